"""What the studies make into weights: its data, its rules, and how a case is tested and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_thought.errors import ThoughtError
from lit_thought.inputs.words import normalised
from recipes.chunks import documents, rules
from recipes.chunks.cases import Case, case_of, document_case, known_chunks, message_case, right
from recipes.chunks.documents import load_document
from recipes.chunks.rules import contains
from recipes.chunks.system_prompts import FOLDER, instructions_known, split
from recipes.harness import SIX_TASKS


def test_questions_are_distinct_and_splits_share_none() -> None:
    general, cooking = (
        [pair["input"] for pair in json.loads((FOLDER / f"{name}.json").read_text())]
        for name in ("questions", "cooking")
    )
    assert len(set(general) | set(cooking)) == len(general) + len(cooking) >= 120
    fit, test = split(general, cooking, 80, 30, 0)
    assert (len(fit), len(test)) == (80, 30)
    assert not set(fit) & set(test)
    assert len(set(fit)) == 80
    assert len(set(test) & set(cooking)) == 15
    assert len(set(fit) & set(cooking)) == 25
    assert split(general, [], 80, 30, 0) != split(general, [], 80, 30, 1)


def test_every_instruction_but_two_has_a_rule() -> None:
    known = instructions_known()
    assert len(known) == len(json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))) >= 6
    assert set(known) - set(rules.RULES) == {"poet", "wizard"}


def test_every_instruction_has_two_other_wordings() -> None:
    for entry in instructions_known().values():
        assert len({entry["instruction"], *entry["reworded"]}) == 3, entry["name"]


@pytest.mark.parametrize(
    ("rule", "follows", "breaks"),
    [
        (
            rules.talks_like_a_pirate,
            ["Arrr, that be so", "Aye!", "Ye must sail the seven seas", "As a pirate, I know"],
            ["The army has a mat.", "A cunning queen", "Yes, you are mated"],
        ),
        (
            rules.is_french,
            ["La capitale de l'Australie est Canberra.", "Le chat est sur la table et il dort dans un lit."],
            ["The capital of Australia is Canberra.", "", "En route to the city of La Paz, the train is on time."],
        ),
        (
            rules.is_one_sentence,
            ["Canberra is the capital.", "It is 3.5 metres long!", 'He said: "Go."', "  Why not?  "],
            ["Yes. It is.", "It is the capital of", "", "It is! Really", "One. Two"],
        ),
        (
            rules.is_archaic,
            ["What sayest thou?", "’Tis a lake", "It hath thee."],
            ["They art-direct", "The thyme", "It is a lake."],
        ),
        (
            rules.is_json_object,
            ['{"answer": "Canberra"}', " {} "],
            ['["a"]', '{"a": ', 'Sure: {"a": 1}', "Canberra", "3"],
        ),
        (
            rules.is_json_so_far,
            ['{"answer": "Canberra"}', '{"answer": "Canberra is', '{"a": [{"b": 1', '{"a": ', '{"a": "b", "c'],
            ['["a"]', 'Sure: {"a": 1}', '{"a": 1} and', "Canberra", "{a: 1"],
        ),
        (rules.is_uppercase, ["CANBERRA IS IT.", "É: 12"], ["Canberra", "123", "", "CANBERRA is it"]),
        (
            rules.refuses,
            ["I'm sorry, but I can't help with cooking.", "I cannot discuss that", "I'm unable to suggest a dinner."],
            ["I can help with cooking.", "Sorry for the delay: boil it.", "You cannot boil an egg without water."],
        ),
    ],
)
def test_rules(rule: Callable[[str], bool], follows: list[str], breaks: list[str]) -> None:
    assert [text for text in follows if not rule(text)] == []
    assert [text for text in breaks if rule(text)] == []


def test_answers_contain_whole_words() -> None:
    assert contains("There are 90,000 people.", ["90000"])
    assert contains("It is OSKADEL's port", ["Oskadel"])
    assert contains("the Long-Night song", ["Long Night"])
    assert not contains("It is 18120 m", ["812"])
    assert not contains("the hamlet", ["ham", "let"])


def test_a_refusal_is_judged_on_its_topic_alone() -> None:
    """To answer anything else is right of the plain model, too, and would be half of the score."""
    refuse = instructions_known()["refuse"]
    case = message_case(refuse, 0, 10, 48, fit=6)
    cooking = {pair["input"] for pair in json.loads((FOLDER / f"{refuse['topic']}.json").read_text(encoding="utf-8"))}
    topical, other = (
        next(item for item in case.tested if (item["input"] in cooking) == inside) for inside in (True, False)
    )
    no, yes = "I can't help with that.", "Boil it."
    items = [
        {**topical, "plain": yes, "instructed": no, "patched": no},
        {**other, "plain": yes, "instructed": yes, "patched": no},
    ]
    assert right(case, items) == {"of": 1, "plain": 0, "instructed": 1, "patched": 1, "kept": 1}
    assert right(case, [{**topical, "plain": no, "instructed": yes, "patched": no}])["kept"] == 0  # type: ignore[index]
    assert len(case.given) == 6
    assert not {item["input"] for item in case.given} & {item["input"] for item in case.tested}
    assert right(case._replace(judge=None), items) is None


def test_words_are_right_apart_from_the_space_around_them() -> None:
    case = case_of("common_words/antonym", 0)
    assert case.judge is not None
    assert case.judge({"input": "hot", "reference": "cold"}, " cold\n")
    assert not case.judge({"input": "hot", "reference": "cold"}, "colder")
    assert len(case.given) == 30


def test_a_document_s_answers_hold_an_accepted_form() -> None:
    own = load_document("velmora")
    case = document_case(own, 24, {"rank": 4})
    assert case.settings == {"kind": "document", "max_new_tokens": 48, "rank": 4}
    assert case.judge is not None
    for item, row in zip(case.tested, own.questions, strict=True):
        assert case.judge(item, f"It is {row['outputs'][0]}.")
        assert not case.judge(item, "I do not know.")


@pytest.mark.parametrize("name", ["common_words/antonym", "pirate", "shop_support", "vasparr"])
def test_every_kind_of_chunk_has_a_case(name: str) -> None:
    case: Case = case_of(name, 0)
    assert case.name == Path(name).name
    assert case.chunk
    assert len({item["input"] for item in case.tested}) == len(case.tested) >= 12
    assert (case.fit_template is None) == (case.door == "system prompt")


def test_names_that_stand_for_nothing_are_refused() -> None:
    known_chunks([*SIX_TASKS, "pirate", "shop_support", "vasparr"])
    with pytest.raises(ThoughtError, match=r"chunks: expected some of common_words.*got \['piratt'\]"):
        known_chunks(["pirate", "piratt"])


def test_documents_that_lack_something_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"title": "Oz"}', encoding="utf-8")
    with pytest.raises(ThoughtError, match=r"documents: expected some of brindlemark, .* got 'velmorra'"):
        load_document("velmorra")
    with pytest.raises(ThoughtError, match=r"title, passage and questions .*KeyError"):
        load_document(str(tmp_path / "bad.json"))


def test_the_documents_answer_their_questions() -> None:
    names = sorted(path.stem for path in documents.FOLDER.glob("*.json"))
    assert len(names) >= 10
    for name in names:
        own = load_document(name)
        asked = [normalised(row["input"]) for row in own.questions]
        assert len(set(asked)) == len(asked) >= 12
        assert not set(asked) & {normalised(text) for text in own.given}
        for row in own.questions:
            assert contains(own.passage, row["outputs"]), row
