"""``lit-thought demo``: the three answers on a local web page."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say
from lit_thought.errors import ThoughtError

__all__ = ["demo"]


def demo(
    adapter: str,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 256,
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    loading: Loading,
) -> Result:
    """Talk to a model on a local web page: plain, instructed and patched, with a slider for the patch's scale.

    The page is served until Ctrl-C, to this machine alone unless --host says otherwise, and fetches nothing. It links
    to the adapter's report, where lit-thought report wrote one.

    Example: lit-thought demo antonym/

    Args:
        adapter: adapter folder that fit wrote, or one on the hub, as OWNER/NAME.
        instruction: the instruction; the one the adapter was made from when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        template: as for fit; the adapter's own when left out.
        max_new_tokens: longest answer.
        host: address to serve at; another than this machine's own lets everybody who reaches it use the model.
        port: port to serve at; 0 for any that is free.
        loading: the model.
    """
    from lit_thought.cli.server import DemoServer
    from lit_thought.patch.chat import check_chat
    from lit_thought.patch.hub import adapter_folder
    from lit_thought.patch.patch import ThoughtPatch

    if isinstance(port, bool) or not 0 <= port < 2**16:
        raise ThoughtError(f"port must be a whole number from 0 to 65535; got {port!r}.")
    text = read_instruction(instruction, instruction_file)
    folder = Path(adapter_folder(adapter, argument="adapter"))
    patch = ThoughtPatch.load(folder)
    check_chat(patch, text, template, max_new_tokens)
    try:
        server = DemoServer((host, port), folder)
    except OSError as error:
        cure = "Correct the host" if isinstance(error, socket.gaierror) else "Choose another port, or 0"
        raise ThoughtError(
            f"host={host!r}, port={port}: cannot be served at ({error.strerror or error}). {cure}."
        ) from error
    with server:
        say(f"Once the model is loaded, the demo will be at {server.address}")
        model, tokenizer = loading.load()
        server.chat = patch.chat(model, tokenizer, instruction=text, template=template, max_new_tokens=max_new_tokens)
        say(f"{server.address} shows the demo. Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return Result({"address": server.address, "messages": len(server.chat.history)})
