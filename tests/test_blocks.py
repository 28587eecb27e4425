"""Finding blocks and sites: the right layers on every supported family, a refusal on everything else."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from lit_thought.blocks import SITES, check_sites, find_blocks, find_decoder, weight_of
from lit_thought.errors import ThoughtError, UnsupportedModelError

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_and_sizes(family: str) -> None:
    model = make_model(family)
    blocks = find_blocks(model)
    gpt2 = family == "gpt2"
    root, attention, norm, firsts, mlp, d_ff = (
        ("transformer.h", "attn.c_proj", "ln_2", ["mlp.c_fc"], "mlp.c_proj", 128)
        if gpt2
        else (
            "model.layers",
            "self_attn.o_proj",
            "post_attention_layernorm",
            ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj",
            48,
        )
    )
    assert [block.index for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert block.module is model.get_submodule(f"{root}.{block.index}")
        assert block.mlp_norm is block.module.get_submodule(norm)
        assert block.output_norm is None
        assert tuple(block.sites) == SITES == ("attn_out", "mlp_in", "mlp_out")
        for name, path, targets, d_in, width in (
            ("attn_out", attention, [attention], 32, 32),
            ("mlp_in", mlp, firsts, 32, d_ff),
            ("mlp_out", mlp, [mlp], d_ff, 32),
        ):
            site = block.sites[name]
            assert (site.name, site.path) == (name, f"{root}.{block.index}.{path}")
            assert site.layer is model.get_submodule(site.path)
            assert site.targets == {
                f"{root}.{block.index}.{target}": block.module.get_submodule(target) for target in targets
            }
            assert (site.d_in, site.d_out) == (d_in, 32)
            assert site.fan_in_fan_out == gpt2
            for layer in site.targets.values():
                assert layer.weight.shape == ((d_in, width) if gpt2 else (width, d_in))
                assert torch.equal(weight_of(layer), layer.weight.T if gpt2 else layer.weight)
    assert find_decoder(model) is model.get_submodule(root.split(".")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_added_at_a_site_moves_the_residual_stream_by_it(family: str) -> None:
    """What makes a layer a site, tested on the model itself: its output is added to the block's output."""
    model = make_model(family)
    hidden: list[torch.Tensor] = []
    for block in find_blocks(model):
        handle = block.module.register_forward_hook(lambda module, args, output: hidden.append(output))
        layer = block.sites["mlp_out"].layer
        shift = torch.linspace(-1, 1, 32, dtype=torch.float64)
        with torch.no_grad():
            model(torch.arange(5)[None])
            bump = layer.register_forward_hook(lambda module, args, output, shift=shift: output + shift)
            model(torch.arange(5)[None])
        before, after = (x[0] if isinstance(x, tuple) else x for x in hidden[-2:])
        torch.testing.assert_close(after, before + shift, rtol=1e-12, atol=1e-12)
        handle.remove()
        bump.remove()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_matrix_added_at_a_site_acts_on_its_input(family: str) -> None:
    """Δ moves an output projection's output by Δ a, and is to the first linear layers as if they got a + Δ a."""
    generator = torch.Generator().manual_seed(0)
    for name, site in find_blocks(make_model(family))[1].sites.items():
        A = torch.randn(2, site.d_in, generator=generator, dtype=torch.float64)
        B = torch.randn(site.d_out, 2, generator=generator, dtype=torch.float64)
        a = torch.randn(7, site.d_in, generator=generator, dtype=torch.float64)
        moved = a @ A.T @ B.T
        changes = site.factors(A, B)
        assert changes.keys() == site.targets.keys()
        for path, layer in site.targets.items():
            wanted = layer(a + moved) if name == "mlp_in" else layer(a) + moved
            mine, theirs = changes[path]
            torch.testing.assert_close(layer(a) + a @ mine.T @ theirs.T, wanted, rtol=1e-12, atol=1e-12)
            assert mine is A  # the first linear layers share it
        single = site.factors(A.float(), B.float())
        assert all(x.dtype == torch.float32 for pair in single.values() for x in pair)


