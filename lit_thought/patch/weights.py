"""Changes put on a model's weights and biases, and taken off exactly.

Per model, the touched parameters are kept as they were, beside the list of changes in the order they came.
Taking one off puts those copies back and adds the rest again, so removal is exact to the last bit in every
dtype and order. A bias that a layer does not have is made for as long as a change needs it.

Of a weight that is sharded over processes (FSDP2) each one changes and keeps its own rows; all of them must call.

A quantised layer's weight cannot be changed: there a forward hook adds ``B A x`` (+ the vector) to the output, and the
parameters stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import PatchError
from lit_thought.model.bare import uncompiled, unwrap
from lit_thought.model.layers import is_linear, layer_shape, sits_beside
from lit_thought.model.loading import fingerprint, fingerprint_with, model_name
from lit_thought.model.sharding import anywhere, is_sharded, own_rows
from lit_thought.patch.change import Change
from lit_thought.patch.provenance import beneath
from lit_thought.solve.factors import Factors

__all__ = [
    "applied",
    "apply",
    "check_absent",
    "check_beneath",
    "has_change",
    "made_for",
    "original_weights",
    "patched_fingerprint",
    "remove",
    "validate",
]


Additions = Mapping[str, Factors | Tensor]
"""What a change adds, by parameter name: Factors to ``"<path>.weight"``, a vector (d_out,) to ``"<path>.bias"``."""


@dataclass
class _State:
    """What is on a model: the parameters changed in place as they were, None for a bias that was not there, and
    each change with what it adds in the order they came."""

    originals: dict[str, Tensor | None] = field(default_factory=dict)
    changes: list[tuple[Change, Additions]] = field(default_factory=list)


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def _state(model: nn.Module) -> _State | None:
    """What is on ``model``, if anything.

    Raises:
        PatchError: for a copy of a model with patches beside its quantised layers: nobody can tell which these are.
    """
    state = _STATES.get(model)
    if state is None and any(map(_hook, model.modules())):
        raise PatchError(
            "model is a copy of one that had patches beside its quantised layers; they are in the copy for good. "
            "Remove them, then copy."
        )
    return state


def has_change(model: nn.Module, change: Change) -> bool:
    """Whether this change, or one equal to it, such as its adapter loaded once more, is on ``model`` now."""
    return _there(model, change) is not None


def _there(model: nn.Module, change: Change) -> Change | None:
    """The change on ``model`` that is this one or equal to it."""
    state = _STATES.get(model)
    return next((other for other, _ in state.changes if _equal(other, change)), None) if state is not None else None


def _equal(one: Change, other: Change) -> bool:
    alike = set(one.targets) == set(other.targets) and one.nbytes == other.nbytes
    return one is other or (alike and one.digest == other.digest)


def check_absent(change: Change, model: nn.Module) -> None:
    """Refuse a change that is on ``model`` now.

    Raises:
        PatchError: if it is.
    """
    if isinstance(model, nn.Module) and has_change(model, change):
        raise PatchError(
            "this patch, or its equal, is applied to the model already. Remove it first, or apply 2 * patch."
        )


def original_weights(model: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of ``model`` changed in place, by name, as they were before any change; None: there was none."""
    state = _STATES.get(model)
    return dict(state.originals) if state else {}


def patched_fingerprint(model: nn.Module) -> str:
    """The fingerprint of ``model`` with the patches that are on it, also those that sit beside quantised layers, whose
    weights stay as they are."""
    found, state = fingerprint(model), _state(model)
    if state is None or not any(_hook(module) for module in model.modules()):
        return found
    digests = [change.digest for change, _ in state.changes]
    return hashlib.sha256(json.dumps([found, digests]).encode()).hexdigest()


def made_for(model: nn.Module, identity: str | None = None) -> dict[str, Any]:
    """What a patch made on ``model`` now belongs to, for its provenance: the ``fingerprint`` of the model without the
    patches that are on it, and ``on_top_of``, where there are any: their digests, and the fingerprint with them.

    Args:
        model: the model.
        identity: its :func:`patched_fingerprint`, where that is known.
    """
    state = _state(model)
    identity = identity or patched_fingerprint(model)
    if state is None:
        return {"fingerprint": identity}
    patches = [change.digest for change, _ in state.changes]
    found = {"fingerprint": identity, "patches": patches}
    return {"fingerprint": fingerprint_with(model, state.originals), "on_top_of": found}


