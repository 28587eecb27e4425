"""Mean Gram matrices of unrelated text through the original model, computed once per model and kept on disk.

They are the preservation term of the solve (Z₀ in :mod:`lit_thought.solve.least_squares`): inputs on which a patched
layer should go on doing what it did. One file per block, so that only one block's matrices are ever in memory. To share
them there is a compact form in a single file (:mod:`lit_thought.statistics.preserve_file`), which is unpacked into the
cache.
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
from lit_thought.files import atomic_folder, default_cache_dir, expanded, own_file, read_json
from lit_thought.model.blocks import Block, require_site
from lit_thought.model.discovery import wider
from lit_thought.model.loading import fingerprint, model_name
from lit_thought.model.sharding import gathered, is_sharded
from lit_thought.prompts.batches import pad
from lit_thought.runs.streams import Stream
from lit_thought.settings import DEFAULT_SITES, check_sites
from lit_thought.solve.gram import add_products, mirror
from lit_thought.solve.least_squares import Prior
from lit_thought.statistics.distributed import gather_json
from lit_thought.statistics.preserve_file import (
    DEFAULT_RANK,
    PreservationFile,
    Storage,
    check_settings,
    check_suffix,
    config_hash,
    pack,
)
from lit_thought.tensor_files import TensorFile, write_tensors

__all__ = [
    "WINDOW",
    "Preservation",
    "preservation",
    "preservation_bar",
    "site_sizes",
    "unpack",
]

WINDOW = 256
"""Tokens of each window of unrelated text."""

_FORMAT = 5
_MANIFEST = "manifest.json"
_PARTS = ("values", "vectors", "gram")
_REMEDY = "Delete the cache's folder, which is made anew."


class Preservation:
    """The cached matrices of one model and one text.

    Args:
        folder: the cache entry.
        device: where :meth:`prior` puts its tensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def prior(self, block: Block, site: str) -> Prior:
        """Z₀ of one site: the mean of a aᵀ over the unrelated tokens, as a
        :class:`~lit_thought.solve.least_squares.Prior`.

        Raises:
            ThoughtError: when the cache's file is damaged or gone.
        """
        file = _file(self.folder, block.index)
        found = _opened(file).read(f"{site}.", self.device, copy=False)  # of the Gram matrix little is used
        if found.keys() != set(_PARTS):
            raise ThoughtError(f"{file.name} of the cache has no {site}. {_REMEDY}")
        return Prior(*(found[part] for part in _PARTS))

    def save(
        self,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        blocks: Sequence[Block],
        sites: Sequence[str] = DEFAULT_SITES,
        rank: int | None = DEFAULT_RANK,
        storage: Storage = "int8",
        overwrite: bool = False,
    ) -> None:
        """Write them to one small file, for ``preserve=`` of a fit on another machine.

        Args:
            path: the file; its suffix must be ``.safetensors``.
            model: the model that they are of, with its ``blocks``.
            sites: attn_out, mlp_in, mlp_out or several: where fits with the file can patch.
            rank: k, how many directions are kept exactly; of the others, the diagonal of what they add. None for all.
            storage: dtype of the numbers: int8, float16 or float32.
            overwrite: replace the file if it exists.

        Raises:
            ThoughtError: for a setting out of range, a path that cannot be written, or a site that is not there.
        """
        check_settings(rank, storage)
        check_suffix(path, "path")
        chosen = check_sites(sites)
        for name in chosen if chosen != DEFAULT_SITES else ():
            require_site(blocks, name)
        manifest = read_json(self.folder / _MANIFEST)
        if "file" in manifest:
            raise ThoughtError("these preservation statistics are from a file and would lose again; copy that file.")
        matrices = {}
        for block in blocks:
            for site in block.stages(chosen):
                prior = self.prior(block, site)
                assert prior.vectors is not None  # the cache has them
                matrices[block.index, site] = pack(prior.values, prior.vectors, rank, storage)
        whole = {**manifest, "config": config_hash(model), "rank": rank, "storage": storage}
        PreservationFile.write(path, whole, matrices, overwrite)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        blocks: Sequence[Block],
        sites: Sequence[str] = DEFAULT_SITES,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Preservation:
        """Read a file that :meth:`save` wrote, by way of the cache (:func:`unpack`).

        Args:
            path: the file.
            model: the model that they are to be used with, with its ``blocks``.
            sites: the sites that they are needed for.
            cache_dir: cache folder, :func:`~lit_thought.files.default_cache_dir` when left out.
            progress: called with the number of blocks done.

        Raises:
            ThoughtError: when the file is damaged, is another model's, or lacks a site.
        """
        file = PreservationFile(path)
        file.check_model(fingerprint(model), model)
        file.check_sites(site_sizes(blocks, sites))
        return unpack(file, next(model.parameters()).device, cache_dir, progress)[0]


