"""``lit-thought evaluate`` and ``lit-thought report``."""

from __future__ import annotations

import shlex
from typing import Any

from lit_thought.cli.model import Loading, read_instruction
from lit_thought.cli.output import Result, say, timed
from lit_thought.errors import ThoughtError, check_counts
from lit_thought.settings import text_place

__all__ = ["evaluate_adapter", "report"]


def evaluate_adapter(  # not evaluate: jsonargparse looks for the name in the package, and would import torch
    adapter: str,
    pairs: str,
    out: str | None = None,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    check: str | None = None,
    check_schema: str | None = None,
    unrelated: str | None = "default",
    perplexity_interval: float | None = 0.01,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    samples: int = 5,
    cache_dir: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    *,
    loading: Loading,
) -> Result:
    """Compare the plain, the instructed and the patched model on held-out pairs.

    Example: lit-thought evaluate antonym/ --pairs test.jsonl --out result/

    Args:
        adapter: adapter folder that fit wrote, or one on the hub, as OWNER/NAME.
        pairs: JSON, JSONL or CSV file with the keys input and output (optional).
        out: folder for result.json and items.jsonl (each pair's three outputs); not written when left out.
        instruction: the instruction; the one the adapter was made from when left out.
        instruction_file: a UTF-8 text file to read it from instead.
        template: as for fit; the adapter's own when left out.
        check: a regular expression that an answer should match, anywhere in it, such as '^[A-Z]'; an answer is an
            output without the thoughts or channels before it.
        check_schema: a JSON schema that an answer should follow, as a file; it is JSON from beginning to end.
        unrelated: text file to measure perplexity on; "default" for text that the package ships, null to skip.
        perplexity_interval: half-width of the 95 % interval of the perplexities' ratio at which enough of that text has
            been measured; null to measure all of it.
        max_new_tokens: longest output.
        batch_size: pairs a batch.
        samples: how many pairs to print with their three outputs.
        cache_dir: where the original model's losses on that text are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        overwrite: replace the folder OUT if it exists.
        progress: show progress bars.
        loading: the model.
    """
    from lit_thought.evaluation.checks import follows, matches
    from lit_thought.evaluation.compare import evaluate, format_result
    from lit_thought.evaluation.perplexity import check_interval
    from lit_thought.files import check_apart, check_output_folder
    from lit_thought.patch.hub import adapter_folder
    from lit_thought.patch.patch import ThoughtPatch
    from lit_thought.patch.provenance import template_of
    from lit_thought.patch.results import of_adapter, write_result
    from lit_thought.prompts.instruction_hash import check_instruction
    from lit_thought.prompts.pairs import load_pairs, pair_instructions
    from lit_thought.prompts.unrelated import load_texts

    if check is not None and check_schema is not None:
        raise ThoughtError("check and check_schema exclude each other; give one of them.")
    wanted = matches(check) if check is not None else follows(check_schema) if check_schema is not None else None
    if samples < 0:
        raise ThoughtError(f"samples must be a whole number of 0 or more; got {samples}.")
    place = adapter_folder(adapter, argument="adapter")
    if out is not None:
        read: dict[str, Any] = {"model": loading.place, "adapter": place, "pairs": pairs}
        read |= {"instruction_file": instruction_file, "check_schema": check_schema, "unrelated": text_place(unrelated)}
        check_apart(cache_dir=cache_dir, out=out)
        check_output_folder(out, overwrite, "out", **read)
    patch = ThoughtPatch.load(place)
    text = None
    if instruction is not None or instruction_file is not None:
        text = read_instruction(instruction, instruction_file)
    elif isinstance(patch.provenance.get("instruction"), str):
        text = patch.provenance["instruction"]
    chosen = template_of(patch.provenance, template)
    rows = load_pairs(pairs)
    check_instruction(patch.provenance, text, rows)
    pair_instructions(rows, text)
    if unrelated is not None:
        load_texts(unrelated, "evaluate", "unrelated")
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_interval(perplexity_interval)
    lm, tokenizer = loading.load()
    with timed("comparing the three models"):
        result = evaluate(
            lm,
            tokenizer,
            patch,
            instruction=text,
            pairs=rows,
            template=chosen,
            check=wanted,
            unrelated=unrelated,
            perplexity_interval=perplexity_interval,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache_dir=cache_dir,
            progress=progress,
        )
    signed = of_adapter(result, place)
    table = format_result(result, samples)
    if out is not None:
        try:
            write_result(signed, out, overwrite)
        except (OSError, ThoughtError):
            print(table)  # what took long is not lost with the disk
            raise
        say(f"Wrote result.json and items.jsonl to {out}")
    return Result(signed, table)


def report(adapter: str, evaluation: str | None = None, out: str | None = None, samples: int = 20) -> Result:
    """Write report.html, report.md and report.json of a fit, and its results into the adapter's README.md.

    Example: lit-thought report antonym/

    Args:
        adapter: adapter folder that fit wrote.
        evaluation: folder that evaluate --out wrote; ADAPTER/evaluation, if it is there, when left out.
        out: folder for the report; ADAPTER when left out.
        samples: how many of the evaluation's pairs to show with their three outputs.
    """
    from lit_thought.evaluation.report import write_report
    from lit_thought.model.source import SMOLLM2_NAME, place_and_file

    with timed("the report"):
        written = write_report(adapter, evaluation, out, samples)
    place = adapter if out is None else out
    say(f"Wrote report.html, report.md and report.json to {place}")
    if written["evaluation"] is None:
        (name, file), folder = place_and_file(str(written["model"] or "")), shlex.quote(adapter)
        base = f" --model {shlex.quote(name)}" if name not in ("", SMOLLM2_NAME) else ""
        base += "" if file is None else f" --gguf_file {shlex.quote(file)}"
        command = f"lit-thought evaluate {folder} --pairs …{base} --out {folder}/evaluation"
        say(f"There is no evaluation yet; {command} makes one.")
    files = [f"{place.rstrip('/')}/report.{suffix}" for suffix in ("html", "md", "json")]
    return Result({"files": files, "report": written})
