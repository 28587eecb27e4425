"""Only an instruction: what a patch is worth that is fitted on nothing but what the model writes itself.

    python -m recipes.studies.instruction_alone --config recipes/studies/instruction_alone.yaml

Every chunk goes through ``transmute(model, tokenizer, chunk)``: lists of demonstrations (the six word tasks), system
messages, documents. Each is tested on what was never fitted: words, questions, and questions about the document that
were worded by hand. Beside a word task's patch stands one of thirty given inputs, on the same words. The figures are
those of ``evaluate``: along the instructed model's outputs and along the patched model's own; and the seconds from the
instruction to the patch, by part. Writes a Markdown and a JSON table after every fit; ``--done`` takes these over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from lit_thought.timing import Stopwatch
from recipes.harness import (
    SIX_TASKS,
    TEMPLATE,
    check_names,
    command_line,
    earlier_runs,
    load_split,
    nearer,
    provenance,
    runs_record,
    shown,
    table,
    write_results,
)
from recipes.tasks.document_data import Document, contains, load_document
from recipes.tasks.system_prompt import FOLDER, RULES, instructions_known, load_pairs, split

Judge = Callable[[Mapping[str, str]], Mapping[str, bool]]
GIVEN = 30
"""Inputs of the fit beside which a word task's stands."""


class Case(NamedTuple):
    """A chunk, what to test it with, and when an output is right: from an item of ``evaluate`` to a truth for each run;
    None where that cannot be told."""

    door: str
    name: str
    chunk: str
    template: PromptTemplate
    tested: list[dict[str, str]]
    max_new_tokens: int
    judge: Judge | None
    given: list[dict[str, str]]
    settings: dict[str, Any]


def instruction_alone(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    instructions: Sequence[str] = ("pirate", "french", "sentence", "shakespeare", "poet", "wizard", "json", "refuse"),
    documents: Sequence[str] = ("brindlemark", "velmora", "quillow", "great_fire", "harrowick", "kestrel_station"),
    seeds: Sequence[int] = (0,),
    counts: Sequence[int] = (),
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
    chosen = [load_document(name) for name in documents]
    settings = {
        "test": test,
        "questions": questions,
        "document_settings": dict(document_settings or {}),
        "word_tokens": word_tokens,
        "answer_tokens": answer_tokens,
        "document_tokens": document_tokens,
    }
    runs = earlier_runs(done, shown(model), settings)
    finished = {(run["door"], run["name"], run["seed"], run["fit"]) for run in runs}
    lm, tokenizer = load_model(model)
    for seed in seeds:
        cases = [word_case(task, seed, test, word_tokens) for task in tasks]
        cases += [message_case(known[name], seed, questions, answer_tokens) for name in instructions]
        cases += [document_case(own, document_tokens, document_settings or {}) for own in chosen]
        for case in cases:
            fits: list[tuple[str, Any, dict[str, Any]]] = [("written", None, {})]
            fits += [(f"written, {count}", None, {"inputs": count}) for count in counts]
            fits += [(f"given, {len(case.given)}", case.given, {})] if case.given else []
            waiting = [own for own in fits if (case.door, case.name, seed, own[0]) not in finished]
            if not waiting:
                continue
            evaluation = evaluation_of(lm, tokenizer, case, unrelated)
            for name, pairs, changes in waiting:
                _, measured = fit_case(evaluation, case, pairs, seed=seed, **changes)
                run = {"door": case.door, "name": case.name, "seed": seed, "fit": name}
                run |= {"right": right(case, measured["items"]), "tested": len(case.tested)}
                runs.append({**run, **measured, "commit": provenance()["commit"]})
                print(_table(runs[-1:]), flush=True)
                write_results(__file__, out, _page(runs), runs_record(shown(model), settings, runs))


def evaluation_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Case, unrelated: bool = True
) -> Evaluation:
    """The plain and the instructed outputs of what a chunk is tested with."""
    return Evaluation(
        *(model, tokenizer),
        instruction=case.chunk,
        pairs=case.tested,
        template=case.template,
        max_new_tokens=case.max_new_tokens,
        unrelated="default" if unrelated else None,
        progress=False,
    )


def fit_case(
    evaluation: Evaluation, case: Case, pairs: Sequence[Mapping[str, str]] | None, **changes: Any
) -> tuple[ThoughtPatch, dict[str, Any]]:
    """:func:`fit_and_score` of a chunk in the usual way, with these changes. The template is left to the library, but
    for a word task's and a document's."""
    usual = {"progress": False, **case.settings}
    template = case.template if case.given or case.door == "document" else None
    return fit_and_score(evaluation, case.chunk, pairs, template, {**usual, **changes})


