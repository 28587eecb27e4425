"""Drive the two runs through the blocks, one site of one block at a time.

For every batch there are two streams: the *target* (instructed, original weights) and the *plain* one, which
goes through the blocks already patched. A *stage* is one site of one block: every batch is observed once,
the caller solves the site's patch from the observations, and :meth:`StreamRunner.finish` installs it. After a
block's last site both streams move on to the next block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.batches import PairBatch
from lit_thought.blocks import Block
from lit_thought.streams import LowRank, Stream, TokenBatch

__all__ = ["ORDERS", "Observation", "StreamRunner"]

ORDERS = ("sequential", "teacher-forced")


@dataclass(frozen=True)
class Observation:
    """What one stage saw in one batch, for the n compared tokens.

    Attributes:
        a: input of the site's layer in the plain run, (n, d_in).
        delta: target's residual stream less the plain run's, right after the site, (n, d), float32 or better.
        weights: (n,).
    """

    a: Tensor
    delta: Tensor
    weights: Tensor


@dataclass
class _Pair:
    """Both streams of one batch, and what is kept of the current block."""

    batch: PairBatch
    plain: Stream | None
    target: Stream
    goals: dict[str, Tensor]
    after: tuple[Tensor, Tensor] | None = None


class StreamRunner:
    """Streams of all batches, advanced together.

    Args:
        model: the frozen causal LM.
        blocks: its blocks.
        sites: sites to patch, in forward order.
        order: ``"sequential"``: each block's plain run has been through the blocks patched so far;
            ``"teacher-forced"``: each block's compared tokens enter as they left the block before in the target run.
        offload: keep streams on the CPU between uses, where the model is on another device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        sites: Sequence[str],
        order: Literal["sequential", "teacher-forced"] = "sequential",
        offload: bool = False,
    ) -> None:
        self.model, self.blocks, self.sites, self.order = model, list(blocks), tuple(sites), order
        self.device = next(model.parameters()).device
        self.storage = torch.device("cpu") if offload else self.device
        self.stage = 0
        self._pairs: dict[int, _Pair] = {}
        self._patches: dict[str, LowRank] = {}

    @property
    def num_stages(self) -> int:
        """Blocks × sites."""
        return len(self.blocks) * len(self.sites)

    @property
    def block(self) -> Block:
        """The block of the current stage."""
        return self.blocks[self.stage // len(self.sites)]

    @property
    def site(self) -> str:
        """The site of the current stage."""
        return self.sites[self.stage % len(self.sites)]

    @torch.inference_mode()
    def observe(self, batch: PairBatch) -> Observation:
        """Run the current stage on one batch; a lead before the batches that follow it."""
        pair = self._pairs.get(batch.index) or self._open(batch)
        if self.site == self.sites[0]:
            self._run_target(pair)
        if pair.plain is None:
            site, width = self.block.sites[self.site], pair.goals[self.site].shape[1]
            return Observation(self._nothing(site.d_in), self._nothing(width), pair.batch.weights)
        last = self.site == self.sites[-1]
        self._fetch(pair.plain)
        output, readings = pair.plain.run(
            self.block, (self.site,), self._patches, stop_after=None if self.site == "mlp_out" else self.site
        )
        self._store(pair.plain)
        reading = readings[self.site]
        rows = pair.batch.plain_rows
        residual = reading.residual.flatten(0, 1)[rows]
        wide = torch.promote_types(residual.dtype, torch.float32)
        delta = pair.goals[self.site].to(self.device).to(wide) - residual.to(wide)
        if last and output is not None:
            pair.after = (output.to(self.storage), reading.input.to(self.storage))
        return Observation(reading.input.flatten(0, 1)[rows], delta, pair.batch.weights)

    @torch.inference_mode()
    def finish(self, patch: LowRank) -> None:
        """Install the current stage's patch and move on; after a block's last site, all streams advance."""
        self._patches[self.site] = patch
        if self.site == self.sites[-1]:
            for pair in self._pairs.values():
                self._advance(pair)
            for pair in self._pairs.values():  # a lead's keys and values only once those that follow it are done
                for stream in (pair.target, pair.plain):
                    if stream is not None:
                        stream.forget_kv(self.block)
            self._patches = {}
        self.stage += 1

    def _open(self, batch: PairBatch) -> _Pair:
        follows = self._pairs[batch.lead] if batch.lead is not None else None
        keep = batch.lead is None

        def stream(tokens: TokenBatch, lead: Stream | None) -> Stream:
            return Stream(self.model, self.blocks, tokens.to(self.device), lead, keep)

        target = stream(batch.target, follows.target if follows else None)
        plain = stream(batch.plain, follows.plain if follows else None) if batch.plain is not None else None
        pair = _Pair(batch.to(self.device), plain, target, {})
        self._pairs[batch.index] = pair
        return pair

    def _run_target(self, pair: _Pair) -> None:
        self._fetch(pair.target)
        output, readings = pair.target.run(self.block, self.sites)
        rows = pair.batch.target_rows
        pair.goals = {name: reading.residual.flatten(0, 1)[rows].to(self.storage) for name, reading in readings.items()}
        assert output is not None
        pair.target.hidden = output.to(self.storage)

    def _advance(self, pair: _Pair) -> None:
        if pair.plain is None:
            return
        output: Tensor | None
        if pair.after is not None:
            output, inputs = (x.to(self.device) for x in pair.after)
            output = output + self._patches["mlp_out"](inputs).to(output.dtype)
            pair.after = None
        else:
            self._fetch(pair.plain)
            output, _ = pair.plain.run(self.block, (), self._patches)
        assert output is not None
        if self.order == "teacher-forced":
            rows = output.flatten(0, 1).clone()
            target = pair.target.hidden.to(self.device).flatten(0, 1)
            rows[pair.batch.plain_rows] = target[pair.batch.target_rows]
            output = rows.view_as(output)
        pair.plain.hidden = output.to(self.storage)

    def _fetch(self, stream: Stream) -> None:
        stream.hidden = stream.hidden.to(self.device)

    def _store(self, stream: Stream) -> None:
        stream.hidden = stream.hidden.to(self.storage)

    def _nothing(self, width: int) -> Tensor:
        return torch.zeros(0, width, device=self.device)
