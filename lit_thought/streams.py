"""Residual streams that are kept and advanced block by block, and what the sites see on the way.

A :class:`Stream` is a padded batch of token sequences at the entrance of some block. It remembers the
arguments (masks, rotary tables, …) with which the model called each of its blocks, so that any one block can
be run again on its own: ``Stream.run(block, ...)``. Tokens that all sequences of a batch start with (the chunk
above all) are a stream of their own, the *lead*, run once; the others read its keys and values.

Nothing is left on the user's model: hooks and replaced methods live inside context managers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_thought.blocks import Block, Site, find_decoder

__all__ = ["LowRank", "Reading", "SitePatch", "Stream", "TokenBatch", "forward_inputs"]


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids, (batch, length), and the mask of real tokens, (batch, length) bool."""

    ids: Tensor
    mask: Tensor

    def to(self, *args: Any, **kwargs: Any) -> TokenBatch:
        """Move both tensors, as ``Tensor.to``."""
        return TokenBatch(self.ids.to(*args, **kwargs), self.mask.to(*args, **kwargs))

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own sequence, whatever the padding side, (batch, length)."""
        return (self.mask.long().cumsum(1) - 1).clamp_min(0)


@dataclass(frozen=True)
class LowRank:
    """Adds ``B (A x)`` to a linear layer's output, in float32 or better, as a LoRA adapter does.

    A: (r, d_in), B: (d_out, r).
    """

    A: Tensor
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.A.dtype) @ self.A.T @ self.B.T


@dataclass(frozen=True)
class SitePatch:
    """What a thought patch changes at one site: a matrix Δ = B A, applied as :meth:`Site.factors` says, and a
    vector, (d_out,), added to the output of the site's projection. Float32 or better."""

    matrix: LowRank | None = None
    vector: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What one site saw in one run of its block.

    Attributes:
        input: a, (batch, length, d_in).
        residual: the residual stream, (batch, length, d): after attention at attn_out and mlp_in, and at mlp_out the
            block's output.
    """

    input: Tensor
    residual: Tensor


class _LeadLayer(DynamicLayer):
    """One layer of a stream's KV cache: hands out the lead's keys and values before the batch's own, keeps
    the latest keys and values it saw when asked to, and never grows."""

    def __init__(self, lead_length: int, keep: bool) -> None:
        super().__init__()
        self.lead_length = lead_length
        self.keep = keep
        self.lead: _LeadLayer | None = None
        self.latest: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.latest = (key_states, value_states)
        if self.lead is None:
            return key_states, value_states
        if self.lead.latest is None:
            raise RuntimeError("the lead stream must run through this block before the streams that follow it")
        keys, values = (x.expand(len(key_states), -1, -1, -1) for x in self.lead.latest)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.lead_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lead_length + query_length, 0


class _StopForwardError(Exception):
    """Raised inside a block once everything that was asked for has been read."""


def forward_inputs(tokens: TokenBatch, lead_length: int) -> dict[str, Tensor]:
    """``input_ids``, ``position_ids`` and ``attention_mask`` of a batch that follows a cached lead."""
    ahead = tokens.mask.new_ones(len(tokens.mask), lead_length)
    return {
        "input_ids": tokens.ids,
        "position_ids": tokens.positions + lead_length,
        "attention_mask": torch.cat([ahead, tokens.mask], dim=1).long(),
    }


@contextmanager
def _recorded_calls(blocks: Sequence[Block], calls: list[tuple[tuple, dict]]) -> Iterator[None]:
    """While inside, blocks pass their input through untouched and append their other arguments to ``calls``."""

    def pass_through(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            had = block.module.__dict__.get("forward")
            block.module.forward = pass_through

            def restore(module: nn.Module = block.module, had: Any = had) -> None:
                if had is None:
                    del module.forward
                else:
                    module.forward = had

            stack.callback(restore)
        yield


class Stream:
    """The residual stream of a batch of sequences at the entrance of one block.

    Args:
        model: the frozen causal LM.
        blocks: its blocks.
        tokens: the batch, without the lead.
        lead: stream of the tokens before the batch, batch size 1; it must be run through each block first.
        keep_kv: keep the keys and values of the block that ran last, for streams that follow this one.

    Attributes:
        hidden: (batch, length, d), the entrance of the next block; starts as the embeddings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        tokens: TokenBatch,
        lead: Stream | None = None,
        keep_kv: bool = False,
    ) -> None:
        self.tokens = tokens
        self.length = tokens.ids.shape[1]
        lead_length = lead.length if lead is not None else 0
        self._layers = [_LeadLayer(lead_length, keep_kv) for _ in blocks]
        if lead is not None:
            for layer, ahead in zip(self._layers, lead._layers, strict=True):
                layer.lead = ahead
        self._calls: list[tuple[tuple, dict]] = []
        # The entrance of block 0 is the embedding; reading it from the recorded call, not from the decoder's
        # output, leaves out the final norm.
        entrances: list[Tensor] = []
        handle = blocks[0].module.register_forward_pre_hook(
            lambda module, args, kwargs: entrances.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        try:
            with _recorded_calls(blocks, self._calls):
                find_decoder(model)(
                    **forward_inputs(tokens, lead_length),
                    past_key_values=Cache(layers=list(self._layers)),
                    use_cache=True,
                )
        finally:
            handle.remove()
        self.hidden = entrances[0]

    def run(
        self,
        block: Block,
        read: Sequence[str],
        patches: Mapping[str, SitePatch] | None = None,
        stop_after: str | None = None,
    ) -> tuple[Tensor | None, dict[str, Reading]]:
        """Run one block on this stream, without advancing it.

        Args:
            block: the block whose entrance :attr:`hidden` is.
            read: sites to read.
            patches: changes of the block, by site.
            stop_after: leave the block as soon as this site was read.

        Returns:
            The block's output, or None when it was left early, and the readings by site.
        """
        args, kwargs = self._calls[block.index]
        hidden = self.hidden
        inputs: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}

        def read_attention(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs["attn_out"], residuals["attn_out"] = given[0], hidden + output
            if stop_after == "attn_out":
                raise _StopForwardError

        def read_norm(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs["mlp_in"], residuals["mlp_in"] = output, given[0]
            if stop_after == "mlp_in":
                raise _StopForwardError

        def read_down(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs["mlp_out"] = given[0]

        readers = {
            "attn_out": (block.sites["attn_out"].layer, read_attention),
            "mlp_in": (block.mlp_norm, read_norm),
            "mlp_out": (block.sites["mlp_out"].layer, read_down),
        }
        with ExitStack() as stack:
            for name, patch in (patches or {}).items():
                for layer, hook in _patch_hooks(block.sites[name], patch):
                    stack.callback(layer.register_forward_hook(hook).remove)
            for name in read:  # after the patches, so that the residual stream is read as they leave it
                layer, reader = readers[name]
                stack.callback(layer.register_forward_hook(reader).remove)
            try:
                output = block.module(hidden, *args, **kwargs)
            except _StopForwardError:
                output = None
        if isinstance(output, tuple):
            output = output[0]
        if output is not None and "mlp_out" in inputs:
            residuals["mlp_out"] = output
        return output, {name: Reading(inputs[name], residuals[name]) for name in inputs}

    def forget_kv(self, block: Block) -> None:
        """Drop the keys and values kept for a block that is finished."""
        self._layers[block.index].latest = None


def _patch_hooks(site: Site, patch: SitePatch) -> Iterator[tuple[nn.Module, Any]]:
    """Forward hooks that make the site's layers put out what their patched weights and bias would."""

    def hook(change: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, given, output: output + change(given[0]).to(output.dtype)

    if patch.matrix is not None:
        for path, factors in site.factors(patch.matrix.A, patch.matrix.B).items():
            yield site.targets[path], hook(LowRank(*factors))
    if patch.vector is not None:
        vector = patch.vector
        yield site.layer, hook(lambda x: vector)


def lead_cache(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache:
    """Run tokens through the model once and return their KV cache, batch size 1.

    The cache keeps every token also where a layer's window is sliding: the masks do the windowing.
    """
    cache = DynamicCache()
    device = next(model.parameters()).device
    find_decoder(model)(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True)
    return cache
