"""The words of a command line, as argparse wants them: every value in one word with its flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["joined", "nearest", "positional"]


def positional(words: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line with the words right after the command as the flags that they stand for.

    Args:
        words: the command line.
        names: by command, which flags may be given by place, in their order.
    """
    given = list(words)
    for place, name in enumerate(names.get(given[0], ()) if given else (), start=1):
        if place >= len(given) or given[place].startswith("-"):
            break
        given[place] = f"--{name}={given[place]}"
    return given


def joined(words: Sequence[str], flags: Mapping[str, Any], lists: Collection[str] = ()) -> list[str]:
    """The words with ``--flag value`` as ``--flag=value``, so that a value may begin with a dash, and the values of a
    list in one word.

    Args:
        words: what follows the command.
        flags: the action of each flag, with its dashes.
        lists: those that take several values.

    Raises:
        argparse.ArgumentError: for a flag that there is not, with the nearest one.
    """
    given, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        action = flags.get(flag.partition(".")[0])
        if action is None and flag.startswith("-") and flag.strip("-"):
            known = [name for name in flags if name.startswith("--") and not name.endswith("+")]
            raise argparse.ArgumentError(None, f"there is no flag {flag}.{nearest(flag, known)}")
        values = [value] if equals else []
        if flag in lists:
            while rest and not rest[0].startswith("--") and rest[0] not in flags:
                values.append(rest.pop(0))
        elif action is not None and action.nargs is None and not equals and rest and not _is_flag(rest[0], flags):
            values.append(rest.pop(0))
        given.append(f"{flag}={' '.join(values)}" if values else word)
    return given


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean …?``, where one of the ``known`` names is near."""
    plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(name), plain, 1)
    return f" Did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _is_flag(word: str, flags: Collection[str]) -> bool:
    return word.partition("=")[0] in flags
