"""Files that come from anyone are read with care, and what is written is there complete, or not at all.

What is not complete has a hidden name beside it. A process that is killed cannot remove that; the next one that writes
to the same place on the same machine does, of folders, for it can tell from a lock that their writer is gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_thought.errors import ThoughtError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked, and what a killed process left stays
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_file",
    "atomic_folder",
    "cache_folder",
    "check_apart",
    "check_output_folder",
    "check_version",
    "check_writable",
    "default_cache_dir",
    "expanded",
    "finite",
    "is_own_file",
    "own_file",
    "parse_json",
    "read_json",
    "temporary_of",
    "writing",
]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""In the names of temporary folders: on a shared file system another machine's lock need not be seen."""
_LONGEST_NAME = 210
"""Bytes; file systems allow 255, and a temporary name is longer."""
_ELSEWHERE = "Choose a path where you may write, or change its permissions."
_REMEDIES = {
    errno.ENOSPC: "Make room there, or choose another path.",
    errno.EDQUOT: "Make room within your quota, or choose another path.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or choose another path.",
    errno.EBUSY: "Choose a folder in it, if it is a mount point, or another path.",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ELSEWHERE),
}
"""What to do where the system cannot write."""


_OF_A_MODEL = re.compile(
    r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|adapter_config|thought)\.(json|model)|"
    r"(model|pytorch_model|adapter_model)[\w.-]*\.(safetensors|bin|json)|merges\.txt|chat_template\.jinja|README\.md"
)
"""The files of models and adapters."""
_HOLDING = ("cache_dir", "log_dir")
"""Folders that nothing replaces, so that others may lie in them."""


def check_apart(**folders: str | os.PathLike[str] | None) -> None:
    """Refuse folders, by the arguments that name them, of which one is another or holds it; None is no folder, and
    ``cache_dir`` and ``log_dir`` may hold others.

    Raises:
        ThoughtError: naming the two.
    """
    places = {name: expanded(path, name).resolve() for name, path in folders.items() if path is not None}
    for (name, one), (other, two) in combinations(places.items(), 2):
        held = (one in two.parents and name not in _HOLDING) or (two in one.parents and other not in _HOLDING)
        if one == two or held:
            if one != two and (name in _HOLDING or other in _HOLDING):
                name, other = (name, other) if one in two.parents else (other, name)
                raise ThoughtError(f"{other} and {name} must be folders of their own, the first not in the second.")
            raise ThoughtError(f"{name} and {other} must be folders of their own, neither in the other.")


def check_output_folder(
    path: str | os.PathLike[str], overwrite: bool = False, argument: str = "path", **read: str | os.PathLike[str] | None
) -> Path:
    """Check, before any long work, that an output folder can be written at ``path``, which messages call ``argument``;
    and that what is ``read`` for it, such as ``adapter`` or ``model``, would stay, where that lies here.

    Returns:
        The folder with ``~`` and links resolved.

    Raises:
        ThoughtError: if ``path`` is a file, a mount point, a non-empty folder without ``overwrite``, a folder that
            must never be replaced (the working or home folder, what is read, or one above them), or lies where nothing
            can be written.
    """
    folder = _resolve(path)
    _remove_abandoned(folder)
    if folder.exists() and not folder.is_dir():
        raise ThoughtError(f"{argument}={str(path)!r} is a file; expected a folder. Choose another path.")
    if folder.is_dir():
        if os.path.ismount(folder):
            raise ThoughtError(
                f"{argument}={str(path)!r} is a mount point, which no folder can take the place of. Choose a folder in "
                "it."
            )
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ThoughtError(f"{argument}={str(path)!r} is a folder that cannot be read. Choose another path.")
        if not overwrite and any(folder.iterdir()):
            raise ThoughtError(
                f"{argument}={str(path)!r} is a folder that is not empty. Choose another path, or pass "
                "overwrite=True to replace the whole folder."
            )
        precious = dict.fromkeys((Path.cwd(), Path.home()), "the working or home folder")
        for name, source in read.items():
            if source is not None and (place := _resolve(source)).exists():  # of the hub, or a name of ours, it is not
                precious.setdefault(place, f"the {name.replace('_', ' ')} {os.fspath(source)!r}")
        for place, what in precious.items():
            if folder == place or folder in place.parents:
                raise ThoughtError(
                    f"{argument}={str(path)!r}{' with overwrite=True' if overwrite else ''} would delete {what}. "
                    "Choose a folder of its own for the output."
                )
    _check_parent(path, folder, argument)
    return folder


