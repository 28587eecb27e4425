"""What a report says, as one JSON-able dict: the single source of its three forms."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lit_thought
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import RUNS
from lit_thought.evaluation.intervals import paired_difference, perplexity_ratio, wilson
from lit_thought.files import expanded, is_own_file, parse_json
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.provenance import are_figures, is_number
from lit_thought.solve.factors import Factors

__all__ = ["FORMAT_VERSION", "RESULT_VERSION", "adapter_digest", "gather", "singular_values"]

FORMAT_VERSION = 1
"""Of ``report.json``; rises when a key changes its meaning."""

RESULT_VERSION = 1
"""Of the ``result.json`` that an evaluation writes, there as ``format``; files without it are of version 1."""
_EVALUATION = "evaluation"
_RESULT, _ITEMS = "result.json", "items.jsonl"
_RESULT_KEYS = ("pairs", "accuracy", "fidelity", "kl", "agreement", "perplexity", "prompt_tokens")
_OPTIONAL = ("accuracy", "first_token_accuracy", "perplexity")
_FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("accuracy", "first_token_accuracy"), RUNS),
    **dict.fromkeys(("kl", "agreement", "perplexity"), ()),
    "prompt_tokens": ("plain", "instructed"),
}
"""Of a result, the keys that hold figures by name, and which of these there must be."""
_BLOCK = re.compile(r"\.([0-9]{1,9})\.")
_STAGES = ("preserve", "prepare", "resume", "forward", "statistics", "reduce", "save", "solve", "validate", "patch")
_LAYER_FIGURES = (
    ("error_before", ("error_before", "vector_error_before")),
    ("error_after", ("error_after", "vector_error_after")),
    ("effective_rank", ("effective_rank",)),
    ("condition", ("condition",)),
    ("truncation_loss", ("truncation_loss",)),
    ("tokens", ("tokens",)),
)


def gather(
    run_dir: str | os.PathLike[str], evaluation: str | os.PathLike[str] | None = None, samples: int = 20
) -> dict[str, Any]:
    """Read a run and work out every figure of its report.

    Args:
        run_dir: adapter folder of a fit.
        evaluation: folder that ``lit-thought evaluate --out`` wrote; ``run_dir``/evaluation, if it is there, when left
            out. Without one, ``evaluation`` of the result is None.
        samples: how many of the evaluation's pairs to show, the first ones.

    Returns:
        ``adapter`` (rank, sizes), ``fits`` (one for each summand of the patch: what was asked, layers, steps, seconds,
        memory, settings, versions), ``spectrum`` (singular values of each changed weight) and ``evaluation`` (the
        three-way table and differences with 95 % intervals, samples). What the records lack is None or empty.

    Raises:
        ThoughtError: when the evaluation is damaged, incomplete or of another adapter.
        PatchError: when ``run_dir`` is not an adapter folder.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ThoughtError(f"samples must be a whole number of 0 or more; got {samples!r}.")
    folder = expanded(run_dir, "run_dir")
    patch = ThoughtPatch.load(folder)
    digest = adapter_digest(folder)
    found = _evaluation_folder(folder, evaluation)
    known = patch.provenance
    return {
        "format_version": FORMAT_VERSION,
        "lit_thought": lit_thought.__version__,
        "model": known.get("base_model") or known.get("model"),
        "revision": known.get("revision"),
        "fingerprint": known.get("fingerprint"),
        "adapter": {
            "rank": patch.rank,
            "weights": len(patch.factors),
            "vectors": len(patch.vectors),
            "parameters": patch.num_parameters,
            "bytes": (folder / "adapter_model.safetensors").stat().st_size,
            "sha256": digest,
            "truncated": known.get("truncated"),
        },
        "fits": [_fit(part) for part in known.get("parts", [known])],
        "spectrum": [
            {**_place(path), "values": singular_values(factors)}
            for path, factors in sorted(patch.factors.items(), key=lambda entry: _order(entry[0]))
        ],
        "evaluation": None if found is None else _evaluation(*_read_evaluation(found, digest), samples),
    }


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of an adapter's weights, by which an evaluation knows its adapter."""
    with (Path(folder).expanduser() / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def singular_values(factors: Factors) -> list[float]:
    """Singular values of ΔW = B A, largest first, (rank,): with B = Q_b R_b and Aᵀ = Q_a R_a those of R_b R_aᵀ."""
    r_b: Tensor = torch.linalg.qr(factors.B.double()).R
    r_a: Tensor = torch.linalg.qr(factors.A.double().T).R
    return [float(f"{value:.6g}") for value in torch.linalg.svdvals(r_b @ r_a.T).tolist()]


def _fit(known: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance of one fit says."""
    instruction = known.get("instruction")
    memory, seconds = _mapping(known.get("memory")), _mapping(known.get("seconds"))
    diagnostics = {label: known for label, known in _mapping(known.get("diagnostics")).items() if _mapping(known)}
    return {
        "scale": known.get("scale", 1.0),
        "instructions": [instruction] if isinstance(instruction, str) else list(instruction or []),
        "template": known.get("template"),
        "layers": [_layer(label, diagnostics[label]) for label in sorted(diagnostics, key=_order)],
        "steps": list(known.get("history") or []),
        "seconds": {stage: seconds[stage] for stage in sorted(seconds, key=_stage_order)},
        "memory": {name: memory.get(name) for name in ("peak", "raised", "estimated")} if memory else None,
        "settings": _mapping(known.get("settings")),
        "versions": _mapping(known.get("versions")),
        "date": known.get("date"),
    }


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _place(label: str) -> dict[str, Any]:
    """A layer's name, its block's index, and which of the block's layers it is."""
    match = _BLOCK.search(label)
    kinds = [".".join(path.split(".")[-2:]) for path in label.split("+")]
    return {"layer": label, "block": int(match[1]) if match else None, "kind": " + ".join(kinds)}


def _order(label: str) -> tuple[int, bool, str]:
    """Layers as a fit goes through them: by block, attention before the MLP."""
    place = _place(label)
    return (-1 if place["block"] is None else place["block"], "attn" not in label and "attention" not in label, label)


def _stage_order(stage: str) -> int:
    return _STAGES.index(stage) if stage in _STAGES else len(_STAGES)


def _layer(label: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        name: next((figures[key] for key in keys if figures.get(key) is not None), None)
        for name, keys in _LAYER_FIGURES
    }
    before, after = values["error_before"], values["error_after"]
    left = after / before if before and after is not None else None
    return {**_place(label), **values, "error_left": left}


def _evaluation_folder(run_dir: Path, evaluation: str | os.PathLike[str] | None) -> Path | None:
    if evaluation is None:
        default = run_dir / _EVALUATION
        return default if default.is_dir() and default.resolve().parent == run_dir.resolve() else None
    folder = expanded(evaluation, "evaluation")
    if not folder.is_dir():
        raise ThoughtError(
            f"evaluation={str(evaluation)!r} is not a folder; expected what lit-thought evaluate --out wrote."
        )
    return folder


def _read_evaluation(folder: Path, digest: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``result.json`` and ``items.jsonl``, checked."""
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
            f"evaluation: {folder.name!r} is of another adapter than the one in this run. Evaluate this one: "
            "lit-thought evaluate --adapter RUN_DIR --pairs test.jsonl --out RUN_DIR/evaluation"
        )
    return result, items


def _wrong_key(result: Mapping[str, Any]) -> str | None:
    """The first key whose value is none that an evaluation writes; keys that are missing pass."""
    for key, names in _FIGURES.items():
        absent = key not in result or (result[key] is None and key in _OPTIONAL)
        if not absent and not are_figures(result[key], *names):
            return key
    if result.get("recovery") is not None and not is_number(result["recovery"]):
        return "recovery"
    windows = result.get("perplexity_windows")
    lists = list(_mapping(windows).values())
    whole = _mapping(windows).keys() == {"tokens", "original", "patched"} and all(isinstance(x, list) for x in lists)
    whole = whole and len(set(map(len, lists))) == 1 and all(x is None or is_number(x) for own in lists for x in own)
    return (
        None
        if windows is None or (whole and all(type(n) is int and n > 0 for n in windows["tokens"]))
        else "perplexity_windows"
    )


def _is_item(value: Any) -> bool:
    item = _mapping(value)
    texts = [item.get(key) for key in ("input", *RUNS)]
    return all(isinstance(text, str) for text in texts) and isinstance(item.get("reference"), str | None)


def _evaluation(result: Mapping[str, Any], items: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    answered = [item for item in items if item.get("reference") is not None]
    right = {run: [_same(item[run], item["reference"]) for item in answered] for run in RUNS}
    faithful = {run: [_same(item[run], item["instructed"]) for item in items] for run in ("plain", "patched")}
    first = result.get("first_token_accuracy")
    perplexity = result["perplexity"] or {}
    lengths = result["prompt_tokens"]
    unrelated = {"plain": perplexity.get("original"), "patched": perplexity.get("patched")}
    rows = [
        _shares("accuracy", "accuracy (exact match)", right),
        _row("first_token_accuracy", "first-token accuracy", first and _with_intervals(first, len(answered)), 2),
        _shares("fidelity", "output equal to the instructed one", faithful),
        _row("kl", "KL(instructed ‖ ·), nats a token", _bare(result["kl"]), 3),
        _row("agreement", "top-1 agreement with instructed", _bare(result["agreement"]), 2),
        _row("perplexity", "perplexity of unrelated text", _bare(unrelated), 2),
        _row("prompt_tokens", "prompt tokens a query", _bare({**lengths, "patched": lengths["plain"]}), 1),
    ]
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
        "table": [row for row in rows if any(cell is not None for cell in row["runs"].values())],
        "differences": differences,
        "recovery": result.get("recovery"),
        "perplexity_ratio": _ratio(result, unrelated),
        "tokens_saved": lengths["instructed"] - lengths["plain"],
        "samples": [{key: item.get(key) for key in ("input", "reference", *RUNS)} for item in items[:samples]],
    }


def _ratio(result: Mapping[str, Any], perplexity: Mapping[str, float | None]) -> dict[str, Any] | None:
    """The ratio of the perplexities, with its interval where the losses of two windows or more are known."""
    original, patched = perplexity["plain"], perplexity["patched"]
    if not original or patched is None:
        return None
    windows = _mapping(result.get("perplexity_windows"))
    if len(windows.get("tokens", ())) < 2 or None in (*windows["original"], *windows["patched"]):
        return {"value": patched / original}
    _, low, high = perplexity_ratio(**windows)
    return {"value": patched / original, "low": low, "high": high}


def _same(text: str, other: str) -> bool:
    return text.strip() == other.strip()


def _row(key: str, label: str, runs: Mapping[str, Any] | None, digits: int) -> dict[str, Any]:
    return {"key": key, "label": label, "digits": digits, "runs": {run: (runs or {}).get(run) for run in RUNS}}


def _bare(values: Mapping[str, float | None]) -> dict[str, Any]:
    return {run: {"value": values[run]} for run in RUNS if values.get(run) is not None}


def _shares(key: str, label: str, outcomes: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    shares = {run: _share(sum(hits), len(hits)) for run, hits in outcomes.items() if hits}
    return _row(key, label, shares, 2)


def _with_intervals(shares: Mapping[str, float], count: int) -> dict[str, Any]:
    return {run: _share(round(shares[run] * count), count) for run in RUNS if count}


def _share(successes: int, count: int) -> dict[str, float]:
    low, high = wilson(successes, count)
    return {"value": successes / count, "low": low, "high": high, "count": count}


def _difference(label: str, first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    value, low, high = paired_difference(first, second)
    return {"label": label, "value": value, "low": low, "high": high}
