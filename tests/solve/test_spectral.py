"""The top of a spectrum against numpy's full decomposition."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from lit_thought.solve import spectral
from lit_thought.solve.spectral import largest_eigenvalue, top_eigenvectors


def positive(values: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return torch.from_numpy((basis * values) @ basis.T)


def missed(matrix: torch.Tensor, vectors: torch.Tensor) -> float:
    """How much of the largest possible tr Uᵀ G U the vectors miss, as a share of tr G."""
    best = np.linalg.eigvalsh(matrix.numpy())[::-1][: vectors.shape[1]].sum()
    return float(best - torch.trace(vectors.T @ matrix @ vectors)) / float(torch.trace(matrix))


SPECTRA = {
    "fast decay": 0.8 ** np.arange(400),
    "power law": (1 + np.arange(400.0)) ** -1,
    "slow decay": np.exp(-np.arange(400) / 80),
    "rank below the one asked for": np.where(np.arange(400) < 5, 1.0, 0.0),
    "equal pairs": np.repeat(0.9 ** np.arange(200), 2),
}


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_top_of_a_large_matrix(name: str, rank: int) -> None:
    matrix = positive(SPECTRA[name])
    values, vectors = top_eigenvectors(matrix, rank)
    assert (values.shape, vectors.shape) == ((rank,), (400, rank))
    np.testing.assert_allclose(values, SPECTRA[name][:rank], atol=3e-6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-12)
    assert missed(matrix, vectors) < 3e-8


@pytest.mark.parametrize(("values", "full"), [(SPECTRA["power law"], False), (2 - 1e-3 * np.arange(400), True)])
def test_few_of_many_need_no_full_decomposition_and_a_flat_spectrum_does(values: np.ndarray, full: bool) -> None:
    matrix = positive(values)
    with patch.object(spectral.torch.linalg, "eigh", wraps=torch.linalg.eigh) as decompose:
        _, vectors = top_eigenvectors(matrix, 8)
    assert (max(len(call.args[0]) for call in decompose.call_args_list) == 400) == full
    assert missed(matrix, vectors) < 3e-8


@pytest.mark.parametrize(("rank", "kept"), [(None, 6), (6, 6), (2, 2), (0.5, 1), (0.9, 3), (0.999, 5)])
def test_ranks_of_a_small_matrix(rank: int | float | None, kept: int) -> None:
    matrix = positive(np.array([8.0, 4.0, 2.0, 1.0, 0.1, 0.001]))
    values, vectors = top_eigenvectors(matrix, rank)
    np.testing.assert_allclose(values, np.array([8.0, 4.0, 2.0, 1.0, 0.1, 0.001])[:kept], atol=1e-12)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-12)


def test_equal_matrices_up_to_rounding_have_equal_projections() -> None:
    """The Krylov space starts from the same noise each time, so that the split of a sum does not show in a patch."""
    matrix = positive(SPECTRA["power law"])
    noise = 1e-13 * positive(np.ones(400), seed=1)
    one, other = (top_eigenvectors(x, 16)[1] for x in (matrix, matrix + noise))
    assert float((one @ one.T - other @ other.T).norm()) < 1e-9


def test_largest_eigenvalue() -> None:
    for values in SPECTRA.values():
        matrix = positive(values)
        found = largest_eigenvalue(lambda v, matrix=matrix: matrix @ v, 400, matrix)
        assert 0.85 * values.max() < found < values.max() * (1 + 1e-12)


def test_a_share_of_nothing_is_one_direction() -> None:
    values, vectors = top_eigenvectors(torch.zeros(5, 5, dtype=torch.float64), 0.9)
    assert (len(values), vectors.shape) == (1, (5, 1))
