"""Patches beside quantised weights, and quantised models told apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from quantised import KINDS, dequantise_, packed_bytes, packed_linear, quantise_
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.model import layers
from lit_thought.model.loading import fingerprint
from lit_thought.patch import weights
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors

IDS = torch.arange(12).reshape(2, 6)
SHAPES = {
    f"model.layers.{i}.{path}": shape
    for i in range(3)
    for path, shape in (("self_attn.o_proj", (32, 32)), ("mlp.up_proj", (48, 32)), ("mlp.down_proj", (32, 48)))
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_quantised(kind: str, dtype: torch.dtype = torch.float32, only: str = "", seed: int = 0) -> PreTrainedModel:
    return quantise_(make_model("llama", dtype, seed), kind, only)


def make_patch(seed: int = 0, every: int = 1, vectors: int = 2, size: float = 0.2) -> ThoughtPatch:
    """A random patch of every ``every``-th layer in SHAPES, with a vector for every ``vectors``-th."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    factors = {
        path: Factors(random(2, d_in), random(d_out, 2)) for path, (d_out, d_in) in list(SHAPES.items())[::every]
    }
    return ThoughtPatch(factors, None, {path: random(SHAPES[path][0]) for path in list(SHAPES)[::vectors]})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_layers_output_gains_the_patchs_and_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = make_quantised(kind, dtype)
    first, second = make_patch(1), make_patch(2)
    before = packed_bytes(model)
    wider = torch.promote_types(dtype, torch.float32)
    for path, (_, d_in) in SHAPES.items():
        layer = model.get_submodule(path)
        x = torch.randn(2, 5, d_in, generator=torch.Generator().manual_seed(3)).to(dtype)
        plain = layer(x)
        with first.applied(model), second.applied(model):
            found = layer(x)
            assert packed_bytes(model) == before
        exact = plain.double()
        for patch in (first, second):
            exact = exact + x.double() @ patch.factors[path].delta(torch.float64).T
            exact = exact + patch.vectors.get(path, torch.zeros(1)).double()
        assert found.dtype == dtype
        noise = 1e-13 if dtype == torch.float64 else 3e-6
        rounding = 0.0 if dtype == wider else torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=noise)
        assert (found - plain).abs().max() > 0.1
        assert torch.equal(layer(x), plain)


@every_kind
def test_equals_the_patch_on_the_unpacked_model(kind: str) -> None:
    model = make_quantised(kind, torch.float64)
    patch = make_patch()
    plain = logits(model)
    unpacked = dequantise_(make_quantised(kind, torch.float64))
    torch.testing.assert_close(plain, logits(unpacked), rtol=0, atol=1e-10)
    with patch.applied(model), patch.applied(unpacked):
        found = logits(model)
        torch.testing.assert_close(found, logits(unpacked), rtol=0, atol=1e-10)
        assert hooks(model) == len(SHAPES)
        assert hooks(unpacked) == 0
    assert (found - plain).abs().max() > 0.5
    assert torch.equal(logits(model), plain)
    assert hooks(model) == 0


