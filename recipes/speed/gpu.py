"""One script for a GPU: whether fits there find the patches that a CPU finds, and what they cost on large models.

    python -m recipes.speed.gpu --config recipes/speed/gpu.yaml

Needs a checkout and the installed packages, and nothing else: all weights are random, and the tokenizer is made of the
package's own text. The first two parts fit tiny models. The others time fits of a model of 8B's shape, made on the
card, and of one block of 70B's, each beside the forward passes that it cannot avoid, and their preservation statistics
beside bare forward passes of their own tokens. The page is written after each part, so that a run that is cut off
leaves what it has; a part that fails does not keep the others from running. With ``--device cpu --shape tiny`` all of
it takes seconds, without a GPU.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtPatch
from lit_thought.errors import ThoughtError
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.prompts.unrelated import load_texts
from lit_thought.settings import DEFAULT_SITES, ORDERS, SITES
from lit_thought.timing import format_bytes
from recipes.harness import (
    TEMPLATE,
    Trial,
    check_names,
    command_line,
    load_split,
    machine,
    one_line,
    patch_difference,
    table,
    write_results,
)
from recipes.robustness.tiny import tiny_tokenizer
from recipes.speed.benchmark_fit import fit_once, peak_memory, preservation_costs, side_by_side

TINY = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "8b": {
        "8B's shape": {**LARGE, "vocab_size": 128256},
        "One block of 70B's shape": {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 1,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    },
    "8b-block": {"One block of 8B's shape": {**LARGE, "num_hidden_layers": 1}},
    "tiny": {"A tiny shape": TINY, "One block of a tiny shape": {**TINY, "num_hidden_layers": 1}},
}
"""What the times are measured on: a model for all numbers of pairs, and others for the first."""
FAMILIES = {"llama": SITES, "gemma3_text": DEFAULT_SITES}
"""Without and with a norm after the projections, whose scales are the gains of the solve; and the sites they have."""
TASK = "function_vectors/capitalize"
VOCABULARY = 2048
TOLERANCE = 1e-5
"""Between two devices. Rounding takes less: without AVX a CPU finds the patches that it finds with it to 5e-6."""
HOW: dict[str, Any] = {"ridge": 0.1}
"""Settings of all fits that are compared: above the default, so that rounding stays below :data:`TOLERANCE`."""


def benchmark(
    device: str = "cuda",
    shape: str = "8b",
    pairs: Sequence[int] = (30, 300),
    repeats: int = 3,
    minutes: float = 8.0,
    out: str = "recipes/results/gpu",
) -> None:
    """Go through the parts while there is time, and write the page after each."""
    check_names("shape", [shape], SHAPES)
    there = torch.device(device)
    if there.type == "cuda" and not torch.cuda.is_available():
        raise ThoughtError(
            f"device={device!r}: torch sees no GPU. Run this where it does, or with --device cpu --shape tiny."
        )
    tokenizer = tiny_tokenizer(load_texts("default", "preserve", "text"), VOCABULARY)
    sizes = [
        (f"{title}, {count} pairs", layers, count)
        for number, (title, layers) in enumerate(SHAPES[shape].items())
        for count in (pairs if number == 0 else pairs[:1])
    ]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "Patches of both devices": partial(same_patches, there, tokenizer),
        "bfloat16, streams elsewhere, outputs": partial(other_ways, there, tokenizer),
        **{title: partial(costs, there, tokenizer, of, count, repeats) for title, of, count in sizes},
    }
    settings = {"device": device, "shape": shape, "pairs": list(pairs), "repeats": repeats, "minutes": minutes}
    record: dict[str, Any] = {"settings": settings, "environment": machine(there), "parts": {}}
    start = time.monotonic()
    for title, part in parts.items():
        print(f"{title} …", flush=True)
        spent = time.monotonic() - start
        late = {"skipped": f"{spent / 60:.1f} of {minutes:g} minutes were over"}
        record["parts"][title] = attempt(part) if spent < 60 * minutes else late
        write_results(__file__, out, page(record), record)
    if failed := failures(record):
        raise SystemExit("\n".join(failed))


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part finds, or the error that ends it; and its seconds."""
    start = time.monotonic()
    try:
        with without_tf32():
            found = part()
    except Exception as error:
        traceback.print_exc()
        found = {"error": one_line(f"{type(error).__name__}: {error}", 300)}
    return {**found, "seconds": time.monotonic() - start}


