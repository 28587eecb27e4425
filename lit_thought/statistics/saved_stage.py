"""One stage of a fit as it is kept on disk, and the record of which fit it was: parts of
:mod:`lit_thought.statistics.saved`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.model.blocks import JOINT, Site
from lit_thought.patch.provenance import check_provenance
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import ORDERS, PARTS, SITES, check_solve_settings
from lit_thought.solve.factors import Factors
from lit_thought.solve.sums import Statistics, VectorStatistics

__all__ = ["Manifest", "SavedStage", "StageHead"]

_ENTRY = re.compile(r"preserve-[0-9a-f]{24}")
_TOLD = ("instruction", "instruction_hash")
"""What a provenance says of the instructions: the texts, or the hash of one that it must not tell."""
_NEEDED = ("order", "rank", "ridge", "preserve_weight", "step_size")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
_OF_THE_PAIRS = ("pairs", "generated_outputs")
"""Settings that count pairs: they add as the sums do."""
_OF_THE_OUTPUTS = ("generate", "max_new_tokens", "seed")
"""Settings of how missing outputs were written, in which merged sets of pairs may differ."""


@dataclass(frozen=True)
class StageHead:
    """What is known of a stage without its sums.

    Attributes:
        block: index of the block.
        site: name of the site.
        projections: number of inputs of each layer that writes to the residual stream here, by path.
        targets: paths of the layers whose weight the site's matrix changes.
        d_in: size of a.
        d_out: size of δ.
        parts: what there are sums for: ``"matrix"``, ``"vector"`` or both.
        gain: whether a norm with a scale follows.
        start: whether a patch was there when the sums were taken.
        tokens: rows added.
        weight: Σ w.
    """

    block: int
    site: str
    projections: dict[str, int]
    targets: tuple[str, ...]
    d_in: int
    d_out: int
    parts: tuple[str, ...]
    gain: bool
    start: bool
    tokens: int
    weight: float

    @property
    def name(self) -> str:
        """The stage's name in messages."""
        return f"block {self.block}, {self.site}"

    @property
    def layer(self) -> StageHead:
        """The head without what depends on the pairs."""
        return replace(self, tokens=0, weight=0.0)

    def combined(self, other: StageHead, sign: int) -> StageHead:
        """That of the sums of both (1), or of this one's without the other's (-1)."""
        return replace(self, tokens=self.tokens + sign * other.tokens, weight=self.weight + sign * other.weight)

    @classmethod
    def from_json(cls, value: Any) -> StageHead:
        """A stage's entry in the manifest.

        Raises:
            ValueError: for one that :class:`StatisticsWriter` would not have written.
        """
        if not isinstance(value, dict) or value.keys() != {item.name for item in fields(cls)}:
            raise ValueError("it does not have the keys of a stage")
        entries: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in value.items()}
        head = cls(**entries)
        sizes = head.projections.values() if isinstance(head.projections, dict) else [None]
        fits = (
            all(type(number) is int and number > 0 for number in (head.d_in, head.d_out, *sizes))
            and all(type(number) is int for number in (head.block, head.tokens))
            and head.block >= 0
            and head.site in (*SITES, JOINT)
            and bool(head.projections)
            and all(isinstance(names, tuple) and names for names in (head.targets, head.parts))
            and all(isinstance(path, str) and path for path in head.targets)
            and head.parts in (PARTS, *((part,) for part in PARTS))
            and all(isinstance(flag, bool) for flag in (head.gain, head.start))
            and isinstance(head.weight, float)
            and math.isfinite(head.weight)
        )
        if not fits or (head.site != "mlp_in" and sum(sizes) != head.d_in):
            raise ValueError("a value of it has a wrong type or size")
        return head


