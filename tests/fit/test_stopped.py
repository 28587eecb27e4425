"""A fit that something else ends before its last stage: an error that says how to go on, and nothing half-written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from command_line import fit_arguments, make_files
from fits import INSTRUCTION, PAIRS, TOKENIZER, distance, readable
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from models import make_model

from lit_thought import PairDataModule, ThoughtCallback, ThoughtError, ThoughtModule, load_model, transmute
from lit_thought.cli import main
from lit_thought.patch.patch import ThoughtPatch


class StopAfter(Callback):
    """Asks the trainer to stop after some epochs, as other callbacks do."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop |= trainer.current_epoch + 1 >= self.epochs


def fit(
    folder: Path, callbacks: tuple = (), resume: bool = False, batch_size: int = 32, **options: Any
) -> ThoughtPatch:
    ours = ThoughtCallback(
        preserve=None, rank=2, output_dir=folder / "adapter", resume_dir=folder / "resume" if resume else None
    )
    trainer = Trainer(
        max_epochs=-1,
        callbacks=[*callbacks, ours],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )
    data = PairDataModule(PAIRS, INSTRUCTION, batch_size=batch_size)
    trainer.fit(ThoughtModule(make_model("llama"), TOKENIZER), datamodule=data)
    assert ours.patch is not None
    return ours.patch


@pytest.mark.parametrize(
    ("callbacks", "options", "done"),
    [
        ([], {"max_time": {"seconds": 0}}, "0 of 6|1 of 6"),
        ([Timer(duration={"seconds": 0}, interval="epoch")], {}, "0 of 6|1 of 6"),
        ([StopAfter(1)], {}, "1 of 6"),
        ([StopAfter(4)], {}, "4 of 6"),
    ],
    ids=["max_time", "Timer", "first stage", "later"],
)
def test_it_ends_as_an_error_with_the_cure(callbacks: list, options: dict, done: str, tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=rf"stopped after ({done}) stages .* Pass resume_dir"):
        fit(tmp_path, tuple(callbacks), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"max_time": {"seconds": 0}}, {"fast_dev_run": True}], ids=["stopped", "refused"])