def validate(change: Change, model: nn.Module, check: bool = True) -> None:
    """See :meth:`~lit_thought.patch.patch.ThoughtPatch.validate`."""
    _fitting(change, unwrap(model), check)


def _fitting(change: Change, model: nn.Module, check: bool) -> dict[str, nn.Module]:
    """The layer of every parameter that a change touches, all of them checked."""
    layers = _find_weights(model, _additions(change))
    _state(model)
    base = change.provenance.get("fingerprint")
    if not check or not base:
        return layers
    found = fingerprint_with(model, original_weights(model))
    if found != base:
        raise PatchError(
            f"this patch was made for {change.provenance.get('model') or 'another model'!r} (fingerprint "
            f"{str(base)[:12]}), this model is {model_name(model) or type(model).__name__!r} "
            f"(fingerprint {found[:12]}): its weights or their dtype differ. Load the right model in the "
            "right dtype, or pass check=False to go ahead all the same."
        )
    check_beneath(change, model)
    return layers


def check_beneath(change: Change, model: nn.Module) -> None:
    """Refuse a change that was made on top of others, where these are not on ``model``.

    Raises:
        PatchError: if one of them is not.
    """
    needed = set(beneath(change.provenance))
    state = _STATES.get(model)
    there = {other.digest for other, _ in state.changes} if needed and state else set()
    if needed - there:
        raise PatchError(
            f"this patch was made on top of {len(needed)} other{'s' if len(needed) > 1 else ''}, and "
            f"{len(needed - there)} of them ({min(needed - there)[:12]}) is not on the model. Apply that first, or "
            "apply their sum (first + this), or pass check=False to go ahead all the same."
        )


def apply(change: Change, model: nn.Module, check: bool = True) -> None:
    """See :meth:`~lit_thought.patch.patch.ThoughtPatch.apply_`. A failure midway takes all of it back."""
    model = unwrap(model)
    check_absent(change, model)
    layers = _fitting(change, model, check)
    state, additions = _STATES.get(model) or _State(), _additions(change)
    originals = dict(state.originals)
    for name, layer in layers.items():
        if name not in originals and not sits_beside(layer):
            value = _parameter(name, layer)
            originals[name] = None if value is None else value.detach().clone()
    try:
        for name, layer in layers.items():
            _add(name, layer, additions[name], bounded=True)
    except BaseException:
        _rebuild(layers, originals, [other for _, other in state.changes])
        raise
    _STATES[model] = _State(originals, [*state.changes, (change, additions)])
    torch.clear_autocast_cache()  # it has the weights as they were


def remove(change: Change, model: nn.Module) -> None:
    """See :meth:`~lit_thought.patch.patch.ThoughtPatch.remove_`. The other changes stay, in their order."""
    model = unwrap(model)
    there = _there(model, change) if isinstance(model, nn.Module) else None
    if there is None:
        raise PatchError("this patch is not applied to this model, so there is nothing to remove.")
    state = _STATES[model]
    mine = next(additions for other, additions in state.changes if other is there)
    rest = [(other, additions) for other, additions in state.changes if other is not there]
    _rebuild(_find_weights(model, mine), state.originals, [additions for _, additions in rest])
    used = {name for _, additions in rest for name in additions}
    if rest:
        _STATES[model] = _State({name: value for name, value in state.originals.items() if name in used}, rest)
    else:
        del _STATES[model]
    torch.clear_autocast_cache()


@contextmanager
def applied(change: Change, model: nn.Module, check: bool = True) -> Iterator[nn.Module]:
    """See :meth:`~lit_thought.patch.patch.ThoughtPatch.applied`."""
    apply(change, model, check)
    try:
        yield model
    finally:
        if has_change(unwrap(model), change):  # unless the block removed it
            remove(change, model)


def _additions(change: Change) -> Additions:
    matrices = {f"{path}.weight": value for path, value in change.factors.items()}
    return {**matrices, **{f"{path}.bias": value for path, value in change.vectors.items()}}


