"""Linear layers with packed weights, as quantisers make them, that run on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_thought.model.loading import fingerprint


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 or better, as the output's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        y = nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def _rows(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Whole numbers in ±levels, and the scale (d_out, 1) of each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / levels
    return (weight.float() / scale).round(), scale


class _Fake(nn.Linear):
    """A subclass of nn.Linear, as bitsandbytes' are: frozen packed weight, forward of its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(self.pack(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def dequantised(self) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return _run(input, self.dequantised(), self.bias)


class FakeLinear8bit(_Fake):
    """int8 weight (d_out, d_in)."""

    def pack(self, weight: Tensor) -> Tensor:
        codes, self.scale = _rows(weight, 127)
        return codes.to(torch.int8)

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.scale


class FakeLinear4bit(_Fake):
    """Two weights a byte in a uint8 column (d_out d_in / 2, 1), which says nothing of the layer's sizes."""

    def pack(self, weight: Tensor) -> Tensor:
        codes, self.scale = _rows(weight, 7)
        pairs = (codes + 8).to(torch.uint8).reshape(-1, 2)
        return (pairs[:, :1] << 4) | pairs[:, 1:]

    def dequantised(self) -> Tensor:
        codes = torch.cat([self.weight >> 4, self.weight & 15], dim=1).float() - 8
        return codes.reshape(self.out_features, self.in_features) * self.scale


class FakeLinearFloat8(_Fake):
    """float8 weight (d_out, d_in): floating, but of one byte."""

    def pack(self, weight: Tensor) -> Tensor:
        _, self.scale = _rows(weight, 8)
        return (weight.float() / self.scale).to(torch.float8_e4m3fn)

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.scale


class FakeTernary(_Fake):
    """A floating-point weight that forward rounds, as BitNet's layers do: a small change of it would be lost."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def dequantised(self) -> Tensor:
        scale = self.weight.abs().mean()
        return (self.weight / scale).round().clamp(-1, 1) * scale


class QuantLinear(nn.Module):
    """No nn.Linear, and no weight: packed into buffers, as GPTQ's and AWQ's layers are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, scale = _rows(weight, 7)
        self.register_buffer("qweight", codes.to(torch.int32).T.contiguous())
        self.register_buffer("scales", scale)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def dequantised(self) -> Tensor:
        return self.qweight.T.float() * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return _run(x, self.dequantised(), self.bias)


class PackedTensor(Tensor):
    """A tensor subclass that holds int8 codes and scales and says it is float, as torchao's are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> PackedTensor:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def dequantised(self) -> Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _run(args[0], args[1].dequantised(), args[2] if len(args) > 2 else None)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"a packed tensor has no {func}")


def packed_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain nn.Linear whose weight is a tensor subclass."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    codes, scale = _rows(weight, 127)
    layer.weight = nn.Parameter(PackedTensor(codes.to(torch.int8), scale, weight.dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


KINDS = {
    "8bit": FakeLinear8bit,
    "4bit": FakeLinear4bit,
    "float8": FakeLinearFloat8,
    "ternary": FakeTernary,
    "buffers": QuantLinear,
    "packed": packed_linear,
}


def quantise_(model: PreTrainedModel, kind: str, only: str = "") -> PreTrainedModel:
    """Replace the linear layers inside the blocks, those with ``only`` in their path, by ones of a kind in KINDS."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Linear, Conv1D)) and path != "lm_head" and only in path:
            weight = layer.weight.detach()
            weight = weight.T if isinstance(layer, Conv1D) else weight
            model.set_submodule(path, KINDS[kind](weight, None if layer.bias is None else layer.bias.detach()))
    return model.eval().requires_grad_(False)


def dequantise_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace quantised layers by plain ones with the weights that they stand for, in the model's dtype."""
    for path, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        packed = weight if isinstance(weight, PackedTensor) else layer
        if hasattr(packed, "dequantised"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=model.dtype)
            plain.weight.data.copy_(packed.dequantised())
            if layer.bias is not None:
                plain.bias.data.copy_(layer.bias)
            model.set_submodule(path, plain)
    return model.eval().requires_grad_(False)


def packed_bytes(model: nn.Module) -> dict[str, bytes]:
    """All parameters and buffers as bytes, and the model's fingerprint."""
    found = {"": fingerprint(model).encode()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        for part in (value.codes, value.scale) if isinstance(value, PackedTensor) else (value,):
            raw = part.detach().contiguous().view(-1).view(torch.uint8)
            found[name] = found.get(name, b"") + raw.numpy().tobytes()
    return found
