"""What a fit needs before its first stage: batches of complete pairs, a plan, preservation, what is kept of it."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Trainer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.fit.budget import plan
from lit_thought.fit.data import PairDataModule, Written
from lit_thought.fit.estimate import Estimate
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preserving import Asked, PreservationSource
from lit_thought.fit.provenance import describe, identity_of, kept_settings
from lit_thought.fit.validation import Validation
from lit_thought.fit.weighing import weighed_by_change
from lit_thought.inputs.write import write_pairs
from lit_thought.model.bare import hook_names
from lit_thought.model.blocks import Block, find_blocks, require_site
from lit_thought.model.loading import context_window
from lit_thought.model.sharding import is_sharded
from lit_thought.patch.weights import patched_fingerprint
from lit_thought.runs.generate import generate
from lit_thought.runs.runner import Stage, StreamRunner, stages_of
from lit_thought.runs.storage import Storage
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import DEFAULT_SITES, LONG_SITES, FitSettings, directions_for
from lit_thought.statistics.distributed import gather_json, share
from lit_thought.statistics.manifest import Manifest
from lit_thought.statistics.preserve_file import Preservation, config_hash
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import StatisticsWriter
from lit_thought.timing import Stopwatch

__all__ = [
    "Preparation",
    "chosen_stages",
    "common_fingerprint",
    "largest_rank",
    "prepare_pairs",
    "write_inputs",
    "write_outputs",
]

_log = logging.getLogger("lit_thought")


def prepare_pairs(
    data: PairDataModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool = False,
) -> None:
    """Write inputs where some are to be written, tokenise all pairs of ``data``, write their missing outputs, and batch
    them, at its answer weight or the default.

    Raises:
        ThoughtError: when a prompt overflows the context window, or no input can be written.
    """
    limit = context_window(model)
    write_inputs(data, model, tokenizer, progress)
    data.tokenise(tokenizer, limit)
    data.complete(tokenizer, write_outputs(data, model, tokenizer, progress), limit)
    weight = data.settings.settled().answer_weight
    assert weight is not None
    data.select(range(len(data.pairs)), weight, model.device)


def write_inputs(
    data: PairDataModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool = False,
    times: float = 1.0,
) -> None:
    """Let the model write the inputs that ``data`` lacks, and add them; ``times`` the usual number, where none is said.

    Raises:
        ThoughtError: when none can be written.
    """
    if not data.to_write:
        return
    settings, instruction = data.settings, data.instruction
    assert instruction is not None
    data.check_given(tokenizer, context_window(model))
    wanted = settings.inputs if isinstance(settings.inputs, int) else None
    with tqdm(desc="Writing inputs", unit=" inputs", disable=not progress) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = write_pairs(
            model,
            tokenizer,
            instruction,
            data.given_template,
            total=wanted,
            times=times,
            kind=settings.kind,
            given=data.given,
            apart=data.val_pairs,
            longest=data.longest(tokenizer),
            seed=settings.seed,
            batch_size=settings.batch_size,
            advance=advance,
        )
    data.add(written.pairs, written.template, written.kind)
    if wanted is not None and len(data.pairs) < wanted:
        _log.warning(
            "inputs=%d: there are %d, since the model wrote no more that differ and fit into its context window.",
            *(wanted, len(data.pairs)),
        )
    if progress:
        names = {"demonstrations": "a list of demonstrations", "system": "a system prompt", "document": "a document"}
        taken = f"the instruction was taken for {names[written.kind]} (the setting kind can say otherwise)"
        tqdm.write(f"Wrote {len(written.pairs)} inputs; {taken}.", file=sys.stderr)


def write_outputs(
    data: PairDataModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool = False,
    indices: Sequence[int] | None = None,
) -> list[Written]:
    """What the instructed model writes where an output is missing; pairs with one instruction share its run.

    Each process writes its share, and of a sharded model, whose processes must go through it together, all of them.

    Args:
        data: the pairs, tokenised; what is :attr:`~PairDataModule.known` is not written again.
        model: the instructed model.
        tokenizer: its tokenizer.
        progress: show a progress bar.
        indices: of the pairs without an output those to write; all of them when left out.
    """
    if data.known is not None:
        return data.known
    wanted = data.missing if indices is None else list(indices)
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = {}  # by how often a prompt came before, on whichever process
    for i in wanted:
        prompt = data.tokenised[i].instructed_ids
        seeds[i] = data.settings.seed + (seen[prompt] << 32)
        seen[prompt] += 1
    missing: dict[str, list[int]] = {}
    for i in wanted if is_sharded(model) else share(wanted):
        missing.setdefault(data.instructions[i], []).append(i)
    total = sum(map(len, missing.values()))
    own: list[Written] = []
    settings, longest, ending = data.settings, data.longest(tokenizer), data.template.ending(tokenizer)
    with tqdm(total=total, desc="Generating outputs", unit="pair", disable=not progress or total == 0) as bar:
        for members in missing.values():
            before = bar.n
            outputs = generate(
                model,
                tokenizer,
                [data.tokenised[i].instructed_ids for i in members],
                max_new_tokens=longest,
                batch_size=settings.batch_size,
                seed=[seeds[i] for i in members],
                progress=lambda done, before=before: bar.update(before + done - bar.n),  # type: ignore[misc]
                options=settings.generate or {},
                **ending,
            )
            own += [(i, output.text, output.finished) for i, output in zip(members, outputs, strict=True)]
    every = {i: (i, text, finished) for part in gather_json(own, model.device) for i, text, finished in part}
    return [every[i] for i in sorted(every)]


def try_options(data: PairDataModule, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write one token with the options for missing outputs, before any long work.

    Raises:
        ThoughtError: when a value is wrong.
    """
    prompt = tokenizer(data.instruction or data.instructions[0], verbose=False)["input_ids"][:8] or [0]
    generate(model, tokenizer, [prompt], max_new_tokens=1, options=data.settings.generate)


