"""The roles of the layers of each of a model's blocks, found by running one block of each kind; once per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.errors import UnsupportedModelError
from lit_thought.model.calls import Call, StopForwardError, find_decoder, find_layers, recorded_calls
from lit_thought.model.discovery import Roles, trace_block
from lit_thought.model.loading import evaluating
from lit_thought.model.sharding import is_sharded

__all__ = ["Trace", "trace_model"]

_TOKENS = 4

_WITHHELD = {"laguna": "PEFT loads adapters of its shared experts under a wrong name"}
"""What tracing cannot know: families whose shared experts are not offered as a site, and why."""


@dataclass(frozen=True)
class Trace:
    """What is known of a model's blocks: the model's name in errors; the kinds and roles of its blocks; width and dtype
    of the residual stream; a block's output where it is a tuple."""

    name: str
    kinds: list[Any]
    roles: list[Roles]
    width: int
    dtype: torch.dtype
    like: Any


_TRACES: WeakKeyDictionary[nn.Module, Trace] = WeakKeyDictionary()


def trace_model(model: PreTrainedModel) -> Trace:
    """What is known of a model's blocks; nothing runs where its modules are those of the last time, or are sharded.

    Raises:
        UnsupportedModelError: see :func:`~lit_thought.model.blocks.find_blocks`.
        SingularSystemError: when a block puts out NaN or infinite values.
    """
    name = _check_model(model)
    layers = find_layers(model)
    if is_sharded(model):
        if model not in _TRACES:
            raise UnsupportedModelError(
                f"not supported: {name} was sharded before its blocks were known. Give ThoughtModule the whole model; "
                'strategy="thought_fsdp" shards it.'
            )
        return _TRACES[model]
    kinds = [_kind(module) for module in layers]
    trace = _TRACES.get(model)
    if trace is None or trace.kinds != kinds:
        with evaluating(model), torch.no_grad():
            trace = _TRACES[model] = _trace(model, layers, kinds, name)
    return trace


def _trace(model: PreTrainedModel, layers: Sequence[nn.Module], kinds: list[Any], name: str) -> Trace:
    calls, entrance, like = _calls(model, layers)
    if entrance.ndim != 3:
        raise UnsupportedModelError(
            f"not supported: {name} keeps several residual streams at once ({tuple(entrance.shape)})."
        )
    found: dict[Any, Roles] = {}
    withheld = _WITHHELD.get(model.config.model_type)
    for index, (module, call, kind) in enumerate(zip(layers, calls, kinds, strict=True)):
        if kind not in found:
            roles = trace_block(module, call, entrance, f"block {index}")
            if withheld is not None and roles.experts is not None:
                roles = replace(roles, mlp_out=None, mlp=None, missing={**roles.missing, "mlp_out": withheld})
            found[kind] = roles
    return Trace(name, kinds, [found[kind] for kind in kinds], entrance.shape[-1], entrance.dtype, like)


def _check_model(model: PreTrainedModel) -> str:
    """Refuse what cannot work, before anything runs; the model's name in errors."""
    config: Any = model.config
    name = f"architecture {config.model_type!r} ({type(model).__name__})"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"not supported: {name} has cross-attention; expected a decoder-only model.")
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    other = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if other or getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"not supported: {name} keeps other state between tokens than keys and values "
            f"({', '.join(other) or 'a recurrent state'}), which cannot be shared by the prompts that follow a chunk."
        )
    return name


def _calls(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[list[Call], Tensor, Any]:
    """How the decoder calls its blocks on a few tokens, the residual stream at their entrance, and a block's output
    where it is a tuple."""
    device = next(model.parameters()).device
    ids = torch.arange(2, 2 + _TOKENS, device=device)[None]
    like: Any = None

    def first(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal like
        like = output if isinstance(output, tuple) else None
        raise StopForwardError

    handle = layers[0].register_forward_hook(first, with_kwargs=True)
    try:
        find_decoder(model)(input_ids=ids, use_cache=False)
    except StopForwardError:
        pass
    finally:
        handle.remove()
    with recorded_calls(layers, like) as recording:
        find_decoder(model)(input_ids=ids, use_cache=False)
    assert recording.entrance is not None
    if len(recording.calls) != len(layers):
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} called its blocks {len(recording.calls)} times in one pass; "
            f"expected each of {len(layers)} once."
        )
    return recording.calls, recording.entrance, (None, *like[1:]) if like is not None else None


def _kind(module: nn.Module) -> Any:
    """What two blocks must share to have the same roles: modules, shapes, dtypes, and factors of a single number."""
    modules = tuple((path, type(child)) for path, child in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return modules, tuple(
        (path, tuple(x.shape), x.dtype, float(x.detach()) if x.numel() == 1 else None) for path, x in tensors
    )
