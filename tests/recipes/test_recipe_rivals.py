"""The recipe ``rivals``: its command line on a tiny model, for which somebody else writes, and when training ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from fits import INSTRUCTION, PAIRS, TOKENIZER
from models import make_model
from recipe_runs import run_recipe

from lit_thought import PairDataModule
from lit_thought.errors import ThoughtError
from lit_thought.fit.preparing import prepare_pairs
from recipes.studies.rivals import LONG, SHORT, page, rivals, trained


def test_training_ends_where_the_held_back_pairs_gain_no_more() -> None:
    """At a rate of zero it never does, so after three measurements, of five steps each; the loss is that of the plain
    model."""
    model = make_model().float()
    data = PairDataModule(PAIRS, INSTRUCTION, max_new_tokens=3)
    prepare_pairs(data, model, TOKENIZER)
    patch, seconds, kl = trained(model, data.tokenised[1:], data.tokenised[:1], 0.0, 1000.0, 0)
    assert all(not own.B.any() for own in patch.factors.values())
    assert 0 < seconds < 500
    _, _, nearer = trained(model, data.tokenised[1:], data.tokenised[1:], 0.01, 1000.0, 0)
    _, _, untrained = trained(model, data.tokenised[1:], data.tokenised[1:], 0.0, 1000.0, 0)
    assert kl > 0
    assert nearer < 0.7 * untrained


def test_unknown_chunks_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"chunks: .*'none'"):
        rivals("there/is none", chunks=["none"])


def test_a_chunk_without_a_rule_has_nothing_that_is_right() -> None:
    run = {"chunk": "poet", "method": "lit_thought", "tested": 20, "right": None, "own_kl": 0.1, "fidelity": 0.5}
    run |= {"output_kl": {"plain": 0.4, "patched": 0.1}, "perplexity_ratio": 1.0, "rank": 16, "seconds": 2.0}
    found = page([{**run, "others": 0.9, "others_instructed": 0.8}]).splitlines()
    assert found[2] == "With the chunk in the prompt, 0.800 of the tokens under other system messages stay."
    assert found[-1] == "| lit_thought | 75.0% | 0.100 | 0.50 | – | 1.0000 | 0.900 | 16 | 2 |"


@pytest.mark.slow
@pytest.mark.usefixtures("_written")
def test_rivals(tmp_path: Path) -> None:
    ran = run_recipe(
        "rivals", tmp_path, "--chunks=[sentence]", "--rates=[0.01,0.001]", "--times=1.5", "--count=2",
        "--answer_tokens=3",
    )  # fmt: skip
    runs = {run["method"].partition(" (")[0]: run for run in ran.record["runs"]}
    assert list(runs) == ["lit_thought", "least squares alone", "thought vectors", "steering", SHORT, LONG]
    own, bare, short = runs["lit_thought"], runs["least squares alone"], runs[SHORT]
    assert own["rank"] == 16 < bare["rank"]
    assert own["output_kl"]["patched"] < runs["thought vectors"]["output_kl"]["patched"] < own["output_kl"]["plain"]
    assert all(run["seconds"] > 0 and 0 <= run["others"] <= 1 for run in runs.values())
    assert short["seconds"] >= own["seconds"] * 0.99
    head, *lines = [line for line in ran.page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}
