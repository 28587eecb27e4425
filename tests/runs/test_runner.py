"""The stages of a fit against brute force: one full forward for each sequence, of a model whose weights are changed.

The reference shares nothing with the runner: no batches, no lead, no cache, no streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from families import make_family
from fits import Untouched
from full_forwards import ANSWER_WEIGHT, BruteForce
from models import make_model, make_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.model.blocks import JOINT, Block, find_blocks
from lit_thought.model.calls import find_layers
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import make_batches, pad
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.runner import StreamRunner, stages_of
from lit_thought.runs.storage import Place as StoragePlace
from lit_thought.runs.storage import Storage
from lit_thought.runs.streams import SitePatch, Stream
from lit_thought.settings import SITES
from lit_thought.solve.factors import Factors

WORDS = [("hot", "cold"), ("big", "small"), ("the capital of France?", None), ("up", "down"), ("good", "a bad fox")]
TEMPLATES = {
    "start": "Q: {input}\nA: {output}\n",
    "middle": "You are a fox.\n{instruction}\nQ: {input}\nA: {output}\n",
    "after": "Q: {input}\n{instruction}\nA: {output}\n",
}
INSTRUCTION = "Talk like a pirate. Antonyms of words."


@dataclass
class Sums:
    """Z, C, the sum of the shifts, Σ w ‖δ‖², Σ w ‖shift‖² and Σ w of one stage, in float64."""

    gram: Tensor
    cross: Tensor
    total: Tensor
    energies: tuple[float, float]
    weight: float

    @classmethod
    def of(cls, a: Tensor, delta: Tensor, shift: Tensor, weights: Tensor) -> Sums:
        wide = weights.double()[:, None]
        a, delta, shift = a.double(), delta.double(), shift.double()
        energies = float((wide * delta**2).sum()), float((wide * shift**2).sum())
        return cls(a.T @ (wide * a), delta.T @ (wide * a), (wide * shift).sum(0), energies, float(weights.sum()))

    def assert_equal(self, other: Sums, tol: float = 1e-9) -> None:
        for mine, theirs in ((self.gram, other.gram), (self.cross, other.cross), (self.total, other.total)):
            assert mine.shape == theirs.shape
            assert float((mine - theirs).norm()) <= tol * float(theirs.norm())
        assert self.energies == pytest.approx(other.energies, rel=tol)
        assert self.weight == pytest.approx(other.weight, rel=1e-12)


def make_pairs(template: str = "start", bos: bool = False) -> list[TokenisedPair]:
    parsed, tokenizer = PromptTemplate.parse(TEMPLATES[template]), make_tokenizer(bos=bos)
    return [parsed.tokenise(tokenizer, INSTRUCTION, text, output) for text, output in WORDS]


def make_patches(
    blocks: Sequence[Block], sites: Sequence[str], size: float = 0.2, chosen: Sequence[int] | None = None, seed: int = 0
) -> list[SitePatch]:
    """What a solve might return at each stage: a small matrix of low rank and a small vector, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * size

    patches = []
    for index in chosen or range(len(blocks)):
        for name in sites:
            site = blocks[index].sites[name]
            patches.append(SitePatch(Factors(random(2, site.d_in), random(site.d_out, 2)), random(site.d_out)))
    return patches


def brute_force(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    sites: Sequence[str],
    patches: Sequence[SitePatch],
    order: str = "sequential",
    chosen: Sequence[int] | None = None,
    start: Mapping[tuple[int, str], SitePatch] | None = None,
) -> list[Sums]:
    """The sums of every stage."""
    brute = BruteForce(model, pairs, order)
    brute.install(start or {})
    stages = []
    for key, patch in zip(stage_keys(brute.blocks, sites, chosen), patches, strict=True):
        stages.append(Sums.of(*brute.observe(*key)))
        brute.install({key: patch})
    return stages


def stage_keys(blocks: int, sites: Sequence[str], chosen: Sequence[int] | None) -> Iterator[tuple[int, str]]:
    return ((block, site) for block in chosen or range(blocks) for site in sites)


