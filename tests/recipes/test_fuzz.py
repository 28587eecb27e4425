"""Malformed input of every kind ends in the library's own error, or does no harm, and leaves no file behind.

A smaller number of the cases of recipes/robustness/scorecard.py, other ones, and values that hypothesis makes up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_thought import PromptTemplate
from lit_thought.errors import ThoughtError
from recipes.robustness import mutations
from recipes.robustness.fuzz_inputs import TOKENIZER
from recipes.robustness.fuzzing import Kind, fuzz
from recipes.robustness.scorecard import KINDS

CASES = dict.fromkeys(KINDS, 80) | {"configs": 15, "unfinished fits": 15, "preservation caches": 20, "evaluations": 30}
CASES |= {"instruction texts": 25, "generation configs": 40, "model wrappers": 30}
CASES |= {"adapter folders": 30, "adapter folders with vectors": 30, "adapter folders without the instruction": 30}


@pytest.mark.parametrize("name", KINDS)
def test_spoilt_copies(name: str, tmp_path: Path) -> None:
    tally = fuzz(KINDS, {name: CASES[name]}, 1, tmp_path)[name]
    assert tally.escaped == []
    assert tally.left == []
    assert tally.tried == CASES[name] == tally.refused + tally.read
    if name == "preservation caches":  # made anew
        assert tally.refused == 0
    elif name != "instruction texts":  # any text is one
        assert tally.refused > 0.1 * tally.tried, "most changes would do no harm: they test nothing"


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda folder: {}["x"], "KeyError: 'x'"),
        (lambda folder: (_ for _ in ()).throw(ThoughtError("")), "refused without a message"),
        (lambda folder: (folder / "left").touch(), "read"),
        (lambda folder: tempfile.mkdtemp(), "read"),
    ],
)
def test_what_escapes_and_what_is_left_is_told(read: Any, expected: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "x.txt").write_text("text")

    def reader(folder: Path) -> object:
        return read(folder) if (folder / "spoilt").exists() else None

    def spoil(folder: Path, draw: Random) -> str:
        (folder / "spoilt").touch()
        return "bytes: flip"

    tally = fuzz({"example": Kind(write, reader, spoil)}, {"example": 2}, 0, tmp_path)["example"]
    assert (tally.tried, tally.refused) == (2, 0)
    assert [entry["end"] for entry in tally.escaped or tally.left] == [expected] * 2
    assert bool(tally.left) == (expected == "read")


def test_changes_are_seeded_and_differ(tmp_path: Path) -> None:
    data = b'{"a": [1, "two"], "b": {"c": null}}'
    found = []
    for seed in (*range(40), 0):
        file = tmp_path / "example.json"
        mutations.restore(tmp_path, {"example.json": data})
        name = mutations.spoil_file(file, Random(seed))
        found.append((name, file.read_bytes() if file.is_file() and not file.is_symlink() else None))
    assert found[0] == found[-1]
    assert len(set(found)) > 30
    assert sum(content == data for _, content in found) < 5


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=10), st.text(max_size=10), st.text(max_size=10), st.text(max_size=10))
def test_any_text_in_a_good_template(before: str, instruction: str, input: str, output: str) -> None:
    try:
        pair = PromptTemplate(f"{before}{{input}}\n{{output}}\n").tokenise(TOKENIZER, instruction, input, output)
    except ThoughtError as error:
        assert str(error)  # noqa: PT017
    else:
        plain = [pair.plain_ids[i] for i in pair.plain_positions]
        assert plain == [pair.instructed_ids[i] for i in pair.instructed_positions]
