"""Documents become adapters: a passage in the prompt, and the same model that knows it without.

    python -m recipes.tasks.document --config recipes/tasks/document.yaml

The chunk is a passage, most of them about things that do not exist, so that no model knows the answers. The model
itself writes questions about it, sentence by sentence, and answers them with the passage in front of it (self-study,
in self_study.py); the patch is fitted to these. It is tested on other questions, worded by hand: how many answers
contain an accepted form, token F1 against it, and the divergence from the instructed model along its own answers. The
measure is patched ÷ instructed right answers, over the rank, the number of questions and the length of the passage.
The analysis says which questions go wrong: whether self-study covered the fact, where in the answer the distributions
differ, and what other settings do. Writes a Markdown and a JSON table and an SVG.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import torch
from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation, batch_logits, output_batches, unrelated_perplexity
from lit_thought.patch.results import RUNS
from lit_thought.prompts.batches import PairBatch
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.runs.generate import generate
from lit_thought.solve.intervals import perplexity_ratio
from recipes.harness import provenance, shown, write_results
from recipes.tasks import document_tables as tables
from recipes.tasks.self_study import Document, contains, coverage, load_document, recite, requests, write_questions
from recipes.tasks.system_prompt import Divergence, by_place, divergence

TEMPLATE = PromptTemplate.chat()
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
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
    """A document, pairs about it to fit to, and the plain and the instructed answers to the tested questions.

    The pairs have the model's own answers: to questions that it wrote, to given ones, and to other requests.
    """

    document: Document
    tokens: int
    studied: list[dict[str, str]]
    given: list[dict[str, str]]
    requests: list[dict[str, str]]
    evaluation: Evaluation
    batches: list[tuple[PairBatch, Tensor]]
    wanted: list[Tensor]
    plain: Divergence


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
    """Fit and test every document.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory; a chat model.
        documents: names below recipes/data/documents, or JSON files of that form.
        source: what to fit to: questions that the model writes, those given in the documents, or both.
        questions: how many it writes about each, at most.
        seed: seed of what is sampled.
        rank: rank of the adapters.
        ridge: λ.
        preserve_weight: ρ, weight of unrelated text.
        answer_weight: weight of the answer's tokens and the token before them.
        max_new_tokens: longest answer to a question.
        request_tokens: longest answer to a request such as "Tell me about …".
        unrelated_windows: windows of 512 tokens of unrelated text whose perplexity is measured.
        ranks: other ranks, for the curve.
        counts: other numbers of questions, for the curve.
        curved: which of the documents these are tried on.
        analysed: which of the documents the variants are tried on.
        variants: which of document.VARIANTS to try.
        samples: tested questions of each document whose answers are shown.
        out: path of the result files, without suffix.
    """
    chosen = check(documents, {"curved": curved, "analysed": analysed}, variants, source)
    settings: dict[str, Any] = {"source": source, "questions": questions, "rank": rank, "ridge": ridge}
    settings |= {"preserve_weight": preserve_weight, "answer_weight": answer_weight}
    curves = [("rank", value) for value in ranks] + [("questions", value) for value in counts]
    lm, tokenizer = load_model(model)
    windows = text_windows(tokenizer, load_texts("default", "evaluate", "unrelated"), 512)[:unrelated_windows]
    original = unrelated_perplexity(lm, windows)
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
            pairs, arguments = study(lm, tokenizer, task, setting, max_new_tokens)
            patch = transmute(lm, tokenizer, own.chunk, pairs, TEMPLATE, progress=False, **arguments)
            run = {"document": own.name, "passage_tokens": task.tokens, "variant": name, "curve": curve}
            run |= {"changes": changes, "rank": setting["rank"], "questions": setting["questions"], "pairs": len(pairs)}
            run |= score(lm, tokenizer, task, patch, windows, original)
            runs.append({**run, **report(task, pairs, run["texts"])})
            print(tables.progress(runs[-1]), flush=True)
    settings |= {"seed": seed, "max_new_tokens": max_new_tokens, "request_tokens": request_tokens}
    record = {"model": shown(model), "settings": settings, **provenance()}
    record |= {"unrelated_perplexity": original, "runs": runs}
    where = f"{shown(model)}, commit {record['commit']}"
    page = f"`python -m recipes.tasks.document` on {where}; settings: `{json.dumps(settings)}`\n\n"
    tables.draw(runs, Path(out).with_suffix(".svg"))
    write_results(out, page + tables.page(runs, samples, Path(out).name), record)


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
    given = {**{argument: (part, names) for argument, part in parts.items()}, "variants": (variants, list(VARIANTS))}
    for argument, (part, known) in given.items():
        unknown = sorted(set(part) - set(known))
        if unknown:
            raise ThoughtError(f"{argument}: expected some of {', '.join(known)}; got {unknown}; correct the names.")
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
    asked = write_questions(model, tokenizer, own, questions, seed) if questions else []
    evaluation = Evaluation(
        model,
        tokenizer,
        instruction=own.chunk,
        pairs=[{"input": row["input"]} for row in own.questions],
        template=TEMPLATE,
        unrelated=None,
        max_new_tokens=max_new_tokens,
        batch_size=8,
        progress=False,
    )
    batches = output_batches(tokenizer, evaluation.completed, evaluation.instructions, evaluation.batch_size)
    wanted = answer_logits(model, batches, "target")
    return Task(
        own,
        len(tokenizer(own.passage)["input_ids"]),
        answer(model, tokenizer, own.chunk, asked, max_new_tokens),
        answer(model, tokenizer, own.chunk, own.given, max_new_tokens),
        answer(model, tokenizer, own.chunk, requests(own), request_tokens),
        evaluation,
        batches,
        wanted,
        divergence(wanted, answer_logits(model, batches, "plain")),
    )


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Mapping[str, Any],
    max_new_tokens: int,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The pairs that a setting asks for, and what is left of it for ``transmute``."""
    arguments = dict(settings)
    source, count = arguments.pop("source"), arguments.pop("questions")
    sampled, requested = arguments.pop("sampled", 0), arguments.pop("requests", True)
    recited = recite(task.document) if arguments.pop("recited", True) else []
    pairs = task.studied[:count] if source != "given" else []
    if source != "self-study":
        pairs = pairs + task.given
    if sampled:
        inputs = [pair["input"] for pair in pairs]
        pairs = answer(model, tokenizer, task.document.chunk, inputs, max_new_tokens, sampled)
    return pairs + recited + (task.requests if requested else []), arguments


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunk: str,
    inputs: Sequence[str],
    max_new_tokens: int,
    sampled: int = 0,
) -> list[dict[str, str]]:
    """Pairs of the inputs and the instructed model's answers: the greedy one, or ``sampled`` drawn ones each."""
    if not inputs:
        return []
    inputs = [*inputs] * max(sampled, 1)
    prompts = [TEMPLATE.tokenise(tokenizer, chunk, text).instructed_ids for text in inputs]
    written = generate(
        *(model, tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        options=SAMPLED if sampled else None,
        keep_special=True,
    )
    return [{"input": text, "output": own.text} for text, own in zip(inputs, written, strict=True)]


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, batches: Sequence[tuple[PairBatch, Tensor]], side: Literal["plain", "target"]
) -> list[Tensor]:
    """Logits of one run at the tokens that predict each answer and its end, (n, vocabulary) each.

    Args:
        model: the model as it is now.
        batches: completed pairs, from ``output_batches``; the answers are in their order.
        side: which of the two runs.
    """
    logits: list[Tensor] = []
    leads: dict[int, Any] = {}
    for batch, weights in batches:
        every = batch_logits(model, batch, side, leads)
        owners = batch.plain_rows // batch.plain.ids.shape[1] if batch.plain is not None else weights.new_zeros(0)
        for owner in owners[weights > 0].unique():
            logits.append(every[(owners == owner) & (weights > 0)])
    return logits


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    patch: ThoughtPatch,
    windows: Sequence[Sequence[int]],
    original: float,
) -> dict[str, Any]:
    """The patched model's answers, its divergence from the instructed one, and its perplexity on unrelated text."""
    own = task.evaluation
    with patch.applied(model):
        prompts = [prompt.plain_ids for prompt in own.prompts]
        written = generate(model, tokenizer, prompts, max_new_tokens=own.max_new_tokens, keep_special=True)
        found = {"plain": task.plain, "patched": divergence(task.wanted, answer_logits(model, task.batches, "plain"))}
        perplexity = unrelated_perplexity(model, windows)
    texts = {"plain": own.plain, "instructed": own.instructed, "patched": written}
    kl = {run: float(torch.cat(those.kl).mean()) for run, those in found.items()}
    return {
        "texts": {run: [text.text for text in texts[run]] for run in RUNS},
        "output_kl": kl,
        "output_kl_interval": {run: mean_interval(those.kl) for run, those in found.items()},
        "output_agreement": {run: float(torch.cat(those.agrees).mean()) for run, those in found.items()},
        "output_kl_by_place": {run: by_place(those.kl) for run, those in found.items()},
        "perplexity_ratio": perplexity / original,
    }


def mean_interval(values: Sequence[Tensor]) -> tuple[float, float]:
    """Of the mean over all answers' tokens, answers drawn anew: a mean KL is the log of a ratio of perplexities."""
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
    jsonargparse.auto_cli(document)
