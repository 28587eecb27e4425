"""The ``lit-thought`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import register_type

from lit_thought.cli_export import export
from lit_thought.errors import ThoughtError

__all__ = ["evaluate", "export", "fit", "inspect", "main", "preserve", "report", "solve", "verify"]

_POSITIONAL = {"export": "adapter", "inspect": "model", "preserve": "model", "report": "run_dir"}
"""The argument of a command that may stand right after it, without its name."""


def fit(
    pairs: str,
    out: str,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str = "Q: {input}\nA: {output}\n",
    model: str = "smollm2",
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Turn an instruction into a PEFT LoRA adapter.

    Example: lit-thought fit --pairs pairs.jsonl --instruction "Answer with the opposite." --out antonym/

    Args:
        pairs: JSON, JSONL or CSV file with the keys input, output (optional) and instruction (optional).
        out: folder to write the adapter to.
        instruction: the removable chunk of the prompt.
        instruction_file: a UTF-8 text file to read it from instead.
        template: text with {input} and {output} (and {instruction} where the chunk is not at the start), "chat"
            (instruction as system message) or "chat-user" (inside the user message).
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
        overwrite: replace the folder if it exists.
        **settings: see :func:`lit_thought.api.transmute`.
    """
    from lit_thought.api import transmute
    from lit_thought.files import check_output_folder
    from lit_thought.selection import format_selection

    check_output_folder(out, overwrite)
    text = _instruction(instruction, instruction_file)
    loader = partial(_load, model, dtype, device, revision, gguf_file, quantization, trust_remote_code)
    patch = transmute(loader, None, text, pairs, template, **settings)
    patch.save_adapter(out, overwrite=overwrite)
    if "selection" in patch.provenance:
        print(format_selection(patch.provenance["selection"]))
    size = (Path(out).expanduser() / "adapter_model.safetensors").stat().st_size
    _say(f"Wrote a rank-{patch.rank} adapter of {size / 1e6:.1f} MB to {out}")


