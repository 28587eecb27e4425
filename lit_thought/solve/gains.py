"""The low-rank patch of a layer whose output passes through a gain: a norm after the layer, a residual multiplier.

Such a block gives o = m + g ⊙ (ΔW a), with g one number an output channel (what the gain does per token is
multiplied into a). With G = diag(g) and ḡ² the median of g² over the channels with g ≠ 0:

    min_ΔW  (1/w) Σ wᵢ ‖g ⊙ (ΔW aᵢ) − δᵢ‖²  +  ρ tr(G ΔW Z₀ ΔWᵀ G)  +  λ s ḡ² ‖ΔW‖²

    row j:  ΔWⱼ = gⱼ Cⱼ (gⱼ² Z + λ s ḡ² I)⁻¹

Z, C and s are those of :mod:`lit_thought.solve.least_squares`. One eigendecomposition ``Z = Q diag(z) Qᵀ`` serves all
rows, and nothing is divided by a gⱼ unless λ = 0. ḡ² makes the ridge act as it does there: with g ≡ c the patch is that
of :func:`lit_thought.solve.least_squares.solve` over c. In the basis Q and with h = g / ḡ, the objective is, up to a
constant and a factor, an element-wise weighted distance,

    Σⱼₖ (hⱼ² zₖ + λ s) (ΔWⱼₖ − Xⱼₖ)²,   X the full-rank patch,

whose best matrix of rank r has no closed form unless h is constant or λ = 0. Take ``B = (H² + λ I)^{-1/2} U`` with U
the top left singular vectors of the weighted X, then A and B in turn exactly, each given the other, a few times.
That is exact in these two cases; elsewhere it ends near the best that a search from many starts finds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.settings import check_rank
from lit_thought.solve.least_squares import (
    Prior,
    Solution,
    check_finite,
    check_terms,
    describe,
    ridge_scale,
    singular_limit,
    singular_system,
)
from lit_thought.solve.spectral import eigh, top_eigenvectors
from lit_thought.solve.sums import Statistics

__all__ = ["check_gain", "solve_with_gains"]

REFINEMENTS = 3  # how often A and B are chosen anew; seven more lower what rank r loses by 0.3 % at most on average


def check_gain(gain: Tensor, d_out: int, name: str) -> Tensor:
    """Check the gain of a layer; which of its channels act, (d_out,), bool.

    A gain below 1e-50 of the largest counts as zero.

    Raises:
        ThoughtError: when it is not (d_out,) or not finite.
        SingularSystemError: when it is zero everywhere.
    """
    if gain.shape != (d_out,):
        raise ThoughtError(f"{name}: gain must be ({d_out},), one number an output channel; got {tuple(gain.shape)}.")
    if not bool(gain.isfinite().all()):
        raise ThoughtError(f"{name}: gain contains NaN or infinite values; check where it was computed.")
    size = gain.double().abs()
    if not bool(size.any()):
        raise SingularSystemError(f"{name}: the gain is zero for every channel, so no patch can act on the output.")
    return size > 1e-50 * size.max()


def solve_with_gains(
    stats: Statistics,
    gain: Tensor,
    ridge: float,
    prior: Prior | None = None,
    prior_weight: float = 0.0,
    rank: int | float | None = None,
    name: str = "layer",
) -> Solution:
    """Solve one layer's patch behind a gain; the formula is at the top of this module.

    While ``stats`` keeps its n tokens as rows, only the span of the n rows and the prior's k directions is decomposed,
    if that is smaller than d_in (the prior's t I has every basis); d_in × d_in otherwise. Both give the same patch to
    rounding. All arithmetic is float64.

    Args:
        stats: sums over the compared tokens, the inputs a with the per-token part of the gain multiplied in.
        gain: g, (d_out,), any floating dtype; a channel with g = 0 gets a zero row.
        ridge: λ ≥ 0, relative to s ḡ².
        prior: inputs to preserve, with ``prior_weight`` ρ ≥ 0 relative to one mean token of ``stats``.
        rank: int, fraction of explained energy in (0, 1), or None for full rank. The energies are the squared
            singular values of the weighted X; they sum to the full-rank patch's gain, but what rank r then loses
            can be a little more than the energy left out (see ``truncation_loss``).
        name: the layer's name, for error messages.

    Returns:
        The patch as factors, no more than min(channels with g ≠ 0, d_in) of them, with the diagnostics of
        :class:`Solution`. ``error_after`` is measured behind the gain; ``condition`` is the largest over the rows of
        ``gⱼ² Z + λ s ḡ² I``, exactly.

    Raises:
        SingularSystemError: when a row's system is singular, a sum is not finite or every gain is zero.
        ThoughtError: when a setting is out of range, the gain has a wrong shape or is not finite, or no token was
            added.
    """
    prior = check_terms(stats, ridge, prior, prior_weight, stats.d_in, name)
    check_rank(rank, min(stats.d_in, stats.d_out))
    acts = check_gain(gain, stats.d_out, name)
    z, basis, cross, outside = _spectrum(stats, prior, prior_weight, name)
    gain, acts = gain.to(z), acts.to(z.device)
    missing = stats.d_in - len(z)
    trace, square = float(z.sum()) + missing * outside, float(z.square().sum()) + missing * outside**2
    scale = ridge_scale(name, trace, square, float(stats.energy))
    size = gain[acts].abs().max()
    size = size * (gain[acts] / size).square().quantile(0.5).sqrt()
    h = gain[acts] / size

    x, y = h.square(), z / scale
    floor = float(y.min()) if missing == 0 else outside / scale
    worst = (float(x.max()) * floor + ridge) / (float(x.max()) * float(y.max()) + ridge)
    if not worst > (singular_limit(stats.d_in, stats.tokens) if missing == 0 else 0.0):
        raise singular_system(stats, ridge, prior, name)

    B, A, lost = _factors(h.unsqueeze(1) * cross[acts] / scale, x, y, ridge, rank)
    left, core = torch.linalg.qr(B)
    A = core @ A @ basis.T / size
    B = left.new_zeros(stats.d_out, left.shape[1])
    B[acts] = left
    before = float(stats.energy) / stats.weight
    after = _error(stats, gain.unsqueeze(1) * B, A)
    return Solution(A, B, describe(A, stats, scale, trace, 1 / worst, before, after, lost))


class _Spectrum(NamedTuple):
    """Z = Q diag(z) Qᵀ + z₀ (I − Q Qᵀ), with C in the span of Q."""

    values: Tensor  # z, (k,), non-negative
    basis: Tensor  # Q, (d_in, k), orthonormal columns
    cross: Tensor  # C Q, (d_out, k)
    outside: float = 0.0  # z₀


def _spectrum(stats: Statistics, prior: Prior | None, rho: float, name: str) -> _Spectrum:
    """Decompose Z from rows where they span less than all dimensions, from the sums otherwise."""
    rows = stats.rows()
    known = None if prior is None else prior.to(stats.energy.double())
    if rows is not None:
        a, delta = rows[0].double() / stats.weight**0.5, rows[1].double() / stats.weight**0.5
        outside = 0.0
        if known is not None:  # the prior's directions are rows whose error is zero
            a = torch.cat([a, rho**0.5 * known.factor.T])
            outside = rho * float(known.rest)
        check_finite(name, float(a.square().sum()), float(delta.square().sum()), outside)
        if len(a) < stats.d_in:
            span, core = torch.linalg.qr(a.T)
            right, singular, left = torch.linalg.svd(core)  # a = leftᵀ diag(singular) (span right)ᵀ
            keep = singular >= singular[0] * stats.d_in * torch.finfo(torch.float64).eps
            singular = singular[keep]
            cross = (left[keep, : len(delta)] @ delta).T * singular
            return _Spectrum(singular.square() + outside, span @ right[:, keep], cross, outside)
    gram, cross = stats.sums()
    total, cross = gram / stats.weight, cross / stats.weight
    if known is not None:
        total = total.add(known.gram(), alpha=rho)
    check_finite(name, float(total.square().sum()), float(cross.square().sum()))
    values, basis = eigh(total)
    return _Spectrum(values.clamp_min(0), basis, cross @ basis)


def _factors(
    target: Tensor, x: Tensor, y: Tensor, ridge: float, rank: int | float | None
) -> tuple[Tensor, Tensor, float]:
    """B, (m, r), and A, (r, k), that minimise Σ (xⱼ yₖ + λ) Tⱼₖ² − 2 Dⱼₖ Tⱼₖ over T = B A, and what rank r gives up.

    Args:
        target: D, (m, k).
        x: h², (m,).
        y: z / s, (k,).
    """
    size = min(target.shape)
    weights = torch.outer(x, y).add_(ridge)
    weighted = target / weights.sqrt()
    energy, start = weighted.square().sum(), torch.empty(0)
    if rank is not None:
        if len(x) <= len(y):
            _, start = top_eigenvectors(weighted @ weighted.T, rank)
        else:
            start = torch.linalg.qr(weighted @ top_eigenvectors(weighted.T @ weighted, rank)[1])[0]
    if rank is None or start.shape[1] == size:
        full = target / weights
        return (torch.eye(size).to(full), full, 0.0) if len(x) == size else (full, torch.eye(size).to(full), 0.0)
    for _ in range(1 + REFINEMENTS):
        _, A = _best_given(target, start, x, y, ridge)
        right = torch.linalg.qr((A * (y + ridge).sqrt()).T)[0]
        A, B = (factor.T for factor in _best_given(target.T, right, y, x, ridge))
        start = torch.linalg.qr(B * (x + ridge).sqrt().unsqueeze(1))[0]
    explained = float((B * (target @ A.T)).sum() / energy) if energy > 0 else 1.0
    return B, A, max(0.0, 1 - explained)


def _best_given(target: Tensor, left: Tensor, x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The minimiser A of :func:`_factors`'s objective given the span of B, and that B rotated to go with it.

    With ``left`` orthonormal, (m, r), B = (diag(x) + λ I)^{-1/2} left; the r × r systems of all columns of A,
    yₖ Bᵀ diag(x) B + λ Bᵀ B, are diagonal once B is rotated by the eigenvectors of λ Bᵀ B = I − Bᵀ diag(x) B.

    Returns:
        B, (m, r), and A, (r, k).
    """
    share = ridge / (x + ridge)
    values, rotation = torch.linalg.eigh((left.T * share) @ left)
    values = values.clamp(share.min(), share.max()).unsqueeze(1)
    B = (left @ rotation) / (x + ridge).sqrt().unsqueeze(1)
    return B, (B.T @ target) / (y * (1 - values) + values)


def _error(stats: Statistics, B: Tensor, A: Tensor) -> float:
    """(1/w) Σ w ‖B A a − δ‖², token by token where ``stats`` keeps them."""
    rows = stats.rows()
    if rows is not None:
        return float((rows[1].to(A) - rows[0].to(A) @ A.T @ B.T).square().sum()) / stats.weight
    cross = B.T @ stats.cross.to(A)
    return float(stats.energy - 2 * (cross * A).sum() + (stats.projected(A) * (B.T @ B)).sum()) / stats.weight
