"""Only an instruction: what a patch is worth that is fitted on nothing but what the model writes itself.

    python -m recipes.studies.instruction_alone --config recipes/studies/instruction_alone.yaml

Every chunk goes through ``transmute(model, tokenizer, chunk)``: lists of demonstrations (the six word tasks), system
messages, documents. Each is tested on what was never fitted: words, questions, and questions about the document that
were worded by hand. Beside a word task's patch stands one of thirty given inputs, on the same words; beside a
document's one of given questions, where its file has some, alone and with others, and, with ``--parts``, one for which
each part of it was alone in the prompt of its own pairs. The figures are those of ``evaluate``: along the instructed
model's outputs and along the patched model's own; and the seconds from the instruction to the patch, by part. Writes a
Markdown and a JSON table after every fit; ``--done`` takes these over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lit_thought import load_model
from lit_thought.errors import check_counts
from lit_thought.patch.results import RUNS
from recipes.chunks.cases import (
    document_case,
    evaluation_of,
    fit_case,
    fit_in_parts,
    message_case,
    right,
    word_case,
)
from recipes.chunks.documents import load_document
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import (
    SIX_TASKS,
    check_names,
    command_line,
    earlier_runs,
    nearer,
    provenance,
    runs_record,
    shown,
    table,
    write_results,
)

INSTRUCTIONS = ("pirate", "french", "sentence", "shakespeare", "poet", "wizard", "json", "uppercase", "refuse")
DOCUMENTS = ("brindlemark", "velmora", "quillow", "great_fire", "harrowick", "kestrel_station", "vasparr", "fenwhistle")
DOCUMENTS += ("tavrok", "skeldry")
BESIDE = 1.5
"""Pairs for one given question about a document, where the others are written."""


def instruction_alone(
    model: str = "smollm2",
    dtype: str = "float32",
    tasks: Sequence[str] = SIX_TASKS,
    instructions: Sequence[str] = INSTRUCTIONS,
    documents: Sequence[str] = DOCUMENTS,
    seeds: Sequence[int] = (0,),
    counts: Sequence[int] = (),
    parts: Sequence[int] = (),
    test: int = 100,
    questions: int = 30,
    word_tokens: int = 12,
    answer_tokens: int = 48,
    document_tokens: int = 24,
    document_settings: Mapping[str, Any] | None = None,
    unrelated: bool = True,
    out: str = "recipes/results/instruction_alone",
    done: Sequence[str] = (),
) -> None:
    """Fit and test every chunk and seed."""
    known = instructions_known()
    check_names("instructions", instructions, known)
    for count in parts:
        check_counts(parts=count)
    chosen = [load_document(name) for name in documents]
    settings = {
        "dtype": dtype,
        "test": test,
        "questions": questions,
        "document_settings": dict(document_settings or {}),
        "word_tokens": word_tokens,
        "answer_tokens": answer_tokens,
        "document_tokens": document_tokens,
    }
    runs = earlier_runs(done, shown(model), settings)
    if runs:  # together, also where nothing is left to do
        write_results(__file__, out, _page(runs), runs_record(shown(model), settings, runs))
    finished = {(run["door"], run["name"], run["seed"], run["fit"]) for run in runs}
    lm, tokenizer = load_model(model, dtype=dtype)
    for seed in seeds:
        cases = [word_case(task, seed, test, word_tokens) for task in tasks]
        cases += [message_case(known[name], seed, questions, answer_tokens) for name in instructions]
        cases += [document_case(own, document_tokens, document_settings or {}) for own in chosen]
        for case in cases:
            fits: list[tuple[str, Any, dict[str, Any]]] = [("written", fit_case, {"pairs": None})]
            fits += [(f"written, {count}", fit_case, {"pairs": None, "inputs": count}) for count in counts]
            if case.given:
                fits.append((f"given, {len(case.given)}", fit_case, {"pairs": case.given}))
            if case.given and case.door == "document":
                more = {"pairs": case.given, "inputs": round(BESIDE * len(case.given))}
                fits.append((f"given, {len(case.given)}, and written", fit_case, more))
            if case.door == "document":
                fits += [(f"written, {count} parts", fit_in_parts, {"count": count}) for count in parts]
            waiting = [own for own in fits if (case.door, case.name, seed, own[0]) not in finished]
            if not waiting:
                continue
            evaluation = evaluation_of(lm, tokenizer, case, unrelated)
            for name, fit, changes in waiting:
                _, measured = fit(evaluation, case, seed=seed, **changes)
                run = {"door": case.door, "name": case.name, "seed": seed, "fit": name}
                run |= {"right": right(case, measured["items"]), "tested": len(case.tested)}
                runs.append({**run, **measured, "commit": provenance()["commit"]})
                print(_table(runs[-1:]), flush=True)
                write_results(__file__, out, _page(runs), runs_record(shown(model), settings, runs))


def _row(run: Mapping[str, Any]) -> list[Any]:
    kl = run["output_kl"]
    counts = run["right"]
    share = None if not counts or not counts["instructed"] else counts["patched"] / counts["instructed"]
    cells = [f"{run['name']}, seed {run['seed']}, {run['fit']}", run["fitted"]]
    cells += [None if counts is None else counts[which] for which in ("of", *RUNS)]
    cells.append(None if share is None else f"{share:.2f}")
    cells.append(None if share is None else f"{counts['kept'] / counts['instructed']:.2f}")
    cells += [
        f"{run['fidelity']:.2f}",
        f"{kl['plain']:.3f}",
        f"{kl['patched']:.3f}",
        nearer(kl),
    ]
    cells += [*own_text_cells(run), *(f"{run['prompt_tokens'][which]:.0f}" for which in ("plain", "instructed"))]
    cells.append(f"{run['seconds_by_part'].get('write', 0):.0f}")
    return [*cells, f"{run['seconds']:.0f}"]


def own_text_cells(run: Mapping[str, Any]) -> list[str | None]:
    """What a run's record says of the patched model's own text, and of unrelated text, under :data:`OWN_TEXT_HEAD`."""
    own, ratio = run["own_text"], run["perplexity_ratio"]
    pairs = [own[name][which] for name in ("repetition", "length") for which in ("instructed", "patched")]
    known = [(own["kl"], 3), *((value, 2) for value in pairs), (ratio, 4)]
    return [None if value is None else f"{value:.{digits}f}" for value, digits in known]


OWN_TEXT_HEAD = ["KL along its own text", "repetition, instructed", "patched", "tokens, instructed", "patched"]
OWN_TEXT_HEAD += ["unrelated perplexity ×"]
HEAD = ["chunk", "pairs", "judged", "right: plain", "instructed", "patched", "patched ÷ instructed"]
HEAD += ["of the instructed ones kept", "same output"]
HEAD += ["KL, plain", "patched", "down by", *OWN_TEXT_HEAD, "prompt tokens, plain", "instructed"]
HEAD += ["seconds: writing inputs", "all"]


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    return table(HEAD, [_row(run) for run in runs])


def _page(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table for each kind of chunk, each fit's mean ratio of right outputs below."""
    parts = []
    for door in dict.fromkeys(run["door"] for run in runs):
        own = [run for run in runs if run["door"] == door]
        fits = dict.fromkeys(run["fit"] for run in own)
        lines = [_line(fit, [run for run in own if run["fit"] == fit]) for fit in fits]
        parts.append("\n".join([f"## {door.capitalize()}s\n\n{_table(own)}", *lines, ""]))
    return "\n".join(parts)


def _line(fit: str, runs: Sequence[Mapping[str, Any]]) -> str:
    counts = [run["right"] for run in runs if run["right"] and run["right"]["instructed"]]
    ratios = [own["patched"] / own["instructed"] for own in counts]
    down = mean(1 - run["output_kl"]["patched"] / run["output_kl"]["plain"] for run in runs)
    text = f"- {fit}: KL down by {down:.1%}, the same output in {mean(run['fidelity'] for run in runs):.3f}"
    if ratios:
        kept = mean(own["kept"] / own["instructed"] for own in counts)
        text += f"; patched ÷ instructed right {mean(ratios):.3f} on average, {min(ratios):.2f} at least; of what the "
        text += f"instructed model has right the patched one has {kept:.3f}"
    worst = [run["perplexity_ratio"] for run in runs if run["perplexity_ratio"] is not None]
    return text + (f"; perplexity × {mean(worst):.4f} on average, {max(worst):.4f} at most" if worst else "")


if __name__ == "__main__":
    command_line(instruction_alone)
