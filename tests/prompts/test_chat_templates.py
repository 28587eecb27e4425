"""The chunk in the chat templates of the common families (``tests/chat_templates``).

The fixtures are reductions written for these tests, with the behaviour of the originals where it matters here: what
becomes of a system message, of thoughts and of whitespace, what is dated, and what ends a turn.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import CORPUS, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lit_thought.errors import ThoughtError
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.template import PromptTemplate

TALK = "Talk like a pirate."
CHAT = PromptTemplate.chat()
THINKING = PromptTemplate.chat(options={"enable_thinking": True})
TEMPLATES = Path(__file__).parents[1] / "chat_templates"


@dataclass(frozen=True)
class Family:
    """What a family's template writes.

    Attributes:
        special: its special tokens.
        end: what ends the assistant's turn.
        chunk: what the instructed run has in the place of ``default``.
        default: what the plain run has instead of ``chunk``.
        opening: what comes between the generation prompt and a given answer.
        bos: the token the template calls ``bos_token``.
        eos: the token the template calls ``eos_token``.
        words: added tokens that are not special.
    """

    special: str
    end: str
    chunk: str = TALK
    default: str = ""
    opening: str = ""
    bos: str = "<s>"
    eos: str = "</s>"
    words: str = ""


CHATML = {"special": "<|im_start|> <|im_end|>", "end": "<|im_end|>", "eos": "<|im_end|>"}
IM_CHUNK = f"<|im_start|>system\n{TALK}<|im_end|>\n"
GEMMA = {"special": "<bos> <start_of_turn> <end_of_turn>", "end": "<end_of_turn>", "bos": "<bos>"}
PHI = {"special": "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>", "end": "<|end|>", "eos": "<|endoftext|>"}
GLM = {"special": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|endoftext|>", "eos": "<|endoftext|>"}
MISTRAL = "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
FAMILIES = {
    "chatml": Family(**CHATML, chunk=IM_CHUNK),
    "smollm2": Family(**CHATML, default="You are SmolLM, a helpful assistant"),
    "qwen2.5": Family(**CHATML, default="You are Qwen. You help."),
    "qwen3": Family(**CHATML, chunk=IM_CHUNK, words="<think> </think>"),
    "smollm3": Family(**CHATML, default="You are SmolLM.", words="<think> </think>"),
    "gemma2": Family(**GEMMA, chunk=f"{TALK}\n\n"),
    "gemma3": Family(**GEMMA, chunk=f"{TALK}\n\n"),
    "llama3": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "mistral-v3": Family(MISTRAL, "</s>", chunk=f" {TALK}\n\n", opening=" "),
    "mistral-v7": Family(MISTRAL, "</s>", default="You are Mistral. Today is 2025-05-01."),
    "phi3": Family(**PHI, chunk=f"<|system|>\n{TALK}<|end|>\n"),
    "phi4-mini": Family(**PHI, chunk=f"<|system|>{TALK}<|end|>"),
    "olmo2": Family(
        "<|endoftext|>",
        "<|endoftext|>",
        chunk=f"<|system|>\n{TALK}\n",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "granite3": Family(
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        "<|end_of_text|>",
        default="Knowledge Cutoff: 2024. Today: May 01, 2025. You are Granite.",
        eos="<|end_of_text|>",
    ),
    "gpt-oss": Family(
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        "<|return|>",
        chunk=f"<|end|><|start|>developer<|message|># Instructions\n\n{TALK}\n\n",
        opening="<|channel|>final<|message|>",
        eos="<|return|>",
    ),
    "deepseek-r1-distill": Family(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        opening="\n</think>\n\n",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        words="<think> </think>",
    ),
    "glm4": Family(**GLM, end="<|user|>", chunk=f"<|system|>\n{TALK}", opening="\n"),
    "glm4.5": Family(**GLM, end="<|user|>", chunk=f"<|system|>\n{TALK}", opening="\n", words="<think> </think>"),
    "command-r": Family(
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        chunk=f"<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{TALK}<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "zephyr": Family("</s>", "</s>", chunk=f"<|system|>\n{TALK}</s>\n"),
    "falcon-instruct": Family("<|endoftext|>", "<|endoftext|>", opening=" ", eos="<|endoftext|>"),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)
THINKERS = pytest.mark.parametrize("name", ["qwen3", "smollm3", "glm4.5"])


class Clock(datetime.datetime):
    """A clock whose days are those of ``days``, one for each time it is read."""

    days: Any = itertools.repeat(1)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime(2025, 5, next(cls.days))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "days", itertools.repeat(1))
    return Clock


def family_tokenizer(name: str, base: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    family, tokenizer = FAMILIES[name], base or make_tokenizer(chat=False)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in family.special.split()])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in family.words.split()])
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str], **options: Any) -> str:
    """The tokenizer's own text; a generation prompt follows a last turn of the user."""
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"enable_thinking": False, "add_generation_prompt": turns[-1][0] == "user"} | options
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def text(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def completion(tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, output: str, finished: bool = True) -> str:
    """What follows the generation prompt in the plain run."""
    prompt = text(tokenizer, template.tokenise(tokenizer, TALK, "up").plain_ids)
    whole = text(tokenizer, template.tokenise(tokenizer, TALK, "up", output, finished).plain_ids)
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


def unmatched(pair: TokenisedPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the plain and of the instructed run that have no counterpart."""
    shift = len(pair.instructed_ids) - len(pair.plain_ids)
    plain = {*pair.plain_positions} | ({0} if pair.sink else set())
    instructed = {*pair.instructed_positions} | ({shift} if pair.sink else set())
    return (
        tuple(token for i, token in enumerate(pair.plain_ids) if i not in plain),
        tuple(token for i, token in enumerate(pair.instructed_ids) if i not in instructed),
    )


# --- every family ------------------------------------------------------------------------------------------


@EVERY
def test_the_plain_run_is_what_a_user_sends(name: str) -> None:
    tokenizer = family_tokenizer(name)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hot fox"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert list(CHAT.tokenise(tokenizer, TALK, "hot fox").plain_ids) == own


@EVERY
def test_the_instructed_run_is_the_familys_own_with_a_system_message(name: str) -> None:
    """But for Mistral v3, where the space before the question stays in its token, so that the chunk has its own."""
    tokenizer = family_tokenizer(name)
    turns = [("system", TALK), ("user", "hot fox")] if name != "gemma2" else [("user", f"{TALK}\n\nhot fox")]
    own = rendered(tokenizer, *turns)
    if name == "mistral-v3":
        own = own.replace("\n\nhot", "\n\n hot")
    instructed = text(tokenizer, CHAT.tokenise(tokenizer, TALK, "hot fox").instructed_ids)
    assert instructed == own
    assert instructed.count(TALK) == 1


@EVERY
@pytest.mark.parametrize("output", [None, "cold"])
def test_only_the_chunk_differs(name: str, output: str | None) -> None:
    tokenizer, family = family_tokenizer(name), FAMILIES[name]
    pair = CHAT.tokenise(tokenizer, TALK, "hot fox", output)
    assert [pair.plain_ids[p] for p in pair.plain_positions] == [
        pair.instructed_ids[q] for q in pair.instructed_positions
    ]
    missing, chunk = unmatched(pair)
    assert text(tokenizer, missing) == family.default
    assert text(tokenizer, chunk) == family.chunk
    assert pair.exact is (not family.default)
    assert pair.sink is (pair.plain_positions[0] == 1)
    assert pair.sink is (pair.exact and pair.instructed_ids[: len(chunk)] == chunk)


@EVERY
def test_the_completion_stands_where_the_model_writes_it(name: str) -> None:
    tokenizer, family = family_tokenizer(name), FAMILIES[name]
    assert completion(tokenizer, CHAT, "cold") == f"{family.opening}cold{family.end}"
    pair = CHAT.tokenise(tokenizer, TALK, "hot fox", "cold")
    start, stop = pair.output_span
    assert text(tokenizer, pair.plain_ids[start:stop]).strip() == "cold"
    assert {*range(start, len(pair.plain_ids))} <= {*pair.plain_positions}
    assert text(tokenizer, pair.instructed_ids).endswith(f"{family.opening}cold{family.end}")
    if name != "deepseek-r1-distill":  # whose own rendering has lost the thought
        body = text(tokenizer, pair.plain_ids).removesuffix(family.end)
        whole = rendered(tokenizer, ("user", "hot fox"), ("assistant", "cold"))
        assert whole.startswith(body)
        assert whole == body or whole[len(body) :].startswith(family.end)


@EVERY
def test_the_end_of_turn_is_one_token_and_only_after_a_finished_output(name: str) -> None:
    tokenizer = family_tokenizer(name)
    finished = CHAT.tokenise(tokenizer, TALK, "up", "\n\ncold")
    cut = CHAT.tokenise(tokenizer, TALK, "up", "\n\ncold", finished=False)
    assert finished.plain_ids[-1] == tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    if FAMILIES[name].opening.strip() == "":
        assert finished.plain_ids[:-1] == cut.plain_ids


@EVERY
@pytest.mark.parametrize("template", ["chat", "chat-user"])
def test_whitespace_and_other_languages_align(name: str, template: str) -> None:
    tokenizer = family_tokenizer(name)
    for instruction, query in [("  Réponds.\n\nToujours. ", "日本 fox\n"), ("{input}", "<think> {instruction}")]:
        pair = PromptTemplate.parse(template).tokenise(tokenizer, instruction, query, " cold ")
        own = rendered(tokenizer, ("user", query))
        assert text(tokenizer, pair.plain_ids).startswith(own)
        assert [pair.plain_ids[p] for p in pair.plain_positions] == [
            pair.instructed_ids[q] for q in pair.instructed_positions
        ]
        assert instruction.split()[-1] in text(tokenizer, unmatched(pair)[1])


# --- families without a system role ------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", ""])
def test_without_a_place_for_it_the_system_message_goes_to_the_user(start: str) -> None:
    """Whether the template refuses the system message or leaves it out."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = start + "{% for m in messages if m.role == 'user' %}U: {{ m.content }}\n{% endfor %}A:"
    assert CHAT.tokenise(tokenizer, TALK, "up") == PromptTemplate.parse("chat-user").tokenise(tokenizer, TALK, "up")
    pair = PromptTemplate.chat(system="Be a fox. {instruction}").tokenise(tokenizer, TALK, "up")
    assert text(tokenizer, pair.plain_ids) == "U: Be a fox.\n\nup\nA:"
    assert text(tokenizer, pair.instructed_ids) == f"U: Be a fox. {TALK}\n\nup\nA:"
    fixed = PromptTemplate.chat("{input} {instruction}", "Be a fox.").tokenise(tokenizer, TALK, "up")
    assert text(tokenizer, fixed.plain_ids) == "U: Be a fox.\n\nup\nA:"


def test_a_system_message_beside_the_chunk_does_not_hide_the_answers_header() -> None:
    """Mistral v3 writes the system message only where the user's message is the last."""
    tokenizer = family_tokenizer("mistral-v3")
    template = PromptTemplate.chat(system="Be a fox. {instruction}")
    assert completion(tokenizer, template, "cold") == " cold</s>"


def test_mistral_with_a_tokenizer_that_keeps_spaces_in_front_of_words() -> None:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = sorted(set("".join(CORPUS)))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS * 4, trainer)
    base = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = family_tokenizer("mistral-v3", base)
    pair = CHAT.tokenise(tokenizer, TALK, "fox", "cold")
    missing, chunk = unmatched(pair)
    assert pair.exact
    assert missing == ()
    assert tokenizer.decode(chunk).strip() == TALK


# --- thoughts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"), [("smollm2", "<|im_start|>system\n<|im_end|>\n"), ("gemma2", "<bos><start_of_turn>user\n")]
)
def test_an_empty_system_message_in_the_place_of_the_familys_own(name: str, start: str) -> None:
    tokenizer, template = family_tokenizer(name), PromptTemplate.parse("chat-empty")
    pair = template.tokenise(tokenizer, TALK, "hot", "cold")
    assert tokenizer.decode(pair.plain_ids).startswith(start)
    assert pair.exact
    assert TALK in tokenizer.decode(pair.instructed_ids)
    assert pair.instructed_ids == CHAT.tokenise(tokenizer, TALK, "hot", "cold").instructed_ids
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template != CHAT
    with pytest.raises(ThoughtError, match="default_system: expected true or false"):
        PromptTemplate.chat(default_system="no")  # type: ignore[arg-type]


