"""Whether stored numbers are still those that were written: a hash of the tensors in a file, kept in its header."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_thought.errors import ThoughtError

__all__ = ["check_hash", "tensors_hash"]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hash(tensors: Mapping[str, Tensor], kept: str | None) -> None:
    """Compare tensors with the hash that was kept of them; files of earlier versions keep none.

    Raises:
        ThoughtError: when they are others.
    """
    if kept is not None and tensors_hash(tensors) != kept:
        raise ThoughtError("its numbers are not those that were written (their SHA-256 is another).")
