"""Texts in scripts other than Latin."""

from __future__ import annotations

import pytest
from fits import TOKENIZER

from lit_thought.inputs.kinds import find_kind
from lit_thought.inputs.study import About, repeated
from lit_thought.inputs.turns import _is_sound
from lit_thought.inputs.words import joined, sentences, spaced, words
from lit_thought.prompts.template import PromptTemplate

CHINESE = "清溪镇的钟楼建于1887年。它由石匠林远山设计！钟楼高四十二米，里面有“三口铜钟”。谁敲钟？守钟人：\n每天敲两次。"
ARABIC = "بني برج الساعة عام 1887. صممه البناء سليم الحداد. من يدق الجرس؟ الحارس كل يوم."
HINDI = "घंटाघर 1887 में बना। इसे राजमिस्त्री मोहन ने बनाया। यह बयालीस मीटर ऊँचा है।"
RUSSIAN = "Часовая башня построена в 1887 году. Её спроектировал каменщик Лев Орлов. Башня высотой сорок два метра."


def test_sentences_end_with_the_signs_of_their_script() -> None:
    assert sentences(CHINESE) == [
        "清溪镇的钟楼建于1887年。",
        "它由石匠林远山设计！",
        "钟楼高四十二米，里面有“三口铜钟”。",
        "谁敲钟？",
        "每天敲两次。",
    ]
    assert sentences("「来た。」と言った。") == ["「来た。」", "と言った。"]
    assert [len(sentences(text)) for text in (ARABIC, HINDI, RUSSIAN)] == [4, 3, 3]
    assert joined(sentences(CHINESE)[:2]) == "清溪镇的钟楼建于1887年。它由石匠林远山设计！"
    assert joined(["One.", "Two."]) == "One. Two."


def test_words_of_a_script_without_spaces_are_pairs() -> None:
    assert spaced("All as it is, ça va?  Да.") == "All as it is, ça va?  Да."
    assert words("建于1887年 in 3月, 钟") == ["建于", "1887", "年", "in", "3", "月", "钟"]
    assert words("石匠林") == ["石匠", "匠林"]
    assert words("घंटाघर में") == ["घंटाघर", "में"]
    assert words("cafe\u0301 ok") == ["cafe\u0301", "ok"]
    assert _is_sound("清溪镇在哪里？")
    assert not _is_sound("哈哈哈哈哈哈哈哈")


@pytest.mark.parametrize(
    ("document", "subject", "question", "answer", "foreign"),
    [
        (CHINESE, "清溪镇的钟楼", "是谁设计了钟楼？", "石匠林远山。", "1923年"),
        (ARABIC, "برج الساعة", "من صمم برج الساعة؟", "البناء سليم الحداد", "عام 1923"),
        (HINDI, "घंटाघर", "घंटाघर को किसने बनाया?", "राजमिस्त्री मोहन ने।", "1923"),
        (RUSSIAN, "часовая башня", "Кто спроектировал башню высотой 42 метра?", "Каменщик Лев Орлов.", "в 1923 году"),
    ],
)
def test_questions_about_a_document(document: str, subject: str, question: str, answer: str, foreign: str) -> None:
    about = About(document, subject)
    assert about.asks(question)
    assert not about.asks(f"{question[:-1]}.")
    assert about.told(question, answer)
    assert not about.told(question, foreign)
    assert not about.told(question, question)
    assert all(about.words_of(part) for part in sentences(document)[:2])


def test_a_passage_in_a_script_without_spaces_is_repeated_after_its_first_characters() -> None:
    text = "".join(f"第{n}座钟楼建于一八八七年，由石匠设计。" for n in "一二三四五")
    found = repeated(text, "钟楼")
    assert [pair["output"] for pair in found] == [text[: len(text) * 3 // 5], text[len(text) * 3 // 5 :]]
    assert '"第一座钟楼建于一八八"' in found[0]["input"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("你是一家书店的店员。回答要简短，不要谈价格。" * 20, "system"),
        ("回答用户的问题时要礼貌。用户问价格时，请他打电话。" * 20, "system"),
        (CHINESE * 12, "document"),
        ("返事は短く。ユーザーの質問に丁寧に答えてください。" * 20, "system"),
        ("Antworte immer höflich. Wenn der Nutzer nach Preisen fragt, nenne keine." * 20, "system"),
        ("Antworten Sie höflich, und fragen Sie nach." * 30, "system"),
        ("Sie wurde in Ulm geboren. Sie lebte in Bern und malte Schiffe." * 30, "document"),
        ("Réponds toujours poliment. Si l'utilisateur demande un prix, n'en donne pas." * 20, "system"),
        ("Отвечай вежливо. Если пользователь спросит о цене, не называй её." * 20, "system"),
        (RUSSIAN * 12, "document"),
        (ARABIC * 12, "document"),
        (HINDI * 12, "document"),
    ],
)
def test_kinds_in_many_languages(text: str, kind: str) -> None:
    assert find_kind(TOKENIZER, text, PromptTemplate.chat()) == kind
