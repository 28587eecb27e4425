"""Thought vectors against the steering-vectors package and against one full forward a prompt."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from models import FAMILIES, make_model, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.blocks import find_blocks
from lit_thought.theory import best_block, thought_vectors, vector_patch

POSITIVE = "Q: up\nA: down\nQ: good\nA: bad\n"
NEGATIVE = "You are a pirate.\n"
PAIRS = [{"input": "hot"}, {"input": "the capital of France"}, {"input": "big"}]
TEMPLATE = "Q: {input}\nA: {output}\n"


def prompt(chunk: str, pair: dict[str, str]) -> str:
    return f"{chunk}Q: {pair['input']}\nA:"


def block_outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Every block's output at every token of one text, (blocks, tokens, d), in one full forward."""
    outputs: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [block.module.register_forward_hook(see) for block in find_blocks(model)]
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(outputs)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("contrast", [None, NEGATIVE])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_last_token_vectors_are_those_of_the_steering_vectors_package(family: str, contrast: str | None) -> None:
    package = pytest.importorskip("steering_vectors")
    model, tokenizer = make_model(family), make_tokenizer()
    pairs = [(prompt(POSITIVE, pair), prompt(contrast or "", pair)) for pair in PAIRS]
    theirs = package.train_steering_vector(model, tokenizer, pairs, batch_size=1)
    ours = thought_vectors(model, tokenizer, POSITIVE, PAIRS, contrast=contrast, template=TEMPLATE, tokens="last")
    expected = torch.stack([theirs.layer_activations[i] for i in range(3)]).double()
    assert relative(ours, expected) < 1e-10


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("contrast", [None, NEGATIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_over_all_tokens(family: str, contrast: str | None, bos: bool) -> None:
    """Outputs count where they are given; the attention sink at position 0 of a plain run does not."""
    model, tokenizer = make_model(family), make_tokenizer(bos=bos)
    pairs = [{**pair, "output": "cold fox"} for pair in PAIRS]
    differences = []
    for pair in pairs:
        texts = [f"{prompt(chunk, pair)} {pair['output']}\n" for chunk in (POSITIVE, contrast or "")]
        positive, negative = (block_outputs(model, tokenizer, text) for text in texts)
        plain = len(tokenizer(texts[1].removeprefix(contrast or ""))["input_ids"])
        rest = plain - 1  # without BOS the first plain token is left out, with it BOS itself is in both runs
        differences.append(positive[:, -rest:] - negative[:, -rest:])
        if bos:
            differences.append(positive[:, :1] - negative[:, :1])
    expected = torch.cat(differences, dim=1).mean(dim=1)
    ours = thought_vectors(model, tokenizer, POSITIVE, pairs, contrast=contrast, template=TEMPLATE, batch_size=2)
    assert ours.dtype == torch.float64
    assert relative(ours, expected) < 1e-10


def test_contrast_is_the_difference_of_the_vectors_against_nothing() -> None:
    model, tokenizer = make_model(), make_tokenizer()

    def vectors(chunk: str, **options: Any) -> Tensor:
        return thought_vectors(model, tokenizer, chunk, PAIRS, template=TEMPLATE, **options)

    torch.testing.assert_close(
        vectors(POSITIVE, contrast=NEGATIVE), vectors(POSITIVE) - vectors(NEGATIVE), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(
        vectors(POSITIVE, contrast=NEGATIVE), -vectors(NEGATIVE, contrast=POSITIVE), rtol=1e-10, atol=1e-12
    )
    assert float(vectors(POSITIVE, contrast=POSITIVE).abs().max()) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_patch_adds_to_the_output_of_its_blocks(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = prompt(POSITIVE, PAIRS[0])
    plain = block_outputs(model, tokenizer, text)
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64)
    patch = vector_patch(model, {1: vector}, scale=0.5)
    with patch.applied(model):
        patched = block_outputs(model, tokenizer, text)
    torch.testing.assert_close(patched[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(patched[1], plain[1] + 0.5 * vector, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(patched[2], plain[2])
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_best_block_against_full_forwards_of_a_changed_copy() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    vectors = thought_vectors(model, tokenizer, POSITIVE, PAIRS[:2], template=TEMPLATE, tokens="last")

    def last(lm: PreTrainedModel, chunk: str, pair: dict[str, str]) -> Tensor:
        with torch.no_grad():
            return lm(**tokenizer(prompt(chunk, pair), return_tensors="pt")).logits[0, -1:]

    expected = []
    for index, vector in enumerate(vectors):
        changed = copy.deepcopy(model)
        find_blocks(changed)[index].sites["mlp_out"].layer.bias = torch.nn.Parameter(2 * vector)
        kls = [float(token_kl(last(model, POSITIVE, pair), last(changed, "", pair))) for pair in PAIRS]
        expected.append(np.mean(kls))
    block, found = best_block(model, tokenizer, vectors, POSITIVE, PAIRS, template=TEMPLATE, scale=2.0)
    assert found == pytest.approx(expected, rel=1e-5)
    assert block == int(np.argmin(expected))


@pytest.mark.parametrize("family", ["phi", "opt", "gpt_neo"])
@torch.no_grad()
def test_vectors_of_other_families(family: str) -> None:
    """A block's output is the same thing where attention and MLP are parallel."""
    model, tokenizer = make_family(family, torch.float64), make_tokenizer()
    vectors = thought_vectors(model, tokenizer, POSITIVE, PAIRS, template=TEMPLATE, tokens="last")
    differences = []
    for pair in PAIRS:
        here, there = (block_outputs(model, tokenizer, prompt(chunk, pair))[:, -1] for chunk in (POSITIVE, ""))
        differences.append(here - there)
    assert relative(vectors, torch.stack(differences).mean(0)) < 1e-6  # GPT-Neo attends in float32
    plain = block_outputs(model, tokenizer, prompt("", PAIRS[0]))[1]
    with vector_patch(model, {1: vectors[1]}, scale=2.0).applied(model):
        patched = block_outputs(model, tokenizer, prompt("", PAIRS[0]))[1]
    assert relative(patched - plain, (2 * vectors[1]).expand_as(plain)) < 1e-6


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "a norm, a gate or a factor stands between its MLP and its output"),
        ("granite", "a norm, a gate or a factor"),
        ("gemma4_text", "a norm, a gate or a factor"),
        ("qwen2_moe", "a norm, a gate or a factor"),
        ("mixtral", "its MLP is a mixture of experts"),
    ],
)
def test_blocks_whose_output_is_not_their_mlps_sum_are_refused(family: str, why: str) -> None:
    model, tokenizer = make_family(family), make_tokenizer()
    for refused in (
        lambda: thought_vectors(model, tokenizer, POSITIVE, PAIRS, template=TEMPLATE),
        lambda: vector_patch(model, {0: torch.ones(32)}),
    ):
        with pytest.raises(UnsupportedModelError, match=f"not supported: a vector on the output of block 0: {why}"):
            refused()


def test_bad_input() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ThoughtError, match='tokens must be "all" or "last"'):
        thought_vectors(model, tokenizer, POSITIVE, PAIRS, tokens="first")  # type: ignore[arg-type]
    with pytest.raises(ThoughtError, match="contrast is empty"):
        thought_vectors(model, tokenizer, POSITIVE, PAIRS, contrast=" ")
    with pytest.raises(ThoughtError, match="instruction"):
        thought_vectors(model, tokenizer, None, PAIRS)
    with pytest.raises(ThoughtError, match="context window"):
        thought_vectors(model, tokenizer, "pirate " * 300, PAIRS)
    with pytest.raises(ThoughtError, match="blocks 0 to 2; got one for block 3"):
        vector_patch(model, {3: torch.zeros(32)})
    with pytest.raises(ThoughtError, match=r"vectors\[1\] must be \(32,\)"):
        vector_patch(model, {1: torch.zeros(31)})


def test_a_contrasting_prompt_that_is_too_long_is_refused() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=512)
    model = AutoModelForCausalLM.from_config(config).eval()
    pairs = [{"input": "hot", "output": "cold"}]
    with pytest.raises(ThoughtError, match="64"):
        thought_vectors(model, make_tokenizer(), "Be kind.\n", pairs, contrast="fox " * 100)


def test_vectors_of_another_model_are_refused_before_anything_runs() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    vectors = thought_vectors(model, tokenizer, POSITIVE, PAIRS, template=TEMPLATE)
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    for wrong in (vectors[:2], vectors[:, :5], vectors[0]):
        with pytest.raises(ThoughtError, match=r"^vectors: expected one of .* width for each of its 3 blocks"):
            best_block(model, tokenizer, wrong, POSITIVE, PAIRS, template=TEMPLATE)
