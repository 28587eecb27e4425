"""Faults in the middle of a fit leave the model as it was and no partial output; the same bits come out every time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import seeded_fit
import torch

from lit_thought.files import _HOST, atomic_folder
from recipes.robustness import faults
from recipes.robustness.tiny import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults strike forked copies of the process")


@pytest.mark.parametrize(
    ("name", "run", "least"),
    [
        ("disk full", lambda: faults.disk_full(8), 8),
        ("file size limit", lambda: faults.size_limit((0, 3_000)), 2),
        ("permission denied", lambda: faults.permission_denied(2), 6),
        ("Ctrl-C", lambda: faults.control_c(1), 13),
        ("weights not finite", faults.not_finite, 18),
        ("forward raises", faults.failing_forward, 8),
        ("SIGKILL", lambda: faults.killed(2, every=7), 8),
    ],
)
def test_a_fault_leaves_nothing_behind(name: str, run: Callable[[], Iterator[faults.Outcome]], least: int) -> None:
    outcomes = list(run())
    assert len(outcomes) >= least
    assert [outcome for outcome in outcomes if not outcome.fine] == []
    assert {outcome.fault for outcome in outcomes} == {name}


def test_what_a_fault_leaves_is_told() -> None:
    usual = {"fault": "x", "where": "y", "end": "OSError", "unchanged": True, "partial": []}

    def outcome(**changes: object) -> faults.Outcome:
        return faults.Outcome(**{**usual, **changes})

    assert outcome().fine
    for changes in ({"end": None}, {"unchanged": False}, {"partial": ["adapter"]}, {"again": False}):
        assert not outcome(**changes).fine


def test_a_snapshot_sees_bits_and_hooks() -> None:
    model = tiny_model()
    before = faults.snapshot(model)
    assert faults.snapshot(tiny_model()) == before
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert faults.snapshot(model) != before
    model = tiny_model()
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert faults.snapshot(model) != before
    handle.remove()
    assert faults.snapshot(model) == before


def test_partial_outputs_are_seen(tmp_path: Path) -> None:
    faults.run_fit(tiny_model(), tmp_path)
    assert faults.partial(tmp_path) == []
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    (tmp_path / "sums" / "stage-0001.safetensors").write_bytes(b"half a file")
    (tmp_path / ".adapter.0123456789ab.tmp").mkdir()
    assert faults.partial(tmp_path) == [".adapter.0123456789ab.tmp", "adapter", "sums"]


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    left = tmp_path / f".out.0123456789ab.{_HOST}.tmp"
    others = [f".other.0123456789ab.{_HOST}.tmp", ".out.0123456789ab.00000000.tmp", ".out.tmp"]
    for folder in (left, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "half.txt").write_text("half")
    with atomic_folder(tmp_path / "out") as first:
        assert not left.exists()
        with atomic_folder(tmp_path / "out", overwrite=True) as second:
            assert first.is_dir()
            (second / "second.txt").write_text("second")
        (first / "first.txt").write_text("first")
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["second.txt"]
        (tmp_path / "out" / "second.txt").unlink()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["first.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "out"])


def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **threads, "LIT_THOUGHT_CACHE": str(tmp_path / "cache one")}
    command = [sys.executable, seeded_fit.__file__, str(tmp_path / "one")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache two"))
    seeded_fit.seeded().save_adapter(tmp_path / "two")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) > 1_000


def test_a_fork_tells_how_it_ended() -> None:
    assert faults._fork(lambda: None) == 0
    assert faults._fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
    assert faults._fork(lambda: {}["x"]) == 1
