"""Low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_thought.errors import PatchError

__all__ = ["Factors"]


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix of low rank as two thin ones, ``B @ A``, in their own dtypes and on their own devices.

    Attributes:
        A: shape (rank, d_in).
        B: shape (d_out, rank).

    Raises:
        PatchError: if A and B are not floating-point matrices of one rank.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        for name, value in (("A", self.A), ("B", self.B)):
            if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
                came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise PatchError(f"Factors: {name} must be a floating-point matrix, got {came}.")
        if self.A.shape[0] != self.B.shape[1] or self.A.shape[0] == 0:
            raise PatchError(
                f"Factors: A must be (rank, d_in) and B (d_out, rank) with one rank of at least 1, got A "
                f"{tuple(self.A.shape)} and B {tuple(self.B.shape)}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """``B (A x)`` of every row of x, (…, d_in), as a LoRA adapter adds it: (…, d_out), in A's dtype."""
        return x.to(self.A.dtype) @ self.A.T @ self.B.T

    def padded(self, rank: int) -> Factors:
        """The same matrix at a higher rank: zero rows are added to A, zero columns to B."""
        missing = rank - self.rank
        rows, columns = self.A.new_zeros(missing, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], missing)
        return Factors(torch.cat([self.A, rows]), torch.cat([self.B, columns], dim=1))

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``B @ A``, shape (d_out, d_in)."""
        return self.B.to(dtype) @ self.A.to(dtype)
