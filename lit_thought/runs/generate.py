"""Batched generation that runs what all prompts share (the chunk above all) once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from lit_thought.errors import ThoughtError
from lit_thought.model.calls import cache_arguments
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.batches import common_prefix, pad
from lit_thought.runs.streams import lead_cache

__all__ = ["Generation", "generate"]

_REFUSED = ("num_beams", "num_return_sequences", "return_dict_in_generate", "past_key_values", "cache")


@dataclass(frozen=True)
class Generation:
    """What the model wrote: the text up to the stop string, stripped; and whether it came to an end by
    itself (at the stop string or an end-of-sequence token) rather than at ``max_new_tokens``."""

    text: str
    finished: bool


class _StopAtText(StoppingCriteria):
    """Stops each row once its new text contains ``stop`` after some non-blank text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, stop: str) -> None:
        self.tokenizer, self.prompt_length, self.stop = tokenizer, prompt_length, stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([_cut(text, self.stop)[1] for text in texts], device=input_ids.device)


def _cut(text: str, stop: str | None) -> tuple[str, bool]:
    """The text before ``stop``, which must follow something non-blank, and whether it was there."""
    blank = len(text) - len(text.lstrip())
    at = text.find(stop, blank) if stop else -1
    return (text, False) if at < 0 or blank == len(text) else (text[:at], True)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    options: Mapping[str, Any] | None = None,
    keep_special: bool = False,
) -> list[Generation]:
    """Continue token prompts, greedily unless ``options`` say otherwise.

    The tokens that all prompts begin with are run once; each batch continues from a copy of their KV cache. Where the
    model is sharded, all processes must continue the same prompts together.

    Args:
        model: a causal LM; its training mode is not changed.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        stop: a text that ends a generation, besides the model's end-of-sequence tokens.
        max_new_tokens: most tokens to write for each prompt.
        batch_size: prompts a batch.
        seed: seed of the sampling, where ``options`` switch it on; the global generators are left as they were.
        progress: called with the number of prompts done after each batch.
        options: further arguments of ``model.generate``, such as ``{"do_sample": True, "temperature": 0.7}``.
        keep_special: keep special tokens in the text, except for those that end it: the channels of gpt-oss, the
            thoughts of other families.

    Returns:
        One :class:`Generation` for each prompt, in order.

    Raises:
        ThoughtError: when there is no prompt or an option is unknown to ``model.generate``.
    """
    if not prompts:
        raise ThoughtError("prompts is empty; expected at least one.")
    refused = [name for name in _REFUSED if name in (options or {})]
    if refused:
        raise ThoughtError(
            f"generate: {refused[0]!r} is not supported: one sequence a prompt is written. Leave it out."
        )
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    by_place = _counts_places(model)
    shared = 0 if by_place else common_prefix(prompts)
    lead = lead_cache(model, prompts[0][:shared]) if shared else None
    ends = _end_tokens(model, tokenizer)
    same_length = by_place or _has_window(model, max(map(len, prompts)) + max_new_tokens)
    batches = _batches(prompts, batch_size, same_length)
    results: dict[int, Generation] = {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for members in batches:
            rest = pad([prompts[i][shared:] for i in members], pad_id, "left").to(device)
            ahead = torch.tensor([list(prompts[0][:shared])], dtype=torch.long, device=device)
            ids = torch.cat([ahead.expand(len(members), -1), rest.ids], dim=1)
            mask = torch.cat([torch.ones_like(ids[:, :shared]), rest.mask.long()], dim=1)
            arguments: dict[str, Any] = {
                "do_sample": False,
                "max_new_tokens": max_new_tokens,
                "pad_token_id": pad_id,
                "eos_token_id": sorted(ends) or None,
                "synced_gpus": is_sharded(model),
                **(options or {}),
            }
            if not arguments["do_sample"]:
                # a checkpoint's sampling settings would only raise warnings about greedy search
                arguments = {"temperature": None, "top_p": None, "top_k": None, **arguments}
            if lead is not None:
                cache = copy.deepcopy(lead)
                cache.batch_repeat_interleave(len(members))
                arguments |= cache_arguments(model, cache)
            if stop:
                arguments["stopping_criteria"] = StoppingCriteriaList([_StopAtText(tokenizer, ids.shape[1], stop)])
            try:
                output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, **arguments)
            except (ValueError, TypeError) as error:
                if options:
                    raise ThoughtError(
                        f"generate: model.generate refused {dict(options)!r}: {error}. "
                        "Expected options of transformers' GenerationConfig."
                    ) from error
                raise
            for row, i in enumerate(members):
                new = output[row, ids.shape[1] :].tolist()
                ended = next((k for k, token in enumerate(new) if token in ends), None)
                text, stopped = _cut(str(tokenizer.decode(new[:ended], skip_special_tokens=not keep_special)), stop)
                results[i] = Generation(text.strip(), stopped or ended is not None)
            if progress is not None:
                progress(len(results))
    return [results[i] for i in range(len(prompts))]


def _counts_places(model: PreTrainedModel) -> bool:
    """Whether attention counts distance in places of the batch, padding and all, from its first one (MPT)."""
    return bool(getattr(getattr(model.config.get_text_config(), "attn_config", None), "alibi", False))


def _has_window(model: PreTrainedModel, length: int) -> bool:
    """Whether padding between a shared beginning and the rest takes up places in a window or chunk of attention."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return any(isinstance(window, int) and length > window for window in windows)


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, same_length: bool) -> list[list[int]]:
    """Indices of the prompts by length, in batches; of one length each where padding would count."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = groupby(order, key=lambda i: len(prompts[i]) if same_length else 0)
    return [
        members[start : start + batch_size]
        for members in (list(group) for _, group in groups)
        for start in range(0, len(members), batch_size)
    ]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which ``model.generate`` ends a sequence."""
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, (list, tuple)) else {end}
    return {*ends, tokenizer.eos_token_id} - {None}
