"""What the model predicts at the compared tokens of a batch of pairs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_thought.model.calls import cache_arguments, head_reads
from lit_thought.prompts.batches import PairBatch, TokenBatch, forward_inputs

__all__ = ["batch_logits", "logit_parts"]

_NUMBERS = 2**26
"""Most logits of a run at a time: 256 MiB in float32."""


def logit_parts(model: PreTrainedModel, batch: PairBatch, wanted: Tensor) -> Iterator[tuple[PairBatch, Tensor]]:
    """A batch in parts of some rows each, whose wanted logits are no more than 2²⁶ where one row has no more itself.

    Args:
        model: the model, whose vocabulary counts.
        batch: the batch.
        wanted: which of its compared tokens' logits are asked for, (n,) bool.

    Yields:
        Each part, and which of the batch's compared tokens are its, (m,) indices.
    """
    if batch.plain is None or batch.plain is batch.target or len(batch.plain.ids) != len(batch.target.ids):
        yield batch, torch.arange(len(wanted))
        return
    limit = max(1, _NUMBERS // int(model.config.get_text_config().vocab_size))
    rows, lengths = len(batch.plain.ids), (batch.plain.ids.shape[1], batch.target.ids.shape[1])
    owners = batch.plain_rows // lengths[0]
    counts = torch.zeros(rows, dtype=torch.long).index_add_(0, owners, wanted.long()).tolist()
    first = 0
    while first < rows:
        last, taken = first + 1, counts[first]
        while last < rows and taken + counts[last] <= limit:
            taken += counts[last]
            last += 1
        chosen = ((owners >= first) & (owners < last)).nonzero()[:, 0]
        part = replace(
            batch,
            plain=TokenBatch(batch.plain.ids[first:last], batch.plain.mask[first:last]),
            target=TokenBatch(batch.target.ids[first:last], batch.target.mask[first:last]),
            plain_rows=batch.plain_rows[chosen] - first * lengths[0],
            target_rows=batch.target_rows[chosen] - first * lengths[1],
            answers=batch.answers[chosen],
            weights=batch.weights[chosen],
        )
        yield part, chosen
        first = last


def batch_logits(
    model: PreTrainedModel,
    batch: PairBatch,
    side: Literal["plain", "target"],
    leads: dict[int, Any],
    chosen: Tensor | None = None,
) -> Tensor:
    """Logits of the compared tokens of one run of a batch, (n, vocabulary).

    The output embedding sees these tokens alone, wherever the model has one that it calls once.

    Args:
        model: a causal LM.
        batch: the batch.
        side: which run.
        leads: the KV cache of the last lead is kept here, and taken from here by the batches that follow it, which come
            before the next lead (:func:`~lit_thought.prompts.batches.make_batches`).
        chosen: which of the compared tokens, (n,) bool; all of them when left out.
    """
    tokens = batch.plain if side == "plain" else batch.target
    rows = batch.plain_rows if side == "plain" else batch.target_rows
    if tokens is None:
        return torch.zeros(0, model.config.get_text_config().vocab_size, device=model.device)
    rows = (rows if chosen is None else rows[chosen.to(rows.device)]).to(model.device)
    lead = leads.get(batch.lead) if batch.lead is not None else None
    cache = DynamicCache() if lead is None else copy.deepcopy(lead)
    if lead is not None:
        cache.batch_repeat_interleave(len(tokens.ids))
    inputs = forward_inputs(tokens.to(model.device), cache.get_seq_length())

    def select(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[rows].unsqueeze(0) if x.shape[:-1] == inputs["input_ids"].shape else x

    with head_reads(model, select):
        logits: Tensor = model(**inputs, **cache_arguments(model, cache), use_cache=True).logits
    if batch.lead is None and len(tokens.ids) == 1:
        leads.clear()
        leads[batch.index] = cache
    return logits[0] if logits.shape[:2] == (1, len(rows)) else logits.flatten(0, 1)[rows]
