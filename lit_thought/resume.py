"""What a fit that was interrupted needs to go on: the patches of its finished stages, and the outputs it had written.

A folder with ``fit.json`` (what the fit was, and the generated outputs) and one file for each finished stage, in the
order of the stages; safetensors and JSON only, each written under a temporary name and renamed. A resumed fit runs its
streams through the finished blocks again, without statistics and solves, and so arrives at the very same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file
from lit_thought.streams import LowRank, SitePatch

__all__ = ["FitProgress"]

_FORMAT = 1
_FIT = "fit.json"


class FitProgress:
    """The finished stages of one fit on disk.

    Args:
        folder: where; created when it is not there.
        identity: JSON values that two fits share exactly when one may go on with the other's stages.
        write: whether this process writes (the first one does).

    Attributes:
        outputs: what was written for pairs without an output: [index, text, finished], or None before that is known.
        stages: how many stages are finished.

    Raises:
        ThoughtError: when the folder belongs to another fit, or is not one of a fit.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], write: bool = True) -> None:
        self.folder, self.write = Path(folder).expanduser(), write
        text = json.dumps(identity, sort_keys=True, allow_nan=False)
        self._fit: dict[str, Any] = {"format": _FORMAT, "fit": hashlib.sha256(text.encode()).hexdigest()}
        self.outputs: list[tuple[int, str, bool]] | None = None
        file = self.folder / _FIT
        if not file.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ThoughtError(
                    f"resume_dir={str(folder)!r} holds something else than an unfinished fit. Choose an empty folder."
                )
        else:
            self._read(file)
        self.stages = 0
        while self._stage_file(self.stages).exists():
            self.stages += 1

    def _read(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            outputs, kind = found["outputs"], (found["format"], found["fit"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ThoughtError(f"resume_dir: {file.name} is not readable ({error}). Delete the folder.") from error
        if kind != (self._fit["format"], self._fit["fit"]):
            raise ThoughtError(
                f"resume_dir={str(self.folder)!r} belongs to another fit: the model, the instruction, the pairs or a "
                "setting differ. Choose another folder, or delete it to start anew."
            )
        self.outputs = [(int(i), str(text), bool(finished)) for i, text, finished in outputs]

    def start(self, outputs: list[tuple[int, str, bool]]) -> None:
        """Record the generated outputs; from here on stages can be saved."""
        self.outputs = outputs
        if self.write:
            with atomic_file(self.folder / _FIT) as file:
                file.write_text(json.dumps({**self._fit, "outputs": outputs}, ensure_ascii=False), encoding="utf-8")

    def save(self, patch: SitePatch, record: Mapping[str, Any]) -> None:
        """Add the next stage: its patch, and JSON values to keep with it."""
        if self.write:
            tensors = {} if patch.matrix is None else {"A": patch.matrix.A, "B": patch.matrix.B}
            if patch.vector is not None:
                tensors["vector"] = patch.vector
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            with atomic_file(self._stage_file(self.stages)) as file:
                save_file(tensors, file, metadata={"record": json.dumps(record)})
        self.stages += 1

    def load(self, stage: int, device: torch.device) -> tuple[SitePatch, dict[str, Any]]:
        """A finished stage's patch and what was kept with it.

        Raises:
            ThoughtError: when its file is damaged.
        """
        file = self._stage_file(stage)
        try:
            with safe_open(file, framework="pt", device=str(device)) as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                record = json.loads((content.metadata() or {})["record"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ThoughtError(f"resume_dir: {file.name} is damaged ({error}). Delete the folder.") from error
        matrix = LowRank(tensors["A"], tensors["B"]) if "A" in tensors else None
        return SitePatch(matrix, tensors.get("vector")), record

    def remove(self) -> None:
        """Delete the folder, once the fit has ended well."""
        if self.write:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stage_file(self, stage: int) -> Path:
        return self.folder / f"stage-{stage:05d}.safetensors"