@dataclass(frozen=True)
class SavedStage:
    """One stage with its sums.

    Attributes:
        head: which stage it is.
        matrix: the sums for the site's matrix, or None.
        vector: those for its vector, or None.
        gain: g of the norm after the projection, (d_out,), or None.
        start: the patch that was there when the sums were taken.
    """

    head: StageHead
    matrix: Statistics | None
    vector: VectorStatistics | None
    gain: Tensor | None = None
    start: SitePatch = field(default_factory=SitePatch)

    @classmethod
    def of(
        cls, block: int, site: Site, start: SitePatch, matrix: Statistics | None, vector: VectorStatistics | None
    ) -> SavedStage:
        """The stage of a fit that has been through all pairs: what it was solved from, or will be."""
        sums = matrix if matrix is not None else vector
        assert sums is not None
        head = StageHead(
            block,
            site.name,
            {projection.path: projection.d_in for projection in site.projections},
            tuple(site.targets),
            site.d_in,
            site.d_out,
            tuple(part for part, own in zip(PARTS, (matrix, vector), strict=True) if own is not None),
            site.gain is not None,
            start.matrix is not None or start.vector is not None,
            sums.tokens,
            float(sums.weight),
        )
        return cls(head, matrix, vector, site.gain, start)

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors by the name that they have in the file, on the CPU."""
        found: dict[str, Tensor] = {}
        for part, sums in zip(PARTS, (self.matrix, self.vector), strict=True):
            if sums is not None:
                found |= {f"{part}.{name}": tensor for name, tensor in sums.to_tensors().items()}
        if self.start.matrix is not None:
            found |= {"start.A": self.start.matrix.A, "start.B": self.start.matrix.B}
        others = {"start.vector": self.start.vector, "gain": self.gain}
        found |= {name: tensor for name, tensor in others.items() if tensor is not None}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, head: StageHead, tensors: Mapping[str, Tensor]) -> SavedStage:
        """The stage that :meth:`to_tensors` took apart.

        Raises:
            ThoughtError: when the tensors are not those that ``head`` announces.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        matrix = Statistics.from_tensors(groups.pop("matrix")) if "matrix" in groups else None
        vector = VectorStatistics.from_tensors(groups.pop("vector")) if "vector" in groups else None
        start, gain = groups.pop("start", {}), groups.pop("gain", {}).get("")
        A, B, shift = start.pop("A", None), start.pop("B", None), start.pop("vector", None)
        rank = 0 if A is None else max(1, len(A))
        sizes = (
            (matrix and (matrix.d_in, matrix.d_out), (head.d_in, head.d_out)),
            (vector and (vector.d,), (head.d_out,)),
            (None if A is None else tuple(A.shape), (rank, head.d_in)),
            (None if B is None else tuple(B.shape), (head.d_out, rank)),
            (None if shift is None else tuple(shift.shape), (head.d_out,)),
            (None if gain is None else tuple(gain.shape), (head.d_out,)),
        )
        # without rows the sums would be zeros of the size that the head claims
        empty = matrix is not None and not matrix.folded and matrix.num_rows != matrix.tokens
        flags = (gain is not None, A is not None or shift is not None, A is not None)
        parts = tuple(part for part, sums in zip(PARTS, (matrix, vector), strict=True) if sums is not None)
        whole = not (groups or start or empty) and parts == head.parts
        whole = whole and flags == (head.gain, head.start, B is not None)
        if not all(tensor.dtype in _DTYPES and bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ThoughtError(f"the sums of {head.name} hold NaN or infinite values, or are no numbers.")
        if not whole or any(found is not None and found != wanted for found, wanted in sizes):
            raise ThoughtError(f"the tensors {sorted(tensors)} are not those of {head.name}, or have other sizes.")
        low_rank = Factors(A, B) if A is not None and B is not None else None
        return cls(head, matrix, vector, gain, SitePatch(low_rank, shift))

    def combined(self, other: SavedStage, sign: int) -> SavedStage:
        """The sums of both (1), or of this one without the other (-1); all else is this one's."""

        def combine(mine: Any, theirs: Any) -> Any:
            return None if mine is None else mine + theirs if sign > 0 else mine - theirs

        matrix, vector = combine(self.matrix, other.matrix), combine(self.vector, other.vector)
        return replace(self, head=self.head.combined(other.head, sign), matrix=matrix, vector=vector)


@dataclass(frozen=True)
class Manifest:
    """Which fit the statistics are of.

    Attributes:
        provenance: the record that the fit's patch keeps: model, revision, fingerprint, instruction, template, settings
            (the dtype of the sums among them) and versions, as JSON values.
        preservation: name of the cache entry with the preservation statistics, or None without preservation.
        uncompared: tokens of the plain runs, padding apart, that are not compared, so that nothing holds them to the
            instructed run.
        approximate: whether sums were combined that depend on patches.
    """

    provenance: dict[str, Any]
    preservation: str | None = None
    uncompared: int = 0
    approximate: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The fit's settings."""
        found: dict[str, Any] = self.provenance["settings"]
        return found

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """The manifest's part on the fit.

        Raises:
            ValueError: for one that :class:`StatisticsWriter` would not have written.
        """
        found = cls(value["provenance"], value["preservation"], value["uncompared"], value["approximate"])
        if not isinstance(found.provenance, dict) or not isinstance(found.provenance.get("settings"), dict):
            raise ValueError("its provenance has no settings")
        lacking = [name for name in _NEEDED if name not in found.settings]
        if lacking or not isinstance(found.provenance.get("fingerprint"), str):
            raise ValueError(f"its provenance lacks {lacking[0] if lacking else 'the fingerprint'}")
        check_provenance(found.provenance, "provenance")
        _check_settings(found.settings)
        entry = found.preservation
        if entry is not None and not (isinstance(entry, str) and _ENTRY.fullmatch(entry)):
            raise ValueError(f"{entry!r} is no name of preservation statistics")
        if type(found.uncompared) is not int or type(found.approximate) is not bool:
            raise ValueError("a value of it has a wrong type")
        return found

    def combined(self, other: Manifest, sign: int, approximate: bool) -> Manifest:
        """That of both sets of pairs, or of this one without the other.

        Raises:
            ThoughtError: naming what else differs than the pairs, their instructions and how outputs were generated.
        """
        mine, theirs = self.provenance, other.provenance
        names = ("fingerprint", "model_type", "fan_in_fan_out", "template")
        pairs = {name: (mine.get(name), theirs.get(name)) for name in names}
        pairs["preservation"] = (self.preservation, other.preservation)
        for key in dict.fromkeys([*self.settings, *other.settings]):
            if key not in (*_OF_THE_PAIRS, *_OF_THE_OUTPUTS):
                pairs[f"settings: {key}"] = (self.settings.get(key), other.settings.get(key))
        for name, (one, two) in pairs.items():
            if one != two:
                raise ThoughtError(
                    f"statistics of different fits cannot be combined: {name} is {one!r} and {two!r}. Both must be of "
                    "one model, fitted with the same settings."
                )
        settings = dict(self.settings)
        for key in _OF_THE_PAIRS:
            settings[key] = settings.get(key, 0) + sign * other.settings.get(key, 0)
        for key in _OF_THE_OUTPUTS:
            settings[key] = settings.get(key) if settings.get(key) == other.settings.get(key) else None
        told = {key: mine[key] for key in _TOLD if key in mine}
        if sign > 0:
            told = _both_told(told, {key: theirs[key] for key in _TOLD if key in theirs})
        rest = {key: value for key, value in mine.items() if key not in _TOLD}
        return Manifest(
            {**rest, **told, "settings": settings},
            self.preservation,
            max(0, self.uncompared + sign * other.uncompared),
            approximate or self.approximate or other.approximate,
        )


def _both_told(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of the instructions of two sets of pairs; what either hides stays hidden."""
    if mine == theirs:
        return mine
    every = [told.get("instruction") for told in (mine, theirs)]
    if None in every:
        return {"instruction": None}
    one, two = (texts if isinstance(texts, list) else [texts] for texts in every)
    return {"instruction": sorted({*one, *two})}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings that are used as they are read.

    Raises:
        ValueError: for one that is none of a fit.
    """
    check_solve_settings(*(settings[name] for name in ("ridge", "rank", "preserve_weight", "step_size")))
    counts = [settings[name] + 1 for name in _OF_THE_PAIRS if name in settings]
    wrong = not all(type(count) is int and count > 0 for count in counts)
    if wrong or settings["order"] not in ORDERS:
        raise ValueError("a setting of its provenance is out of range")
