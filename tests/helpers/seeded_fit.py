"""A fit to sampled outputs, from a fixed seed: ``python seeded_fit.py FOLDER`` saves its adapter."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lit_thought import ThoughtPatch, transmute  # noqa: E402
from recipes.robustness.tiny import INSTRUCTION, PAIRS, TEXTS, tiny_model, tiny_tokenizer  # noqa: E402


def seeded() -> ThoughtPatch:
    """A patch from sampled outputs."""
    options = {"do_sample": True, "temperature": 1.5}
    pairs = [{"input": pair["input"]} for pair in PAIRS]
    common = {"rank": 2, "preserve": TEXTS, "max_new_tokens": 6, "progress": False, "seed": 7, "generate": options}
    return transmute(tiny_model(), tiny_tokenizer(), INSTRUCTION, pairs, **common)  # type: ignore[arg-type]


if __name__ == "__main__":
    seeded().save_adapter(sys.argv[1])
