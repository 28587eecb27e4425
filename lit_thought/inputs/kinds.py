"""What kind of chunk an instruction is, and so how inputs for it are written.

=================  ===============================================================================================
kind               inputs
=================  ===============================================================================================
``demonstrations``  a list of inputs and outputs in the form of the template: the next inputs of the list
``system``          tells how to answer: what users write to the model, with it and without; of a long one, what it is
                    there for, questions about it, and its facts, too
``document``        a text to know: questions about it, requests, and the text itself
=================  ===============================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lit_thought.inputs.words import spaced
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.settings import Kind

__all__ = ["Demonstration", "demonstrations", "find_kind", "find_template", "is_long"]

LONG = 200
"""Tokens from which on a text that addresses nobody is a document, and a system prompt a long one, with rules and facts
that what users write of themselves does not come upon."""
_ADDRESS = re.compile(
    r"(?i:\b(you|your|yours|yourself|users?|assistant"
    r"|vous|votre|vos|utilisateurs?|dich|dein\w*|(be)?nutzer\w*|usted|usuarios?|utent[ei]|você|usuários?|jij|jouw"
    r"|gebruikers?|użytkownik\w*|ты|тебя|твой|вы|вас|вам|ваш\w*|пользовател\w*|أنت|المستخدم\w*)\b)"
    r"|(?<=[\w,] )(Sie|Ihnen|Ihre?[mnrs]?)\b"  # where a sentence begins it may be she, her or they
    r"|你|您|用户|用戶|使用者|助手|あなた|ユーザー|アシスタント|당신|사용자|ผู้ใช้|คุณ(?!ภาพ|สมบัติ|ค่า|ธรรม|ลักษณะ)"
    r"|(?<![\u0900-\u097f])(आप|आपको|तुम|उपयोगकर्ता)(?![\u0900-\u097f])"
)
"""Who is addressed, in the languages that most is written in; no words that mean something else in another of them."""
_OPENING = re.compile(
    r"(#[^\n]*\n)?\W*((you|your (task|job|role|goal)|act as|imagine|pretend"
    r"|tu es|vous êtes|du bist|sie sind|eres|sei un|você é|jij bent|jesteś|ты|вы|أنت)\b"
    r"|[你您](是|的任务|将)|あなたは|당신은|คุณ(คือ|เป็น)|आप(?![\u0900-\u097f]))",
    re.IGNORECASE,
)
"""How a text begins, under a heading or not, that tells a model who it is; one that begins with how to answer may go on
with a document."""
_FIELDS = re.compile(r"\{(input|output)\}")


@dataclass(frozen=True)
class Demonstration:
    """An input and its output in an instruction, and the characters that they take up there."""

    input: str
    output: str
    span: tuple[int, int]


def demonstrations(template: PromptTemplate, instruction: str) -> list[Demonstration]:
    """The demonstrations that an instruction consists of, in the form of a text template.

    Returns:
        At least two, each of which is one line for each field; none, where what is no demonstration is more than half
        of the instruction, and for chat templates and templates that hold the instruction elsewhere than at the start;
        nor in a template of fields and blanks alone, in whose form any lines are, where the first one tells the model
        who it is ("You are …").
    """
    if template.is_chat or "{instruction}" in template.text:
        return []
    parts = _FIELDS.split(template.text.lstrip())[::2]
    if not any(part.strip() for part in parts) and _OPENING.match(instruction):  # any lines are in such a form
        return []
    before, between, after = map(re.escape, parts)
    between = re.sub(r"(\\ )+$", r"[ \\t]*" if between.strip("\\ ") else r"[ \\t]+", between)
    end = f"{after}|$" if after else "\n|$"
    found = [
        Demonstration(one[1].strip(), one[2].strip(), one.span())
        for one in re.finditer(f"{before}(.+?){between}(.+?)(?={end})", instruction)
    ]
    covered = sum(stop - start for start, stop in (one.span for one in found))
    return found if len(found) >= 2 and covered >= len(instruction) / 2 else []


def find_template(
    tokenizer: PreTrainedTokenizerBase, instruction: str, template: PromptTemplate | None
) -> PromptTemplate:
    """The template given; left out, the default one where the instruction is demonstrations in its form or the model
    has no chat template, else ``"chat"``."""
    if template is not None:
        return template
    default = PromptTemplate(DEFAULT_TEMPLATE)
    talks = bool(getattr(tokenizer, "chat_template", None))
    return PromptTemplate.chat() if talks and not demonstrations(default, instruction) else default


def find_kind(tokenizer: PreTrainedTokenizerBase, instruction: str, template: PromptTemplate) -> Kind:
    """Demonstrations where :func:`demonstrations` finds some; a document where the instruction is :data:`LONG`, begins
    otherwise than by telling the model who it is or what to do ("You are …", "Your task …", "Act as …"), and addresses
    somebody (you, your, the user, the assistant) in fewer than one word of a hundred; else a system prompt."""
    if demonstrations(template, instruction):
        return "demonstrations"
    words, addressed = len(spaced(instruction).split()), len(_ADDRESS.findall(instruction))
    told = _OPENING.match(instruction) is not None
    return "document" if is_long(tokenizer, instruction) and not told and addressed * 100 < words else "system"


def is_long(tokenizer: PreTrainedTokenizerBase, instruction: str) -> bool:
    """Whether it has :data:`LONG` tokens or more."""
    return len(tokenizer(instruction, add_special_tokens=False, verbose=False)["input_ids"]) >= LONG
