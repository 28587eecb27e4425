"""Thought vectors and thought matrices: the least-squares theorem as properties, against NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.solve.sums import Statistics, VectorStatistics
from lit_thought.theory import SOLVERS, thought_matrix, thought_vector

RIDGE = 0.03
quick = settings(max_examples=30, deadline=None)
sizes, seeds = st.integers(1, 7), st.integers(0, 10**6)


def draw(n: int, d_in: int, d_out: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Activations of the given rank whose other singular values lie in [1, 4], corrections, and the generator."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((n, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((d_in, rank)))[0]
    return (left * rng.uniform(1, 4, rank)) @ right.T, rng.standard_normal((n, d_out)), rng


def objective(matrix: np.ndarray, a: np.ndarray, deltas: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Σ wᵢ ‖M aᵢ − δᵢ‖²."""
    return float((((a @ matrix.T - deltas) ** 2).sum(1) * weights).sum())


def matrix_of(a: np.ndarray, deltas: np.ndarray, solver: str = "exact", weights: np.ndarray | None = None):
    """Our matrix from NumPy rows, as NumPy."""
    weight = None if weights is None else torch.tensor(weights)
    found = thought_matrix(torch.tensor(a), torch.tensor(deltas), solver, weights=weight, ridge=RIDGE)
    assert found.dtype == torch.float64
    assert found.shape == (deltas.shape[1], a.shape[1])
    return found.numpy()


def assert_close(found: np.ndarray | torch.Tensor, wanted: np.ndarray, tol: float = 1e-10) -> None:
    assert np.linalg.norm(np.asarray(found) - wanted) <= tol * max(np.linalg.norm(wanted), 1e-3)


def reference(a: np.ndarray, deltas: np.ndarray, weights: np.ndarray, solver: str) -> np.ndarray:
    """Each solver from its definition, with the rows at hand and no normal equations where that is possible."""
    root = np.sqrt(weights)[:, None]
    if solver == "orthogonal":
        return sum(w * np.outer(e, x) / (x @ x) for x, e, w in zip(a, deltas, weights, strict=True))
    if solver == "isotropic":
        return a.shape[1] * (deltas * weights[:, None]).T @ a / (weights @ (a * a).sum(1))
    if solver == "ridge":
        values = np.linalg.svd(a * root, compute_uv=False) ** 2
        floor = np.sqrt(RIDGE * (values**2).sum() / values.sum()) * np.eye(a.shape[1])
        wanted = np.concatenate([deltas * root, np.zeros((len(floor), deltas.shape[1]))])
        return np.linalg.lstsq(np.concatenate([a * root, floor]), wanted, rcond=None)[0].T
    if solver == "min_norm":
        return (scipy.linalg.pinv(a * root, rtol=1e-7) @ (deltas * root)).T
    return np.linalg.lstsq(a * root, deltas * root, rcond=None)[0].T


# --- Theorem 3.1: the minimiser, and when it is the only one


