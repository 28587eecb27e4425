"""What a report says, as one JSON-able dict: the single source of its three forms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import lit_thought
from lit_thought.errors import ThoughtError
from lit_thought.files import expanded
from lit_thought.patch.adapter import WEIGHTS, read_adapter
from lit_thought.patch.display import layer_figures, order, place, title
from lit_thought.patch.provenance import summands
from lit_thought.patch.results import adapter_digest, read_evaluation, three_way
from lit_thought.solve.factors import Factors

__all__ = ["FORMAT_VERSION", "gather", "singular_values"]

FORMAT_VERSION = 1
"""Of ``report.json``; rises when a key changes its meaning."""

_PHASES = ("preserve", "prepare", "resume", "forward", "statistics", "reduce", "save", "solve", "validate", "patch")


def gather(
    adapter: str | os.PathLike[str], evaluation: str | os.PathLike[str] | None = None, samples: int = 20
) -> dict[str, Any]:
    """Read a run and work out every figure of its report.

    Args:
        adapter: adapter folder of a fit.
        evaluation: folder that ``lit-thought evaluate --out`` wrote; ``adapter``/evaluation, if it is there, when left
            out. Without one, ``evaluation`` of the result is None.
        samples: how many of the evaluation's pairs to show, the first ones.

    Returns:
        ``adapter`` (rank, sizes), ``fits`` (one for each summand of the patch: what was asked, layers, steps, seconds,
        memory, settings, versions), ``spectrum`` (singular values of each changed weight) and ``evaluation`` (the
        headline, warnings, the three-way table and differences with 95 % intervals, samples). What the records lack is
        None or empty.

    Raises:
        ThoughtError: when the evaluation is damaged, incomplete or of another adapter.
        PatchError: when ``adapter`` is not an adapter folder.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ThoughtError(f"samples must be a whole number of 0 or more; got {samples!r}.")
    folder = expanded(adapter, "adapter")
    patch = read_adapter(folder, "adapter")
    found = read_evaluation(folder, evaluation)
    known = patch.provenance
    return {
        "format_version": FORMAT_VERSION,
        "lit_thought": lit_thought.__version__,
        "title": title(known),
        "model": known.get("base_model") or known.get("model"),
        "revision": known.get("revision"),
        "fingerprint": known.get("fingerprint"),
        "adapter": {
            "rank": patch.rank,
            "weights": len(patch.factors),
            "vectors": len(patch.vectors),
            "parameters": patch.num_parameters,
            "bytes": (folder / WEIGHTS).stat().st_size,
            "sha256": adapter_digest(folder),
            "truncated": known.get("truncated"),
        },
        "fits": [_fit(own) for own in summands(known)],
        "spectrum": [
            {**place(path), "values": singular_values(factors)}
            for path, factors in sorted(patch.factors.items(), key=lambda entry: order(entry[0]))
        ],
        "evaluation": None if found is None else three_way(*found, samples),
    }


def singular_values(factors: Factors) -> list[float]:
    """Singular values of ΔW = B A, largest first, (rank,): with B = Q_b R_b and Aᵀ = Q_a R_a those of R_b R_aᵀ."""
    r_b: Tensor = torch.linalg.qr(factors.B.double()).R
    r_a: Tensor = torch.linalg.qr(factors.A.double().T).R
    return [float(f"{value:.6g}") for value in torch.linalg.svdvals(r_b @ r_a.T).tolist()]


def _fit(known: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance of one fit says."""
    instruction = known.get("instruction")
    memory, seconds = known.get("memory") or {}, known.get("seconds") or {}
    return {
        "scale": known.get("scale", 1.0),
        "instructions": [instruction] if isinstance(instruction, str) else list(instruction or []),
        "template": known.get("template"),
        "layers": layer_figures(known),
        "steps": list(known.get("history") or []),
        "seconds": {phase: seconds[phase] for phase in sorted(seconds, key=_phase_order)},
        "memory": {"peak": None, "estimated": None, **memory, "raised": memory.get("raised") or {}} if memory else None,
        "settings": dict(known.get("settings") or {}),
        "written_inputs": (known.get("inputs") or {}).get("count"),
        "versions": dict(known.get("versions") or {}),
        "date": known.get("date"),
    }


def _phase_order(phase: str) -> int:
    return _PHASES.index(phase) if phase in _PHASES else len(_PHASES)
