"""Find a model's transformer blocks and the linear layers of each that a thought patch may change.

This is the only place that knows about architectures. A *site* is where the input a and the error δ of the
least squares are read, and which weights its solution changes:

=========== ===================================== ====================================== =======================
site        a                                     δ                                      what changes
=========== ===================================== ====================================== =======================
attn_out    z, the concatenated heads: input of   error of the residual stream m after   that projection
            attention's output projection         attention
mlp_in      norm(m), input of the MLP's first     error of norm(m)                       every first linear:
            linear layers (gate and up)                                                  W ← W + W Δ
mlp_out     f (d_ff), input of the MLP's output   error of the block's output            that projection
            (down) projection
=========== ===================================== ====================================== =======================

A thought *vector* is added to the bias of the site's output projection: attention's at attn_out, the MLP's at
mlp_in and mlp_out; at mlp_in it is the error of m, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import ThoughtError, UnsupportedModelError

__all__ = ["SITES", "Block", "Site", "check_indices", "check_sites", "find_blocks", "find_decoder", "weight_of"]

SITES = ("attn_out", "mlp_in", "mlp_out")
"""The sites in the order in which a block's forward pass reaches them."""


@dataclass(frozen=True)
class _Roles:
    """Paths inside a block. ``output_norm`` normalises the MLP's output (post-norm blocks)."""

    attn_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    output_norm: str | None = None


_GATED = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA_LIKE = _Roles("self_attn.o_proj", "post_attention_layernorm", _GATED, "mlp.down_proj")
_ROLES: dict[str, _Roles] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gpt2": _Roles("attn.c_proj", "ln_2", ("mlp.c_fc",), "mlp.c_proj"),
    "gemma3_text": _Roles(
        "self_attn.o_proj", "pre_feedforward_layernorm", _GATED, "mlp.down_proj", "post_feedforward_layernorm"
    ),
}
"""``config.model_type`` -> roles. Every family here is sequential: a block computes ``m = h + attention(norm(h))``
and returns ``m + mlp(norm(m))``, post-norm ones with another norm around attention's and the MLP's output."""


@dataclass(frozen=True)
class Site:
    """One site of one block.

    Attributes:
        name: ``"attn_out"``, ``"mlp_in"`` or ``"mlp_out"``.
        path: full module path, as PEFT names it, of the projection that writes to the residual stream; its bias takes
            a thought vector.
        layer: that ``nn.Linear`` or ``Conv1D`` itself.
        targets: the layers whose weight the site's matrix changes, by path: the projection, or at mlp_in the MLP's
            first linear layers.
        d_in: size of a.
        d_out: size of δ: that of the residual stream.
    """

    name: str
    path: str
    layer: nn.Module
    targets: dict[str, nn.Module]
    d_in: int
    d_out: int

    @property
    def fan_in_fan_out(self) -> bool:
        """True where weights are stored transposed, (d_in, d_out): GPT-2's ``Conv1D``."""
        return isinstance(self.layer, Conv1D)

    def factors(self, A: Tensor, B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The change of each target's weight for the site's matrix Δ = B A, as (A, B), in B's dtype.

        At the output projections ΔW = Δ; at mlp_in ΔW = W Δ = (W B) A, with one A for all first linears.

        Args:
            A: (r, d_in).
            B: (d_out, r).
        """
        if self.name != "mlp_in":
            return {self.path: (A, B)}
        return {path: (A, weight_of(layer).detach().to(B) @ B) for path, layer in self.targets.items()}


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: its place in the model.
        module: the block itself.
        sites: by name.
        mlp_norm: the norm between the residual stream m and the MLP.
        output_norm: the norm of the MLP's output in post-norm blocks, otherwise None.
    """

    index: int
    module: nn.Module
    sites: dict[str, Site]
    mlp_norm: nn.Module
    output_norm: nn.Module | None = None


def weight_of(layer: nn.Module) -> Tensor:
    """A linear layer's weight as (d_out, d_in), however it is stored."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """Return ``sites`` in forward order.

    Raises:
        ThoughtError: when ``sites`` is empty, repeats a site or names one that does not exist.
    """
    names = (sites,) if isinstance(sites, str) or not isinstance(sites, Iterable) else tuple(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown or not names or len(set(names)) != len(names):
        raise ThoughtError(
            f"sites must name one or more of {list(SITES)}, each once; got {list(names)!r}. "
            "Leave it out for the default, attn_out and mlp_out."
        )
    return tuple(name for name in SITES if name in names)


def check_indices(blocks: Sequence[int] | None, count: int | None = None) -> list[int] | None:
    """Return indices of blocks in ascending order, or None for all of them.

    Args:
        blocks: indices from 0 on, each once, or None.
        count: how many blocks the model has, where that is known.

    Raises:
        ThoughtError: for anything else, or an index the model does not have.
    """
    if blocks is None:
        return None
    chosen = list(blocks) if isinstance(blocks, Iterable) else []
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in chosen):
        raise ThoughtError(
            f"blocks must be indices of blocks, from 0 on; got {blocks!r}. Leave it out for all of them."
        )
    if len(set(chosen)) != len(chosen):
        raise ThoughtError(f"blocks must name each block once; got {chosen!r}.")
    if count is not None and max(chosen) >= count:
        raise ThoughtError(f"blocks: the model has blocks 0 to {count - 1}; got {max(chosen)}.")
    return sorted(chosen)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that embeds tokens and runs the blocks: the causal LM without its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def find_blocks(model: PreTrainedModel, post_norm: bool = False) -> list[Block]:
    """Find the blocks of a causal LM, in order, and the sites of each.

    Args:
        model: the causal LM.
        post_norm: accept blocks that normalise the MLP's output (Gemma 3), to which a fit does not apply yet.

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
    supported = sorted(name for name, roles in _ROLES.items() if post_norm or roles.output_norm is None)
    if family not in supported or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"not supported yet: architecture {family!r} ({type(model).__name__}). Supported: {', '.join(supported)}."
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


def _block(index: int, module: nn.Module, roles: _Roles, paths: dict[int, str]) -> Block:
    def linear(relative: str) -> tuple[str, nn.Module]:
        layer = module.get_submodule(relative)
        path = paths[id(layer)]
        if type(layer) is not nn.Linear and not isinstance(layer, Conv1D):
            raise UnsupportedModelError(
                f"not supported yet: {path} is a {type(layer).__name__}; expected nn.Linear or Conv1D. "
                "Load the model without quantisation, or unload its adapters, first."
            )
        return path, layer

    attn_out, mlp_out = linear(roles.attn_out), linear(roles.mlp_out)
    firsts = dict(linear(relative) for relative in roles.mlp_in)
    width = len(weight_of(mlp_out[1]))
    sites = {
        "attn_out": Site("attn_out", *attn_out, dict([attn_out]), weight_of(attn_out[1]).shape[1], width),
        "mlp_in": Site("mlp_in", *mlp_out, firsts, width, width),
        "mlp_out": Site("mlp_out", *mlp_out, dict([mlp_out]), weight_of(mlp_out[1]).shape[1], width),
    }
    output_norm = module.get_submodule(roles.output_norm) if roles.output_norm else None
    return Block(index, module, sites, module.get_submodule(roles.mlp_norm), output_norm)
