"""What to ask about a document, and what to have said of it, so that the model knows it afterwards (self-study).

Three kinds of pairs:

- *Questions* that the model writes: lists of them, with the document before it, and one for each word that says
  something, after :data:`ASKING_FOR` or :data:`FORMS`, so that no part of the document goes without. The instructed
  model answers them; a question that it answers with nothing of the document is dropped (after the round-trip
  consistency of Alberti et al. 2019, arXiv 1906.05416).
- *Requests* about the whole, answered by the instructed model: :data:`REQUESTS`.
- The *text itself*, to be recited: each sentence told, and passages repeated after their first words.

The second and third are the reference texts that PatchKV (arXiv 2609.39329) fits the same least squares to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from lit_thought.errors import ThoughtError
from lit_thought.inputs.pen import Distinct, Pen
from lit_thought.inputs.words import LETTER, is_pair, joined, normalised, sentences, spaced, words
from lit_thought.prompts.template import PromptTemplate

__all__ = [
    "ASKING_FOR",
    "FORMS",
    "REQUESTS",
    "About",
    "find_subject",
    "has_fact",
    "recited",
    "repeated",
    "write_questions",
]

_WORD = re.compile(f"{LETTER}(?:(?:{LETTER}|[,.])*{LETTER})?")
_ENDS = re.compile("([?？؟\u037e]|か。?|(?<=[\u0370-\u03ff\u1f00-\u1fff]);)$")
"""How questions end, the Greek ones with what looks like a semicolon."""
SAMPLING = {"temperature": 0.6, "top_k": 50}
LIST_SAMPLING = {"temperature": 0.9, "top_k": 50}
"""Of lists, whose items are to differ."""
LONGEST = 24
"""Words of a question, and tokens of one that asks for a word, and of its answer; longer questions are dropped."""
OPENING, GUESSES = 4, 8
"""Sentences at a document's beginning; samples of what it is about, where the likeliest cannot be."""
LISTED = 20
"""Questions asked for at once, ..."""
LISTS = 8
"""... in as many samples of each wording in :data:`ASKING`."""
ROUNDS, DRAWN = 8, 32
"""Most rounds of questions that ask for a word, and how many a round draws at least, ..."""
SPARE = 1.5
"""... of those that are wanted, since many give the word away."""
SHORT, STEM = 4, 5
"""Letters of a word that says nothing by itself, and letters by which two words are taken for the same."""

ASKING_FOR = (
    'Text about {about}: "{sentence}"\n\nWrite a short question about {about} to which the answer is "{word}". Reply '
    "with the question alone.",
    "Text: {sentence}\nSomebody is curious about {about}. Which question would this person have to ask to hear of "
    '"{word}"? Reply with the question alone, and name what it is about.',
    '"{sentence}"\n\nA quiz about {about} has "{word}" as an answer. Write the question, which must not give the '
    "answer away. Reply with the question alone.",
)
"""Requests for a question, put to the plain model."""

