"""Seconds and peaks of memory by name, with and without a GPU's events."""

from __future__ import annotations

import weakref

import pytest
import torch

from lit_thought import timing
from lit_thought.timing import Stopwatch


def test_stopwatch_adds_up_how_far_each_name_raised_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100, 150, 150, 180, 170])
    monkeypatch.setattr(timing, "peak_memory", readings.__next__)
    stopwatch = Stopwatch()
    for name in ("solve", "forward", "solve", "forward"):
        with stopwatch(name):
            pass
    assert stopwatch.raised == {"solve": 80, "forward": 0}
    assert stopwatch.peak == 180


class Gpu:
    """A stream that takes ten seconds for each piece of work, whose events the host may run ahead of."""

    def __init__(self) -> None:
        self.queued, self.done, self.waits = 0.0, 0.0, 0
        self.events = weakref.WeakSet[Event]()

    def work(self) -> None:
        self.queued += 10

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        event = Event(self)
        self.events.add(event)
        return event


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, -1.0

    def record(self) -> None:
        self.at = self.gpu.queued

    def query(self) -> bool:
        return self.at <= self.gpu.done

    def synchronize(self) -> None:
        self.gpu.waits += not self.query()
        self.gpu.done = max(self.gpu.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    return gpu


def test_gpu_work_is_timed_by_its_events_and_waited_for_once(gpu: Gpu) -> None:
    stopwatch = Stopwatch()
    for name in ("forward", "statistics", "forward"):
        with stopwatch(name):
            gpu.work()
    assert gpu.waits == 0
    assert stopwatch.seconds == {"forward": 20, "statistics": 10}
    assert gpu.waits == 1
    assert stopwatch.seconds == {"forward": 20, "statistics": 10}


def test_events_that_have_passed_are_not_kept(gpu: Gpu) -> None:
    stopwatch = Stopwatch()
    for _ in range(100):
        with stopwatch("forward"):
            gpu.work()
        gpu.done = gpu.queued
    with stopwatch("forward"):
        pass
    assert not gpu.events
    assert stopwatch.seconds == {"forward": 1000}


def test_what_began_before_the_gpu_was_used_is_timed_by_the_host(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch()
    monkeypatch.setattr(timing.time, "perf_counter", iter([5.0, 7.0]).__next__)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    start = stopwatch.mark()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    stopwatch.add("prepare", start)
    assert stopwatch.seconds == {"prepare": 2}
