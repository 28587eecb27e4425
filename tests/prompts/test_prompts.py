"""The two runs of a prompt: what each consists of, and which of their tokens are compared."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CORPUS, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_thought.errors import ThoughtError
from lit_thought.prompts import alignment
from lit_thought.prompts.alignment import TokenisedPair, check_context
from lit_thought.prompts.template import PromptTemplate

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
        assert list(positions) == sorted(set(positions))
    if pair.exact:
        block = len(pair.instructed_ids) - len(pair.plain_ids)
        assert block > 0
        assert plain == tuple(range(pair.sink, len(pair.plain_ids)))
        place = 0 if pair.sink else sum(p == q for p, q in zip(plain, instructed, strict=True))
        assert pair.instructed_ids[:place] + pair.instructed_ids[place + block :] == pair.plain_ids
        assert instructed == tuple(p if p < place else p + block for p in plain)


# --- text templates ----------------------------------------------------------------------------------------


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
        ("\ncold", True, "Q: hot\nA:\ncold\n", "\ncold"),
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
    assert pair.plain_positions[1:] == tuple(p - shift for p in pair.instructed_positions[1:])
    assert pair.instructed_positions[-1] == len(pair.instructed_ids) - 1
    check_invariants(pair)


@pytest.mark.parametrize(
    ("template", "before", "chunk", "after"),
    [
        ("Fox:\n{instruction}\nQ: {input}\nA: {output}\n", "Fox:\n", "I say", "\nQ: hot\nA: cold\n"),
        ("Q: {input}\n{instruction}\nA: {output}\n", "Q: hot\n", "I say", "\nA: cold\n"),
        ("{instruction}\nQ: {input}\nA: {output}\n", "", "I say", "\nQ: hot\nA: cold\n"),
        ("Q: {input}\nA: {output}\n", "", "I say\n", "Q: hot\nA: cold\n"),
    ],
    ids=["middle", "after the input", "start", "start by default"],
)
@pytest.mark.parametrize("tokenizer", [WITHOUT_BOS, WITH_BOS], ids=["no bos", "bos"])
def test_place_of_the_chunk(
    tokenizer: PreTrainedTokenizerFast, template: str, before: str, chunk: str, after: str
) -> None:
    pair = PromptTemplate(template).tokenise(tokenizer, "I say", "hot", "cold")
    head = len(tokenizer(before).input_ids)
    tail = len(tokenizer(after, add_special_tokens=False).input_ids)
    assert pair.plain_ids == tuple(tokenizer(before + after).input_ids)
    assert pair.instructed_ids == tuple(tokenizer(before + chunk + after).input_ids)
    stop = len(pair.instructed_ids)
    expected = (*range(head), *range(stop - tail, stop))
    assert pair.sink is (head == 0)
    assert pair.instructed_positions == expected[pair.sink :]
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
    middle = PromptTemplate("{input}\n{instruction}\n{output}").tokenise(WITHOUT_BOS, "{input}", "{output}")
    assert text(WITHOUT_BOS, middle.instructed_ids) == "{output}\n{input}\n"


def test_chunk_that_merges_with_its_neighbours_is_tokenised_apart() -> None:
    """``" ho" + "t"`` is one token, but the chunk falls between plain tokens, so it stays removable."""
    pair = PromptTemplate("Say ho{instruction}\nQ: {input}\nA: {output}\n").tokenise(WITH_BOS, "t", "hot")
    natural = WITH_BOS("Say hot\nQ: hot\nA:")
    assert pair.exact
    assert pair.plain_ids == tuple(WITH_BOS("Say ho\nQ: hot\nA:").input_ids)
    assert pair.instructed_ids != tuple(natural.input_ids)
    assert text(WITH_BOS, pair.instructed_ids) == "<s>Say hot\nQ: hot\nA:"
    check_invariants(pair)


def test_merge_over_the_chunks_place_aligns_prefix_and_suffix(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain text has ``" pirate"`` where the instructed one has ``" pi" … "rate"``."""
    monkeypatch.setattr(alignment, "_warned", set())
    template = PromptTemplate("a pi{instruction}rate\nQ: {input}\nA: {output}\n")
    for _ in range(2):
        pair = template.tokenise(WITHOUT_BOS, " a pirate\nQ: hot, ", "hot", "cold")
    assert not pair.exact
    assert not pair.sink
    assert pair.plain_ids == tuple(WITHOUT_BOS("a pirate\nQ: hot\nA: cold\n").input_ids)
    assert pair.instructed_ids == tuple(WITHOUT_BOS("a pi a pirate\nQ: hot, rate\nQ: hot\nA: cold\n").input_ids)
    assert pair.plain_positions == (0, *range(2, len(pair.plain_ids)))
    assert pair.instructed_positions[1] == len(pair.instructed_ids) - len(pair.plain_ids) + 2
    check_invariants(pair)
    assert [record.levelno for record in caplog.records if record.name == "lit_thought"] == [logging.WARNING]


