"""Residual streams that are kept and advanced block by block, and what the sites see on the way.

A :class:`Stream` is a padded batch of token sequences at the entrance of some block. It remembers the
arguments (masks, rotary tables, …) with which the model called each of its blocks, so that any one block can
be run again on its own: ``Stream.run(block, ...)``. Tokens that all sequences of a batch start with (the chunk
above all) are a stream of their own, the *lead*, run once; the others read its keys and values.

Nothing is left on the user's model: hooks and replaced methods live inside context managers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_thought.model.blocks import Block, Projection, Site
from lit_thought.model.calls import (
    Call,
    StopForwardError,
    cache_arguments,
    find_decoder,
    first_float,
    hidden_of,
    recorded_calls,
    unwrapped,
)
from lit_thought.model.discovery import row_ratio, wider
from lit_thought.model.sharding import gathered
from lit_thought.prompts.batches import TokenBatch, forward_inputs
from lit_thought.runs.storage import Kept, Storage
from lit_thought.solve.factors import Factors

__all__ = ["Reading", "SitePatch", "Stream", "lead_cache"]


@dataclass(frozen=True)
class SitePatch:
    """What a thought patch changes at one site: a matrix Δ = B A, applied as :meth:`Site.factors` says, and a
    vector, (d_out,), added to the output of the site's projection. Float32 or better."""

    matrix: Factors | None = None
    vector: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What one site saw in one run of its block.

    Attributes:
        input: a, with the factor γ of each token in it, (batch, length, d_in).
        residual: the residual stream after the site, (batch, length, d).
        scale: γ of the projection whose bias takes a vector, (batch or 1, length or 1, 1); None for ones.
    """

    input: Tensor
    residual: Tensor
    scale: Tensor | None = None


class _LeadLayer(DynamicLayer):
    """One layer of a stream's KV cache: hands out the lead's keys and values before the batch's own, keeps
    the latest keys and values it saw when asked to, and never grows."""

    def __init__(self, lead_length: int, storage: Storage | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lead_length = lead_length
        self.storage = storage
        self.lead: _LeadLayer | None = None
        self.latest: tuple[Kept, Kept] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.storage is not None:
            self.latest = (self.storage.put(key_states), self.storage.put(value_states))
        if self.lead is None:
            return key_states, value_states
        if self.lead.latest is None:
            raise RuntimeError("the lead stream must run through this block before the streams that follow it")
        keys, values = (x.get().expand(len(key_states), -1, -1, -1) for x in self.lead.latest)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.lead_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lead_length + query_length, 0


class Stream:
    """The residual stream of a batch of sequences at the entrance of one block.

    Args:
        model: the frozen causal LM.
        blocks: its blocks.
        tokens: the batch, without the lead.
        lead: stream of the tokens before the batch, batch size 1; it must be run through each block first.
        keep_kv: keep the keys and values of the block that ran last, for streams that follow this one.
        storage: where to keep them, the residual stream and the blocks' arguments between uses; on the device when left
            out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        tokens: TokenBatch,
        lead: Stream | None = None,
        keep_kv: bool = False,
        storage: Storage | None = None,
    ) -> None:
        self.tokens = tokens
        self._storage = storage or Storage()
        self.length = tokens.ids.shape[1]
        lead_length = lead.length if lead is not None else 0
        self._layers = [_LeadLayer(lead_length, self._storage if keep_kv else None) for _ in blocks]
        if lead is not None:
            for layer, ahead in zip(self._layers, lead._layers, strict=True):
                layer.lead = ahead
        with recorded_calls([block.module for block in blocks], blocks[0].like) as recording:
            decoder = find_decoder(model)
            cache = cache_arguments(decoder, Cache(layers=list(self._layers)))
            decoder(**forward_inputs(tokens, lead_length), **cache, use_cache=True)
        assert recording.entrance is not None
        self._calls = _kept_calls(recording.calls, self._storage)
        self.hidden = recording.entrance

    @property
    def hidden(self) -> Tensor:
        """(batch, length, d), the entrance of the next block; starts as the embeddings."""
        assert self._hidden is not None
        return self._hidden.get()

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self._hidden: Kept | None = self._storage.put(value)

    def forget_hidden(self) -> None:
        """Drop the residual stream, where another is about to take its place."""
        self._hidden = None

    def run(
        self,
        block: Block,
        read: Sequence[str],
        patches: Mapping[str, SitePatch] | None = None,
        stop_after: str | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor | None, dict[str, Reading]]:
        """Run one block on this stream, without advancing it.

        Args:
            block: the block whose entrance :attr:`hidden` is.
            read: sites to read.
            patches: changes of the block, by site.
            stop_after: leave the block as soon as this site was read.
            residual: the residual stream after attention, (batch, length, d), to go on from where it is known already
                and the block can (:meth:`Block.rest`).

        Returns:
            The block's output, or None when it was left early, and the readings by site.
        """
        hidden = self.hidden
        reader = _Reader(hidden)
        with ExitStack() as stack:
            for name, patch in (patches or {}).items():
                for layer, hook in _patch_hooks(block.sites[name], patch):
                    stack.callback(layer.register_forward_hook(hook).remove)
            for name in read:  # after the patches, so that the residual stream is read as they leave it
                for handle in reader.hooks(block.sites[name], stop=name == stop_after):
                    stack.callback(handle.remove)
            output: Tensor | None = None
            with suppress(StopForwardError):
                if residual is None:
                    call = self._calls[block.index].converted(Kept, lambda kept: kept.get())
                    output = unwrapped(call(block.module, hidden))
                else:
                    output = block.rest(residual)
        return output, reader.readings(output)

    def forget_kv(self, block: Block) -> None:
        """Drop the keys and values kept for a block that is finished."""
        self._layers[block.index].latest = None


