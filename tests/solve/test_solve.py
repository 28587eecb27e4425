"""The closed-form solve against NumPy and SciPy: least squares, normal equations, brute force over rank-r matrices.

What it refuses and says of a patch is tested in test_gains.py, with the other solver.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from least_squares import D_IN, D_OUT, FEW, MANY, PRIORS, RIDGES, close, make_problem, product

from lit_thought.errors import SingularSystemError
from lit_thought.solve import least_squares as route
from lit_thought.solve.least_squares import Prior, dual_operations, primal_operations, solve
from lit_thought.solve.sums import Statistics


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("n", [*FEW, *MANY])
@pytest.mark.parametrize("d_out", [D_OUT, 30])
def test_full_rank_patch_is_the_least_squares_solution(d_out: int, n: int, ridge: float, prior: bool | str) -> None:
    problem = make_problem(n, ridge, prior, d_out=d_out)
    assert (problem.statistics().rows() is not None) == (n in FEW)  # so that both forms are tested
    reference = problem.least_squares()
    normal = scipy.linalg.solve(problem.system, problem.cross.T, assume_a="pos").T
    assert close(reference, normal, 1e-7)  # the references agree with each other
    for folded in (False, True):
        solution = problem.solve(folded=folded)
        assert close(product(solution), reference, 1e-7)
        assert problem.objective(product(solution)) <= problem.objective(reference) * (1 + 1e-9)
        columns = solution.B.shape[1]
        np.testing.assert_allclose(solution.B.T @ solution.B, np.eye(columns), atol=1e-9)
        assert solution.A.dtype == solution.B.dtype == torch.float64


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("rank", [None, 3, 0.9])
@pytest.mark.parametrize("n", FEW)
def test_dual_is_the_primal(n: int, rank: int | float | None, ridge: float, prior: bool | str) -> None:
    problem = make_problem(n, ridge, prior)
    dual, primal = problem.solve(rank), problem.solve(rank, folded=True)
    assert close(product(dual), product(primal), 1e-9)
    for key, value in primal.diagnostics.items():
        if key != "rank":  # the dual drops directions that are numerically nothing
            tol = 0.01 if key == "condition" else 1e-9  # an estimate, from a start in another basis
            assert dual.diagnostics[key] == pytest.approx(value, rel=tol, abs=1e-12), key


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("n", [5, 11, 12, 60])
def test_patch_of_rank_r_is_reduced_rank_regression(n: int, rank: int, prior: bool | str) -> None:
    problem = make_problem(n, prior=prior)
    patch = product(problem.solve(rank))
    assert np.linalg.matrix_rank(patch) == rank
    assert close(patch, problem.reduced_rank(rank), 1e-7)
    best = problem.objective(patch)

    full = problem.least_squares()
    u, s, vt = np.linalg.svd(full, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert best < problem.objective(truncated) * (1 - 1e-6)  # the SVD of ΔW is not the best of its rank
    rng = np.random.default_rng(1)
    left, right = np.linalg.svd(patch, full_matrices=False)[::2]
    left, right = left[:, :rank], np.linalg.lstsq(left[:, :rank], patch, rcond=None)[0]
    for size in (1e-3, 1e-1, 1):
        for _ in range(20):
            other = (left + size * rng.standard_normal(left.shape)) @ (right + size * rng.standard_normal(right.shape))
            assert best <= problem.objective(other)


def test_random_candidates_of_the_same_rank_are_no_better() -> None:
    """Each candidate chooses its output directions at random and is optimal given these."""
    problem = make_problem(60)
    best = problem.objective(product(problem.solve(2)))
    full, rng = problem.least_squares(), np.random.default_rng(0)
    for _ in range(200):
        basis = np.linalg.qr(rng.standard_normal((D_OUT, 2)))[0]
        assert best < problem.objective(basis @ basis.T @ full)


@pytest.mark.parametrize("n", [5, 11, 60])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.99, 0.9999])
def test_rank_as_a_fraction_is_the_smallest_that_explains_it(fraction: float, n: int) -> None:
    problem = make_problem(n)
    solution = problem.solve(fraction)
    gains = np.linalg.eigvalsh(problem.cross @ np.linalg.solve(problem.system, problem.cross.T))[::-1]
    explained = gains.cumsum() / gains.sum()
    rank = int(np.argmax(explained >= fraction)) + 1
    assert solution.diagnostics["rank"] == solution.A.shape[0] == rank
    assert close(product(solution), problem.reduced_rank(rank), 1e-7)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("n", [5, 11, 60])
def test_scale_effective_rank_and_condition(n: int, prior: bool | str) -> None:
    problem = make_problem(n, prior=prior)
    said = problem.solve().diagnostics
    values = np.linalg.eigvalsh(problem.gram)
    assert said["ridge_scale"] == pytest.approx((values**2).sum() / values.sum(), rel=1e-9)
    assert said["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
    floor = problem.ridge * problem.scale
    assert said["condition"] == pytest.approx((values[-1] + floor) / floor, rel=0.03)
    if values[0] < 1e-6 * floor:  # Z is singular, so the ridge is M's smallest eigenvalue
        assert said["condition"] == pytest.approx(np.linalg.cond(problem.system), rel=0.03)
    spans = isinstance(prior, str) or n + prior * D_IN // 2 >= D_IN
    assert spans == (values[0] >= 1e-6 * floor)


@pytest.mark.parametrize("n", [D_IN, 60])
def test_without_ridge_it_is_theorem_3_1(n: int) -> None:
    problem = make_problem(n, ridge=0.0)
    solution = problem.solve()
    root = np.sqrt(problem.weights)[:, None]
    reference = np.linalg.lstsq(problem.a * root, problem.delta * root, rcond=None)[0].T
    assert close(product(solution), reference, 1e-7)
    if n == D_IN:  # as many tokens as dimensions: every error is corrected
        np.testing.assert_allclose(problem.a @ product(solution).T, problem.delta, atol=1e-6)
        assert abs(solution.diagnostics["error_after"]) < 1e-9 * solution.diagnostics["error_before"]
    assert solution.diagnostics["condition"] == pytest.approx(np.linalg.cond(problem.gram), rel=1e-3)


def test_without_ridge_a_prior_can_make_the_system_invertible() -> None:
    problem = make_problem(5, ridge=0.0, prior=True)
    problem.prior = np.cov(np.random.default_rng(0).standard_normal((D_IN, 100)))
    assert close(product(problem.solve()), problem.least_squares(), 1e-7)


@pytest.mark.parametrize("kind", ["dead input", "repeated tokens", "dependent inputs"])
def test_without_ridge_inputs_that_do_not_span_are_refused(kind: str) -> None:
    problem = make_problem(60, ridge=0.0)
    if kind == "dead input":
        problem.a[:, 4] = 0
    elif kind == "repeated tokens":
        problem.a[:] = problem.a[np.arange(60) % 20]
    else:
        problem.a[:, 4] = problem.a[:, 5] - 2 * problem.a[:, 6]
    with pytest.raises(SingularSystemError, match="block 3, mlp_out"):
        problem.solve()
    problem.ridge = 1e-3
    assert close(product(problem.solve()), problem.least_squares(), 1e-7)


@pytest.mark.parametrize("factor", [1e-3, 250.0])
@pytest.mark.parametrize("n", [5, 60])
def test_scales_of_inputs_errors_and_weights(n: int, factor: float) -> None:
    """λ is relative: the patch of c·a is ΔW / c, that of c·δ is c ΔW, and only ratios of weights matter."""
    for prior in (False, True):
        base = product(make_problem(n, prior=prior).solve(3))
        inputs, errors, weights = (make_problem(n, prior=prior) for _ in range(3))
        inputs.a *= factor
        if inputs.prior is not None:
            inputs.prior = inputs.prior * factor**2
        errors.delta *= factor
        weights.weights *= factor
        assert close(product(inputs.solve(3)) * factor, base, 1e-9)
        assert close(product(errors.solve(3)) / factor, base, 1e-9)
        assert close(product(weights.solve(3)), base, 1e-9)


def test_prior_of_weight_zero_is_no_prior_and_a_large_one_keeps_its_inputs() -> None:
    alone, both = make_problem(5), make_problem(5, prior=True)
    both.rho = 0.0
    assert close(product(both.solve()), product(alone.solve()), 1e-14)
    assert both.prior is not None
    kept = []
    for both.rho in (0.1, 10.0, 1000.0):
        patch = product(both.solve())
        kept.append(np.trace(patch @ both.prior @ patch.T))
    assert kept[0] > 2 * kept[1] > 4 * kept[2]


def test_the_form_with_fewer_operations_is_used() -> None:
    """Rows and directions of a prior that are few for the layer; the counts against those of the matrices' sizes."""
    assert dual_operations(208, 1536, 576, 96) < primal_operations(208, 1536, 576, 96) / 10
    assert dual_operations(1500, 1536, 576, 1536) > primal_operations(1500, 1536, 576, 1536)
    few = dual_operations(100, 10**6, 1, 0)
    assert few == pytest.approx(1.2 * 100**2 * 10**6, rel=1e-2)
    assert primal_operations(0, 10**4, 1, 0) == pytest.approx(10**12 / 3, rel=1e-2)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("n", [5, 11])
