"""The plain and the instructed tokens of one prompt, and which tokens of the two are compared.

Everything downstream rests on the alignment made here: it never guesses where the chunk is, and it refuses a pair
whose input or output tokens have no counterpart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_thought.errors import ThoughtError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptTexts", "TokenisedPair", "align", "check_context"]

_log = logging.getLogger("lit_thought")
_warned: set[str] = set()  # kinds of inexact alignment that this process has already reported
_Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class TokenisedPair:
    """The token ids of a plain and an instructed run, and which tokens of the two are compared.

    Attributes:
        plain_ids: What the tokenizer makes of the plain text.
        instructed_ids: The same with the chunk.
        plain_positions: Increasing positions of the compared tokens in ``plain_ids``.
        instructed_positions: Their counterparts: same length, same token ids, increasing.
        sink: Plain token 0 has a counterpart but is not compared, because with no BOS before it, it is the
            attention sink of the plain run and an ordinary token of the instructed run.
        output_span: Token range ``[start, stop)`` of the output in ``plain_ids``; ``(len, len)`` without one.
        exact: ``plain_ids`` are ``instructed_ids`` less one contiguous block. Otherwise the runs are aligned
            on their common prefix and suffix, and some plain tokens have no counterpart.
    """

    plain_ids: tuple[int, ...]
    instructed_ids: tuple[int, ...]
    plain_positions: tuple[int, ...]
    instructed_positions: tuple[int, ...]
    sink: bool
    output_span: tuple[int, int]
    exact: bool


@dataclass(frozen=True)
class PromptTexts:
    """The instructed text ``before + chunk + after``, the plain text, and character ranges in the latter."""

    before: str
    chunk: str
    after: str
    plain: str
    input_span: tuple[int, int]
    output_span: tuple[int, int]

    def cuts(self) -> list[int]:
        """Places in the plain text where a block put in makes the instructed text, the best first.

        The block is the chunk, or the chunk with what goes away along with it (whitespace around it, the
        frame of a system message). Empty where more has changed than that.
        """
        longest_head = _common(self.before, self.plain)
        shortest_head = len(self.plain) - _common(self.after[::-1], self.plain[::-1])
        cuts = list(range(shortest_head, longest_head + 1))
        return cuts[::-1] if longest_head == len(self.before) else cuts


def check_context(pair: TokenisedPair, limit: int, index: int, room: int = 0) -> None:
    """Check that the longer of the two runs fits the model's context window.

    Args:
        pair: The tokenised pair.
        limit: The context window, in tokens.
        index: The pair's place among the pairs, for the message.
        room: How many tokens (max_new_tokens) may yet be generated.

    Raises:
        ThoughtError: It is too long; says whether the instruction alone fills the window.
    """
    length = max(len(pair.plain_ids), len(pair.instructed_ids))
    if length + room <= limit:
        return
    chunk = len(pair.instructed_ids) - len(pair.instructed_positions) - pair.sink
    if chunk >= limit:
        raise ThoughtError(
            f"instruction: expected room for it in the model's context window of {limit} tokens, "
            f"but it alone has {chunk}; shorten it, or use a model with a longer window"
        )
    to_come = f" and max_new_tokens={room}" if room else ""
    raise ThoughtError(
        f"pairs[{index}]: expected at most {limit} tokens (the model's context window), got {length}{to_come}, "
        f"{chunk} of them the instruction; shorten input or output, lower max_new_tokens or leave it out"
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids and the characters each covers, with the whitespace that some tokenizers trim off."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    spans, reached = [], 0
    for start, stop in encoded["offset_mapping"]:
        if reached < start and text[reached:start].isspace():
            start = reached
        spans.append((start, stop))
        reached = max(reached, stop)
    return tuple(encoded["input_ids"]), spans


def _overlap(spans: _Spans, start: int, stop: int) -> tuple[int, int]:
    """Range of the tokens that share characters with ``[start, stop)``; empty, in its place, if none do."""
    first = next((i for i, (_, end) in enumerate(spans) if end > start), len(spans))
    touching = [i for i, (begin, end) in enumerate(spans) if begin < stop and end > start and begin < end]
    return (touching[0], touching[-1] + 1) if touching and start < stop else (first, first)


def _places(texts: PromptTexts, spans: _Spans, is_chat: bool) -> Iterator[tuple[int, int]]:
    """Where the block can go in, the best first: its place in the plain text, and the cut that it belongs to.

    The place is the cut, where that falls between two plain tokens. In a chat it can also be before the whitespace
    that the cut parts from the rest of a token (``[INST]| up``): the whitespace is then on both sides of the block.
    """
    inside = []
    for cut in texts.cuts():
        start = next((start for start, stop in spans if stop > cut), cut)
        if start >= cut:
            yield cut, cut
        elif is_chat and texts.plain[start:cut].isspace():
            inside.append((start, cut))
    yield from inside


def align(tokenizer: PreTrainedTokenizerBase, texts: PromptTexts, is_chat: bool) -> TokenisedPair:
    plain, spans = _encode(tokenizer, texts.plain, special=not is_chat)
    instructed_text = texts.before + texts.chunk + texts.after
    instructed, instructed_spans = _encode(tokenizer, instructed_text, special=not is_chat)
    head = tail = -1
    for start, cut in _places(texts, spans, is_chat):
        block = instructed_text[start : len(instructed_text) - (len(texts.plain) - cut)]
        if start < cut:
            text = texts.plain[:start] + block + texts.plain[start:]
            instructed, _ = _encode(tokenizer, text, special=not is_chat)
        head = next((i for i, (_, stop) in enumerate(spans) if stop > start), len(plain))
        tail = len(plain) - head
        kept = instructed[:head] + instructed[len(instructed) - tail :]
        if kept != plain:  # it merges with the text around it
            block_ids = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
            instructed = (*plain[:head], *block_ids, *plain[head:])
        break
    exact = head >= 0
    if not exact:
        _report_inexact("chat" if is_chat and not texts.cuts() else "merge")
        start, stop = _overlap(instructed_spans, len(texts.before), len(texts.before) + len(texts.chunk))
        tail = _common(plain[::-1], instructed[stop:][::-1])
        head = _common(plain[: len(plain) - tail], instructed[:start])
    shift = len(instructed) - len(plain)
    matches = [(i, i) for i in range(head)] + [(i, i + shift) for i in range(len(plain) - tail, len(plain))]
    sink = bool(matches) and matches[0][0] == 0 and matches[0][1] != 0
    matches = matches[sink:]
    output_span = _overlap(spans, *texts.output_span)
    covered = {p for p, _ in matches} | ({0} if sink else set())
    for name, span in (("input", _overlap(spans, *texts.input_span)), ("output", output_span)):
        for position in range(*span):
            if position not in covered:
                token = texts.plain[slice(*spans[position])]
                raise ThoughtError(
                    f"{name}: expected its tokens to be the same in both runs, but {token!r} is not: it "
                    "merges with text at the edge of the chunk; put a newline, or other text that does not "
                    f"merge, between {{instruction}} and {{{name}}} in the template"
                )
    if head <= output_span[0] and 0 < output_span[0] <= len(plain) - tail:
        raise ThoughtError(
            "template: expected text between {instruction} and {output}, which the token before the output is of in "
            "both runs: it predicts the output, and behind the chunk it is another one. Put a word there, such as A:, "
            "since tokenizers merge newlines."
        )
    return TokenisedPair(
        plain_ids=plain,
        instructed_ids=instructed,
        plain_positions=tuple(p for p, _ in matches),
        instructed_positions=tuple(q for _, q in matches),
        sink=sink,
        output_span=output_span,
        exact=exact,
    )


def _report_inexact(kind: str) -> None:
    """Say once per process and kind that the plain run is not the instructed run less the chunk."""
    if kind in _warned:
        return
    _warned.add(kind)
    if kind == "chat":
        _log.info(
            "The chat template writes other text where the chunk is missing; the runs are aligned on their "
            "common prefix and suffix."
        )
    else:
        _log.warning(
            "The tokenizer merges text across the chunk's place into one token; the runs are aligned on "
            "their common prefix and suffix. A newline next to the chunk in the template avoids this."
        )


def _common(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
