"""A finished run written by hand, with text that tries to break out of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors

SCRIPT = "<script>window.hit = 1</script>"
ATTACK = f"""{SCRIPT} "><img src=x onerror="window.hit = 2"> </pre></td> {{{{ 7 * 7 }}}} & | `x` $y$"""
INSTRUCTION = f"Answer with the opposite. {ATTACK}\n```\n## Use\n<!-- results, from lit-thought report -->\n"
KINDS = ("self_attn.o_proj", "mlp.down_proj")
ERRORS = {"self_attn.o_proj": (0.5, 0.1), "mlp.down_proj": (2.0, 1.0)}
ITEMS = [  # reference, plain, instructed, patched
    ("hot", "cold", "It is warm", "cold", "cold"),
    ("big", "small", "no", "small", " small\n"),
    ("up", "down", "up", "down", "not down at all"),
    ("rich", "poor", "poor", "wealthy", "poor"),
    (ATTACK, None, SCRIPT, "one two three", "one three " + ATTACK),
]
"""Of the four with a reference: plain right once, instructed 3 times, patched 3 times; of all five, the patched output
is the instructed one twice, the plain one never."""
RESULT: dict[str, Any] = {
    "pairs": 5,
    "accuracy": {"plain": 0.25, "instructed": 0.75, "patched": 0.75},
    "first_token_accuracy": {"plain": 0.25, "instructed": 0.75, "patched": 1.0},
    "recovery": 1.0,
    "fidelity": 0.4,
    "fidelity_plain": 0.0,
    "kl": {"plain": 3.25, "patched": 0.0625},
    "agreement": {"plain": 0.3, "patched": 0.95},
    "perplexity": {"original": 20.0, "patched": 20.25},
    "perplexity_ratio": 1.0125,
    "perplexity_windows": {"tokens": [10, 20, 30], "original": [30.0, 61.0, 90.0], "patched": [30.4, 60.9, 90.5]},
    "prompt_tokens": {"plain": 6.0, "instructed": 86.0, "saved": 80.0},
}
LONG_ITEMS = [
    (
        "How do I bake bread?",
        None,
        "Mix flour and water.",
        "Arr, mix flour and water, matey!",
        "Bake, bake, bake, bake",
    ),
    ("What is rain?", None, "Water that falls.", "Arr, water that falls!", "Arr, water that falls!"),
]
LONG_RESULT: dict[str, Any] = {
    "pairs": 2,
    **dict.fromkeys(("accuracy", "first_token_accuracy", "recovery")),
    "checked": {"plain": 0.0, "instructed": 1.0, "patched": 0.5},
    "fidelity": 0.5,
    "fidelity_plain": 0.0,
    "kl": {"plain": 0.25, "patched": 0.05},
    "agreement": {"plain": 0.7, "patched": 0.94},
    "output_kl": {"plain": 0.4, "patched": 0.06},
    "own_text": {
        "kl": 1.5,
        "kl_reverse": 2.5,
        "agrees_for": {"plain": 0.05, "patched": 0.5},
        "agrees_for_tokens": {"plain": 0.5, "patched": 4.0},
        "repetition": {"plain": 0.0, "instructed": 0.01, "patched": 0.25},
        "length": {"plain": 6.0, "instructed": 9.5, "patched": 20.5},
        "finished": {"plain": 1.0, "instructed": 1.0, "patched": 0.5},
    },
    "perplexity": None,
    "perplexity_ratio": None,
    "prompt_tokens": {"plain": 36.0, "instructed": 31.5, "saved": -4.5},
}
"""Of long outputs without references: the difference fell by 85 %, and all the same every warning applies."""


def make_patch(blocks: int = 12, **provenance: Any) -> ThoughtPatch:
    """Rank-3 changes of two layers a block, with the whole record of a fit."""
    generator = torch.Generator().manual_seed(0)
    paths = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    factors = {
        path: Factors(torch.randn(3, 10, generator=generator), torch.randn(8, 3, generator=generator)) for path in paths
    }
    record = {
        "model": "tiny/model",
        "base_model": "tiny/model",
        "revision": "abc123",
        "fingerprint": "f00d",
        "instruction": INSTRUCTION,
        "template": {"text": "Q: {input}\nA: {output}\n", "separator": "\n"},
        "inputs": {"kind": "demonstrations", "count": 28, "pairs": []},
        "settings": {"rank": 3, "pairs": 30, "generated_outputs": 30, "preserve_weight": 3.0, "preserve_tokens": 12000},
        "versions": {"lit_thought": "0.1.0", "torch": "2.13.0"},
        "diagnostics": {
            path: {
                "error_before": ERRORS[path.split(".", 3)[3]][0],
                "error_after": ERRORS[path.split(".", 3)[3]][1],
                "effective_rank": 7.5,
                "condition": 1234.5,
                "truncation_loss": 0.125,
                "tokens": 99,
            }
            for path in paths
        },
        "history": [
            {"step": 0, "fidelity": 0.0, "output_kl": 3.0, "accuracy": 0.0, "instructed_accuracy": 0.8},
            {"step": 1, "fidelity": 0.7, "output_kl": 0.2, "accuracy": 0.65, "instructed_accuracy": 0.8},
        ],
        "seconds": {"solve": 2.5, "prepare": 0.5, "forward": 1.0},
        "memory": {"peak": 1_400_000_000, "raised": {"solve": 30_000_000}, "estimated": {"solve": 47_000_000}},
        "date": "2026-01-02T03:04:05+00:00",
    }
    return ThoughtPatch(factors, {**record, **provenance})


def write_evaluation(folder: Path, adapter: str | None = None, long: bool = False, **changes: Any) -> None:
    """What ``lit-thought evaluate --out`` writes, before it measured the patched model's own text; or, of ``long``
    outputs, since."""
    folder.mkdir(parents=True)
    keys = ("input", "reference", "plain", "instructed", "patched")
    lines = [json.dumps(dict(zip(keys, item, strict=True))) + "\n" for item in (LONG_ITEMS if long else ITEMS)]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    result = {**(LONG_RESULT if long else RESULT), **({"adapter": adapter} if adapter else {}), **changes}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def make_run(folder: Path, **provenance: Any) -> Path:
    """An adapter folder with its evaluation."""
    make_patch(**provenance).save_adapter(folder)
    write_evaluation(folder / "evaluation")
    return folder
