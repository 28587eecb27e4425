"""Patches added: one, two, three, four of them in one model. Does each still do what it does alone?

    python -m recipes.studies.added --config recipes/studies/added.yaml

A persona, a form of answers and documents are made into patches, each from its text alone, and added in turn. Each
patch and each sum is tested as for every chunk alone: against the model with that chunk in the prompt, with its own
questions. Beside the sum of all stands one fit of the joint prompt, which says everything. Writes a Markdown and a JSON
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_thought import ThoughtPatch, load_model, transmute
from recipes.harness import command_line, shown, table, write_results
from recipes.studies.instruction_alone import Case, evaluation_of, fit_case, right
from recipes.studies.side_effects import case_of, known_chunks

JOINT = "one fit of the joint prompt"


def added(
    model: str = "smollm2",
    chunks: Sequence[str] = ("wizard", "sentence", "vasparr", "brindlemark"),
    seed: int = 0,
    fit: Mapping[str, Any] | None = None,
    out: str = "recipes/results/added",
) -> None:
    """Fit every chunk, add the patches in turn, and test."""
    known_chunks(chunks)
    lm, tokenizer = load_model(model)
    cases = [case_of(name, seed) for name in chunks]
    evaluations = [evaluation_of(lm, tokenizer, case) for case in cases]
    how = {"seed": seed, "progress": False, **(fit or {})}
    runs: list[dict[str, Any]] = []
    record = {"model": shown(model), "settings": {"chunks": list(chunks), "seed": seed, "fit": dict(fit or {})}}
    total: ThoughtPatch | None = None

    def score(name: str, patch: ThoughtPatch) -> None:
        for case, evaluation in zip(cases, evaluations, strict=True):
            scored = evaluation.score(patch)
            kept = {key: scored[key] for key in ("output_kl", "perplexity_ratio")}
            runs.append({"patch": name, "chunk": case.name, "right": right(case, scored["items"]), **kept})
        write_results(__file__, out, page(runs, cases), {**record, "runs": runs})

    for count, (case, evaluation) in enumerate(zip(cases, evaluations, strict=True), start=1):
        patch, _ = fit_case(evaluation, case, None, **how)
        score(f"{case.name} alone", patch)
        total = patch if total is None else total + patch
        if count > 1:
            score(f"sum of the first {count}", total)
    joint = "\n\n".join(case.chunk for case in cases)
    how = {"max_new_tokens": max(min(64, 2 * case.max_new_tokens) for case in cases), **how}
    score(JOINT, transmute(lm, tokenizer, joint, None, cases[0].template, **how))


def page(runs: Sequence[Mapping[str, Any]], cases: Sequence[Case]) -> str:
    """How much nearer each chunk's own instructed model is, and what is right, by patch."""
    names = [case.name for case in cases]
    rows = []
    for patch in dict.fromkeys(run["patch"] for run in runs):
        own = {run["chunk"]: run for run in runs if run["patch"] == patch}
        cells: list[Any] = [patch]
        for run in (own[name] for name in names):
            kl, counts = run["output_kl"], run["right"]
            told = f" ({counts['patched']} right)" if counts else ""
            cells.append(f"{1 - kl['patched'] / kl['plain']:.1%}{told}")
        rows.append([*cells, f"{max(run['perplexity_ratio'] for run in own.values()):.4f}"])
    firsts = {run["chunk"]: run["right"] for run in runs}
    told = [f"{name} {own['instructed']}" for name, own in firsts.items() if own]
    return (
        "KL to the model with the column's own chunk in its prompt, down by; in brackets, what is right of its own "
        f"questions, which the instructed model has right as often: {', '.join(told)}.\n\n"
        f"{table(['patch', *names, 'unrelated perplexity ×'], rows)}"
    )


if __name__ == "__main__":
    command_line(added)
