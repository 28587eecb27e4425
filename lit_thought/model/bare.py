"""The bare causal LM in what a user hands over: wrappers that change nothing come off, the rest is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.model.layers import of_peft

__all__ = ["bare_model", "check_autocast", "check_tokenizer", "has_peft_layers", "hook_names", "uncompiled", "unwrap"]

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch.compile and torch's activation checkpointing call the module that they wrap."""
_HARMLESS = ("accelerate", "lightning", "lit_thought", "torch", "transformers")
"""Packages whose forward hooks leave what a model computes as it is; this one's patches are told otherwise."""
_COMPILED = ("_compiled_call_impl", "forward")
"""What ``module.compile()`` and ``module.forward = torch.compile(module.forward)`` leave on a module."""


def bare_model(model: Any) -> PreTrainedModel:
    """The causal LM itself, with its head and with all its weights on one device.

    Wrappers come off as :func:`unwrap` says. What the model's modules are called is then what a saved adapter calls
    them, so that PEFT finds each of them in a model of that class.

    Raises:
        UnsupportedModelError: for anything else, by name and with the cure: a class, a tokenizer, a pipeline; a model
            without a language modelling head (classifiers; ``AutoModel``, whose modules have other names than the
            causal LM's, so that PEFT would load its adapters to no effect); one that Accelerate runs in another
            precision; weights on the meta device (offloaded, or not loaded) or on several devices.
    """
    model = unwrap(model)
    _check_kind(model)
    assert isinstance(model, PreTrainedModel)
    if not model.can_generate():
        raise UnsupportedModelError(
            f"model must be a causal LM with its language modelling head; got {type(model).__name__}, which cannot "
            "write text, and whose adapters may do nothing to the model that can. Load it with AutoModelForCausalLM, "
            "or load_model(name)."
        )
    if "_original_forward" in vars(model):
        raise UnsupportedModelError(
            "model runs in another precision than its weights', by Accelerate's mixed_precision. Give the model as it "
            "was before accelerator.prepare, or accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    _check_weights(model)
    return model


def unwrap(model: Any) -> Any:
    """The module in wrappers that leave what it computes as it is; anything without one as it came.

    They are torch.compile, ``DataParallel``, ``DistributedDataParallel``, activation checkpointing, and a ``PeftModel``
    whose adapters are gone (``merge_and_unload()`` or ``unload()`` was called). One with adapters is refused, also when
    they are disabled or merged in place: PEFT's layers stand where the linear layers were, under other names, and
    enabling an adapter again, or unmerging it, would leave a patch that was fitted on something else.

    Raises:
        UnsupportedModelError: for adapters in a ``PeftModel``, and for FSDP1's wrapper.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        return model
    if _is_peft_model(model):
        raise UnsupportedModelError(_OF_PEFT)
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise UnsupportedModelError(
            "model is wrapped by FullyShardedDataParallel, which keeps its weights in pieces of other shapes. Give the "
            'whole model; strategy="thought_fsdp" shards it.'
        )
    return model


def has_peft_layers(model: nn.Module) -> bool:
    """Whether there are layers of PEFT's in the model."""
    return any(map(of_peft, model.modules()))


def check_autocast(model: nn.Module) -> None:
    """Refuse to take sums where torch.autocast is on, which would multiply them in half precision.

    Raises:
        ThoughtError: if it is, on the model's device.
    """
    kind = next(model.parameters()).device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        raise ThoughtError(
            f"torch.autocast is on for {kind!r}, and statistics need products in float32. Call this outside of it; "
            'for a model in half precision load it so: load_model(name, dtype="bfloat16").'
        )


def hook_names(model: nn.Module) -> list[str]:
    """The forward hooks on a model's modules that may change what it computes, each as module and function; those of
    torch, its relatives and this package, which do not, or are accounted for, left out."""
    found = []
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function = getattr(hook, "func", hook)  # of a partial
            named = function if hasattr(function, "__qualname__") else type(function)
            origin = str(getattr(named, "__module__", ""))
            if origin.partition(".")[0] not in _HARMLESS:
                found.append(f"{path}: {origin}.{named.__qualname__}")
    return found


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of the model is compiled, and its modules have the names that they have without wrappers.

    torch.compile would not see hooks that come after it, and calls a wrapped layer's own layers by other names.
    """
    with ExitStack() as stack:
        for module in list(model.modules()):
            for name in _COMPILED:
                had = vars(module).get(name)
                plain = None if name != "forward" else getattr(had, "_torchdynamo_orig_callable", had)
                if had is not plain:
                    vars(module)[name] = plain
                    stack.callback(vars(module).__setitem__, name, had)
            for name, child in module._modules.items():
                inner = child
                while (next_one := _inner(inner)) is not None:
                    inner = next_one
                if inner is not child:
                    module._modules[name] = inner
                    stack.callback(module._modules.__setitem__, name, child)
        yield


def check_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, if it is one.

    Raises:
        ThoughtError: for anything else.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is None:
        raise ThoughtError("tokenizer is missing; give the model's own. load_model(name) returns both.")
    raise ThoughtError(
        f"tokenizer must be a tokenizer of transformers; got {_name(tokenizer)}. {_pass_its(tokenizer, 'tokenizer')}"
    )


_OF_PEFT = (
    "model is wrapped by PEFT; expected a plain transformers causal LM. Call model.merge_and_unload() to keep what its "
    "adapters do, or model.unload(), and pass what that returns."
)


def _inner(module: Any) -> Any:
    """What a wrapper that leaves it as it is holds, or None."""
    if not isinstance(module, nn.Module):  # torch.compile makes a function of a module that is compiled already
        owner = getattr(getattr(module, "_torchdynamo_orig_callable", None), "__self__", None)
        return owner if isinstance(owner, nn.Module) else None
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    if _is_peft_model(module):
        found: Any = module
        if not found.peft_config:  # the last adapter was deleted, and its layers stay
            return None
        base = found.get_base_model()
        gone = not found.active_peft_config.is_prompt_learning and not has_peft_layers(base)
        return base if gone else None
    return next((module._modules[name] for name in _INSIDE if name in module._modules), None)


def _is_peft_model(module: nn.Module) -> bool:
    return of_peft(module) and hasattr(module, "get_base_model")


def _check_kind(model: Any) -> None:
    """Refuse what is no model of transformers, or has PEFT's layers in it."""
    if isinstance(model, PreTrainedTokenizerBase):
        raise UnsupportedModelError(
            f"model must be a transformers causal LM; got {_name(model)}, a tokenizer. The model comes first, then "
            "its tokenizer."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model must be a transformers causal LM; got {_name(model)}. {_pass_its(model, *_MODELS)}"
        )
    if has_peft_layers(model):
        raise UnsupportedModelError(
            "model has PEFT's layers inside, as where transformers loads an adapter; expected a plain causal LM. Load "
            "its base model afresh; to keep what the adapter does, "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload()."
        )


_MODELS = ("model", "module", "pretrained_model")
"""What pipelines, trainers and engines call the model that they hold."""


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _pass_its(value: Any, *names: str) -> str:
    """The cure: the attribute with what was asked for, where the value has one."""
    kinds = (PreTrainedModel, PreTrainedTokenizerBase)
    found = [] if isinstance(value, type) else [name for name in names if isinstance(getattr(value, name, None), kinds)]
    return f"Pass its .{found[0]}." if found else "load_model(name) returns a model with its tokenizer."


def _check_weights(model: PreTrainedModel) -> None:
    """Refuse weights that are elsewhere."""
    places: dict[Any, str] = {}
    for name, value in model.named_parameters():
        places.setdefault(value.device, name)
    for device, name in places.items():
        if device.type == "meta":
            raise UnsupportedModelError(
                f"model: the weight {name!r} is on the meta device (offloaded to memory or disk by a device_map, or "
                f"not loaded). {_ON_ONE}"
            )
        if device.type == "mps":
            raise UnsupportedModelError(
                f"model: the weight {name!r} is on {device}, which has no float64 numbers; expected a CPU or a CUDA "
                "GPU. Load it on the CPU: load_model(name, device='cpu')."
            )
    if len(places) > 1:
        shown = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise UnsupportedModelError(f"model: its weights are on several devices ({shown}). {_ON_ONE}")


_ON_ONE = (
    "Load the whole model onto one device: load_model(name, device=...), or device_map={'': 0} (or 'cpu'). One that "
    'fits none: load it into main memory in every process, and give Trainer(strategy="thought_fsdp").'
)