@THINKERS
def test_thinking_is_off_unless_asked_for(name: str) -> None:
    tokenizer = family_tokenizer(name)
    off, on = (text(tokenizer, t.tokenise(tokenizer, TALK, "up").plain_ids) for t in (CHAT, THINKING))
    assert off == rendered(tokenizer, ("user", "up"), enable_thinking=False)
    assert on == rendered(tokenizer, ("user", "up"), enable_thinking=True)
    assert off.rstrip().endswith("</think>")
    assert "</think>" not in on
    explicit = PromptTemplate.chat(options={"enable_thinking": False})
    assert explicit.tokenise(tokenizer, TALK, "up") == CHAT.tokenise(tokenizer, TALK, "up")


@pytest.mark.parametrize(("name", "empty"), [("qwen3", "<think>\n\n</think>\n\n"), ("glm4.5", "\n<think></think>\n")])
def test_an_answer_without_a_thought_gets_the_familys_empty_one(name: str, empty: str) -> None:
    tokenizer = family_tokenizer(name)
    assert completion(tokenizer, THINKING, "cold") == f"{empty}cold{FAMILIES[name].end}"
    whole = text(tokenizer, THINKING.tokenise(tokenizer, TALK, "up", "cold", finished=True).plain_ids)
    own = rendered(tokenizer, ("user", "up"), ("assistant", "cold"), enable_thinking=True)
    assert own.startswith(whole.removesuffix(FAMILIES[name].end))


