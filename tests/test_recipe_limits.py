"""The recipe ``limits``: its command line on a tiny model, and its list of numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

from limits import FORMS, NAMES, code_list, demonstrations  # noqa: E402


def test_limits(tmp_path: Path) -> None:
    make_model("llama").float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "limits"
    command = [sys.executable, "recipes/limits.py", "--config=recipes/limits.yaml", f"--model={tmp_path / 'model'}"]
    command += ["--names=6", "--shots=3", "--fit=4", "--test=3", "--rank=4", "--max_new_tokens=3", f"--out={out}"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["case"] for row in rows] == [
        "names that were fitted",
        "other names of the list",
        *FORMS,
        "fitted on outputs of the instructed model",
        "fitted on right outputs",
    ]
    fitted, other = ({item["input"] for item in row["items"]} for row in rows[:2])
    assert (fitted, other) == ({"Anna", "Clara", "Emma"}, {"Ben", "David", "Frank"})
    words = [{item["input"] for item in row["items"]} for row in rows[2:6]]
    assert all(row == words[0] for row in words)
    assert rows[0]["output_kl"]["patched"] < rows[0]["output_kl"]["plain"]
    assert rows[6]["output_kl"] != rows[7]["output_kl"], "right outputs must reach the fit"
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 1 + len(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_different_and_seeded(seed: int) -> None:
    entries = code_list(NAMES, seed)
    assert len({entry["output"] for entry in entries}) == len(NAMES) == len(set(NAMES))
    assert all(10 <= int(entry["output"]) <= 99 for entry in entries)
    assert entries == code_list(NAMES, seed) != code_list(NAMES, seed + 1)


def test_demonstrations_take_a_form() -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "up", "output": "down"}]
    assert demonstrations(pairs, FORMS["hot -> …"]) == "hot -> cold\nup -> down\n"
    assert demonstrations(pairs) == "Q: hot\nA: cold\nQ: up\nA: down\n"
