"""Whether an answer is right, or follows the rule of a system prompt: functions of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

from lit_thought.inputs.words import normalised

_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
_PIRATE = re.compile(
    r"\b(a+r+|ahoy|aye|avast|mate[yi]s?|mateys|hearties|ye|yer|yo-ho|landlubbers?|scallywags?|booty|plunder|doubloons?"
    r"|buccaneers?|pirates?|seven seas|high seas)\b",
    re.IGNORECASE,
)
_ARCHAIC = re.compile(
    r"(?<!\w)(thou|thee|thy|thine|hath|doth|hast|dost|ye|'tis|'twas|wherefore|prithee|forsooth|methinks|verily"
    r"|alas|hark|nay)\b",
    re.IGNORECASE,
)
_FRENCH_WORDS = (
    "le la les l un une des du de d et est sont dans pour que qui qu il elle ils elles nous vous je ne pas plus par "
    "sur avec ce cette ces c au aux à en se s son sa ses être a ont mais ou où comme été fait peut votre vos"
)
_ENGLISH_WORDS = (
    "the a an of and is are in for that who it he she they we you i not more by on with this these to as was were "
    "have has but or be been can your from at which their its there here no off get gets take takes cost costs"
)
_FRENCH, _ENGLISH = frozenset(_FRENCH_WORDS.split()), frozenset(_ENGLISH_WORDS.split())
_ENDS = ("}", '"}', "]}", '"]}', '": 0}', ": 0}", ' "": 0}', "0}", '"}]}', "}]}")
"""What may be missing of a JSON object: within a text, a list, a key, and so on."""
_REFUSAL = re.compile(
    r"\b(can't|cannot|can not|unable to|not able to|won't|must not|not allowed to|don't|do not)\s+"
    r"(help|assist|talk|discuss|answer|provide|give|share|speak|suggest|recommend)\b",
    re.IGNORECASE,
)


def contains(text: str, accepted: Iterable[str]) -> bool:
    """Whether one of the accepted forms stands in the text, as whole words."""
    return any(f" {normalised(form)} " in f" {normalised(text)} " for form in accepted)


def talks_like_a_pirate(text: str) -> bool:
    """At least one word that only a pirate would use, or the word pirate itself."""
    return _PIRATE.search(text) is not None


def is_archaic(text: str) -> bool:
    """At least one word of Shakespeare's English that is not said any more."""
    return _ARCHAIC.search(text.replace("’", "'")) is not None


def is_french(text: str) -> bool:
    """French function words make up a tenth of the words or more, and are more than the English ones."""
    french, english, words = _function_words(text)
    return french > english and french >= words / 10


def is_english(text: str) -> bool:
    """English function words make up a tenth of the words or more, and are no fewer than the French ones."""
    french, english, words = _function_words(text)
    return english >= french and 0 < english >= words / 10


def is_of_no_language(text: str) -> bool:
    """A text of four words or fewer with a function word of neither language, such as a name or a number."""
    french, english, words = _function_words(text)
    return bool(text.strip()) and french == english == 0 and words <= 4


def _function_words(text: str) -> tuple[int, int, int]:
    """How many of a text's words are French and English function words, and how many words it has."""
    words = [word.lower() for word in _WORD.findall(text)]
    return sum(word in _FRENCH for word in words), sum(word in _ENGLISH for word in words), len(words)


def is_one_sentence(text: str) -> bool:
    """One end of a sentence (a mark before white space or the end), and nothing after it.

    An abbreviation with a full stop counts as an end; an answer that broke off is no sentence.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text.strip())]
    return ends == [len(text.strip())]


def is_json_object(text: str) -> bool:
    """The whole text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_json_so_far(text: str) -> bool:
    """The whole text is one JSON object, or the beginning of one, for the studies cut long answers."""
    return any(is_json_object(text.rstrip() + end) for end in ("", *_ENDS))


def is_uppercase(text: str) -> bool:
    """At least nine letters in ten are capitals, and there are some."""
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and sum(letter.isupper() for letter in letters) >= 0.9 * len(letters)


def refuses(text: str) -> bool:
    """Says that it cannot or will not help, talk, answer …; whatever follows."""
    return _REFUSAL.search(text.replace("’", "'")) is not None


RULES: dict[str, Callable[[str], bool]] = {
    "pirate": talks_like_a_pirate,
    "french": is_french,
    "sentence": is_one_sentence,
    "json": is_json_so_far,
    "uppercase": is_uppercase,
    "refuse": refuses,
    "shakespeare": is_archaic,
}
"""By the name of the instruction; the others cannot be checked by rule. Of a topic to refuse, questions about that are
checked, and no others."""
