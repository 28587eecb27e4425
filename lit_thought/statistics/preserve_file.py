"""A model's preservation statistics as one small file: what the cache keeps, what a fit reads, what one can share.

Of each site's mean Gram matrix Z₀ ≈ L Lᵀ + t I (:mod:`lit_thought.solve.nystrom`) the file holds L, (d, k), row i of it
rounded to ``sᵢ`` times 8-bit integers, and t. That is positive semi-definite whatever the rounding, and k bytes a
channel. A solve reads it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file, expanded, parse_json
from lit_thought.model.blocks import JOINT
from lit_thought.settings import SITES
from lit_thought.solve.least_squares import Prior
from lit_thought.tensor_files import TensorFile, write_tensors

__all__ = ["FORMAT", "Preservation", "check_suffix", "config_hash", "is_preservation_file", "rounded"]

FORMAT = 2
"""Of the file, and of how what it holds is computed: either changes it."""
_METADATA = "lit_thought_preservation"
_PARTS = ("factor", "scale", "rest")
_DTYPES = {"factor": "I8", "scale": "F32", "rest": "F32"}
_TEXTS = ("model", "fingerprint", "config", "dtype", "windows")


def is_preservation_file(source: Any) -> bool:
    """Whether what was given to preserve is such a file rather than text: its suffix says so."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".safetensors"


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 of a model's configuration, the same wherever it is loaded."""
    config = model.config.to_dict()
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"):
        config.pop(name, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def check_suffix(path: str | os.PathLike[str], argument: str) -> None:
    """Check that what is written to ``path`` can be told from text later.

    Raises:
        ThoughtError: when it has another suffix.
    """
    if not is_preservation_file(path):
        raise ThoughtError(f"{argument}={str(path)!r} must end in .safetensors: a fit tells it from a text by that.")


def rounded(prior: Prior) -> dict[str, Tensor]:
    """What the file holds of one site.

    Args:
        prior: L, (d, k), and t, one number.

    Returns:
        factor, (d, k), int8; scale, (d,), and rest, (), float32.
    """
    scale = (prior.factor.abs().amax(1) / 127).float()
    rows = prior.factor / scale.double().where(scale > 0, 1.0).unsqueeze(1)
    # float32 rounds the scale, so that an entry can be a hair above 127
    return {"factor": rows.round().clamp(-127, 127).to(torch.int8), "scale": scale, "rest": prior.rest.float()}


class Preservation:
    """A file of preservation statistics: its manifest is read at once, its matrices when they are asked for.

    Args:
        path: the file.
        device: where :meth:`prior` puts its tensors.
        argument: what a message calls the file.

    Attributes:
        path: the file.
        manifest: which statistics these are: model, fingerprint, configuration, dtype, tokens and windows of the text,
            number of blocks, sites of each block, and directions.
        sites: the sites of each block.
        sizes: of each block, its sites with their d_in.

    Raises:
        ThoughtError: when it cannot be read, is damaged, or is something else.
    """

    def __init__(
        self, path: str | os.PathLike[str], device: torch.device | str = "cpu", argument: str = "path"
    ) -> None:
        self.path, self.device, self._name = expanded(path, argument), device, f"{argument}={str(path)!r}"
        try:
            self._content = TensorFile(self.path, self._name, "Get it anew.")
        except ThoughtError as error:
            raise ThoughtError(
                f"{self._name} cannot be read as a file of preservation statistics ({error.__cause__ or error}). Get "
                "it anew, or write one with lit-thought preserve."
            ) from error
        shapes, dtypes = self._content.shapes, self._content.dtypes
        if _METADATA not in self._content.header:
            raise ThoughtError(
                f"{self._name} is a safetensors file without preservation statistics. Give one that lit-thought "
                "preserve wrote, or a text file with another suffix."
            )
        try:
            self.manifest = _checked(parse_json(self._content.header[_METADATA]), shapes, dtypes)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ThoughtError(
                f"{self._name} is damaged or of another version: {error}. Write it anew: lit-thought preserve MODEL "
                f"--out {self.path.name} --overwrite."
            ) from error
        self._parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.sites: list[list[str]] = self.manifest["sites"]
        self.sizes = [
            {site: shapes[_key(block, site, "scale")][0] for site in there} for block, there in enumerate(self.sites)
        ]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        priors: Mapping[tuple[int, str], Mapping[str, Tensor]],
        overwrite: bool = False,
    ) -> None:
        """Write what :func:`rounded` gives of all sites, by block and site, under ``manifest``."""
        tensors = {_key(block, site, part): parts[part] for (block, site), parts in priors.items() for part in _PARTS}
        header = {_METADATA: json.dumps(dict(manifest), sort_keys=True)}
        write_tensors(path, tensors, header, [_key(block, site, "") for block, site in priors], overwrite)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Copy them to a file of one's own, for ``preserve=`` of a fit on another machine.

        Args:
            path: the file; its suffix must be ``.safetensors``.
            overwrite: replace the file if it exists.

        Raises:
            ThoughtError: for a path that cannot be written.
        """
        check_suffix(path, "path")
        with atomic_file(path, overwrite) as file:
            file.write_bytes(self.path.read_bytes())

    def prior(self, block: int, site: str) -> Prior:
        """Z₀ of one site: the mean of a aᵀ over the unrelated tokens, L float64.

        Raises:
            ThoughtError: when the file is damaged or gone, or its numbers are not those of a Gram matrix.
        """
        parts = self._parts.get((block, site)) or self._read(block, site)
        factor = parts["factor"].double() * parts["scale"].double().unsqueeze(1)
        return Prior(factor, parts["rest"].double())

    def _read(self, block: int, site: str) -> dict[str, Tensor]:
        """What the file holds of one site, checked."""
        parts = self._content.read(_key(block, site, ""), self.device, f"block {block}, {site}")
        if parts.keys() != set(_PARTS):
            raise ThoughtError(f"{self._name} has no {site} of block {block}. Get it anew.")
        if not bool(parts["scale"].isfinite().all()) or not 0 <= float(parts["rest"]) < float("inf"):
            raise ThoughtError(f"{self._name} is damaged: block {block}, {site} is no Gram matrix. Get it anew.")
        return parts

    def check_numbers(self) -> None:
        """Read all of it, once and for all: :meth:`prior` takes it from memory, k bytes a channel.

        Raises:
            ThoughtError: when a number is not what was written, or a matrix is none of a Gram matrix.
        """
        for block, there in enumerate(self.sites):
            for site in there:
                self._parts[block, site] = self._read(block, site)

    def check_model(self, fingerprint: str, model: PreTrainedModel | None = None) -> None:
        """Refuse another model than the statistics' own.

        Raises:
            ThoughtError: saying what differs.
        """
        mine = self.manifest
        name = f"{self._name} has the preservation statistics of {mine['model'] or 'another model'!r}"
        remedy = "Write a file for this model with lit-thought preserve."
        if model is not None and str(model.dtype) != mine["dtype"]:
            raise ThoughtError(f"{name} in {mine['dtype']}; the model is in {model.dtype}. Load it so, or: {remedy}")
        if fingerprint != mine["fingerprint"]:
            raise ThoughtError(f"{name}, whose weights are not the model's. {remedy}")
        if model is not None and config_hash(model) != mine["config"]:
            raise ThoughtError(f"{name}: the same weights, but another configuration. {remedy}")

    def check_sites(self, needed: Sequence[Mapping[str, int]]) -> None:
        """Refuse a fit at sites that the file does not hold, or holds in another size.

        Args:
            needed: of each block, the sites with their d_in.

        Raises:
            ThoughtError: naming them.
        """
        if len(needed) != len(self.sites):
            raise ThoughtError(f"{self._name} has {len(self.sites)} blocks; the model has {len(needed)}. Get it anew.")
        for block, (wanted, there) in enumerate(zip(needed, self.sites, strict=True)):
            lacking = [site for site in wanted if site not in there]
            if lacking:
                raise ThoughtError(
                    f"{self._name} has the sites {there} of block {block}; the fit needs {lacking}, too. Write a file "
                    "with them: lit-thought preserve --sites."
                )
            for site, d_in in wanted.items():
                found = self.sizes[block][site]
                if found != d_in:
                    raise ThoughtError(
                        f"{self._name}: block {block}, {site} has {found} inputs, not {d_in}. Get it anew."
                    )


def _key(block: int, site: str, part: str) -> str:
    return f"{block}.{site}.{part}"


def _checked(manifest: Any, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """The manifest, if it is one and the tensors are those that it speaks of.

    Raises:
        KeyError, TypeError, ValueError: if not.
    """
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    if not all(isinstance(manifest[name], str) for name in _TEXTS):
        raise ValueError("a name in its manifest is no text")
    sites, directions = manifest["sites"], manifest["directions"]
    if any(type(manifest[name]) is not int for name in ("tokens", "blocks")) or len(sites) != manifest["blocks"]:
        raise ValueError("its numbers of tokens or blocks are wrong")
    if type(directions) is not int or directions < 1:
        raise ValueError(f"its number of directions is {directions!r}")
    if not isinstance(sites, list) or not all(isinstance(there, list) for there in sites):
        raise ValueError("its sites are not lists of names")
    names = [(block, site) for block, there in enumerate(sites) for site in there]
    if not all(site in (*SITES, JOINT) for _, site in names):
        raise ValueError("it names an unknown site")
    if shapes.keys() != {_key(block, site, part) for block, site in names for part in _PARTS}:
        raise ValueError("its matrices are not those that it names")
    wrong = [name for name, dtype in dtypes.items() if dtype != _DTYPES[name.rpartition(".")[2]]]
    if wrong:
        raise ValueError(f"{wrong[0]} is of the dtype {dtypes[wrong[0]]}")
    for block, site in names:
        factor, (size,), rest = (shapes[_key(block, site, part)] for part in _PARTS)
        if factor != (size, min(size, directions)) or rest != ():
            raise ValueError(f"block {block}, {site} has a wrong size")
    return dict(manifest)
