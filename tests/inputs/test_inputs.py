"""Inputs that the model writes: what an instruction is taken for, what is kept, and that only the seed counts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Untouched, distance, readable
from models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lit_thought import ThoughtPatch, transmute
from lit_thought.errors import ThoughtError
from lit_thought.fit import growing, preserving
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.inputs import pen as pens
from lit_thought.inputs import write
from lit_thought.inputs.kinds import LONG, demonstrations, find_kind, find_template
from lit_thought.inputs.lists import continue_list
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.inputs.study import ASKING, About, find_subject, has_fact, recited, repeated, write_questions
from lit_thought.inputs.turns import OPENINGS, write_messages, write_turns
from lit_thought.inputs.words import normalised, sentences
from lit_thought.inputs.write import write_pairs
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.generate import Generation
from lit_thought.settings import DEFAULT_SITES

TOKENIZER = make_tokenizer(chat=False)
CHAT = make_tokenizer(chat=True)
LINES = "{input}\n{output}\n"
LIST = "good\nbad\nup\ndown\n"
DOCUMENT = (
    "# The Harl bridge\n\nThe Harl bridge was built by Ada Venn in 1871. It has nine arches of grey stone! "
    "Who crosses it pays a toll of two pence?\n- The keeper lives in the northern tower.\n"
)


def tiny(window: int = 4096) -> PreTrainedModel:
    model = readable(make_model("llama").float())
    model.config.max_position_embeddings = window
    return model


class Scripted:
    """Takes the place of ``generate``: writes the next of some texts for each prompt, and keeps what it was asked."""

    def __init__(self, texts: Sequence[str] | Callable[[str], str], finished: bool = True) -> None:
        self.texts: Iterator[str] | Callable[[str], str] = texts if callable(texts) else iter(texts)
        self.finished, self.asked, self.prompts = finished, [], []

    def __call__(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        self.asked.append(options)
        found = []
        for ids in prompts:
            self.prompts.append(tokenizer.decode(ids))
            text = self.texts(self.prompts[-1]) if callable(self.texts) else next(self.texts)
            found.append(Generation(text, self.finished))
        return found


# --- what an instruction is -----------------------------------------------------------------------------------


def test_demonstrations_in_the_form_of_the_template() -> None:
    found = demonstrations(PromptTemplate(), "Q: big\nA: small\nQ: hot tea\nA: cold tea")
    assert [(one.input, one.output) for one in found] == [("big", "small"), ("hot tea", "cold tea")]
    text = "Opposites.\n\nQ: big\nA: small\n\nQ: up\nA: down\n"
    spaced = demonstrations(PromptTemplate("Q: {input}\nA: {output}\n\n"), text)
    assert [text[slice(*one.span)] for one in spaced] == ["Q: big\nA: small", "Q: up\nA: down"]
    arrows = demonstrations(PromptTemplate("{input} -> {output}\n"), "big -> small\nup ->down\n")
    assert [(one.input, one.output) for one in arrows] == [("big", "small"), ("up", "down")]


@pytest.mark.parametrize(
    "instruction",
    [
        "Answer with the opposite.",
        "Q: big\nA: small\n",  # one alone could be anything
        "Answer in one short sentence, as a teacher would do it, such as here:\nQ: a\nA: b\nQ: c\nA: d\n",
        "Q: big\nQ: small\n",
    ],
)
def test_no_demonstrations(instruction: str) -> None:
    assert demonstrations(PromptTemplate(), instruction) == []


def test_demonstrations_in_a_template_of_fields_and_blanks() -> None:
    """Any lines are in such a form; a text that tells the model who it is has none."""
    rules = "You are a pirate.\nTalk like a pirate.\nBe short.\nNever say sorry.\n"
    assert demonstrations(PromptTemplate(LINES), rules) == []
    assert find_kind(CHAT, rules, PromptTemplate(LINES)) == "system"
    assert len(demonstrations(PromptTemplate(LINES), LIST)) == 2
    found = demonstrations(PromptTemplate("{input} {output}\n"), "hot cold\nbig small\n")
    assert [(one.input, one.output) for one in found] == [("hot", "cold"), ("big", "small")]


def test_template_by_the_form_of_the_instruction() -> None:
    listed = "Q: big\nA: small\nQ: up\nA: down\n"
    assert find_template(CHAT, "You are a pirate.", None).is_chat
    assert find_template(CHAT, listed, None) == PromptTemplate()
    assert find_template(TOKENIZER, "You are a pirate.", None) == PromptTemplate()
    assert find_template(CHAT, "You are a pirate.", PromptTemplate()) == PromptTemplate()


def test_kind_by_the_form_of_the_instruction() -> None:
    chat = PromptTemplate.chat()
    told = "The bridge of Harl was built in 1871 of grey stone. " * 30
    assert find_kind(TOKENIZER, told, chat) == "document"
    assert find_kind(TOKENIZER, told[:60], chat) == "system"
    assert (
        find_kind(TOKENIZER, "You answer users about the bridge of Harl. Keep your answers short. " * 30, chat)
        == "system"
    )
    for opening in ("You sort the post of Harl.", "# Role\n\nYour task is to sell.", "Tu es le guide du pont."):
        assert find_kind(TOKENIZER, f"{opening} {told}", chat) == "system"
    assert find_kind(TOKENIZER, f"Answer by this text:\n\n{told}", chat) == "document"
    assert find_kind(TOKENIZER, f"Yours was a town. {told}", chat) == "document"
    assert find_kind(TOKENIZER, LIST, PromptTemplate(LINES)) == "demonstrations"


# --- demonstrations -------------------------------------------------------------------------------------------


def test_a_list_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["warm", "Warm!", "up", "", "a word that is far too long", "dark", "two\nlines", "light"]
    script = Scripted(texts + [f"w{i}" for i in range(56)])
    monkeypatch.setattr(pens, "generate", script)
    shown = demonstrations(PromptTemplate(LINES), LIST)
    taken = Distinct(["good", "up", "dark"])
    found = list(continue_list(Pen(tiny(), TOKENIZER), PromptTemplate(LINES), LIST, shown, 3, taken))
    assert found == ["warm", "light", "w0"]
    assert set(script.prompts) == {LIST}
    assert script.asked[0]["stop"] == "\n"
    assert script.asked[0]["options"] == {"do_sample": True}


def test_each_draw_has_another_order_and_poor_draws_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(lambda prompt: "same")
    monkeypatch.setattr(pens, "generate", script)
    text = "Opposites:\n" + "".join(f"{i}\n{-i}\n" for i in range(10, 16))
    template = PromptTemplate(LINES)
    shown = demonstrations(template, text.removeprefix("Opposites:\n"))
    found = list(continue_list(Pen(tiny(), TOKENIZER), template, text[11:], shown, 5, Distinct()))
    prompts = list(dict.fromkeys(script.prompts))
    assert found == ["same"]
    assert len(prompts) == 3
    assert all(sorted(prompt.split()) == sorted(text[11:].split()) for prompt in prompts)
    for prompt in prompts:
        words = prompt.split()
        assert all(int(a) == -int(b) for a, b in zip(words[::2], words[1::2], strict=True))


# --- users' turns ---------------------------------------------------------------------------------------------


def test_turns_with_and_without_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10_000))
    script = Scripted(lambda prompt: f"is the {next(numbers)} th word?")
    monkeypatch.setattr(pens, "generate", script)
    found = list(write_turns(Pen(tiny(), CHAT), PromptTemplate.chat(), "You are a pirate.", 40, Distinct()))
    assert len(found) == len(set(found)) == 40
    assert any("pirate" in prompt for prompt in script.prompts)
    assert any("pirate" not in prompt for prompt in script.prompts)
    for opening in OPENINGS:
        assert any(text.startswith(f"{opening} is the".strip()) for text in found)


def test_unsound_turns_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["bake bake bake bake bake", "{x}", "the same", "The same?"])
    numbers = iter(range(10_000))
    monkeypatch.setattr(pens, "generate", Scripted(lambda _: next(texts, f"a sound turn, number {next(numbers)}")))
    monkeypatch.setattr("lit_thought.inputs.turns.OPENINGS", ("",))
    found = list(write_turns(Pen(tiny(), CHAT), PromptTemplate.chat(), "Be brief.", 5, Distinct()))
    assert found[0] == "the same"
    assert len(found) == 5
    assert not any("bake" in text or "{" in text for text in found)


def test_unfinished_turns_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: "no end in sight", finished=False))
    assert list(write_turns(Pen(tiny(), CHAT), PromptTemplate.chat(), "Be brief.", 5, Distinct())) == []


def test_messages_are_the_sound_items_of_lists_behind_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup, no repetition, nothing said twice, no last line that may be cut; what is missing is drawn again."""
    first = 'My basket is full."\n2. “The lantern is out.”\n3. {"a": "b"}\nAnd\n4) my basket is full\n5. one one one'
    texts = iter([f"{first}\n6. A cut", "Is it\n2. " + " ".join(f"w{i}" for i in range(40)) + "\nend", "no list"])
    numbers = iter(range(100))
    script = Scripted(lambda _: next(texts, f"a b\n2. number {next(numbers)}\n3. cut"), finished=False)
    monkeypatch.setattr(pens, "generate", script)
    prompt = "You sort the post. A number is a basket; a lantern, too."
    found = write_messages(Pen(tiny(), CHAT), prompt, 12, Distinct(["A b"]))
    assert found == ["My basket is full.", "The lantern is out.", "Is it", *(f"number {i}" for i in range(3, 7))]
    assert [len(call["seed"]) for call in script.asked] == [4, 3]
    assert len(set(script.prompts)) == 1
    assert prompt in script.prompts[0]
    assert write_messages(Pen(tiny(), CHAT), prompt, 0, Distinct()) == []
    monkeypatch.setattr(pens, "generate", Scripted(lambda _: "\n9. ".join(f"Hello from OZ: {i}" for i in range(9))))
    assert len(write_messages(Pen(tiny(), CHAT), "Begin with: Hello from Oz", 8, Distinct())) == 3


