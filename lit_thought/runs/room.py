"""The key-value cache of a batch that is continued: made once, written in place."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["with_room"]


class _Layer(DynamicLayer):
    """Keys and values with room for those to come.

    transformers' own layer makes new tensors of all keys and values for each token, which takes longer than the
    model's products do, where thousands of tokens lie before it.

    Args:
        lead: what all rows begin with, in a batch of one.
        rows: how many there are.
        room: tokens that they may still take.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, lead: DynamicLayer, rows: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = cast(tuple[Tensor, Tensor], (lead.keys, lead.values))
        self._tensors = [_expanded(x, rows, room) for x in (keys, values)]
        self.device, self.is_initialized = keys.device, True
        self._show(keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write those of new tokens behind the others."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        for x, new in zip(self._tensors, (key_states, value_states), strict=True):
            x[..., start:stop, :] = new
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only keep these rows."""
        length = self.keys.shape[-2]
        self._tensors = [x[indices] for x in self._tensors]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (x[..., :length, :] for x in self._tensors)


def _expanded(x: Tensor, rows: int, room: int) -> Tensor:
    """One row's keys or values (1, heads, n, d) as those of many (rows, heads, n + room, d)."""
    _, *heads, length, size = x.shape
    wide = x.new_empty(rows, *heads, length + room, size)
    wide[..., :length, :] = x
    return wide


def with_room(lead: DynamicCache, rows: int, room: int) -> DynamicCache:
    """A copy of ``lead`` (a batch of one) for many rows.

    Args:
        lead: the cache of what they all begin with.
        rows: how many.
        room: tokens that each may still take.
    """
    cache = copy.copy(lead)
    cache.layers = []
    for layer in lead.layers:
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers.append(_Layer(layer, rows, room))
        else:
            other = cast(Any, copy.deepcopy(layer))
            other.batch_repeat_interleave(rows)
            cache.layers.append(other)
    return cache
