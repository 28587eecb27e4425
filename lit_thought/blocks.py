"""Find a model's transformer blocks and the linear layers of each that a thought patch may change.

This is the only place that knows about architectures. A *site* is a linear layer that writes to the
residual stream; a patch adds a low-rank matrix to its weight:

=========== ======================================= ==========================================
site        the layer                               what its input is
=========== ======================================= ==========================================
attn_out    attention's output projection           z, the concatenated heads
mlp_out     the MLP's output (down) projection      f, the MLP's hidden activations (d_ff)
=========== ======================================= ==========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import ThoughtError, UnsupportedModelError

__all__ = ["SITES", "Block", "Site", "check_sites", "find_blocks", "find_decoder"]

SITES = ("attn_out", "mlp_out")
"""The sites in the order in which a block's forward pass reaches them."""

_LLAMA_LIKE = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}
_ROLES: dict[str, dict[str, str]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gpt2": {"attn_out": "attn.c_proj", "mlp_out": "mlp.c_proj"},
}
"""``config.model_type`` -> site -> the layer's path inside a block. Every family here is pre-norm and
sequential: a block computes ``m = h + attention(norm(h))`` and returns ``m + mlp(norm(m))``."""


@dataclass(frozen=True)
class Site:
    """One linear layer that writes to the residual stream.

    Attributes:
        name: ``"attn_out"`` or ``"mlp_out"``.
        path: the layer's full module path in the model, as PEFT names it.
        layer: the ``nn.Linear`` or ``Conv1D`` itself.
        d_in: size of its input.
        d_out: size of the residual stream.
    """

    name: str
    path: str
    layer: nn.Module
    d_in: int
    d_out: int

    @property
    def fan_in_fan_out(self) -> bool:
        """True where the weight is stored transposed, (d_in, d_out): GPT-2's ``Conv1D``."""
        return isinstance(self.layer, Conv1D)


@dataclass(frozen=True)
class Block:
    """One transformer block: its index, its module and its sites by name."""

    index: int
    module: nn.Module
    sites: dict[str, Site]


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """Return ``sites`` in forward order.

    Raises:
        ThoughtError: when ``sites`` is empty, repeats a site or names one that does not exist.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown or not names or len(set(names)) != len(names):
        raise ThoughtError(
            f"sites must name one or more of {list(SITES)}, each once; got {list(names)!r}. "
            "Leave it out for both sites."
        )
    return tuple(name for name in SITES if name in names)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that embeds tokens and runs the blocks: the causal LM without its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Find the blocks of a causal LM, in order, and the sites of each.

    Raises:
        UnsupportedModelError: for an architecture that is not in the table, a block whose layers are not
            plain linear layers (wrapped by PEFT, quantised), or cross-attention.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "model is wrapped by PEFT; expected a plain transformers causal LM. "
            "Call model.merge_and_unload() or model.unload() first."
        )
    if family not in _ROLES or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"not supported yet: architecture {family!r} ({type(model).__name__}). "
            f"Supported: {', '.join(sorted(_ROLES))}."
        )
    decoder = find_decoder(model)
    lists = [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"not supported yet: {type(model).__name__} has {len(lists)} lists of "
            f"{config.num_hidden_layers} blocks under its decoder; expected one."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    return [_block(index, module, _ROLES[family], paths) for index, module in enumerate(lists[0][1])]


def _block(index: int, module: nn.Module, roles: dict[str, str], paths: dict[int, str]) -> Block:
    sites = {}
    for name, relative in roles.items():
        layer = module.get_submodule(relative)
        path = paths[id(layer)]
        if type(layer) is nn.Linear:
            d_in, d_out = layer.in_features, layer.out_features
        elif isinstance(layer, Conv1D):
            d_in, d_out = layer.weight.shape
        else:
            raise UnsupportedModelError(
                f"not supported yet: {path} is a {type(layer).__name__}; expected nn.Linear or Conv1D. "
                "Load the model without quantisation, or unload its adapters, first."
            )
        sites[name] = Site(name, path, layer, d_in, d_out)
    return Block(index, module, sites)
