"""The recipe ``added``: its command line on a tiny model, for which somebody else writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from recipes.chunks.cases import case_of
from recipes.studies.added import ALL, JOINT, added, joint


def test_unknown_chunks_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"chunks: .*'none'"):
        added("there/is none", chunks=["none"])


def test_all_chunks_in_one_prompt_are_asked_each_one_s_questions() -> None:
    cases = [case_of(name, 0) for name in ("wizard", "vasparr")]
    together = joint(cases)
    assert together.chunk == f"{cases[0].chunk}\n\n{cases[1].chunk}"
    assert together.tested == [*cases[0].tested[:8], *cases[1].tested[:8]]
    assert together.max_new_tokens == 48
    assert together.judge is None


@pytest.mark.slow
@pytest.mark.usefixtures("_written")
def test_added(tmp_path: Path) -> None:
    ran = run_recipe("added", tmp_path, "--chunks=[sentence,wizard]", "--fit={inputs: 6, max_new_tokens: 3}")
    runs = ran.record["runs"]
    total = "sum of the first 2"
    assert [(run["patch"], run["chunk"]) for run in runs] == [
        *[("sentence alone", "sentence"), ("wizard alone", "wizard")],
        *[(total, chunk) for chunk in ("sentence", "wizard", ALL)],
        *[(JOINT, chunk) for chunk in (ALL, "sentence", "wizard")],
    ]
    by = {(run["patch"], run["chunk"]): run["output_kl"] for run in runs}
    for (_, chunk), own in by.items():
        assert own["plain"] == by[JOINT, chunk]["plain"]
    for own in (("sentence alone", "sentence"), ("wizard alone", "wizard"), (JOINT, ALL)):
        assert by[own]["patched"] < by[own]["plain"]
    head, *lines = [line for line in ran.page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert len(lines) == 1 + 4
    alone = next(line for line in lines if "sentence alone" in line)
    assert alone.split(" | ")[2:4] == ["–"] * 2