@quick
@given(d_in=sizes, d_out=sizes, more=st.integers(0, 12), seed=seeds, size=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_exact_is_the_only_minimiser_when_the_activations_span(d_in, d_out, more, seed, size) -> None:
    a, deltas, rng = draw(d_in + more, d_in, d_out, d_in, seed)
    weights = rng.uniform(0.2, 5, len(a))
    matrix = matrix_of(a, deltas, weights=weights)
    least = objective(matrix, a, deltas, weights)
    for _ in range(10):
        step = rng.standard_normal(matrix.shape)
        step *= size / np.linalg.norm(step)
        # Z's least eigenvalue is at least 0.2 · 1, so that a step costs at least 0.2 ‖step‖²
        assert objective(matrix + step, a, deltas, weights) >= least + 0.19 * size**2
    gradient = (a @ matrix.T - deltas).T @ (a * weights[:, None])
    assert np.abs(gradient).max() < 1e-10
    assert_close(matrix, reference(a, deltas, weights, "exact"))


@quick
@given(d_in=st.integers(2, 9), d_out=sizes, missing=st.integers(1, 5), more=st.integers(0, 9), seed=seeds)
def test_missing_directions_leave_a_choice_and_are_counted(d_in, d_out, missing, more, seed) -> None:
    missing = min(missing, d_in - 1)
    a, deltas, rng = draw(d_in - missing + more, d_in, d_out, d_in - missing, seed)
    with pytest.raises(SingularSystemError, match=f"leave {missing} of the {d_in} directions .*'min_norm'.*'ridge'"):
        matrix_of(a, deltas)
    matrix = matrix_of(a, deltas, "min_norm")
    least, norm = objective(matrix, a, deltas), np.linalg.norm(matrix)
    unseen = scipy.linalg.null_space(a, rcond=1e-10)
    assert unseen.shape == (d_in, missing)
    for _ in range(10):
        free = rng.standard_normal((d_out, missing)) @ unseen.T  # kills the span of the activations
        assert objective(matrix + free, a, deltas) == pytest.approx(least, rel=1e-10, abs=1e-10)
        assert np.linalg.norm(matrix + free) > norm  # min_norm is the least of them
        step = 1e-2 * rng.standard_normal(matrix.shape)
        assert objective(matrix + step, a, deltas) >= least - 1e-12
    assert np.abs(matrix @ unseen).max() < 1e-10
    assert_close(matrix, reference(a, deltas, np.ones(len(a)), "min_norm"))


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 3), (40, 1), (40, 13), (4000, 1), (4000, 15), (4000, 16)])
def test_rank_is_counted_in_the_precision_of_the_sums(n: int, rank: int) -> None:
    a, deltas, _ = draw(n, 16, 3, rank, seed=n + rank)
    stats = Statistics(16, 3)
    for start in range(0, n, 100):
        stats.update(torch.tensor(a[start : start + 100]), torch.tensor(deltas[start : start + 100]))
    assert_close(thought_matrix(stats, solver="min_norm"), reference(a, deltas, np.ones(n), "min_norm"))
    if rank == 16:
        assert_close(thought_matrix(stats), reference(a, deltas, np.ones(n), "exact"))
    else:
        with pytest.raises(SingularSystemError, match=f"{n} tokens leave {16 - rank} of the 16"):
            thought_matrix(stats)


@quick
@given(d_in=sizes, d_out=sizes, more=st.integers(0, 20), solver=st.sampled_from(SOLVERS), seed=seeds)
def test_solvers_equal_their_definitions(d_in, d_out, more, solver, seed) -> None:
    a, deltas, rng = draw(d_in + more, d_in, d_out, d_in, seed)
    weights = rng.uniform(0.2, 5, len(a))
    assert_close(matrix_of(a, deltas, solver, weights), reference(a, deltas, weights, solver))
    assert_close(matrix_of(a, deltas, solver), reference(a, deltas, np.ones(len(a)), solver))


@quick
@given(d_in=sizes, d_out=sizes, more=st.integers(0, 20), seed=seeds)
def test_it_is_the_best_single_operator_for_the_tokens_own_operators(d_in, d_out, more, seed) -> None:
    """The second reading of the theorem: Σ ‖M aᵢ − Δᵢ aᵢ‖² with Δᵢ = δᵢ aᵢᵀ / ‖aᵢ‖²."""
    a, deltas, rng = draw(d_in + more, d_in, d_out, d_in, seed)
    own = [np.outer(e, x) / (x @ x) for x, e in zip(a, deltas, strict=True)]
    matrix = matrix_of(a, deltas)

    def regret(candidate: np.ndarray) -> float:
        return float(sum(((candidate - op) @ x) @ ((candidate - op) @ x) for x, op in zip(a, own, strict=True)))

    least = regret(matrix)
    assert least == pytest.approx(objective(matrix, a, deltas), rel=1e-9, abs=1e-10)
    for candidate in (*own, sum(own) / len(own), sum(own), np.zeros_like(matrix)):
        assert least <= regret(candidate) + 1e-10
    for _ in range(10):
        assert least < regret(matrix + 1e-2 * rng.standard_normal(matrix.shape))
    assert_close(matrix_of(a, np.stack([op @ x for x, op in zip(a, own, strict=True)])), matrix)


