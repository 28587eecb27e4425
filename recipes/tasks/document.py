"""Documents become adapters: a passage in the prompt, and the same model that knows it without.

    python -m recipes.tasks.document --config recipes/tasks/document.yaml

The chunk is a passage, most of them about things that do not exist, so that no model knows the answers. The model
itself writes questions about it and answers them with the passage in front of it (self-study, as
``lit_thought.inputs.study`` has it); the patch is fitted to these. It is tested on other questions, worded by hand: how
many answers contain an accepted form, token F1 against it, and the divergence from the instructed model along its own
answers. The measure is patched ÷ instructed right answers, over the rank, the number of questions and the length of the
passage. The analysis says which questions go wrong: whether self-study covered the fact, where in the answer the
distributions differ, and what other settings do. Writes a Markdown and a JSON table and an SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import ThoughtPatch, load_model
from lit_thought.errors import ThoughtError
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.inputs.study import REQUESTS, recited, write_questions
from lit_thought.patch.results import RUNS
from lit_thought.solve.intervals import perplexity_ratio
from recipes.harness import Unrelated, check_names, command_line, shown, write_results
from recipes.tasks import document_tables as tables
from recipes.tasks.chats import TEMPLATE, Chat
from recipes.tasks.document_data import Document, contains, coverage, load_document

VARIANTS: dict[str, dict[str, Any]] = {
    "given questions": {"source": "given"},
    "given and self-study questions": {"source": "both"},
    "no requests besides questions": {"requests": False},
    "passage not recited": {"recited": False},
    "two sampled answers to each question": {"sampled": 2},
    "answer weight 1": {"answer_weight": 1.0},
    "answer weight 30": {"answer_weight": 30.0},
    "ridge 0.0003": {"ridge": 0.0003},
    "ridge 0.01": {"ridge": 0.01},
    "ridge 0.1": {"ridge": 0.1},
    "nothing preserved": {"preserve": None},
    "preservation weight 3": {"preserve_weight": 3.0},
    "attn_out alone": {"sites": ("attn_out",)},
    "mlp_out alone": {"sites": ("mlp_out",)},
    "two steps": {"steps": 2},
    "ranks by energy": {"rank": 0.9},
    "full rank": {"rank": None},
}
"""Changes of the setting that the analysis tries: of ``transmute``'s arguments and of what is fitted to."""


class Task(NamedTuple):
    """A document, and pairs about it to fit to, with the model's own answers: to questions that it wrote, to given
    ones, and to other requests."""

    document: Document
    tokens: int
    chat: Chat
    studied: list[dict[str, str]]
    given: list[dict[str, str]]
    requests: list[dict[str, str]]


def document(
    model: str = "smollm2",
    documents: Sequence[str] = ("brindlemark", "velmora", "quillow", "great_fire", "harrowick", "kestrel_station"),
    source: Literal["self-study", "given", "both"] = "self-study",
    questions: int = 80,
    seed: int = 0,
    rank: int = 64,
    ridge: float = 0.001,
    preserve_weight: float = 0.3,
    answer_weight: float = 10.0,
    max_new_tokens: int = 24,
    request_tokens: int = 96,
    unrelated_windows: int = 2,
    ranks: Sequence[int] = (8, 16, 32),
    counts: Sequence[int] = (10, 30),
    curved: Sequence[str] = ("velmora", "harrowick"),
    analysed: Sequence[str] = ("harrowick",),
    variants: Sequence[str] = tuple(name for name, changes in VARIANTS.items() if "source" not in changes),
    samples: int = 3,
    out: str = "recipes/results/document",
) -> None:
    """Fit and test every document."""
    chosen = check(documents, {"curved": curved, "analysed": analysed}, variants, source)
    settings: dict[str, Any] = {"source": source, "questions": questions, "rank": rank, "ridge": ridge}
    settings |= {"preserve_weight": preserve_weight, "answer_weight": answer_weight}
    curves = [("rank", value) for value in ranks] + [("questions", value) for value in counts]
    lm, tokenizer = load_model(model)
    unrelated = Unrelated(lm, tokenizer, unrelated_windows)
    runs = []
    for own in chosen:
        tried: list[tuple[str, str | None, dict[str, Any]]] = [(tables.AS_SET, None, {})]
        tried += [(f"{name} {value}", name, {name: value}) for name, value in curves if own.name in curved]
        tried += [(name, None, VARIANTS[name]) for name in variants if own.name in analysed]
        given_alone = all({**settings, **changes}["source"] == "given" for _, _, changes in tried)
        most = 0 if given_alone else max(questions, *(counts if own.name in curved else ()), 0)
        task = prepare(lm, tokenizer, own, most, seed, max_new_tokens, request_tokens)
        for name, curve, changes in tried:
            setting = {**settings, **changes}
            pairs, arguments = study(task, setting)
            patch = task.chat.fit(pairs, **arguments)
            run = {"document": own.name, "passage_tokens": task.tokens, "variant": name, "curve": curve}
            run |= {"changes": changes, "rank": setting["rank"], "questions": setting["questions"], "pairs": len(pairs)}
            run |= score(task, patch, unrelated)
            runs.append({**run, **report(task, pairs, run["texts"])})
            print(tables.progress(runs[-1]), flush=True)
    settings |= {"seed": seed, "max_new_tokens": max_new_tokens, "request_tokens": request_tokens}
    record = {"model": shown(model), "settings": settings, "unrelated_perplexity": unrelated.perplexity, "runs": runs}
    tables.draw(runs, out)
    write_results(__file__, out, tables.page(runs, samples, Path(out).name), record)