def test_heads_narrower_than_the_model() -> None:
    """d_in of ``attn_out`` is heads × head size, not the model's width."""
    model = AutoModelForCausalLM.from_config(make_model("qwen3").config.__class__(**{**TINY, "head_dim": 4}))
    site = find_blocks(model)[0].sites["attn_out"]
    assert (site.d_in, site.d_out) == (8, 16)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**{k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "head_dim")}),
        Gemma2Config(**TINY),
        Gemma3TextConfig(**TINY),
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2),
        PhiConfig(**{k: v for k, v in TINY.items() if k != "head_dim"}),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_are_refused_by_name(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"not supported yet: architecture '{config.model_type}'.*llama"):
        find_blocks(model)


@torch.no_grad()
def test_post_norm_blocks_on_request() -> None:
    """Gemma 3 computes m + output_norm(mlp(mlp_norm(m))), which a fit does not know but the exact patches do."""
    model = Gemma3ForCausalLM(Gemma3TextConfig(**TINY)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    seen: dict[str, Tensor] = {}
    for block in find_blocks(model):
        module, norm = block.module, block.output_norm
        assert norm is module.post_feedforward_layernorm
        assert list(block.sites["mlp_in"].targets.values()) == [module.mlp.gate_proj, module.mlp.up_proj]
        assert block.sites["attn_out"].layer is module.self_attn.o_proj
        handles = [
            block.mlp_norm.register_forward_hook(
                lambda module, args, output: seen.update(m=args[0], normed=output)  # type: ignore[arg-type]
            ),
            block.sites["mlp_out"].layer.register_forward_hook(lambda module, args, output: seen.update(out=output)),
            module.mlp.register_forward_pre_hook(lambda module, args: seen.update(into=args[0])),
            module.register_forward_hook(lambda module, args, output: seen.update(block=output)),
        ]
        model(torch.arange(5)[None])
        assert seen["into"] is seen["normed"]
        torch.testing.assert_close(seen["block"], seen["m"] + norm(seen["out"]), rtol=1e-12, atol=1e-12)
        for handle in handles:
            handle.remove()


def test_cross_attention_is_refused() -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    with pytest.raises(UnsupportedModelError, match="not supported yet: architecture 'gpt2'"):
        find_blocks(GPT2LMHeadModel(config))


def test_models_wrapped_by_peft_are_refused_and_accepted_once_unloaded() -> None:
    wrapped = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"wrapped by PEFT.*unload"):
        find_blocks(wrapped)
    with pytest.raises(UnsupportedModelError, match=r"PEFT|lora"):
        find_blocks(wrapped.base_model.model)
    assert len(find_blocks(wrapped.unload())) == 3


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", "mlp.down_proj"), ("llama", "mlp.gate_proj"), ("llama", "self_attn.o_proj"), ("gpt2", "mlp.c_fc")],
)
def test_a_site_that_is_no_plain_linear_layer_is_refused_by_path(family: str, layer: str) -> None:
    class Quantised(nn.Linear):
        pass

    model = make_model(family)
    path = f"{'transformer.h' if family == 'gpt2' else 'model.layers'}.1.{layer}"
    model.set_submodule(path, Quantised(48, 32), strict=True)
    with pytest.raises(UnsupportedModelError, match=f"not supported yet: {path} is a Quantised; expected nn.Linear"):
        find_blocks(model)


def test_conv1d_is_the_layer_of_gpt2() -> None:
    for block in find_blocks(make_model("gpt2")):
        for site in block.sites.values():
            assert all(type(layer) is Conv1D for layer in (site.layer, *site.targets.values()))


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not supported yet: architecture 'Linear'"):
        find_blocks(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (("attn_out", "mlp_out"), ("attn_out", "mlp_out")),
        (["mlp_out", "attn_out"], ("attn_out", "mlp_out")),
        (["mlp_out", "mlp_in", "attn_out"], SITES),
        (["mlp_out"], ("mlp_out",)),
        ("mlp_in", ("mlp_in",)),
        ("attn_out", ("attn_out",)),
    ],
)
def test_sites_come_in_forward_order(sites, expected: tuple[str, ...]) -> None:
    assert check_sites(sites) == expected


@pytest.mark.parametrize("sites", [(), "", "mlp", ["attn_out", "mlp_up"], ["mlp_in", "mlp_in"], [1]])
def test_wrong_sites_are_refused(sites) -> None:
    with pytest.raises(ThoughtError, match=r"sites must name one or more of \['attn_out', 'mlp_in', 'mlp_out'\]"):
        check_sites(sites)
