"""What the studies make into weights: a chunk by its name, what it is tested with, and when an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.inputs.write import write_pairs
from lit_thought.patch.results import RUNS
from lit_thought.prompts.pairs import load_pairs
from lit_thought.timing import Stopwatch
from recipes.chunks import documents, long_prompts, system_prompts
from recipes.chunks.rules import RULES, contains
from recipes.harness import SIX_TASKS, TEMPLATE, check_names, load_split

GIVEN = 30
"""Inputs of the fit beside which a word task's stands."""


class Case(NamedTuple):
    """A chunk, what to test it with, and when an output is right, given an item of ``evaluate`` and the output: None
    for an item that this does not say anything about; no function where it never can be told."""

    door: str
    name: str
    chunk: str
    template: PromptTemplate
    tested: list[dict[str, str]]
    max_new_tokens: int
    judge: Callable[[Mapping[str, str], str], bool | None] | None
    given: list[dict[str, str]]
    settings: dict[str, Any]

    @property
    def fit_template(self) -> PromptTemplate | None:
        """The template of the fit, None where it is left to the library: all but a word task's and a document's."""
        return None if self.door == "system prompt" else self.template


def known_chunks(chunks: Sequence[str]) -> None:
    """Refuse names that :func:`case_of` does not know."""
    known = [*SIX_TASKS, *system_prompts.instructions_known()]
    known += [file.stem for folder in (long_prompts.FOLDER, documents.FOLDER) for file in folder.glob("*.json")]
    check_names("chunks", chunks, known)


def case_of(name: str, seed: int) -> Case:
    """A chunk by its name, with what it is tested with."""
    if name in SIX_TASKS:
        return word_case(name, seed, 50, 12)
    if name in (known := system_prompts.instructions_known()):
        return message_case(known[name], seed, 20, 48)
    if (long_prompts.FOLDER / f"{name}.json").is_file():
        own = long_prompts.load_prompt(name)
        return prompt_case(own.name, own.chunk, [row["input"] for row in own.messages], 48)
    return document_case(documents.load_document(name), 24, {})


def word_case(task: str, seed: int, test: int, max_new_tokens: int) -> Case:
    """Ten demonstrations of a word task, its test words, and the inputs that the other recipes fit."""
    own = load_split(task, seed, fit=GIVEN, test=test)

    def judge(item: Mapping[str, str], output: str) -> bool:
        return output.strip() == item["reference"].strip()

    template = PromptTemplate(TEMPLATE)
    return Case("word task", own.name, own.instruction, template, own.test, max_new_tokens, judge, own.fit, {})


def message_case(entry: Mapping[str, str], seed: int, test: int, max_new_tokens: int, fit: int = 0) -> Case:
    """A system message with its rule, if it has one, and questions to test it with; ``fit`` others may be given."""
    folder = system_prompts.FOLDER
    general = [pair["input"] for pair in load_pairs(folder / "questions.json")]
    topic = [pair["input"] for pair in load_pairs(folder / f"{entry['topic']}.json")] if "topic" in entry else []
    fitted, tested = system_prompts.split(general, topic, fit, test, seed)
    rule = RULES.get(entry["name"])

    def judge(item: Mapping[str, str], output: str) -> bool | None:
        assert rule is not None
        return rule(output) if not topic or item["input"] in topic else None

    case = prompt_case(entry["name"], entry["instruction"], tested, max_new_tokens)
    return case._replace(judge=judge if rule else None, given=[{"input": text} for text in fitted])


def prompt_case(name: str, chunk: str, messages: Sequence[str], max_new_tokens: int) -> Case:
    """A system message whose answers no rule judges, and messages to test it with."""
    tested = [{"input": text} for text in messages]
    return Case("system prompt", name, chunk, PromptTemplate.chat(), tested, max_new_tokens, None, [], {})


