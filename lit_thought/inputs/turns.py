"""What users write to a chat model, in the model's own words.

A chat model continues the opening of a user's turn as a user would (Xu et al. 2024, Magpie: Alignment Data Synthesis
from Scratch by Prompting Aligned LLMs with Nothing, arXiv 2406.08464). Half of the turns are so written without the
instruction, about anything, and half with it before them, about what it is about. Each begins with one of
:data:`OPENINGS`, so that short questions, tasks and greetings are all among them.

Keeping, of twice as many, those for which the instruction changes most how the answer begins was tried and gained
nothing that could be told from noise.

To a model with a long system prompt users write what that is there for: tickets to sort, wishes to a house. Turns and
questions hardly ever are such messages; behind the prompt as a plain text the model writes lists of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.inputs.study import LIST_SAMPLING, About
from lit_thought.inputs.words import spaced, words
from lit_thought.prompts.template import PromptTemplate

__all__ = ["OPENINGS", "write_messages", "write_turns"]

OPENINGS = (
    *("", "What", "How do I", "Why", "Who", "Can you", "Tell me", "Explain", "Write a", "Give me", "Is", "I", "Hi"),
    *("Please", "When", "Where", "Which", "List", "Describe", "How", "Should I", "What is", "Do you", "How many"),
)
"""First words of a turn; the empty one leaves them to the model."""
LONGEST = 32
"""Tokens of a turn; longer ones are dropped."""
SAMPLING = {"temperature": 0.8, "top_k": 50}
"""``top_p`` alone sorts the vocabulary at each token, which takes as long as the model itself does."""
ROUNDS = 6
"""Most draws, each of a third more turns than are missing."""

LIST = (
    "{instruction}\n\n---\nAll of the above are instructions. Below are thirty messages of users, to test with, "
    'without the answers. They are short and all different.\n\n1. "'
)
"""A plain text that goes on with messages, whatever the model's chat template."""
LISTED, EACH, LISTS = 256, 3, 2
"""Tokens of a list, messages that one is counted on for, and most rounds of lists."""
ALIKE = 3
"""Most messages that begin with the same words, and how many words these are: a prompt that says how answers begin is
often obeyed in messages, too."""
_ITEM = re.compile(r"\W*\d+[.):]\s*(.*\S)\s*$")
_QUOTES = "\"'“”„«»「」"


def write_messages(pen: Pen, instruction: str, count: int, taken: Distinct) -> list[str]:
    """What users write to a model with a long system prompt, from lists that go on behind it (:data:`LIST`).

    Args:
        pen: the model.
        instruction: the system prompt.
        count: how many.
        taken: what is written already.

    Returns:
        New messages, ``count`` at most: fewer where the model writes too few that are sound, and none where it writes
        about anything, with no word of the system prompt in most of them, as very small models do.
    """
    prompt = pen.tokenizer(LIST.format(instruction=instruction))["input_ids"]
    about = About(instruction, "")
    kept: list[str] = []
    begun: Counter[tuple[str, ...]] = Counter()

    def keep(text: str) -> bool:
        begin = tuple(words(text.lower())[:ALIKE])
        new = len(words(text)) <= LONGEST and _is_sound(text) and begun[begin] < ALIKE and taken.new(text)
        begun[begin] += new
        return new

    for _ in range(LISTS if count > 0 else 0):
        lists = -(-(count - len(kept)) // EACH)
        for one in pen.write([prompt] * lists, LISTED, sampling=LIST_SAMPLING):
            lines = f"1. {one.text}".splitlines()
            items = map(_ITEM.match, lines if one.finished else lines[:-1])
            kept += filter(keep, (item[1].strip(f"{_QUOTES} ") for item in items if item))
        if 2 * sum(map(about.mentions, kept)) < len(kept):
            return []
        if len(kept) >= count:
            break
    return kept[:count]


def write_turns(pen: Pen, template: PromptTemplate, instruction: str, count: int, taken: Distinct) -> Iterator[str]:
    """What users write, in turn without the instruction and with it.

    Args:
        pen: the model.
        template: the prompt's form; behind a text template the model writes inputs for that.
        instruction: the chunk.
        count: how many.
        taken: what is written already.

    Yields:
        New turns, ``count`` at most: fewer where the model writes too few that are sound and come to an end.
    """
    frame, chat = template.frame(pen.tokenizer, instruction), template.is_chat
    after = pen.tokenizer(frame.after.strip(), add_special_tokens=False)["input_ids"]
    ends = [token for token in after[:1] if chat and token in pen.tokenizer.all_special_ids]
    stop = None if chat else frame.after.rstrip() or "\n"
    number = 0
    for _ in range(ROUNDS):
        openings = [OPENINGS[(number + i) % len(OPENINGS)] for i in range(-(-count * 2 // 3))]
        number += len(openings)
        for before in (frame.instructed, frame.plain):
            texts = [before + (f"{'' if chat else ' '}{one}" if one else "") for one in openings]
            prompts = [pen.tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in texts]
            begun = [i for i, ids in enumerate(prompts) if ids]  # nothing can be written after nothing
            drawn = pen.write([prompts[i] for i in begun], LONGEST, stop=stop, ends=ends, sampling=SAMPLING)
            for opening, one in zip([openings[i] for i in begun], drawn, strict=True):
                joint = "" if one.text[:1] in ",.;:?!'’" else " "
                text = f"{opening}{joint}{one.text}".strip()
                if one.finished and one.text and _is_sound(text) and taken.new(text):
                    yield text
                    count -= 1
                    if not count:
                        return


def _is_sound(text: str) -> bool:
    """Whether it is neither a repetition of few words, nor a fragment of markup."""
    words = spaced(text).split()
    return len(words) >= 2 and len(set(words)) * 2 > len(words) and not set(text) & set("{}<>|`")
