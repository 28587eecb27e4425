"""The main job on the embedded SmolLM2: the figures that the tutorial of demonstrations promises, within some room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lit_thought import ThoughtPatch, transmute
from lit_thought.evaluation.compare import Evaluation
from recipes.harness import TEMPLATE, Split, load_split

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split("common_words/antonym", seed=3)


@pytest.fixture(scope="module")
def patch(smollm2: tuple[Any, Any], split: Split) -> ThoughtPatch:
    return transmute(*smollm2, split.instruction, split.fit, TEMPLATE, max_new_tokens=12, progress=False)


def test_the_plain_prompt_behaves_like_the_instructed_one(
    smollm2: tuple[Any, Any], split: Split, patch: ThoughtPatch
) -> None:
    before = {name: value.clone() for name, value in smollm2[0].state_dict().items()}
    evaluation = Evaluation(
        *smollm2, instruction=split.instruction, pairs=split.test, template=TEMPLATE, max_new_tokens=12, progress=False
    )
    result = evaluation.score(patch)
    accuracy = result["accuracy"]
    assert accuracy["plain"] <= 0.1
    assert accuracy["instructed"] >= 0.6
    assert accuracy["patched"] >= 0.8 * accuracy["instructed"]
    assert result["fidelity"] >= 0.7
    assert result["output_kl"]["patched"] <= 0.1 * result["output_kl"]["plain"]
    assert result["perplexity_ratio"] <= 1.04
    assert result["prompt_tokens"]["saved"] >= 70
    assert all(before[name].equal(value) for name, value in smollm2[0].state_dict().items())


def test_the_adapter_is_small_and_peft_loads_the_same_model(
    smollm2: tuple[Any, Any], split: Split, patch: ThoughtPatch, tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    patch.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size <= 7e6
    ids = tokenizer("Q: tall\nA:", return_tensors="pt")
    with torch.no_grad():
        plain = model(**ids).logits
        with patch.applied(model):
            direct = model(**ids).logits
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
        loaded = adapted(**ids).logits
        adapted.unload()
        assert (loaded - plain).abs().max() > 1
        assert (loaded - direct).abs().max() < 1e-4 * direct.abs().max()


def test_a_system_prompt_becomes_weights(smollm2: tuple[Any, Any]) -> None:
    """Chat template with SmolLM2's own default system message on the plain side."""
    questions = [
        "What is the capital of France?", "How do I boil an egg?", "Why is the sky blue?", "Tell me about dogs.",
        "What should I eat tonight?", "How do planes fly?", "Give me advice on sleep.", "What is a computer?",
    ]  # fmt: skip
    instruction = "You are a pirate. Talk like a pirate."
    pairs = [{"input": question} for question in questions]
    patch = transmute(*smollm2, instruction, pairs, "chat", max_new_tokens=30, progress=False)
    held_out = [{"input": "What is the moon made of?"}, {"input": "How do I learn to swim?"}]
    result = Evaluation(
        *smollm2, instruction=instruction, pairs=held_out, template="chat", max_new_tokens=30, progress=False,
        unrelated=None,
    ).score(patch)  # fmt: skip
    assert result["kl"]["patched"] < 0.5 * result["kl"]["plain"]
