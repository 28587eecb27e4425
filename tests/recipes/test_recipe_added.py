"""The recipe ``added``: its command line on a tiny model, for which somebody else writes."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.inputs import pen
from lit_thought.runs.generate import Generation
from recipes.studies.added import JOINT, added


def test_unknown_chunks_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"chunks: .*'none'"):
        added("there/is none", chunks=["none"])


@pytest.mark.slow
def test_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = count()

    def write(model: object, tokenizer: object, prompts: list, **options: object) -> list[Generation]:
        return [Generation(f"What is the use of number {next(number)}?", True, ()) for _ in prompts]

    monkeypatch.setattr(pen, "generate", write)
    ran = run_recipe("added", tmp_path, "--chunks=[sentence,wizard]", "--fit={inputs: 6, max_new_tokens: 3}")
    runs = ran.record["runs"]
    patches = ["sentence alone", "wizard alone", "sum of the first 2", JOINT]
    assert [(run["patch"], run["chunk"]) for run in runs] == [
        (patch, chunk) for patch in patches for chunk in ("sentence", "wizard")
    ]
    by = {(run["patch"], run["chunk"]): run["output_kl"] for run in runs}
    plain = {chunk: by["wizard alone", chunk]["plain"] for chunk in ("sentence", "wizard")}
    assert all(own["plain"] == plain[chunk] for (_, chunk), own in by.items())
    assert by["sentence alone", "sentence"]["patched"] < plain["sentence"]
    head, *lines = [line for line in ran.page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert len(lines) == 1 + len(patches)
