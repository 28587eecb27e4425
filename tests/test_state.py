"""Nothing of the caller's state changes: all of it, around every public entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fits import INSTRUCTION, PAIRS, TEXTS, TOKENIZER, readable
from lightning.pytorch import Trainer
from models import make_model
from state import unchanged
from transformers import PreTrainedModel

from lit_thought import (
    PairDataModule,
    ThoughtCallback,
    ThoughtError,
    ThoughtModule,
    ThoughtPatch,
    evaluate,
    load_model,
    transmute,
)
from lit_thought.fit.inspection import inspect_model
from lit_thought.model.blocks import find_blocks
from lit_thought.statistics.preserve import preservation
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved
from lit_thought.theory.vectors import thought_vectors, vector_patch
from lit_thought.theory.verify import verify_exact

INPUTS = [{"input": pair["input"]} for pair in PAIRS]
MANY = [{"input": word} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")]


def small(cache: Path, **settings) -> dict:
    usual = {"preserve": TEXTS, "rank": 2, "cache_dir": cache / "cache", "max_new_tokens": 3, "progress": False}
    return usual | settings


def fitted(model: PreTrainedModel, folder: Path, **settings) -> ThoughtPatch:
    return transmute(model, TOKENIZER, INSTRUCTION, PAIRS, **small(folder, **settings))


def lightning(model: PreTrainedModel, folder: Path) -> None:
    callback = ThoughtCallback(preserve=None, rank=2, output_dir=folder / "adapter")
    trainer = Trainer(
        max_epochs=-1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(ThoughtModule(model, TOKENIZER), datamodule=PairDataModule(INPUTS, INSTRUCTION, max_new_tokens=3))


def kept(model: PreTrainedModel, folder: Path) -> None:
    fitted(model, folder, statistics_dir=folder / "sums", resume_dir=folder / "resume", val_pairs=PAIRS[:2])
    solve_saved(SavedStatistics.load(folder / "sums"), rank=1, approximate=True, cache_dir=folder / "cache")


def refused(model: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(ThoughtError):
        fitted(model, folder, memory_budget=1e-9)
    with pytest.raises(ThoughtError):
        fitted(model, folder, blocks=[99])


def compared(model: PreTrainedModel, folder: Path) -> None:
    patch = fitted(model, folder)
    evaluate(
        *(model, TOKENIZER, patch),
        instruction=INSTRUCTION,
        pairs=PAIRS,
        unrelated=TEXTS,
        max_new_tokens=3,
        cache_dir=folder / "cache",
        progress=False,
    )


def applied(model: PreTrainedModel, folder: Path) -> None:
    patch = fitted(model, folder)
    patch.save_adapter(folder / "adapter")
    patch = ThoughtPatch.load(folder / "adapter", model)
    with patch.applied(model):
        pass
    patch.apply_(model)
    patch.remove_(model)


def steered(model: PreTrainedModel, folder: Path) -> None:
    vectors = thought_vectors(model, TOKENIZER, INSTRUCTION, PAIRS)
    vector_patch(model, {1: vectors[1]}).save_control_vector(folder.with_suffix(".gguf"), model)


def loaded(model: PreTrainedModel, folder: Path) -> None:
    """Loading draws random numbers in other libraries: for weights that are then read from the file."""
    if not (place := folder.parent / "model").exists():
        model.save_pretrained(place)
        TOKENIZER.save_pretrained(place)
    load_model(str(place))


ENTRIES: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "transmute": lambda model, folder: transmute(model, TOKENIZER, INSTRUCTION, INPUTS, **small(folder)),
    "sampled outputs": lambda model, folder: transmute(
        model, TOKENIZER, INSTRUCTION, INPUTS, **small(folder, generate={"do_sample": True})
    ),
    "auto": lambda model, folder: transmute(model, TOKENIZER, INSTRUCTION, MANY, **small(folder, ridge="auto")),
    "Lightning": lightning,
    "statistics kept": kept,
    "refused": refused,
    "evaluate": compared,
    "apply and remove": applied,
    "vectors": steered,
    "load_model": loaded,
    "inspect": lambda model, folder: inspect_model(model),
    "verify": lambda model, folder: verify_exact(model, TOKENIZER, INSTRUCTION, " ".join(TEXTS), tokens=12),
    "preserve": lambda model, folder: preservation(model, find_blocks(model), [[5, 6, 7, 8] * 4], folder),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_everything_of_the_callers_is_as_it_was(entry: str, tmp_path: Path) -> None:
    model = readable(make_model("llama"))
    model.train()
    model.requires_grad_(True)
    ENTRIES[entry](model, tmp_path / "first")  # what is imported, or registered once, is
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, labels=ids).loss.backward()
    torch.manual_seed(7)
    with unchanged(model, TOKENIZER):
        ENTRIES[entry](model, tmp_path / "second")


def test_the_users_own_switches_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Lightning knows, set the other way."""
    model = readable(make_model("llama"))
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    try:
        with torch.no_grad(), unchanged(model, TOKENIZER):
            fitted(model, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_precision_that_converts_the_model_is_refused(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    trainer = Trainer(
        max_epochs=-1,
        callbacks=[ThoughtCallback(preserve=None)],
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with unchanged(model, TOKENIZER), pytest.raises(ThoughtError, match=r"precision='64-true' must be left out"):
        trainer.fit(ThoughtModule(model, TOKENIZER), datamodule=PairDataModule(PAIRS, INSTRUCTION))
