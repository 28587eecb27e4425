"""Which versions of the libraries that it rests on lit_thought runs with: the oldest that it states, and the newest.

    python -m recipes.robustness.versions --config recipes/robustness/versions.yaml

For each of the two a virtual environment is made, the named packages are installed there by pip, which also chooses
what they need, and a selection of the tests is run. Everything else, torch above all, is taken from the environment
that runs the recipe, so that it takes some megabytes instead of a gigabyte. The oldest versions are those in
pyproject.toml, the newest those that pip finds. The newest of everything, and all tests: ``.ci/newest``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from lit_thought.errors import ThoughtError
from recipes.harness import ROOT, command_line, table, write_results
from recipes.robustness.junit import Case, count, run, run_tests

SHARED = "torch"


def main(
    packages: list[str],
    tests: list[str],
    combinations: Sequence[Literal["newest", "oldest"]] = ("newest", "oldest"),
    minutes: float = 30,
    out: str = "recipes/results/versions",
) -> None:
    """Install and test every combination, and write the table; exit code 1 where one does not pass."""
    minima = stated_minima((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    unknown = [name for name in packages if name not in minima]
    if unknown:
        raise ThoughtError(f"packages: pyproject.toml states no minimum of {unknown[0]!r}; expected {sorted(minima)}.")
    lines = []
    for name in combinations:
        asked = [f"{package}=={minima[package]}" if name == "oldest" else package for package in packages]
        print(f"{name}: {' '.join(asked)} …", flush=True)
        lines.append({"name": name, **tried(asked, [*packages, SHARED], tests, 60 * minutes)})
        print(*row(lines[-1], packages), flush=True)
    record = {
        "settings": {"packages": packages, "tests": tests, "minutes": minutes},
        "minima": {name: minima[name] for name in [*packages, SHARED]},
        "python": ".".join(map(str, sys.version_info[:3])),
        "combinations": lines,
    }
    write_results(__file__, out, page(record), record)
    failed = [line["name"] for line in lines if not is_fine(line)]
    if failed:
        sys.exit(f"{' and '.join(failed)} did not pass.")


def is_fine(line: Mapping[str, Any]) -> bool:
    """Whether the tests of a combination came to their end, and none failed."""
    return line["failed"] == 0 and bool(line["passed"])


def stated_minima(pyproject: str) -> dict[str, str]:
    """The version after ``>=`` of each dependency that has one, by the text of pyproject.toml."""
    found = {}
    for line in tomllib.loads(pyproject)["project"]["dependencies"]:
        requirement = Requirement(line)
        for part in requirement.specifier:
            if part.operator == ">=":
                found[requirement.name] = part.version
    return found


def tried(specifiers: Sequence[str], packages: Sequence[str], tests: Sequence[str], seconds: float) -> dict[str, Any]:
    """What came of one combination: the versions installed, and of the tests how many passed, failed and skipped; None
    for what did not come to its end."""
    with TemporaryDirectory() as folder:
        found: dict[str, Any] = {"asked": list(specifiers), "installed": None, **counts(None)}
        python = environment(Path(folder), specifiers)
        if python is not None:
            started = time.monotonic()
            found |= counts(run_tests(tests, python, seconds))
            found |= {"installed": versions_in(python, packages), "seconds": round(time.monotonic() - started)}
        return found


def environment(folder: Path, specifiers: Sequence[str]) -> str | None:
    """The Python of a new virtual environment in ``folder`` with these packages, before those of the running one; None
    where pip finds no way to install them."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    own = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], 60).stdout.strip()
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(own) / "shared.pth").write_text(line, encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check", *specifiers]
    done = run(install, 1800)
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr, flush=True)
    return python if done.returncode == 0 else None


def versions_in(python: str, packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages in an environment."""
    lines = "import json, sys; from importlib.metadata import version; "
    lines += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(run([python, "-c", lines, *packages], 60).stdout)
    return found


def counts(cases: Sequence[Case] | None) -> dict[str, Any]:
    """Of tests, how many passed, failed and skipped, and which failed; None where the run did not come to its end."""
    if cases is None:
        return {"passed": None, "failed": None, "skipped": None, "failures": []}
    numbers = {end: count(cases, end) for end in ("passed", "failed", "skipped")}
    return {**numbers, "failures": [case.name for case in cases if case.end == "failed"]}


def page(record: Mapping[str, Any]) -> str:
    """A record's page; the scorecard shows it, too."""
    packages, lines = record["settings"]["packages"], record["combinations"]
    torch = next((line["installed"][SHARED] for line in lines if line["installed"]), None)
    stated = record["minima"][SHARED]
    fine = sum(map(is_fine, lines))
    head = ["combination", *packages, "passed", "failed", "skipped", "seconds"]
    parts = [
        f"{fine} of {len(lines)} combinations pass {len(record['settings']['tests'])} files or single tests, on Python "
        f"{record['python']}.\n",
        table(head, (row(line, packages) for line in lines), left=1 + len(packages)),
    ]
    if torch is not None:
        reached = Version(torch).release[:2] == Version(stated).release[:2]
        untested = "" if reached else f"; its oldest stated version, {stated}, was not tested"
        own = "Each in a virtual environment of its own"
        parts.append(f"{own} over one with torch {torch}, the same for all{untested}.\n")
    failures = [f"- {line['name']}: {name}" for line in lines for name in line["failures"]]
    return "\n".join([*parts, *(["Failed:\n", *failures, ""] if failures else [])])


def row(line: Mapping[str, Any], packages: Sequence[str]) -> list[Any]:
    """One combination's line of the table."""
    installed = line["installed"] or {}
    numbers = [line[key] for key in ("passed", "failed", "skipped")]
    if numbers[0] is None:
        numbers[0] = "did not end" if installed else "not installed"
    return [line["name"], *(installed.get(name) for name in packages), *numbers, line.get("seconds")]


if __name__ == "__main__":
    command_line(main)
