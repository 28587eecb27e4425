"""One layer's regression in NumPy, to compare the solvers with: from the definitions, and from full decompositions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
import torch

from lit_thought.solve.least_squares import Prior, Solution, solve
from lit_thought.solve.sums import Statistics

D_IN, D_OUT = 24, 10
FEW = (1, 5, 11, 20)  # kept as rows (n < d_in); 11 is more than d_out, and 20 are more than the dual is used for
MANY = (24, 60)  # folded into sums
RIDGES = (1e-6, 1e-2, 1.0)


@dataclass
class Problem:
    """A regression in NumPy, from the definitions at the top of ``least_squares.py``."""

    a: np.ndarray
    delta: np.ndarray
    weights: np.ndarray
    ridge: float
    prior: np.ndarray | None = None
    rho: float = 0.0
    known: Prior | None = field(default=None, kw_only=True)  # the prior in another form than all of its directions

    @property
    def share(self) -> np.ndarray:
        """wᵢ / w as a column."""
        return (self.weights / self.weights.sum())[:, None]

    @property
    def gram(self) -> np.ndarray:
        own = (self.a * self.share).T @ self.a
        return own if self.prior is None else own + self.rho * self.prior

    @property
    def cross(self) -> np.ndarray:
        return (self.delta * self.share).T @ self.a

    @property
    def scale(self) -> float:
        values = np.linalg.eigvalsh(self.gram)
        return float((values**2).sum() / values.sum())

    @property
    def system(self) -> np.ndarray:
        return self.gram + self.ridge * self.scale * np.eye(self.a.shape[1])

    def error(self, patch: np.ndarray) -> float:
        return float((((self.a @ patch.T - self.delta) ** 2) * self.share).sum())

    def objective(self, patch: np.ndarray) -> float:
        kept = 0.0 if self.prior is None else self.rho * np.trace(patch @ self.prior @ patch.T)
        return self.error(patch) + kept + self.ridge * self.scale * float((patch**2).sum())

    def least_squares(self) -> np.ndarray:
        """The minimiser from one augmented least-squares problem: no normal equations, no inverse."""
        left, right = [self.a * np.sqrt(self.share)], [self.delta * np.sqrt(self.share)]
        if self.prior is not None:
            left.append(np.sqrt(self.rho) * scipy.linalg.sqrtm(self.prior).real)
        left.append(np.sqrt(self.ridge * self.scale) * np.eye(self.a.shape[1]))
        right += [np.zeros((len(block), self.delta.shape[1])) for block in left[1:]]
        return np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0].T

    def reduced_rank(self, rank: int) -> np.ndarray:
        """Reduced-rank regression."""
        return self.truncated(self.least_squares(), rank)

    def truncated(self, patch: np.ndarray, rank: int) -> np.ndarray:
        """Eckart–Young in the metric M: whiten with M^{1/2}, truncate the SVD, whiten back."""
        root = scipy.linalg.sqrtm(self.system).real
        u, s, vt = np.linalg.svd(patch @ root, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)

    def solve(self, rank: int | float | None = None, folded: bool = False) -> Solution:
        prior = self.known or (Prior.from_gram(torch.tensor(self.prior)) if self.prior is not None else None)
        return solve(self.statistics(folded), self.ridge, prior, self.rho, rank, "block 3, mlp_out")

    def statistics(self, folded: bool = False) -> Statistics:
        stats = Statistics(self.a.shape[1], self.delta.shape[1])
        stats.update(torch.tensor(self.a), torch.tensor(self.delta), torch.tensor(self.weights))
        return stats - Statistics(self.a.shape[1], self.delta.shape[1]) if folded else stats


PRIORS = (False, True, "compact")


def make_problem(n: int, ridge: float = 1e-2, prior: bool | str = False, seed: int = 0, d_out: int = D_OUT) -> Problem:
    """Inputs with a decaying spectrum and a common mean, as activations have; δ partly linear in them."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((D_IN, D_IN)) * 0.8 ** np.arange(D_IN)[:, None]
    a = rng.standard_normal((n, D_IN)) @ mixing + rng.standard_normal(D_IN)
    delta = a @ rng.standard_normal((D_IN, d_out)) * 0.9 ** np.arange(d_out) + rng.standard_normal((n, d_out))
    others = rng.standard_normal((D_IN // 2, D_IN)) + 1
    gram = others.T @ others / len(others)
    known = None
    if isinstance(prior, str):  # a few directions, and what is left
        factor = rng.standard_normal((D_IN, 3)) * rng.uniform(0.1, 3, (D_IN, 1))
        rest = rng.uniform(0.1, 2)
        gram = factor @ factor.T + rest * np.eye(D_IN)
        known = Prior(torch.tensor(factor), torch.tensor(rest, dtype=torch.float64))
    weights = rng.uniform(0.2, 5, n)
    return Problem(a, delta, weights, ridge, gram if prior else None, 0.7 if prior else 0.0, known=known)


def product(solution: Solution) -> np.ndarray:
    return (solution.B @ solution.A).numpy()


def close(left: np.ndarray, right: np.ndarray, tol: float) -> bool:
    return bool(np.linalg.norm(left - right) <= tol * np.linalg.norm(right))
