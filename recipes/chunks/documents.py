"""Documents, with questions to test with and the answers that are accepted."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from lit_thought.errors import ThoughtError
from recipes.harness import DATA

FOLDER = DATA / "documents"
LEAD = "Answer each question in one short sentence, using this text:\n\n"
"""What stands before the passage in the prompt, and is part of the chunk."""


class Document(NamedTuple):
    """A passage, and questions about it: to test with, each with accepted answers, and to fit on."""

    name: str
    title: str
    passage: str
    questions: tuple[dict[str, Any], ...]
    given: tuple[str, ...] = ()

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
        return Document(path.stem, data["title"], data["passage"], questions, tuple(data.get("given", ())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(own.stem for own in FOLDER.glob("*.json")))
        raise ThoughtError(
            f"documents: expected some of {known}, or JSON files with title, passage and questions (input, outputs); "
            f"got {name!r} ({type(error).__name__}: {error}); correct the name or the file."
        ) from error


def cut(chunk: str, parts: int) -> list[str]:
    """A document's chunk in parts of about as many words, cut between paragraphs; what leads to the passage stands
    before each. There are fewer where there are fewer paragraphs."""
    lead, *paragraphs = chunk.split("\n\n")
    ends = list(accumulate(len(one.split()) for one in paragraphs))
    groups: dict[int, list[str]] = {}
    for one, end in zip(paragraphs, ends, strict=True):
        middle = end - len(one.split()) / 2
        groups.setdefault(int(parts * middle / ends[-1]), []).append(one)
    return ["\n\n".join([lead, *group]) for group in groups.values()]
