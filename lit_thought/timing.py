"""Wall-clock time and peak memory by stage."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Stopwatch", "peak_memory"]


def peak_memory() -> int:
    """Most bytes that were in use at once so far: allocated on the current GPU where torch uses one, else resident in
    this process; 0 where the system does not say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Adds up by name seconds, in :attr:`seconds`, and by how many bytes the peak of memory rose, in :attr:`raised`.

    CUDA work is waited for when there is any.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.raised: dict[str, int] = defaultdict(int)
        self.peak = peak_memory()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        start = self.now()
        try:
            yield
        finally:
            self.add(name, start)

    def add(self, name: str, start: float) -> None:
        """Count what has passed since ``start``, a time from :meth:`now`."""
        self.seconds[name] += self.now() - start
        before, self.peak = self.peak, max(self.peak, peak_memory())
        self.raised[name] += self.peak - before

    @staticmethod
    def now() -> float:
        """The time in seconds, once the work under way on the GPU is done."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()
