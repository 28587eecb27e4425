"""The few numbers that say of a mean Gram matrix what a solve needs, summed in one pass without the matrix itself.

With aᵢ the inputs to preserve, Z₀ = (1/n) Σ aᵢ aᵢᵀ and Ω a fixed random orthonormal matrix, (d, l), the sketch

    Y = Z₀ Ω = (1/n) Σ aᵢ (aᵢᵀ Ω)

takes l products an input instead of d, and holds Z₀'s leading directions (Nyström):

    Z₀ ≈ Y (Ωᵀ Y)⁻¹ Yᵀ = U diag(σ) Uᵀ.

The k leading ones are kept, L = U √σ, and what is left of Z₀ in the mean square of each channel, or of all of them.

Source: Tropp, Yurtsever, Udell and Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", arXiv 1706.05736, algorithm 3; Halko, Martinsson and Tropp 2011, arXiv 0909.4061.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_thought.solve.least_squares import Prior
from lit_thought.solve.spectral import eigh

__all__ = ["Sketch"]

OVERSAMPLING = 2
"""Columns of a sketch over directions kept."""


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
        >>> factor, rest = sketch.parts()
        >>> bool(torch.allclose(factor @ factor.T + rest.diag(), torch.eye(3).double() / 3))
        True
    """

    def __init__(self, size: int, directions: int, device: torch.device | str = "cpu") -> None:
        self.directions, self.count = min(directions, size), 0
        width = min(size, OVERSAMPLING * directions)
        noise = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._test = torch.linalg.qr(noise)[0].to(device)  # the same on every device
        self._total = torch.zeros_like(self._test)
        self._squares = self._test.new_zeros(size)

    def update(self, a: Tensor) -> None:
        """Add inputs, (n, d), any floating dtype; they are multiplied in it, and their products added in float64."""
        self._total += a.T @ (a @ self._test.to(a))
        self._squares += a.double().square().sum(0)
        self.count += len(a)

    @property
    def finite(self) -> bool:
        """Whether what was summed is free of NaN and infinite values."""
        return bool(self._squares.isfinite().all()) and bool(self._total.isfinite().all())

    def prior(self) -> Prior:
        """Z₀ ≈ L Lᵀ + t I, float64."""
        sketch, squares = self._total / self.count, self._squares / self.count
        # shifted by the size of the products' rounding, so that the core is positive definite
        shift = 1e-7 * float(torch.linalg.vector_norm(sketch)) + torch.finfo(torch.float64).tiny
        shifted = sketch + shift * self._test
        core = self._test.T @ shifted
        values, vectors = eigh((core + core.T) / 2)
        root = shifted @ (vectors / values.clamp_min(shift).sqrt())  # Y (Ωᵀ Y)^{-1/2}, up to a rotation
        left, small = torch.linalg.qr(root)
        values, vectors = eigh(small @ small.T)
        kept = (values[-self.directions :] - shift).clamp_min(0)
        factor = left @ vectors[:, -self.directions :] * kept.sqrt()
        rest = squares.sum() - kept.sum()
        seen = sketch - factor @ (factor.T @ self._test)
        energy = seen.square().sum() * len(squares) / sketch.shape[1]
        return Prior(factor, (energy / rest).clamp_min(0) if float(rest) > 0 else rest.new_zeros(()))