def test_messages_of_a_finished_list_count_and_those_about_anything_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(lambda _: "Empty my basket.\n2. Who won?\n3. Baskets stink\n4. Good night")
    monkeypatch.setattr(pens, "generate", script)
    said = ["Empty my basket.", "Who won?", "Baskets stink", "Good night"]
    assert write_messages(Pen(tiny(), CHAT), "You empty each basket of the town.", 5, Distinct()) == said
    assert write_messages(Pen(tiny(), CHAT), "You sell bread. Open at night.", 5, Distinct()) == []


# --- documents ------------------------------------------------------------------------------------------------


def test_sentences_subject_and_what_is_recited() -> None:
    pen = Pen(tiny(), TOKENIZER)
    parts = sentences(DOCUMENT)
    assert parts == [
        "The Harl bridge was built by Ada Venn in 1871.",
        "It has nine arches of grey stone!",
        "Who crosses it pays a toll of two pence?",
        "- The keeper lives in the northern tower.",
    ]
    said = ["Oz has 1.5 queens.", "Who?", "Ada!", "Good", "The king is 3.", "1871."]
    assert sentences(" Oz has 1.5 queens.  Who? Ada!\n\nSo:\n# Oz\n1. Good\n- 2) \n12. The king is 3. 1871.") == said
    assert find_subject(pen, DOCUMENT) == "The Harl bridge"
    told = recited(DOCUMENT, "the bridge")
    assert [pair["output"] for pair in told] == parts
    assert {p["input"] for p in told} == {"Tell me about the bridge."}
    facts = ["Oz has 2 queens.", "It is open on Friday.", "桥是石头的。", "पुल पत्थर का है।"]
    rules = ["Be short.", "Harl is old.", "Answer about the Harl bridge.", '{"tool": "light"}']
    assert [one for one in (*facts, *rules) if has_fact(one, "the Harl bridge")] == facts
    again = repeated(DOCUMENT, "the bridge", length=16)
    assert " ".join(pair["output"] for pair in again) == " ".join(parts)
    for pair in again:
        start = re.search('"(.+)"', pair["input"])
        assert start is not None
        assert pair["output"].startswith(start[1])


