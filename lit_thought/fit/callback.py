"""The Lightning callback that turns a fit without optimizer steps into a thought patch."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from lit_thought.errors import ThoughtError, UnsupportedModelError, check_counts
from lit_thought.evaluation.compare import Evaluation
from lit_thought.files import check_output_folder
from lit_thought.fit.budget import check_budget, plan
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.estimate import Estimate
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.provenance import costs, describe, fit_settings
from lit_thought.fit.strategy import check_trainer
from lit_thought.model.blocks import DEFAULT_SITES, JOINT, Block, check_indices, check_sites, find_blocks, require_site
from lit_thought.model.loading import fingerprint
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import PairBatch
from lit_thought.prompts.unrelated import TextSource, load_texts, text_windows
from lit_thought.runs.runner import ORDERS, Observation, Stage, StreamRunner, stages_of
from lit_thought.runs.storage import Storage, check_offload
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.least_squares import check_rank
from lit_thought.statistics.distributed import gather_json, rank_and_size
from lit_thought.statistics.preserve import WINDOW, Preservation, preservation, preservation_bar, site_sizes, unpack
from lit_thought.statistics.preserve_file import PreservationFile, is_preservation_file
from lit_thought.statistics.resume import FitProgress
from lit_thought.statistics.saved import StatisticsWriter, check_statistics_folder
from lit_thought.statistics.saved_stage import Manifest, SavedStage
from lit_thought.statistics.stage import (
    StageSettings,
    StageSums,
    check_parts,
    check_solve_settings,
    site_defaults,
    target_changes,
    vector_inputs,
)
from lit_thought.timing import Stopwatch

__all__ = ["ThoughtCallback"]


class ThoughtCallback(Callback):
    """Accumulate the statistics of one site of one block an epoch, solve, install, and go on to the next.

    An epoch is one stage, so a fit takes steps × blocks × sites (× passes) epochs: use ``Trainer(max_epochs=-1)``; the
    callback stops the run after the last one. The patch is then in :attr:`patch`.

    Args:
        sites: where to patch each block: ``"attn_out"``, ``"mlp_in"`` (the paper's), ``"mlp_out"``, or several. A block
            that lacks one of them goes without (``mlp_out`` in a mixture of experts); left out, attn_out and mlp_out.
        parts: what to solve for: ``"matrix"``, ``"vector"`` or both; left out, a matrix, and at mlp_in a vector too.
        blocks: indices of the blocks to patch; all when left out.
        steps: how often to go through the blocks, each time with the patch so far in place; left out, 1, and 2 where
            mlp_in is the only site.
        step_size: η in (0, 1], how much of each step's solution is added to the patch; left out, 1, and 0.5 where
            mlp_in is the only site.
        pairs_per_step: pairs that a step is solved from, the next ones in turn; all pairs when left out.
        passes: how often to solve a site whose output goes through a norm (Gemma, OLMo 2), each time with that norm's
            factors as the patch so far leaves them (Gauss-Newton); other sites are solved once, in closed form.
        order: ``"sequential"``: each block's plain run has been through the blocks patched so far;
            ``"teacher-forced"``: it enters each block as the instructed run does.
        rank: rank of the patch: an int, a fraction of explained energy in (0, 1), or None for full rank.
        ridge: λ ≥ 0, relative to the mean eigenvalue of the Gram matrix.
        preserve: unrelated text that the patch should leave alone: a text file, a list of texts, ``"default"``
            (text that the package ships) or None; or the model's preservation statistics, a ``.safetensors`` file that
            ``lit-thought preserve`` wrote.
        preserve_weight: ρ ≥ 0, weight of the unrelated tokens' mean Gram matrix against that of the pairs; left out, 3,
            and 1 where mlp_in is the only site.
        preserve_tokens: most tokens of unrelated text to use; a file of statistics has its own.
        statistics_dtype: dtype of the sums, ``"float64"`` or ``"float32"``; the solve is always float64.
        offload: where the streams are kept between uses: ``"device"`` (also False), ``"cpu"`` (main memory; also True),
            ``"disk"`` (in a temporary file, mapped into memory piece by piece; see :func:`tempfile.gettempdir`) or
            ``"auto"``: the first of them where they fit. The patch is the same, bit for bit.
        memory_budget: GB that the fit may take besides the model, on the device and in main memory; left out, 0.8 of
            what is free. A fit that cannot keep to it is refused.
        cache_dir: where the preservation statistics of each model are kept.
        resume_dir: folder in which finished stages are kept until the fit ends well; an interrupted fit with the same
            model, pairs and settings goes on from there, to the same bits. Not kept when left out.
        statistics_dir: folder to keep the statistics of every stage in, for ``lit-thought solve``; not written when
            left out.
        output_dir: folder to write the adapter to at the end; not written when left out.
        overwrite: replace ``output_dir`` if it exists.
        store_instruction: keep the instruction in the patch's record, and so in what is written: adapter, statistics,
            report. False keeps a salted hash of it, with which an evaluation checks the one that it is given, and no
            generated outputs in ``resume_dir``. The template is kept either way.

    Attributes:
        patch: the :class:`~lit_thought.patch.patch.ThoughtPatch`, once the fit has ended.
        history: how the data module's ``val_pairs`` do before the first step and after each one: step, accuracy,
            fidelity and KL to the instructed model; also sent to the trainer's loggers as ``val/…``, by step.
        stopwatch: seconds by stage: preserve (load or compute), prepare (write missing outputs, tokenise, batch),
            forward, statistics, solve, validate (score ``val_pairs``), patch.
        estimate: the :class:`~lit_thought.fit.estimate.Estimate` of this process's memory and time, once that is known.
        preserve_cached: whether the preservation statistics came from the cache; None without preservation.
        preservation_file: the :class:`~lit_thought.statistics.preserve_file.PreservationFile` given as ``preserve``, or
            None.

    Raises:
        ThoughtError: for a setting out of range; at its start the fit raises
            :class:`~lit_thought.errors.MemoryBudgetError` when it needs more memory than there is.
    """

    def __init__(
        self,
        sites: Sequence[str] | None = None,
        parts: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        order: Literal["sequential", "teacher-forced"] = "sequential",
        steps: int | None = None,
        step_size: float | None = None,
        pairs_per_step: int | None = None,
        passes: int = 1,
        rank: int | float | None = 16,
        ridge: float = 3e-2,
        preserve: TextSource | None = "default",
        preserve_weight: float | None = None,
        preserve_tokens: int = 12_000,
        statistics_dtype: Literal["float32", "float64"] = "float64",
        offload: Literal["auto", "device", "cpu", "disk"] | bool = "auto",
        memory_budget: float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        resume_dir: str | os.PathLike[str] | None = None,
        statistics_dir: str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        store_instruction: bool = True,
    ) -> None:
        _refuse_auto(blocks=blocks, rank=rank, ridge=ridge, preserve_weight=preserve_weight)
        self._asked_sites = None if sites is None else check_sites(sites)
        self.sites = self._asked_sites or DEFAULT_SITES
        self.parts = check_parts(parts, self.sites)
        self.chosen = check_indices(blocks)
        self.defaults = site_defaults(self.sites)
        steps = self.defaults.steps if steps is None else steps
        step_size = self.defaults.step_size if step_size is None else step_size
        check_counts(steps=steps, passes=passes)
        if pairs_per_step is not None:
            check_counts(pairs_per_step=pairs_per_step)
        if order not in ORDERS:
            raise ThoughtError(f"order must be one of {list(ORDERS)}; got {order!r}.")
        preserve_weight = self.defaults.preserve_weight if preserve_weight is None else preserve_weight
        check_solve_settings(ridge, rank, preserve_weight, step_size)
        if not isinstance(preserve_tokens, int) or preserve_tokens < 2:
            raise ThoughtError(f"preserve_tokens must be a whole number of 2 or more; got {preserve_tokens!r}.")
        if statistics_dtype not in ("float32", "float64"):
            raise ThoughtError(f'statistics_dtype must be "float32" or "float64"; got {statistics_dtype!r}.')
        self.preservation_file, self.texts = _what_to_preserve(preserve)
        if output_dir is not None:
            check_output_folder(output_dir, overwrite)
        self.order, self.rank, self.ridge = order, rank, float(ridge)
        self.preserve_weight, self.preserve_tokens = float(preserve_weight), preserve_tokens
        self.statistics_dtype = statistics_dtype
        self.steps, self.step_size, self.pairs_per_step = steps, float(step_size), pairs_per_step
        self.passes = passes
        self.offload, self.memory_budget = check_offload(offload), check_budget(memory_budget)
        self.cache_dir = cache_dir
        if statistics_dir is not None:
            check_statistics_folder(statistics_dir, output_dir, resume_dir, overwrite)
        self.resume_dir, self.statistics_dir = resume_dir, statistics_dir
        self.output_dir, self.overwrite = output_dir, overwrite
        if not isinstance(store_instruction, bool):
            raise ThoughtError(f"store_instruction must be True or False; got {store_instruction!r}.")
        self.store_instruction = store_instruction
        self.patch: ThoughtPatch | None = None
        self.stopwatch = Stopwatch()
        self.preserve_cached: bool | None = None
        self.estimate: Estimate | None = None
        self._forget()

    def _forget(self) -> None:
        self._preservation: Preservation | None = None
        self._sums: StageSums | None = None
        self._patches: dict[tuple[int, str], SitePatch] = {}
        self._diagnostics: dict[str, dict[str, float]] = {}
        self._provenance: dict[str, Any] = {}
        self._evaluation: Evaluation | None = None
        self._progress: FitProgress | None = None
        self._writer: StatisticsWriter | None = None
        self._storage = Storage()
        self._replaying = False
        self.step = 0
        self.history: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer, module or data that this callback cannot work with, before anything runs."""
        if not isinstance(pl_module, ThoughtModule):
            raise ThoughtError(f"ThoughtCallback works with a ThoughtModule; got {type(pl_module).__name__}.")
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, PairDataModule):
            raise ThoughtError(
                "ThoughtCallback works with a PairDataModule; call trainer.fit(module, datamodule=PairDataModule(…))."
            )
        blocks = find_blocks(pl_module.model)
        check_indices(self.chosen, len(blocks))
        turns = self._stages(blocks)
        stages = self.steps * len(turns)
        check_trainer(trainer, stages, f"{self.steps} steps × {len(turns)} sites of blocks")
        if self.pairs_per_step is not None and self.pairs_per_step > len(datamodule.pairs):
            raise ThoughtError(
                f"pairs_per_step={self.pairs_per_step} is more than the {len(datamodule.pairs)} pairs there are. "
                "Leave it out to use all of them in every step."
            )
        sites = [blocks[stage.block].sites[stage.site] for stage in turns]
        check_rank(self.rank, min(min(site.d_in, site.d_out) for site in sites))
        if self.steps > 1 and self.pairs_per_step is not None:
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # each step has its own batches

    def _stages(self, blocks: Sequence[Block]) -> list[Stage]:
        """What this fit goes through; settles which sites there are.

        Raises:
            UnsupportedModelError: when a site that was asked for is in no block, or none of the default ones is.
        """
        for name in self._asked_sites or ():
            require_site(blocks, name)
        if self._asked_sites is None:
            self.sites = tuple(name for name in DEFAULT_SITES if any(name in block.sites for block in blocks))
        stages = stages_of(blocks, self.sites, self.chosen, self.passes)
        if not stages:
            raise UnsupportedModelError(
                f"blocks={self.chosen}: none of them has one of the sites {list(self.sites)}. Choose other blocks."
            )
        return stages

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write missing outputs, align and batch the pairs, open the streams, get the preservation statistics."""
        assert isinstance(pl_module, ThoughtModule)
        model, tokenizer, data = pl_module.model, pl_module.tokenizer, trainer.datamodule  # type: ignore[attr-defined]
        self._forget()
        self.patch = None
        self.stopwatch = Stopwatch()
        show = trainer.progress_bar_callback is not None
        blocks = find_blocks(model)  # once more: by now the model is on its device
        with self.stopwatch("prepare"):
            prompts = data.check(model, tokenizer)
            self._plan(trainer, pl_module, blocks, prompts, complete=all("output" in pair for pair in data.pairs))
        with self.stopwatch("preserve"):
            identity = fingerprint(model)
            if self.preservation_file is not None:
                self.preservation_file.check_model(identity, model)
                self.preservation_file.check_sites(site_sizes(blocks, self.sites))
            if len(set(gather_json(identity, pl_module.device))) > 1:
                raise ThoughtError("model: the processes of this fit hold different weights. Load the same in each.")
            first = trainer.local_rank == 0  # of each machine: it computes and writes
            together = is_sharded(model) and self.preservation_file is None  # all compute
            if first or together:
                self._load_preservation(model, tokenizer, blocks, identity, show and first, write=first)
            trainer.strategy.barrier("preserve")
            if not (first or together):
                self._load_preservation(model, tokenizer, blocks, identity, show=False)
        progress = self._open_progress(trainer, identity, data)
        written = None if progress is None else progress.outputs
        with self.stopwatch("prepare"):
            data.prepare(model, tokenizer, prompts, show, self.defaults.answer_weight, written)
            if data.written:
                self._plan(trainer, pl_module, blocks, data.tokenised, complete=True)
        if show and trainer.is_global_zero and self.estimate is not None:
            tqdm.write(str(self.estimate), file=sys.stderr)
        if progress is not None:
            trainer.strategy.barrier("resume")
            progress.start(data.written)
        self._provenance = describe(self, model, blocks, identity, data)
        if self.statistics_dir is not None and trainer.is_global_zero:
            entry = self._preservation.folder.name if self._preservation is not None else None
            uncompared = sum(len(pair.plain_ids) - len(pair.plain_positions) for pair in data.tokenised)
            manifest = Manifest(self._provenance, entry, uncompared)
            self._writer = StatisticsWriter(self.statistics_dir, manifest, self.overwrite)
        if data.val_pairs and (trainer.is_global_zero or is_sharded(model)):  # of a sharded model all must run it
            with self.stopwatch("validate"):
                self._evaluation = data.evaluation(model, tokenizer, progress=show and trainer.is_global_zero)
        self._start_step(trainer, pl_module, blocks)
        if progress is not None:
            with self.stopwatch("resume"):
                self._replay(trainer, pl_module, progress)
        self._progress = progress

    def _plan(
        self,
        trainer: Trainer,
        pl_module: ThoughtModule,
        blocks: Sequence[Block],
        prompts: Sequence[TokenisedPair],
        complete: bool,
    ) -> None:
        """Estimate the fit, refuse it where it does not fit, and choose where its streams are kept."""
        data: PairDataModule = trainer.datamodule  # type: ignore[attr-defined]
        longest = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].instructed_ids))[: self.pairs_per_step]
        self.estimate = plan(
            pl_module.model,
            blocks,
            self._stages(blocks),
            data.batched(pl_module.tokenizer, prompts, longest),
            offload=self.offload,
            memory_budget=self.memory_budget,
            statistics_dtype=getattr(torch, self.statistics_dtype),
            preserve=self.preserve_weight > 0 and (self.texts or self.preservation_file) is not None,
            processes=trainer.num_devices,
            steps=self.steps,
            complete=complete,
        )
        self._storage = Storage(self.estimate.place)

    def _open_progress(self, trainer: Trainer, identity: str, data: PairDataModule) -> FitProgress | None:
        """The finished stages of this very fit, where they are kept."""
        if self.resume_dir is None:
            return None
        fit = {
            "model": identity,
            "settings": fit_settings(self, data),
            "pairs": data.pairs,
            "instructions": data.instructions,
            "template": data.template.to_dict(),
            "preserve": self.texts,
            "batch_size": data.batch_size,
            "processes": trainer.world_size,
        }
        return FitProgress(self.resume_dir, fit, trainer.is_global_zero, self.store_instruction)

    def _replay(self, trainer: Trainer, pl_module: ThoughtModule, progress: FitProgress) -> None:
        """Through the stages that are finished, but for the last one of the fit, with their patches: nothing is summed
        or solved, but the streams run as they did."""
        runner, self._replaying = _runner(pl_module), True
        for number in range(min(progress.stages, self.steps * runner.num_stages - 1)):
            patch, record = progress.load(number, pl_module.device, runner.block.sites[runner.site])
            for batch in trainer.datamodule.batches:  # type: ignore[attr-defined]
                runner.observe(batch)
            self._install(trainer, pl_module, patch, record["figures"])
            if record["history"]:
                self.history = record["history"]
            runner = _runner(pl_module)
        progress.stages, self._replaying = min(progress.stages, self.steps * runner.num_stages - 1), False

    def _start_step(self, trainer: Trainer, pl_module: ThoughtModule, blocks: Sequence[Block]) -> None:
        """Streams for the next pass through the blocks, over this step's pairs."""
        data: PairDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.pairs_per_step is not None:
            first = self.step * self.pairs_per_step
            turn = [i % len(data.pairs) for i in range(first, first + self.pairs_per_step)]
            data.select(pl_module.tokenizer, turn, pl_module.device)
        runner = pl_module.runner = StreamRunner(
            pl_module.model, blocks, self.sites, self.order, self._storage, self.chosen, self._patches, self.passes
        )
        with self.stopwatch("forward"):
            runner.open(data.batches)

    def _load_preservation(
        self, model: Any, tokenizer: Any, blocks: Sequence[Block], identity: str, show: bool, write: bool = True
    ) -> None:
        self.preserve_cached = None
        file, texts = self.preservation_file, self.texts
        if self.preserve_weight == 0:
            return
        with preservation_bar(len(blocks), show) as progress:
            if file is not None:
                found = unpack(file, next(model.parameters()).device, self.cache_dir, progress)
            elif texts is not None:
                windows = text_windows(tokenizer, texts, WINDOW, self.preserve_tokens)
                found = preservation(
                    model, blocks, windows, self.cache_dir, identity=identity, progress=progress, write=write
                )
            else:
                return
        self._preservation, self.preserve_cached = found

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty sums for this epoch's site."""
        runner = _runner(pl_module)
        block, name = runner.block, runner.site
        settings = StageSettings(
            self.rank, self.ridge, self.preserve_weight, self.step_size, getattr(torch, self.statistics_dtype)
        )
        parts = self.parts["attn_out" if name == JOINT else name]
        self._sums = StageSums(block.sites[name], parts, settings, f"block {block.index}, {name}")

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
        """Solve this site's patch, install it as it will be exported, and stop after the last stage."""
        runner = _runner(pl_module)
        assert self._sums is not None
        with self.stopwatch("reduce"):
            owner = 0 if self.statistics_dir is not None else runner.stage % trainer.world_size  # 0 saves them, too
            device = pl_module.device
            self._sums.reduce(owner, device)
        if self._writer is not None:
            with self.stopwatch("save"):
                site, sums = runner.block.sites[runner.site], self._sums
                self._writer.add(SavedStage.of(runner.block.index, site, runner.start, sums.matrix, sums.vector))
        with self.stopwatch("solve"):
            known = self._preservation if rank_and_size()[0] == owner else None
            prior = known.prior(runner.block, runner.site) if known is not None else None
            patch, figures = self._sums.solve_at(owner, device, runner.start, prior, trainer.num_devices)
        left = figures["error_after"] / figures["error_before"] if figures["error_before"] > 0 else 0.0
        pl_module.log(f"{runner.site}/error_left", left, prog_bar=True, on_epoch=True, rank_zero_only=True)
        self._install(trainer, pl_module, patch, figures)
        if self._progress is not None and self.patch is None:
            self._progress.save(patch, {"figures": figures, "history": self.history})

    def _install(
        self, trainer: Trainer, pl_module: LightningModule, patch: SitePatch, figures: Mapping[str, float]
    ) -> None:
        """Keep a stage's patch and go on; after the last stage of a step, the next step or the end."""
        runner = _runner(pl_module)
        self._patches[runner.block.index, runner.site] = patch
        self._diagnostics[runner.block.sites[runner.site].label] = {k: round(v, 8) for k, v in figures.items()}
        with self.stopwatch("forward"):
            runner.finish(patch)
        if runner.stage == runner.num_stages:
            self._finish_step(trainer, pl_module, runner.blocks)

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule, blocks: Sequence[Block]) -> None:
        """After the last stage of a step: the patch so far, how it does, and the next step or the end."""
        assert isinstance(pl_module, ThoughtModule)
        self.step += 1
        sites = {(index, name): blocks[index].sites[name] for index, name in self._patches}
        factors, vectors = target_changes(sites, self._patches)
        if self._evaluation is not None and not self._replaying:
            with self.stopwatch("validate"):
                self._validate(trainer, self._evaluation.score(ThoughtPatch(factors, {}, vectors)))
        if self.step < self.steps:
            self._start_step(trainer, pl_module, blocks)
            return
        with self.stopwatch("patch"):
            if vectors:  # an adapter has a matrix for each of them, too
                self._provenance["d_in"] = vector_inputs(sites.values(), vectors)
            self._provenance["diagnostics"] = self._diagnostics
            self._provenance["history"] = self.history
            self._provenance |= costs(self.stopwatch, self.estimate)
            self._provenance["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.patch = ThoughtPatch(factors, self._provenance, vectors)
            if self.output_dir is not None and trainer.is_global_zero:
                self.patch.save_adapter(self.output_dir, overwrite=self.overwrite)
            if self._writer is not None:
                self._writer.close()
            if self._progress is not None:
                trainer.strategy.barrier("written")
                self._progress.remove()
        trainer.should_stop = True

    def _validate(self, trainer: Trainer, result: Mapping[str, Any]) -> None:
        """Keep and log, by step, how the validation pairs do; the plain model is step 0."""
        for step, run in ((0, "plain"), (self.step, "patched"))[self.step > 1 :]:
            figures = {
                "fidelity": result["fidelity" if run == "patched" else "fidelity_plain"],
                "output_kl": result["output_kl"][run],
                "output_agreement": result["output_agreement"][run],
            }
            if result["accuracy"] is not None:
                figures["accuracy"] = result["accuracy"][run]
                figures["instructed_accuracy"] = result["accuracy"]["instructed"]
            self.history.append({"step": step, **figures})
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics({f"val/{name}": value for name, value in figures.items()}, step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up after a failed fit, too; Lightning tears down only after one that ended well."""
        self.teardown(trainer, pl_module, "fit")
        pl_module.teardown("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the sums and the cached matrices; statistics that were not completed are not left behind."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        self._preservation = None
        self._sums = None
        self._evaluation = None
        self._storage.close()


def _refuse_auto(**settings: Any) -> None:
    for name, value in settings.items():
        if isinstance(value, str) and value == "auto":
            raise ThoughtError(
                f'{name}="auto" is chosen before the fit: call transmute, or ThoughtCallback(**select_settings(module, '
                f'data, ["{name}"]).settings), from lit_thought.fit.selection.'
            )


def _what_to_preserve(source: TextSource | None) -> tuple[PreservationFile | None, list[str] | None]:
    """The statistics or the texts that were given as ``preserve``, read."""
    if is_preservation_file(source):
        return PreservationFile(cast(Any, source), "preserve"), None
    return None, None if source is None else load_texts(source, "preserve", "preserve")


def _runner(pl_module: LightningModule) -> StreamRunner:
    assert isinstance(pl_module, ThoughtModule)
    assert pl_module.runner is not None
    return pl_module.runner
