"""Tests run by a recipe, and what came of them: for records that say what was tried, not what was meant to be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from recipes.harness import ROOT


@dataclass(frozen=True)
class Case:
    """One test: its name, ``passed``, ``failed`` or ``skipped``, and why it was skipped."""

    name: str
    end: str
    reason: str = ""


def run_tests(tests: Sequence[str], python: str = sys.executable, seconds: float = 1800) -> list[Case] | None:
    """Run files of tests, or single tests, of this checkout; None when the run did not come to its end.

    Args:
        tests: as pytest takes them.
        python: the interpreter of the environment to run them in.
        seconds: longest time.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            done = run([*command, *tests], seconds)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            print(f"{done.stdout[-3000:]}{done.stderr[-1000:]}", file=sys.stderr, flush=True)
        # 0: all passed, 1: some failed; anything else is no run of all of them
        whole = done.returncode in (0, 1) and report.is_file()
        return read_report(report.read_text(encoding="utf-8")) if whole else None


def run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command in this checkout, which it finds before any installed lit_thought."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def read_report(text: str) -> list[Case]:
    """The tests in a JUnit report."""
    cases = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            cases.append(Case(name, "failed"))
        elif skipped is not None:
            cases.append(Case(name, "skipped", (skipped.get("message") or "").removeprefix("Skipped: ")))
        else:
            cases.append(Case(name, "passed"))
    return cases


def count(cases: Sequence[Case], end: str) -> int:
    """How many ended so."""
    return sum(case.end == end for case in cases)
