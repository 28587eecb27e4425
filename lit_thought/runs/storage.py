"""Where the streams of a fit wait between uses: on their device, in main memory, or in a file on disk.

The file is temporary and has no name (POSIX), so that nothing of it is left however the process ends. Tensors are
mapped into memory when they are read, privately (a change stays in memory), and only for as long as they are in use.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import IO, Literal

import torch
from torch import Tensor

from lit_thought.errors import MemoryBudgetError

__all__ = ["Kept", "Place", "Storage"]

Place = Literal["device", "cpu", "disk"]


class Kept(ABC):
    """A tensor that is kept somewhere; the room is free again once nothing refers to this object."""

    @abstractmethod
    def get(self) -> Tensor:
        """The tensor, on the device that it came from; not to be changed in place."""


class Storage:
    """Keeps tensors at one place.

    Args:
        place: ``"device"``: where each tensor is; ``"cpu"``: in main memory, pinned for tensors of a GPU; ``"disk"``:
            in one temporary file.
    """

    def __init__(self, place: Place = "device") -> None:
        self._arena = _Arena() if place == "disk" else None
        self.place = place

    def put(self, value: Tensor) -> Kept:
        """Keep a tensor.

        Raises:
            MemoryBudgetError: when the disk is full.
        """
        if self._arena is not None and value.numel():
            return _OnDisk(self._arena, value)
        home = value if self.place == "device" or value.device.type == "cpu" else _to_main_memory(value)
        return _InMemory(home, value.device)

    def close(self) -> None:
        """Remove the file; what was kept in it can no longer be read."""
        if self._arena is not None:
            self._arena.file.close()


@dataclass(frozen=True)
class _InMemory(Kept):
    home: Tensor
    device: torch.device

    def get(self) -> Tensor:
        return self.home.to(self.device, non_blocking=True)


def _to_main_memory(value: Tensor) -> Tensor:
    pinned = value.device.type == "cuda"
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned).copy_(value, non_blocking=pinned)


class _Arena:
    """One file of regions; those that are given back are used again."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.end = 0
        self.free: dict[int, list[int]] = defaultdict(list)

    def write(self, data: memoryview) -> tuple[int, int]:
        """Where the data went, and the size of the region."""
        size = math.ceil(len(data) / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        offset = self.free[size].pop() if self.free[size] else self.end
        self.end = max(self.end, offset + size)
        try:
            self.file.seek(offset)
            while len(data):  # one call writes 2 GB at most
                data = data[self.file.write(data) :]
        except OSError as error:
            raise MemoryBudgetError(
                f"offload: the streams of this fit cannot be written to {tempfile.gettempdir()!r} ({error.strerror}). "
                "Make room there, or set TMPDIR to a folder on a larger disk."
            ) from error
        return offset, size


class _OnDisk(Kept):
    """A tensor in a file."""

    def __init__(self, arena: _Arena, value: Tensor) -> None:
        self.arena, self.device, self.shape, self.dtype = arena, value.device, value.shape, value.dtype
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self.offset, self.size = arena.write(data)

    def get(self) -> Tensor:
        count = math.prod(self.shape)
        length = count * self.dtype.itemsize
        mapping = _Mapping(self.arena.file.fileno(), length, access=mmap.ACCESS_COPY, offset=self.offset)
        mapping.kept = self
        return torch.frombuffer(mapping, dtype=self.dtype, count=count).view(self.shape).to(self.device)

    def __del__(self) -> None:
        if hasattr(self, "size"):
            self.arena.free[self.size].append(self.offset)


class _Mapping(mmap.mmap):
    """Refers to what it maps, whose region cannot be written anew before this mapping is gone."""

    kept: _OnDisk
