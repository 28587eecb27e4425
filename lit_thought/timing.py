"""Wall-clock time and peak memory by phase, and how they are written."""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Stopwatch", "format_bytes", "format_duration", "peak_memory"]


def peak_memory() -> int:
    """Most bytes that were in use at once so far: allocated on the current GPU where torch uses one, else resident in
    this process; 0 where the system does not say."""
    if _on_gpu():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Mark(NamedTuple):
    """A moment: seconds on the host, and where torch uses a GPU an event in its stream."""

    host: float
    event: torch.cuda.Event | None


class Stopwatch:
    """Adds up by name seconds, in :attr:`seconds`, and by how many bytes the peak of memory rose, in :attr:`raised`.

    Where torch uses a GPU, what a stage takes is read off events in its stream, so that timing lets the host run ahead.
    """

    def __init__(self) -> None:
        self.raised: dict[str, int] = defaultdict(int)
        self.peak = peak_memory()
        self._seconds: dict[str, float] = defaultdict(float)
        self._under_way: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by name, once the GPU is done with all that was timed."""
        if self._under_way:
            self._under_way[-1][2].synchronize()
            self._settle()
        return self._seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        start = self.mark()
        try:
            yield
        finally:
            self.add(name, start)

    def add(self, name: str, start: Mark) -> None:
        """Count what has passed since ``start``, from :meth:`mark`."""
        end = self.mark()
        if start.event is None or end.event is None:
            self._seconds[name] += end.host - start.host
        else:
            self._under_way.append((name, start.event, end.event))
            self._settle()
        before, self.peak = self.peak, max(self.peak, peak_memory())
        self.raised[name] += self.peak - before

    def _settle(self) -> None:
        """Add up what the GPU is done with."""
        while self._under_way and self._under_way[0][2].query():
            name, start, end = self._under_way.popleft()
            self._seconds[name] += start.elapsed_time(end) / 1000

    @staticmethod
    def mark() -> Mark:
        """The start of something, for :meth:`add`."""
        event = None
        if _on_gpu():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Mark(time.perf_counter(), event)

    @staticmethod
    def now() -> float:
        """The time in seconds, once the work under way on the GPU is done."""
        if _on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def format_bytes(count: float) -> str:
    """In GB, MB or kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def format_duration(seconds: float) -> str:
    """In minutes, seconds or milliseconds."""
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"
