"""The recipe ``limits``: its command line on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from models import make_model, make_tokenizer

from recipes.harness import ROOT
from recipes.studies.limits import FORMS, demonstrations


def test_limits(tmp_path: Path) -> None:
    make_model("llama").float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    town = {"title": "Land", "passage": "the red dog sits on the blue hill"}
    town["questions"] = [{"input": text, "outputs": ["hill"]} for text in ("Who?", "Where?", "When?")]
    (tmp_path / "town.json").write_text(json.dumps(town), encoding="utf-8")
    out = tmp_path / "limits"
    command = [
        sys.executable,
        "-m",
        "recipes.studies.limits",
        "--config=recipes/studies/limits.yaml",
        f"--model={tmp_path / 'model'}",
    ]
    command += [f"--document={tmp_path / 'town.json'}", f"--out={out}"]
    command += ["--shots=3", "--fit=4", "--test=3", "--rank=4", "--document_rank=4", "--max_new_tokens=3"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["case"] for row in rows] == [
        "facts that were fitted",
        "other facts of it",
        *FORMS,
        "fitted on outputs of the instructed model",
        "fitted on right outputs",
    ]
    fitted, other = ({item["input"] for item in row["items"]} for row in rows[:2])
    assert (fitted, other) == ({"Who?", "When?"}, {"Where?"})
    words = [{item["input"] for item in row["items"]} for row in rows[2:6]]
    assert all(row == words[0] for row in words)
    assert rows[0]["output_kl"]["patched"] < rows[0]["output_kl"]["plain"]
    assert rows[6]["output_kl"] != rows[7]["output_kl"], "right outputs must reach the fit"
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 1 + len(rows)


def test_demonstrations_take_a_form() -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "up", "output": "down"}]
    assert demonstrations(pairs, FORMS["hot -> …"]) == "hot -> cold\nup -> down\n"
    assert demonstrations(pairs) == "Q: hot\nA: cold\nQ: up\nA: down\n"
