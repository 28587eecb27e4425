"""Tables and figure of the recipe ``document``, from its record of runs; see document.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib import pyplot

from lit_thought.files import atomic_file
from lit_thought.patch.results import RUNS
from lit_thought.solve.intervals import paired_difference, wilson
from recipes.tasks.system_prompt import PLACES

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "lit_thought", "savefig.bbox": "tight"})
AS_SET = "as set"
"""The name of the run with the settings as given."""
BAR = 0.85
"""What patched ÷ instructed right answers should reach on average."""
COVERAGE = {"none": (0, 0), "1 or 2": (1, 2), "3 to 5": (3, 5), "6 or more": (6, math.inf)}
"""Numbers of fitted answers that hold the fact asked for, shown apart."""

Run = Mapping[str, Any]


def progress(run: Run) -> str:
    """One line about a run, for the terminal."""
    counts = ", ".join(f"{which} {sum(run['right'][which])}" for which in RUNS)
    kl = run["output_kl"]
    return (
        f"{run['document']}, {run['variant']}: right {counts} of {len(run['asked'])}; "
        f"KL {kl['plain']:.3f} to {kl['patched']:.3f}; perplexity × {run['perplexity_ratio']:.4f}"
    )


def page(runs: Sequence[Run], samples: int, name: str) -> str:
    """The whole page but its first line."""
    main = [run for run in runs if run["variant"] == AS_SET]
    parts = [main_table(main), verdict(main), curve_table(runs), f"![Curves]({name}.svg)\n"]
    parts += [coverage_table(main), place_table(main), variant_table(runs), sample_table(main, samples)]
    return "\n".join(part for part in parts if part)


def main_table(runs: Sequence[Run]) -> str:
    """One line for each document, and one for all questions together."""
    lines = [
        "| document | tokens | pairs | plain | instructed | patched (95 %) | patched ÷ instructed "
        "| patched − instructed (95 %) | F1: plain | instructed | patched | KL along the answer: plain "
        "| patched (95 %) | down by | agreement: plain | patched | unrelated perplexity × |",
        "|---|" + "---:|" * 16,
    ]
    for run in runs:
        kl, f1, agreement = run["output_kl"], run["f1"], run["output_agreement"]
        low, high = run["output_kl_interval"]["patched"]
        cells = [run["document"], str(run["passage_tokens"]), str(run["pairs"]), *_counts(run["right"])]
        cells += [*(f"{f1[which]:.2f}" for which in RUNS), f"{kl['plain']:.3f}"]
        cells += [f"{kl['patched']:.3f} ({low:.3f} to {high:.3f})", f"{1 - kl['patched'] / kl['plain']:.0%}"]
        cells += [f"{agreement['plain']:.2f}", f"{agreement['patched']:.2f}", f"{run['perplexity_ratio']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    right = {which: [one for run in runs for one in run["right"][which]] for which in RUNS}
    lines.append("| all questions | | | " + " | ".join(_counts(right)) + " |" + " |" * 9)
    return "\n".join(lines) + "\n"


def verdict(runs: Sequence[Run]) -> str:
    """The mean ratio against :data:`BAR`."""
    ratios = {run["document"]: run["ratio"] for run in runs if run["ratio"] is not None}
    if not ratios:
        return "The instructed model answers nothing right: no ratio.\n"
    reached = mean(ratios.values())
    short = [name for name, ratio in ratios.items() if ratio < BAR]
    line = f"patched ÷ instructed: {reached:.3f} on average over {len(ratios)} documents, "
    line += f"{min(ratios.values()):.3f} at least. The bar of {BAR} is {'reached' if reached >= BAR else 'missed'}"
    return line + (f"; below it: {', '.join(short)}.\n" if short else ", and by every document.\n")


def curve_table(runs: Sequence[Run]) -> str:
    """Patched ÷ instructed by rank and by number of questions, of the documents tried with several; empty without."""
    curves = {name: curve(runs, name) for name in ("rank", "questions")}
    names = dict.fromkeys(run["document"] for run in runs if run["curve"])
    heads = [f"{name} {value}" for name, points in curves.items() for value in points]
    lines = ["| patched ÷ instructed | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in names:
        values = [ratios.get(name) for points in curves.values() for ratios in points.values()]
        lines.append(f"| {name} | " + " | ".join(map(_share, values)) + " |")
    means = [mean(ratios.values()) if ratios else None for points in curves.values() for ratios in points.values()]
    return "\n".join([*lines, "| mean | " + " | ".join(map(_share, means)) + " |", ""]) if names else ""


def curve(runs: Sequence[Run], setting: str) -> dict[int, dict[str, float]]:
    """Patched ÷ instructed for each value of a setting, from the runs that change nothing else, by document.

    Documents that were tried with one value alone are left out: means over different documents would be no curve.
    """
    curved = {run["document"] for run in runs if run["curve"] == setting}
    points: dict[int, dict[str, float]] = {}
    for run in runs:
        if run["document"] in curved and (run["variant"] == AS_SET or run["curve"] == setting):
            ratios = points.setdefault(run[setting], {})
            ratios |= {} if run["ratio"] is None else {run["document"]: run["ratio"]}
    return dict(sorted(points.items()))


def coverage_table(runs: Sequence[Run]) -> str:
    """Of the questions that the instructed model answers right, how many the patched one does, by coverage."""
    lines = [
        "| of what the instructed model answers right, by how many fitted answers hold the fact: | "
        + " | ".join(f"{name}: patched right" for name in COVERAGE)
        + " |",
        "|---|" + "---:|" * len(COVERAGE),
    ]
    totals = [(0, 0)] * len(COVERAGE)
    for run in runs:
        found = by_coverage(run)
        totals = [(a + c, b + d) for (a, b), (c, d) in zip(totals, found, strict=True)]
        lines.append(f"| {run['document']} | " + " | ".join(map(_of, found)) + " |")
    return "\n".join([*lines, "| all | " + " | ".join(map(_of, totals)) + " |", ""])


def by_coverage(run: Run) -> list[tuple[int, int]]:
    """Of the questions answered right by the instructed model: (patched right, all) in each part of COVERAGE."""
    rows = list(zip(run["coverage"], run["right"]["patched"], run["right"]["instructed"], strict=True))
    parts = [
        [patched for count, patched, instructed in rows if instructed and low <= count <= high]
        for low, high in COVERAGE.values()
    ]
    return [(sum(part), len(part)) for part in parts]


def place_table(runs: Sequence[Run]) -> str:
    """KL along the answer, by token."""
    names = [f"{start + 1}" if stop == start + 1 else f"{start + 1}–{stop or ''}" for start, stop in PLACES]
    lines = ["| KL at the answer's tokens | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for run in runs:
        for which, values in run["output_kl_by_place"].items():
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {run['document']}, {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def variant_table(runs: Sequence[Run]) -> str:
    """One line for each variant of the analysed documents, and for the run it is a variant of; empty without any."""
    analysed = {run["document"] for run in runs if run["variant"] != AS_SET and run["curve"] is None}
    lines = [
        "| document, variant | pairs | instructed | patched | patched ÷ instructed | KL along the answer "
        "| unrelated perplexity × |",
        "|---|" + "---:|" * 6,
    ]
    for run in runs:
        if run["document"] in analysed and run["curve"] is None:
            cells = [f"{run['document']}, {run['variant']}", str(run["pairs"])]
            cells += [str(sum(run["right"][which])) for which in ("instructed", "patched")]
            cells += [_share(run["ratio"]), f"{run['output_kl']['patched']:.3f}", f"{run['perplexity_ratio']:.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if analysed else ""


def sample_table(runs: Sequence[Run], samples: int) -> str:
    """The first tested questions of each document with the three answers."""
    lines = ["| document | question | " + " | ".join(RUNS) + " |", "|---|---|" + "---|" * len(RUNS)]
    for run in runs:
        for i, asked in enumerate(run["asked"][:samples]):
            texts = (" ".join(text.split()).replace("|", "\\|")[:160] for text in _row(run, i, asked))
            lines.append(f"| {run['document']} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], file: Path) -> None:
    """Patched ÷ instructed over rank, number of questions and length of the passage."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for axes, setting in ((left, "rank"), (middle, "questions")):
        points = curve(runs, setting)
        for name in dict.fromkeys(name for ratios in points.values() for name in ratios):
            own = [(value, ratios[name]) for value, ratios in points.items() if name in ratios]
            axes.plot([x for x, _ in own], [y for _, y in own], "o-", alpha=0.4, markersize=3, label=name)
        means = [(value, mean(ratios.values())) for value, ratios in points.items() if ratios]
        axes.plot([x for x, _ in means], [y for _, y in means], "ko-", label="mean")
        axes.set(xlabel=setting, xscale="log", xticks=list(points), xticklabels=list(points))
        axes.minorticks_off()
    main = [run for run in runs if run["variant"] == AS_SET and run["ratio"] is not None]
    for run in main:
        right.plot(run["passage_tokens"], run["ratio"], "o")
    right.set(xlabel="tokens of the passage", xscale="log")
    left.set(ylabel="patched ÷ instructed", ylim=(0, None))
    for axes in (left, middle, right):
        axes.axhline(BAR, color="grey", linestyle="--", linewidth=0.8)
    left.legend(fontsize="x-small")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _counts(right: Mapping[str, Sequence[bool]]) -> list[str]:
    """Cells: right answers of the three runs, the last with its interval; their ratio; their difference."""
    n = len(right["patched"])
    counts = {which: sum(right[which]) for which in RUNS}
    low, high = wilson(counts["patched"], n)
    cells = [f"{counts[which]} of {n}" for which in RUNS]
    cells[2] += f" ({low:.2f} to {high:.2f})"
    cells.append(_share(counts["patched"] / counts["instructed"] if counts["instructed"] else None))
    return [*cells, "{:+.2f} ({:+.2f} to {:+.2f})".format(*paired_difference(right["patched"], right["instructed"]))]


def _of(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]}" if counts[1] else "–"


def _row(run: Run, i: int, asked: str) -> list[str]:
    return [asked, *(run["texts"][which][i] for which in RUNS)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
