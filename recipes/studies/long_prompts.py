"""What people really pay for: long system prompts, made into weights from nothing but their text.

    python -m recipes.studies.long_prompts --config recipes/studies/long_prompts.yaml

Eight prompts of 500 to 3,200 tokens, as products have them, each with thirty messages that say what their answers are
to be checked for (recipes/data/long_prompts). A patch is fitted on the prompt alone, and plain, instructed and patched
answers are checked by the same rules. Beside them stand the figures of ``evaluate``, what a query costs, with answers
of one length side by side on the same messages (the prompt read anew, its keys and values kept, and with the patch),
and what making the patch costs against one pass over what it was fitted to: the prompt once, and all inputs after it.
Under other system messages, how many of the plain model's tokens stay its likeliest, along its own answers
(side_effects.py), with the prompt before them and with the patch. Writes a Markdown and a JSON table after every fit;
``--done`` takes these over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from statistics import mean
from typing import Any

import torch

from lit_thought import PromptTemplate, ThoughtPatch, load_model
from lit_thought.errors import check_counts
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from lit_thought.prompts.batches import common_prefix
from lit_thought.runs.generate import generate
from lit_thought.runs.streams import lead_cache
from lit_thought.timing import Stopwatch
from recipes.chunks.cases import evaluation_of, fit_case, prompt_case
from recipes.chunks.long_prompts import RULES, LongPrompt, kept, load_prompt
from recipes.harness import (
    command_line,
    earlier_runs,
    machine,
    measured_on,
    provenance,
    runs_record,
    shown,
    table,
    write_results,
)
from recipes.speed.benchmark_inference import Case, write
from recipes.studies.instruction_alone import OWN_TEXT_HEAD, own_text_cells
from recipes.studies.side_effects import Others
from recipes.studies.side_effects import unrelated as unrelated_prompts

ANSWERED = 32
"""Longest answer under another system message, in tokens."""
WAYS = ("instructed", "prompt kept", "patched")
"""How a query is answered: with the prompt read anew, after the prompt's keys and values, without the prompt."""


def long_prompts(
    model: str = "smollm2",
    dtype: str = "float32",
    prompts: Sequence[str] = (
        "shop_support",
        "ticket_labels",
        "code_helper",
        "clinic_desk",
        "museum_guide",
        "tool_assistant",
        "product_persona",
        "style_editor",
    ),
    seeds: Sequence[int] = (0,),
    test: int = 30,
    answer_tokens: int = 64,
    timed: int = 8,
    timed_tokens: int = 32,
    count: int = 40,
    fit: Mapping[str, Any] | None = None,
    unrelated: bool = True,
    out: str = "recipes/results/long_prompts",
    done: Sequence[str] = (),
) -> None:
    """Fit and test every prompt and seed."""
    check_counts(test=test, answer_tokens=answer_tokens, timed=timed, timed_tokens=timed_tokens, count=count)
    chosen = [load_prompt(name) for name in prompts]
    settings = {"dtype": dtype, "test": test, "answer_tokens": answer_tokens, "timed": timed}
    settings |= {"timed_tokens": timed_tokens, "count": count, "fit": dict(fit or {})}
    runs = earlier_runs(done, shown(model), settings)
    if runs:  # together, also where nothing is left to do
        write_results(__file__, out, _page(runs), runs_record(shown(model), settings, runs))
    finished = {(run["name"], run["seed"]) for run in runs}
    lm, tokenizer = load_model(model, dtype=dtype)
    others: Others | None = None
    for own in chosen:
        waiting = [seed for seed in seeds if (own.name, seed) not in finished]
        if not waiting:
            continue
        case = prompt_case(own.name, own.chunk, [row["input"] for row in own.messages[:test]], answer_tokens)
        check = (lambda text, rules=own.rules: all(kept(text, rules).values())) if own.rules else None
        evaluation = evaluation_of(lm, tokenizer, case, unrelated, check=check)
        others = others or Others(lm, tokenizer, unrelated_prompts("other instructions", "", count, 0), ANSWERED)
        instructed = others.agreement(own.chunk, None)
        for seed in waiting:
            how = {"max_new_tokens": answer_tokens, **settings["fit"], "seed": seed}
            patch, measured = fit_case(evaluation, case, None, **how)
            run = {"name": own.name, "title": own.title, "seed": seed, **checked(own, measured["items"]), **measured}
            run["query"] = {**query_seconds(evaluation, patch, timed, timed_tokens), "tokens": timed_tokens}
            run["pass_seconds"] = pass_seconds(evaluation, own.chunk, patch)
            run["others"] = {"instructed": instructed, "patched": others.agreement(None, patch)}
            runs.append({**run, "machine": machine(lm.device), "commit": provenance()["commit"]})
            write_results(__file__, out, _page(runs), runs_record(shown(model), settings, runs))


