"""The LightningModule around a frozen causal LM."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self, TypeGuard
from warnings import catch_warnings, filterwarnings

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, did_you_mean
from lit_thought.fit.strategy import shard_model
from lit_thought.model.bare import bare_model, check_tokenizer, unwrap
from lit_thought.model.loading import evaluating, load_model
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Observation, StreamRunner

__all__ = ["ModelLoader", "ThoughtModule"]

ModelLoader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""A function that loads the model and its tokenizer."""


_ADVICE = (
    r"Found \d+ module\(s\) in eval mode",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Your `IterableDataset` has `__len__` defined",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""How warnings begin that are about gradient steps and workers that load data, which there are none of, and one of
torch about Lightning's own code."""


class ThoughtModule(LightningModule):
    """A frozen causal LM that observes itself with and without an instruction; it trains nothing.

    ``training_step`` runs one site of one block on one batch through :class:`~lit_thought.runs.runner.StreamRunner`
    and returns the :class:`~lit_thought.runs.runner.Observation`; what to do with it is the callback's business.

    Args:
        model: a causal LM that :func:`~lit_thought.model.blocks.find_blocks` knows; wrappers that change nothing come
            off (:func:`~lit_thought.model.bare.unwrap`). Or a name that
            :func:`~lit_thought.model.loading.load_model` takes, or a function without arguments that returns (model,
            tokenizer): then the model is loaded when it is first asked for, which a fit does as it is set up.
        tokenizer: its tokenizer; left out where the model is loaded.
        load: keywords of :func:`~lit_thought.model.loading.load_model`, such as dtype and revision, beside a name.

    Raises:
        ThoughtError: when there is no tokenizer, or ``model`` is no causal LM of transformers in one place: see
            :func:`~lit_thought.model.bare.bare_model`; for arguments that do not belong together.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelLoader | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        model = unwrap(model)
        self._loader: ModelLoader | None = None
        if isinstance(model, (str, os.PathLike)):
            _check_load(load, tokenizer)
            self._loader = partial(load_model, model, **(load or {}))
        elif load is not None:
            raise ThoughtError(
                f"load={load!r:.60} says how load_model loads a model that is given by name; this one is not. Leave it "
                "out."
            )
        elif _is_loader(model):
            self._loader = model
        else:
            self._take(model, tokenizer)
        self.runner: StreamRunner | None = None
        self._mode = ExitStack()
        self._home: torch.device | None = None

    def _take(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = bare_model(model), check_tokenizer(tokenizer)

    def __getattr__(self, name: str) -> Any:
        """Model and tokenizer, loaded when one of them is first asked for."""
        if name in ("model", "tokenizer") and (loader := vars(self).get("_loader")) is not None:
            self._take(*_loaded(loader))
            self._loader = None
            return getattr(self, name)
        return super().__getattr__(name)

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
        """Switch dropout off, before the callback generates outputs; Lightning leaves the mode as it finds it, and is
        not to warn of it."""
        self._mode.enter_context(_without_advice())
        self._mode.enter_context(evaluating(self.model))

    @property
    def _is_lent(self) -> bool:
        """Whether a trainer is at work, which moves the module to its device and at the end to the CPU, and the model
        is one to be brought back, which a sharded one is not."""
        model = self._modules.get("model")  # not one that is still to be loaded
        sharded = isinstance(model, PreTrainedModel) and is_sharded(model)
        return self._trainer is not None and self._trainer.state.stage is not None and not sharded

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As for any module; of a fit, which brings the model to its device by this, where it came from is kept."""
        if self._is_lent and self._home is None:
            self._home = self.model.device
        return super().to(*args, **kwargs)

    def cpu(self) -> Self:
        """To the CPU; at the end of a fit, where Lightning calls this once or twice, to where the model came from,
        which it has not left if the fit was refused before it began."""
        if not self._is_lent:
            return super().cpu()
        home, self._home = self._home, None
        return self if home is None else super().to(home)

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


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence what Lightning says of a fit because it takes it for training."""
    with catch_warnings():
        for message in _ADVICE:
            filterwarnings("ignore", message)
        yield


def _check_load(load: Any, tokenizer: Any) -> None:
    """Refuse keywords that load_model does not take, and a tokenizer beside the one that it brings.

    Raises:
        ThoughtError: naming the argument.
    """
    if tokenizer is not None:
        raise ThoughtError(
            "tokenizer comes with a model that is given by name; leave it out, or give load={'tokenizer': …}."
        )
    if not isinstance(load, (Mapping, type(None))):
        raise ThoughtError(f"load must be keywords of load_model by name, such as dtype; got {load!r:.60}.")
    known = [name for name in inspect.signature(load_model).parameters if name != "name"]
    for name in (load or {}).keys() - set(known):
        raise ThoughtError(f"load: load_model takes {', '.join(known)}; got {name!r}.{did_you_mean(str(name), known)}")


def _is_loader(model: Any) -> TypeGuard[ModelLoader]:
    """Whether it is a function without arguments; models, tokenizers, pipelines and classes can be called, too."""
    if not callable(model) or isinstance(model, (nn.Module, PreTrainedTokenizerBase, type)):
        return False
    try:
        inspect.signature(model).bind()
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def _loaded(loader: ModelLoader) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded: Any = loader()
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2:
        got = f"{len(loaded)} things" if isinstance(loaded, (tuple, list)) else type(loaded).__name__
        raise ThoughtError(f"model: the function that loads must return (model, tokenizer); got {got}.")
    return loaded[0], loaded[1]
