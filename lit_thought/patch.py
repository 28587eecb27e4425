"""The patch: low-rank changes of named weights. Apply, remove, scale, add, truncate, save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import nn

from lit_thought.errors import PatchError
from lit_thought.models import fingerprint_with, model_name
from lit_thought.weights import (
    Factors,
    add_change,
    find_weights,
    has_change,
    original_weights,
    take_off_change,
)

__all__ = ["Factors", "ThoughtPatch"]


class ThoughtPatch:
    """Changes of a model's weights, by the full path of the module that each belongs to.

    Args:
        factors: e.g. ``{"model.layers.0.self_attn.o_proj": Factors(A, B)}``.
        provenance: what the patch was made from, as JSON values; infinite and NaN figures become null.
            Keys read here: ``fingerprint`` and ``model`` (which model it belongs to), ``base_model`` (the
            name that adapters record), ``fan_in_fan_out`` (the targets are GPT-2's transposed ``Conv1D``).

    Raises:
        PatchError: if there are no factors or the provenance is not JSON.
    """

    def __init__(self, factors: Mapping[str, Factors], provenance: Mapping[str, Any] | None = None) -> None:
        if not factors:
            raise PatchError("factors is empty: a patch needs at least one module to change.")
        for path, value in factors.items():
            if not isinstance(path, str) or not path or not isinstance(value, Factors):
                came = f"{path!r}: {type(value).__name__}"
                raise PatchError(f"factors must map module paths to Factors, got {came}.")
        self.factors: dict[str, Factors] = dict(factors)
        self.provenance: dict[str, Any] = _plain_json(provenance or {})

    # What it is

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the modules that the patch changes."""
        return tuple(self.factors)

    @property
    def rank(self) -> int:
        """The largest rank of any target."""
        return max(value.rank for value in self.factors.values())

    @property
    def num_parameters(self) -> int:
        return sum(value.A.numel() + value.B.numel() for value in self.factors.values())

    @property
    def nbytes(self) -> int:
        return sum(value.A.nbytes + value.B.nbytes for value in self.factors.values())

    def __repr__(self) -> str:
        made_for = self.provenance.get("model") or self.provenance.get("base_model")
        return (
            f"ThoughtPatch({f'model={made_for!r}, ' if made_for else ''}targets={len(self.factors)}, "
            f"rank={self.rank}, parameters={self.num_parameters:,}, {self.nbytes / 2**20:.2f} MiB)"
        )

    # On a model

    def validate(self, model: nn.Module, check: bool = True) -> None:
        """Check that the patch fits ``model``, changing nothing.

        Args:
            model: the model whose module paths the patch names.
            check: also compare fingerprints, where the patch has one: is this the model it was made for?
                Patches that are on ``model`` now do not count as a change of it.

        Raises:
            PatchError: on a missing module, a wrong shape, a weight that is quantised, shared, sharded or not
                loaded, or another model.
        """
        find_weights(model, self.factors)
        made_for = self.provenance.get("fingerprint")
        if not check or not made_for:
            return
        found = fingerprint_with(model, original_weights(model))
        if found != made_for:
            raise PatchError(
                f"this patch was made for {self.provenance.get('model') or 'another model'!r} (fingerprint "
                f"{str(made_for)[:12]}), this model is {model_name(model) or type(model).__name__!r} "
                f"(fingerprint {found[:12]}): its weights or their dtype differ. Load the right model in the "
                "right dtype, or pass check=False to apply it all the same."
            )

    def apply_(self, model: nn.Module, check: bool = True) -> None:
        """Add the patch to the model's weights, in place; ``remove_`` takes it off again.

        Every target is checked before the first weight changes, and a failure midway puts all of them back.
        The sum is computed in float32 (float64 for float64 weights) and rounded to the weight's dtype once.
        One copy of each touched weight is kept until the last patch on it is removed. While a patch is on,
        do not change a touched weight by other means: removal would undo that change too.

        Args:
            model: the model to change.
            check: refuse a model with another fingerprint than the one the patch was made for.

        Raises:
            PatchError: see ``validate``; also if this very patch is applied already.
        """
        if isinstance(model, nn.Module) and has_change(model, self):
            raise PatchError("this patch is applied to the model already. Remove it first, or apply 2 * patch.")
        self.validate(model, check)
        add_change(model, self, self.factors)

    def remove_(self, model: nn.Module) -> None:
        """Take the patch off again. The weights are then, bit for bit, as if it had never been applied.

        Patches applied before or after it stay on, in their order.

        Raises:
            PatchError: if this patch is not applied to ``model``.
        """
        if not isinstance(model, nn.Module) or not has_change(model, self):
            raise PatchError("this patch is not applied to this model, so there is nothing to remove.")
        take_off_change(model, self)

    @contextmanager
    def applied(self, model: nn.Module, check: bool = True) -> Iterator[nn.Module]:
        """Apply for the length of a ``with`` block; leaving it, by an exception too, removes the patch."""
        self.apply_(model, check)
        try:
            yield model
        finally:
            if has_change(model, self):  # unless the block removed it
                self.remove_(model)

    # Algebra

    def __mul__(self, factor: object) -> ThoughtPatch:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise PatchError(f"factor={number}: a patch can be scaled by a finite number only.")
        scaled = {path: Factors(value.A, value.B * number) for path, value in self.factors.items()}
        return ThoughtPatch(scaled, _scaled(self.provenance, number))

    __rmul__ = __mul__

    def __neg__(self) -> ThoughtPatch:
        return self * -1.0

    def __add__(self, other: object) -> ThoughtPatch:
        """The exact sum: the factors of each target are put side by side, so their ranks add."""
        if not isinstance(other, ThoughtPatch):
            return self if type(other) is int and other == 0 else NotImplemented  # sum() starts from 0
        total = dict(self.factors)
        for path, value in other.factors.items():
            if path not in total:
                total[path] = value
                continue
            mine = total[path]
            if mine.A.shape[1] != value.A.shape[1] or mine.B.shape[0] != value.B.shape[0]:
                raise PatchError(
                    f"patches of different models cannot be added: {path!r} is {mine.B.shape[0]} by "
                    f"{mine.A.shape[1]} in one, {value.B.shape[0]} by {value.A.shape[1]} in the other."
                )
            total[path] = Factors(torch.cat([mine.A, value.A]), torch.cat([mine.B, value.B], dim=1))
        return ThoughtPatch(total, _joined(self.provenance, other.provenance))

    __radd__ = __add__

    def __sub__(self, other: object) -> ThoughtPatch:
        return self + -other if isinstance(other, ThoughtPatch) else NotImplemented

    def truncate(self, rank: int) -> ThoughtPatch:
        """Each target's nearest change of at most ``rank``, in the Frobenius norm (computed in float64).

        Targets of lower rank stay as they are. The provenance gains ``truncated``: the rank and the relative
        error ‖ΔW − ΔW_rank‖ / ‖ΔW‖ over all targets.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise PatchError(f"rank={rank!r}; expected a whole number of at least 1.")
        reduced, lost, whole = {}, 0.0, 0.0
        for path, value in self.factors.items():
            # ΔW = B A = Q_b (R_b R_aᵀ) Q_aᵀ, so the SVD of the small matrix in the middle is that of ΔW
            q_b, r_b = torch.linalg.qr(value.B.double())
            q_a, r_a = torch.linalg.qr(value.A.double().T)
            u, s, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            whole += float(s.square().sum())
            if value.rank <= rank:
                reduced[path] = value
                continue
            lost += float(s[rank:].square().sum())
            root = s[:rank].sqrt()
            reduced[path] = Factors(root[:, None] * (v_t[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root)
        error = math.sqrt(lost / whole) if whole > 0 else 0.0
        truncated = {"rank": rank, "relative_error": error}
        return ThoughtPatch(reduced, {**self.provenance, "truncated": truncated})

    # On disk

    def save_adapter(
        self, path: str | os.PathLike[str], overwrite: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write a PEFT adapter folder (see ``lit_thought.adapter.write_adapter``)."""
        from lit_thought.adapter import write_adapter

        write_adapter(self, path, overwrite=overwrite, dtype=dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> ThoughtPatch:
        """Read an adapter folder; with ``model``, also check that the patch fits it (see ``validate``)."""
        from lit_thought.adapter import read_adapter

        patch = read_adapter(path)
        if model is not None:
            patch.validate(model)
        return patch


def _plain_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy as JSON would store it; NaN and infinities, which JSON lacks, become None."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: finite(entry) for key, entry in value.items()}
        return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    try:
        plain = json.loads(json.dumps(finite(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PatchError(
            f"provenance must hold JSON values only ({error}). Convert tensors and paths first."
        ) from error
    if not isinstance(plain, dict):
        raise PatchError(f"provenance must be a dict, got {type(provenance).__name__}.")
    return plain


def _scaled(provenance: dict[str, Any], factor: float) -> dict[str, Any]:
    if "parts" in provenance:
        return {**provenance, "parts": [_scaled(part, factor) for part in provenance["parts"]]}
    return {**provenance, "scale": provenance.get("scale", 1.0) * factor}


def _joined(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Provenance of a sum: what identifies the model, which must agree, and the ``parts``."""
    together: dict[str, Any] = {}
    for key in ("model", "base_model", "fingerprint", "fan_in_fan_out"):
        found = [entry[key] for entry in (mine, theirs) if entry.get(key) is not None]
        if key in ("fingerprint", "fan_in_fan_out") and len(found) == 2 and found[0] != found[1]:
            names = [entry.get("model") or "an unnamed model" for entry in (mine, theirs)]
            raise PatchError(
                f"patches of different models cannot be added: {key} is {str(found[0])[:12]} ({names[0]}) "
                f"and {str(found[1])[:12]} ({names[1]}). Fit both on the same model."
            )
        if found:
            together[key] = found[0]
    together["parts"] = [part for entry in (mine, theirs) for part in _parts(entry)]
    return together


def _parts(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The summands; a truncated sum is one summand, since its parts no longer add up to it."""
    if "parts" in provenance and "truncated" not in provenance:
        return list(provenance["parts"])
    return [provenance]
