"""Settings chosen on pairs of the fit that are held back, without a look at any test: ``"auto"``.

1. A seeded quarter of the pairs is held back (4 to 50 of them). The others are fitted once, at the defaults of the
   settings to choose, and the sums are kept for a while.
2. Other ridges, preservation weights and ranks are solved again from these sums
   (:func:`~lit_thought.statistics.solve.solve_several`), one setting at a time, and then what is better of each
   together. Other scales, and quarters of the blocks left out, need no solve; they are tried on what has been chosen so
   far.
3. A candidate's score is, on the held-back pairs, KL(instructed ‖ patched) over the tokens that predict the output or
   its end; its *drift* KL(original ‖ patched) on unrelated text (:mod:`lit_thought.evaluation.held_back`).
4. :func:`choose`: of the candidates whose drift is at most :data:`MAX_DRIFT` the one with the smallest mean score; but
   the default, where it is one of them, stays unless the other is better by more than a standard error of the pairs'
   mean difference. Where all drift more, the one that drifts least.

In sequential order later sums depend on earlier patches, which the second solve accounts for to first order: a
candidate far from the default still looks a little worse than its own fit would be, in favour of the default.

Drift is measured as a divergence, not as the ratio of perplexities that an evaluation reports, because from equally
many tokens it is several times less noisy. On English prose the logarithm of that ratio is about half of it: the limit
stands for a perplexity × 1.02.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from lit_thought.errors import ThoughtError
from lit_thought.evaluation.held_back import HeldBack
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule, Written
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import write_inputs, write_outputs
from lit_thought.model.blocks import find_blocks
from lit_thought.model.loading import context_window
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.unrelated import load_texts
from lit_thought.settings import FitSettings
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_several

__all__ = [
    "AUTO",
    "MAX_DRIFT",
    "OF_THE_LAST_FIT",
    "Selection",
    "check_auto",
    "choose",
    "completed",
    "format_selection",
    "mean_and_error",
    "part_of",
    "select_settings",
    "split",
]

AUTO = FitSettings.names(auto=True)
"""The settings that can be ``"auto"``."""

MAX_DRIFT = 0.04
"""Nats a token of unrelated text."""

_SOLVED = ("ridge", "preserve_weight", "rank")
_MIN_PAIRS = 8
OF_THE_LAST_FIT = ("statistics_dir", "resume_dir", "output_dir", "overwrite")
"""What fits on the way to the last one do without."""


@dataclass(frozen=True)
class Selection:
    """What :func:`select_settings` chose.

    Attributes:
        settings: arguments of :class:`~lit_thought.fit.callback.ThoughtCallback`: all that were given, and the chosen
            ones.
        outputs: what the instructed model wrote for pairs without output, for ``PairDataModule.known``.
        provenance: the candidates with their figures, the choice and the seconds it took, as JSON values.
    """

    settings: dict[str, Any]
    outputs: list[Written]
    provenance: dict[str, Any]


def check_auto(names: Sequence[str], pairs: int, settings: Mapping[str, Any]) -> None:
    """Check what can be checked without a model.

    Args:
        names: the settings to choose.
        pairs: how many pairs there are.
        settings: the fit's other settings.

    Raises:
        ThoughtError: when they cannot be chosen.
    """
    unknown = [name for name in names if name not in AUTO]
    if unknown or not names:
        raise ThoughtError(f"only {', '.join(AUTO)} can be chosen automatically; got {list(names)!r}.")
    if pairs < _MIN_PAIRS:
        raise ThoughtError(
            f'{names[0]}="auto" needs {_MIN_PAIRS} pairs or more, to hold some of them back; got {pairs}. Give more '
            "pairs, or a value."
        )
    if settings.get("pairs_per_step") is not None:
        raise ThoughtError(f'{names[0]}="auto" and pairs_per_step exclude each other; leave one of them out.')
    if "preserve_weight" in names and settings.get("preserve", "default") is None:
        raise ThoughtError('preserve_weight="auto" weighs text to preserve, but preserve is None. Give preserve.')


def split(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the pairs to fit and of those held back: a seeded quarter, 4 to 50 of them; both ascending."""
    held = set(random.Random(seed).sample(range(count), min(50, max(4, count // 4))))
    return [i for i in range(count) if i not in held], sorted(held)


def choose(scores: Sequence[Tensor], drift: Callable[[int], float], limit: float = MAX_DRIFT) -> int:
    """The rule at the top of this module.

    Args:
        scores: of each candidate the KL of each held-back pair, (pairs,); the default's first.
        drift: a candidate's drift by its index, called only where the choice depends on it.
        limit: the largest drift.

    Returns:
        The index of the candidate chosen.
    """
    means = [float(score.mean().nan_to_num(float("inf"))) for score in scores]
    ranked = sorted(range(len(scores)), key=means.__getitem__)
    if drift(0) <= limit:
        ranked = [i for i in ranked if i == 0 or _better(scores[i], scores[0])]
    chosen = next((i for i in ranked if drift(i) <= limit), None)
    return min(range(len(scores)), key=drift) if chosen is None else chosen


def _better(score: Tensor, default: Tensor) -> bool:
    """Whether it is smaller by more than a standard error; a single pair has none to compare with."""
    gain, error = mean_and_error(default - score)
    return error is not None and gain > error


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of (n,) and its standard error, None for a single value."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def select_settings(
    module: ThoughtModule,
    data: PairDataModule,
    names: Sequence[str] = AUTO,
    *,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Selection:
    """Choose settings for a fit of ``data`` by what they do on a held-back share of its pairs.

    Args:
        module: the model; left bit for bit as it was.
        data: the pairs of the fit.
        names: which settings to choose, of :data:`AUTO`.
        seed: of which pairs are held back.
        progress: show progress bars.
        settings: the other arguments of the fit's :class:`~lit_thought.fit.callback.ThoughtCallback`.

    Raises:
        ThoughtError: for an unknown name, fewer than 8 pairs, preserve_weight without text to preserve, with
            pairs_per_step, and for what the fit itself refuses.

    Example:
        >>> chosen = select_settings(module, data, ["ridge", "rank"], sites=["mlp_out"])  # doctest: +SKIP
        >>> callback = ThoughtCallback(**chosen.settings)  # doctest: +SKIP
    """
    check_auto(names, data.expected, settings)
    started = time.perf_counter()
    given = {name: value for name, value in settings.items() if name not in names}
    ours = {name: value for name, value in given.items() if name not in OF_THE_LAST_FIT}
    ThoughtCallback(**ours).check(module, data)
    model, tokenizer = module.model, module.tokenizer
    write_inputs(data, model, tokenizer, progress)
    check_auto(names, len(data.pairs), settings)
    rest, held = split(len(data.pairs), seed)
    data.tokenise(tokenizer, context_window(model))
    outputs = write_outputs(data, model, tokenizer, progress)
    with tempfile.TemporaryDirectory(prefix="lit-thought-") as root:
        folder = Path(root) / "statistics" if set(names) & set(_SOLVED) else None
        callback = ThoughtCallback(**ours, statistics_dir=folder)
        patch = fit(module, part_of(data, rest, outputs), callback, progress)
        texts = callback.preserved.texts or load_texts("default", "preserve", "preserve")
        pairs = completed(module, data, held, outputs)
        measure = HeldBack(
            model, tokenizer, pairs, [data.instructions[i] for i in held], texts, data.settings.batch_size
        )
        kept = patch.provenance["settings"]
        defaults = callback.settings.options(auto=True) | {name: kept[name] for name in _SOLVED}
        search = _Search(measure, defaults, patch, progress)
        if folder is not None:
            saved = SavedStatistics.load(folder, model.device)
            largest = min(min(head.d_in, head.d_out) for head in saved.heads)
            solved = [name for name in _SOLVED if name in names]

            def solve(candidates: list[dict[str, Any]]) -> list[ThoughtPatch]:
                chosen = [{name: settings[name] for name in solved} for settings in candidates]
                found = solve_several(saved, chosen, cache_dir=callback.settings.cache_dir, model=model)
                return [defaults["scale"] * patch for patch in found]

            search.solve(solve, {name: _other_values(name, defaults[name], largest) for name in solved})
    if "scale" in names:
        search.scale()
    if "blocks" in names:
        search.leave_out(_owners(module))
    search.best.chosen = True
    best = search.best
    told = {
        "names": list(names),
        "seed": seed,
        "held_back": [len(held), len(data.pairs)],
        "max_drift": MAX_DRIFT,
        "candidates": [candidate.to_json(search.tried[0]) for candidate in search.tried],
        "chosen": {name: best.settings[name] for name in names},
        "seconds": round(time.perf_counter() - started, 2),
    }
    chosen = {name: best.settings[name] for name in names}
    return Selection({**given, **chosen}, outputs, told)


def format_selection(selection: Mapping[str, Any]) -> str:
    """The candidates of a selection, as a provenance keeps it, a line each, the chosen one marked."""
    held, pairs = selection["held_back"]
    lines = [f"Chosen on {held} of {pairs} pairs, held back, in {selection['seconds']:.1f} s (KL, nats a token):"]
    default = selection["candidates"][0]["settings"]
    for candidate in selection["candidates"]:
        settings = candidate["settings"]
        changed = [f"{name} {_shown(value)}" for name, value in settings.items() if value != default[name]]
        drift = "" if candidate["drift"] is None else f", drift {candidate['drift']:.4f}"
        mark = "  <- chosen" if candidate["chosen"] else ""
        error = "" if candidate["kl_error"] is None else f" ± {candidate['kl_error']:.4f}"
        kl = "–" if candidate["kl"] is None else f"{candidate['kl']:.4f}"  # which was no number
        lines.append(f"  {', '.join(changed) or 'defaults'}: {kl}{error}{drift}{mark}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value[0]} to {value[-1]}" if isinstance(value, list) else f"{value:.3g}" if value is not None else "all"


@dataclass(eq=False)
class _Candidate:
    """Settings, what they give, and how that does."""

    settings: dict[str, Any]
    patch: ThoughtPatch
    scores: Tensor
    drift: float | None = None
    chosen: bool = False

    def to_json(self, default: _Candidate) -> dict[str, Any]:
        """``kl`` with its standard error; ``gain``, how much better than the default it is, with that of the pairs'
        differences; ``drift``, None where the choice did not depend on it."""
        figures = {"kl": mean_and_error(self.scores), "gain": mean_and_error(default.scores - self.scores)}
        flat = {name: value for name, (value, _) in figures.items()}
        flat |= {f"{name}_error": error for name, (_, error) in figures.items()}  # type: ignore[misc]
        return {"settings": self.settings, **flat, "drift": self.drift, "chosen": self.chosen}


class _Search:
    """The candidates tried so far, and the best of them."""

    def __init__(self, measure: HeldBack, settings: dict[str, Any], patch: ThoughtPatch, progress: bool) -> None:
        self.measure, self.show = measure, progress
        self.tried: list[_Candidate] = []
        self.best = self._try([settings], [patch])[0]

    def solve(self, solver: Callable[[list[dict[str, Any]]], list[ThoughtPatch]], values: dict[str, list[Any]]) -> None:
        """One setting at a time, then what is better of each together.

        Args:
            solver: from settings to patches.
            values: other values of each setting.
        """
        default = self.best
        settings = [{**default.settings, name: value} for name in values for value in values[name]]
        tried = self._try(settings, solver(settings))
        found = iter(tried)
        picks = {name: self._choose([default, *islice(found, len(values[name]))]) for name in values}
        moved = {name: pick.settings[name] for name, pick in picks.items() if pick is not default}
        if len(moved) > 1:
            together = [{**default.settings, **moved}]
            tried += self._try(together, solver(together))
        self.best = self._choose([default, *tried])

    def scale(self) -> None:
        """The best patch so far, a fifth smaller and larger."""
        patch, settings = self.best.patch, self.best.settings
        scales = [0.8, 1.2]
        self._rival([{**settings, "scale": scale} for scale in scales], [scale * patch for scale in scales])

    def leave_out(self, owners: Mapping[str, int]) -> None:
        """The best patch so far, without the first and without the last quarter of the blocks.

        Args:
            owners: the block of each layer that a patch may change, by path.
        """
        patch, settings = self.best.patch, self.best.settings
        count = 1 + max(owners.values())
        ranges = [range(count // 4, count), range(count - count // 4)] if count >= 4 else []
        parts = [_only({path for path, block in owners.items() if block in kept}, patch) for kept in ranges]
        found = [(list(kept), part) for kept, part in zip(ranges, parts, strict=True) if part is not None]
        self._rival([{**settings, "blocks": kept} for kept, _ in found], [part for _, part in found])

    def _rival(self, settings: list[dict[str, Any]], patches: list[ThoughtPatch]) -> None:
        self.best = self._choose([self.best, *self._try(settings, patches)])

    def _try(self, settings: Sequence[dict[str, Any]], patches: Sequence[ThoughtPatch]) -> list[_Candidate]:
        bar = tqdm(settings, desc="Choosing settings", unit="candidate", disable=not self.show, leave=False)
        pairs = zip(bar, patches, strict=True)
        found = [_Candidate(own, patch, self.measure.divergences(patch)) for own, patch in pairs]
        self.tried += found
        return found

    def _choose(self, candidates: Sequence[_Candidate]) -> _Candidate:
        return candidates[choose([candidate.scores for candidate in candidates], lambda i: self._drift(candidates[i]))]

    def _drift(self, candidate: _Candidate) -> float:
        if candidate.drift is None:
            candidate.drift = self.measure.drift(candidate.patch)
        return candidate.drift


def _other_values(name: str, value: Any, largest: int) -> list[Any]:
    """What is tried of a setting besides its default; ``largest`` is the largest rank that the layers allow."""
    if name == "rank":
        return [rank for rank in (value // 2, 2 * value) if 1 <= rank <= largest]
    return [value / 3, 3 * value]


def _only(paths: Container[str], patch: ThoughtPatch) -> ThoughtPatch | None:
    """The patch at some layers, or None where it does nothing there."""
    factors = {path: value for path, value in patch.factors.items() if path in paths}
    vectors = {path: value for path, value in patch.vectors.items() if path in paths}
    return ThoughtPatch(factors, patch.provenance, vectors) if factors or vectors else None


def _owners(module: ThoughtModule) -> dict[str, int]:
    """The block of each layer that a patch may change, by path."""
    sites = [(block.index, site) for block in find_blocks(module.model) for site in block.sites.values()]
    written = {projection.path: index for index, site in sites for projection in site.projections}
    return {path: index for index, site in sites for path in site.targets} | written


def part_of(data: PairDataModule, indices: Sequence[int], outputs: Sequence[Written]) -> PairDataModule:
    """Some of the pairs, by ascending indices, with the outputs that were written for them."""
    first = len(data.given)
    given = [data.pairs[i] for i in indices if i < first]
    settings = data.settings.options(data=True) | ({} if data.kind is not None else {"inputs": None})
    part = PairDataModule(given or None, data.instruction, data.template, **settings)
    if data.kind is not None:
        part.add([data.pairs[i] for i in indices if i >= first], data.template, data.kind)
    place = {index: row for row, index in enumerate(indices)}
    part.known = [(place[i], text, finished) for i, text, finished in outputs if i in place]
    return part


def completed(
    module: ThoughtModule, data: PairDataModule, indices: Sequence[int], outputs: Sequence[Written]
) -> list[TokenisedPair]:
    """Some of the pairs as tokens, with their outputs or those that were written for them."""
    written = {i: (text, finished) for i, text, finished in outputs}
    return [
        data.template.tokenise(
            module.tokenizer,
            data.instructions[i],
            data.pairs[i]["input"],
            *(written[i] if i in written else (data.pairs[i]["output"],)),
        )
        for i in indices
    ]
