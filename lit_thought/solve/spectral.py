"""The top of the spectrum of a symmetric positive semi-definite matrix, without the rest where that is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["eigh", "few_of_many", "largest_eigenvalue", "shifted_cholesky", "top_eigenvectors"]

OVERSAMPLING = 8
"""Columns of a Krylov block beyond the eigenvectors that are wanted."""
STEPS = 6
"""Blocks of the smallest Krylov space."""
TOLERANCE = 1e-8
"""Of the residual, squared, over the smallest eigenvalue wanted times the trace."""


LARGEST_ON_CUDA = 16_384
"""Columns up to which CUDA's eigensolver is used; it is reported to fail from about 23,000 on."""


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix, (n, n), in ascending order, and its eigenvectors, one a column.

    Beyond :data:`LARGEST_ON_CUDA` columns a matrix on a GPU is decomposed on the CPU.
    """
    if matrix.is_cuda and len(matrix) > LARGEST_ON_CUDA:
        values, vectors = torch.linalg.eigh(matrix.cpu())
        return values.to(matrix.device), vectors.to(matrix.device)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def shifted_cholesky(matrix: Tensor, rounding: float) -> tuple[Tensor, float]:
    """The Cholesky factor of a positive semi-definite matrix, (n, n), plus the least shift that rounding asks for.

    Args:
        matrix: Z, which rounding may have made slightly indefinite.
        rounding: of its entries, relative to the largest.

    Returns:
        L with L Lᵀ = Z + τ I, and τ, the first of ``rounding`` × ‖Z‖_F × 1, 10, 100, … for which there is one.
    """
    shift = rounding * float(torch.linalg.vector_norm(matrix)) + torch.finfo(matrix.dtype).tiny
    for _ in range(20):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) == 0:
            break
        shift *= 10
    return lower, shift


def top_eigenvectors(matrix: Tensor, rank: int | float | None) -> tuple[Tensor, Tensor]:
    """The top eigenvalues of a positive semi-definite matrix, largest first, and their eigenvectors.

    Few of many come from a block Krylov space, which grows until ``‖G U − U diag(w)‖² ≤ 1e-8 · w_r · tr G``; what U
    then misses of the largest possible ``tr Uᵀ G U`` is about 1e-8 of tr G where neighbouring eigenvalues differ by a
    percent. All others, and those that do not converge, come from the full decomposition.

    Args:
        matrix: G, (n, n).
        rank: how many: int, the smallest number that holds a fraction in (0, 1) of the trace, or None for all.

    Returns:
        Eigenvalues w, (r,), none below zero, and eigenvectors U, (n, r), one a column.

    Source:
        Musco and Musco 2015, "Randomized block Krylov methods", arXiv 1504.05477.
    """
    if isinstance(rank, int):
        found = few_of_many(
            lambda v: matrix @ v, len(matrix), rank, float(matrix.diagonal().sum()), len(matrix), matrix
        )
        if found is not None:
            return found
    values, vectors = eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if isinstance(rank, float):
        some = values.cpu()  # CUDA's sums over a vector are none of its deterministic algorithms
        explained = some.cumsum(0) / some.sum().clamp_min(torch.finfo(values.dtype).tiny)
        rank = min(len(values), int((explained < rank).sum()) + 1) if float(values.sum()) > 0 else 1
    return values[:rank], vectors[:, :rank]


def largest_eigenvalue(matmul: Callable[[Tensor], Tensor], size: int, like: Tensor) -> float:
    """A lower estimate of the largest eigenvalue: the Rayleigh–Ritz value on a small Krylov space, fixed start."""
    block = _start(size, 4, like)
    blocks = [block]
    for _ in range(2):
        block = matmul(block)
        block = block / block.norm(dim=0).clamp_min(torch.finfo(block.dtype).tiny)
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
    return float(torch.linalg.eigvalsh(basis.T @ matmul(basis))[-1])


def few_of_many(
    matmul: Callable[[Tensor], Tensor], size: int, rank: int, trace: float, most: int, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The top eigenpairs of G from a Krylov space, as :func:`top_eigenvectors` finds them.

    Args:
        matmul: V ↦ G V, of (n, w).
        size: n.
        rank: how many.
        trace: tr G.
        most: a bound on G's own rank.
        like: of the dtype and on the device of the result.

    Returns:
        As for :func:`top_eigenvectors`; None where they are not few, or do not converge in half the dimensions.
    """
    width = rank + OVERSAMPLING
    if 2 * STEPS * width > size or STEPS * width > most:
        return None
    basis = block = torch.linalg.qr(_start(size, width, like))[0]
    while basis.shape[1] <= size // 2 - width:
        block = matmul(block)
        for _ in range(2):  # twice, as the first time leaves rounding that the growing space would amplify
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block)[0]
        basis = torch.cat([basis, block], dim=1)
        if basis.shape[1] % (2 * width) or basis.shape[1] < STEPS * width:
            continue
        applied = matmul(basis)
        values, rotation = torch.linalg.eigh(basis.T @ applied)
        values, rotation = values[-rank:].flip(0), rotation[:, -rank:].flip(1)
        vectors = basis @ rotation
        residual = (applied @ rotation - vectors * values).square().sum()
        if float(residual) <= TOLERANCE * float(values[-1]) * trace:
            return values, vectors
    return None


def _start(size: int, width: int, like: Tensor) -> Tensor:
    """The same noise for every matrix of a size, (size, width), so that equal sums give equal patches."""
    return _noise(size, width).to(like)


@lru_cache(maxsize=8)
def _noise(size: int, width: int) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