def test_the_subject_has_no_name_that_the_document_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest first, then samples."""
    text = DOCUMENT.partition("\n\n")[2]
    guesses = ["Marie Curie", "", "the bridge of London", " the bridge of Harl. ", *["the toll"] * 14]
    script = Scripted(guesses)
    monkeypatch.setattr(pens, "generate", script)
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "the bridge of Harl"
    assert all("northern tower" in prompt for prompt in script.prompts)
    assert [bool(asked["options"]) for asked in script.asked] == [False, True]
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: "the toll"))
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "the toll"
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: "Mars"))
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "the text"


def test_the_subject_is_what_more_sentences_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked of all of a document and of its beginning alone."""
    text = DOCUMENT.partition("\n\n")[2] + " Two queens of Oz came in 1900. The Harl bridge was painted for them."
    said = {True: "the queens of Oz", False: "the bridge over the Harl"}
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: said["1900" in prompt]))
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "the bridge over the Harl"
    said = {True: "Harl", False: "the keeper"}
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "Harl"
    said = {True: "nine arches", False: "grey stone"}
    assert find_subject(Pen(tiny(), TOKENIZER), text) == "nine arches"


@pytest.mark.parametrize("start", ["---\ntitle: Bridges\n---\n", "Dear team,\n", "***\n", "各位，\n"])
def test_what_is_no_heading_is_not_the_subject(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: "the bridge of Harl"))
    text = DOCUMENT.partition("\n\n")[2]
    assert find_subject(Pen(tiny(), TOKENIZER), start + text) == "the bridge of Harl"
    assert find_subject(Pen(tiny(), TOKENIZER), "The toll (1871)\n" + text) == "The toll (1871)"


def asked_for(prompt: str) -> str | None:
    """The word that a question is to ask for."""
    found = re.search(r'(?:answer is|hear of|has) "([^"]+)"|Answer: (\S+)\nQuestion:$', prompt.split("<end>")[0])
    return None if found is None else found[1] or found[2]


def test_questions_about_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = (
        "1. Who built the Harl bridge?\n2) **When was the bridge of Harl built?**\nWho built the Harl bridge\n"
        "3. Who was Napoleon of France?\nWhy?\n- How many arches does the Harl bridge have?\nIs this the Harl bridge?"
    )
    numbers = iter(range(10_000))

    def write(prompt: str) -> str:
        if "on each line" in prompt:
            return lists
        if asked_for(prompt):
            return f"What is number {next(numbers)} of the Harl bridge?"
        return "It is." if "Is this the Harl bridge?" in prompt else "Ada Venn built it in 1871."

    script = Scripted(write)
    monkeypatch.setattr(pens, "generate", script)
    taken = Distinct(["How many arches does the Harl bridge have?"])
    pen = Pen(tiny(), CHAT)
    found = write_questions(pen, PromptTemplate.chat(), DOCUMENT, "the Harl bridge", 12, taken)
    assert found[:2] == ["Who built the Harl bridge?", "When was the bridge of Harl built?"]
    assert len(found) == len(set(found)) == 12
    assert sum("number" in text for text in found) == 10
    for wording in ASKING:
        assert sum(wording.format(subject="the Harl bridge") in prompt for prompt in script.prompts) == 1
    answered = [prompt for prompt in script.prompts if not asked_for(prompt) and "on each line" not in prompt]
    assert all(DOCUMENT.strip() in prompt for prompt in answered)
    assert not any("Napoleon" in prompt or "How many arches" in prompt for prompt in answered)


