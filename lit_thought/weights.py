"""Low-rank changes put on a model's weights, and taken off exactly.

Per model, the touched weights are kept as they were, beside the list of changes in the order they came.
Taking one off puts those copies back and adds the rest again, so removal is exact to the last bit in every
dtype and order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import PatchError
from lit_thought.models import model_name

__all__ = ["Factors", "add_change", "find_weights", "has_change", "original_weights", "take_off_change"]


@dataclass(eq=False)
class Factors:
    """One weight's change as two thin matrices: ``ΔW = B @ A``. Kept in float32 on the CPU.

    Attributes:
        A: shape (rank, d_in).
        B: shape (d_out, rank).
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        for name, value in (("A", self.A), ("B", self.B)):
            if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
                tensor = isinstance(value, Tensor)
                came = f"{value.dtype} {tuple(value.shape)}" if tensor else type(value).__name__
                raise PatchError(f"Factors: {name} must be a floating-point matrix, got {came}.")
        if self.A.shape[0] != self.B.shape[1] or self.A.shape[0] == 0:
            raise PatchError(
                f"Factors: A must be (rank, d_in) and B (d_out, rank) with one rank of at least 1, got A "
                f"{tuple(self.A.shape)} and B {tuple(self.B.shape)}."
            )
        self.A, self.B = _keep(self.A), _keep(self.B)
        for name, value in (("A", self.A), ("B", self.B)):
            if not bool(torch.isfinite(value).all()):
                raise PatchError(f"Factors: {name} holds NaN or infinite values (as float32).")

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``B @ A``, shape (d_out, d_in)."""
        return self.B.to(dtype) @ self.A.to(dtype)


@dataclass
class _State:
    """What is on a model: the touched weights as they were, and (owner, change) in the order they came."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    changes: list[tuple[object, Mapping[str, Factors]]] = field(default_factory=list)


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def has_change(model: nn.Module, owner: object) -> bool:
    """Whether the change that ``owner`` put on ``model`` is there now."""
    state = _STATES.get(model)
    return state is not None and any(other is owner for other, _ in state.changes)


def original_weights(model: nn.Module) -> dict[str, Tensor]:
    """The touched parameters of ``model``, by name, as they were before any change."""
    state = _STATES.get(model)
    return {f"{path}.weight": value for path, value in state.originals.items()} if state else {}


def add_change(model: nn.Module, owner: object, change: Mapping[str, Factors]) -> None:
    """Add ``change`` to the weights, in ``owner``'s name. A failure midway puts all weights back."""
    state = _STATES.get(model) or _State()
    modules = find_weights(model, change)
    originals = dict(state.originals)
    for path, module in modules.items():
        if path not in originals:
            originals[path] = _weight(module).detach().clone()
    try:
        for path, module in modules.items():
            _add(module, change[path])
    except BaseException:
        _rebuild(modules, originals, [other for _, other in state.changes])
        raise
    _STATES[model] = _State(originals, [*state.changes, (owner, change)])


def take_off_change(model: nn.Module, owner: object) -> None:
    """Take ``owner``'s change off again; the others stay, in their order."""
    state = _STATES[model]
    mine = next(change for other, change in state.changes if other is owner)
    rest = [(other, change) for other, change in state.changes if other is not owner]
    _rebuild(find_weights(model, mine), state.originals, [change for _, change in rest])
    used = {path for _, change in rest for path in change}
    if rest:
        _STATES[model] = _State({path: state.originals[path] for path in used}, rest)
    else:
        del _STATES[model]


def find_weights(model: nn.Module, change: Mapping[str, Factors]) -> dict[str, nn.Module]:
    """The module of every target, after checking that each can take its change.

    Raises:
        PatchError: on a missing module, a wrong shape, or a weight that is quantised, shared, sharded or not
            loaded.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    modules = dict(model.named_modules())
    missing = [path for path in change if path not in modules]
    if missing:
        raise PatchError(
            f"the model ({model_name(model) or type(model).__name__}) has no module {missing[0]!r} "
            f"({len(missing)} of the patch's {len(change)} targets are missing). The patch belongs to "
            "another architecture, or the model is wrapped: pass the bare model."
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, factors in change.items():
        _check_module(path, modules[path], factors)
        shared = [name for name in names.get(id(modules[path].weight), []) if name != f"{path}.weight"]
        if shared:
            raise PatchError(
                f"{path!r} shares its weight with {shared}, so changing it in place would change both. "
                "Load the saved adapter with peft.PeftModel.from_pretrained instead."
            )
    return {path: modules[path] for path in change}


def _check_module(path: str, module: nn.Module, factors: Factors) -> None:
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise PatchError(
            f"{path!r} is a {type(module).__name__}; expected torch.nn.Linear or transformers' Conv1D. If "
            "the model is quantised or holds PEFT layers, use peft.PeftModel on the saved adapter."
        )
    weight = _weight(module)
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise PatchError(
            f"{path!r} is quantised ({weight.dtype}), and its weight cannot be changed in place. Save the "
            "patch with save_adapter and load it with peft.PeftModel.from_pretrained(model, folder)."
        )
    if weight.is_meta or hasattr(weight, "full_tensor"):  # full_tensor: a sharded DTensor
        raise PatchError(
            f"{path!r} is sharded, offloaded or not loaded; expected the whole weight in memory. Apply the "
            "patch before sharding, or use the saved adapter with PEFT."
        )
    here = (weight.shape[0], weight.shape[1]) if isinstance(module, nn.Linear) else tuple(weight.shape)[::-1]
    wanted = (factors.B.shape[0], factors.A.shape[1])
    if here != wanted:
        raise PatchError(
            f"{path!r} maps {here[1]} inputs to {here[0]} outputs in this model, but the patch is for "
            f"{wanted[1]} to {wanted[0]}. Load the model that the patch was made for."
        )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _add(module: nn.Module, factors: Factors) -> None:
    """``W += B A`` (transposed for Conv1D), in float32 or better, rounded to the weight's dtype once."""
    weight = _weight(module)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # autocast would compute the product in half precision
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        delta = factors.B.to(weight.device, dtype) @ factors.A.to(weight.device, dtype)
        weight.copy_(weight.to(dtype) + (delta.T if isinstance(module, Conv1D) else delta))


def _rebuild(
    modules: Mapping[str, nn.Module],
    originals: Mapping[str, Tensor],
    changes: Iterable[Mapping[str, Factors]],
) -> None:
    """Put the original weights back, then add the given changes in order."""
    with torch.no_grad():
        for path, module in modules.items():
            _weight(module).copy_(originals[path])
    for change in changes:
        for path, module in modules.items():
            if path in change:
                _add(module, change[path])


def _keep(value: Tensor) -> Tensor:
    """A float32 copy on the CPU that nothing else can change."""
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
