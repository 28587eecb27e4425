"""Long system prompts, and what an answer under one is checked for: a function of text and wanted value for each rule.

The rules' names are those that the messages of recipes/data/long_prompts state; :data:`RULES` has them all.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_thought.errors import ThoughtError
from recipes.chunks.rules import contains, is_english, is_french, is_json_object, is_of_no_language, refuses
from recipes.harness import DATA

FOLDER = DATA / "long_prompts"
_CODE = re.compile(r"```(\w*)[ \t]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)
"""A fenced block, to the end of the text where no fence ends it: the study cuts long answers."""
_FUNCTION = re.compile(r"^(?:async )?def (\w+)\(", re.MULTILINE)
_LANGUAGES = {"English": is_english, "French": is_french}


def omits(text: str, forms: Sequence[str]) -> bool:
    """None of the forms stands in the text, as whole words, and there is a text."""
    return bool(text.strip()) and not contains(text, forms)


def lacks(text: str, characters: str) -> bool:
    """These characters do not stand in the text, and there is a text."""
    return bool(text.strip()) and characters not in text


def begins_with(text: str, start: str) -> bool:
    """The text begins with these characters, and goes on."""
    return text.startswith(start) and len(text) > len(start)


def ends_with(text: str, line: str) -> bool:
    """The last line is this one, white space around it apart, and not the only one."""
    lines = [own.strip() for own in text.strip().splitlines()]
    return len(lines) > 1 and lines[-1] == line


def at_most_words(text: str, most: int) -> bool:
    """There are words, set apart by white space, and no more than so many."""
    return 0 < len(text.split()) <= most


def in_language(text: str, language: str) -> bool:
    """The text is in English or in French, by its function words; a short one without any is in both."""
    return is_of_no_language(text) or _LANGUAGES[language](text)


def refuses_if(text: str, wanted: bool) -> bool:
    """The text refuses if it has to, and does not if it must not; an empty one does neither."""
    return bool(text.strip()) and refuses(text) == wanted


def json_keys(text: str, keys: Sequence[str]) -> bool:
    """The whole text is one JSON object with these keys, and no others."""
    return is_json_object(text) and json.loads(text).keys() == set(keys)


def has_value(text: str, key: str, value: str) -> bool:
    """The first JSON object in the text, whatever stands around it, has this value of a key."""
    return first_object(text).get(key) == value


def has_label(text: str, label: str) -> bool:
    """The right label is named."""
    return has_value(text, "label", label)


def has_priority(text: str, priority: str) -> bool:
    """The right priority is named."""
    return has_value(text, "priority", priority)


def names_tool(text: str, name: str) -> bool:
    """The right tool is named."""
    return has_value(text, "tool", name)


def has_arguments(text: str, wanted: Mapping[str, Sequence[Any]]) -> bool:
    """Each of these arguments of a tool call has one of its accepted values; case does not count, "10" is not 10."""
    arguments = first_object(text).get("arguments")
    if not isinstance(arguments, dict):
        return False
    return all(_plain(arguments.get(name)) in map(_plain, values) for name, values in wanted.items())


def _plain(value: Any) -> Any:
    """A value to compare with."""
    return value.strip().casefold() if isinstance(value, str) else value


def first_object(text: str) -> dict[str, Any]:
    """The JSON object that begins at the text's first brace; empty where there is none."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return {}
    return dict(found)


def is_code_block(text: str, language: str) -> bool:
    """The whole text is one fenced block of this language."""
    found = _CODE.fullmatch(text.strip())
    return found is not None and found[1] == language and "```" not in found[2]


def code_of(text: str) -> str:
    """The text's first fenced block; without any the text."""
    found = _CODE.search(text)
    return found[2] if found else text