def document_case(own: documents.Document, max_new_tokens: int, settings: Mapping[str, Any]) -> Case:
    """A document, and the questions about it that were worded by hand; the answers that are fitted are twice as long as
    those that are tested, at most."""
    accepted = {row["input"]: row["outputs"] for row in own.questions}

    def judge(item: Mapping[str, str], output: str) -> bool:
        return contains(output, accepted[item["input"]])

    how = {"kind": "document", "max_new_tokens": 2 * max_new_tokens, **settings}
    tested = [{"input": text} for text in accepted]
    given = [{"input": text} for text in own.given]
    return Case("document", own.name, own.chunk, PromptTemplate.chat(), tested, max_new_tokens, judge, given, how)


def evaluation_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Case, unrelated: bool = True, **options: Any
) -> Evaluation:
    """The plain and the instructed outputs of what a chunk is tested with."""
    return Evaluation(
        *(model, tokenizer),
        instruction=case.chunk,
        pairs=case.tested,
        template=case.template,
        max_new_tokens=case.max_new_tokens,
        unrelated="default" if unrelated else None,
        perplexity_interval=None,  # so that the ratios of two patches are of the same windows
        progress=False,
        **options,
    )


def fit_case(
    evaluation: Evaluation, case: Case, pairs: Sequence[Mapping[str, str]] | None, **changes: Any
) -> tuple[ThoughtPatch, dict[str, Any]]:
    """A chunk's patch, fitted to these pairs in the usual way but for the changes, with what it was fitted to, its
    seconds and its evaluation, as a record keeps them. Where the model writes the inputs, what is tested are validation
    pairs, so that it writes none of it; the seconds are those without validation."""
    apart = {"val_pairs": case.tested} if pairs is None or "inputs" in changes else {}
    settings = {"progress": False, **apart, **case.settings, **changes}
    start = Stopwatch.now()
    patch = transmute(evaluation.model, evaluation.tokenizer, case.chunk, pairs, case.fit_template, **settings)
    parts = dict(patch.provenance["seconds"])
    seconds = Stopwatch.now() - start - parts.pop("validate", 0.0)
    run = {"inputs": patch.provenance.get("inputs"), "fitted": patch.provenance["settings"]["pairs"]}
    run |= {"seconds": seconds, "seconds_by_part": parts}
    scored = evaluation.score(patch)
    return patch, run | {key: value for key, value in scored.items() if key != "perplexity_windows"}


def fit_in_parts(
    evaluation: Evaluation, case: Case, count: int, seed: int, **changes: Any
) -> tuple[ThoughtPatch, dict[str, Any]]:
    """The same of a document that is cut into parts at its paragraphs: each part is written about, and stands before
    what was written about it, alone; the statistics of all of them are added."""
    start = Stopwatch.now()
    pairs = [
        {**pair, "instruction": part}
        for part in documents.cut(case.chunk, count)
        for pair in write_pairs(
            *(evaluation.model, evaluation.tokenizer, part, case.template),
            kind="document",
            apart=case.tested,
            seed=seed,
        ).pairs
    ]
    writing = Stopwatch.now() - start
    patch, run = fit_case(evaluation, case, pairs, seed=seed, **changes)
    by_part = {**run["seconds_by_part"], "write": writing}
    return patch, run | {"seconds": writing + run["seconds"], "seconds_by_part": by_part}


def right(case: Case, items: Sequence[Mapping[str, str]]) -> dict[str, int] | None:
    """Of how many outputs it can be told (``of``), how many of each run are right, and how many of the patched ones
    where the instructed one is (``kept``)."""
    if case.judge is None:
        return None
    judged = [found for item in items if None not in (found := [case.judge(item, item[run]) for run in RUNS])]
    counts = {run: sum(map(bool, hits)) for run, hits in zip(RUNS, zip(*judged, strict=True), strict=False)}
    kept = sum(bool(instructed and patched) for _, instructed, patched in judged)
    return {"of": len(judged), **dict.fromkeys(RUNS, 0), **counts, "kept": kept}
