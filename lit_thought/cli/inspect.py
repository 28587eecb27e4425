"""``lit-thought inspect`` and ``lit-thought verify``: what a model is like, and that the theory holds for it."""

from __future__ import annotations

from contextlib import nullcontext
from json import dumps
from typing import Literal

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say, timed
from lit_thought.settings import FitSettings, text_place

__all__ = ["inspect", "verify"]


def inspect(
    sites: list[str] | None = None,
    tokens: int = 500,
    chunk_tokens: int = 100,
    rank: int = 16,
    preserve_tokens: int = FitSettings.preserve_tokens,
    *,
    loading: Loading,
) -> Result:
    """Show what a fit would find and change in a model, and estimate its memory and time, before anything runs.

    Example: lit-thought inspect google/gemma-3-270m

    Args:
        sites: attn_out, mlp_in, mlp_out or several; when left out, attn_out and mlp_out wherever a block has them.
        tokens: compared tokens of all pairs together, for the estimates.
        chunk_tokens: tokens of the instruction, for the estimates.
        rank: rank of the patch, for the estimates.
        preserve_tokens: tokens of unrelated text, for the estimates.
        loading: the model.
    """
    from lit_thought.errors import check_counts
    from lit_thought.fit.inspection import format_inspection, inspect_model
    from lit_thought.settings import check_sites

    check_counts(tokens=tokens, chunk_tokens=chunk_tokens, rank=rank, preserve_tokens=preserve_tokens)
    if sites is not None:
        check_sites(sites)
    lm, _ = loading.load()
    with timed("looking at the blocks"):
        found = inspect_model(lm, sites, tokens, chunk_tokens, rank, preserve_tokens)
    return Result(found.to_dict(), format_inspection(found))


def verify(
    instruction: str | None = None,
    instruction_file: str | None = None,
    text_file: str = "default",
    tokens: int | None = 256,
    output: Literal["vector", "norm_scale"] | None = None,
    out: str | None = None,
    overwrite: bool = False,
    *,
    loading: Loading,
) -> Result:
    """Check the theorems: with each token's own weights, the model without the instruction is the one with it.

    Example: lit-thought verify --instruction "Always answer in French. "

    Args:
        instruction: the removable chunk, put before the text as it is; a line on talking like a pirate when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        text_file: a UTF-8 text file to compare the two runs on; "default" for text that the package ships.
        tokens: how many tokens of it to use, at most; null for all of it.
        output: where the residual error goes: vector (the MLP's output bias, or after its norm) or norm_scale (the
            scale of the norm after the MLP, where there is one); what suits the model when left out.
        out: JSON file for the report; not written when left out.
        overwrite: replace the file if it exists.
        loading: the model.
    """
    from lit_thought.files import atomic_file
    from lit_thought.prompts.unrelated import load_texts
    from lit_thought.theory.exact import check_texts
    from lit_thought.theory.verify import format_report, verify_exact

    chunk = read_instruction(instruction, instruction_file)
    chunk = "You are a pirate. Talk like a pirate.\n" if chunk is None else chunk
    text = load_texts(text_file, "evaluate", "text_file")[0]
    check_texts(chunk, text, tokens)
    read = {"instruction_file": instruction_file, "text_file": text_place(text_file), "model": loading.place}
    with atomic_file(out, overwrite, **read) if out is not None else nullcontext() as file:  # checks its path first
        lm, tokenizer = loading.load()
        with timed("checking the theorems"):
            found = verify_exact(lm, tokenizer, chunk, text, output=output, tokens=tokens)
        if file is not None:
            file.write_text(dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if out is not None:
        say(f"Wrote the report to {out}")
    return Result(found.to_dict(), format_report(found))
