"""The recipe ``baselines``: its command line on a tiny model, its contrast and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import make_model, make_tokenizer

from recipes.harness import ROOT
from recipes.studies.baselines import mixed_up, table

METHODS = [
    "thought vector",
    "thought matrix and vector",
    "contrastive steering",
    "function vector",
    "LoRA distillation",
    "lit_thought",
    "token-exact",
    "plain",
    "instructed",
]


def test_baselines(tmp_path: Path) -> None:
    make_model("llama").float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "baselines"
    command = [sys.executable, "-m", "recipes.studies.baselines", "--config=recipes/studies/baselines.yaml"]
    command += [f"--model={tmp_path / 'model'}", "--tasks=[common_words/antonym]", "--fit=6", "--test=3", "--rank=4"]
    command += ["--steps=2", "--max_new_tokens=3", f"--out={out}"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| token-exact |" in done.stdout
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    runs = {run["method"]: run for run in record["runs"]}
    assert list(runs) == METHODS
    assert all(len(run["correct"]) == len(run["equal"]) == 3 for run in runs.values())
    assert runs["token-exact"]["equal"] == [True] * 3
    assert runs["token-exact"]["output_kl"] < 1e-6
    assert runs["instructed"]["equal"] == [True] * 3
    assert runs["lit_thought"]["output_kl"] < runs["thought vector"]["output_kl"]
    assert len({run["output_kl"] for run in record["runs"] if "output_kl" in run}) == 7


@pytest.mark.parametrize("seed", range(5))
def test_contrast_has_every_output_at_another_input(seed: int) -> None:
    words = [("big", "small"), ("hot", "cold"), ("up", "down"), ("in", "out")]
    found = mixed_up("".join(f"Q: {a}\nA: {b}\n" for a, b in words), seed)
    assert found.endswith("\n")
    lines = found.splitlines()
    assert lines[::2] == [f"Q: {a}" for a, _ in words]
    outputs = [line.removeprefix("A: ") for line in lines[1::2]]
    assert sorted(outputs) == sorted(b for _, b in words)
    assert all(output != b for output, (_, b) in zip(outputs, words, strict=True))


def test_table_pools_words_and_averages_tasks() -> None:
    runs = []
    for task, hits in (("one", [True, True, False, False]), ("two", [True, True])):
        runs.append(
            {"task": task, "method": "lit_thought", "correct": hits, "equal": hits, "output_kl": len(hits) / 10}
        )
        runs.append({"task": task, "method": "plain", "correct": [False] * len(hits), "equal": [False] * len(hits)})
        runs.append({"task": task, "method": "instructed", "correct": hits, "equal": [True] * len(hits)})
    lines = table(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| plain", "| lit_thought", "| instructed"]
    assert lines[5] == "| lit_thought | 0.50 | 1.00 | 0.667 (0.30 to 0.90) | 0.750 | 0.300 |  |  |"
