"""Talking to the three models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fits import TOKENIZER, make_patch, readable
from models import make_model
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.patch.chat import Answer, Answers, Chat, check_chat
from lit_thought.patch.provenance import summands

INSTRUCTION = "You are a pirate. Talk like a pirate."
ASKED = ["What is the capital of France?", "Antonyms of words", "fox"]
RUNS = ("plain", "instructed", "patched")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return readable(make_model())


@pytest.fixture(scope="module")
def patch(model: PreTrainedModel) -> ThoughtPatch:
    return make_patch(model, instruction=INSTRUCTION, template="chat")


@pytest.fixture
def chat(patch: ThoughtPatch, model: PreTrainedModel) -> Iterator[Chat]:
    before = copy.deepcopy(model.state_dict())
    yield patch.chat(model, TOKENIZER, max_new_tokens=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def continued(model: torch.nn.Module, messages: list[dict[str, str]], tokens: int = 8) -> tuple[str, int]:
    """A greedy answer, by whole forward passes over what the chat template writes, and the prompt's tokens."""
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    forbidden = base.generation_config.suppress_tokens
    while len(ids) < start + tokens:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            return TOKENIZER.decode(ids[start:-1]).strip(), start
    return TOKENIZER.decode(ids[start:]).strip(), start


def test_three_turns_are_those_of_transformers_and_peft(chat: Chat, patch: ThoughtPatch, tmp_path: Path) -> None:
    patch.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copy.deepcopy(chat.model), str(tmp_path / "adapter"))
    models = {"plain": chat.model, "instructed": chat.model, "patched": adapted}
    system = [{"role": "system", "content": INSTRUCTION}]
    histories = {run: system[:] if run == "instructed" else [] for run in RUNS}
    texts = set()
    for message in ASKED:
        answers = chat.ask(message)
        for run in RUNS:
            histories[run].append({"role": "user", "content": message})
            wanted = continued(models[run], histories[run])
            got = getattr(answers, run)
            assert (got.text, got.tokens) == wanted
            histories[run].append({"role": "assistant", "content": got.text})
            texts.add((message, got.text))
    assert len(texts) > len(ASKED)  # the three do not say the same
    assert [answers.message for answers in chat.history] == ASKED


def test_what_is_seen_while_it_is_written_grows_into_the_answers(chat: Chat) -> None:
    seen: list[Answers] = []
    answers = chat.ask(ASKED[0], seen.append)
    assert seen[-1] == answers == chat.history[-1]
    for run in RUNS:
        texts = [getattr(one, run).text for one in seen if getattr(one, run) is not None]
        assert len(set(texts)) > 2
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert answers == Chat(chat.patch, chat.model, TOKENIZER, max_new_tokens=8).ask(ASKED[0])


def test_the_scale_is_that_of_the_patch(chat: Chat) -> None:
    chat.scale = 0
    off = chat.ask(ASKED[0])
    assert off.patched == off.plain
    chat.new()
    chat.scale = -1.5
    scaled = chat.ask(ASKED[0])
    with (-1.5 * chat.patch).applied(chat.model):
        assert scaled.patched is not None
        assert scaled.patched.text == continued(chat.model, [{"role": "user", "content": ASKED[0]}])[0]
    assert "patched × -1.5" in str(scaled)
    with pytest.raises(ThoughtError, match="scale must be a number; got 'much'"):
        chat.scale = "much"  # type: ignore[assignment]


def test_a_text_template_has_no_turns(model: PreTrainedModel) -> None:
    chat = make_patch(model).chat(model, TOKENIZER, max_new_tokens=4)
    first = chat.ask("hot")
    chat.ask("big")
    again = chat.ask("hot")
    assert (again.plain, again.instructed, again.patched) == (first.plain, first.instructed, first.patched)


def test_another_instruction_starts_over(chat: Chat) -> None:
    chat.ask(ASKED[0])
    chat.instruction = "Always answer in French."
    assert chat.history == []
    wanted = continued(
        chat.model, [{"role": "system", "content": chat.instruction}, {"role": "user", "content": "fox"}]
    )
    got = chat.ask("fox").instructed
    assert got is not None
    assert (got.text, got.tokens) == wanted
    with pytest.raises(ThoughtError, match="instruction"):
        chat.instruction = "  "
    assert chat.instruction == "Always answer in French."


