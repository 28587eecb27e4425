"""What the chunk costs at inference, and what the patch saves: time to first token, decoding speed, KV cache.

    python -m recipes.speed.benchmark_inference --config recipes/speed/benchmark_inference.yaml

Compared are the instructed model (chunk and question), the same with the chunk's KV cache computed before (prompt
caching), and the question alone on the patched model, its PEFT adapter merged into the weights or beside them. All are
measured in turn in one process, ``repeats`` times; medians are reported. Decoding is greedy and has a fixed number of
tokens. Prints a Markdown table and writes it with a JSON record.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from lit_thought import ThoughtPatch, load_model
from lit_thought.errors import ThoughtError
from lit_thought.model.calls import cache_arguments
from lit_thought.model.loading import context_window
from lit_thought.prompts.unrelated import load_texts
from lit_thought.runs.streams import lead_cache
from lit_thought.timing import Stopwatch
from recipes.harness import Trial, command_line, load_split, machine, repeated, shown, table, write_results

QUESTION = "\nQ: What is the opposite of hot?\nA:"


def benchmark(
    model: str = "smollm2",
    dtype: str = "float32",
    device: str | None = None,
    chunks: Sequence[int] = (100, 500, 2000),
    batches: Sequence[int] = (1, 8),
    new_tokens: int = 16,
    rank: int = 16,
    repeats: int = 3,
    seed: int = 0,
    out: str = "recipes/results/benchmark_inference",
) -> None:
    """Time prompts with and without the chunk and print them side by side."""
    if new_tokens < 2:
        raise ThoughtError(f"new_tokens must be at least 2, the first token and one decoded; got {new_tokens}.")
    lm, tokenizer = load_model(model, dtype=dtype, device=device)
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    room = context_window(lm) - len(question) - new_tokens
    if max(chunks) > room:
        raise ThoughtError(f"chunks={list(chunks)}: the model's context window leaves {room} tokens; ask for shorter.")
    text = tokenizer(load_texts("default", "preserve", "text")[0], add_special_tokens=False, verbose=False)["input_ids"]
    trial = Trial(lm, tokenizer, load_split("common_words/antonym", seed, fit=4))
    patch = trial.fit(rank=rank, preserve=None)
    cases = [Case("patched, merged", 0, with_adapter(lm, patch).merge_and_unload(), question)]
    cases.append(Case("patched, adapter beside", 0, with_adapter(lm, patch), question))
    with torch.inference_mode():
        for length in chunks:
            cases.append(Case("instructed", length, lm, [*text[:length], *question]))
            cases.append(Case("instructed, chunk cached", length, lm, question, lead_cache(lm, text[:length])))
        rows = [row for size in batches for row in measure(cases, size, new_tokens, repeats)]
    settings = {"dtype": dtype, "rank": rank, "new_tokens": new_tokens, "repeats": repeats}
    record = {"model": shown(model), "settings": settings, "rows": rows, "environment": machine(lm.device)}
    write_results(__file__, out, f"{page(rows)}\n{record['environment']}\n", record)


@dataclass(frozen=True)
class Case:
    """A way to ask: model, token ids, and the KV cache of what comes before them, batch size 1, where there is one."""

    name: str
    chunk: int
    model: PreTrainedModel
    ids: Sequence[int]
    lead: DynamicCache | None = None


def with_adapter(model: PreTrainedModel, patch: ThoughtPatch) -> PeftModel:
    """A copy of the model with the patch as PEFT loads it from disk."""
    with TemporaryDirectory() as folder:
        patch.save_adapter(Path(folder) / "adapter")
        return PeftModel.from_pretrained(copy.deepcopy(model), str(Path(folder) / "adapter")).eval()


def measure(cases: Sequence[Case], size: int, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Medians over repeats, in each of which all cases have their turn; those without a chunk warm up before."""
    for case in cases:
        if not case.chunk:
            write(case, size, 2)
    runs = [[write(case, size, new_tokens) for case in cases] for _ in range(repeats)]
    rows = []
    for case, own in zip(cases, zip(*runs, strict=True), strict=True):
        first, decode = (median(run[key] for run in own) for key in ("first", "decode"))
        rows.append(
            {
                "batch": size,
                "case": case.name,
                "chunk": case.chunk,
                "tokens_run": len(case.ids),
                "first_token_seconds": first,
                "tokens_per_second": size * (new_tokens - 1) / decode,
                "cache_bytes": own[0]["cache_bytes"],
                "kept_bytes": 0 if case.lead is None else cache_bytes(case.lead),
            }
        )
    return rows


def write(case: Case, size: int, new_tokens: int) -> dict[str, Any]:
    """Continue the same prompt in all rows of a batch, greedily: tokens (batch, new), seconds to the first and of the
    others, bytes of the KV cache at the end."""
    cache = DynamicCache()
    start = Stopwatch.now()
    if case.lead is not None:
        cache = repeated(case.lead, size)
    tokens = [torch.tensor([list(case.ids)], device=case.model.device).expand(size, -1)]
    base = case.model.get_base_model() if isinstance(case.model, PeftModel) else case.model
    for _ in range(new_tokens):
        given = cache_arguments(base, cache)
        logits = case.model(input_ids=tokens[-1], **given, use_cache=True, logits_to_keep=1).logits
        tokens.append(logits[:, -1:].argmax(-1))
        if len(tokens) == 2:
            first = Stopwatch.now()
    end = Stopwatch.now()
    new = torch.cat(tokens[1:], dim=1)
    return {"tokens": new, "first": first - start, "decode": end - first, "cache_bytes": cache_bytes(cache)}


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(tensor.nbytes for keys, values, _ in cache for tensor in (keys, values))


def page(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each case and batch."""
    merged = {row["batch"]: row["first_token_seconds"] for row in rows if row["case"] == "patched, merged"}
    lines = [
        [
            *(row["batch"], row["chunk"] or None, row["case"], row["tokens_run"]),
            f"{1e3 * row['first_token_seconds']:.0f}",
            f"{row['first_token_seconds'] / merged[row['batch']]:.1f}",
            f"{row['tokens_per_second']:.1f}",
            *(f"{row[key] / 1e6:.1f}" for key in ("cache_bytes", "kept_bytes")),
        ]
        for row in rows
    ]
    head = ["batch", "chunk, tokens", "", "tokens to run", "time to first token, ms", "× patched, merged"]
    head += ["tokens per second, decoding", "KV cache at the end, MB", "kept between prompts, MB"]
    return table(head, lines, left=3)


if __name__ == "__main__":
    command_line(benchmark)