def test_fallback_keeps_out_of_the_chunks_tokens() -> None:
    """The chunk holds copies of the text on both sides of it: no match may reach into it."""
    template = PromptTemplate("up pi{instruction}rate\nQ: {input}\nA: {output}\n")
    pair = template.tokenise(WITHOUT_BOS, "rate\nQ: hot\nA: cold\nup pi", "hot", "cold")
    before, after = len(WITHOUT_BOS("up").input_ids), len(WITHOUT_BOS("\nQ: hot\nA: cold\n").input_ids)
    assert not pair.exact
    assert pair.plain_positions == (*range(before), *range(len(pair.plain_ids) - after, len(pair.plain_ids)))
    assert pair.instructed_positions[:before] == tuple(range(before))
    check_invariants(pair)


@pytest.mark.parametrize(
    ("template", "instruction", "token", "field"),
    [
        ("Q: {instruction}{input}\nA: {output}\n", "say ", "' hot'", "input"),
        ("Q: {input} {instruction}{output}\n", "say", "' cold'", "output"),
    ],
)
def test_input_and_output_must_be_comparable(template: str, instruction: str, token: str, field: str) -> None:
    with pytest.raises(ThoughtError, match=f"{field}.*{token}.*newline"):
        PromptTemplate(template).tokenise(WITHOUT_BOS, instruction, "hot", "cold")


def test_offsets_that_leave_out_spaces() -> None:
    """Some tokenizers' offsets say that ``" hot"`` begins after its space."""
    trimming = make_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trimming("Q: hot", return_offsets_mapping=True).offset_mapping[-1] == (3, 6)
    with pytest.raises(ThoughtError, match="' hot'"):
        PromptTemplate("Q: {instruction}{input}\nA: {output}\n").tokenise(trimming, "say ", "hot", "cold")
    template = "Q: {input}\n{instruction}\nA: {output}\n"
    ours, theirs = (
        PromptTemplate(template).tokenise(t, "say  \n", " hot  up", "cold") for t in (trimming, WITHOUT_BOS)
    )
    assert ours == theirs


