"""The parser of ``lit-thought``: flags from the commands' signatures, their help from the docstrings.

Only the command that was asked for gets its flags, and torch is not imported for them, so that ``--help``, a typing
mistake and completion in the shell take no longer than Python itself.
"""

from __future__ import annotations

import inspect
import os
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import wraps
from importlib.metadata import version
from itertools import product
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse

import lit_thought
from lit_thought.cli.config import MODE
from lit_thought.cli.errors import EXIT_CODES
from lit_thought.cli.model import Loading
from lit_thought.cli.output import Output, Result
from lit_thought.cli.words import nearest
from lit_thought.files import check_output_folder, expanded
from lit_thought.settings import PARTS, SITES, TEMPLATES, FitSettings, register_paths

__all__ = ["PROSE", "Command", "build_parser", "call", "command_parser", "complete", "lists"]

Command = Callable[..., Result]
_CONFIG = jsonargparse.ActionConfigFile  # type: ignore[attr-defined]  # which it exports, by other means
_GROUPS: dict[str, type] = {"loading": Loading}
"""Arguments of a command that stand for a group of flags."""
_SETTINGS = "settings"
"""The argument of a command that takes those of :class:`FitSettings`."""
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    os.PathLike: "a path",
    Mapping: "options and their values, as in --generate.top_k 3",
}
_LISTS = {(int,): "whole numbers", (str,): "names"}
"""What values of these types are called, and lists of them."""
PROSE = {"instruction", "message", "template"}
"""Flags whose value may be any text, also null."""


