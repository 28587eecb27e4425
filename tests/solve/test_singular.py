"""Whether a system is singular is decided with a margin: never by the last bit of a pivot, at no size, scale or rank.

Cases by brute force, in float64: singular ones (to rounding, in rotated bases, from few tokens, many tokens, a prior
or both) are refused by everything that inverts a sum of products; well-conditioned ones are solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from lit_thought.errors import SingularSystemError
from lit_thought.solve.gains import solve_with_gains
from lit_thought.solve.least_squares import Prior, solve, solve_constrained
from lit_thought.solve.sums import Statistics
from lit_thought.theory.condense import thought_matrix

D_OUT = 3
SIZES = (2, 3, 5, 9, 10, 17, 40)
SEEDS = 12  # of each size, kind and scale
SCALES = (1e-30, 1e-3, 1.0, 1e30)


def direct(stats: Statistics, prior: Prior | None) -> np.ndarray:
    found = solve(stats, 0.0, prior, 0.7)
    return (found.B @ found.A).numpy()


def gained(stats: Statistics, prior: Prior | None) -> np.ndarray:
    found = solve_with_gains(stats, torch.tensor([1.0, 2.0, 0.5]), 0.0, prior, 0.7)
    return (found.B @ found.A).numpy()


def constrained(stats: Statistics, prior: Prior | None) -> np.ndarray:
    key = torch.full((1, stats.d_in), stats.d_in**-0.5, dtype=torch.float64)
    return solve_constrained(key, torch.zeros(1, D_OUT), prior=prior, stats=stats, prior_weight=0.7).numpy()


def condensed(stats: Statistics, prior: None) -> np.ndarray:
    return thought_matrix(stats).numpy()


SOLVERS: list[Callable[[Statistics, Prior | None], np.ndarray]] = [direct, gained, constrained, condensed]


def sums(a: np.ndarray, delta: np.ndarray, batches: int = 1) -> Statistics:
    """Folded, so that nothing but the sums is known."""
    stats = Statistics(a.shape[1], D_OUT)
    for rows, errors in zip(np.array_split(a, batches), np.array_split(delta, batches), strict=True):
        stats.update(torch.tensor(rows), torch.tensor(errors))
    return stats - Statistics(a.shape[1], D_OUT)


def inputs(rng: np.random.Generator, n: int, d: int, rank: int, condition: float, scale: float) -> np.ndarray:
    """n inputs with this many singular values, down to 1 / condition of the largest, in random bases."""
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (n, d))
    return scale * (left * np.geomspace(1, 1 / condition, rank)) @ right.T


def singular_cases(d: int, prior: bool) -> Iterator[tuple[Statistics, Prior | None]]:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        scale = SCALES[seed % len(SCALES)]
        rank = int(rng.integers(1, d))
        n = int(rng.choice([rank, d, 4 * d, 50 * d]))
        own = int(rng.integers(1, rank)) if prior and rank > 1 else rank
        a = inputs(rng, max(n, own), d, own, 10 ** rng.uniform(0, 4), scale)
        if seed % 3 == 0:  # as it comes: random rows, whose leading columns may be ill-conditioned
            a = scale * rng.standard_normal((max(n, own), own)) @ rng.standard_normal((own, d))
        elif seed % 3 == 1:  # unrotated: an input that is always the sum of two others, or zero
            a = scale * rng.standard_normal((max(n, d), d))
            a[:, -1] = a[:, :-2].sum(1) if d > 2 and seed % 2 else 0.0
        stats = sums(a, rng.standard_normal((len(a), D_OUT)), min(len(a), 1 + seed))
        if not prior:
            yield stats, None
            continue
        null = np.linalg.svd(np.linalg.qr(a)[1])[2][-1]  # a direction that no token has, and the prior has not
        others = scale * rng.standard_normal((2 * d, d))
        others -= np.outer(others @ null, null)
        yield stats, Prior.from_gram(torch.tensor(others.T @ others / len(others)))


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("d", SIZES)
def test_singular_systems_are_refused(d: int, prior: bool) -> None:
    for stats, known in singular_cases(d, prior):
        for solver in SOLVERS[:-1] if prior else SOLVERS:  # a thought matrix has no prior
            with pytest.raises(SingularSystemError, match="is singular"):
                solver(stats, known)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_well_conditioned_systems_are_solved(solver: Callable, d: int) -> None:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        a = inputs(rng, int(rng.choice([d, 4 * d, 50 * d])), d, d, 10 ** rng.uniform(0, 5), SCALES[seed % len(SCALES)])
        patch = rng.standard_normal((D_OUT, d)) / np.linalg.norm(a, 2)
        if solver is constrained:
            patch -= patch.sum(1, keepdims=True) / d  # its key is asked to stay as it is
        gain = np.array([1.0, 2.0, 0.5]) if solver is gained else np.ones(D_OUT)
        found = solver(sums(a, a @ patch.T * gain), None)
        assert np.linalg.norm(found - patch) <= 1e-4 * np.linalg.norm(patch)


@pytest.mark.parametrize("d", SIZES)
def test_dependent_keys_are_refused_and_independent_ones_are_not(d: int) -> None:
    prior = Prior.from_gram(torch.eye(d))
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(1, d + 1))
        keys = torch.tensor(inputs(rng, k, d, k, 10 ** rng.uniform(0, 5), SCALES[seed % len(SCALES)]))
        solve_constrained(keys, torch.zeros(k, D_OUT), prior=prior)
        more = torch.cat([keys, torch.tensor(rng.standard_normal((1, k))) @ keys])
        with pytest.raises(SingularSystemError, match=f"{k + 1} keys span {k} dimensions"):
            solve_constrained(more, torch.zeros(k + 1, D_OUT), prior=prior)


@pytest.mark.parametrize("d", SIZES)
def test_a_small_ridge_makes_a_singular_system_solvable(d: int) -> None:
    for stats, _ in singular_cases(d, prior=False):
        assert solve(stats, 1e-9).diagnostics["condition"] <= 1e9 * d
        assert bool(solve_with_gains(stats, torch.ones(D_OUT), 1e-9).A.isfinite().all())
