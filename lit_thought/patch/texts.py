"""What turns one text into another."""

from __future__ import annotations

import difflib
import re

__all__ = ["differences"]

_WORDS = re.compile(r"\S+\s*|^\s+")


def differences(text: str, reference: str) -> list[tuple[str, str]]:
    """What turns ``reference`` into ``text``, by words: (equal, insert or delete, words) in order.

    White space is part of the word before it. The equal and inserted words make up ``text``, up to the white space at
    its ends. Where the two have no word in common, nothing is said to be deleted: ``text`` is another one altogether.
    """
    words, known = (_WORDS.findall(side.strip()) for side in (text, reference))
    pieces: list[tuple[str, str]] = []
    # compared without their white space, so that a word at the end is the same word
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in known], [w.strip() for w in words], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind in ("delete", "replace"):
            pieces.append(("delete", "".join(known[a:b])))
        if kind in ("insert", "replace"):
            pieces.append(("insert", "".join(words[c:d])))
        if kind == "equal":
            pieces.append(("equal", "".join(words[c:d])))
    if not words or any(kind == "equal" for kind, _ in pieces):
        return pieces
    return [piece for piece in pieces if piece[0] == "insert"]
