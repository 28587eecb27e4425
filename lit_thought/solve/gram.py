"""Sums of products aᵀ a, which are symmetric: half of each is enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_products", "inner_products", "mirror", "packed", "products", "unpacked"]

_NARROWEST, _MOST = 256, 8
_INNER = 1024


def add_products(total: Tensor, a: Tensor) -> None:
    """Add aᵀ a to ``total``, (d, d), in place: to its blocks on and above the diagonal only; see :func:`mirror`.

    Args:
        total: any floating dtype; the products are added in it.
        a: rows, (n, d); they are multiplied in their own dtype.
    """
    for rows, block in zip(_blocks(len(total)), _upper(total), strict=True):
        block += a[:, rows].T @ a[:, rows.start :]


def mirror(total: Tensor) -> Tensor:
    """Fill, in place, the blocks below the diagonal of what :func:`add_products` added up; returns ``total``."""
    for rows in _blocks(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def products(a: Tensor) -> Tensor:
    """aᵀ a, (d, d), of rows (n, d)."""
    total = a.new_zeros(a.shape[1], a.shape[1])
    add_products(total, a)
    return mirror(total)


def inner_products(a: Tensor) -> Tensor:
    """a aᵀ, (n, n), float64, of rows (n, d): products of 1024 columns at a time in their own dtype, sums in float64."""
    total = a.new_zeros(len(a), len(a), dtype=torch.float64)
    for columns in a.split(_INNER, dim=1):
        add_products(total, columns.T)
    return mirror(total)


def packed(total: Tensor) -> Tensor:
    """The blocks on and above the diagonal of a symmetric matrix, one after the other, to send them."""
    return torch.cat([block.flatten() for block in _upper(total)])


def unpacked(values: Tensor, size: int) -> Tensor:
    """The matrix, (size, size), that :func:`packed` took apart."""
    total = values.new_empty(size, size)
    blocks = _upper(total)
    for block, part in zip(blocks, values.split([block.numel() for block in blocks]), strict=True):
        block.copy_(part.view_as(block))
    return mirror(total)


def _upper(total: Tensor) -> list[Tensor]:
    return [total[rows, rows.start :] for rows in _blocks(len(total))]


def _blocks(size: int) -> Iterator[slice]:
    """Of 256 rows or more, 8 of them at most: 0.56 to 0.75 of all products of a matrix that is large enough."""
    width = max(_NARROWEST, -(-size // _MOST))
    return (slice(start, min(start + width, size)) for start in range(0, size, width))
