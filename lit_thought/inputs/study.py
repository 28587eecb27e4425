"""What to ask about a document, and what to have said of it, so that the model knows it afterwards (self-study).

Three kinds of pairs:

- *Questions* that the model writes: lists of them, with the document before it, and one about each sentence in turn,
  after :data:`FORMS`, so that no part of the document goes without. The instructed model answers them.
- *Requests* about the whole, answered by the instructed model: :data:`REQUESTS`.
- The *text itself*, to be recited: each sentence told, and passages repeated after their first words.

The second and third are the reference texts that PatchKV (arXiv 2609.39329) fits the same least squares to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lit_thought.errors import ThoughtError
from lit_thought.inputs.pen import Distinct, Pen, normalised
from lit_thought.prompts.template import PromptTemplate

__all__ = ["FORMS", "REQUESTS", "About", "find_subject", "recited", "repeated", "sentences", "write_questions"]

SAMPLING = {"temperature": 0.6, "top_k": 50}
LONGEST = 24
"""Words of a question, and tokens of one about a sentence; longer ones are dropped."""
LISTED = 20
"""Questions asked for at once, ..."""
LISTS = 8
"""... in as many samples of each wording in :data:`ASKING`."""
ROUNDS, DRAWN = 8, 32
"""Most draws of questions about sentences, and questions of a draw, or one about each sentence."""

FORMS = (
    """Write a question that the text answers. The question says what it is about.

About: Mars
Text: It has two moons, which are called Phobos and Deimos.
Question: How many moons does Mars have?

About: the violin
Text: The four strings are played with a bow of horsehair.
Question: What is the bow of a violin made of?

About: Marie Curie
Text: In 1903 she received the Nobel Prize together with her husband Pierre.
Question: Who shared the Nobel Prize with Marie Curie?

About: {about}
Text: {sentence}
Question:""",
    """Read the text. Then ask for one word or number in it.

About: Marie Curie
Text: She was born in Warsaw, the capital of Poland, in 1867.
Question: In which year was Marie Curie born?

About: the camel
Text: A thirsty camel can drink a hundred litres of water in ten minutes.
Question: How much water can a camel drink at once?

About: Mars
Text: Its red colour comes from rust, which covers the ground everywhere.
Question: What gives Mars its red colour?

About: {about}
Text: {sentence}
Question:""",
    """A visitor asks a guide about something, and the text has the answer.

About: the Eiffel Tower
Text: It was built by Gustave Eiffel for the world fair of 1889 and weighs 10,100 tonnes.
Question: Can you tell me who built the Eiffel Tower?

About: the violin
Text: The most famous maker of violins was Antonio Stradivari, who worked in Cremona.
Question: I heard about a famous maker of violins. What was his name?

About: the camel
Text: Camels store fat in their humps, which they live on when there is no food.
Question: What does a camel keep in its hump?

