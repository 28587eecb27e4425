"""Atomic output: a folder or file is there complete, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_thought.errors import ThoughtError

__all__ = ["atomic_file", "atomic_folder", "check_output_folder"]


def check_output_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Check, before any long work, that an output folder can be written at ``path``.

    Returns:
        The folder with ``~`` and links resolved.

    Raises:
        ThoughtError: if ``path`` is a file, a non-empty folder without ``overwrite``, a folder that must
            never be replaced (the working or home folder, or one above them), or lies where nothing can be
            written.
    """
    folder = _resolve(path)
    if folder.exists() and not folder.is_dir():
        raise ThoughtError(f"path={str(path)!r} is a file; expected a folder. Choose another path.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ThoughtError(
                f"path={str(path)!r} is a folder that is not empty. Choose another path, or pass "
                "overwrite=True to replace the whole folder."
            )
        for precious in (Path.cwd(), Path.home()):
            if folder == precious or folder in precious.parents:
                raise ThoughtError(
                    f"path={str(path)!r} with overwrite=True would delete the working or home folder. "
                    "Choose a folder of its own for the output."
                )
    _check_parent(path, folder)
    return folder


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that becomes ``path`` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary is removed and ``path`` stays as it was. With
    ``overwrite`` an existing folder is replaced as a whole, and only once the new one is complete.
    """
    folder = check_output_folder(path, overwrite)
    temporary = _sibling(folder, "tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        _replace_folder(temporary, check_output_folder(path, overwrite))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path`` (same suffix) that becomes ``path`` at the end.

    On any exception the temporary file is removed and ``path`` stays as it was.
    """
    file = _resolve(path)
    if file.is_dir():
        raise ThoughtError(f"path={str(path)!r} is a folder; expected a file. Choose another path.")
    if file.exists() and not overwrite:
        raise ThoughtError(f"path={str(path)!r} exists. Choose another path, or pass overwrite=True.")
    _check_parent(path, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(file, "tmp", keep_suffix=True)
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; a folder already there is put aside first, and put back on failure."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = _sibling(folder, "old")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _resolve(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().resolve()


def _sibling(path: Path, kind: str, keep_suffix: bool = False) -> Path:
    suffix = path.suffix if keep_suffix else ""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}{suffix}")


def _check_parent(path: str | os.PathLike[str], resolved: Path) -> None:
    """Refuse a place whose nearest existing folder is a file or cannot be written."""
    nearest = next(parent for parent in resolved.parents if parent.exists())
    if not nearest.is_dir():
        problem = f"{str(nearest)!r} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"no permission to write in {str(nearest)!r}"
    else:
        return
    raise ThoughtError(f"path={str(path)!r}: {problem}. Choose another path.")
