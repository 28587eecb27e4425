"""Batches against the pairs they were made from: every compared token, once, with its weight and its context."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
import torch
from batches import Seen, from_batches, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_tokenizer
from transformers import PreTrainedTokenizerFast

from lit_thought.errors import ThoughtError
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import PairBatch, common_prefix, make_batches, pad
from lit_thought.prompts.template import PromptTemplate

PAD = 499  # no token of the tokenizer


def from_pairs(pairs: list[TokenisedPair], answer_weight: float) -> Seen:
    """The same from the pairs' own matches, with no batch and no lead."""
    seen: Seen = defaultdict(float)
    for pair in pairs:
        if pair.sink:
            seen[pair.plain_ids[:1], pair.plain_ids[:1]] += 1
        start, stop = pair.output_span
        answer = {*range(start, stop), start - 1} if start < stop else set()
        for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True):
            weight = answer_weight if p in answer else 1.0
            seen[pair.plain_ids[: p + 1], pair.instructed_ids[: q + 1]] += weight
    return dict(seen)


@cache
def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=bos)


TEMPLATES = {
    "start": "Q: {input}\nA: {output}\n",
    "middle": "You are a fox.\n{instruction}\nQ: {input}\nA: {output}\n",
    "after the input": "Q: {input}\n{instruction}\nA: {output}\n",
    "glued": "Q:{instruction}{input}\nA:{output}",
    "chat": "chat",
    "chat-user": "chat-user",
}
words = st.sampled_from(["hot", "big", "up", "a pirate", "capital of France?", "x", "dog; the lazy dog"])
pair_lists = st.lists(
    st.tuples(words, st.one_of(st.none(), words), st.sampled_from(["Antonyms.", "Talk like a pirate. Always!"])),
    min_size=1,
    max_size=7,
)


def tokenise(template: str, bos: bool, rows: list[tuple[str, str | None, str]]) -> list[TokenisedPair]:
    parsed, pairs = PromptTemplate.parse(TEMPLATES[template]), []
    for text, output, instruction in rows:
        try:
            pairs.append(parsed.tokenise(tokenizer(bos), instruction, text, output))
        except ThoughtError:  # a token merges across the edge of the chunk
            assert template in ("glued", "chat-user")
    return pairs


@settings(max_examples=150, deadline=None)
@given(
    template=st.sampled_from(list(TEMPLATES)),
    bos=st.booleans(),
    rows=pair_lists,
    batch_size=st.integers(1, 8),
    grouped=st.booleans(),
    answer_weight=st.sampled_from([1.0, 5.0]),
)
def test_batches_hold_each_compared_token_once(
    template: str, bos: bool, rows: list, batch_size: int, grouped: bool, answer_weight: float
) -> None:
    pairs = tokenise(template, bos, rows)
    if not pairs:
        return
    groups = [row[2] for row in rows][: len(pairs)] if grouped else None
    batches = make_batches(pairs, batch_size, groups, answer_weight)
    assert from_batches(batches) == pytest.approx(from_pairs(pairs, answer_weight))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    for batch in batches:
        if batch.lead is not None:
            lead = batches[batch.lead]
            assert lead.lead is None
            assert lead.index < batch.index
            assert len(lead.target.ids) == 1
            assert bool(lead.target.mask.all())
            assert lead.plain is None or bool(lead.plain.mask.all())
        assert batch.plain is not None or not len(batch.plain_rows)
        assert len(batch.target.ids) <= batch_size or batch.index == 0
    # the runs themselves are all there too
    followers = [batch for batch in batches if not is_shared(batches, batch)]
    for run, attribute in (("plain", "plain_ids"), ("target", "instructed_ids")):
        made = sorted(tuple(s) for batch in followers for s in sequences(batches, batch.index, run))
        assert made == sorted(getattr(pair, attribute) for pair in pairs)


def is_shared(batches: list[PairBatch], batch: PairBatch) -> bool:
    """A lead, or the batch of attention sinks: the same single tokens on both sides, which lead nothing."""
    if any(other.lead == batch.index for other in batches):
        return True
    return batch.index == 0 and batch.plain is batch.target


steps = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=8)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(steps, min_size=1, max_size=5), batch_size=st.integers(1, 3))
def test_any_alignment_whatever(rows: list[list[tuple[int, int]]], batch_size: int) -> None:
    """Random sequences of few tokens, much in common, with arbitrary increasing alignments.

    Each step is a token and where it stands: in both runs (compared), in the instructed one, or in the plain one.
    """
    pairs = []
    for row in rows:
        plain: list[int] = [9]
        target: list[int] = [9]
        matched: list[tuple[int, int]] = []
        for token, where in row:
            if where == 0:
                matched.append((len(plain), len(target)))
            if where in (0, 1):
                target.append(token)
            if where in (0, 2):
                plain.append(token)
        positions = list(zip(*matched, strict=True)) or [(), ()]
        pairs.append(TokenisedPair(tuple(plain), tuple(target), *positions, False, (len(plain),) * 2, False))
    batches = make_batches(pairs, batch_size)
    assert from_batches(batches) == pytest.approx(from_pairs(pairs, 1.0))


