"""Patches added: one, two, three, four of them in one model. Does each still do what it does alone?

    python -m recipes.studies.added --config recipes/studies/added.yaml

A persona, a form of answers and documents are made into patches, each from its text alone, and added in turn. Each
chunk's own questions test its patch and each sum that it is in, against the model with that chunk alone in its prompt.
All patches together should be the model with all chunks in its prompt, and against that one the sum of all is tested,
too, with questions from each chunk; beside it stands one fit of the joint prompt. Writes a Markdown and a JSON table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_thought import ThoughtPatch, load_model
from recipes.chunks.cases import Case, case_of, evaluation_of, fit_case, known_chunks, prompt_case, right
from recipes.harness import command_line, nearer, shown, table, write_results

ALL = "all in the prompt"
JOINT = "one fit of the joint prompt"
ASKED = 8
"""Questions of each chunk that the model with all of them in its prompt is asked."""


def added(
    model: str = "smollm2",
    dtype: str = "float32",
    chunks: Sequence[str] = ("wizard", "sentence", "vasparr", "brindlemark"),
    seed: int = 0,
    fit: Mapping[str, Any] | None = None,
    out: str = "recipes/results/added",
) -> None:
    """Fit every chunk, add the patches in turn, and test."""
    known_chunks(chunks)
    lm, tokenizer = load_model(model, dtype=dtype)
    cases = [case_of(name, seed) for name in chunks]
    evaluations = [evaluation_of(lm, tokenizer, case) for case in cases]
    together = joint(cases)
    whole = evaluation_of(lm, tokenizer, together)
    how = {"seed": seed, "progress": False, **(fit or {})}
    runs: list[dict[str, Any]] = []
    record = {
        "model": shown(model),
        "settings": {"dtype": dtype, "chunks": list(chunks), "seed": seed, "fit": dict(fit or {})},
    }

    def note(name: str, case: Case, scored: Mapping[str, Any]) -> None:
        kept = {key: scored[key] for key in ("output_kl", "perplexity_ratio")}
        runs.append({"patch": name, "chunk": case.name, "right": right(case, scored["items"]), **kept})
        write_results(__file__, out, page(runs, [*cases, together]), {**record, "runs": runs})

    total: ThoughtPatch | None = None
    for count, (case, evaluation) in enumerate(zip(cases, evaluations, strict=True), start=1):
        patch, measured = fit_case(evaluation, case, None, **how)
        note(f"{case.name} alone", case, measured)
        total = patch if total is None else total + patch
        for mine, own in zip(cases[:count], evaluations, strict=False) if count > 1 else ():
            note(f"sum of the first {count}", mine, own.score(total))
    assert total is not None
    note(f"sum of the first {len(cases)}", together, whole.score(total))
    patch, measured = fit_case(whole, together, None, **how)
    note(JOINT, together, measured)
    for case, evaluation in zip(cases, evaluations, strict=True):
        note(JOINT, case, evaluation.score(patch))


def joint(cases: Sequence[Case]) -> Case:
    """All chunks in one prompt, tested with the first of each one's questions."""
    messages = [item["input"] for case in cases for item in case.tested[:ASKED]]
    longest = max(case.max_new_tokens for case in cases)
    return prompt_case(ALL, "\n\n".join(case.chunk for case in cases), messages, longest)


def page(runs: Sequence[Mapping[str, Any]], cases: Sequence[Case]) -> str:
    """How much nearer each chunk's own instructed model is, and what is right, by patch."""
    names = [case.name for case in cases]
    rows = []
    for patch in dict.fromkeys(run["patch"] for run in runs):
        own = {run["chunk"]: run for run in runs if run["patch"] == patch}
        cells = [_cell(own[name]) if name in own else None for name in names]
        rows.append([patch, *cells, f"{max(run['perplexity_ratio'] for run in own.values()):.4f}"])
    told = [f"{name} {own['instructed']}" for name, own in {run["chunk"]: run["right"] for run in runs}.items() if own]
    return (
        "KL to the model with the column's own chunk in its prompt, down by; in brackets, what is right of its own "
        f"questions, which the instructed model has right as often: {', '.join(told)}.\n\n"
        f"{table(['patch', *names, 'unrelated perplexity ×'], rows)}"
    )


def _cell(run: Mapping[str, Any]) -> str:
    counts = run["right"]
    return nearer(run["output_kl"]) + (f" ({counts['patched']} right)" if counts else "")


if __name__ == "__main__":
    command_line(added)