def _find_weights(model: nn.Module, additions: Additions) -> dict[str, nn.Module]:
    """The layer of every parameter named, after checking that each can take its change.

    Raises:
        PatchError: on a missing module, one that is no linear layer, a wrong shape, or a parameter that is shared,
            sharded other than by rows, or not loaded.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    with uncompiled(model):
        return _layers(model, additions)


def _layers(model: nn.Module, additions: Additions) -> dict[str, nn.Module]:
    """See :func:`_find_weights`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = {name: name.rpartition(".")[0] for name in additions}
    targets = set(paths.values())
    missing = [path for path in paths.values() if path not in modules]
    if missing:
        raise PatchError(
            f"the model ({model_name(model) or type(model).__name__}) has no module {missing[0]!r} "
            f"({len(set(missing))} of the patch's {len(targets)} targets are missing). The patch belongs to "
            "another architecture, or the model is wrapped: pass the bare model."
        )
    layers = {name: modules[path] for name, path in paths.items()}
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        places.setdefault(id(module), []).append(path)
    for name, layer in layers.items():
        _check_layer(paths[name], layer, additions[name])
        # a bias that is not there yet is shared where its layer is, which the layer's weight tells
        kind = "weight" if _parameter(name, layer) is None else name.rpartition(".")[2]
        own = f"{paths[name]}.{kind}"
        shared = [other for other in names.get(id(_parameter(own, layer)), []) if other != own]
        shared = shared or [path for path in places[id(layer)] if path != paths[name]]
        if shared:
            raise PatchError(
                f"{paths[name]!r} shares its {kind} with {shared}, so changing it in place would change both. "
                "Load the saved adapter with peft.PeftModel.from_pretrained instead."
            )
    return layers


def _check_layer(path: str, layer: nn.Module, addition: Factors | Tensor) -> None:
    if not is_linear(layer):
        raise PatchError(
            f"{path!r} is a {type(layer).__name__}; expected torch.nn.Linear, transformers' Conv1D or a quantised "
            "linear layer. If the model holds PEFT layers, use peft.PeftModel on the saved adapter."
        )
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_meta:
            raise PatchError(
                f"{path!r} is offloaded or not loaded; expected the weight in memory. Load the whole model, or use the "
                "saved adapter with PEFT."
            )
        if is_sharded(value) and not all(p.is_replicate() or p.is_shard(0) for p in value.placements):  # type: ignore[attr-defined]
            raise PatchError(
                f"{path!r} is sharded other than by rows (tensor parallelism); expected the whole weight or FSDP2's "
                "shards. Apply the patch before sharding, or use the saved adapter with PEFT."
            )
    d_out, d_in = layer_shape(layer)
    if isinstance(addition, Tensor):
        if len(addition) != d_out:
            raise PatchError(
                f"{path!r} has {d_out} outputs in this model, but the patch's vector has {len(addition)} entries. "
                "Load the model that the patch was made for."
            )
    elif (d_out, d_in) != (addition.B.shape[0], addition.A.shape[1]):
        raise PatchError(
            f"{path!r} maps {d_in} inputs to {d_out} outputs in this model, but the patch is for "
            f"{addition.A.shape[1]} to {addition.B.shape[0]}. Load the model that the patch was made for."
        )


def _parameter(name: str, layer: nn.Module) -> Tensor | None:
    """The layer's weight or bias, whichever ``name`` ends with; None for one that is not there."""
    value = getattr(layer, name.rpartition(".")[2], None)
    return value if isinstance(value, Tensor) else None


