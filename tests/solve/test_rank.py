"""The best low-rank form of a given matrix, against a dense reference in NumPy and against competitors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from least_squares import D_IN, D_OUT, FEW, MANY, PRIORS, Problem, make_problem

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.solve.least_squares import Prior
from lit_thought.solve.rank import reduce_rank


def make_factors(rank: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, D_IN)) * np.linspace(0.2, 2, rank)[:, None], rng.normal(size=(D_OUT, rank))


def reduce(
    problem: Problem,
    A: np.ndarray,
    B: np.ndarray,
    rank: int | float | None,
    folded: bool = False,
    gain: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    prior = problem.known or (Prior.from_gram(torch.tensor(problem.prior)) if problem.prior is not None else None)
    stats, ridge = problem.statistics(folded), problem.ridge * problem.scale
    assert (stats.rows() is None) == (folded or len(problem.a) >= D_IN)
    behind = None if gain is None else torch.tensor(gain)
    found = reduce_rank(torch.tensor(A), torch.tensor(B), stats, ridge, prior, problem.rho, rank, behind)
    return found[0].numpy(), found[1].numpy()


def loss(problem: Problem, difference: np.ndarray) -> float:
    """tr(D M Dᵀ) token by token, with the ridge and the prior."""
    kept = 0.0 if problem.prior is None else problem.rho * np.trace(difference @ problem.prior @ difference.T)
    data = float((((problem.a @ difference.T) ** 2) * problem.share).sum())
    return data + kept + problem.ridge * problem.scale * float((difference**2).sum())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("n", [*FEW, *MANY])
def test_equals_the_dense_reference(n: int, prior: bool | str) -> None:
    problem = make_problem(n, prior=prior)
    A, B = make_factors(7)
    for rank in (1, 3, 6):
        wanted = problem.truncated(B @ A, rank)
        for folded in (False, True):
            found_a, found_b = reduce(problem, A, B, rank, folded)
            assert found_a.shape == (rank, D_IN)
            assert found_b.shape == (D_OUT, rank)
            np.testing.assert_allclose(found_b @ found_a, wanted, atol=1e-9 * np.abs(wanted).max())
            np.testing.assert_allclose(found_b.T @ found_b, np.eye(rank), atol=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_no_other_matrix_of_that_rank_is_nearer(prior: bool | str) -> None:
    problem = make_problem(40, prior=prior)
    A, B = make_factors(7)
    T = B @ A
    rng = np.random.default_rng(1)
    for rank in (1, 3):
        found_a, found_b = reduce(problem, A, B, rank)
        best = loss(problem, T - found_b @ found_a)
        u, s, vt = np.linalg.svd(T)
        frobenius = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert loss(problem, T - frobenius) > 1.01 * best  # the metric matters
        for _ in range(200):
            basis = np.linalg.qr(rng.normal(size=(D_OUT, rank)))[0]
            assert loss(problem, T - basis @ basis.T @ T) >= best
        for size in (1e-3, 1e-1):
            for _ in range(100):
                left = found_b + size * rng.normal(size=found_b.shape)
                right = found_a + size * rng.normal(size=found_a.shape)
                assert loss(problem, T - left @ right) >= best


@pytest.mark.parametrize(("own", "rank"), [(4, None), (4, 4), (4, 9), (15, None), (15, D_OUT)])
def test_nothing_is_lost_where_the_rank_is_enough(own: int, rank: int | None) -> None:
    """None keeps T as it is, in no more than min(R, d_out) rows."""
    A, B = make_factors(own)
    found_a, found_b = reduce(make_problem(40), A, B, rank)
    assert len(found_a) == min(own, D_OUT)
    np.testing.assert_allclose(found_b @ found_a, B @ A, atol=1e-10)


def test_a_fraction_is_the_smallest_rank_that_keeps_it() -> None:
    problem = make_problem(40)
    A, B = make_factors(7)
    whole = loss(problem, B @ A)
    for fraction in (0.5, 0.9, 0.999):
        found_a, found_b = reduce(problem, A, B, fraction)
        rank = len(found_a)
        assert loss(problem, found_b @ found_a) >= fraction * whole
        smaller_a, smaller_b = reduce(problem, A, B, rank - 1) if rank > 1 else (0 * found_a, found_b)
        assert loss(problem, smaller_b @ smaller_a) < fraction * whole


@pytest.mark.parametrize("n", [5, 40])
def test_weights_ridge_and_prior_are_in_the_metric(n: int) -> None:
    A, B = make_factors(7)
    base = make_problem(n, prior=True)
    found = np.matmul(*reduce(base, A, B, 2)[::-1])
    even = Problem(base.a, base.delta, np.ones(n), base.ridge, base.prior, base.rho)
    stiff = Problem(base.a, base.delta, base.weights, 1.0, base.prior, base.rho)
    free = Problem(base.a, base.delta, base.weights, base.ridge)
    for other in (even, stiff, free):
        assert np.linalg.norm(np.matmul(*reduce(other, A, B, 2)[::-1]) - found) > 1e-3 * np.linalg.norm(found)


def test_a_prior_of_no_weight_is_none() -> None:
    problem, A, B = make_problem(40, prior=True), *make_factors(7)
    problem.rho = 0.0
    found = reduce(problem, A, B, 3)
    problem.prior = None
    for mine, theirs in zip(found, reduce(problem, A, B, 3), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def make_gain(zeros: int = 2) -> np.ndarray:
    """Gains of both signs, widely spread, some of them zero."""
    rng = np.random.default_rng(8)
    gain = np.exp(1.5 * rng.normal(size=D_OUT)) * rng.choice([-1, 1], D_OUT)
    gain[:zeros] = 0
    return gain


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("n", [*FEW, *MANY])
def test_with_a_gain_it_is_the_dense_right_projection(n: int, prior: bool | str) -> None:
    problem, gain = make_problem(n, prior=prior), make_gain()
    A, B = make_factors(7)
    T, root = B @ A, scipy.linalg.sqrtm(problem.system).real
    for rank in (1, 3, 6):
        top = np.linalg.svd(gain[:, None] * T @ root)[2][:rank]
        wanted = T @ root @ top.T @ top @ np.linalg.inv(root)
        assert np.abs(wanted[gain == 0]).max() > 0  # projected, not dropped
        for folded in (False, True):
            found_a, found_b = reduce(problem, A, B, rank, folded, gain)
            assert found_a.shape == (rank, D_IN)
            assert found_b.shape == (D_OUT, rank)
            np.testing.assert_allclose(found_b @ found_a, wanted, atol=1e-9 * np.abs(wanted).max())
            np.testing.assert_allclose(found_b.T @ found_b, np.eye(rank), atol=1e-12)


def test_with_a_gain_no_other_matrix_is_nearer_behind_it() -> None:
    problem, gain, rng = make_problem(40, prior=True), make_gain(), np.random.default_rng(1)
    A, B = make_factors(7)
    T = B @ A
    for rank in (1, 3):
        found_a, found_b = reduce(problem, A, B, rank, gain=gain)
        best = loss(problem, gain[:, None] * (T - found_b @ found_a))
        plain = np.matmul(*reduce(problem, A, B, rank)[::-1])
        assert loss(problem, gain[:, None] * (T - plain)) > 1.01 * best  # the gain matters
        for size in (1e-3, 1e-1):
            for _ in range(100):
                left = found_b + size * rng.normal(size=found_b.shape)
                right = found_a + size * rng.normal(size=found_a.shape)
                assert loss(problem, gain[:, None] * (T - left @ right)) >= best


@pytest.mark.parametrize("constant", [1.0, -1.0, 30.0, 1e-200, 1e200])
@pytest.mark.parametrize("rank", [None, 1, 4, 7, 9, 0.9])
def test_a_constant_gain_changes_nothing(rank: int | float | None, constant: float) -> None:
    for n in (5, 40):
        problem, (A, B) = make_problem(n, prior=True), make_factors(7)
        plain = reduce(problem, A, B, rank)
        found = reduce(problem, A, B, rank, gain=np.full(D_OUT, constant))
        assert found[0].shape == plain[0].shape
        np.testing.assert_allclose(found[1] @ found[0], plain[1] @ plain[0], atol=1e-9)


def test_with_a_gain_a_fraction_is_counted_behind_it() -> None:
    problem, gain = make_problem(40), make_gain()
    A, B = make_factors(7)
    root = scipy.linalg.sqrtm(problem.system).real
    energies = np.linalg.svd(gain[:, None] * (B @ A) @ root, compute_uv=False) ** 2
    for fraction in (0.5, 0.9, 0.999):
        rank = int(np.argmax(energies.cumsum() >= fraction * energies.sum())) + 1
        assert len(reduce(problem, A, B, fraction, gain=gain)[0]) == rank


def test_with_a_gain_on_fewer_channels_than_the_rank() -> None:
    """What acts on these channels is kept, no more directions than that are needed, and T stays for rank None."""
    gain = make_gain(zeros=D_OUT - 2)
    A, B = make_factors(7)
    for n in (5, 40):
        found_a, found_b = reduce(make_problem(n), A, B, 4, gain=gain)
        assert found_a.shape == (4, D_IN)
        np.testing.assert_allclose((found_b @ found_a)[-2:], (B @ A)[-2:], atol=1e-8)
        assert np.linalg.matrix_rank(found_b @ found_a, tol=1e-9) == 2
        whole_a, whole_b = reduce(make_problem(n), A, B, None, gain=gain)
        np.testing.assert_allclose(whole_b @ whole_a, B @ A, atol=1e-10)


def test_with_a_gain_nothing_reduces_to_nothing() -> None:
    A, B = make_factors(7)
    found_a, found_b = reduce(make_problem(40), A, 0 * B, 3, gain=make_gain())
    assert found_a.shape == (3, D_IN)
    assert not (found_b @ found_a).any()


def test_wrong_gains_are_refused() -> None:
    problem, (A, B) = make_problem(5), make_factors(7)
    for rank in (None, 3):
        with pytest.raises(ThoughtError, match="gain must be"):
            reduce(problem, A, B, rank, gain=np.ones(D_OUT + 1))
        with pytest.raises(ThoughtError, match="NaN or infinite"):
            reduce(problem, A, B, rank, gain=np.full(D_OUT, np.nan))
        with pytest.raises(SingularSystemError, match="zero for every channel"):
            reduce(problem, A, B, rank, gain=np.zeros(D_OUT))
