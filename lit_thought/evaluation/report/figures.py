"""The report's figures as inline SVG, in the page's own colours.

matplotlib draws with stand-in colours that then become CSS variables, so that one SVG serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from lit_thought.patch.results import RUNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

__all__ = ["Figure", "draw_figures"]

_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_SERIES = ("#010104", "#010105", "#010106", "#010107")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
_RUN_STYLE = {"plain": (_SERIES[0], "s"), "instructed": (_SERIES[1], "o"), "patched": (_SERIES[2], "D")}
_MARKERS = ("o", "s", "D", "^")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
_STEP_LINES = (("accuracy", "accuracy"), ("fidelity", "fidelity"), ("instructed_accuracy", "instructed accuracy"))
_BY_BLOCK = {
    "error": (
        "error_left",
        "Error left by block",
        "Share of the residual stream's squared error that is left once the layer is patched; lower is better.",
        1.03,
    ),
    "rank": (
        "effective_rank",
        "Effective rank by block",
        "In how many directions the layer's inputs spread: (Σ eigenvalues)² ÷ Σ eigenvalues² of their Gram matrix.",
        None,
    ),
}
"""Figures with a line for each kind of layer: key of the layer's value, title, caption, top of the axis."""
_WIDTH = 5.4  # inches; at 72 units each about the width of a phone, so that the text keeps its size there


@dataclass(frozen=True)
class Figure:
    """A drawing, what it is called, and what a reader should see in it."""

    title: str
    caption: str
    svg: Markup


