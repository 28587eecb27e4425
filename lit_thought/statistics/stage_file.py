"""One stage of a fit as a file: its sums, to solve it again, or its patch, to go on from there, or both.

The folders of :mod:`lit_thought.statistics.saved` and :mod:`lit_thought.statistics.resume` are made of such files. The
header says which stage it is, and of which folder: files of two folders cannot be mixed up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.files import parse_json
from lit_thought.model.blocks import JOINT, Site
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import PARTS, SITES
from lit_thought.solve.factors import Factors
from lit_thought.solve.sums import Statistics, VectorStatistics
from lit_thought.tensor_files import TensorFile, write_tensors

__all__ = ["KeptStage", "StageHead", "label"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


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
        parts: what there are sums for: ``"matrix"``, ``"vector"`` or both; none where only the patch is kept.
        gain: whether the scale of a norm that follows is kept with the sums.
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
        """A head that was kept.

        Raises:
            ValueError: for one of no stage.
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
            and isinstance(head.targets, tuple)
            and bool(head.targets)
            and all(isinstance(path, str) and path for path in head.targets)
            and head.parts in (PARTS, *((part,) for part in PARTS), ())
            and all(isinstance(flag, bool) for flag in (head.gain, head.start))
            and isinstance(head.weight, float)
            and math.isfinite(head.weight)
        )
        if not fits or (head.site != "mlp_in" and sum(sizes) != head.d_in):
            raise ValueError("a value of it has a wrong type or size")
        return head


