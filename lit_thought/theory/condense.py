"""Many token-dependent corrections condensed into one that depends on no token: thought vector, thought matrix.

A token i wants the correction δᵢ added where its activation is aᵢ. The best constants for all tokens at once are

    δ(I) = argmin_v Σ wᵢ ‖v − δᵢ‖²      = (Σ wᵢ δᵢ) / (Σ wᵢ)                    (thought vector)
    Δ(I) = argmin_M Σ wᵢ ‖M aᵢ − δᵢ‖²   = (Σ wᵢ δᵢ aᵢᵀ) (Σ wᵢ aᵢ aᵢᵀ)⁻¹ = C Z⁻¹   (thought matrix)

The vector always is the only one; with two contrasting chunks, paired token by token, it is the difference of their
means. The matrix is the only one if and only if Z is invertible. It is also the best single operator for the
tokens' own rank-1 operators Δᵢ = δᵢ aᵢᵀ / ‖aᵢ‖² on their own inputs, as Δᵢ aᵢ = δᵢ.

Source: "Transmuting prompts into weights" (Mazzawi et al. 2025, arXiv 2510.08734), Theorem 3.1. What a fit installs
comes from :mod:`lit_thought.solve.least_squares`, which adds a ridge, preservation and a low rank to the same least
squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.solve.least_squares import check_finite, singular_limit, solve
from lit_thought.solve.sums import Statistics, VectorStatistics

__all__ = ["SOLVERS", "thought_matrix", "thought_vector"]

SOLVERS = ("exact", "min_norm", "ridge", "isotropic", "orthogonal")


def thought_vector(deltas: Tensor | VectorStatistics, weights: Tensor | None = None) -> Tensor:
    """The thought vector ``Σ wᵢ δᵢ / Σ wᵢ``, the constant nearest to all corrections in least squares.

    Args:
        deltas: corrections, (n, d), any floating dtype; or their sums.
        weights: non-negative weight of each token, (n,); 1 when left out. Sums hold theirs already.

    Returns:
        (d,), float64.

    Raises:
        ThoughtError: on wrong shapes, no tokens, negative weights, or NaN or infinite values.

    Source:
        Mazzawi et al. 2025 (arXiv 2510.08734); with paired contrasting chunks it is activation steering's vector.

    Example:
        >>> thought_vector(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).tolist()
        [2.0, 2.0]
    """
    if isinstance(deltas, VectorStatistics):
        _check_absent("thought_vector", "deltas", weights=weights)
        stats = deltas
    else:
        _check_rows("thought_vector: deltas must be (n, d)", weights, deltas=deltas)
        stats = VectorStatistics(deltas.shape[1])
        stats.update(deltas, weights)
    mean = stats.mean()
    check_finite("thought_vector", float(stats.energy), float(mean.sum()))
    return mean


def thought_matrix(
    a: Tensor | Statistics,
    deltas: Tensor | None = None,
    solver: str = "exact",
    *,
    weights: Tensor | None = None,
    ridge: float = 1e-2,
) -> Tensor:
    """The thought matrix Δ, which takes the activations to their corrections, Δ aᵢ ≈ δᵢ, as well as one matrix can.

    With ``C = Σ wᵢ δᵢ aᵢᵀ`` and ``Z = Σ wᵢ aᵢ aᵢᵀ``, the solvers are

    - ``"exact"``: C Z⁻¹, the only minimiser of Σ wᵢ ‖Δ aᵢ − δᵢ‖²; needs activations that span all of d_in;
    - ``"min_norm"``: C Z⁺, of all minimisers the one of least norm; zero on directions that no token has;
    - ``"ridge"``: C (Z + λ s I)⁻¹ with s = ‖Z‖_F² / tr Z, as :func:`lit_thought.solve.least_squares.solve` at full
    rank;
    - ``"isotropic"``: d_in C / tr Z, as if Z = (tr Z / d_in) I, with no inverse: off by O(√(d_in / n)) for n spherical
      activations;
    - ``"orthogonal"``: Σ wᵢ δᵢ aᵢᵀ / ‖aᵢ‖², the sum of the tokens' rank-1 operators: the same as ``"min_norm"`` for
      mutually orthogonal activations of weight 1. A token with a = 0 adds nothing.

    Args:
        a: activations, (n, d_in), any floating dtype; or the sums of activations and corrections.
        deltas: corrections, (n, d_out); None with sums.
        solver: one of the above.
        weights: non-negative weight of each token, (n,); 1 when left out. Sums hold theirs already.
        ridge: λ ≥ 0 of ``"ridge"``; the others do not read it.

    Returns:
        Δ, (d_out, d_in), float64.

    Raises:
        SingularSystemError: when the solver needs an inverse that does not exist, or the sums are not finite.
        ThoughtError: on an unknown solver, wrong shapes, no tokens, negative weights, NaN or infinite values, or
            ``"orthogonal"`` from sums gathered without ``rank_one=True``.

    Source:
        Mazzawi et al. 2025 (arXiv 2510.08734), Theorem 3.1.

    Example:
        >>> thought_matrix(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[1.0, 3.0], [2.0, 4.0]]
    """
    if solver not in SOLVERS:
        raise ThoughtError(f"thought_matrix: solver must be one of {', '.join(SOLVERS)}; got {solver!r}.")
    if isinstance(a, Statistics):
        _check_absent("thought_matrix", "a", deltas=deltas, weights=weights)
        stats = a
    else:
        if deltas is None:
            raise ThoughtError("thought_matrix: deltas is missing; give (n, d_out) corrections, or sums as a.")
        _check_rows("thought_matrix: a and deltas must be (n, d_in) and (n, d_out)", weights, a=a, deltas=deltas)
        stats = Statistics(a.shape[1], deltas.shape[1], rank_one=solver == "orthogonal")
        stats.update(a, deltas, weights)
    if stats.weight <= 0:
        raise ThoughtError("thought_matrix: there is no token to condense; there are none, or every weight is zero.")
    if solver == "ridge":
        solution = solve(stats, ridge, name="thought_matrix")
        return solution.B @ solution.A
    if solver == "orthogonal":
        operators = stats.operators
        check_finite("thought_matrix", float(stats.energy), float(operators.sum()))
        return operators
    if solver == "isotropic":
        trace = float(stats.gram.diagonal().sum())
        check_finite("thought_matrix", trace, float(stats.energy))
        if trace <= 0:
            raise SingularSystemError(
                "thought_matrix: all activations are zero, so there is nothing to map to the corrections. Check a."
            )
        return stats.cross * (stats.d_in / trace)
    matrix, rank = _minimum_norm(stats)
    if solver == "exact" and rank < stats.d_in:
        raise SingularSystemError(
            f"thought_matrix: Z is singular: {stats.tokens} tokens leave {stats.d_in - rank} of the {stats.d_in} "
            "directions of a missing, so the minimiser is not unique. Add tokens, or use solver='min_norm' (zero on "
            "those directions) or solver='ridge'."
        )
    return matrix


def _minimum_norm(stats: Statistics) -> tuple[Tensor, int]:
    """C Z⁺, (d_out, d_in), and the rank of Z, by an eigendecomposition.

    While the n tokens are kept as rows that of the n × n matrix a aᵀ, which has the same eigenvalues: δᵀ (a aᵀ)⁺ a.
    """
    kept = stats.rows()
    rows = None if kept is None else (kept[0].double(), kept[1].double())
    left, square = (stats.cross, stats.gram) if rows is None else (rows[1].T, rows[0] @ rows[0].T)
    check_finite("thought_matrix", float(square.diagonal().sum()), float(stats.energy))
    values, vectors = torch.linalg.eigh(square)
    seen = values > singular_limit(stats.d_in, stats.tokens) * values[-1].clamp_min(0)
    values, vectors = values[seen], vectors[:, seen]
    matrix = (left @ vectors / values) @ vectors.T
    return matrix if rows is None else matrix @ rows[0], len(values)


def _check_rows(expected: str, weights: Tensor | None, **arguments: Tensor) -> None:
    """Check matrices with one row a token, by their argument's name, and the tokens' weights."""
    function = expected.partition(":")[0]
    tensors = arguments if weights is None else arguments | {"weights": weights}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ThoughtError(f"{function}: {name} must be a tensor; got {type(value).__name__}.")
    count = tensors["deltas"].shape[:1]
    if any(x.ndim != (1 if name == "weights" else 2) or x.shape[:1] != count for name, x in tensors.items()):
        came = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ThoughtError(f"{expected}, and weights, if given, (n,), with one n; got {came}.")
    for name, value in tensors.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ThoughtError(
                f"{function}: {name} has {bad} NaN or infinite values; check the model's weights and dtype (float16 "
                "overflows easily; bfloat16 or float32 do not)."
            )
    if weights is not None and bool((weights < 0).any()):
        raise ThoughtError(f"{function}: weights must be ≥ 0; the least is {float(weights.min())}.")


def _check_absent(function: str, holder: str, **arguments: Tensor | None) -> None:
    """Check that what the sums hold already is not given again."""
    for name, value in arguments.items():
        if value is not None:
            raise ThoughtError(f"{function}: {holder} is sums, which hold {name} already; leave {name} out.")
