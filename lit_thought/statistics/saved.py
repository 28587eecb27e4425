"""The statistics of a whole fit, kept in a folder: ``manifest.json`` and one safetensors file a stage.

A stage is one site of one block; of several steps the last one's is kept, with the patch that was there when
its sums were taken. Stages are read one by one when they are asked for: at d_ff 14336 a single Gram matrix is 1.6 GB.

Sums add over sets of pairs, Z = Z₁ + Z₂ and C = C₁ + C₂, and subtract (:meth:`SavedStatistics.merge`,
:meth:`SavedStatistics.subtract`). That is exact where no stage's sums depend on patches that the fit solved before it,
nor on all pairs of the fit, which :meth:`SavedStatistics.inexact` looks into.
:func:`lit_thought.statistics.solve.solve_saved` makes patches of them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import (
    atomic_folder,
    check_version,
    expanded,
    own_file,
    read_json,
    writing,
)
from lit_thought.model.loading import as_device
from lit_thought.runs.streams import SitePatch
from lit_thought.statistics.manifest import Manifest
from lit_thought.statistics.stage_file import KeptStage, StageHead, label
from lit_thought.tensor_files import TensorFile

__all__ = [
    "FORMAT_VERSION",
    "SavedStatistics",
    "StatisticsWriter",
]

FORMAT_VERSION = 1
"""Of ``manifest.json``; rises when an older reader would misread the folder."""

MANIFEST = "manifest.json"


class _AbortedError(Exception):
    """Ends the writer's temporary folder."""