# --- orthogonal and spherical activations


@quick
@given(d_in=sizes, fewer=st.integers(0, 6), d_out=sizes, seed=seeds)
def test_orthogonal_activations_need_only_the_sum_of_rank_1_operators(d_in, fewer, d_out, seed) -> None:
    n = max(d_in - fewer, 1)
    rng = np.random.default_rng(seed)
    a = np.linalg.qr(rng.standard_normal((d_in, n)))[0].T * rng.uniform(0.1, 10, (n, 1))
    deltas = rng.standard_normal((n, d_out))
    matrix = matrix_of(a, deltas, "orthogonal")
    assert_close(a @ matrix.T, deltas)  # every token gets exactly its own correction
    assert_close(matrix, matrix_of(a, deltas, "min_norm"))
    if n == d_in:
        assert_close(matrix, matrix_of(a, deltas, "exact"))
    with_zero = np.concatenate([a, np.zeros((2, d_in))]), np.concatenate([deltas, np.ones((2, d_out))])
    assert_close(matrix_of(*with_zero, "orthogonal"), matrix)  # a token without an activation has no operator


def test_correlated_activations_need_more_than_the_sum() -> None:
    """A negative control of the above."""
    a, deltas, rng = draw(4, 6, 3, 4, seed=0)
    a += 2 * rng.standard_normal(6)
    for solver in ("orthogonal", "isotropic"):
        assert np.linalg.norm(a @ matrix_of(a, deltas, solver).T - deltas) > 0.5 * np.linalg.norm(deltas)


