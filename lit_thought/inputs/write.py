"""From an instruction alone to the pairs of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.inputs.kinds import demonstrations, find_kind, find_template, is_long
from lit_thought.inputs.lists import continue_list
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.inputs.study import REQUESTS, find_subject, has_fact, recited, repeated, write_questions
from lit_thought.inputs.turns import write_messages, write_turns
from lit_thought.inputs.words import sentences
from lit_thought.model.loading import context_window, evaluating
from lit_thought.prompts.template import PromptTemplate
from lit_thought.settings import Kind

__all__ = ["Written", "write_pairs"]

ENOUGH = {"demonstrations": 100, "system": 120}
"""How many inputs there are in all, where that is left to the library."""
PER_SENTENCE = 8
"""Questions about each sentence of a document, likewise; a quarter as many about each of a long system prompt, and as
many messages that it is there for, ..."""
MOST = 300
"""... and most of them."""
ROOM = 32
"""Tokens that an input needs."""
NEAR = 1024
"""More than an input ever has."""


class Written(NamedTuple):
    """What was written for an instruction.

    Attributes:
        kind: what the instruction was taken for.
        template: the prompts' form.
        pairs: new inputs, with outputs where these are words of a document.
    """

    kind: Kind
    template: PromptTemplate
    pairs: list[dict[str, str]]


def write_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    template: PromptTemplate | None = None,
    *,
    total: int | None = None,
    times: float = 1.0,
    kind: Kind | None = None,
    given: Sequence[Mapping[str, str]] = (),
    apart: Sequence[Mapping[str, str]] = (),
    longest: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    advance: Callable[[int, int], None] | None = None,
) -> Written:
    """Let the model write what an instruction is to be fitted on.

    Args:
        model: the model; not changed.
        tokenizer: its tokenizer.
        instruction: the chunk.
        template: how instruction and input make a prompt; found by the form of the instruction when left out.
        total: how many pairs there are to be, the given ones among them; left out, the usual number
            (:data:`ENOUGH`, :data:`PER_SENTENCE`), ...
        times: ... as often as this.
        kind: what the instruction is; found by its form when left out.
        given: pairs that are there already, which are not written again.
        apart: pairs that are not to be fitted, and are not written either.
        longest: most tokens of the outputs to come, for which the context window is to have room.
        seed: seed of all that is sampled.
        batch_size: prompts a batch.
        advance: called with how many are written, of how many.

    Returns:
        The pairs, fewer where the model repeats itself, or the context window cannot hold one and its output.

    Raises:
        ThoughtError: when the template has no place to write an input at, the instruction leaves no room in the
            context window, or nothing can be kept of what the model writes.
    """
    chosen = find_template(tokenizer, instruction, template)
    kind = find_kind(tokenizer, instruction, chosen) if kind is None else kind
    shown = demonstrations(chosen, instruction)
    if kind == "demonstrations" and not shown:
        raise ThoughtError(
            "kind='demonstrations': expected two or more in the instruction, in the form of the template "
            f"{chosen.text or 'chat'!r}, one line for each field; got {instruction!r:.80}. Give the template that they "
            "are in, or leave kind out."
        )
    frame = chosen.frame(tokenizer, instruction)
    if not frame.instructed.strip():
        raise ThoughtError("template: there is nothing before {input} from which a model could write one; give pairs.")
    limit, length = context_window(model), len(tokenizer(frame.instructed, verbose=False)["input_ids"])
    if length + ROOM + longest > limit:
        raise ThoughtError(
            f"instruction: expected room for its prompt, {ROOM} tokens of an input and max_new_tokens={longest} in the "
            f"model's context window of {limit} tokens, but the prompt has {length}; shorten it, write shorter "
            "outputs, or use a model with a longer window."
        )
    taken = Distinct([*(pair["input"] for pair in (*given, *apart)), *(one.input for one in shown)])
    pen = Pen(model, tokenizer, seed, batch_size)
    pairs: list[dict[str, str]] = []
    with evaluating(model):
        if kind == "document":
            pairs = _study(pen, chosen, instruction, total, times, given, apart, taken)
        else:
            count = max((round(times * ENOUGH[kind]) if total is None else total) - len(given), 0)
            if kind == "demonstrations":
                found = _alone(continue_list(pen, chosen, instruction, shown, count, taken))
            elif is_long(tokenizer, instruction):
                subject = find_subject(pen, instruction)
                facts = [one for one in recited(instruction, subject) if has_fact(one["output"], subject)]
                told = _new(facts, (*given, *apart))
                turns, asked = count // 2, round(times * min(MOST, PER_SENTENCE * len(sentences(instruction)) // 2))
                if total is not None:
                    told = told[: count // 6]
                    turns, asked = count - count // 2, count // 2 - len(told)
                count = turns + asked + len(told)
                found = _brief(pen, chosen, instruction, subject, turns, asked, told, taken)
            else:
                found = _alone(write_turns(pen, chosen, instruction, count, taken))
            for pair in found:
                pairs.append(pair)
                if advance is not None:
                    advance(len(pairs), count)
    if 2 * length + NEAR + longest > limit:  # an output may be the text itself
        pairs = [pair for pair in pairs if _fits(tokenizer, chosen, instruction, pair, longest, limit)]
    if not pairs and not given:
        raise ThoughtError(
            "inputs: the model wrote none that can be used for this instruction. Give pairs, or use a model that "
            "follows instructions."
        )
    return Written(kind, chosen, pairs)


def _fits(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    instruction: str,
    pair: Mapping[str, str],
    longest: int,
    limit: int,
) -> bool:
    """Whether a pair with its output is in the context window."""
    tokens = template.tokenise(tokenizer, instruction, pair["input"], pair.get("output"))
    return max(len(tokens.plain_ids), len(tokens.instructed_ids)) + (0 if "output" in pair else longest) <= limit


def _new(pairs: Sequence[dict[str, str]], there: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The pairs that are not there: by their inputs alone, where they are without outputs."""
    known = [{"input": pair["input"], "output": pair.get("output")} for pair in there]
    inputs = {pair["input"] for pair in there}
    return [pair for pair in pairs if (pair not in known if "output" in pair else pair["input"] not in inputs)]


