"""What a fit would find in a model and what it would cost, before anything long runs: ``lit-thought inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_thought.errors import check_counts
from lit_thought.fit.estimate import Load, estimate_bytes, estimate_seconds, fit_operations, preserve_operations
from lit_thought.model.bare import bare_model
from lit_thought.model.blocks import JOINT, Block, Site, find_blocks, require_site
from lit_thought.model.layers import layer_shape, sits_beside
from lit_thought.model.loading import model_name
from lit_thought.runs.runner import stages_of
from lit_thought.settings import DEFAULT_SITES, DIRECTIONS, SITES, FitSettings, check_sites
from lit_thought.timing import format_bytes, format_duration

__all__ = ["BlockKind", "Inspection", "SiteReport", "format_inspection", "inspect_model"]


@dataclass(frozen=True)
class SiteReport:
    """One site of a kind of block.

    Attributes:
        name: attn_out, mlp_in, mlp_out, or attn_out+mlp_out where both are solved together.
        layers: paths of the layers that change, within the block.
        d_in, d_out: sizes of a and δ.
        output: how the layers' output reaches the residual stream, in words.
        gain: smallest, median and largest |g| over the channels of all blocks of the kind; None without a norm.
        quantised: whether a layer is quantised, so that the patch stays beside it.
        statistics_bytes: Z and C in float64.
        fitted: whether a fit at the chosen sites solves it.
    """

    name: str
    layers: tuple[str, ...]
    d_in: int
    d_out: int
    output: str
    gain: tuple[float, float, float] | None
    quantised: bool
    statistics_bytes: int
    fitted: bool


@dataclass(frozen=True)
class BlockKind:
    """Blocks that are alike, by index, and what was found in them; ``missing`` says why they lack a site."""

    blocks: tuple[int, ...]
    layout: str
    norm_before_mlp: str | None
    experts: str | None
    sites: tuple[SiteReport, ...]
    missing: dict[str, str]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes:
        model, architecture, parameters, dtype, device, width: the model; ``width`` is that of the residual stream.
        kinds: its blocks.
        tokens, chunk_tokens, rank: what the costs below are for.
        statistics_bytes: sums and work space of the largest stage; there is one at a time.
        streams_bytes: both residual streams, what is kept with them, and the keys and values of the chunk.
        preservation_bytes: the preservation statistics on disk.
        adapter_bytes: the adapter in float32.
        seconds: estimates by phase: forward, statistics, solve, and
            preservation, which comes once per model and kind of fit.
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    width: int
    kinds: tuple[BlockKind, ...]
    tokens: int
    chunk_tokens: int
    rank: int
    statistics_bytes: int
    streams_bytes: int
    preservation_bytes: int
    adapter_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def inspect_model(
    model: PreTrainedModel,
    sites: Sequence[str] | None = None,
    tokens: int = 500,
    chunk_tokens: int = 100,
    rank: int = 16,
    preserve_tokens: int = FitSettings.preserve_tokens,
) -> Inspection:
    """Find the model's blocks and sites, and estimate what a fit costs.

    Times are estimates (:func:`~lit_thought.fit.estimate.estimate_seconds`).

    Args:
        model: a causal LM.
        sites: as for :func:`~lit_thought.fit.api.transmute`.
        tokens: compared tokens of all pairs together.
        chunk_tokens: tokens of the instruction.
        rank: rank of the patch.
        preserve_tokens: tokens of unrelated text.

    Raises:
        ThoughtError: for a bad setting; UnsupportedModelError for a model that is not supported, with the reason.
    """
    check_counts(tokens=tokens, chunk_tokens=chunk_tokens, rank=rank, preserve_tokens=preserve_tokens)
    names = None if sites is None else check_sites(sites)
    model = bare_model(model)
    blocks = find_blocks(model)
    for name in names or ():
        require_site(blocks, name)
    chosen = names or DEFAULT_SITES
    fitted = [block.sites[name] for block in blocks for name in block.stages(chosen)]
    width = fitted[0].d_out
    load = Load.typical(tokens, chunk_tokens)
    stages = stages_of(blocks, chosen)
    memory = estimate_bytes(model, blocks, stages, load, tokens)
    seconds, preservation = (
        estimate_seconds(operations, fitted[-1].layer, model.device, tokens, len(fitted), asked=True)
        for operations in (
            fit_operations(model, blocks, stages, load, tokens),
            preserve_operations(model, blocks, fitted, preserve_tokens),
        )
    )
    return Inspection(
        model=model_name(model),
        architecture=f"{model.config.model_type} ({type(model).__name__})",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(next(model.parameters()).device),
        width=width,
        kinds=_kinds(blocks, chosen),
        tokens=tokens,
        chunk_tokens=chunk_tokens,
        rank=rank,
        statistics_bytes=memory.work_bytes,
        streams_bytes=memory.held_bytes,
        preservation_bytes=sum((min(DIRECTIONS, site.d_in) + 4) * site.d_in for site in fitted),
        adapter_bytes=sum(4 * rank * sum(layer_shape(layer)) for site in fitted for layer in site.targets.values()),
        seconds={**seconds, "preservation": sum(preservation.values())},
    )


def _kinds(blocks: Sequence[Block], chosen: Sequence[str]) -> tuple[BlockKind, ...]:
    """Blocks with the same description, together."""
    found: dict[str, tuple[BlockKind, list[Block]]] = {}
    for block in blocks:
        kind = _describe(block, chosen)
        found.setdefault(repr(kind), (kind, []))[1].append(block)
    return tuple(
        replace(
            kind,
            blocks=tuple(block.index for block in own),
            sites=tuple(replace(site, gain=_gain([block.sites[site.name] for block in own])) for site in kind.sites),
        )
        for kind, own in found.values()
    )


def _gain(sites: Sequence[Site]) -> tuple[float, float, float] | None:
    gains = [site.gain.abs().double() for site in sites if site.gain is not None]
    if not gains:
        return None
    every = torch.cat(gains)
    return float(every.min()), float(every.median()), float(every.max())


def _describe(block: Block, chosen: Sequence[str]) -> BlockKind:
    within = {id(module): path for path, module in block.module.named_modules()}

    def report(site: Site) -> SiteReport:
        layers = tuple(within[id(layer)] for layer in site.targets.values())
        return SiteReport(
            site.name,
            layers,
            site.d_in,
            site.d_out,
            "changes what the MLP reads" if site.name == "mlp_in" else _output(site, within),
            None,
            any(map(sits_beside, site.targets.values())),
            8 * site.d_in * (site.d_in + site.d_out),
            site.name in block.stages(chosen),
        )

    post = any(site.gain is not None for site in block.sites.values())
    layout = "attention and MLP in parallel" if block.parallel else "attention, then MLP"
    return BlockKind(
        (),
        layout + ("; a norm on what they put out" if post else ""),
        within[id(block.mlp_norm)] if block.mlp_norm is not None else None,
        block.experts.partition(f".{block.index}.")[2] if block.experts is not None else None,
        tuple(report(block.sites[name]) for name in (*SITES, JOINT) if name in block.sites),
        {name: why for name, why in block.missing.items() if name not in block.sites},
    )


def _output(site: Site, within: dict[int, str]) -> str:
    """How what a site's layers put out reaches the residual stream."""
    words = []
    for projection in site.projections:
        parts = [] if projection.multiplier == 1 else [f"times {projection.multiplier:.4g}"]
        if projection.gate is not None:
            parts.append(f"times the sigmoid of {within[id(projection.gate)]}")
        if projection.norm is not None:
            parts.append(f"through {within[id(projection.norm)]}")
        words.append(", ".join(parts) or "added as it is")
    return "; ".join(dict.fromkeys(words))


