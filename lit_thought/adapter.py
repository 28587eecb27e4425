"""The patch as a PEFT LoRA adapter: a folder that PEFT, vLLM and llama.cpp read without this package.

Written with one uniform rank (zero rows and columns fill the smaller ones) and alpha = rank, so that the
scale is 1 everywhere; vLLM and llama.cpp know nothing else. Reading accepts other plain LoRA adapters too.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_thought.card import model_card
from lit_thought.errors import PatchError
from lit_thought.files import atomic_folder
from lit_thought.patch import ThoughtPatch
from lit_thought.weights import Factors

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["FORMAT_VERSION", "read_adapter", "to_peft", "write_adapter"]

FORMAT_VERSION = 1
"""Of ``thought.json``; rises when an older reader would misread the file."""

CONFIG, WEIGHTS, THOUGHT, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "thought.json",
    "README.md",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<side>lora_[AB])\.weight")
# LoRA options that change what the adapter computes: each must be off, or B A is not the change
_UNSUPPORTED = """
    use_dora use_qalora use_bdlora lora_bias modules_to_save rank_pattern alpha_pattern layer_replication
    target_parameters trainable_token_indices alora_invocation_tokens megatron_config velora_config
    monteclora_config arrow_config kasa_config
""".split()  # noqa: SIM905
# initialisations that leave the base weights as they are
_PLAIN_INIT = ("gaussian", "eva", "orthogonal")


def to_peft(patch: ThoughtPatch) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter's config and weights (float32): ``A`` (rank, d_in), ``B`` (d_out, rank)."""
    from peft import LoraConfig, TaskType

    rank = patch.rank
    known = patch.provenance
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(patch.targets),
        fan_in_fan_out=bool(known.get("fan_in_fan_out", False)),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=known.get("base_model") or known.get("model") or None,
        inference_mode=True,
    )
    state: dict[str, Tensor] = {}
    for path, factors in patch.factors.items():
        missing = rank - factors.rank
        a = torch.cat([factors.A, factors.A.new_zeros(missing, factors.A.shape[1])])
        b = torch.cat([factors.B, factors.B.new_zeros(factors.B.shape[0], missing)], dim=1)
        state[f"base_model.model.{path}.lora_A.weight"] = a
        state[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    return config, state


def write_adapter(
    patch: ThoughtPatch,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter folder, complete or not at all.

    Args:
        patch: what to write.
        folder: where; with ``overwrite`` a folder there is replaced as a whole.
        overwrite: allow ``folder`` to exist and hold files.
        dtype: of the stored factors: float32, bfloat16 or float16.

    Raises:
        PatchError: if ``dtype`` cannot hold the factors.
        ThoughtError: if ``folder`` cannot be written.
    """
    if dtype not in _DTYPES:
        raise PatchError(f"dtype={dtype}; expected one of {[str(known) for known in _DTYPES]}.")
    config, state = to_peft(patch)
    state = {key: value.to(dtype) for key, value in state.items()}
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise PatchError(f"dtype={dtype} cannot hold {key!r}: a value overflows. Use torch.float32.")
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    thought = {"format_version": FORMAT_VERSION, "provenance": patch.provenance}
    with atomic_folder(folder, overwrite) as out:
        save_file(state, out / WEIGHTS, metadata={"format": "pt"})
        _write_json(out / CONFIG, settings)
        _write_json(out / THOUGHT, thought)
        (out / CARD).write_text(model_card(patch), encoding="utf-8")


def read_adapter(folder: str | os.PathLike[str]) -> ThoughtPatch:
    """Read an adapter folder, ours or any plain LoRA adapter, and check all of it.

    A scale alpha / rank (or alpha / √rank: rank-stabilised LoRA) other than 1 goes into ``B``; padding of the
    rank with zeros is dropped. Without a ``thought.json`` the provenance holds only what the config knows.

    Raises:
        PatchError: if a file is missing or damaged, if the config asks for more than plain LoRA, or if the
            tensors do not match the config.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise PatchError(f"path={str(folder)!r} is not a folder; expected an adapter that save_adapter wrote.")
    config = _read_json(path / CONFIG)
    rank, scale = _check_config(config)
    tensors = _read_tensors(path / WEIGHTS)
    factors = {
        target: _factors(target, sides["lora_A"], sides["lora_B"], rank, scale)
        for target, sides in _pair_up(tensors, config.get("target_modules")).items()
    }
    provenance = _read_provenance(path / THOUGHT)
    if provenance is None:
        known = {
            "base_model": config.get("base_model_name_or_path"),
            "fan_in_fan_out": config.get("fan_in_fan_out"),
        }
        provenance = {key: value for key, value in known.items() if value}
    return ThoughtPatch(factors, provenance)


def _check_config(config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scale of a plain LoRA config; everything else is refused."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PatchError(f"{CONFIG}: peft_type is {kind!r}; only plain LoRA adapters ('LORA') can be read.")
    bad = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        bad.append("bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_INIT:
        bad.append("init_lora_weights")  # such as PiSSA: the adapter belongs to changed base weights
    if bad:
        asked = ", ".join(f"{name}={config[name]!r}" for name in bad)
        raise PatchError(
            f"{CONFIG} asks for {asked}; only plain LoRA (one rank and alpha, no bias, no further trained "
            "modules) can be read. Load this adapter with peft.PeftModel.from_pretrained."
        )
    targets = config.get("target_modules")
    if not _are_targets(targets):
        raise PatchError(f"{CONFIG}: target_modules is {targets!r}; expected a list of names or one pattern.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PatchError(f"{CONFIG}: r is {rank!r}; expected a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise PatchError(f"{CONFIG}: lora_alpha is {alpha!r}; expected a finite number.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pair_up(tensors: dict[str, Tensor], targets: Any) -> dict[str, dict[str, Tensor]]:
    """Each module's ``lora_A`` and ``lora_B``; every target has both, and nothing is left over."""
    found: dict[str, dict[str, Tensor]] = {}
    surplus = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or not _is_target(match["path"], targets):
            surplus.append(key)
        else:
            found.setdefault(match["path"], {})[match["side"]] = value
    if surplus:
        raise PatchError(
            f"{WEIGHTS} holds {len(surplus)} tensors that {CONFIG} does not account for, such as "
            f"{surplus[0]!r}. The folder mixes two adapters, or it is not plain LoRA."
        )
    missing = [
        f"base_model.model.{path}.{side}.weight"
        for path, sides in found.items()
        for side in ("lora_A", "lora_B")
        if side not in sides
    ]
    if isinstance(targets, list):
        missing += [name for name in targets if not any(_is_target(path, [name]) for path in found)]
    if missing or not found:
        raise PatchError(
            f"{WEIGHTS} lacks {len(missing) or 'all'} of the tensors that {CONFIG} names: "
            f"{sorted(missing)[:4]}. The folder is incomplete; copy or save it again."
        )
    return found


def _is_target(path: str, targets: Any) -> bool:
    """PEFT's rule: a list holds full paths or their endings, a string is a pattern for the full path."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def _are_targets(targets: Any) -> bool:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error:
            return False
        return True
    return isinstance(targets, list) and all(isinstance(name, str) for name in targets)


def _factors(path: str, a: Tensor, b: Tensor, rank: int, scale: float) -> Factors:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise PatchError(
            f"{WEIGHTS}: {path!r} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; expected "
            f"({rank}, inputs) and (outputs, {rank}), since r={rank}. The folder mixes two adapters."
        )
    a, b = a.float(), b.float() * scale
    used = (a.ne(0).any(dim=1) | b.ne(0).any(dim=0)).nonzero()
    kept = int(used[-1]) + 1 if len(used) else 1
    try:
        return Factors(a[:kept], b[:, :kept])
    except PatchError as error:
        raise PatchError(f"{WEIGHTS}: {path!r}: {error} Save or copy the adapter again.") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickled = file.with_suffix(".bin").name if file.with_name("adapter_model.bin").is_file() else None
        why = f"; {pickled} is a pickle, which could run code: convert it with PEFT first" if pickled else ""
        raise PatchError(f"{file.parent.name!r} has no {WEIGHTS}{why}. Expected a folder that save_adapter wrote.")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors' own error is not a subclass of anything narrower
        raise PatchError(f"{WEIGHTS} in {file.parent.name!r} is damaged ({error}). Copy or save it again.") from error
    return tensors


def _read_provenance(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    thought = _read_json(file)
    version = thought.get("format_version")
    if version != FORMAT_VERSION:
        raise PatchError(
            f"{THOUGHT}: format_version is {version!r}, this lit_thought reads {FORMAT_VERSION}. Upgrade "
            "lit-thought, or delete the file to read the weights without their history."
        )
    provenance = thought.get("provenance", {})
    if not isinstance(provenance, dict):
        raise PatchError(f"{THOUGHT}: provenance is a {type(provenance).__name__}; expected an object.")
    return provenance


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PatchError(f"{file.parent.name!r} has no {file.name}. Expected a folder that save_adapter wrote.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise PatchError(f"{file.name} in {file.parent.name!r} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise PatchError(f"{file.name} in {file.parent.name!r} holds a {type(value).__name__}; expected an object.")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
