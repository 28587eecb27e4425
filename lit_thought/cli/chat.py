"""``lit-thought chat``: talk to an adapter's model, plain, instructed and patched side by side."""

from __future__ import annotations

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say

__all__ = ["chat"]


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
    one marked; /help lists the commands. From a pipe, each line is a message, or with a slash a command, and the
    answers are plain text.

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
    from lit_thought.cli.conversation import converse
    from lit_thought.patch.chat import check_chat
    from lit_thought.patch.hub import adapter_folder
    from lit_thought.patch.patch import ThoughtPatch

    text = read_instruction(instruction, instruction_file)
    patch = ThoughtPatch.load(adapter_folder(adapter, argument="adapter"))
    check_chat(patch, text, template, max_new_tokens)
    model, tokenizer = loading.load()
    talk = patch.chat(model, tokenizer, instruction=text, template=template, max_new_tokens=max_new_tokens)
    if talk.instruction is None:
        say("The adapter keeps no instruction: answers are plain and patched. --instruction gives one.")
    return Result({"answers": converse(talk)})
