"""Exact per-token patches, against weights that are written out in full and applied without our hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import make_family
from models import CORPUS, FAMILIES, make_model, make_tokenizer
from theorems import CASES, INSTRUCTION, TEXT, hooks_on, largest, make_any, record, tokens_of, unchanged
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.model.blocks import find_blocks
from lit_thought.model.layers import weight_of
from lit_thought.theory import TokenPatches, apply_token_patches, token_patches


class WrittenOut(nn.Module):
    """An MLP that, for each token, has that token's patched weights and bias written into a copy of itself."""

    def __init__(self, mlp: nn.Module, paths: list[str], down: str | None, patch: TokenPatches) -> None:
        super().__init__()
        self.mlp, self.paths, self.down, self.patch = mlp, paths, down, patch

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i in range(x.shape[1]):
            mlp = copy.deepcopy(self.mlp)
            for path in self.paths:
                layer = mlp.get_submodule(path)
                u, v = self.patch.rank_one(weight_of(layer), i)
                weight_of(layer).add_(torch.outer(u, v))
            if self.down is not None:
                layer = mlp.get_submodule(self.down)
                bias = torch.zeros_like(self.patch.delta[i]) if layer.bias is None else layer.bias
                layer.bias = nn.Parameter(bias + self.patch.delta[i])
            outputs.append(mlp(x[:, i : i + 1]))
        return torch.cat(outputs, dim=1)


class WrittenOutNorm(nn.Module):
    """An output norm with each token's own scale, or with each token's vector after it."""

    def __init__(self, norm: nn.Module, patch: TokenPatches) -> None:
        super().__init__()
        self.norm, self.patch = norm, patch

    def forward(self, x: Tensor) -> Tensor:
        if self.patch.norm_scale is None:
            return self.norm(x) + self.patch.delta
        outputs = []
        for i in range(x.shape[1]):
            norm = copy.deepcopy(self.norm)
            norm.weight.add_(self.patch.norm_scale[i])
            outputs.append(norm(x[:, i : i + 1]))
        return torch.cat(outputs, dim=1)