FORMS = (
    """Write a question that has the answer. The question says what it is about and does not give the answer away.

About: Marie Curie
Text: In 1903 she received the Nobel Prize together with her husband Pierre.
Answer: Pierre
Question: Who received the Nobel Prize together with Marie Curie?

About: the camel
Text: A thirsty camel can drink a hundred litres of water in ten minutes.
Answer: hundred
Question: How many litres of water can a thirsty camel drink in ten minutes?

About: Mars
Text: Its red colour comes from rust, which covers the ground everywhere.
Answer: rust
Question: What gives Mars its red colour?

About: {about}
Text: {sentence}
Answer: {word}
Question:""",
    """A visitor asks a guide about something, and the guide has the answer.

About: the Eiffel Tower
Text: It was built by Gustave Eiffel for the world fair of 1889 and weighs 10,100 tonnes.
Answer: 1889
Question: Which year's world fair was the Eiffel Tower built for?

About: the violin
Text: The four strings are played with a bow of horsehair.
Answer: horsehair
Question: What is the bow of a violin made of?

About: Marie Curie
Text: She was born in Warsaw, the capital of Poland, in 1867.
Answer: Warsaw
Question: I heard about Marie Curie. In which city was she born?

About: {about}
Text: {sentence}
Answer: {word}
Question:""",
    """A teacher asks a pupil for one word of the text.

About: the camel
Text: Camels store fat in their humps, which they live on when there is no food.
Answer: food
Question: What is missing when a camel lives on the fat in its humps?

About: the violin
Text: The most famous maker of violins was Antonio Stradivari, who worked in Cremona.
Answer: Stradivari
Question: What was the name of the most famous maker of violins?

About: Mars
Text: It has two moons, which are called Phobos and Deimos.
Answer: Deimos
Question: What is the second moon of Mars called?

About: {about}
Text: {sentence}
Answer: {word}
Question:""",
)
"""Beginnings of the same for templates that are no chat's; the examples name the subject where the text has only a
pronoun."""

ASKING = (
    "Write twenty different short questions about {subject} that the text answers, one on each line. Each names what "
    "it asks about.",
    "A teacher wants to know whether a pupil has learnt every detail about {subject}: names, numbers, dates, places, "
    "reasons. Write twenty short questions for this, one on each line.",
    "Somebody who has never heard of {subject} is curious. Write twenty questions that this person asks, in other "
    "words than the text uses, one on each line.",
)
"""Requests for lists of questions, put to the instructed model."""

REQUESTS = (
    "Tell me about {subject}.",
    "What do you know about {subject}?",
    "List the most important facts about {subject}.",
    "Write a short text about {subject}.",
    "Summarise what is known about {subject}.",
    "List the names, dates and numbers that belong to {subject}, as JSON.",
    "Ask three questions about {subject} and answer them.",
)
"""Inputs that are no questions about one fact."""

SUBJECT = """Text: It has two moons, which are called Phobos and Deimos. Its red colour comes from rust.
The text is about: the planet Mars

Text: Travel must be booked ten days ahead. Nordwick Ltd pays for second class only, and for hotels of up to 90 euros.
The text is about: the travel policy of Nordwick Ltd

Text: Marie Curie was born in Warsaw, the capital of Poland, in 1867. In 1903 she received the Nobel Prize.
The text is about: Marie Curie

Text: {text}
The text is about:"""


def find_subject(pen: Pen, document: str) -> str:
    """What a document is about, in a few words: its heading where it has one, else what the model says of all of it, or
    of its beginning, at first greedily, then in samples, until all names in that are in the document; of several those
    words which are in more of its sentences; "the text" where there are none."""
    head, _, rest = document.strip().partition("\n")
    heading = head.lstrip("# ").strip()
    short = len(heading.split()) <= 10 and len(spaced(heading).split()) <= 30
    if rest.strip() and short and re.search(r"\w", heading) and heading[-1] not in ".!?:,;。！？：，；、":
        return heading
    parts = sentences(document)
    views = (parts, parts[:OPENING])
    prompts = [pen.tokenizer(SUBJECT.format(text=" ".join(view)))["input_ids"] for view in views]
    known = set(words(document))
    often = Counter(stem for part in parts for stem in _stems(part))
    for draws, sampling in ((1, None), (GUESSES, SAMPLING)):
        said = [one.text.strip(" .") for one in pen.write(prompts * draws, 16, stop="\n", sampling=sampling)]
        true = [one for one in said if one and _names(words(one)) <= known]
        if true:
            return max(true, key=lambda one: sum(often[stem] for stem in _saying(f"the {one}")))
    return "the text"