def test_sentencepiece_style_tokenizer() -> None:
    """A tokenizer that puts a space before the text: the plain ids still come first."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted(set("".join(CORPUS)))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS * 4, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    pair = QA.tokenise(tokenizer, DEMOS, "hot", "cold")
    assert pair.exact
    assert pair.plain_ids == tuple(tokenizer("Q: hot\nA: cold\n").input_ids)
    assert pair.plain_positions == tuple(range(len(pair.plain_ids)))
    start, stop = pair.output_span
    assert tokenizer.decode(pair.plain_ids[start:stop]).strip() == "cold"
    check_invariants(pair)
    middle = PromptTemplate("Q: {input}\n{instruction}\nA: {output}").tokenise(tokenizer, "pirate", "hot")
    assert middle.instructed_ids == tuple(tokenizer("Q: hot\npirate\nA:").input_ids)
    check_invariants(middle)


# --- chat templates ----------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerFast, *messages: tuple[str, str], prompt: bool = True) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)


def test_chat_with_a_default_system_message(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a system message the template writes one of its own: it stays, and is not compared."""
    monkeypatch.setattr(alignment, "_warned", set())
    caplog.set_level(logging.INFO, logger="lit_thought")
    for _ in range(2):
        pair = PromptTemplate.chat().tokenise(WITHOUT_BOS, "Talk like a pirate.", "up", "down")
    plain = render(WITHOUT_BOS, ("user", "up"))
    assert pair.plain_ids == tuple(WITHOUT_BOS(plain + "down<|e|>", add_special_tokens=False).input_ids)
    instructed = render(WITHOUT_BOS, ("system", "Talk like a pirate."), ("user", "up")) + "down<|e|>"
    assert pair.instructed_ids == tuple(WITHOUT_BOS(instructed, add_special_tokens=False).input_ids)
    assert not pair.exact
    assert not pair.sink
    missing = sorted(set(range(len(pair.plain_ids))) - set(pair.plain_positions))
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert text(WITHOUT_BOS, tuple(pair.plain_ids[i] for i in missing)) == "You are a helpful fox"
    start, stop = pair.output_span
    assert text(WITHOUT_BOS, pair.plain_ids[start:stop]) == "down"
    check_invariants(pair)
    assert [record.levelno for record in caplog.records if record.name == "lit_thought"] == [logging.INFO]


def test_chat_whose_system_message_goes_away_whole() -> None:
    tokenizer = chat_tokenizer(PLAIN_CHAT)
    pair = PromptTemplate.chat().tokenise(tokenizer, "  Talk like a pirate. ", "up")
    assert text(tokenizer, pair.plain_ids) == "<|s|>user\nup<|e|>\n<|s|>assistant\n"
    assert text(tokenizer, pair.instructed_ids).startswith("<|s|>system\nTalk like a pirate.<|e|>\n<|s|>user\nup")
    assert pair.exact
    assert pair.sink
    check_invariants(pair)


@pytest.mark.parametrize(
    ("user", "plain_user", "instructed_user"),
    [
        ("{instruction}\n\n{input}", "up", "Talk\n\nup"),
        ("{input}\n\n{instruction}", "up", "up\n\nTalk"),
        ("Fox:\n{instruction}\n{input}", "Fox:\n\nup", "Fox:\nTalk\nup"),
        ("{instruction} {input}", "up", "Talk up"),
    ],
)
def test_chat_with_the_chunk_in_the_user_message(user: str, plain_user: str, instructed_user: str) -> None:
    pair = PromptTemplate.chat(user=user, system=None).tokenise(WITHOUT_BOS, "Talk", "up", "down", finished=False)
    assert text(WITHOUT_BOS, pair.plain_ids) == render(WITHOUT_BOS, ("user", plain_user)) + "down"
    assert text(WITHOUT_BOS, pair.instructed_ids) == render(WITHOUT_BOS, ("user", instructed_user)) + "down"
    assert pair.exact
    assert not pair.sink
    assert pair.plain_positions == tuple(range(len(pair.plain_ids)))
    check_invariants(pair)


def test_whitespace_around_the_chunk_goes_with_it() -> None:
    """The template's newline before the chunk stays where it is; the two after it go away."""
    pair = PromptTemplate.parse("chat-user").tokenise(WITHOUT_BOS, "Talk", "up")
    head = render(WITHOUT_BOS, ("user", "up")).partition("up<|e|>")[0]
    assert head.endswith("user\n")
    kept = sum(p == q for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True))
    assert kept == len(WITHOUT_BOS(head, add_special_tokens=False).input_ids)


