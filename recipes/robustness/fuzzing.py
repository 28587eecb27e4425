"""Malformed input for everything that the library reads, and how each reading ends: a part of scorecard.py.

A *kind* of input has an example that the library itself would take, a way to spoil it (mutations.py), and what
the library does with it: fuzz_inputs.py, fuzz_folders.py. Each spoilt copy must be refused with a
ThoughtError that has a message, or be harmless; no other exception may escape, and no file be left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from huggingface_hub import constants

from lit_thought.errors import ThoughtError
from recipes.harness import check_names
from recipes.robustness.mutations import restore, spoil_file

_SECONDS = 20


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Args:
        write: writes the example into an empty folder.
        read: all that the library does with it.
        spoil: changes the example in place, and says how.
        valid: whether the library takes the example as it is.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], object]
    spoil: Callable[[Path, Random], str]
    valid: bool = True


@dataclass
class Tally:
    """How the spoilt copies of one kind ended: refused, read without harm, or, as records, anything else."""

    tried: int = 0
    refused: int = 0
    read: int = 0
    escaped: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)


class Reached(Exception):
    """All arguments have been checked; the long work would begin."""


class Endless(BaseException):
    """A reading that does not end."""


def fuzz(
    kinds: Mapping[str, Kind],
    cases: Mapping[str, int],
    seed: int,
    folder: Path,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Tally]:
    """Try so many spoilt copies of each kind in ``folder``.

    Raises:
        ThoughtError: when a kind is unknown.
    """
    check_names("cases", cases, kinds)
    found = {}
    with _quiet(folder):
        for name, count in cases.items():
            progress(name)
            found[name] = _fuzz_kind(kinds[name], name, count, seed, folder / name.replace(" ", "_"))
    return found


def _fuzz_kind(kind: Kind, name: str, count: int, seed: int, root: Path) -> Tally:
    example = root / "example"
    example.mkdir(parents=True)
    kind.write(example)
    files = {str(file.relative_to(example)): file.read_bytes() for file in example.rglob("*") if file.is_file()}
    with contextlib.suppress(Reached, *(() if kind.valid else (ThoughtError,))):
        kind.read(example)
    tally = Tally()
    for number in range(count):
        draw = Random(f"{seed} {name} {number}")
        restore(example, files)
        change = kind.spoil(example, draw)
        before = _listing(root)
        with mock.patch.object(tempfile, "tempdir", str(root)):
            end = ending(lambda: kind.read(example))
        tally.tried += 1
        tally.changes[change.split(":")[0]] += 1
        about = {"number": number, "change": change, "end": end}
        if end == "refused":
            tally.refused += 1
        elif end == "read":
            tally.read += 1
        else:
            tally.escaped.append(about)
        if new := _listing(root) - before - {str(Path("example") / name) for name in files}:  # made anew
            tally.left.append({**about, "files": sorted(new)})
    return tally


def ending(run: Callable[[], object]) -> str:
    """refused, read, or what escaped."""
    try:
        with _limited(_SECONDS):
            run()
    except (Reached, FileNotFoundError) as error:
        return "read" if isinstance(error, Reached) else repr(error)
    except ThoughtError as error:
        return "refused" if str(error).strip() else "refused without a message"
    except (Exception, Endless) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "read"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise :class:`Endless` in a reading that takes longer."""

    def stop(*_: Any) -> None:
        raise Endless(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """No warnings, nothing on the console, a cache that is nobody's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        warnings.catch_warnings(),
        mock.patch.dict(os.environ, {"LIT_THOUGHT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}),
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def spoil_some_file(folder: Path, draw: Random) -> str:
    return spoil_file(draw.choice(sorted(path for path in folder.rglob("*") if path.is_file())), draw)
