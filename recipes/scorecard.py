"""How the library behaves when things go wrong, counted.

    python recipes/scorecard.py --config recipes/scorecard.yaml

Two parts, on a tiny random model. *Malformed input* (recipes/fuzzing.py): examples of everything that the library
reads are spoilt in a seeded way, thousands of times, and each reading must end in the library's own error with a
message, or do no harm; nothing else may escape and no file be left behind. *Faults* (recipes/faults.py): a fit is
struck by a full disk, a missing permission, Ctrl-C, SIGKILL, weights that are not finite and a forward pass that
raises; the model must be left bit for bit as it was, without hooks, and no partial output be there.
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults import FAULTS, Outcome
from fuzz_folders import FOLDERS
from fuzz_inputs import INPUTS
from fuzzing import Tally, fuzz
from jsonargparse import auto_cli
from tasks import provenance, write_results

from lit_thought.errors import ThoughtError

KINDS = {**INPUTS, **FOLDERS}


def main(
    cases: dict[str, int],
    faults: list[str],
    seed: int = 0,
    out: str = "recipes/results/scorecard",
) -> None:
    """Try all of it and write the scorecard.

    Args:
        cases: how many spoilt copies to try of each kind of input, of those in recipes/fuzz_*.py.
        faults: which faults to try, of those in recipes/faults.py.
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
    record = scorecard(tallies, outcomes)
    record |= {
        "settings": {"cases": cases, "faults": faults, "seed": seed},
        "system": platform.system(),
        **provenance(),
    }
    page = table(tallies, outcomes, _cpu_seconds() - started)
    print(page)
    write_results(out, f"{page}\nCommit {record['commit']}, {record['system']}.\n", record)


def scorecard(tallies: dict[str, Tally], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All figures, as JSON values."""
    return {
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
        "`python recipes/scorecard.py --config recipes/scorecard.yaml`",
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
        "of the same call must give the bytes of one that nothing struck, and remove what the killed one left.",
        "",
    ]
    wrong = [f"- {name}: {entry['change']}, case {entry['number']}: {entry['end']}" for name, entry in escaped]
    wrong += [f"- {name}: {entry['change']}, case {entry['number']}: left {entry['files']}" for name, entry in left]
    wrong += [f"- {outcome.fault}, {outcome.where}: {outcome}" for outcome in bad]
    return "\n".join([*lines, *(["## Missed", "", *wrong, ""] if wrong else [])])


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