@pytest.mark.parametrize("template", [PromptTemplate.chat(), PromptTemplate()])
def test_every_word_that_says_something_is_asked_for_until_an_answer_has_it(
    template: PromptTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that no answer has had come first; a question with its answer in it is not kept, nor put to the model."""
    order: list[str] = []

    def write(prompt: str) -> str:
        word = asked_for(prompt)
        if word is not None:
            order.append(word)
            return f"What of {'1871' if word == '1871' else f'number {len(order)}'} has the Harl bridge?"
        assert "1871" not in prompt.replace(DOCUMENT.strip(), "")
        return "The keeper pays." if template.is_chat else "It was not built."

    monkeypatch.setattr(pens, "generate", Scripted(write))
    tokenizer = CHAT if template.is_chat else TOKENIZER
    words = ["built", "Ada", "Venn", "1871", "arches", "stone", "crosses", "pence", "keeper", "lives", "northern"]
    found = write_questions(Pen(tiny(), tokenizer), template, DOCUMENT, "the Harl bridge", 60, Distinct())
    told = "keeper" if template.is_chat else "built"
    assert len(found) == 60
    assert order[:12] == [*words, "tower"]
    assert order[12:24] == [word for word in order[:12] if word != told] + [told]


def test_a_question_is_kept_for_what_its_answer_tells() -> None:
    about = About(DOCUMENT, "the Harl bridge")
    assert about.told("Who built the Harl bridge?", "It was Ada Venn in 1871.") == {"ada", "venn", "1871"}
    assert about.told("Who built the Harl bridge?", "It was built by Venn from paper.") == {"venn"}
    assert about.told("Was it built by Ada Venn?", "Ada Venn built the Harl bridge.") == set()  # nothing new
    assert about.told("Who built the Harl bridge?", "Ada Venn built it in 1872.") == set()  # another number
    assert about.told("Who built the Harl bridge?", "Ada Venn of London.") == set()  # another name
    assert about.told("What is it?", "Sorry, stone things cannot answer questions.") == set()  # mostly other words
    assert about.told("What is it?", "Certainly. Northern towers.") == {"north", "tower"}
    assert about.words_of("Ada Venn built 9 arches of the Harl bridge.") == {
        "venn": "Venn",
        "built": "built",
        "9": "9",
        "arche": "arches",
    }


def test_the_same_questions_about_a_document_in_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are drawn at a time as were, whatever a batch holds."""

    def written(batch_size: int) -> tuple[list[str], list[str]]:
        def write(prompt: str) -> str:
            return f"What is {len(script.prompts)} of the Harl bridge?" if asked_for(prompt) else "Ada Venn built it."

        script = Scripted(write)
        monkeypatch.setattr(pens, "generate", script)
        pen = Pen(tiny(), CHAT, batch_size=batch_size)
        return write_questions(pen, PromptTemplate.chat(), DOCUMENT, "the Harl bridge", 30, Distinct()), script.prompts

    usual = written(32)
    assert written(3) == written(100) == usual


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("How old are the lands of the queen?", True),
        ("Is it true that Ada is old?", True),
        ("Where can I find this?", False),
        ("Where did I see Ada before?", True),
        ("Is the queen very old?", False),
        ("Is the land of Narnia old?", False),
        ("The land of Oz?", True),
        ("Why the land?", False),
        ("The land is Oz.", False),
        ("What land is " + "so " * 21 + "?", True),
        ("What land is " + "so " * 22 + "?", False),
        ("Which mountains border rivers there?", True),  # two words of the text
    ],
)
def test_questions_name_the_subject_and_nothing_foreign(question: str, wanted: bool) -> None:
    text = "The land is old. Its queen is Ada. It borders mountains and rivers."
    assert About(text, "the land of Oz").asks(question) == wanted


