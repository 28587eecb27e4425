"""Random patches of tiny models, and what a model is with them."""

from __future__ import annotations

from typing import Any

import torch
from models import make_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_thought.model.loading import fingerprint
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors

IDS = torch.arange(12).reshape(2, 6)


def output_projections(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the attention's and the MLP's output projection in each block."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj")):
            shape = tuple(module.weight.shape)
            found[path] = shape[::-1] if isinstance(module, Conv1D) else shape
    assert len(found) == 6
    return found


def make_patch(
    model: nn.Module, seed: int = 0, rank: int = 2, every: int = 1, marked: bool = True, size: float = 0.2
) -> ThoughtPatch:
    """A random patch of every ``every``-th output projection; ``marked`` with the model's fingerprint."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(
            torch.randn(rank, d_in, generator=generator) * size,
            torch.randn(d_out, rank, generator=generator) * size,
        )
        for path, (d_out, d_in) in list(output_projections(model).items())[::every]
    }
    provenance = {"model": "tiny", "fingerprint": fingerprint(model), "instruction": "Talk like a pirate."}
    return ThoughtPatch(factors, provenance if marked else None)


def make_vectors(model: nn.Module, seed: int = 0, every: int = 1, size: float = 0.5) -> dict[str, Tensor]:
    """A random thought vector for every ``every``-th output projection, the last one first."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = list(output_projections(model).items())[::-every]
    return {path: torch.randn(d_out, generator=generator) * size for path, (d_out, _) in shapes}


def with_vectors(patch: ThoughtPatch, seed: int = 0, every: int = 1, family: str = "llama") -> ThoughtPatch:
    return ThoughtPatch(patch.factors, patch.provenance, make_vectors(make_model(family), seed, every))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Equal to the last bit (so -0.0 is not 0.0)."""
    return all(
        torch.equal(value.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8))
        for name, value in model.state_dict().items()
    )


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def uneven(model: PreTrainedModel, seed: int = 1) -> ThoughtPatch:
    """A random patch of ranks 5 and 2 in turn, with the provenance that a fit writes."""
    factors = make_patch(model, seed, rank=3, every=2) + make_patch(model, seed + 1, rank=2)
    kind = model.config.model_type
    known = {"base_model": "someone/base", "model_type": kind, "fan_in_fan_out": kind == "gpt2"}
    return ThoughtPatch(factors.factors, {**known, "fingerprint": fingerprint(model)})
