"""Patches for programs that know nothing of this package: an adapter that PEFT, vLLM and llama.cpp's converter all
read, and a merged model. (``export_gguf`` has GGUF adapters, ``control_vector`` control vectors.)
"""

from __future__ import annotations

import copy
import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import PatchError
from lit_thought.files import atomic_folder, check_output_folder
from lit_thought.model.bare import bare_model, check_tokenizer, uncompiled
from lit_thought.model.layers import sits_beside
from lit_thought.model.loading import fingerprint_with, model_place, no_bars
from lit_thought.patch.adapter import write_adapter
from lit_thought.patch.change import Change
from lit_thought.patch.provenance import THOUGHT, thought_text
from lit_thought.patch.weights import applied, apply, check_absent, check_beneath, original_weights, validate

__all__ = ["VLLM_RANKS", "check_matrices_only", "export_adapter", "export_merged"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (``MaxLoRARanks`` in its ``config/lora.py``)."""

_HALVES = (torch.bfloat16, torch.float16)


def export_adapter(
    patch: Change,
    folder: str | os.PathLike[str],
    rank: int | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT adapter that vLLM and llama.cpp's converter read too: one rank of :data:`VLLM_RANKS`, no bias.

    All targets have the same rank, filled up with zeros, and alpha = rank, so that the scale is 1 everywhere. vLLM is
    started with ``--max-lora-rank`` of that rank or more.

    Args:
        patch: changes of weights.
        folder: where; with ``overwrite`` a folder there is replaced as a whole.
        rank: one of :data:`VLLM_RANKS`, at least the patch's rank. None: the smallest such.
        overwrite: allow ``folder`` to exist and hold files.
        dtype: of the stored factors: float32, bfloat16 or float16.

    Raises:
        PatchError: if the patch has vectors, if no such rank is large enough, or if ``dtype`` cannot hold the factors.
        ThoughtError: if ``folder`` cannot be written.
    """
    check_matrices_only(patch)
    write_adapter(patch.padded(_vllm_rank(patch.rank, rank)), folder, overwrite=overwrite, dtype=dtype)


def export_merged(
    patch: Change,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> None:
    """Write the model with the patch in its weights, as safetensors that transformers and any server load.

    ``W + B A`` is computed in float32 (float64 from or to float64 weights) and rounded to the stored dtype; all other
    weights are those of the model. Its provenance is in ``thought.json``. The model itself stays as it is.

    Args:
        patch: what to add. Vectors only at layers that have a bias.
        model: the base, with plain weights; patches that are on it now are written, too.
        folder: where; with ``overwrite`` a folder there is replaced as a whole.
        tokenizer: saved beside the model, if given.
        dtype: of the stored weights; the model's own if None. Another one takes room for a copy of the model
            in float32.
        overwrite: allow ``folder`` to exist and hold files.
        check: refuse a model with another fingerprint than the one the patch was made for. One in half precision passes
            if its weights, as float32, are the ones the patch was made for.

    Raises:
        PatchError: if the patch does not fit the model (see ``ThoughtPatch.validate``) or is on it already, or the
            model cannot hold it.
        ThoughtError: if ``folder`` cannot be written, or is the model's own.
    """
    if dtype not in (None, torch.float64, torch.float32, *_HALVES):
        raise PatchError(
            f"dtype={dtype}; expected a floating-point dtype of 16 bits or more, or None for the model's own."
        )
    model = bare_model(model)
    check_absent(patch, model)  # a copy of the model would not know
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    check_output_folder(folder, overwrite, "folder", model=model_place(model))
    with atomic_folder(folder, overwrite) as out, uncompiled(model), no_bars():
        validate(patch, model, check and not _made_for_float32(patch, model))
        if check:
            check_beneath(patch, model)
        _check_mergeable(patch, model)
        if dtype is None or dtype == model.dtype:
            with applied(patch, model, check=False):
                own = copy.copy(model)  # saving writes to the config
                own.config = copy.deepcopy(model.config)
                own.save_pretrained(out)
        else:
            wide = torch.promote_types(torch.promote_types(model.dtype, dtype), torch.float32)
            merged = copy.deepcopy(model).to(wide)  # type: ignore[arg-type]
            apply(patch, merged, check=False)
            merged.to(dtype)
            _check_finite(merged)
            merged.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        (out / THOUGHT).write_text(thought_text(patch.provenance), encoding="utf-8")


def check_matrices_only(patch: Change) -> None:
    """Refuse thought vectors, which vLLM and llama.cpp cannot read from an adapter.

    Raises:
        PatchError: if there are any; says where they can go.
    """
    if patch.vectors:
        raise PatchError(
            f"patch adds {len(patch.vectors)} thought vectors, such as at {next(iter(patch.vectors))!r}, and vLLM and "
            "llama.cpp read no biases from an adapter. Export patch.only_vectors() as a control vector (format "
            "control-vector: llama.cpp) and patch.without_vectors() as the adapter; or all of it as a merged model "
            "(format merged), where the base has biases there; or use save_adapter, which PEFT alone reads."
        )


def _vllm_rank(needed: int, rank: int | None) -> int:
    """The rank to write; ``needed`` is the patch's."""
    if rank is None:
        enough = [known for known in VLLM_RANKS if known >= needed]
        if not enough:
            raise PatchError(
                f"patch has rank {needed}; vLLM takes at most {VLLM_RANKS[-1]}. Cut it first: "
                f"patch.truncate({VLLM_RANKS[-1]})."
            )
        return enough[0]
    if rank not in VLLM_RANKS:
        raise PatchError(f"rank={rank!r}; vLLM takes one of {VLLM_RANKS}. Leave it out for the smallest that will do.")
    if rank < needed:
        raise PatchError(f"rank={rank} is less than the patch's, {needed}. Cut it first: patch.truncate({rank}).")
    return rank


def _made_for_float32(patch: Change, model: PreTrainedModel) -> bool:
    """Whether a model in half precision is the one that the patch was fitted on in float32, as fits load it."""
    made_for = patch.provenance.get("fingerprint")
    if not made_for or model.dtype not in _HALVES:
        return False
    return bool(fingerprint_with(model, original_weights(model), torch.float32) == made_for)


def _check_finite(model: PreTrainedModel) -> None:
    """Refuse a sum that its dtype has no number for."""
    if not all(bool(torch.isfinite(value).all()) for value in model.parameters()):
        raise PatchError(
            f"dtype={model.dtype} cannot hold the merged model: a value overflows. Pass one of a larger range, "
            "torch.float32 or torch.bfloat16, or scale the patch down."
        )


def _check_mergeable(patch: Change, model: PreTrainedModel) -> None:
    """Refuse layers whose weight cannot hold the sum, and vectors that have no bias to go to."""
    made = [name.removesuffix(".bias") for name, value in original_weights(model).items() if value is None]
    for path in (*patch.targets, *made):
        layer = model.get_submodule(path)
        if sits_beside(layer):
            raise PatchError(
                f"{path!r} is a {type(layer).__name__} whose quantised weight cannot hold the patch. Load the model "
                "with plain weights, or serve the adapter beside it (formats peft and gguf)."
            )
        if path in made or (path in patch.vectors and layer.bias is None):
            raise PatchError(
                f"{path!r} has no bias in this architecture, so transformers would not load the thought vector there. "
                "Use patch.save_adapter for PEFT, or a control vector for llama.cpp."
            )
