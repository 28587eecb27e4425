"""The recipe ``instruction_alone``: its command line on a tiny model, for which somebody else writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_runs import run_recipe

from lit_thought import ThoughtError
from recipes.chunks.documents import cut
from recipes.studies.instruction_alone import instruction_alone


@pytest.mark.usefixtures("_written")
def test_instruction_alone(tmp_path: Path) -> None:
    rows = [{"input": "Who rules Oz?", "outputs": ["Ada"]}, {"input": "Where is Oz?", "outputs": ["here"]}]
    oz = {
        "title": "Oz",
        "passage": "Ada rules Oz.\n\nThe city of Oz is green.",
        "questions": rows,
        "given": ["Is Oz green?", "Who is Ada?"],
    }
    (tmp_path / "oz.json").write_text(json.dumps(oz))
    reduced = [
        "--tasks=[common_words/antonym]",
        "--instructions=[pirate,poet]",
        f"--documents=[{tmp_path / 'oz.json'}]",
    ]
    reduced += ["--test=3", "--questions=2", "--word_tokens=3", "--answer_tokens=3", "--document_tokens=3"]
    reduced += ["--unrelated=false", "--counts=[6]", "--parts=[2]", "--document_settings={rank: 4}"]
    ran = run_recipe("instruction_alone", tmp_path, *reduced)
    runs = ran.record["runs"]
    assert [(run["name"], run["fit"]) for run in runs] == [
        *[("antonym", fit) for fit in ("written", "written, 6", "given, 30")],
        *[(name, fit) for name in ("pirate", "poet", "oz") for fit in ("written", "written, 6")],
        *[("oz", fit) for fit in ("given, 2", "given, 2, and written")],
        ("oz", "written, 2 parts"),
    ]
    assert [run["fitted"] for run in runs if run["fit"] == "written, 6"] == [6] * 4
    kinds = [run["inputs"] and run["inputs"]["kind"] for run in runs]
    assert kinds == ["demonstrations"] * 2 + [None] + ["system"] * 4 + ["document"] * 2 + [None, "document", None]
    assert [run["right"] is None for run in runs] == [run["name"] == "poet" for run in runs]
    for run in runs:
        assert run["seconds"] > 0
        assert "validate" not in run["seconds_by_part"]
        if run["name"] != "antonym" or run["inputs"] is None:  # the words that a random model writes are no words
            assert run["output_kl"]["patched"] < run["output_kl"]["plain"]
    assert "## Word tasks" in ran.page
    head, *rows = [line for line in ran.page.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert not any("{" in row for row in rows)
    (poet,) = [row.split(" | ") for row in rows if "poet, seed 0, written |" in row]
    assert poet[2:6] == ["–"] * 4
    assert "- written: KL down by" in ran.page

    (tmp_path / "more").mkdir()
    reduced += ["--seeds=[0,1]", "--tasks=[]", f"--done=[{tmp_path / 'instruction_alone.json'}]"]
    more = run_recipe("instruction_alone", tmp_path / "more", *reduced).record["runs"]
    assert more[: len(runs)] == runs
    assert [(run["name"], run["seed"]) for run in more[len(runs) :]] == [
        *[(name, 1) for name in ("pirate", "poet", "oz") for _ in range(2)],
        *[("oz", 1)] * 3,
    ]


def test_parts_are_checked_before_any_work() -> None:
    with pytest.raises(ThoughtError, match=r"parts must be .* got 0"):
        instruction_alone(model="nowhere", parts=[2, 0])


def test_cut() -> None:
    """Every paragraph is in one part, in order, and what leads to the passage before each."""
    chunk = "Use this:\n\none two three four five\n\nsix\n\nseven\n\neight nine ten"
    assert cut(chunk, 1) == [chunk]
    halves = ["Use this:\n\none two three four five", "Use this:\n\nsix\n\nseven\n\neight nine ten"]
    assert cut(chunk, 2) == halves
    every = [f"Use this:\n\n{part}" for part in ("one two three four five", "six\n\nseven", "eight nine ten")]
    assert cut(chunk, 3) == every
    assert len(cut(chunk, 9)) == 4
