"""What the model predicts at the compared tokens of a batch of pairs."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_thought.model.calls import cache_arguments, head_reads
from lit_thought.prompts.batches import PairBatch, forward_inputs

__all__ = ["batch_logits"]


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
        leads: a lead's KV cache is kept here, and taken from here by the batches that follow it.
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
        leads[batch.index] = cache
    return logits[0] if logits.shape[:2] == (1, len(rows)) else logits.flatten(0, 1)[rows]
