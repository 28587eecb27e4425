"""Self-study: a model writes questions about a passage itself, sentence by sentence; see document.py."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.inputs.pen import normalised
from lit_thought.inputs.study import FORMS, sentences
from lit_thought.runs.generate import generate
from recipes.harness import DATA

FOLDER = DATA / "documents"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
LONGEST = 24
"""Tokens of a question; longer ones are dropped."""
DRAWN = 48
"""How many questions are drawn in a round, at least."""
ROUNDS = 8
"""Most rounds of a document."""

REQUESTS = (
    "Tell me about {title}.",
    "What do you know about {title}?",
    "List the most important facts about {title}.",
    "Write a short text about {title}.",
)
"""Inputs that are no questions about one fact."""


LEAD = "Answer each question in one short sentence, using this text:\n\n"
"""What stands before the passage in the prompt, and is part of the chunk."""


class Document(NamedTuple):
    """A passage, questions about it to test with, each with accepted answers, and given ones to fit on, if any."""

    name: str
    title: str
    passage: str
    given: tuple[str, ...]
    questions: tuple[dict[str, Any], ...]

    @property
    def chunk(self) -> str:
        """The instruction."""
        return LEAD + self.passage


def load_document(name: str) -> Document:
    """Read recipes/data/documents/<name>.json, or a file of that form.

    Raises:
        ThoughtError: There is no such file, or it lacks one of title, passage and questions.
    """
    path = FOLDER / f"{name}.json"
    path = path if path.is_file() else Path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        questions = tuple({"input": row["input"], "outputs": list(row["outputs"])} for row in data["questions"])
        return Document(path.stem, data["title"], data["passage"], tuple(data.get("fit", ())), questions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(own.stem for own in FOLDER.glob("*.json")))
        raise ThoughtError(
            f"documents: expected some of {known}, or JSON files with title, passage and questions (input, outputs); "
            f"got {name!r} ({type(error).__name__}: {error}); correct the name or the file."
        ) from error


def contains(text: str, accepted: Iterable[str]) -> bool:
    """Whether one of the accepted forms stands in the text, as whole words."""
    return any(f" {normalised(form)} " in f" {normalised(text)} " for form in accepted)


def about(question: str, document: Document) -> bool:
    """Whether a question names the subject, or a name of the passage, and no other name.

    Names are words with a capital that do not stand first; a word of the subject may have an ending.
    """
    words = re.findall(r"\w+", question)
    known = {*re.findall(r"\w+", document.passage), *re.findall(r"\w+", document.title), "I"}
    names = {word for word in words[1:] if word[0].isupper()}
    subject = [word for word in re.findall(r"\w+", document.title.lower()) if len(word) > 3]
    named = any(word.startswith(tuple(subject)) for word in normalised(question).split())
    return names <= known and (named or bool(names - {"I"}))


def keep_questions(written: Iterable[str], document: Document, taken: Iterable[str] = ()) -> list[str]:
    """Questions of 4 to 24 words :func:`about` a document, each once however punctuated, and none to test with."""
    seen = {normalised(text) for text in (*taken, *(row["input"] for row in document.questions))}
    kept = []
    for text in written:
        key = normalised(text)
        if text.endswith("?") and 4 <= len(key.split()) <= 24 and key not in seen and about(text, document):
            seen.add(key)
            kept.append(text)
    return kept


def write_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: Document, count: int, seed: int
) -> list[str]:
    """Questions that the model writes about the passage, of each sentence as many, shuffled.

    Each round draws questions about the sentences that have fewer than their share of ``count``, with the next of
    :data:`~lit_thought.inputs.study.FORMS`; after :data:`ROUNDS` of them what is there must do.

    Returns:
        At most ``count`` questions: fewer where a sentence did not get its share.

    Raises:
        ThoughtError: The model writes no question that can be kept.
    """
    parts = sentences(document.passage)
    share = -(-count // len(parts))
    kept: list[list[str]] = [[] for _ in parts]
    for number in range(ROUNDS):
        wanting = [i for i, own in enumerate(kept) if len(own) < share]
        if not wanting:
            break
        wanting *= -(-DRAWN // len(wanting))
        form = FORMS[number % len(FORMS)]
        prompts = [tokenizer(form.format(about=document.title, sentence=parts[i]))["input_ids"] for i in wanting]
        drawn = generate(
            *(model, tokenizer, prompts),
            stop="\n",
            max_new_tokens=LONGEST,
            batch_size=len(prompts),
            seed=seed + number,
            options=SAMPLING,
        )
        for i, written in zip(wanting, drawn, strict=True):
            kept[i] = (kept[i] + keep_questions([written.text], document, chain(*kept)))[:share]
    questions = list(chain(*kept))
    if not questions:
        raise ThoughtError(
            f"questions: expected the model to write some about {document.name}, got none to keep in {ROUNDS} rounds; "
            "use a model that follows examples, or give questions."
        )
    random.Random(seed).shuffle(questions)
    return questions[:count]


def requests(document: Document) -> list[str]:
    """:data:`REQUESTS` about a document's subject."""
    return [form.format(title=document.title) for form in REQUESTS]


def recite(document: Document) -> list[dict[str, str]]:
    """The passage's sentences, each as an answer to the first of :data:`REQUESTS`."""
    asked = REQUESTS[0].format(title=document.title)
    return [{"input": asked, "output": part} for part in sentences(document.passage)]


def coverage(questions: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[int]:
    """In how many of the texts an accepted answer to each question stands."""
    return [sum(contains(text, row["outputs"]) for text in texts) for row in questions]