def test_rows_in_single_precision_are_multiplied_in_it(n: int, prior: bool | str) -> None:
    """With a ridge that is coarse; the sums of their products and all that follows are float64."""
    problem = make_problem(n, 1e-2, prior)
    stats = Statistics(D_IN, D_OUT, product_dtype=torch.float32)
    stats.update(torch.tensor(problem.a).float(), torch.tensor(problem.delta).float(), torch.tensor(problem.weights))
    known = problem.known or (None if problem.prior is None else Prior.from_gram(torch.tensor(problem.prior)))
    solution = solve(stats, problem.ridge, known, problem.rho)
    assert solution.A.dtype == solution.B.dtype == torch.float64
    error = np.linalg.norm(product(solution) - problem.least_squares()) / np.linalg.norm(problem.least_squares())
    assert 1e-12 < error < 1e-5


def test_prior_restores_its_gram_matrix() -> None:
    gram = make_problem(5, prior=True).prior
    prior = Prior.from_gram(torch.tensor(gram))
    np.testing.assert_allclose(prior.gram().numpy(), gram, atol=1e-12)
    thin = Prior(prior.factor[:, -4:], torch.tensor(0.5))
    np.testing.assert_allclose(
        thin.gram().numpy(), thin.factor.numpy() @ thin.factor.numpy().T + 0.5 * np.eye(D_IN), atol=1e-12
    )


