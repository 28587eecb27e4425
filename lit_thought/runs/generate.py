"""Batched generation that runs what all prompts share (the chunk above all) once."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lit_thought.errors import ThoughtError, did_you_mean, is_out_of_memory
from lit_thought.model.calls import cache_arguments, head_reads
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.batches import PAD, common_prefix, pad
from lit_thought.prompts.chat import special_tokens
from lit_thought.runs.room import with_room
from lit_thought.runs.streams import lead_cache

__all__ = ["Generation", "check_options", "generate"]

_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
"""What shapes the distribution that is sampled from, in transformers' order."""
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
"""Values of these that leave it as it is."""
_READING = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias")
"""Options that look at a prompt's tokens, and would take padding for some of them."""
_NEVER = ("suppress_tokens", "begin_suppress_tokens")
"""Tokens that are not to be written, a model's own as its end tokens are."""
_OTHERS = ("eos_token_id", "min_new_tokens", *_NEVER, "logits_processor")
_SUPPORTED = ("do_sample", *_WARPERS, *_READING, *_OTHERS)
_NEAR = 4
"""Times ``top_k`` tokens among which all are that are as likely as the last of these, in logits of any dtype."""
STRETCH = 8
"""Tokens after which the prompts that have come to an end leave a batch."""
_WIDER, _CACHED, _READ = 4, 2**30, 2**12
"""How many times ``batch_size`` prompts are continued at once at most: a step runs one token of each, which leaves a
processor idle where a pass over as many whole prompts does not. While the batch's keys and values take no more than so
many bytes, and the tokens that its prompts do not share are no more than so many."""
_INSTEAD = {
    "max_new_tokens": "Set max_new_tokens, which is a setting of its own.",
    "max_length": "Set max_new_tokens, which is a setting of its own.",
    "stop_strings": "A template says where its outputs stop (stop).",
    "seed": "Set seed, which is a setting of its own.",
}


@dataclass(frozen=True)
class Generation:
    """What the model wrote: the text up to the stop string, stripped; whether it came to an end by itself (at the stop
    string or an end-of-sequence token) rather than at ``max_new_tokens``; and the tokens, those that end it included.
    """

    text: str
    finished: bool
    tokens: tuple[int, ...] = ()


