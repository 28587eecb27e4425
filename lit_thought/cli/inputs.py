"""``lit-thought inputs``: what a fit would be of, to be looked at before."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say, timed
from lit_thought.settings import Kind

__all__ = ["inputs"]


def inputs(
    out: str,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    pairs: str | None = None,
    inputs: int | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool = True,
    *,
    loading: Loading,
) -> Result:
    """Write the inputs that fit would write for an instruction, to be read, changed and given to it as --pairs, beside
    the --template and the --kind that are named in the end.

    Example: lit-thought inputs --instruction "You are a pirate." --out questions.jsonl

    Args:
        out: file to write, ending in .jsonl.
        instruction: the removable chunk of the prompt.
        instruction_file: a UTF-8 text file to read it from instead.
        template: as for fit.
        pairs: pairs that there are already, as for fit; they come first.
        inputs: how many there are to be in all; left out, the usual number.
        kind: what the instruction is, as for fit.
        seed: seed of what the model writes.
        batch_size: inputs written at once, up to four times as many while they are short; they do not depend on it.
        overwrite: replace the file if it exists.
        progress: show a progress bar.
        loading: the model.
    """
    from lit_thought.errors import ThoughtError
    from lit_thought.files import atomic_file

    if not out.endswith(".jsonl"):
        raise ThoughtError(f"out={out!r}: expected a file that ends in .jsonl. Rename it.")
    text = read_instruction(instruction, instruction_file)
    from lit_thought.fit.data import PairDataModule
    from lit_thought.fit.preparing import write_inputs
    from lit_thought.model.blocks import find_blocks

    wanted = "auto" if inputs is None else inputs  # so that pairs that are given are topped up
    settings: dict[str, Any] = {"inputs": wanted, "kind": kind, "seed": seed, "batch_size": batch_size}
    data = PairDataModule(pairs, text, template, **settings)
    with atomic_file(out, overwrite, pairs=pairs, instruction_file=instruction_file) as file:  # checks its path first
        lm, tokenizer = loading.load()
        find_blocks(lm)  # a model without any is none that a fit takes
        with timed("the inputs"):
            write_inputs(data, lm, tokenizer, progress)
        rows = [json.dumps(pair, ensure_ascii=False) for pair in data.pairs]
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    taken = {"pairs": out, "template": template or ("chat" if data.template.is_chat else None), "kind": data.kind}
    flags = " ".join(f"--{name} {shlex.quote(value)}" for name, value in taken.items() if value is not None)
    say(f"Wrote {len(rows)} pairs to {out}. Give them to fit with {flags}")
    return Result({"file": out, "pairs": len(rows), "kind": data.kind, "template": data.template.to_dict()})
