"""The recipe ``gallery``: its command line on records of studies, and what it says of a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from recipes.harness import ROOT
from recipes.site.gallery import against

RESULTS = ROOT / "recipes" / "results"


def test_gallery(tmp_path: Path) -> None:
    ran = run_recipe("gallery", tmp_path, model=None)
    runs = ran.record["runs"]
    assert {run["kind"] for run in runs} == {"system prompt", "word task", "document"}
    summary, *cases = ran.page.split("\n## ")
    assert [case.splitlines()[0] for case in cases] == [run["name"] for run in runs]
    for run, case in zip(runs, cases, strict=True):
        assert f"[{run['name']}](#{run['name']})" in summary
        lines = [line for line in case.splitlines() if line.startswith("| ")]
        assert len(lines) == 1 + len(ran.record["settings"]["asked"]) == 1 + len(run["items"])
        assert all(sentence in case for sentence in against(run))
    assert any(against(run) for run in runs), "failures belong in it"
    assert "> You are a pirate. Talk like a pirate." in cases[0]
    assert "> Q: love A: hate" in ran.page


def test_every_answer_is_one_that_a_study_has_recorded(tmp_path: Path) -> None:
    recorded = "".join((RESULTS / f"{name}.json").read_text("utf-8") for name in _config_records())
    for run in run_recipe("gallery", tmp_path, model=None).record["runs"]:
        asked = run["items"][0]["input"] == "What can I do on a rainy Sunday?"
        assert asked == (run["kind"] == "system prompt")
        for item in run["items"]:
            assert all(json.dumps(item[which]) in recorded for which in ("plain", "instructed", "patched"))


def test_the_gallery_kept_is_the_records(tmp_path: Path) -> None:
    drawn = run_recipe("gallery", tmp_path, model=None).record
    kept = json.loads((RESULTS / "gallery.json").read_text("utf-8"))
    assert kept["runs"] == drawn["runs"], "run the recipe again"


def _config_records() -> list[str]:
    return list(yaml.safe_load((ROOT / "recipes/site/gallery.yaml").read_text("utf-8"))["records"])


def test_what_is_refused(tmp_path: Path) -> None:
    other = json.loads((RESULTS / "instruction_alone_words.json").read_text("utf-8")) | {"model": "another"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for arguments, said in (
        (["--records=[nothing]"], "records: expected names below recipes/results"),
        ([f"--records=[instruction_alone_system, {tmp_path / 'other.json'}]"], "records: expected those of one model"),
        (["--cases=[corsair]"], "cases: expected some of pirate"),
        (["--asked=[Why?]"], "asked: expected some of"),
    ):
        with pytest.raises(ThoughtError, match=said):
            run_recipe("gallery", tmp_path, *arguments, model=None)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (None, []),
        ({"plain": 0, "instructed": 0, "patched": 0}, ["there is nothing to copy"]),
        ({"plain": 0, "instructed": 10, "patched": 5}, ["Of 10 answers that the instructed model has right, 5 are"]),
        ({"plain": 0, "instructed": 10, "patched": 6}, []),
    ],
)
def test_a_failure_is_called_one(counts: dict[str, int] | None, said: list[str]) -> None:
    run: dict[str, Any] = {"right": counts, "warnings": ["It saves nothing."]}
    *found, last = against(run)
    assert last == "It saves nothing."
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))
