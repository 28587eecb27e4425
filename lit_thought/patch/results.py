"""Results of an evaluation: the folder that ``lit-thought evaluate --out`` writes, its checks, and the three-way table
that cards and reports make of it.

The folder holds ``result.json``, all that :func:`~lit_thought.evaluation.compare.evaluate` returns but the ``items``,
with the keys ``format`` and ``adapter`` (:func:`adapter_digest`), and ``items.jsonl``, one of the ``items`` a line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_folder, expanded, finite, is_own_file, parse_json
from lit_thought.patch.adapter import WEIGHTS
from lit_thought.patch.provenance import are_figures, is_number
from lit_thought.patch.verdict import headline, is_long, warnings
from lit_thought.solve.intervals import paired_difference, perplexity_ratio, wilson

__all__ = [
    "RUNS",
    "adapter_digest",
    "figures",
    "items_text",
    "of_adapter",
    "read_evaluation",
    "three_way",
    "write_result",
]

RUNS = ("plain", "instructed", "patched")
RESULT_VERSION = 1
"""Of the ``result.json`` that an evaluation writes, there as ``format``; files without it are of version 1."""
_EVALUATION = "evaluation"
_RESULT, _ITEMS = "result.json", "items.jsonl"
_RESULT_KEYS = ("pairs", "accuracy", "fidelity", "kl", "agreement", "perplexity", "prompt_tokens")
_OPTIONAL = ("accuracy", "first_token_accuracy", "checked", "perplexity")
_FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("accuracy", "first_token_accuracy", "checked"), RUNS),
    **dict.fromkeys(("kl", "agreement", "output_kl", "perplexity"), ()),
    "prompt_tokens": ("plain", "instructed"),
}
"""Of a result, the keys that hold figures by name, and which of these there must be."""
_OWN_FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("agrees_for", "agrees_for_tokens", "repetition"), ()),
    **dict.fromkeys(("length", "finished"), RUNS),
}
"""The same of its ``own_text``."""


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of an adapter's weights, by which an evaluation knows its adapter."""
    with (Path(folder).expanduser() / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_adapter(result: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A result of ``evaluate`` as the files have it: with the format's version and the digest of its adapter."""
    return {"format": RESULT_VERSION, **result, "adapter": adapter_digest(folder)}


def write_result(result: Mapping[str, Any], folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write ``result.json`` and ``items.jsonl`` of :func:`of_adapter`'s result, complete or not at all, in the place of
    a folder that is there with ``overwrite``.

    Raises:
        ThoughtError: if ``folder`` cannot be written.
    """
    figures = {name: value for name, value in result.items() if name != "items"}
    with atomic_folder(folder, overwrite) as out:
        (out / _ITEMS).write_text(items_text(result["items"]), encoding="utf-8")
        (out / _RESULT).write_text(json.dumps(finite(figures), indent=1) + "\n", encoding="utf-8")


def items_text(items: Iterable[Mapping[str, Any]]) -> str:
    """``items.jsonl``."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def read_evaluation(
    adapter: Path, evaluation: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Result and items of an evaluation of the adapter in ``adapter``, checked.

    Args:
        adapter: adapter folder.
        evaluation: folder of the evaluation. If None, ``adapter``/evaluation, and None is returned where there is none.

    Raises:
        ThoughtError: when it is damaged, incomplete or of another adapter.
    """
    folder = _evaluation_folder(adapter, evaluation)
    if folder is None:
        return None
    digest = adapter_digest(adapter)
    try:
        for name in (_RESULT, _ITEMS):
            if not is_own_file(folder / name):
                raise ValueError(f"it has no {name} of its own")
        text = (folder / _RESULT).read_text(encoding="utf-8")
        result = parse_json(text, parse_constant=lambda name: None)  # NaN and infinities are no JSON
        lines = (folder / _ITEMS).read_text(encoding="utf-8").split("\n")
        items = [parse_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ThoughtError(
            f"evaluation: {folder.name!r} cannot be read ({error}). Expected the folder with {_RESULT} and {_ITEMS} "
            "that lit-thought evaluate --out wrote; run it again."
        ) from error
    result = _mapping(result)
    version = result.get("format", RESULT_VERSION)
    if type(version) is not int or version != RESULT_VERSION:
        raise ThoughtError(
            f"evaluation: {folder.name!r}: the format of {_RESULT} is {version!r:.60}, this lit_thought reads "
            f"{RESULT_VERSION}. Upgrade lit-thought, or run lit-thought evaluate again."
        )
    wrong = _wrong_key(result)
    if wrong is not None:
        raise ThoughtError(
            f"evaluation: {folder.name!r} is damaged: {wrong} is {result[wrong]!r:.60}. Run lit-thought evaluate again."
        )
    lacking = [key for key in _RESULT_KEYS if key not in result]
    bad = [i for i, item in enumerate(items) if not _is_item(item)]
    if lacking or bad or len(items) != result["pairs"] or not items:
        wanted = f"{_ITEMS} does not hold the outputs of {result.get('pairs')} pairs"
        what = f"{_RESULT} lacks {lacking}" if lacking else wanted
        raise ThoughtError(f"evaluation: {folder.name!r} is incomplete: {what}. Run lit-thought evaluate again.")
    if result.get("adapter", digest) != digest:
        raise ThoughtError(
            f"evaluation: {folder.name!r} is of other weights than the adapter's here, if only by their dtype or rank. "
            "Evaluate this one: lit-thought evaluate ADAPTER --pairs test.jsonl --out ADAPTER/evaluation; or push the "
            "folder that was evaluated: lit-thought push ADAPTER OWNER/NAME"
        )
    return result, items


def _evaluation_folder(adapter: Path, evaluation: str | os.PathLike[str] | None) -> Path | None:
    if evaluation is None:
        default = adapter / _EVALUATION
        return default if default.is_dir() and default.resolve().parent == adapter.resolve() else None
    folder = expanded(evaluation, "evaluation")
    if not folder.is_dir():
        raise ThoughtError(
            f"evaluation={str(evaluation)!r} is not a folder; expected what lit-thought evaluate --out wrote."
        )
    return folder


def _wrong_key(result: Mapping[str, Any]) -> str | None:
    """The first key whose value is none that an evaluation writes; keys that are missing pass."""
    for key, names in _FIGURES.items():
        absent = key not in result or (result[key] is None and key in _OPTIONAL)
        if not absent and not are_figures(result[key], *names):
            return key
    own = result.get("own_text")
    if own is not None and not _is_own_text(own):
        return "own_text"
    for key in ("checked", "first_token_accuracy"):
        if result.get(key) is not None and not _are_shares(result[key]):
            return key
    for key in ("recovery", "fidelity_plain", "fidelity"):
        value = result.get(key, 0)
        if not is_number(value) and (value is not None or key == "fidelity"):
            return key
    windows = result.get("perplexity_windows")
    lists = list(_mapping(windows).values())
    whole = _mapping(windows).keys() == {"tokens", "original", "patched"} and all(isinstance(x, list) for x in lists)
    whole = whole and len(set(map(len, lists))) == 1 and all(x is None or is_number(x) for own in lists for x in own)
    return (
        None
        if windows is None or (whole and all(type(n) is int and n > 0 for n in windows["tokens"]))
        else "perplexity_windows"
    )


def _is_own_text(value: Any) -> bool:
    own = _mapping(value)
    if not all(name in own and are_figures({name: own[name]}) for name in ("kl", "kl_reverse")):
        return False
    whole = all(are_figures(own.get(key), *names) for key, names in _OWN_FIGURES.items())
    loops = own.get("loops")  # older files have none
    return (
        whole and _are_shares(own["finished"]) and (loops is None or (are_figures(loops, *RUNS) and _are_shares(loops)))
    )


def _are_shares(figures: Mapping[str, float]) -> bool:
    return all(0 <= figures[run] <= 1 for run in RUNS)


def _is_item(value: Any) -> bool:
    item = _mapping(value)
    texts = [item.get(key) for key in ("input", *RUNS)]
    texts += [_mapping(item["answers"]).get(run) for run in RUNS] if "answers" in item else []
    return all(isinstance(text, str) for text in texts) and isinstance(item.get("reference"), str | None)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def figures(result: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float | None], int]]:
    """The rows of the three-way table that have a value: key, label, the values by run where there are any, decimals.

    Of long outputs (:func:`~lit_thought.patch.verdict.is_long`) it has the figures of the patched model's own text, and
    KL along the instructed outputs; short ones are told by accuracy and fidelity.
    """
    perplexity, lengths = result["perplexity"] or {}, result["prompt_tokens"]
    fidelity = {"plain": result.get("fidelity_plain"), "patched": result["fidelity"]}
    unrelated = {"plain": perplexity.get("original"), "patched": perplexity.get("patched")}
    rows = [
        ("accuracy", "accuracy (exact match)", result["accuracy"] or {}, 2),
        ("first_token_accuracy", "first-token accuracy", result.get("first_token_accuracy") or {}, 2),
        ("checked", "outputs that pass the check", result.get("checked") or {}, 2),
        ("fidelity", "output equal to the instructed one", fidelity, 2),
        ("kl", "KL(instructed ‖ ·), nats a token", result["kl"], 3),
        ("agreement", "top-1 agreement with instructed", result["agreement"], 2),
    ]
    if is_long(result):
        own = result["own_text"]
        rows += [
            ("output_kl", "KL(instructed ‖ ·) along the instructed output", result.get("output_kl") or {}, 3),
            ("own_kl", "KL(· ‖ instructed) along its own output", {"patched": own["kl"]}, 3),
            ("agrees_for", "instructed output reproduced, to the first other token", own["agrees_for"], 2),
            ("repetition", "repeated 3-grams", own["repetition"], 2),
            ("loops", "outputs that loop", own.get("loops") or {}, 2),
            ("length", "tokens an output", own["length"], 1),
            ("finished", "outputs that come to an end", own["finished"], 2),
        ]
    rows += [
        ("perplexity", "perplexity of unrelated text", unrelated, 2),
        ("prompt_tokens", "prompt tokens a query", {**lengths, "patched": lengths["plain"]}, 1),
    ]
    return [row for row in rows if any(row[2].get(run) is not None for run in RUNS)]


def three_way(result: Mapping[str, Any], items: Sequence[Mapping[str, Any]], samples: int = 0) -> dict[str, Any]:
    """The comparison of the three runs as cards and reports show it, with 95 % intervals.

    Args:
        result, items: those of :func:`read_evaluation`.
        samples: how many of the items to keep, the first ones.
    """
    answered = [item for item in items if item.get("reference") is not None]
    right = {run: [_same(item.get("answers", item)[run], item["reference"]) for item in answered] for run in RUNS}
    faithful = {run: [_same(item[run], item["instructed"]) for item in items] for run in ("plain", "patched")}
    first = result.get("first_token_accuracy") or {}
    own = result.get("own_text") or {}
    cells = {
        "accuracy": {run: _share(sum(hits), len(hits)) for run, hits in right.items() if hits},
        "first_token_accuracy": {
            run: _share(round(first[run] * len(answered)), len(answered)) for run in RUNS if first and answered
        },
        "fidelity": {run: _share(sum(hits), len(hits)) for run, hits in faithful.items()},
        **{
            key: {run: _share(round(shares[run] * len(items)), len(items)) for run in RUNS}
            for key, shares in (("checked", result.get("checked")), ("finished", own.get("finished")))
            if shares
        },
    }
    rows = []
    for key, label, values, digits in figures(result):
        own = cells.get(key, {run: {"value": values[run]} for run in RUNS if values.get(run) is not None})
        if own:
            rows.append({"key": key, "label": label, "digits": digits, "runs": {run: own.get(run) for run in RUNS}})
    lengths = result["prompt_tokens"]
    differences = []
    if answered:
        differences = [
            _difference("accuracy, patched − instructed", right["patched"], right["instructed"]),
            _difference("accuracy, patched − plain", right["patched"], right["plain"]),
        ]
    differences.append(
        _difference("output equal to the instructed one, patched − plain", faithful["patched"], faithful["plain"])
    )
    return {
        "pairs": len(items),
        "answered": len(answered),
        "confidence": 0.95,
        "headline": headline(result),
        "warnings": list(warnings(result).values()),
        "long": is_long(result),
        "table": rows,
        "differences": differences,
        "recovery": result.get("recovery"),
        "perplexity_ratio": _ratio(result),
        "tokens_saved": lengths["instructed"] - lengths["plain"],
        "samples": [{key: item.get(key) for key in ("input", "reference", *RUNS)} for item in items[:samples]],
    }


def _ratio(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ratio of the perplexities, with its interval where the losses of two windows or more are known."""
    original, patched = map((result["perplexity"] or {}).get, ("original", "patched"))
    if not original or patched is None:
        return None
    windows = _mapping(result.get("perplexity_windows"))
    if len(windows.get("tokens", ())) < 2 or None in (*windows["original"], *windows["patched"]):
        return {"value": patched / original}
    _, low, high = perplexity_ratio(**windows)
    return {"value": patched / original, "low": low, "high": high}


def _same(text: str, other: str) -> bool:
    return text.strip() == other.strip()


def _share(successes: int, count: int) -> dict[str, float]:
    low, high = wilson(successes, count)
    return {"value": successes / count, "low": low, "high": high, "count": count}


def _difference(label: str, first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    value, low, high = paired_difference(first, second)
    return {"label": label, "value": value, "low": low, "high": high}