def test_a_prior_in_single_precision_is_solved_with_in_double() -> None:
    problem = make_problem(60, prior=True)
    exact = Prior.from_gram(torch.tensor(problem.prior))
    single = Prior(exact.factor.float(), exact.rest.float())
    solution = solve(problem.statistics(), problem.ridge, single, problem.rho)
    assert solution.A.dtype == torch.float64
    assert close(product(solution), problem.least_squares(), 1e-4)


@pytest.mark.parametrize("n", [90, 300])
@pytest.mark.parametrize(("small", "formed"), [(512, 1024), (0, 1024), (0, 0)], ids=["rows", "formed", "products"])
def test_every_way_to_the_top_gains(n: int, small: int, formed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By n × n, by d_out × d_out, and by a Krylov space of products: numpy's decomposition of δᵀ (I − S⁻¹) δ."""
    monkeypatch.setattr(route, "SMALL", small)
    monkeypatch.setattr(route, "FORMED", formed)
    random, d_out, rank = np.random.default_rng(0), 200, 5
    delta = random.normal(size=(n, d_out)) * 0.9 ** np.arange(d_out)
    rows = random.normal(size=(n, n // 2))  # G is singular
    whole = np.eye(n) + rows @ rows.T
    gains = np.linalg.eigvalsh(delta.T @ (np.eye(n) - np.linalg.inv(whole)) @ delta)[::-1]
    lower = torch.from_numpy(np.linalg.cholesky(whole))
    found, basis, total = route._top_gains(torch.from_numpy(delta), lower, rank)
    np.testing.assert_allclose(found, gains[:rank], rtol=1e-6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
    assert total == pytest.approx(gains.sum(), rel=1e-9)
    matrix = torch.from_numpy(delta.T @ (np.eye(n) - np.linalg.inv(whole)) @ delta)
    assert float(torch.trace(basis.T @ matrix @ basis)) == pytest.approx(gains[:rank].sum(), rel=1e-7)
