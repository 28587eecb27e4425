"""Edits with equality constraints: ROME, MEMIT and a brute-force KKT system, each written in NumPy on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import scipy.linalg
import torch

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.solve.least_squares import Prior, solve, solve_constrained
from lit_thought.solve.sums import Statistics

D_IN, D_OUT = 9, 5
FEW, MANY = 3, 40  # tokens kept as rows, tokens folded into sums


@dataclass
class Edit:
    """Keys, wanted changes, preserved inputs and tokens of one layer, all NumPy float64."""

    keys: np.ndarray  # (k, d_in)
    values: np.ndarray  # (k, d_out)
    kept: np.ndarray  # (m, d_in), whose mean Gram matrix is Z₀
    a: np.ndarray  # (n, d_in); no tokens: n = 0
    delta: np.ndarray  # (n, d_out)
    weights: np.ndarray  # (n,)
    ridge: float = 0.0
    rho: float = 0.7

    @property
    def z0(self) -> np.ndarray:
        return sum(np.outer(x, x) for x in self.kept) / len(self.kept)

    @cached_property
    def scale(self) -> float:
        z = self.rho * self.z0 if len(self.kept) else np.zeros((D_IN, D_IN))
        for x, w in zip(self.a, self.weights, strict=True):
            z = z + w / self.weights.sum() * np.outer(x, x)
        return float((z**2).sum() / np.trace(z))

    def objective(self, patch: np.ndarray) -> float:
        """The three terms from the tokens, with neither Z nor C."""
        total = self.ridge * self.scale * (patch**2).sum()
        if len(self.a):
            total += np.average(((self.a @ patch.T - self.delta) ** 2).sum(1), weights=self.weights)
        if len(self.kept):
            total += self.rho * ((self.kept @ patch.T) ** 2).sum(1).mean()
        return float(total)

    def kkt(self) -> np.ndarray:
        """The stationary point of the Lagrangian, as one linear system in all entries of ΔW and the multipliers.

        The objective is quadratic, so its gradient and Hessian are read off differences of the objective itself.
        """
        size, count = D_OUT * D_IN, len(self.keys) * D_OUT
        basis = np.eye(size).reshape(size, D_OUT, D_IN)
        zero, single = self.objective(np.zeros((D_OUT, D_IN))), [self.objective(step) for step in basis]
        gradient = np.array([(one - self.objective(-step)) / 2 for one, step in zip(single, basis, strict=True)])
        hessian = np.zeros((size, size))
        for i in range(size):
            for j in range(i + 1):
                mixed = self.objective(basis[i] + basis[j]) - single[i] - single[j] + zero
                hessian[i, j] = hessian[j, i] = mixed
        constraints = np.kron(np.eye(D_OUT), self.keys)  # (k · d_out, d_out · d_in), outputs slowest
        system = np.block([[hessian, constraints.T], [constraints, np.zeros((count, count))]])
        found = np.linalg.solve(system, np.concatenate([-gradient, self.values.T.reshape(-1)]))
        return found[:size].reshape(D_OUT, D_IN)

    def prior(self) -> Prior | None:
        return Prior.from_gram(torch.tensor(self.z0)) if len(self.kept) else None

    def statistics(self) -> Statistics | None:
        if not len(self.a):
            return None
        stats = Statistics(D_IN, D_OUT)
        stats.update(torch.tensor(self.a), torch.tensor(self.delta), torch.tensor(self.weights))
        return stats

    def solve(self) -> np.ndarray:
        keys, values = torch.tensor(self.keys), torch.tensor(self.values)
        found = solve_constrained(
            keys, values, prior=self.prior(), stats=self.statistics(), ridge=self.ridge, prior_weight=self.rho
        )
        assert found.dtype == torch.float64
        assert found.shape == (D_OUT, D_IN)
        return found.numpy()


def make_edit(k: int = 1, n: int = 0, kept: int = 30, ridge: float = 0.0, seed: int = 0) -> Edit:
    """Activations with a decaying spectrum and a common mean."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((D_IN, D_IN)) * 0.8 ** np.arange(D_IN)[:, None]

    def inputs(count: int) -> np.ndarray:
        return rng.standard_normal((count, D_IN)) @ mixing + 0.5

    keys, values, others = inputs(k), rng.standard_normal((k, D_OUT)), inputs(kept)
    return Edit(keys, values, others, inputs(n), rng.standard_normal((n, D_OUT)), rng.uniform(0.2, 5, n), ridge)