def test_the_model_stays_where_it_was(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning brings the module to the CPU at its end, and once more when that raises; it may have been on a GPU."""
    moved: list[Any] = []
    monkeypatch.setattr(LightningModule, "cpu", lambda module: moved.append(module) or module)
    with pytest.raises(ThoughtError):
        fit(tmp_path, **options)
    assert not moved
    fit(tmp_path)
    assert not moved
    module = ThoughtModule(make_model("llama"), TOKENIZER)
    assert module.cpu() is module  # its owner's own wish
    assert moved == [module]


def test_with_resume_dir_the_same_call_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"The same call, with resume_dir=.*, goes on from there"):
        fit(tmp_path, (StopAfter(3),), resume=True)
    assert not (tmp_path / "adapter").exists()
    found = fit(tmp_path, resume=True)
    assert distance(found, fit(tmp_path / "whole")) < 1e-6
    assert ThoughtPatch.load(tmp_path / "adapter").rank == 2


def test_stopping_with_the_last_stage_is_no_error(tmp_path: Path) -> None:
    assert fit(tmp_path, (StopAfter(6),)).rank == 2


@pytest.mark.parametrize(
    ("options", "callbacks", "said"),
    [
        ({"min_steps": 500}, (), "min_steps=500 must be left out"),
        ({"max_steps": 2}, (), "max_steps=2 must be left out"),
        ({"fast_dev_run": True}, (), "must be left out|max_epochs=1 is too few"),
        ({"limit_train_batches": 1}, (), "limit_train_batches must be left out"),
        ({"overfit_batches": 1}, (), "limit_train_batches must be left out"),
        ({}, (EarlyStopping("attn_out/error_left"),), "EarlyStopping would end the fit"),
    ],
)
def test_what_can_only_stop_it_is_refused_before_it_starts(
    options: dict, callbacks: tuple, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ThoughtError, match=said):
        fit(tmp_path, callbacks, **options)
    assert not list(tmp_path.iterdir())


EPOCH = 2 + len(PAIRS)
"""Batches of one pair, and what prompts share before them."""


class StopAtBatch(Callback):
    """Asks the trainer to stop within an epoch."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop |= self.left <= 0


@pytest.mark.parametrize("batch", [1, 2 * EPOCH + 2, 6 * EPOCH - 1])
def test_a_stage_is_not_solved_from_some_of_its_batches(batch: int, tmp_path: Path) -> None:
    """In the first, a later and the last stage."""
    with pytest.raises(ThoughtError, match=rf"stopped after {batch // EPOCH} of 6 stages"):
        fit(tmp_path, (StopAtBatch(batch),), resume=True, batch_size=1)
    assert not (tmp_path / "adapter").exists()
    assert len(list((tmp_path / "resume").glob("stage-*"))) == batch // EPOCH
    found = fit(tmp_path, resume=True, batch_size=1)
    assert distance(found, fit(tmp_path / "whole", batch_size=1)) < 1e-6


def test_the_same_data_module_goes_on(tmp_path: Path) -> None:
    """Though by then it holds the inputs that the model wrote."""
    data = PairDataModule(None, INSTRUCTION, "Q: {input}\nA: {output}\n", inputs=4)
    model = readable(make_model("llama").float())

    def run(*callbacks: Callback) -> ThoughtPatch | None:
        ours = ThoughtCallback(preserve=None, rank=2, resume_dir=tmp_path / "resume")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=-1, callbacks=[*callbacks, ours], **quiet)
        trainer.fit(ThoughtModule(model, TOKENIZER), datamodule=data)
        return ours.patch

    with pytest.raises(ThoughtError, match="stopped after 2 of 6"):
        run(StopAfter(2))
    found = run()
    assert found is not None
    assert found.provenance["inputs"]["count"] == 4


def test_a_fit_whose_adapter_cannot_be_written_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the call that returns the patch, and by the command."""
    make_files(tmp_path)
    model, tokenizer = load_model(tmp_path / "model")
    settings: dict[str, Any] = {"preserve": None, "rank": 2, "resume_dir": tmp_path / "resume", "progress": False}
    settings |= {"output_dir": tmp_path / "adapter"}
    write = ThoughtPatch.save_adapter

    def full(self: ThoughtPatch, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "adapter")

    calls = {
        "transmute": lambda: transmute(model, tokenizer, INSTRUCTION, PAIRS, **settings),
        "the command": lambda: main([*fit_arguments(tmp_path, "other"), f"--resume_dir={tmp_path / 'resume'}"]),
    }
    for name, call in calls.items():
        monkeypatch.setattr(ThoughtPatch, "save_adapter", full)
        with pytest.raises((OSError, SystemExit)):
            call()
        kept = sorted(file.name for file in (tmp_path / "resume").iterdir())
        assert kept == ["fit.json", *(f"stage-{number:05d}.safetensors" for number in range(5))], name
        monkeypatch.setattr(ThoughtPatch, "save_adapter", write)
        call()
        assert not (tmp_path / "resume").exists(), name
    assert (tmp_path / "adapter" / "thought.json").exists()
    assert (tmp_path / "other" / "thought.json").exists()


def test_how_settings_and_inputs_were_chosen_is_in_the_adapter(tmp_path: Path) -> None:
    patch = transmute(
        readable(make_model("llama")),
        TOKENIZER,
        INSTRUCTION,
        [*PAIRS, *({"input": word, "output": "x"} for word in ("up", "good", "fox"))],
        rank="auto",
        preserve=None,
        output_dir=tmp_path / "adapter",
        progress=False,
    )
    assert ThoughtPatch.load(tmp_path / "adapter").provenance["selection"] == patch.provenance["selection"]