class _Reader:
    """What new tokens say up to ``stop``, which must follow some non-blank text, and whether it was there. Special
    tokens are looked at where ``stop`` has one, and left out of the text unless they are to be kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | None, keep_special: bool) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        special = sorted(special_tokens(tokenizer), key=len, reverse=True) if stop else []
        self.keep = keep_special or any(token in (stop or "") for token in special)
        self.dropped = special if self.keep and not keep_special else []

    def __call__(self, tokens: list[int]) -> tuple[str, bool]:
        text, stopped = _cut(str(self.tokenizer.decode(tokens, skip_special_tokens=not self.keep)), self.stop)
        for token in self.dropped:
            text = text.replace(token, "")
        return text, stopped


class _StopAtText(StoppingCriteria):
    """Stops each row once its new tokens say ``stop``."""

    def __init__(self, read: _Reader, prompt_length: int) -> None:
        self.read, self.prompt_length = read, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = [self.read(new)[1] for new in input_ids[:, self.prompt_length :].tolist()]
        return torch.tensor(stopped, device=input_ids.device)


class _Report(StoppingCriteria):
    """Stops nothing, and says after each token how many whole prompts the steps so far amount to, the most that a
    prompt may take being all of its own."""

    def __init__(self, progress: Callable[[int], None], done: int, prompt_length: int, max_new_tokens: int) -> None:
        self.progress, self.done = progress, done
        self.prompt_length, self.max_new_tokens = prompt_length, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows, length = input_ids.shape
        self.progress(self.done + rows * (length - self.prompt_length) // self.max_new_tokens)
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)


def _cut(text: str, stop: str | None) -> tuple[str, bool]:
    """The text before ``stop``, which must follow something non-blank, and whether it was there."""
    blank = len(text) - len(text.lstrip())
    at = text.find(stop, blank) if stop else -1
    return (text, False) if at < 0 or blank == len(text) else (text[:at], True)


class _Sampler(LogitsProcessor):
    """Leaves each row one token, drawn from its distribution with the row's own generator.

    A row's draws so depend on its prompt, its seed and nothing else: not on the batch, its order or the device. Where
    ``top_k`` is among the warpers, only :data:`_NEAR` times as many tokens are looked at, as sums over all of a large
    vocabulary take about as long as the model's step.
    """

    def __init__(self, warpers: LogitsProcessorList, seeds: Sequence[int]) -> None:
        self.warpers = warpers
        self.near = sum(_NEAR * one.top_k for one in warpers if isinstance(one, TopKLogitsWarper))
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        near, places = scores, None
        if 0 < self.near < scores.shape[1]:
            places = scores.topk(self.near).indices.sort().values  # in the vocabulary's order, as draws go by sums
            near = scores.gather(1, places)
        each = self.warpers(cast(Any, input_ids), cast(Any, near)).double().softmax(-1)
        exact = torch.are_deterministic_algorithms_enabled()  # CUDA's sums over a vector are none of these
        total = (each.cpu() if exact else each).cumsum(-1).to(scores.device)
        drawn = [torch.rand((), generator=own, dtype=torch.float64, device="cpu") for own in self.generators]
        place = torch.stack(drawn).to(total).unsqueeze(1) * total[:, -1:]
        token = torch.searchsorted(total, place, right=True).clamp_max(total.shape[1] - 1)
        token = token if places is None else places.gather(1, token)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def check_options(options: Mapping[str, Any] | None) -> None:
    """Check the names of options for :func:`generate`, and that none of them would be without effect.

    Raises:
        ThoughtError: naming the option, and what there is in its place.
    """
    given = options or {}
    for name in given:
        if name not in _SUPPORTED:
            meant = did_you_mean(str(name), _SUPPORTED)
            names = ", ".join(n for n in _SUPPORTED if n != "logits_processor")
            raise ThoughtError(
                f"generate: {name!r} is not supported.{meant} {_INSTEAD.get(name, f'Options are {names}.')}"
            )
    if not isinstance(given.get("do_sample", False), bool):
        raise ThoughtError(f"generate: do_sample must be true or false; got {given['do_sample']!r}.")
    shaping = [name for name in given if name in _WARPERS]
    if shaping and not given.get("do_sample"):
        raise ThoughtError(
            f"generate: {shaping[0]!r} has no effect on greedy outputs. Add do_sample, which samples, or leave it out."
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop: str | None = None,
    ends: Sequence[int] = (),
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int | Sequence[int] = 0,
    progress: Callable[[int], None] | None = None,
    options: Mapping[str, Any] | None = None,
    keep_special: bool = False,
) -> list[Generation]:
    """Continue token prompts, greedily unless ``options`` say otherwise.

    The tokens that all prompts begin with are run once; each batch continues from a copy of their KV cache, and prompts
    that have come to an end leave it every :data:`STRETCH` tokens. Where the model is sharded, all processes must
    continue the same prompts together.

    What is written depends on the model's weights, the tokens at which it ends or which it must not write, and the
    arguments here; nothing else counts of its ``generation_config``, which a checkpoint or the caller may have set to
    anything. It is the same in batches of any size, up to near ties in the logits.

    Args:
        model: a causal LM; its training mode and generation config are not changed.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        stop: a text that ends a generation, besides the model's end-of-sequence tokens; special tokens may be in it.
        ends: tokens that do, too, unless ``options`` say which these are.
        max_new_tokens: most tokens to write for each prompt.
        batch_size: prompts a batch; up to four times as many where they share a beginning and are short, since a step
            runs one token of each.
        seed: seed of the sampling, where ``options`` switch it on; equal prompts are sampled independently. Or one for
            each prompt, with which equal prompts and seeds are sampled alike. The global generators are not used.
        progress: called after each token with the number of prompts done, counting a batch in hand by its tokens.
        options: by transformers' names: do_sample, with temperature, top_k, top_p, min_p and typical_p (none unless
            given); eos_token_id, in the place of the model's; min_new_tokens, suppress_tokens, begin_suppress_tokens;
            repetition_penalty, no_repeat_ngram_size, bad_words_ids and sequence_bias, with which only prompts of one
            length share a batch, as these would read padding.
        keep_special: keep special tokens in the text, except for those that end it: the channels of gpt-oss, the
            thoughts of other families.

    Returns:
        One :class:`Generation` for each prompt, in order.

    Raises:
        ThoughtError: when there is no prompt, one has no tokens, or an option is not one of these or has a wrong value.
    """
    if not prompts:
        raise ThoughtError("prompts is empty; expected at least one.")
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ThoughtError(f"prompts[{empty[0]}] is empty; expected one token at least, which a model goes on from.")
    given = dict(options or {})
    check_options(given)
    device = next(model.parameters()).device
    by_place = _counts_places(model)
    shared = 0 if by_place else common_prefix(prompts)
    lead = lead_cache(model, prompts[0][:shared]) if shared else None
    own = given.pop("logits_processor", [])
    sampled = given.pop("do_sample", False)
    shaping = {name: given.pop(name) for name in _WARPERS if name in given}
    seeds = _seeds(prompts, seed) if sampled else []
    same_length = by_place or _has_window(model, max(map(len, prompts)) + max_new_tokens)
    rows = _rows(prompts, shared, lead, max_new_tokens, batch_size)
    batches = _batches(prompts, rows, same_length or any(name in given for name in _READING))
    results: dict[int, Generation] = {}
    reader = _Reader(tokenizer, stop, keep_special)
    with _explained(options):
        own_ends = {*_end_tokens(model, tokenizer), *ends}
        last = _as_set(given["eos_token_id"]) if "eos_token_id" in given else own_ends
        never = {name: getattr(model.generation_config, name, None) for name in _NEVER}
        meant = {"do_sample": False, "pad_token_id": PAD, **never, **given, "eos_token_id": sorted(last) or None}
        acting = [name for name, value in shaping.items() if value is not None and value != _NEUTRAL.get(name)]
        warpers = LogitsProcessorList([_WARPERS[name](shaping[name]) for name in acting])
    for members in batches:
        rest = pad([prompts[i][shared:] for i in members], PAD, "left").to(device)
        ahead = torch.tensor([list(prompts[0][:shared])], dtype=torch.long, device=device)
        ids = torch.cat([ahead.expand(len(members), -1), rest.ids], dim=1)
        mask = torch.cat([torch.ones_like(ids[:, :shared]), rest.mask.long()], dim=1)
        start, written = ids.shape[1], 0
        sampler = _Sampler(warpers, [seeds[i] for i in members]) if sampled else None
        arguments: dict[str, Any] = {"synced_gpus": is_sharded(model)}
        if processors := [*own, *([sampler] if sampler is not None else [])]:
            arguments["logits_processor"] = LogitsProcessorList(processors)
        cache = None
        if lead is not None:
            cache = with_room(lead, len(members), rest.ids.shape[1] + max_new_tokens)
            arguments |= cache_arguments(model, cache)
        while members:
            length = max_new_tokens - written if cache is None else min(STRETCH, max_new_tokens - written)
            criteria: list[StoppingCriteria] = [_StopAtText(reader, start)] if stop else []
            if progress is not None:
                criteria.append(_Report(progress, len(results), start, max_new_tokens))
            if criteria:
                arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
            with _explained(options):
                config = GenerationConfig(**_stretch(meant, written, length))
                with _configured(model, config), head_reads(model, _without_gaps):
                    output = cast(Any, model).generate(
                        input_ids=ids, attention_mask=mask, generation_config=config, **arguments
                    )
            written += length
            read = [_read(new, last, reader) for new in output[:, start:].tolist()]
            results |= {
                i: one for i, one in zip(members, read, strict=True) if one.finished or written == max_new_tokens
            }
            going = [row for row, i in enumerate(members) if i not in results]
            members = [members[row] for row in going]
            if cache is None or not members:
                break
            mask = torch.cat([mask, torch.ones_like(output[:, ids.shape[1] :])], dim=1)[going]
            ids = output[going]
            if len(going) < len(read):
                cache.batch_select_indices(torch.tensor(going, device=device))
                if sampler is not None:
                    sampler.keep(going)
        if progress is not None:
            progress(len(results))
    return [results[i] for i in range(len(prompts))]


def _stretch(options: Mapping[str, Any], written: int, length: int) -> dict[str, Any]:
    """Options for ``length`` tokens after as many that are written."""
    least = min((options.get("min_new_tokens") or 0) - written, length)
    there = {**options, "max_new_tokens": length, "min_new_tokens": least if least > 0 else None}
    return {**there, "begin_suppress_tokens": None} if written else there


def _read(new: list[int], ends: set[int], read: _Reader) -> Generation:
    """What a row's new tokens say up to its end, after which comes padding."""
    ended = next((k for k, token in enumerate(new) if token in ends), None)
    text, stopped = read(new[:ended])
    count = len(new) if ended is None else ended + 1
    if stopped:
        count = next(k for k in range(1, count + 1) if read(new[:k])[1])
    return Generation(text.strip(), stopped or ended is not None, tuple(new[:count]))