def written_out(model: PreTrainedModel, patches: dict[int, TokenPatches]) -> PreTrainedModel:
    """A copy of the model in which every patched block's MLP is a :class:`WrittenOut`."""
    written = copy.deepcopy(model).requires_grad_(False)
    for block in find_blocks(written):
        if block.index not in patches:
            continue
        patch, gated = patches[block.index], hasattr(block.module.mlp, "gate_proj")
        firsts, down = (["gate_proj", "up_proj"], "down_proj") if gated else (["c_fc"], "c_proj")
        if block.output_norm is not None:
            block.module.post_feedforward_layernorm = WrittenOutNorm(block.output_norm, patch)
        block.module.mlp = WrittenOut(block.module.mlp, firsts, down if block.output_norm is None else None, patch)
    return written


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms in float64 throughout: in float32, a scale written into their weight would be rounded."""
    monkeypatch.setattr(Gemma3RMSNorm, "forward", lambda self, x: self._norm(x) * (1 + self.weight))


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("bos", [False, True], ids=["sink", "bos"])
@pytest.mark.parametrize(("family", "output"), CASES)
def test_weights_written_out_token_by_token_put_out_the_instructed_run(family: str, output: str, bos: bool) -> None:
    model, tokenizer = make_any(family), make_tokenizer(bos=bos)
    plain, instructed, positions = tokens_of(tokenizer)
    wanted = record(model, instructed)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT, output=output)
    got, bare = record(written_out(model, patches), plain, model), record(model, plain)
    assert len(got["o"]) == len(patches) == len(wanted["o"])
    for block, o in enumerate(wanted["o"]):
        assert largest(got["o"][block], o[positions]) <= 1e-9
        assert largest(bare["o"][block], o[positions]) > 0.1
    assert largest(got["logits"], wanted["logits"][positions]) <= 1e-9
    assert largest(bare["logits"], wanted["logits"][positions]) > 0.1


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize(("family", "output"), CASES)
def test_one_block_alone_written_out(family: str, output: str) -> None:
    """Single-block theorem: the common tokens enter as in the instructed run, attention sees no other."""
    model, tokenizer = make_any(family), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    wanted = record(model, instructed)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT, output=output, order="teacher-forced")
    for index, patch in patches.items():
        for chosen, low, high in (({index: patch}, 0, 1e-9), ({}, 0.01, 10)):
            written = written_out(model, chosen)
            block = find_blocks(model)[index]
            inner = dict(written.named_modules())[
                next(name for name, module in model.named_modules() if module is block.module)
            ]
            entrance = wanted["entrance"][index][positions][None]
            inner.register_forward_pre_hook(lambda _, given, h=entrance: (h, *given[1:]))
            outputs: list[Any] = []
            inner.register_forward_hook(lambda _, given, out, into=outputs: into.append(out))
            with torch.no_grad():
                written(plain)
            o = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            assert low <= largest(o[0], wanted["o"][index][positions]) <= high


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_the_update_is_of_rank_one_and_gives_each_first_linear_the_instructed_input(family: str) -> None:
    model, tokenizer = make_any(family), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    bare, wanted = record(model, plain), record(model, instructed)
    patch = token_patches(model, tokenizer, INSTRUCTION, TEXT)[0]  # block 0 sees the plain run as it is
    a, target = bare["a"][0], wanted["a"][0][positions]
    assert patch.a.equal(a)
    assert patch.delta_a.allclose(target - a, atol=1e-12)
    assert patch.delta.allclose(wanted["m"][0][positions] - bare["m"][0], atol=1e-12)
    for layer in find_blocks(model)[0].firsts.values():
        weight = weight_of(layer)
        for i in (0, 1, 5):  # a sliding window of 8 lets these see the chunk
            change = torch.outer(*patch.rank_one(weight, i))
            assert change.shape == weight.shape
            assert torch.linalg.matrix_rank(change) == 1
            assert ((weight + change) @ a[i]).allclose(weight @ target[i], atol=1e-10)
            assert not (weight @ a[i]).allclose(weight @ target[i], atol=1e-2)
            orthogonal = torch.linalg.qr(a[i][:, None], mode="complete")[0][:, 1:]
            assert (change @ orthogonal).abs().max() < 1e-12  # other inputs pass as before


@pytest.mark.parametrize("bos", [False, True], ids=["sink", "bos"])
def test_every_plain_token_has_its_counterpart(bos: bool) -> None:
    model, tokenizer = make_any("llama"), make_tokenizer(bos=bos)
    plain, instructed, positions = tokens_of(tokenizer)
    assert positions[0] == (0 if bos else len(tokenizer(INSTRUCTION)["input_ids"]))
    for patch in token_patches(model, tokenizer, INSTRUCTION, TEXT).values():
        assert patch.token_ids.tolist() == plain[0].tolist()
        assert patch.target_positions.tolist() == positions
        assert instructed[0][patch.target_positions].equal(patch.token_ids)
        assert len(patch.a) == len(patch.delta_a) == len(patch.delta) == len(positions)


def test_a_text_that_merges_with_the_instruction_keeps_its_tokens() -> None:
    model, tokenizer = make_any("llama"), make_tokenizer()
    joined = tokenizer("Talk like a pi" + "rate. Talk")["input_ids"]
    patch = token_patches(model, tokenizer, "Talk like a pi", "rate. Talk")[0]
    assert patch.token_ids.tolist() == tokenizer("rate. Talk")["input_ids"] != joined[-len(patch.a) :]
    assert not patch.delta.eq(0).all(-1).any()


def test_tokens_takes_the_beginning_of_the_text() -> None:
    model = make_any("llama")
    for bos in (False, True):
        tokenizer = make_tokenizer(bos=bos)
        whole = token_patches(model, tokenizer, INSTRUCTION, TEXT)
        part = token_patches(model, tokenizer, INSTRUCTION, TEXT, tokens=5)
        assert len(part[0].a) == 5 + bos
        for block, patch in part.items():
            assert patch.delta.allclose(whole[block].delta[: 5 + bos], atol=1e-12)


@pytest.mark.parametrize(("family", "output"), CASES)
def test_hooks_do_what_written_out_weights_do_and_leave_nothing(family: str, output: str) -> None:
    model, tokenizer = make_any(family), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    with torch.no_grad():
        wanted = model(instructed).logits[0, positions]
    model.train()
    find_blocks(model)[0].module.eval()  # mixed modes come back as they were
    with unchanged(model):
        patches = token_patches(model, tokenizer, INSTRUCTION, TEXT, output=output)
    model.eval()
    with unchanged(model):
        with torch.no_grad(), apply_token_patches(model, patches) as same:
            assert same is model
            got = model(plain).logits[0]
        assert largest(got, wanted) <= 1e-9
        with torch.no_grad():
            assert largest(model(plain).logits[0], wanted) > 0.1


def test_the_layers_real_input_is_used() -> None:
    """An input other than a gets the rank-1 update's response to that input, as a changed weight would give."""
    model, tokenizer = make_any("llama"), make_tokenizer()
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT)
    layer = find_blocks(model)[1].sites["mlp_in"].targets["model.layers.1.mlp.gate_proj"]
    x = torch.randn(1, len(patches[1].a), 32, dtype=torch.float64)
    with torch.no_grad(), apply_token_patches(model, patches):
        got = layer(x)[0]
    for i in range(len(got)):
        changed = weight_of(layer) + torch.outer(*patches[1].rank_one(weight_of(layer), i))
        assert got[i].allclose(changed @ x[0, i], atol=1e-10)


