"""A fit that was interrupted goes on where it was, to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from models import make_tokenizer

from lit_thought import ThoughtPatch, transmute
from lit_thought.errors import ThoughtError
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.stage import StageSums

PAIRS = [{"input": word} for word in ("hot", "big fox", "up", "good")]
INSTRUCTION = "You are a pirate. Talk like a pirate.\n"
TEXT = ["The quick brown fox jumps over the lazy dog. " * 3]


def fit(folder: Path | None, family: str = "llama", **settings: Any) -> ThoughtPatch:
    model = make_family(family).float()
    common = {"rank": 4, "preserve": TEXT, "max_new_tokens": 4, "progress": False}
    return transmute(model, make_tokenizer(), INSTRUCTION, PAIRS, resume_dir=folder, **{**common, **settings})


def same(one: ThoughtPatch, other: ThoughtPatch) -> bool:
    assert one.targets == other.targets
    factors = (
        torch.equal(v.A, other.factors[p].A) and torch.equal(v.B, other.factors[p].B) for p, v in one.factors.items()
    )
    return all(factors) and all(torch.equal(v, other.vectors[p]) for p, v in one.vectors.items())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"sites": ("mlp_in",)}),
        ("gpt2", {"steps": 2, "step_size": 0.5, "pairs_per_step": 3, "val_pairs": PAIRS[:1]}),
        ("gemma3_text", {}),
        ("gemma4_text", {}),
        ("phi", {"order": "teacher-forced"}),
        ("mixtral", {}),
    ],
)
def test_the_same_bits_from_any_stage_on(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(None, family, **settings)
    real, solved = StageSums.solve, 0

    def solve(self: StageSums, *args: Any) -> Any:
        nonlocal solved
        solved += 1
        if solved == stop:
            raise Interrupted
        return real(self, *args)

    monkeypatch.setattr(StageSums, "solve", solve)
    folder, done = tmp_path / "unfinished", 0
    for stop in (1, 2, 2):  # three interruptions, at the first stage, the second and the third
        solved = 0
        with pytest.raises(Interrupted):
            fit(folder, family, **settings)
        done += stop - 1
        assert len(list(folder.glob("stage-*"))) == done
    stop, solved = 0, 0
    resumed = fit(folder, family, **settings)
    total = len(whole.provenance["diagnostics"]) * whole.provenance["settings"]["steps"]
    assert solved == total - done, "finished stages are not solved again"
    assert same(resumed, whole)
    assert resumed.provenance["diagnostics"] == whole.provenance["diagnostics"]
    assert resumed.provenance["history"] == whole.provenance["history"]
    assert not folder.exists()


def test_outputs_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageSums, "solve", lambda *args: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        fit(tmp_path / "unfinished")
    monkeypatch.undo()
    monkeypatch.setattr("lit_thought.fit.data.generate", lambda *args, **kwargs: pytest.fail("it writes again"))
    fit(tmp_path / "unfinished")


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_resume import fit
from lit_thought.statistics.stage import StageSums
real, left = StageSums.solve, int(sys.argv[1])
def solve(self, *args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
StageSums.solve = solve
fit(Path({folder!r})).save_adapter({out!r})
"""


def test_a_killed_process(tmp_path: Path) -> None:
    names = {
        "paths": [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")],
        "folder": str(tmp_path / "unfinished"),
        "out": str(tmp_path / "out"),
    }
    command = [sys.executable, "-c", SCRIPT.format(**names)]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    for stop, expected in ((4, -signal.SIGKILL), (0, 0)):
        done = subprocess.run([*command, str(stop)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr[-2000:]
        assert (tmp_path / "unfinished").exists() == (stop > 0)
    fit(None).save_adapter(tmp_path / "whole")
    found, wanted = ((tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("out", "whole"))
    assert found == wanted


def test_another_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "unfinished"
    monkeypatch.setattr(StageSums, "solve", lambda *args: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        fit(folder)
    monkeypatch.undo()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for change in (
        {"rank": 5},
        {"ridge": 0.1},
        {"preserve": ["Other text, of no use to anyone."]},
        {"family": "qwen3"},
    ):
        with pytest.raises(ThoughtError, match="belongs to another fit"):
            fit(folder, **change)
    (folder / "fit.json").write_text("{")
    with pytest.raises(ThoughtError, match=r"fit\.json is not readable"):
        fit(folder)
    (folder / "fit.json").write_bytes(before["fit.json"])
    (folder / "stage-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ThoughtError, match=r"stage-00000\.safetensors is damaged"):
        fit(folder)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ThoughtError, match="holds something else than an unfinished fit"):
        fit(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_what_is_kept_is_json_and_safetensors(tmp_path: Path) -> None:
    progress = UnfinishedFit(tmp_path / "unfinished", {"a": 1})
    progress.start([(0, "cold", True)])
    assert json.loads((tmp_path / "unfinished" / "fit.json").read_text())["outputs"] == [[0, "cold", True]]
    again = UnfinishedFit(tmp_path / "unfinished", {"a": 1}, write=False)
    assert (again.outputs, again.stages) == ([(0, "cold", True)], 0)
