"""What earlier versions wrote can be read, with its numbers; what later ones write is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

from make import IDENTITY, OUTPUTS, numbers  # noqa: E402

from lit_thought import ThoughtPatch  # noqa: E402
from lit_thought.errors import ThoughtError  # noqa: E402
from lit_thought.prompts.instruction_hash import is_text_of  # noqa: E402
from lit_thought.statistics.preserve_file import PreservationFile  # noqa: E402
from lit_thought.statistics.resume import FitProgress  # noqa: E402
from lit_thought.statistics.saved import SavedStatistics  # noqa: E402

VERSIONS = sorted(path for path in FIXTURES.iterdir() if (path / "numbers.json").is_file())


def test_there_are_fixtures_and_they_are_small() -> None:
    assert VERSIONS[0].name == "v1"
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()) < 200_000


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
    found = json.loads(json.dumps(numbers(folder)))
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert same(found[key], wanted[key]), key
    assert wanted["unfinished"]["outputs"] == [list(output) for output in OUTPUTS]
    vectors = ThoughtPatch.load(folder / "adapter_with_vectors")
    assert vectors.vectors
    assert vectors.provenance["instruction"] is None
    assert is_text_of(vectors.provenance["instruction_hash"], "Answer with the opposite.\n")


def edited(name: str, key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, key: 99}))

    return edit


def edited_file(folder: Path) -> None:
    file = folder / "preservation.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as content:
        ((key, record),) = content.metadata().items()
    save_file(tensors, file, {key: json.dumps({**json.loads(record), "format": 99})})


@pytest.mark.parametrize(
    ("edit", "read"),
    [
        (edited("adapter/thought.json", "format_version"), lambda folder: ThoughtPatch.load(folder / "adapter")),
        (edited("statistics/manifest.json", "format_version"), lambda f: SavedStatistics.load(f / "statistics")),
        (edited("unfinished/fit.json", "format"), lambda folder: FitProgress(folder / "unfinished", IDENTITY)),
        (edited_file, lambda folder: PreservationFile(folder / "preservation.safetensors")),
    ],
    ids=["adapter", "statistics", "unfinished fit", "preservation file"],
)
def test_a_later_version_is_refused_by_name(
    edit: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path
) -> None:
    shutil.copytree(VERSIONS[-1], tmp_path / "later")
    read(tmp_path / "later")
    edit(tmp_path / "later")
    with pytest.raises(ThoughtError, match=r"(is|of format) 99, this (lit_thought|version) reads \d"):
        read(tmp_path / "later")
