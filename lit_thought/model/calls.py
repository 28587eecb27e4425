"""The blocks of a causal LM as modules, and the arguments with which the model calls each of them.

A block run on its own needs what the decoder's loop would have given it: masks, rotary tables, caches, which may
differ from layer to layer. They are recorded from one forward pass of the decoder in which blocks hand on their input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lit_thought.errors import UnsupportedModelError
from lit_thought.model.sharding import is_sharded, unhooked

__all__ = [
    "Call",
    "Recording",
    "StopForwardError",
    "cache_arguments",
    "find_decoder",
    "find_layers",
    "first_float",
    "head_reads",
    "hidden_of",
    "recorded_calls",
    "unwrapped",
    "wrapped",
]


class StopForwardError(Exception):
    """Raised inside a block once everything that was asked for has been read."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without the residual stream.

    Attributes:
        args, kwargs: the arguments.
        keyword: whether the residual stream was passed as ``hidden_states=``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: bool

    def __call__(self, module: nn.Module, hidden: Tensor) -> Any:
        """Call the block with another residual stream."""
        if self.keyword:
            return module(*self.args, hidden_states=hidden, **self.kwargs)
        return module(hidden, *self.args, **self.kwargs)

    def converted(self, kind: type, convert: Callable[[Any], Any]) -> Call:
        """The call with each value of a kind among its arguments, or in tuples, lists and dicts there, converted."""

        def walk(value: Any) -> Any:
            if isinstance(value, kind):
                return convert(value)
            if type(value) in (tuple, list):
                return type(value)(map(walk, value))
            return {key: walk(item) for key, item in value.items()} if type(value) is dict else value

        return Call(walk(self.args), walk(dict(self.kwargs)), self.keyword)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that embeds tokens and runs the blocks: the causal LM without its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    has_layers = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    return decoder if has_layers else model.base_model  # ModernBERT calls its head the decoder


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a causal LM, in order: the one list of ``num_hidden_layers`` modules in its decoder.

    Raises:
        UnsupportedModelError: when there is no such list, or more than one.
    """
    decoder = find_decoder(model)
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    count = getattr(text, "num_hidden_layers", None)
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [m for m in lists if not any(m is not other and m in set(other.modules()) for other in lists)]
    if len(outer) != 1:
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} is not one stack of blocks: its decoder has {len(outer)} lists of "
            f"{count} modules (num_hidden_layers); expected one."
        )
    return list(outer[0])


@contextmanager
def head_reads(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output embedding is given ``change`` of its input, wherever the model has one that it calls."""

    def changed(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:]) if args else args

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(changed) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def cache_arguments(module: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """``cache`` as a keyword argument of a model or its decoder, by the name that its ``forward`` has for it.

    transformers calls it ``past_key_values`` up to 5.23, ``cache`` since.
    """
    name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
    return {name: cache}


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream among the arguments of a block."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def first_float(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments of a module: the activations it was called with."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)


def unwrapped(output: Any) -> Tensor:
    """The residual stream in the output of a block, which some families return as the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def wrapped(hidden: Tensor, like: Any) -> Any:
    """``hidden`` as the output of a block that returned ``like``."""
    return (hidden, *like[1:]) if isinstance(like, tuple) else hidden


@dataclass
class Recording:
    """What the decoder gave its blocks in one forward pass.

    Attributes:
        calls: the arguments of each block.
        entrance: the residual stream at the first block, (batch, length, d); None before it.
    """

    calls: list[Call] = field(default_factory=list)
    entrance: Tensor | None = None


@contextmanager
def recorded_calls(layers: Sequence[nn.Module], like: Any = None) -> Iterator[Recording]:
    """While inside, blocks hand on their input untouched, as an output shaped like ``like``, and are recorded."""
    recording = Recording()

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states" or args}
        if recording.entrance is None:
            recording.entrance = hidden
        recording.calls.append(Call(args[1:], others, keyword=not args))
        return wrapped(hidden, like)

    with ExitStack() as stack:
        for layer in layers:
            had = layer.__dict__.get("forward")
            layer.forward = hand_on

            def restore(layer: nn.Module = layer, had: Any = had) -> None:
                if had is None:
                    del layer.forward
                else:
                    layer.forward = had

            stack.callback(restore)
            if is_sharded(layer):  # FSDP would gather the weights of a block that does not run
                stack.enter_context(unhooked(layer))
        yield recording
