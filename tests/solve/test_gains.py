"""The solve behind a gain against NumPy and SciPy: row by row, Kronecker least squares, a search from many starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from largest import LargestTensor
from least_squares import D_IN, D_OUT, FEW, MANY, PRIORS, RIDGES, Problem, close, make_problem, product

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.settings import check_rank
from lit_thought.solve.gains import solve_with_gains
from lit_thought.solve.least_squares import Prior, Solution, solve
from lit_thought.solve.sums import Statistics

ONES = torch.ones(D_OUT)


@dataclass
class Gained(Problem):
    """A regression behind a gain, from the definitions at the top of ``gains.py``."""

    gain: np.ndarray = field(default_factory=lambda: np.ones(D_OUT))

    @property
    def floor(self) -> float:
        """λ s ḡ²."""
        return self.ridge * self.scale * float(np.median(self.gain[self.gain != 0] ** 2))

    def error(self, patch: np.ndarray) -> float:
        return super().error(self.gain[:, None] * patch)

    def objective(self, patch: np.ndarray) -> float:
        behind = self.gain[:, None] * patch
        kept = 0.0 if self.prior is None else self.rho * np.trace(behind @ self.prior @ behind.T)
        return self.error(patch) + kept + self.floor * float((patch**2).sum())

    def least_squares(self) -> np.ndarray:
        patch = np.zeros((len(self.gain), self.a.shape[1]))
        for j, g in enumerate(self.gain):
            if g != 0:
                patch[j] = np.linalg.solve(g**2 * self.gram + self.floor * np.eye(self.a.shape[1]), g * self.cross[j])
        return patch

    def given_inputs(self, A: np.ndarray) -> np.ndarray:
        """The best B for this A, one row after the other."""
        B, live = np.zeros((len(self.gain), len(A))), self.gain != 0
        metrics = self.gain[live, None, None] ** 2 * (A @ self.gram @ A.T) + self.floor * A @ A.T
        right = self.gain[live, None] * (self.cross[live] @ A.T)
        B[live] = np.linalg.solve(metrics, right[:, :, None])[:, :, 0]
        return B

    def given_outputs(self, B: np.ndarray) -> np.ndarray:
        """The best A for this B: P A Z + λ s ḡ² Q A = R with P = Bᵀ G² B, Q = Bᵀ B, a Sylvester equation."""
        behind = self.gain[:, None] * B
        inner, right = behind.T @ behind, behind.T @ self.cross
        return scipy.linalg.solve_sylvester(
            self.floor * np.linalg.solve(inner, B.T @ B), self.gram, np.linalg.solve(inner, right)
        )

    def alternation(self, rank: int, starts: int = 4, rounds: int = 100) -> float:
        """The smallest objective that exact alternation reaches from random starts."""
        found, rng = [], np.random.default_rng(0)
        for _ in range(starts):
            A = rng.standard_normal((rank, self.a.shape[1]))
            for _ in range(rounds):
                A = self.given_outputs(np.linalg.qr(self.given_inputs(A))[0])
                A = np.linalg.qr(A.T)[0].T
            found.append(self.objective(self.given_inputs(A) @ A))
        return min(found)

    def solve(self, rank: int | float | None = None, folded: bool = False) -> Solution:
        prior = self.known or (Prior.from_gram(torch.tensor(self.prior)) if self.prior is not None else None)
        gain = torch.tensor(self.gain)
        return solve_with_gains(self.statistics(folded), gain, self.ridge, prior, self.rho, rank, "block 3, mlp_out")


def spread(sigma: float = 1.5, zeros: int = 2, seed: int = 3, d_out: int = D_OUT) -> np.ndarray:
    """Gains of both signs, log-normal in size, some of them zero."""
    rng = np.random.default_rng(seed)
    gain = np.exp(sigma * rng.standard_normal(d_out)) * rng.choice([-1, 1], d_out)
    gain[rng.permutation(d_out)[:zeros]] = 0
    return gain


def make_gained(
    n: int,
    ridge: float = 1e-2,
    prior: bool | str = False,
    gain: np.ndarray | None = None,
    seed: int = 0,
    d_out: int = D_OUT,
) -> Gained:
    base = make_problem(n, ridge, prior, seed, d_out)
    gain = spread(seed=seed + 3, d_out=d_out) if gain is None else gain
    return Gained(base.a, base.delta, base.weights, base.ridge, base.prior, base.rho, gain, known=base.known)


def lost(problem: Gained, patch: np.ndarray) -> float:
    """How much worse than the full-rank patch."""
    return problem.objective(patch) - problem.objective(problem.least_squares())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("n", [*FEW, *MANY])
@pytest.mark.parametrize("d_out", [D_OUT, 30])
def test_full_rank_patch_is_that_of_every_row_alone(d_out: int, n: int, ridge: float, prior: bool | str) -> None:
    problem = make_gained(n, ridge, prior, d_out=d_out)
    assert (problem.statistics().rows() is not None) == (n in FEW)
    reference = problem.least_squares()
    for folded in (False, True):
        solution = problem.solve(folded=folded)
        assert close(product(solution), reference, 1e-6)
        assert problem.objective(product(solution)) <= problem.objective(reference) * (1 + 1e-9)
        assert not product(solution)[problem.gain == 0].any()
        columns = solution.B.shape[1]
        np.testing.assert_allclose(solution.B.T @ solution.B, np.eye(columns), atol=1e-9)
        assert solution.A.dtype == solution.B.dtype == torch.float64


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
def test_a_tiny_case_is_one_kronecker_least_squares_problem(prior: bool) -> None:
    """Every entry of ΔW is an unknown of one stacked system: data, preservation, ridge."""
    rng = np.random.default_rng(2)
    a, delta, gain = rng.standard_normal((7, 3)), rng.standard_normal((7, 4)), np.array([2.0, -0.3, 0.0, 9.0])
    gram = np.cov(rng.standard_normal((3, 20))) if prior else None
    problem = Gained(a, delta, rng.uniform(0.5, 2, 7), 0.1, gram, 0.4 if prior else 0.0, gain)
    root = np.sqrt(problem.share)
    scale = np.trace(problem.gram @ problem.gram) / np.trace(problem.gram)
    left = [np.kron(np.diag(gain), a * root), np.sqrt(0.1 * scale * np.median([4, 0.09, 81])) * np.eye(12)]
    if gram is not None:
        left.append(np.kron(np.diag(gain), np.sqrt(0.4) * scipy.linalg.sqrtm(gram).real))
    right = np.concatenate([(delta * root).T.ravel(), np.zeros(sum(map(len, left[1:])))])
    wanted = np.linalg.lstsq(np.concatenate(left), right, rcond=None)[0].reshape(4, 3)
    np.testing.assert_allclose(product(problem.solve()), wanted, atol=1e-12)


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("n", [5, 60])
def test_no_descent_from_the_full_rank_patch(n: int, prior: bool) -> None:
    problem = make_gained(n, prior=prior, gain=np.array([0.05, 0.0, -3.0, 1.0]), d_out=4)
    patch = product(problem.solve())
    best, shape = problem.objective(patch), patch.shape
    found = scipy.optimize.minimize(lambda flat: problem.objective(flat.reshape(shape)), np.zeros(patch.size))
    assert best <= found.fun * (1 + 1e-12)
    assert best == pytest.approx(found.fun, rel=1e-5)


@pytest.mark.parametrize("constant", [1.0, -1.0, 7.5, 1e-3, 1e60, 1e-60])
@pytest.mark.parametrize("rank", [None, 1, 3, 0.9])
@pytest.mark.parametrize("n", [1, 5, 11, 60])
def test_a_constant_gain_only_divides_the_patch(n: int, rank: int | float | None, constant: float) -> None:
    for prior in (False, True):
        for ridge in (1e-3, 1.0):  # ḡ² makes the ridge the same
            plain = make_problem(n, ridge, prior)
            known = plain.solve(rank)
            solution = make_gained(n, ridge, prior, np.full(D_OUT, constant)).solve(rank)
            assert close(product(solution) * constant, product(known), 1e-8)
            for key, value in known.diagnostics.items():
                if key in ("rank", "condition", "norm"):  # solve drops empty directions and bounds the condition
                    continue
                assert solution.diagnostics[key] == pytest.approx(value, rel=1e-8, abs=1e-10), key
            if rank is not None and n > 3:
                assert solution.diagnostics["rank"] == known.diagnostics["rank"]


@pytest.mark.parametrize("rank", [None, 3, 0.9])
@pytest.mark.parametrize("n", [5, 60])
def test_a_sign_or_a_scale_of_the_gain_is_the_patch_s(n: int, rank: int | float | None) -> None:
    base, flipped, larger = (make_gained(n) for _ in range(3))
    signs = np.where(np.arange(D_OUT) % 3 == 0, -1.0, 1.0)
    flipped.gain, flipped.delta = flipped.gain * signs, flipped.delta
    larger.gain = larger.gain * 1e4
    assert close(product(larger.solve(rank)) * 1e4, product(base.solve(rank)), 1e-9)
    flipped.delta = flipped.delta * signs
    assert close(product(flipped.solve(rank)), product(base.solve(rank)), 1e-9)


@pytest.mark.parametrize("rank", [None, 1, 3, 0.9])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("n", FEW)
def test_dual_is_the_primal(n: int, prior: bool | str, ridge: float, rank: int | float | None) -> None:
    problem = make_gained(n, ridge, prior)
    dual, primal = problem.solve(rank), problem.solve(rank, folded=True)
    assert close(product(dual), product(primal), 1e-8)
    for key, value in primal.diagnostics.items():
        if key != "rank" or rank == 0.9:  # the dual has no more than n directions
            assert dual.diagnostics[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
    assert prior or dual.diagnostics["rank"] <= n


def test_repeated_tokens_and_zero_tokens_in_the_dual() -> None:
    problem = make_gained(9, ridge=1e-10)
    problem.a[:] = problem.a[np.arange(9) % 4]
    problem.a[3] = 0
    for rank in (None, 2):
        solution = problem.solve(rank)
        assert problem.objective(product(solution)) <= problem.objective(0.0 * product(solution))
        assert np.isfinite(product(solution)).all()
    assert solution.diagnostics["rank"] == 2
    assert problem.solve().diagnostics["rank"] == 4
    assert close(product(problem.solve()), problem.least_squares(), 1e-4)


@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize("live", [1, 2, 3])
def test_few_channels_with_a_gain(live: int, rank: int | None) -> None:
    gain = np.zeros(D_OUT)
    gain[[7, 0, 4][:live]] = [3.0, -0.01, 40.0][:live]
    for n in (5, 60):
        problem = make_gained(n, gain=gain)
        solution = problem.solve(rank)
        assert solution.diagnostics["rank"] == len(solution.A) == min(live, rank or live)
        assert not solution.B[gain == 0].any()
        if rank != 1 or live == 1:
            assert close(product(solution), problem.least_squares(), 1e-7)
            assert solution.diagnostics["truncation_loss"] == 0


@pytest.mark.parametrize("small", [1e-10, 1e-40, 1e-60, 1e-200, 5e-324])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_gains_next_to_nothing_stay_finite(ridge: float, small: float) -> None:
    gain = spread()
    gain[gain == 0] = small
    for rank in (None, 3):
        patch = product(make_gained(60, ridge, gain=gain).solve(rank))
        assert np.isfinite(patch).all()
        if small < 1e-50:
            assert not patch[gain == small].any()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "prior"), [(11, False), (60, True)], ids=["few, alone", "many, prior"])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_r_is_near_the_best_that_a_search_finds(n: int, rank: int, ridge: float, prior: bool) -> None:
    excess, plain = [], []
    for seed in range(3):
        problem = make_gained(n, ridge, prior, seed=seed)
        solution = problem.solve(rank)
        patch = product(solution)
        assert np.linalg.matrix_rank(patch, tol=1e-9 * np.linalg.norm(patch)) == rank
        mine, full = lost(problem, patch), problem.least_squares()
        best = problem.alternation(rank) - problem.objective(full)
        assert mine <= lost(problem, problem.given_inputs(solution.A.numpy()) @ solution.A.numpy()) * (1 + 1e-7)
        u, s, vt = np.linalg.svd(full)
        truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert mine <= lost(problem, truncated)
        root = scipy.linalg.sqrtm(problem.system).real
        right = np.linalg.svd(problem.gain[:, None] * full @ root)[2][:rank]
        projected = full @ root @ right.T @ right @ np.linalg.inv(root)
        assert mine <= lost(problem, projected)
        excess.append(mine / best - 1)
        plain.append(lost(problem, projected) / best - 1)
    assert max(excess) < 0.1
    assert np.mean(excess) < 0.05
    assert np.mean(excess) < 0.3 * np.mean(plain)


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("rank", [1, 3])
def test_without_ridge_rank_r_is_eckart_young(rank: int, prior: bool) -> None:
    """λ = 0 turns G ΔW into an unknown of its own, so the best G ΔW is that of reduced-rank regression."""
    problem = make_gained(60, 0.0, prior)
    live = problem.gain != 0
    plain = Problem(problem.a, problem.delta[:, live], problem.weights, 0.0, problem.prior, problem.rho)
    assert close((problem.gain[:, None] * product(problem.solve(rank)))[live], plain.reduced_rank(rank), 1e-7)


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("n", [5, 11, 60])
def test_scale_effective_rank_and_condition(n: int, rank: int | None, prior: bool) -> None:
    problem = make_gained(n, prior=prior)
    said = problem.solve(rank).diagnostics
    assert said.keys() == solve(problem.statistics(), 0.1).diagnostics.keys()
    values = np.linalg.eigvalsh(problem.gram)
    assert said["ridge_scale"] == pytest.approx(problem.scale, rel=1e-9)
    assert said["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
    systems = [g**2 * problem.gram + problem.floor * np.eye(D_IN) for g in problem.gain if g != 0]
    assert said["condition"] == pytest.approx(max(map(np.linalg.cond, systems)), rel=1e-6)


@pytest.mark.parametrize("n", [5, 11, 60])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.99, 0.9999])
def test_rank_as_a_fraction_counts_the_weighted_energies(fraction: float, n: int) -> None:
    problem = make_gained(n)
    solution = problem.solve(fraction)
    values, vectors = np.linalg.eigh(problem.gram)
    weighted = problem.gain[:, None] * problem.cross @ vectors
    weighted /= np.sqrt(problem.gain[:, None] ** 2 * values + problem.floor)
    energies = np.linalg.svd(weighted, compute_uv=False) ** 2
    gained = problem.objective(np.zeros((D_OUT, D_IN))) - problem.objective(problem.least_squares())
    assert energies.sum() == pytest.approx(gained, rel=1e-9)
    rank = int(np.argmax(energies.cumsum() >= fraction * energies.sum())) + 1
    assert solution.diagnostics["rank"] == rank
    assert solution.diagnostics["truncation_loss"] < 1.5 * (1 - fraction) + 1e-3
    assert close(product(solution), product(problem.solve(rank)), 1e-9)


def test_more_rank_than_there_is_to_correct() -> None:
    """δ in two channels only: whatever else a patch of rank 4 holds is zero."""
    for n in (5, 60):
        problem = make_gained(n, gain=spread(zeros=0))
        problem.delta[:, 2:] = 0
        solution = problem.solve(4)
        assert close(product(solution), problem.least_squares(), 1e-7)
        assert solution.diagnostics["truncation_loss"] < 1e-9


@pytest.mark.parametrize("n", [D_IN, 60])
def test_without_ridge_every_row_is_least_squares(n: int) -> None:
    problem = make_gained(n, ridge=0.0)
    patch, root = product(problem.solve()), np.sqrt(problem.weights)[:, None]
    for j, g in enumerate(problem.gain):
        if g != 0:
            row = np.linalg.lstsq(g * problem.a * root, (problem.delta * root)[:, j], rcond=None)[0]
            assert close(patch[j], row, 1e-6)
        else:
            assert not patch[j].any()


def test_without_ridge_a_prior_can_make_the_system_invertible() -> None:
    problem = make_gained(60, ridge=0.0)
    problem.a[:, 4] = problem.a[:, 5] - 2 * problem.a[:, 6]
    problem.prior, problem.rho = np.eye(D_IN), 0.5
    assert close(product(problem.solve()), problem.least_squares(), 1e-7)


def test_wrong_gains_are_refused() -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        gain = spread()
        gain[1] = wrong
        with pytest.raises(ThoughtError, match="block 3, mlp_out: gain contains NaN or infinite"):
            make_gained(5, gain=gain).solve()
    for n in (5, 60):
        with pytest.raises(SingularSystemError, match="block 3, mlp_out: the gain is zero for every channel"):
            make_gained(n, gain=np.zeros(D_OUT)).solve()
    for shape in ((D_OUT + 1,), (D_OUT, 1), ()):
        with pytest.raises(ThoughtError, match=rf"block 3, mlp_out: gain must be \({D_OUT},\)"):
            make_gained(5, gain=np.ones(shape)).solve()


@pytest.mark.parametrize("n", [5, 60])
def test_a_gain_in_single_precision_is_solved_with_in_double(n: int) -> None:
    problem = make_gained(n, ridge=1e-2)
    problem.gain = problem.gain.astype(np.float32).astype(np.float64)
    for rank in (None, 3):
        solution = solve_with_gains(problem.statistics(), torch.tensor(problem.gain).float(), problem.ridge, rank=rank)
        assert solution.A.dtype == solution.B.dtype == torch.float64
        assert close(product(solution), product(problem.solve(rank)), 1e-9)


def test_the_weights_of_tokens_are_ratios() -> None:
    base, scaled = make_gained(60, prior=True), make_gained(60, prior=True)
    scaled.weights = scaled.weights * 37
    assert close(product(scaled.solve(3)), product(base.solve(3)), 1e-9)


def test_a_per_token_gain_is_multiplied_into_the_input() -> None:
    """min Σ ‖γᵢ g ⊙ (ΔW aᵢ) − δᵢ‖² + λ s ḡ² ‖ΔW‖² by gradient descent's end point: a zero gradient."""
    problem, rng = make_gained(40, ridge=0.3), np.random.default_rng(1)
    raw, gamma = problem.a.copy(), rng.uniform(0.2, 3, (40, 1))
    problem.a = gamma * raw
    patch = product(problem.solve())
    errors = gamma * problem.gain * (raw @ patch.T) - problem.delta
    gradient = (problem.share * gamma * problem.gain * errors).T @ raw + problem.floor * patch
    assert np.abs(gradient).max() < 1e-10 * np.abs(problem.cross).max() * np.abs(problem.gain).max()


