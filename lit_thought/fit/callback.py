"""The Lightning callback that turns a fit without optimizer steps into a thought patch."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_thought.errors import ThoughtError
from lit_thought.files import check_apart, check_output_folder, check_writable, expanded
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.estimate import Estimate
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import Preparation, chosen_stages, largest_rank
from lit_thought.fit.preserving import PreservationSource
from lit_thought.fit.provenance import costs
from lit_thought.fit.strategy import check_epochs, check_trainer
from lit_thought.fit.validation import log_figures
from lit_thought.model.bare import check_autocast
from lit_thought.model.blocks import JOINT, find_blocks
from lit_thought.model.loading import model_place
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Observation, Stage, StreamRunner
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import (
    SITES,
    FitSettings,
    check_blocks,
    check_parts,
    check_rank,
    directions_for,
    takes_settings,
    text_place,
)
from lit_thought.statistics.distributed import rank_and_size
from lit_thought.statistics.resume import UnfinishedFit, check_unfinished
from lit_thought.statistics.stage import SolvedStages, StageSettings, StageSums
from lit_thought.statistics.stage_file import KeptStage
from lit_thought.timing import Stopwatch

__all__ = ["ThoughtCallback"]


class ThoughtCallback(Callback):
    """Accumulate the statistics of one site of one block an epoch, solve, install, and go on to the next.

    An epoch is one stage, so a fit takes steps × blocks × sites epochs: use ``Trainer(max_epochs=-1)``; the callback
    stops the run after the last one. The patch is then in :attr:`patch`.

    As each stage is solved, the trainer's loggers get ``fit/error_left``, the share of the error that its patch leaves,
    with the index of the block, ``fit/block``, and that of the site among attn_out, mlp_in, mlp_out and both output
    projections together, ``fit/site``; the step is the number of stages solved.

    Args:
        output_dir: folder to write the adapter to at the end; not written when left out.
        overwrite: replace ``output_dir``, and ``statistics_dir``, if they exist.
        settings: those of :class:`~lit_thought.settings.FitSettings` that are not the data module's own.

    Attributes:
        settings: these, as a :class:`~lit_thought.settings.FitSettings`, what depends on the sites filled in.
        patch: the :class:`~lit_thought.patch.patch.ThoughtPatch`, once the fit has ended.
        history: how the data module's ``val_pairs`` do before the first step and after each one: step, accuracy,
            fidelity and KL to the instructed model, along its outputs and on the patched model's own text; the loggers
            get it, too, as ``val/…``, by step.
        stopwatch: seconds by phase: write (inputs), preserve (load or compute), prepare (write missing outputs,
            tokenise, batch), forward, statistics, solve, validate (score ``val_pairs``), patch.
        preserved: what was given as ``preserve``: texts, or a file of statistics.
        told: what else the patch's provenance is to hold, as JSON values: how its settings and inputs were chosen.

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
        if chosen.preserve is None and chosen.preserve_weight:
            raise ThoughtError(
                f"preserve_weight={chosen.preserve_weight:g} weighs text to preserve, but preserve is None. Give "
                "preserve, or leave the weight out."
            )
        self.settings: Any = chosen.settled()  # FitSettings; Any, since its types allow for "auto" and for None
        self.preserved = PreservationSource(chosen.preserve)
        self.output_dir, self.overwrite = output_dir, overwrite
        self.told: dict[str, Any] = {}
        self._check_folders()
        folders = {name: getattr(chosen, name) for name in ("statistics_dir", "resume_dir", "cache_dir")}
        check_apart(**folders, output_dir=output_dir)
        self._reloads: int | None = None  # the trainer's own, while its loaders are made anew for each step
        self._forget()

    def _forget(self) -> None:
        """As before a fit."""
        self.patch: ThoughtPatch | None = None
        self.stopwatch = Stopwatch()
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._ready: Preparation | None = None
        self._sums: StageSums | None = None
        self._batches = 0  # of this epoch
        self._solved = SolvedStages()

    @property
    def steps(self) -> int:
        """How often the fit goes through the blocks."""
        return int(self.settings.steps)

    @property
    def estimate(self) -> Estimate | None:
        """This process's memory and time, once that is known."""
        return None if self._ready is None else self._ready.estimate

    @property
    def preserve_cached(self) -> bool | None:
        """Whether the preservation statistics came from the cache; None without preservation."""
        return None if self._ready is None else self._ready.preserve_cached

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer, module or data that this callback cannot work with, before anything runs."""
        if not isinstance(pl_module, ThoughtModule):
            raise ThoughtError(f"ThoughtCallback works with a ThoughtModule; got {type(pl_module).__name__}.")
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PairDataModule):
            raise ThoughtError(
                "ThoughtCallback works with a PairDataModule; call trainer.fit(module, datamodule=PairDataModule(…))."
            )
        if data.to_write and data.settings.inputs == "auto":
            raise ThoughtError(
                'inputs="auto" is chosen before the fit: call transmute, or give a number, or leave it out for the '
                "usual one."
            )
        check_trainer(trainer)
        for logger in trainer.loggers:
            check_apart(log_dir=getattr(logger, "log_dir", None), **self._outputs)
        stages = self.check(pl_module, data)
        check_epochs(trainer, self.steps * len(stages), f"{self.steps} steps × {len(stages)} sites of blocks")
        if self.steps > 1 and self.settings.pairs_per_step is not None:
            self._reloads = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # each step has its own batches

    def check(self, module: ThoughtModule, data: PairDataModule, preserved: bool = False) -> list[Stage]:
        """Refuse settings that do not go with a model and its data, before anything is written for them.

        Args:
            module: the model.
            data: the pairs, as far as they are there.
            preserved: also what is to be preserved, as the fit itself does before it writes.

        Returns:
            The stages of a step.

        Raises:
            ThoughtError: naming the setting; of its class UnsupportedModelError for a model without known blocks.
        """
        settings = self.settings
        check_autocast(module.model)
        self._check_folders(model_place(module.model))
        blocks = find_blocks(module.model)
        check_blocks(settings.blocks, len(blocks))
        long = data.is_long(module.tokenizer)
        sites, stages = chosen_stages(blocks, settings, long)
        data.check_step(settings.pairs_per_step, module.tokenizer)
        if settings.rank != "usual":
            check_rank(settings.rank, largest_rank(blocks, stages))
        if preserved:
            how = (settings, blocks, sites, directions_for(long), not data.is_chat(module.tokenizer))
            self.preserved.check(module.model, module.tokenizer, *how)
        return stages

    @property
    def _outputs(self) -> dict[str, str | os.PathLike[str] | None]:
        """The folders that a fit writes as a whole, by the arguments that name them."""
        return {"statistics_dir": self.settings.statistics_dir, "output_dir": self.output_dir}

    def _check_folders(self, model: str | None = None) -> None:
        """Refuse outputs that cannot be written, or would replace the model at this place."""
        text = text_place(self.settings.preserve)
        for name, folder in self._outputs.items():
            if folder is not None:
                check_output_folder(folder, self.overwrite, name, model=model, preserve=text)
        if self.settings.resume_dir is not None:
            check_unfinished(self.settings.resume_dir)
        cache = self.settings.cache_dir
        if cache is not None and not expanded(cache, "cache_dir").is_dir():  # of one that is there, no more may be read
            check_writable(cache, "cache_dir")

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare, open the streams, and go through what an interrupted fit has finished."""
        assert isinstance(pl_module, ThoughtModule)
        check_autocast(pl_module.model)  # on its device now
        self._forget()
        # the blocks are looked for once more: by now the model is on its device
        self._ready = Preparation(trainer, pl_module, self.settings, self.preserved, self.stopwatch)
        self._ready.run(self.overwrite)
        pl_module.runner = self._ready.start_step(self.step, self._solved.patches)
        if self._ready.unfinished is not None:
            with self.stopwatch("resume"):
                self._go_through(trainer, pl_module, self._ready.unfinished)

    def _go_through(self, trainer: Trainer, pl_module: ThoughtModule, unfinished: UnfinishedFit) -> None:
        """Through the stages that are finished, but for the last one of the fit, with their patches: nothing is summed
        or solved, but the streams run as they did."""
        ready, runner = self._prepared, _runner(pl_module)
        validation, ready.validation = ready.validation, None  # what it found is kept with the stages
        last = self.steps * runner.num_stages - 1
        for number in range(min(unfinished.stages, last)):
            site = runner.block.sites[runner.site]
            stage = unfinished.load(number, pl_module.device, runner.block.index, site)
            for batch in ready.data.batches:
                runner.observe(batch)
            if ready.writer is not None:
                ready.writer.add(stage)
            self._install(trainer, pl_module, stage.patch, stage.figures)
            self.history = stage.history or self.history
            runner = _runner(pl_module)
        unfinished.stages, ready.validation = min(unfinished.stages, last), validation

    @property
    def _prepared(self) -> Preparation:
        assert self._ready is not None
        return self._ready

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty sums for this epoch's stage."""
        runner, settings = _runner(pl_module), self._prepared.settings
        block, name = runner.block, runner.site
        how = StageSettings(settings.rank, settings.ridge, settings.preserve_weight, settings.step_size)
        parts = check_parts(settings.parts, self._prepared.sites)["attn_out" if name == JOINT else name]
        self._sums = StageSums(block.sites[name], parts, how, f"block {block.index}, {name}")
        self._batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the forward pass."""
        self._started = self.stopwatch.mark()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Add the batch's compared tokens to the sums."""
        self._batches += 1
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
        if self._batches < self._prepared.data.num_batches:  # something else has ended the epoch: on_fit_end says so
            trainer.should_stop = True
            return
        with self.stopwatch("reduce"):
            saving = self.settings.statistics_dir is not None  # the first process saves them, too
            owner = 0 if saving else runner.stage % trainer.world_size
            device = pl_module.device
            sums.reduce(owner, device)
        ready, own = self._prepared, rank_and_size()[0] == owner
        kept = (sums.matrix, sums.vector) if saving and own else ()
        stage = KeptStage.of(runner.block.index, sums.site, runner.start, *kept)
        if ready.writer is not None:
            with self.stopwatch("save"):
                ready.writer.add(stage)
        with self.stopwatch("solve"):
            known = ready.preservation if own else None
            prior = known.prior(runner.block.index, runner.site) if known is not None else None
            patch, figures = sums.solve_at(owner, device, runner.start, prior, trainer.num_devices)
        left = figures["error_after"] / figures["error_before"] if figures["error_before"] > 0 else 0.0
        pl_module.log(
            f"{runner.site}/error_left", left, prog_bar=True, logger=False, on_epoch=True, rank_zero_only=True
        )
        done = self.step * runner.num_stages + runner.stage + 1
        place = {"block": runner.block.index, "site": (*SITES, JOINT).index(runner.site)}
        log_figures(trainer, "fit", {"error_left": left, **place}, done)
        self._install(trainer, pl_module, patch, figures)
        if ready.unfinished is not None and self.patch is None:
            ready.unfinished.save(stage.solved(patch, figures, self.history))

    def _install(
        self, trainer: Trainer, pl_module: LightningModule, patch: SitePatch, figures: Mapping[str, float]
    ) -> None:
        """Keep a stage's patch and go on; after the last stage of a step, the next step or the end."""
        runner = _runner(pl_module)
        self._solved.add(runner.block.index, runner.block.sites[runner.site], patch, figures)
        with self.stopwatch("forward"):
            runner.finish(patch)
        if runner.stage == runner.num_stages:
            self._finish_step(trainer, pl_module)

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last stage of a step: the patch so far, how it does, and the next step or the end."""
        assert isinstance(pl_module, ThoughtModule)
        ready = self._prepared
        self.step += 1
        if ready.validation is not None:
            with self.stopwatch("validate"):
                self.history += ready.validation.rows(self.step, self._scaled(self._solved.patch()), trainer)
        if self.step < self.steps:
            pl_module.runner = ready.start_step(self.step, self._solved.patches)
            return
        with self.stopwatch("patch"):
            ready.provenance["history"] = self.history
            ready.provenance |= costs(self.stopwatch, self.estimate) | self.told
            ready.provenance["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.patch = self._scaled(self._solved.patch(ready.provenance))
            if self.output_dir is not None and trainer.is_global_zero:
                self.patch.save_adapter(self.output_dir, overwrite=self.overwrite)
            if ready.writer is not None:
                ready.writer.close()
            if ready.unfinished is not None:
                trainer.strategy.barrier("written")
                ready.unfinished.remove()
        trainer.should_stop = True

    def _scaled(self, patch: ThoughtPatch) -> ThoughtPatch:
        return patch if self.settings.scale == 1 else self.settings.scale * patch

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to end well without a patch, where something else has stopped the trainer.

        Raises:
            ThoughtError: saying how to go on.
        """
        if self.patch is not None or self._ready is None:
            return
        runner = _runner(pl_module)
        done, every = self.step * runner.num_stages + runner.stage, self.steps * runner.num_stages
        folder = self.settings.resume_dir
        goes_on = "Pass resume_dir: the finished stages are then kept, and the same call goes on from there"
        if folder is not None:
            goes_on = f"The same call, with resume_dir={str(folder)!r}, goes on from there"
        raise ThoughtError(
            f"the fit was stopped after {done} of {every} stages (by max_time, a Timer or another callback), so there "
            f"is no patch. {goes_on}; or take out what stops it."
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint, which has nothing of a fit.

        Raises:
            ThoughtError: with what does it instead.
        """
        raise ThoughtError(
            "ckpt_path must be left out: a checkpoint has nothing of a fit. resume_dir keeps the finished stages, from "
            "which the same call goes on."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up after a failed fit, too; Lightning tears down only after one that ended well."""
        self.teardown(trainer, pl_module, "fit")
        pl_module.teardown("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the sums and the cached matrices; statistics that were not completed are not left behind."""
        self._sums = None
        if self._reloads is not None:
            trainer.reload_dataloaders_every_n_epochs, self._reloads = self._reloads, None  # type: ignore[attr-defined]
        if self._ready is not None:
            self._ready.close()


def _runner(pl_module: LightningModule) -> StreamRunner:
    assert isinstance(pl_module, ThoughtModule)
    assert pl_module.runner is not None
    return pl_module.runner
