"""Draws the pictures of the documentation, into recipes/site/pages/pictures.

    python -m recipes.site.pictures

The first says it all at once, light or dark as the reader's system is: a prompt with its chunk, and an adapter in the
chunk's place; another is a still of ``lit-thought chat``. Three are schematic: the two runs and their shared tokens,
what a block adds to the residual stream, the order of a fit. Two show figures of recipes/results: which one change does
how much, and what preservation and ridge trade. The same command writes the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import jsonargparse
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from lit_thought.files import atomic_file
from lit_thought.patch.chat import Answer, Answers
from lit_thought.patch.results import RUNS
from recipes.harness import load_split

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
INK, MUTED, CHUNK, PLAIN, SOLVED = "#222222", "#777777", "#f3c77a", "#d9dee8", "#7fa8d8"
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lit_thought",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pictures(out: str = str(HERE / "pages" / "pictures")) -> None:
    """Draw all of them.

    Args:
        out: the folder to write them to.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        with atomic_file(folder / f"{name}.svg") as temporary:
            temporary.write_text(draw(), encoding="utf-8")


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib's own settings with ours, whatever others have set; afterwards theirs again."""
    with rc_context():
        rcdefaults()
        rcParams.update(SETTINGS)
        yield


def drawing(width: float, height: float) -> Callable[[Callable[[Axes], None]], Callable[[], str]]:
    """Makes a function that draws on axes without frame, in tenths of an inch, one that returns an SVG."""

    def decorate(draw: Callable[[Axes], None]) -> Callable[[], str]:
        def render() -> str:
            with style():
                figure = Figure(figsize=(width / 10, height / 10))
                axes = figure.add_axes((0, 0, 1, 1))
                axes.set(xlim=(0, width), ylim=(0, height))
                axes.axis("off")
                draw(axes)
                return svg(figure)

        return render

    return decorate


def chart(draw: Callable[[Figure], None]) -> Callable[[], str]:
    """Makes a function that draws on a figure one that returns an SVG."""

    def render() -> str:
        with style():
            figure = Figure(figsize=(7, 3.2), layout="constrained")
            draw(figure)
            return svg(figure)

    return render