def format_inspection(found: Inspection) -> str:
    """The report as text."""
    lines = [
        f"{found.model or found.architecture}: {found.architecture}, {found.parameters / 1e6:,.0f} M parameters, "
        f"{found.dtype} on {found.device}, residual stream of {found.width}",
    ]
    for kind in found.kinds:
        lines += ["", f"{_ranges(kind.blocks)}: {kind.layout}"]
        if kind.experts is not None:
            lines.append(f"  mixture of experts: {kind.experts} (left as it is)")
        if kind.norm_before_mlp is not None:
            lines.append(f"  norm before the MLP: {kind.norm_before_mlp}")
        for site in kind.sites:
            mark = "*" if site.fitted else " "
            gain = "" if site.gain is None else " (|gain| {0:.2g} to {2:.2g}, median {1:.2g})".format(*site.gain)
            quantised = ", quantised: the patch stays beside the weight" if site.quantised else ""
            lines.append(
                f"  {mark} {site.name:<16} {', '.join(site.layers)}  {site.d_in} → {site.d_out}; "
                f"{site.output}{gain}{quantised}; statistics {format_bytes(site.statistics_bytes)}"
            )
        lines += [f"    {name:<16} not here: {why}" for name, why in kind.missing.items()]
    stages = {name: found.seconds[name] for name in ("forward", "statistics", "solve")}
    words = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in stages.items())
    lines += [
        "",
        "* is what a fit changes.",
        f"A fit of {found.tokens} compared tokens with a chunk of {found.chunk_tokens}, rank {found.rank}: about "
        f"{format_duration(sum(stages.values()))} ({words}); outputs that are missing are written first, at the "
        "model's own pace.",
        f"Memory above the model: statistics and solve {format_bytes(found.statistics_bytes)} (one site at a time), "
        f"streams {format_bytes(found.streams_bytes)}. Adapter: {format_bytes(found.adapter_bytes)}.",
        "Preservation statistics, once per model and kind of fit: about "
        f"{format_duration(found.seconds['preservation'])}, "
        f"{format_bytes(found.preservation_bytes)} on disk.",
    ]
    return "\n".join(lines)


def _ranges(indices: Sequence[int]) -> str:
    """``blocks 0, 2 to 4``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("blocks " if len(indices) > 1 else "block ") + ", ".join(words)
