"""A fit with a plain Trainer, on the model's own device."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch import Trainer

from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.progress import StageProgressBar
from lit_thought.patch.patch import ThoughtPatch

__all__ = ["fit"]


def fit(module: ThoughtModule, data: PairDataModule, callback: ThoughtCallback, progress: bool = True) -> ThoughtPatch:
    """Run the fit with a plain Trainer on the model's own device and return the patch.

    Raises:
        ThoughtError: for bad input.
    """
    device = module.model.device
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # Lightning sets another for good
    with _quiet_lightning(), current:
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
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # which Lightning leaves on
                trainer.fit(module, datamodule=data)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C, with the signal ignored from then on
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
    assert callback.patch is not None
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
