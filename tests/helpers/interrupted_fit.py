"""Fits that are interrupted: ``python interrupted_fit.py FOLDER OUT NUMBER`` is killed at its NUMBER-th solve, or
writes its adapter to OUT."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from families import make_family
from fits import TEXTS, readable
from models import make_tokenizer

from lit_thought import ThoughtPatch, transmute
from lit_thought.statistics.stage import StageSums

PAIRS = [{"input": word, "output": "down"} for word in ("hot", "big fox", "up", "good")]
INSTRUCTION = "You are a pirate. Talk like a pirate.\n"


def fit(folder: Path | None, family: str = "llama", letters: bool = False, **settings: Any) -> ThoughtPatch:
    """A small fit that keeps its finished stages in ``folder``; ``letters``: of a model that writes these only."""
    common = {"pairs": PAIRS, "rank": 4, "preserve": TEXTS, "max_new_tokens": 4, "progress": False}
    model = make_family(family).float()
    if letters:
        readable(model)
    usual = {"instruction": INSTRUCTION, **common}
    return transmute(model, make_tokenizer(), resume_dir=folder, **{**usual, **settings})


class Interrupted(Exception):
    """What interrupts a fit."""


class Solves:
    """Takes the place of ``StageSums.solve``: counts, and calls ``stop`` at the ``last``-th one."""

    def __init__(self, last: int = 0, stop: Any = None) -> None:
        self.genuine, self.last, self.count, self.stop = StageSums.solve, last, 0, stop

    def __get__(self, sums: StageSums, kind: type) -> Any:
        def solve(*args: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                if self.stop is None:
                    raise Interrupted
                self.stop()
            return self.genuine(sums, *args)

        return solve


if __name__ == "__main__":
    StageSums.solve = Solves(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[assignment]
    fit(Path(sys.argv[1])).save_adapter(sys.argv[2])