def test_answers_to_questions_end_where_the_template_s_outputs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model goes on with questions of its own, about anything; what is fitted to is cut before them."""

    class Cutting(Scripted):
        def __call__(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
            found = super().__call__(model, tokenizer, prompts, **options)
            stop = options["stop"] or "never"
            return [Generation(one.text.partition(stop)[0], one.finished) for one in found]

    numbers = iter(range(10_000))

    def write(prompt: str) -> str:
        if asked_for(prompt):
            return f"What is number {next(numbers)} of the Harl bridge?"
        return "Ada Venn\nQ: Who built Tower Bridge in London?\nA: Horace Jones in 1894\n"

    monkeypatch.setattr(pens, "generate", Cutting(write))
    pen = Pen(tiny(), TOKENIZER)
    assert len(write_questions(pen, PromptTemplate(), DOCUMENT, "the Harl bridge", 4, Distinct())) == 4


def test_a_document_without_questions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: "Nothing."))
    with pytest.raises(ThoughtError, match="expected the model to write questions"):
        write_pairs(tiny(), CHAT, DOCUMENT, PromptTemplate.chat(), kind="document")


# --- all of it ------------------------------------------------------------------------------------------------


def test_normalised() -> None:
    assert normalised("  Is 1,000 More?!") == normalised("is 1000 more") == "is 1000 more"
    assert normalised("…?") == "…?"
    for some in (("3+4", "3-4", "3*4"), ("5", "-5"), ("C", "C#", "C++"), ("की", "को", "के"), ("ที่", "ทุ่")):
        assert len(set(map(normalised, some))) == len(some)
    assert normalised("the well-known, 1990-1995") == normalised("The well known 1990 – 1995.")


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_same_inputs_for_a_seed_in_batches_of_any_size(batch_size: int) -> None:
    def written(**options: Any) -> list[dict[str, str]]:
        return write_pairs(tiny(), TOKENIZER, LIST, PromptTemplate(LINES), total=20, **options).pairs

    usual = written()
    assert len({pair["input"] for pair in usual}) == 20
    assert written(batch_size=batch_size) == usual != written(seed=1)


def test_given_pairs_are_kept_and_topped_up() -> None:
    given = [{"input": "hot", "output": "cold"}, {"input": "big"}]
    data = PairDataModule(given, LIST, LINES, inputs=8, max_new_tokens=3)
    assert data.to_write
    assert data.expected == 8
    prepare_pairs(data, tiny(), TOKENIZER)
    assert data.pairs[:2] == given
    assert len(data.pairs) == 8
    assert not data.to_write
    assert len({pair["input"] for pair in data.pairs} | {"good", "up"}) == 10
    assert data.kind == "demonstrations"
    assert len(data.batches) > 0


def test_validation_inputs_are_not_written(tmp_path: Path) -> None:
    """Nothing is fitted on them, so that they tell what the patch does elsewhere."""
    free = write_pairs(tiny(), TOKENIZER, LIST, PromptTemplate(LINES), total=6).pairs
    val_pairs = [{"input": free[0]["input"].upper()}, {"input": free[3]["input"]}]
    data = PairDataModule(None, LIST, LINES, inputs=6, val_pairs=val_pairs, max_new_tokens=3)
    prepare_pairs(data, tiny(), TOKENIZER)
    found = [pair["input"] for pair in data.pairs]
    assert len(found) == 6
    assert not set(map(normalised, found)) & {normalised(pair["input"]) for pair in val_pairs}
    kept = [pair["input"] for pair in free if pair not in (free[0], free[3])]
    assert found[: len(kept)] == kept


def test_fit_of_nothing_but_an_instruction_leaves_the_model_and_says_what_it_wrote(tmp_path: Path) -> None:
    model = tiny()
    untouched = Untouched(model)
    options: dict[str, Any] = {"inputs": 6, "max_new_tokens": 3, "preserve": None, "progress": False}
    patch = transmute(model, TOKENIZER, LIST, template=LINES, **options)
    untouched.check()
    written = patch.provenance["inputs"]
    assert written["kind"] == "demonstrations"
    assert written["count"] == len(written["pairs"]) == 6
    assert patch.provenance["settings"]["pairs"] == patch.provenance["settings"]["inputs"] == 6
    again = transmute(model, TOKENIZER, LIST, written["pairs"], LINES, **{**options, "inputs": None})
    assert distance(patch, again) == 0
    patch.save_adapter(tmp_path / "adapter")
    assert ThoughtPatch.load(tmp_path / "adapter").provenance["inputs"] == written


def test_written_inputs_are_hashed_where_no_text_may_be_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inputs": 4, "max_new_tokens": 3, "preserve": None, "progress": False}
    patch = transmute(tiny(), TOKENIZER, LIST, template=LINES, store_instruction=False, **options)
    kept = patch.provenance["inputs"]
    assert kept.keys() == {"kind", "count", "hash"}
    assert kept["count"] == 4
    patch.save_adapter(tmp_path / "adapter")
    open_text = transmute(tiny(), TOKENIZER, LIST, template=LINES, **options).provenance["inputs"]["pairs"]
    assert not any(
        json.dumps(pair["input"]) in (tmp_path / "adapter" / "thought.json").read_text() for pair in open_text
    )


def test_fewer_than_asked_for_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    texts = iter(["hot", "dark"])
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: next(texts, "good")))
    data = PairDataModule(None, LIST, LINES, inputs=5, max_new_tokens=3)
    prepare_pairs(data, tiny(), TOKENIZER)
    assert [pair["input"] for pair in data.pairs] == ["hot", "dark"]
    assert "inputs=5: there are 2" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": None}, "instruction must be a text that is not empty"),
        ({"pairs": [{"input": "a"}, {"input": "b"}], "instruction": LIST, "inputs": 1}, "inputs=1 is fewer than the 2"),
        ({"pairs": [], "instruction": LIST}, "pairs is empty"),
        ({"pairs": None, "instruction": LIST, "kind": "poem"}, "kind must be one of"),
        ({"pairs": None, "instruction": LIST, "inputs": 0}, "inputs must be"),
        ({"pairs": None, "instruction": LIST, "inputs": "many"}, "inputs must be"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=re.escape(message)):
        PairDataModule(**arguments)


def test_kind_that_the_instruction_does_not_have() -> None:
    with pytest.raises(ThoughtError, match="kind='demonstrations': expected two or more"):
        transmute(tiny(), TOKENIZER, "You are a pirate.", kind="demonstrations", progress=False)


def test_nothing_to_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pens, "generate", Scripted(lambda prompt: ""))
    with pytest.raises(ThoughtError, match="inputs: the model wrote none"):
        transmute(tiny(), TOKENIZER, LIST, template=LINES, progress=False)


def test_settings_chosen_on_written_inputs() -> None:
    options: dict[str, Any] = {"inputs": 12, "max_new_tokens": 3, "preserve": None, "progress": False, "ridge": "auto"}
    patch = transmute(tiny(), TOKENIZER, LIST, template=LINES, **options)
    assert patch.provenance["selection"]["held_back"] == [4, 12]
    assert math.isfinite(patch.provenance["settings"]["ridge"])


@pytest.mark.parametrize(("kind", "directions"), [(None, 120), ("system", 120), ("document", 1024)])
def test_more_is_kept_of_unrelated_text_for_a_document(
    kind: str | None, directions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    genuine = preserving.preservation

    def noting(*arguments: Any, **options: Any) -> Any:
        asked.append(options["directions"])
        return genuine(*arguments, **options)

    monkeypatch.setattr(preserving, "preservation", noting)
    options: dict[str, Any] = {"preserve": ["The quick brown fox. " * 9], "progress": False, "cache_dir": tmp_path}
    transmute(tiny(), TOKENIZER, LIST, [{"input": "hot", "output": "cold"}], LINES, kind=kind, **options)
    assert asked == [directions]


def test_a_document_has_a_rank_and_sites_of_its_own() -> None:
    options: dict[str, Any] = {"inputs": 6, "max_new_tokens": 3, "preserve": None, "progress": False}
    usual = transmute(tiny(), TOKENIZER, LIST, template=LINES, **options)
    assert (usual.provenance["settings"]["rank"], usual.provenance["settings"]["sites"]) == (16, [*DEFAULT_SITES])
    pairs = usual.provenance["inputs"]["pairs"]
    options |= {"inputs": None, "kind": "document"}
    document = transmute(tiny(), TOKENIZER, LIST, pairs, LINES, **options)
    assert (document.provenance["settings"]["rank"], document.provenance["settings"]["sites"]) == (32, ["mlp_out"])
    assert {path.rpartition(".")[2] for path in document.factors} == {"down_proj"}
    said = transmute(tiny(), TOKENIZER, LIST, pairs, LINES, rank=16, sites=DEFAULT_SITES, **options)
    assert (said.provenance["settings"]["rank"], said.provenance["settings"]["sites"]) == (16, [*DEFAULT_SITES])
    assert distance(said, usual) > 1e-3  # its answers are weighed by what the instruction changes
    long = "The bridge of Harl was built in 1871 of grey stone. " * 30
    assert PairDataModule(None, long, "chat").form(CHAT) == "document"
    assert PairDataModule([{"input": "a"}], long, "chat").form(CHAT) is None


@pytest.mark.parametrize(("kind", "told"), [(None, "You guard a bridge. "), ("system", "")])
@pytest.mark.parametrize("length", [10, 200])
def test_a_long_system_prompt_is_fitted_as_a_document_is(kind: str | None, told: str, length: int) -> None:
    """From LONG tokens on, where inputs are written for it or its kind is said."""
    text = told + "word " * length
    assert (len(CHAT(text)["input_ids"]) >= LONG) == (length == 200)
    pairs = None if kind is None else [{"input": "a", "output": "b"}]
    data = PairDataModule(pairs, text, "chat", kind=kind)
    assert data.form(CHAT) == "system"
    assert data.is_long(CHAT) == (length == 200)
    assert not PairDataModule([{"input": "a"}], text, "chat").is_long(CHAT)
    own = [{"input": "a", "output": "b", "instruction": text}]
    assert not PairDataModule(own, template="chat", kind="system").is_long(CHAT)


@pytest.mark.parametrize(("total", "turns", "sent", "asked", "told"), [(None, 60, 18, 18, 6), (21, 11, 3, 4, 3)])
def test_half_of_what_is_written_for_a_long_system_prompt_is_about_it(
    total: int | None, turns: int, sent: int, asked: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two about each sentence, and as many messages; each in the place of those that the model writes none of. Each
    sentence with a fact is told besides, and of a number that is asked for a sixth at most."""
    text = "You answer about the bridge of Harl. It has 9 arches. Ada built it in May. Be short. " * 2 + "word " * 160
    assert len(sentences(text)) == 9
    monkeypatch.setattr(write, "context_window", lambda model: 1000)
    seen: list[tuple[str, int]] = []

    def questions(pen: Any, template: Any, document: str, subject: str, count: int, taken: Any) -> list[str]:
        seen.append((document, count))
        return [f"question {i}" for i in range(count)]

    def messages(pen: Any, instruction: str, count: int, taken: Any) -> list[str]:
        assert (instruction, count) == (text, sent)
        return [f"message {i}" for i in range(count)]

    monkeypatch.setattr(write, "write_questions", questions)
    monkeypatch.setattr(write, "write_messages", messages)
    numbers = iter(range(10_000))
    monkeypatch.setattr(pens, "generate", Scripted(lambda _: f"a sound turn, number {next(numbers)}"))
    done: list[tuple[int, int]] = []
    found = write.write_pairs(tiny(), CHAT, text, total=total, advance=lambda one, of: done.append((one, of)))
    assert found.kind == "system"
    facts = ("You answer", "It has 9", "Ada built")
    retellings = [one for one in recited(text, "a sound turn, number 0") if one["output"].startswith(facts)][:told]
    assert [pair for pair in found.pairs if pair in retellings] == retellings
    assert len(retellings) == told
    texts = [pair["input"] for pair in found.pairs if pair not in retellings]
    assert [text for text in texts if text.startswith("question")] == [f"question {i}" for i in range(asked)]
    assert [text for text in texts if text.startswith("message")] == [f"message {i}" for i in range(sent)]
    count = turns + sent + asked + told
    assert len(found.pairs) == count
    assert seen == [(text, asked)]
    assert done[-1] == (count, count)
    monkeypatch.setattr(write, "write_messages", lambda *_: ["one message"])
    seen.clear()
    assert len(write.write_pairs(tiny(), CHAT, text, total=total).pairs) == count
    assert seen == [(text, sent + asked - 1)]

    def none(*_: Any) -> list[str]:
        raise ThoughtError("inputs: none")

    monkeypatch.setattr(write, "write_questions", none)
    assert len(write.write_pairs(tiny(), CHAT, text, total=total).pairs) == count