def common_fingerprint(model: PreTrainedModel) -> str:
    """The model's fingerprint, with the patches that are on it.

    Raises:
        ThoughtError: when the processes of a fit hold different weights.
    """
    found = patched_fingerprint(model)
    if len(set(gather_json(found, model.device))) > 1:
        raise ThoughtError("model: the processes of this fit hold different weights. Load the same in each.")
    return found


def chosen_stages(blocks: Sequence[Block], settings: FitSettings, long: bool) -> tuple[tuple[str, ...], list[Stage]]:
    """The sites of a fit that the model has, and the stages of a step, for a long instruction or another.

    Raises:
        UnsupportedModelError: when a site that was asked for is in no block, or none of the default ones is.
    """
    for name in settings.sites or ():
        require_site(blocks, name)
    there = [name for name in DEFAULT_SITES if any(name in block.sites for block in blocks)]
    if long:
        there = [name for name in there if name in LONG_SITES] or there
    sites = tuple(there if settings.sites is None else settings.sites)
    stages = stages_of(blocks, sites, cast(Any, settings.blocks))  # "auto" is chosen by now
    if not stages:
        raise UnsupportedModelError(
            f"blocks={settings.blocks}: none of them has one of the sites {list(sites)}. Choose other blocks."
        )
    return sites, stages


def largest_rank(blocks: Sequence[Block], stages: Sequence[Stage]) -> int:
    """The largest rank that all layers of these stages allow."""
    sites = [blocks[stage.block].sites[stage.site] for stage in stages]
    return min(min(site.d_in, site.d_out) for site in sites)


