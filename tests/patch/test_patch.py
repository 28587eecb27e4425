"""Patches on models: exact removal, exact algebra, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, make_model
from patches import IDS, make_patch, make_vectors, output_projections, same, snapshot, with_vectors
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.errors import PatchError
from lit_thought.model.loading import fingerprint
from lit_thought.patch import weights
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_changes_by_the_factors_and_removal_is_exact(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    before = snapshot(model)
    patch = make_patch(model)
    patch.apply_(model)
    for path, factors in patch.factors.items():
        old = before[f"{path}.weight"].double().numpy()
        delta = factors.B.double().numpy() @ factors.A.double().numpy()
        wanted = old + (delta.T if family == "gpt2" else delta)
        new = model.get_submodule(path).weight.detach().double().numpy()
        # one rounding to the weight's dtype, and no more: half a unit in the last place
        noise = 1e-14 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(new, wanted, rtol=torch.finfo(dtype).eps / 2, atol=noise)
        assert not np.allclose(new, old, atol=1e-2)
    untouched = set(before) - {f"{path}.weight" for path in patch.targets}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)
    assert not same(model, before)
    patch.remove_(model)
    assert same(model, before)


def test_context_removes_after_an_exception_and_nests() -> None:
    model = make_model("llama", torch.bfloat16)
    before = snapshot(model)
    outer, inner = make_patch(model, 1), make_patch(model, 2)
    with pytest.raises(KeyboardInterrupt), outer.applied(model) as same_model:  # noqa: PT012
        assert same_model is model
        with_outer = snapshot(model)
        assert not same(model, before)
        with pytest.raises(RuntimeError, match="inside"), inner.applied(model):  # noqa: PT012
            assert not same(model, with_outer)
            raise RuntimeError("inside")
        assert same(model, with_outer)
        raise KeyboardInterrupt
    assert same(model, before)
    with outer.applied(model):
        outer.remove_(model)  # the block may remove it itself
    assert same(model, before)


@pytest.mark.parametrize("count", [4, 9])
def test_failure_midway_puts_everything_back(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    first = make_patch(model, 1)
    second = with_vectors(make_patch(model, 2))  # 6 matrices, 6 vectors
    first.apply_(model)
    before = snapshot(model)
    genuine, calls = weights._add, []

    def failing(name: str, layer: nn.Module, addition: Factors | Tensor, **given: Any) -> None:
        calls.append(name)
        if len(calls) == count:
            raise MemoryError("no room")
        genuine(name, layer, addition, **given)

    monkeypatch.setattr(weights, "_add", failing)
    with pytest.raises(MemoryError):
        second.apply_(model)
    assert len(calls) > count  # the first patch was added again
    assert same(model, before)
    assert all(model.get_submodule(path).bias is None for path in second.vectors)
    with pytest.raises(PatchError, match="not applied"):
        second.remove_(model)


def test_removal_is_exact_under_autocast_and_inference_mode() -> None:
    model = make_model("llama", torch.float32)
    before = snapshot(model)
    patch = make_patch(model)
    patch.apply_(model)
    plain = snapshot(model)
    patch.remove_(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), patch.applied(model):
        assert same(model, plain)
    assert same(model, before)


def test_applying_twice_and_removing_what_is_not_there() -> None:
    model = make_model("llama")
    patch = make_patch(model)
    with pytest.raises(PatchError, match="not applied"):
        patch.remove_(model)
    patch.apply_(model)
    with pytest.raises(PatchError, match="applied to the model already"):
        patch.apply_(model)
    with pytest.raises(PatchError, match="not applied"):
        (2 * patch).remove_(model)
    patch.remove_(model)
    with pytest.raises(PatchError, match="not applied"):
        patch.remove_(model)


def test_the_same_adapter_loaded_again_is_the_same_patch(tmp_path: Path) -> None:
    model = make_model("llama")
    before, patch = snapshot(model), make_patch(model)
    backwards = dict(reversed(patch.factors.items()))
    patch = ThoughtPatch(backwards, patch.provenance, patch.vectors)
    patch.save_adapter(tmp_path / "adapter")
    again = ThoughtPatch.load(tmp_path / "adapter")
    assert again.targets != patch.targets
    patch.apply_(model)
    once = snapshot(model)
    with pytest.raises(PatchError, match="its equal, is applied to the model already"):
        again.apply_(model)
    with pytest.raises(PatchError, match="applied to the model already"), again.applied(model):
        pass
    assert same(model, once)
    again.remove_(model)
    assert same(model, before)


def test_another_model_is_refused_unless_asked() -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    patch = make_patch(model)
    before = snapshot(other)
    with pytest.raises(PatchError, match=r"made for 'tiny'.*check=False"):
        patch.apply_(other)
    assert same(other, before)
    with patch.applied(other, check=False):
        assert not same(other, before)
    assert same(other, before)
    with pytest.raises(PatchError, match="dtype differ"):
        patch.apply_(make_model("llama", torch.float32))


def down(block: int) -> str:
    return f"model.layers.{block}.mlp.down_proj"


def of_peft() -> PreTrainedModel:
    model = make_model("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    return model


def with_a_bias_shared() -> PreTrainedModel:
    model = make_model("gpt2")
    first, second = (block.mlp.c_proj for block in model.transformer.h[:2])
    first.bias = second.bias
    return model


def with_a_layer_used_twice() -> PreTrainedModel:
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj = model.model.layers[1].mlp.down_proj
    return model


def llama() -> PreTrainedModel:
    return make_model("llama")


MATRICES = make_patch(llama(), marked=False).factors
VECTORS = make_vectors(llama())
NORM = Factors(torch.ones(1, 32), torch.ones(32, 1))


@pytest.mark.parametrize(
    ("model", "factors", "vectors", "message"),
    [
        (lambda: "a model", MATRICES, {}, "must be a torch"),
        (lambda: "a model", {}, VECTORS, "must be a torch"),
        (lambda: make_model("gpt2"), MATRICES, {}, "6 of the patch's 6 targets are missing"),
        (lambda: make_model("gpt2"), MATRICES, VECTORS, "6 of the patch's 6 targets are missing"),
        (lambda: llama().to("meta"), MATRICES, {}, "not loaded"),
        (lambda: llama().to("meta"), {}, VECTORS, "not loaded"),
        (llama, {**MATRICES, down(2): Factors(torch.ones(1, 7), torch.ones(9, 1))}, {}, r"maps 48 inputs.*7 to 9"),
        (llama, {}, {**VECTORS, down(0): torch.ones(7)}, "has 32 outputs in this model.* vector has 7 entries"),
        (llama, {**MATRICES, "model.norm": NORM}, {}, r"'model\.norm' is a LlamaRMSNorm"),
        (llama, {}, {**VECTORS, "model.norm": torch.ones(32)}, r"'model\.norm' is a LlamaRMSNorm"),
        (of_peft, MATRICES, {}, r"o_proj' is a Linear;.*If the model holds PEFT layers, use peft.PeftModel"),
        (
            lambda: make_model("gpt2"),
            {"lm_head": Factors(torch.ones(1, 32), torch.ones(512, 1))},
            {},
            r"shares its weight with \['transformer.wte.weight'\]",
        ),
        (with_a_bias_shared, {}, {"transformer.h.1.mlp.c_proj": torch.ones(32)}, "shares its bias with"),
        (with_a_layer_used_twice, {}, {down(0): torch.ones(32)}, "shares its weight with"),
    ],
)
def test_every_target_is_checked_before_the_first_change(
    model: Callable[[], Any], factors: dict[str, Factors], vectors: dict[str, Tensor], message: str
) -> None:
    given = model()
    before = snapshot(given) if isinstance(given, nn.Module) else {}
    with pytest.raises(PatchError, match=message):
        ThoughtPatch(factors, None, vectors).apply_(given, check=False)
    if before:
        assert set(given.state_dict()) == set(before)
        assert next(given.parameters()).is_meta or same(given, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """Bit for bit the float32 sum, rounded: a change rounded first, or rounded twice, would differ."""
    model = make_model("llama", dtype)
    patch = with_vectors(make_patch(model))
    before = snapshot(model)
    twice = 0
    with patch.applied(model):
        for path, factors in patch.factors.items():
            old, delta = before[f"{path}.weight"], factors.delta()
            layer = model.get_submodule(path)
            assert torch.equal(layer.weight, (old.float() + delta).to(dtype))
            assert torch.equal(layer.bias, patch.vectors[path].to(dtype))
            twice += int(((old + delta.to(dtype)) != layer.weight).sum())
    assert twice > 100
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_removal_is_exact_at_the_ends_of_a_half_precision_range(dtype: torch.dtype) -> None:
    """Negative zero, subnormals, the largest numbers, and sums that vanish."""
    model = make_model("llama", dtype)
    patch = make_patch(model, marked=False)
    info = torch.finfo(dtype)
    ends = torch.tensor([-0.0, info.smallest_normal / 4, -info.tiny, info.max, info.min]).to(dtype)
    for path in patch.targets:
        model.get_submodule(path).weight.data[:, : len(ends)] = ends
    before = snapshot(model)
    with patch.applied(model), (1e-6 * patch).applied(model):
        assert not same(model, before)
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_beyond_the_dtype_is_refused_and_nothing_changes(dtype: torch.dtype) -> None:
    """Infinite weights would answer with NaN. The last target overflows, so the first ones have to go back."""
    model = make_model("llama", dtype)
    patch, before = make_patch(model), snapshot(model)
    *_, last = patch.factors
    huge = Factors(patch.factors[last].A * 1e20, patch.factors[last].B * 1e20)
    assert huge.delta().abs().max() > torch.finfo(dtype).max
    with pytest.raises(PatchError, match=f"{dtype} cannot hold '{last}.weight' with the patch on it"):
        ThoughtPatch({**patch.factors, last: huge}).apply_(model)
    assert same(model, before)


def test_removal_is_exact_where_the_others_alone_would_leave_the_range() -> None:
    model = make_model("llama", torch.float16)
    path, before = next(iter(output_projections(model))), snapshot(model)
    d_out, d_in = output_projections(model)[path]
    one = ThoughtPatch({path: Factors(torch.ones(1, d_in), torch.full((d_out, 1), -4e4))})
    other = ThoughtPatch({path: Factors(torch.ones(1, d_in), torch.full((d_out, 1), 9e4))})
    one.apply_(model)
    other.apply_(model)
    one.remove_(model)
    assert bool(model.get_submodule(path).weight.isinf().all())  # what the other alone would have made
    other.remove_(model)
    assert same(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scale_and_sum_are_exact(family: str) -> None:
    model = make_model(family)
    a, b, c = (
        make_patch(model, 1, rank=2),
        make_patch(model, 2, rank=3, every=2),
        make_patch(model, 3, rank=1),
    )
    combined = 0.5 * a + b * 3 - c
    assert set(combined.targets) == set(a.targets)
    assert combined.rank == 6

    def dense(patch: ThoughtPatch, path: str) -> np.ndarray:
        if path not in patch.factors:
            return np.zeros(output_projections(model)[path])
        factors = patch.factors[path]
        return factors.B.double().numpy() @ factors.A.double().numpy()

    for path in a.targets:
        wanted = 0.5 * dense(a, path) + 3 * dense(b, path) - dense(c, path)
        # halving and negating are exact in float32, tripling rounds each entry of B once
        np.testing.assert_allclose(dense(combined, path), wanted, rtol=0, atol=3e-7)
        np.testing.assert_array_equal(dense(-a, path), -dense(a, path))
        np.testing.assert_array_equal(dense(0.5 * a, path), 0.5 * dense(a, path))
    before = snapshot(model)
    with combined.applied(model), torch.no_grad():
        logits = model(IDS).logits
        for path in a.targets:
            old = before[f"{path}.weight"].numpy()
            new = model.get_submodule(path).weight.numpy()
            delta = dense(combined, path)
            np.testing.assert_allclose(new, old + (delta.T if family == "gpt2" else delta), rtol=0, atol=1e-14)
    with (0.5 * a).applied(model), (3 * b).applied(model), (-c).applied(model), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-10)
    total = sum([a, b, c])
    assert isinstance(total, ThoughtPatch)
    assert total.rank == 6


def test_algebra_keeps_provenance() -> None:
    model = make_model("llama")
    a, b = make_patch(model, 1), make_patch(model, 2)
    total = 2 * (a + 3 * b) + a
    assert [part.get("scale", 1.0) for part in total.provenance["parts"]] == [2.0, 6.0, 1.0]
    assert total.provenance["fingerprint"] == a.provenance["fingerprint"]
    assert all(part["instruction"] == "Talk like a pirate." for part in total.provenance["parts"])
    cut = total.truncate(1)
    assert [len((cut + a).provenance["parts"])] == [2]  # a truncated sum is one part: its own no longer add up
    assert "parts" not in a.provenance


def test_algebra_refuses_nonsense() -> None:
    model = make_model("llama")
    patch = make_patch(model)
    with pytest.raises(PatchError, match="fingerprint is"):
        patch + make_patch(make_model("llama", seed=1))
    wide = ThoughtPatch({patch.targets[0]: Factors(torch.ones(1, 5), torch.ones(4, 1))})
    with pytest.raises(PatchError, match="4 by 5 in the other"):
        patch + wide
    with pytest.raises(PatchError, match=r"rank=1; expected at least the patch's, 2\. Cut it first: patch\.truncate"):
        patch.padded(1)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(PatchError, match="finite"):
            factor * patch
    with pytest.raises(PatchError, match="infinite"):
        1e300 * patch
    for other in ("2", None, True, [1]):
        with pytest.raises(TypeError):
            patch * other
    for other in (1, False, "x"):
        with pytest.raises(TypeError):
            patch + other
    for rank in (0, -1, 1.0, True):
        with pytest.raises(PatchError, match="rank="):
            patch.truncate(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 3, 5, 12])
def test_truncate_is_the_best_of_its_rank(rank: int) -> None:
    """By NumPy's SVD of each whole matrix; one has factors of more columns than rows."""
    model = make_model("llama")
    patch = make_patch(model, 1, rank=3) + make_patch(model, 2, rank=2, every=2)
    generator = torch.Generator().manual_seed(0)
    wide = Factors(torch.randn(20, 5, generator=generator), torch.randn(7, 20, generator=generator))
    patch = ThoughtPatch({**patch.factors, "wide": wide})
    cut = patch.truncate(rank)
    assert cut.rank == min(rank, 5)
    lost = whole = 0.0
    for path, factors in patch.factors.items():
        dense = factors.B.double().numpy() @ factors.A.double().numpy()
        u, s, v_t = np.linalg.svd(dense, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v_t[:rank]
        np.testing.assert_allclose(cut.factors[path].delta(torch.float64).numpy(), best, rtol=0, atol=2e-5)
        lost, whole = lost + np.sum(s[rank:] ** 2), whole + np.sum(s**2)
    said = cut.provenance["truncated"]
    assert said["rank"] == rank
    assert said["relative_error"] == pytest.approx(np.sqrt(lost / whole), abs=1e-9)
    assert (0 * patch).truncate(1).provenance["truncated"]["relative_error"] == 0.0


def test_truncate_again() -> None:
    """The error is that against the first patch, by dense matrices; where nothing is cut the record stays."""
    model = make_model("llama")
    patch = make_patch(model, 1, rank=5) + make_patch(model, 2, rank=4, every=2)
    assert patch.truncate(9).provenance == patch.provenance
    whole = {path: value.delta(torch.float64) for path, value in patch.factors.items()}
    norm = sum(float(value.square().sum()) for value in whole.values())
    for ranks in ((6, 3), (6, 4, 2), (4, 4, 8)):
        cut = patch
        for rank in ranks:
            cut = (-0.5 * cut).truncate(rank)
        scale = (-0.5) ** len(ranks)
        lost = sum(
            float((whole[path] - v.delta(torch.float64) / scale).square().sum()) for path, v in cut.factors.items()
        )
        assert cut.provenance["truncated"] == {
            "rank": min(ranks),
            "relative_error": pytest.approx((lost / norm) ** 0.5, rel=1e-5),
        }


def test_a_patch_owns_its_numbers() -> None:
    a = torch.ones(1, 2, dtype=torch.float32)
    patch = ThoughtPatch({"x": Factors(a, torch.ones(3, 1))}, given := {"settings": {"rank": 1}})
    a.fill_(7)
    given["settings"]["rank"] = 2
    assert patch.factors["x"].A.tolist() == [[1.0, 1.0]]
    assert patch.provenance["settings"]["rank"] == 1
    assert (patch.rank, patch.num_parameters, patch.nbytes, patch.targets) == (1, 5, 20, ("x",))
    assert repr(patch) == "ThoughtPatch(rank=1, weights=1, parameters=5)"
    kept = ThoughtPatch(patch.factors, {"loss": float("nan"), "steps": (1, 2), "deep": {"x": [float("inf")]}})
    assert kept.provenance == {"loss": None, "steps": [1, 2], "deep": {"x": [None]}}


ones = torch.ones
GOOD = {"x": Factors(ones(1, 2), ones(3, 1))}
NAN, HUGE = torch.tensor([[float("nan")]]), torch.tensor([[1e300]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factors(ones(2, 3), ones(3, 3)), "one rank"),
        (lambda: Factors(ones(0, 3), ones(3, 0)), "at least 1"),
        (lambda: Factors(ones(3), ones(3, 1)), "A must be a floating-point matrix"),
        (lambda: Factors(ones(1, 3), [[1.0]]), r"B must be .* got list"),  # type: ignore[arg-type]
        (lambda: Factors(ones(1, 3).long(), ones(3, 1)), "int64"),
        (lambda: ThoughtPatch({"x": Factors(NAN, ones(1, 1))}), "NaN or infinite"),
        (lambda: ThoughtPatch({"x": Factors(ones(1, 1), HUGE)}), "NaN or infinite"),
        (lambda: ThoughtPatch({}, None, None), "factors is empty, and so is vectors"),
        (lambda: ThoughtPatch({}, None, {}), "factors is empty, and so is vectors"),
        (lambda: ThoughtPatch({"x": ones(1)}), "must map"),  # type: ignore[dict-item]
        (lambda: ThoughtPatch(GOOD, {"loss": ones(1)}), "JSON"),
        (lambda: ThoughtPatch(GOOD, None, {"x": ones(4)}), "3 outputs by its factors, but its vector has 4 entries"),
        *((lambda bad=bad: ThoughtPatch({}, None, {bad: ones(3)}), "got the key") for bad in ("", 3)),
        *(
            (lambda bad=bad: ThoughtPatch({}, {"d_in": bad}, {"x": ones(3)}), r"provenance\['d_in'\]")
            for bad in (3, {"x": "3"}, {"x": 0}, {"x": True})
        ),
        *(
            (lambda bad=bad: ThoughtPatch({}, None, {"x": bad}), message)
            for bad, message in (
                ([1.0], r"vectors\['x'\] must be .* got list"),
                (ones(1, 3), r"got torch.float32 \(1, 3\)"),
                (ones(()), r"got torch.float32 \(\)"),
                (ones(0), r"got torch.float32 \(0,\)"),
                (ones(3).long(), "got torch.int64"),
                (NAN[0], "NaN or infinite"),
                (HUGE[0], "NaN or infinite"),
            )
        ),
    ],
)
def test_what_is_no_patch(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        make()


# Thought vectors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_added_to_the_outputs_of_layers(family: str, dtype: torch.dtype) -> None:
    """Against hooks that add the vectors to the layers' outputs: an independent way to the same logits."""
    model = make_model(family, dtype)
    before = snapshot(model)
    vectors = make_vectors(model, every=2)
    patch = ThoughtPatch({}, {"fingerprint": fingerprint(model)}, vectors)

    def adding(vector: Tensor) -> Any:
        return lambda layer, args, output: (output.double() + vector.double()).to(output.dtype)

    handles = [model.get_submodule(path).register_forward_hook(adding(vector)) for path, vector in vectors.items()]
    with torch.no_grad():
        wanted = model(IDS).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), patch.applied(model):
        found = model(IDS).logits
        for path, vector in vectors.items():
            old = before.get(f"{path}.bias", torch.zeros(len(vector))).double()
            bias = model.get_submodule(path).bias
            # one rounding to the bias's dtype, and no more
            exact = old + vector.double()
            noise = 1e-14 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(bias.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=noise)
            assert bias.dtype == dtype
            assert isinstance(bias, nn.Parameter)
        plain = set(before) | {f"{path}.bias" for path in vectors}
        assert set(model.state_dict()) == plain
        untouched = plain - {f"{path}.bias" for path in vectors}
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)
    if dtype == torch.float64:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert (model(IDS).logits - wanted).abs().max() > 0.1  # a negative control: the vectors do something
    assert set(model.state_dict()) == set(before)
    assert same(model, before)
    assert model not in weights._STATES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_vectors_and_matrices_come_off_in_any_order(order: tuple[int, ...], family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    before = snapshot(model)
    patches = [
        ThoughtPatch({}, None, make_vectors(model, 1)),
        make_patch(model, 2, marked=False),
        with_vectors(make_patch(model, 3, every=2, marked=False), 3, every=3, family=family),
        ThoughtPatch({}, None, make_vectors(model, 4, every=2)),
    ]
    for patch in patches:
        patch.apply_(model)
    on = list(patches)
    for number in order:
        patches[number].remove_(model)
        on.remove(patches[number])
        fresh = make_model(family, dtype)
        for patch in on:
            patch.apply_(fresh)
        assert same(model, snapshot(fresh))
        held = {path for patch in on for path in patch.vectors}
        for path in patches[0].vectors:  # a bias is there for as long as a vector is, and no longer
            assert (model.get_submodule(path).bias is None) == (family == "llama" and path not in held)
        originals = weights.original_weights(model)
        factored = {f"{path}.weight" for patch in on for path in patch.factors}
        assert set(originals) == factored | {f"{path}.bias" for path in held}
    assert set(model.state_dict()) == set(before)
    assert same(model, before)
    assert model not in weights._STATES


def test_a_made_bias_follows_its_weight_and_leaves_no_trace() -> None:
    model = make_model("llama", torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    patch = ThoughtPatch({}, None, make_vectors(model))
    path = patch.targets[0]
    layer = model.get_submodule(path)
    for frozen in (True, False):
        layer.weight.requires_grad_(not frozen)
        with patch.applied(model):
            assert layer.bias.requires_grad is not frozen
            assert layer.bias.device == layer.weight.device
        assert layer.bias is None
        assert list(layer._parameters) == ["weight", "bias"]
        assert [name for name, _ in model.named_parameters()] == names
        assert "bias=False" in repr(layer)


def test_a_bias_made_in_inference_mode_can_be_changed_outside() -> None:
    model = make_model("llama", torch.float32)
    before = snapshot(model)
    first, second = ThoughtPatch({}, None, make_vectors(model, 1)), ThoughtPatch({}, None, make_vectors(model, 2))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        first.apply_(model)
    second.apply_(model)
    for path, vector in first.vectors.items():
        assert torch.equal(model.get_submodule(path).bias.detach(), vector + second.vectors[path])
    first.remove_(model)
    for path, vector in second.vectors.items():
        assert torch.equal(model.get_submodule(path).bias.detach(), vector)
    second.remove_(model)
    assert same(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_fingerprint_check_sees_through_applied_patches(family: str) -> None:
    model = make_model(family, torch.float32)
    first, other = (with_vectors(make_patch(model, seed), seed, family=family) for seed in (1, 2))
    original = fingerprint(model)
    with first.applied(model), other.applied(model):  # `other` was made for the model without `first`
        assert fingerprint(model) != original
        stranger = ThoughtPatch(other.factors, {"fingerprint": fingerprint(model)})
        with pytest.raises(PatchError, match="made for"):
            stranger.apply_(model)
    assert fingerprint(model) == original


def test_algebra_of_vectors() -> None:
    model = make_model("llama")
    a = ThoughtPatch(make_patch(model, 1, every=2).factors, None, make_vectors(model, 1))
    b = ThoughtPatch(make_patch(model, 2).factors, None, make_vectors(model, 2, every=2))
    for path, vector in a.vectors.items():
        other = b.vectors.get(path, torch.zeros(32))
        assert torch.equal((0.5 * a).vectors[path], 0.5 * vector)
        assert torch.equal((-a).vectors[path], -vector)
        assert torch.equal((a + b).vectors[path], vector + other)
        assert torch.equal((b + a).vectors[path], vector + other)
        assert torch.equal((a - b).vectors[path], vector - other)
        assert torch.equal(a.truncate(1).vectors[path], vector)
    assert a.truncate(1).rank == 1
    combined = 2 * a - 0.5 * b
    with combined.applied(model), torch.no_grad():
        logits = model(IDS).logits
    with (2 * a).applied(model), (-0.5 * b).applied(model), torch.no_grad():
        # the sum of two vectors is rounded to float32 once
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=5e-6)

    alone = a.only_vectors()
    assert not alone.factors
    assert alone.truncate(3).provenance == alone.provenance
    assert (alone + a.without_vectors()).targets == (*a.factors, *(p for p in a.vectors if p not in a.factors))
    with pytest.raises(PatchError, match=r"vectors of 'model.* have 32 and 7 entries"):
        alone + ThoughtPatch({}, None, {alone.targets[0]: torch.ones(7)})
    with pytest.raises(PatchError, match="32 outputs by its factors, but its vector has 7"):
        b + ThoughtPatch({}, None, {b.targets[0]: torch.ones(7)})
    for number in (float("nan"), 1e300):
        with pytest.raises(PatchError, match=r"infinite|finite"):
            number * alone
    joined = ThoughtPatch({}, {"d_in": {"x": 3}}, {"x": torch.ones(2)}) + ThoughtPatch(
        {}, {"d_in": {"y": 4}}, {"y": torch.ones(2)}
    )
    assert joined.provenance["d_in"] == {"x": 3, "y": 4}
    with pytest.raises(PatchError, match="factors is empty"):
        alone.without_vectors()
    with pytest.raises(PatchError, match="factors is empty"):
        a.without_vectors().only_vectors()


def test_what_a_patch_with_vectors_says_of_itself() -> None:
    value = torch.ones(3, dtype=torch.float64)
    factors = {"x": Factors(torch.ones(2, 2), torch.ones(3, 2))}
    both = ThoughtPatch(factors, None, {"y": value, "x": value.bfloat16()})
    value.fill_(7)
    assert both.vectors["y"].tolist() == [1.0, 1.0, 1.0]
    assert {vector.dtype for vector in both.vectors.values()} == {torch.float32}
    assert (both.rank, both.num_parameters, both.nbytes, both.targets) == (2, 16, 64, ("x", "y"))
    assert repr(both) == "ThoughtPatch(rank=2, weights=1, vectors=2, parameters=16)"
    alone = both.only_vectors()
    assert (alone.rank, alone.num_parameters, alone.nbytes, alone.targets) == (0, 6, 24, ("y", "x"))
    assert repr(alone) == "ThoughtPatch(rank=0, weights=0, vectors=2, parameters=6)"
    assert repr(both.without_vectors()) == "ThoughtPatch(rank=2, weights=1, parameters=10)"
