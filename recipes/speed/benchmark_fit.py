"""What a fit costs, against the forward passes that it cannot avoid.

    python -m recipes.speed.benchmark_fit --config recipes/speed/benchmark_fit.yaml

Unavoidable: the chunk once, and every compared token twice (with the chunk and without it), through the decoder
without its head, in the same batches, process and threads. The fit goes from pairs with outputs to an adapter on
disk; the preservation statistics come from their cache, whose own cost is printed beside. Measured for several numbers
of pairs, with demonstrations as the chunk, and for several lengths of the chunk, with prose. Prints a Markdown table
and writes it with a JSON record.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, load_model
from lit_thought.fit.fitting import fit
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.model.calls import cache_arguments, find_decoder
from lit_thought.prompts.batches import forward_inputs, pad
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.runs.streams import lead_cache
from lit_thought.statistics.preserve import WINDOW
from lit_thought.timing import Stopwatch
from recipes.harness import (
    SIX_TASKS,
    TEMPLATE,
    command_line,
    load_split,
    machine,
    repeated,
    shown,
    table,
    write_results,
)

_WINDOWS = 8
"""Windows of unrelated text a batch, as the preservation statistics have them."""


def benchmark(
    model: str = "smollm2",
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str | None = None,
    task: str = "function_vectors/capitalize",
    pairs: Sequence[int] = (10, 30, 100, 300, 1000),
    chunks: Sequence[int] = (50, 500, 2000),
    chunk_pairs: int = 100,
    rank: int = 16,
    repeats: int = 5,
    out: str = "recipes/results/benchmark_fit",
) -> None:
    """Time fits and bare forward passes in turn and print their ratio."""
    rows, preserved = [], {}
    for dtype in dtypes:
        lm, tokenizer = load_model(model, dtype=dtype, device=device)
        with tempfile.TemporaryDirectory() as cache:
            for count, instruction in _cases(tokenizer, task, pairs, chunks, chunk_pairs):
                inputs = _inputs(task, count)
                data = PairDataModule(inputs, instruction, TEMPLATE, max_new_tokens=12)
                start = time.perf_counter()
                prepare_pairs(data, lm, tokenizer)
                generating = time.perf_counter() - start
                labelled = [{**pair, "output": text} for pair, text in zip(inputs, data.outputs, strict=True)]

                settings = {"rank": rank, "cache_dir": cache}
                run = partial(fit_once, lm, tokenizer, labelled, instruction, settings)
                warm = run()
                if dtype not in preserved:
                    preserved[dtype] = preservation_costs(lm, tokenizer, warm, repeats)
                measured = side_by_side(lm, data, run, repeats)
                rows.append({"dtype": dtype, "pairs": count, **measured, "generate_seconds": generating})
    environment, names = machine(lm.device), list(rows[0]["stages"])
    head = ["dtype", "pairs", "chunk tokens", "compared tokens", "bare forward, s", "fit, s", "fit ÷ forward"]
    head += [
        *(f"{name}, s" for name in names),
        "forward, statistics and solve: estimated ÷ measured",
        "peak memory above the model, MB",
        "(outputs, if generated, s)",
    ]
    lines = [
        [
            *(row["dtype"], row["pairs"], row["chunk_tokens"], row["compared_tokens"]),
            *(f"{row[key]:.2f}" for key in ("bare_seconds", "fit_seconds", "ratio")),
            *(f"{row['stages'][name]:.2f}" for name in names),
            "–" if row["estimated_ratio"] is None else f"{row['estimated_ratio']:.2f}",
            *(f"{row['peak_bytes'] / 1e6:.0f}", f"{row['generate_seconds']:.2f}"),
        ]
        for row in rows
    ]
    page = table(head, lines, left=1)
    for dtype, costs in preserved.items():
        page += f"\nPreservation statistics in {dtype}, once per model: {costs['seconds']:.1f} s, "
        page += f"{costs['ratio']:.2f} times the bare forward passes of their {costs['tokens']:,} tokens.\n"
    page += f"\n{environment}\n"
    record = {"model": shown(model), "settings": {"rank": rank, "task": task}, "rows": rows}
    write_results(__file__, out, page, record | {"preservation": preserved, "environment": environment})


def _cases(
    tokenizer: Any, task: str, pairs: Sequence[int], chunks: Sequence[int], chunk_pairs: int
) -> list[tuple[int, str]]:
    """Numbers of pairs and instructions: demonstrations for ``pairs``, then prose of the lengths in ``chunks``."""
    prose = tokenizer(load_texts("default", "evaluate", "chunks")[0], add_special_tokens=False).input_ids
    if max(chunks, default=0) > len(prose):
        raise SystemExit(f"chunks must be {len(prose)} tokens at most, the length of the text; got {max(chunks)}.")
    demonstrations = load_split(task, 0).instruction
    return [(n, demonstrations) for n in pairs] + [(chunk_pairs, tokenizer.decode(prose[:n])) for n in chunks]


def _inputs(task: str, count: int) -> list[dict[str, str]]:
    """This many different inputs without outputs: the task's, then those of the other word tasks."""
    words = [pair["input"] for name in (task, *SIX_TASKS) for pair in load_split(name, 0, fit=10**9).fit]
    different = list(dict.fromkeys(words))
    if count > len(different):
        raise SystemExit(f"pairs must be {len(different)} at most, the words there are; got {count}.")
    return [{"input": word} for word in different[:count]]


