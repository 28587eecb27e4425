"""Texts to leave alone: where they come from, and how they are cut."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from models import CORPUS, make_tokenizer
from transformers.utils import chat_template_utils

from lit_thought.errors import ThoughtError
from lit_thought.inputs.words import normalised
from lit_thought.prompts.unrelated import chat_windows, load_texts, text_windows

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
RECIPE_DATA = Path(__file__).parents[2] / "recipes" / "data"

TEXTS = ["The quick brown fox jumps over the lazy dog; what is the capital?", CORPUS[0], "Talk like a pirate."]


def bare(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_default_texts_do_not_overlap() -> None:
    kept, judged = (
        " ".join(" ".join(load_texts("default", part, "preserve")).split()) for part in ("preserve", "evaluate")
    )
    assert min(len(kept), len(judged)) > 20_000
    shingles = {kept[i : i + 40] for i in range(len(kept) - 39)}
    assert not any(judged[i : i + 40] in shingles for i in range(len(judged) - 39))


def test_sources(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_text("Où est le renard?\n", encoding="utf-8")
    for source in (file, str(file)):
        assert load_texts(source, "evaluate", "unrelated") == ["Où est le renard?\n"]
    assert load_texts(TEXTS, "evaluate", "unrelated") == TEXTS
    assert load_texts(tuple(TEXTS), "preserve", "preserve") == TEXTS


@pytest.mark.parametrize("argument", ["preserve", "unrelated"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.txt", "='nothing.txt' cannot be read as a UTF-8 text file"),
        ("latin.txt", "='latin.txt' cannot be read as a UTF-8 text file"),
        (".", "='.' cannot be read"),
        ("blank.txt", " must hold one or more texts"),
        ([], " must hold one or more texts"),
        (["fox", " \n"], " must hold one or more texts"),
        (["fox", 5], " must hold one or more texts"),
        (5, " must be a text file, a list of texts"),
        ({"text": "fox"}, " must be a text file, a list of texts"),
    ],
)
def test_bad_sources(source: Any, message: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Où".encode("latin-1"))
    Path("blank.txt").write_text(" \n")
    with pytest.raises(ThoughtError) as raised:
        load_texts(source, "preserve", argument)
    assert str(raised.value).startswith(argument + message)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 3, 7, 1000])
def test_windows_cover_each_text_and_never_cross_two(bos: bool, length: int) -> None:
    tokenizer = make_tokenizer(bos=bos)
    windows = text_windows(tokenizer, TEXTS, length)
    opening = [tokenizer.bos_token_id] * bos
    rest = list(windows)
    for text in TEXTS:
        ids = bare(tokenizer, text)
        while len(opening + ids) > 1 and ids:  # what is left of one token is too little to learn from
            window = rest.pop(0)
            assert window == [*opening, *ids[: length - len(opening)]]
            ids = ids[length - len(opening) :]
    assert not rest


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("most", [2, 9, 20, 21])
def test_max_tokens_bounds_all_windows_together(bos: bool, most: int) -> None:
    tokenizer = make_tokenizer(bos=bos)
    every, some = text_windows(tokenizer, TEXTS, 6), text_windows(tokenizer, TEXTS, 6, most)
    assert most - 1 <= sum(map(len, some)) <= most  # one token alone is no window
    places = [next(i for i, window in enumerate(every) if window[: len(own)] == own) for own in some]
    assert places == sorted(set(places))
    assert all(every[i] == own for i, own in list(zip(places, some, strict=True))[:-1])
    gaps = [after - before for before, after in pairwise(places)]
    assert min(gaps, default=len(every)) >= len(every) // (len(some) + 2)  # spread over the texts, not their beginning
    assert text_windows(tokenizer, TEXTS, 6, 10_000) == every


def test_too_little_text() -> None:
    with pytest.raises(ThoughtError, match="no window of two tokens"):
        text_windows(make_tokenizer(), ["a", "b"], 8)
    assert text_windows(make_tokenizer(bos=True), ["a"], 8) == [[0, *bare(make_tokenizer(), "a")]]


CHATS = json.loads(files("lit_thought.prompts").joinpath("text", "chats.json").read_text(encoding="utf-8"))


class LaterDay(datetime.datetime):
    """A clock of another day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime(2031, 3, 4)


def messages(chat: dict[str, str]) -> list[dict[str, str]]:
    said = [("system", chat.get("system")), ("user", chat["input"]), ("assistant", chat["output"])]
    return [{"role": role, "content": text} for role, text in said if text is not None]


@pytest.mark.parametrize(("length", "most"), [(1000, None), (40, None), (1000, 700)])
def test_chats_are_what_the_chat_template_writes(length: int, most: int | None) -> None:
    tokenizer = make_tokenizer()
    windows = chat_windows(tokenizer, length, most)
    texts = [tokenizer.apply_chat_template(messages(chat), tokenize=False) for chat in CHATS]
    whole = [bare(tokenizer, text)[:length] for text in texts]
    if most is None:
        assert windows == whole
    else:
        assert most - 1 <= sum(map(len, windows)) <= most
        assert all(window in whole for window in windows[:-1])


@pytest.mark.parametrize("name", ["llama3", "granite3", "gpt-oss", "gemma2", "qwen3"])
def test_chats_do_not_change_with_the_day(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    before = chat_windows(tokenizer, 1000)
    assert len(before) == len(CHATS)
    assert all(chat["output"] in tokenizer.decode(ids) for chat, ids in zip(CHATS, before, strict=True))
    assert all(chat.get("system", "") in tokenizer.decode(ids) for chat, ids in zip(CHATS, before, strict=True))
    monkeypatch.setattr(chat_template_utils, "datetime", LaterDay)
    assert chat_windows(tokenizer, 1000) == before


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", {"tool_use": "{{ messages }}"}])
def test_no_chats_without_a_chat_template(template: Any) -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.chat_template = template
    assert chat_windows(tokenizer, 100) == []


def test_chats_hold_nothing_that_the_recipes_test_with() -> None:
    asked = {normalised(text) for chat in CHATS for text in (chat["input"], chat.get("system")) if text}
    assert len(asked) > len(CHATS)
    found = [*RECIPE_DATA.rglob("*.json")]
    assert len(found) > 20
    tested = {normalised(text) for file in found for text in strings(json.loads(file.read_text(encoding="utf-8")))}
    assert not asked & tested


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\ufeffIt rained.", encoding="utf-8")
    assert load_texts(tmp_path / "text.txt", "preserve", "preserve") == ["It rained."]
