"""The two runs of a prompt: what each consists of, and which of their tokens are compared."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from conftest import make_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_thought import prompts
from lit_thought.errors import ThoughtError
from lit_thought.prompts import PromptTemplate, TokenisedPair, check_context

QA = PromptTemplate()
DEMOS = "Q: big\nA: small\nQ: up\nA: down\n"
WITHOUT_BOS = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)
PLAIN_CHAT = "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] | trim }}<|e|>\n{% endfor %}"
PLAIN_CHAT += "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def check_invariants(pair: TokenisedPair) -> None:
    """What every pair must satisfy, whatever the prompt."""
    plain, instructed = pair.plain_positions, pair.instructed_positions
    assert len(plain) == len(instructed)
    assert [pair.plain_ids[p] for p in plain] == [pair.instructed_ids[q] for q in instructed]
    for positions in (plain, instructed):
        assert all(a < b for a, b in zip(positions, positions[1:], strict=False))
    assert pair.sink is (pair.exact and (not plain or plain[0] != 0))
    if pair.exact:
        block = len(pair.instructed_ids) - len(pair.plain_ids)
        assert block > 0
        shifts = [q - p for p, q in zip(plain, instructed, strict=True)]
        assert plain == tuple(range(1 if pair.sink else 0, len(pair.plain_ids)))
        start = shifts.index(block) + plain[0] if block in shifts else len(pair.plain_ids)
        start = 0 if pair.sink else start
        assert pair.plain_ids == pair.instructed_ids[:start] + pair.instructed_ids[start + block :]
        assert set(shifts) <= {0, block}


# --- text templates ---------------------------------------------------------------------------------------------


def test_generation_prompt_ends_without_the_templates_space() -> None:
    pair = QA.tokenise(WITHOUT_BOS, "Antonyms of words.", "hot")
    assert text(WITHOUT_BOS, pair.plain_ids) == "Q: hot\nA:"
    assert text(WITHOUT_BOS, pair.instructed_ids) == "Antonyms of words.\nQ: hot\nA:"
    assert pair.output_span == (len(pair.plain_ids),) * 2
    check_invariants(pair)


@pytest.mark.parametrize(
    ("output", "finished", "expected", "answer"),
    [
        ("cold", True, "Q: hot\nA: cold\n", " cold"),
        ("cold", False, "Q: hot\nA: cold", " cold"),
        (" cold", True, "Q: hot\nA: cold\n", " cold"),
        ("\tcold", True, "Q: hot\nA:\tcold\n", "\tcold"),
        ("cold {input} {", True, "Q: hot\nA: cold {input} {\n", " cold {input} {"),
        ("", True, "Q: hot\nA:\n", ""),
        ("", False, "Q: hot\nA:", ""),
    ],
)
def test_output_space_and_tail(output: str, finished: bool, expected: str, answer: str) -> None:
    pair = QA.tokenise(WITHOUT_BOS, DEMOS, "hot", output, finished)
    assert text(WITHOUT_BOS, pair.plain_ids) == expected
    assert pair.plain_ids == tuple(WITHOUT_BOS(expected).input_ids)
    start, stop = pair.output_span
    assert text(WITHOUT_BOS, pair.plain_ids[start:stop]) == answer
    assert text(WITHOUT_BOS, pair.plain_ids[:start]) == "Q: hot\nA:"
    check_invariants(pair)


def test_newlines_before_the_output_stay_in_the_generation_prompt() -> None:
    pair = PromptTemplate("Q: {input}\nA:\n\t {output}").tokenise(WITHOUT_BOS, "Be brief.", "hot")
    assert text(WITHOUT_BOS, pair.plain_ids) == "Q: hot\nA:\n"


def test_without_bos_the_sink_is_not_compared() -> None:
    pair = QA.tokenise(WITHOUT_BOS, DEMOS, "hot", "cold")
    assert pair.sink
    assert pair.exact
    assert pair.plain_positions == tuple(range(1, len(pair.plain_ids)))


def test_with_bos_everything_is_compared() -> None:
    pair = QA.tokenise(WITH_BOS, DEMOS, "hot", "cold")
    assert not pair.sink
    assert pair.plain_ids[0] == pair.instructed_ids[0] == WITH_BOS.bos_token_id
    assert pair.plain_positions == tuple(range(len(pair.plain_ids)))
    assert pair.instructed_positions[:2] == (0, 1 + len(pair.instructed_ids) - len(pair.plain_ids))
    assert pair.instructed_ids.count(WITH_BOS.bos_token_id) == 1
    check_invariants(pair)


@pytest.mark.parametrize("tokenizer", [WITHOUT_BOS, WITH_BOS], ids=["no bos", "bos"])
def test_demonstrations_align_to_the_last_occurrence(tokenizer: PreTrainedTokenizerFast) -> None:
    """Even where a demonstration is the query itself, the query's tokens match those after the chunk."""
    pair = QA.tokenise(tokenizer, "Q: hot\nA: cold\n", "hot", "cold")
    shift = len(pair.instructed_ids) - len(pair.plain_ids)
    first = 1
    assert [q - p for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True)][first:] == (
        [shift] * (len(pair.plain_positions) - first)
    )
    assert pair.instructed_positions[-1] == len(pair.instructed_ids) - 1
    check_invariants(pair)


