"""What a patch cannot do, with an example each.

    python -m recipes.studies.limits --config recipes/studies/limits.yaml

1. *It knows what the fit showed of the chunk, and no more.* The chunk is a passage about a town that does not exist. A
   patch fitted to questions about every other fact knows these; the rest is out of its reach, for there is nothing left
   to attend to.
2. *It belongs to a form of prompt.* A patch for antonyms, fitted on questions and answers, is asked in other forms.
   The demonstrations are rewritten in the same form for the instructed run.
3. *It copies mistakes.* Where the instructed model is mostly wrong, so is the patched one. Right outputs given for the
   inputs can help, but then it is labels that teach, not the prompt.

Writes a Markdown and a JSON table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import ThoughtPatch, load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from recipes.chunks.cases import document_case, evaluation_of, right
from recipes.chunks.documents import Document, load_document
from recipes.harness import (
    TEMPLATE,
    Trial,
    command_line,
    demonstrations,
    load_split,
    share,
    shown,
    table,
    write_results,
)

FORMS = {
    "Q: hot / A: …": TEMPLATE,
    "Input: hot / Output: …": "Input: {input}\nOutput: {output}\n",
    "hot -> …": "{input} -> {output}\n",
    "The opposite of hot is …": "The opposite of {input} is {output}\n",
}
"""Forms of one task's prompts; the first is the one that is fitted."""

STUDY = {"ridge": 0.001, "preserve_weight": 0.3, "answer_weight": 1.0}
"""What a passage is fitted with: facts want a lower ridge, and a higher rank, than rules."""


def limits(
    model: str = "smollm2",
    seed: int = 0,
    rank: int = 16,
    document: str = "harrowick",
    document_rank: int = 64,
    shots: int = 10,
    fit: int = 30,
    test: int = 30,
    max_new_tokens: int = 24,
    out: str = "recipes/results/limits",
) -> None:
    """Fit and test each example."""
    passage = load_document(document)
    lm, tokenizer = load_model(model)
    rows = look_up(lm, tokenizer, passage, document_rank, max_new_tokens)
    trials = [
        Trial(lm, tokenizer, load_split(f"common_words/{task}", seed, shots, fit, test), max_new_tokens)
        for task in ("antonym", "english-french")
    ]
    rows += other_forms(trials[0], rank) + mistakes(trials[1], rank)
    settings: dict[str, Any] = {"seed": seed, "document": passage.name, "document_rank": document_rank, "study": STUDY}
    settings |= {"shots": shots, "fit": fit, "test": test, "rank": rank, "max_new_tokens": max_new_tokens}
    write_results(__file__, out, page(rows), {"model": shown(model), "settings": settings, "rows": rows})


def look_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: Document, rank: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Questions about a passage in the chunk: those that were fitted, and the others; an answer holds a right form."""
    parts = {"facts that were fitted": document.questions[::2], "other facts of it": document.questions[1::2]}
    cases = {name: document_case(document._replace(questions=part), max_new_tokens, {}) for name, part in parts.items()}
    asked = cases["facts that were fitted"]
    settings: dict[str, Any] = {**STUDY, "rank": rank, "max_new_tokens": max_new_tokens, "progress": False}
    patch = transmute(model, tokenizer, asked.chunk, asked.tested, asked.template, **settings)
    rows = []
    for name, case in cases.items():
        row = measure(evaluation_of(model, tokenizer, case, unrelated=False), patch)
        counts = right(case, row["items"])
        assert counts is not None, "a document's answers can be judged"
        row["accuracy"] = {run: counts[run] / len(case.tested) for run in RUNS}
        rows.append({"example": "a passage in the chunk", "case": name, **row})
    return rows


def other_forms(trial: Trial, rank: int) -> list[dict[str, Any]]:
    """A patch fitted on one form of prompt, asked in others."""
    patch, rows = trial.fit(rank=rank), []
    for case, form in FORMS.items():
        evaluation = trial.evaluation(
            instruction=demonstrations(trial.split.shown, form), template=form, unrelated=None
        )
        rows.append({"example": "antonyms, fitted in the first form", "case": case, **measure(evaluation, patch)})
    return rows


def mistakes(trial: Trial, rank: int) -> list[dict[str, Any]]:
    """A task that the instructed model fails, from its own outputs and from right ones."""
    evaluation, rows = trial.evaluation(unrelated=None), []
    for case, pairs in (("outputs of the instructed model", None), ("right outputs", trial.split.labelled)):
        row = measure(evaluation, trial.fit(pairs, rank=rank))
        rows.append({"example": "French, which the model hardly knows", "case": f"fitted on {case}", **row})
    return rows


def measure(evaluation: Evaluation, patch: ThoughtPatch) -> dict[str, Any]:
    """Accuracy of the three runs, fidelity and KL, with every output."""
    result = evaluation.score(patch)
    return {key: result[key] for key in ("pairs", "accuracy", "fidelity", "output_kl", "items")}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each case."""
    lines = []
    for row in rows:
        n, accuracy, kl = row["pairs"], row["accuracy"], row["output_kl"]
        right = round(accuracy["patched"] * n)
        cells = [row["example"], row["case"], n, f"{accuracy['plain']:.2f}", f"{accuracy['instructed']:.2f}"]
        cells += [share([True] * right + [False] * (n - right)), f"{row['fidelity']:.2f}"]
        lines.append([*cells, f"{kl['plain']:.2f}", f"{kl['patched']:.2f}"])
    head = ["example", "case", "n", "plain", "instructed", "patched", "fidelity", "KL: plain", "patched"]
    return table(head, lines, left=2)


if __name__ == "__main__":
    command_line(limits)
