"""The recipe ``baselines``: its command line on a tiny model, its contrast and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import run_recipe

from recipes.studies.baselines import mixed_up, page

METHODS = ["thought vector", "thought matrix and vector", "contrastive steering", "function vector"]
METHODS += ["LoRA distillation", "lit_thought", "token-exact", "plain", "instructed"]


def test_baselines(tmp_path: Path) -> None:
    reduced = ["--tasks=[common_words/antonym]", "--fit=6", "--test=3", "--rank=4", "--steps=2", "--max_new_tokens=3"]
    ran = run_recipe("baselines", tmp_path, *reduced)
    assert "| token-exact |" in ran.printed
    runs = {run["method"]: run for run in ran.record["runs"]}
    assert list(runs) == METHODS
    assert all(len(run["correct"]) == len(run["equal"]) == 3 for run in runs.values())
    assert runs["token-exact"]["equal"] == [True] * 3
    assert runs["token-exact"]["output_kl"] < 1e-6
    assert runs["instructed"]["equal"] == [True] * 3
    assert runs["lit_thought"]["output_kl"] < runs["thought vector"]["output_kl"]
    assert len({run["output_kl"] for run in runs.values() if "output_kl" in run}) == 7


@pytest.mark.parametrize("seed", range(5))
def test_contrast_has_every_output_at_another_input(seed: int) -> None:
    words = {"big": "small", "hot": "cold", "up": "down", "in": "out"}
    lines = mixed_up([{"input": a, "output": b} for a, b in words.items()], seed).splitlines()
    assert lines[::2] == [f"Q: {a}" for a in words]
    outputs = [line.removeprefix("A: ") for line in lines[1::2]]
    assert sorted(outputs) == sorted(words.values())
    assert all(output != b for output, b in zip(outputs, words.values(), strict=True))


def test_table_pools_words_and_averages_tasks() -> None:
    runs = []
    for task, hits in (("one", [True, True, False, False]), ("two", [True, True])):
        own = {"correct": hits, "equal": hits, "output_kl": len(hits) / 10}
        runs.append({"task": task, "method": "lit_thought", **own})
        runs.append({"task": task, "method": "plain", "correct": [False] * len(hits), "equal": [False] * len(hits)})
        runs.append({"task": task, "method": "instructed", "correct": hits, "equal": [True] * len(hits)})
    lines = page(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| plain", "| lit_thought", "| instructed"]
    assert lines[5] == "| lit_thought | 0.50 | 1.00 | 0.667 (0.30 to 0.90) | 0.750 | 0.300 |  |  |"
