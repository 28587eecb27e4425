"""Padded, aligned batches from tokenised pairs.

Each :class:`PairBatch` carries the token ids of two runs of the same texts, the *target* run (instructed,
original weights) and the *plain* run (patched weights), and which rows of one are compared with which rows
of the other. Tokens that all sequences of a run begin with are split off into one *lead* batch of batch size
one, whose rows weigh as much as the pairs that share them; so the chunk costs its tokens once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_thought.prompts.alignment import TokenisedPair

__all__ = ["PAD", "PairBatch", "TokenBatch", "common_prefix", "forward_inputs", "make_batches", "pad"]

PAD = 0
"""Padding: it is masked, so any token that every model has. A tokenizer's own may be one that its model has not."""


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids, (batch, length), and the mask of real tokens, (batch, length) bool."""

    ids: Tensor
    mask: Tensor

    def to(self, *args: Any, **kwargs: Any) -> TokenBatch:
        """Move both tensors, as ``Tensor.to``."""
        return TokenBatch(self.ids.to(*args, **kwargs), self.mask.to(*args, **kwargs))

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own sequence, whatever the padding side, (batch, length)."""
        return (self.mask.long().cumsum(1) - 1).clamp_min(0)


@dataclass(frozen=True)
class PairBatch:
    """One batch of both runs.

    Attributes:
        index: place in the list of batches.
        lead: index of the lead batch that comes before these tokens, or None.
        plain: tokens of the plain run; None where a lead has no plain tokens.
        target: tokens of the run to copy.
        plain_rows: compared tokens, (n,), as flat indices into (batch × length) of ``plain``.
        target_rows: their counterparts in ``target``, (n,).
        weights: weight of each compared token, (n,) float64.
        answers: how many pairs' outputs each of them predicts a token of, or the end, (n,) float64; 0 or 1, but in a
            lead.
    """

    index: int
    lead: int | None
    plain: TokenBatch | None
    target: TokenBatch
    plain_rows: Tensor
    target_rows: Tensor
    weights: Tensor
    answers: Tensor

    def to(self, *args: Any, **kwargs: Any) -> PairBatch:
        """Move every tensor, as ``Tensor.to``, but weights and answers, which the host wants without waiting."""
        return replace(
            self,
            plain=self.plain and self.plain.to(*args, **kwargs),
            target=self.target.to(*args, **kwargs),
            plain_rows=self.plain_rows.to(*args, **kwargs),
            target_rows=self.target_rows.to(*args, **kwargs),
        )


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> TokenBatch:
    """Pad token sequences to one length on the given side."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        at = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[row, at] = torch.tensor(list(sequence))
        mask[row, at] = True
    return TokenBatch(ids, mask)


def forward_inputs(tokens: TokenBatch, lead_length: int) -> dict[str, Tensor]:
    """``input_ids``, ``position_ids`` and ``attention_mask`` of a batch that follows a cached lead."""
    ahead = tokens.mask.new_ones(len(tokens.mask), lead_length)
    return {
        "input_ids": tokens.ids,
        "position_ids": tokens.positions + lead_length,
        "attention_mask": torch.cat([ahead, tokens.mask], dim=1).long(),
    }


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share, leaving each at least one token of its own."""
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return max(0, min(shared, min(map(len, sequences)) - 1))


def make_batches(
    pairs: Sequence[TokenisedPair],
    batch_size: int,
    groups: Sequence[Any] | None = None,
    answer_weight: float = 1.0,
) -> list[PairBatch]:
    """Sort pairs by length, split off what they share, and pad the rest.

    Args:
        pairs: tokenised pairs.
        batch_size: pairs a batch.
        groups: one hashable key a pair (its instruction); only pairs of one group share a lead.
        answer_weight: weight of the output's tokens and of the token before them; others weigh 1.

    Returns:
        Batches in the order in which they must run: each lead before the batches that follow it.
    """
    keys = list(groups) if groups is not None else [None] * len(pairs)
    batches: list[PairBatch] = []
    _add_sinks(batches, pairs)
    for key in dict.fromkeys(keys):
        members = [pair for pair, k in zip(pairs, keys, strict=True) if k == key]
        _add_group(batches, members, batch_size, answer_weight)
    return batches


