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
    original: Sequence[float], patched: Sequence[float], tokens: Sequence[int], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The ratio of two perplexities of the same text, with a paired t interval over its windows.

    With cᵢ = pᵢ − oᵢ the change of window i and nᵢ its tokens, log r = Σ cᵢ / Σ nᵢ, a ratio of two means, whose
    standard error is √(k / (k − 1) Σ (cᵢ − nᵢ log r)²) / Σ nᵢ for k windows. The bounds are as many of them from log r
    as Student's t with k − 1 degrees of freedom says. Where all windows are as long, this is the t interval of the
    paired differences. It speaks of text like the windows, of which they are a sample, also where they are all there
    is of it.

    Args:
        original, patched: negative log-likelihood of each window of the text, in nats.
        tokens: how many tokens each is the sum over.
        confidence: in (0, 1).

    Returns:
        The ratio r, its lower and its upper bound; infinite or NaN where losses are.

    Raises:
        ThoughtError: when there are fewer than two windows, or not as many in each.

    Source: Cochran, Sampling Techniques (1977), section 2.11.
    """
    k = len(tokens)
    if k < 2 or len(original) != k or len(patched) != k:
        counts = f"{len(original)}, {len(patched)} and {k}"
        raise ThoughtError(f"original, patched and tokens: expected as many windows, and at least two; got {counts}.")
    change = torch.tensor(patched, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    weight = torch.tensor(tokens, dtype=torch.float64)
    mean = change.sum() / weight.sum()
    error = (k / (k - 1) * (change - mean * weight).square().sum()).sqrt() / weight.sum()
    half = _t_quantile((1 + confidence) / 2, k - 1) * error
    ratio, low, high = torch.stack([mean, mean - half, mean + half]).exp().tolist()
    return ratio, low, high


def _t_quantile(probability: float, degrees: int) -> float:
    """The quantile, ``probability`` > 1/2, of Student's t with a whole number ν of degrees of freedom.

    With θ = arctan(t / √ν), P(|T| ≤ t) is a finite sum: (2/π) (θ + sin θ (cos θ + 2/3 cos³ θ + …)) for odd ν,
    sin θ (1 + 1/2 cos² θ + …) for even ν, up to cos^(ν−2) θ. Halving finds θ.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    odd = degrees % 2 == 1

    def inside(angle: float) -> float:
        cosine = math.cos(angle)
        term, total = cosine if odd else 1.0, 0.0
        for power in range(2 if odd else 1, degrees, 2):
            total += term
            term *= power / (power + 1) * cosine * cosine
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _correlation(both: int, ones: int, twos: int, n: int) -> float:
    """φ of a 2 × 2 table; a positive one with a continuity correction."""
    product = ones * (n - ones) * twos * (n - twos)
    if product == 0:
        return 0.0
    excess = both * n - ones * twos
    return (max(excess - n / 2, 0.0) if excess > 0 else excess) / math.sqrt(product)
