"""The sums that thoughts are condensed from: two for a patch (one site of one block), one for a vector.

With aᵢ the input of the site's linear layer, δᵢ the error of the residual stream and wᵢ a token's weight:

    Z = Σ wᵢ aᵢ aᵢᵀ    (the Gram matrix, d_in × d_in)
    C = Σ wᵢ δᵢ aᵢᵀ    (the cross matrix, d_out × d_in)

Sums add: over batches, processes and data sets. As long as there are fewer tokens than ``d_in`` the tokens
themselves are the smaller and the cheaper form of the same sums (they feed the n × n dual of the solve), so
they are kept as rows; beyond that they are folded into Z and C and forgotten.

A thought vector needs Σ wᵢ δᵢ only: :class:`VectorStatistics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.solve.gram import add_products, mirror

__all__ = ["Statistics", "VectorStatistics"]

_WIDE = torch.float64
FOLD = 1024
"""Rows that are multiplied at a time once there are too many to keep."""


@dataclass
class Statistics:
    """Running sums for one linear layer, in float64 whatever the model's dtype.

    Attributes:
        d_in: size of a, the layer's input.
        d_out: size of δ, the residual stream.
        weight: Σ wᵢ.
        tokens: rows added; a token that several pairs share is one row with their joint weight.
        energy: Σ wᵢ ‖δᵢ‖², what a patch has to explain (a 0-dim tensor once tokens were added).
        product_dtype: lowest dtype for multiplying the tokens of one :meth:`update` before they go into the sums; those
            of wider activations are wider. None for float64. Float32 is twice as fast, and its rounding, 1e-7 of the
            largest entries, is nothing beside a ridge of 1e-3 or more.
        rank_one: also keep :attr:`operators`, one more d_out × d_in sum; off by default.

    Example:
        >>> stats = Statistics(d_in=3, d_out=2)
        >>> stats.update(torch.eye(3), torch.ones(3, 2))
        >>> stats.gram.diagonal().tolist(), stats.tokens
        ([1.0, 1.0, 1.0], 3)
    """

    d_in: int
    d_out: int
    weight: float = 0.0
    tokens: int = 0
    energy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=_WIDE))
    rank_one: bool = field(default=False, kw_only=True)
    product_dtype: torch.dtype | None = field(default=None, kw_only=True)
    _gram: Tensor | None = field(default=None, repr=False)
    _cross: Tensor | None = field(default=None, repr=False)
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    _operators: Tensor | None = field(default=None, repr=False)
    _half: bool = field(default=False, repr=False)
    _shared: bool = field(default=True, repr=False)
    """Whether someone else may hold the sums, so that tokens are added to a copy."""

    def update(self, a: Tensor, delta: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            a: inputs of the layer, (n, d_in), any floating dtype.
            delta: errors of the residual stream, (n, d_out).
            weights: non-negative weight of each token, (n,); 1 when left out.

        Raises:
            ThoughtError: when the shapes do not fit.
        """
        shapes = [tuple(x.shape) for x in (a, delta, weights) if x is not None]
        if shapes != [(len(a), self.d_in), (len(a), self.d_out), (len(a),)][: len(shapes)]:
            raise ThoughtError(
                f"a, delta and weights must be (n, {self.d_in}), (n, {self.d_out}) and (n,); got {shapes}."
            )
        product = _WIDE
        if self.product_dtype is not None:
            product = torch.promote_types(torch.promote_types(a.dtype, delta.dtype), self.product_dtype)
        if self.rank_one:
            self._add_operators(a.to(_WIDE), delta.to(_WIDE), weights)
        given = a, delta
        a, delta = a.to(product), delta.to(product)
        if weights is None:
            self.weight += len(a)
            a, delta = (x.clone() if x is mine else x for x, mine in zip((a, delta), given, strict=True))  # to keep
        else:
            self.weight += float(weights.sum())
            root = weights.to(_WIDE).sqrt().to(a, non_blocking=True).unsqueeze(1)
            a, delta = a * root, delta * root
        self.tokens += len(a)
        delta_wide = delta.to(_WIDE)
        self.energy = self.energy.to(delta_wide) + delta_wide.square().sum()
        self._rows.append((a, delta))
        waiting = sum(len(a) for a, _ in self._rows)
        if waiting >= (FOLD if self.folded else self.d_in):
            self._fold()

    def _add_operators(self, a: Tensor, delta: Tensor, weights: Tensor | None) -> None:
        squares = a.square().sum(1, keepdim=True)
        share = 1 / squares.masked_fill(squares == 0, 1)  # a row with a = 0 adds nothing
        if weights is not None:
            share = share * weights.to(share, non_blocking=True).unsqueeze(1)
        operators = (delta * share).T @ a
        self._operators = operators if self._operators is None else self._operators + operators

    @classmethod
    def from_rows(cls, rows: tuple[Tensor, Tensor], weight: float, tokens: int) -> Statistics:
        """Statistics that keep the rows √w a, (n, d_in), and √w δ, (n, d_out), of ``tokens`` with the joint weight."""
        a, delta = rows
        energy = delta.to(_WIDE).square().sum()
        return cls(a.shape[1], delta.shape[1], weight, tokens, energy, _rows=[(a, delta)])

    @classmethod
    def from_sums(cls, gram: Tensor, cross: Tensor, energy: Tensor, weight: float, tokens: int) -> Statistics:
        """Statistics from their sums: Z, (d_in, d_in), C, (d_out, d_in), and Σ w ‖δ‖²."""
        d_out, d_in = cross.shape
        return cls(d_in, d_out, weight, tokens, energy.to(gram), _gram=gram, _cross=cross)

    def to_tensors(self) -> dict[str, Tensor]:
        """What :meth:`from_tensors` makes the same statistics of, bit for bit.

        Returns:
            weight (float64), tokens (int64) and energy, all 0-dim; while there are few tokens a, (n, d_in), and delta,
            (n, d_out), which are √w a and √w δ; otherwise gram, Z, and cross, C; with ``rank_one`` operators too.
        """
        head = {"weight": torch.tensor(self.weight, dtype=torch.float64), "tokens": torch.tensor(self.tokens)}
        found = {**head, "energy": self.energy}
        if self._gram is not None:
            found |= {"gram": self.gram, "cross": self.cross}
        else:
            empty = (torch.zeros(0, d, dtype=_WIDE, device=self.energy.device) for d in (self.d_in, self.d_out))
            found["a"], found["delta"] = self.rows() or empty
        return {**found, "operators": self.operators} if self.rank_one else found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """The statistics that :meth:`to_tensors` took apart; sums in float32, which there once were, become wider.

        Raises:
            ThoughtError: when a tensor is missing or too many, or has a wrong shape or dtype.
        """
        folded, rank_one = "gram" in tensors, "operators" in tensors
        names = ("gram", "cross") if folded else ("a", "delta")
        _check_names(tensors, {*names, "operators"} if rank_one else set(names))
        left, right = (tensors[name] for name in names)
        fits = left.ndim == right.ndim == 2 and left.dtype == right.dtype
        if not fits or (left.shape != (right.shape[1],) * 2 if folded else len(left) != len(right)):
            raise ThoughtError(
                f"statistics: {names[0]} {tuple(left.shape)} {left.dtype} and {names[1]} {tuple(right.shape)} "
                f"{right.dtype} do not belong together."
            )
        d_in, d_out = left.shape[1], len(right) if folded else right.shape[1]
        operators = tensors.get("operators")
        if operators is not None and (operators.shape != (d_out, d_in) or operators.dtype != left.dtype):
            raise ThoughtError(f"statistics: operators must be ({d_out}, {d_in}); got {tuple(operators.shape)}.")
        if folded:
            sums: dict[str, Any] = {"_gram": left.to(_WIDE), "_cross": right.to(_WIDE)}
        else:
            sums = {"_rows": [(left, right)] if len(left) else []}
        weight, tokens = float(tensors["weight"]), int(tensors["tokens"])
        common = (d_in, d_out, weight, tokens, tensors["energy"].to(_WIDE))
        operators = None if operators is None else operators.to(_WIDE)
        return cls(*common, rank_one=rank_one, _operators=operators, **sums)

    @property
    def folded(self) -> bool:
        """Whether the tokens are in the sums already, and no longer kept as rows."""
        return self._gram is not None

    @property
    def num_rows(self) -> int:
        """Tokens kept as rows: all of them, or 0 once they are folded into the sums."""
        return 0 if self.folded else sum(len(a) for a, _ in self._rows)

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """√w a, (n, d_in), and √w δ, (n, d_out), while there are few tokens; otherwise None. They have the dtype that
        they are multiplied in."""
        if self._gram is not None or not self._rows:
            return None
        self._rows = [(self._joined(0), self._joined(1))]
        return self._rows[0]

    @property
    def gram(self) -> Tensor:
        """Z = Σ w a aᵀ, (d_in, d_in)."""
        return self.sums()[0]

    def projected(self, A: Tensor) -> Tensor:
        """A Z Aᵀ, (r, r), for A, (r, d_in), in A's dtype; from the rows, without forming Z, while there are few."""
        rows = self.rows()
        if rows is None:
            return A @ self.gram.to(A) @ A.T
        seen = A @ rows[0].to(A).T
        return seen @ seen.T

    @property
    def cross(self) -> Tensor:
        """C = Σ w δ aᵀ, (d_out, d_in)."""
        return self.sums()[1]

    @property
    def operators(self) -> Tensor:
        """Σ w δ aᵀ / ‖a‖², (d_out, d_in): the tokens' own rank-1 operators, summed; a token with a = 0 has none.

        Raises:
            ThoughtError: without ``rank_one=True``, as Z and C do not determine this sum.
        """
        if not self.rank_one:
            raise ThoughtError(
                "these statistics hold no sum of rank-1 operators, and it does not follow from Z and C. Gather them "
                f"with Statistics({self.d_in}, {self.d_out}, rank_one=True)."
            )
        if self._operators is None:
            return torch.zeros(self.d_out, self.d_in, dtype=_WIDE, device=self.energy.device)
        return self._operators

    def sums(self) -> tuple[Tensor, Tensor]:
        """Both at once: Z, (d_in, d_in), and C, (d_out, d_in); while tokens are kept as rows, each call forms them."""
        if self._gram is not None and self._cross is not None:
            if self._rows:
                self._fold()
            if self._half:
                mirror(self._gram)
                self._half = False
            self._shared = True
            return self._gram, self._cross
        rows = self.rows()
        if rows is None:
            device = self.energy.device
            return (
                torch.zeros(self.d_in, self.d_in, dtype=_WIDE, device=device),
                torch.zeros(self.d_out, self.d_in, dtype=_WIDE, device=device),
            )
        a, delta = rows
        gram = a.new_zeros(self.d_in, self.d_in, dtype=_WIDE)
        add_products(gram, a)
        return mirror(gram), (delta.T @ a).to(_WIDE)

    def _joined(self, side: int) -> Tensor:
        """The rows that are kept, of a (0) or of δ (1), in the dtype they are multiplied in."""
        parts = [row[side] for row in self._rows]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _fold(self) -> None:
        a, delta = self._joined(0), self._joined(1)
        self._rows = []
        if self._gram is None or self._cross is None:
            self._gram, self._cross = (a.new_zeros(d, self.d_in, dtype=_WIDE) for d in (self.d_in, self.d_out))
        elif self._shared:
            self._gram, self._cross = self._gram.clone(), self._cross.clone()
        self._shared = False
        add_products(self._gram, a)
        self._cross += delta.T @ a
        self._half = True

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of tokens together."""
        self._check_same_layer(other)
        total = self._combined(other, 1)
        if self._gram is None and other._gram is None:
            total._rows = [*self._rows, *other._rows]
            if total.num_rows >= total.d_in:
                total._fold()
        else:
            total._gram, total._cross = self.gram + other.gram, self.cross + other.cross
        return total

    def __sub__(self, other: Statistics) -> Statistics:
        """The statistics of the tokens of ``self`` without those of ``other``, to rounding."""
        self._check_same_layer(other)
        rest = self._combined(other, -1)
        rest._gram, rest._cross = self.gram - other.gram, self.cross - other.cross
        return rest

    def _combined(self, other: Statistics, sign: int) -> Statistics:
        return Statistics(
            self.d_in,
            self.d_out,
            self.weight + sign * other.weight,
            self.tokens + sign * other.tokens,
            self.energy + sign * other.energy,
            rank_one=self.rank_one,
            _operators=self.operators + sign * other.operators if self.rank_one else None,
        )

    def _check_same_layer(self, other: Statistics) -> None:
        mine, theirs = (self.d_in, self.d_out), (other.d_in, other.d_out)
        if mine != theirs:
            raise ThoughtError(
                f"statistics of different layers cannot be combined: (d_in, d_out) is {mine} and {theirs}."
            )
        if self.rank_one != other.rank_one:
            raise ThoughtError(
                "statistics with and without the sum of rank-1 operators cannot be combined: rank_one is "
                f"{self.rank_one} and {other.rank_one}. Gather both with the same rank_one."
            )


@dataclass
class VectorStatistics:
    """Running sum for one thought vector: Σ wᵢ δᵢ, with δᵢ the error of the residual stream and wᵢ a token's weight.

    In float64, whatever the model's dtype.

    Attributes:
        d: size of δ, the residual stream.
        weight: Σ wᵢ.
        tokens: rows added.
        energy: Σ wᵢ ‖δᵢ‖², what the vector has to explain (a 0-dim tensor).
        total: Σ wᵢ δᵢ, (d,).

    Example:
        >>> stats = VectorStatistics(d=2)
        >>> stats.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> stats.mean().tolist(), stats.tokens
        ([2.0, 2.0], 2)
    """

    d: int
    weight: float = field(default=0.0, init=False)
    tokens: int = field(default=0, init=False)
    energy: Tensor = field(init=False)
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.energy, self.total = torch.zeros((), dtype=_WIDE), torch.zeros(self.d, dtype=_WIDE)

    def update(self, deltas: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            deltas: errors of the residual stream, (n, d), any floating dtype.
            weights: non-negative weight of each token, (n,); 1 when left out.

        Raises:
            ThoughtError: when the shapes do not fit.
        """
        shapes = [tuple(x.shape) for x in (deltas, weights) if x is not None]
        if shapes != [(len(deltas), self.d), (len(deltas),)][: len(shapes)]:
            raise ThoughtError(f"deltas and weights must be (n, {self.d}) and (n,); got {shapes}.")
        deltas = deltas.to(_WIDE)
        weights = torch.ones(len(deltas), dtype=_WIDE) if weights is None else weights.to(_WIDE)
        self.weight += float(weights.sum())
        weights = weights.to(deltas, non_blocking=True)
        self.tokens += len(deltas)
        self.energy = self.energy.to(deltas) + weights @ deltas.square().sum(1)
        self.total = self.total.to(deltas) + weights @ deltas

    def mean(self) -> Tensor:
        """Σ w δ / Σ w, (d,): the constant nearest to the errors in (weighted) least squares.

        Raises:
            ThoughtError: when no token was added, or none with a weight.
        """
        if self.weight <= 0:
            raise ThoughtError("there is no token to average; the statistics are empty, or every weight is zero.")
        return self.total / self.weight

    def to_tensors(self) -> dict[str, Tensor]:
        """weight (float64), tokens (int64) and energy, all 0-dim, and total, (d,): see :meth:`from_tensors`."""
        head = {"weight": torch.tensor(self.weight, dtype=torch.float64), "tokens": torch.tensor(self.tokens)}
        return {**head, "energy": self.energy, "total": self.total}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> VectorStatistics:
        """The statistics that :meth:`to_tensors` took apart, bit for bit.

        Raises:
            ThoughtError: when a tensor is missing or too many, or has a wrong shape or dtype.
        """
        _check_names(tensors, {"total"})
        if tensors["total"].ndim != 1:
            raise ThoughtError(f"statistics: total must be (d,); got {tuple(tensors['total'].shape)}.")
        found = cls(len(tensors["total"]))
        found.weight, found.tokens = float(tensors["weight"]), int(tensors["tokens"])
        found.energy, found.total = tensors["energy"].to(_WIDE), tensors["total"].to(_WIDE)
        return found

    def __add__(self, other: VectorStatistics) -> VectorStatistics:
        """The statistics of both sets of tokens together."""
        return self._combined(other, 1)

    def __sub__(self, other: VectorStatistics) -> VectorStatistics:
        """The statistics of the tokens of ``self`` without those of ``other``, to rounding."""
        return self._combined(other, -1)

    def _combined(self, other: VectorStatistics, sign: int) -> VectorStatistics:
        if self.d != other.d:
            raise ThoughtError(f"statistics of different vectors cannot be combined: d is {self.d} and {other.d}.")
        both = VectorStatistics(self.d)
        both.weight = self.weight + sign * other.weight
        both.tokens = self.tokens + sign * other.tokens
        both.energy = self.energy + sign * other.energy
        both.total = self.total + sign * other.total
        return both


def _check_names(tensors: Mapping[str, Tensor], own: set[str]) -> None:
    """Check that there are these tensors and the three single numbers that all statistics have, and no others."""
    single = ("weight", "tokens", "energy")
    if tensors.keys() != {*single, *own}:
        raise ThoughtError(f"statistics: expected the tensors {sorted({*single, *own})}; got {sorted(tensors)}.")
    wrong = [name for name in single if tensors[name].ndim]
    if wrong:
        raise ThoughtError(f"statistics: {wrong[0]} must be a single number; got {tuple(tensors[wrong[0]].shape)}.")
    kinds = tuple(tensors[name].dtype for name in ("weight", "tokens"))
    if kinds != (torch.float64, torch.int64) or not tensors["energy"].is_floating_point():
        raise ThoughtError(f"statistics: weight and tokens must be float64 and int64, energy a float; got {kinds}.")
    for name in own:
        if tensors[name].dtype not in (torch.float32, torch.float64):
            raise ThoughtError(f"dtype of the statistics must be float32 or float64; got {tensors[name].dtype}.")
