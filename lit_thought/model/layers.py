"""Linear layers as they come: ``nn.Linear``, GPT-2's ``Conv1D``, and quantised ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_thought.model.sharding import is_sharded, whole

__all__ = ["is_linear", "layer_shape", "of_peft", "sits_beside", "weight_of"]


def is_linear(layer: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not: they all state their sizes. PEFT's wrappers are none."""
    if of_peft(layer):
        return False
    sizes = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    return isinstance(layer, Conv1D) or all(isinstance(size, int) for size in sizes)


def of_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, a wrapper of a model or of a layer."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def weight_of(layer: nn.Module) -> Tensor:
    """A linear layer's weight as (d_out, d_in), however it is stored; gathered where it is sharded."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = whole(weight)
    return weight.T if isinstance(layer, Conv1D) else weight


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, quantised or not: a packed weight's shape says nothing of it."""
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def sits_beside(layer: nn.Module) -> bool:
    """Whether a change of this linear layer is added to its output, since its weight cannot be changed in place.

    So it is for every layer that does not simply multiply by a floating-point weight of at least two bytes:
    bitsandbytes, GPTQ, AWQ, HQQ, FP8, torchao and so on. One with a ``forward`` of its own (BitNet's, Falcon's) is
    tried on a row of noise.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or not all(_is_plain(value) for value in (weight, bias) if value is not None):
        return True
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or weight.is_meta:
        return False
    if is_sharded(weight):  # one process cannot try it alone
        return True
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, weight_of(layer).shape[1], generator=generator, device="cpu").to(weight)
    with torch.no_grad():
        found, wanted = layer.forward(row).float(), nn.functional.linear(row, weight_of(layer), bias).float()
    return not bool((found - wanted).norm() <= 1e-2 * wanted.norm())


def _is_plain(value: Tensor) -> bool:
    """Whether adding to this parameter changes it to floating-point precision; packed tensors are subclasses."""
    simple = type(value) in (Tensor, nn.Parameter) or is_sharded(value)
    return simple and value.is_floating_point() and value.element_size() > 1
