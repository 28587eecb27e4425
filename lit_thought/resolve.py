"""Patches from saved statistics, at the settings of their fit or at others, without a forward pass.

The sums Z and C of a stage hold all that its solve needs: any ridge λ, rank, preservation weight ρ and step size η can
be tried on them. That gives what a new fit would wherever a stage's sums do not depend on patches, which
:meth:`~lit_thought.saved.SavedStatistics.coupling` looks into; elsewhere a stage's sums stay those that were taken
behind the patches of the original fit.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType, SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from lit_thought.blocks import Block, Projection, Site
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.models import fingerprint
from lit_thought.patch import Factors, ThoughtPatch
from lit_thought.preserve import Preservation, default_cache_dir
from lit_thought.saved import SavedStatistics
from lit_thought.saved_stage import SavedStage, StageHead
from lit_thought.solve import Prior
from lit_thought.stage import StageSettings, StageSums, check_solve_settings, target_changes, vector_inputs
from lit_thought.streams import SitePatch

__all__ = ["PriorOf", "solve_saved"]

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
    cache_dir: str | os.PathLike[str] | None = None,
    model: PreTrainedModel | None = None,
    approximate: bool = False,
) -> ThoughtPatch:
    """Solve every stage of a fit again; left-out settings are those of the fit.

    With all of them left out, and on the same kind of device, it is the patch of the fit bit for bit. Otherwise it is
    the patch that a new fit would find, to rounding, unless the statistics are coupled.

    Args:
        saved: the statistics; stages are read one by one, and solved on ``saved.device``.
        ridge: λ ≥ 0, relative to s (:mod:`lit_thought.solve`).
        rank: an int, a fraction of explained energy in (0, 1), or None for full rank.
        preserve_weight: ρ ≥ 0.
        step_size: η in (0, 1]; of several steps, that of the last.
        prior_of: the inputs to preserve; left out, the cache entry that the fit used.
        cache_dir: where the fit kept it; :func:`~lit_thought.preserve.default_cache_dir` when left out.
        model: the fit's model, for statistics of a matrix at mlp_in (whose change is W Δ); otherwise not needed.
        approximate: solve at other settings where the statistics are coupled, too.

    Returns:
        The patch. Its provenance is the fit's, without its history and with the new settings; ``approximate`` in it
        says why it is not what a new fit would find, or is None.

    Raises:
        ThoughtError: for a setting out of range, for other settings than the fit's with coupled statistics, when the
            preservation statistics are not in the cache, or when the model is needed and missing.
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
    settings = StageSettings(
        chosen["rank"],
        float(chosen["ridge"]),
        float(chosen["preserve_weight"]),
        float(chosen["step_size"]),
        getattr(torch, fitted["statistics_dtype"]),
    )
    changed = [name for name, value in chosen.items() if value != fitted[name]]
    coupled = saved.coupling() if changed else None
    if coupled is not None and not approximate:
        raise ThoughtError(
            f"another {', '.join(changed)} than the fit's would change the sums of these statistics too: {coupled}. "
            "Fit anew, or pass approximate=True to keep the sums as they are."
        )
    _check_model(saved, model)
    if settings.prior_weight == 0:
        prior_of = None
    elif prior_of is None:
        prior_of = _cached_priors(saved, cache_dir)
    patches: dict[tuple[int, str], SitePatch] = {}
    sites: dict[tuple[int, str], Site] = {}
    diagnostics: dict[str, dict[str, float]] = {}
    for stage in saved.stages():
        key = (stage.head.block, stage.head.site)
        site = sites[key] = _site(stage, model)
        prior = prior_of(*key) if prior_of is not None else None
        patches[key], figures = _solve(stage, site, settings, prior)
        diagnostics[site.label] = {name: round(value, 8) for name, value in figures.items()}
    with torch.no_grad():
        changes, vectors = target_changes(sites, patches)
    provenance: dict[str, Any] = {
        **saved.manifest.provenance,
        "settings": {**fitted, **chosen},
        "approximate": coupled or (saved.coupling() if saved.manifest.approximate else None),
        "diagnostics": diagnostics,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if vectors:
        provenance["d_in"] = vector_inputs(sites.values(), vectors)
    return ThoughtPatch({path: Factors(A, B) for path, (A, B) in changes.items()}, provenance, vectors)


def _solve(
    stage: SavedStage, site: Site, settings: StageSettings, prior: Prior | None
) -> tuple[SitePatch, dict[str, float]]:
    sums = StageSums(site, stage.head.parts, settings, stage.head.name)
    sums.matrix, sums.vector = stage.matrix, stage.vector
    return sums.solve(stage.start, prior)


def _site(stage: SavedStage, model: PreTrainedModel | None) -> Site:
    """As much of the site as the solve and :func:`~lit_thought.stage.target_changes` read; layers at mlp_in alone."""
    head = stage.head
    projections = tuple(Projection(path, nn.Identity(), d_in) for path, d_in in head.projections.items())
    targets: dict[str, nn.Module] = {path: nn.Identity() for path in head.targets}
    if _needs_model(head):
        assert model is not None
        targets = {path: model.get_submodule(path) for path in head.targets}
    return Site(head.site, projections, targets, head.d_in, head.d_out, stage.gain)


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
    elif fingerprint(model) != saved.manifest.provenance["fingerprint"]:
        raise PatchError(f"model is not the one that the statistics were taken from, {name!r}: its weights differ.")


def _cached_priors(saved: SavedStatistics, cache_dir: str | os.PathLike[str] | None) -> PriorOf:
    """The preservation statistics that the fit used, read block by block."""
    entry = saved.manifest.preservation
    if entry is None:
        raise ThoughtError(
            "preserve_weight: the fit had no preservation statistics to weigh. Pass preserve_weight=0, or prior_of."
        )
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / entry
    missing = (
        f"the preservation statistics of the fit, {entry}, are not in {str(root)!r}, or are damaged. Pass the "
        "cache_dir of the fit; a fit of the same model and text writes them anew; or pass preserve_weight=0."
    )
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ThoughtError(missing) from error
    if not isinstance(found, dict) or found.get("fingerprint") != saved.manifest.provenance["fingerprint"]:
        raise ThoughtError(missing)
    preservation = Preservation(folder, saved.device)

    def prior_of(block: int, site: str) -> Prior:
        try:
            return preservation.prior(cast(Block, SimpleNamespace(index=block)), site)
        except (OSError, KeyError, SafetensorError) as error:
            raise ThoughtError(missing) from error

    return prior_of
