"""Text and chats that have nothing to do with the instruction: what a patch should leave alone.

The package ships two parts of public-domain English prose (A. Conan Doyle, *The Adventures of Sherlock
Holmes*, 1892; C. and M. Beard, *History of the United States*, 1921) that do not overlap: one to preserve,
one to measure perplexity on. Beside them it has short chats, written for it: questions and tasks of many kinds, sums,
code, other languages, other system messages. Plain text does not tell what a patch does to chats, and does not hold it
off them (recipes/studies/side_effects.py measures that).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from lit_thought.errors import ThoughtError
from lit_thought.files import expanded
from lit_thought.prompts.chat import render_answered
from lit_thought.prompts.pairs import check_unicode
from lit_thought.settings import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_windows", "load_texts", "text_windows"]


def load_texts(source: TextSource, part: Literal["preserve", "evaluate"], argument: str) -> list[str]:
    """Texts from a list, a UTF-8 file, or ``"default"``: the package's own text for this ``part``.

    Raises:
        ThoughtError: when the file is missing or not UTF-8, or there is no text; names ``argument``.
    """
    if isinstance(source, (list, tuple)):
        texts = list(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise ThoughtError(
            f'{argument} must be a text file, a list of texts or "default"; got {type(source).__name__}.'
        )
    elif source == "default":
        texts = [files("lit_thought.prompts").joinpath("text", f"{part}.txt").read_text(encoding="utf-8")]
    else:
        path = expanded(source, argument)
        try:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            texts = [path.read_text(encoding="utf-8-sig")]  # some editors write a mark first
        except (OSError, ValueError) as error:
            raise ThoughtError(
                f"{argument}={str(source)!r} cannot be read as a UTF-8 text file ({error}). "
                'Give a text file, a list of texts, or "default".'
            ) from error
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ThoughtError(f"{argument} must hold one or more texts that are not empty.")
    for text in texts:
        check_unicode(argument, text)
    return texts


def text_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Cut texts into windows of at most ``length`` tokens, each beginning with the tokenizer's BOS if it adds one.

    A window never crosses two texts. ``max_tokens`` bounds the tokens of all windows together; there are then as many
    windows as it allows, evenly spread over the texts, the last of them cut.

    Raises:
        ThoughtError: when nothing of two tokens or more is left.
    """
    opening = _opening_tokens(tokenizer)
    size = length - len(opening)
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        every = ([*opening, *ids[start : start + size]] for start in range(0, len(ids), size))
        windows += [window for window in every if len(window) >= 2]
    windows = _spread(windows, max_tokens)
    if not windows:
        raise ThoughtError("the unrelated text gives no window of two tokens or more; give more text.")
    return windows


def chat_windows(tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None) -> list[list[int]]:
    """The package's chats as the tokenizer's chat template writes them, each cut to ``length`` tokens.

    ``max_tokens`` bounds them as it does those of :func:`text_windows`. There are none for a tokenizer without a chat
    template, or with one that does not take a message and its answer.
    """
    chats = json.loads(files("lit_thought.prompts").joinpath("text", "chats.json").read_text(encoding="utf-8"))
    try:
        texts = render_answered(tokenizer, [(one.get("system"), one["input"], one["output"]) for one in chats])
    except ThoughtError:
        return []
    return _spread([tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts], max_tokens)


def _spread(windows: list[list[int]], most: int | None) -> list[list[int]]:
    """Windows of at most ``most`` tokens in all, evenly spread over those given; the last is cut."""
    total = sum(map(len, windows))
    if most is None or total <= most:
        return windows
    chosen, count = list[list[int]](), most * len(windows) // total
    while sum(map(len, chosen)) < most:
        count += 1
        chosen = [windows[i * len(windows) // count] for i in range(count)]
    left, cut = most, []
    for window in chosen:
        cut.append(window[:left])
        left -= len(cut[-1])
    return [window for window in cut if len(window) >= 2]


def _opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before plain text: [BOS] or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: full.index(bare[0])] if bare and bare[0] in full else []
