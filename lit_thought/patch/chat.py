"""A conversation with a model as it is, with the instruction in its prompt, and with the patch: one question, three
answers."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, check_counts, is_finite
from lit_thought.model.bare import bare_model, check_tokenizer
from lit_thought.model.loading import context_window, evaluating
from lit_thought.patch.change import Change
from lit_thought.patch.provenance import template_of
from lit_thought.patch.texts import differences
from lit_thought.patch.weights import applied, check_absent, validate
from lit_thought.prompts.instruction_hash import check_instruction
from lit_thought.prompts.pairs import check_unicode
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.generate import generate

__all__ = ["Answer", "Answers", "Chat", "ChatOptions", "Watch", "check_chat"]

Watch = Callable[["Answers"], None]
"""Called with the answers as far as they are written, with every token."""

_CHANGED = "bold yellow"
_HELLO = "Hello"


class ChatOptions(TypedDict, total=False):
    """What :class:`Chat` takes by name."""

    instruction: str | None
    template: str | PromptTemplate | None
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What one of the models answered.

    Attributes:
        text: the answer.
        tokens: tokens of the prompt that it read, where that is known.
        finished: whether it came to an end before ``max_new_tokens``.
    """

    text: str
    tokens: int | None = None
    finished: bool = True


@dataclass(frozen=True)
class Answers:
    """The answers to one message, side by side: as a table in a terminal and a notebook, as text elsewhere.

    Attributes:
        message: what was asked.
        plain: of the model as it is, without the instruction.
        instructed: with the instruction in the prompt; None where there is no instruction.
        patched: of the patched model, without the instruction.
        scale: what the patch was multiplied by.
    """

    message: str
    plain: Answer | None = None
    instructed: Answer | None = None
    patched: Answer | None = None
    scale: float = 1.0

    def columns(self) -> Iterator[tuple[str, Answer]]:
        """The answers that there are, with what to call them."""
        patched = "patched" if self.scale == 1 else f"patched × {self.scale:g}"
        named = (("plain", self.plain), ("instructed", self.instructed), (patched, self.patched))
        return ((name, answer) for name, answer in named if answer is not None)

    def pieces(self, answer: Answer) -> list[tuple[bool, str]]:
        """The answer's words, and whether they differ from the instructed answer: only the patched one's can."""
        if answer is not self.patched or self.instructed is None:
            return [(False, answer.text)]
        found = differences(answer.text, self.instructed.text)
        return [(kind == "insert", words) for kind, words in found if kind != "delete"]

    def __str__(self) -> str:
        return "\n\n".join(f"{_title(name, answer)}\n{answer.text}" for name, answer in self.columns())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(expand=True)
        texts = []
        for name, answer in self.columns():
            table.add_column(Text(_title(name, answer)), ratio=1, overflow="fold")
            texts.append(Text.assemble(*((words, _CHANGED if new else "") for new, words in self.pieces(answer))))
        table.add_row(*texts)
        yield table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(_title(name, answer))}</th>" for name, answer in self.columns())
        cells = []
        for _, answer in self.columns():
            words = ((new, html.escape(text)) for new, text in self.pieces(answer))
            cells.append("".join(f"<mark>{text}</mark>" if new else text for new, text in words))
        style = "white-space: pre-wrap; vertical-align: top; text-align: left"
        row = "".join(f'<td style="{style}">{cell}</td>' for cell in cells)
        return f"<p><b>{html.escape(self.message)}</b></p><table><tr>{head}</tr><tr>{row}</tr></table>"


def check_chat(
    patch: Change, instruction: str | None, template: str | PromptTemplate | None, max_new_tokens: int
) -> PromptTemplate:
    """Check, before a model is loaded for it, what a :class:`Chat` is given.

    Returns:
        The template.

    Raises:
        ThoughtError: as :class:`Chat` says.
    """
    check_counts(max_new_tokens=max_new_tokens)
    if instruction is not None:
        if not isinstance(instruction, str) or not instruction.strip():
            raise ThoughtError(f"instruction must be a text that is not empty; got {instruction!r}. Leave it out.")
        check_instruction(patch.provenance, instruction, [{"input": _HELLO}])
    return template_of(patch.provenance, template)