def checked(own: LongPrompt, items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How many rules there are, and how many each run follows, by kind; items get the kinds that they ``missed``."""
    stated: Counter[str] = Counter()
    followed: dict[str, Counter[str]] = {run: Counter() for run in RUNS}
    for item in items:
        rules = own.rules_of(item["input"])
        stated.update(rules.keys())
        item["missed"] = {}
        for run in RUNS:
            found = kept(item[run], rules)
            followed[run].update(kind for kind, holds in found.items() if holds)
            item["missed"][run] = [kind for kind, holds in found.items() if not holds]
    return {"rules": {kind: {"stated": n, **{run: followed[run][kind] for run in RUNS}} for kind, n in stated.items()}}


@torch.inference_mode()
def query_seconds(evaluation: Evaluation, patch: ThoughtPatch, timed: int, tokens: int) -> dict[str, float]:
    """Mean seconds of a query that is answered alone with so many tokens, in each of the :data:`WAYS`, and seconds to
    read once the prompt whose keys and values may be kept."""
    model, prompts = evaluation.model, evaluation.prompts
    shared = common_prefix([prompt.instructed_ids for prompt in prompts])
    start = Stopwatch.now()
    lead = lead_cache(model, prompts[0].instructed_ids[:shared])
    spent: dict[str, list[float]] = {"reading": [Stopwatch.now() - start], **{way: [] for way in WAYS}}
    for prompt in prompts[:timed]:
        ids = prompt.instructed_ids
        for way, own in zip(WAYS, ((ids, None), (ids[shared:], lead), (prompt.plain_ids, None)), strict=True):
            with patch.applied(model) if way == "patched" else nullcontext():
                start = Stopwatch.now()
                write(Case(way, shared, model, *own), 1, tokens)
                spent[way].append(Stopwatch.now() - start)
    return {what: mean(seconds) for what, seconds in spent.items()}


def pass_seconds(evaluation: Evaluation, chunk: str, patch: ThoughtPatch) -> float:
    """Seconds in which the model reads the prompt once and every input that the patch was fitted to after it."""
    inputs = [pair["input"] for pair in patch.provenance["inputs"]["pairs"]]
    template = PromptTemplate.from_dict(patch.provenance["template"])
    prompts = [template.tokenise(evaluation.tokenizer, chunk, text).instructed_ids for text in inputs]
    start = Stopwatch.now()
    generate(evaluation.model, evaluation.tokenizer, prompts, max_new_tokens=1)
    return Stopwatch.now() - start


# --- the page --------------------------------------------------------------------------------------------------------


def total(run: Mapping[str, Any], which: str) -> int:
    """Rules of all kinds that a run follows, or that are ``stated``."""
    return sum(counts[which] for counts in run["rules"].values())


def ratio(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Rules followed by the patched model against those followed by the instructed one; None where that has none."""
    instructed = sum(total(run, "instructed") for run in runs)
    return sum(total(run, "patched") for run in runs) / instructed if instructed else None


def answer_line(runs: Sequence[Mapping[str, Any]]) -> str:
    """The study's answer in one sentence."""
    sizes = [round(run["prompt_tokens"]["saved"]) for run in runs]
    counts = {which: sum(total(run, which) for run in runs) for which in ("stated", *RUNS)}
    each = {f"{run['name']}, seed {run['seed']}": ratio([run]) for run in runs}
    known = {name: value for name, value in each.items() if value is not None}
    line = f"A patch made of nothing but a prompt (patches: {len(runs)}; tokens saved a query: {min(sizes):,} to "
    line += f"{max(sizes):,}) follows {counts['patched']} of {counts['stated']} rules, where the instructed model "
    line += f"follows {counts['instructed']} and the plain one {counts['plain']}"
    if known:
        worst = min(known, key=lambda name: known[name])
        line += f": {ratio(runs):.2f} times as many as instructed, {known[worst]:.2f} at least ({worst})"
    if counts["instructed"] > counts["plain"]:
        share = (counts["patched"] - counts["plain"]) / (counts["instructed"] - counts["plain"])
        line += f", and {share:.2f} of those that the prompt adds"
    query = {way: mean(run["query"][way] for run in runs) for way in WAYS}
    line += f"; a query with an answer of {runs[0]['query']['tokens']} tokens takes {query['patched']:.2f} s"
    line += f" in the place of {query['instructed']:.2f} s"
    line += f" ({query['prompt kept']:.2f} s where the prompt's keys and values are kept)"
    making = mean(run["seconds"] for run in runs), mean(run["seconds"] / run["pass_seconds"] for run in runs)
    line += f", making the patch {making[0]:.0f} s, {making[1]:.1f} times one pass over its inputs with the prompt"
    worse = [run["perplexity_ratio"] for run in runs if run["perplexity_ratio"] is not None]
    line += f", unrelated perplexity is × {max(worse):.4f} at most" if worse else ""
    others = {which: mean(run["others"][which] for run in runs) for which in ("patched", "instructed")}
    line += f", and under other system messages {others['patched']:.3f} of the plain model's tokens stay "
    return line + f"({others['instructed']:.3f} with the prompt before them)."


def _two(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _rules_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run: rules followed, and the figures of its answers."""
    head = ["prompt", "rules", *(f"followed: {which}" if which == RUNS[0] else which for which in RUNS)]
    head += ["patched ÷ instructed", "same output", "KL, plain", "patched", *OWN_TEXT_HEAD]
    head += ["tokens that stay under other system messages: instructed", "patched"]
    rows = []
    for run in runs:
        cells = [f"{run['name']}, seed {run['seed']}", *(total(run, which) for which in ("stated", *RUNS))]
        cells += [_two(ratio([run])), _two(run["fidelity"])]
        cells += [f"{run['output_kl'][which]:.3f}" for which in ("plain", "patched")]
        rows.append([*cells, *own_text_cells(run), *(f"{run['others'][which]:.3f}" for which in RUNS[1:])])
    return table(head, rows)


def _kinds_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each kind of rule, over all runs."""
    rows = []
    for kind in (kind for kind in RULES if any(kind in run["rules"] for run in runs)):
        own = [{"rules": {kind: run["rules"][kind]}} for run in runs if kind in run["rules"]]
        counts = {which: sum(total(run, which) for run in own) for which in ("stated", *RUNS)}
        shares = (f"{counts[which] / counts['stated']:.2f}" for which in RUNS)
        rows.append([kind, len(own), counts["stated"], *shares, _two(ratio(own))])
    head = ["rule", "patches", "answers", *(f"share: {which}" if which == RUNS[0] else which for which in RUNS)]
    return table([*head, "patched ÷ instructed"], rows)


def _costs_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run: what a query and what the patch costs."""
    head = ["prompt", "tokens saved a query", *(f"seconds a query: {way}" if way == WAYS[0] else way for way in WAYS)]
    head += ["saved", "seconds to read the prompt", "inputs written", "taken for", "seconds to make the patch"]
    head += ["of these writing", "one pass over its inputs, s", "making ÷ pass"]
    head += ["queries until it pays", "where the prompt is kept"]
    rows = []
    for run in runs:
        query, inputs = run["query"], run["inputs"]
        saved, beside_kept = (query[way] - query["patched"] for way in ("instructed", "prompt kept"))
        cells = [f"{run['name']}, seed {run['seed']}", f"{run['prompt_tokens']['saved']:,.0f}"]
        cells += [*(_two(query[way]) for way in WAYS), _two(saved), _two(query["reading"])]
        cells += [inputs["count"], inputs["kind"], f"{run['seconds']:.0f}"]
        cells += [f"{run['seconds_by_part'].get('write', 0):.0f}", f"{run['pass_seconds']:.1f}"]
        cells.append(f"{run['seconds'] / run['pass_seconds']:.1f}")
        cells += [f"{run['seconds'] / each:,.0f}" if each > 0 else None for each in (saved, beside_kept)]
        rows.append(cells)
    return table(head, rows)


def _page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The answer, and what it rests on."""
    parts = [f"**{answer_line(runs)}**\n", f"## Rules\n\n{_rules_table(runs)}"]
    parts += [f"## Rules by kind\n\n{_kinds_table(runs)}", f"## Costs\n\n{_costs_table(runs)}"]
    parts.append(measured_on(runs))
    return "\n".join(parts)


if __name__ == "__main__":
    command_line(long_prompts)
