"""Is a patched model still a good model? What it does with all that its patch is not about.

    python -m recipes.studies.side_effects --config recipes/studies/side_effects.yaml

A patch is fitted on each chunk alone. Then plain and patched model get prompts of five kinds that have nothing to do
with it: sums, common knowledge, questions under another system message, other languages, code. Reported is how often
the patched model's likeliest token is the one that the original wrote, along the original's greedy answers, how many
whole answers are the same, and how many sums and facts are right before and after. Beside it stands the original with
the chunk in its prompt, which is no more than asked of it either: what the chunk itself changes. With several weights
of the preserved text, the trade is drawn as a curve against nearness to the instructed model where the patch is meant
to work. Writes a Markdown and a JSON table, and a figure where there is a curve.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model
from lit_thought.errors import check_counts
from lit_thought.model.loading import evaluating
from lit_thought.prompts.batches import common_prefix
from lit_thought.prompts.pairs import load_pairs
from lit_thought.runs.generate import Generation, generate
from lit_thought.runs.streams import lead_cache
from recipes.chunks.cases import case_of, evaluation_of, fit_case, known_chunks
from recipes.chunks.rules import contains
from recipes.chunks.system_prompts import FOLDER, instructions_known
from recipes.harness import DATA, command_line, panels, save_figure, shown, table, write_results
from recipes.studies.distillation import last_logits

TEMPLATE = PromptTemplate.chat()
KINDS = ("sums", "knowledge", "other instructions", "languages", "code")
RUNS = ("instructed", "patched")
"""What is compared with the original: itself with the chunk in its prompt, and the patched model without it."""


class Prompt(NamedTuple):
    """A message, the system message before it, and the accepted answers, where there are such."""

    message: str
    system: str | None = None
    accepted: tuple[str, ...] = ()


def side_effects(
    model: str = "smollm2",
    dtype: str = "float32",
    chunks: Sequence[str] = ("common_words/antonym", "sentence", "vasparr"),
    preserve_weights: Sequence[float] = (),
    count: int = 100,
    answer_tokens: int = 32,
    fit: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str = "recipes/results/side_effects",
) -> None:
    """Fit every chunk, and compare the models on everything else."""
    check_counts(count=count, answer_tokens=answer_tokens)
    known_chunks(chunks)
    lm, tokenizer = load_model(model, dtype=dtype)
    runs: list[dict[str, Any]] = []
    settings = {
        "dtype": dtype,
        "chunks": list(chunks),
        "preserve_weights": list(preserve_weights),
        "count": count,
        "answer_tokens": answer_tokens,
    }
    settings |= {"fit": dict(fit or {}), "seed": seed}
    others: dict[str, Others] = {}
    for name in chunks:
        case = case_of(name, seed)
        prompts = {kind: unrelated(kind, name, count, seed) for kind in KINDS}
        for kind, own in prompts.items():
            if kind not in others or others[kind].prompts != own:
                others[kind] = Others(lm, tokenizer, own, answer_tokens)
        evaluation = evaluation_of(lm, tokenizer, case)
        instructed = {kind: others[kind].compared(case.chunk, None) for kind in KINDS}
        for weight in (None, *preserve_weights):
            how = {"seed": seed, "preserve_weight": weight, **settings["fit"]}
            patch, measured = fit_case(evaluation, case, None, **how)
            patched = {kind: others[kind].compared(None, patch) for kind in KINDS}
            kl = measured["output_kl"]
            runs.append(
                {
                    "chunk": name,
                    "preserve_weight": patch.provenance["settings"]["preserve_weight"],
                    "default": weight is None,
                    "down": 1 - kl["patched"] / kl["plain"],
                    "perplexity_ratio": measured["perplexity_ratio"],
                    "kinds": {kind: {"instructed": instructed[kind], "patched": patched[kind]} for kind in KINDS},
                }
            )
            write_results(__file__, out, _page(runs), {"model": shown(model), "settings": settings, "runs": runs})
    if preserve_weights:
        save_figure(_curve(runs), out)


def unrelated(kind: str, chunk: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of a kind, at most ``count``; those under other system messages leave out the chunk's own."""
    if kind == "sums":
        draw = random.Random(seed)
        numbers = [(draw.randint(2, 60), draw.randint(2, 60)) for _ in range(count)]
        return [Prompt(f"What is {a} + {b}?", None, (str(a + b),)) for a, b in numbers]
    if kind == "knowledge":
        capitals = load_pairs(DATA / "common_words" / "country-capital.json")
        places = json.loads((DATA / "landmarks.json").read_text(encoding="utf-8"))["landmarks"]["preserve"]
        found = [Prompt(f"What is the capital of {one['input']}?", None, (one["output"],)) for one in capitals]
        return [*found, *(Prompt(f"In which city is {place}?", None, (city,)) for place, city in places)][:count]
    if kind == "other instructions":
        systems = [own["instruction"] for name, own in instructions_known().items() if name != chunk]
        asked = [pair["input"] for pair in load_pairs(FOLDER / "questions.json")]
        return [Prompt(text, systems[i % len(systems)]) for i, text in enumerate(asked[:count])]
    texts = json.loads((DATA / "side_effects.json").read_text(encoding="utf-8"))[kind]
    return [Prompt(text) for text in texts[:count]]


