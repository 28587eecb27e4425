"""A prompt with a removable chunk, written by a tokenizer's chat template.

The chunk goes where the model's family puts instructions: into the system message or, where the template takes none,
to the start of the user's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_thought.errors import ThoughtError
from lit_thought.prompts.alignment import PromptTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatForm",
    "check_options",
    "read_form",
    "render_answered",
    "render_chat",
    "render_conversation",
    "special_tokens",
]

_MARK = "LITTHOUGHTMARK"  # stands in for a string to find where a chat template puts it
DEFAULT_OPTIONS = {"enable_thinking": False}
_SAME_DAY = "{%- macro strftime_now(format) -%}26 July 2024{%- endmacro -%}"
_RENDERINGS = 5  # tries to see the same twice; a date may change in between
_OURS = {
    *("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "sanitize_control_tokens",
}
_Messages = list[dict[str, str]]


def check_options(options: object) -> dict[str, Any]:
    """A copy of the further arguments for a chat template.

    Raises:
        ThoughtError: They are not JSON values under names, or one is an argument that is not the caller's to set.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ThoughtError(
            "chat template options: expected a mapping of argument names to JSON values, such as "
            f"{{'enable_thinking': True}}; got {options!r}"
        )
    taken = sorted(_OURS.intersection(options))
    if taken:
        raise ThoughtError(
            f"chat template options: expected arguments of the chat template itself, got {taken[0]!r}, which "
            "PromptTemplate sets; leave it out"
        )
    try:
        copied = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ThoughtError(f"chat template options: expected JSON values only ({error}); got {options!r}") from error
    if copied != dict(options):
        raise ThoughtError(f"chat template options: expected JSON values only, with names as keys; got {options!r}")
    return dict(copied)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    user: str,
    system: str | None,
    options: Mapping[str, Any],
    default_system: bool,
    instruction: str,
    input: str,
    output: str | None,
    finished: bool,
) -> PromptTexts:
    """The prompt's texts, all written at the same date.

    Args:
        tokenizer: A tokenizer with a chat template.
        user: The user's message, with fields.
        system: The system message, with fields, or ``None``.
        options: Further arguments of the chat template.
        default_system: Whether a system message left empty is dropped.
        instruction: The chunk.
        input: The query.
        output: The assistant's message; ``None`` for a prompt to generate from.
        finished: Whether the end of the turn follows the output.

    Raises:
        ThoughtError: The tokenizer has no chat template, or it has no place for the chunk, fails, or never writes the
            same twice.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ThoughtError(
            f"template: a chat template needs a tokenizer with one, but this {type(tokenizer).__name__} "
            "has none; set tokenizer.chat_template, or use a text template such as "
            "'Q: {input}\\nA: {output}\\n'"
        )
    return _Chat(tokenizer, user, system, options, default_system).texts(instruction, input, output, finished)


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    user: str,
    system: str | None,
    options: Mapping[str, Any],
    default_system: bool,
    instruction: str | None,
    turns: Sequence[tuple[str, str]],
    input: str,
) -> str:
    """The prompt that goes on after ``turns`` of inputs and answers: the first one's messages are those of
    :func:`render_chat`, with the chunk or without it, and the later users' messages are without.

    Raises:
        ThoughtError: As :func:`render_chat`, for a tokenizer or chat template that cannot be used.
    """
    chat = _Chat(tokenizer, user, system, options, default_system)
    form = chat.form()
    inputs = [*(asked for asked, _ in turns), input]
    messages = chat._messages(instruction, inputs[0])
    for (_, answer), asked in zip(turns, inputs[1:], strict=True):
        # of what is fixed in a system message no more is said, though it may be folded into the first user's
        messages += [_message("assistant", form.answer(answer)), chat_messages(user, None, None, asked)[-1]]
    return chat._apply(messages)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts of a tokenizer's special tokens."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in (*tokenizer.all_special_tokens, *added) if token}


def read_form(
    tokenizer: PreTrainedTokenizerBase,
    user: str,
    system: str | None,
    options: Mapping[str, Any],
    default_system: bool,
) -> ChatForm:
    """How an answer stands in a chat of these messages; the arguments are those of :func:`render_chat`."""
    return _Chat(tokenizer, user, system, options, default_system).form()


def render_answered(tokenizer: PreTrainedTokenizerBase, chats: Iterable[tuple[str | None, str, str]]) -> list[str]:
    """Chats of a system message or none, a message and its answer; a template that writes the date always writes the
    same.

    Raises:
        ThoughtError: Where there is no chat template, several without a default one, or one that fails.
    """
    try:
        options = {"chat_template": _SAME_DAY + tokenizer.get_chat_template()}
    except ValueError as error:
        raise ThoughtError(f"template: the tokenizer has no chat template for plain messages: {error}") from error
    chat = _Chat(tokenizer, "{input}", "{instruction}", options, default_system=True)
    return [
        chat._apply([*chat._messages(system, input), _message("assistant", output)], prompt=False)
        for system, input, output in chats
    ]


class ChatForm(NamedTuple):
    """How a family's chat template writes an answer.

    Attributes:
        end: the special token that ends the assistant's turn, where one does and nothing but blanks comes before the
            answer. (A family that names channels ends more than its answers by such a token.)
        header: what comes right before an answer: the end of a thought, the name of a channel; empty without one.
        start: how a thought or a channel begins; where the prompt has begun one, nothing.
    """

    end: str = ""
    header: str = ""
    start: str = ""

    def answer(self, text: str) -> str:
        """Of what the model wrote the answer alone, without the thoughts or channels before it; nothing of an output
        that breaks off in these."""
        _, found, after = text.rpartition(self.header) if self.header else ("", "", text)
        if found:
            return after.strip()
        return "" if self.header and text.lstrip().startswith(self.start) else text


class _Chat:
    """The messages of one prompt template, and what one tokenizer's chat template makes of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        user: str,
        system: str | None,
        options: Mapping[str, Any],
        default_system: bool,
    ) -> None:
        self.tokenizer, self.user, self.system = tokenizer, user, system
        self.options = {**DEFAULT_OPTIONS, **options}
        self.folds = system is not None and not self._takes_system()
        self.keeps_system = not default_system and not self.folds

    def form(self) -> ChatForm:
        """How an answer stands in a chat; nothing known where the chat template cannot write one."""
        asking = [_message("user", "input")]
        try:
            prompt, reply = self._apply(asking), self._apply([*asking, _message("assistant", _MARK)], prompt=False)
        except ThoughtError:
            return ChatForm()
        header, end = _header(prompt, reply, prompt).strip(), self._end_of_turn("input", reply).strip()
        tags = _tags(header)
        if not tags:
            return ChatForm(end if end in special_tokens(self.tokenizer) else "")
        closes, begun = tags[-1].startswith("</"), prompt.rstrip().endswith("<think>")
        start = re.match(r"<[^<>\s]*>", header)
        return ChatForm("", tags[-1] if closes else header, "" if begun or start is None else start[0])

    def _takes_system(self) -> bool:
        """Whether the chat template writes a system message, rather than refuse it or leave it out."""
        try:
            return _MARK in self._apply([_message("system", _MARK), _message("user", "input")])
        except ThoughtError:
            return False

    def texts(self, instruction: str, input: str, output: str | None, finished: bool) -> PromptTexts:
        """The texts of both runs; see :func:`render_chat`."""
        instructed, marked, plain, asking, *answered = self._renderings(instruction, input, output)
        before, after = _split(marked, "instruction")
        input_before, input_after = _split(asking, "input")
        stop = len(instructed) - len(after)
        if stop < len(before) or not (instructed.startswith(before) and instructed.endswith(after)):
            raise ThoughtError(
                "template: the tokenizer's chat template changes the text around the instruction depending "
                "on what it says, so the chunk cannot be removed; use 'chat-user' or a text template"
            )
        if instructed == plain:
            raise ThoughtError(
                f"instruction: the tokenizer's chat template leaves out {instruction!r} or writes its default text "
                "instead; reword it, or use 'chat-user' or a text template"
            )
        opening = completion = ""
        if output is not None:
            asked, reply = answered
            opening = _opening(_header(asked, reply, plain), plain, output, finished)
            completion = opening + output + (self._end_of_turn(input, reply) if finished else "")
        output_start = len(plain) + len(opening)
        return PromptTexts(
            before,
            instructed[len(before) : stop],
            after + completion,
            plain + completion,
            (len(input_before), len(plain) - len(input_after)),
            (output_start, output_start + len(output or "")),
        )

    def _renderings(self, instruction: str, input: str, output: str | None) -> list[str]:
        """The prompts, instructed and plain, each as it is and with a mark, all of one date.

        Where there is an output, the plain user's message alone and with an answer follow; alone, since some
        templates write a system message into the last turn only.
        """
        seen: list[str] = []
        for _ in range(_RENDERINGS):
            plain = self._messages(None, input)
            instructed, marked = self._messages(instruction, input), self._messages(_MARK, input)
            now = [self._apply(chat) for chat in (instructed, marked, plain, self._messages(None, _MARK))]
            if output is not None:
                now += [self._apply(plain[-1:]), self._apply([*plain[-1:], _message("assistant", _MARK)], prompt=False)]
            if now == seen:
                return now
            seen = now
        raise ThoughtError(
            "template: the tokenizer's chat template writes something else each time, such as the time of day, so the "
            "two runs cannot be compared; take it out of tokenizer.chat_template, or use a text template"
        )

    def _messages(self, instruction: str | None, input: str) -> _Messages:
        """The messages with the chunk, or, with ``instruction=None``, those of the plain run."""
        messages = chat_messages(self.user, self.system, instruction, input, self.keeps_system)
        if self.folds:
            messages = [_message("user", "\n\n".join(message["content"] for message in messages))]
        return messages

    def _apply(self, messages: _Messages, prompt: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **self.options
                )
            )
        except Exception as error:  # Jinja's errors, and whatever the template itself raises
            roles = ", ".join(message["role"] for message in messages)
            raise ThoughtError(
                f"template: the tokenizer's chat template failed on messages of the roles {roles}, with the "
                f"arguments {self.options}: {error}; use 'chat-user' or a text template"
            ) from error

    def _end_of_turn(self, input: str, answered: str) -> str:
        """What ends the assistant's turn, up to its first special token."""
        _, found, after = answered.rpartition(_MARK)
        end = ""
        if found and after.strip():
            end = self._first_special(after) or after.rstrip()
        elif found:  # no token ends a turn: the first one of the user's next turn does
            turns = [("user", input), ("assistant", _MARK), ("user", _MARK)]
            try:
                parts = self._apply([_message(*turn) for turn in turns], prompt=False).split(_MARK)
            except ThoughtError:
                parts = []
            end = self._first_special(parts[1]) if len(parts) == 3 else ""
        return end or str(self.tokenizer.eos_token or "")

    def _first_special(self, text: str) -> str:
        """``text`` up to and with its first special token; empty if there is none."""
        ends = [(text.index(token), -len(token)) for token in special_tokens(self.tokenizer) if token in text]
        if not ends:
            return ""
        start, negative_length = min(ends)
        return text[: start - negative_length]


