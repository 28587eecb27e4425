"""What a patch does on pairs that are held back from a fit, and to unrelated text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import output_batches
from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.loading import context_window, evaluating
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import PAD, PairBatch, forward_inputs, pad
from lit_thought.prompts.unrelated import text_windows
from lit_thought.runs.logits import batch_logits, logit_parts

__all__ = ["HeldBack"]

_WINDOW, _WINDOWS = 128, 2
"""Tokens of a window of unrelated text, and how many of them."""


class HeldBack:
    """Held-back pairs, and what the instructed model makes of them; unrelated text, and what the original one does.

    Their logits are kept, of the tokens that predict the outputs in main memory, and of 256 tokens of text.

    Args:
        model: the model, without a patch.
        tokenizer: its tokenizer.
        pairs: the pairs, outputs included.
        instructions: the instruction of each.
        texts: unrelated text.
        batch_size: pairs a batch.

    Raises:
        ThoughtError: when no pair has an output.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[TokenisedPair],
        instructions: Sequence[str],
        texts: Sequence[str],
        batch_size: int,
    ) -> None:
        self.model = model
        every = text_windows(tokenizer, texts, min(_WINDOW, context_window(model)))
        self.text = pad(every[:: max(1, len(every) // _WINDOWS)][:_WINDOWS], PAD, "right").to(model.device)
        batches = output_batches(pairs, instructions, batch_size)
        if not any(bool(batch.answers.any()) for batch in batches):
            raise ThoughtError('the held-back pairs have empty outputs, on which "auto" could compare nothing.')
        self.parts: list[tuple[PairBatch, Tensor]] = []
        for batch, owner in zip(batches, _owners(batches), strict=True):
            self.parts += [(part, owner[of]) for part, of in logit_parts(model, batch, batch.answers > 0)]
        leads: dict[int, Any] = {}
        with evaluating(model):
            self.wanted = [batch_logits(model, part, "target", leads, part.answers > 0).cpu() for part, _ in self.parts]
            self.original = self._text_logits()

    @torch.no_grad()
    def divergences(self, patch: ThoughtPatch) -> Tensor:
        """KL(instructed ‖ patched) of each pair, (pairs,) float64: the mean over the tokens that predict the output or
        its end, in nats."""
        total = torch.zeros(1 + max(int(owner.max()) for _, owner in self.parts if len(owner)), dtype=torch.float64)
        count, leads = torch.zeros_like(total), {}  # type: tuple[Tensor, dict[int, Any]]
        with evaluating(self.model), patch.applied(self.model, check=False):
            for (part, owner), wanted in zip(self.parts, self.wanted, strict=True):
                own = part.answers > 0
                got = batch_logits(self.model, part, "plain", leads, own)
                found = token_kl(wanted.to(got.device), got).double().cpu()
                total.index_add_(0, owner[own], found * part.answers[own])
                count.index_add_(0, owner[own], part.answers[own])
        return (total / count)[count > 0]

    @torch.no_grad()
    def drift(self, patch: ThoughtPatch) -> float:
        """KL(original ‖ patched) in nats, the mean over the tokens of the unrelated text."""
        with evaluating(self.model), patch.applied(self.model, check=False):
            return float(token_kl(self.original, self._text_logits()).double().mean())

    def _text_logits(self) -> Tensor:
        logits: Tensor = self.model(**forward_inputs(self.text, 0), use_cache=False).logits
        return logits[self.text.mask]


def _owners(batches: Sequence[PairBatch]) -> list[Tensor]:
    """Of each batch's compared tokens, (n,), the number of the pair that they are of.

    A pair alone in its group is nearly all in its lead; its last token, in the batch that follows, is of the same pair.
    What several pairs share with the lead counts as a pair of its own.
    """
    owners: list[Tensor] = []
    leads: dict[int, int] = {}
    free = 0
    for batch in batches:
        rows, width = batch.plain.ids.shape if batch.plain is not None else (1, 1)
        first = free
        if rows == 1 and batch.lead in leads:
            first = leads[batch.lead]
        elif batch.lead is None and bool(batch.answers.any()):
            leads[batch.index] = first
        free = max(free, first + rows)
        owners.append(first + batch.plain_rows // width)
    return owners
