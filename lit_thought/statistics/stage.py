"""What a fit sums and solves at one stage: one site of one block, its thought matrix, its thought vector or both.

Every site shares these lines; only where a and δ are read differs (:mod:`lit_thought.runs.streams`). With T the matrix
and v the vector that are there already, δ the error that they leave, and η the step size,

    T ← T + η · argmin_Δ Σ wᵢ ‖Δ aᵢ − δᵢ‖² + …        (the terms of :mod:`lit_thought.solve.least_squares`)
    v ← v + η · argmin_u (1/w) Σ wᵢ ‖u − δᵢ‖² + ρ ‖u‖²  =  v + η Σ wᵢ δᵢ / (w (1 + ρ))

the second being the least-squares constant, with a token of unrelated text wishing for zero. Where a norm with the
scale g follows the projection, both are solved with that gain (:mod:`lit_thought.solve.gains`); the vector's row j is
then gⱼ mⱼ / ((1 + ρ) gⱼ² + λ ḡ²), with m the mean of δᵢ / γᵢ weighted by wᵢ γᵢ² and ḡ² the median of g². Mazzawi et al.
2025, arXiv 2510.08734: the thought matrix (Theorem 3.1), the thought vector, and their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lit_thought.errors import ThoughtError
from lit_thought.model.blocks import Site
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.runs.runner import Observation
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.factors import Factors
from lit_thought.solve.gains import check_gain, solve_with_gains
from lit_thought.solve.least_squares import COARSE_RIDGE, Prior, check_finite, solve
from lit_thought.solve.rank import reduce_rank
from lit_thought.solve.sums import Statistics, VectorStatistics
from lit_thought.statistics.distributed import (
    more_threads,
    rank_and_size,
    reduce_statistics,
    reduce_vector,
    share_json,
    share_tensors,
)

__all__ = ["SolvedStages", "StageSettings", "StageSums"]


@dataclass(frozen=True)
class StageSettings:
    """How stages are solved: see :class:`~lit_thought.fit.callback.ThoughtCallback`."""

    rank: int | float | None
    ridge: float
    prior_weight: float
    step_size: float


class StageSums:
    """The sums of one stage.

    Args:
        site: the site.
        parts: what to solve for.
        settings: how.
        name: the stage's name, for error messages.
    """

    def __init__(self, site: Site, parts: Sequence[str], settings: StageSettings, name: str) -> None:
        self.site, self.settings, self.name = site, settings, name
        products = torch.float32 if settings.ridge >= COARSE_RIDGE else None
        matrix = Statistics(site.d_in, site.d_out, product_dtype=products)
        self.matrix = matrix if "matrix" in parts else None
        self.vector = VectorStatistics(site.d_out) if "vector" in parts else None

    def update(self, seen: Observation) -> None:
        """Add one batch's compared tokens."""
        if self.matrix is not None:
            self.matrix.update(seen.a, seen.delta, seen.weights)
        if self.vector is not None and seen.scale is None:
            self.vector.update(seen.shift, seen.weights)
        elif self.vector is not None and seen.scale is not None:
            scale = seen.scale.double()
            shift = seen.shift / scale.masked_fill(scale == 0, 1)
            self.vector.update(shift, seen.weights.to(scale) * scale.squeeze(1).square())

    def reduce(self, owner: int, device: torch.device) -> None:
        """Add up what all processes have summed, on the process that will solve."""
        if self.matrix is not None:
            self.matrix = reduce_statistics(self.matrix, owner, device)
        if self.vector is not None:
            reduce_vector(self.vector, owner, device)

    def solve(self, start: SitePatch, prior: Prior | None) -> tuple[SitePatch, dict[str, float]]:
        """The site's patch after this stage, in float32 as it will be exported, and figures of its quality.

        Args:
            start: what was there when the sums were taken.
            prior: inputs to preserve.
        """
        matrix, vector = start.matrix, start.vector
        figures: dict[str, float] = {}
        if self.matrix is not None:
            matrix, figures = self._solve_matrix(self.matrix, matrix, prior)
        if self.vector is not None:
            check_finite(self.name, float(self.vector.energy))
            step = self.settings.step_size * self._constant(self.vector, prior is not None)
            vector = (step if vector is None else vector.to(step) + step).float()
            figures |= self._vector_figures(self.vector, step)
        return SitePatch(matrix, vector), figures

    def solve_at(
        self, owner: int, device: torch.device, start: SitePatch, prior: Prior | None, neighbours: int = 1
    ) -> tuple[SitePatch, dict[str, float]]:
        """:meth:`solve` on one process, whose patch and figures, or error, all processes get.

        Args:
            owner: rank of the process that has the sums (:meth:`reduce`).
            device: where the process group's tensors live.
            start: what was there when the sums were taken.
            prior: inputs to preserve; needed by ``owner`` alone.
            neighbours: processes on each machine; their cores, idle meanwhile, help to solve.
        """
        rank, size = rank_and_size()
        if size == 1:
            return self.solve(start, prior)
        patch, solved = SitePatch(), cast(Any, None)
        if rank == owner:
            try:
                with more_threads(neighbours):
                    patch, solved = self.solve(start, prior)
            except ThoughtError as error:
                solved = error
        figures = share_json(solved, owner, device)
        parts = [] if patch.matrix is None else [patch.matrix.A, patch.matrix.B]
        parts = share_tensors([*parts, *([] if patch.vector is None else [patch.vector])], owner, device)
        matrix = Factors(parts[0], parts[1]) if self.matrix is not None else None
        return SitePatch(matrix, parts[-1] if self.vector is not None else None), figures

    def _constant(self, sums: VectorStatistics, preserve: bool) -> torch.Tensor:
        """The vector of this step, (d_out,)."""
        keep = 1 + (self.settings.prior_weight if preserve else 0.0)
        if self.site.gain is None:
            return sums.mean() / keep
        gain = self.site.gain.to(sums.total)
        acts = check_gain(gain, len(gain), self.name)
        ridge = self.settings.ridge * gain[acts].square().quantile(0.5)
        return (gain * sums.mean() / (keep * gain.square() + ridge)).where(acts, 0.0)

    def _solve_matrix(
        self, sums: Statistics, start: Factors | None, prior: Prior | None
    ) -> tuple[Factors, dict[str, float]]:
        settings = self.settings
        weight = settings.prior_weight
        gain = self.site.gain
        if gain is None:
            solution = solve(sums, settings.ridge, prior, weight, settings.rank, self.name)
        else:
            solution = solve_with_gains(sums, gain, settings.ridge, prior, weight, settings.rank, self.name)
        A, B, figures = solution.A, settings.step_size * solution.B, solution.diagnostics
        if start is not None:
            A, B = torch.cat([start.A.to(A), A]), torch.cat([start.B.to(B), B], dim=1)
            ridge = settings.ridge * solution.diagnostics["ridge_scale"]
            A, B = reduce_rank(A, B, sums, ridge, prior, weight, settings.rank, gain)
        if start is not None or settings.step_size != 1:  # the figures of what is installed, not of the full step
            after = _error_after(A, B, start, sums, gain)
            figures |= {"error_after": after, "rank": len(A), "norm": _norm(A, B)}
        if A.shape[0] == 0:  # a patch of nothing has rank 1 and is zero
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        return Factors(A.float().contiguous(), B.float().contiguous()), figures

    def _vector_figures(self, sums: VectorStatistics, step: torch.Tensor) -> dict[str, float]:
        before = float(sums.energy) / sums.weight
        moved = step if self.site.gain is None else self.site.gain.to(step) * step
        after = before - 2 * float(moved @ sums.mean()) + float(moved @ moved)
        if self.matrix is None:
            return {"error_before": before, "error_after": after, "tokens": sums.tokens, "norm": float(step.norm())}
        return {"vector_error_before": before, "vector_error_after": after, "vector_norm": float(step.norm())}