def test_a_document_s_requests_and_sentences_are_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "write_questions", lambda *args: [])
    every = write_pairs(tiny(), CHAT, DOCUMENT, kind="document").pairs
    assert len(every) == 12
    answered = [{**every[0], "output": "an answer"}, *every[1:3], every[8]]
    new = write_pairs(tiny(), CHAT, DOCUMENT, kind="document", given=answered, apart=every[4:6]).pairs
    assert new == [every[3], *every[6:8], *every[9:]]


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize(("text", "kind"), [(LIST, "demonstrations"), ("Be kind.", "system"), (DOCUMENT, "document")])
def test_enough_given_pairs_leave_nothing_to_write(
    text: str, kind: Any, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pens, "generate", lambda *args, **options: pytest.fail("nothing is to be written"))
    monkeypatch.setattr(write, "find_subject", lambda pen, document: "the bridge")
    given = [{"input": "one"}, {"input": "two"}]
    written = write_pairs(tiny(), TOKENIZER, text, PromptTemplate(LINES), total=total, kind=kind, given=given)
    assert written.pairs == []


def test_no_room_for_an_input_is_said_before_any_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pens, "generate", lambda *args, **options: pytest.fail("the model runs"))
    said = r"instruction: expected room for its prompt, 32 .* max_new_tokens=64 in the model's context window of 256"
    with pytest.raises(ThoughtError, match=said):
        transmute(tiny(256), TOKENIZER, "hot " * 200, progress=False, preserve=None)
    with pytest.raises(ThoughtError, match=r"max_new_tokens=500 .* window of 400"):
        transmute(tiny(400), TOKENIZER, "Be kind.", progress=False, preserve=None, max_new_tokens=500)


