"""What layers of a block do, found by running it: against tables written by hand, and against the models themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import make_family
from fits import Untouched
from quantised import QuantLinear, quantise_
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_thought.errors import SingularSystemError, UnsupportedModelError
from lit_thought.model.blocks import JOINT, Block, Site, find_blocks, require_site
from lit_thought.model.discovery import channel_gain
from lit_thought.model.layers import weight_of
from lit_thought.prompts.batches import pad
from lit_thought.runs.streams import Reading, Stream
from lit_thought.settings import SITES

IDS = [7, 300, 41, 12, 9]


def roles(attn_out: str, mlp_out: str = "", mlp_in: str = "", firsts: str = "", experts: str = "") -> dict[str, str]:
    """What :func:`describe` says of a block; a parallel one writes both outputs at its end."""
    return {"attn_out": attn_out, "mlp_out": mlp_out, "mlp_in": mlp_in, "firsts": firsts, "experts": experts}


NORM = "post_attention_layernorm"
GATED = "mlp.gate_proj mlp.up_proj"
LLAMA = roles(f"self_attn.o_proj (64) @ {NORM}", "mlp.down_proj (48)", f"{NORM} > {GATED}")
EXPERTS = roles(f"self_attn.o_proj (64) @ {NORM}", experts="mlp.experts")
GEMMA = roles(
    "self_attn.o_proj (64) norm post_attention_layernorm @ pre_feedforward_layernorm",
    "mlp.down_proj (48) norm post_feedforward_layernorm",
    firsts=f"pre_feedforward_layernorm > {GATED}",
)


def gemma4(heads: int, d_ff: int) -> dict[str, str]:
    mlp = f"mlp.down_proj ({d_ff}) norm post_feedforward_layernorm @ per_layer_input_gate"
    return {**GEMMA, "attn_out": GEMMA["attn_out"].replace("64", str(heads)), "mlp_out": mlp}


EXPECTED: dict[str, list[dict[str, str]]] = {
    "llama": [LLAMA] * 3,
    "doge": [LLAMA] * 3,
    "gpt2": [roles("attn.c_proj (32) @ ln_2", "mlp.c_proj (48)", "ln_2 > mlp.c_fc")] * 3,
    "gpt_neo": [roles("attn.attention.out_proj (32) @ ln_2", "mlp.c_proj (48)", "ln_2 > mlp.c_fc")] * 4,
    "bloom": [
        roles(f"self_attention.dense (32) @ {NORM}", "mlp.dense_4h_to_h (128)", f"{NORM} > mlp.dense_h_to_4h"),
    ]
    * 3,
    "opt": [roles("self_attn.out_proj (32) @ final_layer_norm", "fc2 (48)", "final_layer_norm > fc1")] * 3,
    "granite": [roles(f"self_attn.o_proj (64) × 0.4 @ {NORM}", "mlp.down_proj (48) × 0.4", firsts=f"{NORM} > {GATED}")]
    * 3,
    "gemma2": [GEMMA] * 4,
    "gemma3_text": [GEMMA] * 4,
    "gemma4_text": [gemma4(64, 48), gemma4(96, 48), gemma4(64, 96), gemma4(96, 96)],
    "olmo2": [
        roles(f"self_attn.o_proj (64) norm {NORM} @ mlp", "mlp.down_proj (48) norm post_feedforward_layernorm"),
    ]
    * 3,
    "glm4": [
        roles(
            f"self_attn.o_proj (64) norm post_self_attn_layernorm @ {NORM}",
            "mlp.down_proj (48) norm post_mlp_layernorm",
            firsts=f"{NORM} > mlp.gate_up_proj",
        )
    ]
    * 3,
    "hyperclovax": [
        roles(
            f"self_attn.o_proj (64) × 0.4 norm post_norm1 @ {NORM}",
            "mlp.down_proj (48) × 0.4 norm post_norm2",
            firsts=f"{NORM} > {GATED}",
        )
    ]
    * 3,
    "phi": [roles("self_attn.dense (32)", "mlp.fc2 (48)")] * 3,
    "gptj": [roles("attn.out_proj (32)", "mlp.fc_out (48)")] * 3,
    "falcon": [roles("self_attention.dense (32)", "mlp.dense_4h_to_h (48)")] * 3,
    "cohere": [roles("self_attn.o_proj (32)", "mlp.down_proj (48)")] * 3,
    "cohere2_moe": [
        roles("self_attn.o_proj (64)", "mlp.down_proj (48)"),
        *[roles("self_attn.o_proj (64)", "mlp.shared_experts.down_proj (48) × 0.5", experts="mlp.experts")] * 3,
    ],
    "mixtral": [EXPERTS] * 3,
    "gpt_oss": [EXPERTS] * 4,
    "qwen3_moe": [EXPERTS, LLAMA, EXPERTS, EXPERTS],
    "dbrx": [roles("norm_attn_norm.attn.out_proj (32) @ norm_attn_norm.norm_2", experts="ffn.experts")] * 3,
    "qwen2_moe": [
        {**EXPERTS, "mlp_out": "mlp.shared_expert.down_proj (28) gate mlp.shared_expert_gate"},
        LLAMA,
        *[{**EXPERTS, "mlp_out": "mlp.shared_expert.down_proj (28) gate mlp.shared_expert_gate"}] * 2,
    ],
    "deepseek_v3": [
        *[roles(f"self_attn.o_proj (40) @ {NORM}", "mlp.down_proj (48)", f"{NORM} > {GATED}")] * 2,
        *[roles(f"self_attn.o_proj (40) @ {NORM}", "mlp.shared_experts.down_proj (20)", experts="mlp.experts")] * 2,
    ],
    "llama4_text": [
        roles(
            f"self_attn.o_proj (64) @ {NORM}",
            "feed_forward.down_proj (40)",
            f"{NORM} > feed_forward.gate_proj feed_forward.up_proj",
        ),
        roles(
            f"self_attn.o_proj (64) @ {NORM}",
            "feed_forward.shared_expert.down_proj (48)",
            experts="feed_forward.experts",
        ),
    ]
    * 2,
}
PARALLEL = ("phi", "gptj", "falcon", "cohere", "cohere2_moe")
NORMED = ("gemma2", "gemma3_text", "gemma4_text", "olmo2", "glm4", "hyperclovax")


def describe(block: Block) -> dict[str, str]:
    """Paths inside the block, as in ``EXPECTED``."""
    paths = {module: path for path, module in block.module.named_modules()}

    def writer(site: Site | None) -> str:
        if site is None:
            return ""
        (part,) = site.projections
        assert part.path.endswith(f".{block.index}.{paths[part.layer]}")
        assert (site.path, site.layer, site.targets) == (part.path, part.layer, {part.path: part.layer})
        factor = f" × {part.multiplier:.2g}" if part.multiplier != 1 else ""
        through = f" norm {paths[part.norm]}" if part.norm is not None else ""
        through += f" gate {paths[part.gate]}" if part.gate is not None else ""
        at = f" @ {paths[site.point]}" if site.point is not None else ""
        return f"{paths[part.layer]} ({site.d_in})" + factor + through + at

    found = roles(writer(block.sites.get("attn_out")), writer(block.sites.get("mlp_out")))
    firsts = " ".join(paths[layer] for layer in block.firsts.values())
    if block.firsts:
        found["mlp_in" if "mlp_in" in block.sites else "firsts"] = f"{paths[block.mlp_norm]} > {firsts}"
    if block.experts is not None:
        found["experts"] = block.experts.partition(f".{block.index}.")[2]
        assert block.module.get_submodule(found["experts"])
    return found


@cache
def family_model(name: str) -> PreTrainedModel:
    """In float64; tests that change it put it back."""
    return make_family(name, torch.float64)


# --- roles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPECTED)
def test_roles(family: str) -> None:
    blocks = find_blocks(family_model(family))
    assert [describe(block) for block in blocks] == EXPECTED[family]
    for block, expected in zip(blocks, EXPECTED[family], strict=True):
        assert block.parallel == (family in PARALLEL)
        assert {"attn_out", "mlp_in", "mlp_out"} - block.sites.keys() == block.missing.keys()
        assert (JOINT in block.sites) == block.parallel
        assert (block.output_norm is not None) == (family in NORMED)
        assert (block.mlp_norm is not None) == bool(block.firsts)
        for name, site in block.sites.items():
            assert (site.name, site.d_out) == (name, 32)
            assert (site.gain is not None) == (family in NORMED)
            gated = name == "mlp_out" and "gate" in expected["mlp_out"].split()
            assert site.linear == (site.gain is None and not gated)
            assert site.plain == (site.linear and "×" not in expected.get(name, expected["mlp_out"]))
        if JOINT in block.sites:
            joint = block.sites[JOINT]
            both = [block.sites["attn_out"], block.sites["mlp_out"]]
            assert joint.projections == tuple(site.projections[0] for site in both)
            assert joint.d_in == sum(site.d_in for site in both)
            assert joint.targets == {site.path: site.layer for site in both}
            assert (joint.path, joint.label) == (both[1].path, f"{both[0].path}+{both[1].path}")


HALF = ("llama", "gpt2", "gemma2", "gemma4_text", "olmo2", "exaone4", "hyperclovax", "cohere2_moe", "qwen2_moe", "opt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", HALF)
def test_roles_do_not_depend_on_the_dtype(family: str, dtype: torch.dtype) -> None:
    model = make_family(family, dtype)
    model.set_experts_implementation("eager")  # the default one wants sizes that are multiples of 8 in 16 bits
    wide = find_blocks(family_model(family))
    for block, expected in zip(find_blocks(model), wide, strict=True):
        assert describe(block) == describe(expected)
        assert block.missing == expected.missing
        for name, site in block.sites.items():
            wanted = expected.sites[name].gain
            assert (site.gain is None) == (wanted is None)
            if site.gain is not None:
                assert site.gain.dtype == torch.float32
                torch.testing.assert_close(site.gain, wanted.float(), rtol=1e-2, atol=1e-2)


# --- what a site's reading says of the residual stream ---------------------------------------------------------


@dataclass
class Seen:
    """One run of a model at one site: input and output of each projection, the gates, and the residual stream."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gates: dict[str, Tensor]
    residual: Tensor