def check(
    documents: Sequence[str], parts: Mapping[str, Sequence[str]], variants: Sequence[str], source: str
) -> list[Document]:
    """Read the documents; names that stand for nothing, and given questions that are not there, are refused.

    Args:
        documents: their names.
        parts: arguments that name some of them: ``curved`` and ``analysed``.
        variants: names in :data:`VARIANTS`.
        source: what to fit to.

    Raises:
        ThoughtError: A name is unknown, or a document lacks given questions.
    """
    chosen = [load_document(name) for name in documents]
    names = [own.name for own in chosen]
    if not chosen or len(set(names)) < len(names):
        raise ThoughtError(f"documents: expected at least one, each once; got {list(documents)}; correct the list.")
    for argument, part in parts.items():
        check_names(argument, part, names)
    check_names("variants", variants, VARIANTS)
    for own in chosen:
        if len(own.questions) < 2:
            raise ThoughtError(
                f"documents: {own.name} has {len(own.questions)} questions to test with; give two or more."
            )
        tried = [VARIANTS[name].get("source", source) for name in variants if own.name in parts["analysed"]]
        if not own.given and {source, *tried} != {"self-study"}:
            raise ThoughtError(
                f"documents: {own.name} has no given questions to fit on (the key fit), which source or variants ask "
                "for; add some, or leave out what asks for them."
            )
    return chosen


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own: Document,
    questions: int,
    seed: int,
    max_new_tokens: int,
    request_tokens: int,
) -> Task:
    """Let the model study a document, and answer the questions to test with as the plain and the instructed run."""
    pen, taken = Pen(model, tokenizer, seed), Distinct(row["input"] for row in own.questions)
    asked = write_questions(pen, TEMPLATE, own.chunk, own.title, questions, taken) if questions else []
    chat = Chat(model, tokenizer, own.chunk, [row["input"] for row in own.questions], max_new_tokens)
    answers = (chat.answer(asked), chat.answer(own.given), chat.answer(requests(own), request_tokens))
    return Task(own, len(tokenizer(own.passage)["input_ids"]), chat, *answers)


def study(task: Task, settings: Mapping[str, Any]) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The pairs that a setting asks for, and what is left of it for ``transmute``."""
    arguments = dict(settings)
    source, count = arguments.pop("source"), arguments.pop("questions")
    sampled, requested = arguments.pop("sampled", 0), arguments.pop("requests", True)
    told = recited(task.document.passage, task.document.title) if arguments.pop("recited", True) else []
    pairs = task.studied[:count] if source != "given" else []
    if source != "self-study":
        pairs = pairs + task.given
    if sampled:
        pairs = task.chat.answer([pair["input"] for pair in pairs], sampled=sampled)
    return pairs + told + (task.requests if requested else []), arguments


def requests(own: Document) -> list[str]:
    """Inputs about the whole of a document."""
    return [form.format(subject=own.title) for form in REQUESTS]


def score(task: Task, patch: ThoughtPatch, unrelated: Unrelated) -> dict[str, Any]:
    """The patched model's answers, its divergence from the instructed one, and its perplexity on unrelated text."""
    chat, known = task.chat, task.chat.evaluation
    scored, patched = chat.score(patch, unrelated)
    with patch.applied(chat.model):
        written = chat.written()
    intervals = {"plain": mean_interval(chat.plain.kl), "patched": mean_interval(patched.kl)}
    texts = {"plain": [one.text for one in known.plain], "instructed": [one.text for one in known.instructed]}
    return {"texts": {**texts, "patched": written}, **scored, "output_kl_interval": intervals}


def mean_interval(values: Sequence[Tensor]) -> tuple[float, float]:
    """Of the mean over all tokens, of answers as a sample: a mean KL is the log of a ratio of perplexities."""
    sums = [float(own.double().sum()) for own in values]
    _, low, high = perplexity_ratio([0.0] * len(sums), sums, [len(own) for own in values])
    return math.log(low), math.log(high)


def report(task: Task, pairs: Sequence[Mapping[str, str]], texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Which answers hold an accepted form, which facts stand in the answers to fitted questions, and token F1."""
    rows = task.document.questions
    others = requests(task.document)
    learnt = [pair["output"] for pair in pairs if pair["input"] not in others]
    right = {run: [contains(text, row["outputs"]) for text, row in zip(texts[run], rows, strict=True)] for run in RUNS}
    count = {run: sum(right[run]) for run in RUNS}
    return {
        "asked": [row["input"] for row in rows],
        "right": right,
        "ratio": count["patched"] / count["instructed"] if count["instructed"] else None,
        "coverage": coverage(rows, learnt),
        "f1": {run: token_f1(texts[run], [row["outputs"] for row in rows]) for run in RUNS},
    }


def token_f1(texts: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Mean SQuAD F1 of each text against the accepted form nearest to it, in [0, 1]."""
    given = [{"id": str(i), "prediction_text": text} for i, text in enumerate(texts)]
    wanted = [
        {"id": str(i), "answers": {"text": list(forms), "answer_start": [0] * len(forms)}}
        for i, forms in enumerate(accepted)
    ]
    return float(squad(given, wanted)["f1"]) / 100


if __name__ == "__main__":
    command_line(document)
