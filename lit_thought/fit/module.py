"""The LightningModule around a frozen causal LM."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.fit.strategy import shard_model
from lit_thought.model.bare import bare_model, check_tokenizer
from lit_thought.model.loading import evaluating
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Observation, StreamRunner

__all__ = ["ThoughtModule"]


class ThoughtModule(LightningModule):
    """A frozen causal LM that observes itself with and without an instruction; it trains nothing.

    ``training_step`` runs one site of one block on one batch through :class:`~lit_thought.runs.runner.StreamRunner`
    and returns the :class:`~lit_thought.runs.runner.Observation`; what to do with it is the callback's business.

    Args:
        model: a causal LM that :func:`~lit_thought.model.blocks.find_blocks` knows; wrappers that change nothing come
            off (:func:`~lit_thought.model.bare.unwrap`).
        tokenizer: its tokenizer.

    Raises:
        ThoughtError: when there is no tokenizer, or ``model`` is no causal LM of transformers in one place: see
            :func:`~lit_thought.model.bare.bare_model`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.model = bare_model(model)
        self.tokenizer = check_tokenizer(tokenizer)
        self.runner: StreamRunner | None = None
        self._mode = ExitStack()
        self._home: torch.device | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave gradients alone, which Lightning clears before it trains: those of a frozen model are its owner's."""

    def configure_optimizers(self) -> list[Optimizer]:
        """No optimizer: the patch is solved, not trained. (Of None, Lightning warns.)"""
        return []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Empty: the frozen model is not worth a checkpoint."""
        return {}

    def configure_model(self) -> None:
        """Under a strategy with a device mesh (``"thought_fsdp"``), shard the model over it, in place and for good."""
        if self.device_mesh is not None and not is_sharded(self.model):
            shard_model(self.model, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Switch dropout off, before the callback generates outputs; Lightning leaves the mode as it finds it."""
        self._mode.enter_context(evaluating(self.model))
        self._home = None if is_sharded(self.model) else self.model.device

    def cpu(self) -> Self:
        """To the CPU; at the end of a fit, where Lightning calls this, to the device that the model came from."""
        home, self._home = self._home, None
        return super().cpu() if home is None else self.to(home)

    def training_step(self, batch: PairBatch | None, batch_idx: int) -> dict[str, Observation] | None:
        """Observe the current site of the current block on one batch; nothing where another process has more."""
        if self.runner is None:
            raise ThoughtError("ThoughtModule has no streams. Give the Trainer a ThoughtCallback.")
        if batch is None:
            return None
        return {"observation": self.runner.observe(batch)}

    def teardown(self, stage: str) -> None:
        """Drop the streams and put the model back into the mode it came in."""
        if self.runner is not None:
            self.runner.close()
        self.runner = None
        self._mode.close()
