"""What a fit costs before it starts: bytes by part, seconds by phase, and where its streams fit.

Bytes follow from sizes alone: those of the blocks' sites and of the batches. They count what is kept; the activations
of the one batch that is in a block come on top. Seconds are operations over the speed of a few products of matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.model.blocks import Block, Site
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Stage, goes_on_from
from lit_thought.runs.storage import Place
from lit_thought.settings import DIRECTIONS
from lit_thought.solve.least_squares import HALF, dual_operations, primal_operations
from lit_thought.solve.nystrom import OVERSAMPLING
from lit_thought.timing import format_bytes, format_duration

__all__ = [
    "Estimate",
    "Load",
    "ModelSizes",
    "estimate_bytes",
    "estimate_seconds",
    "fit_operations",
    "lead_bytes",
    "plain_runs",
    "preserve_operations",
    "solve_bytes",
    "statistics_bytes",
    "stream_bytes",
    "weighing_operations",
]


_SLOWER = {"forward": 1.4, "statistics": 1.6, "solve": 3.2}
"""Than single products: of a batch with one of the model's matrices, and of square matrices."""
_PER_SOLVE = 0.005
"""Seconds of a solve besides its operations."""


@dataclass(frozen=True)
class Load:
    """Tokens that a fit runs through the model, padding included.

    Attributes:
        compared: tokens that the sums take.
        answers: of these, tokens that predict one of an output, or its end.
        target, plain: tokens of the two runs.
        leads: of these, tokens of batches whose keys and values others read.
        looks: pairs of a token and one that it may attend to, in both runs.
    """

    compared: int
    answers: int
    target: int
    plain: int
    leads: int
    looks: int

    @classmethod
    def of(cls, batches: Sequence[PairBatch]) -> Load:
        """The load of these batches."""
        compared = answers = target = plain = leads = looks = 0
        ahead = {batch.index: batch for batch in batches}
        for batch in batches:
            compared += len(batch.plain_rows)
            answers += int((batch.answers > 0).sum())
            lead = None if batch.lead is None else ahead[batch.lead]
            runs = [
                (batch.target, None if lead is None else lead.target),
                (batch.plain, None if lead is None else lead.plain),
            ]
            target += batch.target.ids.numel()
            plain += 0 if batch.plain is None else batch.plain.ids.numel()
            for tokens, before in runs:
                if tokens is None:
                    continue
                rows, length = tokens.ids.shape
                looks += rows * length * (length + (0 if before is None else before.ids.shape[1]))
                leads += length if batch.lead is None and rows == 1 else 0
        return cls(compared, answers, target, plain, leads, looks)

    def longer(self, outputs: int) -> Load:
        """The same with so many more tokens of outputs, which both runs go through."""
        names = ("compared", "answers", "target", "plain")
        return replace(self, **{name: getattr(self, name) + outputs for name in names})

    @classmethod
    def typical(cls, tokens: int, chunk_tokens: int) -> Load:
        """That of short pairs with ``tokens`` compared tokens, all of outputs, and one chunk that all share."""
        return cls(tokens, tokens, tokens + chunk_tokens, tokens, chunk_tokens, tokens * chunk_tokens)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model's streams.

    Attributes:
        element: bytes of a number in the residual stream.
        keys_values: numbers of a token's keys and values in one block.
        tables: bytes of a token's rotary tables and position.
        mask: bytes of the masks for one pair of tokens.
        active: share of a mixture's experts that a token goes through.
    """

    element: int
    keys_values: int
    tables: int
    mask: int
    active: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        """Those of a model, from its configuration."""
        config = model.config.get_text_config()
        layers = getattr(config, "per_layer_config", None)  # where layers differ: the one with the widest heads
        config = max(layers, key=lambda layer: getattr(layer, "head_dim", None) or 0) if layers else config

        def first(*names: str, default: Any = None) -> Any:
            return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

        element = torch.empty((), dtype=model.dtype).element_size()
        heads = first("num_attention_heads", "n_head", default=1)
        size = first("head_dim", default=first("hidden_size", "n_embd", default=0) // heads)
        keys_values = 2 * first("num_key_value_heads", default=heads) * size
        if first("kv_lora_rank") is not None:  # DeepSeek's keys and values are wider than what is cached of them
            size = first("qk_rope_head_dim")
            keys_values = heads * (first("qk_nope_head_dim") + size + first("v_head_dim"))
        kinds = len(set(first("layer_types", default=("full",))))
        rotary = first("rope_parameters")
        rotated = 0 if rotary is None else int(size * rotary.get("partial_rotary_factor", 1.0))
        attention = getattr(config, "_attn_implementation", "sdpa")
        mask = {"sdpa": 1, "eager": element}.get(attention, 0)
        experts = first("num_local_experts", "num_experts", "n_routed_experts", default=1)
        active = first("num_experts_per_tok", default=experts) / max(experts, 1)
        return cls(element, keys_values, kinds * 2 * rotated * element + 8, kinds * mask, min(active, 1.0))


@dataclass(frozen=True)
class Estimate:
    """What a fit takes besides the model.

    Attributes:
        tokens: compared tokens.
        widest: the site with the most to sum and solve, as name and number of inputs.
        streams_bytes: both residual streams of all batches, their masks and rotary tables, the errors' targets and
            what was seen of one block.
        lead_bytes: keys and values of what prompts have in common, of one block at a time.
        statistics_bytes: Z and C, or the tokens where these are few, of the widest site.
        solve_bytes: work space of its solve.
        seconds: by phase: forward, statistics and solve; empty for a fit that is too short to ask.
        most_seconds: all of them, where outputs are still to be written and come out as long as they may; else 0.
        place: where what can be kept elsewhere than on the device is kept.
    """

    tokens: int
    widest: tuple[str, int]
    streams_bytes: int
    lead_bytes: int
    statistics_bytes: int
    solve_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    most_seconds: float = 0.0
    place: Place = "device"

    def __str__(self) -> str:
        place = {"device": "", "cpu": "; streams in main memory", "disk": "; streams on disk"}[self.place]
        time = least = ""
        if self.seconds:
            longest = f" to {format_duration(self.most_seconds)}" if self.most_seconds else ""
            time = f"about {format_duration(sum(self.seconds.values()))}{longest} and "
        if self.most_seconds:
            time, least = time.replace(" and ", ", once the outputs are written, and "), "at least "
        return f"This fit takes {time}{least}{format_bytes(self.total_bytes)} besides the model{place}."

    @property
    def held_bytes(self) -> int:
        """What can be kept elsewhere than on the device."""
        return self.streams_bytes + self.lead_bytes

    @property
    def work_bytes(self) -> int:
        """What has to be on the device."""
        return self.statistics_bytes + self.solve_bytes

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.held_bytes + self.work_bytes

    def parts(self) -> str:
        """Bytes by part, in words."""
        name, inputs = self.widest
        return (
            f"streams of {self.tokens:,} compared tokens {format_bytes(self.streams_bytes)}, keys and values of what "
            f"prompts share {format_bytes(self.lead_bytes)}, statistics of the widest site ({name}, {inputs:,} inputs) "
            f"{format_bytes(self.statistics_bytes)}, its solve {format_bytes(self.solve_bytes)}"
        )


def stream_bytes(blocks: Sequence[Block], stages: Sequence[Stage], load: Load, sizes: ModelSizes) -> int:
    """The most that :class:`~lit_thought.runs.runner.StreamRunner` keeps of the streams between two batches."""
    element = sizes.element
    width = blocks[stages[0].block].sites[stages[0].site].d_out
    target, plain, compared = (count * width * element for count in (load.target, load.plain, load.compared))
    tables = (load.target + load.plain) * sizes.tables + load.looks * sizes.mask
    most = target + plain
    for index, group in groupby(stages, key=lambda stage: stage.block):
        sites, middle = [blocks[index].sites[stage.site] for stage in group], 0
        goals = [compared + (load.compared * element * site.d_in if site.name == "mlp_in" else 0) for site in sites]
        for number, site in enumerate(sites):
            if number > 0:
                most = max(most, target + plain + middle + sum(goals[number:]))
            after, output = 0, False
            if goes_on_from(blocks[index], site.name, last=number + 1 == len(sites)):
                wide = element if site.plain else max(element, 4)  # times γ, in float32 or better
                after, output = load.plain * (width * element + site.d_in * wide), site.point is None
            most = max(most, target + (0 if output else plain + middle) + sum(goals[number + 1 :]) + after)
            middle = plain if after else middle
    return most + tables


def lead_bytes(stages: Sequence[Stage], load: Load, sizes: ModelSizes) -> int:
    """Keys and values of the leads: of one block, and at the start of all blocks before the first that is patched."""
    return load.leads * sizes.keys_values * sizes.element * (1 + stages[0].block)


def statistics_bytes(site: Site, tokens: int, element: int = 8) -> int:
    """Z and C of one site, or its tokens while they are fewer than d_in, at ``element`` bytes a number."""
    return element * min(tokens, site.d_in) * (site.d_in + site.d_out)


def solve_bytes(site: Site, tokens: int, directions: int) -> int:
    """Work space of one solve; float64 throughout."""
    d, out, n = site.d_in, site.d_out, tokens
    k = min(directions, d)
    if site.gain is not None:
        few = n + k < d
        return 8 * (5 * d * (n + k) + 4 * (n + k) ** 2 if few else 6 * d * d + 2 * d * out)
    if _is_dual(site, n, k):
        small = min(n, out)
        return 8 * (2 * n * d + 2 * k * d + 3 * n * n + n * k + 2 * n * out + 4 * small * small)
    return 8 * (3 * d * d + 2 * d * out + out * out)


def _is_dual(site: Site, tokens: int, directions: int) -> bool:
    """Whether the solve is the n × n dual (:func:`lit_thought.solve.least_squares.solve`)."""
    shape = (tokens, site.d_in, site.d_out, directions)
    return tokens < site.d_in and dual_operations(*shape) < primal_operations(*shape)


def estimate_bytes(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    stages: Sequence[Stage],
    load: Load,
    tokens: int,
    directions: int = DIRECTIONS,
) -> Estimate:
    """The bytes of a fit.

    Args:
        model: the model, with its ``blocks``.
        stages: what the fit goes through.
        load: what this process runs.
        tokens: compared tokens of all processes together, which one of them solves from.
        directions: k of the preservation statistics, 0 without.
    """
    sizes = ModelSizes.of(model)
    sites = [blocks[stage.block].sites[stage.site] for stage in stages]

    def work(site: Site) -> tuple[int, int]:
        return statistics_bytes(site, tokens), solve_bytes(site, tokens, directions)

    widest = max(sites, key=lambda site: sum(work(site)))
    return Estimate(
        load.compared,
        (widest.name, widest.d_in),
        stream_bytes(blocks, stages, load, sizes),
        lead_bytes(stages, load, sizes),
        *work(widest),
    )


def plain_runs(block: Block, names: Sequence[str]) -> float:
    """How often a fit of these sites runs the plain stream through a block, parts of it added up."""
    sites = [block.sites[name] for name in names]
    if not sites:
        return 1.0
    halves = sites[0].name == "attn_out" and goes_on_from(block, "attn_out", last=False)  # which the others go on from
    seen = sum(0.5 if site.point is not None or halves else 1.0 for site in sites)
    return seen + (0 if sites[-1].point is None and sites[-1].linear else 1)


def preserve_operations(
    model: PreTrainedModel, blocks: Sequence[Block], sites: Sequence[Site], tokens: int
) -> dict[str, float]:
    """Those of the preservation statistics of ``tokens`` tokens, in the phases of :func:`fit_operations`."""
    active, sizes = ModelSizes.of(model).active, [site.d_in for site in sites]
    return {
        "forward": sum(2.0 * tokens * _weights(block, active) for block in blocks),
        "statistics": sum(4.0 * tokens * d * min(d, OVERSAMPLING * DIRECTIONS) for d in sizes),
        "solve": sum(12.0 * d * min(d, OVERSAMPLING * DIRECTIONS) ** 2 for d in sizes),
    }


def fit_operations(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    stages: Sequence[Stage],
    load: Load,
    tokens: int,
    directions: int = DIRECTIONS,
) -> dict[str, float]:
    """Multiplications and additions of a fit by phase: forward, statistics, solve; attention's own are left out. The
    arguments are those of :func:`estimate_bytes`."""
    active, spent = ModelSizes.of(model).active, {"forward": 0.0, "statistics": 0.0, "solve": 0.0}
    for block in blocks:
        names = [stage.site for stage in stages if stage.block == block.index]
        spent["forward"] += 2 * _weights(block, active) * (load.target + load.plain * plain_runs(block, names))
        for site in (block.sites[name] for name in names):
            d, out, few = site.d_in, site.d_out, tokens < site.d_in
            k = min(directions, d)
            spent["statistics"] += 0.0 if few else load.compared * d * (HALF * d + 2 * out)
            if site.gain is not None:
                size = min(tokens + k, d) if few else d
                spent["solve"] += 8 * size**3 + 4 * size * size * d
            elif _is_dual(site, tokens, k):  # its rows are multiplied in single precision: twice as fast
                spent["solve"] += dual_operations(tokens, d, out, k) - 0.5 * tokens * d * (HALF * tokens + 2 * k)
            else:
                spent["solve"] += primal_operations(tokens if few else 0, d, out, k)
    return spent


def weighing_operations(model: PreTrainedModel, blocks: Sequence[Block], load: Load) -> float:
    """Those of :func:`~lit_thought.fit.weighing.weighed_by_change`, as :func:`fit_operations` counts them."""
    active, head = ModelSizes.of(model).active, model.get_output_embeddings()
    every = sum(_weights(block, active) for block in blocks) * (load.target + load.plain)
    embedding = 0 if head is None else sum(weight.numel() for weight in head.parameters())
    return 2 * (every + 2 * load.answers * embedding)


def _weights(block: Block, active: float) -> float:
    """Weights that a token meets in a block."""
    every = sum(weight.numel() for weight in block.module.parameters())
    if block.experts is None:
        return every
    name = block.experts.partition(f".{block.index}.")[2]
    return every - (1 - active) * sum(weight.numel() for weight in block.module.get_submodule(name).parameters())


def estimate_seconds(
    operations: Mapping[str, float],
    layer: nn.Module,
    device: torch.device,
    rows: int,
    solves: int = 0,
    asked: bool = False,
) -> dict[str, float]:
    """Seconds for :func:`fit_operations` at the speed of three products of matrices on this machine.

    Args:
        operations: by phase.
        layer: a linear layer of the model; where its weight is no plain matrix, another matrix stands in for it.
        device: where the model is.
        rows: tokens of a batch.
        solves: how many there are.
        asked: also where these products would take more than a twentieth of the fit themselves; otherwise nothing
            then.
    """
    weight: Any = getattr(layer, "weight", None)
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2
    size = 2048 if device.type == "cuda" else 512
    products = 2 * size**3 + rows * (weight.numel() if plain else size * size)
    if sum(operations.values()) < 20 * 2 * 2 * products and not asked:
        return {}
    square = {kind: torch.ones(size, size, dtype=kind, device=device) for kind in (torch.float32, torch.float64)}
    own = weight.detach() if plain else square[torch.float32]
    speeds = {
        "forward": _speed(own.new_ones(rows, own.shape[0]), own),
        "statistics": _speed(square[torch.float32], square[torch.float32]),
        "solve": _speed(square[torch.float64], square[torch.float64]),
    }
    found = {name: _SLOWER[name] * count / speeds[name] for name, count in operations.items()}
    return {**found, "solve": found["solve"] + solves * _PER_SOLVE}


def _speed(left: Tensor, right: Tensor) -> float:
    """Multiplications and additions a second."""
    return 2 * len(left) * right.numel() / max(_timed(lambda: left @ right), 1e-9)


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the second of two runs."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        spent = time.perf_counter() - start
    return spent