def svg(figure: Figure) -> str:
    """The figure as text, with no date in it and fonts that every reader has."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plain = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1sans-serif", text.getvalue())
    return re.sub(r"[ \t]+$", "", plain, flags=re.MULTILINE)


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 3.2) -> None:
    """A labelled box with its lower left corner at (x, y)."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center_baseline")


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, style: str = "-|>"
) -> None:
    """An arrow."""
    line = {"arrowstyle": style, "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=line)


@drawing(72, 24)
def two_runs(axes: Axes) -> None:
    """The instructed and the plain run, and which tokens are compared."""
    suffix = ["Q:", " hot", "\\n", "A:", " cold"]
    chunk = "Q: big\\nA: small\\nQ: early\\nA: late\\n"
    axes.text(1, 21.3, "instructed run: what to copy", color=MUTED)
    axes.text(1, 1.2, "plain run: what your server will send", color=MUTED)
    box(axes, 1, 16, 6, "<s>", PLAIN)
    box(axes, 7, 16, 32, chunk, CHUNK)
    axes.text(23, 14.1, "chunk I, to be removed", ha="center", color=MUTED)
    box(axes, 1, 4, 6, "<s>", PLAIN)
    arrow(axes, (4, 7.4), (4, 15.8), MUTED, "<|-|>")
    for place, token in enumerate(suffix):
        box(axes, 39 + 6 * place, 16, 6, token, PLAIN)
        box(axes, 7 + 6 * place, 4, 6, token, PLAIN)
        arrow(axes, (10 + 6 * place, 7.4), (42 + 6 * place, 15.8), MUTED, "<|-|>")
    axes.text(52, 8.5, "compared: the tokens\nthat both runs share", color=MUTED, va="center", linespacing=1.4)


@drawing(72, 31)
def block(axes: Axes) -> None:
    """One block of the plain run, and where the three sites read and write."""
    arrow(axes, (2, 5), (71, 5))
    axes.text(2, 1.6, "residual stream of the plain run", color=MUTED)
    for x, text in ((8, "norm"), (15, "attention"), (38, "norm"), (45, "up, gate")):
        box(axes, x, 13, 6 if text == "norm" else 9, text, PLAIN)
    box(axes, 25, 13, 7, "o_proj", SOLVED)
    box(axes, 55, 13, 10, "down_proj", SOLVED)
    for start, end in ((14, 15), (24, 25), (44, 45), (54, 55)):
        arrow(axes, (start, 14.6), (end, 14.6))
    for x in (9.5, 39.5):
        arrow(axes, (x, 5), (x, 12.9))
    for x, label in ((30, "m"), (63, "o")):
        arrow(axes, (x, 12.9), (x, 6.1))
        axes.text(x, 5, "+", ha="center", va="center_baseline", bbox={"boxstyle": "circle", "fc": "white", "ec": INK})
        axes.text(x + 2.6, 6.4, label, style="italic")
    sites = ((24.5, "attn_out", "a: heads’ outputs\nδ = m* − m"), (54.5, "mlp_out", "a: activations\nδ = o* − o"))
    for x, name, reads in sites:
        arrow(axes, (x, 21), (x, 15.2), CHUNK)
        axes.text(x, 28.2, name, ha="center", weight="bold")
        axes.text(x, 24.4, reads, ha="center", va="center", color=MUTED, linespacing=1.4)
    arrow(axes, (44.5, 21), (44.5, 15.2), MUTED)
    axes.text(41, 28.2, "mlp_in", ha="center", weight="bold", color=MUTED)
    axes.text(41, 24.4, "a: norm(m)\nδ = norm(m*) − a", ha="center", va="center", color=MUTED, linespacing=1.4)


@drawing(72, 22)
def order(axes: Axes) -> None:
    """Sequential order: each stage sees what is patched before it."""
    axes.text(1, 19.2, "instructed run, computed once", color=MUTED)
    axes.text(1, 0.9, "plain run, through what is patched so far", color=MUTED)
    names = [("block 0", "attn_out"), ("block 0", "mlp_out"), ("block 1", "attn_out"), ("block 1", "mlp_out")]
    arrow(axes, (1, 17), (71, 17))
    arrow(axes, (1, 5), (71, 5))
    for place, (number, site) in enumerate(names):
        x = 2 + 16.5 * place
        box(axes, x, 9, 14, f"{number}, {site}", SOLVED, 4)
        arrow(axes, (x + 3, 17), (x + 3, 13.1), MUTED)
        arrow(axes, (x + 3, 5), (x + 3, 8.9), MUTED)
        axes.text(x + 3.6, 14.4, "target", color=MUTED, size=8.5)
        axes.text(x + 3.6, 6.3, "a", color=MUTED, size=8.5)
        arrow(axes, (x + 9.5, 8.9), (x + 9.5, 5.2))
        axes.text(x + 10, 6.3, "ΔW", size=8.5)
    axes.text(68.5, 10.4, "…", size=14)


@chart
def methods(figure: Figure) -> None:
    """Fidelity and unrelated perplexity of one change for all tokens, by kind of change."""
    tasks = _read("theory")["3. Six word tasks"]
    names = ["function vector", "vector", "mlp_in", "mlp_out", "attn_out", "both"]
    figures = {name: [_mean(tasks[name], key) for key in ("fidelity", "perplexity_ratio")] for name in names}
    left, right = figure.subplots(1, 2, sharey=True)
    titles = ("outputs equal to the instructed model's", "perplexity of unrelated text ×")
    for place, (axes, title) in enumerate(zip((left, right), titles, strict=True)):
        values = [figures[name][place] for name in names]
        axes.barh(names, values, color=[SOLVED if name in names[3:] else PLAIN for name in names])
        for row, value in enumerate(values):
            axes.annotate(f"{value:.2f}", (value, row), (4, 0), textcoords="offset points", va="center_baseline")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.15 * max(values))
        axes.tick_params(axis="y", length=0)
    left.invert_yaxis()


@chart
def trade(figure: Figure) -> None:
    """What preservation weight and ridge trade: KL on held-back words against unrelated perplexity."""
    runs = [run for run in _read("sweep")["rows"] if run["sites"] == "both" and run["rank"] == 16]
    axes = figure.subplots()
    markers = dict(zip(sorted({run["ridge"] for run in runs}), "osD^v", strict=False))
    for number, (ridge, marker) in enumerate(markers.items()):
        own = sorted((run for run in runs if run["ridge"] == ridge), key=lambda run: run["preserve_weight"])
        x, y = [run["perplexity_ratio"] for run in own], [run["output_kl"] for run in own]
        axes.plot(x, y, marker=marker, label=f"ridge λ = {ridge:g}", linewidth=1)
        for run, place in zip(own, zip(x, y, strict=True), strict=True):
            axes.annotate(
                f"ρ {run['preserve_weight']:g}",
                place,
                (5, 4 - 14 * (number % 2)),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xlabel="perplexity of unrelated text ×", ylabel="KL to the instructed model, nats")
    axes.legend(frameon=False)


