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


def test_training_ends_where_it_gains_no_more_and_the_nearest_adapter_counts() -> None:
    """At a rate of zero it never gains, so it ends after four measurements, of five steps each, and the first counts;
    at one that is far too high the last need not be the nearest."""
    model = make_model().float()
    data = PairDataModule(PAIRS, INSTRUCTION, max_new_tokens=3)
    prepare_pairs(data, model, TOKENIZER)
    pairs, others = data.tokenised[1:], data.tokenised[:1]
    still = trained(model, pairs, others, learning_rate=0.0)
    assert [entry["step"] for entry in still.history] == [5, 10, 15, 20]
    assert list(still.kept) == [0]
    assert not any(own.B.any() for own in still.best(1000.0).patch.factors.values())
    learnt = trained(model, pairs, pairs, learning_rate=0.01, max_steps=60)
    best = learnt.best(1000.0)
    assert best.kl == min(entry["kl"] for entry in learnt.history) < 0.7 * still.history[0]["kl"]
    assert best.seconds == learnt.history[-1]["seconds"]
    first = learnt.best(0.0)
    assert (first.kl, first.seconds) == (learnt.history[0]["kl"], learnt.history[0]["seconds"])
    seen = [own.A for own in first.patch.factors.values()]
    assert any((before != own.A).any() for own, before in zip(best.patch.factors.values(), seen, strict=True))
    wild = trained(model, pairs, others, learning_rate=0.3, max_steps=40)
    assert wild.best(1000.0).kl == min(entry["kl"] for entry in wild.history)


def test_unknown_chunks_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"chunks: .*'none'"):
        rivals("there/is none", chunks=["none"])


def test_a_chunk_without_a_rule_has_nothing_that_is_right() -> None:
    run = {"chunk": "poet", "method": "lit_thought", "tested": 20, "right": None, "own_kl": 0.1, "fidelity": 0.5}
    run |= {"output_kl": {"plain": 0.4, "patched": 0.1}, "perplexity_ratio": 1.0, "rank": 16, "seconds": 2.0}
    run |= {"others": 0.9, "others_instructed": 0.8, "rate": None, "machine": "an abacus"}
    found = page([run]).splitlines()
    assert found[2] == "With the chunk in the prompt, 0.800 of the tokens under other system messages stay."
    assert found[-1] == "Measured on an abacus."
    assert found[-3] == "| lit_thought | 75.0% | 0.100 | 0.50 | – | 1.0000 | 0.900 | 16 | 2 |"


def test_of_several_seeds_there_are_the_mean_and_the_ends() -> None:
    run = {"chunk": "json", "method": SHORT, "tested": 20, "own_kl": 0.1, "fidelity": 0.5, "rank": 16, "others": 0.9}
    run |= {"others_instructed": 0.8, "perplexity_ratio": 1.0, "machine": "an abacus"}
    runs = [
        {**run, "output_kl": {"plain": 1.0, "patched": kl}, "right": {"plain": 0, "instructed": 9, "patched": n}}
        | {"seconds": seconds, "rate": rate}
        for kl, n, seconds, rate in ((0.1, 7, 5.0, 0.001), (0.2, 8, 5.2, 0.01), (0.3, 8, 9.0, 0.001))
    ]
    found = page(runs).splitlines()
    assert found[2].startswith("The instructed model has 9 of 20 right, the plain one 0. With the chunk")
    assert found[2].endswith("Of 3 seeds, the mean (the least to the most).")
    cells = [cell.strip() for cell in found[-3].strip("|").split("|")]
    assert cells[0] == f"{SHORT} (0.001, 0.01)"
    assert cells[1] == "80.0% (70.0% to 90.0%)"
    assert cells[4] == "7.7 (7 to 8)"
    assert cells[-1] == "6 (5 to 9)"


@pytest.mark.slow
@pytest.mark.usefixtures("_written")
def test_rivals(tmp_path: Path) -> None:
    ran = run_recipe(
        "rivals", tmp_path, "--chunks=[sentence]", "--seeds=[0]", "--rates=[0.01,0.001]", "--times=1.5", "--count=2",
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