# --- of both solvers ---------------------------------------------------------------------------------------------

Both = pytest.mark.parametrize("make", [make_problem, make_gained], ids=["solve", "solve_with_gains"])


@Both
@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("n", [5, 11, 60])
def test_errors_and_truncation_loss_are_those_of_the_patch(
    n: int, rank: int | None, prior: bool, make: Callable[..., Problem]
) -> None:
    problem = make(n, prior=prior)
    solution = problem.solve(rank)
    patch, said = product(solution), solution.diagnostics
    nothing, full = np.zeros_like(patch), problem.least_squares()
    assert said["error_before"] == pytest.approx(problem.error(nothing), rel=1e-12)
    assert said["error_after"] == pytest.approx(problem.error(patch), rel=1e-9)
    gain = problem.objective(nothing) - problem.objective(full)
    share = (problem.objective(patch) - problem.objective(full)) / gain
    assert said["truncation_loss"] == pytest.approx(share, abs=1e-9)
    assert (share > 1e-4) == (rank is not None)
    assert said["norm"] == pytest.approx(np.linalg.norm(patch), rel=1e-9)
    assert said["tokens"] == n
    assert said["rank"] == solution.A.shape[0] == solution.B.shape[1]


@Both
@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("rank", [None, 2, 0.9])
@pytest.mark.parametrize("n", [5, 11, 60])
def test_nothing_to_correct_gives_a_zero_patch(
    n: int, rank: int | float | None, prior: bool, make: Callable[..., Problem]
) -> None:
    problem = make(n, prior=prior)
    problem.delta[:] = 0
    solution = problem.solve(rank)
    assert product(solution).shape == (D_OUT, D_IN)
    assert not product(solution).any()
    said = solution.diagnostics
    assert [said[key] for key in ("error_before", "error_after", "truncation_loss", "norm")] == [0, 0, 0, 0]