def first_function(text: str) -> ast.FunctionDef | None:
    """The first function of the text's code, which is read and never run; None where it is no Python or has none."""
    try:
        tree = ast.parse(code_of(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def defines(text: str, name: str) -> bool:
    """The code's first function has this name, whether it has come to its end or not."""
    found = _FUNCTION.search(code_of(text))
    return found is not None and found[1] == name


def is_annotated(text: str, wanted: bool) -> bool:
    """Every parameter of the function and its return value have type hints."""
    own = first_function(text)
    if own is None:
        return False
    arguments = (*own.args.posonlyargs, *own.args.args, *own.args.kwonlyargs)
    return (own.returns is not None and all(one.annotation is not None for one in arguments)) == wanted


def has_docstring(text: str, wanted: bool) -> bool:
    """The function has a docstring of one line that ends with a full stop."""
    own = first_function(text)
    if own is None:
        return False
    about = ast.get_docstring(own, clean=False) or ""
    return (about.endswith(".") and "\n" not in about) == wanted


def has_no_comments(text: str, wanted: bool) -> bool:
    """No number sign stands in the function's code."""
    return first_function(text) is not None and ("#" not in code_of(text)) == wanted


def calls_none_of(text: str, names: Sequence[str]) -> bool:
    """The function calls nothing by one of these names."""
    own = first_function(text)
    if own is None:
        return False
    called = {node.func.id for node in ast.walk(own) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return not called & set(names)


class Rule(NamedTuple):
    """Whether a text is as wanted, and the type of what is wanted."""

    holds: Callable[[str, Any], bool]
    wants: type


RULES: dict[str, Rule] = {
    "states": Rule(contains, list),
    "omits": Rule(omits, list),
    "lacks": Rule(lacks, str),
    "begins_with": Rule(begins_with, str),
    "ends_with": Rule(ends_with, str),
    "at_most_words": Rule(at_most_words, int),
    "language": Rule(in_language, str),
    "refuses": Rule(refuses_if, bool),
    "json_keys": Rule(json_keys, list),
    "label": Rule(has_label, str),
    "priority": Rule(has_priority, str),
    "tool": Rule(names_tool, str),
    "arguments": Rule(has_arguments, dict),
    "code_block": Rule(is_code_block, str),
    "function": Rule(defines, str),
    "annotated": Rule(is_annotated, bool),
    "docstring": Rule(has_docstring, bool),
    "uncommented": Rule(has_no_comments, bool),
    "calls_none_of": Rule(calls_none_of, list),
}
"""By the name that a message states it by."""


def kept(text: str, rules: Mapping[str, Any]) -> dict[str, bool]:
    """Of each rule that applies whether the text follows it."""
    return {name: RULES[name].holds(text, wanted) for name, wanted in rules.items()}


class LongPrompt(NamedTuple):
    """A system prompt, the rules for all of its answers, and messages, each with those for its own."""

    name: str
    title: str
    chunk: str
    rules: dict[str, Any]
    messages: tuple[dict[str, Any], ...]

    def rules_of(self, message: str) -> dict[str, Any]:
        """All rules that the answer to a message is checked for."""
        own = next(row["rules"] for row in self.messages if row["input"] == message)
        return {**self.rules, **own}


def load_prompt(name: str) -> LongPrompt:
    """Read recipes/data/long_prompts/<name>.txt and .json, or files of that form.

    Raises:
        ThoughtError: There are no such files, they lack something, or they state a rule that there is not.
    """
    path = FOLDER / f"{name}.json"
    path = path if path.is_file() else Path(name).with_suffix(".json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        chunk = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        messages = tuple({"input": row["input"], "rules": dict(row["rules"])} for row in data["messages"])
        own = LongPrompt(path.stem, data["title"], chunk, dict(data.get("rules", {})), messages)
        for rules in (own.rules, *(row["rules"] for row in messages)):
            for rule, wanted in rules.items():
                if not isinstance(wanted, RULES[rule].wants):
                    raise TypeError(f"the rule {rule} wants a {RULES[rule].wants.__name__}, not {wanted!r}")
            kept("", rules)
        return own
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(own.stem for own in FOLDER.glob("*.json")))
        raise ThoughtError(
            f"prompts: expected some of {known}, or JSON files with title and messages (input, rules), each beside "
            f"its prompt as .txt, with rules of {', '.join(RULES)}; got {name!r} ({type(error).__name__}: {error}); "
            "correct the name or the files."
        ) from error
