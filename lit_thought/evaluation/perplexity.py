"""The perplexity of unrelated text, which a patch should leave alone: how much it changes, on as many windows of the
text as it takes to say so."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, is_finite
from lit_thought.files import atomic_file, cache_folder, is_own_file, read_json
from lit_thought.model.discovery import wider
from lit_thought.model.loading import context_window, fingerprint
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.batches import PAD, forward_inputs, pad
from lit_thought.prompts.unrelated import text_windows
from lit_thought.solve.intervals import perplexity_ratio

__all__ = ["UnrelatedText", "check_interval", "unrelated_perplexity", "window_losses"]

_log = logging.getLogger("lit_thought")

_WINDOW = 512
"""Tokens of each window of unrelated text whose perplexity is measured."""
_FEWEST = 4
"""Windows to measure before an interval is believed; half as many again each time that it is too wide."""
_LOGITS = 2**27
"""Most logits of one batch: 0.5 GB in float32."""
_FORMAT = 1


def check_interval(interval: float | None) -> None:
    """Refuse a half-width that is no number above 0, or None.

    Raises:
        ThoughtError: naming ``perplexity_interval``.
    """
    if interval is not None and not (is_finite(interval) and interval > 0):
        raise ThoughtError(
            f"perplexity_interval must be a finite number above 0, or None for all of the text; got {interval!r}."
        )


class UnrelatedText:
    """Unrelated text in windows, and what the original model makes of them; :meth:`measure` is for several patches.

    A window's loss under the original model is measured once: it is kept here, and in the cache, under a hash of all
    that it depends on (weights, configuration, dtype and device of the model, token ids). Nothing is kept of a sharded
    model, whose processes would have to agree on what they know, and of one with hooks, which may do something else
    than its weights say, as with a patch beside quantised layers; nor inside ``torch.autocast``.

    Args:
        model: the model, without the patch.
        tokenizer: its tokenizer.
        texts: the text.
        interval: half-width of the 95 % interval of the ratio at which to stop; None to measure all windows.
        cache_dir: cache folder, :func:`~lit_thought.files.default_cache_dir` when left out.
        progress: show progress bars.

    Attributes:
        windows: token ids of each window.
        original: losses of the windows that have been measured, by their index (see :func:`window_losses`).

    Raises:
        ThoughtError: for an interval that is not a number above 0, or a text of no two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        interval: float | None = 0.01,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        check_interval(interval)
        self.model, self.interval, self.progress = model, interval, progress
        self.windows = text_windows(tokenizer, texts, min(_WINDOW, context_window(model)))
        self._manifest = {} if is_sharded(model) or _has_hooks(model) else _manifest(model, self.windows)
        key = hashlib.sha256(json.dumps(self._manifest, sort_keys=True).encode()).hexdigest()[:24]
        self._file = cache_folder(cache_dir) / f"perplexity-{key}.json"
        self.original = _read(self._file, self._manifest) if self._manifest else {}

    def measure(self, patch: ThoughtPatch) -> dict[str, Any]:
        """The perplexities and their ratio, as :func:`~lit_thought.evaluation.compare.evaluate` returns them.

        The windows come in an order that spreads over the text however many there are, the same for every patch. After
        the first four, then half as many again each time, the interval decides whether that is enough. To look several
        times costs a little confidence: of normal changes a 95 % interval then holds 92 to 95 %.

        Args:
            patch: one that fits the model.
        """
        order = _spread(len(self.windows))
        count = len(order) if self.interval is None else min(_FEWEST, len(order))
        rough = torch.is_autocast_enabled(self.model.device.type)
        original: dict[int, float] = {} if rough else self.original
        patched: dict[int, float] = {}
        while True:
            self._measure_original(order[:count], original)
            with patch.applied(self.model, check=False):
                patched |= self._losses("patched", order[:count], patched)
            result = self._result(original, patched)
            reached = result["perplexity_interval"]
            if count == len(order) or (self.interval is not None and reached <= self.interval):
                return result
            count = min(count * 3 // 2, len(order))

    def _measure_original(self, wanted: Sequence[int], known: dict[int, float]) -> None:
        found = self._losses("original", wanted, known)
        known |= found
        if found and self._manifest and known is self.original:
            _write(self._file, self._manifest, known, len(self.windows))

    def _losses(self, run: str, wanted: Sequence[int], known: dict[int, float]) -> dict[int, float]:
        """Of the windows that are not known yet, by the model as it is now."""
        new = sorted(set(wanted) - known.keys())
        shown = {"desc": f"Perplexity of unrelated text, {run}", "unit": "window", "leave": False}
        start = len(wanted) - len(new)
        with tqdm(total=len(wanted), initial=start, disable=not (self.progress and new), **shown) as bar:
            values = window_losses(
                self.model,
                [self.windows[i] for i in new],
                progress=lambda done: bar.update(start + done - bar.n) and None,
            )
        return dict(zip(new, values, strict=True))

    def _result(self, known: dict[int, float], patched: dict[int, float]) -> dict[str, Any]:
        measured = sorted(patched)
        original, changed = ([losses[i] for i in measured] for losses in (known, patched))
        tokens = [len(self.windows[i]) - 1 for i in measured]
        before, after = (_perplexity(losses, sum(tokens)) for losses in (original, changed))
        half = None
        if len(measured) > 1:
            _, low, high = perplexity_ratio(original, changed, tokens)
            half = (high - low) / 2
        return {
            "perplexity": {"original": before, "patched": after},
            "perplexity_ratio": after / before if after and before else None,
            "perplexity_interval": half,
            "perplexity_tokens": {"measured": sum(tokens), "text": sum(len(window) - 1 for window in self.windows)},
            "perplexity_windows": {"tokens": tokens, "original": original, "patched": changed},
        }


def unrelated_perplexity(model: PreTrainedModel, windows: Sequence[Sequence[int]], batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    return _perplexity(window_losses(model, windows, batch_size), sum(len(window) - 1 for window in windows))


def _perplexity(losses: Sequence[float], tokens: int) -> float:
    mean = sum(losses) / tokens
    return float(torch.tensor(mean, dtype=torch.float64).exp())  # infinite, not an error, where that is too large


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Negative log-likelihood of each window: the sum over its tokens but the first, each given those before it.

    Args:
        model: the model.
        windows: token ids of each.
        batch_size: most windows a batch; fewer where the vocabulary is large.
        progress: called with the number of windows done after each batch.

    Returns:
        A loss a window in nats, each token's in float32 or better and their sum in float64.
    """
    losses: list[float] = []
    size = max(map(len, windows), default=1) * model.config.get_text_config().vocab_size
    step = max(1, min(batch_size, _LOGITS // size))
    for start in range(0, len(windows), step):
        batch = windows[start : start + step]
        tokens = pad(batch, PAD, "right").to(model.device)
        logits = model(**forward_inputs(tokens, 0), use_cache=False).logits
        each = []
        for row, ids, length in zip(logits, tokens.ids, map(len, batch), strict=True):
            # window by window the vocabulary is contiguous, where log-softmax is fast and sums in blocks; and a wider
            # copy of the logits is that of one window
            own = row[: length - 1]
            each.append(cross_entropy(own.to(wider(own.dtype)), ids[1:length], reduction="none").double().sum())
        losses += torch.stack(each).tolist()
        if progress is not None:
            progress(len(losses))
    return losses


def _spread(count: int) -> list[int]:
    """0 to count − 1 by their bits read backwards: the first, the middle, the quarters, the eighths …"""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))


# --- the cache -------------------------------------------------------------------------------------------------------


def _has_hooks(model: PreTrainedModel) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _manifest(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that the losses depend on."""
    return {
        "format": _FORMAT,
        "fingerprint": fingerprint(model),
        "config": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "windows": hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest(),
    }


def _read(file: Path, manifest: dict[str, Any]) -> dict[int, float]:
    """The losses of an entry by window; none where it is not there, damaged, or another's."""
    try:
        entry = read_json(file) if is_own_file(file) else None
    except (OSError, ValueError):
        return {}
    if not isinstance(entry, dict) or entry.get("manifest") != manifest:
        return {}
    losses = entry.get("losses")
    if not isinstance(losses, list) or entry.get("digest") != _digest(manifest, losses):
        return {}
    return {i: loss for i, loss in enumerate(losses) if loss is not None}


def _write(file: Path, manifest: dict[str, Any], known: dict[int, float], count: int) -> None:
    """Keep what is known of so many windows; a disk that cannot be written costs time later, and not this result."""
    losses = [known[i] if math.isfinite(known.get(i, math.nan)) else None for i in range(count)]
    entry = {"manifest": manifest, "losses": losses, "digest": _digest(manifest, losses)}
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    except (OSError, ThoughtError) as error:
        _log.warning("cache_dir: the original model's losses on unrelated text are not kept (%s).", error)


def _digest(manifest: dict[str, Any], losses: list[Any]) -> str:
    return hashlib.sha256(json.dumps([manifest, losses]).encode()).hexdigest()