@THINKERS
def test_thoughts_of_the_output_stay_as_the_model_wrote_them(name: str) -> None:
    tokenizer = family_tokenizer(name)
    thought = "<think>\nHot.\n</think>\n\ncold"
    gap = FAMILIES[name].opening
    assert completion(tokenizer, THINKING, thought) == gap + thought + FAMILIES[name].end
    assert completion(tokenizer, THINKING, "<think>\nHot", finished=False) == gap + "<think>\nHot"


def test_a_thought_that_the_generation_prompt_opens() -> None:
    tokenizer = family_tokenizer("deepseek-r1-distill")
    end = FAMILIES["deepseek-r1-distill"].end
    assert completion(tokenizer, CHAT, "Hot.\n</think>\n\ncold") == f"Hot.\n</think>\n\ncold{end}"
    assert completion(tokenizer, CHAT, "Hot", finished=False) == "Hot"
    assert completion(tokenizer, CHAT, "") == end


def test_channels_of_the_output_stay_as_the_model_wrote_them() -> None:
    tokenizer = family_tokenizer("gpt-oss")
    output = "<|channel|>analysis<|message|>Hot.<|end|><|start|>assistant<|channel|>final<|message|>cold"
    assert completion(tokenizer, CHAT, output) == output + "<|return|>"


