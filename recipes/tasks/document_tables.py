"""Tables and figure of the recipe ``document``, from its record of runs; see document.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lit_thought.patch.results import RUNS
from recipes.harness import difference, nearer, one_line, panels, save_figure, share, table
from recipes.tasks.chats import place_table

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
    parts += [coverage_table(main), place_table(main, "document"), variant_table(runs), sample_table(main, samples)]
    return "\n".join(part for part in parts if part)


def main_table(runs: Sequence[Run]) -> str:
    """One line for each document, and one for all questions together."""
    head = ["document", "tokens", "pairs", "plain", "instructed", "patched (95 %)", "patched ÷ instructed"]
    head += ["patched − instructed (95 %)", "F1: plain", "instructed", "patched", "KL along the answer: plain"]
    head += ["patched (95 %)", "down by", "agreement: plain", "patched", "unrelated perplexity ×"]
    rows = []
    for run in runs:
        kl, f1, agreement = run["output_kl"], run["f1"], run["output_agreement"]
        low, high = run["output_kl_interval"]["patched"]
        cells = [run["document"], run["passage_tokens"], run["pairs"], *_counts(run["right"])]
        cells += [*(f"{f1[which]:.2f}" for which in RUNS), f"{kl['plain']:.3f}"]
        cells += [f"{kl['patched']:.3f} ({low:.3f} to {high:.3f})", nearer(kl, 0)]
        cells += [f"{agreement['plain']:.2f}", f"{agreement['patched']:.2f}", f"{run['perplexity_ratio']:.4f}"]
        rows.append(cells)
    right = {which: [one for run in runs for one in run["right"][which]] for which in RUNS}
    return table(head, [*rows, ["all questions", "", "", *_counts(right), *[""] * 9]])


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
    points = [(f"{name} {value}", ratios) for name, own in curves.items() for value, ratios in own.items()]
    rows = [[name, *(_ratio(ratios.get(name)) for _, ratios in points)] for name in names]
    rows.append(["mean", *(_ratio(mean(ratios.values()) if ratios else None) for _, ratios in points)])
    return table(["patched ÷ instructed", *(head for head, _ in points)], rows) if names else ""


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
    head = "of what the instructed model answers right, by how many fitted answers hold the fact:"
    found = {run["document"]: by_coverage(run) for run in runs}
    found["all"] = [(sum(a for a, _ in part), sum(b for _, b in part)) for part in zip(*found.values(), strict=True)]
    rows = [[name, *(f"{a} of {b}" if b else None for a, b in own)] for name, own in found.items()]
    return table([head, *(f"{name}: patched right" for name in COVERAGE)], rows)


def by_coverage(run: Run) -> list[tuple[int, int]]:
    """Of the questions answered right by the instructed model: (patched right, all) in each part of COVERAGE."""
    rows = list(zip(run["coverage"], run["right"]["patched"], run["right"]["instructed"], strict=True))
    parts = [
        [patched for count, patched, instructed in rows if instructed and low <= count <= high]
        for low, high in COVERAGE.values()
    ]
    return [(sum(part), len(part)) for part in parts]


def variant_table(runs: Sequence[Run]) -> str:
    """One line for each variant of the analysed documents, and for the run it is a variant of; empty without any."""
    analysed = {run["document"] for run in runs if run["variant"] != AS_SET and run["curve"] is None}
    rows = [
        [
            *(f"{run['document']}, {run['variant']}", run["pairs"]),
            *(sum(run["right"][which]) for which in ("instructed", "patched")),
            *(_ratio(run["ratio"]), f"{run['output_kl']['patched']:.3f}", f"{run['perplexity_ratio']:.4f}"),
        ]
        for run in runs
        if run["document"] in analysed and run["curve"] is None
    ]
    head = ["document, variant", "pairs", "instructed", "patched", "patched ÷ instructed", "KL along the answer"]
    return table([*head, "unrelated perplexity ×"], rows) if rows else ""


def sample_table(runs: Sequence[Run], samples: int) -> str:
    """The first tested questions of each document with the three answers."""
    rows = [
        [run["document"], *(one_line(text, 160) for text in (asked, *(run["texts"][which][i] for which in RUNS)))]
        for run in runs
        for i, asked in enumerate(run["asked"][:samples])
    ]
    return table(["document", "question", *RUNS], rows, left=5)


def draw(runs: Sequence[Run], out: str | Path) -> None:
    """Patched ÷ instructed over rank, number of questions and length of the passage."""
    figure, (left, middle, right) = panels(3, 10, 3.2, sharey=True)
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
    save_figure(figure, out)


def _counts(right: Mapping[str, Sequence[bool]]) -> list[str | None]:
    """Cells: right answers of the three runs, the last with its interval; their ratio; their difference."""
    counts = {which: sum(right[which]) for which in RUNS}
    cells = [f"{counts[which]} of {len(right[which])}" for which in RUNS]
    cells[2] += " " + share(right["patched"]).partition(" ")[2]
    ratio = counts["patched"] / counts["instructed"] if counts["instructed"] else None
    return [*cells, _ratio(ratio), difference(right["patched"], right["instructed"])]


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