def run(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    sites: Sequence[str],
    patches: Sequence[SitePatch],
    order: str = "sequential",
    batch_size: int = 2,
    place: StoragePlace = "device",
    chosen: Sequence[int] | None = None,
    start: Mapping[tuple[int, str], SitePatch] | None = None,
) -> list[Sums]:
    batches = make_batches(pairs, batch_size, answer_weight=ANSWER_WEIGHT)
    runner = StreamRunner(model, find_blocks(model), sites, order, Storage(place), chosen, start)  # type: ignore[arg-type]
    assert runner.num_stages == len(patches)
    stages = []
    for stage, (key, patch) in enumerate(zip(stage_keys(3, sites, chosen), patches, strict=True)):
        assert (runner.stage, runner.block.index, runner.site) == (stage, *key)
        seen = [runner.observe(batch) for batch in batches]
        columns = (torch.cat([getattr(o, name) for o in seen]) for name in ("a", "delta", "shift", "weights"))
        stages.append(Sums.of(*columns))
        runner.finish(patch)
    return stages


def check(model: PreTrainedModel, pairs: list[TokenisedPair], sites: Sequence[str], **options) -> None:
    patches = make_patches(find_blocks(model), sites, chosen=options.get("chosen"))
    reference = {key: options[key] for key in ("order", "chosen", "start") if key in options}
    expected = brute_force(model, pairs, sites, patches, **reference)
    assert_equal(run(model, pairs, sites, patches, **options), expected)


