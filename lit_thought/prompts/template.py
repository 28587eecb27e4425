"""A prompt with a removable chunk, as text with and without it.

The instructed run reads ``prefix · I · suffix``, the plain run ``prefix · suffix`` ("Transmuting prompts into
weights", arXiv 2510.08734). :mod:`lit_thought.prompts.chat` writes the two with a chat template;
:mod:`lit_thought.prompts.alignment` tokenises and aligns them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_thought.errors import ThoughtError, did_you_mean
from lit_thought.prompts.alignment import PromptTexts, TokenisedPair, align
from lit_thought.prompts.chat import (
    ChatForm,
    chat_messages,
    check_options,
    read_form,
    render_chat,
    render_conversation,
)
from lit_thought.prompts.pairs import check_unicode
from lit_thought.settings import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_TEMPLATE", "Frame", "PromptTemplate"]

DEFAULT_TEMPLATE = "Q: {input}\nA: {output}\n"

_FIELD = re.compile(r"\{(instruction|input|output)\}")


_MARK = "LITTHOUGHTINPUT"


class Frame(NamedTuple):
    """The text before an input in the instructed and in the plain run, and what follows it, up to the output."""

    instructed: str
    plain: str
    after: str


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with fields, one of which, ``{instruction}``, is the removable chunk I.

    A text template has the fields ``{input}`` and ``{output}`` once each, ``{output}`` last, and
    ``{instruction}`` at most once; without it the chunk goes to the very start. Any other brace is literal,
    and what is put into a field is never parsed. For chat models use :meth:`chat`.

    Args:
        text: The template. Spaces and tabs before ``{output}`` belong to the output: a generation prompt ends
            without them (``"Q: hot\\nA:"``), and they are left out before an output that is empty or begins
            with whitespace of its own.
        separator: Ends a chunk that goes to the very start, unless the instruction ends in whitespace. It is
            part of the chunk, and removed with it.
        user: Chat only; see :meth:`chat`.
        system: Chat only; see :meth:`chat`.
        options: Chat only; see :meth:`chat`.
        default_system: Chat only; see :meth:`chat`.

    Raises:
        ThoughtError: A field is missing, repeated or out of order, or an option is not a JSON value.
    """

    text: str = DEFAULT_TEMPLATE
    separator: str = "\n"
    user: str | None = field(default=None, kw_only=True)
    system: str | None = field(default=None, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    default_system: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("text", "separator", "user", "system"):
            value = getattr(self, name)
            if value is not None or name in ("text", "separator"):
                _require_str(f"template {name}", value)
        object.__setattr__(self, "options", check_options(self.options))
        if not isinstance(self.default_system, bool):
            raise ThoughtError(f"template default_system: expected true or false, got {self.default_system!r}")
        if self.user is None and self.system is None and not self.options and self.default_system:
            self._check_text()
        else:
            self._check_chat()

    def _check_text(self) -> None:
        fields = _FIELD.findall(self.text)
        for name in ("input", "output"):
            if fields.count(name) != 1:
                raise ThoughtError(
                    f"template: expected the field {{{name}}} exactly once, got it {fields.count(name)} "
                    f"times in {self.text!r}; write for example 'Q: {{input}}\\nA: {{output}}\\n'"
                )
        if fields.count("instruction") > 1:
            raise ThoughtError(
                f"template: expected the field {{instruction}} at most once, got it "
                f"{fields.count('instruction')} times in {self.text!r}; the chunk must be one block"
            )
        if fields[-1] != "output":
            raise ThoughtError(
                f"template: expected {{output}} to be the last field, got {{{fields[-1]}}} after it in "
                f"{self.text!r}; move it before {{output}}: the output is what follows the prompt"
            )

    def _check_chat(self) -> None:
        if self.text or self.user is None:
            raise ThoughtError(
                "template: expected either a text or chat messages, with a user message; got "
                f"text={self.text!r}, user={self.user!r}, system={self.system!r}, options={self.options!r}; "
                "build chat templates with PromptTemplate.chat(user=..., system=...)"
            )
        user, system = _FIELD.findall(self.user), _FIELD.findall(self.system or "")
        got = f"got user={self.user!r}, system={self.system!r}"
        if user.count("input") != 1 or "input" in system:
            raise ThoughtError(f"chat template: expected {{input}} exactly once, in the user message; {got}")
        if (user + system).count("instruction") != 1:
            raise ThoughtError(
                f"chat template: expected {{instruction}} exactly once, in the user or system message; {got}"
            )
        if "output" in user + system:
            raise ThoughtError(
                f"chat template: expected no {{output}}; {got}; remove it: it is the assistant's message"
            )

    @classmethod
    def chat(
        cls,
        user: str = "{input}",
        system: str | None = "{instruction}",
        options: Mapping[str, Any] | None = None,
        default_system: bool = True,
    ) -> PromptTemplate:
        """A template that goes through the tokenizer's chat template.

        In the plain run the chunk is empty: whitespace of the template left over at an end of its message
        goes with it, and a system message left empty is dropped, so that the family's default system text stands
        there, if it has one, or written empty (``default_system``). Where a chat template refuses or leaves out system
        messages (Gemma 2), the system message goes to the start of the user's, followed by a blank line.

        An output stands where the model writes its answer: what the family puts between generation prompt and answer
        (a space, an empty thought, the name of a channel) comes first, unless the output brings it along.

        Args:
            user: The user's message, with ``{input}`` once.
            system: The system message or ``None``. ``{instruction}`` stands once, in either of the two.
            options: Further arguments of the chat template, as JSON values, such as ``{"date_string": "1 May 2025"}``
                or ``{"reasoning_effort": "low"}``. ``enable_thinking`` is false unless given here: an output is then
                the answer alone; when it is true, the model's thoughts are part of the output.
            default_system: Whether a system message left empty is dropped in the plain run. If not, it is written
                empty, as for users who send one that is: no tokens go to the family's default text then.

        Raises:
            ThoughtError: A field is missing, repeated or in the wrong message, or an option cannot be used.
        """
        options = {} if options is None else options
        return cls("", "", user=user, system=system, options=options, default_system=default_system)

    @classmethod
    def parse(cls, value: str | PromptTemplate) -> PromptTemplate:
        """A template from a name, a text with fields, or a template, which is returned as it is.

        The names are ``"chat"`` (chunk = system message; where the chat template takes none, as ``"chat-user"``),
        ``"chat-empty"`` (the same, with an empty system message in the plain run: ``default_system=False``) and
        ``"chat-user"`` (chunk before the input in the user's message).

        Raises:
            ThoughtError: Anything else.
        """
        if isinstance(value, PromptTemplate):
            return value
        if value == "chat":
            return cls.chat()
        if value == "chat-empty":
            return cls.chat(default_system=False)
        if value == "chat-user":
            return cls.chat(user="{instruction}\n\n{input}", system=None)
        if isinstance(value, str) and _FIELD.search(value):
            return cls(value)
        known = f"{', '.join(map(repr, TEMPLATES))} or a text with the fields {{input}} and {{output}}"
        if not isinstance(value, str):
            raise ThoughtError(f"template: expected {known}, or a PromptTemplate; got {value!r}")
        raise ThoughtError(f"template: expected {known}; got {value!r}.{did_you_mean(value, TEMPLATES)}")

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return self.user is not None

    @property
    def stop(self) -> str | None:
        """The literal text after ``{output}``, at which generation stops; ``None`` if empty, and for chat."""
        return None if self.is_chat else self.text.partition("{output}")[2] or None

    def ending(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """How an output ends and is read: arguments of :func:`~lit_thought.runs.generate.generate`. In a chat it ends
        with the chat template's turn, too, whose token need not be among those that end the model's outputs: a base
        model's is not."""
        end = self.chat_form(tokenizer).end
        ends = [tokenizer.convert_tokens_to_ids(end)] if end else []
        return {"stop": self.stop, "ends": ends, "keep_special": self.is_chat}

    def chat_form(self, tokenizer: PreTrainedTokenizerBase) -> ChatForm:
        """How the tokenizer's chat template writes an answer; nothing of a text template."""
        if self.user is None:
            return ChatForm()
        return read_form(tokenizer, self.user, self.system, self.options, self.default_system)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` needs to build this template again; fit for JSON."""
        if self.is_chat:
            kept = {} if self.default_system else {"default_system": False}
            return {"user": self.user, "system": self.system, "options": check_options(self.options), **kept}
        return {"text": self.text, "separator": self.separator}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """The template that :meth:`to_dict` described.

        Raises:
            ThoughtError: The keys are not those of a text template or of a chat template.
        """
        keys = set(values) if isinstance(values, Mapping) else set()
        if keys - {"options", "default_system"} == {"user", "system"}:
            return cls.chat(**values)
        if keys == {"text", "separator"}:
            return cls(**values)
        raise ThoughtError(
            f"template: expected the keys text and separator, or user, system and options; got {values!r}; "
            "pass what PromptTemplate.to_dict() returned"
        )

    def plain(self, input: str) -> str | list[dict[str, str]]:
        """What a user sends in the plain run: a text to go on from, or for chat the messages."""
        if self.user is not None:
            return chat_messages(self.user, self.system, None, input, not self.default_system)
        return self._render_text("\n", input, None, True).plain

    def tokenise(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str,
        input: str,
        output: str | None = None,
        finished: bool = True,
    ) -> TokenisedPair:
        """Tokenise the prompt with and without the chunk, and align the two.

        The plain text is always tokenised as the tokenizer does it by itself (chat prompts without additional
        special tokens, since the chat template writes them), so that users' prompts match. Where the chunk
        falls between two plain tokens, the plain ids are the instructed ids less one block; otherwise the
        runs are aligned on their common suffix and prefix outside the chunk.

        Args:
            tokenizer: A fast tokenizer; for chat, one with a chat template.
            instruction: The chunk I.
            input: The query.
            output: The completion; ``None`` for a prompt to generate from.
            finished: Whether the output is complete. If so, the template's tail (for chat, the end of the
                turn) follows it; ``False`` if a generation hit its length limit.

        Raises:
            ThoughtError: A blank or non-string argument, an unfit tokenizer, a chat template that has no
                place for the chunk, or an input or output token without a counterpart in the other run.
        """
        for name, value in (("instruction", instruction), ("input", input)):
            _require_str(name, value)
            if not value.strip():
                raise ThoughtError(f"{name}: expected a string that is not blank, got {value!r}")
        if output is not None:
            _require_str("output", output)
        if not getattr(tokenizer, "is_fast", False):
            raise ThoughtError(
                f"tokenizer: expected a fast tokenizer (character offsets are needed to find the chunk), got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        return align(tokenizer, self._render(tokenizer, instruction, input, output, finished), self.is_chat)

    def conversation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str | None,
        turns: Sequence[tuple[str, str]],
        input: str,
    ) -> tuple[int, ...]:
        """The tokens of a prompt to generate from, after ``turns`` of inputs and answers, oldest first.

        A text template has no turns: each input there is a prompt of its own, and ``turns`` are left out.

        Args:
            tokenizer: A fast tokenizer; for chat, one with a chat template.
            instruction: The chunk I; ``None`` for the prompt without it.
            turns: What was asked and answered before.
            input: The query.

        Raises:
            ThoughtError: As :meth:`tokenise`.
        """
        if self.user is not None and turns:
            messages = (self.user, self.system, self.options, self.default_system)
            text = render_conversation(tokenizer, *messages, instruction, turns, input)
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        pair = self.tokenise(tokenizer, instruction or _MARK, input)
        return tuple(pair.plain_ids if instruction is None else pair.instructed_ids)

    def frame(self, tokenizer: PreTrainedTokenizerBase, instruction: str) -> Frame:
        """What stands around an input, for a model to write one.

        Raises:
            ThoughtError: As :meth:`tokenise`, for a tokenizer or chat template that cannot be used.
        """
        texts = self._render(tokenizer, instruction, _MARK)
        instructed, _, after = (texts.before + texts.chunk + texts.after).partition(_MARK)
        plain = texts.plain[: texts.input_span[0]]
        blanks = "" if self.is_chat else " \t"  # which belong to the input, as those before an output do
        return Frame(instructed.rstrip(blanks), plain.rstrip(blanks), after)

    def _render(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str,
        input: str,
        output: str | None = None,
        finished: bool = True,
    ) -> PromptTexts:
        if not self.is_chat:
            return self._render_text(instruction, input, output, finished)
        assert self.user is not None
        messages = (self.user, self.system, self.options, self.default_system)
        return render_chat(tokenizer, *messages, instruction, input, output, finished)

    def _render_text(self, instruction: str, input: str, output: str | None, finished: bool) -> PromptTexts:
        body, _, tail = self.text.partition("{output}")
        prompt = body.rstrip(" \t")
        chunk = instruction
        if "{instruction}" in prompt:
            before, _, after = prompt.partition("{instruction}")
        else:
            before, after = "", prompt
            if not instruction[-1].isspace():
                chunk += self.separator
        if "{input}" in before:
            start = before.index("{input}")
            before = before.replace("{input}", input)
        else:
            start = len(before) + after.index("{input}")
            after = after.replace("{input}", input)
        if output is not None and output[:1].strip():
            after += body[len(prompt) :]
        output_start = len(before) + len(after)
        after += output or ""
        output_stop = len(before) + len(after)
        if output is not None and finished:
            after += tail
        input_span, output_span = (start, start + len(input)), (output_start, output_stop)
        return PromptTexts(before, chunk, after, before + after, input_span, output_span)


def _require_str(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ThoughtError(f"{name}: expected a string, got {type(value).__name__} ({value!r})")
    check_unicode(name, value)
