"""What a fit is to preserve: unrelated text, or a file of its statistics, and who of several processes computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.files import cache_folder, check_writable
from lit_thought.model.blocks import Block
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.weights import patched_fingerprint
from lit_thought.prompts.unrelated import chat_windows, load_texts, text_windows
from lit_thought.settings import FitSettings, TextSource
from lit_thought.statistics.distributed import gather_json
from lit_thought.statistics.preserve import cached_file, entry_of, preservation, preservation_bar, site_sizes, window_of
from lit_thought.statistics.preserve_file import Preservation, is_preservation_file

__all__ = ["Asked", "PreservationSource"]


class Asked(NamedTuple):
    """What a fit wants the statistics of, and for.

    Attributes:
        model, blocks, sites, settings: those of the fit.
        identity: the model's fingerprint.
        directions: k, how many directions of each site are kept one by one.
        texts, chats: the token windows to preserve (:meth:`PreservationSource.windows`).
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    sites: Sequence[str]
    settings: FitSettings
    identity: str
    directions: int
    texts: list[list[int]]
    chats: list[list[int]]


class PreservationSource:
    """What was given as ``preserve``, read: unrelated texts, or a file of statistics.

    Attributes:
        texts: the texts, or None.
        file: the file, or None.
        chats: whether the package's chats come with the texts, which are its own.

    Raises:
        ThoughtError: when it cannot be read.
    """

    def __init__(self, source: TextSource | None) -> None:
        self.file = Preservation(cast(Any, source), argument="preserve") if is_preservation_file(source) else None
        given = source is not None and self.file is None
        self.chats = source == "default"
        self.texts = load_texts(cast(Any, source), "preserve", "preserve") if given else None

    def __bool__(self) -> bool:
        return self.texts is not None or self.file is not None

    def windows(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: FitSettings, apart: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The token windows of the texts, and those of chats; none where no text is to be preserved.

        Args:
            model, tokenizer: those of the fit.
            settings: those of the fit.
            apart: whether the patch is for prompts that are no chats, so that chats are to be preserved, too. (For a
                document, which is asked about in chats, this costs much of what the patch achieves.)

        Raises:
            ThoughtError: when the texts are too short.
        """
        if self.texts is None or settings.preserve_weight == 0:
            return [], []
        how = (window_of(model), settings.preserve_tokens)
        chats = chat_windows(tokenizer, *how) if self.chats and apart else []
        return text_windows(tokenizer, self.texts, *how), chats

    def check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: FitSettings,
        blocks: Sequence[Block],
        sites: Sequence[str],
        directions: int,
        apart: bool,
        identity: str | None = None,
    ) -> None:
        """Refuse, before any long work, a file of another model or without a site of the fit, texts of the caller's
        that are too short, and a cache that cannot be written where it has not what the fit needs.

        Args:
            model, tokenizer, settings, blocks, sites, directions: those of the fit.
            apart: as for :meth:`windows`.
            identity: the model's :func:`~lit_thought.patch.weights.patched_fingerprint`, where it is known.

        Raises:
            ThoughtError: saying what is wrong.
        """
        if self.file is not None:
            self.file.check_model(identity or patched_fingerprint(model), model)
            self.file.check_sites(site_sizes(blocks, sites))
        elif not self.chats:
            self.windows(model, tokenizer, settings, False)
        if not self or settings.preserve_weight == 0 or (self.file is not None and settings.statistics_dir is None):
            return
        try:
            check_writable(cache_folder(settings.cache_dir), "cache_dir")
        except ThoughtError:
            if self.file is not None:
                entry = entry_of(settings.cache_dir, self.file.digest)
            else:
                texts, chats = self.windows(model, tokenizer, settings, apart)
                where = (settings.cache_dir, identity or patched_fingerprint(model), sites, directions)
                entry = cached_file(model, blocks, texts + chats, *where)
            if not entry.is_file():
                raise

    def place(self, asked: Asked) -> str:
        """A sentence that says whether the unrelated text's statistics are there, and where they are kept; empty where
        there is no such text."""
        if not asked.texts:
            return ""
        windows = asked.texts + asked.chats
        where = (asked.settings.cache_dir, asked.identity, asked.sites, asked.directions)
        file = cached_file(asked.model, asked.blocks, windows, *where)
        if file.exists():
            return f"Statistics of unrelated text: in {file.parent}."
        tokens, chats = sum(map(len, windows)), " and chats" if asked.chats else ""
        through = f"{tokens:,} tokens of unrelated text{chats} go through it, for {file.parent}."
        return f"First, once per model and kind of fit, {through}"

    def load(self, trainer: Trainer, asked: Asked, show: bool) -> tuple[Preservation | None, bool | None]:
        """The model's preservation statistics, and whether they came from the cache; all processes call this together,
        after :meth:`check`.

        The first process of each machine computes and writes, the others read; of a sharded model all compute.
        """
        first = trainer.local_rank == 0
        together = is_sharded(asked.model) and self.file is None
        found: tuple[Preservation | None, bool | None] = (None, None)
        failure: Exception | None = None
        if first or together:
            try:
                found = self._load(asked, show and first, first)
            except Exception as error:  # of which the others, who wait here, are to be told
                failure = error
        try:
            gather_json(failure and _told(failure), asked.model.device)
        finally:
            if failure is not None:
                raise failure
        if not (first or together):
            found = self._load(asked, False, True)
        return found

    def _load(self, asked: Asked, show: bool, write: bool) -> tuple[Preservation | None, bool | None]:
        model, settings = asked.model, asked.settings
        if not self or settings.preserve_weight == 0:
            return None, None
        if self.file is not None:
            return self._copied(self.file, settings, next(model.parameters()).device)
        with preservation_bar(len(asked.blocks), show) as progress:
            return preservation(
                *(model, asked.blocks, asked.texts + asked.chats, settings.cache_dir),
                identity=asked.identity,
                progress=progress,
                write=write,
                sites=asked.sites,
                directions=asked.directions,
            )

    def _copied(self, file: Preservation, settings: FitSettings, device: torch.device) -> tuple[Preservation, bool]:
        """The file's statistics, and that nothing was computed: where those of the fit are kept, of a copy in the
        cache, in which they find it later."""
        entry = entry_of(settings.cache_dir, file.digest)
        if settings.statistics_dir is None:
            entry = file.path
            file.check_numbers()
        elif not entry.is_file() or entry.read_bytes() != file.path.read_bytes():
            file.check_numbers()
            file.save(entry, overwrite=True)
        return Preservation(entry, device), True


def _told(error: Exception) -> ThoughtError:
    """An error of one process, for all others."""
    return error if isinstance(error, ThoughtError) else ThoughtError(f"preserve: {type(error).__name__}: {error}")
