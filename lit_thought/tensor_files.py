"""Tensors on disk: safetensors files that are there whole or not at all, and are read with care.

The header keeps texts beside the tensors, and a SHA-256 of them, so that a flipped bit is noticed. The version of a
format stands in the header or in the JSON file of the folder (:func:`~lit_thought.files.check_version`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file

__all__ = ["TensorFile", "tensors_hash", "write_tensors"]

_HASH = "sha256"


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(
    file: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    hashed: Iterable[str] = ("",),
    overwrite: bool = True,
) -> None:
    """Write a file, complete or not at all.

    Args:
        file: where to.
        tensors: by name.
        header: texts to keep with them.
        hashed: beginnings of names; the tensors of each get a hash, with which :meth:`TensorFile.read` checks them.
        overwrite: replace the file if it exists.

    Raises:
        ThoughtError: for a path where no file can be written.
        OSError: naming the path and what to do, where the disk is full or there is no permission.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {f"{prefix}{_HASH}": tensors_hash(_group(plain, prefix)) for prefix in hashed}
    with atomic_file(file, overwrite) as temporary:
        save_file(plain, temporary, {**(header or {}), **hashes})


class TensorFile:
    """A file whose header is read at once, and its tensors when they are asked for.

    Args:
        file: the file.
        name: what a message calls it.
        remedy: what a message says to do.
        error: what to raise.

    Attributes:
        header: the texts that are kept with the tensors.
        shapes: of the tensors, by name.
        dtypes: of the tensors, by name, as safetensors calls them.

    Raises:
        ThoughtError: of the class ``error``, when it is no complete safetensors file.
    """

    def __init__(self, file: Path, name: str, remedy: str, error: type[ThoughtError] = ThoughtError) -> None:
        self.file, self._name, self._remedy, self._error = file, name, remedy, error
        try:
            if not file.is_file():  # a pipe might never end
                raise FileNotFoundError("there is no such file")
            with safe_open(file, framework="pt") as content:  # refuses a truncated file
                self.header: dict[str, str] = content.metadata() or {}
                slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
                self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                self.dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
        except (OSError, SafetensorError) as problem:
            raise self.damaged(f" ({problem}).") from problem

    def damaged(self, problem: str) -> ThoughtError:
        """The error that says what is wrong, after the words "is damaged"."""
        return self._error(f"{self._name} is damaged{problem} {self._remedy}")

    def read(self, prefix: str = "", device: torch.device | str = "cpu", part: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names, out of the file's memory map: they
        are aligned as new tensors are, on which the last bits of products with them depend.

        Args:
            prefix: all tensors when left out.
            device: where to put them.
            part: what a message calls them.

        Raises:
            ThoughtError: of the class ``error``, when they are not those that were written. Files of earlier versions
                keep no hash, and are not checked.
        """
        try:
            with safe_open(self.file, framework="pt") as content:
                found = {key: content.get_tensor(key) for key in self.shapes if key.startswith(prefix)}
        except (OSError, SafetensorError) as problem:
            raise self.damaged(f" ({problem}).") from problem
        tensors, kept = _group(found, prefix), self.header.get(f"{prefix}{_HASH}")
        if kept is not None and tensors_hash(tensors) != kept:
            named = f"{part}: " if part else ""
            raise self.damaged(f": {named}its numbers are not those that were written (their SHA-256 is another).")
        return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
