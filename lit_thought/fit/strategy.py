"""Several processes for a model that is not trained: ``Trainer(devices=N, strategy="thought_ddp" or "thought_fsdp")``.

Under ``"thought_ddp"`` every process holds the whole model, under ``"thought_fsdp"`` a share of its weights; either way
each sees a share of the pairs. There is nothing to train, so there is no gradient bucket and no synchronisation of
weights; what is summed over processes are the statistics, by the callback (:mod:`lit_thought.statistics.distributed`).
"""

from __future__ import annotations

import signal
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lit_thought.errors import ThoughtError
from lit_thought.model.bare import bare_model
from lit_thought.model.calls import find_layers
from lit_thought.model.layers import is_linear, sits_beside
from lit_thought.model.loading import evaluating
from lit_thought.model.tracing import trace_model

__all__ = ["ThoughtDDPStrategy", "ThoughtFSDPStrategy", "check_epochs", "check_trainer", "shard_model"]

_launchers: list[Any] = []  # the first one's processes serve all fits of a script


class _EndingTogether(ParallelStrategy):
    """A strategy under which a process that fails ends the others."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self.launcher is not None:  # torchrun and SLURM start processes themselves
            _launchers.append(self.launcher)

    def on_exception(self, exception: BaseException) -> None:
        """End the processes started here, which may be waiting for this one; a ThoughtError they raise themselves."""
        super().on_exception(exception)
        if not isinstance(exception, ThoughtError):
            for launcher in _launchers:
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


class ThoughtDDPStrategy(_EndingTogether, DDPStrategy):
    """Lightning's ``DDPStrategy``, launchers, clusters (torchrun, SLURM) and all, without the DDP wrapper.

    By name: ``"thought_ddp"`` (a process for each device, started by Lightning or by the cluster) and
    ``"thought_ddp_spawn"``.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is: PyTorch refuses to wrap one without parameters that require a gradient."""

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add the two names to Lightning's registry."""
        for name, method in (("thought_ddp", "popen"), ("thought_ddp_spawn", "spawn")):
            strategy_registry.register(
                name, cls, description="Data parallel thought patches, nothing trained", start_method=method
            )