def test_chat_with_a_chunk_inside_a_system_message() -> None:
    template = PromptTemplate.chat(system="You are a fox. {instruction}")
    pair = template.tokenise(WITHOUT_BOS, "Talk.", "  up")
    assert text(WITHOUT_BOS, pair.plain_ids) == render(WITHOUT_BOS, ("system", "You are a fox."), ("user", "  up"))
    assert pair.exact
    check_invariants(pair)


def test_chat_end_of_turn() -> None:
    def tail(template: str, finished: bool = True) -> str:
        tokenizer = chat_tokenizer(template)
        whole = PromptTemplate.chat().tokenise(tokenizer, "Talk.", "up", "down ", finished)
        prompt = PromptTemplate.chat().tokenise(tokenizer, "Talk.", "up")
        start = len(text(tokenizer, prompt.plain_ids))
        return text(tokenizer, whole.plain_ids)[start:]

    assert tail(PLAIN_CHAT) == "down <|e|>"
    assert tail(PLAIN_CHAT, finished=False) == "down "
    assert tail(PLAIN_CHAT.replace("<|e|>", " END\n")) == "down  END"
    tokenizer = chat_tokenizer(PLAIN_CHAT.replace("<|e|>", "<|x|> and more"))
    tokenizer.add_tokens([AddedToken("<|x|>", special=True)])
    pair = PromptTemplate.chat().tokenise(tokenizer, "Talk.", "up", "down")
    assert text(tokenizer, pair.plain_ids).endswith("assistant\ndown<|x|>")
    hiding = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}\n{% endfor %}"
    assert tail(hiding) == "down </s>"
    assert tail(hiding.replace("}}", "}}<|e|>")) == "down </s>"
    assert PromptTemplate.chat().tokenise(chat_tokenizer(hiding), "Talk.", "up", "down").plain_ids[-1] == 1


def test_chat_input_that_is_found_elsewhere_too() -> None:
    """The input's place comes from the template, not from a search for the input's text."""
    pair = PromptTemplate.chat().tokenise(WITHOUT_BOS, "Talk.", "You are a helpful fox", "system")
    start, stop = pair.output_span
    assert text(WITHOUT_BOS, pair.plain_ids[start:stop]) == "system"
    check_invariants(pair)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "needs a tokenizer with one"),
        ("{{ messages | length }}", "write the instruction once, but it wrote it 0 times"),
        (
            "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
            "instruction once, but it wrote it 2 times",
        ),
        ("{{ raise_exception('no messages') }}", "failed on messages of the roles user.*no messages"),
        (
            "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
            "depending on what",
        ),
    ],
)
def test_unfit_chat_templates(template: str | None, match: str) -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.chat_template = template
    with pytest.raises(ThoughtError, match=match):
        PromptTemplate.chat().tokenise(tokenizer, "Talk.", "hot")


# --- the template itself -----------------------------------------------------------------------------------


def test_parse() -> None:
    assert PromptTemplate.parse("chat") == PromptTemplate.chat() == PromptTemplate.chat("{input}", "{instruction}")
    assert PromptTemplate.parse("chat-user") == PromptTemplate.chat("{instruction}\n\n{input}", None)
    assert PromptTemplate.parse("Q: {input}\nA: {output}\n") == QA != PromptTemplate.chat()
    assert PromptTemplate.parse(QA) is QA
    for value in ("chatt", "", None, 3):
        with pytest.raises(ThoughtError, match=r"template: expected 'chat', 'chat-empty', 'chat-user'.*got"):
            PromptTemplate.parse(value)  # type: ignore[arg-type]


def test_stop() -> None:
    assert QA.stop == "\n"
    assert PromptTemplate("{input} = {output}").stop is None
    assert PromptTemplate.chat().stop is None


