"""Wall-clock time by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up seconds by name in :attr:`seconds`; CUDA work is waited for when there is any."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    @staticmethod
    def now() -> float:
        """The time in seconds, once the work under way on the GPU is done."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()
