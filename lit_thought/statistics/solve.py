"""Patches from saved statistics, at the settings of their fit or at others, without a forward pass.

The sums Z and C of a stage hold all that its solve needs: any ridge λ, rank, preservation weight ρ and step size η can
be tried on them. That gives what a new fit would wherever a stage's sums do not depend on patches, which
:meth:`~lit_thought.statistics.saved.SavedStatistics.coupling` looks into, and the ridge is not below 0.001 where that
of the fit was not (its rows were then multiplied in their own precision); elsewhere a stage's sums stay those that were
taken behind the patches of the original fit.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import EllipsisType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import cache_folder
from lit_thought.model.bare import bare_model, uncompiled
from lit_thought.model.blocks import Projection, Site
from lit_thought.model.layers import is_linear, layer_shape
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.provenance import fitted_on
from lit_thought.patch.weights import patched_fingerprint
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import check_solve_settings
from lit_thought.solve.least_squares import COARSE_RIDGE, Prior
from lit_thought.solve.sums import Statistics
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.stage import SolvedStages, StageSettings, StageSums
from lit_thought.statistics.stage_file import KeptStage, StageHead

__all__ = ["PriorOf", "solve_saved", "solve_several"]

PriorOf = Callable[[int, str], Prior]
"""From a block's index and a site's name to the inputs to preserve there."""


def solve_saved(
    saved: SavedStatistics,
    *,
    ridge: float | None = None,
    rank: int | float | EllipsisType | None = ...,
    preserve_weight: float | None = None,
    step_size: float | None = None,
    prior_of: PriorOf | None = None,
    preserve: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    model: PreTrainedModel | None = None,
    approximate: bool = False,
) -> ThoughtPatch:
    """Solve every stage of a fit again; left-out settings are those of the fit.

    To rounding it is then the patch of the fit, and otherwise the one that a new fit would find, unless the statistics
    are coupled.

    Args:
        saved: the statistics; stages are read one by one, and solved on ``saved.device``.
        ridge: λ ≥ 0, relative to s (:mod:`lit_thought.solve.least_squares`).
        rank: an int, a fraction of explained energy in (0, 1), or None for full rank.
        preserve_weight: ρ ≥ 0.
        step_size: η in (0, 1]; of several steps, that of the last.
        prior_of: the inputs to preserve; left out, ``preserve`` or the cache entry that the fit used.
        preserve: a file of the model's preservation statistics to use instead (``lit-thought preserve``).
        cache_dir: where the fit kept its entry; :func:`~lit_thought.files.default_cache_dir` when left
            out.
        model: the fit's model, for statistics of a matrix at mlp_in (whose change is W Δ); otherwise not needed.
        approximate: solve at other settings where the statistics are coupled, or too coarse for the ridge, too.

    Returns:
        The patch. Its provenance is the fit's, without its history and with the new settings; ``approximate`` in it
        says why it is not what a new fit would find, or is None.

    Raises:
        ThoughtError: for a setting out of range, for other settings than the fit's with coupled statistics, when the
            preservation statistics are not in the cache or the file does not fit, or when the model is needed and
            missing.
        PatchError: when ``model`` is another one than the fit's, or a stage's file is damaged.
        SingularSystemError: when a stage's system is singular.

    Example:
        >>> saved = SavedStatistics.load("statistics/")  # doctest: +SKIP
        >>> solve_saved(saved, ridge=0.1, rank=8).save_adapter("antonym-8/")  # doctest: +SKIP
    """
    fitted = saved.manifest.settings
    asked = {"ridge": ridge, "preserve_weight": preserve_weight, "step_size": step_size}
    chosen = {name: fitted[name] if value is None else value for name, value in asked.items()}
    chosen["rank"] = fitted["rank"] if isinstance(rank, EllipsisType) else rank
    check_solve_settings(**chosen)
    file = None if preserve is None else _preservation_file(saved, preserve)
    if file is not None:
        chosen |= {"preserve_file": file.digest, "preserve_tokens": file.manifest["tokens"]}
    settings = _settings(chosen)
    changed = [name for name, value in chosen.items() if value != fitted.get(name)]
    changed += ["prior_of"] if prior_of is not None else []
    coarse = _coarse(saved, chosen["ridge"])
    summed = any("matrix" in head.parts and head.tokens >= head.d_in for head in saved.heads)
    coupled = (coarse if summed else None) or (saved.coupling() if changed else None)
    if coupled is not None and not approximate:
        raise _refused(changed, coupled)
    model = None if model is None else bare_model(model)
    _check_model(saved, model)
    if settings.prior_weight == 0:
        given = "preserve" if file is not None else "prior_of" if prior_of is not None else None
        if given is not None:
            raise ThoughtError(
                f"{given} has no effect at preserve_weight=0, which is the fit's where it preserved nothing. Give a "
                "preserve_weight above 0, or leave it out."
            )
    elif prior_of is None:
        prior_of = file.prior if file is not None else _cached_priors(saved, cache_dir)
    solved = SolvedStages()
    for stage in saved.stages():
        if coarse is not None and stage.matrix is not None and stage.matrix.folded:  # as differences are at any size
            coupled = coarse
            if not approximate:
                raise _refused(changed, coarse)
        site = _site(stage, model)
        prior = prior_of(stage.head.block, site.name) if prior_of is not None else None
        solved.add(stage.head.block, site, *_solve(stage, site, settings, prior))
    provenance: dict[str, Any] = {
        **{name: value for name, value in saved.manifest.provenance.items() if name != "scale"},
        "settings": {**fitted, **chosen},
        "approximate": coupled or (saved.inexact() if saved.manifest.approximate else None),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    scale = saved.manifest.provenance.get("scale")
    patch = solved.patch(provenance)
    return patch if scale in (None, 1) else scale * patch


def _refused(changed: Sequence[str], coupled: str) -> ThoughtError:
    return ThoughtError(
        f"another {', '.join(changed)} than the fit's would change the sums of these statistics too: {coupled}. Fit "
        "anew, or pass approximate=True to keep the sums as they are."
    )


def _coarse(saved: SavedStatistics, ridge: float) -> str | None:
    """Why sums, which rows are not, are too coarse for a ridge, if they are."""
    fitted = saved.manifest.settings["ridge"]
    if not ridge < COARSE_RIDGE <= fitted:
        return None
    return f"fits at a ridge of {COARSE_RIDGE:g} or more, as this one at {fitted:g}, multiply in the model's own dtype"


@torch.no_grad()
def solve_several(
    saved: SavedStatistics,
    candidates: Sequence[Mapping[str, Any]],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    model: PreTrainedModel | None = None,
) -> list[ThoughtPatch]:
    """Patches at several settings, close to what new fits would find where :func:`solve_saved` is not.

    Each stage is read once.

    Where a stage's inputs have gone through the patches before it, a candidate that changes the residual stream less
    than the fit did would leave more for that stage to correct. To first order the difference stays in the stream:
    with T the fit's matrices and T' the candidate's, δₖ becomes δₖ + Σ (Tⱼ − T'ⱼ) aⱼ, over the stages j before k. That
    needs the rows; of stages that keep sums alone, or are at mlp_in, nothing is carried on.

    Args:
        saved: the statistics.
        candidates: ridge, rank and preserve_weight of each patch; those of the fit where left out.
        cache_dir: as for :func:`solve_saved`.
        model: the fit's model, as for :func:`solve_saved`; not checked again.

    Returns:
        A patch for each candidate, without provenance, and not times the fit's scale.

    Raises:
        ThoughtError, SingularSystemError: as for :func:`solve_saved`.
    """
    model = None if model is None else bare_model(model)
    fitted = _settings(saved.manifest.settings)
    every = [_settings({**saved.manifest.settings, **candidate}) for candidate in candidates]
    prior_of = _cached_priors(saved, cache_dir) if any(each.prior_weight for each in [fitted, *every]) else None
    solved = [SolvedStages() for _ in every]
    left: list[torch.Tensor | None] = [None] * len(every)
    before_it = -1
    for stage in saved.stages():
        block, site = stage.head.block, _site(stage, model)
        if saved.manifest.settings["order"] == "teacher-forced" and block != before_it:
            left = [None] * len(every)  # each block starts from the instructed stream
        before_it = block
        prior = prior_of(block, site.name) if prior_of is not None else None
        usual = _effect(stage, _solve(stage, site, fitted, prior if fitted.prior_weight else None)[0])
        for number, settings in enumerate(every):
            own = _carrying(stage, left[number])
            patch, figures = _solve(own, site, settings, prior if settings.prior_weight else None)
            effect = _effect(stage, patch)
            if usual is not None and effect is not None:
                before = left[number]
                left[number] = usual - effect if before is None else before + usual - effect
            solved[number].add(block, site, patch, figures)
    return [stages.patch() for stages in solved]


def _effect(stage: KeptStage, patch: SitePatch) -> torch.Tensor | None:
    """What a patch adds to the residual stream at the stage's rows, (n, d_out); None without them."""
    rows = stage.matrix.rows() if stage.matrix is not None and stage.head.site != "mlp_in" else None
    if rows is None or patch.matrix is None:
        return None
    added = rows[0].double() @ patch.matrix.A.double().T @ patch.matrix.B.double().T
    return added if stage.gain is None else added * stage.gain.double()


