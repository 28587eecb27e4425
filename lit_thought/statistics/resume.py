"""What a fit that was interrupted needs to go on: the patches of its finished stages, and what the model had written.

A folder with ``fit.json`` (what the fit was, and the inputs and outputs that the model wrote) and one file for each
finished stage, in the order of the stages, as :mod:`lit_thought.statistics.stage_file` writes them; a fit that saves
its statistics keeps the stages' sums in them, too. A resumed fit runs its streams through the finished blocks again,
without statistics and solves, and finds the same patch to rounding: what it reads are the same bits, aligned as new
tensors are, but a processor may still multiply them otherwise in another process.

What the fit was is kept as a salted hash. Inputs and outputs are kept as they are, or, where no text may be stored, as
a hash too: a resumed fit then writes them again, and is refused if they are other ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file, check_version, check_writable, expanded, is_own_file, read_json, temporary_of
from lit_thought.model.blocks import Site
from lit_thought.prompts.instruction_hash import hash_text, is_text_of
from lit_thought.statistics.stage_file import KeptStage, label
from lit_thought.tensor_files import TensorFile

__all__ = ["UnfinishedFit", "check_unfinished"]

_FORMAT = 3
_FIT = "fit.json"
_NAME = r"(fit\.json|stage-\d{5}\.safetensors)"
_LEFT = temporary_of(_NAME)
"""Hidden folders in which our files are written, as a killed process leaves them."""


def check_unfinished(path: str | os.PathLike[str]) -> None:
    """Refuse a ``resume_dir`` that is no folder of an unfinished fit, or none that can be made and written.

    Raises:
        ThoughtError: saying what it is.
    """
    folder = expanded(path, "resume_dir")
    if folder.exists() and not folder.is_dir():
        raise ThoughtError(f"resume_dir={str(path)!r} is a file; expected a folder. Choose another path.")
    with suppress(FileNotFoundError):  # another process may remove it at its end
        begun = os.path.lexists(folder / _FIT) or not folder.is_dir()
        if not begun and not all(_LEFT.fullmatch(entry.name) for entry in folder.iterdir()):
            raise ThoughtError(
                f"resume_dir={str(path)!r} holds something else than an unfinished fit. Choose an empty folder."
            )
    check_writable(path, "resume_dir")


class UnfinishedFit:
    """The finished stages of one fit on disk.

    Args:
        folder: where; created when it is not there.
        identity: JSON values that two fits share exactly when one may go on with the other's stages.
        write: whether this process writes (the first one does).
        store_text: keep what the model wrote as text, rather than as a hash.

    Attributes:
        inputs: what was written beside the pairs given: ``pairs``, ``template`` and ``kind``; None where nothing was,
            or before that is known.
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
        self.id = uuid.uuid4().hex
        self.inputs: dict[str, Any] | None = None
        self.outputs: list[tuple[int, str, bool]] | None = None
        self._outputs_hash: dict[str, str] | None = None
        check_unfinished(folder)
        file = self.folder / _FIT
        if os.path.lexists(file):
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
            self.id, fit, digest = str(found["id"]), found["fit"], found["outputs_hash"]
            inputs, outputs = found.get("inputs"), found["outputs"]
        except ThoughtError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ThoughtError(f"resume_dir: {file.name} is not readable ({error}). Delete the folder.") from error
        if not is_text_of(fit, self._identity):
            raise ThoughtError(
                f"resume_dir={str(self.folder)!r} belongs to another fit: the model, its configuration or tokenizer, "
                "the instruction, the pairs or a setting differ. Choose another folder, or delete it to start anew."
            )
        if digest is None and not (_are_outputs(outputs) and _are_inputs(inputs)):
            raise ThoughtError(f"resume_dir: {file.name} is damaged: it holds no outputs. Delete the folder.")
        self._outputs_hash = digest
        self.inputs = inputs if digest is None else None
        self.outputs = [(i, text, finished) for i, text, finished in outputs] if digest is None else None

    def start(self, outputs: list[tuple[int, str, bool]], inputs: dict[str, Any] | None = None) -> None:
        """Record what the model wrote; from here on stages can be saved.

        Raises:
            ThoughtError: when it was written again, and is other than that of the finished stages.
        """
        text = json.dumps(outputs if inputs is None else [inputs, outputs])
        if self._outputs_hash is not None and not is_text_of(self._outputs_hash, text):
            raise ThoughtError(
                f"resume_dir={str(self.folder)!r}: the model writes other inputs or outputs than before it was "
                "interrupted, on which the finished stages rest. Delete the folder to start anew."
            )
        self.inputs, self.outputs = inputs, outputs
        if self.write:
            told = {"inputs": inputs, "outputs": outputs, "outputs_hash": None}
            hidden = {"inputs": None, "outputs": None, "outputs_hash": hash_text(text)}
            value = {"format": _FORMAT, "id": self.id, "fit": hash_text(self._identity)}
            with atomic_file(self.folder / _FIT) as file:
                text = json.dumps({**value, **(told if self.store_text else hidden)}, ensure_ascii=False)
                file.write_text(text, encoding="utf-8")

    def save(self, stage: KeptStage) -> None:
        """Add the next stage, solved."""
        if self.write:
            stage.write(self._stage_file(self.stages), self.id)
        self.stages += 1

    def load(self, number: int, device: torch.device, block: int, site: Site) -> KeptStage:
        """A finished stage.

        Args:
            number: which one, in the order of the fit.
            device: where to put its tensors.
            block: index of the block that it must be of.
            site: the site that it must be of.

        Raises:
            ThoughtError: when its file is damaged, or of another stage or fit.
        """
        file = self._stage_file(number)
        content = TensorFile(file, f"resume_dir: {file.name}", "Delete the folder.")
        stage, wanted = KeptStage.read(content, device), label(self.id, block, site.name)
        fits = {key: content.header.get(key) for key in wanted} == wanted
        if not fits or (stage.head.d_in, stage.head.d_out) != (site.d_in, site.d_out) or not stage.is_solved:
            raise content.damaged(f", or not of this fit's {site.name}.")
        return stage

    def remove(self) -> None:
        """Delete what this class writes, and the folder if that is all, once the fit has ended well."""
        if self.write:
            with suppress(OSError):
                for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name == _FIT):  # that one last
                    if re.fullmatch(_NAME, entry.name):
                        entry.unlink()
                    elif _LEFT.fullmatch(entry.name):
                        shutil.rmtree(entry)
                self.folder.rmdir()

    def _stage_file(self, number: int) -> Path:
        return self.folder / f"stage-{number:05d}.safetensors"


def _are_outputs(value: Any) -> bool:
    """Whether these are [index, text, finished], as :meth:`UnfinishedFit.start` keeps them."""
    kinds = (int, str, bool)
    return isinstance(value, list) and all(
        isinstance(entry, list) and [type(part) for part in entry] == list(kinds) for entry in value
    )


def _are_inputs(value: Any) -> bool:
    """Whether these are ``pairs`` of texts, a ``template`` and a ``kind``, or nothing."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"pairs", "template", "kind"}:
        return False
    pairs = value["pairs"]
    return isinstance(pairs, list) and all(
        isinstance(pair, dict) and all(isinstance(text, str) for text in pair.values()) for pair in pairs
    )