def test_the_chunk_is_run_once_and_its_tokens_weigh_as_many_as_share_them() -> None:
    rows = [(word, "cold", "Talk like a pirate.") for word in ("hot", "big", "up", "good", "x")]
    pairs = tokenise("middle", True, rows)
    lead, *followers = make_batches(pairs, 2)
    chunk = len(pairs[0].instructed_ids) - len(pairs[0].plain_ids)
    assert lead.plain is not None
    assert lead.plain.ids[0, 0] == lead.target.ids[0, 0] == tokenizer(True).bos_token_id
    assert lead.target.ids.shape[1] == lead.plain.ids.shape[1] + chunk
    assert set(lead.weights.tolist()) == {5.0}
    assert [batch.lead for batch in followers] == [0, 0, 0]
    longest = max(len(pair.plain_ids) for pair in pairs) - lead.plain.ids.shape[1]
    assert max(batch.target.ids.shape[1] for batch in followers) == longest


def test_groups_share_no_lead_with_each_other() -> None:
    rows = [(word, None, text) for text in ("Antonyms.", "Antonyms of words.") for word in ("hot", "big", "up")]
    pairs = tokenise("start", False, rows)
    together = make_batches(pairs, 8)
    apart = make_batches(pairs, 8, groups=[row[2] for row in rows])
    assert len({batch.lead for batch in together if batch.lead is not None}) == 1
    assert len({batch.lead for batch in apart if batch.lead is not None}) == 2
    shared = {batch.index: batch.target.ids.shape[1] for batch in apart if is_shared(apart, batch) and batch.index}
    assert min(shared.values()) > max(len(b.target.ids[0]) for b in together if is_shared(together, b) and b.index)
    assert from_batches(apart) == from_batches(together)


def test_sinks_are_one_batch_with_their_counts() -> None:
    rows = [("hot", "cold", "Antonyms."), ("hot", "x", "Antonyms."), ("big", "small", "Antonyms.")]
    pairs = tokenise("start", False, rows)
    other = PromptTemplate("{input}\nA: {output}\n").tokenise(tokenizer(False), "Antonyms.", "up", "down")
    assert all(pair.sink for pair in [*pairs, other])
    sinks = make_batches([*pairs, other], 2)[0]
    assert sinks.plain is sinks.target
    assert sinks.target.ids.tolist() == [[pairs[0].plain_ids[0]], [other.plain_ids[0]]]
    assert sinks.weights.tolist() == [3, 1]
    assert sinks.plain_rows.tolist() == sinks.target_rows.tolist() == [0, 1]


def test_no_padding_between_a_lead_and_its_followers() -> None:
    """It would count against a sliding window."""
    pairs = tokenise("start", True, [("hot", "cold", "Antonyms."), ("the lazy dog", "a pirate", "Antonyms.")])
    batches = make_batches(pairs, 2)
    assert batches[-1].lead is not None
    assert bool(batches[-1].target.mask[:, 0].all())


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=5))
def test_common_prefix(rows: list[list[int]]) -> None:
    shared = common_prefix(rows)
    candidates = [n for n in range(min(map(len, rows))) if all(row[:n] == rows[0][:n] for row in rows)]
    assert shared == max(candidates)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side: str) -> None:
    tokens = pad([[1, 2, 3], [4]], PAD, side)  # type: ignore[arg-type]
    assert tokens.ids.dtype == torch.long
    assert tokens.mask.dtype == torch.bool
    if side == "left":
        assert tokens.ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
        assert tokens.mask.tolist() == [[True] * 3, [False, False, True]]
    else:
        assert tokens.ids.tolist() == [[1, 2, 3], [4, PAD, PAD]]
        assert tokens.mask.tolist() == [[True] * 3, [True, False, False]]


def test_batches_move_as_one() -> None:
    pairs = tokenise("start", True, [("hot", "cold", "Antonyms."), ("big", "small", "Antonyms.")])
    for batch in make_batches(pairs, 2):
        moved = batch.to("meta")
        assert moved.weights is batch.weights  # their sum is wanted on the host
        tensors = [moved.target.ids, moved.target.mask, moved.plain_rows, moved.target_rows]
        tensors += [moved.plain.ids, moved.plain.mask] if moved.plain else []
        assert all(tensor.is_meta for tensor in tensors)
        assert (moved.index, moved.lead) == (batch.index, batch.lead)
