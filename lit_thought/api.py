"""One call from a model, an instruction and some inputs to a thought patch."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.callback import ThoughtCallback
from lit_thought.data import PairDataModule
from lit_thought.errors import ThoughtError
from lit_thought.module import ThoughtModule
from lit_thought.patch import ThoughtPatch
from lit_thought.progress import StageProgressBar
from lit_thought.prompts import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.unrelated import TextSource

__all__ = ["fit", "transmute"]

ModelLoader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def transmute(
    model: PreTrainedModel | ModelLoader,
    tokenizer: PreTrainedTokenizerBase | None = None,
    instruction: str | None = None,
    pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] = (),
    template: str | PromptTemplate = DEFAULT_TEMPLATE,
    *,
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
    answer_weight: float | None = None,
    generate: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    val_pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    statistics_dtype: Literal["float32", "float64"] = "float64",
    offload: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
    statistics_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> ThoughtPatch:
    """Find the change of weights that makes the plain prompt behave like the instructed one.

    Thin: a ``Trainer.fit`` of :class:`~lit_thought.module.ThoughtModule` over
    :class:`~lit_thought.data.PairDataModule` with :class:`~lit_thought.callback.ThoughtCallback`; the arguments
    are theirs. The model is left bit for bit as it was.

    Args:
        model: a frozen causal LM of transformers (``lit-thought inspect`` says what it finds in one), in any floating
            dtype or quantised; or a function without arguments that loads and returns (model, tokenizer), called once
            all other arguments have been checked.
        tokenizer: its tokenizer; left out when ``model`` is such a function.
        instruction: the removable chunk of the prompt.
        pairs: inputs, with outputs where you have them; see :class:`~lit_thought.data.PairDataModule`.
        template: how instruction, input and output make a prompt.
        sites: where to patch each block: attn_out, mlp_in, mlp_out or several of them; left out, attn_out and mlp_out
            wherever a block has them.
        parts: what to solve for, matrix, vector or both; left out, a matrix, and at mlp_in a vector too.
        blocks: indices of the blocks to patch; all when left out.
        order: sequential (each block sees the blocks patched so far) or teacher-forced (the instructed run).
        steps: how often to go through the blocks, the patch so far in place; left out, 1, and 2 for mlp_in alone.
        step_size: how much of each step's solution is added, in (0, 1]; left out, 1, and 0.5 for mlp_in alone.
        pairs_per_step: pairs that a step is solved from, the next ones in turn; all pairs when left out.
        passes: how often to solve a site whose output goes through a norm (Gemma, OLMo 2); others are solved once.
        rank: rank of the patch: an integer, a fraction of explained energy in (0, 1), or None for full rank.
        ridge: λ ≥ 0, relative to the mean eigenvalue of the Gram matrix.
        preserve: unrelated text to leave alone: a text file, a list of texts, "default" (shipped text) or None.
        preserve_weight: ρ ≥ 0, weight of the unrelated text against the pairs; left out, 3, and 1 for mlp_in alone.
        preserve_tokens: most tokens of unrelated text to use.
        answer_weight: weight of the output's tokens and the token before them, others weigh 1; left out, 10, and 100
            for mlp_in alone.
        generate: options of model.generate for outputs that are missing; greedy when left out.
        max_new_tokens: longest output that the instructed model may write.
        batch_size: pairs a batch; the patch does not depend on it.
        val_pairs: pairs to follow the fit with, step by step (in the patch's provenance, as history).
        statistics_dtype: dtype of the sums, float64 or float32; the solve is always float64.
        offload: keep the streams on the CPU between uses, for a model on a GPU.
        resume_dir: folder for the finished stages of this fit; interrupted, the same call goes on from there.
        statistics_dir: folder to keep the statistics of every stage in, to solve again at other settings.
        cache_dir: where each model's preservation statistics are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        progress: show progress bars.
        seed: seed of the generated outputs, where they are sampled.

    Returns:
        The patch, not applied.

    Raises:
        ThoughtError: for bad input, before any long work.

    Example:
        >>> patch = transmute(model, tokenizer, "Answer with the opposite.\\n", [{"input": "hot"}])  # doctest: +SKIP
        >>> patch.save_adapter("antonym/")  # doctest: +SKIP
    """
    callback = ThoughtCallback(
        sites=sites,
        parts=parts,
        blocks=blocks,
        order=order,
        steps=steps,
        step_size=step_size,
        pairs_per_step=pairs_per_step,
        passes=passes,
        rank=rank,
        ridge=ridge,
        preserve=preserve,
        preserve_weight=preserve_weight,
        preserve_tokens=preserve_tokens,
        statistics_dtype=statistics_dtype,
        offload=offload,
        resume_dir=resume_dir,
        statistics_dir=statistics_dir,
        cache_dir=cache_dir,
    )
    data = PairDataModule(
        pairs,
        instruction,
        template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        generate=generate,
        seed=seed,
        answer_weight=answer_weight,
        val_pairs=val_pairs,
    )
    if not isinstance(model, PreTrainedModel) and callable(model):
        model, tokenizer = model()
    return fit(ThoughtModule(model, tokenizer), data, callback, progress=progress)


def fit(module: ThoughtModule, data: PairDataModule, callback: ThoughtCallback, progress: bool = True) -> ThoughtPatch:
    """Run the fit with a plain Trainer on the model's own device and return the patch.

    Raises:
        ThoughtError: for bad input, or when the fit was interrupted.
    """
    model = module.model
    device = model.device
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=-1,
            callbacks=[callback, StageProgressBar()] if progress else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C, with the signal ignored from then on
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
        finally:
            torch.nn.Module.to(model, device)  # Lightning moves a module to the CPU when it is done
    if callback.patch is None:
        raise ThoughtError("the fit was interrupted before its last block; there is no patch.")
    return callback.patch


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banner and its advice on data loading, which does not apply here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
