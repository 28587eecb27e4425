"""Fits of sharded models, started by test_fsdp.py: ``python fsdp_fit.py PLAN.json``.

The plan is that of distributed_fit.py, whose fits these are, and others. Every process writes what it saw of each to
``<fit>-<rank>.pt`` and what became of the model's weights to ``<fit>-weights-<rank>.pt``, beside the plan.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import distributed_fit as base
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from models import make_tokenizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.module import ThoughtModule
from lit_thought.model.layers import layer_shape
from lit_thought.model.loading import fingerprint
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors
from lit_thought.statistics.distributed import rank_and_size

# As in distributed_fit.py. "odd" has sizes that two processes cannot share evenly, "resumed" goes on with what "not
# finite" has finished.
FITS: dict[str, dict[str, Any]] = {
    **{name: base.FITS[name] for name in ("many", "unequal", "generated", "instructions", "preserving", "gains")},
    **{name: base.FITS[name] for name in ("vectors", "followed", "stored", "weighed")},
    "mlp_in": {**base.FITS["mlp_in"], "model": ("odd", "float64", False)},
    "later blocks": {
        "model": ("deep", "float64", False),
        "pairs": base.PAIRS,
        "shuffled": {"batch_size": 1},
        "thought": {"rank": 4, "blocks": [1, 3]},
    },
    "transposed": {"model": ("gpt2", "float64", False), "pairs": base.PAIRS, "shuffled": {"batch_size": 2}},
    "own forward": {"model": ("falcon", "float64", False), "pairs": base.PAIRS, "shuffled": {"batch_size": 2}},
    "experts": {"model": ("mixtral", "float64", False), "pairs": base.PAIRS, "shuffled": {"batch_size": 1}},
    "one output missing": {
        "model": ("llama", "float64", True),
        "pairs": [{"input": "hot"}, *base.PAIRS[1:]],
        "data": {"max_new_tokens": 4},
        "shuffled": {"batch_size": 2},
    },
    "again": {"pairs": base.PAIRS, "shuffled": {"batch_size": 1}, "repeats": 2},
    "resumed": {"pairs": base.MANY, "shuffled": {"batch_size": 2}, "resumes": True},
}


class Weights(Callback):
    """Notes where the weights are while one fit runs, how often they are gathered, and fails where asked to."""

    def __init__(self, name: str, folder: Path | None, broken: dict[str, Any] | None) -> None:
        self.name, self.folder, self.broken = name, folder, broken
        self.seen: dict[str, Any] = {"whole": set(), "gathers": Counter(), "at": []}
        self._spies = ExitStack()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        model = pl_module.model
        self.seen["before"] = fingerprint(model), _hooks(model)
        self.names = {id(module): name for name, module in model.named_modules()}
        self._spies.enter_context(base._spy(FSDPModule, "unshard", self._gathered))

    def _gathered(self, run: Any, module: Any) -> None:
        self.seen["gathers"][self.names[id(module)]] += 1
        run()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model = pl_module.model
        held = [value.to_local().numel() for value in model.parameters() if _sharded(value)]
        self.seen["share"] = sum(held) / sum(v.numel() for v in model.parameters() if _sharded(v))
        self.seen["frozen"] = not any(value.requires_grad for value in model.parameters())
        if self.broken is not None and trainer.global_rank == self.broken["rank"]:
            self.runner = pl_module.runner
            model.model.layers[1].mlp.register_forward_hook(self._break)

    def _break(self, module: Any, inputs: Any, output: Any) -> Any:
        return base.broken_output(self.runner, self.broken, self.folder, output)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        here = next(name for name, module in pl_module.model.named_modules() if module is pl_module.runner.block.module)
        self.seen["whole"] |= {
            "the block" if name.startswith(f"{here}.") else name
            for name, value in pl_module.model.named_parameters()
            if not _sharded(value)
        }

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._spies.close()
        model = pl_module.model
        patch = next(c for c in trainer.callbacks if isinstance(c, ThoughtCallback)).patch  # type: ignore[attr-defined]
        assert patch is not None
        with patch.applied(model):  # which it is known to fit
            self.seen["patched"] = fingerprint(model)
        self.seen["sharded"] = all(map(_sharded, model.parameters()))
        self.seen["after"] = fingerprint(model), _hooks(model)
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.name}-weights-{trainer.global_rank}.pt")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._spies.close()


def _sharded(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")


def _hooks(model: PreTrainedModel) -> int:
    """FSDP's own are two a block, and two for the rest."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def fit(name: str, spec: dict[str, Any], folder: Path | None, *args: Any, **launch: Any) -> dict[str, Any]:
    """One fit, as distributed_fit.fit, with a second watch."""
    return base.fit(name, spec, folder, *args, more=lambda: [Weights(name, folder, spec.get("broken"))], **launch)