@Both
@pytest.mark.parametrize("n", [1, 5, 12, D_IN - 1])
def test_without_ridge_too_few_tokens_are_refused_by_name(n: int, make: Callable[..., Problem]) -> None:
    """As rows and as sums."""
    with pytest.raises(SingularSystemError, match=f"block 3, mlp_out: .*singular.*{n} tokens for {D_IN}"):
        make(n, ridge=0.0).solve()


@Both
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["a", "delta"])
@pytest.mark.parametrize("n", [5, 60])
def test_values_that_are_not_finite_are_refused_by_name(
    n: int, where: str, value: float, ridge: float, make: Callable[..., Problem]
) -> None:
    for prior in (False, True):
        problem = make(n, ridge, prior)
        getattr(problem, where)[2, 3] = value
        with pytest.raises(SingularSystemError, match=r"block 3, mlp_out: .*NaN or infinite"):
            problem.solve(rank=2)


@Both
@pytest.mark.parametrize("n", [5, 60])
def test_inputs_that_are_all_zero_are_refused_by_name(n: int, make: Callable[..., Problem]) -> None:
    problem = make(n)
    problem.a[:] = 0
    with pytest.raises(SingularSystemError, match="block 3, mlp_out: all inputs"):
        problem.solve()


@Both
@pytest.mark.parametrize("rank", [0, -1, D_OUT + 1, 0.0, 1.0, -0.5, float("nan"), True, "16"])
def test_wrong_rank_is_refused(rank: Any, make: Callable[..., Problem]) -> None:
    with pytest.raises(ThoughtError, match="rank must be"):
        make(5).solve(rank)
    with pytest.raises(ThoughtError, match="rank must be"):
        check_rank(rank, D_OUT)