def test_an_exception_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_any("gemma3"), make_tokenizer()
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT)
    plain = patches[0].token_ids[None]
    model.train()
    with unchanged(model):
        with pytest.raises(ThoughtError, match=r"one sequence of \d+ tokens"), apply_token_patches(model, patches):
            model(plain[:, :-1])
        with pytest.raises(ThoughtError, match="one sequence"), apply_token_patches(model, patches):
            model(plain.expand(2, -1))
        with pytest.raises(KeyError, match="mine"), apply_token_patches(model, patches):
            raise KeyError("mine")

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(find_blocks(model)[2].mlp_norm, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            token_patches(model, tokenizer, INSTRUCTION, TEXT)
        assert hooks_on(model) == 0
        assert model.training


def test_some_blocks() -> None:
    model, tokenizer = make_any("llama"), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    wanted = record(model, instructed)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT, blocks=[2, 0])
    assert list(patches) == [0, 2]
    with apply_token_patches(model, patches):
        got = record(model, plain)
    errors = [largest(o, w[positions]) for o, w in zip(got["o"], wanted["o"], strict=True)]
    assert errors[0] <= 1e-9
    assert errors[1] > 0.05
    assert errors[2] <= 1e-9  # m* − m takes the whole difference, also that of the block before


def test_an_input_of_zero_is_skipped_and_said_so() -> None:
    zeros, ones = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    patch = TokenPatches(0, torch.arange(2), torch.arange(2), zeros, ones, zeros)
    assert patch.keys.eq(0).all()
    assert patch.rank_one(torch.ones(4, 3), 0)[1].eq(0).all()
    assert patch.unreachable.tolist() == [True, False]
    # end to end: norm(m) = 0 in both runs, so that only δ is left to do
    model, tokenizer = make_any("llama"), make_tokenizer()
    find_blocks(model)[1].mlp_norm.weight.data.zero_()
    plain, instructed, positions = tokens_of(tokenizer)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT)
    assert patches[1].a.eq(0).all()
    assert not any(patch.unreachable.any() for patch in patches.values())
    with torch.no_grad(), apply_token_patches(model, patches):
        assert largest(model(plain).logits[0], model_logits(make_zeroed(), instructed)[positions]) <= 1e-9


def make_zeroed() -> PreTrainedModel:
    model = make_any("llama")
    find_blocks(model)[1].mlp_norm.weight.data.zero_()
    return model


@torch.no_grad()
def model_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits[0]


def test_a_channel_of_zero_is_out_of_reach_of_the_norms_scale() -> None:
    model, tokenizer = make_any("gemma3"), make_tokenizer()
    weight_of(find_blocks(model)[1].sites["mlp_out"].layer).data[5] = 0
    plain, instructed, positions = tokens_of(tokenizer)
    wanted = record(model, instructed)["o"][1][positions]
    for output, missed in (("norm_scale", True), ("vector", False)):
        patches = token_patches(model, tokenizer, INSTRUCTION, TEXT, output=output)
        assert patches[1].unreachable.all() == missed
        assert not patches[0].unreachable.any()
        with apply_token_patches(model, patches):
            got = record(model, plain)["o"][1]
        assert got.isfinite().all()
        others = [channel for channel in range(32) if channel != 5]
        assert largest(got[:, others], wanted[:, others]) <= 1e-9
        assert (largest(got, wanted) > 1e-3) == missed


