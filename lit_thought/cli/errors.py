"""How the command ends: exit codes, and one line that says what went wrong."""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
import socket
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import suppress

from lit_thought.errors import ThoughtError, is_out_of_memory

__all__ = ["BUG", "DONE", "EXIT_CODES", "INPUT", "INTERRUPTED", "MACHINE", "as_typed", "exit_code", "tell"]

DONE, MACHINE, INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130
EXIT_CODES = {
    DONE: "done",
    MACHINE: "the machine failed: disk full, permission denied, out of memory, no network",
    INPUT: "bad input: an argument, a file or a model that cannot be used",
    BUG: "a bug in lit-thought",
    INTERRUPTED: "interrupted (Ctrl-C)",
}

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM}
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
_NETWORK_NAMES = {"TransportError", "OfflineModeIsEnabled"}  # of httpx and huggingface_hub
_ALIASES = {
    "commit_message": ("message",),
    "folder": ("adapter", "statistics"),
    "name": ("model",),
    "output_dir": ("out",),
    "path": ("out",),
}
"""What the library calls arguments of its own, and the flags that stand for them: the last one that there is."""
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\.\.\.|[-+.\w]*\w"""


def exit_code(error: BaseException) -> int:
    """The exit code for an exception; what a :class:`ThoughtError` was raised from decides whose fault it is."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ThoughtError):
        return MACHINE if any(map(_is_of_the_machine, _causes(error))) else INPUT
    return MACHINE if isinstance(error, OSError) or _is_of_the_machine(error) else BUG


def tell(error: BaseException, trace: bool = False, flags: Collection[str] = ()) -> None:
    """Say on standard error what went wrong, in one line, of a command with these flags; with ``trace`` after the stack
    trace."""
    if trace:
        traceback.print_exception(error, file=sys.stderr)
    text = as_typed(_message(error, trace), flags)
    print(f"lit-thought: {_red('error:')} {' '.join(text.split())}", file=sys.stderr)


def as_typed(message: str, flags: Collection[str]) -> str:
    """A message that the library has for Python, with what it says of arguments as one types it: ``rank=8`` is
    ``--rank 8``, ``overwrite=True`` is ``--overwrite``, ``None`` is null. Only of these flags, and of what they are
    called there."""
    names = {other: flag for other, candidates in _ALIASES.items() for flag in candidates if flag in flags}
    names |= {flag: flag for flag in flags}
    if not names:
        return message
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))

    def flag_of(match: re.Match[str]) -> str:
        return f"{match['before']}--{names[match['name']]}{_typed(match['value'])}"

    def alone(match: re.Match[str]) -> str:
        return re.sub(rf"\b({name})\b", lambda word: f"--{names[word[1]]}", match[0])

    message = re.sub(rf"^({name})(?=: | must | is | and \w+ exclude )", alone, message)
    message = re.sub(rf"(?<=\band )({name})(?= exclude | must )|(?<=[Ll]eave )({name})(?= out\b)", alone, message)
    message = re.sub(rf"(?P<before>^|[\s;:,])(?P<name>{name})=(?P<value>{_VALUE})", flag_of, message)
    words = "|".join(flag for flag in flags if "_" in flag) or "$^"  # no other word looks like these
    message = re.sub(rf"(?<![\w./'\"=-])({words})(?!\.?\w|['\"=(/])", r"--\1", message)
    message = re.sub(r"\[('[^'\]]*'(?:, '[^'\]]*')*)\]", lambda match: match[1].replace("'", ""), message)
    return re.sub(r"\b(Use|Pass|or) None\b", r"\1 null", re.sub(r"\b(got|has) None\b", r"\1 none", message))


def _typed(value: str) -> str:
    """What follows a flag in the place of a Python value."""
    with suppress(ValueError, SyntaxError):
        known = ast.literal_eval(value)
        if isinstance(known, bool):
            return "" if known else " false"
        if isinstance(known, list | tuple):
            return "".join(f" {shlex.quote(str(one))}" for one in known)
        if known is None or known is ...:
            return " null" if known is None else " …"
        return f" {shlex.quote(str(known))}"
    return f" {value}"


def _message(error: BaseException, trace: bool) -> str:
    code = exit_code(error)
    if code == INTERRUPTED:
        return "interrupted."
    if code == INPUT or isinstance(error, ThoughtError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    text = str(error) or "no message"
    if is_out_of_memory(error):
        return f"out of memory ({text}). Choose a smaller model, or a smaller --batch_size where there is one."
    if code == MACHINE:
        return text
    hint = "" if trace else "; run the same command with --traceback, and"
    return f"this is a bug in lit-thought ({type(error).__name__}: {text}){hint or ':'} send in the stack trace."


def _is_of_the_machine(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in _FULL
    names = {kind.__name__ for kind in type(error).__mro__}
    return full or isinstance(error, _NETWORK) or bool(names & _NETWORK_NAMES) or is_out_of_memory(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _red(text: str) -> str:
    """The text in red where standard error is a terminal, and nobody objects (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else f"\x1b[31m{text}\x1b[0m"