def write_questions(
    pen: Pen, template: PromptTemplate, document: str, subject: str, count: int, taken: Distinct
) -> list[str]:
    """Questions about a document, in the words of the model, whose answers between them are to say all of it.

    Up to half of them come from lists, where the template is a chat's. The others ask for a word of a sentence each (a
    name, a number or a longer word), in every round for those that the fewest answers have had so far. A question is
    kept if the instructed model's answer tells something (:meth:`About.told`): a question that gives its answer away,
    or to which the document has none, is nothing to learn from.

    Returns:
        ``count`` at most.

    Raises:
        ThoughtError: when the model writes none that can be kept.
    """
    if count <= 0:
        return []
    about = About(document, subject)
    kept: list[str] = []
    told: Counter[str] = Counter()
    ending = template.ending(pen.tokenizer)

    def keep(questions: Iterable[str], most: int) -> None:
        new = [one for one in questions if about.asks(one) and taken.new(one)]
        prompts = [template.tokenise(pen.tokenizer, document, one).instructed_ids for one in new]
        answers = pen.write(prompts, LONGEST, stop=ending["stop"], ends=ending["ends"])
        for question, answer in zip(new, answers, strict=True):
            if len(kept) < most and (found := about.told(question, answer.text)):
                kept.append(question)
                told.update(found)

    if template.is_chat:
        keep(_listed(pen, template, document, subject, count // 2), count // 2)
    words = [(part, word, stem) for part in sentences(document) for stem, word in about.words_of(part).items()]
    asked: Counter[int] = Counter()
    for number in range(ROUNDS):
        wanted = count - len(kept)
        if wanted <= 0:
            break
        rarest = sorted(range(len(words)), key=lambda i: told[words[i][2]] + asked[i])
        chosen = rarest[: max(DRAWN, round(SPARE * wanted))]
        asked.update(chosen)
        prompts = [_asking_for(pen, template, document, subject, number, *words[i][:2]) for i in chosen]
        drawn = pen.write(prompts, LONGEST, stop="\n", sampling=SAMPLING)
        keep([one.text for one, i in zip(drawn, chosen, strict=True) if words[i][2] not in _stems(one.text)], count)
    if not kept:
        raise ThoughtError(
            "inputs: expected the model to write questions about the document and to answer them from it, but it did "
            "not. Give pairs, or use a model that follows instructions."
        )
    return kept


def _listed(pen: Pen, template: PromptTemplate, document: str, subject: str, count: int) -> list[str]:
    asked = [wording.format(subject=subject) for _ in range(LISTS) for wording in ASKING]
    asked = asked[: max(len(ASKING), -(-2 * count // LISTED))] if count else []
    prompts = [template.tokenise(pen.tokenizer, document, one).instructed_ids for one in asked]
    lists = pen.write(prompts, LISTED * 16, sampling=LIST_SAMPLING)
    lines = [line.strip() for one in lists for line in one.text.splitlines()]
    return [re.sub(r"^\W*(\d+[.):]\s*)?\W*", "", line).rstrip("*_ ") for line in lines]


def _asking_for(
    pen: Pen, template: PromptTemplate, document: str, subject: str, number: int, part: str, word: str
) -> Sequence[int]:
    """The prompt for a question to which a word of a sentence is the answer, in one of the wordings."""
    forms = ASKING_FOR if template.is_chat else FORMS
    request = forms[number % len(forms)].format(about=subject, sentence=part, word=word)
    if template.is_chat:
        return template.tokenise(pen.tokenizer, document, request).plain_ids
    ids: list[int] = pen.tokenizer(request)["input_ids"]
    return ids


def _names(words: Iterable[str]) -> set[str]:
    """Those with a capital."""
    return {word for word in words if word[0].isupper()}


def _stem(word: str) -> str:
    """What of a word tells whether another is the same: its beginning, all of a number."""
    plain = normalised(word)
    return plain if re.search(r"\d", plain) else plain[:STEM]


def _stems(text: str) -> set[str]:
    """The beginnings of a text's words."""
    return {_stem(word) for word in _WORD.findall(spaced(text))}


class About:
    """What is about a document.

    Names are words with a capital that do not stand first in a sentence.
    """

    def __init__(self, document: str, subject: str) -> None:
        self.known = {*words(f"{document} {subject}"), "I"}
        later = [word for part in sentences(document) for word in words(part)[1:]]
        self.names = _names(later)
        self.subject = tuple(one for one in spaced(normalised(subject)).split() if len(one) > 3 or is_pair(one))
        self.words = {word.lower() for word in self.known if len(word) > 5 or is_pair(word)}
        self.stems, self.given = _stems(f"{document} {subject}"), _stems(subject)

    def asks(self, text: str) -> bool:
        """Whether it is a question about the document, of 4 to :data:`LONGEST` words: it names the subject (the words
        may have an ending) or something of the document, and no other name."""
        said = words(text)
        if not _ENDS.search(text) or not 4 <= len(said) <= LONGEST:
            return False
        names = _names(said[1:])
        lower = [word.lower() for word in said]
        named = bool(self.subject) and any(word.startswith(self.subject) for word in lower)
        told = named or not names.isdisjoint(self.names) or sum(word in self.words for word in lower) >= 2
        return names <= self.known and told

    def words_of(self, text: str) -> dict[str, str]:
        """Its words that say something, by their beginnings: names, numbers and words of more than :data:`SHORT`
        letters (or pairs of characters), without the subject's."""
        return {stem: word for stem, (word, _) in _saying(text).items() if stem not in self.given}

    def mentions(self, text: str) -> bool:
        """Whether a word that says something is one of the document's."""
        return not self.stems.isdisjoint(_saying(text))

    def told(self, question: str, answer: str) -> set[str]:
        """The beginnings of the words with which an answer says something of the document that is not in its question;
        none where it has a name or number that is not in the document, or fewer words of it than others."""
        known = _stems(question) | self.given
        new = {stem: exact for stem, (_, exact) in _saying(answer).items() if stem not in known}
        ours = new.keys() & self.stems
        foreign = any(exact for stem, exact in new.items() if stem not in ours)
        return set() if foreign or len(new) > 2 * len(ours) else ours


def _saying(text: str) -> dict[str, tuple[str, bool]]:
    """By their beginnings the words that say something, each with whether it is a name or a number."""
    found: dict[str, tuple[str, bool]] = {}
    for part in re.split(r"(?<=[.!?:])\s+", text):
        for place, word in enumerate(_WORD.findall(spaced(part))):
            exact = bool(re.search(r"\d", word)) or (place > 0 and word[0].isupper())
            if exact or len(word) > SHORT or is_pair(word):
                found.setdefault(_stem(word), (word, exact))
    return found


def has_fact(text: str, subject: str) -> bool:
    """Whether a sentence has a name or number that is not the subject's. One of a script without capitals always has,
    as its names look like other words."""
    given = _stems(subject)
    named = any(exact and stem not in given for stem, (_, exact) in _saying(text).items())
    return named or text.upper() == text.lower()


def recited(document: str, subject: str) -> list[dict[str, str]]:
    """Each sentence of a document as an answer to the first of :data:`REQUESTS`."""
    asked = REQUESTS[0].format(subject=subject)
    return [{"input": asked, "output": part} for part in sentences(document)]


def repeated(document: str, subject: str, length: int = 60) -> list[dict[str, str]]:
    """Passages of about ``length`` words after their first words: ``Repeat the text about … from "…" on.``"""
    parts, pairs, at = sentences(document), [], 0
    while at < len(parts):
        stop = at + 1
        while stop < len(parts) and len(spaced(joined(parts[at : stop + 1])).split()) <= length:
            stop += 1
        start = " ".join(parts[at].split()[:5])
        start = start[:10] if len(spaced(start).split()) > 10 else start  # of a script without spaces
        asked = f'Repeat the text about {subject} from "{start}" on.'
        pairs.append({"input": asked, "output": joined(parts[at:stop])})
        at = stop
    return pairs