@pytest.mark.parametrize("only", ["", "down_proj"])
@pytest.mark.parametrize("kind", ["8bit", "4bit", "buffers"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_patches_come_off_in_any_order(order: tuple[int, ...], kind: str, only: str) -> None:
    """With ``only``, the same patches change plain layers in place and sit beside quantised ones."""
    model = make_quantised(kind, torch.bfloat16, only)
    before, names, plain = packed_bytes(model), list(model.state_dict()), logits(model)
    patches = [make_patch(seed, every=seed + 1, vectors=3 - seed) for seed in range(3)]
    for patch in patches:
        patch.apply_(model)
    on = list(patches)
    for number in order:
        with pytest.raises(PatchError, match="applied to the model already"):
            patches[number].apply_(model)
        patches[number].remove_(model)
        assert not weights.has_change(model, patches[number])
        on.remove(patches[number])
        fresh = make_quantised(kind, torch.bfloat16, only)
        for patch in on:
            patch.apply_(fresh)
        assert torch.equal(logits(model), logits(fresh))
        assert packed_bytes(model) == packed_bytes(fresh)
        held = {path for patch in on for path in patch.targets if only in path}
        assert hooks(model) == len(held)
        assert not [name for name in weights.original_weights(model) if only in name]
    assert torch.equal(logits(model), plain)
    assert packed_bytes(model) == before
    assert list(model.state_dict()) == names
    assert model not in weights._STATES


@pytest.mark.parametrize("count", [3, 12])
def test_failure_midway_takes_everything_off(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_quantised("4bit", only="mlp")
    first, second = make_patch(1), make_patch(2)
    first.apply_(model)
    before, patched, hooked = packed_bytes(model), logits(model), hooks(model)
    genuine, calls = weights._add, []

    def failing(name: str, layer: nn.Module, addition: Factors | Tensor, **given: Any) -> None:
        calls.append(name)
        if len(calls) == count:
            raise MemoryError("no room")
        genuine(name, layer, addition, **given)

    monkeypatch.setattr(weights, "_add", failing)
    with pytest.raises(MemoryError):
        second.apply_(model)
    assert packed_bytes(model) == before
    assert torch.equal(logits(model), patched)
    assert hooks(model) == hooked
    assert not weights.has_change(model, second)
    first.remove_(model)
    assert hooks(model) == 0


def test_algebra_beside_the_weights() -> None:
    model = make_quantised("8bit", torch.float64)
    a, b = make_patch(1), make_patch(2, every=2)
    with (2 * a - 0.5 * b).applied(model):
        combined = logits(model)
    with (2 * a).applied(model), (-0.5 * b).applied(model):
        torch.testing.assert_close(logits(model), combined, rtol=0, atol=1e-5)  # vectors are summed in float32
    plain = logits(model)
    with a.applied(model), (-a).applied(model):
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-12)
    for part in (a.only_vectors(), a.without_vectors()):
        unpacked = dequantise_(make_quantised("8bit", torch.float64))
        with part.applied(model), part.applied(unpacked):
            torch.testing.assert_close(logits(model), logits(unpacked), rtol=0, atol=1e-10)


def test_checks_hold_and_sizes_are_the_layers_own() -> None:
    path = "model.layers.1.mlp.down_proj"
    model = make_quantised("4bit", only="mlp")
    before = packed_bytes(model)
    ones = torch.ones
    assert tuple(model.get_submodule(path).weight.shape) == (32 * 48 // 2, 1)
    for bad in (Factors(ones(1, 1), ones(768, 1)), Factors(ones(1, 32), ones(48, 1))):
        with pytest.raises(PatchError, match="maps 48 inputs to 32 outputs"):
            ThoughtPatch({**make_patch().factors, path: bad}).apply_(model)
    with pytest.raises(PatchError, match="has 32 outputs in this model"):
        ThoughtPatch({}, None, {path: ones(768)}).apply_(model)
    other = ThoughtPatch(make_patch().factors, {"fingerprint": fingerprint(make_quantised("8bit"))})
    with pytest.raises(PatchError, match="made for"):
        other.apply_(model)
    own = ThoughtPatch(make_patch().factors, {"fingerprint": fingerprint(model)})
    with make_patch(4).applied(model), own.applied(model):
        assert hooks(model) == 6
    assert hooks(model) == 0
    assert packed_bytes(model) == before
    for kind in ("8bit", "buffers"):
        model = make_quantised(kind)
        with pytest.raises(PatchError, match="not loaded"):
            make_patch().apply_(copy.deepcopy(model).to("meta"))
        model.model.layers[0].mlp.down_proj = model.model.layers[1].mlp.down_proj
        with pytest.raises(PatchError, match=r"shares its weight with \['model.layers.1.mlp.down_proj"):
            make_patch().apply_(model)
        assert hooks(model) == 0


@every_kind
def test_which_layers_a_patch_sits_beside(kind: str) -> None:
    layer = KINDS[kind](torch.randn(3, 4), None)
    assert layers.sits_beside(layer)
    assert layers.layer_shape(layer) == (3, 4)
    for dtype in (torch.float16, torch.float64):
        assert not layers.sits_beside(nn.Linear(4, 3, dtype=dtype))
    assert not layers.sits_beside(make_model("gpt2").transformer.h[0].mlp.c_fc)
    assert layers.layer_shape(make_model("gpt2").transformer.h[0].mlp.c_fc) == (128, 32)
    # a weight that is computed anew for each call cannot be changed in place either
    assert layers.sits_beside(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))


def test_a_quantised_layer_in_place_of_a_transposed_one() -> None:
    model, path = quantise_(make_model("gpt2"), "8bit"), "transformer.h.1.mlp.c_proj"
    patch = ThoughtPatch({path: Factors(torch.ones(1, 128) / 9, torch.ones(32, 1))}, None, {path: torch.ones(32)})
    unpacked = dequantise_(quantise_(make_model("gpt2"), "8bit"))
    with patch.applied(model), patch.applied(unpacked):
        torch.testing.assert_close(logits(model), logits(unpacked), rtol=0, atol=1e-10)


def test_other_hooks_autocast_keywords_and_gradients() -> None:
    model = make_quantised("8bit", torch.float32)
    path = "model.layers.0.mlp.down_proj"
    layer, patch, seen = model.get_submodule(path), make_patch(), []
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        patch.apply_(model)
        under_autocast = layer(x)
    assert torch.equal(seen[-1], under_autocast)
    leaf = x.clone().requires_grad_()
    patched = layer(input=leaf)
    assert torch.equal(patched, under_autocast)  # bfloat16 would differ in the third digit
    patched.sum().backward()
    wanted = (layer.dequantised() + patch.factors[path].delta()).sum(0)
    torch.testing.assert_close(leaf.grad, wanted.expand(4, -1))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    patch.remove_(model)
    assert list(layer._forward_hooks) == [handle.id]


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_peft_puts_the_adapter_beside_the_same_weights(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, patch = make_quantised(kind), make_patch()
    patch.save_adapter(tmp_path / "adapter")
    with patch.applied(model):
        wanted = logits(model)
    with ThoughtPatch.load(tmp_path / "adapter", model).applied(model):
        assert torch.equal(logits(model), wanted)
    with_peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(with_peft), wanted, rtol=0, atol=5e-6)
    before = hooks(model)
    with pytest.raises(PatchError, match="PEFT"):
        patch.apply_(model, check=False)
    assert hooks(model) == before


# Fingerprints


@every_kind
def test_fingerprint_sees_quantised_weights(kind: str) -> None:
    first = fingerprint(make_quantised(kind))
    assert first == fingerprint(make_quantised(kind))
    others = [other for other in KINDS if other != kind]
    assert first not in {fingerprint(make_quantised(other)) for other in others}
    assert kind == "ternary" or first != fingerprint(make_model("llama", torch.float32))
    changed = make_quantised(kind)
    layer = changed.model.layers[2].mlp.up_proj
    if kind == "buffers":
        layer.qweight[3, 4] += 1
    elif kind == "packed":
        layer.weight.codes[3, 4] += 1
    else:
        raw = layer.weight.data.view(torch.uint8)
        raw[3, 0] = raw[3, 0] ^ 1
    assert fingerprint(changed) != first


def test_fingerprint_of_buffers_and_packed_tensors() -> None:
    """Only the scale, or only the codes, of a model that has nothing else."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for kind, parts in (("buffers", ("qweight", "scales")), ("packed", ("codes", "scale"))):
        layer: Any = KINDS[kind](weight, None)
        holder = layer if kind == "buffers" else layer.weight
        first = fingerprint(layer)
        for name in parts:
            kept = getattr(holder, name).clone()
            getattr(holder, name)[1] += 1
            assert fingerprint(layer) != first
            getattr(holder, name).copy_(kept)
            assert fingerprint(layer) == first
    lost = packed_linear(weight, None)
    lost.weight.codes = lost.weight.codes.to("meta")
    with pytest.raises(ThoughtError, match="meta device"):
        fingerprint(lost)


def test_a_copy_of_a_patched_quantised_model_is_told() -> None:
    """Its hooks came along, and nobody can take them off."""
    model, patch = make_quantised("8bit"), make_patch()
    with patch.applied(model):
        other = copy.deepcopy(model)
    for ask in (patch.validate, patch.apply_, weights.patched_fingerprint, weights.made_for):
        with pytest.raises(PatchError, match="model is a copy of one that had patches beside its quantised layers"):
            ask(other)
    patch.validate(model)