BROKEN: dict[str, dict[str, Any]] = {
    "not finite": {**FITS["resumed"], "broken": {"rank": 1, "how": "nan"}},
    "rank 1 fails": {"pairs": base.PAIRS, "broken": {"rank": 1, "how": "raise"}, "output": "never"},
    "rank 0 fails": {"pairs": base.PAIRS, "broken": {"rank": 0, "how": "raise"}, "output": "never"},
}


# --- patches on sharded weights ----------------------------------------------------------------------------

PATCHED = {
    "llama": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
    "odd": ("model.layers.0.mlp.gate_proj", "model.layers.2.mlp.down_proj"),
    "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_proj"),
    "falcon": ("transformer.h.0.mlp.dense_4h_to_h", "transformer.h.1.self_attention.dense"),
}
IDS = [[5, 9, 17, 3, 250, 44]]


def patches_for(family: str, sizes: dict[str, tuple[int, int]]) -> list[ThoughtPatch]:
    """Two patches, from seeds, of matrices and a vector; ``sizes`` are (d_out, d_in) by path."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for rank in (2, 3):
        factors = {
            path: Factors(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw))
            for path, (d_out, d_in) in sizes.items()
        }
        path = PATCHED[family][0]
        found.append(ThoughtPatch(factors, vectors={path: torch.randn(sizes[path][0], generator=draw)}))
    return found


class Patching(Callback):
    """Puts patches on a model that is sharded, and takes them off, in place of a fit."""

    def __init__(self, family: str, dtype: str, folder: Path) -> None:
        self.family, self.dtype, self.folder = family, dtype, folder

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        model = pl_module.model
        layers = {path: model.get_submodule(path) for path in PATCHED[self.family]}
        one, other = patches_for(self.family, {path: layer_shape(layer) for path, layer in layers.items()})
        found = {"plain": _weights(model), "logits": model(torch.tensor(IDS)).logits}
        one.apply_(model)
        other.apply_(model)
        found |= {"both": _weights(model), "patched logits": model(torch.tensor(IDS)).logits}
        found["beside"] = sum(len(layer._forward_hooks) for layer in layers.values())
        found["sharded"] = [_sharded(layer.weight) for layer in layers.values()]
        one.remove_(model)
        found["other"] = _weights(model)
        other.remove_(model)
        found["again"] = _weights(model)
        found["names"] = [name for name, _ in model.named_parameters()]
        torch.save(found, self.folder / f"patched {self.family} {self.dtype}-{trainer.global_rank}.pt")
        trainer.should_stop = True


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters, put together from what each process has."""
    _, size = rank_and_size()
    found = {}
    for name, value in model.named_parameters():
        if not _sharded(value):
            found[name] = value.clone()
            continue
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, value.to_local().clone())
        found[name] = torch.cat(parts)
    return found


class Idle(ThoughtModule):
    """One that needs no streams."""

    def training_step(self, *args: Any) -> None: ...


def patch(name: str, folder: Path, **launch: Any) -> None:
    """``name``: "patched", a family and a dtype."""
    _, family, dtype = name.split()
    module = Idle(base.build(family, getattr(torch, dtype)), make_tokenizer())
    data = torch.utils.data.DataLoader([0])
    callbacks = [Patching(family, dtype, folder)]
    Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **launch).fit(module, data)


def main(path: str) -> None:
    folder = Path(path).parent
    plan = json.loads(Path(path).read_text())
    launch = {**base.QUIET, "devices": plan["devices"]}
    for name in plan["fits"]:
        strategy: Any = plan["strategy"]
        if strategy == "object":
            strategy = ModelParallelStrategy(data_parallel_size=plan["devices"], tensor_parallel_size=1)
        settings = {**launch, "strategy": strategy}
        if name.startswith("patched "):
            patch(name, folder, **settings)
        elif name in FITS:
            fit(name, FITS[name], folder, folder, True, **settings)
        elif name == "not finite":
            with base.noted(folder, name):
                fit(name, BROKEN[name], folder, folder, True, **settings)
        else:
            fit(name, BROKEN[name], folder, folder, False, **settings)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
