"""The next inputs of a list of demonstrations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from lit_thought.inputs.kinds import Demonstration
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.prompts.template import PromptTemplate

__all__ = ["continue_list"]

DRAWN = 64
"""Inputs drawn at once."""
ROUNDS = 40
"""Most such draws."""
FEW = 3
"""A draw that brings fewer new inputs is a poor one; after as many poor ones the model has no more to say."""


def continue_list(
    pen: Pen, template: PromptTemplate, instruction: str, shown: Sequence[Demonstration], count: int, taken: Distinct
) -> Iterator[str]:
    """Inputs that the model writes next in the list, at temperature 1.

    Each draw goes on from another order of the demonstrations, the first from that of the instruction.

    Args:
        pen: the model.
        template: the prompt's form.
        instruction: the chunk, with its demonstrations.
        shown: these.
        count: how many inputs.
        taken: what is written already, the demonstrations' inputs among it.

    Yields:
        New inputs, ``count`` at most: fewer where the model repeats itself.
    """
    if count <= 0:
        return
    longest = 3 * max(len(one.input) for one in shown)
    tokens = 4 + 2 * max(len(pen.tokenizer(one.input)["input_ids"]) for one in shown)
    order, chance, poor = list(range(len(shown))), random.Random(pen.seed), 0
    for _ in range(ROUNDS):
        frame = template.frame(pen.tokenizer, _reordered(instruction, shown, order))
        prompt = pen.tokenizer(frame.instructed)["input_ids"]
        stop = frame.after.rstrip() or "\n"
        new = 0
        for one in pen.write([prompt] * DRAWN, tokens, stop=stop, sampling={}):
            text = one.text
            if one.finished and text and len(text) <= longest and "\n" not in text and taken.new(text):
                new += 1
                yield text
                count -= 1
                if not count:
                    return
        poor += new < FEW
        if poor == FEW:
            return
        chance.shuffle(order)


def _reordered(instruction: str, shown: Sequence[Demonstration], order: Sequence[int]) -> str:
    """The instruction with its demonstrations in another order, and all else in its place."""
    parts, at = [], 0
    for one, which in zip(shown, order, strict=True):
        start, stop = shown[which].span
        parts += [instruction[at : one.span[0]], instruction[start:stop]]
        at = one.span[1]
    return "".join(parts) + instruction[at:]
