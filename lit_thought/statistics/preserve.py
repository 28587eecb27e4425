"""Mean Gram matrices of unrelated text through the original model, once per model and kind of fit, and kept on disk.

They are the preservation term of the solve (Z₀ in :mod:`lit_thought.solve.least_squares`): inputs on which a patched
layer should go on doing what it did. They are summed in one pass in the compact form in which they are kept
(:mod:`lit_thought.solve.nystrom`, :mod:`lit_thought.statistics.preserve_file`), one block at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.files import cache_folder, check_writable
from lit_thought.model.bare import bare_model, check_autocast, hook_names, uncompiled
from lit_thought.model.blocks import Block
from lit_thought.model.discovery import wider
from lit_thought.model.loading import context_window, model_name
from lit_thought.model.sharding import gathered, is_sharded
from lit_thought.patch.weights import patched_fingerprint
from lit_thought.prompts.batches import PAD, pad
from lit_thought.runs.streams import Stream
from lit_thought.settings import DEFAULT_SITES, DIRECTIONS
from lit_thought.solve.nystrom import Sketch
from lit_thought.statistics.distributed import gather_json
from lit_thought.statistics.preserve_file import FORMAT, Preservation, config_hash, rounded

__all__ = ["WINDOW", "cached_file", "entry_of", "preservation", "preservation_bar", "site_sizes", "window_of"]

WINDOW = 256
"""Tokens of each window of unrelated text."""


def window_of(model: PreTrainedModel) -> int:
    """Tokens of each window of unrelated text: :data:`WINDOW`, or as many as the model's context holds."""
    return min(WINDOW, context_window(model))


def preservation(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    identity: str | None = None,
    progress: Callable[[int], None] | None = None,
    write: bool = True,
    sites: Sequence[str] = DEFAULT_SITES,
    directions: int = DIRECTIONS,
) -> tuple[Preservation, bool]:
    """Load the matrices for these token windows from the cache, or compute them and keep them there.

    The file's name is a hash of everything that changes its content: the model's weights, configuration, patches and
    hooks, the token ids, the sites, the directions, the format. Sums are float64, of products in float32 or better.

    Args:
        model: the original, unpatched model.
        blocks: its blocks.
        windows: token ids of each window.
        cache_dir: cache folder, :func:`~lit_thought.files.default_cache_dir` when left out.
        batch_size: windows a batch.
        identity: the model's :func:`~lit_thought.patch.weights.patched_fingerprint`, where it is known already.
        progress: called with the number of blocks done.
        write: whether this process keeps what it computes. The processes of a sharded model compute together, and one
            of each machine writes; the others can read once it is done.
        sites: the sites of a fit.
        directions: k, how many directions of each site are kept one by one; d_in where that is less.

    Returns:
        The matrices, and whether they came from the cache.

    Raises:
        ThoughtError: inside torch.autocast; for a ``cache_dir`` that cannot be written.
        SingularSystemError: when the model's activations are not finite.
    """
    model = bare_model(model)
    check_autocast(model)
    device = next(model.parameters()).device
    sizes = site_sizes(blocks, sites)
    manifest = _manifest(model, windows, sizes, identity, directions)
    file = _entry(model, manifest, cache_dir)
    found = _valid(file, device, manifest, sizes)
    cached = found is not None
    if is_sharded(model):
        cached = all(gather_json(cached, device))
    if not cached:
        if write:
            check_writable(file.parent, "cache_dir")
        with uncompiled(model):
            priors = _compute(model, blocks, windows, sizes, directions, batch_size, progress, write)
        if write:
            Preservation.write(file, manifest, priors, overwrite=True)
        if is_sharded(model):
            gather_json(True, device)  # until it is written
        found = None
    return found or Preservation(file, device), cached


def cached_file(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    cache_dir: str | os.PathLike[str] | None,
    identity: str,
    sites: Sequence[str],
    directions: int,
) -> Path:
    """Where :func:`preservation`, whose arguments these are, keeps what it computes, whether it is there or not."""
    model = bare_model(model)
    return _entry(model, _manifest(model, windows, site_sizes(blocks, sites), identity, directions), cache_dir)


