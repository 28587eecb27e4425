"""Finding blocks and sites: the right layers on every supported family, a refusal on everything else."""

from __future__ import annotations

import pytest
import torch
from families import make_family
from models import FAMILIES, make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.model.blocks import find_blocks
from lit_thought.model.calls import find_decoder
from lit_thought.model.layers import weight_of
from lit_thought.settings import SITES, check_sites


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
        assert block.sites.keys() == {"attn_out", "mlp_in", "mlp_out"}
        assert block.stages(SITES[::-1]) == SITES == ("attn_out", "mlp_in", "mlp_out")
        assert (block.missing, block.parallel, block.experts) == ({}, False, None)
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
            assert (site.d_in, site.d_out, site.gain) == (d_in, 32, None)
            assert site.plain
            assert [(part.path, part.layer) for part in site.projections] == [(site.path, site.layer)]
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
            assert torch.equal(mine, A)  # the first linear layers share it
        single = site.factors(A.float(), B.float())
        assert all(x.dtype == torch.float32 for pair in single.values() for x in pair)


def test_heads_narrower_than_the_model() -> None:
    """d_in of ``attn_out`` is heads × head size, not the model's width."""
    config = make_model("qwen3").config
    config.head_dim = 4
    site = find_blocks(AutoModelForCausalLM.from_config(config))[0].sites["attn_out"]
    assert (site.d_in, site.d_out) == (16, 32)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@torch.no_grad()
def test_blocks_with_a_norm_after_the_mlp(family: str) -> None:
    """Gemma computes m + output_norm(mlp(mlp_norm(m))): no mlp_in, but what the exact patches need is there."""
    model = make_family(family, torch.float64)
    seen: dict[str, Tensor] = {}
    for block in find_blocks(model):
        module, norm = block.module, block.output_norm
        assert norm is module.post_feedforward_layernorm
        assert list(block.firsts.values()) == [module.mlp.gate_proj, module.mlp.up_proj]
        assert block.sites["attn_out"].layer is module.self_attn.o_proj
        assert block.stages(SITES) == ("attn_out", "mlp_out")
        assert block.missing == {"mlp_in": "a norm follows the MLP, so the vector part has no bias to go to"}
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
    with pytest.raises(UnsupportedModelError, match=r"not supported: architecture 'gpt2' .* has cross-attention"):
        find_blocks(GPT2LMHeadModel(config))


def test_models_wrapped_by_peft_are_refused_and_accepted_once_unloaded() -> None:
    wrapped = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"wrapped by PEFT.*unload"):
        find_blocks(wrapped)
    with pytest.raises(UnsupportedModelError, match=r"PEFT|lora"):
        find_blocks(wrapped.base_model.model)
    assert len(find_blocks(wrapped.unload())) == 3


def test_conv1d_is_the_layer_of_gpt2() -> None:
    for block in find_blocks(make_model("gpt2")):
        for site in block.sites.values():
            assert all(type(layer) is Conv1D for layer in (site.layer, *site.targets.values()))


def test_something_else_than_a_model_is_refused() -> None:
    for thing in (nn.Linear(2, 2), "llama", None):
        with pytest.raises(UnsupportedModelError, match=f"^model must be .* causal LM; got {type(thing).__name__}"):
            find_blocks(thing)  # type: ignore[arg-type]


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
