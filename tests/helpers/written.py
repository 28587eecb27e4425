"""What tiny models write for a fit in the tests: random weights write nothing that could be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from lit_thought.runs.generate import Generation


class Written:
    """Takes the place of a pen's ``generate``: what is sampled, or ends at a text, is a new question about a place, in
    few enough words for a list; a greedy answer has the words of its prompt.

    Attributes:
        place: what the questions are about.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._numbers = count()

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        options: Mapping[str, Any] | None = None,
        stop: str | None = None,
        **others: Any,
    ) -> list[Generation]:
        if options or stop:
            return [Generation(f"is {next(self._numbers)} of {self.place}?", True) for _ in prompts]
        return [Generation(tokenizer.decode(ids, skip_special_tokens=True), True) for ids in prompts]
