"""The Lightning callback that turns a fit without optimizer steps into a thought patch."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lit_thought
from lit_thought.batches import PairBatch
from lit_thought.blocks import Block, check_sites, find_blocks
from lit_thought.data import PairDataModule
from lit_thought.errors import ThoughtError
from lit_thought.files import check_output_folder
from lit_thought.models import fingerprint, model_name
from lit_thought.module import ThoughtModule
from lit_thought.patch import Factors, ThoughtPatch
from lit_thought.preserve import WINDOW, Preservation, preservation
from lit_thought.runner import ORDERS, Observation, StreamRunner
from lit_thought.solve import Solution, check_rank, solve
from lit_thought.statistics import Statistics
from lit_thought.streams import LowRank
from lit_thought.timing import Stopwatch
from lit_thought.unrelated import TextSource, load_texts, text_windows

__all__ = ["ThoughtCallback"]


class ThoughtCallback(Callback):
    """Accumulate the statistics of one site of one block an epoch, solve, install, and go on to the next.

    An epoch is one stage, so a fit takes blocks × sites epochs: use ``Trainer(max_epochs=-1)``; the callback
    stops the run after the last one. The patch is then in :attr:`patch`.

    Args:
        sites: where to patch each block, ``"attn_out"``, ``"mlp_out"`` or both.
        order: ``"sequential"``: each block's plain run has been through the blocks patched so far;
            ``"teacher-forced"``: it enters each block as the instructed run does.
        rank: rank of the patch: an int, a fraction of explained energy in (0, 1), or None for full rank.
        ridge: λ ≥ 0, relative to the mean eigenvalue of the Gram matrix.
        preserve: unrelated text that the patch should leave alone: a text file, a list of texts, ``"default"``
            (text that the package ships) or None.
        preserve_weight: ρ ≥ 0, weight of the unrelated tokens' mean Gram matrix against that of the pairs.
        preserve_tokens: most tokens of unrelated text to use.
        statistics_dtype: dtype of the sums, ``"float64"`` or ``"float32"``; the solve is always float64.
        offload: keep the streams on the CPU between uses, for a model on a GPU.
        cache_dir: where the preservation statistics of each model are kept.
        output_dir: folder to write the adapter to at the end; not written when left out.
        overwrite: replace ``output_dir`` if it exists.

    Attributes:
        patch: the :class:`~lit_thought.patch.ThoughtPatch`, once the fit has ended.
        stopwatch: seconds by stage: preserve (load or compute), prepare (write missing outputs, tokenise, batch),
            forward, statistics, solve, patch.
        preserve_cached: whether the preservation statistics came from the cache; None without preservation.

    Raises:
        ThoughtError: for a setting out of range.
    """

    def __init__(
        self,
        sites: Sequence[str] = ("attn_out", "mlp_out"),
        order: Literal["sequential", "teacher-forced"] = "sequential",
        rank: int | float | None = 16,
        ridge: float = 3e-2,
        preserve: TextSource | None = "default",
        preserve_weight: float = 3.0,
        preserve_tokens: int = 12_000,
        statistics_dtype: Literal["float32", "float64"] = "float64",
        offload: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.sites = check_sites(sites)
        if order not in ORDERS:
            raise ThoughtError(f"order must be one of {list(ORDERS)}; got {order!r}.")
        check_rank(rank, 10**9)
        for name, value in (("ridge", ridge), ("preserve_weight", preserve_weight)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ThoughtError(f"{name} must be a finite number ≥ 0; got {value!r}.")
        if not isinstance(preserve_tokens, int) or preserve_tokens < 2:
            raise ThoughtError(f"preserve_tokens must be a whole number of 2 or more; got {preserve_tokens!r}.")
        if statistics_dtype not in ("float32", "float64"):
            raise ThoughtError(f'statistics_dtype must be "float32" or "float64"; got {statistics_dtype!r}.')
        self.texts = load_texts(preserve, "preserve", "preserve") if preserve is not None else None
        if output_dir is not None:
            check_output_folder(output_dir, overwrite)
        self.order, self.rank, self.ridge = order, rank, float(ridge)
        self.preserve_weight, self.preserve_tokens = float(preserve_weight), preserve_tokens
        self.statistics_dtype = statistics_dtype
        self.offload, self.cache_dir = offload, cache_dir
        self.output_dir, self.overwrite = output_dir, overwrite
        self.patch: ThoughtPatch | None = None
        self.stopwatch = Stopwatch()
        self.preserve_cached: bool | None = None
        self._forget()

    def _forget(self) -> None:
        self._preservation: Preservation | None = None
        self._statistics: Statistics | None = None
        self._factors: dict[str, Factors] = {}
        self._diagnostics: dict[str, dict[str, float]] = {}
        self._provenance: dict[str, Any] = {}

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
        stages = len(blocks) * len(self.sites)
        allowed = trainer.max_epochs
        if allowed is not None and allowed != -1 and allowed < stages:
            raise ThoughtError(
                f"max_epochs={allowed} is too few: {len(blocks)} blocks × {len(self.sites)} sites need {stages}. "
                "Use Trainer(max_epochs=-1); the callback stops the run after the last one."
            )
        if (trainer.min_epochs or 0) > stages:
            raise ThoughtError(f"min_epochs={trainer.min_epochs} is too many: the fit ends after {stages} epochs.")
        if trainer.world_size > 1:
            raise ThoughtError(
                f"not supported yet: a fit on {trainer.world_size} processes. Use Trainer(devices=1, num_nodes=1)."
            )
        limit = trainer.limit_train_batches  # the float 1.0 is all batches, the int 1 a single one
        if isinstance(limit, int) or limit not in (None, 1.0):
            raise ThoughtError("limit_train_batches must be left out: the statistics need every batch.")
        if trainer.precision not in ("32-true", "64-true"):
            raise ThoughtError(
                f"precision={trainer.precision!r} must be left out; load the model in the dtype you want instead "
                '(load_model(name, dtype="bfloat16")).'
            )
        sites = [block.sites[name] for block in blocks for name in self.sites]
        check_rank(self.rank, min(min(site.d_in, site.d_out) for site in sites))

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write missing outputs, align and batch the pairs, open the streams, get the preservation statistics."""
        assert isinstance(pl_module, ThoughtModule)
        model, tokenizer, data = pl_module.model, pl_module.tokenizer, trainer.datamodule  # type: ignore[attr-defined]
        self._forget()
        self.patch = None
        self.stopwatch = Stopwatch()
        show = trainer.progress_bar_callback is not None
        blocks = find_blocks(model)
        with self.stopwatch("prepare"):
            prompts = data.check(model, tokenizer)
        with self.stopwatch("preserve"):
            identity = fingerprint(model)
            self._load_preservation(model, tokenizer, blocks, identity, show)
        with self.stopwatch("prepare"):
            data.prepare(model, tokenizer, prompts, progress=show)
        pl_module.runner = StreamRunner(model, blocks, self.sites, self.order, self.offload)
        self._provenance = self._describe(model, blocks, identity, data)

    def _load_preservation(
        self, model: Any, tokenizer: Any, blocks: Sequence[Block], identity: str, show: bool
    ) -> None:
        self.preserve_cached = None
        if self.texts is None or self.preserve_weight == 0:
            return
        windows = text_windows(tokenizer, self.texts, WINDOW, self.preserve_tokens)
        with tqdm(
            total=len(blocks),
            desc="Preservation statistics (once per model)",
            unit="block",
            disable=not show,
            leave=False,
        ) as bar:
            self._preservation, self.preserve_cached = preservation(
                model,
                blocks,
                windows,
                self.cache_dir,
                identity=identity,
                progress=lambda done: bar.update(done - bar.n) and None,
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty sums for this epoch's site."""
        runner = _runner(pl_module)
        site = runner.block.sites[runner.site]
        self._statistics = Statistics(site.d_in, site.d_out, getattr(torch, self.statistics_dtype))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the forward pass."""
        self._started = self.stopwatch.now()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Add the batch's compared tokens to the sums."""
        self.stopwatch.seconds["forward"] += self.stopwatch.now() - self._started
        seen: Observation = outputs["observation"]
        assert self._statistics is not None
        with self.stopwatch("statistics"):
            self._statistics.update(seen.a, seen.delta, seen.weights)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve this site's patch, install it as it will be exported, and stop after the last stage."""
        runner = _runner(pl_module)
        block, site = runner.block, runner.block.sites[runner.site]
        name = f"block {block.index}, {site.name}"
        assert self._statistics is not None
        with self.stopwatch("solve"):
            prior = self._preservation.prior(block, site.name) if self._preservation is not None else None
            solution = solve(self._statistics, self.ridge, prior, self.preserve_weight, self.rank, name)
            low_rank = _exported(solution)
        self._factors[site.path] = Factors(low_rank.A.cpu(), low_rank.B.cpu())
        self._diagnostics[site.path] = {key: round(value, 8) for key, value in solution.diagnostics.items()}
        self._log(pl_module, site.name, solution)
        with self.stopwatch("forward"):
            runner.finish(low_rank)
        if runner.stage == runner.num_stages:
            self._finish()
            trainer.should_stop = True

    def _log(self, pl_module: LightningModule, site: str, solution: Solution) -> None:
        before, after = (solution.diagnostics[f"error_{when}"] for when in ("before", "after"))
        left = after / before if before > 0 else 0.0
        pl_module.log(f"{site}/error_left", left, prog_bar=True, on_epoch=True)

    def _finish(self) -> None:
        with self.stopwatch("patch"):
            self._provenance["diagnostics"] = self._diagnostics
            self._provenance["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.patch = ThoughtPatch(self._factors, self._provenance)
            if self.output_dir is not None:
                self.patch.save_adapter(self.output_dir, overwrite=self.overwrite)

    def _describe(
        self, model: PreTrainedModel, blocks: Sequence[Block], identity: str, data: PairDataModule
    ) -> dict[str, Any]:
        """What the patch remembers of how it was made."""
        packages = ("torch", "transformers", "peft", "lightning")
        return {
            "model": model_name(model),
            "base_model": model_name(model),
            "revision": getattr(model.config, "_commit_hash", None),
            "fingerprint": identity,
            "fan_in_fan_out": blocks[0].sites[self.sites[0]].fan_in_fan_out,
            "instruction": data.instruction if data.instruction is not None else sorted(set(data.instructions)),
            "template": data.template.to_dict(),
            "settings": {
                "sites": list(self.sites),
                "order": self.order,
                "rank": self.rank,
                "ridge": self.ridge,
                "preserve_weight": self.preserve_weight if self.texts is not None else 0.0,
                "preserve_tokens": self.preserve_tokens if self.texts is not None else 0,
                "statistics_dtype": self.statistics_dtype,
                "pairs": len(data.pairs),
                "generated_outputs": sum("output" not in pair for pair in data.pairs),
                "generate": data.generate_options,
                "max_new_tokens": data.max_new_tokens,
                "answer_weight": data.answer_weight,
                "seed": data.seed,
            },
            "versions": {"lit_thought": lit_thought.__version__, **{p: version(p) for p in packages}},
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up after a failed fit, too; Lightning tears down only after one that ended well."""
        self.teardown(trainer, pl_module, "fit")
        pl_module.teardown("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the sums and the cached matrices."""
        self._preservation = None
        self._statistics = None


def _runner(pl_module: LightningModule) -> StreamRunner:
    assert isinstance(pl_module, ThoughtModule)
    assert pl_module.runner is not None
    return pl_module.runner


def _exported(solution: Solution) -> LowRank:
    """The factors in float32, as the adapter will hold them; a patch of nothing has rank 1 and is zero."""
    A, B = solution.A.float(), solution.B.float()
    if A.shape[0] == 0:
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    return LowRank(A.contiguous(), B.contiguous())
