"""Confidence intervals against SciPy's, and what they cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from lit_thought.errors import ThoughtError
from lit_thought.solve.intervals import paired_difference, perplexity_ratio, wilson


@pytest.mark.parametrize("trials", [1, 7, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_is_that_of_scipy(trials: int, confidence: float) -> None:
    for successes in range(trials + 1):
        wanted = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        assert wilson(successes, trials, confidence) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(("both", "first", "second"), [(0.5, 0.2, 0.1), (0.0, 0.5, 0.4), (0.3, 0.15, 0.0)])
def test_the_interval_of_a_paired_difference_covers_it(both: float, first: float, second: float) -> None:
    """Over every outcome of 30 pairs, with its probability: the share of intervals that hold the true difference."""
    n, covered = 30, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                cells = (a, b, c, n - a - b - c)
                weight = scipy.stats.multinomial.pmf(cells, n, (both, first, second, 1 - both - first - second))
                if weight < 1e-7:
                    continue
                ones = [True] * (a + b) + [False] * (n - a - b)
                twos = [True] * a + [False] * b + [True] * c + [False] * (n - a - b - c)
                value, low, high = paired_difference(ones, twos)
                assert value == pytest.approx((b - c) / n)
                covered += weight * (low <= first - second <= high)
    assert 0.93 < covered < 0.985, covered


def test_paired_difference_is_near_the_bootstrap_of_many_pairs_and_has_a_width_where_all_agree() -> None:
    generator = np.random.default_rng(0)
    ones = generator.random(600) < 0.7
    twos = np.where(generator.random(600) < 0.8, ones, generator.random(600) < 0.4)
    value, low, high = paired_difference(ones.tolist(), twos.tolist())
    options: Any = {"paired": True, "vectorized": False, "rng": generator, "method": "percentile"}
    sampled = scipy.stats.bootstrap((ones, twos), lambda a, b: a.mean() - b.mean(), **options).confidence_interval
    assert (low, high) == pytest.approx((sampled.low, sampled.high), abs=0.006)
    assert paired_difference(twos.tolist(), ones.tolist()) == pytest.approx((-value, -high, -low))
    value, low, high = paired_difference([True] * 9, [True] * 9)
    assert value == 0
    assert low == -high < -0.1


@pytest.mark.parametrize("windows", [*range(2, 9), 14, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_of_a_perplexity_ratio_is_scipy_s_t_interval(windows: int, confidence: float) -> None:
    """Where all windows are as long."""
    generator = np.random.default_rng(windows)
    original = 511 * generator.normal(3.5, 0.3, windows)
    patched = original + 511 * generator.normal(0.01, 0.02, windows)
    found = perplexity_ratio(original.tolist(), patched.tolist(), [511] * windows, confidence)
    change = (patched - original) / 511
    wanted = scipy.stats.ttest_1samp(change, 0).confidence_interval(confidence)
    assert found == pytest.approx(np.exp([change.mean(), wanted.low, wanted.high]), rel=1e-10)


def test_the_interval_of_a_perplexity_ratio_weighs_windows_by_their_tokens() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 512, 400)
    original = tokens * generator.normal(3.5, 0.3, 400)
    patched = original + tokens * generator.normal(0.2, 0.02, 400)  # the change of long windows is larger
    value, low, high = perplexity_ratio(original.tolist(), patched.tolist(), tokens.tolist())
    assert value == pytest.approx(np.exp((patched - original).sum() / tokens.sum()))

    def ratio(a: Any, b: Any, n: Any, axis: int) -> Any:
        return np.exp(np.sum(b - a, axis) / np.sum(n, axis))

    options: Any = {"paired": True, "vectorized": True, "rng": generator, "method": "percentile", "n_resamples": 4000}
    wanted = scipy.stats.bootstrap((original, patched, tokens), ratio, **options).confidence_interval
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=2e-4)
    assert high - low > 3e-3


def test_the_interval_of_a_perplexity_ratio_covers_it_from_four_windows() -> None:
    generator, held = np.random.default_rng(2), 0
    for _ in range(1000):
        tokens = generator.integers(300, 512, 4)
        change = tokens * generator.normal(0.01, 0.02, 4)
        _, low, high = perplexity_ratio([0.0] * 4, change.tolist(), tokens.tolist())
        held += low <= np.exp(0.01) <= high
    assert 0.93 < held / 1000 < 0.97, held


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(0, 0),
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, 1.0),
        lambda: paired_difference([], []),
        lambda: perplexity_ratio([1.0], [1.0], [5]),
        lambda: perplexity_ratio([1.0, 2.0], [1.0], [5, 5]),
        lambda: paired_difference([True], [True, False]),
    ],
)
def test_intervals_refuse(call: Any) -> None:
    with pytest.raises(ThoughtError, match=r"expected|between"):
        call()