def assert_equal(found: Sequence[Sums], expected: Sequence[Sums], tol: float = 1e-9) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        mine.assert_equal(theirs, tol)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("sites", [SITES, ("mlp_out",), ("mlp_in",), ("attn_out",)], ids="+".join)
@pytest.mark.parametrize("bos", [False, True], ids=["sink", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stages_equal_brute_force(family: str, bos: bool, sites: tuple[str, ...], order: str) -> None:
    pairs = make_pairs(bos=bos)
    assert all(pair.sink == (not bos) for pair in pairs)
    check(make_model(family), pairs, sites, order=order)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize(
    ("sites", "chosen"),
    [(SITES, (1,)), (("mlp_out",), (0, 2)), (("attn_out", "mlp_in"), (2,)), (("mlp_in",), (0, 2)), (SITES, (1, 2))],
    ids=lambda value: "+".join(map(str, value)),
)
@pytest.mark.parametrize(("family", "template"), [("llama", "start"), ("gpt2", "middle")])
def test_some_of_the_blocks(
    family: str, template: str, sites: tuple[str, ...], chosen: tuple[int, ...], order: str
) -> None:
    """Both runs pass through the others, before, between and after, as they are; the lead is the chunk, and in the
    middle template the tokens before it too."""
    pairs, place = make_pairs(template)[:3], "disk" if template == "middle" else "device"
    check(make_model(family), pairs, sites, order=order, chosen=chosen, place=place)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize(
    ("family", "sites", "there", "chosen"),
    [
        ("llama", SITES, SITES, None),
        ("gpt2", ("mlp_in",), ("mlp_in",), (0, 2)),
        ("llama", ("mlp_out",), ("mlp_out",), None),  # which does not run the block again to leave it
        ("llama", ("attn_out", "mlp_in"), ("attn_out", "mlp_in"), None),
        ("gpt2", ("mlp_in", "mlp_out"), SITES, (0, 2)),
    ],
)
def test_a_second_step_starts_from_patches(
    family: str, sites: tuple[str, ...], there: tuple[str, ...], chosen: tuple[int, ...] | None, order: str
) -> None:
    """The plain run goes through the patches that are there, until a stage puts another in their place."""
    model = make_model(family)
    given = make_patches(find_blocks(model), there, chosen=chosen, seed=1)
    start = dict(zip(stage_keys(3, there, chosen), given, strict=True))
    before = dict(start)
    check(model, make_pairs(bos=True)[:3], sites, order=order, chosen=chosen, start=start)
    assert start == before


@pytest.mark.parametrize("template", ["middle", "after"])
@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_chunk_elsewhere(family: str, order: str, template: str) -> None:
    check(make_model(family), make_pairs(template), SITES, order=order)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_and_order_of_pairs_do_not_matter(batch_size: int) -> None:
    model = make_model("llama")
    patches = make_patches(find_blocks(model), SITES)
    for template in ("start", "after"):  # with the chunk first, and with no lead but the prompt's first tokens
        pairs = make_pairs(template)
        for ordered in (pairs, pairs[::-1]):
            found = run(model, ordered, SITES, patches, batch_size=batch_size)
            assert_equal(found, llama_reference(template))


@cache
def llama_reference(template: str) -> list[Sums]:
    model = make_model("llama")
    return brute_force(model, make_pairs(template), SITES, make_patches(find_blocks(model), SITES))


def test_pairs_that_share_no_token() -> None:
    """No lead at all."""
    pairs = []
    for i, length in enumerate((4, 7, 5)):
        ids = tuple(range(10 + 20 * i, 10 + 20 * i + length))
        target = (*ids[:2], 400, 401 + i, *ids[2:])
        positions = tuple(range(length)), tuple(p if p < 2 else p + 2 for p in range(length))
        pairs.append(TokenisedPair(ids, target, *positions, False, (length, length), True))
    assert all(batch.lead is None for batch in make_batches(pairs, 3))
    for order in ("sequential", "teacher-forced"):
        check(make_model("mistral"), pairs, SITES, batch_size=3, order=order)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("sites", [SITES, ("attn_out",)], ids="+".join)
def test_offloaded_streams_give_the_same(sites: tuple[str, ...], order: str) -> None:
    model = make_model("llama")
    pairs, patches = make_pairs(), make_patches(find_blocks(model), sites)
    offloaded = run(model, pairs, sites, patches, order, place="disk")
    assert_equal(offloaded, run(model, pairs, sites, patches, order), tol=0)


def test_negative_control() -> None:
    """Orders, sites, patches and the sink change the sums by far more than the tolerance."""
    model, pairs = make_model("llama"), make_pairs()
    patches = make_patches(find_blocks(model), SITES)
    base = run(model, pairs, SITES, patches)[-1].cross
    start = dict(zip(stage_keys(3, SITES, None), patches, strict=True))
    without_sink = [replace(pair, sink=False) for pair in pairs]
    for other in (
        run(model, pairs, SITES, patches, "teacher-forced"),
        run(model, pairs, SITES, [SitePatch(Factors(p.matrix.A, -p.matrix.B), p.vector) for p in patches]),
        run(model, pairs, SITES, [SitePatch(p.matrix, None) for p in patches]),
        run(model, without_sink, SITES, patches),
        run(model, pairs[:-1], SITES, patches),
        run(model, pairs, SITES, patches[-3:], chosen=[2]),
        run(model, pairs, SITES, patches, start={(2, "mlp_out"): start[2, "mlp_out"]}),
    ):
        assert float((other[-1].cross - base).norm()) > 1e-3 * float(base.norm())


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_an_instruction_that_changes_nothing_has_no_error(order: str) -> None:
    """Where both runs are the same tokens, δ is zero at every stage as long as the patches are."""
    model = make_model("llama")
    ids = (5, 6, 7, 8)
    pairs = [TokenisedPair(ids, ids, (0, 1, 2, 3), (0, 1, 2, 3), False, (4, 4), True)]
    blocks = find_blocks(model)
    zero = [SitePatch(Factors(p.matrix.A, 0 * p.matrix.B), 0 * p.vector) for p in make_patches(blocks, SITES)]
    assert all(stage.energies == (0, 0) for stage in run(model, pairs, SITES, zero, order))


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("llama")
    before = Untouched(model)
    run(model, make_pairs(), SITES, make_patches(find_blocks(model), SITES))
    before.check()


def test_half_precision_model_is_compared_in_single_precision() -> None:
    model = make_model("llama", torch.bfloat16)
    batches = make_batches(make_pairs(), 2)
    patches = make_patches(find_blocks(model), SITES)
    runner = StreamRunner(model, find_blocks(model), SITES, start={(0, "mlp_in"): narrow(patches[1])})
    for patch in patches:
        for batch in batches:
            seen = runner.observe(batch)
            assert seen.delta.dtype == seen.shift.dtype == torch.float32
        runner.finish(narrow(patch))


def narrow(patch: SitePatch) -> SitePatch:
    assert patch.matrix is not None
    assert patch.vector is not None
    return SitePatch(Factors(patch.matrix.A.float(), patch.matrix.B.float()), patch.vector.float())


# --- blocks of other forms ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A layer that writes to the residual stream: its path in the block, and what its output goes through."""

    path: str
    factor: float = 1.0
    norm: str | None = None
    gate: str | None = None


class Place(NamedTuple):
    """A site: its layers, and the module whose input is the residual stream after it; None for the block's output."""

    parts: tuple[Part, ...]
    point: str | None = None


OUT, DOWN, AFTER = Part("self_attn.o_proj"), Part("mlp.down_proj"), "post_attention_layernorm"
GEMMA2 = {
    "attn_out": Place((Part("self_attn.o_proj", norm=AFTER),), "pre_feedforward_layernorm"),
    "mlp_out": Place((Part("mlp.down_proj", norm="post_feedforward_layernorm"),)),
}
EXPERTS = {"attn_out": Place((OUT,), AFTER)}
SHARED = {**EXPERTS, "mlp_out": Place((Part("mlp.shared_expert.down_proj", gate="mlp.shared_expert_gate"),))}
DENSE = {**EXPERTS, "mlp_out": Place((DOWN,))}


def at_once(*parts: Part) -> dict[str, Place]:
    """A parallel block's sites."""
    return {"attn_out": Place(parts[:1]), "mlp_out": Place(parts[1:]), JOINT: Place(parts)}


PLACES: dict[str, list[dict[str, Place]]] = {
    "gemma2": [GEMMA2] * 4,
    "olmo2": [
        {
            "attn_out": Place((Part("self_attn.o_proj", norm=AFTER),), "mlp"),
            "mlp_out": Place((Part("mlp.down_proj", norm="post_feedforward_layernorm"),)),
        }
    ]
    * 3,
    "gemma4_text": [{**GEMMA2, "mlp_out": Place(GEMMA2["mlp_out"].parts, "per_layer_input_gate")}] * 4,
    "hyperclovax": [
        {
            "attn_out": Place((Part("self_attn.o_proj", 0.4, norm="post_norm1"),), AFTER),
            "mlp_out": Place((Part("mlp.down_proj", 0.4, norm="post_norm2"),)),
        }
    ]
    * 3,
    "granite": [
        {"attn_out": Place((OUT._replace(factor=0.4),), AFTER), "mlp_out": Place((DOWN._replace(factor=0.4),))},
    ]
    * 3,
    "phi": [at_once(Part("self_attn.dense"), Part("mlp.fc2"))] * 3,
    "gptj": [at_once(Part("attn.out_proj"), Part("mlp.fc_out"))] * 3,
    "falcon": [at_once(Part("self_attention.dense"), Part("mlp.dense_4h_to_h"))] * 3,
    "cohere2_moe": [at_once(OUT, DOWN), *[at_once(OUT, Part("mlp.shared_experts.down_proj", 0.5))] * 3],
    "mixtral": [EXPERTS] * 3,
    "qwen3_moe": [EXPERTS, DENSE, EXPERTS, EXPERTS],
    "qwen2_moe": [SHARED, DENSE, SHARED, SHARED],
    "opt": [{"attn_out": Place((Part("self_attn.out_proj"),), "final_layer_norm"), "mlp_out": Place((Part("fc2"),))}]
    * 3,
}
NARROW = ("gemma2", "olmo2", "gemma4_text", "hyperclovax", "gptj")  # norms or attention in float32, whatever the dtype


class Sight(NamedTuple):
    """What one full forward has at one site: raw input and output of each part, γ of each, γ and norm of the last
    part's y alone, and the residual stream; (length, ·) each."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    factors: list[Tensor]
    residual: Tensor

    @property
    def a(self) -> Tensor:
        return torch.cat([x * factor for x, factor in zip(self.inputs, self.factors, strict=True)], dim=1)


def scale_of(norm: nn.Module) -> Tensor:
    """g, read from the weights: Gemma 2's norms scale by 1 + weight."""
    return 1 + norm.weight.detach() if "Gemma2" in type(norm).__name__ else norm.weight.detach()


def epsilon_of(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


class Reference(BruteForce):
    """Brute force for the families in ``PLACES``: hooks by hand-written paths, γ from the layers' own outputs."""

    def __init__(self, family: str, pairs: Sequence[TokenisedPair], order: str = "sequential") -> None:
        self.places = PLACES[family]
        super().__init__(make_family(family, torch.float64), pairs, order)

    def module(self, model: PreTrainedModel, block: int, path: str | None = None) -> nn.Module:
        layer = find_layers(model)[block]
        return layer.get_submodule(path) if path else layer

    def install(self, patches: Mapping[tuple[int, str], SitePatch]) -> None:
        """Into weights and biases of the copy, always from the original ones."""
        self.patches |= patches
        for block in {block for block, _ in patches}:
            for place in self.places[block].values():
                for part in place.parts:
                    mine, theirs = (self.module(m, block, part.path) for m in (self.changed, self.model))
                    mine.weight.data.copy_(theirs.weight)
                    mine.bias = None if theirs.bias is None else nn.Parameter(theirs.bias.detach().clone())
            for (index, site), patch in self.patches.items():
                if index == block:
                    self._add(block, self.places[block][site], patch)

    def _add(self, block: int, place: Place, patch: SitePatch) -> None:
        layers = [self.module(self.changed, block, part.path) for part in place.parts]
        if patch.matrix is not None:
            change = patch.matrix.B @ patch.matrix.A
            for layer in layers:
                width = layer.weight.shape[1]
                layer.weight.data += change[:, :width]
                change = change[:, width:]
            assert change.shape[1] == 0
        if patch.vector is not None:
            old = 0 if layers[-1].bias is None else layers[-1].bias.detach()
            layers[-1].bias = nn.Parameter(old + patch.vector)

    @torch.no_grad()
    def trace(
        self, model: PreTrainedModel, ids: Sequence[int], replaced: Mapping[int, tuple[list[int], Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[tuple[int, str], Sight]]:
        """Each block's entrance and each site of one full forward; ``replaced`` as in :func:`trace`."""
        entrances: list[Tensor] = []
        given: dict[tuple[int, str | None], Tensor] = {}
        put: dict[tuple[int, str | None], Tensor] = {}
        handles = []

        def rows(value: Any) -> Tensor:
            value = value[0] if isinstance(value, tuple) else value
            return value.reshape(len(ids), -1)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any], block: int) -> tuple[tuple, dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if replaced and block in replaced:
                positions, values = replaced[block]
                hidden = hidden.clone()
                hidden[0, positions] = values
            entrances.append(hidden[0])
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, key: tuple) -> None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            given[key], put[key] = rows(value), rows(output)

        for block, places in enumerate(self.places):
            layer = self.module(model, block)
            handles.append(layer.register_forward_pre_hook(partial(enter, block=block), with_kwargs=True))
            parts = [part for place in places.values() for part in place.parts]
            paths = {path for part in parts for path in (part.path, part.norm, part.gate)}
            for path in {*paths, *(place.point for place in places.values()), None}:
                hook = partial(note, key=(block, path))
                handles.append(self.module(model, block, path).register_forward_hook(hook, with_kwargs=True))
        model(torch.tensor([list(ids)]), use_cache=False)
        for handle in handles:
            handle.remove()
        found = {}
        for block, places in enumerate(self.places):
            for site, place in places.items():
                factors = []
                for part in place.parts:
                    y = put[block, part.path]
                    factor = torch.full((len(ids), 1), part.factor, dtype=torch.float64)
                    if part.gate is not None:
                        factor = factor * torch.sigmoid(put[block, part.gate])
                    if part.norm is not None:
                        factor = (
                            factor
                            / (
                                y.square().mean(1, keepdim=True) + epsilon_of(self.module(model, block, part.norm))
                            ).sqrt()
                        )
                    factors.append(factor)
                residual = put[block, None] if place.point is None else given[block, place.point]
                inputs, outputs = ([into[block, part.path] for part in place.parts] for into in (given, put))
                found[block, site] = Sight(inputs, outputs, factors, residual)
        return entrances, found

    def see(self, block: int, site: str) -> list[Tensor]:
        """a, δ, the shift, weights and γ of a stage's compared tokens."""
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for seen, wanted, here, there, weights in self.runs(block):
            sight = seen[block, site]
            error = wanted[block, site].residual[there] - sight.residual[here]
            for column, values in zip(
                columns, (sight.a[here], error, error, weights, sight.factors[-1][here]), strict=True
            ):
                column.append(values)
        return [torch.cat(column) for column in columns]


def walk(
    family: str,
    sites: Sequence[str],
    stages: Sequence[tuple[int, str]],
    parts: str = "matrix",
    order: str = "sequential",
    started: bool = False,
) -> None:
    """Go through the expected stages with arbitrary patches, each compared with brute force.

    ``parts``: which part the patches have.
    """
    pairs = make_pairs()[:3]
    reference = Reference(family, pairs, order)
    model, tol = reference.model, 2e-5 if family in NARROW else 1e-9
    blocks, generator = find_blocks(model), torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def patch(block: int, site: str) -> SitePatch:
        d_in = blocks[block].sites[site].d_in
        matrix = Factors(random(2, d_in), random(32, 2)) if parts != "vector" else None
        return SitePatch(matrix, random(32) if parts != "matrix" else None)

    start = {(block, site): patch(block, site) for block, site in stages} if started else {}
    reference.install(start)
    batches = make_batches(pairs, 2, answer_weight=ANSWER_WEIGHT)
    runner = StreamRunner(model, blocks, sites, order, start=start)  # type: ignore[arg-type]
    assert [tuple(stage) for stage in runner.stages] == list(stages)
    for block, site in stages:
        assert (runner.block.index, runner.site) == (block, site)
        seen = [runner.observe(batch) for batch in batches]
        wanted = reference.see(block, site)
        columns = [torch.cat([getattr(o, name) for o in seen]) for name in ("a", "delta", "shift", "weights")]
        Sums.of(*columns).assert_equal(Sums.of(*wanted[:4]), tol)
        scales = [o.scale if o.scale is not None else torch.ones(len(o.weights), 1) for o in seen]
        found, expected = moments(torch.cat(scales), columns[3]), moments(wanted[4], wanted[3])
        torch.testing.assert_close(found, expected, rtol=10 * tol, atol=0)
        chosen_patch = patch(block, site)
        runner.finish(chosen_patch)
        reference.install({(block, site): chosen_patch})
    assert runner.stage == len(stages)


def moments(scale: Tensor, weights: Tensor) -> Tensor:
    """Σ w γᵏ, which tells apart what the order of the tokens and repeated sinks do not."""
    return torch.stack([(weights.double() * scale.double().flatten() ** k).sum() for k in range(1, 4)])


def each(blocks: Sequence[int], sites: Sequence[str]) -> list[tuple[int, str]]:
    return [(block, site) for block in blocks for site in sites]


BOTH = ("attn_out", "mlp_out")


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("parts", ["matrix", "vector"])
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gemma4_text", "hyperclovax", "granite", "opt"])
def test_sites_behind_norms_and_factors_equal_brute_force(family: str, parts: str, order: str) -> None:
    """What is read after one site was patched, and in the next block, is what changed weights give."""
    walk(family, BOTH, each(range(len(PLACES[family])), BOTH), parts, order)


def test_a_fit_goes_through_the_sites_of_the_chosen_blocks() -> None:
    for family, sites, chosen, expected in (
        ("llama", SITES, None, each(range(3), SITES)),
        ("phi", BOTH, None, each(range(3), (JOINT,))),
        ("gemma2", ("mlp_out",), (1, 3), each((1, 3), ("mlp_out",))),
    ):
        assert stages_of(find_blocks(make_family(family)), sites, chosen) == expected


@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "from patches"])
@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("family", ["phi", "gptj", "falcon", "cohere2_moe"])
def test_both_projections_of_a_parallel_block_are_one_site(family: str, order: str, started: bool) -> None:
    """a = [z; f], f times its factor; each layer's weights get their columns of Δ."""
    blocks = range(len(PLACES[family]))
    walk(family, BOTH, each(blocks, (JOINT,)), "both", order, started=started)


@pytest.mark.parametrize("site", BOTH)
@pytest.mark.parametrize("family", ["phi", "cohere2_moe"])
def test_one_projection_of_a_parallel_block(family: str, site: str) -> None:
    walk(family, (site,), each(range(len(PLACES[family])), (site,)), "both", started=True)


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize(
    ("family", "sites", "stages"),
    [
        ("mixtral", BOTH, each(range(3), ("attn_out",))),
        ("qwen3_moe", BOTH, [(0, "attn_out"), *each((1,), BOTH), *each((2, 3), ("attn_out",))]),
        ("qwen3_moe", ("mlp_out",), [(1, "mlp_out")]),  # the others are only passed through
        ("qwen2_moe", BOTH, each(range(4), BOTH)),
        ("qwen2_moe", ("mlp_out",), each(range(4), ("mlp_out",))),
    ],
)
def test_blocks_with_experts(
    family: str, sites: tuple[str, ...], stages: list[tuple[int, str, int]], order: str
) -> None:
    walk(family, sites, stages, "both", order)


@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", BOTH), ("llama", ("mlp_out",)), ("granite", BOTH), ("phi", BOTH), ("cohere2_moe", ("mlp_out",))],
)
def test_a_block_does_not_run_again_where_its_output_is_known(family: str, sites: tuple[str, ...]) -> None:
    """A patch whose effect on the output is linear is added to the output that was seen without it."""
    model = make_family(family)
    blocks, batch = find_blocks(model), make_batches(make_pairs(bos=True)[:2], 2)[0]
    assert batch.plain is not None
    runner = StreamRunner(model, blocks, sites)
    while runner.stage + 1 < runner.num_stages and runner.stages[runner.stage + 1].block == 0:
        runner.observe(batch)
        runner.finish(SitePatch(None, torch.ones(32)))
    runner.observe(batch)

    def fail(*args: Any) -> None:
        pytest.fail("the block has run")

    handle = blocks[0].module.register_forward_pre_hook(fail)
    runner.finish(SitePatch(None, torch.ones(32)))
    handle.remove()
    assert runner.block.index == 1


