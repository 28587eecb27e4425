"""The recipe ``scorecard``: its command line, reduced, and its page on hand-made figures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_runs import CONFIGS, all_exist, run_recipe

from lit_thought.errors import ThoughtError
from recipes.robustness.faults import FAULTS, Outcome
from recipes.robustness.fuzzing import Tally
from recipes.robustness.junit import Case
from recipes.robustness.scorecard import (
    KINDS,
    faults_part,
    main,
    malformed_part,
    missed_part,
    scorecard,
    serving_part,
    summary,
    verdict,
    versions_part,
)


def test_scorecard(tmp_path: Path) -> None:
    test = tmp_path / "tests" / "test_way.py"
    test.parent.mkdir()
    test.write_text("def test_one():\n    pass\n", encoding="utf-8")
    cases = json.dumps({"templates": 30, "unfinished fits": 5})
    reduced = [f"--cases={cases}", "--faults=[forward raises,file size limit]", f"--versions={tmp_path / 'none.json'}"]
    ran = run_recipe("scorecard", tmp_path, *reduced, f"--serving={{a way: [{test}]}}", model=None)
    record = ran.record
    counts = {name: (t["tried"], t["refused"] + t["read"]) for name, t in record["malformed"].items()}
    assert counts == {"templates": (30, 30), "unfinished fits": (5, 5)}
    assert {fault["fault"] for fault in record["faults"]} == {"forward raises", "file size limit"}
    assert all(fault["fine"] for fault in record["faults"])
    assert ran.page.startswith("`python -m recipes.robustness.scorecard`")
    assert "| a way | verified | 1 | 0 | 0 |" in ran.page
    assert "Not run." in ran.page.partition("## Versions")[2]
    assert [case["end"] for case in record["serving"]["a way"]] == ["passed"]
    assert record["versions_tried"] is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scorecard.json", "scorecard.md", "tests"]


def test_the_config_names_every_kind_and_fault_and_enough_cases() -> None:
    config = yaml.safe_load(CONFIGS["scorecard"].read_text(encoding="utf-8"))
    assert set(config["cases"]) == set(KINDS)
    assert set(config["faults"]) == set(FAULTS)
    assert sum(config["cases"].values()) >= 10_000
    assert all(all_exist(tests) for tests in config["serving"].values())


def test_what_was_not_run_is_not_verified() -> None:
    passed, skipped = Case("a", "passed"), Case("b", "skipped", "vLLM is not installed")
    served = {
        "one": [passed, skipped],
        "two": [skipped, skipped],
        "three": [passed, Case("c", "failed")],
        "four": None,
        "five": [],
    }
    assert [verdict(cases) for cases in served.values()] == ["verified", "not run", "failed", "failed", "not run"]
    page = serving_part(served)
    assert "1 of 5 ways to serve a patch verified" in page
    assert "| one | verified | 1 | 0 | 1 |" in page
    assert "| two | not run | 0 | 0 | 2 |" in page
    assert "| four | failed | – | – | – |" in page
    assert page.count("- two: vLLM is not installed") == 1
    assert serving_part({}) == ""
    assert "Not run." in versions_part(None)


def test_the_page_counts_and_names_what_went_wrong() -> None:
    bad = {"number": 7, "change": "bytes: flip", "end": "KeyError: 'x'"}
    tallies = {
        "pairs": Tally(10, 6, 3, [bad], [], Counter(bytes=4, value=6)),
        "texts": Tally(5, 4, 1, [], [{**bad, "end": "read", "files": ["example/x"]}], Counter(bytes=5)),
    }
    outcomes = [
        Outcome("disk full", "write 1", "OSError", True, []),
        Outcome("disk full", "write 2", "OSError", False, []),
        Outcome("SIGKILL", "solve", "killed", None, ["sums"], True),
        Outcome("SIGKILL", "solve, 2", "killed", None, [], False),
        Outcome("Ctrl-C", "solve", None, True, []),
    ]
    found = summary(tallies, outcomes, 60)
    assert "15 malformed inputs: 10 refused with the library's own error, 4 without harm, 1 in another exc" in found
    assert "5 faults: 1 of 3 left the model" in found
    assert "after 0 of 2 killed processes" in found
    assert "| pairs | 10 | 6 | 3 | 1 | 0 |" in malformed_part(tallies)
    assert "all kinds together: bytes 9, value 6." in malformed_part(tallies)
    page = faults_part(outcomes)
    assert "| disk full | 2 | OSError | 1 of 2 | 0 | – |" in page
    assert "| SIGKILL | 2 | killed | – | 1 | 1 of 2 |" in page
    assert "| Ctrl-C | 1 | no error | 1 of 1 | 0 | – |" in page
    missed = missed_part(tallies, outcomes)
    assert "case 7: KeyError: 'x'" in missed
    assert "left ['example/x']" in missed
    assert missed.count("\n- ") == 6
    record = scorecard(tallies, outcomes, {"one": [Case("a", "passed")], "two": None}, None)
    assert [fault["fine"] for fault in record["faults"]] == [True, False, False, False, False]
    assert record["serving"] == {"one": [{"name": "a", "end": "passed", "reason": ""}], "two": None}
    assert missed_part({"texts": Tally(1, 1)}, outcomes[:1]) == ""


@pytest.mark.parametrize(
    "arguments", [{"cases": {"pears": 3}, "faults": []}, {"cases": {}, "faults": ["flood"]}], ids=["cases", "faults"]
)
def test_unknown_names_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ThoughtError, match="expected some of"):
        main(**arguments, serving={}, out="unused")
