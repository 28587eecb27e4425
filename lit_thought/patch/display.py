"""A patch in a few words and pictures: its title, its errors by block, and what a notebook shows of it."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lit_thought.patch.provenance import summands

__all__ = [
    "bars",
    "error_bars",
    "escaped",
    "html_table",
    "kind_of",
    "layer_figures",
    "markdown_table",
    "order",
    "place",
    "title",
]

_KINDS = {"demonstrations": "Demonstrations", "system": "A system prompt", "document": "A document"}
_LONG_KINDS = ("Demonstrations", "A document")
"""Kinds of instructions, and those whose first words alone do not tell what they are."""
_TITLE = 60
"""Characters of the instruction in the title."""
_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")
_BARS = "▁▂▃▄▅▆▇█"
_BLOCK = re.compile(r"\.([0-9]{1,9})\.")
_LAYER_FIGURES = (
    ("error_before", ("error_before", "vector_error_before")),
    ("error_after", ("error_after", "vector_error_after")),
    ("effective_rank", ("effective_rank",)),
    ("condition", ("condition",)),
    ("truncation_loss", ("truncation_loss",)),
    ("tokens", ("tokens",)),
)


def title(provenance: Mapping[str, Any]) -> str:
    """What an adapter stands in for, in a few words: how its instruction begins, or what kind of one it is, where that
    is all that was kept."""
    return f"{' and '.join(dict.fromkeys(map(_subject, summands(provenance))))} as weights"


def kind_of(known: Mapping[str, Any]) -> str | None:
    """What one fit's instruction is (:data:`~lit_thought.settings.Kind`), where its inputs were written by that."""
    inputs = known.get("inputs")
    return inputs.get("kind") if isinstance(inputs, Mapping) else None


def _subject(known: Mapping[str, Any]) -> str:
    kind = _KINDS.get(str(kind_of(known)), "")
    instruction = known.get("instruction")
    texts = [instruction] if isinstance(instruction, str) else list(instruction or [])
    if len(texts) != 1 or not texts[0].strip():
        return kind or ("Instructions" if len(texts) > 1 else "An instruction")
    words = textwrap.shorten(texts[0], _TITLE, placeholder="…")
    words = words if len(words) > 1 else f"{' '.join(texts[0].split())[:_TITLE]}…"  # of one long word
    return f"{kind + ': ' if kind in _LONG_KINDS else ''}“{words}”"


def escaped(text: str) -> str:
    """A text in one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def place(label: str) -> dict[str, Any]:
    """A layer's name, its block's index, and which of the block's layers it is."""
    match = _BLOCK.search(label)
    kinds = [".".join(path.split(".")[-2:]) for path in label.split("+")]
    return {"layer": label, "block": int(match[1]) if match else None, "kind": " + ".join(kinds)}


def order(label: str) -> tuple[int, bool, str]:
    """Layers as a fit goes through them: by block, attention before the MLP."""
    found = place(label)
    return (-1 if found["block"] is None else found["block"], "attn" not in label and "attention" not in label, label)


def layer_figures(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What one fit's provenance says of each layer, in the order of the fit: where it is, errors before and after, the
    share of the error that is left (``error_left``), and more."""
    layers = {label: own for label, own in (known.get("diagnostics") or {}).items() if isinstance(own, Mapping) and own}
    return [_layer(label, layers[label]) for label in sorted(layers, key=order)]


def _layer(label: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        name: next((figures[key] for key in keys if figures.get(key) is not None), None)
        for name, keys in _LAYER_FIGURES
    }
    before, after = values["error_before"], values["error_after"]
    left = after / before if before and after is not None else None
    return {**place(label), **values, "error_left": left}


def bars(shares: Sequence[float | None]) -> str:
    """A character for each share, the higher the more, up to 1; a dot for None."""
    return "".join("·" if share is None else _BARS[int(7.99 * min(1.0, max(0.0, share)))] for share in shares)


def error_bars(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Of each kind of layer: its name, the share of the error that is left by block, as :func:`bars`, and its mean."""
    rows = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        shares = [layer["error_left"] for layer in layers if layer["kind"] == kind]
        known = [share for share in shares if share is not None]
        if known:
            rows.append((kind, bars(shares), sum(known) / len(known)))
    return rows


def markdown_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, under a title; texts are shown as they are."""
    lines = [f"**{escaped(caption)}**", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {escaped(name)} | {escaped(value)} |" for name, value in rows)])


def html_table(caption: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """The same as HTML, of any number of columns."""
    top = f"<thead><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    left = ' style="text-align: left"'
    body = ""
    for first, *cells in rows:
        others = "".join(f"<td{left}>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr><th{left}>{html.escape(first)}</th>{others}</tr>"
    return f"<table><caption>{html.escape(caption)}</caption>{top}<tbody>{body}</tbody></table>"
