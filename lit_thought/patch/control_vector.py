"""Thought vectors as a llama.cpp control vector: a GGUF file for ``--control-vector``.

llama.cpp adds the tensor ``direction.N`` to the output of block N, counted from 0, at every token. It has no slot for
block 0: its loader refuses ``direction.0`` and keeps the vector of block N at offset (N - 1) d
(``common_control_vector_load_one``), from which ``llama_adapter_cvec::apply`` fills the blocks from 1 on. A block's
output is m + MLP(norm(m)) in pre-norm blocks, so adding a vector to the MLP's output projection is the same.

The keys are those of llama.cpp's own generator and of repeng; llama.cpp reads the tensors alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.errors import PatchError
from lit_thought.model.bare import bare_model
from lit_thought.model.blocks import Site, find_blocks, plain_outputs
from lit_thought.model.loading import model_name, model_place
from lit_thought.patch.change import Change
from lit_thought.patch.gguf_files import gguf_architecture, gguf_writer, import_gguf
from lit_thought.patch.provenance import base_here
from lit_thought.patch.weights import validate

__all__ = ["check_vectors", "read_control_vector", "write_control_vector"]

_ARCHITECTURE = "controlvector"
_FIT = "lit-thought fit --sites mlp_in --parts vector --blocks 1 2 …, all blocks but 0"
"""How to make what fits."""
_DIRECTION = re.compile(r"direction\.([1-9][0-9]*)")


def write_control_vector(
    patch: Change,
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    overwrite: bool = False,
    check: bool = True,
) -> None:
    """Write the thought vectors of ``patch`` as a control vector, complete or not at all.

    The file holds the architecture's name (``controlvector.model_hint``), the number of vectors
    (``controlvector.layer_count``) and, for each, a float32 tensor ``direction.N`` of shape (d,), N the block's index.

    Args:
        patch: vectors at MLP output projections (site ``mlp_out``) of blocks from 1 on, and nothing else.
        path: the file to write, by custom ending in ``.gguf``.
        model: the model that the patch is for, of a family with pre-norm blocks; it is not changed.
        overwrite: allow ``path`` to exist.
        check: refuse a model with another fingerprint than the one the patch was made for.

    Raises:
        PatchError: if the patch holds what a control vector cannot: matrices, vectors elsewhere or at block 0; or if
            it does not fit the model (see ``ThoughtPatch.validate``).
        UnsupportedModelError: if the blocks of ``model`` cannot be told, or are not pre-norm.
        ThoughtError: if ``path`` cannot be written, or the ``gguf`` package is missing.
    """
    model = bare_model(model)
    directions = _directions(patch, model)
    validate(patch, model, check)
    with gguf_writer(path, _ARCHITECTURE, overwrite, model_place(model) or base_here(patch.provenance)) as writer:
        writer.add_string(f"{_ARCHITECTURE}.model_hint", _gguf_name(model))
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for index, vector in sorted(directions.items()):
            writer.add_tensor(f"direction.{index}", vector.numpy())


def read_control_vector(path: str | os.PathLike[str], model: PreTrainedModel) -> Change:
    """Read a control vector, ours or another's, as thought vectors at the MLP output projections of ``model``.

    Args:
        path: the GGUF file.
        model: the model to use it on, of a family with pre-norm blocks; it is not changed.

    Returns:
        A patch of one vector (d,) per ``direction.N``, at block N. Its provenance names the model; the file does not
        tell what it was made from.

    Raises:
        PatchError: if the file is missing, damaged, no control vector, made for another architecture, or does not fit
            the model.
        UnsupportedModelError: if the blocks of ``model`` cannot be told, or are not pre-norm.
        ThoughtError: if the ``gguf`` package is missing.
    """
    gguf = import_gguf()
    model = bare_model(model)
    sites = _sites(model)
    file = Path(path).expanduser()
    if not file.is_file():
        raise PatchError(f"path={str(path)!r} is not a file; expected a control vector in GGUF form.")
    try:
        reader = gguf.GGUFReader(file)
        fields = {key: reader.get_field(key) for key in ("general.architecture", f"{_ARCHITECTURE}.model_hint")}
        kind, hint = (None if field is None else field.contents() for field in fields.values())
        tensors = {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}
    except Exception as error:  # the reader lets whatever a damaged file leads to through
        raise PatchError(f"path={str(path)!r} is not a readable GGUF file ({error}). Copy or save it again.") from error
    if kind != _ARCHITECTURE:
        raise PatchError(f"path={str(path)!r} holds {kind!r}; expected a control vector ({_ARCHITECTURE!r}).")
    if hint is not None and hint not in (model.config.model_type, _gguf_name(model)):
        raise PatchError(
            f"path={str(path)!r} was made for the architecture {hint!r}, the model is {_gguf_name(model)!r}. "
            "Load the model that the control vector was made for."
        )
    if not tensors:
        raise PatchError(f"path={str(path)!r} holds no vector. Copy or save it again.")
    vectors = {}
    for name, (dtype, data) in tensors.items():
        match = _DIRECTION.fullmatch(name)
        site = sites.get(int(match[1])) if match else None
        if site is None:
            raise PatchError(
                f"path={str(path)!r} holds the tensor {name!r}; expected 'direction.N' with N from 1 to "
                f"{len(sites) - 1}, this model's last block. Load the model that the control vector was made for."
            )
        if dtype != gguf.GGMLQuantizationType.F32 or data.shape != (site.d_out,):
            raise PatchError(
                f"path={str(path)!r}: {name!r} is {dtype.name} {data.shape}; expected F32 ({site.d_out},), the "
                "hidden size of this model. Load the model that the control vector was made for."
            )
        vectors[site.path] = torch.from_numpy(data)
    provenance = {
        "model": model_name(model) or None,
        "fan_in_fan_out": any(site.fan_in_fan_out for site in sites.values()),
        "d_in": {site.path: site.d_in for site in sites.values() if site.path in vectors},
    }
    return Change({}, {key: value for key, value in provenance.items() if value}, vectors)


def check_vectors(patch: Change) -> None:
    """Check what needs no model: that the patch is of vectors alone.

    Raises:
        PatchError: if it changes weights.
    """
    if patch.factors:
        raise PatchError(
            f"patch changes {len(patch.factors)} weights, such as {next(iter(patch.factors))!r}; a control vector can "
            f"only add to a block's output. Make a patch of vectors ({_FIT}), export this one with save_adapter, or "
            "only its vectors with patch.only_vectors().save_control_vector(...)."
        )


def _directions(patch: Change, model: PreTrainedModel) -> dict[int, Tensor]:
    """The vectors by block; refuses what a control vector cannot hold."""
    check_vectors(patch)
    blocks = {site.path: index for index, site in _sites(model).items()}
    elsewhere = [path for path in patch.vectors if path not in blocks]
    if elsewhere:
        raise PatchError(
            f"patch has a vector at {elsewhere[0]!r}; a control vector adds to a block's output, which only vectors at "
            "the MLP's output projection do. Fit at the site mlp_out alone, or export with save_adapter for PEFT."
        )
    directions = {blocks[path]: vector for path, vector in patch.vectors.items()}
    if 0 in directions:
        raise PatchError(
            "patch has a vector at block 0, for which llama.cpp's control vectors have no slot. Fit blocks from 1 on "
            f"only ({_FIT}), or export with save_adapter for PEFT."
        )
    return directions


def _sites(model: PreTrainedModel) -> dict[int, Site]:
    """The MLP's output projection of each block."""
    return dict(enumerate(plain_outputs(find_blocks(model))))


def _gguf_name(model: PreTrainedModel) -> str:
    return gguf_architecture(model.config.model_type) or model.config.model_type