About: {about}
Text: {sentence}
Question:""",
)
"""Prompts for a question; the examples show how to name the subject where the text has only a pronoun."""

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


def sentences(text: str) -> list[str]:
    """A text's sentences: cut after a full stop, a question mark or an exclamation mark before white space, and at
    line breaks; no headings (``# …``), and nothing that leads to what comes next (``…:``)."""
    lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = [part.strip() for line in lines for part in re.split(r"(?<=[.!?])\s+", line)]
    return [part for part in parts if re.search(r"\w", part) and not part.endswith(":")]


def find_subject(pen: Pen, document: str) -> str:
    """What a document is about, in a few words: its heading where it has one, else what the model says."""
    head, _, rest = document.strip().partition("\n")
    heading = head.lstrip("# ").strip()
    if rest.strip() and len(heading.split()) <= 10 and heading[-1:] not in ".!?:":
        return heading
    text = " ".join(sentences(document)[:4])
    prompt = pen.tokenizer(SUBJECT.format(text=text))["input_ids"]
    return pen.write([prompt], 16, stop="\n")[0].text.strip(" .") or "the text"


def write_questions(
    pen: Pen, template: PromptTemplate, document: str, subject: str, count: int, taken: Distinct
) -> list[str]:
    """Questions about a document, in the words of the model.

    Up to half of them come from lists, where the template is a chat's; of the others each sentence gets as many.

    Returns:
        ``count`` at most.

    Raises:
        ThoughtError: when the model writes none that can be kept.
    """
    about = About(document, subject)
    kept: list[str] = []
    if template.is_chat:
        kept += _from_lists(pen, template, document, subject, count // 2, about, taken)
    kept += _by_sentence(pen, document, subject, count - len(kept), about, taken)
    if not kept:
        raise ThoughtError(
            "inputs: expected the model to write questions about the document, but it wrote none that name something "
            "in it. Give pairs, or use a model that follows instructions."
        )
    return kept


def _from_lists(
    pen: Pen, template: PromptTemplate, document: str, subject: str, count: int, about: About, taken: Distinct
) -> list[str]:
    asked = [wording.format(subject=subject) for _ in range(LISTS) for wording in ASKING]
    asked = asked[: max(len(ASKING), -(-2 * count // LISTED))] if count else []
    prompts = [template.tokenise(pen.tokenizer, document, one).instructed_ids for one in asked]
    kept: list[str] = []
    for one in pen.write(prompts, LISTED * 16, sampling={"temperature": 0.9, "top_k": 50}) if prompts else []:
        lines = [re.sub(r"^\W*(\d+[.):]\s*)?\W*", "", line.strip()).rstrip("*_ ") for line in one.text.splitlines()]
        kept += [line for line in lines if about.asks(line) and taken.new(line)]
    return kept[:count]


def _by_sentence(pen: Pen, document: str, subject: str, count: int, about: About, taken: Distinct) -> list[str]:
    parts = sentences(document)
    share = -(-count // len(parts))
    kept: list[list[str]] = [[] for _ in parts]
    for number in range(ROUNDS):
        wanting = [i for i, own in enumerate(kept) if len(own) < share]
        if not wanting or count <= 0:
            break
        wanting *= -(-DRAWN // len(wanting))
        form = FORMS[number % len(FORMS)]
        prompts = [pen.tokenizer(form.format(about=subject, sentence=parts[i]))["input_ids"] for i in wanting]
        for i, one in zip(wanting, pen.write(prompts, LONGEST, stop="\n", sampling=SAMPLING), strict=True):
            if len(kept[i]) < share and about.asks(one.text) and taken.new(one.text):
                kept[i].append(one.text)
    return [question for row in _rows(kept) for question in row][:count]


def _rows(columns: Sequence[Sequence[str]]) -> Iterable[list[str]]:
    """The first of each, the second of each, …"""
    for number in range(max(map(len, columns), default=0)):
        yield [own[number] for own in columns if number < len(own)]


class About:
    """Whether a question is about a document: it names the subject, or something of the document, and no other name.

    Names are words with a capital that do not stand first; a word of the subject may have an ending.
    """

    def __init__(self, document: str, subject: str) -> None:
        self.known = {*re.findall(r"\w+", f"{document} {subject}"), "I"}
        later = [word for part in sentences(document) for word in re.findall(r"\w+", part)[1:]]
        self.names = {word for word in later if word[0].isupper()}
        self.subject = tuple(word for word in normalised(subject).split() if len(word) > 3)
        self.words = {word.lower() for word in self.known if len(word) > 5}

    def asks(self, text: str) -> bool:
        """Whether it is such a question, of 4 to :data:`LONGEST` words."""
        words = re.findall(r"\w+", text)
        if not text.endswith("?") or not 4 <= len(words) <= LONGEST:
            return False
        names = {word for word in words[1:] if word[0].isupper()}
        lower = [word.lower() for word in words]
        named = bool(self.subject) and any(word.startswith(self.subject) for word in lower)
        told = named or not names.isdisjoint(self.names) or sum(word in self.words for word in lower) >= 2
        return names <= self.known and told


def recited(document: str, subject: str) -> list[dict[str, str]]:
    """Each sentence of a document as an answer to the first of :data:`REQUESTS`."""
    asked = REQUESTS[0].format(subject=subject)
    return [{"input": asked, "output": part} for part in sentences(document)]


def repeated(document: str, subject: str, words: int = 60) -> list[dict[str, str]]:
    """Passages of about ``words`` words after their first words: ``Repeat the text about … from "…" on.``"""
    parts, pairs, at = sentences(document), [], 0
    while at < len(parts):
        stop = at + 1
        while stop < len(parts) and len(" ".join(parts[at : stop + 1]).split()) <= words:
            stop += 1
        start = " ".join(parts[at].split()[:5])
        asked = f'Repeat the text about {subject} from "{start}" on.'
        pairs.append({"input": asked, "output": " ".join(parts[at:stop])})
        at = stop
    return pairs