@pytest.mark.parametrize("gain", [False, True])
def test_few_rows_and_few_directions_form_nothing_of_d_by_d(gain: bool) -> None:
    size, generator = 500, torch.Generator().manual_seed(0)
    stats = Statistics(size, D_OUT)
    stats.update(torch.randn(12, size, generator=generator), torch.randn(12, D_OUT, generator=generator))
    prior = Prior(torch.randn(size, 6, generator=generator), torch.tensor(0.3))
    with LargestTensor() as largest:
        if gain:
            solve_with_gains(stats, torch.randn(D_OUT, generator=generator), 0.01, prior, 3.0, 4)
        else:
            solve(stats, 0.01, prior, 3.0, 4)
    assert largest.numbers < size * size / 4


@pytest.mark.parametrize("solver", [solve, lambda stats, *args, **kw: solve_with_gains(stats, ONES, *args, **kw)])
def test_wrong_settings_are_refused(solver: Callable[..., Solution]) -> None:
    stats, prior = make_problem(5).statistics(), Prior.from_gram(torch.eye(D_IN))
    for ridge, rho in [(-1e-3, 0.1), (float("nan"), 0.1), (float("inf"), 0.1), (0.1, -1.0), (0.1, float("nan"))]:
        with pytest.raises(ThoughtError, match="ridge and prior_weight"):
            solver(stats, ridge, prior, rho)
    with pytest.raises(ThoughtError, match=rf"block 0: prior has a factor .{D_IN + 1}.*expected .{D_IN}, k"):
        solver(stats, 0.1, Prior.from_gram(torch.eye(D_IN + 1)), 1.0, name="block 0")
    with pytest.raises(ThoughtError, match="block 0: there is no token"):
        solver(Statistics(D_IN, D_OUT), 0.1, name="block 0")
