"""The entry point of ``lit-thought``: from the words of a command line to a result and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lit_thought.cli.errors import exit_code, tell
from lit_thought.cli.evaluate import evaluate_adapter as evaluate
from lit_thought.cli.evaluate import report
from lit_thought.cli.export import export
from lit_thought.cli.fit import fit, preserve, solve
from lit_thought.cli.hub import push
from lit_thought.cli.inspect import inspect, verify
from lit_thought.cli.output import Output, console, flush, give, timed
from lit_thought.cli.parser import Command, build_parser, call, complete, positional
from lit_thought.errors import ThoughtError

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Command] = {
    "fit": fit,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "preserve": preserve,
    "push": push,
    "report": report,
    "solve": solve,
    "verify": verify,
}
_POSITIONAL = {
    "export": ("adapter",),
    "inspect": ("model",),
    "preserve": ("model",),
    "push": ("adapter", "repo_id"),
    "report": ("run_dir",),
}
"""The arguments of a command that may stand right after it, without their names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with one of :data:`~lit_thought.cli.errors.EXIT_CODES`, after one line on standard error, when
            something is wrong.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if arguments is None else arguments)
    trace = any(word in ("--traceback", "--traceback=true") for word in given)
    try:
        name, values = _parse(given)
        output = Output(**{field.name: values.pop(field.name) for field in fields(Output)})
        trace = output.traceback
        with console(output), timed(f"lit-thought {name}"):
            result = call(COMMANDS[name], values)
        give(result, output)
    except SystemExit:  # of --help and --version
        flush()
        raise
    except (Exception, KeyboardInterrupt) as error:
        tell(error, trace)
        raise SystemExit(exit_code(error)) from None


def _parse(given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words ask for, and the values of its flags."""
    if "_ARGCOMPLETE" in os.environ:
        complete(COMMANDS)
    parser = build_parser(COMMANDS, given[0] if given else None, "--version" in given)
    try:
        values = parser.parse_args(positional(given, _POSITIONAL))
    except argparse.ArgumentError as error:
        command = f"{given[0]} " if given and given[0] in COMMANDS else ""
        raise ThoughtError(f"{str(error).rstrip('.')}. See lit-thought {command}--help.") from error
    except UnicodeDecodeError as error:
        raise ThoughtError(f"the config is no UTF-8 text ({error}). Save it as UTF-8.") from error
    name = values["subcommand"]
    return name, vars(values[name])
