"""Sums of aᵀ a by half of their blocks, against NumPy's whole products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_thought.solve.gram import add_products, mirror, packed, products, unpacked


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600, 2100])
@pytest.mark.parametrize(("rows", "total"), [("float64", "float64"), ("float32", "float64"), ("float32", "float32")])
def test_the_sum_over_several_batches(size: int, rows: str, total: str) -> None:
    generator = torch.Generator().manual_seed(size)
    batches = [torch.randn(n, size, generator=generator, dtype=getattr(torch, rows)) for n in (3, 1, 8)]
    found = torch.zeros(size, size, dtype=getattr(torch, total))
    for a in batches:
        add_products(found, a)
    every = torch.cat(batches).double().numpy()
    tolerance = 1e-12 if rows == "float64" else 2e-5
    for _ in range(2):  # mirroring it again changes nothing
        np.testing.assert_allclose(mirror(found).double(), every.T @ every, atol=tolerance * size**0.5)
    add_products(found, batches[0])
    wanted = every.T @ every + batches[0].double().numpy().T @ batches[0].double().numpy()
    np.testing.assert_allclose(mirror(found).double(), wanted, atol=tolerance * size**0.5)


def test_the_blocks_below_the_diagonal_are_not_computed() -> None:
    found = torch.zeros(1024, 1024)
    add_products(found, torch.ones(2, 1024))
    assert float(found.sum()) / 2 == 1024**2 * (0.5 + 1 / 8), "four blocks a side: ten of sixteen"


@pytest.mark.parametrize("size", [1, 256, 700])
def test_products_of_rows(size: int) -> None:
    a = torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    np.testing.assert_allclose(products(a), a.numpy().T @ a.numpy(), atol=1e-12)


@pytest.mark.parametrize("size", [1, 256, 700, 2100])
def test_a_symmetric_matrix_is_packed_and_unpacked_bit_for_bit(size: int) -> None:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    matrix = matrix + matrix.T
    values = packed(matrix)
    assert torch.equal(unpacked(values, size), matrix)
    assert size <= 256 or len(values) < 0.8 * size * size
