"""PairDataModule: what it checks, what it prepares, and what the batches hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_family
from fits import INSTRUCTION, PAIRS, readable
from models import make_model, make_tokenizer

from lit_thought import transmute
from lit_thought.errors import ThoughtError
from lit_thought.fit import preparing
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.preparing import prepare_pairs, write_outputs
from lit_thought.model.loading import context_window
from lit_thought.prompts.pairs import pair_instructions
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.generate import Generation

TOKENIZER = make_tokenizer()


def length(text: str) -> int:
    return len(TOKENIZER(text)["input_ids"])


def words(count: int) -> str:
    """A text of exactly ``count`` tokens, which nothing merges with."""
    text = " big" * count
    assert length(text) == count
    return text


def window(size: int) -> Any:
    model = make_model()
    model.config.max_position_embeddings = size
    return model


def test_context_window() -> None:
    assert context_window(make_model("llama")) == context_window(make_model("gpt2")) == 256
    mpt = make_family("mpt")
    assert context_window(mpt) == mpt.config.max_seq_len < 10**6  # which has a name of its own for it


def test_pair_overflows_the_context_window() -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "big", "output": "small" * 9}]
    data = PairDataModule(pairs, INSTRUCTION)
    longest = length(f"{INSTRUCTION}Q: big\nA: {pairs[1]['output']}\n")
    data.tokenise(TOKENIZER, longest)
    with pytest.raises(ThoughtError, match=rf"pairs\[1\]: expected at most {longest - 1} tokens .*got {longest}, "):
        data.tokenise(TOKENIZER, longest - 1)


def test_room_for_the_output_counts() -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "hot"}]
    data = PairDataModule(pairs, INSTRUCTION, max_new_tokens=50)
    prompt = length(f"{INSTRUCTION}Q: hot\nA:")
    data.tokenise(TOKENIZER, prompt + 50)
    with pytest.raises(ThoughtError, match=rf"pairs\[1\]: expected at most {prompt + 49} .* and max_new_tokens=50,"):
        data.tokenise(TOKENIZER, prompt + 49)
    PairDataModule(pairs[:1], INSTRUCTION, max_new_tokens=50).tokenise(TOKENIZER, prompt + 49)


def test_instruction_alone_overflows() -> None:
    data = PairDataModule(PAIRS, words(60))
    with pytest.raises(ThoughtError, match=r"instruction: .*context window of 50 tokens, but it alone has 6"):
        data.tokenise(TOKENIZER, 50)
    with pytest.raises(ThoughtError, match=r"pairs\[0\]"):
        data.tokenise(TOKENIZER, 65)  # it fits, but not with a query


def test_an_output_that_comes_out_too_long_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that was decoded and is tokenised again may be longer than what was written."""
    model = window(60)
    monkeypatch.setattr(preparing, "generate", lambda m, t, prompts, **_: [Generation("cold " * 70, True)])
    data = PairDataModule([{"input": "hot"}], "bad\n", max_new_tokens=2)
    with pytest.raises(ThoughtError, match=r"pairs\[0\]: expected at most 60"):
        prepare_pairs(data, readable(model), TOKENIZER)


def test_instructions() -> None:
    pairs = [{"input": "hot"}, {"input": "big", "instruction": "its own"}]
    assert pair_instructions(pairs, "common") == ["common", "its own"]
    with pytest.raises(ThoughtError, match="instruction must be a text that is not empty; pair 0 has None"):
        pair_instructions(pairs, None)
    with pytest.raises(ThoughtError, match="pair 0 has ' '"):
        PairDataModule(pairs, " ")
    data = PairDataModule(pairs[1:])
    assert data.instructions == ["its own"]
    assert data.instruction is None