class Preparation:
    """All that a fit needs before its first stage.

    Args:
        trainer: Lightning's, with a :class:`~lit_thought.fit.data.PairDataModule`.
        module: the model.
        settings: the callback's, settled.
        preserved: what to preserve.
        stopwatch: takes the seconds of the phases prepare, preserve and validate.

    Attributes:
        blocks: the model's blocks, on its device.
        sites: where they are patched.
        long: whether the instruction is a long one, with a rank, sites and weights of its own.
        directions: k of the preservation statistics.
        estimate: this process's memory and time.
        storage: where the streams are kept.
        preservation: the preservation statistics, or None.
        preserve_cached: whether they came from the cache; None without.
        unfinished: the finished stages of this very fit, where they are kept, or None.
        provenance: how the patch is made, as far as it is known.
        writer: what keeps the statistics, or None.
        validation: the validation pairs, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: ThoughtModule,
        settings: FitSettings,
        preserved: PreservationSource,
        stopwatch: Stopwatch,
    ) -> None:
        self.trainer, self.module, self.preserved, self.stopwatch = trainer, module, preserved, stopwatch
        self.data: PairDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.blocks = find_blocks(module.model)
        self.long = self.data.is_long(module.tokenizer)
        self.sites, self.stages = chosen_stages(self.blocks, settings, self.long)
        self.directions = directions_for(self.long)
        largest = largest_rank(self.blocks, self.stages)
        # FitSettings, with nothing "auto" or left out
        self.settings: Any = replace(settings, sites=self.sites).suited(self.long, largest)
        self.estimate: Estimate | None = None
        self.storage = Storage()
        self.preservation: Preservation | None = None
        self.preserve_cached: bool | None = None
        self.unfinished: UnfinishedFit | None = None
        self.provenance: dict[str, Any] = {}
        self.writer: StatisticsWriter | None = None
        self.validation: Validation | None = None
        self._weighed = False

    def run(self, overwrite: bool = False) -> None:
        """Tokenise, plan, load or compute the preservation statistics, write missing outputs, open what is kept.

        Args:
            overwrite: replace the folder of statistics if it exists.

        Raises:
            ThoughtError: for pairs or a file that do not fit the model, or a folder of another fit.
            MemoryBudgetError: when the fit needs more memory than there is.
        """
        model, tokenizer, data, settings = self.module.model, self.module.tokenizer, self.data, self.settings
        trainer, first = self.trainer, self.trainer.is_global_zero
        show = trainer.progress_bar_callback is not None
        limit = context_window(model)
        with self.stopwatch("prepare"):
            identity = common_fingerprint(model)
        if settings.resume_dir is not None:
            kept, summing = self._kept(), settings.statistics_dir is not None
            ours, processes = [identity, config_hash(model), *hook_names(model)], trainer.world_size
            if data.val_pairs:  # whose figures are of the scaled patch
                kept |= {"scale": settings.scale}
            whole = identity_of(kept, self.preserved.texts, ours, tokenizer, data, processes, summing)
            self.unfinished = UnfinishedFit(settings.resume_dir, whole, first, settings.store_instruction)
            if self.unfinished.inputs is not None:
                data.restore(self.unfinished.inputs)
        apart = not data.is_chat(tokenizer)
        self.preserved.check(model, tokenizer, settings, self.blocks, self.sites, self.directions, apart, identity)
        if data.settings.generate and data.known is None and (data.missing or data.to_write):
            try_options(data, model, tokenizer)
        with self.stopwatch("write"):
            write_inputs(data, model, tokenizer, show and first)
        data.check_step(settings.pairs_per_step, tokenizer)  # which the model may have written fewer of
        with self.stopwatch("prepare"):
            data.tokenise(tokenizer, limit)
            for told in filter(None, (data.is_no_chat(tokenizer), data.saves_nothing()) if first else ()):
                _log.warning(told)
            self._plan(len(data.missing) * data.longest(tokenizer))
        windows = self.preserved.windows(model, tokenizer, settings, apart)
        asked = Asked(model, self.blocks, self.sites, settings, identity, self.directions, *windows)
        if show and first:
            tqdm.write(f"{self.estimate} {self.preserved.place(asked)}".strip(), file=sys.stderr)
        assert self.estimate is not None
        _log.debug("memory: %s", self.estimate.parts())
        with self.stopwatch("preserve"):
            self.preservation, self.preserve_cached = self.preserved.load(trainer, asked, show)
        with self.stopwatch("prepare"):
            before = None if self.unfinished is None else self.unfinished.outputs
            data.complete(tokenizer, before or write_outputs(data, model, tokenizer, show), limit)
            if data.written:
                place = self.storage.place
                self._plan(0)
                if self.storage.place != place and show and first:
                    tqdm.write(str(self.estimate), file=sys.stderr)
            answers = data.answer_tokens(settings.pairs_per_step)
            self.settings = self.settings.weighed(answers, apart or self.long)
        if self.unfinished is not None:
            trainer.strategy.barrier("resume")
            self.unfinished.start(data.written, data.inputs())
        self.provenance = describe(self._kept(), model, self.blocks, identity, data, settings.store_instruction)
        if settings.statistics_dir is not None and first:
            entry = self.preservation.path.name if self.preservation is not None else None
            uncompared = sum(len(pair.plain_ids) - len(pair.plain_positions) for pair in data.tokenised)
            manifest = Manifest({**self.provenance, "scale": settings.scale}, entry, uncompared)
            self.writer = StatisticsWriter(settings.statistics_dir, manifest, overwrite)
        if data.val_pairs and (first or is_sharded(model)):  # of a sharded model all must run it
            with self.stopwatch("validate"):
                self.validation = Validation(data, model, tokenizer, show and first)

    def _kept(self) -> dict[str, Any]:
        longest = self.data.longest(self.module.tokenizer)
        kept = kept_settings(self.settings, self.preserved, self.data, longest)
        return kept | ({"answers_weighed": True} if self.long else {})

    def _plan(self, missing: int) -> None:
        """Batch the longest pairs of a step, refuse a fit that does not fit, and choose where its streams are kept.

        Args:
            missing: most tokens of outputs that are still to be written.
        """
        settings, data = self.settings, self.data
        self._select(sorted(range(len(data.pairs)), key=data.by_length)[: settings.pairs_per_step])
        self.estimate = plan(
            self.module.model,
            self.blocks,
            self.stages,
            data.batches,
            offload=settings.offload,
            memory_budget=settings.memory_budget,
            directions=self.directions if self.preserved and settings.preserve_weight != 0 else 0,
            processes=self.trainer.num_devices,
            steps=settings.steps,
            missing=missing,
            weighings=(settings.steps if settings.pairs_per_step else 1) if self.long else 0,
        )
        self.storage = Storage(self.estimate.place)

    def _select(self, indices: Sequence[int]) -> None:
        self.data.select(indices, self._answer_weight, self.module.device)
        self._weighed = False

    @property
    def _answer_weight(self) -> float:
        return float(self.data.settings.answer_weight or self.settings.answer_weight)

    def start_step(self, step: int, patches: Mapping[tuple[int, str], SitePatch]) -> StreamRunner:
        """Streams for a step, over its pairs, with the patches so far."""
        settings, every = self.settings, len(self.data.pairs)
        if settings.pairs_per_step is not None:
            first = step * settings.pairs_per_step
            self._select([i % every for i in range(first, first + settings.pairs_per_step)])
        if not self._weighed and self.long:
            show = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
            with self.stopwatch("prepare"):
                self.data.batches = weighed_by_change(self.module.model, self.data.batches, self._answer_weight, show)
        self._weighed = True
        runner = StreamRunner(
            self.module.model, self.blocks, self.sites, settings.order, self.storage, settings.blocks, patches
        )
        with self.stopwatch("forward"):
            runner.open(self.data.batches)
        return runner

    def close(self) -> None:
        """Free what is held; statistics that were not completed are not left behind."""
        if self.writer is not None:
            self.writer.abort()
        self.writer = self.preservation = self.validation = None
        self.storage.close()
