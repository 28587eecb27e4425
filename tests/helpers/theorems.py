"""Models, tokens and recorded runs for the tests of the exact theorems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fits import Untouched
from models import CORPUS, FAMILIES, make_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from lit_thought.model.blocks import find_blocks

INSTRUCTION = "You are a pirate. Talk like a pirate.\n"
TEXT = CORPUS[0]
CASES = [*((family, "vector") for family in FAMILIES), ("gemma3", "vector"), ("gemma3", "norm_scale")]


def make_any(family: str) -> PreTrainedModel:
    """A tiny float64 model of any family, Gemma 3 included: four blocks, sliding and full attention in turn."""
    if family != "gemma3":
        return make_model(family)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=8, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # they start at 0, which would hide that the scale is 1 + weight
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def tokens_of(tokenizer: Any, instruction: str = INSTRUCTION, text: str = TEXT) -> tuple[Tensor, Tensor, list[int]]:
    """Plain ids, instructed ids and the counterparts of the plain tokens, put together by hand."""
    bare = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (instruction, text)]
    bos = tokenizer(text)["input_ids"][: len(tokenizer(text)["input_ids"]) - len(bare[1])]
    chunk = len(bare[0])
    positions = [*range(len(bos)), *range(len(bos) + chunk, len(bos) + chunk + len(bare[1]))]
    return torch.tensor([bos + bare[1]]), torch.tensor([bos + bare[0] + bare[1]]), positions


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor, original: PreTrainedModel | None = None) -> dict[str, Any]:
    """Entrance, m, norm(m) and output of each block, and the logits, of one run: (length, d) each.

    ``original``: the model of which ``model`` is a copy with other layers in it, which do not run on any tokens.
    """
    seen: dict[str, Any] = {name: [] for name in ("entrance", "m", "a", "o")}
    handles = []
    paths = {module: path for path, module in (original or model).named_modules()}
    for block in find_blocks(original or model):
        module, norm = (model.get_submodule(paths[part]) for part in (block.module, block.mlp_norm))
        handles.append(module.register_forward_pre_hook(lambda _, given: seen["entrance"].append(given[0][0])))
        handles.append(norm.register_forward_hook(lambda _, given, out: seen["m"].append(given[0][0])))
        handles.append(norm.register_forward_hook(lambda _, given, out: seen["a"].append(out[0])))
        handles.append(
            module.register_forward_hook(
                lambda _, given, out: seen["o"].append((out[0] if isinstance(out, tuple) else out)[0])
            )
        )
    seen["logits"] = model(ids).logits[0]
    for handle in handles:
        handle.remove()
    return seen


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def largest(got: Tensor, wanted: Tensor) -> float:
    """The largest ‖got − wanted‖ / ‖wanted‖ over tokens."""
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Checks that the model is bit for bit as it was after the block, free of hooks."""
    before = Untouched(model)
    yield
    before.check()
    assert hooks_on(model) == 0
