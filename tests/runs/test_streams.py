"""Streams that advance block by block, against transformers' own full forward of one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from full_forwards import install, layer_at
from models import FAMILIES, make_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.model.blocks import Block, find_blocks
from lit_thought.model.calls import cache_arguments
from lit_thought.prompts.batches import TokenBatch, forward_inputs, pad
from lit_thought.runs.streams import SitePatch, Stream, lead_cache
from lit_thought.settings import SITES
from lit_thought.solve.factors import Factors

LEAD = [5, 17, 300, 8, 9, 44]
ROWS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [40], [200, 7, 200, 7], [31, 32, 33, 34, 35, 36]]
# With a lead and left padding there is a gap between the two, which counts against mistral's sliding window.
CASES = [
    (family, lead, side)
    for family in FAMILIES
    for lead in ([], LEAD)
    for side in ("left", "right")
    if not (family == "mistral" and lead and side == "left")
]


def make_patches(blocks: Sequence[Block], seed: int = 0, size: float = 0.3) -> list[dict[str, SitePatch]]:
    """A matrix and a vector at every site."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * size

    return [
        {
            name: SitePatch(Factors(random(2, site.d_in), random(site.d_out, 2)), random(site.d_out))
            for name, site in block.sites.items()
        }
        for block in blocks
    ]


class Reference:
    """One full forward of one sequence: entrance and exit of each block, input and output of each site's layer."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        self.entrances: list[Tensor] = []
        self.exits: list[Tensor] = []
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.outputs: dict[tuple[int, str], Tensor] = {}
        handles = []
        for block in find_blocks(model):

            def see_block(module: nn.Module, args: tuple, output: Tensor) -> None:
                self.entrances.append(args[0][0])
                self.exits.append((output[0] if isinstance(output, tuple) else output)[0])

            handles.append(block.module.register_forward_hook(see_block))
            for name, layer in (
                ("attn_out", "self_attn.o_proj"),
                ("mlp_in", "mlp.gate_proj"),
                ("mlp_out", "mlp.down_proj"),
            ):

                def see_site(module: nn.Module, args: tuple, output: Tensor, key=(block.index, name)) -> None:
                    self.inputs[key], self.outputs[key] = args[0][0], output[0]

                handles.append(layer_at(model, block.index, layer).register_forward_hook(see_site))
        with torch.no_grad():
            result = model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.hidden_states = [x[0] for x in result.hidden_states]
        self.logits = result.logits[0]

    def residual(self, block: int, site: str) -> Tensor:
        return self.exits[block] if site == "mlp_out" else self.entrances[block] + self.outputs[block, "attn_out"]


def assert_same(found: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tol * float(expected.norm())


def run_all(
    model: PreTrainedModel, lead: list[int], side: str, patches: Sequence[dict[str, SitePatch]] | None = None
) -> list[list[dict[str, Tensor]]]:
    """For each block and each row what the streams saw: entrance, output, and the sites' inputs and residuals."""
    blocks = find_blocks(model)
    seen = []
    with torch.no_grad():
        ahead = Stream(model, blocks, pad([lead], 0, "right"), keep_kv=True) if lead else None
        batch = Stream(model, blocks, pad(ROWS, 0, side), lead=ahead)  # type: ignore[arg-type]
        for block in blocks:
            patch = patches[block.index] if patches else None
            for stream in filter(None, (ahead, batch)):
                entrance = stream.hidden
                output, readings = stream.run(block, SITES, patch)
                assert stream.hidden is entrance  # it is the caller who advances a stream
                assert output is not None
                stream.hidden = output
            found = {"entrance": entrance, "output": output}
            for name, reading in readings.items():
                found |= {f"{name} input": reading.input, f"{name} residual": reading.residual}
            seen.append([{key: x[i][batch.tokens.mask[i]] for key, x in found.items()} for i in range(len(ROWS))])
            if ahead:
                ahead.forget_kv(block)
    return seen