def _error_after(
    A: torch.Tensor, B: torch.Tensor, start: Factors | None, sums: Statistics, gain: torch.Tensor | None = None
) -> float:
    """(1/w) Σ w ‖δ − g ⊙ (T − T₀) a‖², T = B A of any rank, with δ measured while T₀ was there."""
    if start is not None:
        A, B = torch.cat([A, start.A.to(A)]), torch.cat([B, -start.B.to(B)], dim=1)
    if gain is not None:
        B = gain.to(B).unsqueeze(1) * B
    explained = float((B.T @ sums.cross.to(B) * A).sum())
    change = float(((B.T @ B) * sums.projected(A)).sum())
    return (float(sums.energy) - 2 * explained + change) / sums.weight


def _norm(A: torch.Tensor, B: torch.Tensor) -> float:
    """‖B A‖_F."""
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


class SolvedStages:
    """What the stages have come to so far.

    Attributes:
        patches: of the sites, by (block index, site).
        figures: of their quality, by the site's label.
    """

    def __init__(self) -> None:
        self.patches: dict[tuple[int, str], SitePatch] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self._sites: dict[tuple[int, str], Site] = {}

    def add(self, block: int, site: Site, patch: SitePatch, figures: Mapping[str, float]) -> None:
        """Put a site's patch in the place of what was there."""
        self.patches[block, site.name], self._sites[block, site.name] = patch, site
        self.figures[site.label] = {name: round(value, 8) for name, value in figures.items()}

    @torch.no_grad()
    def patch(self, provenance: Mapping[str, Any] | None = None) -> ThoughtPatch:
        """The patch of the model that the sites' come to.

        Args:
            provenance: how it was made, which the figures are added to; left out, only the inputs of layers with a
                vector are said, for an adapter has a matrix for each of them, too.
        """
        factors: dict[str, Factors] = {}
        vectors: dict[str, torch.Tensor] = {}
        for key, own in self.patches.items():
            site = self._sites[key]
            if own.matrix is not None:
                found = site.factors(own.matrix.A, own.matrix.B)
                factors |= {path: Factors(A, B) for path, (A, B) in found.items()}
            if own.vector is not None:
                vectors[site.path] = vectors[site.path] + own.vector if site.path in vectors else own.vector
        told = {} if provenance is None else {**provenance, "diagnostics": self.figures}
        if vectors:
            written = [projection for site in self._sites.values() for projection in site.projections]
            told["d_in"] = {layer.path: layer.d_in for layer in written if layer.path in vectors}
        return ThoughtPatch(factors, told, vectors)
