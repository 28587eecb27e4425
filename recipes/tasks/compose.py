"""Two instructions as patches: fitted apart and together, added, subtracted, scaled.

    python -m recipes.tasks.compose --config recipes/tasks/compose.yaml

A and B are system messages of a chat model, and the joint prompt is one message that says both. What comes close to
the model with the joint prompt: the sum of A's and B's patches, one patch of the sum of their statistics, one fit of
both sets of answers, one fit of the joint prompt, or B fitted on the model that has A's patch? What is left of a sum
when one patch is taken off again? And what do patches do at 0 to 1.5 times their size? Measures: how many answers
follow A's rule, B's rule and both (functions of the text, in recipes/chunks/rules.py), the divergence from the
instructed model along its own answers, and the perplexity of unrelated text. Writes a Markdown page, a figure and JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from lit_thought import ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.solve.factors import Factors
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved
from recipes.chunks.cases import Case, evaluation_of, message_case
from recipes.chunks.rules import RULES
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import Unrelated, command_line, one_line, panels, save_figure, share, shown, table, write_results

WAYS = {
    "A": "patch of A alone",
    "B": "patch of B alone",
    "A + B": "the two patches added",
    "joint": "patch of the joint prompt",
    "statistics": "statistics of A and B added, one solve",
    "2 × statistics": "twice that patch",
    "one fit": "one fit of A's and B's answers, each with its own instruction",
    "A, then B": "B fitted on the model with A's patch in place",
    "(A + B) − B": "B's patch taken off the sum again",
    "joint − B": "B's patch taken off the joint prompt's",
}
"""The patches that are compared, by their short name."""
AIMS = {"A": ("joint", "A"), "(A + B) − B": ("joint", "A"), "joint − B": ("joint", "A")}
"""Which instructed models a patch is compared with, where that is not the joint one alone."""
SCALED = ("A + B", "joint")
DISTANCES = (
    ("(A + B) − B", "A"),
    ("statistics", "one fit"),
    ("2 × statistics", "A + B"),
    ("A, then B", "A + B"),
    ("A + B", "joint"),
    ("joint − B", "A"),
)
"""Pairs of patches whose weights are compared, the second as the measure."""


def compose(
    model: str = "smollm2",
    first: str = "french",
    second: str = "sentence",
    fit: int = 40,
    test: int = 30,
    seed: int = 0,
    rank: int = 16,
    ridge: float = 0.03,
    preserve_weight: float = 0.3,
    answer_weight: float = 10.0,
    max_new_tokens: int = 48,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    unrelated_windows: int = 2,
    samples: int = 3,
    out: str = "recipes/results/compose",
) -> None:
    """Fit both instructions in every way, measure the patches, and the sum and the joint patch at every scale."""
    entries = instructions(first, second)
    settings = {"rank": rank, "ridge": ridge, "preserve_weight": preserve_weight}
    settings |= {"answer_weight": answer_weight, "max_new_tokens": max_new_tokens}
    cases = {key: message_case(entry, seed, test, max_new_tokens, fit) for key, entry in entries.items()}
    lm, tokenizer = load_model(model)
    unrelated = Unrelated(lm, tokenizer, unrelated_windows)
    evaluations = {key: evaluation_of(lm, tokenizer, case, unrelated=False) for key, case in cases.items()}
    patches = combine(evaluations["joint"], cases, settings)
    rules = (first, second)
    rows = {"plain": measure(evaluations, 0 * patches["A"], ("joint", "A"), unrelated, rules)}
    del rows["plain"]["rank"]
    for key, evaluation in evaluations.items():
        answers = [one.text for one in evaluation.instructed]
        rows[f"instructed: {key}"] = {"answers": answers, "follows": follows(answers, rules)}
    for name in WAYS:
        rows[name] = measure(evaluations, patches[name], AIMS.get(name, ("joint",)), unrelated, rules)
        print(_line(name, rows[name]), flush=True)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in SCALED}
    for name, scale in ((name, scale) for name in SCALED for scale in scales):
        found = {0.0: rows["plain"], 1.0: rows[name]}.get(scale)
        found = found or measure(evaluations, scale * patches[name], ("joint",), unrelated, rules)
        curves[name].append({"scale": scale, **{key: value for key, value in found.items() if key != "answers"}})
        print(f"{scale:g} × ", _line(name, found), flush=True)
    record = {
        "model": shown(model),
        "instructions": {key: entry["instruction"] for key, entry in entries.items()},
        "settings": {"first": first, "second": second, "fit": fit, **settings, "test": test, "seed": seed},
        "unrelated_perplexity": unrelated.perplexity,
        "questions": [row["input"] for row in cases["joint"].tested],
        "rows": rows,
        "scales": curves,
        "distances": [
            {"patch": one, "from": two, "relative": distance(patches[one], patches[two])} for one, two in DISTANCES
        ],
    }
    draw(curves, rows["instructed: joint"], rules, out)
    write_results(__file__, out, page(record, samples, Path(out).name), record)


def instructions(first: str, second: str) -> dict[str, dict[str, str]]:
    """Entries for A, B and the joint prompt, as :func:`message_case` takes them.

    Raises:
        ThoughtError: for a name that is unknown or has no rule, for one with questions of its own, or twice the same.
    """
    known = instructions_known()
    usable = [name for name, entry in known.items() if name in RULES and "topic" not in entry]
    for argument, name in (("first", first), ("second", second)):
        if name not in usable:
            raise ThoughtError(f"{argument}: expected one of {', '.join(usable)}; got {name!r}; correct the name.")
    if first == second:
        raise ThoughtError(f"first and second are both {first!r}; expected two instructions. Change one of them.")
    texts = {"A": known[first]["instruction"], "B": known[second]["instruction"]}
    texts["joint"] = f"{texts['A']} {texts['B']}"
    return {key: {"name": key, "instruction": text} for key, text in texts.items()}


def combine(evaluation: Evaluation, cases: Mapping[str, Case], settings: Mapping[str, Any]) -> dict[str, ThoughtPatch]:
    """The patches of :data:`WAYS`, of an evaluation's model; A, B and the joint prompt are fitted on the same
    questions."""

    def fit(key: str, pairs: Sequence[Mapping[str, str]] | None = None, **more: Any) -> ThoughtPatch:
        return fitted(evaluation, cases[key], {**settings, **more}, pairs)

    with TemporaryDirectory() as folder:
        alone = {key: fit(key, statistics_dir=f"{folder}/{key}") for key in ("A", "B")}
        sums = [SavedStatistics.load(f"{folder}/{key}") for key in alone]
        merged = solve_saved(sums[0].merge(sums[1], approximate=True))
    both = [{**pair, "instruction": cases[key].chunk} for key in alone for pair in cases[key].given]
    joint, added = fit("joint"), alone["A"] + alone["B"]
    return {
        **alone,
        "A + B": added,
        "joint": joint,
        "statistics": merged,
        "2 × statistics": 2 * merged,
        "one fit": fit("joint", both),
        "A, then B": fit_after(alone["A"], evaluation, cases["B"], settings),
        "(A + B) − B": added - alone["B"],
        "joint − B": joint - alone["B"],
    }


def fitted(
    evaluation: Evaluation,
    case: Case,
    settings: Mapping[str, Any],
    pairs: Sequence[Mapping[str, str]] | None = None,
) -> ThoughtPatch:
    """The patch of a case's chunk on its given questions, or on these pairs, for an evaluation's model as it is now,
    which answers them."""
    common = (evaluation.model, evaluation.tokenizer, case.chunk, case.given if pairs is None else pairs)
    return transmute(*common, case.template, progress=False, **settings)


def fit_after(before: ThoughtPatch, evaluation: Evaluation, case: Case, settings: Mapping[str, Any]) -> ThoughtPatch:
    """``before`` and a patch of ``case`` that was fitted on the model with ``before`` in place, added.

    Its target is that model with the case's instruction in the prompt, which writes the answers, too. Statistics of
    the changed model do not stay in the cache.
    """
    with TemporaryDirectory() as folder, before.applied(evaluation.model):
        after = fitted(evaluation, case, {**settings, "cache_dir": folder})
    # the fit saw other weights; with `before` beside it, the patch is one for the model without either
    belongs = {**after.provenance, "fingerprint": before.provenance["fingerprint"]}
    return before + ThoughtPatch(after.factors, belongs, after.vectors)


def measure(
    evaluations: Mapping[str, Evaluation],
    patch: ThoughtPatch,
    aims: Sequence[str],
    unrelated: Unrelated,
    rules: Sequence[str],
) -> dict[str, Any]:
    """A patch's own answers, which rules they follow, its divergence from the instructed models ``aims``, the joint one
    first, and what it does to other text."""
    model = evaluations["joint"].model
    with patch.applied(model):
        ratio = unrelated.ratio(model)
    found = {aim: evaluations[aim].score(patch) for aim in aims}
    answers = [item["patched"] for item in found["joint"]["items"]]
    return {
        "answers": answers,
        "kl": {aim: own["output_kl"]["patched"] for aim, own in found.items()},
        "agreement": {aim: own["output_agreement"]["patched"] for aim, own in found.items()},
        "perplexity_ratio": ratio,
        "rank": patch.rank,
        "follows": follows(answers, rules),
    }


def follows(answers: Sequence[str], rules: Sequence[str]) -> dict[str, list[bool]]:
    """Whether each answer follows A's rule, B's rule, and both."""
    one, two = ([RULES[rule](text) for text in answers] for rule in rules)
    return {"A": one, "B": two, "both": [a and b for a, b in zip(one, two, strict=True)]}


def distance(patch: ThoughtPatch, reference: ThoughtPatch) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖ in the Frobenius norm over all layers, computed in float64."""

    def squares(factors: Mapping[str, Factors]) -> float:
        return sum(float((own.B.double() @ own.A.double()).square().sum()) for own in factors.values())

    return math.sqrt(squares((patch - reference).factors) / squares(reference.factors))


