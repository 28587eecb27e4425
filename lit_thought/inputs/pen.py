"""Sampled text, shared out over the processes of a fit; what is kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.inputs.words import normalised
from lit_thought.model.loading import context_window
from lit_thought.model.sharding import is_sharded
from lit_thought.runs.generate import Generation, generate
from lit_thought.statistics.distributed import gather_json, share

__all__ = ["Distinct", "Pen"]


class Distinct:
    """Texts, each once however it is punctuated."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._seen = {normalised(text) for text in taken}

    def new(self, text: str) -> bool:
        """Whether this is the first such text."""
        key = normalised(text)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


@dataclass
class Pen:
    """A model that writes: the same texts for a seed, in batches of any size, on any number of processes.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        seed: seed of everything that is sampled.
        batch_size: prompts a batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    batch_size: int = 32
    _draws: int = field(default=0, init=False)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        longest: int,
        *,
        stop: str | None = None,
        ends: Sequence[int] = (),
        sampling: dict[str, Any] | None = None,
    ) -> list[Generation]:
        """One continuation of each prompt, as far as the context window goes; empty for a prompt that fills it. Where
        several come too near to its end, the one with the least room says how far.

        Args:
            prompts: token ids.
            longest: most tokens of a continuation.
            stop: a text that ends one.
            ends: tokens that do, besides the model's own.
            sampling: options of :func:`~lit_thought.runs.generate.generate`; greedy when left out.
        """
        if not prompts:
            return []
        limit = context_window(self.model)
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < limit]
        own = fitting if is_sharded(self.model) else share(fitting)
        options: dict[str, Any] = {"do_sample": True, **sampling} if sampling is not None else {}
        self._draws += 1
        near = [i for i in fitting if len(prompts[i]) + longest > limit]
        least = limit - max((len(prompts[i]) for i in near), default=0)
        found = []
        for some, most in (([i for i in own if i not in near], longest), ([i for i in own if i in near], least)):
            if not some:
                continue
            drawn = generate(
                self.model,
                self.tokenizer,
                [prompts[i] for i in some],
                stop=stop,
                ends=ends,
                max_new_tokens=most,
                batch_size=self.batch_size,
                seed=[(self.seed * 1_000 + self._draws) * 100_000 + i for i in some],
                options=options,
            )
            found += [[i, one.text, one.finished] for i, one in zip(some, drawn, strict=True)]
        every = {i: Generation(text, end) for part in gather_json(found, self.model.device) for i, text, end in part}
        return [every.get(i, Generation("", False)) for i in range(len(prompts))]
