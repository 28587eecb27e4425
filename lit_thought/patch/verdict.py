"""An evaluation in words: the figure to look at first, and what puts the figures in doubt. For its printed table, the
card and the report alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["headline", "is_long", "warnings"]

_LONG = 8
"""Tokens of the mean instructed output beyond which two outputs are hardly ever the same."""
_FALL, _TIMES = 0.8, 5
"""By how much KL along the instructed outputs has to fall to look good, and how much larger it is on the patched
model's own text where that is misleading."""
_REPEATED, _LENGTH, _CHECKED = 0.1, 0.25, 0.8
"""How much more of an output may be repetition, and of all outputs loop; how much longer or shorter it may be; and what
share of the instructed outputs that pass the check has to pass."""


def is_long(result: Mapping[str, Any]) -> bool:
    """Whether the instructed outputs have more than 8 tokens on average, their ends included; not where the result does
    not say so."""
    length = _own(result, "length").get("instructed")
    return length is not None and length > _LONG


def headline(result: Mapping[str, Any]) -> dict[str, str]:
    """The figure that says most about a patch, chosen for the job.

    With references it is accuracy. Without, for long outputs, how much of the difference to the instructed model is
    gone: 1 − KL(instructed ‖ patched) ÷ KL(instructed ‖ plain), along the instructed outputs; no two long outputs are
    the same to the letter. For short ones, how many are.

    Args:
        result: what :func:`~lit_thought.evaluation.compare.evaluate` returns, from a file or not.

    Returns:
        ``key`` (``accuracy``, ``difference`` or ``fidelity``), ``label``, ``value`` and ``note``, as texts.
    """
    accuracy, kl = result.get("accuracy"), result.get("output_kl") or {}
    if accuracy is not None:
        note = f"instructed {accuracy['instructed']:.2f}, plain {accuracy['plain']:.2f}"
        return _figure("accuracy", "accuracy, patched", f"{accuracy['patched']:.2f}", note)
    fall = _fall(kl)
    if is_long(result) and fall is not None:
        note = f"KL from {kl['plain']:.3f} to {kl['patched']:.3f} nats a token along its outputs"
        value = f"{'down' if fall >= 0 else 'up'} by {abs(fall):.0%}".replace("%", " %")
        return _figure("difference", "difference to the instructed model", value, note)
    plain = result.get("fidelity_plain")
    note = "" if plain is None else f"plain {plain:.2f}"
    return _figure("fidelity", "same output as instructed", f"{result['fidelity']:.2f}", note)


def warnings(result: Mapping[str, Any]) -> dict[str, str]:
    """Sentences on what the other figures do not show, by what they are about; none where there is nothing to say.

    - ``own_text``: KL along the instructed outputs fell by 80 % or more, but on the patched model's own text it is over
      5 times what is left of it;
    - ``loops``: more of the patched outputs than of the instructed ones loop, by over 0.1: most of their 3-grams came
      before;
    - ``repetition``, where that does not say it: they repeat themselves more, by over 0.1;
    - ``length``: they are over 25 % longer or shorter, and over a token;
    - ``checked``: they pass the check less than 0.8 times as often;
    - ``tokens``: the prompts with the chunk are no longer than those without.

    Args:
        result: what :func:`~lit_thought.evaluation.compare.evaluate` returns, from a file or not.
    """
    found = {}
    kl, own_kl = result.get("output_kl") or {}, (result.get("own_text") or {}).get("kl")
    fall = _fall(kl)
    if fall is not None and own_kl is not None and fall >= _FALL and own_kl > _TIMES * kl["patched"]:
        found["own_text"] = (
            f"As it is used, the patch does worse: KL to the instructed model is {own_kl:.3f} nats a token on the text "
            f"that the patched model writes, {kl['patched']:.3f} along the instructed outputs. Read what it writes."
        )
    loops, before = (_own(result, "loops").get(run) or 0 for run in ("patched", "instructed"))
    if loops > before + _REPEATED:
        found["loops"] = (
            f"Of the patched outputs {loops:.2f} loop (most of their 3-grams came before), of the instructed ones "
            f"{before:.2f}."
        )
    repeated, before = (_own(result, "repetition").get(run) or 0 for run in ("patched", "instructed"))
    if "loops" not in found and repeated > before + _REPEATED:
        found["repetition"] = (
            f"The patched outputs repeat themselves: {repeated:.2f} of their 3-grams came before, of those of the "
            f"instructed ones {before:.2f}."
        )
    length, wanted = (_own(result, "length").get(run) for run in ("patched", "instructed"))
    if length is not None and wanted and abs(length - wanted) > max(1, _LENGTH * wanted):
        found["length"] = (
            f"The patched outputs are {'longer' if length > wanted else 'shorter'} than the instructed ones: "
            f"{length:.1f} tokens on average, not {wanted:.1f}."
        )
    checked = result.get("checked") or {}
    if checked and checked["patched"] < _CHECKED * checked["instructed"]:
        found["checked"] = (
            f"Of the patched outputs {checked['patched']:.2f} pass the check, of the instructed ones "
            f"{checked['instructed']:.2f}."
        )
    tokens = result["prompt_tokens"]
    if tokens["instructed"] <= tokens["plain"]:
        found["tokens"] = (
            f"The patch saves no tokens: prompts have {tokens['plain']:.1f} without the chunk and "
            f"{tokens['instructed']:.1f} with it. (Many a chat template writes a system message of its own where there "
            "is none.)"
        )
    return found


def _figure(key: str, label: str, value: str, note: str) -> dict[str, str]:
    return {"key": key, "label": label, "value": value, "note": note}


def _own(result: Mapping[str, Any], key: str) -> Mapping[str, float | None]:
    figures: Mapping[str, float | None] = (result.get("own_text") or {}).get(key) or {}
    return figures


def _fall(kl: Mapping[str, float | None]) -> float | None:
    """By what share KL fell; None where it is not known, or there was none."""
    plain, patched = kl.get("plain"), kl.get("patched")
    if plain is None or patched is None or not (math.isfinite(plain) and math.isfinite(patched)) or plain <= 0:
        return None
    return 1 - patched / plain