def assert_close(found: np.ndarray, wanted: np.ndarray, tol: float = 1e-9) -> None:
    assert np.linalg.norm(found - wanted) <= tol * np.linalg.norm(wanted)


CASES = [  # keys, tokens, preserved inputs, ridge
    (1, 0, 30, 0.0),
    (1, 0, 30, 0.01),
    (3, 0, 30, 0.0),
    (3, 0, 4, 0.01),
    (1, MANY, 30, 0.0),
    (3, MANY, 30, 0.01),
    (3, MANY, 0, 0.0),
    (2, FEW, 30, 0.0),
    (3, FEW, 0, 0.01),
    (3, FEW, 4, 0.01),
    (D_IN, MANY, 30, 0.01),
]


def rome(weight: np.ndarray, key: np.ndarray, value: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Meng et al. 2022, equation 2: Ŵ = W + Λ (C⁻¹ k)ᵀ with Λ = (v − W k) / ((C⁻¹ k)ᵀ k); returns Ŵ − W."""
    direction = np.linalg.inv(gram) @ key
    return np.outer((value - weight @ key) / (direction @ key), direction)


def memit(keys: np.ndarray, residuals: np.ndarray, gram: np.ndarray, strength: float) -> np.ndarray:
    """Meng et al. 2023: Δ = R Kᵀ (λ C₀ + K Kᵀ)⁻¹, keys and residuals as rows here."""
    return residuals.T @ keys @ np.linalg.inv(strength * gram + keys.T @ keys)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rho", [0.01, 1.0, 300.0])
def test_one_key_and_no_tokens_is_rome(rho: float, seed: int) -> None:
    edit = make_edit(seed=seed)
    edit.rho = rho
    rng = np.random.default_rng(seed + 100)
    weight, value = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal(D_OUT)
    edit.values = (value - weight @ edit.keys[0])[None]
    patch = edit.solve()
    assert_close(patch, rome(weight, edit.keys[0], value, edit.z0))
    assert_close((weight + patch) @ edit.keys[0], value)
    assert np.linalg.matrix_rank(patch) == 1


@pytest.mark.parametrize("k", [1, 3, 6, 40])
@pytest.mark.parametrize("strength", [0.1, 3.0, 1e3])
def test_keys_as_tokens_and_a_prior_are_memit(k: int, strength: float) -> None:
    edit = make_edit(k)
    stats = Statistics(D_IN, D_OUT)
    stats.update(torch.tensor(edit.keys), torch.tensor(edit.values))
    solution = solve(stats, 0.0, edit.prior(), prior_weight=strength / k)
    assert_close((solution.B @ solution.A).numpy(), memit(edit.keys, edit.values, edit.z0, strength))


def test_memit_becomes_the_constrained_edit_as_its_prior_loses_weight() -> None:
    edit = make_edit(3)
    patch = edit.solve()
    gaps = [np.linalg.norm(memit(edit.keys, edit.values, edit.z0, strength) - patch) for strength in (1e-1, 1e-3, 1e-5)]
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]
    assert gaps[2] < 1e-4 * np.linalg.norm(patch)


@pytest.mark.parametrize(("k", "n", "kept", "ridge"), CASES)
def test_constrained_patch_solves_the_kkt_system(k: int, n: int, kept: int, ridge: float) -> None:
    for seed in range(3):
        edit = make_edit(k, n, kept, ridge, seed)
        assert_close(edit.solve(), edit.kkt())


@pytest.mark.parametrize(("k", "n", "kept", "ridge"), CASES)
def test_constraint_holds_and_no_other_feasible_patch_is_better(k: int, n: int, kept: int, ridge: float) -> None:
    edit = make_edit(k, n, kept, ridge)
    patch = edit.solve()
    assert_close(patch @ edit.keys.T, edit.values.T)
    least, rng = edit.objective(patch), np.random.default_rng(1)
    free = scipy.linalg.null_space(edit.keys)  # directions that change no key's output
    assert free.shape == (D_IN, D_IN - k)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(10 if k < D_IN else 0):
            step = size * rng.standard_normal((D_OUT, D_IN - k)) @ free.T
            assert_close((patch + step) @ edit.keys.T, edit.values.T, 1e-7)
            assert edit.objective(patch + step) > least
    free_keys = replace(edit, keys=edit.keys[:0], values=edit.values[:0])  # a negative control
    assert edit.objective(free_keys.kkt()) < 0.99 * least


def test_a_constraint_that_holds_anyway_changes_nothing() -> None:
    for n in (FEW, MANY):
        edit = make_edit(3, n, ridge=0.01)
        stats = edit.statistics()
        assert stats is not None
        free = solve(stats, edit.ridge, edit.prior(), edit.rho)
        patch = (free.B @ free.A).numpy()
        edit.values = edit.keys @ patch.T
        assert_close(edit.solve(), patch)
        edit.values = edit.values + 0.1
        assert np.linalg.norm(edit.solve() - patch) > 1e-2 * np.linalg.norm(patch)


def test_constraint_is_the_limit_of_a_heavy_token() -> None:
    edit = make_edit(1, MANY)
    heavy = Edit(
        edit.keys,
        edit.values,
        edit.kept,
        np.concatenate([edit.a, edit.keys]),
        np.concatenate([edit.delta, edit.values]),
        np.concatenate([edit.weights, [1e6 * edit.weights.sum()]]),
    )
    stats = heavy.statistics()
    assert stats is not None
    # ρ counts per mean token, and the heavy one has grown the mean
    free = solve(stats, 0.0, edit.prior(), edit.rho * edit.weights.sum() / heavy.weights.sum())
    assert_close((free.B @ free.A).numpy(), edit.solve(), 1e-5)


def test_scale_and_order_of_keys_do_not_matter() -> None:
    edit = make_edit(3, MANY, ridge=0.01)
    patch = edit.solve()
    sizes = np.array([[1e-8], [1.0], [1e8]])
    edit.keys, edit.values = (edit.keys * sizes)[::-1].copy(), (edit.values * sizes)[::-1].copy()
    assert_close(edit.solve(), patch)


def test_keys_in_single_precision_are_solved_in_double() -> None:
    edit = make_edit(2, MANY, ridge=0.01)
    edit.keys, edit.values = edit.keys.astype(np.float32), edit.values.astype(np.float32)
    patch = edit.solve()
    edit.keys, edit.values = edit.keys.astype(np.float64), edit.values.astype(np.float64)
    assert_close(patch, edit.kkt())


def test_ill_conditioned_prior_still_meets_the_constraint() -> None:
    for seed in range(20):
        edit = make_edit(6, seed=seed)
        edit.kept = edit.kept * np.logspace(0, -4.5, D_IN)
        assert np.linalg.cond(edit.z0) > 1e9
        assert_close(edit.solve() @ edit.keys.T, edit.values.T, 1e-13)


# --- misuse


def test_dependent_keys_are_refused_with_their_number() -> None:
    for change in ("repeated", "combined", "too many"):
        edit = make_edit(D_IN + 1 if change == "too many" else 4, ridge=0.01)
        if change == "repeated":
            edit.keys[3] = 1e6 * edit.keys[0]
        elif change == "combined":
            edit.keys[3] = edit.keys[0] - 2 * edit.keys[1]
        with pytest.raises(SingularSystemError, match=f"{len(edit.keys)} keys span {len(edit.keys) - 1} dimensions"):
            edit.solve()


def test_zero_key_is_refused_by_number() -> None:
    edit = make_edit(3)
    edit.keys[1] = 0
    with pytest.raises(SingularSystemError, match="layer: key 1 is zero"):
        edit.solve()


@pytest.mark.parametrize(("n", "kept"), [(0, 4), (FEW, 0), (FEW, 4)])
def test_singular_system_is_refused_by_name(n: int, kept: int) -> None:
    edit = make_edit(1, n, kept)
    keys, values = torch.tensor(edit.keys), torch.tensor(edit.values)
    with pytest.raises(SingularSystemError, match=f"block 2: the system is singular .*{n} tokens.*{D_IN}.*ridge > 0"):
        solve_constrained(keys, values, prior=edit.prior(), stats=edit.statistics(), name="block 2")


def test_nothing_to_minimise_is_refused() -> None:
    keys, values, prior = torch.ones(1, D_IN), torch.ones(1, D_OUT), Prior.from_gram(torch.eye(D_IN))
    for arguments in ({"prior": None}, {"prior": prior, "prior_weight": 0.0}, {"prior": None, "ridge": 0.1}):
        with pytest.raises(ThoughtError, match="block 2: there is nothing to minimise; give stats, or a prior"):
            solve_constrained(keys, values, name="block 2", **arguments)
    with pytest.raises(ThoughtError, match="block 2: there is no token"):
        solve_constrained(keys, values, prior=prior, stats=Statistics(D_IN, D_OUT), name="block 2")
    with pytest.raises(SingularSystemError, match="are zero"):
        solve_constrained(keys, values, prior=Prior.from_gram(torch.zeros(D_IN, D_IN)))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, D_IN), (3, D_OUT)),
        ((D_IN,), (D_OUT,)),
        ((0, D_IN), (0, D_OUT)),
        ((1, 1, D_IN), (1, D_OUT)),
        ((2, D_IN), (2, D_OUT + 1)),
        ((2, D_IN + 1), (2, D_OUT)),
    ],
)
def test_wrong_shapes_are_refused(keys: tuple, values: tuple) -> None:
    edit = make_edit(1, MANY)
    with pytest.raises(
        ThoughtError, match=r"(keys and values must be \(k, .*got \(|prior has a factor .9, 9.*expected .10)"
    ):
        solve_constrained(torch.ones(keys), torch.ones(values), prior=edit.prior(), stats=edit.statistics())


def test_wrong_settings_and_values_are_refused() -> None:
    keys, values, prior = torch.ones(1, D_IN), torch.ones(1, D_OUT), Prior.from_gram(torch.eye(D_IN))
    for wrong in ({"ridge": -1.0}, {"ridge": float("nan")}, {"prior_weight": -1.0}, {"prior_weight": float("inf")}):
        with pytest.raises(ThoughtError, match="ridge and prior_weight must be finite"):
            solve_constrained(keys, values, prior=prior, **wrong)
    with pytest.raises(ThoughtError, match=r"prior has a factor .3, 3.*expected .9, k"):
        solve_constrained(keys, values, prior=Prior.from_gram(torch.eye(3)))
    for name, rows in (("keys", keys), ("values", values)):
        bad = {"keys": keys, "values": values, name: rows.clone()}
        bad[name][0, 1] = float("nan")
        with pytest.raises(ThoughtError, match=f"layer: {name} contains NaN or infinite"):
            solve_constrained(**bad, prior=prior)
    poisoned = Statistics(D_IN, D_OUT)
    poisoned.update(torch.full((2, D_IN), float("inf")), torch.ones(2, D_OUT))
    with pytest.raises(SingularSystemError, match="NaN or infinite"):
        solve_constrained(keys, values, prior=prior, stats=poisoned)
