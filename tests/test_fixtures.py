"""What earlier versions wrote can be read, with its numbers; what later ones write is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixture_files import IDENTITY, OUTPUTS, numbers, preserved, unfinished
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_thought import ThoughtPatch
from lit_thought.errors import ThoughtError
from lit_thought.prompts.instruction_hash import is_text_of
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import SavedStatistics

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(FIXTURES.iterdir())


def test_there_are_fixtures_and_they_are_small() -> None:
    assert [version.name for version in VERSIONS] == ["v1", "v2", "v3"]
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()) < 300_000


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float):
        return found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    return found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_every_number_is_what_it_was(folder: Path) -> None:
    wanted = json.loads((folder / "numbers.json").read_text())
    progress, kept = wanted.pop("unfinished"), wanted.pop("preservation")
    found = json.loads(json.dumps(numbers(folder)))
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert same(found[key], wanted[key]), key
    vectors = ThoughtPatch.load(folder / "adapter_with_vectors")
    assert vectors.vectors
    assert vectors.provenance["instruction"] is None
    assert is_text_of(vectors.provenance["instruction_hash"], "Answer with the opposite.\n")
    assert progress["outputs"] == [list(output) for output in OUTPUTS]
    if folder.name != "v1":
        assert same(json.loads(json.dumps(unfinished(folder))), progress)
    if folder == VERSIONS[-1]:
        assert same(json.loads(json.dumps(preserved(folder))), kept)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_preservation_statistics_of_an_earlier_version_are_refused_by_name(version: str) -> None:
    with pytest.raises(
        ThoughtError,
        match=r"its format is 1, this version reads 2\. Write it anew: lit-thought preserve MODEL",
    ):
        Preservation(FIXTURES / version / "preservation.safetensors")


def test_an_unfinished_fit_of_an_earlier_version_is_refused_by_name() -> None:
    with pytest.raises(
        ThoughtError, match=r"^resume_dir: fit\.json: format is 2, this lit_thought reads 3\. Delete the"
    ):
        unfinished(FIXTURES / "v1")


def edited(name: str, key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, key: 99}))

    return edit


def edited_file(folder: Path) -> None:
    file, key = folder / "preservation.safetensors", "lit_thought_preservation"
    with safe_open(file, framework="pt") as content:
        header = content.metadata()
    save_file(load_file(file), file, {**header, key: json.dumps({**json.loads(header[key]), "format": 99})})


@pytest.mark.parametrize(
    ("edit", "read"),
    [
        (edited("adapter/thought.json", "format_version"), lambda folder: ThoughtPatch.load(folder / "adapter")),
        (edited("statistics/manifest.json", "format_version"), lambda f: SavedStatistics.load(f / "statistics")),
        (edited("unfinished/fit.json", "format"), lambda folder: UnfinishedFit(folder / "unfinished", IDENTITY)),
        (edited_file, lambda folder: Preservation(folder / "preservation.safetensors")),
    ],
    ids=["adapter", "statistics", "unfinished fit", "preservation file"],
)
def test_a_later_version_is_refused_by_name(
    edit: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path
) -> None:
    shutil.copytree(VERSIONS[-1], tmp_path / "later")
    read(tmp_path / "later")
    edit(tmp_path / "later")
    with pytest.raises(ThoughtError, match=r"is 99, this (lit_thought|version) reads \d"):
        read(tmp_path / "later")
