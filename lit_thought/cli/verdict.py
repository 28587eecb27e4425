"""The end of ``lit-thought fit``: how near the patched model comes to the instructed one, in words and in samples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.cli.output import say
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import evaluate
from lit_thought.inputs.write import write_pairs
from lit_thought.patch.chat import Answer, Answers
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.results import RUNS
from lit_thought.patch.verdict import headline, warnings
from lit_thought.prompts.pairs import load_pairs
from lit_thought.prompts.template import PromptTemplate

__all__ = ["compared", "format_verdict"]

_SAMPLES, _WIDTH = 3, 80
_SHARED = ("max_new_tokens", "batch_size", "cache_dir")
"""Settings of a fit that its evaluation takes over where they are given."""
_LONGEST = 64
"""Tokens of an output that an evaluation writes at most, where nothing is said."""
_INTERVAL = 0.02
"""Half-width of the interval of the unrelated text's perplexity: twice an evaluation's, for a quarter of the text."""


def compared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: ThoughtPatch,
    instruction: str | None,
    pairs: str | None,
    val_pairs: str | None,
    count: int,
    settings: Mapping[str, Any],
    progress: bool,
) -> dict[str, Any] | None:
    """What :func:`~lit_thought.evaluation.compare.evaluate` finds on ``count`` inputs; as ``inputs``, whose they are.
    None where there are none.

    Args:
        model, tokenizer, instruction, pairs, val_pairs, settings: those of the fit.
        patch: what it found.
        count: how many inputs.
        progress: show progress bars.
    """
    known, given = patch.provenance, load_pairs(pairs) if pairs is not None else []
    template, written = PromptTemplate.from_dict(known["template"]), known.get("inputs")
    new = [] if written is None else written.get("pairs", [])
    rows, whose = [], "validation inputs"
    if val_pairs is not None:
        rows = load_pairs(val_pairs)[:count]
    elif written is not None and instruction is not None:
        old = [*given, *new]
        whose = "other inputs, written anew" if "pairs" in written else "inputs written anew, perhaps as for the fit"
        total = len(old) + (2 if written["kind"] == "document" else 1) * count  # of a document half are questions
        options: dict[str, Any] = {"kind": written["kind"], "given": old, "seed": settings["seed"] + 1}
        if settings["batch_size"] is not None:
            options["batch_size"] = settings["batch_size"]
        options["longest"] = settings["max_new_tokens"] or _LONGEST
        with suppress(ThoughtError):  # that the model has no more to ask is no reason to fail
            rows = write_pairs(model, tokenizer, instruction, template, total=total, **options).pairs[:count]
    if not rows:
        rows, whose = (given or new)[-count:], "inputs of the fit itself"
    if not rows:
        return None
    try:
        found = evaluate(
            *(model, tokenizer, patch),
            instruction=instruction,
            pairs=rows,
            template=template,
            perplexity_interval=_INTERVAL,
            progress=progress,
            **{name: value for name in _SHARED if (value := settings[name]) is not None},
        )
    except ThoughtError as error:  # the adapter is written, and is no worse for it
        say(f"There is no verdict: {error}")
        return None
    return {"inputs": whose, **found}


def format_verdict(result: Mapping[str, Any]) -> str:
    """Nearness, side effects and tokens saved in words, what puts them in doubt, and three samples."""
    top, ratio, saved = headline(result), result["perplexity_ratio"], result["prompt_tokens"]["saved"]
    note = f" ({top['note']})" if top["note"] else ""
    said = f"{top['label']} {top['value']}{note}"
    lines = [f"On {result['pairs']} {result['inputs']}: {said}.", f"Unrelated text: perplexity × {ratio:.3f}."]
    if saved > 0:
        lines.append(f"Each query saves {saved:.0f} of {result['prompt_tokens']['instructed']:.0f} prompt tokens.")
    # that no tokens are saved was said before the fit
    lines += [f"Warning: {one}" for about, one in warnings(result).items() if about != "tokens"]
    if Console().is_terminal:
        lines.append("Below, what the patched model says otherwise than the instructed one is yellow.")
    lines = [textwrap.fill(line, _WIDTH) for line in lines]
    samples = [f"> {item['input']}\n\n{_answers(item)}" for item in islice(result["items"], _SAMPLES)]
    return "\n\n".join(["\n".join(lines), *samples])


def _answers(item: Mapping[str, Any]) -> str:
    """A sample's answers as ``lit-thought chat`` shows them."""
    plain, instructed, patched = (Answer(item[run]) for run in RUNS)
    answers = Answers(item["input"], plain, instructed, patched)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        return str(answers)
    with console.capture() as shown:
        console.print(answers)
    return shown.get().rstrip()
