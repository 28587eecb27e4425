"""From the statistics of one layer to its low-rank patch, in closed form.

The patch ΔW of a linear layer minimises the mean squared error of the residual stream, with a ridge and
with a Gram matrix Z₀ of inputs that should go on producing what they produced (preservation):

    min_ΔW  (1/w) Σ wᵢ ‖ΔW aᵢ − δᵢ‖²  +  ρ tr(ΔW Z₀ ΔWᵀ)  +  λ s ‖ΔW‖²

    ΔW = C M⁻¹,   M = Z + λ s I,   Z = (1/w) Σ wᵢ aᵢaᵢᵀ + ρ Z₀,   C = (1/w) Σ wᵢ δᵢaᵢᵀ

``s = ‖Z‖_F² / tr Z`` is a weighted mean of Z's eigenvalues, so that one λ serves all layers and models.
The best patch of rank r in the same metric is ΔW projected on the top eigenvectors U of
``ΔW M ΔWᵀ = C M⁻¹ Cᵀ`` (reduced-rank regression): ``B = U``, ``A = Uᵀ ΔW``.

"Transmuting prompts into weights" (Mazzawi et al. 2025, arXiv 2510.08734), Theorem 3.1, is the case
ρ = λ = 0 at full rank; the preservation term is MEMIT's covariance term (Meng et al. 2023). With equality
constraints ΔW kⱼ = vⱼ besides (:func:`solve_constrained`), ROME's rank-1 edit (Meng et al. 2022) is the case
of one key and no tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.settings import check_rank
from lit_thought.solve.gram import add_products, inner_products, mirror, products
from lit_thought.solve.spectral import eigh, few_of_many, largest_eigenvalue, shifted_cholesky, top_eigenvectors
from lit_thought.solve.sums import Statistics

__all__ = [
    "COARSE_RIDGE",
    "HALF",
    "Prior",
    "Solution",
    "check_finite",
    "check_terms",
    "describe",
    "dual_operations",
    "primal_operations",
    "ridge_scale",
    "singular_limit",
    "singular_system",
    "solve",
    "solve_constrained",
]


HALF = 1.2
"""Operations of aᵀa, of n rows of d, over n d²: by blocks on and above the diagonal (:mod:`lit_thought.solve.gram`)."""


COARSE_RIDGE = 1e-3
"""From this ridge λ on, float32 rounding of Z (1e-7 of its largest entries) makes no difference to a solution."""


SMALL = 512
"""Rows, or half of d_out if that is more, up to which a full decomposition of n × n is cheaper than a Krylov space."""


FORMED = 1024
"""Columns up to which a d_out × d_out matrix is formed rather than only multiplied with."""


SMALLEST_DUAL_RIDGE = 1e-7
"""Below this ridge λ the n × n dual loses digits where the primal does not: eps / λ of the largest entries."""


@dataclass(frozen=True)
class Prior:
    """Mean Gram matrix of inputs to preserve, in few numbers: Z₀ = L Lᵀ + t I.

    Attributes:
        factor: L, (d_in, k), the directions that matter one by one, any floating dtype; k may be 0.
        rest: t ≥ 0, (), what all directions have besides.
    """

    factor: Tensor
    rest: Tensor

    @classmethod
    def from_gram(cls, gram: Tensor) -> Prior:
        """All of a mean Gram matrix, (d_in, d_in): its eigenvectors times the roots of their eigenvalues."""
        values, vectors = eigh(gram.double())
        return cls(vectors * values.clamp_min(0).sqrt(), values.new_zeros(()))

    def to(self, like: Tensor) -> Prior:
        """Of the dtype and on the device of another tensor."""
        return Prior(self.factor.to(like), self.rest.to(like))

    def gram(self) -> Tensor:
        """Z₀, (d_in, d_in), float64."""
        factor = self.factor.double()
        total = products(factor.T)
        total.diagonal().add_(self.rest.double())
        return total


@dataclass
class Solution:
    """A low-rank patch ΔW = B A of one layer and what is known about its quality.

    Attributes:
        A: (r, d_in), float64.
        B: (d_out, r), float64, orthonormal columns.
        diagnostics: plain numbers:
            ``error_before``: mean squared error of the residual stream, (1/w) Σ w ‖δ‖²;
            ``error_after``: the same predicted with the patch of rank r;
            ``rank``: r; ``tokens``; ``ridge_scale``: s;
            ``effective_rank``: tr Z / s, the participation ratio of Z's eigenvalues;
            ``condition``: of M: Z's largest eigenvalue (Rayleigh–Ritz) over the ridge λ s, an upper bound that is
            sharp where Z is singular; without a ridge, or with one that is next to nothing, M's own, exactly;
            ``truncation_loss``: share of the full-rank patch's gain that rank r gives up;
            ``norm``: ‖ΔW‖_F.
    """

    A: Tensor
    B: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)


def solve(
    stats: Statistics,
    ridge: float,
    prior: Prior | None = None,
    prior_weight: float = 0.0,
    rank: int | float | None = None,
    name: str = "layer",
) -> Solution:
    """Solve one layer's patch; the formula is at the top of this module.

    While ``stats`` keeps its n tokens as rows, the n × n dual is used where it takes fewer operations
    (:func:`dual_operations`); the d_in × d_in primal otherwise. Both give the same patch to rounding. All arithmetic is
    float64, but for products of rows that are narrower themselves, where the ridge is :data:`COARSE_RIDGE` or more:
    their sums are float64 alone.

    Args:
        stats: sums over the compared tokens.
        ridge: λ ≥ 0, relative to s.
        prior: inputs to preserve, with ``prior_weight`` ρ ≥ 0 relative to one mean token of ``stats``.
        rank: int, fraction of explained energy in (0, 1), or None for full rank.
        name: the layer's name, for error messages.

    Returns:
        The patch as factors with its diagnostics.

    Raises:
        SingularSystemError: when M is singular or a sum is not finite.
        ThoughtError: when a setting is out of range or no token was added.
    """
    prior = check_terms(stats, ridge, prior, prior_weight, stats.d_in, name)
    check_rank(rank, min(stats.d_in, stats.d_out))
    rows = stats.rows()
    try:
        if rows is not None and ridge >= SMALLEST_DUAL_RIDGE and _dual_is_cheaper(stats, prior):
            return _solve_dual(stats, rows, ridge, prior, prior_weight, rank, name)
        return _solve_primal(stats, ridge, prior, prior_weight, rank, name)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise SingularSystemError(
            f"{name}: the sums are out of the range of float64, or no decomposition of them was found ({error}). Check "
            "the model's weights and dtype."
        ) from error


def solve_constrained(
    keys: Tensor,
    values: Tensor,
    *,
    prior: Prior | None,
    stats: Statistics | None = None,
    ridge: float = 0.0,
    prior_weight: float = 1.0,
    name: str = "layer",
) -> Tensor:
    """The patch that minimises the objective of :func:`solve` among those with ΔW kⱼ = vⱼ for every key.

        ΔW = ΔW₀ + (V − ΔW₀ K) (Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹,   ΔW₀ = C M⁻¹ (zero without ``stats``)

    with the keys as columns of K and the values as columns of V. M is that of :func:`solve`, or ρ Z₀ + λ s I
    without ``stats``; one key, no ``stats`` and λ = 0 is ROME: ΔW = v (Z₀⁻¹ k)ᵀ / (kᵀ Z₀⁻¹ k), whatever ρ.
    MEMIT's softer R Kᵀ (μ Z₀ + K Kᵀ)⁻¹, with n keys as the tokens, is :func:`solve` with ``ridge=0`` and
    ``prior_weight=μ / n``.

    Args:
        keys: inputs of the layer, (k, d_in), linearly independent, any floating dtype.
        values: the wanted change of the layer's output at each key, v − W k, (k, d_out).
        prior: inputs to preserve, with weight ρ = ``prior_weight`` ≥ 0; may be None if ``stats`` is given.
        stats: sums over tokens whose errors the patch should correct as well, as far as the constraints let it.
        ridge: λ ≥ 0, relative to s.
        name: the layer's name, for error messages.

    Returns:
        ΔW, (d_out, d_in), float64.

    Raises:
        SingularSystemError: when M is singular, the keys are dependent or a sum is not finite.
        ThoughtError: when shapes or settings are wrong, or there is neither ``stats`` nor a prior.

    Source:
        Meng et al. 2022 (ROME, arXiv 2202.05262), equation 2; Meng et al. 2023 (MEMIT, arXiv 2210.07229).
    """
    if keys.ndim != 2 or values.ndim != 2 or len(keys) != len(values) or len(keys) == 0:
        raise ThoughtError(
            f"{name}: keys and values must be (k, d_in) and (k, d_out) with k ≥ 1; got {tuple(keys.shape)} and "
            f"{tuple(values.shape)}."
        )
    d_in = keys.shape[1]
    prior = check_terms(stats, ridge, prior, prior_weight, d_in, name)
    if stats is not None and (stats.d_in, stats.d_out) != (d_in, values.shape[1]):
        raise ThoughtError(
            f"{name}: keys and values must be (k, {stats.d_in}) and (k, {stats.d_out}), the sizes of stats; got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if stats is None:
        if prior is None:
            raise ThoughtError(f"{name}: there is nothing to minimise; give stats, or a prior with prior_weight > 0.")
        stats = Statistics(d_in, values.shape[1], energy=prior.rest.new_zeros((), dtype=torch.float64))
    system = _system(stats, ridge, prior, prior_weight, name)
    keys, values = keys.to(system.lower), values.to(system.lower)
    for argument, rows in (("keys", keys), ("values", values)):
        if not bool(rows.isfinite().all()):
            raise ThoughtError(f"{name}: {argument} contains NaN or infinite values; check where it was computed.")
    norms = keys.norm(dim=1, keepdim=True)
    if not bool(norms.all()):
        raise SingularSystemError(f"{name}: key {int(norms.argmin())} is zero, which no patch can act on; drop it.")
    keys, values = keys / norms, values / norms
    rank = int(torch.linalg.matrix_rank(keys, rtol=singular_limit(max(keys.shape), 0)))
    if rank < len(keys):
        raise SingularSystemError(
            f"{name}: the keys are linearly dependent ({len(keys)} keys span {rank} dimensions), so their values "
            "cannot be chosen freely. Drop keys that repeat or combine others, or give them to solve as tokens."
        )
    # the left inverse of K, (Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹ = R⁻¹ Qᵀ L⁻¹ with M = L Lᵀ and L⁻¹ K = Q R
    orthogonal, upper = torch.linalg.qr(torch.linalg.solve_triangular(system.lower, keys.T, upper=False))
    inverse = torch.linalg.solve_triangular(system.lower.T, orthogonal, upper=True)
    inverse = torch.linalg.solve_triangular(upper, inverse.T, upper=True)
    patch: Tensor = torch.cholesky_solve(system.cross.T / (stats.weight or 1.0), system.lower).T
    for _ in range(2):  # the second time takes off the rounding of the first
        patch = patch + (values.T - patch @ keys.T) @ inverse
    return patch


def check_terms(
    stats: Statistics | None, ridge: float, prior: Prior | None, rho: float, d_in: int, name: str
) -> Prior | None:
    """Check the terms of an objective; the prior, or None where its weight is zero."""
    if not (ridge >= 0 and rho >= 0 and math.isfinite(ridge) and math.isfinite(rho)):
        raise ThoughtError(f"ridge and prior_weight must be finite and ≥ 0; got {ridge!r} and {rho!r}.")
    if stats is not None and stats.weight <= 0:
        raise ThoughtError(f"{name}: there is no token to solve from; the statistics are empty.")
    prior = prior if rho > 0 else None
    if prior is not None and (len(prior.factor) != d_in or prior.rest.ndim):
        raise ThoughtError(
            f"{name}: prior has a factor {tuple(prior.factor.shape)} and a rest {tuple(prior.rest.shape)}; expected "
            f"({d_in}, k) and ()."
        )
    return prior


def dual_operations(rows: int, d_in: int, d_out: int, directions: int) -> float:
    """Multiplications and additions of the n × n dual.

    Args:
        rows: n.
        d_in, d_out: of the layer.
        directions: k of the prior, 0 without one.
    """
    n, k = rows, directions
    spread = 2 * n * d_out * min(n, d_out) + 2 * n * n * min(n, d_out)
    return HALF * (n * n + k * k) * d_in + 2 * n * k * d_in + HALF * n * n * k + (n**3 + k**3) / 3 + spread


def primal_operations(rows: int, d_in: int, d_out: int, directions: int) -> float:
    """Multiplications and additions of the d_in × d_in primal; ``rows`` 0 where they are in the sums already."""
    d = d_in
    sums = (HALF * (rows + directions) * d + 2 * rows * d_out) * d
    return sums + d**3 / 3 + d * d * d_out + HALF * d * d_out * d_out


def _dual_is_cheaper(stats: Statistics, prior: Prior | None) -> bool:
    shape = (stats.num_rows, stats.d_in, stats.d_out, 0 if prior is None else prior.factor.shape[1])
    return dual_operations(*shape) < primal_operations(*shape)


class _System(NamedTuple):
    """M of one layer, C, and what is known of them."""

    cross: Tensor  # w C, (d_out, d_in)
    lower: Tensor  # Cholesky factor of M, (d_in, d_in)
    scale: float  # s
    trace: float  # tr Z
    condition: float  # of M, as Solution.diagnostics says


def _system(stats: Statistics, ridge: float, prior: Prior | None, rho: float, name: str) -> _System:
    weight = stats.weight or 1.0  # without tokens the sums are zero and there is nothing to divide
    gram, cross = stats.sums()
    matrix = gram / weight
    if prior is not None:
        known = prior.to(matrix)
        add_products(matrix, rho**0.5 * known.factor.T)
        mirror(matrix).diagonal().add_(rho * known.rest)
    trace = float(matrix.diagonal().sum())
    norm = float(torch.linalg.vector_norm(matrix))
    scale = ridge_scale(name, trace, norm**2, float(stats.energy))
    matrix.diagonal().add_(ridge * scale)
    limit = singular_limit(stats.d_in, stats.tokens)
    if ridge * scale > 2 * limit * norm:  # no eigenvalue of M is near zero, whatever Z's are
        condition = largest_eigenvalue(lambda v: matrix @ v, stats.d_in, matrix) / (ridge * scale)
    else:  # not the Cholesky pivots, whose rounding grows with the condition of the leading columns
        values = torch.linalg.eigvalsh(matrix)
        if not bool(values[0] > limit * values[-1]):
            raise singular_system(stats, ridge, prior, name)
        condition = float(values[-1] / values[0])
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise singular_system(stats, ridge, prior, name)
    return _System(cross, lower, scale, trace, condition)


def singular_limit(size: int, tokens: int) -> float:
    """The smallest over the largest eigenvalue of a sum of products, (size, size), up to which it counts as singular.

    Rounding leaves of an eigenvalue that is zero, relative to the largest, less than eps √n from summing n tokens and
    eps √size from the decomposition, in whatever order a processor sums. The limit is 32 times that, so that what is
    singular is refused everywhere; above it the smallest eigenvalue is not noise.

    Args:
        size: d_in.
        tokens: n.
    """
    return float(32 * max(size, tokens) ** 0.5 * torch.finfo(torch.float64).eps)


def singular_system(stats: Statistics, ridge: float, prior: Prior | None, name: str) -> SingularSystemError:
    """The error of a layer whose M is singular, for the caller to raise."""
    also, where = ("", "") if prior is None else (" and a prior", ", in the statistics or the prior")
    return SingularSystemError(
        f"{name}: the system is singular ({stats.tokens} tokens{also} for {stats.d_in} input dimensions, "
        f"ridge {ridge}). Use ridge > 0, or more tokens than dimensions{where}."
    )


def _solve_primal(
    stats: Statistics, ridge: float, prior: Prior | None, rho: float, rank: int | float | None, name: str
) -> Solution:
    cross, lower, scale, trace, condition = _system(stats, ridge, prior, rho, name)
    half = torch.linalg.solve_triangular(lower, cross.T, upper=False).div_(stats.weight)
    gains, basis = top_eigenvectors(products(half), rank)
    A = torch.linalg.solve_triangular(lower.T, half @ basis, upper=True).T
    before = float(stats.energy) / stats.weight
    after = before + float((stats.projected(A).trace() - 2 * (basis.T @ cross * A).sum()) / stats.weight)
    lost = _lost(gains, float(half.square().sum()))
    return Solution(A, basis, describe(A, stats, scale, trace, condition, before, after, lost))


def _solve_dual(
    stats: Statistics,
    rows: tuple[Tensor, Tensor],
    ridge: float,
    prior: Prior | None,
    rho: float,
    rank: int | float | None,
    name: str,
) -> Solution:
    """The same patch from n rows a, δ: with D = ρ Z₀ + λ s I, G = a D⁻¹ aᵀ (n × n) and I + G = R Rᵀ,

    C M⁻¹ = δᵀ (I + G)⁻¹ a D⁻¹  and  C M⁻¹ Cᵀ = δᵀ (I − (I + G)⁻¹) δ,

    by Woodbury and push-through. With h = ρ t + λ s, of ρ L Lᵀ + h I once more

    D⁻¹ = (I − L (h / ρ I + Lᵀ L)⁻¹ Lᵀ) / h,

    so that nothing of d_in × d_in is formed.
    """
    size, coarse = stats.d_in, ridge >= COARSE_RIDGE
    a, delta = rows[0] if coarse else rows[0].double(), rows[1].double() / stats.weight**0.5
    a = a / stats.weight**0.5
    known = Prior(a.new_zeros(size, 0), delta.new_zeros(())) if prior is None else prior
    factor, rest = rho**0.5 * known.factor.to(a), rho * float(known.rest)  # with ρ in them
    inner, seen, own = inner_products(a), (a @ factor).double(), inner_products(factor.T)
    trace = float(inner.diagonal().sum() + own.diagonal().sum()) + size * rest
    norms = (float(torch.linalg.vector_norm(part)) ** 2 for part in (inner, seen, seen, own))
    square = sum(norms)
    square += 2 * rest * (trace - size * rest) + size * rest**2
    scale = ridge_scale(name, trace, square, float(stats.energy))

    def matmul(v: Tensor) -> Tensor:  # of the Gram matrix of both kinds of rows, whose largest eigenvalue is Z's
        left, right = v[: len(a)], v[len(a) :]
        return torch.cat([inner @ left + seen @ right, seen.T @ left + own @ right])

    largest = largest_eigenvalue(matmul, len(a) + len(own), inner) + rest
    held = rest + ridge * scale  # h
    core = own.clone()
    core.diagonal().add_(held)
    core = torch.linalg.cholesky(core)
    pulled = torch.linalg.solve_triangular(core, seen.T, upper=False)
    system = (inner - products(pulled)).div_(held)
    system.diagonal().add_(1)
    lower = torch.linalg.cholesky(system)

    gains, basis, total = _top_gains(delta, lower, rank)
    A = torch.cholesky_solve(delta @ basis, lower).T.to(a)
    back = torch.cholesky_solve((A.double() @ seen).T, core).T.to(a)
    A = (A @ a - back @ factor.T).double() / held
    before = float(stats.energy) / stats.weight
    explained = (a @ A.T.to(a)).double()
    after = float((delta - explained @ basis.T).square().sum())
    condition = (largest + ridge * scale) / (ridge * scale)
    return Solution(A, basis, describe(A, stats, scale, trace, condition, before, after, _lost(gains, total)))


def _top_gains(delta: Tensor, lower: Tensor, rank: int | float | None) -> tuple[Tensor, Tensor, float]:
    """The top eigenvalues of δᵀ (I − (R Rᵀ)⁻¹) δ, their eigenvectors, and the trace.

    Args:
        delta: δ, (n, d_out).
        lower: R, (n, n).
        rank: as for :func:`top_eigenvectors`.
    """
    n, d_out = delta.shape
    if isinstance(rank, int) and n <= min(max(SMALL, d_out // 2), d_out):
        return _small_gains(delta, lower, rank)
    whitened = torch.linalg.solve_triangular(lower, delta, upper=False)
    most = float(torch.linalg.vector_norm(delta)) ** 2
    total = most - float(torch.linalg.vector_norm(whitened)) ** 2
    if isinstance(rank, int) and d_out > FORMED:
        found = few_of_many(lambda v: delta.T @ (delta @ v) - whitened.T @ (whitened @ v), d_out, rank, total, n, delta)
        if found is not None:
            return *found, total
    span = None
    if n >= d_out or (isinstance(rank, int) and d_out <= FORMED):
        matrix = products(delta) - products(whitened)
    else:  # what the patch writes lies in the span of the rows δ: n × n is enough
        span, small = torch.linalg.qr(delta.T)
        whitened = torch.linalg.solve_triangular(lower, small.T.contiguous(), upper=False)
        matrix = small @ small.T - products(whitened)
    gains, basis = top_eigenvectors(matrix, rank)
    keep = gains > most * n * torch.finfo(gains.dtype).eps  # what is numerically zero has no direction
    gains, basis = gains[keep], basis[:, keep]
    return gains, basis if span is None else span @ basis, total


def _small_gains(delta: Tensor, lower: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """:func:`_top_gains` of few rows: with P = I − (R Rᵀ)⁻¹ and δ δᵀ = F Fᵀ, (n × n), the gains are the eigenvalues of
    Fᵀ P F = V diag(g) Vᵀ, and their directions δᵀ P F V / g."""
    factor, shift = shifted_cholesky(delta @ delta.T, torch.finfo(delta.dtype).eps)
    whitened = torch.linalg.solve_triangular(lower, factor, upper=False)
    gains, vectors = eigh(factor.T @ factor - whitened.T @ whitened)
    keep = gains > len(delta) * shift  # what is numerically zero has no direction
    gains, vectors = gains[keep].flip(0), factor @ vectors[:, keep].flip(1)
    total, vectors = float(gains.sum()), vectors[:, :rank]
    written = delta.T @ (vectors - torch.cholesky_solve(vectors, lower))
    return gains[:rank], torch.linalg.qr(written)[0], total


def check_finite(name: str, *sums: float) -> None:
    """Check numbers that are finite exactly when what they sum is.

    Raises:
        SingularSystemError: when one is NaN or infinite.
    """
    if not all(map(math.isfinite, sums)):
        raise SingularSystemError(
            f"{name}: the activations contain NaN or infinite values, so there is nothing to solve. Check the "
            "model's weights and dtype (float16 overflows easily; bfloat16 or float32 do not)."
        )


def ridge_scale(name: str, trace: float, square: float, energy: float) -> float:
    """s = ‖Z‖_F² / tr Z, once the sums are known to be finite and not all zero."""
    check_finite(name, trace, square, energy)
    if trace <= 0:
        raise SingularSystemError(f"{name}: all inputs of the layer are zero; there is no direction to patch.")
    return square / trace


def _lost(kept: Tensor, total: float) -> float:
    """The share of the full-rank patch's gain that is beyond the gains kept."""
    return max(0.0, 1 - float(kept.sum()) / total) if total > 0 else 0.0


def describe(
    A: Tensor,
    stats: Statistics,
    scale: float,
    trace: float,
    condition: float,
    before: float,
    after: float,
    truncation_loss: float,
) -> dict[str, float]:
    """``Solution.diagnostics`` of a patch ΔW = B A, B with orthonormal columns; ``scale`` is s, ``trace`` tr Z."""
    return {
        "error_before": before,
        "error_after": after,
        "rank": len(A),
        "tokens": stats.tokens,
        "ridge_scale": scale,
        "effective_rank": trace / scale,
        "condition": condition,
        "truncation_loss": truncation_loss,
        "norm": float(A.norm()),
    }
