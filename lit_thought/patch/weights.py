"""Changes put on a model's weights and biases, and taken off exactly.

Per model, the touched parameters are kept as they were, beside the list of changes in the order they came.
Taking one off puts those copies back and adds the rest again, so removal is exact to the last bit in every
dtype and order. A bias that a layer does not have is made for as long as a change needs it.

Of a weight that is sharded over processes (FSDP2) each one changes and keeps its own rows; all of them must call.

A quantised layer's weight cannot be changed: there a forward hook adds ``B A x`` (+ the vector) to the output, and the
parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import PatchError
from lit_thought.model.layers import is_linear, layer_shape, sits_beside
from lit_thought.model.loading import model_name
from lit_thought.model.sharding import is_sharded, own_rows
from lit_thought.solve.factors import Factors

__all__ = [
    "Change",
    "add_change",
    "checked_factors",
    "checked_vector",
    "find_weights",
    "has_change",
    "original_weights",
    "take_off_change",
]


Change = Mapping[str, Factors | Tensor]
"""What to add, by parameter name: Factors to ``"<path>.weight"``, a vector (d_out,) to ``"<path>.bias"``."""


def checked_factors(value: Factors) -> Factors:
    """A float32 copy on the CPU of a weight's change.

    Raises:
        PatchError: if it is not finite as float32.
    """
    kept = Factors(_keep(value.A), _keep(value.B))
    for name, tensor in (("A", kept.A), ("B", kept.B)):
        if not bool(torch.isfinite(tensor).all()):
            raise PatchError(f"Factors: {name} holds NaN or infinite values (as float32).")
    return kept


def checked_vector(path: str, value: object) -> Tensor:
    """A float32 copy on the CPU of a thought vector, shape (d_out,).

    Raises:
        PatchError: if it is not a floating-point vector of at least one entry, or not finite as float32.
    """
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point() or value.numel() == 0:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PatchError(f"vectors[{path!r}] must be a floating-point tensor of shape (d_out,), got {came}.")
    kept = _keep(value)
    if not bool(torch.isfinite(kept).all()):
        raise PatchError(f"vectors[{path!r}] holds NaN or infinite values (as float32).")
    return kept


@dataclass
class _State:
    """What is on a model: the parameters changed in place as they were, None for a bias that was not there, and
    (owner, change) in the order they came."""

    originals: dict[str, Tensor | None] = field(default_factory=dict)
    changes: list[tuple[object, Change]] = field(default_factory=list)


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def has_change(model: nn.Module, owner: object) -> bool:
    """Whether the change that ``owner`` put on ``model`` is there now."""
    state = _STATES.get(model)
    return state is not None and any(other is owner for other, _ in state.changes)


def original_weights(model: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of ``model`` changed in place, by name, as they were before any change; None: there was none."""
    state = _STATES.get(model)
    return dict(state.originals) if state else {}


def add_change(model: nn.Module, owner: object, change: Change) -> None:
    """Add ``change`` to the parameters, or beside them, in ``owner``'s name. A failure midway takes all of it back.

    Raises:
        PatchError: see ``find_weights``.
    """
    state = _STATES.get(model) or _State()
    layers = find_weights(model, change)
    originals = dict(state.originals)
    for name, layer in layers.items():
        if name not in originals and not sits_beside(layer):
            value = _parameter(name, layer)
            originals[name] = None if value is None else value.detach().clone()
    try:
        for name, layer in layers.items():
            _add(name, layer, change[name])
    except BaseException:
        _rebuild(layers, originals, [other for _, other in state.changes])
        raise
    _STATES[model] = _State(originals, [*state.changes, (owner, change)])


def take_off_change(model: nn.Module, owner: object) -> None:
    """Take ``owner``'s change off again; the others stay, in their order."""
    state = _STATES[model]
    mine = next(change for other, change in state.changes if other is owner)
    rest = [(other, change) for other, change in state.changes if other is not owner]
    _rebuild(find_weights(model, mine), state.originals, [change for _, change in rest])
    used = {name for _, change in rest for name in change}
    if rest:
        _STATES[model] = _State({name: value for name, value in state.originals.items() if name in used}, rest)
    else:
        del _STATES[model]


def find_weights(model: nn.Module, change: Change) -> dict[str, nn.Module]:
    """The layer of every parameter in ``change``, after checking that each can take its change.

    Raises:
        PatchError: on a missing module, one that is no linear layer, a wrong shape, or a parameter that is shared,
            sharded other than by rows, or not loaded.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = {name: name.rpartition(".")[0] for name in change}
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
        _check_layer(paths[name], layer, change[name])
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


def _add(name: str, layer: nn.Module, addition: Factors | Tensor) -> None:
    """``W += B A`` (transposed for Conv1D) or ``b += v``, in float32 or better, rounded to the dtype once; or beside
    the layer."""
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
        own.copy_(own.to(dtype) + delta)


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
    changes: Iterable[Change],
) -> None:
    """Put the original parameters back and take hooks off, then add the given changes in order."""
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
                value.copy_(original)
    for change in changes:
        for name, layer in layers.items():
            if name in change:
                _add(name, layer, change[name])


def _keep(value: Tensor) -> Tensor:
    """A float32 copy on the CPU that nothing else can change."""
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