def preservation(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    identity: str | None = None,
    progress: Callable[[int], None] | None = None,
    write: bool = True,
) -> tuple[Preservation, bool]:
    """Load the matrices for these token windows from the cache, or compute them and keep them there.

    The entry's name is a hash of everything that changes its content: the model's weights and configuration,
    the token ids, the format. Sums are float64, of products in float32 or better; the matrices and their eigenvectors
    are stored in float32.

    Args:
        model: the original, unpatched model.
        blocks: its blocks.
        windows: token ids of each window.
        cache_dir: cache folder, :func:`~lit_thought.files.default_cache_dir` when left out.
        batch_size: windows a batch.
        identity: the model's fingerprint, where it is known already.
        progress: called with the number of blocks done.
        write: whether this process keeps what it computes. The processes of a sharded model compute together, and one
            of each machine writes; the others can read once it is done.

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

    def fill(folder: Path | None) -> None:
        _compute(model, blocks, windows, folder, batch_size, progress)

    folder = _place(manifest, cache_dir)
    cached = _valid(folder, manifest, [{name: site.d_in for name, site in block.sites.items()} for block in blocks])
    if is_sharded(model):
        cached = all(gather_json(cached, device))
    if not cached and write:
        _write(folder, manifest, fill)
    elif not cached:
        fill(None)
    return Preservation(folder, device), cached


def unpack(
    file: PreservationFile,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Preservation, bool]:
    """Load the matrices of a file from the cache, or decompose them and keep them there.

    Args:
        file: the file, known to fit the model.
        device: where to decompose them and to put what is read.
        cache_dir: cache folder, :func:`~lit_thought.files.default_cache_dir` when left out.
        progress: called with the number of blocks done.

    Returns:
        The matrices, and whether they came from the cache.

    Raises:
        ThoughtError: when the file is damaged.
    """

    # float32 takes half as long, and is a thousand times finer than 8 or 16 bits
    precision = torch.float64 if file.manifest["storage"] == "float32" else torch.float32

    def fill(folder: Path) -> None:
        for index, names in enumerate(file.sites):
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= _tensors(name, file.gram(index, name, device), precision)
            write_tensors(_file(folder, index), tensors, hashed=())
            if progress is not None:
                progress(index + 1)

    manifest = {**file.manifest, "file": file.digest}
    folder = _place(manifest, cache_dir)
    cached = _valid(folder, manifest, file.sizes)
    if not cached:
        _write(folder, manifest, fill)
    return Preservation(folder, device), cached


def site_sizes(blocks: Sequence[Block], sites: Sequence[str]) -> list[dict[str, int]]:
    """Of each block the sites of a fit, with their d_in."""
    return [{name: block.sites[name].d_in for name in block.stages(sites)} for block in blocks]


@contextmanager
def preservation_bar(blocks: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar, and what to call with the number of blocks done."""
    with tqdm(
        total=blocks, desc="Preservation statistics (once per model)", unit="block", disable=not show, leave=False
    ) as bar:
        yield lambda done: bar.update(done - bar.n) and None


def _place(manifest: dict[str, Any], cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache's folder for a manifest."""
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:24]
    root = expanded(cache_dir, "cache_dir") if cache_dir is not None else default_cache_dir()
    return root / f"preserve-{key}"


def _write(folder: Path, manifest: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Fill an entry of the cache, complete or not at all."""
    with atomic_folder(folder, overwrite=True) as temporary:
        fill(temporary)
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def _compute(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Sequence[Sequence[int]],
    folder: Path | None,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> None:
    device = next(model.parameters()).device
    tokens = [pad(windows[i : i + batch_size], 0, "right").to(device) for i in range(0, len(windows), batch_size)]
    with gathered(model):
        streams = [Stream(model, blocks, batch) for batch in tokens]
    count = sum(map(len, windows))
    for block in blocks:
        sizes = {name: site.d_in for name, site in block.sites.items()}
        grams = {n: torch.zeros(d, d, dtype=torch.float64, device=device) for n, d in sizes.items()}
        with gathered(block.module):
            for stream in streams:
                output, readings = stream.run(block, tuple(block.sites))
                for name, reading in readings.items():
                    a = reading.input[stream.tokens.mask]
                    add_products(grams[name], a.to(wider(a.dtype)))
                assert output is not None
                stream.hidden = output
        tensors: dict[str, Tensor] = {}
        for name, gram in grams.items():
            if not bool(torch.isfinite(gram).all()):
                raise SingularSystemError(
                    f"preserve: block {block.index} gives NaN or infinite activations on the unrelated text. "
                    "Check the model's weights and dtype."
                )
            if folder is not None:
                tensors |= _tensors(name, mirror(gram) / count, torch.float64)
        if folder is not None:
            write_tensors(_file(folder, block.index), tensors, hashed=())
        if progress is not None:
            progress(block.index + 1)


def _tensors(name: str, gram: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    """What the cache keeps of one site's mean Gram matrix, (d_in, d_in); ``precision`` is that of its decomposition."""
    values, vectors = torch.linalg.eigh(gram.to(precision))
    kept = (values.double().clamp_min(0), vectors.float(), gram.float())
    return {f"{name}.{part}": tensor for part, tensor in zip(_PARTS, kept, strict=True)}


def _file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:04d}.safetensors"


def _opened(file: Path) -> TensorFile:
    return TensorFile(file, f"{file.name} of the cache", _REMEDY)


def _valid(folder: Path, manifest: dict[str, Any], sizes: Sequence[Mapping[str, int]]) -> bool:
    """Whether an entry is complete, of these sizes, and is what its name says; a damaged one is made anew."""
    try:
        found = read_json(folder / _MANIFEST)
        return found == manifest and all(_complete(_file(folder, index), own) for index, own in enumerate(sizes))
    except (OSError, ValueError):
        return False


def _complete(file: Path, sizes: Mapping[str, int]) -> bool:
    content = _opened(own_file(file, "a file of the cache"))
    shapes = {f"{name}.{part}": (d,) if part == "values" else (d, d) for name, d in sizes.items() for part in _PARTS}
    return content.shapes == shapes and set(content.dtypes.values()) <= {"F32", "F64"}