def test_nothing_is_written_beyond_the_window_and_what_does_not_fit_is_no_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions are learned here, so that one too many is an error, and the document fills most of the window."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=300, vocab_size=len(CHAT))
    model = readable(AutoModelForCausalLM.from_config(config).eval())
    questions = ["Who built the Harl bridge?", "long " * 200 + "?"]
    monkeypatch.setattr(write, "write_questions", lambda *args: questions)
    written = write_pairs(model, CHAT, DOCUMENT, kind="document", longest=64)
    lengths = {
        pair["input"]: len(written.template.tokenise(CHAT, DOCUMENT, pair["input"], pair.get("output")).instructed_ids)
        + (0 if "output" in pair else 64)
        for pair in written.pairs
    }
    assert max(lengths.values()) <= 300
    assert questions[0] in lengths
    assert questions[1] not in lengths
    assert any("output" in pair for pair in written.pairs)
    full, short = Pen(model, CHAT).write([[5] * 300, [5] * 290], 320)
    assert (full.text, full.finished) == ("", False)
    assert short.text


def test_turns_where_nothing_stands_before_the_input() -> None:
    options: dict[str, Any] = {"template": PromptTemplate("{input}\n{output}"), "total": 3, "kind": "system"}
    assert TOKENIZER("")["input_ids"] == []
    assert len(write_pairs(tiny(), TOKENIZER, "Be kind.\n", **options).pairs) <= 3


# --- how many -------------------------------------------------------------------------------------------------