@pytest.mark.parametrize("patched", [False, True], ids=["original", "patched"])
@pytest.mark.parametrize(("family", "lead", "side"), CASES)
def test_streams_equal_the_full_forward(family: str, lead: list[int], side: str, patched: bool) -> None:
    model, changed = make_model(family), make_model(family)
    blocks = find_blocks(model)
    patches = make_patches(blocks) if patched else None
    for index, patch in enumerate(patches or ()):
        install(changed, model, index, patch)
    seen = run_all(model, lead, side, patches)
    for i, row in enumerate(ROWS):
        reference = Reference(changed, lead + row)
        for block in blocks:
            whole = {"entrance": reference.hidden_states[block.index], "output": reference.exits[block.index]}
            for name in SITES:
                whole[f"{name} input"] = reference.inputs[block.index, name]
                whole[f"{name} residual"] = reference.residual(block.index, name)
            assert seen[block.index][i].keys() == whole.keys()
            for key, expected in whole.items():
                assert_same(seen[block.index][i][key], expected[len(lead) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_control_patches_and_lead_matter(family: str) -> None:
    """What the test above compares differs by far more than its tolerance where it should."""
    model = make_model(family)
    patches = make_patches(find_blocks(model))
    base = run_all(model, LEAD, "right")[-1][0]["output"]
    for other in (run_all(model, [], "right"), run_all(model, LEAD, "right", patches)):
        assert float((other[-1][0]["output"] - base).norm()) > 0.01 * float(base.norm())


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_in_the_padding_do_not_matter(side: str) -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    outputs = []
    for pad_id in (0, 77):
        with torch.no_grad():
            tokens = pad(ROWS, pad_id, side)  # type: ignore[arg-type]
            stream = Stream(model, blocks, tokens)
            for block in blocks:
                stream.hidden = stream.run(block, ())[0]
        outputs.append(stream.hidden[tokens.mask])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("parts", ["matrix", "vector"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_part_at_one_site(family: str, site: str, parts: str) -> None:
    """Nothing else is patched, and only what was asked for is read."""
    model, changed = make_model(family), make_model(family)
    blocks = find_blocks(model)
    whole = [patch[site] for patch in make_patches(blocks)]
    patches = [{site: SitePatch(p.matrix, None) if parts == "matrix" else SitePatch(None, p.vector)} for p in whole]
    for index, patch in enumerate(patches):
        install(changed, model, index, patch)
    reference = Reference(changed, ROWS[0])
    with torch.no_grad():
        stream = Stream(model, blocks, pad([ROWS[0]], 0, "right"))
        for block in blocks:
            for name in SITES:
                output, readings = stream.run(block, [name], patches[block.index])
                assert set(readings) == {name}
                assert_same(readings[name].input[0], reference.inputs[block.index, name])
                assert_same(readings[name].residual[0], reference.residual(block.index, name))
            stream.hidden = output
            assert_same(output[0], reference.exits[block.index])


@pytest.mark.parametrize("site", ["attn_out", "mlp_in"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stopping_early_runs_no_mlp(family: str, site: str) -> None:
    model, changed = make_model(family), make_model(family)
    blocks = find_blocks(model)
    patch = make_patches(blocks)[0]
    install(changed, model, 0, patch)
    reference = Reference(changed, ROWS[0])
    ran: list[str] = []
    handle = blocks[0].module.mlp.register_forward_hook(lambda *args: ran.append("mlp"))
    with torch.no_grad():
        stream = Stream(model, blocks, pad([ROWS[0]], 0, "right"))
        output, readings = stream.run(blocks[0], [site], patch, stop_after=site)
        assert output is None
        assert ran == []
        assert set(readings) == {site}
        assert_same(readings[site].input[0], reference.inputs[0, site])
        assert_same(readings[site].residual[0], reference.residual(0, site))
        output, _ = stream.run(blocks[0], [site], patch)  # and again, in full
    handle.remove()
    assert ran == ["mlp"]
    assert_same(output[0], reference.exits[0])


@torch.no_grad()
def test_patches_keep_the_dtype_of_the_stream() -> None:
    """Float32 patches of a bfloat16 model: what they add is rounded once, and the stream stays bfloat16."""
    model = make_model("llama", torch.bfloat16)
    blocks = find_blocks(model)
    wide = make_patches(blocks)[0]
    patch = {
        name: SitePatch(Factors(p.matrix.A.float(), p.matrix.B.float()), p.vector.float()) for name, p in wide.items()
    }
    stream = Stream(model, blocks, pad([ROWS[0]], 0, "right"))
    output, readings = stream.run(blocks[0], SITES, patch)
    assert output.dtype == torch.bfloat16
    assert all(x.dtype == torch.bfloat16 for r in readings.values() for x in (r.input, r.residual))
    double, changed = make_model("llama", torch.bfloat16).double(), make_model("llama", torch.bfloat16).double()
    install(changed, double, 0, wide)
    expected = Reference(changed, ROWS[0])
    for name in SITES:
        assert_same(readings[name].residual[0].double(), expected.residual(0, name), tol=2e-2)


def test_a_block_can_be_run_again_with_the_same_result() -> None:
    """Nothing piles up in the cache, neither of the lead nor of the batch."""
    model = make_model("llama")
    blocks = find_blocks(model)
    with torch.no_grad():
        ahead = Stream(model, blocks, pad([LEAD], 0, "right"), keep_kv=True)
        batch = Stream(model, blocks, pad(ROWS, 0, "right"), lead=ahead)
        results = []
        for _ in range(3):
            first, _ = ahead.run(blocks[0], ())
            second, _ = batch.run(blocks[0], SITES)
            results.append((first, second))
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])


def test_followers_read_the_keys_of_a_patched_lead() -> None:
    """The lead runs through patched blocks too, so what it hands on at the next block has changed."""
    model, changed = make_model("llama"), make_model("llama")
    patches = make_patches(find_blocks(model))
    for index, patch in enumerate(patches):
        install(changed, model, index, patch)
    wrong = run_all(model, LEAD, "right")  # follower and lead unpatched
    right = run_all(model, LEAD, "right", patches)
    reference = Reference(changed, LEAD + ROWS[2])
    assert_same(right[2][2]["attn_out input"], reference.inputs[2, "attn_out"][len(LEAD) :])
    assert not torch.allclose(wrong[2][2]["attn_out input"], right[2][2]["attn_out input"], rtol=1e-2)


def test_a_follower_without_its_lead_is_an_error() -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    with torch.no_grad():
        ahead = Stream(model, blocks, pad([LEAD], 0, "right"), keep_kv=True)
        batch = Stream(model, blocks, pad(ROWS, 0, "right"), lead=ahead)
        with pytest.raises(RuntimeError, match="lead"):
            batch.run(blocks[0], ())
        ahead.run(blocks[0], ())
        batch.run(blocks[0], ())
        ahead.forget_kv(blocks[0])
        with pytest.raises(RuntimeError, match="lead"):
            batch.run(blocks[0], ())


def traces(model: PreTrainedModel) -> dict[str, tuple]:
    """Everything that a hook or a replaced method would change."""
    return {
        name: (
            "forward" in module.__dict__,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(sorted(module.__dict__)),
        )
        for name, module in model.named_modules()
    }


class BoomError(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_left_on_the_model(family: str) -> None:
    model = make_model(family)
    blocks = find_blocks(model)
    before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    patches = make_patches(blocks)
    run_all(model, LEAD, "right", patches)
    with torch.no_grad():
        stream = Stream(model, blocks, pad(ROWS, 0, "right"))
        for site in ("attn_out", "mlp_in"):
            stream.run(blocks[0], [site], patches[0], stop_after=site)
    assert traces(model) == before

    class Broken(nn.Module):
        def forward(self, *args, **kwargs):
            raise BoomError

    norm = "ln_2" if family == "gpt2" else "post_attention_layernorm"
    whole = getattr(blocks[1].module, norm)
    setattr(blocks[1].module, norm, Broken())  # an exception inside a block, after its first site
    with torch.no_grad(), pytest.raises(BoomError):
        Stream(model, blocks, pad(ROWS, 0, "right")).run(blocks[1], SITES, patches[1])
    setattr(blocks[1].module, norm, whole)
    assert traces(model) == before

    with torch.no_grad(), pytest.raises(IndexError):  # and one on the way in, while the blocks are replaced
        Stream(model, blocks, TokenBatch(torch.tensor([[100_000]]), torch.ones(1, 1, dtype=torch.bool)))
    handle = blocks[2].module.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(BoomError()))
    with torch.no_grad(), pytest.raises(BoomError):
        Stream(model, blocks, pad(ROWS, 0, "right"))
    handle.remove()
    assert traces(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_a_forward_that_the_user_replaced_stays() -> None:
    """Accelerate, for one, replaces ``forward`` on instances."""
    model = make_model("llama")
    blocks = find_blocks(model)
    calls: list[int] = []
    original = blocks[1].module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    blocks[1].module.forward = counted
    run_all(model, [], "right")
    assert blocks[1].module.__dict__["forward"] is counted
    assert calls == [1]  # run once as a block; not while the arguments were recorded
    assert "forward" not in blocks[0].module.__dict__


@pytest.mark.parametrize("family", FAMILIES)
def test_lead_cache_continues_as_the_full_forward(family: str) -> None:
    model = make_model(family)
    with torch.no_grad():
        cache = lead_cache(model, LEAD + LEAD)
        assert cache.get_seq_length() == 2 * len(LEAD)
        tokens = pad([ROWS[0]], 0, "right")
        logits = model(**forward_inputs(tokens, 2 * len(LEAD)), **cache_arguments(model, cache)).logits[0]
    assert_same(logits, Reference(model, LEAD + LEAD + ROWS[0]).logits[2 * len(LEAD) :])


def test_low_rank_keeps_its_own_precision() -> None:
    """A half-precision input is multiplied in the factors' float32, as a LoRA adapter does, not in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 40, generator=generator), torch.randn(20, 3, generator=generator)
    x = torch.randn(7, 40, generator=generator).bfloat16()
    found = Factors(A, B)(x)
    assert found.dtype == torch.float32
    expected = x.double() @ (B.double() @ A.double()).T
    assert float((found.double() - expected).norm()) < 1e-6 * float(expected.norm())


def test_positions_count_real_tokens_only() -> None:
    for side, expected in (("right", [0, 1, 2]), ("left", [0, 1, 2])):
        tokens = pad([[7, 8, 9], [1]], 0, side)  # type: ignore[arg-type]
        assert tokens.positions[0].tolist() == expected
        assert tokens.positions[1][tokens.mask[1]].tolist() == [0]
        assert int(tokens.positions.min()) == 0
        assert forward_inputs(tokens, 5)["position_ids"][0].tolist() == [5, 6, 7]
