"""What a fit needs before its first stage: outputs that are missing, the model's identity, preservation, validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Trainer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.data import PairDataModule, Written
from lit_thought.model.blocks import Block
from lit_thought.model.loading import context_window, fingerprint
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.runs.generate import generate
from lit_thought.settings import FitSettings, TextSource
from lit_thought.statistics.distributed import gather_json, share
from lit_thought.statistics.preserve import WINDOW, Preservation, preservation, preservation_bar, site_sizes, unpack
from lit_thought.statistics.preserve_file import PreservationFile, is_preservation_file

__all__ = ["PreservationSource", "Validation", "common_fingerprint", "prepare_pairs", "write_outputs"]


def prepare_pairs(
    data: PairDataModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool = False,
) -> None:
    """Tokenise all pairs of ``data``, write their missing outputs, and batch them, at its answer weight or 10.

    Raises:
        ThoughtError: when a prompt overflows the context window.
    """
    limit = context_window(model)
    data.tokenise(tokenizer, limit)
    data.complete(tokenizer, write_outputs(data, model, tokenizer, progress), limit)
    weight = data.settings.settled().answer_weight
    assert weight is not None
    data.select(tokenizer, range(len(data.pairs)), weight, model.device)


def write_outputs(
    data: PairDataModule, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> list[Written]:
    """What the instructed model writes where an output is missing; pairs with one instruction share its run.

    Each process writes its share, and of a sharded model, whose processes must go through it together, all of them.

    Args:
        data: the pairs, tokenised; what is :attr:`~PairDataModule.known` is not written again.
        model: the instructed model.
        tokenizer: its tokenizer.
        progress: show a progress bar.
    """
    if data.known is not None:
        return data.known
    missing: dict[str, list[int]] = {}
    for i in data.missing if is_sharded(model) else share(data.missing):
        missing.setdefault(data.instructions[i], []).append(i)
    total = sum(map(len, missing.values()))
    own: list[Written] = []
    settings = data.settings
    with tqdm(total=total, desc="Generating outputs", unit="pair", disable=not progress or total == 0) as bar:
        for members in missing.values():
            before = bar.n
            outputs = generate(
                model,
                tokenizer,
                [data.tokenised[i].instructed_ids for i in members],
                stop=data.template.stop,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                seed=settings.seed,
                progress=lambda done, before=before: bar.update(before + done - bar.n),  # type: ignore[misc]
                options=settings.generate or {},
                keep_special=data.template.is_chat,
            )
            own += [(i, output.text, output.finished) for i, output in zip(members, outputs, strict=True)]
    every = {i: (i, text, finished) for part in gather_json(own, model.device) for i, text, finished in part}
    return [every[i] for i in sorted(every)]


def common_fingerprint(model: PreTrainedModel) -> str:
    """The model's fingerprint.

    Raises:
        ThoughtError: when the processes of a fit hold different weights.
    """
    found = fingerprint(model)
    if len(set(gather_json(found, model.device))) > 1:
        raise ThoughtError("model: the processes of this fit hold different weights. Load the same in each.")
    return found


class PreservationSource:
    """What was given as ``preserve``, read: unrelated texts, or a file of statistics.

    Attributes:
        texts: the texts, or None.
        file: the file, or None.

    Raises:
        ThoughtError: when it cannot be read.
    """

    def __init__(self, source: TextSource | None) -> None:
        self.file = PreservationFile(cast(Any, source), "preserve") if is_preservation_file(source) else None
        given = source is not None and self.file is None
        self.texts = load_texts(cast(Any, source), "preserve", "preserve") if given else None

    def __bool__(self) -> bool:
        return self.texts is not None or self.file is not None

    def load(
        self,
        trainer: Trainer,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Sequence[Block],
        sites: Sequence[str],
        settings: FitSettings,
        identity: str,
        show: bool,
    ) -> tuple[Preservation | None, bool | None]:
        """The model's preservation statistics, and whether they came from the cache; all processes call this together.

        The first process of each machine computes and writes, the others read; of a sharded model all compute.

        Raises:
            ThoughtError: for a file of another model, or without a site of the fit.
        """
        if self.file is not None:
            self.file.check_model(identity, model)
            self.file.check_sites(site_sizes(blocks, sites))
        first = trainer.local_rank == 0
        together = is_sharded(model) and self.file is None
        found: tuple[Preservation | None, bool | None] = (None, None)
        if first or together:
            found = self._load(model, tokenizer, blocks, settings, identity, show and first, first)
        trainer.strategy.barrier("preserve")
        if not (first or together):
            found = self._load(model, tokenizer, blocks, settings, identity, False, True)
        return found

    def _load(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Sequence[Block],
        settings: FitSettings,
        identity: str,
        show: bool,
        write: bool,
    ) -> tuple[Preservation | None, bool | None]:
        if not self or settings.preserve_weight == 0:
            return None, None
        with preservation_bar(len(blocks), show) as progress:
            if self.file is not None:
                return unpack(self.file, next(model.parameters()).device, settings.cache_dir, progress)
            windows = text_windows(tokenizer, self.texts or [], WINDOW, settings.preserve_tokens)
            return preservation(
                model, blocks, windows, settings.cache_dir, identity=identity, progress=progress, write=write
            )


class Validation:
    """How the validation pairs do before the first step and after each one.

    Args:
        evaluation: their plain and instructed outputs.
        history: rows of an interrupted fit, to go on from.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation

    @classmethod
    def of(
        cls, data: PairDataModule, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool
    ) -> Validation:
        """Writes the plain and instructed outputs of the data module's validation pairs."""
        evaluation = Evaluation(
            model,
            tokenizer,
            instruction=data.instruction,
            pairs=data.val_pairs,
            template=data.template,
            unrelated=None,
            max_new_tokens=data.settings.max_new_tokens,
            batch_size=data.settings.batch_size,
            progress=progress,
        )
        return cls(evaluation)

    def rows(self, step: int, patch: ThoughtPatch, trainer: Trainer) -> list[dict[str, float]]:
        """The figures after a step, before the first one too those of the plain model as step 0; also logged, as
        ``val/…``."""
        result = self.evaluation.score(patch)
        rows = []
        for number, run in ((0, "plain"), (step, "patched"))[step > 1 :]:
            figures = {
                "fidelity": result["fidelity" if run == "patched" else "fidelity_plain"],
                "output_kl": result["output_kl"][run],
                "output_agreement": result["output_agreement"][run],
            }
            if result["accuracy"] is not None:
                figures["accuracy"] = result["accuracy"][run]
                figures["instructed_accuracy"] = result["accuracy"]["instructed"]
            rows.append({"step": number, **figures})
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics({f"val/{name}": value for name, value in figures.items()}, number)
        return rows
