"""``lit-thought chat``: talk to an adapter's model, plain, instructed and patched side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say
from lit_thought.errors import ThoughtError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from lit_thought.patch.chat import Answers, Chat

__all__ = ["chat"]

_HELP = {
    "scale": "/scale 0.5          multiply the patch; 1 is as it was made",
    "off": "/off                switch the patch off, as /scale 0 does; /on switches it on",
    "on": "",
    "instruction": "/instruction [TEXT] show the instruction, or take another and start over",
    "new": "/new                start over: forget what was said",
    "help": "/help               this list",
    "quit": "/quit               end, as Ctrl-D does",
}


def chat(
    adapter: str,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 256,
    *,
    loading: Loading,
) -> Result:
    """Talk to a model: each message is answered plain, instructed and patched, side by side.

    In a terminal the answers appear as they are written, with what the patched model says otherwise than the instructed
    one marked; /help lists the commands. From a pipe, each line is a message, and the answers are plain text.

    Example: lit-thought chat antonym/
    Example: echo "How do I bake bread?" | lit-thought chat pirate/

    Args:
        adapter: adapter folder that fit wrote, or one on the hub, as OWNER/NAME.
        instruction: the instruction; the one the adapter was made from when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        template: as for fit; the adapter's own when left out.
        max_new_tokens: longest answer.
        loading: the model.
    """
    from rich.console import Console

    from lit_thought.patch.hub import adapter_folder
    from lit_thought.patch.patch import ThoughtPatch

    text = read_instruction(instruction, instruction_file)
    patch = ThoughtPatch.load(adapter_folder(adapter, argument="adapter"))
    model, tokenizer = loading.load()
    talk = patch.chat(model, tokenizer, instruction=text, template=template, max_new_tokens=max_new_tokens)
    console = Console(highlight=False, markup=False)
    live = console.is_terminal and sys.stdin.isatty()
    if talk.instruction is None:
        say("The adapter keeps no instruction: answers are plain and patched. --instruction gives one.")
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
            print(f"> {line}\n\n{answers}\n", flush=True)
    return Result({"answers": [_values(answers) for answers in said]})


def _lines(live: bool) -> Iterator[str]:
    """What the user says, line by line, blank ones left out."""
    if live:
        import readline  # noqa: F401  # input() then edits the line, and remembers

    while True:
        try:
            line = input("\n> " if live else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _answered(talk: Chat, line: str, console: Console) -> Answers:
    """The answers, shown as they are written."""
    from rich.live import Live

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


def _values(answers: Answers) -> dict[str, object]:
    runs = {run: getattr(answers, run) for run in ("plain", "instructed", "patched")}
    shown = {run: None if own is None else {"text": own.text, "prompt_tokens": own.tokens} for run, own in runs.items()}
    return {"message": answers.message, "scale": answers.scale, **shown}
