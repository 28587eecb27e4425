"""Drive the two runs through the blocks, one site of one block at a time.

For every batch there are two streams: the *target* (instructed, original weights) and the *plain* one, which
goes through the blocks already patched. A *stage* is one site of one block: every batch is observed once,
the caller solves the site's patch from the observations, and :meth:`StreamRunner.finish` installs it. After a
block's last site both streams move on to the next block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.model.blocks import Block
from lit_thought.model.discovery import wider
from lit_thought.model.sharding import gathered
from lit_thought.prompts.batches import PairBatch, TokenBatch
from lit_thought.runs.storage import Kept, Storage
from lit_thought.runs.streams import SitePatch, Stream
from lit_thought.solve.factors import Factors

__all__ = ["Observation", "Stage", "StreamRunner", "goes_on_from", "stages_of"]


@dataclass(frozen=True)
class Observation:
    """What one stage saw in one batch, for the n compared tokens.

    Attributes:
        a: the site's input in the plain run, with each token's factor γ in it, (n, d_in).
        delta: the error that the site's matrix should explain, target less plain, (n, d), float32 or better: of
            norm(m) at mlp_in, of the residual stream right after the site elsewhere. What a patch that is there
            already explains of it is taken off.
        shift: the error that its vector should explain, likewise, (n, d): of the residual stream, at mlp_in that of m.
        weights: (n,).
        scale: γ, by which a vector reaches the residual stream, (n, 1); None for ones.
    """

    a: Tensor
    delta: Tensor
    shift: Tensor
    weights: Tensor
    scale: Tensor | None = None


class Stage(NamedTuple):
    """One site of one block."""

    block: int
    site: str


def stages_of(blocks: Sequence[Block], sites: Sequence[str], chosen: Sequence[int] | None = None) -> list[Stage]:
    """What a step of a fit goes through, in order: the sites that each chosen block has."""
    return [
        Stage(index, site)
        for index in (range(len(blocks)) if chosen is None else chosen)
        for site in blocks[index].stages(sites)
    ]


def goes_on_from(block: Block, name: str, last: bool) -> bool:
    """Whether the residual stream with a site's patch follows from the one seen without it, and the block can go on
    from there: at its output, which nothing but its ``last`` stage needs, or after attention where the MLP is known as
    one module."""
    site = block.sites[name]
    return site.linear and (last if site.point is None else name == "attn_out" and block.mlp is not None)


@dataclass
class _Pair:
    """Both streams of one batch, and what is kept of the current block: the target's readings of the compared
    tokens, (n, d_in or nothing) and (n, d) by site; the residual stream and input seen at its latest site, before that
    site's patch; and the residual stream after attention with its patch, where the block can go on from there."""

    batch: PairBatch
    plain: Stream | None
    target: Stream
    goals: dict[str, tuple[Kept | None, Kept]]
    after: tuple[Kept, Kept] | None = None
    middle: Kept | None = None