ANALYSIS = "<|channel|>analysis<|message|>Hot.<|end|><|start|>assistant<|channel|>final<|message|>cold"


@EVERY
def test_outputs_end_with_the_chat_templates_turn(name: str) -> None:
    """A base model's own end of text is another. Where channels are named, more than answers end by that token."""
    tokenizer, family = family_tokenizer(name), FAMILIES[name]
    names_channels = bool(family.opening.strip())
    wanted = [] if names_channels else [tokenizer.convert_tokens_to_ids(family.end)]
    assert CHAT.ending(tokenizer) == {"stop": None, "ends": wanted, "keep_special": True}
    assert PromptTemplate().ending(tokenizer) == {"stop": "\n", "ends": [], "keep_special": False}


@pytest.mark.parametrize(
    ("name", "template", "output", "answer"),
    [
        ("gpt-oss", CHAT, ANALYSIS, "cold"),
        ("gpt-oss", CHAT, "<|channel|>final<|message|>cold", "cold"),
        ("deepseek-r1-distill", CHAT, "Hot.\n</think>\n\ncold", "cold"),
        ("qwen3", THINKING, "<think>\nHot.\n</think>\n\ncold", "cold"),
        ("gpt-oss", CHAT, "<|channel|>analysis<|message|>Hot is", ""),  # which breaks off
        ("gpt-oss", CHAT, "cold", "cold"),
        ("deepseek-r1-distill", CHAT, "Hot is", ""),
        ("qwen3", THINKING, "<think>\nHot is", ""),
        ("qwen3", THINKING, "cold", "cold"),
        ("llama3", CHAT, "a </think> b", "a </think> b"),
        ("qwen3", CHAT, " cold\n", " cold\n"),
        ("qwen3", PromptTemplate(), "<think>\n</think>cold", "<think>\n</think>cold"),
    ],
)
def test_an_answer_is_what_follows_thoughts_and_channels(
    name: str, template: PromptTemplate, output: str, answer: str
) -> None:
    assert template.chat_form(family_tokenizer(name)).answer(output) == answer


