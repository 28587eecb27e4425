"""A flipped bit in a stored number is noticed; what earlier versions wrote without a hash is read as before."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import fixture_files
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_thought.errors import ThoughtError
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.tensor_files import TensorFile, tensors_hash, write_tensors


def test_the_hash_is_that_of_the_bytes_in_the_order_of_the_names() -> None:
    tensors = {
        "b": torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64).T,  # not contiguous
        "a": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "one": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    digest = hashlib.sha256()
    for about, data in (
        ("a (2,) torch.bfloat16\n", b"\xc0\x3f\x20\x40"),
        ("b (2, 2) torch.float64\n", tensors["b"].numpy().tobytes()),
        ("none (0, 3) torch.float32\n", b""),
        ("one () torch.int64\n", (7).to_bytes(8, "little")),
    ):
        digest.update(about.encode() + data)
    assert tensors_hash(tensors) == digest.hexdigest()


def test_a_group_is_read_as_it_was_written_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"one.a": torch.arange(6.0).view(2, 3).T, "one.b": torch.tensor(True), "two.a": torch.zeros(0, 3)}
    write_tensors(file, tensors, {"about": "ü"}, ["one."])
    content = TensorFile(file, "file='a'", "Get it anew.")
    assert content.header["about"] == "ü"
    assert content.shapes == {"one.a": (3, 2), "one.b": (), "two.a": (0, 3)}
    found = content.read("one.")
    assert {name: value.tolist() for name, value in found.items()} == {"a": [[0, 3], [1, 4], [2, 5]], "b": True}
    assert all(value.data_ptr() % 64 == 0 for value in content.read("one.").values())
    save_file({**tensors, "one.a": tensors["one.a"].contiguous() + 1}, file, content.header)
    assert content.read("two.")["a"].shape == (0, 3)  # of which no hash was kept
    with pytest.raises(ThoughtError, match=r"^file='a' is damaged: first: its numbers .*SHA-256.*\. Get it anew\.$"):
        content.read("one.", part="first")
    with pytest.raises(ThoughtError, match="exists"):
        write_tensors(file, tensors, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "now"
    fixture_files.main(folder)
    return folder


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "statistics": (
        "statistics/stage-0001.safetensors",
        lambda folder: SavedStatistics.load(folder / "statistics").stage(1),
        r"stage-0001\.safetensors in 'statistics' is damaged.*SHA-256",
    ),
    "preservation file": (
        "preservation.safetensors",
        lambda folder: [
            Preservation(folder / "preservation.safetensors").prior(block, site)
            for block in (0, 1)
            for site in ("attn_out", "mlp_out")
        ],
        r"preservation\.safetensors' is damaged: block \d, \w+: its numbers.*SHA-256",
    ),
    "unfinished fit": (
        "unfinished/stage-00000.safetensors",
        fixture_files.unfinished,
        r"stage-00000\.safetensors is damaged.*SHA-256",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(name: str, written: Path, tmp_path: Path) -> None:
    file, read, message = FILES[name]
    shutil.copytree(written, tmp_path / "copy")
    copy = tmp_path / "copy" / file
    read(tmp_path / "copy")
    data = copy.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in (start, (start + len(data)) // 2, len(data) - 1):
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ThoughtError, match=message):
            read(tmp_path / "copy")
    copy.write_bytes(data)
    read(tmp_path / "copy")


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_hash_is_read(name: str, written: Path, tmp_path: Path) -> None:
    file, read, _ = FILES[name]
    shutil.copytree(written, tmp_path / "copy")
    copy = tmp_path / "copy" / file
    with safe_open(copy, framework="pt") as content:
        label = content.metadata()
    kept = {key: value for key, value in label.items() if "sha256" not in key}
    assert len(kept) < len(label)
    save_file(load_file(copy), copy, kept)
    read(tmp_path / "copy")