def _carrying(stage: KeptStage, left: torch.Tensor | None) -> KeptStage:
    """The stage with more error to correct at its rows."""
    rows = stage.matrix.rows() if stage.matrix is not None and stage.head.site != "mlp_in" else None
    if left is None or rows is None or rows[1].shape != left.shape:
        return stage
    assert stage.matrix is not None
    more = (rows[0].double(), rows[1].double() + left)
    return replace(stage, matrix=Statistics.from_rows(more, stage.matrix.weight, stage.matrix.tokens))


def _settings(chosen: Mapping[str, Any]) -> StageSettings:
    return StageSettings(
        chosen["rank"],
        float(chosen["ridge"]),
        float(chosen["preserve_weight"]),
        float(chosen["step_size"]),
    )


def _solve(
    stage: KeptStage, site: Site, settings: StageSettings, prior: Prior | None
) -> tuple[SitePatch, dict[str, float]]:
    sums = StageSums(site, stage.head.parts, settings, stage.head.name)
    sums.matrix, sums.vector = stage.matrix, stage.vector
    return sums.solve(stage.start, prior)


def _site(stage: KeptStage, model: PreTrainedModel | None) -> Site:
    """As much of the site as :mod:`lit_thought.statistics.stage` reads; layers at mlp_in alone."""
    head = stage.head
    projections = tuple(Projection(path, nn.Identity(), d_in) for path, d_in in head.projections.items())
    targets: dict[str, nn.Module] = {path: nn.Identity() for path in head.targets}
    if _needs_model(head):
        assert model is not None
        targets = {path: _layer(model, path, head.d_in) for path in head.targets}
    return Site(head.site, projections, targets, head.d_in, head.d_out, stage.gain)