class ThoughtFSDPStrategy(_EndingTogether, ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` over all devices, for models that do not fit one: FSDP2, see
    :func:`shard_model`. By name: ``"thought_fsdp"``.

    ``ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)`` does as well, but writes the model's
    weights into each checkpoint and leaves it to the backend to end processes that wait for one that failed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Shard over all devices of all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module itself says: empty, see :meth:`~lit_thought.fit.module.ThoughtModule.state_dict`."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add the name to Lightning's registry."""
        strategy_registry.register("thought_fsdp", cls, description="Thought patches for a sharded model")


def shard_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model's weights over processes with FSDP2: each block, then the rest; in place, frozen, and for good.

    Each process loads the whole model into main memory, and brings it to its device block by block. The device keeps
    1/N of all weights, and holds the whole of one block at a time, or of the embeddings and the head.

    Args:
        model: the whole model, on the CPU or on this process's device.
        mesh: Lightning's mesh, ``data_parallel`` × ``tensor_parallel``, or one with a single dimension.

    Raises:
        ThoughtError: for tensor parallelism, and for weights that are quantised.
        UnsupportedModelError: see :func:`~lit_thought.model.blocks.find_blocks`.
    """
    if mesh.ndim > 1:
        if mesh["tensor_parallel"].size() > 1:
            raise ThoughtError(
                f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported: a layer's input would be in "
                'pieces. Use strategy="thought_fsdp", or ModelParallelStrategy(data_parallel_size=<all devices>, '
                "tensor_parallel_size=1)."
            )
        mesh = mesh["data_parallel"]
    model = bare_model(model)
    _check_plain(model)
    with evaluating(model), torch.no_grad():
        trace_model(model)  # runs whole blocks
        model.requires_grad_(False)
        for module in (*find_layers(model), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # FSDP takes the module that it sees run first for the whole
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _check_plain(model: PreTrainedModel) -> None:
    """Refuse weights that FSDP would not bring back as they were."""
    packed = [name for name, value in model.named_parameters() if type(value) is not nn.Parameter]
    packed += [path for path, layer in model.named_modules() if is_linear(layer) and sits_beside(layer)]
    if packed:
        raise ThoughtError(
            f"model: {packed[0]!r} is quantised or sharded already, which a sharded fit does not support. Load the "
            'model with plain weights, such as load_model(name, dtype="bfloat16").'
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that no fit can work with.

    Raises:
        ThoughtError: for limits of steps or batches, a callback that stops a fit before its last stage or works on what
            is trained, checkpoints, a strategy that looks for parameters to train or a precision other than the
            model's own.
    """
    if trainer.min_steps:
        raise ThoughtError(f"min_steps={trainer.min_steps} must be left out: the fit ends after its last stage.")
    if trainer.max_steps != -1:
        raise ThoughtError(f"max_steps={trainer.max_steps} must be left out: without all its stages there is no patch.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        reason = next((why for kinds, why in _REFUSED.items() if isinstance(callback, kinds)), None)
        if reason is not None and not _is_lightnings_own(callback, trainer):
            raise ThoughtError(f"callbacks: {type(callback).__name__} {reason}")
    known = (ThoughtDDPStrategy, ModelParallelStrategy)
    if isinstance(trainer.strategy, ParallelStrategy) and not isinstance(trainer.strategy, known):
        raise ThoughtError(
            f'a fit on {trainer.world_size} processes needs strategy="thought_ddp" (or "thought_ddp_spawn"), or '
            f'"thought_fsdp" for a model that does not fit one device; got {type(trainer.strategy).__name__}, '
            "which would look for parameters to train."
        )
    limit = trainer.limit_train_batches  # the float 1.0 is all batches, the int 1 a single one
    if isinstance(limit, int) or limit not in (None, 1.0):
        raise ThoughtError("limit_train_batches must be left out: the statistics need every batch.")
    if trainer.precision != "32-true":  # Lightning's default, which leaves a model as it is; others convert it
        raise ThoughtError(
            f"precision={trainer.precision!r} must be left out; load the model in the dtype you want instead "
            '(load_model(name, dtype="bfloat16")).'
        )


_REFUSED: dict[type[Callback], str] = {
    EarlyStopping: "would end the fit before its last stage, and then there is no patch. Take it out.",
    Checkpoint: "would save nothing, since no weight of the model changes. Take it out: output_dir writes the adapter, "
    "and resume_dir keeps the finished stages, from which the same call goes on.",
    **dict.fromkeys(
        (BaseFinetuning, ModelPruning, SpikeDetection, StochasticWeightAveraging, WeightAveraging),
        "works on weights that are trained, and a fit trains none. Take it out.",
    ),
}
"""Callbacks that a fit cannot have, and why."""


def _is_lightnings_own(callback: Callback, trainer: Trainer) -> bool:
    """Whether it is the checkpoint callback that a Trainer adds where there is none; it never saves in a fit."""
    own = ModelCheckpoint()
    return (
        type(callback) is ModelCheckpoint
        and callback.state_key == own.state_key
        and (callback.filename, callback.save_last) == (own.filename, own.save_last)
        and (callback.dirpath is None or trainer.current_epoch > 0)  # a fit before this one has filled it in
    )


def check_epochs(trainer: Trainer, stages: int, reason: str) -> None:
    """Refuse a trainer of too few or too many epochs.

    Args:
        trainer: Lightning's.
        stages: epochs that the fit takes, one a stage.
        reason: what makes them so many, for the message.

    Raises:
        ThoughtError: naming the argument.
    """
    allowed = trainer.max_epochs
    if allowed is not None and allowed != -1 and allowed < stages:
        raise ThoughtError(
            f"max_epochs={allowed} is too few: {reason} need {stages}. "
            "Use Trainer(max_epochs=-1); the callback stops the run after the last one."
        )
    if (trainer.min_epochs or 0) > stages:
        raise ThoughtError(f"min_epochs={trainer.min_epochs} is too many: the fit ends after {stages} epochs.")


ThoughtDDPStrategy.register_strategies(StrategyRegistry)
ThoughtFSDPStrategy.register_strategies(StrategyRegistry)