@contextmanager
def without_tf32() -> Iterator[None]:
    """No TF32 inside, where nothing may change that.

    Raises:
        RuntimeError: when something has.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
        if (after := torch.get_float32_matmul_precision()) != "highest":
            raise RuntimeError(f"torch.set_float32_matmul_precision was called in a fit, with {after!r}")
    finally:
        torch.set_float32_matmul_precision(before)


def random_model(
    family: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """A model of random weights, made where it is to be: matrices that keep the size of what they are given, and norms
    of different scales."""
    width = sizes["hidden_size"]
    config = AutoConfig.for_model(
        family,
        **{"vocab_size": len(tokenizer), **sizes},
        head_dim=width // sizes["num_attention_heads"],
        initializer_range=width**-0.5,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


# --- the same patches -----------------------------------------------------------------------------------------------


def same_patches(device: torch.device, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Fits on the device against the same on the CPU: each site and all together, in both orders and precisions."""
    checks = []
    for family, sites in FAMILIES.items():
        for dtype in (torch.float32, torch.float64):
            here = random_model(family, TINY, dtype, torch.device("cpu"), tokenizer)
            models = (here, copy.deepcopy(here).to(device))
            for chosen in (*((site,) for site in sites), sites):
                for order in ORDERS:
                    case = f"{family}, {str(dtype)[6:]}, {order}, {' + '.join(chosen)}"
                    how = {"sites": chosen, "order": order}
                    checks.append(check(case, "the CPU", partial(apart, models, tokenizer, [how, how])))
    return {"checks": checks}