def _entry(model: PreTrainedModel, manifest: Mapping[str, Any], cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file of the cache for these statistics of ``model``, hooks that are on it included."""
    key, hooks = _key(manifest), hook_names(model)
    return entry_of(cache_dir, json.dumps({**key, "hooks": hooks} if hooks else key, sort_keys=True))


def entry_of(cache_dir: str | os.PathLike[str] | None, key: str) -> Path:
    """The file of the cache for what ``key`` says."""
    folder = cache_folder(cache_dir)
    if folder.is_file():
        raise ThoughtError(f"cache_dir={str(folder)!r} is a file; expected a folder. Choose another path.")
    return folder / f"preserve-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def site_sizes(blocks: Sequence[Block], sites: Sequence[str]) -> list[dict[str, int]]:
    """Of each block the sites of a fit, with their d_in."""
    return [{name: block.sites[name].d_in for name in block.stages(sites)} for block in blocks]


@contextmanager
def preservation_bar(blocks: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar, and what to call with the number of blocks done."""
    with tqdm(
        total=blocks,
        desc="Preservation statistics (once per model and kind of fit)",
        unit="block",
        disable=not show,
        leave=False,
    ) as bar:
        yield lambda done: bar.update(done - bar.n) and None


def _manifest(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    sizes: Sequence[Mapping[str, int]],
    identity: str | None,
    directions: int,
) -> dict[str, Any]:
    """All that the statistics depend on."""
    return {
        "format": FORMAT,
        "model": model_name(model),
        "fingerprint": identity or patched_fingerprint(model),
        "config": config_hash(model),
        "dtype": str(model.dtype),
        "tokens": sum(map(len, windows)),
        "windows": hashlib.sha256(json.dumps([list(w) for w in windows]).encode()).hexdigest(),
        "blocks": len(sizes),
        "sites": [list(there) for there in sizes],
        "directions": directions,
    }


def _key(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What tells these statistics from others: a model that has moved is the same."""
    return {name: value for name, value in manifest.items() if name != "model"}


@torch.inference_mode()
def _compute(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    sizes: Sequence[Mapping[str, int]],
    directions: int,
    batch_size: int,
    progress: Callable[[int], None] | None,
    keep: bool,
) -> dict[tuple[int, str], dict[str, Tensor]]:
    device = next(model.parameters()).device
    tokens = [pad(windows[i : i + batch_size], PAD, "right").to(device) for i in range(0, len(windows), batch_size)]
    with gathered(model):
        streams = [Stream(model, blocks, batch) for batch in tokens]
    kept: dict[tuple[int, str], dict[str, Tensor]] = {}
    for block, there in zip(blocks, sizes, strict=True):
        sketches = {name: Sketch(size, directions, device) for name, size in there.items()}
        with gathered(block.module):
            for stream in streams:
                output, readings = stream.run(block, tuple(sketches))
                for name, reading in readings.items():
                    a = reading.input[stream.tokens.mask]
                    sketches[name].update(a.to(wider(a.dtype)))
                assert output is not None
                stream.hidden = output
        for name, sketch in sketches.items():
            if not sketch.finite:
                raise SingularSystemError(
                    f"preserve: block {block.index} gives NaN or infinite activations on the unrelated text. "
                    "Check the model's weights and dtype."
                )
            if keep:
                kept[block.index, name] = {part: value.cpu() for part, value in rounded(sketch.prior()).items()}
        if progress is not None:
            progress(block.index + 1)
    return kept


def _valid(
    file: Path, device: torch.device, manifest: Mapping[str, Any], sizes: Sequence[Mapping[str, int]]
) -> Preservation | None:
    """An entry that is complete, of these sizes, and what its name says; a damaged one is made anew."""
    try:
        found = Preservation(file, device, argument="cache_dir")
        found.check_numbers()
    except (OSError, ThoughtError):
        return None
    same = all(found.manifest[name] == value for name, value in _key(manifest).items())
    return found if same and found.sizes == list(sizes) else None