def _add_sinks(batches: list[PairBatch], pairs: Sequence[TokenisedPair]) -> None:
    """Attention sinks without BOS should stay what the original model makes of them, alone at position 0."""
    counts = Counter(pair.plain_ids[0] for pair in pairs if pair.sink)
    if counts:
        tokens = pad([[token] for token in counts], PAD, "right")
        rows = torch.arange(len(counts))
        weights = torch.tensor([float(n) for n in counts.values()], dtype=torch.float64)
        batches.append(PairBatch(len(batches), None, tokens, tokens, rows, rows, weights, torch.zeros_like(weights)))


def _add_group(
    batches: list[PairBatch],
    pairs: list[TokenisedPair],
    batch_size: int,
    answer_weight: float,
) -> None:
    plain_lead, target_lead = _lead_lengths(pairs)
    lead = len(batches) if target_lead else None
    if target_lead:
        shared = [(p, q) for p, q in _matches(pairs[0]) if p < plain_lead]
        answers = [sum(_predicts_output(pair, p) for pair in pairs) for p, _ in shared]
        batches.append(
            PairBatch(
                len(batches),
                None,
                pad([pairs[0].plain_ids[:plain_lead]], PAD, "right") if plain_lead else None,
                pad([pairs[0].instructed_ids[:target_lead]], PAD, "right"),
                torch.tensor([p for p, _ in shared], dtype=torch.long),
                torch.tensor([q for _, q in shared], dtype=torch.long),
                *_weights(answers, len(pairs), answer_weight),
            )
        )
    ordered = sorted(pairs, key=lambda pair: (len(pair.instructed_ids), pair.instructed_ids))
    for start in range(0, len(ordered), batch_size):
        members = ordered[start : start + batch_size]
        # on the right: padding between a lead and its followers would use up a sliding window
        plain = pad([pair.plain_ids[plain_lead:] for pair in members], PAD, "right")
        target = pad([pair.instructed_ids[target_lead:] for pair in members], PAD, "right")
        plain_rows, target_rows, answers = [], [], []
        for row, pair in enumerate(members):
            plain_start = row * plain.ids.shape[1] - plain_lead
            target_start = row * target.ids.shape[1] - target_lead
            for p, q in _matches(pair):
                if p >= plain_lead:
                    plain_rows.append(plain_start + p)
                    target_rows.append(target_start + q)
                    answers.append(int(_predicts_output(pair, p)))
        batches.append(
            PairBatch(
                len(batches),
                lead,
                plain,
                target,
                torch.tensor(plain_rows, dtype=torch.long),
                torch.tensor(target_rows, dtype=torch.long),
                *_weights(answers, 1, answer_weight),
            )
        )


def _matches(pair: TokenisedPair) -> list[tuple[int, int]]:
    return list(zip(pair.plain_positions, pair.instructed_positions, strict=True))


def _predicts_output(pair: TokenisedPair, position: int) -> bool:
    start, stop = pair.output_span
    return start < stop and start - 1 <= position < stop


def _weights(answers: Sequence[int], pairs: int, answer_weight: float) -> tuple[Tensor, Tensor]:
    """Weights of tokens that so many pairs share, of whose outputs they predict ``answers``; and these."""
    counts = torch.tensor(answers, dtype=torch.float64)
    return pairs - counts + answer_weight * counts, counts


def _lead_lengths(pairs: list[TokenisedPair]) -> tuple[int, int]:
    """How many leading tokens of the plain and of the instructed run to share.

    Both leads shrink until each compared token has its counterpart on the same side of the cut and all
    pairs agree on the counterparts inside the lead.
    """
    plain = common_prefix([pair.plain_ids for pair in pairs])
    target = common_prefix([pair.instructed_ids for pair in pairs])
    reference = dict(_matches(pairs[0]))
    changed = True
    while changed:
        changed = False
        for pair in pairs:
            matches = dict(_matches(pair))
            for p, q in matches.items():
                if p < plain and q >= target:
                    plain, changed = p, True
                elif p >= plain and q < target:
                    target, changed = q, True
            for p in range(plain):
                if matches.get(p) != reference.get(p):
                    plain, changed = p, True
                    break
    return (plain, target) if target else (0, 0)