def draw_figures(content: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that the content has numbers for, by name: three_way; and with the number of the fit steps_0,
    error_0, rank_0, time_0; spectrum."""
    from matplotlib import rc_context

    figures: dict[str, Figure] = {}
    with rc_context(_SETTINGS):
        if content["evaluation"] is not None:
            figures["three_way"] = _three_way(content["evaluation"])
        for number, fit in enumerate(content["fits"]):
            with rc_context({"svg.hashsalt": str(number)}):
                drawn = {"steps": _steps(fit["steps"]), "time": _time(fit["seconds"])}
                drawn |= {name: _by_block(fit["layers"], *figure) for name, figure in _BY_BLOCK.items()}
            figures |= {f"{name}_{number}": figure for name, figure in drawn.items() if figure is not None}
        if content["spectrum"]:
            figures["spectrum"] = _spectrum(content["spectrum"])
    return figures


def _three_way(evaluation: Mapping[str, Any]) -> Figure:
    rows = [row for row in evaluation["table"] if any(cell and "low" in cell for cell in row["runs"].values())]

    def draw(axes: Axes) -> None:
        named: set[str] = set()
        for place, row in enumerate(rows):
            for offset, run in zip((-0.22, 0.0, 0.22), RUNS, strict=True):
                if (cell := row["runs"][run]) is None:
                    continue
                colour, marker = _RUN_STYLE[run]
                axes.plot([cell["low"], cell["high"]], [place + offset] * 2, color=colour, linewidth=1.8)
                axes.plot(cell["value"], place + offset, marker, color=colour, label=None if run in named else run)
                named.add(run)
        labels = [re.sub("^(output equal to|outputs that) ", r"\1\n", row["label"]) for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        _legend(axes, len(RUNS))

    return _draw(
        "Plain, instructed and patched",
        f"Shares of {evaluation['pairs']} held-out pairs; the bars are 95 % Wilson intervals.",
        draw,
        height=0.9 + 0.62 * len(rows),
    )


def _steps(steps: Sequence[Mapping[str, float]]) -> Figure | None:
    if not steps:
        return None
    lines = [(key, label) for key, label in _STEP_LINES if any(key in step for step in steps)]

    def draw(axes: Axes) -> None:
        for (key, label), colour, marker in zip(lines, _SERIES[2:] + _SERIES[1:2], _MARKERS, strict=False):
            seen = [step for step in steps if key in step]
            axes.plot([step["step"] for step in seen], [step[key] for step in seen], marker, color=colour, label=label)
            axes.lines[-1].set_linestyle("--" if key == "instructed_accuracy" else "-")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xticks([step["step"] for step in steps])
        axes.set_xlabel("step (0 is the plain model)")
        axes.grid(axis="y")
        _legend(axes, len(lines))

    return _draw("Accuracy by step", "How the validation pairs do after each time through the blocks.", draw)


def _by_block(
    layers: Sequence[Mapping[str, Any]], key: str, title: str, caption: str, top: float | None
) -> Figure | None:
    seen = [layer for layer in layers if layer["block"] is not None and layer[key] is not None]
    if not seen:
        return None
    kinds = list(dict.fromkeys(layer["kind"] for layer in seen))

    def draw(axes: Axes) -> None:
        for number, kind in enumerate(kinds):
            own = [layer for layer in seen if layer["kind"] == kind]
            (line,) = axes.plot([layer["block"] for layer in own], [layer[key] for layer in own], label=kind)
            line.set(marker=_MARKERS[number % 4], color=_SERIES[(1, 2, 0, 3)[number % 4]], markersize=3.5)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.set_ylim(0, top and max(top, 1.05 * max(layer[key] for layer in seen)))
        axes.grid(axis="y")
        _legend(axes, len(kinds))

    return _draw(title, caption, draw)


def _spectrum(spectrum: Sequence[Mapping[str, Any]]) -> Figure:
    kinds = list(dict.fromkeys(entry["kind"] for entry in spectrum))[:4]

    def draw(*panels: Axes) -> None:
        for axes, kind in zip(panels, kinds, strict=True):
            own = [entry for entry in spectrum if entry["kind"] == kind]
            for number, entry in enumerate(own):
                values = [value for value in entry["values"] if value > 0]
                shade = 0.25 + 0.75 * (number + 1) / len(own)
                axes.plot(range(1, len(values) + 1), values, color=_SERIES[1], alpha=shade, linewidth=1.1)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_title(kind)
            axes.set_xlabel("singular value")
            axes.xaxis.set_major_locator(_whole_numbers())
            axes.grid(axis="y")

    return _draw(
        "Spectrum of the patch",
        "Singular values of each changed weight's ΔW, largest first; a line a block, the darker the deeper.",
        draw,
        panels=len(kinds),
        height=2.5 if len(kinds) <= 2 else 4.8,
    )


def _time(seconds: Mapping[str, float]) -> Figure | None:
    spent = {phase: value for phase, value in seconds.items() if value > 0}
    if not spent:
        return None

    def draw(axes: Axes) -> None:
        places = range(len(spent))
        axes.barh(places, list(spent.values()), color=_SERIES[1], height=0.6)
        for place, value in zip(places, spent.values(), strict=True):
            axes.annotate(f"{value:.2f} s", (value, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, list(spent))
        axes.set_ylim(len(spent) - 0.4, -0.6)
        axes.set_xlim(0, 1.18 * max(spent.values()))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    return _draw("Time by phase", "Seconds of the whole fit that each phase took.", draw, height=0.4 + 0.3 * len(spent))


def _whole_numbers() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", integer=True)


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(entries, 3), borderaxespad=0, handlelength=1.6)


def _draw(title: str, caption: str, draw: Callable[..., None], height: float = 2.9, panels: int = 1) -> Figure:
    from matplotlib import rc_context, rcParams
    from matplotlib.figure import Figure as Canvas

    columns = min(panels, 2)
    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    axes = canvas.subplots(-(-panels // columns), columns, squeeze=False).ravel()
    for surplus in axes[panels:]:
        surplus.remove()
    draw(*axes[:panels])
    with rc_context({"svg.hashsalt": f"{rcParams['svg.hashsalt']} {title}"}):  # names of its own in the page
        return Figure(title, caption, _inline_svg(canvas, f"{title}. {caption}"))


def _inline_svg(canvas: Canvas, description: str) -> Markup:
    """The drawing without what a file of its own needs, named for screen readers, with the page's colours and font."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", box.start()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same names in every figure
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    return Markup(head + body)  # matplotlib escapes the labels
