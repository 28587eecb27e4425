"""The Lightning callback that turns a fit without optimizer steps into a thought patch."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.files import check_output_folder
from lit_thought.fit.budget import plan
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.estimate import Estimate
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import PreservationSource, Validation, common_fingerprint, write_outputs
from lit_thought.fit.provenance import costs, describe, identity_of, kept_settings
from lit_thought.fit.strategy import check_trainer
from lit_thought.model.blocks import JOINT, Block, find_blocks, require_site
from lit_thought.model.loading import context_window
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Observation, Stage, StreamRunner, stages_of
from lit_thought.runs.storage import Storage
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import DEFAULT_SITES, FitSettings, check_blocks, check_parts, check_rank, takes_settings
from lit_thought.statistics.distributed import rank_and_size
from lit_thought.statistics.manifest import Manifest
from lit_thought.statistics.preserve import Preservation
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import StatisticsWriter, check_statistics_folder
from lit_thought.statistics.stage import SolvedStages, StageSettings, StageSums
from lit_thought.statistics.stage_file import KeptStage
from lit_thought.timing import Stopwatch

__all__ = ["ThoughtCallback"]


class ThoughtCallback(Callback):
    """Accumulate the statistics of one site of one block an epoch, solve, install, and go on to the next.

    An epoch is one stage, so a fit takes steps × blocks × sites epochs: use ``Trainer(max_epochs=-1)``; the callback
    stops the run after the last one. The patch is then in :attr:`patch`.

    Args:
        output_dir: folder to write the adapter to at the end; not written when left out.
        overwrite: replace ``output_dir``, and ``statistics_dir``, if they exist.
        settings: those of :class:`~lit_thought.settings.FitSettings` that are not the data module's own.

    Attributes:
        settings: these, as a :class:`~lit_thought.settings.FitSettings`, what depends on the sites filled in.
        sites: where blocks are patched; at the start of a fit those that the model has.
        patch: the :class:`~lit_thought.patch.patch.ThoughtPatch`, once the fit has ended.
        history: how the data module's ``val_pairs`` do before the first step and after each one: step, accuracy,
            fidelity and KL to the instructed model; also sent to the trainer's loggers as ``val/…``, by step.
        stopwatch: seconds by phase: preserve (load or compute), prepare (write missing outputs, tokenise, batch),
            forward, statistics, solve, validate (score ``val_pairs``), patch.
        estimate: the :class:`~lit_thought.fit.estimate.Estimate` of this process's memory and time, once that is known.
        preserve_cached: whether the preservation statistics came from the cache; None without preservation.
        preserved: what was given as ``preserve``: texts, or a file of statistics.

    Raises:
        ThoughtError: for a setting out of range; at its start the fit raises
            :class:`~lit_thought.errors.MemoryBudgetError` when it needs more memory than there is.
    """

    @takes_settings(data=False)
    def __init__(
        self, *, output_dir: str | os.PathLike[str] | None = None, overwrite: bool = False, **settings: Any
    ) -> None:
        chosen = FitSettings(**settings)
        if chosen.auto:
            name = chosen.auto[0]
            raise ThoughtError(
                f'{name}="auto" is chosen before the fit: call transmute, or ThoughtCallback(**select_settings(module, '
                f'data, ["{name}"]).settings), from lit_thought.selection.'
            )
        self.settings: Any = chosen.settled()  # FitSettings; Any, since its types allow for "auto" and for None
        self.sites = tuple(chosen.sites or DEFAULT_SITES)
        self.parts = check_parts(chosen.parts, self.sites)
        self.preserved = PreservationSource(chosen.preserve)
        if output_dir is not None:
            check_output_folder(output_dir, overwrite)
        if chosen.statistics_dir is not None:
            check_statistics_folder(chosen.statistics_dir, output_dir, chosen.resume_dir, overwrite)
        self.output_dir, self.overwrite = output_dir, overwrite
        self._forget()

    def _forget(self) -> None:
        """As before a fit."""
        self.patch: ThoughtPatch | None = None
        self.stopwatch = Stopwatch()
        self.preserve_cached: bool | None = None
        self.estimate: Estimate | None = None
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._preservation: Preservation | None = None
        self._sums: StageSums | None = None
        self._solved = SolvedStages()
        self._provenance: dict[str, Any] = {}
        self._validation: Validation | None = None
        self._finished: UnfinishedFit | None = None
        self._writer: StatisticsWriter | None = None
        self._storage = Storage()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer, module or data that this callback cannot work with, before anything runs."""
        if not isinstance(pl_module, ThoughtModule):
            raise ThoughtError(f"ThoughtCallback works with a ThoughtModule; got {type(pl_module).__name__}.")
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PairDataModule):
            raise ThoughtError(
                "ThoughtCallback works with a PairDataModule; call trainer.fit(module, datamodule=PairDataModule(…))."
            )
        blocks, settings = find_blocks(pl_module.model), self.settings
        check_blocks(settings.blocks, len(blocks))
        stages = self._stages(blocks)
        check_trainer(trainer, self.steps * len(stages), f"{self.steps} steps × {len(stages)} sites of blocks")
        if settings.pairs_per_step is not None and settings.pairs_per_step > len(data.pairs):
            raise ThoughtError(
                f"pairs_per_step={settings.pairs_per_step} is more than the {len(data.pairs)} pairs there are. "
                "Leave it out to use all of them in every step."
            )
        sites = [blocks[stage.block].sites[stage.site] for stage in stages]
        check_rank(settings.rank, min(min(site.d_in, site.d_out) for site in sites))
        if self.steps > 1 and settings.pairs_per_step is not None:
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # each step has its own batches

    @property
    def steps(self) -> int:
        """How often the fit goes through the blocks."""
        return int(self.settings.steps)

    def _stages(self, blocks: Sequence[Block]) -> list[Stage]:
        """What a step goes through; settles which sites there are.

        Raises:
            UnsupportedModelError: when a site that was asked for is in no block, or none of the default ones is.
        """
        for name in self.settings.sites or ():
            require_site(blocks, name)
        if self.settings.sites is None:
            self.sites = tuple(name for name in DEFAULT_SITES if any(name in block.sites for block in blocks))
        stages = stages_of(blocks, self.sites, self.settings.blocks)
        if not stages:
            raise UnsupportedModelError(
                f"blocks={self.settings.blocks}: none of them has one of the sites {list(self.sites)}. Choose other "
                "blocks."
            )
        return stages

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write missing outputs, align and batch the pairs, open the streams, get the preservation statistics."""
        assert isinstance(pl_module, ThoughtModule)
        model, tokenizer, data = pl_module.model, pl_module.tokenizer, _data(trainer)
        self._forget()
        show = trainer.progress_bar_callback is not None
        blocks = find_blocks(model)  # once more: by now the model is on its device
        limit = context_window(model)
        with self.stopwatch("prepare"):
            data.tokenise(tokenizer, limit)
            self._plan(trainer, pl_module, blocks, complete=not data.missing)
        with self.stopwatch("preserve"):
            identity = common_fingerprint(model)
            self._preservation, self.preserve_cached = self.preserved.load(
                trainer, model, tokenizer, blocks, self.sites, self.settings, identity, show
            )
        kept = kept_settings(replace(self.settings, sites=self.sites), self.parts, self.preserved, data)
        finished = None
        if self.settings.resume_dir is not None:
            summing = self.settings.statistics_dir is not None
            whole = identity_of(kept, self.preserved.texts, identity, data, trainer.world_size, summing)
            finished = UnfinishedFit(
                self.settings.resume_dir, whole, trainer.is_global_zero, self.settings.store_instruction
            )
        with self.stopwatch("prepare"):
            before = None if finished is None else finished.outputs
            data.complete(tokenizer, before or write_outputs(data, model, tokenizer, show), limit)
            if data.written:
                self._plan(trainer, pl_module, blocks, complete=True)
        if show and trainer.is_global_zero and self.estimate is not None:
            tqdm.write(str(self.estimate), file=sys.stderr)
        if finished is not None:
            trainer.strategy.barrier("resume")
            finished.start(data.written)
        self._provenance = describe(kept, model, blocks, identity, data, self.settings.store_instruction)
        if self.settings.statistics_dir is not None and trainer.is_global_zero:
            entry = self._preservation.folder.name if self._preservation is not None else None
            uncompared = sum(len(pair.plain_ids) - len(pair.plain_positions) for pair in data.tokenised)
            manifest = Manifest(self._provenance, entry, uncompared)
            self._writer = StatisticsWriter(self.settings.statistics_dir, manifest, self.overwrite)
        if data.val_pairs and (trainer.is_global_zero or is_sharded(model)):  # of a sharded model all must run it
            with self.stopwatch("validate"):
                self._validation = Validation.of(data, model, tokenizer, show and trainer.is_global_zero)
        self._start_step(trainer, pl_module, blocks)
        if finished is not None:
            with self.stopwatch("resume"):
                self._go_through(trainer, pl_module, finished)
        self._finished = finished

    def _plan(self, trainer: Trainer, pl_module: ThoughtModule, blocks: Sequence[Block], complete: bool) -> None:
        """Batch the longest pairs of a step, refuse a fit that does not fit, and choose where its streams are kept."""
        data, settings = _data(trainer), self.settings
        longest = sorted(range(len(data.pairs)), key=data.by_length)[: settings.pairs_per_step]
        self._select(trainer, pl_module, longest)
        self.estimate = plan(
            pl_module.model,
            blocks,
            self._stages(blocks),
            data.batches,
            offload=settings.offload,
            memory_budget=settings.memory_budget,
            preserve=bool(self.preserved) and settings.preserve_weight != 0,
            processes=trainer.num_devices,
            steps=self.steps,
            complete=complete,
        )
        self._storage = Storage(self.estimate.place)

    def _select(self, trainer: Trainer, pl_module: ThoughtModule, indices: Sequence[int]) -> None:
        data = _data(trainer)
        weight = data.settings.answer_weight or self.settings.answer_weight
        data.select(pl_module.tokenizer, indices, weight, pl_module.device)

    def _start_step(self, trainer: Trainer, pl_module: ThoughtModule, blocks: Sequence[Block]) -> None:
        """Streams for the next step, over its pairs."""
        data, settings = _data(trainer), self.settings
        if settings.pairs_per_step is not None:
            first = self.step * settings.pairs_per_step
            self._select(
                trainer, pl_module, [i % len(data.pairs) for i in range(first, first + settings.pairs_per_step)]
            )
        runner = pl_module.runner = StreamRunner(
            pl_module.model, blocks, self.sites, settings.order, self._storage, settings.blocks, self._solved.patches
        )
        with self.stopwatch("forward"):
            runner.open(data.batches)

    def _go_through(self, trainer: Trainer, pl_module: ThoughtModule, finished: UnfinishedFit) -> None:
        """Through the stages that are finished, but for the last one of the fit, with their patches: nothing is summed
        or solved, but the streams run as they did."""
        runner, validation = _runner(pl_module), self._validation
        self._validation = None  # what it found is kept with the stages
        last = self.steps * runner.num_stages - 1
        for number in range(min(finished.stages, last)):
            site = runner.block.sites[runner.site]
            stage = finished.load(number, pl_module.device, runner.block.index, site)
            for batch in _data(trainer).batches:
                runner.observe(batch)
            if self._writer is not None:
                self._writer.add(stage)
            self._install(trainer, pl_module, stage.patch, stage.figures)
            self.history = stage.history or self.history
            runner = _runner(pl_module)
        finished.stages, self._validation = min(finished.stages, last), validation

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty sums for this epoch's stage."""
        runner, settings = _runner(pl_module), self.settings
        block, name = runner.block, runner.site
        how = StageSettings(settings.rank, settings.ridge, settings.preserve_weight, settings.step_size)
        parts = self.parts["attn_out" if name == JOINT else name]
        self._sums = StageSums(block.sites[name], parts, how, f"block {block.index}, {name}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the forward pass."""
        self._started = self.stopwatch.mark()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Add the batch's compared tokens to the sums."""
        if not outputs:  # this process has fewer batches than another
            return
        self.stopwatch.add("forward", self._started)
        seen: Observation = outputs["observation"]
        assert self._sums is not None
        with self.stopwatch("statistics"):
            self._sums.update(seen)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve this stage's patch, install it as it will be exported, and stop after the last stage."""
        runner, sums = _runner(pl_module), self._sums
        assert sums is not None
        with self.stopwatch("reduce"):
            saving = self.settings.statistics_dir is not None  # the first process saves them, too
            owner = 0 if saving else runner.stage % trainer.world_size
            device = pl_module.device
            sums.reduce(owner, device)
        kept = (sums.matrix, sums.vector) if saving and rank_and_size()[0] == owner else ()
        stage = KeptStage.of(runner.block.index, sums.site, runner.start, *kept)
        if self._writer is not None:
            with self.stopwatch("save"):
                self._writer.add(stage)
        with self.stopwatch("solve"):
            known = self._preservation if rank_and_size()[0] == owner else None
            prior = known.prior(runner.block, runner.site) if known is not None else None
            patch, figures = sums.solve_at(owner, device, runner.start, prior, trainer.num_devices)
        left = figures["error_after"] / figures["error_before"] if figures["error_before"] > 0 else 0.0
        pl_module.log(f"{runner.site}/error_left", left, prog_bar=True, on_epoch=True, rank_zero_only=True)
        self._install(trainer, pl_module, patch, figures)
        if self._finished is not None and self.patch is None:
            self._finished.save(stage.solved(patch, figures, self.history))

    def _install(
        self, trainer: Trainer, pl_module: LightningModule, patch: SitePatch, figures: Mapping[str, float]
    ) -> None:
        """Keep a stage's patch and go on; after the last stage of a step, the next step or the end."""
        runner = _runner(pl_module)
        self._solved.add(runner.block.index, runner.block.sites[runner.site], patch, figures)
        with self.stopwatch("forward"):
            runner.finish(patch)
        if runner.stage == runner.num_stages:
            self._finish_step(trainer, pl_module, runner.blocks)

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule, blocks: Sequence[Block]) -> None:
        """After the last stage of a step: the patch so far, how it does, and the next step or the end."""
        assert isinstance(pl_module, ThoughtModule)
        self.step += 1
        if self._validation is not None:
            with self.stopwatch("validate"):
                self.history += self._validation.rows(self.step, self._solved.patch(), trainer)
        if self.step < self.steps:
            self._start_step(trainer, pl_module, blocks)
            return
        with self.stopwatch("patch"):
            self._provenance["history"] = self.history
            self._provenance |= costs(self.stopwatch, self.estimate)
            self._provenance["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            patch = self._solved.patch(self._provenance)
            self.patch = patch if self.settings.scale == 1 else self.settings.scale * patch
            if self.output_dir is not None and trainer.is_global_zero:
                self.patch.save_adapter(self.output_dir, overwrite=self.overwrite)
            if self._writer is not None:
                self._writer.close()
            if self._finished is not None:
                trainer.strategy.barrier("written")
                self._finished.remove()
        trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up after a failed fit, too; Lightning tears down only after one that ended well."""
        self.teardown(trainer, pl_module, "fit")
        pl_module.teardown("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the sums and the cached matrices; statistics that were not completed are not left behind."""
        if self._writer is not None:
            self._writer.abort()
        self._writer = self._preservation = self._sums = self._validation = None
        self._storage.close()


def _data(trainer: Trainer) -> PairDataModule:
    data: PairDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data


def _runner(pl_module: LightningModule) -> StreamRunner:
    assert isinstance(pl_module, ThoughtModule)
    assert pl_module.runner is not None
    return pl_module.runner
