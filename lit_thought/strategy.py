"""Distributed data parallelism for a model that is not trained: ``Trainer(devices=N, strategy="thought_ddp")``.

Every process holds the whole model and sees a share of the pairs. There is nothing to train, so there is no wrapper, no
gradient bucket and no synchronisation of weights; what is summed over processes are the statistics, by the callback
(:mod:`lit_thought.distributed`).
"""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lit_thought.errors import ThoughtError

__all__ = ["ThoughtDDPStrategy"]

_launchers: list[Any] = []  # the first one's processes serve all fits of a script


class ThoughtDDPStrategy(DDPStrategy):
    """Lightning's ``DDPStrategy``, launchers, clusters (torchrun, SLURM) and all, without the DDP wrapper.

    By name: ``"thought_ddp"`` (a process for each device, started by Lightning or by the cluster) and
    ``"thought_ddp_spawn"``.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is: PyTorch refuses to wrap one without parameters that require a gradient."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        _launchers.append(self.launcher)

    def on_exception(self, exception: BaseException) -> None:
        """End the processes started here, which may be waiting for this one; a ThoughtError they raise themselves."""
        super().on_exception(exception)
        if not isinstance(exception, ThoughtError):
            for launcher in _launchers:
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add the two names to Lightning's registry."""
        for name, method in (("thought_ddp", "popen"), ("thought_ddp_spawn", "spawn")):
            strategy_registry.register(
                name, cls, description="Data parallel thought patches, nothing trained", start_method=method
            )


ThoughtDDPStrategy.register_strategies(StrategyRegistry)