class _Help(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of examples and exit codes."""


def build_parser(
    commands: Mapping[str, Command], places: Mapping[str, Sequence[str]], wanted: str | None, show_versions: bool
) -> tuple[Any, dict[str, Any]]:
    """The parser of all commands, and those of each, with the flags of the ``wanted`` one; of all where a config may
    name it.

    Args:
        commands: the functions by name.
        places: by name, which flags may be given by place, in their order.
        wanted: the first word of the command line.
        show_versions: whether it asks for ``--version``.
    """
    register_paths()
    parser = _new(
        prog="lit-thought",
        description="Turn a prompt into weights, with no training.",
        epilog=_epilog(commands),
        version=_versions() if show_versions else lit_thought.__version__,
    )
    subcommands = parser.add_subcommands(required=True)
    parsers = {}
    for name, command in commands.items():
        summary = _description(command).partition("\n\n")[0].replace("\n", " ")
        asked = wanted is not None and (name == wanted or wanted.startswith(("--config", "--print_config")))
        parsers[name] = command_parser(command, _usage(name, command, places.get(name, ()))) if asked else _new()
        subcommands.add_subcommand(name, parsers[name], help=summary)
    return parser, parsers


def command_parser(command: Command, usage: str | None = None) -> Any:
    """The parser of one command: its own flags, those of the groups that it takes, and those of :class:`Output`."""
    parser = _new(description=_description(command), usage=usage)
    own = {name for name in inspect.signature(command).parameters if name in (*_GROUPS, _SETTINGS)}
    parser.add_function_arguments(command, as_group=False, as_positional=False, skip=own)
    if _SETTINGS in own:
        parser.add_class_arguments(FitSettings, as_group=True)
    for group in (*(_GROUPS[name] for name in own & _GROUPS.keys()), Output):
        parser.add_class_arguments(group, as_group=True)
    for action in parser._actions:
        action.help = action.help and _as_typed(action.help)
        if isinstance(action.default, bool) and action.nargs is None:  # --overwrite is --overwrite true
            action.nargs, action.const = "?", True
        if hasattr(action, "_typehint"):
            _read_as_typed(action)
    return parser


def _as_typed(text: str) -> str:
    """What a docstring says of an argument, for a terminal: without references, and None as it is typed."""
    return re.sub(r"\bNone\b", "null", re.sub(r"\s+\(:\w+:`[^`]+`[^()]*\)", "", text))


def lists(parser: Any) -> set[str]:
    """The flags that take several values."""
    return {f"--{action.dest}" for action in parser._actions if _is_list(_parts(getattr(action, "_typehint", None)))}


def complete(commands: Mapping[str, Command], places: Mapping[str, Sequence[str]]) -> None:
    """Answer a shell that asks, in the variables of argcomplete, how the word at the cursor may go on; then end.

    argcomplete is told to begin at the command, whose parser it gets: it knows nothing of jsonargparse's subcommands.
    """
    start, line = int(os.environ["_ARGCOMPLETE"]), os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    *whole, typed = f"{line}|".split()  # the last one is being typed
    if len(whole) > start and whole[start] in commands:
        os.environ["_ARGCOMPLETE"] = str(start + 1)
        before = whole[start + 1 :]
        if len(before) < len(names := places.get(whole[start], ())) and not any(w[:1] == "-" for w in (*before, typed)):
            line = f"{' '.join(whole)} --{names[len(before)]} {typed[:-1]}"  # as the flag that the word stands for
            os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        parser = command_parser(commands[whole[start]])
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                action.completer = _completer(action)
        parser.parse_args([])
    build_parser(commands, places, None, False)[0].parse_args([])


def _completer(action: Any) -> Callable[..., list[str]]:
    """What a flag's value may be: a word that its type names or that is known for it, and a file, if it may be any text
    but that of a template."""
    from argcomplete.completers import FilesCompleter

    words = [*_words(action._typehint), *_known(action.dest)]
    any_file = "" in words and action.dest != "template"

    def complete(prefix: str, **_: Any) -> list[str]:
        known = [word for word in words if word and word.startswith(prefix)]
        return known + (list(FilesCompleter()(prefix)) if any_file else [])

    return complete


def _known(flag: str) -> Sequence[str]:
    """What a flag may be besides any text: of a model the names of those that are here."""
    if flag == "model":
        from lit_thought.model.source import cached_models

        return ["smollm2", *cached_models()]
    return {"template": TEMPLATES, "sites": SITES, "parts": PARTS}.get(flag, ())


def _words(hint: Any) -> Iterator[str]:
    """The words of literals and truth values; the empty one stands for any text."""
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif hint in (bool, str):
        yield from {bool: ("true", "false"), str: ("",)}[hint]
    elif len(_parts(hint)) > 1:
        for part in _parts(hint):
            yield from _words(part)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other by itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_list(parts: Sequence[Any]) -> bool:
    """Whether several values can be written apart: not where a sequence stands beside a text, since it is one of texts,
    which hold commas and blanks."""
    return _takes_list(parts) and (str not in parts or any(get_origin(part) is list for part in parts))


def _takes_list(parts: Sequence[Any]) -> bool:
    return any(get_origin(part) in (list, Sequence) for part in parts)


def _read_as_typed(action: Any) -> None:
    """Let a text be what was typed, to the letter, where jsonargparse reads YAML and makes nothing of ``# …``, and a
    list one value, or several with commas or blanks between. ``null`` and ``[a, b]`` stay what they are."""
    parts, check = _parts(action._typehint), action._check_type
    words = {*_words(action._typehint), *(() if action.dest in PROSE else ("null",))} - {""}

    @wraps(check)  # jsonargparse asks for the names of its arguments
    def checked(value: Any, *args: Any, **options: Any) -> Any:
        if isinstance(value, str) and value not in words and not (value.startswith("[") and _takes_list(parts)):
            several = value.replace(",", " ").split() if _is_list(parts) else []
            if str in parts and len(several) < 2:
                return value
            if _is_list(parts):
                value = several
        try:
            found = check(value, *args, **options)
            return _with_numbers(found) if any(get_origin(part) is Mapping for part in parts) else found
        except TypeError as error:
            near = nearest(str(value), words - {"null", "true", "false"})
            wanted = _expected(parts, action.default)
            raise TypeError(f'Parser key "{action.dest}": expected {wanted}; got {_shown(value)}.{near}') from error

    action._check_type = checked


def _with_numbers(value: Any) -> Any:
    """Options of any values, with the numbers in their lists as such, where the loader leaves every entry a text."""
    if isinstance(value, dict):
        return {name: _with_numbers(own) for name, own in value.items()}
    return [_with_numbers(_number(own)) for own in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.match(r"[-+]?\d", value):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


def _expected(parts: Sequence[Any], default: Any) -> str:
    """The values of a flag in words. That it can be null is said where it is something else by default: elsewhere null
    is to leave it out."""
    names = []
    for part in parts:
        if part is not type(None) and (part is not int or float not in parts):
            names += list(_words(part)) if get_origin(part) is Literal or part is bool else [_named(part)]
    names += ["null"] if type(None) in parts and default is not None else []
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} or {last}" if first else last


def _named(part: Any) -> str:
    return _KINDS[part] if part in _KINDS else _KINDS.get(get_origin(part)) or _LISTS[get_args(part)]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def call(command: Command, values: Mapping[str, Any]) -> Result:
    """Call a command with the values of its flags, those of :class:`Output` left out."""
    given = {name: value for name, value in values.items() if name != "config"}
    configs = values.get("config") or () if given.get("overwrite") else ()
    for config, name in product(configs, ("out", "statistics_dir")):
        if given.get(name) and expanded(given[name], name).is_dir():
            check_output_folder(given[name], True, name, config=str(config))
    parameters = inspect.signature(command).parameters
    for argument, group in _GROUPS.items():
        if argument in parameters:
            given[argument] = group(**{name: given.pop(name) for name in _names(group)})
    if _SETTINGS in parameters:
        given[_SETTINGS] = {name: given.pop(name) for name in FitSettings.names()}
    return command(**given)


def _new(**options: Any) -> Any:
    parser = jsonargparse.ArgumentParser(
        formatter_class=_Help, exit_on_error=False, allow_abbrev=False, parser_mode=MODE, **options
    )
    parser.add_argument("--config", action=_CONFIG, help="a YAML file with values of the flags.")
    return parser


def _names(group: type) -> list[str]:
    return [field.name for field in fields(group)]


def _usage(name: str, command: Command, places: Sequence[str]) -> str:
    """How a command is called: what may stand right after it, and which flags there must be."""
    parameters = inspect.signature(command).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is not one.KEYWORD_ONLY]
    words = [own.upper() if own in needed else f"[{own.upper()}]" for own in places]
    words += [f"--{own} {own.upper()}" for own in needed if own not in places]
    return " ".join(["lit-thought", name, *words, "[flags]"])


def _description(command: Command) -> str:
    """What the docstring says before its arguments."""
    return (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]


def _epilog(commands: Mapping[str, Command]) -> str:
    examples = [line for one in commands.values() for line in _description(one).splitlines() if "Example:" in line]
    codes = [f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(
        [
            "examples:",
            *(f"  {line.removeprefix('Example: ')}" for line in examples),
            "",
            "Every command takes --config FILE (what is typed wins), --json, --quiet, --verbose and --traceback.",
            "A list takes several words or commas: --blocks 0 1 2. A text is taken to the letter; for a newline,",
            "$'…\\n' in bash.",
            "",
            "exit codes:",
            *codes,
        ]
    )


def _versions() -> str:
    packages = ("torch", "transformers", "peft", "lightning")
    return "\n".join([lit_thought.__version__, *(f"{name} {version(name)}" for name in packages)])
