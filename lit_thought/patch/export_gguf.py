"""The patch as a GGUF LoRA adapter: a file for llama.cpp's ``--lora``.

As ``convert_lora_to_gguf.py`` writes it and ``llama-adapter.cpp`` reads it: for each target ``blk.N.<layer>.weight``,
the matrix ``A`` (rank, d_in) as ``….lora_a`` and ``B`` (d_out, rank) as ``….lora_b``, row by row. llama.cpp multiplies
``B A`` by alpha / rank, where the rank is that of each pair of tensors and alpha one number for all: so all have one
rank here, filled up with zeros, and alpha is that rank.

llama.cpp stores output projections and the MLP's layers as transformers has them (GPT-2's transposed weights turned
round: as any other layer, as ``A`` and ``B`` are here). It reorders the rows of queries and keys in some families, and
fuses them in others; no fit changes them, and adapters that do are refused.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor

from lit_thought.errors import PatchError, UnsupportedModelError
from lit_thought.patch.change import Change
from lit_thought.patch.export import check_matrices_only
from lit_thought.patch.gguf_files import gguf_architecture, gguf_writer, import_gguf
from lit_thought.patch.provenance import base_here, public_name

__all__ = ["export_gguf"]

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SCALED = ("falcon-h1",)
_LAYERS = ("ATTN_OUT", "FFN_DOWN", "FFN_UP", "FFN_GATE", "FFN_DOWN_SHEXP", "FFN_UP_SHEXP", "FFN_GATE_SHEXP")
"""Names in ``gguf.MODEL_TENSOR`` of the layers that llama.cpp stores as they are."""


def export_gguf(
    patch: Change,
    path: str | os.PathLike[str],
    model_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write the patch as a GGUF LoRA adapter, complete or not at all.

    Args:
        patch: changes of output projections and MLP layers.
        path: the file to write, by custom ending in ``.gguf``.
        model_type: the base's ``config.model_type``, such as ``"llama"``. None: what the patch's provenance says.
        dtype: of the stored factors: float32, float16 or bfloat16.
        overwrite: allow ``path`` to exist.

    Raises:
        PatchError: if the patch has vectors, changes a layer that llama.cpp stores otherwise, does not say its
            ``model_type``, or if ``dtype`` cannot hold it.
        UnsupportedModelError: if the ``gguf`` package does not know the architecture, or has no name for a layer.
        ThoughtError: if ``path`` cannot be written, or the ``gguf`` package is missing.
    """
    check_matrices_only(patch)
    if dtype not in _TYPES:
        raise PatchError(f"dtype={dtype}; expected one of {[str(known) for known in _TYPES]}.")
    gguf = import_gguf()
    architecture = _architecture(patch, model_type)
    names = _tensor_names(patch, architecture)
    kind = getattr(gguf.GGMLQuantizationType, _TYPES[dtype])
    tensors = {
        f"{names[target]}.weight.{name}": _stored(gguf, target, matrix, dtype, kind)
        for target, value in patch.padded(patch.rank).factors.items()
        for name, matrix in (("lora_a", value.A), ("lora_b", value.B))
    }
    with gguf_writer(path, architecture, overwrite, base_here(patch.provenance)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        base = patch.provenance.get("base_model") or patch.provenance.get("model")
        if base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, public_name(str(base)))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(patch.rank))
        for name, data in tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)


def _architecture(patch: Change, model_type: str | None) -> str:
    given = model_type or patch.provenance.get("model_type")
    if not given:
        raise PatchError(
            "patch does not say which architecture it is for. Pass model_type, the base model's config.model_type, "
            "such as 'llama'."
        )
    architecture = gguf_architecture(str(given))
    if architecture in _SCALED:
        raise UnsupportedModelError(
            f"model_type={given!r}: llama.cpp stores its layers scaled. Convert the adapter with llama.cpp's "
            "convert_lora_to_gguf.py, or export a merged model."
        )
    if architecture is None:
        raise UnsupportedModelError(
            f"model_type={given!r}: the gguf package knows no such architecture, so llama.cpp cannot run the base "
            "either. Serve the adapter with PEFT or vLLM, or try a newer gguf (pip install -U gguf)."
        )
    return architecture


def _tensor_names(patch: Change, architecture: str) -> dict[str, str]:
    """llama.cpp's name of each target, such as ``blk.0.ffn_down``."""
    gguf = import_gguf()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, 1)
    stored = [getattr(gguf.MODEL_TENSOR, name) for name in _LAYERS]
    names = {}
    for path in patch.targets:
        # the table of one block names those of all
        first = re.sub(r"\.\d+\.", ".0.", path.replace("language_model.", ""), count=1)
        found = table.get_type_and_name(first)
        if found is None:
            raise UnsupportedModelError(
                f"{path!r}: the gguf package has no name for it in the architecture {architecture!r}. Serve the "
                "adapter with PEFT or vLLM, or export a merged model."
            )
        if found[0] not in stored:
            raise PatchError(
                f"{path!r} is neither an output projection nor a layer of the MLP, and llama.cpp may store it in "
                "another order. Convert this adapter with llama.cpp's convert_lora_to_gguf.py."
            )
        block = re.search(r"\.(\d+)\.", path)
        names[path] = found[1] if block is None else found[1].replace(".0.", f".{block[1]}.", 1)
    return names


def _stored(gguf: Any, path: str, matrix: Tensor, dtype: torch.dtype, kind: Any) -> Any:
    """The matrix as an array of the bytes that go to the file."""
    if not bool(torch.isfinite(matrix.to(dtype)).all()):
        raise PatchError(f"dtype={dtype} cannot hold the factors of {path!r}: a value overflows. Use torch.float32.")
    return gguf.quants.quantize(matrix.numpy(), kind)