def spherical_error(n: int, d: int, seed: int, shape: Callable[[np.ndarray], np.ndarray] = lambda a: a) -> float:
    """Relative distance of the isotropic from the exact matrix, for n activations on a sphere of d dimensions."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, d))
    a = shape(3 * a / np.linalg.norm(a, axis=1, keepdims=True))
    deltas = a @ rng.standard_normal((d, 4)) + 0.5 * rng.standard_normal((n, 4))
    exact = matrix_of(a, deltas)
    return float(np.linalg.norm(matrix_of(a, deltas, "isotropic") - exact) / np.linalg.norm(exact))


def test_isotropic_approaches_exact_on_a_sphere_at_the_expected_rate() -> None:
    counts = np.array([400, 1600, 6400, 25600])
    errors = {d: np.array([[spherical_error(n, d, seed) for n in counts] for seed in range(5)]) for d in (4, 16)}
    for error in errors.values():
        slope = np.polyfit(np.log(counts), np.log(error).mean(0), 1)[0]
        assert slope == pytest.approx(-0.5, abs=0.15)
    for d, error in errors.items():  # and O(√(d / n)) in d as well: one constant serves both
        assert (error.mean(0) / np.sqrt(d / counts)).tolist() == pytest.approx([1.0] * 4, abs=0.45)


def test_isotropic_stays_off_where_activations_are_no_sphere() -> None:
    """A negative control of the above: with one long axis more tokens do not help."""

    def stretch(a: np.ndarray) -> np.ndarray:
        return a * np.array([3.0] + [1.0] * 7)

    near, far = (np.mean([spherical_error(n, 8, seed, stretch) for seed in range(5)]) for n in (400, 12800))
    assert far > 0.8 * near > 0.2


# --- thought vectors


@quick
@given(n=st.integers(1, 12), d=sizes, seed=seeds)
def test_vector_is_the_least_squares_constant(n, d, seed) -> None:
    rng = np.random.default_rng(seed)
    deltas, weights = rng.standard_normal((n, d)), rng.uniform(0.2, 5, n)
    vector = thought_vector(torch.tensor(deltas), torch.tensor(weights)).numpy()
    assert vector.shape == (d,)
    assert_close(vector, np.average(deltas, axis=0, weights=weights))
    root = np.sqrt(weights)[:, None]
    assert_close(vector, np.linalg.lstsq(root, root * deltas, rcond=None)[0][0])  # regression on a constant
    for _ in range(10):
        step = rng.standard_normal(d)
        for size in (1e-3, 1.0):
            worse = ((vector + size * step - deltas) ** 2).sum(1) @ weights - ((vector - deltas) ** 2).sum(1) @ weights
            assert worse == pytest.approx(size**2 * weights.sum() * (step @ step), rel=1e-6)
    assert_close(thought_vector(torch.tensor(deltas)), deltas.mean(0))


@quick
@given(n=st.integers(1, 12), d=sizes, seed=seeds)
def test_contrastive_averaging_is_the_least_squares_constant_of_the_differences(n, d, seed) -> None:
    rng = np.random.default_rng(seed)
    plus, minus = (torch.tensor(rng.standard_normal((n, d)) + shift) for shift in (1, -1))
    weights = torch.tensor(rng.uniform(0.2, 5, n))
    means = thought_vector(plus, weights) - thought_vector(minus, weights)
    assert_close(means, thought_vector(plus - minus, weights).numpy())


@quick
@given(n=st.integers(1, 20), cuts=st.lists(st.integers(0, 20), max_size=4), order=st.randoms(use_true_random=False))
def test_vector_depends_on_neither_split_nor_order(n, cuts, order) -> None:
    rng = np.random.default_rng(n)
    deltas, weights = torch.tensor(rng.standard_normal((n, 3))), torch.tensor(rng.integers(1, 4, n))
    edges = [0, *sorted(cut % (n + 1) for cut in cuts), n]
    parts = list(pairwise(edges))
    order.shuffle(parts)
    stats, merged = VectorStatistics(3), VectorStatistics(3)
    for start, stop in parts:
        part = VectorStatistics(3)
        for target in (stats, part):
            target.update(deltas[start:stop], weights[start:stop])
        merged = merged + part
    wanted = deltas.repeat_interleave(weights, 0).mean(0).numpy()
    for found in (stats, merged, (merged + stats) - stats):
        assert_close(thought_vector(found), wanted)


# --- one arithmetic: rows, sums, splits, order, weights


def gather(a, deltas, weights, edges: list[int], merge: bool, fold: bool) -> Statistics:
    """Statistics with the rank-1 operators: updated piece by piece, or pieces merged; folded at will."""
    d_in, d_out = a.shape[1], deltas.shape[1]
    stats = Statistics(d_in, d_out, rank_one=True)
    for start, stop in pairwise(edges):
        part = Statistics(d_in, d_out, rank_one=True) if merge else stats
        part.update(a[start:stop], deltas[start:stop], None if weights is None else weights[start:stop])
        stats = stats + part if merge else stats
    return stats - Statistics(d_in, d_out, rank_one=True) if fold else stats


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 24), max_size=3),
    merge=st.booleans(),
    fold=st.booleans(),
    seed=seeds,
)
def test_solvers_depend_on_neither_split_order_merging_nor_folding(n, cuts, merge, fold, seed) -> None:
    d_in, d_out = 8, 3
    a, deltas, rng = (torch.tensor(x) if i < 2 else x for i, x in enumerate(draw(n, d_in, d_out, min(n, d_in), seed)))
    weights, order = torch.tensor(rng.integers(1, 4, n)), torch.tensor(rng.permutation(n))
    edges = [0, *sorted(cut % (n + 1) for cut in cuts), n]
    stats = gather(a[order], deltas[order], weights[order], edges, merge, fold)
    assert (stats.rows() is None) == (fold or n >= d_in)
    repeated = gather(a.repeat_interleave(weights, 0), deltas.repeat_interleave(weights, 0), None, [0, 99], False, True)
    for solver in SOLVERS:
        if solver == "exact" and n < d_in:
            for sums in (stats, repeated):
                with pytest.raises(SingularSystemError, match=f"leave {d_in - n} of the {d_in}"):
                    thought_matrix(sums)
            continue
        wanted = thought_matrix(a, deltas, solver, weights=weights, ridge=RIDGE).numpy()
        assert_close(thought_matrix(stats, solver=solver, ridge=RIDGE), wanted)
        assert_close(thought_matrix(repeated, solver=solver, ridge=RIDGE), wanted)


def test_subtracting_statistics_takes_tokens_off_again() -> None:
    a, deltas, _ = draw(30, 6, 2, 6, seed=3)
    first, both = Statistics(6, 2, rank_one=True), Statistics(6, 2, rank_one=True)
    first.update(torch.tensor(a[:12]), torch.tensor(deltas[:12]))
    both.update(torch.tensor(a), torch.tensor(deltas))
    for solver in SOLVERS:
        assert_close(thought_matrix(both - first, None, solver, ridge=RIDGE), matrix_of(a[12:], deltas[12:], solver))


def test_half_precision_rows_are_summed_in_float64() -> None:
    a, deltas, _ = (torch.tensor(x).bfloat16() if i < 2 else x for i, x in enumerate(draw(40, 6, 2, 6, seed=1)))
    exact = reference(a.double().numpy(), deltas.double().numpy(), np.ones(40), "exact")
    assert_close(thought_matrix(a, deltas), exact)
    assert_close(thought_vector(deltas), deltas.double().numpy().mean(0))


def test_ridge_goes_from_the_least_norm_minimiser_to_zero() -> None:
    a, deltas, _ = (torch.tensor(x) if i < 2 else x for i, x in enumerate(draw(5, 8, 3, 5, seed=2)))
    least = thought_matrix(a, deltas, "min_norm").numpy()
    assert_close(thought_matrix(a, deltas, "ridge", ridge=1e-7), least, 1e-5)
    norms = [float(thought_matrix(a, deltas, "ridge", ridge=ridge).norm()) for ridge in (1e-3, 1e-1, 10.0, 1e3)]
    assert np.linalg.norm(least) > norms[0] > norms[1] > norms[2] > 50 * norms[3] > 0


# --- misuse


def test_unknown_solver_is_refused_with_the_choices() -> None:
    with pytest.raises(ThoughtError, match=r"solver must be one of exact, .*orthogonal; got 'inverse'"):
        thought_matrix(torch.eye(2), torch.eye(2), "inverse")


@pytest.mark.parametrize(
    "shapes", [((4, 3), (5, 2)), ((4,), (4, 2)), ((4, 3), (4,)), ((4, 3), ()), ((4, 1, 3), (4, 2))]
)
def test_wrong_shapes_are_refused(shapes: tuple) -> None:
    a, deltas = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ThoughtError, match=r"\(n, d_in\) and \(n, d_out\).*got a \("):
        thought_matrix(a, deltas, "ridge")


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(4, 1), torch.tensor(1.0)])
def test_wrong_weights_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(ThoughtError, match=r"weights.*\(n,\).*got a"):
        thought_matrix(torch.ones(4, 3), torch.ones(4, 2), "ridge", weights=weights)
    with pytest.raises(ThoughtError, match=r"deltas must be \(n, d\).*got deltas"):
        thought_vector(torch.ones(4, 2), weights)
    for function in (lambda w: thought_vector(torch.ones(2, 2), w), lambda w: matrix_with(w)):
        with pytest.raises(ThoughtError, match=r"weights must be ≥ 0; the least is -2\.0"):
            function(torch.tensor([1.0, -2.0]))


def matrix_with(weights: torch.Tensor) -> torch.Tensor:
    return thought_matrix(torch.eye(2), torch.ones(2, 2), weights=weights)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_values_that_are_not_finite_are_refused(solver: str, value: float) -> None:
    for name in ("a", "deltas", "weights"):
        rows = {"a": torch.eye(6), "deltas": torch.ones(6, 2), "weights": torch.ones(6)}
        rows[name].view(-1)[1] = value
        with pytest.raises(ThoughtError, match=f"{name} has 1 NaN or infinite"):
            thought_matrix(rows["a"], rows["deltas"], solver, weights=rows["weights"])
        for n in (2, 6) if name != "weights" else ():  # rows kept, rows folded
            stats = Statistics(6, 2, rank_one=True)
            stats.update(*(x[:n] for x in rows.values()))
            with pytest.raises(SingularSystemError, match=r"thought_matrix: .*NaN or infinite"):
                thought_matrix(stats, solver=solver)
    deltas = torch.ones(3, 2)
    deltas[1, 0] = value
    with pytest.raises(ThoughtError, match="deltas has 1 NaN or infinite"):
        thought_vector(deltas)
    sums = VectorStatistics(2)
    sums.update(deltas)
    with pytest.raises(SingularSystemError, match=r"thought_vector: .*NaN or infinite"):
        thought_vector(sums)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_tokens_and_no_activations(solver: str) -> None:
    empty = torch.zeros(0, 3), torch.zeros(0, 2)
    for arguments in (empty, (Statistics(3, 2, rank_one=True),)):
        with pytest.raises(ThoughtError, match="no token"):
            thought_matrix(*arguments, solver=solver)
    with pytest.raises(ThoughtError, match="every weight is zero"):
        thought_matrix(torch.eye(3), torch.ones(3, 2), solver, weights=torch.zeros(3))
    for n in (1, 5):
        rows = torch.zeros(n, 3), torch.ones(n, 2)
        if solver in ("min_norm", "orthogonal"):
            assert not thought_matrix(*rows, solver).any()
        else:
            with pytest.raises(SingularSystemError, match="leave 3 of the 3" if solver == "exact" else "are zero"):
                thought_matrix(*rows, solver)
    for nothing in (torch.zeros(0, 2), VectorStatistics(2)):
        with pytest.raises(ThoughtError, match="no token to average"):
            thought_vector(nothing)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    a, deltas = torch.eye(3), torch.ones(3, 2)
    stats, sums = Statistics(3, 2), VectorStatistics(2)
    stats.update(a, deltas)
    sums.update(deltas)
    with pytest.raises(ThoughtError, match=r"rank_one=True"):
        thought_matrix(stats, solver="orthogonal")
    with pytest.raises(ThoughtError, match="a is sums, which hold deltas already"):
        thought_matrix(stats, deltas)
    with pytest.raises(ThoughtError, match="a is sums, which hold weights already"):
        thought_matrix(stats, weights=torch.ones(3))
    with pytest.raises(ThoughtError, match="deltas is sums, which hold weights already"):
        thought_vector(sums, torch.ones(3))
    with pytest.raises(ThoughtError, match="deltas is missing"):
        thought_matrix(a)
    with pytest.raises(ThoughtError, match="a must be a tensor; got list"):
        thought_matrix([[1.0]], deltas)
    with pytest.raises(ThoughtError, match="deltas must be a tensor; got Statistics"):
        thought_vector(stats)
    with pytest.raises(ThoughtError, match="ridge and prior_weight must be finite"):
        thought_matrix(a, deltas, "ridge", ridge=-1.0)


@pytest.mark.parametrize("solver", ["exact", "min_norm", "ridge", "isotropic"])
def test_sums_of_narrow_products_give_a_wide_matrix(solver: str) -> None:
    torch.manual_seed(0)
    a, deltas = torch.randn(6, 8), torch.randn(6, 3)
    stats = Statistics(8, 3, product_dtype=torch.float32)
    stats.update(a, deltas)
    if solver == "exact":
        stats.update(torch.randn(8, 8), torch.randn(8, 3))
    found = thought_matrix(stats, solver=solver)
    assert found.dtype == torch.float64
    if solver == "min_norm":
        torch.testing.assert_close(found, (torch.linalg.pinv(a.double()) @ deltas.double()).T, rtol=1e-9, atol=1e-9)
