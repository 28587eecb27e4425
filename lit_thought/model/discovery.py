"""Find out what the layers of a block do by running it: which linear layers write to the residual stream, and how.

Names of layers differ from family to family; what they do can be observed. A block is run on a few random rows h, and
again with a known change. All statements are about the block's residual stream, which is recognised by what survives
when h is scaled up: x(K h) ≈ κ ⊙ K h for large K, the same κ for all rows (mostly 1), as every branch of the block
normalises its input or its output.

A linear layer with output y *writes to* the residual stream if there is a point x of that stream, a module's input or
the block's output, where a change v of y shows as (the additivity probe)

    x(y + v) − x(y)  =  c v,   c γᵢ v  or  c (N(y + v) − N(y)):

directly, with a residual multiplier c (Granite); through a gate γᵢ, a number for each token (a shared expert's); or
through a norm N of the form N(y) = g ⊙ y γ(y) (post-norm blocks: Gemma 2 and 3, OLMo 2, GLM 4). Attention's output
projection is the first writer whose input depends on other tokens, the MLP's the next one whose input does not, once
attention's output is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_thought.errors import SingularSystemError
from lit_thought.model.calls import Call, first_float, unwrapped
from lit_thought.model.layers import is_linear

__all__ = ["Roles", "Writer", "channel_gain", "row_ratio", "trace_block", "wider"]

_SHARED = "shared_kv_states"
"""The argument through which blocks read the keys and values of another block (Gemma 4)."""


@dataclass(frozen=True)
class Writer:
    """A linear layer that writes to the residual stream.

    Attributes:
        path: of the layer, in the block.
        d_in: size of the layer's input.
        point: path of the module whose input is the residual stream after this layer; None for the block's output.
        multiplier: c.
        norm: path of the norm N between the layer and the residual stream, or None.
        gate: path of the layer whose output's sigmoid is γ, or None.
    """

    path: str
    d_in: int
    point: str | None
    multiplier: float = 1.0
    norm: str | None = None
    gate: str | None = None


@dataclass(frozen=True)
class Roles:
    """What was found out about a block.

    Attributes:
        attn_out, mlp_out: the two writers, where there are.
        parallel: attention and MLP read the same residual stream and are added to it at once.
        mlp_norm: path of the norm between the residual stream and the MLP, or None.
        mlp_in: paths of the MLP's first linear layers, if nothing else reads what that norm puts out.
        mlp: path of the MLP, where the block ends with ``o = m + c N(mlp(norm(m)))`` (either norm may be missing) and
            can go on from m alone; None elsewhere.
        experts: path of a mixture of experts in the block, or None.
        missing: why a role was not found, by site.
    """

    attn_out: Writer | None = None
    mlp_out: Writer | None = None
    parallel: bool = False
    mlp_norm: str | None = None
    mlp_in: tuple[str, ...] = ()
    mlp: str | None = None
    experts: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def channel_gain(norm: nn.Module, like: Tensor) -> Tensor | None:
    """g of a norm N(y) = g ⊙ y γ(y), with γ(y) a number for each row; None for a norm of another form.

    g is what the norm makes of a row of ones, whose γ is 1 (to the norm's own epsilon).

    Args:
        norm: such as an RMSNorm, whether it scales by its weight or, as in Gemma, by 1 + weight.
        like: some rows y, (n, d), to test the form on.

    Returns:
        (d,), float32 or better.
    """
    gain = norm.forward(torch.ones_like(like[:1]))[0]  # without hooks, which a user may have put there
    gain = gain.to(wider(gain.dtype))
    found, direction = norm.forward(like).to(gain), gain * like.to(gain)
    scales = row_ratio(found, direction)
    return gain if _close(found, scales * direction, _tolerance(like.dtype)) else None


def trace_block(module: nn.Module, call: Call, like: Tensor, name: str) -> Roles:
    """Find the roles of a block's layers; the block is run about ten times on a few rows of noise.

    Args:
        module: the block, in eval mode.
        call: one call of it, batch size 1.
        like: the residual stream in that call, (1, length, d), for its shape, dtype and device.
        name: the block's name, for error messages.

    Raises:
        SingularSystemError: when the block puts out NaN or infinite values.
    """
    tracer = _Tracer(module, call, like)
    if not bool(tracer.base.output.isfinite().all()):
        raise SingularSystemError(f"{name} puts out NaN or infinite values. Check the model's weights and dtype.")
    return tracer.roles()


@dataclass
class _Run:
    """One run of a block: inputs and outputs of its modules in the order of the calls, and its own output."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    output: Tensor

    def at(self, point: str | None) -> Tensor | None:
        """The input of a module, the block's output for None; None where that module was not called."""
        return self.output if point is None else self.inputs.get(point)


class _Tracer:
    def __init__(self, module: nn.Module, call: Call, like: Tensor) -> None:
        self.module, self.call, self.like = module, call, like
        self.names = {path: child for path, child in module.named_modules() if path}
        self.tokens, self.width = like.shape[1:]
        self.generator = torch.Generator().manual_seed(0)
        self.hidden = self._noise()
        self.tolerance = _tolerance(like.dtype)
        # a probe that is to be seen in a residual stream of size 1
        self.least = 1e-3 if like.dtype in (torch.float32, torch.float64) else 1.0
        self.base = self._run(self.hidden)
        for scale in (1e5,) if like.dtype in (torch.float32, torch.float64) else (1e3, 200, 40):
            self.scaled = self._run(scale * self.hidden)
            if bool(self.scaled.output.isfinite().all()):
                break  # in float16, an MLP without a norm before it overflows early
        moved = self.hidden.clone()
        moved[:, 0] = self._noise()[:, 0]
        self.moved = self._run(moved)

    def _noise(self) -> Tensor:
        noise = torch.randn(self.like.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return noise.to(self.like)

    def roles(self) -> Roles:
        experts = next((path for path in self.names if self._is_experts(path)), None)
        writers = []
        for path, module in self.names.items():
            if self._is_candidate(path, module) and (writer := self._writer(path)) is not None:
                writers.append(writer)
        order = list(self.base.outputs)
        writers.sort(key=lambda writer: order.index(writer.path))
        mixing = [writer for writer in writers if self._mixes_tokens(writer.path)]
        if not mixing and _SHARED in self.call.kwargs:  # its keys and values come from another block
            mixing = writers[:1]
        attn_out = mixing[0] if mixing else None
        missing = {}
        if attn_out is None:
            missing["attn_out"] = (
                "no linear layer that mixes tokens writes to the residual stream"
                if self._is_stream(None)
                else "its residual stream cannot be told from its branches (post-layer-norm, or no norm on attention)"
            )
        mlp_out = None
        for writer in writers:
            if attn_out is not None and writer is not attn_out and not self._mixes_tokens(writer.path, held=attn_out):
                mlp_out = writer
                break
        parallel = attn_out is not None and mlp_out is not None and attn_out.point == mlp_out.point
        if mlp_out is None:
            missing["mlp_out"] = (
                f"its MLP is a mixture of experts ({experts}), and no shared expert writes to the residual stream"
                if experts
                else "no linear layer of its MLP writes to the residual stream"
            )
        norm, firsts, reason = self._mlp_in(attn_out, mlp_out, parallel)
        if reason:
            missing["mlp_in"] = reason
        mlp = self._mlp(attn_out, mlp_out) if not parallel else None
        return Roles(attn_out, mlp_out, parallel, norm, firsts, mlp, experts, missing)

    def _mlp(self, attn_out: Writer | None, mlp_out: Writer | None) -> str | None:
        """The MLP as one module, if the rest of the block after attention is it and what its writer says."""
        if attn_out is None or mlp_out is None or attn_out.point is None or mlp_out.point is not None:
            return None
        path = mlp_out.path.partition(".")[0]
        m, mlp, entry = self.base.inputs[attn_out.point], self.names[path], self.names[attn_out.point]
        norm = self.names[mlp_out.norm] if mlp_out.norm is not None else None
        if "." not in mlp_out.path or (entry is not mlp and self.base.outputs.get(attn_out.point) is None):
            return None
        with torch.no_grad():
            try:
                found = mlp(m if entry is mlp else entry(m))
            except TypeError:  # it takes more than its input: the residual stream itself, in Bloom and MPT
                return None
            if not isinstance(found, Tensor):
                return None
            found = m + mlp_out.multiplier * (found if norm is None else norm(found))
        return path if _close(found, self.base.output, self.tolerance**2) else None

    def _is_experts(self, path: str) -> bool:
        own = self.names[path].named_parameters(recurse=False)
        return path.rpartition(".")[2] == "experts" or any(parameter.ndim == 3 for _, parameter in own)

    def _is_candidate(self, path: str, module: nn.Module) -> bool:
        parents = [".".join(path.split(".")[:i]) for i in range(1, path.count(".") + 1)]
        inside_list = any(isinstance(self.names[parent], nn.ModuleList) for parent in parents)
        output = self.base.outputs.get(path)
        return is_linear(module) and not inside_list and output is not None and output.shape[-1] == self.width

    def _writer(self, path: str) -> Writer | None:
        """How a layer writes to the residual stream, at the first point where it can be seen; None if it does not."""
        y = self.base.outputs[path]
        change = self._noise() * (4 * y.float().square().mean().sqrt().clamp_min(self.least)).to(y)
        probe = self._run(self.hidden, change={path: change})
        later = list(self.base.outputs)[list(self.base.outputs).index(path) + 1 :]
        entered = [point for point in self.base.inputs if point in set(later)]
        for point in (*entered, None):
            before, after = self.base.at(point), probe.at(point)
            if before is None or after is None or before.shape != change.shape or not self._is_stream(point):
                continue
            moved = (after - before).double()
            if not bool(moved.any()):
                continue
            found = self._form(path, point, y.double(), change.double(), moved)
            if found is not None:
                return found
        return None

    def _form(self, path: str, point: str | None, y: Tensor, change: Tensor, moved: Tensor) -> Writer | None:
        d_in = self.base.inputs[path].shape[-1]
        multiplier = float((moved * change).sum() / change.square().sum())
        if _close(moved, multiplier * change, self.tolerance):
            return Writer(path, d_in, point, _tidy(multiplier))
        for norm_path, norm in self.names.items():
            if norm_path not in self.base.inputs or next(norm.children(), None) is not None or is_linear(norm):
                continue
            given = self.base.inputs[norm_path]
            if given.shape != y.shape or not torch.equal(given.double(), y):
                continue
            through = (norm(given + change.to(given)) - norm(given)).double()
            multiplier = float((moved * through).sum() / through.square().sum().clamp_min(1e-300))
            if _close(moved, multiplier * through, self.tolerance) and channel_gain(norm, given[0]) is not None:
                return Writer(path, d_in, point, _tidy(multiplier), norm=norm_path)
        scales = row_ratio(moved, change)
        if _close(moved, scales * change, self.tolerance):
            for gate, output in self.base.outputs.items():
                if output.numel() == self.tokens and is_linear(self.names[gate]):
                    gamma = output.double().sigmoid().view_as(scales)
                    multiplier = float((scales * gamma).sum() / gamma.square().sum())
                    if _close(scales, multiplier * gamma, self.tolerance):
                        return Writer(path, d_in, point, _tidy(multiplier), gate=gate)
        return None

    def _is_stream(self, point: str | None) -> bool:
        x, h = self.scaled.at(point), self.hidden.double()
        if x is None:
            return False
        x = x.double()
        share = (x * h).sum(1, keepdim=True) / h.square().sum(1, keepdim=True)
        return bool(share.any()) and _close(x, share * h, 0.1)

    def _mixes_tokens(self, path: str, held: Writer | None = None) -> bool:
        """Whether the input of a layer at the last token depends on the first token."""
        if held is None:
            other = self.moved
        else:
            moved = self.hidden.clone()
            moved[:, 0] = -moved[:, 0]
            other = self._run(moved, hold={held.path: self.base.outputs[held.path]})
        before, after = self.base.inputs[path], other.inputs[path]
        before, after = (x.reshape(self.tokens, -1)[-1].double() for x in (before, after))
        return not _close(after, before, self.tolerance**2)

    def _mlp_in(
        self, attn_out: Writer | None, mlp_out: Writer | None, parallel: bool
    ) -> tuple[str | None, tuple[str, ...], str]:
        """The norm before the MLP, the linear layers that read it, and why they are not a site."""
        if attn_out is None or mlp_out is None:
            return None, (), "there is no single MLP whose first linear layers could be changed"
        if parallel:
            return None, (), "attention and MLP are parallel: the MLP does not see what attention adds"
        point = attn_out.point
        assert point is not None
        norm = self.names[point]
        output = self.base.outputs.get(point)
        if next(norm.children(), None) is not None or is_linear(norm) or output is None:
            return None, (), "no norm stands between the residual stream and the MLP"
        firsts = tuple(
            path
            for path, given in self.base.inputs.items()
            if is_linear(self.names[path]) and path in self.base.outputs and given.data_ptr() == output.data_ptr()
        )
        hold = {path: self.base.outputs[path] for path in firsts}
        if not firsts or not torch.equal(
            self._run(self.hidden, change={point: self._noise()}, hold=hold).output, self.base.output
        ):
            return None, (), "not only linear layers read what the norm before the MLP puts out"
        if mlp_out.norm is not None:
            return point, firsts, "a norm follows the MLP, so the vector part has no bias to go to"
        if mlp_out.multiplier != 1 or mlp_out.gate is not None:
            return point, firsts, "the MLP's output is scaled, so the vector part has no bias to go to"
        return point, firsts, ""

    @torch.no_grad()
    def _run(
        self, hidden: Tensor, change: Mapping[str, Tensor] | None = None, hold: Mapping[str, Tensor] | None = None
    ) -> _Run:
        """Run the block; the outputs of modules may be changed by, or held at, given values."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        change, hold = change or {}, hold or {}

        def enter(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = first_float(args, kwargs)
                if given is not None and given.numel() // given.shape[-1] == self.tokens:
                    inputs[path] = given.reshape(1, self.tokens, -1)

            return hook

        def leave(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                if path in hold:
                    return hold[path].view_as(output)
                if path in change:
                    output = output + change[path].view_as(output)
                if isinstance(output, Tensor) and output.numel() // max(output.shape[-1], 1) == self.tokens:
                    outputs[path] = output.reshape(1, self.tokens, -1)
                return output if path in change else None

            return hook

        with ExitStack() as stack:
            for path, child in self.names.items():
                stack.callback(child.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(leave(path)).remove)
            output = unwrapped(self.call(self.module, hidden.clone()))
        return _Run(inputs, outputs, output)


def row_ratio(found: Tensor, direction: Tensor) -> Tensor:
    """The numbers γ that bring γ · direction nearest to ``found``, one for each row: (…, d) and (…, d) to (…, 1)."""
    square = direction.square().sum(-1, keepdim=True)
    return (found * direction).sum(-1, keepdim=True) / square.masked_fill(square == 0, 1)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where ``dtype`` is that."""
    return torch.promote_types(dtype, torch.float32)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _tidy(multiplier: float) -> float:
    """1 where a multiplier is 1 to the precision of the probe."""
    return 1.0 if abs(multiplier - 1) < 1e-2 else multiplier