def draw(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    instructed: Mapping[str, Any],
    rules: Sequence[str],
    out: str | Path,
) -> None:
    """Rules followed, KL and perplexity against the scale, as an SVG file."""
    figure, axes = panels(4, 13, 3.2)
    titles = [f"answers that follow A ({rules[0]})", f"that follow B ({rules[1]})", "KL to the joint prompt, nats"]
    for panel, title in zip(axes, [*titles, "unrelated perplexity ×"], strict=True):
        panel.set(title=title, xlabel="scale")
        panel.title.set_fontsize("medium")
    for colour, (name, points) in zip(("C0", "C1"), curves.items(), strict=True):
        scales = [point["scale"] for point in points]
        values = [[mean(point["follows"][key]) for point in points] for key in ("A", "B")]
        values.append([point["kl"]["joint"] for point in points])
        values.append([point["perplexity_ratio"] for point in points])
        for panel, own in zip(axes, values, strict=True):
            panel.plot(scales, own, "o-", color=colour, label=name)
    for panel, key in zip(axes, ("A", "B"), strict=False):
        panel.axhline(mean(instructed["follows"][key]), color="grey", linestyle="--", label="joint prompt")
        panel.set_ylim(-0.03, 1.03)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(fontsize="small")
    save_figure(figure, out)


