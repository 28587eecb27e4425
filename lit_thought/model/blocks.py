"""Find a model's transformer blocks and the linear layers of each that a thought patch may change.

A *site* is where the input a and the error δ of the least squares are read, and which weights its solution changes:

    ================== ===================================== ================================== =======================
    site               a                                     δ                                  what changes
    ================== ===================================== ================================== =======================
    attn_out           z, the concatenated heads: input of   error of the residual stream m     that projection
                       attention's output projection         after attention
    mlp_in             norm(m), input of the MLP's first     error of norm(m)                   every first linear:
                       linear layers (gate and up)                                              W ← W + W Δ
    mlp_out            f (d_ff), input of the MLP's output   error of the residual stream       that projection
                       (down) projection                     after the MLP
    attn_out+mlp_out   [z; f], in blocks whose attention     error of the block's output        both projections
                       and MLP are parallel
    ================== ===================================== ================================== =======================

A thought *vector* is added to the bias of the site's output projection: attention's at attn_out, the MLP's at
mlp_in and mlp_out; at mlp_in it is the error of m, as in the paper.

What an output projection puts out, y, reaches the residual stream as ``g ⊙ γ y``: γ is a number for each token (a
residual multiplier, a gate, or 1 / rms(y) of a norm that follows), g one for each channel (that norm's scale). The γ
is read with a and multiplied into it; g is the site's ``gain``. Which layers are which is found out by running each
kind of block once (:mod:`lit_thought.model.discovery`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import SingularSystemError, UnsupportedModelError
from lit_thought.model.bare import bare_model, uncompiled
from lit_thought.model.calls import find_layers
from lit_thought.model.discovery import Roles, Writer, channel_gain
from lit_thought.model.layers import sits_beside, weight_of
from lit_thought.model.sharding import gathered
from lit_thought.model.tracing import Trace, trace_model
from lit_thought.settings import SITES

__all__ = [
    "JOINT",
    "Block",
    "Projection",
    "Site",
    "find_blocks",
    "plain_outputs",
    "require_site",
]


JOINT = "attn_out+mlp_out"
"""The site that attn_out and mlp_out are together where attention and MLP are parallel."""


@dataclass(frozen=True)
class Projection:
    """A linear layer that writes ``multiplier · gate · norm(y)`` to the residual stream, y being its output.

    Attributes:
        path: full module path, as PEFT names it.
        layer: the ``nn.Linear``, ``Conv1D`` or quantised linear itself.
        d_in: size of its input.
        multiplier: a constant factor.
        norm: the norm that its output goes through, or None.
        gate: the layer whose output's sigmoid is the factor of each token, or None.
    """

    path: str
    layer: nn.Module
    d_in: int
    multiplier: float = 1.0
    norm: nn.Module | None = None
    gate: nn.Module | None = None

    @property
    def linear(self) -> bool:
        """Whether a change of y shows in the residual stream times a constant, and y's size does not matter."""
        return self.norm is None and self.gate is None


