"""Metrics of the three-way comparison, as torchmetrics metrics: sums are kept as state and divided once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TextMatch", "TokenDivergence", "agrees_for", "repetition", "token_kl"]

_NUMBERS = 2**22
"""Most logits to compare at a time: several times as many numbers are there meanwhile."""


class TextMatch(Metric):
    """Share of texts that are equal to their references, after stripping white space.

    Against the reference outputs it is exact match; against the instructed model's outputs, fidelity.

    Example:
        >>> metric = TextMatch()
        >>> metric.update(["cold", "small"], ["cold", "little"])
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    higher_is_better = True

    matches: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("matches", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """Add pairs of texts.

        Raises:
            ValueError: when there are not as many texts as references.
        """
        self.matches += sum(a.strip() == b.strip() for a, b in zip(texts, references, strict=True))
        self.total += len(texts)

    def compute(self) -> Tensor:
        """Matches ÷ pairs, 0-dim; NaN without pairs."""
        return self.matches.double() / self.total


def agrees_for(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens two outputs begin with in common.

    Example:
        >>> agrees_for([5, 6, 7], [5, 6, 8, 9])
        2
    """
    both = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(tokens), len(reference)))


def repetition(tokens: Sequence[int], n: int = 3) -> float | None:
    """Share of an output's n-grams that it had before: 1 − distinct n-grams ÷ n-grams; None of fewer than n tokens.

    Source:
        Welleck et al., *Neural text generation with unlikelihood training*, 2019, arXiv 1908.04319 (seq-rep-n).

    Example:
        >>> repetition([5, 6, 5, 6, 5, 6])
        0.5
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def token_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) of each token in nats, p from ``reference`` and q from ``logits``: Σ_v p_v (log p_v − log q_v).

    Args:
        reference: (n, vocabulary), any floating dtype; computed in float32 or better.
        logits: (n, vocabulary).

    Returns:
        (n,).
    """
    wide, rows = torch.promote_types(reference.dtype, torch.float32), max(1, _NUMBERS // max(1, reference.shape[1]))
    found = []
    for one, other in zip(reference.split(rows), logits.split(rows), strict=True):
        p, q = one.to(wide).log_softmax(-1), other.to(wide).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


class TokenDivergence(Metric):
    """Mean KL(reference ‖ model) in nats and share of equal top-1 tokens, over tokens.

    :meth:`compute` returns ``{"kl": …, "agreement": …}``.
    """

    full_state_update = False

    kl: Tensor
    agree: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("kl", "agree", "total"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reference: Tensor, logits: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: logits of the reference and of the model, both (n, vocabulary), and weights, (n,), or 1."""
        if weights is None:
            weights = torch.ones(len(logits), device=logits.device)
        weights = weights.double()
        self.kl += (token_kl(reference, logits).double() * weights).sum()
        self.agree += ((reference.argmax(-1) == logits.argmax(-1)) * weights).sum()
        self.total += weights.sum()

    def compute(self) -> dict[str, Tensor]:
        """Weighted means over tokens, 0-dim; NaN without tokens."""
        return {"kl": self.kl / self.total, "agreement": self.agree / self.total}
