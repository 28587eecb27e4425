"""The stages of a fit against brute force: one full forward for each sequence, of a model whose weights are changed.

The reference shares nothing with the runner: no batches, no lead, no cache, no streams.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.alignment import TokenisedPair
from lit_thought.batches import make_batches
from lit_thought.blocks import SITES, Block, find_blocks
from lit_thought.prompts import PromptTemplate
from lit_thought.runner import StreamRunner
from lit_thought.streams import LowRank

WORDS = [("hot", "cold"), ("big", "small"), ("the capital of France?", None), ("up", "down"), ("good", "a bad fox")]
TEMPLATES = {
    "start": "Q: {input}\nA: {output}\n",
    "middle": "You are a fox.\n{instruction}\nQ: {input}\nA: {output}\n",
    "after": "Q: {input}\n{instruction}\nA: {output}\n",
}
INSTRUCTION = "Talk like a pirate. Antonyms of words."
ANSWER_WEIGHT = 3.0


@dataclass
class Sums:
    """Z, C, Σ w ‖δ‖², Σ w and the number of tokens of one stage, in float64."""

    gram: Tensor
    cross: Tensor
    energy: float
    weight: float

    @classmethod
    def of(cls, a: Tensor, delta: Tensor, weights: Tensor) -> Sums:
        wide = weights.double()[:, None]
        a, delta = a.double(), delta.double()
        return cls(a.T @ (wide * a), delta.T @ (wide * a), float((wide * delta**2).sum()), float(weights.sum()))

    def assert_equal(self, other: Sums, tol: float = 1e-9) -> None:
        for mine, theirs in ((self.gram, other.gram), (self.cross, other.cross)):
            assert mine.shape == theirs.shape
            assert float((mine - theirs).norm()) <= tol * float(theirs.norm())
        assert self.energy == pytest.approx(other.energy, rel=tol)
        assert self.weight == pytest.approx(other.weight, rel=1e-12)


def make_pairs(template: str = "start", bos: bool = False) -> list[TokenisedPair]:
    parsed, tokenizer = PromptTemplate.parse(TEMPLATES[template]), make_tokenizer(bos=bos)
    return [parsed.tokenise(tokenizer, INSTRUCTION, text, output) for text, output in WORDS]


def make_patches(blocks: Sequence[Block], sites: Sequence[str], size: float = 0.2) -> list[LowRank]:
    """What a solve might return at each stage: something small of low rank, in float64."""
    generator = torch.Generator().manual_seed(0)
    patches = []
    for block in blocks:
        for name in sites:
            site = block.sites[name]
            A = torch.randn(2, site.d_in, generator=generator, dtype=torch.float64) * size
            B = torch.randn(site.d_out, 2, generator=generator, dtype=torch.float64) * size
            patches.append(LowRank(A, B))
    return patches


def trace(
    model: PreTrainedModel, ids: Sequence[int], replaced: dict[int, tuple[list[int], Tensor]] | None = None
) -> tuple[list[Tensor], dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """A plain full forward: each block's entrance, and each site's input and the residual stream after it.

    ``replaced``: for a block, positions and what enters at them instead.
    """
    entrances: list[Tensor] = []
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    handles = []
    for block in find_blocks(model):

        def enter(module: nn.Module, args: tuple, index: int = block.index) -> tuple:
            hidden = args[0]
            if replaced and index in replaced:
                positions, values = replaced[index]
                hidden = hidden.clone()
                hidden[0, positions] = values
            entrances.append(hidden[0])
            return (hidden, *args[1:])

        def attention(module: nn.Module, args: tuple, output: Tensor, index: int = block.index) -> None:
            seen[index, "attn_out"] = (args[0][0], entrances[index] + output[0])

        def mlp(module: nn.Module, args: tuple, output: Tensor, index: int = block.index) -> None:
            seen[index, "mlp_out"] = (args[0][0], seen[index, "attn_out"][1] + output[0])

        handles += [
            block.module.register_forward_pre_hook(enter),
            block.sites["attn_out"].layer.register_forward_hook(attention),
            block.sites["mlp_out"].layer.register_forward_hook(mlp),
        ]
    with torch.no_grad():
        model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return entrances, seen


def brute_force(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    sites: Sequence[str],
    patches: Sequence[LowRank],
    order: str = "sequential",
) -> list[Sums]:
    """The sums of every stage, from one pair and one full forward at a time."""
    changed = copy.deepcopy(model)
    blocks = find_blocks(changed)
    comparisons = []  # plain ids, target ids, (plain position, target position, weight)
    for pair in pairs:
        if pair.sink:
            comparisons.append((pair.plain_ids[:1], pair.plain_ids[:1], [(0, 0, 1.0)]))
        start, stop = pair.output_span
        matches = [
            (p, q, ANSWER_WEIGHT if start < stop and start - 1 <= p < stop else 1.0)
            for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True)
        ]
        comparisons.append((pair.plain_ids, pair.instructed_ids, matches))
    stages = []
    for stage, patch in enumerate(patches):
        block, site = blocks[stage // len(sites)], sites[stage % len(sites)]
        rows: list[tuple[Tensor, Tensor, float]] = []
        for plain, target, matches in comparisons:
            goals, goal = trace(model, target)
            forced = None
            if order == "teacher-forced":  # from the second block on: the first one's entrance is the embedding
                here, there = [p for p, _, _ in matches], [q for _, q, _ in matches]
                forced = {index: (here, goals[index][there]) for index in range(1, block.index + 1)}
            _, seen = trace(changed, plain, forced)
            a, residual = seen[block.index, site]
            wanted = goal[block.index, site][1]
            rows += [(a[p], wanted[q] - residual[p], weight) for p, q, weight in matches]
        stages.append(
            Sums.of(
                torch.stack([a for a, _, _ in rows]),
                torch.stack([delta for _, delta, _ in rows]),
                torch.tensor([weight for _, _, weight in rows], dtype=torch.float64),
            )
        )
        delta = patch.B @ patch.A
        layer = block.sites[site]
        with torch.no_grad():
            changed.get_parameter(f"{layer.path}.weight").add_(delta.T if layer.fan_in_fan_out else delta)
    return stages


def run(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    sites: Sequence[str],
    patches: Sequence[LowRank],
    order: str = "sequential",
    batch_size: int = 2,
    side: str = "right",
    offload: bool = False,
) -> list[Sums]:
    batches = make_batches(pairs, batch_size, 0, side, answer_weight=ANSWER_WEIGHT)
    runner = StreamRunner(model, find_blocks(model), sites, order, offload)  # type: ignore[arg-type]
    assert runner.num_stages == len(patches)
    stages = []
    for stage, patch in enumerate(patches):
        assert (runner.stage, runner.block.index, runner.site) == (
            stage,
            stage // len(sites),
            sites[stage % len(sites)],
        )
        seen = [runner.observe(batch) for batch in batches]
        columns = (torch.cat([getattr(o, name) for o in seen]) for name in ("a", "delta", "weights"))
        stages.append(Sums.of(*columns))
        runner.finish(patch)
    return stages


def check(model: PreTrainedModel, pairs: list[TokenisedPair], sites: Sequence[str], **options) -> list[Sums]:
    patches = make_patches(find_blocks(model), sites)
    order = options.get("order", "sequential")
    reference = brute_force(model, pairs, sites, patches, order)
    found = run(model, pairs, sites, patches, **options)
    for mine, theirs in zip(found, reference, strict=True):
        mine.assert_equal(theirs)
    return found


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("sites", [SITES, ("mlp_out",), ("attn_out",)], ids="+".join)
@pytest.mark.parametrize("bos", [False, True], ids=["sink", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stages_equal_brute_force(family: str, bos: bool, sites: tuple[str, ...], order: str) -> None:
    pairs = make_pairs(bos=bos)
    assert all(pair.sink == (not bos) for pair in pairs)
    check(make_model(family), pairs, sites, order=order)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_other_families_too(family: str) -> None:
    """Mistral with a sliding window that is shorter than the chunk."""
    for side in ("left", "right"):
        check(make_model(family), make_pairs("middle", bos=True), SITES, batch_size=5, side=side)


@pytest.mark.parametrize("template", ["middle", "after"])
@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_chunk_elsewhere(family: str, order: str, template: str) -> None:
    check(make_model(family), make_pairs(template), SITES, order=order)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_padding_and_order_of_pairs_do_not_matter(batch_size: int, side: str) -> None:
    model = make_model("llama")
    patches = make_patches(find_blocks(model), SITES)
    for template in ("start", "after"):  # with the chunk first, and with no lead but the prompt's first tokens
        pairs = make_pairs(template)
        reference = brute_force(model, pairs, SITES, patches)
        for ordered in (pairs, pairs[::-1]):
            found = run(model, ordered, SITES, patches, batch_size=batch_size, side=side)
            for mine, theirs in zip(found, reference, strict=True):
                mine.assert_equal(theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_that_share_no_token(side: str) -> None:
    """No lead at all, so padding really goes to the left."""
    pairs = []
    for i, length in enumerate((4, 7, 5)):
        ids = tuple(range(10 + 20 * i, 10 + 20 * i + length))
        target = (*ids[:2], 400, 401 + i, *ids[2:])
        positions = tuple(range(length)), tuple(p if p < 2 else p + 2 for p in range(length))
        pairs.append(TokenisedPair(ids, target, *positions, False, (length, length), True))
    assert all(batch.lead is None for batch in make_batches(pairs, 3, 0, side))
    for order in ("sequential", "teacher-forced"):
        check(make_model("mistral"), pairs, SITES, batch_size=3, side=side, order=order)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("sites", [SITES, ("attn_out",)], ids="+".join)
def test_offloaded_streams_give_the_same(sites: tuple[str, ...], order: str) -> None:
    model = make_model("llama")
    pairs, patches = make_pairs(), make_patches(find_blocks(model), sites)
    for mine, theirs in zip(
        run(model, pairs, sites, patches, order, offload=True), run(model, pairs, sites, patches, order), strict=True
    ):
        mine.assert_equal(theirs, tol=0)


def test_negative_control() -> None:
    """Orders, sites, patches and the sink change the sums by far more than the tolerance."""
    model, pairs = make_model("llama"), make_pairs()
    patches = make_patches(find_blocks(model), SITES)
    base = run(model, pairs, SITES, patches)[-1].cross
    without_sink = [replace(pair, sink=False) for pair in pairs]
    for other in (
        run(model, pairs, SITES, patches, "teacher-forced"),
        run(model, pairs, SITES, [LowRank(p.A, -p.B) for p in patches]),
        run(model, without_sink, SITES, patches),
        run(model, pairs[:-1], SITES, patches),
    ):
        assert float((other[-1].cross - base).norm()) > 1e-3 * float(base.norm())


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_an_instruction_that_changes_nothing_has_no_error(order: str) -> None:
    """Where both runs are the same tokens, δ is zero at every stage as long as the patches are."""
    model = make_model("llama")
    ids = (5, 6, 7, 8)
    pairs = [TokenisedPair(ids, ids, (0, 1, 2, 3), (0, 1, 2, 3), False, (4, 4), True)]
    blocks = find_blocks(model)
    zero = [LowRank(p.A, 0 * p.B) for p in make_patches(blocks, SITES)]
    assert all(stage.energy == 0 for stage in run(model, pairs, SITES, zero, order))


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(model, make_pairs(), SITES, make_patches(find_blocks(model), SITES))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_half_precision_model_is_compared_in_single_precision() -> None:
    model = make_model("llama", torch.bfloat16)
    runner = StreamRunner(model, find_blocks(model), SITES)
    for batch in make_batches(make_pairs(), 2, 0):
        assert runner.observe(batch).delta.dtype == torch.float32