def other_ways(device: torch.device, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Fits on the device in bfloat16, with the streams elsewhere, and of outputs that the model writes there."""
    low = random_model("llama", TINY, torch.bfloat16, torch.device("cpu"), tokenizer)
    here = copy.deepcopy(low).float()
    there = copy.deepcopy(here).to(device)
    rounding = apart((here, low), tokenizer)
    checks = [
        check(
            "bfloat16",
            "the same weights in float32, on the CPU; at most twice what bfloat16 changes there",
            partial(apart, (here, low.to(device)), tokenizer),
            2 * rounding,
        )
    ]
    for place in ("cpu", "disk"):
        ways = [{"offload": "device"}, {"offload": place}]
        checks.append(check(f"offload={place}", "offload=device", partial(apart, (there, there), tokenizer, ways)))
    written = partial(apart, (here, there), tokenizer, pairs=load_split(TASK, 0, fit=8).fit)
    checks.append(check("outputs that the model writes", "the CPU, where it writes them, too", written))
    return {"checks": checks}


def apart(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    ways: Sequence[Mapping[str, Any]] = ({}, {}),
    pairs: Sequence[Mapping[str, str]] | None = None,
) -> float:
    """How far the patches of two models at two settings are from each other; each has its own statistics to preserve.

    Args:
        models: the models.
        tokenizer: theirs.
        ways: the settings.
        pairs: eight of the task, with their outputs, when left out.
    """
    split = load_split(TASK, 0, fit=8)
    text = load_texts("default", "preserve", "text")[0][:2000]
    patches: list[ThoughtPatch] = []
    for lm, how in zip(models, ways, strict=True):
        with tempfile.TemporaryDirectory() as cache:
            settings = {**HOW, "preserve": [text], "cache_dir": cache, **how}
            patches.append(Trial(lm, tokenizer, split).fit(pairs or split.labelled, **settings))
    return patch_difference(*patches)


def check(case: str, against: str, found: Callable[[], float], most: float = TOLERANCE) -> dict[str, Any]:
    """One comparison: a difference, or the error that came up, and whether it is small enough."""
    tried = attempt(lambda: {"difference": found()})
    return {"case": case, "against": against, "most": most, "holds": tried.get("difference", most + 1) <= most, **tried}


# --- what a fit costs -----------------------------------------------------------------------------------------------


def costs(
    device: torch.device, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, int], count: int, repeats: int
) -> dict[str, Any]:
    """Fits of so many pairs on a random Llama, in bfloat16 on a GPU, from pairs with outputs to an adapter on disk."""
    gc.collect()  # models that Lightning's trainers hold
    torch.cuda.empty_cache()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = random_model("llama", sizes, dtype, device, tokenizer)
    split = load_split(TASK, 0, fit=count)
    data = PairDataModule(split.labelled, split.instruction, TEMPLATE)
    prepare_pairs(data, lm, tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        run = partial(fit_once, lm, tokenizer, split.labelled, split.instruction, {"cache_dir": cache})
        with peak_memory(device) as peak:
            first = run()
        preserved = preservation_costs(lm, tokenizer, first, repeats)
        found = side_by_side(lm, data, run, repeats)
    return {
        "sizes": dict(sizes),
        "parameters": sum(weight.numel() for weight in lm.parameters()),
        "weights_bytes": sum(weight.numel() * weight.element_size() for weight in lm.parameters()),
        "pairs": len(split.labelled),
        **found,
        "preservation": {**preserved, "peak_bytes": peak["bytes"]},
    }


# --- the page -------------------------------------------------------------------------------------------------------


def failures(record: Mapping[str, Any]) -> list[str]:
    """What did not end, and what does not agree, in words."""
    failed = []
    for title, part in record["parts"].items():
        failed += [f"{title}: {part['error']}"] if "error" in part else []
        for row in part.get("checks", ()):
            if not row["holds"]:
                found = row.get("error") or f"{row['difference']:.1e} is more than {row['most']:.1e}"
                failed.append(f"{title}: {row['case']}: {found}")
    return failed


def page(record: Mapping[str, Any]) -> str:
    """All parts so far."""
    parts = record["parts"]
    checks = [row for part in parts.values() for row in part.get("checks", ())]
    text = f"{record['environment']}\n\n{sum(row['holds'] for row in checks)} of {len(checks)} comparisons of patches "
    text += "hold; TF32 is off, and a fit that turns it on fails.\n"
    if failed := failures(record):
        text += "\n" + "".join(f"- {line}\n" for line in failed)
    for title, part in parts.items():
        text += f"\n## {title}\n\n"
        if "skipped" in part:
            text += f"Left out: {part['skipped']}.\n"
        elif "error" in part:
            text += f"Failed: {part['error']}\n"
        else:
            text += _checks(part["checks"]) if "checks" in part else _costs(part)
            text += f"\n{part['seconds']:.0f} s in all.\n"
    return text


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in checks:
        found = f"{row['difference']:.1e}" if "difference" in row else "failed"
        lines.append([row["case"], row["against"], found, f"{row['most']:.1e}", "yes" if row["holds"] else "**no**"])
    return table(["fit", "against", "largest relative difference", "at most", "holds"], lines, left=2)


def _costs(part: Mapping[str, Any]) -> str:
    stages, kept, weights = part["stages"], part["preservation"], part["weights_bytes"]
    seconds = {
        "bare forward passes": part["bare_seconds"],
        "fit": part["fit_seconds"],
        **{f"of it {name}": spent for name, spent in stages.items()},
        "of it anything else": part["fit_seconds"] - sum(stages.values()),
        f"preservation statistics, once per model, {kept['tokens']:,} tokens": kept["seconds"],
        "bare forward passes of these": kept["bare_seconds"],
    }
    lines = [[name, f"{spent:.3f} s"] for name, spent in seconds.items()]
    lines += [["fit ÷ bare", f"{part['ratio']:.2f}"], ["preservation ÷ bare", f"{kept['ratio']:.2f}"]]
    lines += [["weights", format_bytes(weights)]]
    for name, more in (("fit", part["peak_bytes"]), ("fit with preservation", kept["peak_bytes"])):
        lines.append([f"peak above the weights, {name}", f"{format_bytes(more)} (× {1 + more / weights:.2f} in all)"])
    about = f"{part['parameters']:,} parameters, `{json.dumps(part['sizes'])}`; {part['pairs']} pairs, "
    about += f"{part['compared_tokens']:,} compared tokens, {part['chunk_tokens']} of the chunk.\n"
    return f"{about}\n{table(['', ''], lines)}"


if __name__ == "__main__":
    command_line(benchmark)
