"""How many inputs to write, chosen on inputs that are held back: ``inputs="auto"``.

1. Twice the usual number is written, and a share of it, :data:`HELD_BACK` at most, is held back. The instructed model
   writes the outputs.
2. A quarter of the others is fitted; the score is, on those held back, KL(instructed ‖ patched) over the tokens that
   predict the output or its end (:mod:`lit_thought.evaluation.held_back`).
3. The inputs are doubled and fitted anew, as long as that has lowered the score by more than a standard error of the
   pairs' mean difference, and the next fit would end within :data:`MAX_SECONDS`.

The fit that scores best is the result. Pairs that were given, and a document's own words, are in every fit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lit_thought.errors import ThoughtError
from lit_thought.evaluation.held_back import HeldBack
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import write_inputs, write_outputs
from lit_thought.fit.selection import completed, mean_and_error, part_of
from lit_thought.model.loading import context_window
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.unrelated import load_texts

__all__ = ["HELD_BACK", "MAX_SECONDS", "Grown", "format_growth", "grow"]

HELD_BACK = 24
"""Most inputs that are held back; a quarter of them where they are few."""
MAX_SECONDS = 600.0
"""From the first input to the last fit; one of twice the inputs is taken to last twice as long as the one before."""


class Grown(NamedTuple):
    """What :func:`grow` found.

    Attributes:
        patch: the best fit's.
        data: its pairs.
        provenance: of each fit the number of pairs, the held-back KL with its standard error and the seconds, and
            which was chosen, as JSON values.
    """

    patch: ThoughtPatch
    data: PairDataModule
    provenance: dict[str, Any]


def grow(
    module: ThoughtModule, data: PairDataModule, callback: Callable[[], ThoughtCallback], progress: bool = True
) -> Grown:
    """Fit more and more of the inputs that the model writes, until that no longer helps.

    Args:
        module: the model; left bit for bit as it was.
        data: pairs with ``inputs="auto"``.
        callback: makes the callback of a fit.
        progress: show progress bars.

    Raises:
        ThoughtError: when the model writes fewer than 8 inputs, and for what a fit refuses.
    """
    started = time.perf_counter()
    model, tokenizer = module.model, module.tokenizer
    write_inputs(data, model, tokenizer, progress, times=2)
    asked = [i for i in range(len(data.given), len(data.pairs)) if "output" not in data.pairs[i]]
    if len(asked) < 8:
        raise ThoughtError(
            f'inputs="auto" holds some of the inputs back, and the model wrote {len(asked)}; expected 8 or more. Give '
            "pairs, or a number of inputs."
        )
    always = [i for i in range(len(data.pairs)) if i not in asked]
    random.Random(data.settings.seed).shuffle(asked)
    count = min(HELD_BACK, len(asked) // 4)
    held, rest = asked[:count], asked[count:]
    data.tokenise(tokenizer, context_window(model))
    outputs = write_outputs(data, model, tokenizer, progress, held)
    pairs, instructions = completed(module, data, held, outputs), [data.instructions[i] for i in held]
    measure: HeldBack | None = None
    tried: list[dict[str, Any]] = []
    best: tuple[ThoughtPatch, PairDataModule] | None = None
    scores = None
    size = -(-len(rest) // 4)
    while True:
        now = time.perf_counter()
        indices = sorted([*always, *rest[:size]])
        new = set(indices) & set(data.missing) - {i for i, _, _ in outputs}
        outputs += write_outputs(data, model, tokenizer, progress, sorted(new))
        own, how = part_of(data, indices, outputs), callback()
        own.val_pairs, own.val_instructions = data.val_pairs, data.val_instructions
        patch = fit(module, own, how, progress)
        if measure is None:
            texts = how.preserved.texts or load_texts("default", "preserve", "preserve")
            measure = HeldBack(model, tokenizer, pairs, instructions, texts, data.settings.batch_size)
        found = measure.divergences(patch).nan_to_num(nan=torch.inf, posinf=torch.inf)  # none is the worst
        kl, error = mean_and_error(found)
        seconds = time.perf_counter() - now
        tried.append({"pairs": len(own.pairs), "kl": kl, "kl_error": error, "seconds": round(seconds, 2)})
        if scores is None or float(found.mean()) < float(scores.mean()):
            best, chosen = (patch, own), len(tried) - 1
        gain, noise = (1.0, 0.0) if scores is None else mean_and_error(scores - found)
        scores = found
        late = time.perf_counter() - started + 2 * seconds > MAX_SECONDS
        if not gain > (noise if noise is not None and math.isfinite(noise) else 0.0) or size >= len(rest) or late:
            break
        size = min(2 * size, len(rest))
    assert best is not None
    told = {"held_back": len(held), "fits": tried, "chosen": chosen}
    return Grown(*best, {**told, "seconds": round(time.perf_counter() - started, 2)})


def format_growth(growth: Mapping[str, Any]) -> str:
    """The fits of :attr:`Grown.provenance`, a line each, the chosen one marked."""
    lines = [f"Chosen on {growth['held_back']} inputs held back, in {growth['seconds']:.1f} s (KL, nats a token):"]
    for number, one in enumerate(growth["fits"]):
        mark = "  <- chosen" if number == growth["chosen"] else ""
        error = "" if one["kl_error"] is None else f" ± {one['kl_error']:.4f}"
        lines.append(f"  {one['pairs']} pairs: {'–' if one['kl'] is None else format(one['kl'], '.4f')}{error}{mark}")
    return "\n".join(lines)
