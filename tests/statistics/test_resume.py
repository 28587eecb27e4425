"""A fit that was interrupted goes on where it was, and finds the same patch, to rounding."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import interrupted_fit
import pytest
import torch
from fits import ROUNDING, distance, make_patch
from interrupted_fit import PAIRS, Interrupted, Solves, fit
from models import make_model, make_tokenizer
from patches import make_patch as random_patch
from quantised import quantise_

from lit_thought import transmute
from lit_thought.errors import ThoughtError
from lit_thought.fit import preparing
from lit_thought.model.blocks import find_blocks
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.factors import Factors
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.stage import StageSums
from lit_thought.statistics.stage_file import KeptStage


def interrupt(monkeypatch: pytest.MonkeyPatch, stop: int, folder: Path, family: str = "llama", **settings: Any) -> None:
    """Start a fit, or go on with it, and end it at a solve."""
    with monkeypatch.context() as patched:
        patched.setattr(StageSums, "solve", Solves(stop))
        with pytest.raises(Interrupted):
            fit(folder, family, **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"statistics_dir": True}),
        ("llama", {"sites": ("mlp_in",)}),
        ("gpt2", {"steps": 2, "step_size": 0.5, "pairs_per_step": 3, "val_pairs": PAIRS[:1]}),
        ("gemma4_text", {}),
        ("phi", {"order": "teacher-forced"}),
        ("mixtral", {}),
    ],
)
def test_the_same_patch_from_any_stage_on(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of a fit that saves them, too, though it does not sum anew."""
    saves = "statistics_dir" in settings
    usual = settings | ({"statistics_dir": tmp_path / "whole"} if saves else {})
    whole = fit(None, family, **usual)
    settings = settings | ({"statistics_dir": tmp_path / "sums"} if saves else {})
    folder, done = tmp_path / "unfinished", 0
    for stop in (1, 3):  # before a stage is finished, and after two
        interrupt(monkeypatch, stop, folder, family, **settings)
        done += stop - 1
        assert len(list(folder.glob("stage-*"))) == done
    assert not (tmp_path / "sums").exists()
    solves = Solves()
    monkeypatch.setattr(StageSums, "solve", solves)
    resumed = fit(folder, family, **settings)
    total = len(whole.provenance["diagnostics"]) * whole.provenance["settings"]["steps"]
    assert solves.count == total - done, "finished stages are not solved again"
    assert distance(resumed, whole) <= ROUNDING
    for label, figures in whole.provenance["diagnostics"].items():
        assert resumed.provenance["diagnostics"][label] == pytest.approx(figures, rel=1e-2, abs=1e-6)
    rows, wanted = (patch.provenance["history"] for patch in (resumed, whole))
    for row, other in zip(rows, wanted, strict=True):
        assert (row["step"], row["output_kl"]) == (other["step"], pytest.approx(other["output_kl"], rel=1e-2))
    assert not folder.exists()
    if saves:
        one, other = (SavedStatistics.load(tmp_path / name) for name in ("sums", "whole"))
        assert one.heads == other.heads
        for mine, theirs in zip(one.stages(), other.stages(), strict=True):
            assert not mine.is_solved
            assert float((mine.matrix.gram - theirs.matrix.gram).norm() / theirs.matrix.gram.norm()) <= ROUNDING


def test_outputs_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"input": pair["input"]} for pair in PAIRS]
    interrupt(monkeypatch, 1, tmp_path / "unfinished", pairs=pairs)
    monkeypatch.setattr(preparing, "generate", lambda *args, **kwargs: pytest.fail("it writes again"))
    fit(tmp_path / "unfinished", pairs=pairs)


