"""How the library behaves when things go wrong, counted.

    python -m recipes.robustness.scorecard --config recipes/robustness/scorecard.yaml

Four parts, the first two on a tiny random model. *Malformed input* (fuzzing.py): examples of everything that
the library reads are spoilt in a seeded way, thousands of times, and each reading must end in the library's own error
with a message, or do no harm; nothing else may escape and no file be left behind. *Faults* (faults.py): a fit
is struck by a full disk, a missing permission, Ctrl-C, SIGKILL, weights that are not finite and a forward pass that
raises; the model must be left bit for bit as it was, without hooks, and no partial output be there. *Serving*: for each
way to serve a patch the tests are run that put it to use; of those that did not run, for what they need is not
installed, the reason is told. *Versions*: the table that versions.py has written.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lit_thought.errors import ThoughtError
from recipes.harness import provenance, write_results
from recipes.robustness.faults import FAULTS, Outcome
from recipes.robustness.fuzz_folders import FOLDERS
from recipes.robustness.fuzz_inputs import INPUTS
from recipes.robustness.fuzzing import Tally, fuzz
from recipes.robustness.junit import Case, count, run_tests
from recipes.robustness.versions import table as versions_table

KINDS = {**INPUTS, **FOLDERS}


def main(
    cases: dict[str, int],
    faults: list[str],
    serving: dict[str, list[str]],
    versions: str = "recipes/results/versions.json",
    seed: int = 0,
    out: str = "recipes/results/scorecard",
) -> None:
    """Try all of it and write the scorecard.

    Args:
        cases: how many spoilt copies to try of each kind of input, of those in fuzz_*.py.
        faults: which faults to try, of those in faults.py.
        serving: for each way to serve a patch the tests that do, as pytest takes them.
        versions: the record of versions.py.
        seed: seed of the changes.
        out: path of the two result files, without suffix.
    """
    unknown = [name for name in faults if name not in FAULTS]
    if unknown:
        raise ThoughtError(f"faults: there is no {unknown[0]!r}; expected some of {list(FAULTS)}.")
    started = _cpu_seconds()
    with tempfile.TemporaryDirectory() as root:
        tallies = fuzz(KINDS, cases, seed, Path(root), lambda name: print(f"malformed {name} …", flush=True))
    outcomes: list[Outcome] = []
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in faults:
            print(f"{name} …", flush=True)
            outcomes += FAULTS[name]()
    logging.disable(logging.NOTSET)
    served: dict[str, list[Case] | None] = {}
    for name, tests in serving.items():
        print(f"serving: {name} …", flush=True)
        served[name] = run_tests(tests)
    tried = read_versions(versions)
    record = scorecard(tallies, outcomes, served, tried)
    record |= {
        "settings": {"cases": cases, "faults": faults, "serving": serving, "seed": seed},
        "system": platform.system(),
        **provenance(),
    }
    seconds = _cpu_seconds() - started
    page = "\n".join([table(tallies, outcomes, seconds), *serving_lines(served), *version_lines(tried)])
    print(page)
    write_results(out, f"{page}\nCommit {record['commit']}, {record['system']}.\n", record)


def read_versions(path: str) -> dict[str, Any] | None:
    """The record of versions.py, None where there is none yet."""
    file = Path(path)
    record: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return record


def scorecard(
    tallies: dict[str, Tally],
    outcomes: Sequence[Outcome],
    served: Mapping[str, Sequence[Case] | None],
    tried: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All figures, as JSON values."""
    return {
        "serving": {name: None if cases is None else list(map(asdict, cases)) for name, cases in served.items()},
        "versions_tried": None if tried is None else {key: tried[key] for key in ("commit", "combinations")},
        "malformed": {name: {**asdict(tally), "changes": dict(tally.changes)} for name, tally in tallies.items()},
        "faults": [{**asdict(outcome), "fine": outcome.fine} for outcome in outcomes],
    }