@dataclass(frozen=True)
class Site:
    """One site of one block.

    Attributes:
        name: ``"attn_out"``, ``"mlp_in"``, ``"mlp_out"`` or ``"attn_out+mlp_out"``.
        projections: what writes to the residual stream here: one layer, at the joint site attention's and the MLP's.
        targets: the layers whose weight the site's matrix changes, by path: the projections, or at mlp_in the MLP's
            first linear layers.
        d_in: size of a, at the joint site of both inputs together.
        d_out: size of δ: that of the residual stream.
        gain: g of the norm after the projection, (d_out,), float32 or better; None for ones.
        point: the module whose input is the residual stream after this site, at mlp_in the norm before the MLP; None
            for the block's output.
    """

    name: str
    projections: tuple[Projection, ...]
    targets: dict[str, nn.Module]
    d_in: int
    d_out: int
    gain: Tensor | None = None
    point: nn.Module | None = None

    @property
    def path(self) -> str:
        """Full path of the (last) projection, whose bias takes a thought vector."""
        return self.projections[-1].path

    @property
    def layer(self) -> nn.Module:
        """The projection at :attr:`path`."""
        return self.projections[-1].layer

    @property
    def label(self) -> str:
        """The site's name in figures: the layer that is solved for, the MLP as a whole at mlp_in."""
        if self.name == "mlp_in":
            return f"{self.path.rpartition('.')[0]}.mlp_in"
        return "+".join(projection.path for projection in self.projections)

    @property
    def linear(self) -> bool:
        """Whether the residual stream is linear in what the projections put out."""
        return all(projection.linear for projection in self.projections)

    @property
    def plain(self) -> bool:
        """Whether what the projections put out is added to the residual stream as it is."""
        return self.linear and all(projection.multiplier == 1 for projection in self.projections)

    @property
    def fan_in_fan_out(self) -> bool:
        """True where weights are stored transposed, (d_in, d_out): GPT-2's ``Conv1D``."""
        return isinstance(self.layer, Conv1D)

    def factors(self, A: Tensor, B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The change of each target's weight for the site's matrix Δ = B A, as (A, B), in B's dtype.

        At the output projections ΔW = Δ, or each projection's columns of Δ; at mlp_in ΔW = W Δ = (W B) A, with one A
        for all first linears.

        Args:
            A: (r, d_in).
            B: (d_out, r).
        """
        if self.name == "mlp_in":
            return {path: (A, weight_of(layer).detach().to(B) @ B) for path, layer in self.targets.items()}
        columns = A.split([projection.d_in for projection in self.projections], dim=1)
        return {projection.path: (own, B) for projection, own in zip(self.projections, columns, strict=True)}


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: its place in the model.
        module: the block itself.
        sites: by name.
        mlp_norm: the norm between the residual stream m and the MLP, where the block has one and is not parallel.
        firsts: the MLP's first linear layers, by path, where nothing else reads that norm.
        mlp: the MLP as one module, where the block ends with ``o = m + c N(mlp(norm(m)))``; else None.
        parallel: attention and MLP read the same residual stream.
        experts: path of a mixture of experts, or None.
        missing: why the block lacks a site, by site.
        like: an output of the block, for families that return tuples; else None.
    """

    index: int
    module: nn.Module
    sites: dict[str, Site]
    mlp_norm: nn.Module | None = None
    firsts: dict[str, nn.Module] = field(default_factory=dict)
    mlp: nn.Module | None = None
    parallel: bool = False
    experts: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    like: Any = None

    @property
    def output_norm(self) -> nn.Module | None:
        """The norm of the MLP's output in post-norm blocks, otherwise None."""
        return self.sites["mlp_out"].projections[-1].norm if "mlp_out" in self.sites else None

    def rest(self, residual: Tensor) -> Tensor:
        """The block's output from the residual stream m after attention, where :attr:`mlp` is known."""
        assert self.mlp is not None
        (last,) = self.sites["mlp_out"].projections
        entry = self.sites["attn_out"].point
        assert entry is not None
        found: Tensor = self.mlp(residual if entry is self.mlp else entry(residual))
        found = found if last.norm is None else last.norm(found)
        return residual + (found if last.multiplier == 1 else last.multiplier * found)

    def stages(self, sites: Sequence[str]) -> tuple[str, ...]:
        """Which of ``sites`` this block has, in forward order; both output projections as one where they are joint."""
        if JOINT in self.sites and {"attn_out", "mlp_out"} <= set(sites):
            return (JOINT,)
        return tuple(name for name in SITES if name in sites and name in self.sites)


def require_site(blocks: Sequence[Block], name: str) -> None:
    """Check that at least one block has a site.

    Raises:
        UnsupportedModelError: with the reason why the first block has none, and what there is instead.
    """
    if not any(name in block.sites for block in blocks):
        there = [site for site in SITES if any(site in block.sites for block in blocks)]
        raise UnsupportedModelError(
            f"sites: no block has the site {name!r}: {blocks[0].missing.get(name, 'it was not found')}. "
            f"This model's sites: {there}."
        )


def plain_outputs(blocks: Sequence[Block]) -> list[Site]:
    """The mlp_out of every block, where what the MLP puts out is added to the residual stream as it is.

    That is where a vector in the projection's bias is a vector added to the block's output (steering).

    Raises:
        UnsupportedModelError: when a block has no such site, with the reason.
    """
    for block in blocks:
        site = block.sites.get("mlp_out")
        if site is None or not site.plain or site.point is not None:
            why = block.missing.get("mlp_out", "a norm, a gate or a factor stands between its MLP and its output")
            raise UnsupportedModelError(
                f"not supported: a vector on the output of block {block.index}: {why}, so the bias of a layer cannot "
                "hold it. transmute works on this model."
            )
    return [block.sites["mlp_out"] for block in blocks]


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Find the blocks of a causal LM, in order, and the sites of each.

    One block of each kind is run on a few rows of noise (:func:`~lit_thought.model.discovery.trace_block`); of a
    sharded model, for which all processes must call together, what was found before it was sharded holds.

    Raises:
        UnsupportedModelError: see :func:`~lit_thought.model.bare.bare_model`; and for a model that keeps other state
            than keys and values (state-space and linear attention layers), an encoder-decoder, or blocks without a
            single site.
        SingularSystemError: when a block, or the norm after a projection, puts out NaN or infinite values.
    """
    model = bare_model(model)
    with uncompiled(model):
        trace = trace_model(model)
        layers = find_layers(model)
        paths = {id(module): path for path, module in model.named_modules()}
        blocks = []
        for index, (module, roles) in enumerate(zip(layers, trace.roles, strict=True)):
            with gathered(module):
                blocks.append(_block(index, module, roles, paths, trace))
    if not any(block.sites for block in blocks):
        raise UnsupportedModelError(f"not supported: {trace.name}: {blocks[0].missing['attn_out']}.")
    _check_names(model, [path for block in blocks for site in block.sites.values() for path in site.targets])
    return blocks


def _check_names(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse layers in wrappers, which give them names that PEFT would not find in a model of this class."""
    for path in targets:
        names = path.split(".")
        wrapped = next((number for number, name in enumerate(names) if name.startswith("_")), None)
        if wrapped is not None:
            kind = type(model.get_submodule(".".join(names[:wrapped]))).__name__
            raise UnsupportedModelError(
                f"model: {path!r} is in a {kind}, so that an adapter would do nothing to a model without one. Give the "
                "model as it was before it was wrapped."
            )


def _block(index: int, module: nn.Module, roles: Roles, paths: Mapping[int, str], trace: Trace) -> Block:
    width = trace.width
    rows = torch.eye(2, width, dtype=trace.dtype, device=next(module.parameters()).device)

    def child(path: str | None) -> nn.Module | None:
        return module.get_submodule(path) if path is not None else None

    def projection(writer: Writer) -> Projection:
        layer = module.get_submodule(writer.path)
        norm, gate = child(writer.norm), child(writer.gate)
        return Projection(paths[id(layer)], layer, writer.d_in, writer.multiplier, norm, gate)

    def site(name: str, writers: Sequence[Writer]) -> Site:
        parts = tuple(map(projection, writers))
        norm = parts[-1].norm
        with torch.no_grad():
            gain = channel_gain(norm, rows) if norm is not None else None
        if norm is not None and gain is None:
            raise SingularSystemError(
                f"block {index}, {name}: the norm after {parts[-1].path} puts out NaN or infinite values. "
                "Check the model's weights and dtype."
            )
        targets = {part.path: part.layer for part in parts}
        d_in = sum(part.d_in for part in parts)
        return Site(name, parts, targets, d_in, width, gain, child(writers[-1].point))

    missing = roles.missing
    found = {"attn_out": roles.attn_out, "mlp_out": roles.mlp_out}
    sites = {name: site(name, [writer]) for name, writer in found.items() if writer is not None}
    firsts = {paths[id(module.get_submodule(path))]: module.get_submodule(path) for path in roles.mlp_in}
    if "mlp_in" not in roles.missing and roles.mlp_out is not None:
        if any(map(sits_beside, firsts.values())):
            missing = {**missing, "mlp_in": "the MLP's first linear layers are quantised"}
        else:
            parts = sites["mlp_out"].projections
            sites["mlp_in"] = Site("mlp_in", parts, firsts, width, width, None, child(roles.mlp_norm))
    both = [writer for writer in found.values() if writer is not None and writer.norm is None]
    if roles.parallel and len(both) == 2:
        sites[JOINT] = site(JOINT, both)
    return Block(
        index,
        module,
        sites,
        child(roles.mlp_norm),
        firsts,
        child(roles.mlp),
        roles.parallel,
        f"{paths[id(module)]}.{roles.experts}" if roles.experts else None,
        missing,
        trace.like,
    )