@pytest.mark.parametrize(
    ("template", "plain", "instructed"),
    [
        ("Fox:\n{instruction}\nQ: {input}\nA: {output}\n", "Fox:\n\nQ: hot\nA: cold\n", "Fox:\nI say\nQ: hot"),
        ("Q: {input}\n{instruction}\nA: {output}\n", "Q: hot\n\nA: cold\n", "Q: hot\nI say\nA: cold"),
        ("{instruction}\nQ: {input}\nA: {output}\n", "\nQ: hot\nA: cold\n", "I say\nQ: hot"),
    ],
    ids=["middle", "after the input", "start"],
)
def test_place_of_the_chunk(template: str, plain: str, instructed: str) -> None:
    pair = PromptTemplate(template).tokenise(WITHOUT_BOS, "I say", "hot", "cold")
    assert text(WITHOUT_BOS, pair.plain_ids) == plain
    assert text(WITHOUT_BOS, pair.instructed_ids).startswith(instructed)
    assert pair.sink is template.startswith("{instruction}")
    block = len(pair.instructed_ids) - len(pair.plain_ids)
    kept = text(WITHOUT_BOS, pair.plain_ids[: pair.instructed_positions.index(block + pair.plain_ids.index(0))]) if (
        0 in pair.plain_ids
    ) else None
    assert kept is None
    check_invariants(pair)


def test_separator_belongs_to_the_chunk_and_only_where_needed() -> None:
    def instructed(template: PromptTemplate, instruction: str) -> str:
        return text(WITHOUT_BOS, template.tokenise(WITHOUT_BOS, instruction, "hot").instructed_ids)

    assert instructed(QA, "Be brief.") == "Be brief.\nQ: hot\nA:"
    assert instructed(QA, "Be brief. ") == "Be brief. Q: hot\nA:"
    assert instructed(PromptTemplate(separator=" | "), "Be brief.") == "Be brief. | Q: hot\nA:"
    assert instructed(PromptTemplate("{instruction}Q: {input}\nA: {output}"), "Hm") == "HmQ: hot\nA:"


def test_other_braces_are_literal_and_values_are_not_parsed() -> None:
    template = PromptTemplate('{{"q": "{input}", {}, {x}, "a": {output}}}')
    pair = template.tokenise(WITHOUT_BOS, "{output} {input} {0}", "{instruction} {output}", "{input}")
    assert text(WITHOUT_BOS, pair.plain_ids) == '{{"q": "{instruction} {output}", {}, {x}, "a": {input}}}'
    assert text(WITHOUT_BOS, pair.instructed_ids).startswith('{output} {input} {0}\n{{"q": "{instruction}')
    assert template.stop == "}}"


def test_chunk_that_merges_with_its_neighbours_is_tokenised_apart() -> None:
    """The natural instructed tokens do not contain the plain ones, yet the chunk falls between plain tokens."""
    template = PromptTemplate("Q:{instruction} {input}\nA: {output}\n")
    pair = template.tokenise(WITHOUT_BOS, " pi rate  ", "hot", "cold")
    apart = tuple(WITHOUT_BOS(" pi rate  ", add_special_tokens=False).input_ids)
    natural = tuple(WITHOUT_BOS("Q: pi rate   hot\nA: cold\n").input_ids)
    assert pair.exact
    assert pair.instructed_ids == pair.plain_ids[:2] + apart + pair.plain_ids[2:]
    glued = PromptTemplate("Q: {input}\nho{instruction}\nA: {output}\n").tokenise(WITHOUT_BOS, "t", "hot", "cold")
    assert glued.exact
    assert glued.instructed_ids != tuple(WITHOUT_BOS("Q: hot\nhot\nA: cold\n").input_ids) or natural
    check_invariants(pair)
    check_invariants(glued)