def _layer(model: PreTrainedModel, path: str, d_in: int) -> nn.Module:
    """A linear layer of the model, of so many inputs."""
    with uncompiled(model):
        layer: nn.Module | None = dict(model.named_modules()).get(path)
    if layer is None or not is_linear(layer) or layer_shape(layer)[1] != d_in:
        raise PatchError(f"the statistics name {path!r}, which is no linear layer of {d_in} inputs of this model.")
    return layer


def _needs_model(head: StageHead) -> bool:
    return head.site == "mlp_in" and "matrix" in head.parts


def _check_model(saved: SavedStatistics, model: PreTrainedModel | None) -> None:
    name = saved.manifest.provenance.get("model")
    if model is None:
        needing = [head.name for head in saved.heads if _needs_model(head)]
        if needing:
            raise ThoughtError(
                f"model is missing: the matrix of {needing[0]} changes the weights W of the MLP's first layers by W Δ. "
                f"Pass the model of the fit, {name!r}."
            )
    elif patched_fingerprint(model) != fitted_on(saved.manifest.provenance):
        raise PatchError(f"model is not the one that the statistics were taken from, {name!r}: its weights differ.")


def _cached_priors(saved: SavedStatistics, cache_dir: str | os.PathLike[str] | None) -> PriorOf:
    """The preservation statistics that the fit used, read block by block."""
    entry = saved.manifest.preservation
    if entry is None:
        raise ThoughtError(
            "preserve_weight: the fit had no preservation statistics to weigh. Pass preserve_weight=0, or prior_of."
        )
    root = cache_folder(cache_dir)
    missing = (
        f"the preservation statistics of the fit, {entry}, are not in {str(root)!r}, or are damaged. Pass the "
        "cache_dir of the fit; a fit of the same model and text (or file) writes them anew; or pass a file of them as "
        "preserve, or preserve_weight=0."
    )
    try:
        found = Preservation(root / entry, saved.device)
        found.check_model(fitted_on(saved.manifest.provenance))
    except ThoughtError as error:
        raise ThoughtError(missing) from error

    def prior_of(block: int, site: str) -> Prior:
        try:
            return found.prior(block, site)
        except ThoughtError as error:
            raise ThoughtError(missing) from error

    return prior_of


def _preservation_file(saved: SavedStatistics, path: str | os.PathLike[str]) -> Preservation:
    """A file of preservation statistics, checked to be of the fit's model and for its sites."""
    file = Preservation(path, saved.device, "preserve")
    file.check_model(fitted_on(saved.manifest.provenance))
    needed: list[dict[str, int]] = [{} for _ in file.sites]
    for head in saved.heads:
        if head.block >= len(needed):
            raise ThoughtError(f"preserve={str(path)!r} has {len(needed)} blocks; the statistics have {head.name}.")
        needed[head.block][head.site] = head.d_in
    file.check_sites(needed)
    return file
