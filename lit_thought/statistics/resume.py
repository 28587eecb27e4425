"""What a fit that was interrupted needs to go on: the patches of its finished stages, and the outputs it had written.

A folder with ``fit.json`` (what the fit was, and the generated outputs) and one file for each finished stage, in the
order of the stages; safetensors and JSON only, each written under a temporary name and renamed. A resumed fit runs its
streams through the finished blocks again, without statistics and solves, and so arrives at the very same bits.

What the fit was is kept as a salted hash. The outputs are kept as they are, or, where no text may be stored, as a hash
too: a resumed fit then writes them again, and is refused if they are other ones.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file, check_version, expanded, is_own_file, parse_json, read_json
from lit_thought.model.blocks import Site
from lit_thought.prompts.instruction_hash import hash_text, is_text_of
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.factors import Factors
from lit_thought.tensor_files import TensorFile, write_tensors

__all__ = ["FitProgress"]

_FORMAT = 2
_FIT = "fit.json"
_NAME = r"(fit\.json|stage-\d{5}\.safetensors)"
_LEFT = re.compile(rf"\.{_NAME}\.[0-9a-f]{{12}}\.tmp\.\w+")
"""Temporary names of our files, as a killed process leaves them."""


class FitProgress:
    """The finished stages of one fit on disk.

    Args:
        folder: where; created when it is not there.
        identity: JSON values that two fits share exactly when one may go on with the other's stages.
        write: whether this process writes (the first one does).
        store_text: keep the outputs as text, rather than as a hash.

    Attributes:
        outputs: what was written for pairs without an output: [index, text, finished], or None before that is known.
        stages: how many stages are finished.

    Raises:
        ThoughtError: when the folder belongs to another fit, is damaged or of another version, or is not one of a fit.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, Any],
        write: bool = True,
        store_text: bool = True,
    ) -> None:
        self.folder, self.write, self.store_text = expanded(folder, "resume_dir"), write, store_text
        self._identity = json.dumps(identity, sort_keys=True, allow_nan=False)
        self.outputs: list[tuple[int, str, bool]] | None = None
        self._outputs_hash: dict[str, str] | None = None
        file = self.folder / _FIT
        if self.folder.exists() and not self.folder.is_dir():
            raise ThoughtError(f"resume_dir={str(folder)!r} is a file; expected a folder. Choose another path.")
        if not os.path.lexists(file):
            if self.folder.is_dir() and not all(_LEFT.fullmatch(entry.name) for entry in self.folder.iterdir()):
                raise ThoughtError(
                    f"resume_dir={str(folder)!r} holds something else than an unfinished fit. Choose an empty folder."
                )
        else:
            self._read(file)
        self.stages = 0
        while is_own_file(self._stage_file(self.stages)):
            self.stages += 1

    def _read(self, file: Path) -> None:
        try:
            if not is_own_file(file):
                raise ValueError("it is no file of this folder")
            found = read_json(file)
            remedy = "Delete the folder to start anew, or go on with the version that wrote it."
            check_version(found, "format", _FORMAT, f"resume_dir: {file.name}", remedy)
            fit, outputs, digest = (found[key] for key in ("fit", "outputs", "outputs_hash"))
        except ThoughtError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ThoughtError(f"resume_dir: {file.name} is not readable ({error}). Delete the folder.") from error
        if not is_text_of(fit, self._identity):
            raise ThoughtError(
                f"resume_dir={str(self.folder)!r} belongs to another fit: the model, the instruction, the pairs or a "
                "setting differ. Choose another folder, or delete it to start anew."
            )
        if digest is None and not _are_outputs(outputs):
            raise ThoughtError(f"resume_dir: {file.name} is damaged: it holds no outputs. Delete the folder.")
        self._outputs_hash = digest
        self.outputs = [(i, text, finished) for i, text, finished in outputs] if digest is None else None

    def start(self, outputs: list[tuple[int, str, bool]]) -> None:
        """Record the generated outputs; from here on stages can be saved.

        Raises:
            ThoughtError: when they were written again, and are other ones than those of the finished stages.
        """
        text = json.dumps(outputs)
        if self._outputs_hash is not None and not is_text_of(self._outputs_hash, text):
            raise ThoughtError(
                f"resume_dir={str(self.folder)!r}: the model writes other outputs than before it was interrupted, on "
                "which the finished stages rest. Delete the folder to start anew."
            )
        self.outputs = outputs
        if self.write:
            kept = {"outputs": outputs, "outputs_hash": None}
            hidden = {"outputs": None, "outputs_hash": hash_text(text)}
            record = {"format": _FORMAT, "fit": hash_text(self._identity), **(kept if self.store_text else hidden)}
            with atomic_file(self.folder / _FIT) as file:
                file.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    def save(self, patch: SitePatch, record: Mapping[str, Any]) -> None:
        """Add the next stage: its patch, and JSON values to keep with it."""
        if self.write:
            tensors = {} if patch.matrix is None else {"A": patch.matrix.A, "B": patch.matrix.B}
            if patch.vector is not None:
                tensors["vector"] = patch.vector
            write_tensors(self._stage_file(self.stages), tensors, {"record": json.dumps(record)})
        self.stages += 1

    def load(self, stage: int, device: torch.device, site: Site) -> tuple[SitePatch, dict[str, Any]]:
        """A finished stage's patch and what was kept with it.

        Raises:
            ThoughtError: when its file is damaged, or not of this site.
        """
        file = self._stage_file(stage)
        content = TensorFile(file, f"resume_dir: {file.name}", "Delete the folder.")
        tensors = content.read(device=device)
        try:
            record = parse_json(content.header["record"])
        except (ValueError, KeyError) as error:
            raise ThoughtError(f"resume_dir: {file.name} is damaged ({error}). Delete the folder.") from error
        if not _fits(tensors, site) or not _is_record(record):
            raise ThoughtError(
                f"resume_dir: {file.name} is damaged, or not of this fit's {site.name}. Delete the folder."
            )
        matrix = Factors(tensors["A"], tensors["B"]) if "A" in tensors else None
        return SitePatch(matrix, tensors.get("vector")), record

    def remove(self) -> None:
        """Delete what this class writes, and the folder if that is all, once the fit has ended well."""
        if self.write:
            with suppress(OSError):
                for entry in list(self.folder.iterdir()):
                    if re.fullmatch(_NAME, entry.name) or _LEFT.fullmatch(entry.name):
                        entry.unlink()
                self.folder.rmdir()

    def _stage_file(self, stage: int) -> Path:
        return self.folder / f"stage-{stage:05d}.safetensors"


