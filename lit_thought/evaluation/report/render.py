"""The content of a report as HTML and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_thought.evaluation.report.figures import draw_figures
from lit_thought.patch.card import fenced, flat, interval, number
from lit_thought.patch.display import error_bars, escaped
from lit_thought.patch.results import RUNS
from lit_thought.patch.texts import differences
from lit_thought.prompts.template import PromptTemplate
from lit_thought.timing import format_bytes, format_duration

__all__ = ["render_html", "render_markdown"]

_NONE = "–"
_LAYER_COLUMNS = (
    ("error_before", "error before"),
    ("error_after", "error after"),
    ("error_left", "error left"),
    ("effective_rank", "effective rank"),
    ("condition", "condition"),
    ("truncation_loss", "lost to the rank"),
)
_ADVICE = "lit-thought evaluate ADAPTER --pairs test.jsonl --out ADAPTER/evaluation"


def render_html(content: Mapping[str, Any]) -> str:
    """One page, whole in itself: no scripts, no requests; all text from prompts and models is escaped."""
    figures = draw_figures(content)
    errors = [figure for name, figure in figures.items() if name.startswith("error_")]
    return _render("report.html.j2", content, figures=figures, errors=errors)


def render_markdown(content: Mapping[str, Any]) -> str:
    """The same as Markdown, with tables in place of the figures."""
    return _render("report.md.j2", content)


def _render(template: str, content: Mapping[str, Any], **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("lit_thought.evaluation.report"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "cell": _markdown_cell,
        "duration": format_duration,
        "error_bars": error_bars,
        "fenced": lambda text: Markup("\n".join(fenced(text))),
        "figure": _figure,
        "interval": interval,
        "number": number,
        "signed": _signed,
        "template_text": _template_text,
    }
    return environment.get_template(template).render(
        **content,
        **more,
        runs=RUNS,
        advice=_ADVICE,
        differences=differences,
        layer_columns=_layer_columns,
        rows_of=_rows,
        summary=_summary(content["evaluation"]),
        step_columns=_step_columns,
    )


def _summary(evaluation: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The few figures that say most: what, how much, and what to compare it with."""
    if evaluation is None:
        return []
    top = evaluation["headline"]
    found = [] if top["key"] == "fidelity" else [top]
    if top["key"] != "difference":
        rows = {row["key"]: row for row in evaluation["table"]}
        cell = rows["fidelity"]["runs"]["patched"]
        note = f"95 % {interval(cell)}"
        found.append({"label": "same output as instructed", "value": number(cell["value"]), "note": note})
    if (ratio := evaluation["perplexity_ratio"]) is not None:
        value, bounds = f"× {number(ratio['value'], 3)}", interval(ratio, 3)
        note = f"95 % {bounds}" if bounds else "1 is unchanged"
        found.append({"label": "perplexity of unrelated text", "value": value, "note": note})
    saved = number(evaluation["tokens_saved"], 0)
    found.append({"label": "prompt tokens saved", "value": saved, "note": "in each query"})
    return found


def _layer_columns(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Those that any layer has a value for."""
    return [(key, label) for key, label in _LAYER_COLUMNS if any(layer[key] is not None for layer in layers)]


def _step_columns(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that any step has, the step itself first."""
    return sorted({key for step in steps for key in step}, key=lambda key: (key != "step", key))


def _signed(value: float) -> str:
    """A difference, with a minus as wide as the plus."""
    return f"{value:+.2f}".replace("-", "−")


def _figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e6 else f"{value:.3g}"


def _rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row a value."""

    def shown(value: Any) -> str:
        return (", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)) or _NONE

    return [(key, shown(value)) for key, value in flat(table)]


def _template_text(template: Any) -> str:
    """A prompt template as its author wrote it, or as JSON where it is more than a text."""
    text = template.get("text") if isinstance(template, Mapping) else template
    if isinstance(text, str) and template in (text, PromptTemplate(text).to_dict()):
        return text
    return json.dumps(template, indent=2, ensure_ascii=False)


def _markdown_cell(value: Any) -> str:
    """A text as one cell of a table that shows it as it is."""
    return escaped(str(_NONE if value is None else value))