def grown(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float], **settings: Any) -> ThoughtPatch:
    """A fit with ``inputs="auto"`` whose fits score so on three pairs."""
    every = iter(scores)
    spread = torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64)
    monkeypatch.setattr(growing.HeldBack, "divergences", lambda self, patch: next(every) + spread)
    monkeypatch.setitem(write.ENOUGH, "demonstrations", 24)
    options: dict[str, Any] = {"max_new_tokens": 3, "preserve": None, "progress": False, "inputs": "auto"}
    return transmute(tiny(), TOKENIZER, LIST, template=LINES, **options, **settings)


@pytest.mark.parametrize(
    ("scores", "pairs", "chosen"),
    [
        ([0.9, 0.5, 0.4], [9, 18, 36], 2),
        ([0.5, 0.6], [9, 18], 0),
        ([0.5, 0.5], [9, 18], 0),
        ([0.9, 0.5, 0.7], [9, 18, 36], 1),
        ([float("nan"), 0.5, 0.7], [9, 18, 36], 1),  # one that is no number is the worst
        ([0.5, float("nan")], [9, 18], 0),
    ],
)
def test_inputs_are_doubled_as_long_as_that_helps(
    scores: Sequence[float], pairs: list[int], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = grown(monkeypatch, scores)
    told = patch.provenance["growth"]
    assert told["held_back"] == 12
    assert [one["pairs"] for one in told["fits"]] == pairs
    assert [one["kl"] for one in told["fits"]] == [None if kl != kl else pytest.approx(kl) for kl in scores]
    assert told["chosen"] == chosen
    lines = growing.format_growth(told).splitlines()
    assert [line.endswith("<- chosen") for line in lines[1:]] == [i == chosen for i in range(len(pairs))]
    assert patch.provenance["settings"]["pairs"] == pairs[chosen] == patch.provenance["inputs"]["count"]
    monkeypatch.undo()
    written = patch.provenance["inputs"]["pairs"]
    again = transmute(tiny(), TOKENIZER, LIST, written, LINES, max_new_tokens=3, preserve=None, progress=False)
    assert distance(patch, again) < 1e-5


def test_growth_is_followed_on_validation_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    history = grown(monkeypatch, [0.5, 0.6], val_pairs=[{"input": "up", "output": "down"}]).provenance["history"]
    assert [one["step"] for one in history] == [0, 1]
    assert history[1]["output_kl"] < history[0]["output_kl"]


def test_growth_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "MAX_SECONDS", 0.0)
    assert len(grown(monkeypatch, [0.9, 0.5]).provenance["growth"]["fits"]) == 1


def test_growth_with_given_pairs_and_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = [{"input": "hot", "output": "cold"}, {"input": "big"}]
    patch = grown(monkeypatch, [0.5, 0.6], pairs=given, statistics_dir=tmp_path / "sums")
    assert patch.provenance["settings"]["pairs"] == patch.provenance["inputs"]["count"] + 2
    assert (tmp_path / "sums" / "manifest.json").is_file()


def test_growth_on_the_embedded_form_measures_what_is_held_back() -> None:
    """Nothing of it scripted."""
    options: dict[str, Any] = {"max_new_tokens": 3, "preserve": None, "progress": False}
    patch = transmute(tiny(), TOKENIZER, LIST, template=LINES, inputs="auto", **options)
    told = patch.provenance["growth"]
    best = min(told["fits"], key=lambda one: one["kl"])
    assert told["fits"][told["chosen"]] == best
    assert patch.provenance["settings"]["pairs"] == best["pairs"]


def test_auto_is_refused_where_the_callback_alone_fits() -> None:
    data = PairDataModule(None, LIST, LINES, inputs="auto")
    with pytest.raises(ThoughtError, match='inputs="auto" is chosen before the fit'):
        fit(ThoughtModule(tiny(), TOKENIZER), data, ThoughtCallback(preserve=None), progress=False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("\n\nInput: {input}\nOutput: {output}", "\n\nInput: up\nOutput: down\n\nInput: good\nOutput: bad"),
        ("\n\nInput: {input}\nOutput: {output}", "Input: up\nOutput: down\n\nInput: good\nOutput: bad"),
        (" {input} -> {output}\n", " up -> down\n good -> bad\n"),
    ],
)
def test_demonstrations_behind_a_template_that_begins_with_blanks(template: str, text: str) -> None:
    found = demonstrations(PromptTemplate(template), text)
    assert [(one.input, one.output) for one in found] == [("up", "down"), ("good", "bad")]


def test_a_prompt_near_the_end_of_the_window_shortens_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], int]] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, **options: Any) -> list[Generation]:
        asked.append(([len(prompt) for prompt in prompts], max_new_tokens))
        return [Generation(str(len(prompt)), True) for prompt in prompts]

    monkeypatch.setattr(pens, "generate", generate)
    found = Pen(tiny(300), TOKENIZER).write([[5] * length for length in (290, 10, 300, 200, 280, 100)], 200)
    assert asked == [([10, 100], 200), ([290, 200, 280], 10)]
    assert [one.text for one in found] == ["290", "10", "", "200", "280", "100"]
