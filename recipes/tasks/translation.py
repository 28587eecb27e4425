"""English to French, German and Spanish: demonstrations become adapters, for words and for short sentences.

    python -m recipes.tasks.translation --config recipes/tasks/translation.yaml

For each language and seed, the first 10 translations of a shuffle are the instruction, the next 30 inputs are fitted
(without their translations: the instructed model writes its own), and others are the test. An answer is right where it
is one of the accepted translations, case and marks at its ends apart; chrF and BLEU (torchmetrics') compare it with all
of them. Then the same by step, as in the second figure of Mazzawi et al. 2025 (arXiv 2510.08734): each step takes the
next pairs and adds a part of its solution to the patch. Writes a Markdown page, a figure and JSON.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from torchmetrics.functional.text import chrf_score, sacre_bleu_score

from lit_thought import load_model
from lit_thought.errors import ThoughtError
from lit_thought.patch.results import RUNS
from recipes.harness import (
    DATA,
    METHODS,
    Split,
    Trial,
    Unrelated,
    check_names,
    command_line,
    difference,
    one_line,
    panels,
    save_figure,
    share,
    shown,
    table,
    write_results,
)
from recipes.studies.accuracy_by_step import Record, plot_steps, step_table

FOLDER = DATA / "translation"
LANGUAGES = ("french", "german", "spanish")
KINDS = ("words", "sentences")


def translation(
    model: str = "google/gemma-3-270m",
    languages: Sequence[str] = LANGUAGES,
    kinds: Sequence[str] = KINDS,
    seeds: Sequence[int] = (0,),
    rank: int = 32,
    shots: int = 10,
    fit: int = 30,
    test: int = 60,
    max_new_tokens: int = 24,
    unrelated_windows: int = 2,
    step_kind: str = "words",
    step_methods: Sequence[str] = ("both", "attn_out", "mlp_out"),
    steps: int = 3,
    step_size: float = 0.5,
    pairs_per_step: int | None = 10,
    step_test: int = 20,
    samples: int = 4,
    out: str = "recipes/results/translation",
) -> None:
    """Fit and test every language, kind and seed, then follow fits of the first seed step by step."""
    check_names("languages", languages, LANGUAGES)
    check_names("kinds", kinds, KINDS)
    check_names("step_kind", [step_kind], KINDS)
    check_names("step_methods", step_methods, METHODS)
    tasks = {
        key: load_translations(*key, shots, fit, test)
        for key in product(languages, dict.fromkeys([*kinds, step_kind]), seeds)
    }
    lm, tokenizer = load_model(model)
    unrelated = Unrelated(lm, tokenizer, unrelated_windows)
    runs = []
    for language, kind, seed in product(languages, kinds, seeds):
        split, accepted = tasks[language, kind, seed]
        found = compare(Trial(lm, tokenizer, split, max_new_tokens), accepted, rank, unrelated)
        runs.append({"language": language, "kind": kind, "seed": seed, **found})
        print(_line(runs[-1:]), flush=True)
    history: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {"steps": steps, "step_size": step_size, "pairs_per_step": pairs_per_step}
    for language, method in product(languages, step_methods):
        trial = Trial(lm, tokenizer, tasks[language, step_kind, seeds[0]][0], max_new_tokens)
        chosen = {"rank": rank, **METHODS[method], **settings}
        patch = trial.fit(**chosen, val_pairs=trial.split.test[:step_test])
        history.setdefault(language, {})[method] = patch.provenance["history"]
        print(language, method, [round(entry["accuracy"], 2) for entry in patch.provenance["history"]], flush=True)
    record = {
        "model": shown(model),
        "settings": {"rank": rank, "shots": shots, "fit": fit, "test": test, "seeds": list(seeds)},
        "unrelated_perplexity": unrelated.perplexity,
        "runs": runs,
        "by_step": {"kind": step_kind, "seed": seeds[0], "test": step_test, **settings, "history": history},
    }
    record["settings"] |= {"max_new_tokens": max_new_tokens}
    if history:
        draw(history, step_kind, out)
    write_results(__file__, out, page(record, samples, Path(out).name), record)


def load_translations(
    language: str, kind: str, seed: int, shots: int = 10, fit: int = 30, test: int = 60
) -> tuple[Split, list[list[str]]]:
    """Shuffle the translations with a seed: ``shots`` demonstrations, ``fit`` inputs, up to ``test`` others.

    Returns:
        The split, whose test pairs have the first translation as their output, and all that are accepted for each.

    Raises:
        ThoughtError: when nothing is left to test on.
    """
    entries = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    if shots + fit >= len(entries):
        raise ThoughtError(f"shots={shots} and fit={fit} leave no test: {kind} has {len(entries)} entries. Lower them.")
    random.Random(seed).shuffle(entries)
    pairs = [{"input": entry["input"], "output": entry[language][0]} for entry in entries]
    rest = slice(shots + fit, shots + fit + test)
    split = Split(f"{language} {kind}", pairs[:shots], pairs[shots : shots + fit], pairs[rest])
    return split, [entry[language] for entry in entries[rest]]


def compare(trial: Trial, accepted: Sequence[Sequence[str]], rank: int, unrelated: Unrelated) -> dict[str, Any]:
    """Fit one task and score the plain, the instructed and the patched model."""
    patch = trial.fit(rank=rank, **METHODS["both"])
    result = trial.evaluation(unrelated=None).score(patch)
    with patch.applied(trial.model):
        ratio = unrelated.ratio(trial.model)
    items = result["items"]
    return {
        "scores": {run: scores([item[run] for item in items], accepted) for run in RUNS},
        **{key: result[key] for key in ("fidelity", "output_kl", "output_agreement", "prompt_tokens")},
        "perplexity_ratio": ratio,
        "items": [
            {"input": item["input"], "accepted": list(own), **{run: item[run] for run in RUNS}}
            for item, own in zip(items, accepted, strict=True)
        ],
    }


def scores(texts: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Which texts are an accepted translation; chrF (order 6, β 2) and BLEU (13a) of all, from 0 to 100."""
    every = [list(own) for own in accepted]
    return {
        "right": [plainly(text) in map(plainly, own) for text, own in zip(texts, every, strict=True)],
        "chrf": 100 * float(chrf_score(list(texts), every, n_word_order=0)),
        "bleu": 100 * float(sacre_bleu_score(list(texts), every)),
    }