def _seeds(prompts: Sequence[Sequence[int]], seed: int | Sequence[int]) -> list[int]:
    """A seed for each prompt: of its tokens, and of how often they came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    for own, prompt in zip(seeds, map(tuple, prompts), strict=True):
        digest = hashlib.sha256(f"{own} {seen[prompt]} {prompt}".encode()).digest()
        found.append(int.from_bytes(digest[:8], "little") >> 1)
        seen[prompt] += isinstance(seed, int)
    return found


@contextmanager
def _configured(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside, the model's generation config is this one, from which ``generate`` fills up one that it is given."""
    had = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = had


def _without_gaps(x: Tensor) -> Tensor:
    """Tokens side by side, as the output embedding is to have them.

    A first step gives it the last token of each prompt, a slice with gaps. Where no gradients are asked for, PyTorch
    multiplies such a slice by a copy of the weights for each prompt: in bfloat16 on a CPU, the most of its time.
    """
    return x.clone(memory_format=torch.contiguous_format)


@contextmanager
def _explained(options: Mapping[str, Any] | None) -> Iterator[None]:
    """What transformers says of a wrong value, with the options that it is about."""
    try:
        yield
    except ThoughtError:
        raise
    except Exception as error:
        given = {name: value for name, value in (options or {}).items() if name != "logits_processor"}
        if not given or is_out_of_memory(error):
            raise
        raise ThoughtError(
            f"generate: model.generate refused {given!r:.200} ({type(error).__name__}: {error}). Expected values as "
            "transformers' GenerationConfig describes them."
        ) from error


