"""What every command prints: results to standard output, messages and progress to standard error."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.files import finite

__all__ = ["Output", "Result", "console", "flush", "give", "say", "timed"]

_log = logging.getLogger("lit_thought")


@dataclass(frozen=True)
class Output:
    """Output and errors

    Args:
        json: print the result as one JSON object; standard output holds nothing else.
        quiet: no messages and no progress bars; errors are still told, and the result is printed.
        verbose: also how long each part took, and what the library logs.
        traceback: with an error, show the stack trace.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    traceback: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise ThoughtError("quiet and verbose exclude each other; give one of them.")


@dataclass(frozen=True)
class Result:
    """What a command found or wrote.

    Args:
        values: the figures, as JSON values, for ``--json``.
        text: the same for people, for standard output; messages go through :func:`say`.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def say(message: str) -> None:
    """A message to the user, on standard error."""
    print(message, file=sys.stderr)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """With ``--verbose``, tell how long the body took."""
    start = time.perf_counter()
    yield
    _log.debug("%s took %.1f s", what, time.perf_counter() - start)


@contextmanager
def console(output: Output) -> Iterator[None]:
    """Inside, standard output, standard error and the log are as ``output`` wants them; afterwards as they were."""
    with ExitStack() as stack:
        if output.quiet:
            stack.enter_context(redirect_stderr(_Nowhere()))
        if output.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if output.verbose:
            stack.enter_context(_logging())
        yield


def give(result: Result, output: Output) -> None:
    """Print a result, if there is something to print."""
    text = result.text
    if output.json:
        plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
        text = json.dumps(finite(result.values), indent=1, ensure_ascii=plain)
    with suppress(BrokenPipeError):
        if text:
            print(text)
    flush()


def flush() -> None:
    """Flush standard output; a reader that has seen enough, such as head, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # else what is left in the buffer fails once more at the interpreter's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _logging() -> Iterator[None]:
    root, levels = logging.getLogger(), (logging.getLogger().level, _log.level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    _log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        _log.setLevel(levels[1])


class _Nowhere(io.TextIOBase):
    """Takes what is written to it and forgets it; never closed, for libraries keep hold of standard error."""

    def write(self, text: str) -> int:
        return len(text)

    def close(self) -> None:
        pass
