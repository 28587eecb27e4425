"""The best low-rank form of a matrix that is already there, in the metric of one layer's data."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_thought.solve import Prior, top_eigenvectors
from lit_thought.statistics import Statistics

__all__ = ["reduce_rank"]


def reduce_rank(
    A: Tensor,
    B: Tensor,
    stats: Statistics,
    ridge: float,
    prior: Prior | None = None,
    prior_weight: float = 0.0,
    rank: int | float | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrix T_r of rank r that does to the data what T = B A does, as nearly as it can.

    Minimises ``tr((T − T_r) M (T − T_r)ᵀ)`` with ``M = (1/w) Z + ρ Z₀ + λ I``, the metric of
    :mod:`lit_thought.solve`: ``T_r = U (Uᵀ T)`` with U the top eigenvectors of ``T M Tᵀ`` (reduced-rank regression).

    Args:
        A: (R, d_in), float64.
        B: (d_out, R), float64.
        stats: sums over the compared tokens.
        ridge: λ ≥ 0, absolute: the relative ridge times ``Solution.diagnostics["ridge_scale"]``.
        prior: inputs to preserve.
        prior_weight: ρ.
        rank: r: int, fraction of explained energy in (0, 1), or None for no more than min(R, d_out).

    Returns:
        A, (r, d_in), and B, (d_out, r) with orthonormal columns, float64.
    """
    basis, core = torch.linalg.qr(B)
    A = core @ A  # T = basis A, and T M Tᵀ = basis (A M Aᵀ) basisᵀ
    metric = stats.projected(A) / stats.weight + ridge * (A @ A.T)
    if prior is not None and prior_weight > 0:
        rotated = A @ prior.vectors.to(A)
        metric += prior_weight * (rotated * prior.values.to(A)) @ rotated.T
    _, top = top_eigenvectors(metric, rank)
    return top.T @ A, basis @ top