def table(tallies: dict[str, Tally], outcomes: Sequence[Outcome], seconds: float) -> str:
    """The page."""
    tried, refused, read = (
        sum(getattr(tally, key) for tally in tallies.values()) for key in ("tried", "refused", "read")
    )
    escaped = [(name, entry) for name, tally in tallies.items() for entry in tally.escaped]
    left = [(name, entry) for name, tally in tallies.items() for entry in tally.left]
    bad = [outcome for outcome in outcomes if not outcome.fine]
    lines = [
        "`python -m recipes.robustness.scorecard --config recipes/robustness/scorecard.yaml`",
        "",
        f"{tried:,} malformed inputs: {refused:,} refused with the library's own error, {read:,} without harm, "
        f"{len(escaped)} in another exception, {len(left)} left a file behind. {len(outcomes)} faults: "
        f"{len(outcomes) - len(bad)} left the model bit for bit as it was, without hooks, and no partial output. "
        f"All of it took {seconds:.0f} s of one core.",
        "",
        "## Malformed input",
        "",
        "| input | tried | refused | without harm | another exception | files left |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {tally.tried} | {tally.refused} | {tally.read} | {len(tally.escaped)} | {len(tally.left)} |"
            for name, tally in tallies.items()
        ),
        "",
        "A change that does no harm is one of a text's own words, of a key that nothing reads, or of a stored number. "
        "A damaged preservation cache is made anew, and so read. What was changed, of all kinds together: "
        + ", ".join(f"{name} {count:,}" for name, count in _changes(tallies).most_common())
        + ".",
        "",
        "## Faults",
        "",
        "| fault | struck | ended in | model unchanged | partial output | next fit the same |",
        "|---|---:|---|---:|---:|---:|",
        *(_line(name, [outcome for outcome in outcomes if outcome.fault == name]) for name in _names(outcomes)),
        "",
        "Struck: the places and calls at which it happened. A killed process leaves no model to compare; the next fit "
        "of the same call must give the patch of one that nothing struck, and remove what the killed one left.",
        "",
    ]
    wrong = [f"- {name}: {entry['change']}, case {entry['number']}: {entry['end']}" for name, entry in escaped]
    wrong += [f"- {name}: {entry['change']}, case {entry['number']}: left {entry['files']}" for name, entry in left]
    wrong += [f"- {outcome.fault}, {outcome.where}: {outcome}" for outcome in bad]
    return "\n".join([*lines, *(["## Missed", "", *wrong, ""] if wrong else [])])


def serving_lines(served: Mapping[str, Sequence[Case] | None]) -> list[str]:
    """The part on ways to serve a patch."""
    rows, reasons = [], []
    for name, cases in served.items():
        end = verdict(cases)
        numbers = ["–"] * 3 if cases is None else [str(count(cases, end)) for end in ("passed", "failed", "skipped")]
        rows.append(f"| {name} | {end} | {' | '.join(numbers)} |")
        reasons += [f"- {name}: {reason}" for reason in dict.fromkeys(case.reason for case in cases or ()) if reason]
    if not rows:
        return []
    verified = sum(verdict(cases) == "verified" for cases in served.values())
    head = [f"{verified} of {len(rows)} ways to serve a patch verified, by tests that use them.", ""]
    table = ["| way | verdict | tests passed | failed | skipped |", "|---|---|---:|---:|---:|", *rows, ""]
    return ["## Serving", "", *head, *table, *(["Skipped for:", "", *reasons, ""] if reasons else [])]


def verdict(cases: Sequence[Case] | None) -> str:
    """``verified`` where tests passed and none failed, ``failed`` where one did or they did not come to their end,
    ``not run`` where all were skipped."""
    if cases is None or count(cases, "failed"):
        return "failed"
    return "verified" if count(cases, "passed") else "not run"


def version_lines(tried: Mapping[str, Any] | None) -> list[str]:
    """The part on versions."""
    head = ["## Versions", "", "`python -m recipes.robustness.versions --config recipes/robustness/versions.yaml`", ""]
    if tried is None:
        return [*head, "Not run.", ""]
    return [*head, *versions_table(tried), "", f"Of commit {tried['commit']}.", ""]


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _changes(tallies: dict[str, Tally]) -> Counter[str]:
    return sum((tally.changes for tally in tallies.values()), Counter())


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.fault for outcome in outcomes))


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    ends = ", ".join(sorted({outcome.end or "no error" for outcome in outcomes}))
    unchanged = [outcome.unchanged for outcome in outcomes if outcome.unchanged is not None]
    again = [outcome.again for outcome in outcomes if outcome.again is not None]
    partial = sum(bool(outcome.partial) for outcome in outcomes)
    return f"| {name} | {len(outcomes)} | {ends} | {_share(unchanged)} | {partial} | {_share(again)} |"


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}" if flags else "–"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
