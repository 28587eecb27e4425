"""The change that a patch is: low-rank changes of named weights, thought vectors, and how they were made. Scale, add,
truncate; what applies it to a model (``weights``) and its file forms stand above."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from lit_thought.errors import PatchError
from lit_thought.patch.display import error_bars, html_table, kind_of, layer_figures, markdown_table, title
from lit_thought.patch.provenance import added, plain_json, public_name, scaled, summands
from lit_thought.solve.factors import Factors
from lit_thought.tensor_files import tensors_hash

__all__ = ["Change", "checked_factors", "checked_vector"]


class Change:
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
        self.provenance: dict[str, Any] = plain_json(provenance or {})

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the modules that the patch changes: those with factors, then those with only a vector."""
        return tuple(dict.fromkeys([*self.factors, *self.vectors]))

    @property
    def rank(self) -> int:
        """The largest rank of any target; 0 where there are only vectors."""
        return max((value.rank for value in self.factors.values()), default=0)

    @property
    def digest(self) -> str:
        """SHA-256 of all factors and vectors: what tells a patch from others, on whatever model it is."""
        matrices = {f"{path}.{name}": getattr(value, name) for path, value in self.factors.items() for name in "AB"}
        return tensors_hash({**matrices, **{f"{path}.bias": vector for path, vector in self.vectors.items()}})

    @property
    def num_parameters(self) -> int:
        """Numbers in all factors and vectors."""
        return sum(value.numel() for value in self._tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors and vectors, in float32."""
        return sum(value.nbytes for value in self._tensors())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._figures().items())})"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return markdown_table(title(self.provenance), self._rows())

    def _repr_html_(self) -> str:
        return html_table(title(self.provenance), self._rows())

    def _figures(self) -> dict[str, str]:
        """What its one line says: size, model and kind."""
        sizes = {"rank": self.rank, "weights": len(self.factors), "vectors": len(self.vectors)}
        figures = {name: str(size) for name, size in sizes.items() if size or name != "vectors"}
        figures["parameters"] = f"{self.num_parameters:,}"
        kinds = set(map(kind_of, summands(self.provenance)))
        named = {"model": self.provenance.get("model") or self.provenance.get("base_model"), "kind": None}
        if len(kinds) == 1:
            (named["kind"],) = kinds
        return figures | {name: repr(public_name(str(value))) for name, value in named.items() if value}

    def _rows(self) -> list[tuple[str, str]]:
        """The same for a table, with what was fitted to, and the errors by block, of each summand."""
        rows = [(name, value.strip("'")) for name, value in self._figures().items()]
        for known in summands(self.provenance):
            if (pairs := (known.get("settings") or {}).get("pairs")) is not None:
                rows.append(("inputs", f"{pairs}"))
            for kind, bars, mean in error_bars(layer_figures(known)):
                rows.append((f"error left by block, {kind}", f"{bars} mean {mean:.2f}"))
        return rows

    def without_vectors(self) -> Self:
        """The weights' changes alone, with the same provenance: what vLLM and llama.cpp read as an adapter.

        Raises:
            PatchError: if there are only vectors.
        """
        return type(self)(self.factors, self.provenance)

    def only_vectors(self) -> Self:
        """The thought vectors alone, with the same provenance.

        Raises:
            PatchError: if there are none.
        """
        return type(self)({}, self.provenance, self.vectors)

    def _tensors(self) -> list[Tensor]:
        matrices = [tensor for value in self.factors.values() for tensor in (value.A, value.B)]
        return [*matrices, *self.vectors.values()]

    def __mul__(self, factor: object) -> Self:
        """The patch times a finite number: of each target, ``B`` and the vector are scaled."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        try:
            number = float(factor)
        except OverflowError:  # an int that float cannot hold
            number = math.inf
        if not math.isfinite(number):
            raise PatchError(f"factor={number}: a patch can be scaled by a finite number only.")
        factors = {path: Factors(value.A, value.B * number) for path, value in self.factors.items()}
        vectors = {path: vector * number for path, vector in self.vectors.items()}
        return type(self)(factors, scaled(self.provenance, number), vectors)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: object) -> Self:
        """The sum: the factors of each target are put side by side, so their ranks add and the sum is exact;
        vectors are added, rounded to float32 once. Of a patch and one that was fitted on top of it, the sum is both.

        Raises:
            PatchError: if the patches belong to different models.
        """
        if not isinstance(other, Change):
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
        known = added({**self.provenance, "digest": self.digest}, {**other.provenance, "digest": other.digest})
        return type(self)(total, known, vectors)

    __radd__ = __add__

    def __sub__(self, other: object) -> Self:
        return self + -other if isinstance(other, Change) else NotImplemented

    def padded(self, rank: int) -> Self:
        """The same change with factors that are all of one ``rank``, filled up with zeros.

        Raises:
            PatchError: if ``rank`` is less than the patch's.
        """
        if rank < self.rank:
            raise PatchError(
                f"rank={rank}; expected at least the patch's, {self.rank}. Cut it first: patch.truncate(rank)."
            )
        return type(self)(
            {path: value.padded(rank) for path, value in self.factors.items()}, self.provenance, self.vectors
        )

    def truncate(self, rank: int) -> Self:
        """Each target's nearest change of at most ``rank``, in the Frobenius norm (computed in float64).

        Targets of lower rank stay as they are, and so do vectors. Where one is cut, the provenance gains ``truncated``:
        the rank and the relative error ‖ΔW − ΔW_rank‖ / ‖ΔW‖ over all targets. Of a patch that was cut before, ΔW is
        what it was before the first cut.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise PatchError(f"rank={rank!r}; expected a whole number of at least 1.")
        if self.rank <= rank:
            return type(self)(self.factors, self.provenance, self.vectors)
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
        before = (self.provenance.get("truncated") or {}).get("relative_error", 0.0) ** 2
        share = lost / whole if whole > 0 else 0.0
        # what a cut takes off is orthogonal to what it leaves, so squares add: of the first ΔW, 1 - before was left
        truncated = {"rank": rank, "relative_error": math.sqrt(before + (1 - before) * share)}
        return type(self)(reduced, {**self.provenance, "truncated": truncated}, self.vectors)


def checked_factors(value: Factors) -> Factors:
    """A float32 copy on the CPU of a weight's change.

    Raises:
        PatchError: if it is not finite as float32.
    """
    kept = Factors(_keep(value.A), _keep(value.B))
    for name, tensor in (("A", kept.A), ("B", kept.B)):
        if not bool(torch.isfinite(tensor).all()):
            raise PatchError(f"Factors: {name} holds NaN or infinite values (as float32).")
    return kept


def checked_vector(path: str, value: object) -> Tensor:
    """A float32 copy on the CPU of a thought vector, shape (d_out,).

    Raises:
        PatchError: if it is not a floating-point vector of at least one entry, or not finite as float32.
    """
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point() or value.numel() == 0:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PatchError(f"vectors[{path!r}] must be a floating-point tensor of shape (d_out,), got {came}.")
    kept = _keep(value)
    if not bool(torch.isfinite(kept).all()):
        raise PatchError(f"vectors[{path!r}] holds NaN or infinite values (as float32).")
    return kept


def _keep(value: Tensor) -> Tensor:
    """A float32 copy on the CPU that nothing else can change."""
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def _is_path(path: object) -> bool:
    return isinstance(path, str) and bool(path)
