"""What the recipes share: word-level tasks, choices of sites, result files."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_thought.files import atomic_file
from lit_thought.fit.provenance import versions
from lit_thought.prompts.pairs import load_pairs
from lit_thought.solve.intervals import wilson

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
DATA = ROOT / "recipes" / "data"
SIX_TASKS = (
    "common_words/country-capital",
    "common_words/antonym",
    "common_words/english-french",
    "function_vectors/singular-plural",
    "function_vectors/present-past",
    "function_vectors/capitalize",
)
TEMPLATE = "Q: {input}\nA: {output}\n"
_ONE_STEP: dict[str, Any] = {"sites": ("mlp_in",), "steps": 1, "step_size": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "both": {"sites": ("attn_out", "mlp_out")},
    "auto": {
        "sites": ("attn_out", "mlp_out"),
        **dict.fromkeys(("ridge", "preserve_weight", "rank", "scale", "blocks"), "auto"),
    },
    "attn_out": {"sites": ("attn_out",)},
    "mlp_out": {"sites": ("mlp_out",)},
    "mlp_in": {"sites": ("mlp_in",)},
    "matrix": {"sites": ("mlp_in",), "parts": ("matrix",)},
    "vector": {"sites": ("mlp_in",), "parts": ("vector",)},
    "mlp_in, 1 step": {**_ONE_STEP},
    "matrix, 1 step": {**_ONE_STEP, "parts": ("matrix",)},
    "vector, 1 step": {**_ONE_STEP, "parts": ("vector",)},
    "mlp_in, teacher-forced": {**_ONE_STEP, "order": "teacher-forced"},
    "mlp_in, blocks 15 to 29": {**_ONE_STEP, "blocks": tuple(range(15, 30))},
    "mlp_in, block 20": {**_ONE_STEP, "blocks": (20,)},
    "vector, block 20": {**_ONE_STEP, "blocks": (20,), "parts": ("vector",)},
    "mlp_in, blocks 18 to 21": {**_ONE_STEP, "blocks": (18, 19, 20, 21)},
    "mlp_in, 2 steps": {"sites": ("mlp_in",), "steps": 2, "step_size": 0.5},
    "mlp_in, 3 batches": {"sites": ("mlp_in",), "steps": 3, "step_size": 0.5, "pairs_per_step": 10},
    "mlp_in, 4 steps": {"sites": ("mlp_in",), "steps": 4, "step_size": 0.5},
    "mlp_in, 4 short steps": {"sites": ("mlp_in",), "steps": 4, "step_size": 0.25},
    "attn_out + mlp_in": {"sites": ("attn_out", "mlp_in"), "parts": ("matrix",)},
    "all three": {"sites": ("attn_out", "mlp_in", "mlp_out"), "parts": ("matrix",)},
}
"""What the recipes compare, as arguments of ``transmute``: our default, the same with settings chosen on pairs held
back, its sites alone, the paper's site with thought matrix and thought vector together and apart, variants of it."""


@dataclass(frozen=True)
class Split:
    """One seeded split of a task: the instruction (demonstrations), inputs to fit, pairs to test."""

    name: str
    instruction: str
    fit: list[dict[str, str]]
    test: list[dict[str, str]]


def load_split(task: str, seed: int, shots: int = 10, fit: int = 30, test: int = 100) -> Split:
    """Shuffle a task with a seed: ``shots`` demonstrations, ``fit`` inputs without outputs, up to ``test`` others.

    Args:
        task: a name below ``recipes/data`` or the path of a JSON, JSONL or CSV file of input/output pairs.
        seed: seed of the shuffle.
        shots: demonstrations in the instruction.
        fit: inputs to fit on; their outputs are dropped.
        test: most pairs to test on.
    """
    path = DATA / f"{task}.json"
    pairs = load_pairs(path if path.is_file() else task)
    random.Random(seed).shuffle(pairs)
    rest = pairs[shots:]
    fitted = [{"input": pair["input"]} for pair in rest[:fit]]
    return Split(Path(task).stem, demonstrations(pairs[:shots]), fitted, rest[fit : fit + test])


def demonstrations(pairs: Sequence[Mapping[str, str]], form: str = TEMPLATE) -> str:
    """Pairs written in a form, one after the other."""
    return "".join(form.replace("{input}", pair["input"]).replace("{output}", pair["output"]) for pair in pairs)


def shown(model: str) -> str:
    """A model's name for results: of a path on this machine the last part only."""
    return Path(model).name if Path(model).exists() else model


def provenance() -> dict[str, Any]:
    """For a record: ``commit``, what git calls the recipes' checkout, or None without git, and ``versions``.

    Changed files make it dirty, but for results, of which one recipe writes some after another.
    """
    commit = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)recipes/results")
    return {"commit": f"{commit}-dirty" if commit and changed else commit, "versions": versions()}


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=DATA, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_results(out: str | Path, table: str, record: dict[str, Any]) -> None:
    """Write a Markdown table and a JSON record to ``out`` with the suffixes .md and .json; a record without
    :func:`provenance` gets it, and the page a last line with it."""
    if "commit" not in record:
        about = provenance()
        packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        record = {**about, **record}
        table = f"{table.rstrip()}\n\nCommit {about['commit']}; {packages}.\n"
    for suffix, content in ((".md", table), (".json", json.dumps(record, indent=1) + "\n")):
        with atomic_file(Path(out).with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")


def share(hits: Sequence[bool]) -> str:
    """A share with its 95 % interval (Wilson), for a table."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.2f} ({low:.2f} to {high:.2f})"


def save_figure(figure: Any, out: str | Path) -> None:
    """Write a matplotlib figure to ``out`` with the suffix .svg, the same bytes for the same figure."""
    import matplotlib

    with (
        matplotlib.rc_context({"svg.hashsalt": "lit_thought"}),
        atomic_file(Path(out).with_suffix(".svg")) as temporary,
    ):
        figure.savefig(temporary, metadata={"Date": None})
