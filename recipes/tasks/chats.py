"""What the recipes on chat models share: a chunk, the answers with and without it, and how far a patch is from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.evaluation.metrics import token_kl
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.runs.generate import generate
from recipes.harness import Unrelated, table

TEMPLATE = PromptTemplate.chat()
SAMPLED = {"do_sample": True}
PLACES = ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32), (32, None))
"""Parts of an answer, in tokens, whose divergence is shown apart."""


class Divergence(NamedTuple):
    """Of each tested answer, at each token that predicts a token of it: KL from the instructed run, in nats, and
    whether the likeliest token is the same."""

    kl: list[Tensor]
    agrees: list[Tensor]

    @property
    def means(self) -> dict[str, float]:
        """KL and agreement over all answers' tokens."""
        return {"kl": float(torch.cat(self.kl).mean()), "agreement": float(torch.cat(self.agrees).mean())}


class Chat:
    """A chunk before questions, and how the plain and the instructed model answer those to test with.

    Args:
        model: a chat model.
        tokenizer: its tokenizer.
        chunk: the instruction.
        tested: questions to test with.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chunk: str,
        tested: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.chunk, self.max_new_tokens = model, tokenizer, chunk, max_new_tokens
        self.evaluation = Evaluation(
            *(model, tokenizer),
            instruction=chunk,
            pairs=[{"input": question} for question in tested],
            template=TEMPLATE,
            unrelated=None,
            max_new_tokens=max_new_tokens,
            progress=False,
        )
        self.wanted = answer_logits(model, self.evaluation.completed, instructed=True)
        self.plain = self.divergence()

    def answer(self, questions: Sequence[str], length: int | None = None, sampled: int = 0) -> list[dict[str, str]]:
        """Pairs of the questions and the instructed model's answers: the greedy one, or ``sampled`` drawn ones each.

        Args:
            questions: the inputs.
            length: longest answer, if not that of the tested ones.
            sampled: answers to draw for each question; 0 for the greedy one.
        """
        inputs = [*questions] * max(sampled, 1)
        prompts = [TEMPLATE.tokenise(self.tokenizer, self.chunk, text).instructed_ids for text in inputs]
        texts = self._generate(prompts, length, SAMPLED if sampled else None) if prompts else []
        return [{"input": question, "output": text} for question, text in zip(inputs, texts, strict=True)]

    def written(self) -> list[str]:
        """What the model, as it is now, answers to the tested questions without the chunk."""
        return self._generate([prompt.plain_ids for prompt in self.evaluation.prompts])

    def _generate(
        self, prompts: list[Sequence[int]], length: int | None = None, options: dict[str, Any] | None = None
    ) -> list[str]:
        length = self.max_new_tokens if length is None else length
        common: dict[str, Any] = {"max_new_tokens": length, "options": options, "keep_special": True}
        return [one.text for one in generate(self.model, self.tokenizer, prompts, **common)]

    def fit(self, pairs: Sequence[Mapping[str, str]], **settings: Any) -> ThoughtPatch:
        """The patch of the chunk, fitted to these pairs."""
        return transmute(self.model, self.tokenizer, self.chunk, pairs, TEMPLATE, progress=False, **settings)

    def divergence(self) -> Divergence:
        """Of the model, as it is now, without the chunk, from the instructed run along its answers."""
        got = answer_logits(self.model, self.evaluation.completed)
        both = list(zip(self.wanted, got, strict=True))
        return Divergence([token_kl(a, b) for a, b in both], [(a.argmax(-1) == b.argmax(-1)).float() for a, b in both])

    def score(self, patch: ThoughtPatch, unrelated: Unrelated) -> tuple[dict[str, Any], Divergence]:
        """How close a patch comes to the instructed run along its answers, and what it does to unrelated text; and the
        first of these token by token."""
        with patch.applied(self.model):
            patched, ratio = self.divergence(), unrelated.ratio(self.model)
        found = {"plain": self.plain, "patched": patched}
        scores = {
            "output_kl": {run: own.means["kl"] for run, own in found.items()},
            "output_agreement": {run: own.means["agreement"] for run, own in found.items()},
            "output_kl_by_place": {run: by_place(own.kl) for run, own in found.items()},
            "perplexity_ratio": ratio,
        }
        return scores, patched


@torch.no_grad()
def answer_logits(model: PreTrainedModel, pairs: Sequence[TokenisedPair], instructed: bool = False) -> list[Tensor]:
    """Logits at the tokens of one run that predict the answer's tokens and what follows them, (n, vocabulary) each."""
    logits = []
    for pair in pairs:
        start, stop = pair.output_span
        places = list(range(start - 1, stop))
        if instructed:
            counterpart = dict(zip(pair.plain_positions, pair.instructed_positions, strict=True))
            places = [counterpart[place] for place in places]
        ids = torch.tensor([pair.instructed_ids if instructed else pair.plain_ids], device=model.device)
        logits.append(model(ids, use_cache=False).logits[0, places])
    return logits


def by_place(values: Sequence[Tensor]) -> list[float | None]:
    """Means over the answers' tokens in each of :data:`PLACES`; None where no answer is as long."""
    parts = [torch.cat([own[start:stop] for own in values]) for start, stop in PLACES]
    return [float(part.mean()) if len(part) else None for part in parts]


def place_table(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    """KL along the answer, by token, of runs with a name under the key ``name``."""
    places = [f"{start + 1}" if stop == start + 1 else f"{start + 1}–{stop or ''}" for start, stop in PLACES]
    rows = [
        [f"{run[name]}, {which}", *(None if value is None else f"{value:.3f}" for value in values)]
        for run in runs
        for which, values in run["output_kl_by_place"].items()
    ]
    return table(["KL at the answer's tokens", *places], rows)
