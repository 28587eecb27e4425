"""Mean Gram matrices of unrelated text through the original model, computed once per model and kept on disk.

They are the preservation term of the solve (Z₀ in :mod:`lit_thought.solve`): inputs on which a patched layer
should go on doing what it did. One file per block, so that only one block's matrices are ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lit_thought.batches import pad
from lit_thought.blocks import Block
from lit_thought.errors import SingularSystemError
from lit_thought.files import atomic_folder
from lit_thought.models import fingerprint, model_name
from lit_thought.solve import Prior
from lit_thought.streams import Stream

__all__ = ["WINDOW", "Preservation", "default_cache_dir", "preservation"]

WINDOW = 256
"""Tokens of each window of unrelated text."""

_FORMAT = 4
_PARTS = ("values", "vectors", "gram")


def default_cache_dir() -> Path:
    """``$LIT_THOUGHT_CACHE``, else ``$XDG_CACHE_HOME/lit_thought``, else ``~/.cache/lit_thought``."""
    if chosen := os.environ.get("LIT_THOUGHT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_thought"


class Preservation:
    """The cached matrices of one model and one text.

    Args:
        folder: the cache entry.
        device: where :meth:`prior` puts its tensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def prior(self, block: Block, site: str) -> Prior:
        """Z₀ of one site: the mean of a aᵀ over the unrelated tokens, as a :class:`~lit_thought.solve.Prior`."""
        with safe_open(_file(self.folder, block), framework="pt", device=str(self.device)) as content:
            return Prior(*(content.get_tensor(f"{site}.{part}") for part in _PARTS))


def preservation(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    identity: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Preservation, bool]:
    """Load the matrices for these token windows from the cache, or compute them and keep them there.

    The entry's name is a hash of everything that changes its content: the model's weights and configuration,
    the token ids, the format. Sums are float64; the matrices and their eigenvectors are stored in float32.

    Args:
        model: the original, unpatched model.
        blocks: its blocks.
        windows: token ids of each window.
        cache_dir: cache folder, :func:`default_cache_dir` when left out.
        batch_size: windows a batch.
        identity: the model's fingerprint, where it is known already.
        progress: called with the number of blocks done.

    Returns:
        The matrices, and whether they came from the cache.
    """
    device = next(model.parameters()).device
    manifest = {
        "format": _FORMAT,
        "model": model_name(model),
        "fingerprint": identity or fingerprint(model),
        "config": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "dtype": str(model.dtype),
        "tokens": sum(map(len, windows)),
        "windows": hashlib.sha256(json.dumps([list(w) for w in windows]).encode()).hexdigest(),
        "blocks": len(blocks),
    }
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:24]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / f"preserve-{key}"
    if _valid(folder, manifest, blocks):
        return Preservation(folder, device), True
    with atomic_folder(folder, overwrite=True) as temporary:
        _compute(model, blocks, windows, temporary, batch_size, progress)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Preservation(folder, device), False


@torch.inference_mode()
def _compute(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    folder: Path,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> None:
    device = next(model.parameters()).device
    tokens = [pad(windows[i : i + batch_size], 0, "right").to(device) for i in range(0, len(windows), batch_size)]
    streams = [Stream(model, blocks, batch) for batch in tokens]
    count = sum(map(len, windows))
    for block in blocks:
        sizes = {name: site.d_in for name, site in block.sites.items()}
        grams = {n: torch.zeros(d, d, dtype=torch.float64, device=device) for n, d in sizes.items()}
        for stream in streams:
            output, readings = stream.run(block, tuple(block.sites))
            for name, reading in readings.items():
                a = reading.input[stream.tokens.mask].double()
                grams[name].addmm_(a.T, a)
            assert output is not None
            stream.hidden = output
        tensors = {}
        for name, gram in grams.items():
            if not bool(torch.isfinite(gram).all()):
                raise SingularSystemError(
                    f"preserve: block {block.index} gives NaN or infinite activations on the unrelated text. "
                    "Check the model's weights and dtype."
                )
            prior = Prior.from_gram(gram / count)
            tensors[f"{name}.values"] = prior.values.cpu()
            tensors[f"{name}.vectors"] = prior.vectors.float().cpu().contiguous()
            tensors[f"{name}.gram"] = (gram / count).float().cpu()
        save_file(tensors, _file(folder, block))
        if progress is not None:
            progress(block.index + 1)


def _file(folder: Path, block: Block) -> Path:
    return folder / f"block-{block.index:04d}.safetensors"


def _valid(folder: Path, manifest: dict[str, Any], blocks: Sequence[Block]) -> bool:
    """Whether an entry is complete and is what its name says; a damaged one is made anew."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return found == manifest and all(_complete(folder, block) for block in blocks)
    except (OSError, ValueError, SafetensorError):
        return False


def _complete(folder: Path, block: Block) -> bool:
    with safe_open(_file(folder, block), framework="pt") as content:  # refuses a truncated file
        return set(content.keys()) == {f"{name}.{part}" for name in block.sites for part in _PARTS}