class Others:
    """Prompts that no patch is about, and what the original answers.

    Args:
        model, tokenizer: the original.
        prompts: the prompts.
        answer_tokens: longest answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answer_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        self.answer_tokens = answer_tokens
        self.answers = self._answers(self._ids(None))

    def _ids(self, chunk: str | None) -> list[tuple[int, ...]]:
        """The prompts, with a chunk before their system messages."""
        systems = ["\n\n".join(filter(None, (chunk, own.system))) or None for own in self.prompts]
        return [
            TEMPLATE.conversation(self.tokenizer, system, [], own.message)
            for system, own in zip(systems, self.prompts, strict=True)
        ]

    def _answers(self, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        return generate(self.model, self.tokenizer, prompts, max_new_tokens=self.answer_tokens, keep_special=True)

    def agreement(self, chunk: str | None, patch: ThoughtPatch | None) -> float:
        """How often the likeliest token of the model with a chunk in its prompt, or patched, is the one that the
        original wrote, along its answers."""
        with self._changed(patch):
            return mean(self._hits(self._ids(chunk)))

    def compared(self, chunk: str | None, patch: ThoughtPatch | None) -> dict[str, Any]:
        """The model with a chunk in its prompt, or patched, against the original: :meth:`agreement`, ``same`` answers,
        and ``right`` ones, where that can be told, with those of the original (``right_before``)."""
        with self._changed(patch):
            answers = self._answers(self._ids(chunk))
        same = [own.tokens == before.tokens for own, before in zip(answers, self.answers, strict=True)]
        found = {"agreement": self.agreement(chunk, patch), "same": mean(same), "prompts": len(answers)}
        if self.prompts[0].accepted:
            for key, texts in (("right", answers), ("right_before", self.answers)):
                judged = [contains(one.text, own.accepted) for one, own in zip(texts, self.prompts, strict=True)]
                found[key] = mean(judged)
        return found

    @contextmanager
    def _changed(self, patch: ThoughtPatch | None) -> Iterator[None]:
        with evaluating(self.model), nullcontext() if patch is None else patch.applied(self.model):
            yield

    @torch.inference_mode()
    def _hits(self, prompts: Sequence[Sequence[int]], size: int = 8) -> Iterator[bool]:
        shared = common_prefix(prompts)
        lead = lead_cache(self.model, prompts[0][:shared]) if shared else None
        written = [answer.tokens for answer in self.answers]
        for first in range(0, len(prompts), size):
            answers = written[first : first + size]
            rows = zip(prompts[first : first + size], answers, strict=True)
            texts = [[*prompt, *answer[:-1]] for prompt, answer in rows]
            likeliest = last_logits(self.model, texts, [len(answer) for answer in answers], lead).argmax(-1)
            yield from (found == token for found, token in zip(likeliest.tolist(), chain(*answers), strict=True))


HEAD = ["chunk", "ρ", "nearer by", "unrelated ×", *KINDS, "mean"]


def _page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Agreement by kind, then whole answers and right ones."""
    lines = ["## Tokens that are the original's, along its own answers\n"]
    rows = []
    for run in runs:
        for which in RUNS:
            if which == "instructed" and not run["default"]:
                continue
            shares = [run["kinds"][kind][which]["agreement"] for kind in KINDS]
            cells = [f"{run['chunk']}, {which}", None, None, None]
            if which == "patched":
                cells[1:] = [f"{run['preserve_weight']:.2f}", f"{run['down']:.1%}", f"{run['perplexity_ratio']:.4f}"]
            rows.append([*cells, *(f"{share:.3f}" for share in [*shares, mean(shares)])])
    lines.append(table(HEAD, rows))
    patched = [run for run in runs if run["default"]]
    overall = mean(run["kinds"][kind]["patched"]["agreement"] for run in patched for kind in KINDS)
    lines.append(f"- patched, mean over chunks and kinds: {overall:.3f}\n")
    lines.append("## Whole answers, and right ones\n")
    head = ["chunk", *(f"the same: {kind}" for kind in KINDS)]
    head += [f"right: {kind}, {when}" for kind in KINDS[:2] for when in ("before", "after")]
    rows = []
    for run in patched:
        kinds = {kind: run["kinds"][kind]["patched"] for kind in KINDS}
        cells = [f"{kinds[kind]['same']:.2f}" for kind in KINDS]
        cells += [f"{kinds[kind][key]:.2f}" for kind in KINDS[:2] for key in ("right_before", "right")]
        rows.append([run["chunk"], *cells])
    return "\n".join([*lines, table(head, rows)])


def _curve(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Agreement on all else against nearness, by ρ, a line for each chunk."""
    figure, (axes,) = panels(1, 6, 4)
    for chunk in dict.fromkeys(run["chunk"] for run in runs):
        own = sorted((run for run in runs if run["chunk"] == chunk), key=lambda run: run["preserve_weight"])
        agreement = [mean(run["kinds"][kind]["patched"]["agreement"] for kind in KINDS) for run in own]
        axes.plot([run["down"] for run in own], agreement, "o-", label=chunk)
        for run, share in zip(own, agreement, strict=True):
            axes.annotate(f"ρ {run['preserve_weight']:.2g}", (run["down"], share), fontsize=7)
    axes.set_xlabel("KL to the instructed model, down by")
    axes.set_ylabel("tokens that stay the original's, elsewhere")
    axes.legend()
    return figure


if __name__ == "__main__":
    command_line(side_effects)