def _alone(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    return ({"input": text} for text in texts)


def _brief(
    pen: Pen,
    template: PromptTemplate,
    instruction: str,
    subject: str,
    turns: int,
    asked: int,
    told: Sequence[dict[str, str]],
    taken: Distinct,
) -> Iterator[dict[str, str]]:
    """What users write to a model with a long system prompt: messages that it is there for, as many questions about
    what it says, and turns of any kind, each also in the place of those before it that the model does not write; and
    its sentences that have facts told, as too few of these are known otherwise; rules are better left to be
    followed."""
    messages = write_messages(pen, instruction, asked // 2, taken)
    yield from _alone(messages)
    questions: list[str] = []
    with suppress(ThoughtError):
        questions = write_questions(pen, template, instruction, subject, asked - len(messages), taken)
    yield from _alone(questions)
    yield from told
    yield from _alone(write_turns(pen, template, instruction, turns + asked - len(messages) - len(questions), taken))


def _study(
    pen: Pen,
    template: PromptTemplate,
    document: str,
    total: int | None,
    times: float,
    given: Sequence[Mapping[str, str]],
    apart: Sequence[Mapping[str, str]],
    taken: Distinct,
) -> list[dict[str, str]]:
    """Questions, requests and the text itself: of a number that is asked for, half are questions at least."""
    subject = find_subject(pen, document)
    requests = [{"input": one.format(subject=subject)} for one in REQUESTS]
    others = _new([*requests, *recited(document, subject), *repeated(document, subject)], (*given, *apart))
    if total is None:
        count = round(times * min(MOST, PER_SENTENCE * len(sentences(document))))
    else:
        wanted = max(total - len(given), 0)
        others = others[: wanted // 2]
        count = wanted - len(others)
    return [*_alone(write_questions(pen, template, document, subject, count, taken)), *others]
