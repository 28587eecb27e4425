"""Confidence intervals: of shares, of the difference of two shares of the same items, of a ratio of perplexities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from lit_thought.errors import ThoughtError

__all__ = ["paired_difference", "perplexity_ratio", "wilson"]


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share p = successes / trials.

    With z the normal quantile of (1 + confidence) / 2 and n trials,
    (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n). It has a width at p = 0 and p = 1, too.

    Args:
        successes: from 0 to ``trials``.
        trials: 1 or more.
        confidence: in (0, 1).

    Returns:
        Lower and upper bound, in [0, 1].

    Raises:
        ThoughtError: for numbers out of range.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ThoughtError(f"successes={successes!r} of trials={trials!r}; expected 0 to trials, and 1 or more trials.")
    if not 0 < confidence < 1:
        raise ThoughtError(f"confidence must be between 0 and 1; got {confidence!r}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, extra = successes / trials, z * z / trials
    centre, half = share + extra / 2, z * math.sqrt(share * (1 - share) / trials + extra / (4 * trials))
    low, high = (centre - half) / (1 + extra), (centre + half) / (1 + extra)
    return 0.0 if successes == 0 else low, 1.0 if successes == trials else high  # which rounding would miss


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The difference of two shares of the same items, p₁ − p₂, with Newcombe's score interval.

    Of Wilson's intervals (l₁, u₁) and (l₂, u₂) and the correlation φ of the two outcomes,
    low = p₁ − p₂ − √((p₁ − l₁)² − 2 φ (p₁ − l₁)(u₂ − p₂) + (u₂ − p₂)²), high alike. It needs no resampling, and has a
    width where all items agree, where a bootstrap has none.

    Args:
        first, second: whether each item is a success, in the same order.
        confidence: in (0, 1).

    Returns:
        The difference, its lower and its upper bound, in [−1, 1].

    Raises:
        ThoughtError: when there are no items or not as many in each.

    Source: Newcombe, Statist. Med. 17 (1998) 2635, method 10.
    """
    if len(first) != len(second) or not first:
        raise ThoughtError(f"first has {len(first)} items, second {len(second)}; expected as many, and at least one.")
    n = len(first)
    ones, twos = sum(map(bool, first)), sum(map(bool, second))
    both = sum(bool(a) and bool(b) for a, b in zip(first, second, strict=True))
    (low1, high1), (low2, high2) = wilson(ones, n, confidence), wilson(twos, n, confidence)
    p1, p2, phi = ones / n, twos / n, _correlation(both, ones, twos, n)

    def distance(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * two + two * two))

    return p1 - p2, p1 - p2 - distance(p1 - low1, high2 - p2), p1 - p2 + distance(high1 - p1, p2 - low2)


def perplexity_ratio(
    original: Sequence[float],
    patched: Sequence[float],
    tokens: Sequence[int],
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The ratio of two perplexities of the same text, exp(Σ (pᵢ − oᵢ) / Σ nᵢ), with a paired bootstrap interval.

    Args:
        original, patched: negative log-likelihood of each window of the text, in nats.
        tokens: how many tokens each is the sum over.
        confidence: in (0, 1).
        resamples: how often as many windows are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        The ratio and the percentiles of the resampled ratios.

    Raises:
        ThoughtError: when there are fewer than two windows, or not as many in each.
    """
    n = len(tokens)
    if n < 2 or len(original) != n or len(patched) != n:
        counts = f"{len(original)}, {len(patched)} and {n}"
        raise ThoughtError(f"original, patched and tokens: expected as many windows, and at least two; got {counts}.")
    change = torch.tensor(patched, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    weight = torch.tensor(tokens, dtype=torch.float64)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = (change[drawn].sum(1) / weight[drawn].sum(1)).quantile(bounds).exp().tolist()
    return float((change.sum() / weight.sum()).exp()), low, high


def _correlation(both: int, ones: int, twos: int, n: int) -> float:
    """φ of a 2 × 2 table; a positive one with a continuity correction."""
    product = ones * (n - ones) * twos * (n - twos)
    if product == 0:
        return 0.0
    excess = both * n - ones * twos
    return (max(excess - n / 2, 0.0) if excess > 0 else excess) / math.sqrt(product)
