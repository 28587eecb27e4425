"""The patch as a PEFT LoRA adapter: a folder that PEFT, vLLM and llama.cpp read without this package.

Written with one uniform rank (zero rows and columns fill the smaller ones) and alpha = rank, so that the
scale is 1 everywhere; vLLM and llama.cpp know nothing else. Reading accepts other plain LoRA adapters too.

Thought vectors become PEFT's ``lora_bias``: every target then has a ``lora_B.bias``, zero where it has no vector.
PEFT alone reads it; vLLM and llama.cpp refuse the adapter. PEFT can merge it only where the base layer has a bias
(GPT-2): on others (Llama, Qwen) ``merge_and_unload`` raises a RuntimeError, without ``safe_merge=True`` only after it
has changed the weight. There keep the adapter apart, as ``PeftModel`` does, and do not merge.
"""

from __future__ import annotations

import math
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_thought.errors import PatchError
from lit_thought.files import atomic_folder, check_output_folder, expanded, is_own_file
from lit_thought.patch.card import CARD, model_card
from lit_thought.patch.change import Change, checked_factors, checked_vector
from lit_thought.patch.provenance import THOUGHT, base_here, json_text, read_object, read_provenance, thought_text
from lit_thought.solve.factors import Factors

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["CONFIG", "WEIGHTS", "read_adapter", "to_peft", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAMES = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
"""Of each target's tensors; the last with ``lora_bias`` only."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEY = re.compile(rf"base_model\.model\.(?P<path>.+)\.(?P<name>{'|'.join(map(re.escape, _NAMES))})")
# LoRA options that change what the adapter computes: each must be off, or B A is not the change
_UNSUPPORTED = """
    use_dora use_qalora use_bdlora modules_to_save rank_pattern alpha_pattern layer_replication
    trainable_token_indices alora_invocation_tokens megatron_config velora_config
    monteclora_config arrow_config kasa_config
""".split()  # noqa: SIM905
_HUGE = sys.float_info.max
# initialisations that leave the base weights as they are
_PLAIN_INIT = ("gaussian", "eva", "orthogonal")


def to_peft(patch: Change) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter's config and weights (float32): ``A`` (rank, d_in), ``B`` (d_out, rank).

    With vectors, ``lora_bias`` is on and every target also has a bias (d_out,); one with only a vector has zero
    factors. Layers that PEFT would take for fused experts by their name (see ``_is_claimed``) are named as
    ``target_parameters``; their tensors are the same.

    Raises:
        PatchError: if vectors stand beside such layers; if a target has only a vector, and the provenance's ``d_in``
            does not give its number of inputs.
    """
    from peft import LoraConfig, TaskType

    rank = max(patch.rank, 1)
    known = patch.provenance
    claimed = [path for path in patch.targets if _is_claimed(path, known.get("model_type"))]
    if claimed and patch.vectors:
        raise PatchError(
            f"{claimed[0]!r}: PEFT cannot hold vectors beside this layer of a mixture of experts. Save "
            "patch.without_vectors() and patch.only_vectors() apart, or fit without vectors."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        lora_bias=bool(patch.vectors),
        target_modules=[path for path in patch.targets if path not in claimed],
        target_parameters=[f"{path}.weight" for path in claimed] or None,
        fan_in_fan_out=bool(known.get("fan_in_fan_out", False)),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=known.get("base_model") or known.get("model") or None,
        inference_mode=True,
    )
    state: dict[str, Tensor] = {}
    for path in patch.targets:
        factors = patch.factors[path] if path in patch.factors else _no_factors(patch, path)
        wide = factors.padded(rank)
        state[f"base_model.model.{path}.lora_A.weight"] = wide.A
        state[f"base_model.model.{path}.lora_B.weight"] = wide.B
        if patch.vectors:
            state[f"base_model.model.{path}.lora_B.bias"] = patch.vectors.get(path, torch.zeros(len(wide.B))).clone()
    return config, state


def _is_claimed(path: str, model_type: Any) -> bool:
    """Whether PEFT takes a target for one of the fused experts: in some families (Qwen MoE, DeepSeek, GLM 4 MoE) it
    rewrites every ``…down_proj``, that of dense blocks and shared experts too, and then drops its weights."""
    try:
        conversion: Any = import_module("peft.utils.transformers_weight_conversion")
        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type or "")
        names = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern or "", {})
    except (ImportError, AttributeError):  # a PEFT that does not rewrite targets
        return False
    return path.rpartition(".")[2] in names


