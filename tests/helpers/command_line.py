"""What a user types, and the files that it names."""

from __future__ import annotations

import json
from pathlib import Path

from models import make_model, make_tokenizer

DEMONSTRATIONS = "Q: hot\nA: cold\nQ: big\nA: small\n"
INPUTS = ["up", "good", "fox", "dog", "brown"]


def make_files(folder: Path) -> None:
    """Write a tiny model, a pairs file, a test file and an instruction file."""
    make_model("llama").float().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"input": word, "output": "down"} for word in INPUTS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "test.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    (folder / "instruction.txt").write_text(DEMONSTRATIONS, encoding="utf-8")


def fit_arguments(files: Path, out: str = "adapter") -> list[str]:
    return [
        "fit",
        f"--model={files / 'model'}",
        f"--pairs={files / 'pairs.jsonl'}",
        f"--instruction_file={files / 'instruction.txt'}",
        f"--out={files / out}",
        "--rank=4",
        "--preserve_tokens=300",
        "--progress=false",
    ]
