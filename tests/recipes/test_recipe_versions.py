"""The recipe ``versions``: what it asks pip for, what it counts, its page, and one environment of its own."""

from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from recipe_runs import CONFIGS, all_exist

from lit_thought.errors import ThoughtError
from recipes.harness import ROOT
from recipes.robustness.junit import Case, read_report, run_tests
from recipes.robustness.versions import counts, environment, main, page, stated_minima, versions_in

PROJECT = '[project]\ndependencies = ["one>=1.2,<3", "two[extra]>=0.4", "three", "four==5"]\n'
REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_x" name="test_a" time="0.1"/>
<testcase classname="tests.test_x" name="test_b"><failure message="assert 0">trace</failure></testcase>
<testcase classname="tests.test_x" name="test_c"><error message="fixture">trace</error></testcase>
<testcase classname="tests.test_y" name="test_d"><skipped message="no GPU">x.py:3: no GPU</skipped></testcase>
</testsuite></testsuites>"""


def test_minima() -> None:
    assert stated_minima(PROJECT) == {"one": "1.2", "two": "0.4"}


def test_counts_of_a_report() -> None:
    cases = read_report(REPORT)
    assert cases == [
        Case("tests.test_x.test_a", "passed"),
        Case("tests.test_x.test_b", "failed"),
        Case("tests.test_x.test_c", "failed"),
        Case("tests.test_y.test_d", "skipped", "no GPU"),
    ]
    failures = ["tests.test_x.test_b", "tests.test_x.test_c"]
    assert counts(cases) == {"passed": 1, "failed": 2, "skipped": 1, "failures": failures}
    assert counts(None)["passed"] is None


def test_the_page_says_what_did_not_run() -> None:
    fine = {"passed": 9, "failed": 0, "skipped": 1, "failures": [], "seconds": 7}
    installed = {"one": "3.0", "two": "0.9", "torch": "2.13.0+cpu"}
    lines = [
        {"name": "newest", "installed": installed, **fine},
        {"name": "oldest", "installed": {**installed, "one": "1.2"}, **fine, "failed": 1, "failures": ["tests.a"]},
        {"name": "none", "installed": None, **counts(None)},
        {"name": "all oldest", "installed": {**installed, "one": "1.2", "two": "0.4"}, **counts(None), "seconds": 60},
    ]
    record = {
        "settings": {"packages": ["one", "two"], "tests": ["tests/test_a.py"]},
        "minima": {"one": "1.2", "two": "0.4", "torch": "2.6"},
        "python": "3.11.7",
        "combinations": lines,
    }
    text = page(record)
    assert "1 of 4 combinations pass" in text
    assert "| newest | 3.0 | 0.9 | 9 | 0 | 1 | 7 |" in text
    assert "| none | – | – | not installed | – | – | – |" in text
    assert "| all oldest | 1.2 | 0.4 | did not end | – | – | 60 |" in text
    assert "- oldest: tests.a" in text
    assert "torch 2.13.0+cpu, the same for all; its oldest stated version, 2.6, was not tested" in text
    record["minima"]["torch"] = "2.13"
    assert "was not tested" not in page(record)


def wheel(folder: Path, name: str, version: str) -> str:
    """An empty package, for which pip asks no registry."""
    about = f"{name}-{version}.dist-info"
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return str(file)


@pytest.mark.slow
def test_an_environment_has_its_own_versions_before_those_of_the_running_one(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", [wheel(tmp_path, "peft", "0.0.7")])
    assert python is not None
    assert python.startswith(str(tmp_path))
    torch = version("torch")
    assert versions_in(python, ["peft", "torch"]) == {"peft": "0.0.7", "torch": torch}
    assert environment(tmp_path / "other", [str(tmp_path / "none-1.0-py3-none-any.whl")]) is None


def test_the_selection_is_of_tests_that_there_are() -> None:
    config = yaml.safe_load(CONFIGS["versions"].read_text(encoding="utf-8"))
    assert all_exist(config["tests"])
    assert set(config["packages"]) <= set(stated_minima((ROOT / "pyproject.toml").read_text()))


def test_a_run_that_does_not_come_to_its_end_counts_nothing() -> None:
    assert run_tests(["tests/test_there_is_none.py"], "false") is None


def test_unknown_packages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"pyproject\.toml states no minimum of 'numpy'"):
        main(packages=["numpy"], tests=[], out=str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []
