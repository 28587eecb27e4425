"""The few numbers that say of a mean Gram matrix what a solve needs, summed in one pass without the matrix itself.

With aᵢ the inputs to preserve, Z₀ = (1/n) Σ aᵢ aᵢᵀ and Ω a fixed random orthonormal matrix, (d, l), the sketch

    Y = Z₀ Ω = (1/n) Σ aᵢ (aᵢᵀ Ω)

takes l products an input instead of d, and holds Z₀'s leading directions (Nyström):

    Z₀ ≈ Y (Ωᵀ Y)⁻¹ Yᵀ = U diag(σ) Uᵀ.

The k leading ones are kept, L = U √σ. Of the rest R = Z₀ − L Lᵀ, whose directions differ in size, a patch is to be held
back where R is large more than where it is small; the one number that stands for it is the mean of its eigenvalues,
each weighted by its own size,

    Z₀ ≈ L Lᵀ + t I,   t = ‖R‖_F² / tr R.

``‖R‖_F²`` is estimated from the products of R with some more random columns, on which L does not depend.

Source: Tropp, Yurtsever, Udell and Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", arXiv 1706.05736, algorithm 3; Halko, Martinsson and Tropp 2011, arXiv 0909.4061.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lit_thought.solve.least_squares import Prior
from lit_thought.solve.spectral import eigh, shifted_cholesky

__all__ = ["Sketch"]

OVERSAMPLING = 2
"""Columns of a sketch over directions kept."""
PROBES = 32
"""Columns with which what is left is measured."""


class Sketch:
    """The sums of one site over the inputs that it should preserve.

    Args:
        size: d, the number of channels.
        directions: k, how many directions to keep; no more than d are.
        device: where the inputs are.

    Attributes:
        count: inputs added.

    Example:
        >>> sketch = Sketch(size=3, directions=3)
        >>> sketch.update(torch.eye(3))
        >>> bool(torch.allclose(sketch.prior().gram(), torch.eye(3).double() / 3))
        True
    """

    def __init__(self, size: int, directions: int, device: torch.device | str = "cpu") -> None:
        self.directions, self.count = min(directions, size), 0
        self._width = min(size, OVERSAMPLING * directions)
        self._test = _columns(size, self._width).to(device)
        self._total = torch.zeros_like(self._test)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, a: Tensor) -> None:
        """Add inputs, (n, d), any floating dtype; they are multiplied in it, and their products added in float64."""
        self._total += a.T @ (a @ self._test.to(a))
        self._squares += a.square().sum(1).double().sum()
        self.count += len(a)

    @property
    def finite(self) -> bool:
        """Whether what was summed is free of NaN and infinite values."""
        return bool(self._squares.isfinite()) and bool(self._total.isfinite().all())

    def prior(self) -> Prior:
        """Z₀ ≈ L Lᵀ + t I, float64."""
        sketch, test = self._total[:, : self._width] / self.count, self._test[:, : self._width]
        # shifted by the size of the products' rounding: the core is positive definite, Z₀ as sketched is rootᵀ root
        lower, shift = shifted_cholesky(test.T @ sketch, 1e-7)
        root = torch.linalg.solve_triangular(lower, (sketch + shift * test).T, upper=False)
        values, vectors = eigh(root @ root.T)
        values, vectors = values[-self.directions :], vectors[:, -self.directions :]
        kept = (values - shift).clamp_min(0)
        factor = root.T @ (vectors * (kept / values).sqrt())
        left = self._squares / self.count - kept.sum()
        if not float(left) > 1e-6 * float(kept.sum()):  # nothing but rounding
            return Prior(factor, left.new_zeros(()))
        probes = self._test[:, self._width :]
        seen = self._total[:, self._width :] / self.count - factor @ (factor.T @ probes)
        return Prior(factor, seen.square().sum() / PROBES / left)


@lru_cache(maxsize=4)
def _columns(size: int, width: int) -> Tensor:
    """Ω, and the probes beside it, (size, width + 32): the same for all blocks, devices and processes."""
    own = torch.Generator().manual_seed(0)
    noise = torch.randn(size, width + PROBES, generator=own, dtype=torch.float64, device="cpu")
    return torch.cat([torch.linalg.qr(noise[:, :width])[0], noise[:, width:]], dim=1)