@pytest.mark.parametrize("store", [True, False])
def test_inputs_are_not_written_again(store: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless no text may be kept: then they are, and are the same."""
    settings: dict[str, Any] = {"pairs": None, "inputs": 5, "template": "{input}\n{output}\n"}
    settings |= {"instruction": "good\nbad\nup\ndown\n", "store_instruction": store, "letters": True}
    whole = fit(None, **settings)
    interrupt(monkeypatch, 2, tmp_path / "unfinished", **settings)
    if store:
        monkeypatch.setattr(preparing, "write_pairs", lambda *args, **kwargs: pytest.fail("it writes again"))
    resumed = fit(tmp_path / "unfinished", **settings)
    assert distance(resumed, whole) <= ROUNDING
    assert store is False or resumed.provenance["inputs"] == whole.provenance["inputs"]
    assert resumed.provenance["inputs"]["count"] == 5


@pytest.mark.slow
def test_a_killed_process(tmp_path: Path) -> None:
    """Another one goes on."""
    folder = tmp_path / "unfinished"
    command = [sys.executable, interrupted_fit.__file__, str(folder), str(tmp_path / "out"), "4"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list(folder.glob("stage-*"))) == 3
    assert distance(fit(folder), fit(None)) <= ROUNDING
    assert not folder.exists()


def test_another_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "unfinished"
    interrupt(monkeypatch, 2, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for change in (
        {"rank": 5},
        {"ridge": 0.1},
        {"preserve": ["Other text, of no use to anyone."]},
        {"family": "qwen3"},
        {"statistics_dir": tmp_path / "sums"},  # its finished stages have no sums
    ):
        with pytest.raises(ThoughtError, match="belongs to another fit"):
            fit(folder, **change)
    interrupt(monkeypatch, 2, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "stage-00000.safetensors", folder)
    with pytest.raises(ThoughtError, match=r"stage-00000\.safetensors is damaged, or not of this fit's attn_out"):
        fit(folder)
    (folder / "stage-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ThoughtError, match=r"stage-00000\.safetensors is damaged"):
        fit(folder)
    (folder / "stage-00000.safetensors").write_bytes(before["stage-00000.safetensors"])
    (folder / "fit.json").write_text("{")
    with pytest.raises(ThoughtError, match=r"fit\.json is not readable"):
        fit(folder)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ThoughtError, match="holds something else than an unfinished fit"):
        fit(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_what_is_kept_is_json_and_safetensors(tmp_path: Path) -> None:
    """And is read to the same bits, aligned as new tensors are."""
    unfinished = UnfinishedFit(tmp_path / "unfinished", {"a": 1})
    unfinished.start([(0, "cold", True)])
    site = find_blocks(make_model())[1].sites["mlp_out"]
    patch = SitePatch(Factors(torch.randn(3, site.d_in), torch.randn(3, site.d_out).T), torch.randn(site.d_out))
    unfinished.save(KeptStage.of(1, site, SitePatch()).solved(patch, {"rank": 3.0}))
    assert json.loads((tmp_path / "unfinished" / "fit.json").read_text())["outputs"] == [[0, "cold", True]]
    again = UnfinishedFit(tmp_path / "unfinished", {"a": 1}, write=False)
    assert (again.outputs, again.stages) == ([(0, "cold", True)], 1)
    found = again.load(0, torch.device("cpu"), 1, site)
    assert (found.figures, found.history) == ({"rank": 3.0}, [])
    for one, other in zip(
        (found.patch.matrix.A, found.patch.matrix.B, found.patch.vector),
        (patch.matrix.A, patch.matrix.B, patch.vector),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.data_ptr() % 64 == 0
    for block, other in ((0, site), (1, find_blocks(make_model())[1].sites["attn_out"])):
        with pytest.raises(ThoughtError, match="or not of this fit's"):
            again.load(0, torch.device("cpu"), block, other)


def test_it_goes_on_with_the_same_validation_and_patches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "unfinished"
    settings = {"steps": 2, "step_size": 0.5}
    interrupt(monkeypatch, 3, folder, val_pairs=PAIRS[:1], **settings)
    with pytest.raises(ThoughtError, match="belongs to another fit"):
        fit(folder, val_pairs=PAIRS[1:2], **settings)
    assert fit(folder, val_pairs=PAIRS[:1], **settings).provenance["history"]


def test_a_patch_beside_quantised_layers_makes_another_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantise_(make_model("llama").float(), "8bit")
    settings = {"preserve": None, "rank": 2, "resume_dir": tmp_path / "unfinished"}
    with monkeypatch.context() as patched:
        patched.setattr(StageSums, "solve", Solves(3))
        with pytest.raises(Interrupted):
            make_patch(model, **settings)
    with random_patch(model).applied(model), pytest.raises(ThoughtError, match="belongs to another fit"):
        make_patch(model, **settings)
    assert distance(make_patch(model, **settings), make_patch(model, **settings)) <= ROUNDING


def test_stages_of_other_prompts_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, behind another chat template, another tokenizer, another configuration."""
    model, tokenizer = make_model("llama").float(), make_tokenizer()

    def go_on(**settings: Any) -> Any:
        usual = {"pairs": PAIRS, "rank": 2, "preserve": None, "template": "chat", "progress": False}
        return transmute(model, tokenizer, "Be a pirate.", resume_dir=tmp_path / "unfinished", **{**usual, **settings})

    with monkeypatch.context() as patched:
        patched.setattr(StageSums, "solve", Solves(3))
        with pytest.raises(Interrupted):
            go_on()
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|s|>", "<|s|> ")
    assert tokenizer.chat_template != template
    with pytest.raises(ThoughtError, match="belongs to another fit"):
        go_on()
    tokenizer.chat_template = template
    tokenizer, own = make_tokenizer(bos=True), tokenizer
    with pytest.raises(ThoughtError, match="belongs to another fit"):
        go_on()
    tokenizer = own
    tokenizer(["hot", "cold water"], padding=True)  # which the tokenizer keeps, and no prompt depends on
    model.config.rms_norm_eps *= 2
    with pytest.raises(ThoughtError, match="belongs to another fit"):
        go_on()
    model.config.rms_norm_eps /= 2
    assert go_on().rank == 2
    assert not (tmp_path / "unfinished").exists()


def test_a_cache_that_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual one, which nobody named. A fit that keeps nothing there does not ask for it."""
    monkeypatch.setattr(preparing, "write_inputs", lambda *args: pytest.fail("inputs are written"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ThoughtError, match=r"cache_dir=.* is a file"):
        transmute(make_model("llama"), make_tokenizer(), "Be a pirate.", inputs=3, max_new_tokens=3, progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "file"))
    make_patch(make_model("llama"), cache_dir=None, preserve=None)


@pytest.mark.parametrize("name", ["resume_dir", "cache_dir"])
def test_a_folder_that_cannot_be_is_told_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "write_inputs", lambda *args: pytest.fail("inputs are written"))
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ThoughtError, match=rf"{name}=.* is a file"):
            make_patch(make_model("llama"), pairs=[], inputs=3, **{name: tmp_path / place})
