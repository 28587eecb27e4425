"""The best low-rank form of a matrix that is already there, in the metric of one layer's data."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_thought.solve.gains import check_gain
from lit_thought.solve.least_squares import Prior
from lit_thought.solve.spectral import top_eigenvectors
from lit_thought.solve.sums import Statistics

__all__ = ["reduce_rank"]


def reduce_rank(
    A: Tensor,
    B: Tensor,
    stats: Statistics,
    ridge: float,
    prior: Prior | None = None,
    prior_weight: float = 0.0,
    rank: int | float | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrix T_r of rank r that does to the data what T = B A does, as nearly as it can.

    Minimises ``tr((T − T_r) M (T − T_r)ᵀ)`` with ``M = (1/w) Z + ρ Z₀ + λ I``, the metric of
    :mod:`lit_thought.solve.least_squares`: ``T_r = U (Uᵀ T)`` with U the top eigenvectors of ``T M Tᵀ`` (reduced-rank
    regression).

    With a gain g behind the layer (:mod:`lit_thought.solve.gains`) it minimises ``tr(G (T − T_r) M (T − T_r)ᵀ G)``,
    G = diag(g), and divides by no g: ``T_r = T M^{1/2} V Vᵀ M^{-1/2}`` with V the top right singular vectors of
    ``G T M^{1/2}``, which is ``T_r = T M A_rᵀ (A_r M A_rᵀ)⁻¹ A_r`` with ``A_r = Uᵀ G T``, U the top eigenvectors of
    ``G T M Tᵀ G``. A row with g = 0 is projected like the others.

    Args:
        A: (R, d_in), float64.
        B: (d_out, R), float64.
        stats: sums over the compared tokens.
        ridge: λ ≥ 0, absolute: the relative ridge times ``Solution.diagnostics["ridge_scale"]``.
        prior: inputs to preserve.
        prior_weight: ρ.
        rank: r: int, fraction of explained energy in (0, 1), or None for no more than min(R, d_out): nothing lost.
        gain: g, (d_out,), any floating dtype.

    Returns:
        A, (r, d_in), and B, (d_out, r) with orthonormal columns, float64.

    Raises:
        ThoughtError: when the gain has a wrong shape, is not finite or is zero everywhere.
    """
    basis, core = torch.linalg.qr(B)
    A = core @ A  # T = basis A, and T M Tᵀ = basis (A M Aᵀ) basisᵀ
    metric = stats.projected(A) / stats.weight + ridge * (A @ A.T)
    if prior is not None and prior_weight > 0:
        known = prior.to(A)
        seen = A @ known.factor
        metric += prior_weight * (seen @ seen.T + (A * known.rest) @ A.T)
    if gain is not None:
        check_gain(gain, len(B), "reduce_rank")
    if gain is None or rank is None:
        _, top = top_eigenvectors(metric, rank)
        return top.T @ A, basis @ top
    gain = gain.to(B)
    seen = torch.linalg.qr((gain / gain.abs().max()).unsqueeze(1) * basis)[1]  # G T = orthonormal · seen A
    energies, top = top_eigenvectors(seen @ metric @ seen.T, rank)
    energies = energies[: top.shape[1]]
    keep = energies > energies[0] * len(metric) * torch.finfo(energies.dtype).eps
    right = seen.T @ top
    small = torch.where(keep, metric @ right / energies.where(keep, energies.new_ones(())), 0.0)
    left, core = torch.linalg.qr(small)
    return core @ right.T @ A, basis @ left
