"""What a patch says of itself: in a line, and as a table in notebooks."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from lit_thought.patch.display import bars, error_bars, layer_figures, title
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors

FACTORS = {"model.layers.0.mlp.down_proj": Factors(torch.ones(2, 3), torch.ones(4, 2))}
KNOWN: dict[str, Any] = {
    "model": "/home/someone/models/tiny",
    "instruction": "Talk like a <b>pirate</b> | always.",
    "inputs": {"kind": "system", "count": 12},
    "settings": {"pairs": 30},
    "diagnostics": {
        "model.layers.1.mlp.down_proj": {"error_before": 4.0, "error_after": 1.0},
        "model.layers.0.mlp.down_proj": {"error_before": 1.0, "error_after": 1.0},
        "model.layers.2.mlp.down_proj": {"error_before": 2.0, "error_after": 0.0},
        "model.layers.0.self_attn.o_proj": {"error_before": 0.0, "error_after": 0.0},
    },
}


class Cells(HTMLParser):
    """The tags of a text, and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_one_line() -> None:
    assert repr(ThoughtPatch(FACTORS, KNOWN)) == (
        "ThoughtPatch(rank=2, weights=1, parameters=14, model='tiny', kind='system')"
    )
    assert repr(ThoughtPatch(FACTORS)) == "ThoughtPatch(rank=2, weights=1, parameters=14)"
    both = ThoughtPatch(FACTORS, KNOWN) + ThoughtPatch(FACTORS, {**KNOWN, "inputs": {"kind": "document", "count": 1}})
    assert repr(both) == "ThoughtPatch(rank=4, weights=1, parameters=28, model='tiny')"


def test_bars_of_the_error_by_block() -> None:
    assert bars([0.0, 0.12, 0.5, 0.87, 1.0, 2.0, None]) == "▁▁▄▇██·"
    assert error_bars(layer_figures(KNOWN)) == [("mlp.down_proj", "█▂▁", pytest.approx(1.25 / 3))]


def test_a_table_in_notebooks() -> None:
    patch = ThoughtPatch(FACTORS, KNOWN)
    page = Cells(patch._repr_html_())
    assert set(page.tags) == {"table", "caption", "tbody", "tr", "th", "td"}
    assert page.cells[0] == "“Talk like a <b>pirate</b> | always.” as weights"
    assert page.cells[page.cells.index("inputs") + 1] == "30"
    assert page.cells[page.cells.index("error left by block, mlp.down_proj") + 1] == "█▂▁ mean 0.42"
    text = patch._repr_markdown_()
    assert "| rank | 2 |" in text
    assert "| error left by block, mlp.down\\_proj | █▂▁ mean 0.42 |" in text
    assert "“Talk like a &lt;b&gt;pirate&lt;/b&gt; \\| always.” as weights" in text
    assert "/home" not in text + patch._repr_html_() + repr(patch)
    assert Cells(ThoughtPatch(FACTORS)._repr_html_()).cells[0] == "An instruction as weights"


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"instruction": "You are a pirate."}, "“You are a pirate.” as weights"),
        ({"instruction": "x" * 100}, f"“{'x' * 60}…” as weights"),
        (
            {"instruction": "Q: big\nA: small\n", "inputs": {"kind": "demonstrations"}},
            "Demonstrations: “Q: big",
        ),
        ({"instruction": None, "inputs": {"kind": "document"}}, "A document as weights"),
        ({"instruction": ["one", "two"]}, "Instructions as weights"),
        ({"instruction": ["one"]}, "“one” as weights"),
        ({}, "An instruction as weights"),
    ],
)
def test_titles(known: dict[str, Any], said: str) -> None:
    assert title(known).startswith(said)