def test_narrow_dtypes_are_computed_in_float32() -> None:
    model, tokenizer = make_any("llama").to(torch.bfloat16), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT)
    assert patches[0].a.dtype == patches[0].delta.dtype == torch.float32
    with torch.no_grad(), apply_token_patches(model, patches):
        got = model(plain).logits[0]
    assert got.dtype == torch.bfloat16
    assert largest(got.float(), model_logits(model, instructed)[positions].float()) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": " \n"}, "instruction: .*not blank"),
        ({"instruction": None}, "instruction: .*got None"),
        ({"text": ""}, "text: .*not blank"),
        ({"text": 3}, "text: .*got 3"),
        ({"text": "Q"}, "text: expected at least 2 tokens, got 1"),
        ({"text": CORPUS[0] * 9}, r"text: expected instruction and text to have at most 256 tokens .* \d+ of them"),
        ({"tokens": 1}, "tokens=1"),
        ({"tokens": 2.0}, "tokens=2.0"),
        ({"blocks": []}, r"blocks must be indices of blocks, from 0 on; got \[\]"),
        ({"blocks": [3]}, "the model has blocks 0 to 2; got 3"),
        ({"blocks": [1, 1]}, "each block once"),
        ({"blocks": 1}, "blocks must be indices .*got 1"),
        ({"blocks": [True]}, r"blocks must be indices .*got \[True\]"),
        ({"output": "bias"}, "output='bias'"),
        ({"output": "norm_scale"}, "output='norm_scale' .* have none. Pass output='vector'"),
        ({"order": "parallel"}, "order='parallel'"),
    ],
)
def test_bad_arguments_are_named_before_any_run(change: dict[str, Any], message: str) -> None:
    model = make_any("llama")
    for block in find_blocks(model):
        block.module.forward = None  # any run would fail
    arguments = {"instruction": INSTRUCTION, "text": TEXT, **change}
    with pytest.raises(ThoughtError, match=message):
        token_patches(model, make_tokenizer(), **arguments)


def test_one_token_is_one_also_after_a_bos() -> None:
    with pytest.raises(ThoughtError, match="at least 2 tokens, got 1"):
        token_patches(make_any("llama"), make_tokenizer(bos=True), INSTRUCTION, "Q")


def test_other_models_are_refused() -> None:
    patches = token_patches(make_any("gemma3"), make_tokenizer(), INSTRUCTION, TEXT)
    model = make_any("llama")
    with (
        pytest.raises(ThoughtError, match=r"3 blocks, width 32.* block 3 of width 32"),
        apply_token_patches(model, patches),
    ):
        pass
    assert hooks_on(model) == 0
    with pytest.raises(ThoughtError, match=r"weight: expected \(d_ff, 32\), got \(32, 48\)"):
        patches[0].rank_one(torch.ones(32, 48), 0)
    with pytest.raises(ThoughtError, match="index=999"):
        patches[0].rank_one(torch.ones(48, 32), 999)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("phi", "attention and MLP are parallel"),
        ("mixtral", "there is no single MLP"),
        ("olmo2", "no norm stands between the residual stream and the MLP"),
        ("granite", "the MLP's output is scaled"),
        ("qwen2_moe", "there is no single MLP|not only linear layers read"),
    ],
)
def test_blocks_of_another_form_are_refused(family: str, why: str) -> None:
    model = make_family(family, torch.float64)
    with pytest.raises(UnsupportedModelError, match=f"^not supported: exact patches of block 0: ({why})"):
        token_patches(model, make_tokenizer(), INSTRUCTION, TEXT)


def test_a_model_without_dense_mlps_is_refused_by_name() -> None:
    patches = {0: token_patches(make_model("llama"), make_tokenizer(), "say\n", "hot and cold")[0]}
    mixture = make_family("mixtral")
    refused = pytest.raises(UnsupportedModelError, match="not supported: exact patches of block 0")
    with refused, apply_token_patches(mixture, patches):
        pytest.fail("it went on")