class StreamRunner:
    """Streams of all batches, advanced together.

    Args:
        model: the frozen causal LM.
        blocks: its blocks.
        sites: sites to patch, in forward order, in the blocks that have them.
        order: ``"sequential"``: each block's plain run has been through the blocks patched so far;
            ``"teacher-forced"``: each block's compared tokens enter as they left the block before in the target run.
        storage: where the streams are kept between uses; on the device when left out.
        chosen: indices of the blocks to patch, ascending; all of them when left out.
        start: patches that are there already, by (block index, site).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        sites: Sequence[str],
        order: Literal["sequential", "teacher-forced"] = "sequential",
        storage: Storage | None = None,
        chosen: Sequence[int] | None = None,
        start: Mapping[tuple[int, str], SitePatch] | None = None,
    ) -> None:
        self.model, self.blocks, self.order = model, list(blocks), order
        self.device = next(model.parameters()).device
        self.storage = storage or Storage()
        self.stages = stages_of(self.blocks, sites, chosen)
        self.stage = 0
        self._start = dict(start or {})
        self._pairs: dict[int, _Pair] = {}
        self._patches = self._existing(self.block.index)
        self._held = ExitStack()

    @property
    def num_stages(self) -> int:
        """Sites of the chosen blocks."""
        return len(self.stages)

    @property
    def block(self) -> Block:
        """The block of the current stage."""
        return self.blocks[self.stages[self.stage].block]

    @property
    def site(self) -> str:
        """The site of the current stage."""
        return self.stages[self.stage].site

    @property
    def start(self) -> SitePatch:
        """The patch that was at the current site before this step."""
        return self._start.get((self.block.index, self.site), SitePatch())

    @property
    def _leads_on(self) -> bool:
        """:func:`goes_on_from` for the current stage."""
        return goes_on_from(self.block, self.site, self._last)

    @property
    def _to_output(self) -> bool:
        """Whether the block's output follows from what is seen at the current stage, so that nothing else is needed."""
        return self._leads_on and self.block.sites[self.site].point is None

    @property
    def _first(self) -> bool:
        """Whether the current stage is the first one of its block."""
        return self.stage == 0 or self.stages[self.stage - 1].block != self.stages[self.stage].block

    @property
    def _last(self) -> bool:
        """Whether the current stage is the last one of its block."""
        return self.stage + 1 == self.num_stages or self.stages[self.stage + 1].block != self.stages[self.stage].block

    @torch.inference_mode()
    def open(self, batches: Sequence[PairBatch]) -> None:
        """Open the streams of these batches, in their order, and bring them to the first stage's block.

        Where the model is sharded, all processes must open theirs together, all at once; elsewhere :meth:`observe`
        opens what is not open yet.
        """
        with gathered(self.model):
            pairs = [self._open(batch) for batch in batches]
        for block in self.blocks[: self.stages[0].block]:
            with gathered(block.module):
                for pair in pairs:
                    self._go_through(pair, block)
        self._hold(self.block)

    def close(self) -> None:
        """Let go of the weights that are gathered for the current block."""
        self._held.close()

    def _hold(self, block: Block) -> None:
        """Gather a block's weights, where they are sharded, until the next call."""
        self._held.close()
        self._held.enter_context(gathered(block.module))

    @torch.inference_mode()
    def observe(self, batch: PairBatch) -> Observation:
        """Run the current stage on one batch; a lead before the batches that follow it."""
        if batch.index not in self._pairs:
            self.open([batch])
        pair = self._pairs[batch.index]
        if self._first:
            self._run_target(pair)
        goal_input, goal = (None if kept is None else kept.get() for kept in pair.goals.pop(self.site))
        assert goal is not None
        if pair.plain is None:
            nothing = self._nothing(goal.shape[1])
            return Observation(self._nothing(self.block.sites[self.site].d_in), nothing, nothing, pair.batch.weights)
        site = self.block.sites[self.site]
        stop = None if site.point is None else self.site
        middle = None if pair.middle is None else pair.middle.get()
        _, readings = pair.plain.run(self.block, (self.site,), self._patches, stop_after=stop, residual=middle)
        reading, rows = readings[self.site], pair.batch.plain_rows
        a = reading.input.flatten(0, 1)[rows]
        scale = reading.scale
        if scale is not None:
            scale = scale.expand(*reading.input.shape[:2], 1).flatten(0, 1)[rows]
        shift = self._error(goal, reading.residual.flatten(0, 1)[rows])
        delta = shift
        here = self._patches.get(self.site, SitePatch())
        if goal_input is not None:  # a patch at mlp_in acts after norm(m) and m were read
            delta = self._error(goal_input, a) - _change(here.matrix, a)
            shift = shift - _constant(here.vector)
        if self._leads_on:
            pair.after = (self.storage.put(reading.residual), self.storage.put(reading.input))
        if self._to_output:
            pair.middle = None
            pair.plain.forget_hidden()
        return Observation(a, delta, shift, pair.batch.weights, scale)

    @torch.inference_mode()
    def finish(self, patch: SitePatch) -> None:
        """Install the current stage's patch and move on; after a block's last site, all streams advance."""
        before = self._patches.get(self.site, SitePatch())
        self._patches[self.site] = patch
        if self._leads_on:
            for pair in self._pairs.values():
                self._go_on(pair, before)
        if self._last:
            here = self.block.index
            ahead = self.stages[self.stage + 1].block if self.stage + 1 < self.num_stages else here + 1
            for pair in self._pairs.values():
                self._advance(pair)
            self._forget_kv(self.blocks[:ahead])
            self._held.close()
            for block in self.blocks[here + 1 : ahead]:
                with gathered(block.module):
                    for pair in self._pairs.values():
                        self._go_through(pair, block)
                self._forget_kv([block])
            self._patches = self._existing(ahead)
            if self.stage + 1 < self.num_stages:
                self._hold(self.blocks[ahead])
        self.stage += 1

    def _forget_kv(self, blocks: Sequence[Block]) -> None:
        """Drop leads' keys and values, once all batches that follow them are done with these blocks."""
        for pair in self._pairs.values():
            for block in blocks:
                pair.target.forget_kv(block)
                if pair.plain is not None:
                    pair.plain.forget_kv(block)

    def _existing(self, index: int) -> dict[str, SitePatch]:
        return {site: patch for (block, site), patch in self._start.items() if block == index}

    def _open(self, batch: PairBatch) -> _Pair:
        follows = self._pairs[batch.lead] if batch.lead is not None else None
        leads = batch.lead is None and len(batch.target.ids) == 1

        def stream(tokens: TokenBatch, lead: Stream | None) -> Stream:
            return Stream(self.model, self.blocks, tokens.to(self.device), lead, leads, self.storage)

        target = stream(batch.target, follows.target if follows else None)
        plain = stream(batch.plain, follows.plain if follows else None) if batch.plain is not None else None
        pair = _Pair(batch.to(self.device), plain, target, {})
        self._pairs[batch.index] = pair
        return pair

    def _go_through(self, pair: _Pair, block: Block) -> None:
        """Both streams through a block that is not patched."""
        output, _ = pair.target.run(block, ())
        assert output is not None
        pair.target.hidden = output
        if pair.plain is not None:
            output, _ = pair.plain.run(block, ())
            assert output is not None
            self._enter(pair, output)

    def _run_target(self, pair: _Pair) -> None:
        sites = tuple(dict.fromkeys(stage.site for stage in self.stages if stage.block == self.block.index))
        output, readings = pair.target.run(self.block, sites)
        rows = pair.batch.target_rows

        def keep(value: Tensor) -> Kept:
            return self.storage.put(value.flatten(0, 1)[rows])

        pair.goals = {
            name: (keep(reading.input) if name == "mlp_in" else None, keep(reading.residual))
            for name, reading in readings.items()
        }
        assert output is not None
        pair.target.hidden = output

    def _go_on(self, pair: _Pair, before: SitePatch) -> None:
        """The residual stream after the current site as it is now patched; ``before`` was there when it was seen."""
        if pair.after is None:
            return
        residual, inputs = (x.get() for x in pair.after)
        now, scale = self._patches[self.site], self.block.sites[self.site].projections[-1].multiplier
        change = _change(now.matrix, inputs) - _change(before.matrix, inputs)
        change = change + scale * (_constant(now.vector) - _constant(before.vector))
        pair.after, pair.middle = None, self.storage.put(residual + torch.as_tensor(change).to(residual))

    def _advance(self, pair: _Pair) -> None:
        """The plain stream through the block as it is now patched."""
        if pair.plain is None:
            return
        output: Tensor | None
        middle = None if pair.middle is None else pair.middle.get()
        if self._to_output:
            output = middle
        else:
            output, _ = pair.plain.run(self.block, (), self._patches, residual=middle)
        pair.middle = None
        assert output is not None
        self._enter(pair, output)

    def _enter(self, pair: _Pair, output: Tensor) -> None:
        """Let the plain stream enter the next block with ``output``."""
        assert pair.plain is not None
        if self.order == "teacher-forced":
            rows = output.flatten(0, 1).clone()
            target = pair.target.hidden.flatten(0, 1)
            rows[pair.batch.plain_rows] = target[pair.batch.target_rows]
            output = rows.view_as(output)
        pair.plain.hidden = output

    def _error(self, goal: Tensor, found: Tensor) -> Tensor:
        wide = wider(found.dtype)
        return goal.to(wide) - found.to(wide)

    def _nothing(self, width: int) -> Tensor:
        return torch.zeros(0, width, device=self.device)


def _change(matrix: Factors | None, inputs: Tensor) -> Tensor | float:
    """Δ a, (…, d_out)."""
    return 0.0 if matrix is None else matrix(inputs)


def _constant(vector: Tensor | None) -> Tensor | float:
    """v, (d_out,)."""
    return 0.0 if vector is None else vector