@EVERY
def test_a_conversation_goes_on_after_what_the_model_wrote(name: str) -> None:
    """As the family's own chat template writes the plain answer, whatever came before that."""
    tokenizer = family_tokenizer(name)
    written = {"gpt-oss": ANALYSIS, "deepseek-r1-distill": "Hot.\n</think>\n\ncold"}.get(name, "cold")
    found = text(tokenizer, CHAT.conversation(tokenizer, None, [("up", written)], "big"))
    assert found == rendered(tokenizer, ("user", "up"), ("assistant", "cold"), ("user", "big"))


@pytest.mark.parametrize("name", ["gemma2", "mistral-v3", "llama3"])
def test_what_is_fixed_in_the_system_message_is_said_once(name: str) -> None:
    template = PromptTemplate.chat(system="Be a fox. {instruction}")
    tokenizer = family_tokenizer(name)
    for instruction in (TALK, None):
        found = text(
            tokenizer, template.conversation(tokenizer, instruction, [("up", "down"), ("big", "small")], "hot")
        )
        assert found.count("Be a fox.") == 1
        assert found.count(TALK) == (instruction is not None)


# --- dates and other arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "granite3", "gpt-oss", "smollm3", "mistral-v7"])
@pytest.mark.parametrize("renderings", range(1, 10))
def test_midnight_between_two_renderings(name: str, renderings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family_tokenizer(name)
    monkeypatch.setattr(Clock, "days", itertools.chain([1] * renderings, itertools.repeat(2)))
    pair = CHAT.tokenise(tokenizer, TALK, "up", "down")
    monkeypatch.setattr(Clock, "days", itertools.repeat(2))
    second = CHAT.tokenise(tokenizer, TALK, "up", "down")
    monkeypatch.setattr(Clock, "days", itertools.repeat(1))
    assert pair in (CHAT.tokenise(tokenizer, TALK, "up", "down"), second)


def test_a_template_that_never_writes_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "days", itertools.cycle(range(1, 30)))
    with pytest.raises(ThoughtError, match="something else each time"):
        CHAT.tokenise(family_tokenizer("llama3"), TALK, "up")


def test_options_reach_the_chat_template() -> None:
    llama, harmony = family_tokenizer("llama3"), family_tokenizer("gpt-oss")
    dated = PromptTemplate.chat(options={"date_string": "4 Jul 2030"})
    low = PromptTemplate.chat(options={"reasoning_effort": "low"})
    for ids in (dated.tokenise(llama, TALK, "up").plain_ids, dated.tokenise(llama, TALK, "up").instructed_ids):
        assert "4 Jul 2030" in text(llama, ids)
    assert "Reasoning: low" in text(harmony, low.tokenise(harmony, TALK, "up").plain_ids)


def test_options_are_part_of_the_template() -> None:
    options = {"enable_thinking": True, "documents": [{"title": "a"}]}
    template = PromptTemplate.chat(options=options)
    assert template != CHAT
    assert template == PromptTemplate.chat(options=dict(options))
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert PromptTemplate.from_dict({"user": "{input}", "system": "{instruction}"}) == CHAT
    assert hash(template) == hash(PromptTemplate.chat(options=options))
    assert copy.deepcopy(template) == template
    options["documents"][0]["title"] = "b"  # type: ignore[index]
    assert template.options["documents"] == [{"title": "a"}]
    assert CHAT.to_dict() == {"user": "{input}", "system": "{instruction}", "options": {}}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("enable_thinking", "a mapping of argument names"),
        ({1: True}, "a mapping of argument names"),
        ({"date": datetime.date(2025, 5, 1)}, "JSON values only"),
        ({"x": float("nan")}, "JSON values only"),
        ({"x": {1: 2}}, "JSON values only"),
        ({"tokenize": True}, "'tokenize', which PromptTemplate sets"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which PromptTemplate sets"),
    ],
)
def test_bad_options(options: Any, match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        PromptTemplate.chat(options=options)


def test_options_are_for_chat_templates_only() -> None:
    with pytest.raises(ThoughtError, match="either a text or chat messages"):
        PromptTemplate(options={"enable_thinking": True})


# --- what cannot be aligned --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "match"),
    [
        ("Use /think.", "changes the text around the instruction"),
        ("/no_think", "leaves out '/no_think'"),
    ],
)
def test_instructions_that_are_commands_to_the_template(instruction: str, match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        CHAT.tokenise(family_tokenizer("smollm3"), instruction, "up")


def test_failures_name_the_roles_and_the_arguments() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(ThoughtError, match=r"roles user, .*'enable_thinking': False.*not today"):
        CHAT.tokenise(tokenizer, TALK, "up")