_ONE_MLP = ("llama", "gemma2", "olmo2", "granite", "qwen2_moe")
_OTHERWISE = ("bloom", "opt", "phi", "mixtral", "gemma4_text")


@pytest.mark.parametrize(("family", "mlp"), [*((name, "mlp") for name in _ONE_MLP), *((f, None) for f in _OTHERWISE)])
def test_the_rest_of_a_block_after_attention(family: str, mlp: str | None) -> None:
    """Where the MLP is one module, m leads to the block's output, to rounding."""
    model = make_family(family, torch.float64)
    block = find_blocks(model)[0]
    assert block.mlp is (None if mlp is None else block.module.get_submodule(mlp))
    if mlp is None:
        return
    stream = Stream(model, [block, *find_blocks(model)[1:]], pad([[5, 6, 7, 8]], 0, "right"))
    with torch.no_grad():
        output, readings = stream.run(block, ("attn_out", "mlp_out"))
        again, read = stream.run(block, ("mlp_out",), residual=readings["attn_out"].residual)
    assert output is not None
    assert again is not None
    assert torch.allclose(again, output, rtol=1e-12, atol=1e-12)
    assert torch.allclose(read["mlp_out"].input, readings["mlp_out"].input, rtol=1e-12, atol=1e-12)


def test_attention_runs_once_in_each_stream_where_the_block_can_go_on_from_it() -> None:
    model = make_family("llama", torch.float64)
    blocks, batch = find_blocks(model), make_batches(make_pairs(bos=True)[:2], 2)[0]
    runner, calls = StreamRunner(model, blocks, BOTH), 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    runner.observe(batch)
    runner.finish(SitePatch(None, torch.ones(32)))
    blocks[0].sites["attn_out"].layer.register_forward_pre_hook(count)
    blocks[0].sites["mlp_out"].layer.register_forward_pre_hook(count)
    runner.observe(batch)
    runner.finish(SitePatch(None, torch.ones(32)))
    assert calls == 1, "only the MLP"