class Chat:
    """Asks three models the same: plain, instructed and patched. Outputs are greedy.

    Each of them has its own history: of the messages, and of what it answered itself. With a text template, where
    there are no turns, each message stands alone.

    Args:
        patch: the patch; an adapter of another model is refused.
        model: the model it was made for, without it; bit for bit the same between two messages.
        tokenizer: its tokenizer.
        instruction: the chunk; the one that the patch keeps when left out. Where it keeps none (a hash, several
            instructions, a sum), there is no instructed answer.
        template: the one that the patch was made with when left out.
        max_new_tokens: longest answer.

    Raises:
        ThoughtError: for bad input, such as another instruction than that of a patch that keeps a hash of it;
            PatchError when the patch does not fit the model, UnsupportedModelError for what is none.
    """

    def __init__(
        self,
        patch: Change,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str | None = None,
        template: str | PromptTemplate | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        self.template = check_chat(patch, instruction, template, max_new_tokens)
        self.model, self.tokenizer = bare_model(model), check_tokenizer(tokenizer)
        check_absent(patch, self.model)
        validate(patch, self.model)
        self.patch, self.max_new_tokens = patch, max_new_tokens
        self._scale = 1.0
        self.history: list[Answers] = []
        kept = patch.provenance.get("instruction")
        self._instruction: str | None = None
        self.instruction = kept if instruction is None and isinstance(kept, str) else instruction

    @property
    def instruction(self) -> str | None:
        """The chunk that the instructed model reads. Another one starts over."""
        return self._instruction

    @instruction.setter
    def instruction(self, text: str | None) -> None:
        if text is not None:
            check_instruction(self.patch.provenance, text, [{"input": _HELLO}])
            self.template.tokenise(self.tokenizer, text, _HELLO)  # refuses a blank one, and what the template cannot
        self._instruction = text
        self.new()

    @property
    def scale(self) -> float:
        """What the patch is multiplied by: 0 is off. The history stays."""
        return self._scale

    @scale.setter
    def scale(self, factor: float) -> None:
        if not is_finite(factor):
            raise ThoughtError(f"scale must be a number; got {factor!r}. 1 is the patch as it was made, 0 none.")
        self._scale = float(factor)

    def new(self) -> None:
        """Start over: the messages so far are forgotten."""
        self.history.clear()

    def ask(self, message: str, watch: Watch | None = None) -> Answers:
        """The answers to a message that goes on from the ones before.

        Args:
            message: what the user says.
            watch: called with every token that is written.

        Raises:
            ThoughtError: for a blank message, or when the conversation no longer fits the model's context window;
                the history is then as it was.
        """
        if not isinstance(message, str) or not message.strip():
            raise ThoughtError(f"message must be a text that is not blank; got {message!r}.")
        check_unicode("message", message)
        check_absent(self.patch, self.model)
        answers = Answers(message, scale=self.scale)
        prompts = {"plain": self._prompt(None, "plain", message)}
        if self.instruction is not None:
            prompts["instructed"] = self._prompt(self.instruction, "instructed", message)
        prompts["patched"] = self._prompt(None, "patched", message)
        changed = self.scale * self.patch if self.scale else None
        for run, prompt in prompts.items():
            answers = self._written(run, prompt, answers, changed if run == "patched" else None, watch)
        self.history.append(answers)
        return answers

    def __repr__(self) -> str:
        runs = "plain, instructed and patched" if self.instruction is not None else "plain and patched"
        return f"Chat({runs}, scale {self.scale:g}, {len(self.history)} messages)"

    def _prompt(self, instruction: str | None, run: str, message: str) -> tuple[int, ...]:
        past = [(each.message, getattr(each, run).text) for each in self.history]
        prompt = self.template.conversation(self.tokenizer, instruction, past, message)
        window = context_window(self.model)
        if len(prompt) + self.max_new_tokens > window:
            cure = "Start over (new)" if past else "Shorten it"
            raise ThoughtError(
                f"message: the {run} prompt takes {len(prompt):,} tokens and the answer up to "
                f"{self.max_new_tokens:,}, of a context window of {window:,}. {cure}, or set a smaller max_new_tokens."
            )
        return prompt

    def _written(
        self, run: str, prompt: tuple[int, ...], answers: Answers, patch: Change | None, watch: Watch | None
    ) -> Answers:
        """The answers, with this run's."""

        def with_text(text: str, finished: bool) -> Answers:
            answer: Any = Answer(text, len(prompt), finished)
            return replace(answers, **{run: answer})

        def show(tokens: list[int]) -> None:
            if watch is not None:
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                watch(with_text(text.strip(), False))

        with evaluating(self.model), nullcontext() if patch is None else applied(patch, self.model, check=False):
            (written,) = generate(
                self.model,
                self.tokenizer,
                [prompt],
                max_new_tokens=self.max_new_tokens,
                options={"logits_processor": [_Watched(len(prompt), show)]} if watch is not None else None,
                **self.template.ending(self.tokenizer),
            )
        done = with_text(written.text, written.finished)
        if watch is not None:
            watch(done)
        return done


class _Watched(LogitsProcessor):
    """Tells what has been written, and changes nothing."""

    def __init__(self, start: int, show: Callable[[list[int]], None]) -> None:
        self.start, self.show = start, show

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.show(input_ids[0, self.start :].tolist())
        return scores


def _title(name: str, answer: Answer) -> str:
    return name if answer.tokens is None else f"{name} · {answer.tokens} tokens"
