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

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from lit_thought.prompts.pairs import load_pairs
from lit_thought.solve.intervals import wilson
from recipes.harness import DATA, TEMPLATE, demonstrations, load_split, provenance, shown, write_results
from recipes.tasks.self_study import Document, contains, load_document

FORMS = {
    "Q: hot / A: …": TEMPLATE,
    "Input: hot / Output: …": "Input: {input}\nOutput: {output}\n",
    "hot -> …": "{input} -> {output}\n",
    "The opposite of hot is …": "The opposite of {input} is {output}\n",
}
"""Forms of one task's prompts; the first is the one that is fitted."""

STUDY = {"ridge": 0.001, "preserve_weight": 0.3, "answer_weight": 1.0}
"""What a passage is fitted with: facts want a lower ridge, and a higher rank, than rules (document.py)."""


def limits(
    model: str = "smollm2",
    seed: int = 0,
    rank: int = 16,
    document: str = "harrowick",
    document_rank: int = 64,
    shots: int = 10,
    fit: int = 30,
    test: int = 30,
    max_new_tokens: int = 12,
    out: str = "recipes/results/limits",
) -> None:
    """Fit and test each example.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        seed: seed of the splits.
        rank: rank of the adapters in the other examples.
        document: name below recipes/data/documents, or a file of that form, for the first example.
        document_rank: rank of its adapter.
        shots: demonstrations in the other examples.
        fit: inputs to fit on in the other examples.
        test: most words to test on in the other examples.
        max_new_tokens: longest output.
        out: path of the two result files, without suffix.
    """
    passage = load_document(document)
    lm, tokenizer = load_model(model)
    common = {"rank": rank, "max_new_tokens": max_new_tokens}
    rows = look_up(lm, tokenizer, passage, document_rank, max_new_tokens)
    rows += other_forms(lm, tokenizer, seed, shots, fit, test, **common)
    rows += mistakes(lm, tokenizer, seed, shots, fit, test, **common)
    settings: dict[str, Any] = {"seed": seed, "document": passage.name, "document_rank": document_rank, "study": STUDY}
    settings |= {"shots": shots, "fit": fit, "test": test, **common}
    record = {"model": shown(model), **provenance(), "settings": settings, "rows": rows}
    page = "`python -m recipes.studies.limits --config recipes/studies/limits.yaml` on "
    page += f"{shown(model)}, commit {record['commit']}; settings: `{json.dumps(settings)}`\n\n{table(rows)}"
    print(page)
    write_results(out, page, record)


def look_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: Document, rank: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Questions about a passage in the chunk: those that were fitted, and the others; an answer holds a right form."""
    asked, others = document.questions[::2], document.questions[1::2]
    inputs = [{"input": row["input"]} for row in asked]
    common: dict[str, Any] = {**STUDY, "rank": rank, "max_new_tokens": max_new_tokens, "progress": False}
    patch = transmute(model, tokenizer, document.chunk, inputs, "chat", **common)
    rows = []
    for case, questions in (("facts that were fitted", asked), ("other facts of it", others)):
        pairs = [{"input": row["input"]} for row in questions]
        row = measure(model, tokenizer, patch, document.chunk, pairs, "chat", max_new_tokens)
        row["accuracy"] = {
            run: sum(contains(item[run], own["outputs"]) for item, own in zip(row["items"], questions, strict=True))
            / len(questions)
            for run in RUNS
        }
        rows.append({"example": "a passage in the chunk", "case": case, **row})
    return rows


def other_forms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    shots: int,
    fit: int,
    test: int,
    rank: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """A patch fitted on one form of prompt, asked in others."""
    task = "common_words/antonym"
    split = load_split(task, seed, shots, fit, test)
    patch = transmute(
        model,
        tokenizer,
        split.instruction,
        split.fit,
        TEMPLATE,
        rank=rank,
        max_new_tokens=max_new_tokens,
        progress=False,
    )
    pairs = load_pairs(DATA / f"{task}.json")
    random.Random(seed).shuffle(pairs)
    return [
        {"example": "antonyms, fitted in the first form", "case": case}
        | measure(model, tokenizer, patch, demonstrations(pairs[:shots], form), split.test, form, max_new_tokens)
        for case, form in FORMS.items()
    ]


def mistakes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    shots: int,
    fit: int,
    test: int,
    rank: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """A task that the instructed model fails, from its own outputs and from right ones."""
    task = "common_words/english-french"
    split = load_split(task, seed, shots, fit, test)
    right = {pair["input"]: pair["output"] for pair in load_pairs(DATA / f"{task}.json")}
    labelled = [{**pair, "output": right[pair["input"]]} for pair in split.fit]
    rows = []
    for case, pairs in (("outputs of the instructed model", split.fit), ("right outputs", labelled)):
        patch = transmute(
            model,
            tokenizer,
            split.instruction,
            pairs,
            TEMPLATE,
            rank=rank,
            max_new_tokens=max_new_tokens,
            progress=False,
        )
        row = measure(model, tokenizer, patch, split.instruction, split.test, TEMPLATE, max_new_tokens)
        rows.append({"example": "French, which the model hardly knows", "case": f"fitted on {case}", **row})
    return rows


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: Any,
    instruction: str,
    pairs: Sequence[Mapping[str, str]],
    template: str,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Accuracy of the three runs, fidelity and KL, with every output."""
    result = Evaluation(
        *(model, tokenizer),
        instruction=instruction,
        pairs=pairs,
        template=template,
        unrelated=None,
        max_new_tokens=max_new_tokens,
        progress=False,
    ).score(patch)
    return {key: result[key] for key in ("pairs", "accuracy", "fidelity", "output_kl", "items")}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each case."""
    lines = [
        "| example | case | n | plain | instructed | patched | fidelity | KL: plain | patched |",
        "|---|---|" + "---:|" * 7,
    ]
    for row in rows:
        n, accuracy, kl = row["pairs"], row["accuracy"], row["output_kl"]
        low, high = wilson(round(accuracy["patched"] * n), n)
        cells = [row["example"], row["case"], str(n), f"{accuracy['plain']:.2f}", f"{accuracy['instructed']:.2f}"]
        cells += [f"{accuracy['patched']:.2f} ({low:.2f} to {high:.2f})", f"{row['fidelity']:.2f}"]
        cells += [f"{kl['plain']:.2f}", f"{kl['patched']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jsonargparse.auto_cli(limits)