def idea() -> str:
    """A prompt of demonstrations and a query, token by token, and the same query with an adapter."""
    runs = _read("instruction_alone_words")["runs"]
    (run,) = (run for run in runs if (run["name"], run["fit"], run["seed"]) == ("antonym", FIT, 0))
    before, after = (round(run["prompt_tokens"][which]) for which in ("instructed", "plain"))
    (item,) = (item for item in run["items"] if item["input"] == "happy")
    first = load_split("common_words/antonym", run["seed"]).shown
    query = f"Q: {item['input']}"
    parts = [
        _text(20, 38, "The prompt", "title"),
        _box(20, 54, 230, 112, "chunk"),
        *(_text(34, 80 + 24 * n, f"Q: {own['input']} A: {own['output']}", "code") for n, own in enumerate(first[:3])),
        _text(34, 80 + 24 * 3, f"… {len(first) - 3} more", "code soft"),
        _box(20, 174, 230, 36, "plain"),
        _text(34, 197, f"{query} A: {item['instructed']}", "code"),
        *_tokens(20, 224, before, before - after),
        _text(20, 302, f"{before} tokens a query", "count"),
        '<path class="line" d="M268 132 H360"/><path class="head" d="M358 125 L372 132 L358 139 Z"/>',
        _text(320, 112, "transmute", "title middle"),
        _text(320, 160, "two runs,", "soft middle"),
        _text(320, 178, "least squares,", "soft middle"),
        _text(320, 196, "no training", "soft middle"),
        _text(390, 38, "With an adapter", "title"),
        _box(390, 54, 230, 112, "adapter"),
        _text(505, 104, "adapter/", "code middle"),
        _text(505, 130, "a LoRA for the same model", "soft middle"),
        _box(390, 174, 230, 36, "plain"),
        _text(404, 197, f"{query} A: {item['patched']}", "code"),
        *_tokens(390, 224, after, 0),
        _text(390, 302, f"{after} tokens a query", "count"),
    ]
    named = f"{before} tokens of prompt become {after} and an adapter; the answer is the same"
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 322" role="img" aria-label="{named}">'
    card = '<rect class="card" x="1" y="1" width="638" height="320" rx="14"/>'
    return "\n".join([opened, f"<style>{STYLE}</style>", card, *parts, "</svg>"]) + "\n"


FIT = "written"
"""Of the study of instructions alone, the fits on nothing but what the model wrote."""
STYLE = """
.card { fill: #ffffff; stroke: #d5d9e2 } .plain { fill: #e6e9f0 } .query { fill: #8b93a3 }
.chunk { fill: #f6d595 } .adapter { fill: #b5d0ee }
text { font: 15px system-ui, sans-serif; fill: #222222 } .title { font-weight: 600; font-size: 17px }
.code { font: 14px ui-monospace, monospace } .soft { fill: #5a5f6a } .count { font-weight: 600; font-size: 19px }
.middle { text-anchor: middle } .line { stroke: #5a5f6a; stroke-width: 2 } .head { fill: #5a5f6a }
@media (prefers-color-scheme: dark) {
.card { fill: #1c2029; stroke: #3a404d } .plain { fill: #3a404d } .query { fill: #9aa2b1 }
.chunk { fill: #86631c } .adapter { fill: #2c5580 }
text { fill: #eceef2 } .soft { fill: #b3b9c5 } .line { stroke: #b3b9c5 } .head { fill: #b3b9c5 }
}
"""


def chat() -> str:
    """A terminal with ``lit-thought chat``: recorded answers to one question, as the command shows them."""
    runs = [run for run in _read("instruction_alone_system")["runs"] if run["name"] == "pirate"]
    (item,) = (item for item in runs[0]["items"] if item["input"] == "What can I do on a rainy Sunday?")
    lengths = {"plain": runs[0]["prompt_tokens"]["plain"], "instructed": runs[0]["prompt_tokens"]["instructed"]}
    lengths["patched"] = lengths["plain"]
    answers = Answers(item["input"], **{run: Answer(item[run], round(lengths[run])) for run in RUNS})
    console = Console(width=96, record=True, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"> {item['input']}\n"))
    console.print(answers)
    fetched = re.compile(r"@font-face \{\{.*?\}\}", re.DOTALL)  # a font from elsewhere: the reader's own will do
    form = fetched.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title="lit-thought chat pirate/", code_format=form, unique_id="chat") + "\n"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{text}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str, corner: float = 6) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}" class="{kind}"/>'


def _tokens(x: float, y: float, count: int, chunk: int) -> list[str]:
    """A small square for each token, 23 in a row, the chunk's first."""
    kinds = ["chunk"] * chunk + ["query"] * (count - chunk)
    return [_box(x + 10 * (n % 23), y + 13 * (n // 23), 8, 10, kind, 2) for n, kind in enumerate(kinds)]


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _mean(tasks: Mapping[str, Mapping[str, float]], key: str) -> float:
    return sum(task[key] for task in tasks.values()) / len(tasks)


PICTURES = {
    "idea": idea,
    "chat": chat,
    "two_runs": two_runs,
    "block": block,
    "order": order,
    "methods": methods,
    "trade": trade,
}

if __name__ == "__main__":
    jsonargparse.auto_cli(pictures, as_positional=False)
