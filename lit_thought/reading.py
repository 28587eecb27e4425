"""Reading what may come from anyone: paths, files that could be links, JSON."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_thought.errors import ThoughtError

__all__ = ["expanded", "is_own_file", "parse_json", "read_json"]


def expanded(path: Any, argument: str) -> Path:
    """A path with ``~`` resolved, that the system can be asked about.

    Raises:
        ThoughtError: when it is no path, its name is too long, its user is unknown, or a folder above it cannot be
            entered; names ``argument``.
    """
    try:
        found = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(found)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ThoughtError(f"{argument}={_shortened(path)} cannot be looked up ({_cause(error)}). Check it.") from error
    return found


def is_own_file(file: Path) -> bool:
    """Whether there is such a file, and it lies in its folder: no link may lead elsewhere, but for the hub's cache,
    whose snapshots are links to the blobs of the same repository, or through them to those that all repositories share
    (in folders by the first digits of their hash)."""
    try:
        if not file.is_file():
            return False
        folder, target = file.parent.resolve(), file.resolve()
    except OSError:
        return False
    repositories = [parent.parent for parent in folder.parents if parent.name == "snapshots"]
    return target.is_relative_to(folder) or any(
        target.parent == place / "blobs" or target.parent.parent == place.parent / "blobs" for place in repositories
    )


def parse_json(text: str, **options: Any) -> Any:
    """The value of a JSON text; ``options`` are those of :func:`json.loads`.

    Raises:
        ValueError: whatever is wrong with the text, values nested too deep for Python among it.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def read_json(file: Path) -> Any:
    """The value in a UTF-8 file.

    Raises:
        OSError, ValueError: when it cannot be read, or is something else, such as a pipe, which might never end.
    """
    if not file.is_file():
        raise FileNotFoundError("there is no such file")
    return parse_json(file.read_text(encoding="utf-8"))


def _cause(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shortened(path: Any) -> str:
    text = repr(os.fspath(path) if isinstance(path, os.PathLike) else path)
    return text if len(text) <= 120 else f"{text[:120]}…"
