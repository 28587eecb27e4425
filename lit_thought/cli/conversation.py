"""A conversation on the command line: what the user types, and the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live

from lit_thought.cli.output import say
from lit_thought.errors import ThoughtError, did_you_mean
from lit_thought.patch.chat import Answers, Chat
from lit_thought.patch.results import RUNS

__all__ = ["converse"]

_HELP = {
    "scale": "/scale 0.5          multiply the patch; 1 is as it was made",
    "off": "/off                switch the patch off, as /scale 0 does; /on switches it on",
    "on": "",
    "instruction": "/instruction [TEXT] show the instruction, or take another and start over",
    "new": "/new                start over: forget what was said",
    "help": "/help               this list",
    "quit": "/quit               end, as Ctrl-D does",
}


def converse(talk: Chat) -> list[dict[str, Any]]:
    """Answer what comes from standard input, line by line, until its end or ``/quit``; in a terminal as it is written.

    Returns:
        The answers, as JSON values.
    """
    console = Console(highlight=False, markup=False)
    live = console.is_terminal and sys.stdin.isatty()
    if live:
        say("Three models are listening. /help lists commands, Ctrl-D ends.")
    said = []
    for line in _lines(live):
        if line.startswith("/"):
            if line.split()[0] == "/quit":
                break
            _obey(talk, line)
            continue
        try:
            answers = _answered(talk, line, console) if live else talk.ask(line)
        except ThoughtError as error:
            if not live:
                raise
            say(str(error))
            continue
        said.append(answers)
        if not live:
            try:
                print(f"> {line}\n\n{answers}\n", flush=True)
            except BrokenPipeError:  # a reader that has seen enough
                break
    return [_values(answers) for answers in said]


def _lines(live: bool) -> Iterator[str]:
    """What the user says, line by line, blank ones left out."""
    if live:
        with suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  # input() then edits the line, and remembers

    while True:
        try:
            line = input("\n> " if live else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ThoughtError(f"standard input: expected UTF-8 text, one question a line; {error}.") from None
        if line.strip():
            yield line.strip()


def _answered(talk: Chat, line: str, console: Console) -> Answers:
    """The answers, shown as they are written."""
    with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as shown:
        return talk.ask(line, shown.update)


def _obey(talk: Chat, line: str) -> None:
    """A command of the user's, /scale and so on; a wrong one is explained, and changes nothing."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    commands: dict[str, Callable[[], str]] = {
        "scale": lambda: _scaled(talk, rest),
        "off": lambda: _scaled(talk, "0"),
        "on": lambda: _scaled(talk, "1"),
        "instruction": lambda: _instructed(talk, rest),
        "new": lambda: _renewed(talk),
        "help": lambda: "\n".join(filter(None, _HELP.values())),
    }
    if name not in commands:
        say(f"/{name} is no command.{did_you_mean(name, _HELP)} /help lists them.")
        return
    try:
        say(commands[name]())
    except ThoughtError as error:
        say(str(error))


def _scaled(talk: Chat, text: str) -> str:
    try:
        talk.scale = float(text)
    except ValueError:
        raise ThoughtError(f"/scale takes a number, such as 0.5; got {text!r}.") from None
    return f"The patch is {'off' if talk.scale == 0 else f'on, times {talk.scale:g}'}."


def _renewed(talk: Chat) -> str:
    talk.new()
    return "Started over."


def _instructed(talk: Chat, text: str) -> str:
    if not text:
        return talk.instruction or "There is no instruction. /instruction TEXT gives one."
    talk.instruction = text
    return "Started over with this instruction."


def _values(answers: Answers) -> dict[str, Any]:
    runs = {run: getattr(answers, run) for run in RUNS}
    shown = {run: None if own is None else {"text": own.text, "prompt_tokens": own.tokens} for run, own in runs.items()}
    return {"message": answers.message, "scale": answers.scale, **shown}