@pytest.mark.parametrize(
    "template",
    [
        QA,
        PromptTemplate("{input}{output}", separator="##"),
        PromptTemplate.chat(),
        PromptTemplate.parse("chat-user"),
        PromptTemplate.chat(options={"enable_thinking": True}),
    ],
)
def test_dict_round_trip(template: PromptTemplate) -> None:
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"text": "{input}{output}"},
        {"user": "{input}", "text": ""},
        {"user": "{input}", "options": {}},
        {"text": "{input}{output}", "separator": "", "options": {}},
        "chat",
    ],
)
def test_from_dict_rejects_other_keys(values: object) -> None:
    with pytest.raises(ThoughtError, match="expected the keys"):
        PromptTemplate.from_dict(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("A: {output}", "{input} exactly once, got it 0 times"),
        ("{input}", "{output} exactly once, got it 0 times"),
        ("{input} {input} {output}", "{input} exactly once, got it 2 times"),
        ("{input} {output} {output}", "{output} exactly once, got it 2 times"),
        ("{instruction}{instruction}{input}{output}", "{instruction} at most once, got it 2 times"),
        ("{output}{input}", "{output} to be the last field, got {input} after it"),
        ("{input}{output}{instruction}", "{output} to be the last field, got {instruction} after it"),
        (None, "template text: expected a string, got NoneType"),
    ],
)
def test_bad_text_templates(template: str, match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        PromptTemplate(template)


@pytest.mark.parametrize(
    ("user", "system", "match"),
    [
        ("hello", "{instruction}", "{input} exactly once, in the user"),
        ("{input}{input}", "{instruction}", "{input} exactly once, in the user"),
        ("{input}", "{instruction} {input}", "{input} exactly once, in the user"),
        ("{input}", None, "{instruction} exactly once"),
        ("{input} {instruction}", "{instruction}", "{instruction} exactly once"),
        ("{input} {output}", "{instruction}", "no {output}"),
        (3, "{instruction}", "template user: expected a string, got int"),
        (None, "{instruction}", "with a user message"),
    ],
)
def test_bad_chat_templates(user: str, system: str | None, match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        PromptTemplate.chat(user, system)


def test_text_and_messages_exclude_each_other() -> None:
    with pytest.raises(ThoughtError, match=r"PromptTemplate\.chat"):
        PromptTemplate("{input}{output}", user="{input} {instruction}")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"instruction": ""}, "instruction: expected a string that is not blank, got ''"),
        ({"instruction": " \n"}, "instruction: expected a string that is not blank"),
        ({"instruction": None}, "instruction: expected a string, got NoneType"),
        ({"input": ""}, "input: expected a string that is not blank"),
        ({"input": 3}, r"input: expected a string, got int \(3\)"),
        ({"output": 3}, "output: expected a string, got int"),
        ({"tokenizer": SimpleNamespace(is_fast=False)}, "expected a fast tokenizer"),
        ({"tokenizer": "smollm2"}, "expected a fast tokenizer.*got str"),
    ],
)
@pytest.mark.parametrize("template", [QA, PromptTemplate.chat()], ids=["text", "chat"])
def test_bad_arguments(template: PromptTemplate, changes: dict[str, object], match: str) -> None:
    arguments = {"tokenizer": WITHOUT_BOS, "instruction": DEMOS, "input": "hot", "output": "cold", **changes}
    with pytest.raises(ThoughtError, match=match):
        template.tokenise(**arguments)  # type: ignore[arg-type]


def test_check_context() -> None:
    pair = QA.tokenise(WITHOUT_BOS, DEMOS, "hot", "cold")
    chunk, whole = len(WITHOUT_BOS(DEMOS).input_ids), len(pair.instructed_ids)
    check_context(pair, whole, 3)
    with pytest.raises(ThoughtError, match=rf"pairs\[3\].*at most {whole - 1} .*got {whole}, {chunk} of them"):
        check_context(pair, whole - 1, 3)
    with pytest.raises(ThoughtError, match=rf"pairs\[3\].*at most {chunk + 1} "):
        check_context(pair, chunk + 1, 3)
    with pytest.raises(ThoughtError, match=f"^instruction: .* it alone has {chunk};"):
        check_context(pair, chunk, 3)