def test_batches_hold_every_compared_token_once() -> None:
    pairs = [*PAIRS, {"input": "dog", "output": "fox", "instruction": "Talk like a pirate.\n"}]
    data = PairDataModule(pairs, INSTRUCTION, batch_size=2, answer_weight=3.0)
    with pytest.raises(ThoughtError, match="no batches yet"):
        data.train_dataloader()
    prepare_pairs(data, make_model(), TOKENIZER)
    assert data.outputs == [pair["output"] for pair in pairs]
    for pair, tokens in zip(pairs, data.tokenised, strict=True):
        chunk = pair.get("instruction", INSTRUCTION)
        assert tokens == PromptTemplate().tokenise(TOKENIZER, chunk, pair["input"], pair["output"])
    total = 0.0
    for tokens in data.tokenised:
        start, stop = tokens.output_span
        total += len(tokens.plain_ids) + 2.0 * (stop - start + 1)
    found = sum(float(batch.weights.sum()) for batch in data.batches)
    assert found == pytest.approx(total)
    for batch in data.batches:
        if batch.plain is not None:
            mine = batch.plain.ids.flatten()[batch.plain_rows]
            assert torch.equal(mine, batch.target.ids.flatten()[batch.target_rows])
    first, second = (list(data.train_dataloader()) for _ in range(2))
    assert [batch.index for batch in first] == [batch.index for batch in second] == list(range(len(data.batches)))
    assert all(batch.lead is None or batch.lead < batch.index for batch in first)
    elsewhere = torch.device("meta")  # where Lightning would move every batch in every epoch
    assert all(data.transfer_batch_to_device(batch, elsewhere, 0) is batch for batch in [*first, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more; got 0"),
        ({"batch_size": 2.0}, "batch_size must"),
        ({"batch_size": True}, "batch_size must"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more; got 0"),
        ({"max_new_tokens": "64"}, "max_new_tokens must"),
        ({"answer_weight": 0}, "answer_weight must be a finite number above 0; got 0"),
        ({"answer_weight": -1.0}, "answer_weight must"),
        ({"answer_weight": float("nan")}, "answer_weight must"),
        ({"answer_weight": float("inf")}, "answer_weight must"),
        ({"answer_weight": "5"}, "answer_weight must"),
        ({"template": "chatty"}, "template: expected"),
        ({"template": "{input}"}, r"template: expected the field \{output\}"),
        ({"generate": {"stopping_criteria": TOKENIZER}}, "generate must hold JSON values"),
        ({"generate": {"temperature": float("nan")}}, "generate must hold JSON values"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        PairDataModule(PAIRS, INSTRUCTION, **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tempratur": 1.0}, "generate: .*tempratur"),
        ({"do_sample": True, "num_return_sequences": 2}, "generate: 'num_return_sequences' is not supported"),
        ({"num_beams": 4}, "generate: 'num_beams' is not supported"),
        ({"return_dict_in_generate": True}, "generate: .*return_dict_in_generate"),
    ],
)
def test_bad_options_of_generate(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        PairDataModule([{"input": "hot"}, {"input": "big"}], INSTRUCTION, generate=options, max_new_tokens=3)


def test_a_bad_value_of_an_option_is_refused_before_any_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing.PreservationSource, "load", lambda *_: pytest.fail("preserves already"))
    with pytest.raises(ThoughtError, match=r"generate: model.generate refused .*'top_p': 7"):
        transmute(make_model(), TOKENIZER, INSTRUCTION, [{"input": "hot"}], generate={"do_sample": True, "top_p": 7})


@pytest.mark.parametrize(
    ("instruction", "template", "chats", "said"),
    [
        ("Jump.", None, True, True),
        ("Jump.", "chat", True, False),
        ("Jump.", "Q: {input}\nA: {output}\n", True, False),
        ("Jump.", None, False, False),
        (INSTRUCTION, None, True, False),  # a list in the default template's form
    ],
)
def test_that_pairs_without_a_template_make_no_chats_is_said(
    instruction: str, template: str | None, chats: bool, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(chat=chats)
    transmute(make_model(), tokenizer, instruction, PAIRS[:2], template, preserve=None, max_new_tokens=2)
    assert ("The template is 'Q: {input}\\nA: {output}\\n', since pairs are given" in caplog.text) == said
    own = [{**pair, "instruction": instruction} for pair in PAIRS[:2]]
    assert bool(PairDataModule(own, None, template).is_no_chat(tokenizer)) == said
    assert PairDataModule(None, "Jump.").is_no_chat(tokenizer) == ""


def test_a_chunk_whose_tokens_are_not_saved_is_said() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|s|>You are a fox, quick and brown.<|e|>{% endif %}"
        "{% for message in messages %}<|s|>{{ message.content }}<|e|>{% endfor %}<|s|>"
    )
    data = PairDataModule([{"input": "hot"}], "Jump.", "chat")
    data.tokenise(tokenizer, 256)
    assert "prompts have" in data.saves_nothing()
    assert "the template chat-empty" in data.saves_nothing()
    for template in ("chat-empty", "Q: {input}\nA: {output}\n"):
        data = PairDataModule([{"input": "hot"}], "Jump.", template)
        data.tokenise(tokenizer, 256)
        assert data.saves_nothing() == ""


@pytest.mark.parametrize("way", ["fit", "auto"])
def test_pairs_that_do_not_fit_are_refused_before_inputs_are_written(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = readable(make_model())
    monkeypatch.setattr("lit_thought.fit.preparing.write_pairs", lambda *args, **options: pytest.fail("it wrote"))
    long = [{"input": "hot " * 5000, "output": "cold"}]
    inputs: Any = 12 if way == "fit" else "auto"
    with pytest.raises(ThoughtError, match=r"^pairs\[0\]: expected at most"):
        transmute(model, TOKENIZER, INSTRUCTION, long, "Q: {input}\nA: {output}\n", inputs=inputs, progress=False)
    with pytest.raises(ThoughtError, match=r"^val_pairs: .*\[0\]: expected at most|^val_pairs: "):
        transmute(model, TOKENIZER, INSTRUCTION, val_pairs=long, inputs=inputs, progress=False)


def test_equal_prompts_are_sampled_alike_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process writes its share, and how often a prompt came before counts all of them."""
    model = readable(make_model())

    def written(shares: int) -> list[str]:
        found: dict[int, str] = {}
        for own in range(shares):
            data = PairDataModule([{"input": "hot"}] * 4, INSTRUCTION, generate={"do_sample": True}, max_new_tokens=8)
            data.tokenise(TOKENIZER, 1000)
            monkeypatch.setattr("lit_thought.fit.preparing.share", lambda items, own=own: items[own::shares])
            found |= {i: text for i, text, _ in write_outputs(data, model, TOKENIZER)}
        return [found[i] for i in range(4)]

    alone = written(1)
    assert len(set(alone)) > 1
    assert written(2) == written(4) == alone