def side_by_side(lm: Any, data: PairDataModule, run: Callable[[], ThoughtCallback], repeats: int) -> dict[str, Any]:
    """What fits take, and the bare forward passes in turn with them: medians.

    Args:
        lm: the model.
        data: its pairs, prepared.
        run: fits on them; it has run before.
        repeats: measurements of each.
    """
    bare(lm, data)
    bares, fits, stages = [], [], []
    for _ in range(repeats):
        bares.append(seconds(partial(bare, lm, data)))
        fits.append(seconds(lambda: stages.append(dict(run().stopwatch.seconds))))
    with peak_memory(lm.device) as peak:
        estimate = run().estimate
    assert estimate is not None
    timed = {name: median(s[name] for s in stages) for name in stages[0]}
    measured = sum(timed[name] for name in estimate.seconds)  # a fit that is too short is not asked
    return {
        "compared_tokens": sum(len(b.plain_rows) for b in data.batches),
        "chunk_tokens": max(b.target.ids.shape[1] for b in data.batches if len(b.target.ids) == 1),
        "bare_seconds": median(bares),
        "fit_seconds": median(fits),
        "ratio": median(f / b for f, b in zip(fits, bares, strict=True)),
        "stages": timed,
        "estimated_ratio": sum(estimate.seconds.values()) / measured if measured else None,
        "peak_bytes": peak["bytes"],
    }


def preservation_costs(lm: Any, tokenizer: Any, callback: ThoughtCallback, repeats: int) -> dict[str, Any]:
    """What the preservation statistics of a fit took that did not find them in its cache, and the bare forward passes
    of their tokens, in the same batches: the median."""
    assert callback.preserve_cached is False
    windows = text_windows(tokenizer, callback.preserved.texts or [], WINDOW, callback.settings.preserve_tokens)
    batches = [pad(windows[i : i + _WINDOWS], 0, "right") for i in range(0, len(windows), _WINDOWS)]
    decoder = find_decoder(lm)

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            decoder(**forward_inputs(batch.to(lm.device), 0), use_cache=False)

    forward()
    spent, least = callback.stopwatch.seconds["preserve"], median(seconds(forward) for _ in range(repeats))
    return {"tokens": sum(map(len, windows)), "seconds": spent, "bare_seconds": least, "ratio": spent / least}


def fit_once(
    lm: Any, tokenizer: Any, pairs: list[dict[str, str]], instruction: str, settings: dict[str, Any]
) -> ThoughtCallback:
    """From pairs with outputs to an adapter on disk."""
    callback = ThoughtCallback(**settings)
    patch = fit(ThoughtModule(lm, tokenizer), PairDataModule(pairs, instruction, TEMPLATE), callback, progress=False)
    with callback.stopwatch("save"):
        patch.save_adapter(Path(settings["cache_dir"]) / "adapter", overwrite=True)
    return callback


@torch.inference_mode()
def bare(lm: Any, data: PairDataModule) -> None:
    """The forward passes that no fit can avoid."""
    decoder = find_decoder(lm)
    for side in ("target", "plain"):
        leads: dict[int, Any] = {}
        for batch in data.batches:
            tokens = getattr(batch, side)
            if tokens is None or batch.plain is batch.target:
                continue
            tokens = tokens.to(lm.device)
            if batch.lead is None and len(tokens.ids) == 1:
                leads[batch.index] = lead_cache(lm, tokens.ids[0].tolist())
                continue
            cache, length = None, 0
            if batch.lead in leads:
                length = leads[batch.lead].get_seq_length()
                cache = repeated(leads[batch.lead], len(tokens.ids))
            given = cache_arguments(decoder, cache)
            decoder(**forward_inputs(tokens, length), **given, use_cache=cache is not None)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Largest memory above what is there at the start: allocated on a GPU, resident in this process otherwise."""
    peak = {"bytes": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    # what earlier fits have freed, and C's allocator keeps, would hide this one's
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            peak["bytes"] = max(peak["bytes"], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes, on a GPU until its work is done."""
    start = Stopwatch.now()
    call()
    return Stopwatch.now() - start


if __name__ == "__main__":
    command_line(benchmark)
