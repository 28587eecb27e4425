"""Models whose weights are spread over processes (PyTorch's FSDP2): each block's weights are gathered when it runs.

FSDP gathers a module's weights in hooks, whenever the module is called. A fit calls blocks one at a time, each process
as often as it has batches, leaves them early and runs parts of them; so it gathers a block's weights once, for all its
batches (:func:`gathered`), and while they are there FSDP's hooks are off. All that processes must do together is one
gather a block, whatever their shares of the data. Generation, where whole forward passes follow each other, leaves it
to FSDP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["anywhere", "gathered", "is_sharded", "own_rows", "unhooked", "whole"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_sharded(value: nn.Module | Tensor) -> bool:
    """Whether a module is FSDP2's, or a tensor is a DTensor."""
    return hasattr(value, "unshard" if isinstance(value, nn.Module) else "full_tensor")


def anywhere(found: bool, value: Tensor) -> bool:
    """Whether it was found of any process's part of a tensor; all processes that have one ask together."""
    if not is_sharded(value):
        return found
    sharded: Any = value
    flag = torch.tensor(float(found), device=sharded.device_mesh.device_type)
    for group in sharded.device_mesh.get_all_groups():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag)


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """While inside, calling the module runs none of the hooks that are on it now."""
    hooks = {name: getattr(module, name) for name in _HOOKS}
    for name in _HOOKS:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for name, value in hooks.items():
            setattr(module, name, value)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While inside, a sharded module has its whole weights, and calling it talks to no other process.

    Of the model itself, these are the weights that are in none of its blocks: embeddings, last norm and head. All
    processes must enter together. Nothing happens where the module is not sharded.
    """
    if not is_sharded(module):
        yield
        return
    sharded: Any = module
    # weights gathered in inference mode could not be gathered again outside it
    with torch.inference_mode(False), torch.no_grad():
        sharded.unshard()
    try:
        with unhooked(module):
            yield
    finally:
        sharded.reshard()


def whole(value: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded; then all processes must ask for it together."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def own_rows(value: Tensor, like: Any) -> Tensor:
    """The rows of ``value`` that belong to this process, as those of the sharded tensor ``like`` do; all of them where
    ``like`` is not sharded. All processes must ask together."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.contiguous(), like.device_mesh, like.placements).to_local()