def chat_messages(
    user: str, system: str | None, instruction: str | None, input: str, keeps_system: bool = False
) -> _Messages:
    """The messages with the chunk, or, with ``instruction=None``, those without; of these a system message left empty
    is dropped, unless ``keeps_system``."""
    messages = []
    for role, content in (("system", system), ("user", user)):
        if content is None:
            continue
        head, chunk, rest = content.partition("{instruction}")
        if chunk and instruction is None:  # whitespace left over at an end goes with the chunk
            left, right = head.strip(), rest.strip()
            head, rest = (head if right else head.rstrip()), (rest if left else rest.lstrip())
        head, rest = head.replace("{input}", input), rest.replace("{input}", input)
        content = head + (instruction or "" if chunk else "") + rest
        if content.strip() or (role == "system" and keeps_system):
            messages.append(_message(role, content))
    return messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split(rendered: str, name: str) -> tuple[str, str]:
    """The text before and after the mark that stands for the field ``name``."""
    if rendered.count(_MARK) != 1:
        raise ThoughtError(
            f"template: expected the tokenizer's chat template to write the {name} once, but it wrote it "
            f"{rendered.count(_MARK)} times; use 'chat-user' or a text template"
        )
    before, _, after = rendered.partition(_MARK)
    return before, after


def _header(asked: str, answered: str, prompt: str) -> str:
    """What the family writes between the generation prompt and an answer: whitespace, a channel, an empty thought."""
    before, found, _ = answered.rpartition(_MARK)
    header = before.removeprefix(asked) if found and before.startswith(asked) else ""
    return "\n</think>\n\n" if not header and prompt.rstrip().endswith("<think>") else header


def _tags(header: str) -> list[str]:
    return re.findall(r"<[^<\s]*|\S+", header)


def _opening(header: str, prompt: str, output: str, finished: bool) -> str:
    """The part of ``header`` that ``output`` does not bring along.

    Whitespace is left out before an output that is empty or begins with whitespace. A thought or a channel is left
    out before an output that holds one of its own, or breaks off and so may be one.
    """
    tags = _tags(header)
    if tags and (not output or not finished or tags[-1] in output):
        header = "" if prompt[-1:].isspace() else header[: -len(header.lstrip())]
    return header if header.strip() or output[:1].strip() else ""
