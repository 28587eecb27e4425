"""A progress bar that counts a fit's stages: one site of one block each; in a notebook, a figure beside it."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.module import ThoughtModule
from lit_thought.patch.display import bars, html_table
from lit_thought.runs.runner import StreamRunner

__all__ = ["StageProgressBar"]

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""One line of 80 columns, with one figure."""


class StageProgressBar(ProgressBar):
    """One bar for the whole fit, instead of one for each epoch; shows what the latest solve left of the error. In a
    notebook, what all solves so far have left of it is drawn below, by block and site. Among a trainer's callbacks it
    stands after the :class:`~lit_thought.fit.callback.ThoughtCallback`, which solves."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._figure: Any = None
        self._site, self._block = "", 0
        self._left: dict[str, dict[int, float]] = {}

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Lightning calls this on the first rank."""
        self._enabled = True

    _enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        runner = _runner(pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        steps = sum(callback.steps for callback in callbacks if isinstance(callback, ThoughtCallback))
        total = steps * runner.num_stages if runner is not None else None
        self._bar = tqdm(total=total, desc="Fitting", disable=not self._enabled, bar_format=_FORMAT)
        self._left = {}
        self._figure = _live_figure() if self._enabled else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the site at work, whose error is told once it is solved."""
        runner = _runner(pl_module)
        self._site, self._block = ("", 0) if runner is None else (runner.site, runner.block.index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the stage, and tell what its solve left of the error."""
        if self._bar is not None:
            left = trainer.callback_metrics.get(f"{self._site}/error_left")
            if left is not None:
                self._bar.set_postfix_str(f"error left {float(left):.2f}", refresh=False)
                self._left.setdefault(self._site, {})[self._block] = float(left)
            self._bar.update(1)
        if self._figure is not None:
            self._figure.update(_Table(self._left))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = self._figure = None


class _Table:
    """What is left of the error by block, a row of bars for each site."""

    def __init__(self, left: dict[str, dict[int, float]]) -> None:
        self.rows = [(site, bars([found[block] for block in sorted(found)])) for site, found in left.items()]

    def _repr_html_(self) -> str:
        return html_table("Error left by block, full bars for all of it", self.rows)


def _live_figure() -> Any:
    """A place in the notebook that runs this, to be drawn at anew; None anywhere else."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    return display(_Table({}), display_id=True)


def _runner(pl_module: LightningModule) -> StreamRunner | None:
    return pl_module.runner if isinstance(pl_module, ThoughtModule) else None
