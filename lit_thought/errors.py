"""Every error that lit_thought raises on purpose, so that a caller can catch them in one clause.

A message names the argument, what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

__all__ = [
    "MemoryBudgetError",
    "PatchError",
    "SingularSystemError",
    "ThoughtError",
    "UnsupportedModelError",
    "check_counts",
    "did_you_mean",
    "is_finite",
    "is_out_of_memory",
]


class ThoughtError(ValueError):
    """Bad input: an argument, a file, a prompt or a model that lit_thought cannot work with."""


class UnsupportedModelError(ThoughtError):
    """A model whose blocks lit_thought does not know how to read (yet)."""


class SingularSystemError(ThoughtError):
    """A least-squares system that is singular or not finite; names its block and the cause."""


class PatchError(ThoughtError):
    """A patch or adapter that does not fit the model, or a damaged adapter folder."""


class MemoryBudgetError(ThoughtError):
    """A fit that needs more memory, or room on disk, than there is; says how much for what."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean '…'?``, where one of the ``known`` names is near; else nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def is_finite(value: Any) -> bool:
    """Whether it is a number, not a bool, that float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short: Python's, torch's of a GPU, and torch's of main memory, which is
    no more than a RuntimeError."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator: " in str(error)


def check_counts(**counts: int) -> None:
    """Check settings that count something.

    Raises:
        ThoughtError: for one that is not a whole number of 1 or more.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ThoughtError(f"{name} must be a whole number of 1 or more; got {value!r}.")