@dataclass(frozen=True)
class KeptStage:
    """One stage, summed or solved.

    Attributes:
        head: which stage it is.
        matrix: the sums for the site's matrix, or None.
        vector: those for its vector, or None.
        gain: g of the norm after the projection, (d_out,), or None; kept with the sums.
        start: the patch that was there when the sums were taken; kept with them.
        patch: the site's patch after this stage; of neither matrix nor vector where it is not solved.
        figures: of the patch's quality.
        history: what the fit has found on its validation pairs until here.
    """

    head: StageHead
    matrix: Statistics | None = None
    vector: VectorStatistics | None = None
    gain: Tensor | None = None
    start: SitePatch = field(default_factory=SitePatch)
    patch: SitePatch = field(default_factory=SitePatch)
    figures: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        block: int,
        site: Site,
        start: SitePatch,
        matrix: Statistics | None = None,
        vector: VectorStatistics | None = None,
    ) -> KeptStage:
        """The stage of a fit that has been through all pairs, with the sums that are to be kept."""
        sums = matrix if matrix is not None else vector
        gain, start = (None, SitePatch()) if sums is None else (site.gain, start)
        head = StageHead(
            block,
            site.name,
            {projection.path: projection.d_in for projection in site.projections},
            tuple(site.targets),
            site.d_in,
            site.d_out,
            tuple(part for part, own in zip(PARTS, (matrix, vector), strict=True) if own is not None),
            gain is not None,
            not _is_empty(start),
            0 if sums is None else sums.tokens,
            0.0 if sums is None else float(sums.weight),
        )
        return cls(head, matrix, vector, gain, start)

    @property
    def is_solved(self) -> bool:
        """Whether its patch is kept."""
        return not _is_empty(self.patch)

    def solved(
        self, patch: SitePatch, figures: Mapping[str, float], history: list[dict[str, float]] | None = None
    ) -> KeptStage:
        """The stage with what was found."""
        return replace(self, patch=patch, figures=dict(figures), history=list(history or ()))

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors by the name that they have in the file."""
        found: dict[str, Tensor | None] = {"gain": self.gain}
        for part, sums in zip(PARTS, (self.matrix, self.vector), strict=True):
            if sums is not None:
                found |= {f"{part}.{name}": tensor for name, tensor in sums.to_tensors().items()}
        for name, patch in (("start", self.start), ("patch", self.patch)):
            if patch.matrix is not None:
                found |= {f"{name}.A": patch.matrix.A, f"{name}.B": patch.matrix.B}
            found[f"{name}.vector"] = patch.vector
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, head: StageHead, tensors: Mapping[str, Tensor]) -> KeptStage:
        """The stage that :meth:`to_tensors` took apart.

        Raises:
            ThoughtError: when the tensors are not those that ``head`` announces.
        """
        if not all(tensor.dtype in _DTYPES and bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ThoughtError(f"the sums of {head.name} hold NaN or infinite values, or are no numbers.")
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        matrix = Statistics.from_tensors(groups.pop("matrix")) if "matrix" in groups else None
        vector = VectorStatistics.from_tensors(groups.pop("vector")) if "vector" in groups else None
        start, patch = (groups.pop(name, {}) for name in ("start", "patch"))
        gain = groups.pop("gain", {}).get("")
        sizes = (
            (matrix and (matrix.d_in, matrix.d_out), (head.d_in, head.d_out)),
            (vector and (vector.d,), (head.d_out,)),
            (None if gain is None else tuple(gain.shape), (head.d_out,)),
        )
        parts = tuple(part for part, sums in zip(PARTS, (matrix, vector), strict=True) if sums is not None)
        # without rows the sums would be zeros of the size that the head claims
        empty = matrix is not None and not matrix.folded and matrix.num_rows != matrix.tokens
        whole = not groups and not empty and parts == head.parts and _fits(start, head) and _fits(patch, head)
        whole = whole and (gain is not None, bool(start)) == (head.gain, head.start)
        if not whole or any(found is not None and found != wanted for found, wanted in sizes):
            raise ThoughtError(f"the tensors {sorted(tensors)} are not those of {head.name}, or have other sizes.")
        return cls(head, matrix, vector, gain, _site_patch(start), _site_patch(patch))

    def write(self, file: Path, identity: str) -> None:
        """Write the stage as one of the folder that is called ``identity``."""
        header = {**label(identity, self.head.block, self.head.site), "head": json.dumps(asdict(self.head))}
        found = {"figures": self.figures, "history": self.history}
        write_tensors(file, self.to_tensors(), header | {key: json.dumps(value) for key, value in found.items()})

    @classmethod
    def read(cls, content: TensorFile, device: torch.device, head: StageHead | None = None) -> KeptStage:
        """A stage that :meth:`write` wrote.

        Args:
            content: its file.
            device: where to put the tensors.
            head: which stage it should be; left out, the one that it says it is.

        Raises:
            ThoughtError: of the file's class of errors, when it is damaged, or another stage than it should be.
        """
        tensors = content.read(device=device)
        try:
            figures, history = (
                parse_json(content.header.get(*pair)) for pair in (("figures", "{}"), ("history", "[]"))
            )
            if not isinstance(history, list) or not all(map(_are_figures, [figures, *history])):
                raise ValueError("its figures are no numbers")
            stage = cls.from_tensors(head or StageHead.from_json(parse_json(content.header["head"])), tensors)
        except ThoughtError as error:
            raise content.damaged(f": {error}") from error
        except (KeyError, ValueError) as error:
            raise content.damaged(f" ({error}).") from error
        return replace(stage, figures=figures, history=history)

    def combined(self, other: KeptStage, sign: int) -> KeptStage:
        """The sums of both (1), or of this one without the other (-1); all else is this one's."""

        def combine(mine: Any, theirs: Any) -> Any:
            return None if mine is None else mine + theirs if sign > 0 else mine - theirs

        matrix, vector = combine(self.matrix, other.matrix), combine(self.vector, other.vector)
        return replace(self, head=self.head.combined(other.head, sign), matrix=matrix, vector=vector)


def label(identity: str, block: int, site: str) -> dict[str, str]:
    """What a stage's file says of itself: the folder that it belongs to, and the stage."""
    return {"statistics": identity, "block": str(block), "site": site}


def _is_empty(patch: SitePatch) -> bool:
    return patch.matrix is None and patch.vector is None


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(figure, (int, float)) for figure in value.values())


def _fits(tensors: Mapping[str, Tensor], head: StageHead) -> bool:
    """Whether these are the tensors of a patch of the site, in float32 or better."""
    rank = len(tensors["A"]) if "A" in tensors and tensors["A"].ndim else 0
    wanted = {"A": (rank, head.d_in), "B": (head.d_out, rank), "vector": (head.d_out,)}
    fits = all(
        tuple(tensor.shape) == wanted.get(name) and tensor.dtype in (torch.float32, torch.float64)
        for name, tensor in tensors.items()
    )
    return fits and ("A" in tensors) == ("B" in tensors) == (rank > 0)


def _site_patch(tensors: Mapping[str, Tensor]) -> SitePatch:
    return SitePatch(Factors(tensors["A"], tensors["B"]) if "A" in tensors else None, tensors.get("vector"))