def _kept_calls(calls: Sequence[Call], storage: Storage) -> list[Call]:
    """The calls with their tensors in the storage, each once however many blocks are given it."""
    kept: dict[int, Kept] = {}

    def keep(value: Tensor) -> Kept:
        if id(value) not in kept:
            kept[id(value)] = storage.put(value)
        return kept[id(value)]

    return [call.converted(Tensor, keep) for call in calls]


class _Reader:
    """Hooks that read what sites see while their block runs on a residual stream like ``hidden``."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self._sites: list[Site] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        self._scales: dict[nn.Module, Tensor] = {}
        self._residuals: dict[str, Tensor] = {}

    def hooks(self, site: Site, stop: bool) -> Iterator[RemovableHandle]:
        """Register the hooks of one site; ``stop`` leaves the block once all of it was read."""
        self._sites.append(site)
        if site.name == "mlp_in":
            assert site.point is not None

            def read_norm(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                self._inputs[module] = self._rows(output)
                self._residuals[site.name] = self._rows(hidden_of(args, kwargs))
                if stop:
                    raise StopForwardError

            yield site.point.register_forward_hook(read_norm, with_kwargs=True)
            return
        for projection in site.projections:
            yield from self._projection_hooks(site, projection)
        if site.point is not None:

            def read_stream(module: nn.Module, args: Any, kwargs: Any) -> None:
                residual = first_float(args, kwargs)
                assert residual is not None
                self._residuals[site.name] = self._rows(residual)
                if stop:
                    raise StopForwardError

            yield site.point.register_forward_pre_hook(read_stream, with_kwargs=True)

    def _projection_hooks(self, site: Site, projection: Projection) -> Iterator[RemovableHandle]:
        layer = projection.layer

        def read_input(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[layer] = self._rows(given[0])

        def read_norm(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            assert site.gain is not None
            y = given[0].to(site.gain)
            self._scales[layer] = self._rows(row_ratio(output.to(y), site.gain * y))

        def read_gate(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self._scales[layer] = self._rows(output.to(wider(output.dtype)).sigmoid())

        yield layer.register_forward_hook(read_input)
        if projection.norm is not None:
            yield projection.norm.register_forward_hook(read_norm)
        if projection.gate is not None:
            yield projection.gate.register_forward_hook(read_gate)

    def readings(self, output: Tensor | None) -> dict[str, Reading]:
        """What was read, once the block has run; ``output`` is None where it was left early."""
        found = {}
        for site in self._sites:
            residual = self._residuals.get(site.name, output if site.point is None else None)
            if residual is None:
                continue
            if site.name == "mlp_in":
                assert site.point is not None
                found[site.name] = Reading(self._inputs[site.point], residual)
                continue
            scales = [self._scale(projection) for projection in site.projections]
            inputs = [
                self._inputs[projection.layer] if scale is None else self._inputs[projection.layer] * scale
                for projection, scale in zip(site.projections, scales, strict=True)
            ]
            a = torch.cat(inputs, dim=-1) if len(inputs) > 1 else inputs[0]
            found[site.name] = Reading(a, residual, scales[-1])
        return found

    def _scale(self, projection: Projection) -> Tensor | None:
        """γ, (batch or 1, length or 1, 1), float32 or better; None for ones."""
        if projection.layer in self._scales:
            return self._scales[projection.layer] * projection.multiplier
        if projection.multiplier == 1:
            return None
        return torch.full((1, 1, 1), projection.multiplier, dtype=wider(self.hidden.dtype), device=self.hidden.device)

    def _rows(self, value: Tensor) -> Tensor:
        """As (batch, length, ·), also where a layer was given all rows of the batch as one list."""
        return value.reshape(*self.hidden.shape[:2], -1)


def _patch_hooks(site: Site, patch: SitePatch) -> Iterator[tuple[nn.Module, Any]]:
    """Forward hooks that make the site's layers put out what their patched weights and bias would."""

    def hook(change: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, given, output: output + change(given[0]).to(output.dtype)

    if patch.matrix is not None:
        for path, factors in site.factors(patch.matrix.A, patch.matrix.B).items():
            yield site.targets[path], hook(Factors(*factors))
    if patch.vector is not None:
        vector = patch.vector
        yield site.layer, hook(lambda x: vector)


def lead_cache(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache:
    """Run tokens through the model once and return their KV cache, batch size 1.

    The cache keeps every token also where a layer's window is sliding: the masks do the windowing.
    """
    cache, decoder = DynamicCache(), find_decoder(model)
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with gathered(model):
        decoder(input_ids=tokens, **cache_arguments(decoder, cache), use_cache=True)
    return cache
