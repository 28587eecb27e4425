"""The entry point of ``lit-thought``: from the words of a command line to a result and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lit_thought.cli.chat import chat
from lit_thought.cli.demo import demo
from lit_thought.cli.errors import exit_code, tell
from lit_thought.cli.evaluate import evaluate_adapter as evaluate
from lit_thought.cli.evaluate import report
from lit_thought.cli.export import export
from lit_thought.cli.fit import fit, preserve, solve
from lit_thought.cli.hub import push
from lit_thought.cli.inputs import inputs
from lit_thought.cli.inspect import inspect, verify
from lit_thought.cli.output import Output, console, flush, give, say, timed
from lit_thought.cli.parser import PROSE, Command, build_parser, call, complete, lists
from lit_thought.cli.words import joined, nearest, positional
from lit_thought.errors import ThoughtError

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Command] = {
    "fit": fit,
    "chat": chat,
    "demo": demo,
    "evaluate": evaluate,
    "export": export,
    "inputs": inputs,
    "inspect": inspect,
    "preserve": preserve,
    "push": push,
    "report": report,
    "solve": solve,
    "verify": verify,
}
_POSITIONAL = {
    "chat": ("adapter",),
    "demo": ("adapter",),
    "evaluate": ("adapter",),
    "export": ("adapter",),
    "inspect": ("model",),
    "preserve": ("model",),
    "push": ("adapter", "repo_id"),
    "report": ("adapter",),
    "solve": ("statistics",),
}
"""The arguments of a command that may stand right after it, without their names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with one of :data:`~lit_thought.cli.errors.EXIT_CODES`, after one line on standard error, when
            something is wrong.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of an encoding that may lack letters, as in pipes on Windows
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    trace = any(word in ("--traceback", "--traceback=true") for word in given)
    flags: Collection[str] = ()
    try:
        name, values = _parse(given)
        flags = tuple(values)
        output = Output(**{field.name: values.pop(field.name) for field in fields(Output)})
        trace = output.traceback
        with console(output), timed(f"lit-thought {name}"):
            _warn(values)
            result = call(COMMANDS[name], values)
        give(result, output)
    except SystemExit:  # of --help and --version
        flush()
        raise
    except (Exception, KeyboardInterrupt) as error:
        tell(error, trace, flags)
        raise SystemExit(exit_code(error)) from None


def _parse(given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words ask for, and the values of its flags."""
    if "_ARGCOMPLETE" in os.environ:
        complete(COMMANDS, _POSITIONAL)
    parser, parsers = build_parser(COMMANDS, _POSITIONAL, given[0] if given else None, "--version" in given)
    place = next((place for place, word in enumerate(given) if word in COMMANDS), len(given))
    command = "".join(given[place : place + 1])
    asked = parsers.get(command, parser)
    try:
        if place and not given[0].startswith("-"):
            choice = f"choose from {', '.join(COMMANDS)}"
            raise argparse.ArgumentError(None, f"{given[0]!r} is no command ({choice}).{nearest(given[0], COMMANDS)}")
        words = joined(given[:place], parser._option_string_actions)
        if command:
            own = joined(positional(given[place:], _POSITIONAL)[1:], asked._option_string_actions, lists(asked))
            words += [command, *sorted(own, key=lambda word: not word.startswith("--config="))]  # what is typed wins
        values = parser.parse_args(words)
    except argparse.ArgumentError as error:
        text = _explained(str(error), command, asked._option_string_actions).rstrip(".")
        see = f"See lit-thought {command} --help." if command else "See lit-thought --help."
        raise ThoughtError(f"{text}{'' if text.endswith('?') else '.'} {see}") from error
    except UnicodeDecodeError as error:
        raise ThoughtError(f"the config is no UTF-8 text ({error}). Save it as UTF-8.") from error
    name = values["subcommand"]
    return name, vars(values[name])


def _explained(text: str, command: str, known: Iterable[str]) -> str:
    """What argparse says, with a remedy where there is one."""
    if text.lower().startswith("unrecognized arguments"):
        return f"{text}. Put a text of several words into quotes"
    if "arguments are required" in text:
        return text.replace(f" {command}.", " --")
    text = re.sub(r'Parser key "(\w+)"', r"--\1", text)
    text = re.sub(r"^argument (--\w+)(/--\w+\+)?", r"\1", text)
    unknown = re.search(r"ption '(\w+)'", text)
    return text if unknown is None else text + nearest(unknown[1], (name.lstrip("-") for name in known))


def _warn(values: Mapping[str, Any]) -> None:
    r"""Say so where a text holds ``\n`` as typed: a shell makes no newline of it."""
    for name in sorted(PROSE & values.keys()):
        text = values[name]
        if text is not None and r"\n" in text and "\n" not in text:
            say(
                rf"Warning: --{name} holds a backslash and an n, and no newline. Where a newline is meant: $'…\n' in "
                "bash, or a file (--instruction_file, --config)."
            )
