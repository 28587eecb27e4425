"""What writing leaves behind: permissions by the umask, and errors of the system that name the path."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import make_model, make_tokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from system import limited, posix

from lit_thought import files, transmute
from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file, atomic_folder, check_output_folder, finite


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@posix
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077], ids=oct)
def test_the_umask_says_who_may_read(mask: int, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3)}
    with masked(mask):
        (tmp_path / "usual").touch()
        with atomic_file(tmp_path / "one.safetensors") as file:
            save_file(tensors, file)
        with atomic_folder(tmp_path / "out") as folder:
            save_file(tensors, folder / "two.safetensors")
            (folder / "sub").mkdir()
            save_file(tensors, folder / "sub" / "three.safetensors")
            (folder / "text.txt").write_text("text")
    assert mode(tmp_path / "usual") == 0o666 & ~mask
    written = [tmp_path / "one.safetensors", *(path for path in (tmp_path / "out").rglob("*") if path.is_file())]
    assert len(written) == 4
    assert {mode(path) for path in written} == {0o666 & ~mask}
    assert {mode(tmp_path / "out"), mode(tmp_path / "out" / "sub")} == {0o777 & ~mask}


def test_a_file_that_is_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "nothing"):
        pass
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.parametrize("large", [lambda path: save_file({"a": torch.zeros(5_000)}, path), None], ids=["tensors", ""])
def test_a_limit_of_the_system_names_the_path(large: Callable[[Path], None] | None, tmp_path: Path) -> None:
    write = large or (lambda path: path.write_text("x" * 20_000))
    with pytest.raises(OSError, match="ulimit") as raised, limited(3_000), atomic_file(tmp_path / "one") as file:
        write(file)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "one"))
    with (
        pytest.raises(OSError, match="half-written") as raised,
        limited(3_000),
        atomic_folder(tmp_path / "b") as folder,
    ):
        write(folder / "two")
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [atomic_file, atomic_folder])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Make room"), (errno.EDQUOT, "quota"), (errno.EACCES, "permissions"), (errno.EROFS, "may write")],
)
def test_errors_at_the_temporary_name_the_path(kind: Callable, number: int, remedy: str, tmp_path: Path) -> None:
    for inside in (True, False):  # the system does not always say where
        with pytest.raises(OSError, match=remedy) as raised, kind(tmp_path / "out") as temporary:
            raise OSError(number, os.strerror(number), *([str(temporary)] if inside else []))
        assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "out"))
        assert isinstance(raised.value, PermissionError) == (number == errno.EACCES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"),
        OSError(errno.ENOENT, "No such file or directory"),
        SafetensorError("Error while serializing: invalid shape"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, atomic_folder(tmp_path / "out"):
        raise error
    assert raised.value is error


@posix
def test_a_fit_whose_statistics_find_no_room_names_their_folder(tmp_path: Path) -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "up", "output": "down"}]
    settings = {"preserve": None, "rank": 2, "statistics_dir": tmp_path / "sums", "progress": False}
    with pytest.raises(OSError, match="ulimit") as raised, limited(3_000):
        transmute(make_model("llama"), make_tokenizer(), "up: down\n", pairs, **settings)
    assert raised.value.filename == str(tmp_path / "sums")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    genuine, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        genuine(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert len(calls) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old.txt").read_text() == "old"


def test_atomic_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "table.csv"
    with atomic_file(target) as file:
        assert file.suffix == ".csv"
        file.write_text("a")
        assert not target.exists()
    assert target.read_text() == "a"
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as file:  # noqa: PT012
        file.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "a"
    assert [entry.name for entry in target.parent.iterdir()] == ["table.csv"]
    with pytest.raises(ThoughtError, match="exists"), atomic_file(target, overwrite=False):
        pass
    with pytest.raises(ThoughtError, match="is a folder"), atomic_file(tmp_path):
        pass


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "out.txt").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(ThoughtError, match="exists"), atomic_file(tmp_path / "out.txt", overwrite=False):
        pass
    with atomic_file(tmp_path / "out.txt") as file:
        file.write_text("new")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert (tmp_path / "out.txt").read_text() == "new"


def test_the_working_folder_is_not_replaced_even_if_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThoughtError, match="would delete the working or home folder"), atomic_folder("."):
        pass
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("replaced", [True, False])
def test_what_a_killed_process_had_put_aside_is_put_back_or_removed(replaced: bool, tmp_path: Path) -> None:
    aside = tmp_path / f".made.{'0' * 12}.{files._HOST}.old"
    aside.mkdir()
    (aside / "old").touch()
    if replaced:
        (tmp_path / "made").mkdir()
    with pytest.raises(KeyError), atomic_folder(tmp_path / "made", overwrite=True):
        raise KeyError
    assert [file.name for file in tmp_path.rglob("*")] == (["made"] if replaced else ["made", "old"])


def test_a_cache_may_hold_outputs_and_not_the_other_way(tmp_path: Path) -> None:
    files.check_apart(out=tmp_path / "a" / "b", cache_dir=tmp_path / "a")
    for inner in ("a", "a/b"):
        with pytest.raises(ThoughtError, match=r"(cache_dir and out|out and cache_dir) must be folders"):
            files.check_apart(out=tmp_path / "a", cache_dir=tmp_path / inner)


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder can be renamed to it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(ThoughtError, match=r"output_dir='.*out' is a mount point.*Choose a folder in it"):
        check_output_folder(tmp_path / "out", False, "output_dir")
    check_output_folder(tmp_path / "out" / "adapter")


def test_what_is_read_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model/model.safetensors", "text.txt"):
        (tmp_path / name).write_text("mine")
    read = {"model": tmp_path / "model", "text_file": tmp_path / "text.txt", "pairs": None}
    for name, what in (("model/model.safetensors", "a file of the model"), ("text.txt", "the text file")):
        with pytest.raises(ThoughtError, match=f"would replace {what}"), atomic_file(tmp_path / name, True, **read):
            pytest.fail("it went on")
        assert (tmp_path / name).read_text() == "mine"
    for word in ("new", "newer"):  # what we have written there is not the model's
        with atomic_file(tmp_path / "model" / "adapter.gguf", True, **read) as file:
            file.write_text(word)
        assert (tmp_path / "model" / "adapter.gguf").read_text() == word


def test_a_value_for_json_has_none_for_what_is_no_number() -> None:
    value = {"a": [1.5, float("nan"), (float("-inf"), True)], "b": {"c": "NaN", "d": None}}
    assert finite(value) == {"a": [1.5, None, [None, True]], "b": {"c": "NaN", "d": None}}
