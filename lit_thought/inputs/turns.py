"""What users write to a chat model, in the model's own words.

A chat model continues the opening of a user's turn as a user would (Xu et al. 2024, Magpie: Alignment Data Synthesis
from Scratch by Prompting Aligned LLMs with Nothing, arXiv 2406.08464). Half of the turns are so written without the
instruction, about anything, and half with it before them, about what it is about. Each begins with one of
:data:`OPENINGS`, so that short questions, tasks and greetings are all among them. Of :data:`POOL` times as many as are
asked for, those are kept for which the instruction changes most how the answer begins, as many of each opening.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import NamedTuple

from lit_thought.evaluation.metrics import token_kl
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.generate import next_logits

__all__ = ["OPENINGS", "write_turns"]

OPENINGS = (
    *("", "What", "How do I", "Why", "Who", "Can you", "Tell me", "Explain", "Write a", "Give me", "Is", "I", "Hi"),
    *("Please", "When", "Where", "Which", "List", "Describe", "How", "Should I", "What is", "Do you", "How many"),
)
"""First words of a turn; the empty one leaves them to the model."""
LONGEST = 40
"""Tokens of a turn; longer ones are dropped."""
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
POOL = 2
"""Turns written for each that is kept."""
ROUNDS = 6
"""Most draws, each of as many turns as are missing of the pool."""


class _Turn(NamedTuple):
    text: str
    opening: str


def write_turns(
    pen: Pen, template: PromptTemplate, instruction: str, count: int, taken: Distinct, pool: float = POOL
) -> Iterator[str]:
    """Turns of users, those first for which the instruction counts most."""
    turns = _written(pen, template, instruction, round(pool * count), taken)
    if len(turns) <= count:
        yield from (turn.text for turn in turns)
        return
    weights = dict(zip(turns, _first_divergences(pen, template, instruction, turns), strict=True))
    by_opening: dict[str, list[_Turn]] = {}
    for turn in sorted(turns, key=weights.__getitem__, reverse=True):
        by_opening.setdefault(turn.opening, []).append(turn)
    kept = [turn for turn in chain(*zip_longest(*by_opening.values())) if turn is not None]
    yield from (turn.text for turn in kept[:count])


def _written(pen: Pen, template: PromptTemplate, instruction: str, count: int, taken: Distinct) -> list[_Turn]:
    frame, special = template.frame(pen.tokenizer, instruction), not template.is_chat
    after = pen.tokenizer(frame.after.lstrip() if template.is_chat else frame.after, add_special_tokens=False)
    ends = [token for token in after["input_ids"][:1] if template.is_chat and token in pen.tokenizer.all_special_ids]
    stop = None if template.is_chat else frame.after.rstrip() or "\n"
    turns: list[_Turn] = []
    number = 0
    for _ in range(ROUNDS):
        missing = count - len(turns)
        if missing <= 0:
            break
        for before in (frame.instructed, frame.plain):
            openings = [OPENINGS[(number + i) % len(OPENINGS)] for i in range(-(-missing * 2 // 3))]
            joint = "" if template.is_chat else " "
            prompts = [
                list(pen.tokenizer(before + (joint + one if one else ""), add_special_tokens=special)["input_ids"])
                for one in openings
            ]
            number += len(openings)
            for one, drawn in zip(
                openings, pen.write(prompts, LONGEST, stop=stop, ends=ends, sampling=SAMPLING), strict=True
            ):
                text = f"{one} {drawn.text}".strip()
                if drawn.finished and drawn.text and _is_sound(text) and taken.new(text):
                    turns.append(_Turn(text, one))
    return turns[:count]


def _is_sound(text: str) -> bool:
    """Whether it is neither a repetition of few words, nor a fragment of markup."""
    words = text.split()
    return len(words) >= 2 and len(set(words)) * 2 > len(words) and not set(text) & set("{}<>|`")


def _first_divergences(pen: Pen, template: PromptTemplate, instruction: str, turns: list[_Turn]) -> list[float]:
    """KL(instructed ‖ plain) of the first token of the answer to each turn, in nats."""
    prompts = [template.tokenise(pen.tokenizer, instruction, turn.text) for turn in turns]
    wanted, got = (
        next_logits(pen.model, pen.tokenizer, ids, pen.batch_size)
        for ids in ([one.instructed_ids for one in prompts], [one.plain_ids for one in prompts])
    )
    return [float(value) for value in token_kl(wanted, got)]
