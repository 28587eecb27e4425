"""Every recipe through its real command line with its own config, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REDUCED = {
    "quickstart": ["--test=2"],
    "word_tasks": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--test=2", "--fit=4", "--max_new_tokens=3"],
    "sweep": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--preserve_weights=[1.0]", "--ridges=[0.01,0.1]"],
    "benchmark_fit": ["--pairs=[4]", "--repeats=1"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").float().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return folder


def run(name: str, tiny: Path, *arguments: str) -> str:
    command = [sys.executable, f"recipes/{name}.py", f"--config=recipes/{name}.yaml", f"--model={tiny / 'model'}"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tiny / "cache")}
    done = subprocess.run(
        [*command, *REDUCED[name], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_recipe_has_a_config_and_a_reduced_setting() -> None:
    assert {path.stem for path in RECIPES} == set(REDUCED)


def test_quickstart(tiny: Path) -> None:
    printed = run("quickstart", tiny, "--rank=4", f"--out={tiny / 'adapter'}")
    assert "| accuracy (exact match) |" in printed
    difference = float(printed.split("patched model: ")[1].split()[0])
    assert difference < 1e-4
    assert (tiny / "adapter" / "adapter_model.safetensors").is_file()


def test_word_tasks(tiny: Path) -> None:
    printed = run("word_tasks", tiny, "--rank=4", f"--out={tiny / 'words'}")
    assert "- both: mean fidelity" in printed
    record = json.loads((tiny / "words.json").read_text())
    assert [run["sites"] for run in record["runs"]] == ["both", "attn_out", "mlp_out"]
    assert record["settings"]["generated_outputs"] == 4, "labels must not be used"


def test_sweep(tiny: Path) -> None:
    run("sweep", tiny, "--ranks=[4]", "--answer_weights=[1.0]", f"--out={tiny / 'sweep'}")
    rows = json.loads((tiny / "sweep.json").read_text())
    assert len(rows) == 2
    assert rows[0]["output_kl"] <= rows[-1]["output_kl"]


def test_benchmark_fit(tiny: Path) -> None:
    run("benchmark_fit", tiny, "--rank=4", f"--out={tiny / 'benchmark'}")
    (row,) = json.loads((tiny / "benchmark.json").read_text())["rows"]
    assert row["ratio"] > 0
    assert {"preserve", "prepare", "forward", "statistics", "solve", "save"} <= set(row["stages"])


def test_splits_share_nothing() -> None:
    sys.path.insert(0, str(ROOT / "recipes"))
    from tasks import SIX_TASKS, load_split

    for task in SIX_TASKS:
        split = load_split(task, 1)
        fit = {pair["input"] for pair in split.fit}
        test = {pair["input"] for pair in split.test}
        assert len(fit) == 30
        assert not fit & test
        assert all(set(pair) == {"input"} for pair in split.fit)
        assert not any(f"Q: {word}\n" in split.instruction for word in fit | test)