class _Beside:
    """A forward hook that adds the changes of one layer to its output; it leaves when the last of them does."""

    def __init__(self) -> None:
        self.additions: dict[str, list[Factors | Tensor]] = {}
        self.handle: RemovableHandle | None = None
        self.ready: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None
        self.where: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        a, b, vector = self._tensors(output.device, dtype)
        with torch.autocast(output.device.type, enabled=False):
            total = output.to(dtype)
            if a is not None and b is not None:
                total = total + x.to(dtype) @ a.T @ b.T
            return (total if vector is None else total + vector).to(output.dtype)

    def _tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A (r, d_in) and B (d_out, r) of all matrices side by side, and the sum (d_out,) of the vectors."""
        if self.ready is None or self.where != (device, dtype):
            matrices = [value for value in self.additions.get("weight", []) if isinstance(value, Factors)]
            vectors = [value for value in self.additions.get("bias", []) if isinstance(value, Tensor)]
            # a tensor made in inference mode could not be used for gradients outside it
            with torch.inference_mode(False):
                self.ready = (
                    torch.cat([value.A for value in matrices]).to(device, dtype) if matrices else None,
                    torch.cat([value.B for value in matrices], dim=1).to(device, dtype) if matrices else None,
                    torch.stack(vectors).to(device, dtype).sum(0) if vectors else None,
                )
            self.where = device, dtype
        return self.ready


def _hook(layer: nn.Module) -> _Beside | None:
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, _Beside)), None)


def _add_beside(name: str, layer: nn.Module, addition: Factors | Tensor) -> None:
    hook = _hook(layer)
    if hook is None:
        hook = _Beside()
        # first of all hooks, so that the others see the output that a changed weight would give
        hook.handle = layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
    hook.additions.setdefault(name.rpartition(".")[2], []).append(addition)
    hook.ready = None


def _clear_beside(name: str, layer: nn.Module) -> None:
    """Take all changes of a layer's weight, or of its bias, off again."""
    hook = _hook(layer)
    if hook is None:
        return
    hook.additions.pop(name.rpartition(".")[2], None)
    hook.ready = None
    if not hook.additions and hook.handle is not None:
        hook.handle.remove()


def _add(name: str, layer: nn.Module, addition: Factors | Tensor, bounded: bool = False) -> None:
    """``W += B A`` (transposed for Conv1D) or ``b += v``, in float32 or better, rounded to the dtype once; or beside
    the layer.

    Raises:
        PatchError: where that is ``bounded``, if a sum leaves the range of the dtype.
    """
    if sits_beside(layer):
        _add_beside(name, layer, addition)
        return
    value = _parameter(name, layer)
    if value is None:
        value = layer.bias = _zero_bias(layer)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    # autocast would compute the product in half precision
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        if isinstance(addition, Tensor):
            delta = own_rows(addition.to(value.device, dtype), value)
        elif isinstance(layer, Conv1D):
            a = own_rows(addition.A.to(value.device, dtype).T, value)
            delta = (addition.B.to(value.device, dtype) @ a.T).T
        else:
            delta = own_rows(addition.B.to(value.device, dtype), value) @ addition.A.to(value.device, dtype)
        own: Tensor = value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]
        total = (own.to(dtype) + delta).to(own.dtype)
        if bounded and anywhere(not bool(total.isfinite().all()), value):
            raise PatchError(
                f"{own.dtype} cannot hold {name!r} with the patch on it: a value overflows. Load the model in a dtype "
                "of a larger range, torch.float32 or torch.bfloat16, or scale the patch down."
            )
        with _writing(own):
            own.copy_(total)


def _writing(value: Tensor) -> AbstractContextManager[Any]:
    """Where a tensor can be written to: one that was made in inference mode nowhere else."""
    return torch.inference_mode() if value.is_inference() else nullcontext()


def _zero_bias(layer: nn.Module) -> nn.Parameter:
    """A bias for a layer without one, in the dtype and on the device of its weight, frozen if that is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # a tensor made in inference mode could not be changed outside it
    with torch.inference_mode(False):
        zeros = torch.zeros(layer_shape(layer)[0], dtype=weight.dtype, device=weight.device)
        return nn.Parameter(zeros, requires_grad=weight.requires_grad)


def _rebuild(
    layers: Mapping[str, nn.Module],
    originals: Mapping[str, Tensor | None],
    changes: Iterable[Additions],
) -> None:
    """Put the original parameters back and take hooks off, then add what the others add in order."""
    with torch.no_grad():
        for name, layer in layers.items():
            if name not in originals:
                _clear_beside(name, layer)
                continue
            original, value = originals[name], _parameter(name, layer)
            if original is None:
                layer.register_parameter("bias", None)
            else:
                assert value is not None
                with _writing(value):
                    value.copy_(original)
    for additions in changes:
        for name, layer in layers.items():
            if name in additions:
                _add(name, layer, additions[name])