def _are_outputs(value: Any) -> bool:
    """Whether these are [index, text, finished], as :meth:`FitProgress.start` keeps them."""
    kinds = (int, str, bool)
    return isinstance(value, list) and all(
        isinstance(entry, list) and [type(part) for part in entry] == list(kinds) for entry in value
    )


def _fits(tensors: Mapping[str, torch.Tensor], site: Site) -> bool:
    """Whether these are the tensors of a patch of the site, in float32 or better."""
    if any(tensor.dtype not in (torch.float32, torch.float64) for tensor in tensors.values()) or not tensors:
        return False
    rank = max(1, len(tensors["A"])) if "A" in tensors and tensors["A"].ndim else 0
    wanted = {"A": (rank, site.d_in), "B": (site.d_out, rank), "vector": (site.d_out,)}
    whole = tensors.keys() in ({"A", "B"}, {"vector"}, {"A", "B", "vector"})
    return whole and all(tuple(tensor.shape) == wanted[name] for name, tensor in tensors.items())


def _is_record(value: Any) -> bool:
    """Whether it holds a stage's figures and the history up to it."""
    figures, history = (value.get(key) if isinstance(value, dict) else None for key in ("figures", "history"))
    rows = [figures, *history] if isinstance(history, list) else [None]
    return all(isinstance(row, dict) and all(isinstance(x, (int, float)) for x in row.values()) for row in rows)