# --- properties --------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["hot", " hot", "Q: ", "A:", "\n", " ", "pirate", "pi", "rate", "é", "日本", "{input}", "<|e|>"]
)
STRINGS = st.lists(WORDS | st.characters(codec="utf-8"), max_size=6).map("".join)
FILLED = STRINGS.filter(lambda s: bool(s.strip()))


@settings(deadline=None)
@given(instruction=FILLED, query=FILLED, output=st.none() | STRINGS, finished=st.booleans(), bos=st.booleans())
def test_chunk_at_the_start_is_always_removable(
    instruction: str, query: str, output: str | None, finished: bool, bos: bool
) -> None:
    tokenizer = WITH_BOS if bos else WITHOUT_BOS
    pair = QA.tokenise(tokenizer, instruction, query, output, finished)
    plain = f"Q: {query}\nA:"
    if output is not None:
        plain += (" " if output and not output[0].isspace() else "") + output + ("\n" if finished else "")
    assert pair.plain_ids == tuple(tokenizer(plain).input_ids)
    assert pair.exact
    assert pair.sink is not bos
    check_invariants(pair)


@settings(deadline=None)
@given(
    template=st.sampled_from(
        [
            "Fox {instruction} {input} {output}",
            "a pi{instruction}rate {input}: {output}\n",
            "Q: {input}{instruction}\nA: {output}",
            "chat",
            "chat-user",
        ]
    ),
    instruction=FILLED,
    query=FILLED,
    output=STRINGS,
    bos=st.booleans(),
)
def test_any_chunk_is_aligned_or_refused(template: str, instruction: str, query: str, output: str, bos: bool) -> None:
    tokenizer = WITH_BOS if bos else WITHOUT_BOS
    refusal = None
    try:
        pair = PromptTemplate.parse(template).tokenise(tokenizer, instruction, query, output, finished=False)
    except ThoughtError as error:
        refusal = str(error)
    if refusal is not None:
        assert "to be the same in both runs" in refusal
        return
    if template.startswith("chat"):
        plain = render(tokenizer, ("user", query)) + output
        assert pair.plain_ids == tuple(tokenizer(plain, add_special_tokens=False).input_ids)
    else:
        body = template.partition("{output}")[0].replace("{instruction}", "")
        gap = " " if output and not output[0].isspace() else ""
        plain = body.rstrip(" ").replace("{input}", query) + gap + output
        assert pair.plain_ids == tuple(tokenizer(plain).input_ids)
    start, stop = pair.output_span
    assert set(range(start, stop)) <= set(pair.plain_positions)
    check_invariants(pair)


@pytest.mark.parametrize(
    ("template", "output"),
    [
        ("Q: {input}\n{instruction}{output}\n", "cold"),
        ("Q: {input}\n{instruction}{output}\n", None),
        ("{input}. {instruction}{output}", None),
    ],
)
def test_what_predicts_the_output_is_the_same_text_in_both_runs(template: str, output: str | None) -> None:
    """Behind the chunk it would be another token than before it."""
    tokenizer = make_tokenizer()
    with pytest.raises(ThoughtError, match=r"^template: expected text between {instruction} and {output}"):
        PromptTemplate(template).tokenise(tokenizer, "say\n", "hot", output)
    PromptTemplate(template.replace("{output}", "A: {output}")).tokenise(tokenizer, "say\n", "hot", output)


def test_the_plain_run_may_be_the_longer_one() -> None:
    tokenizer = make_tokenizer()
    pair = PromptTemplate().tokenise(tokenizer, "say\n", "hot")
    longer = replace(pair, plain_ids=(*pair.instructed_ids, 5, 6))
    check_context(longer, len(longer.plain_ids), 0)
    with pytest.raises(ThoughtError, match=rf"pairs\[3\]: expected at most .* got {len(longer.plain_ids)}"):
        check_context(longer, len(longer.plain_ids) - 1, 3)