def rows(value: Any) -> Tensor:
    value = value[0] if isinstance(value, tuple) else value
    return value.reshape(len(IDS), -1)


@torch.no_grad()
def observe(model: PreTrainedModel, block: Block, site: Site, *hooks: tuple[nn.Module, Any]) -> Seen:
    """A full forward with hooks of our own, and ``hooks`` besides."""
    seen = Seen({}, {}, {}, torch.empty(0))

    def projection(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen.inputs[path], seen.outputs[path] = rows(args[0]), rows(output)

        return hook

    def residual(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.residual = rows(args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        for part in site.projections:
            stack.callback(part.layer.register_forward_hook(projection(part.path)).remove)
            if part.gate is not None:
                note = lambda module, args, output, path=part.path: seen.gates.update({path: rows(output)})  # noqa: E731
                stack.callback(part.gate.register_forward_hook(note).remove)
        if site.point is not None:
            stack.callback(site.point.register_forward_pre_hook(residual, with_kwargs=True).remove)
        else:
            note = lambda module, args, output: setattr(seen, "residual", rows(output))  # noqa: E731
            stack.callback(block.module.register_forward_hook(note).remove)
        model(torch.tensor([IDS]), use_cache=False)
    return seen


@torch.no_grad()
def read_all(model: PreTrainedModel) -> list[dict[str, Reading]]:
    """What the library reads at every site of every block."""
    blocks = find_blocks(model)
    stream, found = Stream(model, blocks, pad([IDS], 0, "right")), []
    for block in blocks:
        output, readings = stream.run(block, tuple(block.sites))
        assert readings.keys() == block.sites.keys()
        assert output is not None
        stream.hidden = output
        found.append(readings)
    return found


def near(found: Tensor, wanted: Tensor, tol: float) -> bool:
    assert found.shape == wanted.shape
    return float((found - wanted).norm()) <= tol * float(wanted.norm())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def with_weights(model: PreTrainedModel, block: Block, site: Site, A: Tensor, B: Tensor, at: Site) -> Tensor:
    """The residual stream after ``at`` with a site's matrix B A in the weights, which are put back bit for bit."""
    changes = site.factors(A, B)
    before = {path: layer.weight.clone() for path, layer in site.targets.items()}
    try:
        for path, (A, B) in changes.items():
            weight_of(site.targets[path]).add_(B @ A)
        return observe(model, block, at).residual
    finally:
        for path, weight in before.items():
            site.targets[path].weight.copy_(weight)


@pytest.mark.parametrize("family", EXPECTED)
def test_a_change_of_the_weights_moves_the_residual_stream_by_gain_times_change_times_input(family: str) -> None:
    """Where nothing depends on the size of y, exactly. Behind a norm to first order, for changes that leave |y| alone:
    the columns of B are orthogonal to every token's y. What is read is the layer's input times each token's factor γ:
    the multiplier, times the gate's sigmoid or 1 / rms(y); with it, a vector moves the stream by γ v."""
    model = family_model(family)
    readings = read_all(model)
    for block in find_blocks(model):
        for name in block.sites.keys() - {"mlp_in"}:
            site, reading = block.sites[name], readings[block.index][name]
            seen = observe(model, block, site)
            assert near(rows(reading.residual), seen.residual, 1e-12)
            a, gain = rows(reading.input), 1 if site.gain is None else site.gain
            A, B = random(2, site.d_in), random(32, 2, seed=1)
            if site.gain is not None:
                y = seen.outputs[site.path]
                B -= torch.linalg.pinv(y) @ y @ B
                B *= 1e-3 * y.norm(dim=1).min() / (seen.inputs[site.path] @ A.T @ B.T).norm(dim=1).max()
            moved = with_weights(model, block, site, A, B, site) - seen.residual
            assert moved.norm() > 0
            assert near(moved, gain * (a @ A.T @ B.T), 1e-10 if site.gain is None else 5e-3)
            factors = []
            for part in site.projections:
                factor = torch.full((len(IDS), 1), part.multiplier, dtype=torch.float64)
                if part.gate is not None:
                    factor = factor * torch.sigmoid(seen.gates[part.path])
                if part.norm is not None:
                    factor = factor / seen.outputs[part.path].square().mean(1, keepdim=True).sqrt()
                factors.append(factor)
            wanted = [seen.inputs[part.path] * factor for part, factor in zip(site.projections, factors, strict=True)]
            assert near(a, torch.cat(wanted, dim=1), 1e-4 if site.gain is not None else 1e-7)
            found = torch.ones(1) if reading.scale is None else reading.scale
            found = found.expand(1, len(IDS), 1)[0].double()
            assert near(found, factors[-1], 1e-4 if site.gain is not None else 1e-7)
            assert (reading.scale is None) == site.projections[-1].linear * (site.projections[-1].multiplier == 1)
            if site.gain is None:
                v = torch.linspace(-1, 1, 32, dtype=torch.float64)
                bumped = observe(model, block, site, (site.layer, lambda module, args, output, v=v: output + v))
                assert near(bumped.residual - seen.residual, found * v, 1e-7)
            else:  # all of what the norm puts out
                y = seen.outputs[site.path]
                norm = site.projections[0].norm
                with torch.no_grad():
                    wanted_y = site.projections[0].multiplier * norm(y)
                assert near(site.gain * found * y, wanted_y, 1e-6)


@pytest.mark.parametrize("family", [name for name, blocks in EXPECTED.items() if any(b["mlp_in"] for b in blocks)])
def test_a_change_at_mlp_in_is_a_change_of_what_the_norm_puts_out(family: str) -> None:
    model = family_model(family)
    readings = read_all(model)
    for block in find_blocks(model):
        if "mlp_in" not in block.sites:
            continue
        site, reading, after = block.sites["mlp_in"], readings[block.index]["mlp_in"], block.sites["mlp_out"]
        A, B = random(2, 32), 0.1 * random(32, 2, seed=1)

        def move(module: nn.Module, args: tuple, output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + output @ A.T @ B.T

        wanted = observe(model, block, after, (block.mlp_norm, move)).residual
        found = with_weights(model, block, site, A, B, after)
        assert near(found, wanted, 1e-12)
        assert not near(found, observe(model, block, after).residual, 1e-3)
        assert reading.scale is None
        (m,) = (rows(x) for x in [reading.residual])
        with torch.no_grad():
            assert torch.equal(block.mlp_norm(m), rows(reading.input))
        attention = observe(model, block, block.sites["attn_out"]).residual
        assert near(m, attention, 1e-12)


# --- gains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "path", "offset"),
    [
        ("llama", "model.norm", 0),
        ("gemma", "model.norm", 1),
        ("gemma2", "model.layers.1.post_feedforward_layernorm", 1),
        ("gemma3_text", "model.layers.1.post_attention_layernorm", 1),
        ("gemma4_text", "model.layers.1.post_attention_layernorm", 0),
        ("olmo2", "model.layers.1.post_attention_layernorm", 0),
        ("glm4", "model.layers.1.post_mlp_layernorm", 0),
        ("hyperclovax", "model.layers.1.post_norm2", 0),
        ("gpt_oss", "model.norm", 0),
        ("nanochat", "model.norm", None),
        ("gpt2", "transformer.ln_f", "none"),
        ("cohere", "model.norm", "none"),
        ("nemotron", "model.norm", "none"),
        ("olmo", "model.norm", "none"),
    ],
)
@torch.no_grad()
def test_gain_of_every_kind_of_norm(family: str, path: str, offset: Any, dtype: torch.dtype) -> None:
    """The scale, 1 + the scale, or ones; none for norms that take off the mean."""
    norm = make_family(family).get_submodule(path).to(dtype)
    weight = getattr(norm, "weight", None)
    if offset in (0, 1):
        weight[:3] = torch.tensor([-2.0, -float(offset), 40.0]).to(dtype)  # one below zero, one zero, one large
    gain = channel_gain(norm, random(6, 32).to(dtype))
    if offset == "none":
        assert gain is None
        return
    assert gain.dtype == (torch.float64 if dtype == torch.float64 and family != "gemma2" else gain.dtype)
    assert gain.dtype in (torch.float32, torch.float64)
    wanted = torch.ones(32) if offset is None else offset + weight.float()
    torch.testing.assert_close(gain.float(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.no_grad()
def test_gain_of_torchs_own_norms() -> None:
    like, weight = random(4, 8), random(8, seed=1)
    norm = nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    norm.weight.copy_(weight)
    torch.testing.assert_close(channel_gain(norm, like), weight, rtol=1e-6, atol=0)
    assert channel_gain(nn.LayerNorm(8, bias=False, dtype=torch.float64), like) is None
    shifted = nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    shifted.register_forward_hook(lambda module, args, output: output + 1)  # hooks are no part of the form
    torch.testing.assert_close(channel_gain(shifted, like), torch.ones(8).double(), rtol=1e-6, atol=0)
    assert channel_gain(nn.Softplus(), like) is None


# --- what tracing leaves behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "gemma4_text", "qwen2_moe", "falcon"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = make_family(family)
    model.train()
    find_layer = model.get_decoder().get_submodule("h" if family in ("gpt_neo", "falcon") else "layers")[1]
    find_layer.eval()  # mixed modes come back
    model.get_input_embeddings().weight.requires_grad_(False)
    untouched, random = Untouched(model), torch.get_rng_state()
    blocks = find_blocks(model)
    untouched.check()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(site.gain is None or not site.gain.requires_grad for block in blocks for site in block.sites.values())


@pytest.mark.parametrize("failing", [1, 2, 3, 9])
def test_an_exception_midway_leaves_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("gpt_neo")
    model.train()
    attention = type(model.transformer.h[0].attn)
    original, calls = attention.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    untouched = Untouched(model)
    with monkeypatch.context() as patched:
        patched.setattr(attention, "forward", forward)
        with pytest.raises(RuntimeError, match="out of memory"):
            find_blocks(model)
    untouched.check()
    assert [describe(block) for block in find_blocks(model)] == EXPECTED["gpt_neo"]


def test_layers_whose_forward_was_replaced_keep_it() -> None:
    """As Accelerate does to spread a model over devices."""
    model = make_family("llama")
    block, calls = model.model.layers[1], []
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    block.forward = forward
    find_blocks(model)
    assert block.forward is forward
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["model.layers.1"]


# --- the cache of traces ---------------------------------------------------------------------------------------


class Runs:
    """Counts the passes of a model's decoder, all of one row of four tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.get_decoder().register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert kwargs["input_ids"].shape == (1, 4)
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


def test_a_model_is_traced_once() -> None:
    model = make_family("gemma2")
    runs = Runs(model)
    first = find_blocks(model)
    assert runs.since() > 0
    second = find_blocks(model)
    assert runs.since() == 0
    assert [describe(block) for block in second] == [describe(block) for block in first]
    with torch.no_grad():
        for parameter in model.parameters():  # training changes no role
            parameter.mul_(1.01)
    find_blocks(model)
    assert runs.since() == 0
    model.model.layers[2].mlp.act_fn = nn.ReLU()
    find_blocks(model)
    assert runs.since() > 0
    twin = copy.deepcopy(model)
    theirs = find_blocks(twin)
    assert theirs[0].module is twin.model.layers[0]
    assert theirs[1].sites["mlp_out"].layer is twin.model.layers[1].mlp.down_proj


def test_another_layer_is_found_where_one_was_replaced() -> None:
    model = make_family("llama", torch.float64)
    runs = Runs(model)
    find_blocks(model)
    runs.since()
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = new = nn.Linear(48, 32, dtype=torch.float64)
    site = find_blocks(model)[1].sites["mlp_out"]
    assert site.layer is new is not old
    assert runs.since() == 0  # of the same kind
    mlp = model.model.layers[1].mlp
    for name, layer in {"gate_proj": (32, 20), "up_proj": (32, 20), "down_proj": (20, 32)}.items():
        setattr(mlp, name, nn.Linear(*layer, dtype=torch.float64))
    assert [block.sites["mlp_out"].d_in for block in find_blocks(model)] == [48, 20, 48]
    assert runs.since() > 0


def test_a_gain_is_the_norms_weight_of_now() -> None:
    model = make_family("gemma2", torch.float64)
    runs = Runs(model)
    before = find_blocks(model)[1].sites["mlp_out"].gain
    runs.since()
    norm = model.model.layers[1].post_feedforward_layernorm
    with torch.no_grad():
        norm.weight += 0.5
    after = find_blocks(model)[1].sites["mlp_out"].gain
    torch.testing.assert_close(after, before + 0.5, rtol=0, atol=1e-5)
    norm.weight = nn.Parameter(torch.zeros(32, dtype=torch.float64))
    torch.testing.assert_close(
        find_blocks(model)[1].sites["mlp_out"].gain.double(), torch.ones(32).double(), rtol=0, atol=1e-5
    )
    assert runs.since() == 0


def test_factors_of_a_single_number_are_measured_anew() -> None:
    """Gemma 4 multiplies a block's output by a buffer of one number, another one for each layer."""
    model = make_family("gemma4_text-tied", torch.float64)

    def found() -> list[float]:
        return [block.sites["mlp_out"].projections[0].multiplier for block in find_blocks(model)]

    scalars = [float(layer.layer_scalar) for layer in model.model.layers]
    assert len(set(scalars)) == 4
    assert found() == pytest.approx(scalars, rel=1e-3)
    model.model.layers[2].layer_scalar.fill_(0.3)
    assert found()[2] == pytest.approx(0.3, rel=1e-3)


# --- numbers that are not, or that vanish ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("llama", "model.layers.0.self_attn.v_proj", "block 0 puts out NaN or infinite values"),
        ("llama", "model.layers.0.mlp.down_proj", "block 0 puts out NaN or infinite values"),
        ("gpt_neo", "transformer.h.0.ln_1", "block 0 puts out NaN or infinite values"),
        ("deepseek_v3", "model.layers.2.mlp.shared_experts.up_proj", "block 2 puts out NaN"),  # first of its kind
        ("gemma2", "model.layers.2.post_feedforward_layernorm", r"block 2, mlp_out: the norm after \S+down_proj puts"),
        ("gemma2", "model.layers.3.post_attention_layernorm", r"block 3, attn_out: the norm after \S+o_proj puts"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_block(family: str, path: str, message: str, value: float) -> None:
    model = make_family(family, torch.float64)
    with torch.no_grad():
        model.get_submodule(path).weight[2] = value
    with pytest.raises(SingularSystemError, match=f"^{message}.*Check the model's weights and dtype"):
        find_blocks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "granite"])
def test_output_projections_of_zeros_are_found(family: str) -> None:
    """As blocks that were added to a trained model start."""
    model = make_family(family, torch.float64)
    with torch.no_grad():
        for block in find_blocks(model):
            for site in block.sites.values():
                for part in site.projections:
                    for parameter in part.layer.parameters():
                        parameter.zero_()
    found = find_blocks(copy.deepcopy(model))
    assert [describe(block) for block in found] == EXPECTED[family]


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "gemma2", "mixtral"])
def test_a_model_of_zeros_is_refused(family: str) -> None:
    model = make_family(family, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(UnsupportedModelError, match="no linear layer that mixes tokens writes to the residual stream"):
        find_blocks(model)


# --- quantised layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8bit", "4bit", "float8", "buffers", "packed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "deepseek_v3", "hyperclovax"])
def test_quantised_layers_have_the_same_roles(family: str, kind: str) -> None:
    """Projections are found whatever their weights look like; mlp_in needs the weights of the first linear layers."""
    model = quantise_(make_family(family), kind)
    for block, expected in zip(find_blocks(model), EXPECTED[family], strict=True):
        firsts = expected["firsts"] or expected["mlp_in"]
        assert describe(block) == {**expected, "mlp_in": "", "firsts": firsts}
        assert "mlp_in" not in block.stages(SITES)
        if expected["mlp_in"]:
            assert block.missing == {"mlp_in": "the MLP's first linear layers are quantised"}


def test_quantised_output_projections_leave_mlp_in() -> None:
    model = quantise_(make_family("llama"), "buffers", only="_proj")
    plain = make_family("llama")
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        layer.mlp.gate_proj, layer.mlp.up_proj = other.mlp.gate_proj, other.mlp.up_proj
    for block in find_blocks(model):
        assert isinstance(block.sites["attn_out"].layer, QuantLinear)
        assert describe(block) == LLAMA
        assert block.stages(SITES) == SITES
    model.model.layers[1].mlp.up_proj = QuantLinear(plain.model.layers[1].mlp.up_proj.weight.detach(), None)
    assert [block.stages(("mlp_in",)) for block in find_blocks(model)] == [("mlp_in",), (), ("mlp_in",)]


# --- blocks that have only some of the sites ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "asked", "expected"),
    [
        ("deepseek_v3", SITES, [SITES, SITES, ("attn_out", "mlp_out"), ("attn_out", "mlp_out")]),
        ("deepseek_v3", ("mlp_in",), [("mlp_in",), ("mlp_in",), (), ()]),
        ("qwen3_moe", ("mlp_out", "attn_out"), [("attn_out",), ("attn_out", "mlp_out"), ("attn_out",), ("attn_out",)]),
        ("qwen3_moe", ("mlp_out",), [(), ("mlp_out",), (), ()]),
        ("phi", ("mlp_out", "attn_out"), [(JOINT,)] * 3),
        ("phi", SITES, [(JOINT,)] * 3),
        ("phi", ("attn_out",), [("attn_out",)] * 3),
        ("phi", ("mlp_in", "mlp_out"), [("mlp_out",)] * 3),
        ("llama", ("mlp_out", "mlp_in"), [("mlp_in", "mlp_out")] * 3),
    ],
)
def test_stages_of_a_block(family: str, asked: Sequence[str], expected: list[tuple[str, ...]]) -> None:
    assert [block.stages(asked) for block in find_blocks(family_model(family))] == expected


def test_a_site_that_no_block_has_is_refused_with_the_reason() -> None:
    for family, name, message in (
        ("mixtral", "mlp_out", r"its MLP is a mixture of experts \(mlp.experts\).* This model's sites: \['attn_out'\]"),
        ("phi", "mlp_in", r"attention and MLP are parallel.* This model's sites: \['attn_out', 'mlp_out'\]"),
        ("olmo2", "mlp_in", "no norm stands between the residual stream and the MLP"),
        ("granite", "mlp_in", "the MLP's output is scaled"),
        ("gemma2", "mlp_in", "a norm follows the MLP"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"^sites: no block has the site '{name}': {message}"):
            require_site(find_blocks(family_model(family)), name)
    for family, name in (("qwen3_moe", "mlp_out"), ("deepseek_v3", "mlp_in"), ("phi", "attn_out")):
        require_site(find_blocks(family_model(family)), name)  # one block is enough


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_layers_are_found_in_low_precision_and_anew_in_another(family: str, dtype: torch.dtype) -> None:
    """Their outputs are less than the rounding of the residual stream."""
    config = AutoConfig.for_model(
        family, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    for name, value in {"num_key_value_heads": 2, "head_dim": 8, "residual_multiplier": 0.22}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    wanted = sorted(find_blocks(AutoModelForCausalLM.from_config(config).eval())[0].sites)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert sorted(find_blocks(model)[0].sites) == wanted
    assert sorted(find_blocks(model.float())[0].sites) == wanted
