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

from recipes.harness import check_names, command_line, table, write_results
from recipes.robustness.faults import FAULTS, Outcome
from recipes.robustness.fuzz_folders import FOLDERS
from recipes.robustness.fuzz_inputs import INPUTS
from recipes.robustness.fuzz_models import MODELS
from recipes.robustness.fuzzing import Tally, fuzz
from recipes.robustness.junit import Case, count, run_tests
from recipes.robustness.versions import page as versions_page

KINDS = {**INPUTS, **MODELS, **FOLDERS}


def main(
    cases: dict[str, int],
    faults: list[str],
    serving: dict[str, list[str]],
    versions: str = "recipes/results/versions.json",
    seed: int = 0,
    out: str = "recipes/results/scorecard",
) -> None:
    """Try all of it and write the scorecard."""
    check_names("faults", faults, FAULTS)
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
    file = Path(versions)
    tried = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    seconds = _cpu_seconds() - started
    parts = [malformed_part(tallies), faults_part(outcomes), serving_part(served), versions_part(tried)]
    page = "\n".join([summary(tallies, outcomes, seconds), *parts, missed_part(tallies, outcomes)])
    settings = {"cases": cases, "faults": faults, "serving": serving, "seed": seed}
    record = {"settings": settings, "system": platform.system(), **scorecard(tallies, outcomes, served, tried)}
    write_results(__file__, out, page, record)


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


def summary(tallies: Mapping[str, Tally], outcomes: Sequence[Outcome], seconds: float) -> str:
    """What was tried, and what came of it."""
    tried, refused, read, escaped, left = (
        sum(of(tally) for tally in tallies.values())
        for of in (
            *(lambda own: own.tried, lambda own: own.refused, lambda own: own.read),
            *(lambda own: len(own.escaped), lambda own: len(own.left)),
        )
    )
    killed = [outcome.fine for outcome in outcomes if outcome.unchanged is None]
    others = [outcome.fine for outcome in outcomes if outcome.unchanged is not None]
    return (
        f"{tried:,} malformed inputs: {refused:,} refused with the library's own error, {read:,} without harm, "
        f"{escaped} in another exception, {left} left a file behind. {len(outcomes)} faults: {sum(others)} of "
        f"{len(others)} left the model bit for bit as it was, without hooks, and no partial output; after "
        f"{sum(killed)} of {len(killed)} killed processes there is no partial output, and the next fit has the same "
        f"patch. All of it took {seconds:.0f} s of one core.\n"
    )


def malformed_part(tallies: Mapping[str, Tally]) -> str:
    """The part on malformed input."""
    rows = [[name, own.tried, own.refused, own.read, len(own.escaped), len(own.left)] for name, own in tallies.items()]
    changes = sum((tally.changes for tally in tallies.values()), Counter())
    return "\n".join(
        [
            "## Malformed input\n",
            table(["input", "tried", "refused", "without harm", "another exception", "files left"], rows),
            "A change that does no harm is one of a text's own words, of a key that nothing reads, or of a stored "
            "number. A damaged preservation cache is made anew, and so read. What was changed, of all kinds together: "
            f"{', '.join(f'{name} {count:,}' for name, count in changes.most_common())}.\n",
        ]
    )


def faults_part(outcomes: Sequence[Outcome]) -> str:
    """The part on faults."""
    rows = []
    for name in dict.fromkeys(outcome.fault for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.fault == name]
        ends = ", ".join(sorted({outcome.end or "no error" for outcome in own}))
        unchanged, again = (
            [flag for outcome in own if (flag := getattr(outcome, key)) is not None] for key in ("unchanged", "again")
        )
        partial = sum(bool(outcome.partial) for outcome in own)
        rows.append([name, len(own), ends, _share(unchanged), partial, _share(again)])
    head = ["fault", "struck", "ended in", "model unchanged", "partial output", "next fit the same"]
    return "\n".join(
        [
            "## Faults\n",
            table(head, rows),
            "Struck: the places and calls at which it happened. A killed process leaves no model to compare; the next "
            "fit of the same call must give the patch of one that nothing struck, and remove what the killed one "
            "left.\n",
        ]
    )


def missed_part(tallies: Mapping[str, Tally], outcomes: Sequence[Outcome]) -> str:
    """What went wrong, if anything did."""
    wrong = []
    for name, tally in tallies.items():
        wrong += [f"- {name}: {own['change']}, case {own['number']}: {own['end']}" for own in tally.escaped]
        wrong += [f"- {name}: {own['change']}, case {own['number']}: left {own['files']}" for own in tally.left]
    wrong += [f"- {outcome.fault}, {outcome.where}: {outcome}" for outcome in outcomes if not outcome.fine]
    return "\n".join(["## Missed\n", *wrong, ""]) if wrong else ""


def serving_part(served: Mapping[str, Sequence[Case] | None]) -> str:
    """The part on ways to serve a patch; empty where none was tried."""
    rows, reasons = [], []
    for name, cases in served.items():
        numbers = [None if cases is None else count(cases, end) for end in ("passed", "failed", "skipped")]
        rows.append([name, verdict(cases), *numbers])
        reasons += [f"- {name}: {reason}" for reason in dict.fromkeys(case.reason for case in cases or ()) if reason]
    verified = sum(verdict(cases) == "verified" for cases in served.values())
    lines = ["## Serving\n", f"{verified} of {len(rows)} ways to serve a patch verified, by tests that use them.\n"]
    lines.append(table(["way", "verdict", "tests passed", "failed", "skipped"], rows, left=2))
    return "\n".join([*lines, *(["Skipped for:\n", *reasons, ""] if reasons else [])]) if rows else ""


def versions_part(tried: Mapping[str, Any] | None) -> str:
    """The part on versions."""
    command = "`python -m recipes.robustness.versions --config recipes/robustness/versions.yaml`"
    found = "Not run.\n" if tried is None else f"{versions_page(tried)}\nOf commit {tried['commit']}.\n"
    return f"## Versions\n\n{command}\n\n{found}"


def verdict(cases: Sequence[Case] | None) -> str:
    """``verified`` where tests passed and none failed, ``failed`` where one did or they did not come to their end,
    ``not run`` where all were skipped."""
    if cases is None or count(cases, "failed"):
        return "failed"
    return "verified" if count(cases, "passed") else "not run"


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _share(flags: Sequence[bool]) -> str | None:
    return f"{sum(flags)} of {len(flags)}" if flags else None


if __name__ == "__main__":
    command_line(main)