class StatisticsWriter:
    """Writes the stages of a fit one after another; the folder is there once :meth:`close` has run, or not at all.

    As a context manager it closes at the end of the block, and aborts on an exception.

    Args:
        folder: where to.
        manifest: which fit it is.
        overwrite: replace the folder if it exists.

    Raises:
        ThoughtError: when the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, overwrite: bool = False) -> None:
        self.id, self._manifest = uuid.uuid4().hex, asdict(manifest)  # a copy: the provenance grows as the fit goes on
        Manifest.from_json(self._manifest)
        self._heads: dict[tuple[int, str], StageHead] = {}
        self._open = ExitStack()
        self._target = folder
        self._folder = self._open.enter_context(atomic_folder(folder, overwrite))

    def add(self, stage: KeptStage) -> None:
        """Write a stage's sums, without its patch; one of the same block and site takes the place of the one before."""
        head = stage.head
        self._heads[head.block, head.site] = head
        index = list(self._heads).index((head.block, head.site))
        with writing(self._target, self._folder):
            stage.solved(SitePatch(), {}).write(self._folder / _file_name(index), self.id)

    def close(self) -> None:
        """Write the manifest, and put the folder where it belongs.

        Raises:
            ThoughtError: without a stage; nothing is left then.
        """
        if not self._heads:
            self.abort()
            raise ThoughtError("there are no statistics to save: no stage was added.")
        stages = [asdict(head) for head in self._heads.values()]
        value = {"format_version": FORMAT_VERSION, "id": self.id, **self._manifest, "stages": stages}
        with self._open:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
            (self._folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Leave nothing behind. Does nothing once the writer is closed."""
        self._open.__exit__(_AbortedError, _AbortedError(), None)

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class SavedStatistics:
    """The statistics of a fit, read stage by stage when they are needed.

    Attributes:
        manifest: which fit it was.
        heads: its stages, in order.
        device: where stages are put.

    Example:
        >>> both = SavedStatistics.load("first/") + SavedStatistics.load("second/")  # doctest: +SKIP
        >>> both.save("both/")  # doctest: +SKIP
    """

    def __init__(
        self,
        manifest: Manifest,
        heads: tuple[StageHead, ...],
        read: Callable[[int], KeptStage],
        device: torch.device,
    ) -> None:
        self.manifest, self.heads, self.device, self._read = manifest, heads, device, read

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> SavedStatistics:
        """Open a folder that :class:`StatisticsWriter` or :meth:`save` wrote, and check that it is whole.

        Args:
            folder: the folder.
            device: where to put the stages, and to solve.

        Raises:
            PatchError: when a file is missing, damaged, outside the folder, of another save or of another version.
        """
        root, device = expanded(folder, "folder").absolute(), as_device(device) or torch.device("cpu")
        if not root.is_dir():
            raise PatchError(f"folder={str(folder)!r} is not a folder; expected the statistics_dir of a fit.")
        value = _read_manifest(root)
        try:
            manifest = Manifest.from_json(value)
            heads = tuple(map(StageHead.from_json, value["stages"]))
            if not heads or len({(head.block, head.site) for head in heads}) < len(heads):
                raise ValueError("it names no stage, or one of them twice")
            if not all(head.parts for head in heads):
                raise ValueError("it names a stage without sums")
        except (KeyError, TypeError, ValueError) as error:
            raise PatchError(f"{MANIFEST} in {root.name!r} is damaged ({error}). Copy or save it again.") from error
        for index, head in enumerate(heads):
            _opened(root, index, head, value.get("id"))

        def read(index: int) -> KeptStage:
            return KeptStage.read(_opened(root, index, heads[index], value.get("id")), device, heads[index])

        return cls(manifest, heads, read, device)

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        name, order = self.manifest.provenance.get("model"), self.manifest.settings["order"]
        tokens = max(head.tokens for head in self.heads)
        return f"SavedStatistics(model={name!r}, stages={len(self)}, tokens={tokens}, order={order!r})"

    def stage(self, index: int) -> KeptStage:
        """Read one stage.

        Raises:
            PatchError: when its file is damaged.
        """
        return self._read(index)

    def stages(self) -> Iterator[KeptStage]:
        """Read one stage after the other."""
        return map(self.stage, range(len(self)))

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the statistics to a folder of their own.

        Raises:
            ThoughtError: when the folder cannot be written.
        """
        with StatisticsWriter(folder, self.manifest, overwrite) as writer:
            for stage in self.stages():
                writer.add(stage)

    def coupling(self) -> str | None:
        """Why sums of one stage depend on patches that the fit solved, or None where they depend on the pairs alone.

        Then other pairs or other settings of the solve would have given other sums, at the same tokens.
        """
        settings, uncompared = self.manifest.settings, self.manifest.uncompared
        if any(head.start for head in self.heads):
            return "the fit took several steps, and each starts from the patch of the one before"
        if len(self.heads) == 1:
            return None
        if settings["order"] != "teacher-forced":
            return f"order={settings['order']!r}: only the first stage's inputs have not gone through a patch"
        if len({head.block for head in self.heads}) < len(self.heads):
            return "a block's second site reads what has gone through the patch of its first one"
        if uncompared:
            return (
                f"{uncompared} tokens of the plain runs have no counterpart in the instructed ones (such as a first "
                "token where the tokenizer puts no BOS), so that they reach a block through the patches before it"
            )
        return None

    def inexact(self) -> str | None:
        """Why sums of this fit and of others do not add to those of a fit of all their pairs, or None where they do:
        their :meth:`coupling`, or weights of the tokens that depend on all pairs of a fit."""
        if self.manifest.settings.get("answers_weighed"):
            return (
                "the instruction is a long one, and what an answer's token weighs depends on the answers of all pairs "
                "of its fit"
            )
        return self.coupling()

    def merge(self, other: SavedStatistics, approximate: bool = False) -> SavedStatistics:
        """The statistics of two sets of pairs that share none; stages are read and added when they are asked for.

        Args:
            other: of the same model, sites, order and settings.
            approximate: add sums, too, that depend on the patches, or on all pairs, of the fit that they come from
                (:meth:`inexact`). Exact are, of instructions that are not long, those of a
                single stage, and with order="teacher-forced" those of one site a block.

        Raises:
            ThoughtError: when they do not belong together, or are not exact without ``approximate``.
        """
        return self._combined(other, 1, approximate)

    def subtract(self, other: SavedStatistics, approximate: bool = False) -> SavedStatistics:
        """The statistics of the pairs that ``other`` lacks, to rounding; its pairs must be among these.

        Args:
            other: as for :meth:`merge`.
            approximate: as for :meth:`merge`.

        Raises:
            ThoughtError: as for :meth:`merge`, and when nothing is left.
        """
        return self._combined(other, -1, approximate)

    __add__ = merge
    __sub__ = subtract

    def _combined(self, other: SavedStatistics, sign: int, approximate: bool) -> SavedStatistics:
        reason = self.inexact() or other.inexact()
        manifest = self.manifest.combined(other.manifest, sign, reason is not None)
        mine, theirs = ([head.layer for head in each.heads] for each in (self, other))
        if mine != theirs:
            named = [", ".join(f"{head.name} ({'+'.join(head.parts)})" for head in heads) for heads in (mine, theirs)]
            raise ThoughtError(f"statistics of different stages cannot be combined: {named[0]}; and {named[1]}.")
        if any(head.start for head in self.heads):
            raise ThoughtError(f"these statistics cannot be combined: {reason}. Fit with steps=1.")
        if reason is not None and not approximate:
            raise ThoughtError(
                f"these statistics do not add exactly: {reason}. Exact are fits of one site a block with "
                'order="teacher-forced", or of a single block, of instructions that are not long. Pass '
                "approximate=True (merge, subtract) to do it anyway."
            )
        heads = tuple(a.combined(b, sign) for a, b in zip(self.heads, other.heads, strict=True))
        if any(head.weight <= 0 for head in heads):
            raise ThoughtError("nothing is left: the statistics to subtract hold as many tokens, or more.")
        return SavedStatistics(
            manifest, heads, lambda index: self.stage(index).combined(other.stage(index), sign), self.device
        )


def _file_name(index: int) -> str:
    return f"stage-{index:04d}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = own_file(folder / MANIFEST, "a folder of saved statistics", PatchError)
    try:
        value = read_json(file)
    except (ValueError, OSError) as error:
        raise PatchError(f"{MANIFEST} in {folder.name!r} is not readable JSON ({error}). Save it again.") from error
    remedy = "Upgrade lit-thought, or save the statistics again."
    check_version(value, "format_version", FORMAT_VERSION, f"{MANIFEST} in {folder.name!r}", remedy, PatchError)
    return dict(value)


def _opened(folder: Path, index: int, head: StageHead, identity: Any) -> TensorFile:
    """A stage's file, whole and of this save."""
    file = own_file(folder / _file_name(index), "a folder of saved statistics", PatchError)
    content = TensorFile(file, f"{file.name} in {folder.name!r}", "Copy or save it again.", PatchError)
    wanted = label(str(identity), head.block, head.site)
    if {key: content.header.get(key) for key in wanted} != wanted:
        raise PatchError(f"{file.name} in {folder.name!r} is not that of {head.name}: the folder mixes two saves.")
    return content