def page(record: Mapping[str, Any], samples: int, name: str) -> str:
    """The results as Markdown."""
    rows, texts = record["rows"], record["instructions"]
    gaps = {(entry["patch"], entry["from"]): entry["relative"] for entry in record["distances"]}
    follows_head = ["follows A", "follows B", "both", "KL to the joint prompt"]
    head = ["", "", *follows_head, "agreement", "KL to A", "unrelated perplexity ×", "rank"]
    lines = [
        f"- A: *{texts['A']}*",
        f"- B: *{texts['B']}*",
        f"- the joint prompt: *{texts['joint']}*",
        "",
        f"Shares of {len(record['questions'])} answers, with 95 % intervals (Wilson). KL and agreement with the "
        "instructed model along its own answers; the plain run has the model's default system message.",
        "",
        table(head, (_line(key, row) for key, row in rows.items()), left=2),
        "What is exact and what is not:",
        "",
        "- Adding, subtracting and scaling *patches* is exact in the weights, to rounding: (A + B) − B is A to "
        f"{gaps['(A + B) − B', 'A']:.0e} of its norm. That a model with both patches does both things is no theorem: "
        "each was solved as if the other were not there, and blocks are not linear.",
        "- Adding *statistics* is exact for one block whose inputs went through no patch. The blocks of these fits "
        "were solved in order, each from inputs that had gone through the patches before it, so the added sums are "
        "not those of one fit of all answers: the patches are "
        f"{gaps['statistics', 'one fit']:.2f} of that fit's norm apart.",
        "- Added statistics ask one patch to do A on A's answers and B on B's, after prompts that are the same, so the "
        f"least squares lie between the two; *twice* that patch is {gaps['2 × statistics', 'A + B']:.2f} of its norm "
        "from the sum of the patches.",
        "- *A, then B* was fitted to what the model with A's patch does with B in the prompt, not to the joint prompt; "
        "its preservation statistics are that model's.",
        "",
        table(
            ["patch", "distance of the weights from", "‖ΔW − ΔW'‖ ÷ ‖ΔW'‖"],
            [[*names, f"{value:.2g}"] for names, value in gaps.items()],
            left=2,
        ),
        "Scaled:",
        "",
    ]
    scaled = [
        [patch, f"{point['scale']:g}", *_line("", point)[2:6], _line("", point)[8]]
        for patch, points in record["scales"].items()
        for point in points
    ]
    lines.append(table(["patch", "scale", *follows_head, "unrelated perplexity ×"], scaled))
    least = {patch: min(points, key=lambda point: point["kl"]["joint"]) for patch, points in record["scales"].items()}
    lines += [
        "KL is least at " + ", ".join(f"{point['scale']:g} × ({patch})" for patch, point in least.items()) + ". A rule "
        "says how far an answer goes, KL whether it is what the instructed model would say: a scale that makes more "
        "answers follow the rules than the joint prompt does is no better copy of it.",
        "",
    ]
    lines.append(f"![Rules followed, KL and perplexity by scale]({name}.svg)\n")
    columns = ("plain", "instructed: joint", "A + B", "joint")
    answers = [
        [question, *(one_line(rows[column]["answers"][index], 200) for column in columns)]
        for index, question in enumerate(record["questions"][:samples])
    ]
    return "\n".join([*lines, table(["question", *columns], answers, left=5)])


def _line(name: str, row: Mapping[str, Any]) -> list[str | None]:
    """One line of the table."""
    kl, agreement = row.get("kl", {}), row.get("agreement", {})
    numbers = [kl.get("joint"), agreement.get("joint"), kl.get("A")]
    cells = [name, WAYS.get(name, ""), *(share(row["follows"][key]) for key in ("A", "B", "both"))]
    cells += [None if number is None else f"{number:.3f}" for number in numbers]
    ratio = row.get("perplexity_ratio")
    return [*cells, None if ratio is None else f"{ratio:.4f}", row.get("rank")]


if __name__ == "__main__":
    command_line(compose)