def _counts_places(model: PreTrainedModel) -> bool:
    """Whether attention counts distance in places of the batch, padding and all, from its first one (MPT)."""
    return bool(getattr(getattr(model.config.get_text_config(), "attn_config", None), "alibi", False))


def _has_window(model: PreTrainedModel, length: int) -> bool:
    """Whether padding between a shared beginning and the rest takes up places in a window or chunk of attention."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return any(isinstance(window, int) and length > window for window in windows)


def _rows(prompts: Sequence[Sequence[int]], shared: int, lead: DynamicCache | None, new: int, batch_size: int) -> int:
    """Prompts to continue at once, with the cache of the ``shared`` tokens that they begin with and ``new`` ones to
    write."""
    if lead is None:
        return batch_size
    longest = max(map(len, prompts))
    token = sum(x.nbytes for layer in lead.layers for x in vars(layer).values() if isinstance(x, Tensor)) / shared
    most = min(_CACHED / (token * (longest + new)), _READ / max(longest - shared, 1))
    return int(max(batch_size, min(_WIDER * batch_size, most)))


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, same_length: bool) -> list[list[int]]:
    """Indices of the prompts by length, in batches of about one size; of one length each where padding would count."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = groupby(order, key=lambda i: len(prompts[i]) if same_length else 0)
    batches = []
    for members in (list(group) for _, group in groups):
        count = math.ceil(len(members) / batch_size)
        size = math.ceil(len(members) / count)
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which ``model.generate`` ends a sequence, and the tokenizer's own."""
    config = model.generation_config if model.generation_config is not None else model.config.get_text_config()
    return {*_as_set(getattr(config, "eos_token_id", None)), *_as_set(tokenizer.eos_token_id)}


def _as_set(tokens: Any) -> set[int]:
    """One token, several or none."""
    if tokens is None:
        return set()
    return set(map(int, tokens)) if isinstance(tokens, (list, tuple)) else {int(tokens)}