def test_without_an_instruction_there_are_two_answers(model: PreTrainedModel) -> None:
    patch = make_patch(model, instruction=INSTRUCTION, template="chat", store_instruction=False)
    chat = patch.chat(model, TOKENIZER, max_new_tokens=4)
    answers = chat.ask("fox")
    assert answers.instructed is None
    assert [name for name, _ in answers.columns()] == ["plain", "patched"]
    with pytest.raises(ThoughtError, match="not the one that this adapter was made from"):
        chat.instruction = "You are a parrot."
    chat.instruction = INSTRUCTION
    assert chat.ask("fox").instructed is not None


def test_a_sum_has_its_parts_template(patch: ThoughtPatch, model: PreTrainedModel) -> None:
    answers = (patch + 0.5 * patch).chat(model, TOKENIZER, max_new_tokens=4).ask("fox")
    assert answers.patched is not None
    other = make_patch(model, instruction=INSTRUCTION)
    with pytest.raises(ThoughtError, match="template: the adapter does not say"):
        (patch + other).chat(model, TOKENIZER)


def test_bad_input(chat: Chat) -> None:
    chat.ask("fox")
    for message in ("", " \n", None):
        with pytest.raises(ThoughtError, match="message must be a text"):
            chat.ask(message)  # type: ignore[arg-type]
    with pytest.raises(ThoughtError, match=r"context window of .* Start over \(new\)"):
        chat.ask("fox " * 5000)
    assert len(chat.history) == 1
    with pytest.raises(ThoughtError, match="max_new_tokens must be a whole number"):
        chat.patch.chat(chat.model, TOKENIZER, max_new_tokens=0)  # type: ignore[attr-defined]
    with pytest.raises(PatchError):
        Chat(chat.patch, readable(make_model(seed=5)), TOKENIZER)
    with pytest.raises(ThoughtError, match="instruction must be a text that is not empty"):
        check_chat(chat.patch, " \n", None, 8)  # before a model is loaded for it
    with pytest.raises(ThoughtError, match="instruction must be a text that is not empty; got 5"):
        check_chat(chat.patch, 5, None, 8)  # type: ignore[arg-type]
    chat.scale = 1e39
    seen: list[Answers] = []
    with pytest.raises(PatchError, match=r"NaN|overflow"):
        chat.ask("fox", seen.append)
    assert not seen


def test_the_patched_answers_own_words_are_marked() -> None:
    said = {
        "plain": Answer("Hello [there]", 3, True),
        "instructed": Answer("Ahoy, my <mate>!", 12, True),
        "patched": Answer("Ahoy, old <mate>!", 3, False),
    }
    answers = Answers("Hi & bye", **said)
    page = answers._repr_html_()
    assert "Ahoy, <mark>old </mark>&lt;mate&gt;!" in page
    assert page.count("<mark>") == 1
    assert "Hi &amp; bye" in page
    console = Console(width=80, record=True, force_terminal=True, color_system="standard", file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(answers)
    printed = console.export_text(styles=True)
    assert "[there]" in printed
    assert "\x1b[1;33mold \x1b[0m" in printed
    assert max(map(len, console.export_text(styles=False).splitlines() or [""])) <= 80
    assert str(answers).split("\n\n")[2] == "patched · 3 tokens\nAhoy, old <mate>!"


def test_a_model_that_has_the_patch_is_refused(patch: ThoughtPatch, model: PreTrainedModel) -> None:
    """Its plain answers would be patched ones."""
    chat = patch.chat(model, TOKENIZER, max_new_tokens=3)
    with patch.applied(model):
        for start in (lambda: patch.chat(model, TOKENIZER), lambda: chat.ask("Hello")):
            with pytest.raises(PatchError, match="is applied to the model already"):
                start()
    with pytest.raises(ThoughtError, match="message holds"):
        chat.ask("\ud800 a")


def test_a_truncated_sum_in_a_sum_keeps_what_its_parts_were_made_with(
    patch: ThoughtPatch, model: PreTrainedModel
) -> None:
    total = 0.5 * (patch + 2 * patch).truncate(2) + patch
    assert [part.get("scale", 1.0) for part in summands(total.provenance)] == [0.5, 1.0, 1.0]
    assert total.chat(model, TOKENIZER).template == patch.chat(model, TOKENIZER).template
    assert total.provenance["parts"][0]["truncated"]["rank"] == 2