def plainly(text: str) -> str:
    """A text without white space and marks at its ends, in one case and one form of accents and apostrophes."""
    return unicodedata.normalize("NFC", text).replace("’", "'").strip(" \t\n.,!?¿¡").casefold()


def draw(history: Mapping[str, Record], kind: str, out: str | Path) -> None:
    """Accuracy by step, a panel for each language, as an SVG file."""
    figure, every = panels(len(history), 3.6 * len(history), 3.2)
    for axes, (language, curves) in zip(every, history.items(), strict=True):
        plot_steps(axes, curves, f"English to {language.capitalize()}, {kind}")
    save_figure(figure, out)


def page(record: Mapping[str, Any], samples: int, name: str) -> str:
    """The results as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in record["runs"]:
        groups.setdefault((run["language"], run["kind"]), []).append(run)
    ratios = [_accuracy(own, "patched") / _accuracy(own, "instructed") for own in groups.values() if _solved(own)]
    head = ["English to", "tests", "accuracy: plain", "instructed", "patched", "patched − instructed"]
    head += ["chrF: plain, instructed, patched", "BLEU: plain, instructed, patched"]
    head += [
        "output equal to the instructed one",
        "KL of the output, plain → patched",
        "unrelated perplexity × (worst)",
    ]
    lines = [
        table([*head, "prompt tokens, instructed → patched"], map(_line, groups.values())),
        "Accuracy is the share of answers that are an accepted translation, patched with its 95 % interval (Wilson), "
        "the difference on the same inputs with Newcombe's. BLEU says little about single words.",
    ]
    if ratios:
        lines[-1] += f" Patched ÷ instructed accuracy: {mean(ratios):.2f} on average, {min(ratios):.2f} at least."
    lines += ["", *(_step_tables(record["by_step"], name) if record["by_step"]["history"] else [])]
    rows = []
    for (language, _), own in groups.items():
        for item in own[0]["items"][:samples]:
            texts = [item["input"], " / ".join(item["accepted"]), *(item[run] for run in RUNS)]
            rows.append([language, *(one_line(text, 90) for text in texts)])
    return "\n".join([*lines, table(["English to", "input", "accepted", *RUNS], rows, left=6)])


def _solved(runs: Sequence[Mapping[str, Any]]) -> bool:
    return any(any(run["scores"]["instructed"]["right"]) for run in runs)


def _accuracy(runs: Sequence[Mapping[str, Any]], which: str) -> float:
    return mean(one for run in runs for one in run["scores"][which]["right"])


def _line(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One language and kind, its seeds together; chrF and BLEU are means over seeds."""
    right = {which: [one for run in runs for one in run["scores"][which]["right"]] for which in RUNS}
    cells = [f"{runs[0]['language'].capitalize()}, {runs[0]['kind']}", str(len(right["plain"]))]
    cells += [f"{_accuracy(runs, 'plain'):.2f}", f"{_accuracy(runs, 'instructed'):.2f}", share(right["patched"])]
    cells.append(difference(right["patched"], right["instructed"]))
    for score in ("chrf", "bleu"):
        cells.append(", ".join(f"{mean(run['scores'][which][score] for run in runs):.1f}" for which in RUNS))
    cells.append(f"{mean(run['fidelity'] for run in runs):.2f}")
    cells.append(" → ".join(f"{mean(run['output_kl'][which] for run in runs):.3f}" for which in ("plain", "patched")))
    ratio = [run["perplexity_ratio"] for run in runs]
    cells.append(f"{mean(ratio):.4f} ({max(ratio):.4f})")
    tokens = [mean(run["prompt_tokens"][which] for run in runs) for which in ("instructed", "plain")]
    return [*cells, " → ".join(f"{count:.0f}" for count in tokens)]


def _step_tables(by_step: Mapping[str, Any], name: str) -> list[str]:
    """Accuracy by step, a table for each language."""
    pairs, size = by_step["pairs_per_step"], by_step["step_size"]
    each = "all pairs" if pairs is None else f"the next {pairs} pairs"
    lines = [
        f"By step, on {by_step['test']} of the test inputs (right is what equals the first translation); each step is "
        f"solved from {each}, and {size:g} of its solution is added to the patch:",
        "",
    ]
    for language, curves in by_step["history"].items():
        lines.append(step_table(curves, f"English to {language.capitalize()}, {by_step['kind']}"))
    return [*lines, f"![Accuracy by step]({name}.svg)", ""]


if __name__ == "__main__":
    command_line(translation)