def _no_factors(patch: Change, path: str) -> Factors:
    """Zero factors of rank 1 for a target that has only a vector."""
    d_in = patch.provenance.get("d_in", {}).get(path)
    if d_in is None:
        raise PatchError(
            f"{path!r} has only a vector, and PEFT wants a matrix too, whose number of inputs is not known. Say it in "
            f"the provenance: ThoughtPatch(..., provenance={{'d_in': {{{path!r}: inputs of the layer}}}})."
        )
    return Factors(torch.zeros(1, d_in), torch.zeros(len(patch.vectors[path]), 1))


def write_adapter(
    patch: Change,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter folder, complete or not at all.

    Args:
        patch: what to write.
        folder: where; with ``overwrite`` a folder there is replaced as a whole.
        overwrite: allow ``folder`` to exist and hold files.
        dtype: of the stored factors and vectors: float32, bfloat16 or float16.

    Raises:
        PatchError: if ``dtype`` cannot hold them, or if the inputs of a target are not known (see ``to_peft``).
        ThoughtError: if ``folder`` cannot be written, or is that of the model that the patch was made for.
    """
    if dtype not in _DTYPES:
        raise PatchError(f"dtype={dtype}; expected one of {[str(known) for known in _DTYPES]}.")
    check_output_folder(folder, overwrite, model=base_here(patch.provenance))
    config, state = to_peft(patch)
    state = {key: value.to(dtype) for key, value in state.items()}
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise PatchError(f"dtype={dtype} cannot hold {key!r}: a value overflows. Use torch.float32.")
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    with atomic_folder(folder, overwrite) as out:
        save_file(state, out / WEIGHTS, metadata={"format": "pt"})
        (out / CONFIG).write_text(json_text(settings), encoding="utf-8")
        (out / THOUGHT).write_text(thought_text(patch.provenance), encoding="utf-8")
        (out / CARD).write_text(model_card(patch), encoding="utf-8")


def read_adapter(folder: str | os.PathLike[str], argument: str = "path") -> Change:
    """Read an adapter folder, ours or any plain LoRA adapter, and check all of it; messages call it ``argument``.

    A scale alpha / rank (or alpha / √rank: rank-stabilised LoRA) other than 1 goes into ``B`` and, as in PEFT, into
    the vector; padding of the rank with zeros is dropped, and so are zero vectors, and zero factors beside a vector.
    Without a ``thought.json`` the provenance holds only what the config knows.

    Raises:
        PatchError: if a file is missing or damaged, if the config asks for more than plain LoRA (with or without
            ``lora_bias``), or if the tensors do not match the config.
    """
    path = expanded(folder, argument)
    if not path.is_dir():
        hub = " For one on the hub, use ThoughtPatch.from_pretrained." if argument == "path" else ""
        wanted = f"expected an adapter that save_adapter wrote.{hub}"
        raise PatchError(f"{argument}={str(folder)!r} is not a folder; {wanted}")
    config = read_object(path / CONFIG)
    rank, scale, targets = _check_config(config)
    names = _NAMES if config.get("lora_bias") else _NAMES[:2]
    provenance = read_provenance(path)
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    d_in: dict[str, int] = {}
    for target, found in _group(_read_tensors(path / WEIGHTS), targets, names, provenance is not None).items():
        a, b = found["lora_A.weight"], found["lora_B.weight"]
        change = _factors(target, a, b, rank, scale)
        vector = _vector(target, found["lora_B.bias"], len(b), scale) if "lora_B.bias" in found else None
        if vector is not None:
            vectors[target] = vector
        if vector is None or change.A.any() or change.B.any():
            factors[target] = change
        else:
            d_in[target] = a.shape[1]
    if provenance is None:
        known = {
            "base_model": config.get("base_model_name_or_path"),
            "fan_in_fan_out": config.get("fan_in_fan_out"),
        }
        provenance = {key: value for key, value in known.items() if value}
    if d_in:
        provenance = {"d_in": d_in, **provenance}
    return Change(factors, provenance, vectors)


def _check_config(config: dict[str, Any]) -> tuple[int, float, list[str] | str]:
    """Rank, scale and targets of a plain LoRA config; everything else is refused."""
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
            f"{CONFIG} asks for {asked}; only plain LoRA (one rank and alpha, no trained base biases "
            "or further modules) can be read. Load this adapter with peft.PeftModel.from_pretrained."
        )
    modules = config.get("target_modules")
    if not _are_targets(modules):
        raise PatchError(f"{CONFIG}: target_modules is {modules!r}; expected a list of names or one pattern.")
    targets = _targets(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 2**31:
        raise PatchError(f"{CONFIG}: r is {rank!r}; expected a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not -_HUGE <= alpha <= _HUGE:
        raise PatchError(f"{CONFIG}: lora_alpha is {alpha!r}; expected a finite number.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), targets


def _targets(config: dict[str, Any]) -> list[str] | str:
    """The layers that a config names: its modules, and those whose weight it names as a parameter."""
    modules: list[str] | str = config["target_modules"]
    parameters = config.get("target_parameters") or []
    if not parameters:
        return modules
    named = parameters if isinstance(parameters, list) else [None]
    paths = [name.removesuffix(".weight") for name in named if isinstance(name, str) and name.endswith(".weight")]
    if len(paths) < len(named) or not isinstance(modules, list):
        raise PatchError(
            f"{CONFIG} asks for target_parameters={parameters!r}; only the weights of linear layers can be read. Load "
            "this adapter with peft.PeftModel.from_pretrained."
        )
    return [*modules, *paths]


def _group(
    tensors: dict[str, Tensor], targets: Any, names: tuple[str, ...], ours: bool
) -> dict[str, dict[str, Tensor]]:
    """Each target's tensors by name; every target has all ``names``, and nothing is left over.

    Of an adapter of ours all targets are there; PEFT takes lists of names some of which the model lacks.
    """
    found: dict[str, dict[str, Tensor]] = {}
    surplus = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in names or not _is_target(match["path"], targets):
            surplus.append(key)
        else:
            found.setdefault(match["path"], {})[match["name"]] = value
    if surplus:
        raise PatchError(
            f"{WEIGHTS} holds {len(surplus)} tensors that {CONFIG} does not account for, such as "
            f"{surplus[0]!r}. The folder mixes two adapters, or it is not plain LoRA."
        )
    missing = [f"base_model.model.{path}.{name}" for path, own in found.items() for name in names if name not in own]
    if ours and isinstance(targets, list):
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
        except (re.error, OverflowError, RecursionError):
            return False
        return True
    return isinstance(targets, list) and all(isinstance(name, str) for name in targets)


def _factors(path: str, a: Tensor, b: Tensor, rank: int, scale: float) -> Factors:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise PatchError(
            f"{WEIGHTS}: {path!r} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; expected "
            f"({rank}, inputs) and (outputs, {rank}), since r={rank}. The folder mixes two adapters."
        )
    _check_floating(path, a, b)
    a, b = a.float(), b.float() * scale
    used = (a.ne(0).any(dim=1) | b.ne(0).any(dim=0)).nonzero()
    kept = int(used[-1]) + 1 if len(used) else 1
    try:
        return checked_factors(Factors(a[:kept], b[:, :kept]))
    except PatchError as error:
        raise PatchError(f"{WEIGHTS}: {path!r}: {error} Save or copy the adapter again.") from error


def _check_floating(path: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise PatchError(f"{WEIGHTS}: {path!r} has a tensor of {tensor.dtype}; expected floating-point numbers.")


def _vector(path: str, bias: Tensor, d_out: int, scale: float) -> Tensor | None:
    """The thought vector (d_out,) of a ``lora_B.bias``, scaled as PEFT does; None where it is zero."""
    if bias.shape != (d_out,):
        raise PatchError(
            f"{WEIGHTS}: {path!r} has a lora_B.bias {tuple(bias.shape)}; expected ({d_out},), its number of outputs. "
            "The folder mixes two adapters."
        )
    _check_floating(path, bias)
    vector = bias.float() * scale
    if not vector.any():
        return None
    try:
        return checked_vector(path, vector)
    except PatchError as error:
        raise PatchError(f"{WEIGHTS}: {error} Save or copy the adapter again.") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not is_own_file(file):
        pickled = file.with_suffix(".bin").name if file.with_name("adapter_model.bin").is_file() else None
        why = f"; {pickled} is a pickle, which could run code: convert it with PEFT first" if pickled else " of its own"
        raise PatchError(f"{file.parent.name!r} has no {WEIGHTS}{why}. Expected a folder that save_adapter wrote.")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors' own error is not a subclass of anything narrower
        raise PatchError(f"{WEIGHTS} in {file.parent.name!r} is damaged ({error}). Copy or save it again.") from error
    return tensors
