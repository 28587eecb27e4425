"""Words and sentences of texts in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["LETTER", "is_pair", "joined", "normalised", "sentences", "spaced", "words"]

LETTER = (
    "[\\w\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e\u0eb1-\u0ece"
    "\u102b-\u103e\u1056-\u109d\u17b4-\u17d3]"
)
"""Pattern of what belongs to a word: ``\\w``, and the accents and vowel signs that it leaves out."""
_WORD = re.compile(f"{LETTER}+")
_UNSPACED = re.compile(
    "[\u0e01-\u0e4e\u0e80-\u0eff\u1000-\u1049\u1780-\u17d3\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
"""A run of a script without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
_FULL = re.compile("[。！？][」』”’）]?$")
_END = re.compile("(?<=[.!?؟।۔])\\s+|(?<=[。！？។။])(?![。！？」』”’）])\\s*|(?<=[。！？][」』”’）])\\s*")
"""Between sentences."""
_LEADS = re.compile(r"[:：]$|^\W*\d{1,3}[.)]$")
"""What is no sentence, but leads to the next: the number of a list's item, too."""


def spaced(text: str) -> str:
    """The text with spaces between its words: scripts without any in pairs of neighbouring characters, each overlapping
    the next, as search engines index them; all else as it is."""
    return _UNSPACED.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", text)


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(max(len(run) - 1, 1))]


def is_pair(word: str) -> bool:
    """Whether a word of :func:`spaced` text is such a pair of characters."""
    return len(word) == 2 and _UNSPACED.fullmatch(word) is not None


def words(text: str) -> list[str]:
    """A text's words, those of scripts without spaces in pairs (:func:`spaced`)."""
    return _WORD.findall(spaced(text))


def joined(parts: Iterable[str]) -> str:
    """Sentences one after the other, with a space between them unless the first ends with a full-width sign."""
    return "".join(f"{one}{'' if _FULL.search(one) else ' '}" for one in parts).strip()


def normalised(text: str) -> str:
    """Words and numbers in lower case, with their signs (-5, 3+4, C#) and one space between them; no comma in 1,000; a
    text without any as it is."""
    plain = re.sub(r"(?<=\d),(?=\d)", "", unicodedata.normalize("NFKC", text).casefold())
    signs = {match.start() for match in re.finditer(r"(?<!\w)-(?=\d)|(?<=\w)#|[*/](?=\d)", plain)}
    kept = (one if i in signs or _is_said(one) else " " for i, one in enumerate(plain))
    return " ".join("".join(kept).split()) or text.strip()


def _is_said(character: str) -> bool:
    """Whether it belongs to a word (vowel signs of Indian scripts are marks), or is a sign of mathematics."""
    return character.isalnum() or character == "_" or unicodedata.category(character)[:1] == "M" or character in "+<=>"


def sentences(text: str) -> list[str]:
    """A text's sentences: cut after a full stop, a question mark or an exclamation mark before white space (after the
    full-width ones without), and at line breaks; no headings (``# …``), no numbers of a list's items (``1.``), and
    nothing that leads to what comes next (``…:``)."""
    lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = [part.strip() for line in lines for part in _END.split(line)]
    return [part for part in parts if re.search(r"\w", part) and not _LEADS.search(part)]
