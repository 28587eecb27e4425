"""Instruction over instruction: a patch that is fitted while another is on, wherever it goes from there."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from fits import PAIRS, TOKENIZER, distance, make_patch
from models import make_model
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch, evaluate
from lit_thought.errors import PatchError
from lit_thought.model.loading import fingerprint
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved

FIRST, SECOND = "Q: good\nA: bad\nQ: up\nA: down\n", "Always answer in French.\n"
IDS = torch.tensor([[5, 17, 300, 8, 9, 44, 60]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def stack(tmp_path: Path) -> tuple[PreTrainedModel, ThoughtPatch, ThoughtPatch, torch.Tensor]:
    """A bare model, two patches, and what both together make it say."""
    model = make_model("llama")
    first = make_patch(model, instruction=FIRST)
    with first.applied(model):
        second = make_patch(model, instruction=SECOND, statistics_dir=tmp_path / "sums")
        with second.applied(model):
            both = logits(model)
    return model, first, second, both


def test_it_fits_the_model_that_it_was_made_for_and_comes_off_in_any_order(stack) -> None:
    model, first, second, both = stack
    plain = logits(model)
    for order in permutations((first, second)):
        first.apply_(model)
        second.apply_(model)
        assert torch.equal(logits(model), both)
        for patch in order:
            patch.remove_(model)
        assert torch.equal(logits(model), plain)


def test_it_is_the_fit_of_a_model_that_has_the_first_in_its_weights(stack) -> None:
    _, first, second, _ = stack
    merged = make_model("llama")
    first.apply_(merged)
    other = make_model("llama")
    other.load_state_dict(merged.state_dict())
    assert distance(make_patch(other, instruction=SECOND), second) < 1e-5


def test_provenance_says_what_it_stands_on(stack) -> None:
    model, first, second, _ = stack
    assert second.provenance["fingerprint"] == fingerprint(model) == first.provenance["fingerprint"]
    assert second.provenance["on_top_of"]["patches"] == [first.digest]
    assert "on_top_of" not in first.provenance
    with first.applied(model):
        assert second.provenance["on_top_of"]["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize("saved", [False, True])
def test_without_the_one_beneath_it_is_refused(stack, saved: bool, tmp_path: Path) -> None:
    model, first, second, both = stack
    if saved:
        second.save_adapter(tmp_path / "second")
        first.save_adapter(tmp_path / "first")
        assert "on top of 1 other patch" in (tmp_path / "second" / "README.md").read_text()
        first, second = (ThoughtPatch.load(tmp_path / name) for name in ("first", "second"))
    with pytest.raises(PatchError, match="made on top of 1 other, and 1 of them"):
        second.apply_(model)
    with (0.5 * first).applied(model), pytest.raises(PatchError, match="made on top of"):
        second.apply_(model)
    with second.applied(model, check=False):
        assert not torch.equal(logits(model), both)
    with first.applied(model), second.applied(model):
        assert torch.equal(logits(model), both)


def test_the_sum_is_both(stack, tmp_path: Path) -> None:
    model, first, second, both = stack
    third = make_patch(model, instruction="Talk like a pirate.\n")
    for total in (first + second, second + first):
        assert "on_top_of" not in total.provenance
        with total.applied(model):
            torch.testing.assert_close(logits(model), both, atol=1e-4, rtol=1e-4)
        total.save_adapter(tmp_path / "sum", overwrite=True)
        ThoughtPatch.load(tmp_path / "sum", model)
    ((first + third) + second).validate(model)
    lonely = second + third
    with pytest.raises(PatchError, match="made on top of"):
        lonely.validate(model)
    with first.applied(model):
        lonely.validate(model)
    with pytest.raises(PatchError, match="made on top of"):
        (2.0 * (first + third) + second).validate(model)  # another first


def test_it_is_evaluated_on_the_model_that_it_was_made_for(stack) -> None:
    model, first, second, _ = stack
    options = {"instruction": SECOND, "pairs": PAIRS, "unrelated": None, "max_new_tokens": 2, "progress": False}
    with first.applied(model):
        result = evaluate(model, TOKENIZER, second, **options)
    assert result["kl"]["patched"] < result["kl"]["plain"]
    with pytest.raises(PatchError, match="made on top of"):
        evaluate(model, TOKENIZER, second, **options)


def test_its_statistics_solve_to_it(stack, tmp_path: Path) -> None:
    _, first, second, _ = stack
    again = solve_saved(SavedStatistics.load(tmp_path / "sums"))
    assert distance(again, second) < 1e-6
    assert again.provenance["on_top_of"]["patches"] == [first.digest]
