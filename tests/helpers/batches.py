"""What batches hold, read back: the sequences without padding, and each compared token's weight by its context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lit_thought.prompts.batches import PairBatch, TokenBatch

Seen = dict[tuple[tuple[int, ...], tuple[int, ...]], float]


def sequences(batches: Sequence[PairBatch], index: int, run: str) -> list[list[int]]:
    """The sequences of a batch without padding, each after its lead."""
    batch = batches[index]
    tokens: TokenBatch | None = getattr(batch, run)
    ahead = sequences(batches, batch.lead, run)[0] if batch.lead is not None else []
    if tokens is None:
        return [ahead]
    return [ahead + ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def prefix(batches: Sequence[PairBatch], batch: PairBatch, run: str, flat: int) -> tuple[int, ...]:
    """All a causal model sees at one flat row: the real tokens up to it, the lead's first."""
    tokens: TokenBatch = getattr(batch, run)
    row, column = divmod(flat, tokens.ids.shape[1])
    assert bool(tokens.mask[row, column])  # never a row of padding
    ahead = sequences(batches, batch.lead, run)[0] if batch.lead is not None else []
    return (*ahead, *tokens.ids[row, : column + 1][tokens.mask[row, : column + 1]].tolist())


def from_batches(batches: Sequence[PairBatch]) -> Seen:
    """Weight by (plain prefix, instructed prefix) over all batches."""
    seen: Seen = defaultdict(float)
    for batch in batches:
        assert len(batch.plain_rows) == len(batch.target_rows) == len(batch.weights)
        for p, q, w in zip(batch.plain_rows.tolist(), batch.target_rows.tolist(), batch.weights.tolist(), strict=True):
            seen[prefix(batches, batch, "plain", p), prefix(batches, batch, "target", q)] += w
    return dict(seen)
