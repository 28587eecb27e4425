"""Which tokens of the answers a fit has to get right: those that the chunk changes.

Most of an answer about a document is what the model would say anyway, once it has begun ("The bridge was opened in"),
and one token of ten is what only the document says ("1893"). As one weight for all, the least squares would spend
itself on the many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.loading import evaluating
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.logits import batch_logits, logit_parts
from lit_thought.statistics.distributed import gather_json

__all__ = ["weighed_by_change"]

EVEN, MOST = 0.2, 20.0
"""The share of an answer token's weight that does not depend on the change, and the change of most weight, in means."""


@torch.no_grad()
def weighed_by_change(
    model: PreTrainedModel, batches: Sequence[PairBatch], answer_weight: float, progress: bool = False
) -> list[PairBatch]:
    """Batches whose answer tokens weigh by how much the chunk changes what the model says there.

    Where w is the answer weight, an answer's token gets

        w (s + (1 − s) min(κ / κ̄, m)),   κ = KL(instructed ‖ plain),   s = 0.2, m = 20,

    of the unpatched model's next-token distributions at the token before it, in nats, and κ̄ their mean over the
    answers of all pairs. The weights so keep their mean, but for what m takes off.

    Args:
        model: the model, without a patch.
        batches: this process's, all processes of a fit together.
        answer_weight: w.
        progress: show a progress bar.

    Returns:
        The same batches with other weights, float64.
    """
    runs = [part for batch in batches if _matters(batch) for part in logit_parts(model, batch, batch.answers > 0)]
    total = max(gather_json(len(runs), model.device))
    found = {batch.index: torch.zeros_like(batch.answers) for batch in batches}
    leads: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    shown = {"desc": "Weighing answers", "unit": "batch", "disable": not progress, "leave": False}
    with evaluating(model):
        for part, chosen in tqdm(runs, **shown):
            own = part.answers > 0
            instructed = batch_logits(model, part, "target", leads[0], own)
            if part.plain is None:
                _idle(model, 1)
                continue
            plain = batch_logits(model, part, "plain", leads[1], own)
            found[part.index][chosen[own]] = token_kl(instructed, plain).double().cpu().clamp_min(0)
        _idle(model, 2 * (total - len(runs)))
    sums = [float((batch.answers * found[batch.index]).sum()) for batch in batches]
    counts = [float(batch.answers.sum()) for batch in batches]
    every = gather_json([sum(sums), sum(counts)], model.device)
    change, count = (sum(column) for column in zip(*every, strict=True))
    if not change:
        return list(batches)
    mean = change / count

    def weighed(batch: PairBatch) -> PairBatch:
        factors = EVEN + (1 - EVEN) * (found[batch.index] / mean).clamp_max(MOST)
        return replace(batch, weights=batch.weights + answer_weight * batch.answers * (factors - 1))

    return [weighed(batch) for batch in batches]


def _matters(batch: PairBatch) -> bool:
    """Whether a batch has answers, or may be the lead of one that has."""
    return bool(batch.answers.any()) or (batch.lead is None and len(batch.target.ids) == 1)


def _idle(model: PreTrainedModel, times: int) -> None:
    """Runs of a sharded model, whose processes go through it together, where this one has nothing to run."""
    for _ in range(times if is_sharded(model) else 0):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
