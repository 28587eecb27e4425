"""The patch: low-rank changes of named weights, and thought vectors. Apply, remove, scale, add, truncate, save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.errors import PatchError
from lit_thought.model.loading import fingerprint_with, model_name
from lit_thought.patch.weights import (
    Change,
    add_change,
    checked_factors,
    checked_vector,
    find_weights,
    has_change,
    original_weights,
    take_off_change,
)
from lit_thought.solve.factors import Factors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from lit_thought.patch.hub import FetchOptions, PushOptions

__all__ = ["ThoughtPatch"]


class ThoughtPatch:
    """Changes of a model's linear layers, by the full path of the layer that each belongs to.

    A change of the weight is a low-rank matrix, one of the bias a *thought vector*: a constant that is added to
    the layer's output at every token (activation addition, a steering vector). A layer may have either or both.

    Args:
        factors: e.g. ``{"model.layers.0.self_attn.o_proj": Factors(A, B)}``; may be empty where there are vectors.
        provenance: what the patch was made from, as JSON values; infinite and NaN figures become null.
            Keys read here: ``fingerprint`` and ``model`` (which model it belongs to), ``model_type`` (its
            architecture), ``base_model`` (the name that adapters record), ``fan_in_fan_out`` (the targets are
            GPT-2's transposed ``Conv1D``), ``d_in`` (number of inputs by path, for ``save_adapter``, of targets that
            have only a vector).
        vectors: e.g. ``{"model.layers.0.mlp.down_proj": v}``, each of shape (d_out,), of any floating-point dtype;
            None is none.

    Factors and vectors are copied, to float32 on the CPU.

    Raises:
        PatchError: if there is neither a factor nor a vector, if a factor is not finite as float32, if a vector is no
            finite floating-point vector or has another length than its target's factors have outputs, or if the
            provenance is not JSON or its ``d_in`` does not hold whole numbers.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        provenance: Mapping[str, Any] | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        vectors = vectors or {}
        if not factors and not vectors:
            raise PatchError("factors is empty, and so is vectors: a patch needs at least one module to change.")
        for path, value in factors.items():
            if not _is_path(path) or not isinstance(value, Factors):
                came = f"{path!r}: {type(value).__name__}"
                raise PatchError(f"factors must map module paths to Factors, got {came}.")
        self.factors: dict[str, Factors] = {path: checked_factors(value) for path, value in factors.items()}
        self.vectors: dict[str, Tensor] = {}
        for path, vector in vectors.items():
            if not _is_path(path):
                raise PatchError(f"vectors must map module paths to tensors, got the key {path!r}.")
            self.vectors[path] = checked_vector(path, vector)
            if path in factors and len(vector) != len(factors[path].B):
                raise PatchError(
                    f"{path!r} has {len(factors[path].B)} outputs by its factors, but its vector has {len(vector)} "
                    "entries. Take both from one model."
                )
        self.provenance: dict[str, Any] = _plain_json(provenance or {})
        d_in = self.provenance.get("d_in", {})
        if not isinstance(d_in, dict) or any(type(number) is not int or number < 1 for number in d_in.values()):
            raise PatchError(f"provenance['d_in'] must map module paths to numbers of inputs, got {d_in!r}.")

    # What it is

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the modules that the patch changes: those with factors, then those with only a vector."""
        return tuple(dict.fromkeys([*self.factors, *self.vectors]))

    @property
    def rank(self) -> int:
        """The largest rank of any target; 0 where there are only vectors."""
        return max((value.rank for value in self.factors.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Numbers in all factors and vectors."""
        return sum(value.numel() for value in self._tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors and vectors, in float32."""
        return sum(value.nbytes for value in self._tensors())

    def __repr__(self) -> str:
        made_for = self.provenance.get("model") or self.provenance.get("base_model")
        return (
            f"ThoughtPatch({f'model={made_for!r}, ' if made_for else ''}targets={len(self.targets)}, "
            f"rank={self.rank}, {f'vectors={len(self.vectors)}, ' if self.vectors else ''}"
            f"parameters={self.num_parameters:,}, {self.nbytes / 2**20:.2f} MiB)"
        )

    def without_vectors(self) -> ThoughtPatch:
        """The weights' changes alone, with the same provenance: what vLLM and llama.cpp read as an adapter.

        Raises:
            PatchError: if there are only vectors.
        """
        return ThoughtPatch(self.factors, self.provenance)

    def only_vectors(self) -> ThoughtPatch:
        """The thought vectors alone, with the same provenance.

        Raises:
            PatchError: if there are none.
        """
        return ThoughtPatch({}, self.provenance, self.vectors)

    def _tensors(self) -> list[Tensor]:
        matrices = [tensor for value in self.factors.values() for tensor in (value.A, value.B)]
        return [*matrices, *self.vectors.values()]

    def _change(self) -> Change:
        """What the patch adds to the model, by parameter name."""
        matrices = {f"{path}.weight": value for path, value in self.factors.items()}
        return {**matrices, **{f"{path}.bias": value for path, value in self.vectors.items()}}

    # On a model

    def validate(self, model: nn.Module, check: bool = True) -> None:
        """Check that the patch fits ``model``, changing nothing.

        Args:
            model: the model whose module paths the patch names.
            check: also compare fingerprints, where the patch has one: is this the model it was made for?
                Patches that are on ``model`` now do not count as a change of it.

        Raises:
            PatchError: on a missing module, one that is no linear layer, a wrong shape, a weight or bias that is
                shared, sharded other than by rows, or not loaded, or another model.
        """
        find_weights(model, self._change())
        made_for = self.provenance.get("fingerprint")
        if not check or not made_for:
            return
        found = fingerprint_with(model, original_weights(model))
        if found != made_for:
            raise PatchError(
                f"this patch was made for {self.provenance.get('model') or 'another model'!r} (fingerprint "
                f"{str(made_for)[:12]}), this model is {model_name(model) or type(model).__name__!r} "
                f"(fingerprint {found[:12]}): its weights or their dtype differ. Load the right model in the "
                "right dtype, or pass check=False to go ahead all the same."
            )

    def apply_(self, model: nn.Module, check: bool = True) -> None:
        """Add the patch to the model's weights and biases, in place; ``remove_`` takes it off again.

        Every target is checked before the first weight changes, and a failure midway puts all of them back.
        The sum is computed in float32 (float64 for float64 weights) and rounded to the weight's dtype once.
        One copy of each touched weight and bias is kept until the last patch on it is removed. While a patch is
        on, do not change what it touches by other means: removal would undo that change too.

        A layer without a bias that gets a vector has one while such a patch is on, in the dtype of its weight, and
        ``bias=None`` again after. Do not ``save_pretrained`` the model meanwhile: its config knows of no such bias,
        so loading would drop it. Save the patch instead.

        A quantised layer (bitsandbytes, GPTQ, AWQ, HQQ, FP8, torchao and so on) keeps its weight, and the patch sits
        *beside* it: a forward hook computes ``B (A x)`` and adds it, and the vector, to the layer's output in float32,
        rounded to the output's dtype once for all patches there. Removing the last of them removes the hook.

        Args:
            model: the model to change.
            check: refuse a model with another fingerprint than the one the patch was made for.

        Raises:
            PatchError: see ``validate``; also if this very patch is applied already.
        """
        if isinstance(model, nn.Module) and has_change(model, self):
            raise PatchError("this patch is applied to the model already. Remove it first, or apply 2 * patch.")
        self.validate(model, check)
        add_change(model, self, self._change())

    def remove_(self, model: nn.Module) -> None:
        """Take the patch off again. Weights and biases are then, bit for bit, as if it had never been applied.

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
        """The patch times a finite number: of each target, ``B`` and the vector are scaled."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        try:
            number = float(factor)
        except OverflowError:  # an int that float cannot hold
            number = math.inf
        if not math.isfinite(number):
            raise PatchError(f"factor={number}: a patch can be scaled by a finite number only.")
        scaled = {path: Factors(value.A, value.B * number) for path, value in self.factors.items()}
        vectors = {path: vector * number for path, vector in self.vectors.items()}
        return ThoughtPatch(scaled, _scaled(self.provenance, number), vectors)

    __rmul__ = __mul__

    def __neg__(self) -> ThoughtPatch:
        return self * -1.0

    def __add__(self, other: object) -> ThoughtPatch:
        """The sum: the factors of each target are put side by side, so their ranks add and the sum is exact;
        vectors are added, rounded to float32 once.

        Raises:
            PatchError: if the patches belong to different models.
        """
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
        vectors = dict(self.vectors)
        for path, vector in other.vectors.items():
            if path in vectors and len(vectors[path]) != len(vector):
                raise PatchError(
                    f"patches of different models cannot be added: the vectors of {path!r} have "
                    f"{len(vectors[path])} and {len(vector)} entries."
                )
            vectors[path] = vectors[path] + vector if path in vectors else vector
        return ThoughtPatch(total, _joined(self.provenance, other.provenance), vectors)

    __radd__ = __add__

    def __sub__(self, other: object) -> ThoughtPatch:
        return self + -other if isinstance(other, ThoughtPatch) else NotImplemented

    def truncate(self, rank: int) -> ThoughtPatch:
        """Each target's nearest change of at most ``rank``, in the Frobenius norm (computed in float64).

        Targets of lower rank stay as they are, and so do vectors. The provenance gains ``truncated``: the rank and the
        relative error ‖ΔW − ΔW_rank‖ / ‖ΔW‖ over all targets.
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
        return ThoughtPatch(reduced, {**self.provenance, "truncated": truncated}, self.vectors)

    # On disk

    def save_adapter(
        self, path: str | os.PathLike[str], overwrite: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write a PEFT adapter folder (see ``lit_thought.patch.adapter.write_adapter``)."""
        from lit_thought.patch.adapter import write_adapter

        write_adapter(self, path, overwrite=overwrite, dtype=dtype)

    def save_control_vector(
        self, path: str | os.PathLike[str], model: PreTrainedModel, overwrite: bool = False, check: bool = True
    ) -> None:
        """Write llama.cpp's form of thought vectors (see ``lit_thought.patch.control_vector.save_control_vector``)."""
        from lit_thought.patch.control_vector import save_control_vector

        save_control_vector(self, path, model, overwrite=overwrite, check=check)

    def push_to_hub(
        self, repo_id: str, dtype: torch.dtype = torch.float32, **options: Unpack[PushOptions]
    ) -> CommitInfo:
        """Share the patch as a PEFT adapter in a repository on the hub.

        Args:
            repo_id: ``owner/name``; made if there is none.
            dtype: of the stored factors and vectors.
            options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, ``license``, ``language``,
                ``base_model`` and ``evaluation``: see :func:`lit_thought.patch.hub.push_adapter`, also for what is
                raised.
        """
        from lit_thought.patch.hub import push_patch

        return push_patch(self, repo_id, dtype, **options)

    @classmethod
    def from_pretrained(
        cls, repo_id_or_path: str | os.PathLike[str], model: nn.Module | None = None, **options: Unpack[FetchOptions]
    ) -> ThoughtPatch:
        """Read an adapter from a repository on the hub, or from a folder as ``load`` does.

        Args:
            repo_id_or_path: ``owner/name``, or a folder, which comes first.
            model: also check that the patch fits it (see ``validate``).
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``subfolder``: see
                :func:`lit_thought.patch.hub.adapter_folder`, also for what is raised.
        """
        from lit_thought.patch.hub import load_adapter

        patch = load_adapter(repo_id_or_path, **options)
        if model is not None:
            patch.validate(model)
        return patch

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> ThoughtPatch:
        """Read an adapter folder; with ``model``, also check that the patch fits it (see ``validate``)."""
        from lit_thought.patch.adapter import read_adapter

        patch = read_adapter(path)
        if model is not None:
            patch.validate(model)
        return patch


def _is_path(path: object) -> bool:
    return isinstance(path, str) and bool(path)


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
    for key in ("model", "model_type", "base_model", "fingerprint", "fan_in_fan_out"):
        found = [entry[key] for entry in (mine, theirs) if entry.get(key) is not None]
        if key in ("fingerprint", "fan_in_fan_out") and len(found) == 2 and found[0] != found[1]:
            names = [entry.get("model") or "an unnamed model" for entry in (mine, theirs)]
            raise PatchError(
                f"patches of different models cannot be added: {key} is {str(found[0])[:12]} ({names[0]}) "
                f"and {str(found[1])[:12]} ({names[1]}). Fit both on the same model."
            )
        if found:
            together[key] = found[0]
    if d_in := {**mine.get("d_in", {}), **theirs.get("d_in", {})}:
        together["d_in"] = d_in
    together["parts"] = [part for entry in (mine, theirs) for part in _parts(entry)]
    return together


def _parts(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The summands; a truncated sum is one summand, since its parts no longer add up to it."""
    if "parts" in provenance and "truncated" not in provenance:
        return list(provenance["parts"])
    return [provenance]