def fit_and_score(
    evaluation: Evaluation,
    chunk: str,
    pairs: Sequence[Mapping[str, str]] | None,
    template: PromptTemplate | None,
    settings: Mapping[str, Any],
) -> tuple[ThoughtPatch, dict[str, Any]]:
    """A patch with what it was fitted to, its seconds and its evaluation, as a record keeps them."""
    start = Stopwatch.now()
    patch = transmute(evaluation.model, evaluation.tokenizer, chunk, pairs, template, **settings)
    seconds = Stopwatch.now() - start
    run = {"inputs": patch.provenance.get("inputs"), "fitted": patch.provenance["settings"]["pairs"]}
    run |= {"seconds": seconds, "seconds_by_part": patch.provenance["seconds"]}
    scored = evaluation.score(patch)
    return patch, run | {key: value for key, value in scored.items() if key != "perplexity_windows"}


def word_case(task: str, seed: int, test: int, max_new_tokens: int) -> Case:
    """Ten demonstrations of a word task, its test words, and the inputs that the other recipes fit."""
    own = load_split(task, seed, fit=GIVEN, test=test)

    def judge(item: Mapping[str, str]) -> dict[str, bool]:
        return {run: item[run].strip() == item["reference"].strip() for run in RUNS}

    template = PromptTemplate(TEMPLATE)
    return Case("word task", own.name, own.instruction, template, own.test, max_new_tokens, judge, own.fit, {})


def message_case(entry: Mapping[str, str], seed: int, test: int, max_new_tokens: int) -> Case:
    """A system message with its rule, if it has one, and the questions that its own recipe tests it with."""
    general = [pair["input"] for pair in load_pairs(FOLDER / "questions.json")]
    topic = [pair["input"] for pair in load_pairs(FOLDER / f"{entry['topic']}.json")] if "topic" in entry else []
    _, tested = split(general, topic, 0, test, seed)
    rule = RULES.get(entry["name"])

    def judge(item: Mapping[str, str]) -> dict[str, bool]:
        assert rule is not None
        wanted = not topic or item["input"] in topic
        return {run: rule(item[run]) == wanted for run in RUNS}

    pairs = [{"input": text} for text in tested]
    template = PromptTemplate.chat()
    name, chunk = entry["name"], entry["instruction"]
    return Case("system prompt", name, chunk, template, pairs, max_new_tokens, judge if rule else None, [], {})


def document_case(own: Document, max_new_tokens: int, settings: Mapping[str, Any]) -> Case:
    """A document, and the questions about it that were worded by hand; what is fitted is twice as long as what is
    tested, at most."""
    accepted = {row["input"]: row["outputs"] for row in own.questions}

    def judge(item: Mapping[str, str]) -> dict[str, bool]:
        return {run: contains(item[run], accepted[item["input"]]) for run in RUNS}

    how = {"kind": "document", "max_new_tokens": 2 * max_new_tokens, **settings}
    tested = [{"input": text} for text in accepted]
    return Case("document", own.name, own.chunk, PromptTemplate.chat(), tested, max_new_tokens, judge, [], how)


def right(case: Case, items: Sequence[Mapping[str, str]]) -> dict[str, int] | None:
    """How many outputs of each run are right."""
    if case.judge is None:
        return None
    found = [case.judge(item) for item in items]
    return {run: sum(own[run] for own in found) for run in RUNS}


def _row(run: Mapping[str, Any]) -> list[Any]:
    kl = run["output_kl"]
    counts = run["right"]
    share = None if not counts or not counts["instructed"] else counts["patched"] / counts["instructed"]
    cells = [f"{run['name']}, seed {run['seed']}, {run['fit']}", run["fitted"]]
    cells += [None if counts is None else counts[which] for which in RUNS]
    cells.append(None if share is None else f"{share:.2f}")
    cells += [
        f"{run['fidelity']:.2f}",
        f"{kl['plain']:.3f}",
        f"{kl['patched']:.3f}",
        nearer(kl),
    ]
    cells += [*own_text_cells(run), f"{run['seconds_by_part'].get('write', 0):.0f}"]
    return [*cells, f"{run['seconds']:.0f}"]


def own_text_cells(run: Mapping[str, Any]) -> list[str | None]:
    """What a run's record says of the patched model's own text, and of unrelated text, under :data:`OWN_TEXT_HEAD`."""
    own, ratio = run["own_text"], run["perplexity_ratio"]
    pairs = [own[name][which] for name in ("repetition", "length") for which in ("instructed", "patched")]
    known = [(own["kl"], 3), *((value, 2) for value in pairs), (ratio, 4)]
    return [None if value is None else f"{value:.{digits}f}" for value, digits in known]


OWN_TEXT_HEAD = ["KL along its own text", "repetition, instructed", "patched", "tokens, instructed", "patched"]
OWN_TEXT_HEAD += ["unrelated perplexity ×"]
HEAD = ["chunk", "pairs", "right: plain", "instructed", "patched", "patched ÷ instructed", "same output"]
HEAD += ["KL, plain", "patched", "down by", *OWN_TEXT_HEAD, "seconds: writing", "all"]


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
        text += f"; patched ÷ instructed right {mean(ratios):.3f} on average, {min(ratios):.2f} at least"
    worst = [run["perplexity_ratio"] for run in runs if run["perplexity_ratio"] is not None]
    return text + (f"; perplexity × {mean(worst):.4f} on average, {max(worst):.4f} at most" if worst else "")


if __name__ == "__main__":
    command_line(instruction_alone)