def evaluate(
    adapter: str,
    pairs: str,
    out: str | None = None,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    model: str = "smollm2",
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
    unrelated: str | None = "default",
    max_new_tokens: int = 64,
    batch_size: int = 32,
    samples: int = 5,
    progress: bool = True,
) -> None:
    """Compare the plain, the instructed and the patched model on held-out pairs.

    Example: lit-thought evaluate --adapter antonym/ --pairs test.jsonl --out result/

    Args:
        adapter: adapter folder that fit wrote.
        pairs: JSON, JSONL or CSV file with the keys input and output (optional).
        out: folder for result.json and items.jsonl (each pair's three outputs); not written when left out.
        instruction: the instruction; the one the adapter was made from when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        template: as for fit; the adapter's own when left out.
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
        unrelated: text file to measure perplexity on; "default" for text that the package ships, null to skip.
        max_new_tokens: longest output.
        batch_size: pairs a batch.
        samples: how many pairs to print with their three outputs.
        progress: show progress bars.
    """
    from lit_thought.data_files import load_pairs, pair_instructions
    from lit_thought.evaluation import evaluate as compare
    from lit_thought.evaluation import format_result
    from lit_thought.files import atomic_folder, check_output_folder
    from lit_thought.instruction_hash import check_instruction
    from lit_thought.patch import ThoughtPatch
    from lit_thought.prompts import PromptTemplate
    from lit_thought.report.content import adapter_digest
    from lit_thought.unrelated import load_texts

    if out is not None:
        check_output_folder(out)
    patch = ThoughtPatch.load(adapter)
    text = None
    if instruction is not None or instruction_file is not None:
        text = _instruction(instruction, instruction_file)
    elif isinstance(patch.provenance.get("instruction"), str):
        text = patch.provenance["instruction"]
    stored = patch.provenance.get("template")
    if template is not None:
        chosen = PromptTemplate.parse(template)
    elif stored is not None:
        chosen = PromptTemplate.from_dict(stored)
    else:
        raise ThoughtError(f"template: {adapter!r} does not say which one it was made with; pass --template.")
    rows = load_pairs(pairs)
    check_instruction(patch.provenance, text, rows)
    pair_instructions(rows, text)
    if unrelated is not None:
        load_texts(unrelated, "evaluate", "unrelated")
    lm, tokenizer = _load(model, dtype, device, revision, gguf_file, quantization, trust_remote_code)
    result = compare(
        lm,
        tokenizer,
        patch,
        instruction=text,
        pairs=rows,
        template=chosen,
        unrelated=unrelated,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    print(format_result(result, samples))
    if out is not None:
        with atomic_folder(out) as folder:
            items = result.pop("items")
            result["adapter"] = adapter_digest(adapter)
            lines = (dumps(item, ensure_ascii=False) + "\n" for item in items)
            (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / "result.json").write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
        _say(f"Wrote result.json and items.jsonl to {out}")


def report(run_dir: str, evaluation: str | None = None, out: str | None = None, samples: int = 20) -> None:
    """Write report.html, report.md and report.json of a fit, and its results into the adapter's README.md.

    Example: lit-thought report antonym/

    Args:
        run_dir: adapter folder that fit wrote.
        evaluation: folder that evaluate --out wrote; RUN_DIR/evaluation, if it is there, when left out.
        out: folder for the report; RUN_DIR when left out.
        samples: how many of the evaluation's pairs to show with their three outputs.
    """
    from lit_thought.report import write_report

    written = write_report(run_dir, evaluation, out, samples)
    _say(f"Wrote report.html, report.md and report.json to {run_dir if out is None else out}")
    if written["evaluation"] is None:
        _say(f"There is no evaluation yet; lit-thought evaluate --out {run_dir}/evaluation makes one.")


def verify(
    instruction: str | None = None,
    instruction_file: str | None = None,
    text_file: str = "default",
    tokens: int = 256,
    output: Literal["vector", "norm_scale"] | None = None,
    out: str | None = None,
    model: str = "smollm2",
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Check the theorems: with each token's own weights, the model without the instruction is the one with it.

    Example: lit-thought verify --instruction "Always answer in French. "

    Args:
        instruction: the removable chunk, put before the text as it is; a line on talking like a pirate when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        text_file: a UTF-8 text file to compare the two runs on; "default" for text that the package ships.
        tokens: how many tokens of it to use, at most.
        output: where the residual error goes: vector (the MLP's output bias, or after its norm) or norm_scale (the
            scale of the norm after the MLP, where there is one); what suits the model when left out.
        out: JSON file for the report; not written when left out.
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
    """
    from lit_thought.files import atomic_file
    from lit_thought.theory.exact import check_texts
    from lit_thought.theory.verify import format_report, verify_exact
    from lit_thought.unrelated import load_texts

    chunk = _instruction(instruction, instruction_file)
    chunk = "You are a pirate. Talk like a pirate.\n" if chunk is None else chunk
    text = load_texts(text_file, "evaluate", "text_file")[0]
    check_texts(chunk, text, tokens)
    with atomic_file(out) if out is not None else nullcontext() as file:  # checks its path first
        lm, tokenizer = _load(model, dtype, device, revision, gguf_file, quantization, trust_remote_code)
        report = verify_exact(lm, tokenizer, chunk, text, output=output, tokens=tokens)
        print(format_report(report))
        if file is not None:
            file.write_text(dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if out is not None:
        _say(f"Wrote the report to {out}")


def inspect(
    model: str = "smollm2",
    sites: list[str] | None = None,
    tokens: int = 500,
    chunk_tokens: int = 100,
    rank: int = 16,
    preserve_tokens: int = 12_000,
    json: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show what a fit would find and change in a model, and estimate its memory and time, before anything runs.

    Example: lit-thought inspect google/gemma-3-270m

    Args:
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        sites: attn_out, mlp_in, mlp_out or several; when left out, attn_out and mlp_out wherever a block has them.
        tokens: compared tokens of all pairs together, for the estimates.
        chunk_tokens: tokens of the instruction, for the estimates.
        rank: rank of the patch, for the estimates.
        preserve_tokens: tokens of unrelated text, for the estimates.
        json: print the report as JSON.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
    """
    from lit_thought.blocks import check_sites
    from lit_thought.errors import check_counts
    from lit_thought.inspection import format_inspection, inspect_model

    check_counts(tokens=tokens, chunk_tokens=chunk_tokens, rank=rank, preserve_tokens=preserve_tokens)
    if sites is not None:
        check_sites(sites)
    lm, _ = _load(model, dtype, device, revision, gguf_file, quantization, trust_remote_code)
    found = inspect_model(lm, sites, tokens, chunk_tokens, rank, preserve_tokens)
    print(dumps(found.to_dict(), indent=1) if json else format_inspection(found))


def preserve(
    output: str,
    model: str = "smollm2",
    texts: str = "default",
    preserve_tokens: int = 12_000,
    sites: list[str] | None = None,
    rank: int | Literal["full"] | None = None,
    storage: Literal["int8", "float16", "float32"] = "int8",
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a model's preservation statistics to one small file, for fit --preserve on any machine.

    Example: lit-thought preserve smollm2 --output smollm2-preserve.safetensors

    Args:
        output: the file, ending in .safetensors.
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        texts: a UTF-8 text file of what patches should leave alone; "default" for text that the package ships.
        preserve_tokens: most tokens of it to use.
        sites: attn_out, mlp_in, mlp_out or several, where fits can use it; when left out, attn_out and mlp_out
            wherever a block has them.
        rank: how many directions of each matrix are kept, and of the others what they add to the diagonal, or full; 768
            when left out.
        storage: numbers in the file: int8, float16 or float32.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
        cache_dir: where each model's statistics are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        overwrite: replace the file if it exists.
        progress: show a progress bar.
    """
    from lit_thought.blocks import DEFAULT_SITES, check_sites, find_blocks
    from lit_thought.errors import check_counts
    from lit_thought.files import atomic_file
    from lit_thought.preserve import WINDOW, preservation, preservation_bar
    from lit_thought.preserve_file import DEFAULT_RANK, check_settings, check_suffix
    from lit_thought.unrelated import load_texts, text_windows

    kept = None if rank == "full" else DEFAULT_RANK if rank is None else rank
    check_settings(kept, storage)
    check_suffix(output, "output")
    check_counts(preserve_tokens=preserve_tokens)
    chosen = DEFAULT_SITES if sites is None else check_sites(sites)
    read = load_texts(texts, "preserve", "texts")
    with atomic_file(output, overwrite) as file:  # checks its path first
        lm, tokenizer = _load(model, dtype, device, revision, gguf_file, quantization, trust_remote_code)
        blocks = find_blocks(lm)
        windows = text_windows(tokenizer, read, WINDOW, preserve_tokens)
        with preservation_bar(len(blocks), progress) as advance:
            entry, _ = preservation(lm, blocks, windows, cache_dir, progress=advance)
        entry.save(file, lm, blocks, chosen, kept, storage)
    _say(f"Wrote {Path(output).expanduser().stat().st_size / 1e6:.1f} MB of preservation statistics to {output}")


def solve(
    statistics: str,
    out: str,
    ridge: float | None = None,
    rank: int | float | Literal["full"] | None = None,
    preserve_weight: float | None = None,
    step_size: float | None = None,
    preserve: str | None = None,
    approximate: bool = False,
    cache_dir: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Make an adapter of a fit's saved statistics, at its settings or at others, without running the model.

    Example: lit-thought solve --statistics sums/ --ridge 0.1 --rank 8 --out antonym-8/

    Args:
        statistics: folder that fit wrote with --statistics_dir.
        out: folder to write the adapter to.
        ridge: the ridge, relative to the mean eigenvalue of the Gram matrix; the fit's when left out.
        rank: an integer, a fraction of explained energy in (0, 1), or full; the fit's when left out.
        preserve_weight: weight of the unrelated text against the pairs; the fit's when left out.
        step_size: how much of the (last) step's solution is added, in (0, 1]; the fit's when left out.
        preserve: file of preservation statistics to use instead of the cache (lit-thought preserve).
        approximate: allow other settings where sums depend on the patches that the fit solved before them.
        cache_dir: where the fit kept its preservation statistics ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        model: the model of the fit, needed for matrices at mlp_in alone: smollm2, a hub id, a local directory or a
            .gguf file.
        dtype: dtype to load it in, that of the fit; float32 when left out.
        device: where to solve, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        trust_remote_code: run code that a hub model brings along.
        overwrite: replace the folder if it exists.
    """
    from lit_thought.files import check_output_folder
    from lit_thought.resolve import solve_saved
    from lit_thought.saved import SavedStatistics

    check_output_folder(out, overwrite)
    saved = SavedStatistics.load(statistics, device or "cpu")
    lm = None
    if model is not None:
        lm, _ = _load(model, dtype, device, revision, gguf_file, None, trust_remote_code)
    chosen: Any = {} if rank is None else {"rank": None if rank == "full" else rank}
    patch = solve_saved(
        saved,
        ridge=ridge,
        preserve_weight=preserve_weight,
        step_size=step_size,
        preserve=preserve,
        cache_dir=cache_dir,
        model=lm,
        approximate=approximate,
        **chosen,
    )
    patch.save_adapter(out, overwrite=overwrite)
    _say(f"Wrote a rank-{patch.rank} adapter of {len(saved)} stages to {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: bad input ends in one line on standard error and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    register_type(os.PathLike, deserializer=_no_path, fail_already_registered=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    positional = _POSITIONAL.get(given[0]) if given else None
    if positional is not None and len(given) > 1 and not given[1].startswith("-"):
        given[1] = f"--{positional}={given[1]}"  # lit-thought inspect MODEL
    try:
        jsonargparse.auto_cli(
            {
                "fit": fit,
                "evaluate": evaluate,
                "export": export,
                "inspect": inspect,
                "preserve": preserve,
                "report": report,
                "solve": solve,
                "verify": verify,
            },
            args=given,
            as_positional=False,
            prog="lit-thought",
            description="Turn a prompt into weights, with no training.",
        )
    except ThoughtError as error:
        _refuse(str(error))
    except UnicodeDecodeError as error:
        _refuse(f"the config is no UTF-8 text ({error}). Save it as UTF-8.")


def _refuse(message: str) -> NoReturn:
    print(f"lit-thought: error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def _instruction(text: str | None, file: str | None) -> str | None:
    from lit_thought.reading import expanded

    if text is not None and file is not None:
        raise ThoughtError("instruction and instruction_file exclude each other; give one of them.")
    if file is None:
        return text
    try:
        return expanded(file, "instruction_file").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThoughtError(f"instruction_file={file!r} cannot be read as a UTF-8 text file ({error}).") from error


def _load(
    name: str,
    dtype: str | None,
    device: str | None,
    revision: str | None,
    gguf_file: str | None,
    quantization: Literal["8bit", "4bit"] | None,
    trust_remote_code: bool,
) -> Any:
    from lit_thought.models import load_model

    _say(f"Loading {name} …")
    return load_model(
        name,
        dtype=dtype,
        device=device,
        revision=revision,
        gguf_file=gguf_file,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )


def _no_path(value: Any) -> Any:
    """Leave it to the other types of an argument: jsonargparse would make the path "None" of null."""
    raise ValueError(f"expected a string, got {value!r}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