def check_writable(path: str | os.PathLike[str], argument: str) -> None:
    """Refuse a folder, there or to be made, in which nothing can be written.

    Raises:
        ThoughtError: naming ``argument``.
    """
    folder = expanded(path, argument).resolve()
    expanded(folder, argument)  # once more, for a name behind ".." that is too long
    _check_parent(path, folder / "file", argument)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that becomes ``path`` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary is removed and ``path`` stays as it was. With
    ``overwrite`` an existing folder is replaced as a whole, and only once the new one is complete. Who may read and
    write the files is what the umask says, whatever made them.

    Raises:
        ThoughtError: for a path that :func:`check_output_folder` refuses.
        OSError: naming ``path`` and what to do, where the disk is full or there is no permission.
    """
    folder = check_output_folder(path, overwrite)
    with _workplace(folder) as temporary, writing(folder, temporary):
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        _replace_folder(temporary, check_output_folder(path, overwrite))


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], overwrite: bool = True, **read: str | os.PathLike[str] | None
) -> Iterator[Path]:
    """Yield the name of a temporary file (that of ``path``, in a hidden folder beside it) that becomes ``path`` at the
    end.

    On any exception the temporary file is removed and ``path`` stays as it was. A link at ``path`` is replaced, and
    what it leads to stays as it was, too. Who may read and write the file is what the umask says, whatever made it.
    What is ``read`` for it, such as ``model``, is not replaced, where that lies here, nor a file of a model or adapter
    in a folder that is.

    Raises:
        ThoughtError: for a path where no file can be written.
        OSError: naming ``path`` and what to do, where the disk is full or there is no permission.
    """
    file = _resolve(path, follow=False)
    if file.is_dir():
        raise ThoughtError(f"path={str(path)!r} is a folder; expected a file. Choose another path.")
    if os.path.lexists(file) and not overwrite:
        raise ThoughtError(f"path={str(path)!r} exists. Choose another path, or pass overwrite=True.")
    for name, source in read.items() if file.exists() else ():
        if source is not None and (
            (place := _resolve(source)) == file or (place == file.parent and _OF_A_MODEL.fullmatch(file.name))
        ):
            raise ThoughtError(
                f"path={str(path)!r} would replace {'' if place == file else 'a file of '}the "
                f"{name.replace('_', ' ')} {os.fspath(source)!r}. Choose another path."
            )
    _check_parent(path, file)
    with _workplace(file) as folder, writing(file, folder):
        temporary = folder / file.name
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, file)


@contextmanager
def _workplace(place: Path) -> Iterator[Path]:
    """A hidden folder beside what is to be written, which is gone at the end; those of processes that were killed are
    removed first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place)
    temporary = _sibling(place, f"{_HOST}.tmp")
    fresh = temporary.with_suffix(".new")  # under which no one takes it for abandoned before it is locked
    with ExitStack() as stack:
        try:
            with writing(place, fresh):
                fresh.mkdir()
                stack.enter_context(_locked(fresh))
                fresh.replace(temporary)
            yield temporary
        finally:
            for left in (fresh, temporary):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(path: str | os.PathLike[str], temporary: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of the system at ``temporary``, or at a place that it does not name, tells of ``path``.

    safetensors' own exception for such an error becomes an OSError, too.

    Raises:
        OSError: of the same number, with what to do, where the disk is full or there is no permission.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _system_number(error)
        place = getattr(error, "filename", None)
        if number not in _REMEDIES or (place is not None and not Path(place).is_relative_to(temporary)):
            raise
        told = f"{os.strerror(number)}; nothing half-written is left. {_REMEDIES[number]}"
        raise OSError(number, told, str(path)) from error


def _system_number(error: SafetensorError) -> int:
    found = re.search(r"\(os error ([0-9]+)\)", str(error))
    return int(found[1]) if found else 0


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; a folder already there is put aside first, and put back on failure."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = _sibling(folder, f"{_HOST}.old")
    with _locked(folder):
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _resolve(path: str | os.PathLike[str], follow: bool = True) -> Path:
    """The path with ``~`` and links resolved, but for a link at its end unless to ``follow`` it."""
    try:
        given = Path(path).expanduser()
        found = given.resolve() if follow or given.name in ("", "..") else given.parent.resolve() / given.name
        found.exists()
        long = len(os.fsencode(found.name)) > _LONGEST_NAME
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ThoughtError(f"path={path!r:.120} cannot be written to ({error}). Choose another path.") from error
    if long:
        raise ThoughtError(f"path={str(path)!r:.120}… has too long a name. Choose another path.")
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, if it is free and the system has such; it ends with the process at the latest."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        yield handle is not None and _lock(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    """Remove this machine's temporary folders for ``folder`` whose process is gone; a folder that one had put aside
    and not replaced is put back."""
    name = temporary_of(re.escape(folder.name), _HOST, "(tmp|old)")
    with suppress(OSError):
        for found in [entry for entry in folder.parent.iterdir() if name.fullmatch(entry.name)]:
            if found.is_dir() and not found.is_symlink():
                with _locked(found) as free:
                    if free and found.suffix == ".old" and not folder.exists():
                        os.rename(found, folder)
                    elif free:
                        shutil.rmtree(found, ignore_errors=True)


def temporary_of(name: str, host: str = "[0-9a-f]{8}", kind: str = "(tmp|new)") -> re.Pattern[str]:
    """The names of the hidden folders in which files and folders are written.

    Args:
        name: of these, a regular expression; ``host`` and ``kind`` likewise.
    """
    return re.compile(rf"\.{name}\.[0-9a-f]{{12}}\.{host}\.{kind}")


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _check_parent(path: str | os.PathLike[str], resolved: Path, argument: str = "path") -> None:
    """Refuse a place whose nearest existing folder is a file or cannot be written."""
    nearest = next(parent for parent in resolved.parents if parent.exists())
    if not nearest.is_dir():
        problem = f"{str(nearest)!r} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"no permission to write in {str(nearest)!r}"
    else:
        return
    raise ThoughtError(f"{argument}={str(path)!r}: {problem}. Choose another path.")


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


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder that an argument ``cache_dir`` stands for: :func:`default_cache_dir` when left out."""
    return default_cache_dir() if cache_dir is None else expanded(cache_dir, "cache_dir")


def default_cache_dir() -> Path:
    """``$LIT_THOUGHT_CACHE``, else ``$XDG_CACHE_HOME/lit_thought``, else ``~/.cache/lit_thought``."""
    if chosen := os.environ.get("LIT_THOUGHT_CACHE"):
        return expanded(chosen, "LIT_THOUGHT_CACHE")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_thought"


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


def own_file(file: Path, wanted: str, error: type[ThoughtError] = ThoughtError) -> Path:
    """A file of a folder that :func:`is_own_file` finds there.

    Raises:
        ThoughtError: of the class ``error``, when it does not; names the folder, and says that a ``wanted`` one was
            expected.
    """
    if not is_own_file(file):
        raise error(f"{file.parent.name!r} has no {file.name} of its own. Expected {wanted}.")
    return file


def check_version(
    value: Any, key: str, known: int, name: str, remedy: str, error: type[ThoughtError] = ThoughtError
) -> None:
    """Check the version of a format in what a file says of itself.

    Args:
        value: a value from JSON.
        key: where in it the version is.
        known: the version that is read here.
        name: what a message calls the file.
        remedy: what a message says to do.

    Raises:
        ThoughtError: of the class ``error``, when it is another one, or none.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if type(found) is not int or found != known:
        raise error(f"{name}: {key} is {found!r}, this lit_thought reads {known}. {remedy}")


def parse_json(text: str, **options: Any) -> Any:
    """The value of a JSON text; ``options`` are those of :func:`json.loads`.

    Raises:
        ValueError: whatever is wrong with the text, values nested too deep for Python among it.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def finite(value: Any) -> Any:
    """A value as JSON would have it, which has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def read_json(file: Path) -> Any:
    """The value in a UTF-8 file.

    Raises:
        OSError, ValueError: when it cannot be read, or is something else, such as a pipe, which might never end.
    """
    if not file.is_file():
        raise FileNotFoundError("there is no such file")
    return parse_json(file.read_text(encoding="utf-8-sig"))  # some editors write a mark first


def _cause(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shortened(path: Any) -> str:
    text = repr(os.fspath(path) if isinstance(path, os.PathLike) else path)
    return text if len(text) <= 120 else f"{text[:120]}…"
