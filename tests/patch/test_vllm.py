"""vLLM's own loader on an exported adapter: it takes the settings, the names and the numbers.

Serving needs a GPU; reading an adapter does not. Names and arguments as of vLLM 0.33.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import make_model
from patches import make_patch

from lit_thought.errors import PatchError
from lit_thought.patch.export import export_adapter
from lit_thought.patch.patch import ThoughtPatch

TAKEN = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
"""Modules that vLLM replaces in Llama, packed ones under either name."""


@pytest.fixture
def exported(tmp_path: Path) -> tuple[ThoughtPatch, Path]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    patch = make_patch(make_model("llama", torch.float32), rank=3)
    export_adapter(patch, tmp_path / "adapter")
    return patch, tmp_path / "adapter"


def test_its_settings_are_legal_and_the_rank_is_checked(exported: tuple[ThoughtPatch, Path]) -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(exported[1]), max_position_embeddings=None)
    assert (helper.r, helper.vllm_lora_scaling_factor) == (8, 1.0)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(LoRAConfig(max_lora_rank=1))


def test_it_reads_the_patch(exported: tuple[ThoughtPatch, Path]) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    patch, folder = exported
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    # "cpu" alone would be put in pinned memory, for which it takes a GPU
    found = LoRAModel.from_local_checkpoint(str(folder), TAKEN, helper, lora_model_id=1, device="cpu:0")
    assert found.loras.keys() == patch.factors.keys()
    for path, layer in found.loras.items():
        change = layer.scaling * layer.lora_b @ layer.lora_a
        torch.testing.assert_close(change, patch.factors[path].delta(torch.float32), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected target modules"):
        LoRAModel.from_local_checkpoint(str(folder), {"down_proj"}, helper, lora_model_id=2, device="cpu:0")


def test_what_it_refuses_is_refused_here(exported: tuple[ThoughtPatch, Path]) -> None:
    """A bias."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    patch, folder = exported
    vectors = ThoughtPatch(patch.factors, patch.provenance, {"model.layers.1.mlp.down_proj": torch.ones(32)})
    vectors.save_adapter(folder.parent / "vectors")
    helper = PEFTHelper.from_local_dir(str(folder.parent / "vectors"), max_position_embeddings=None)
    with pytest.raises(ValueError, match="bias"):
        helper.validate_legal(LoRAConfig(max_lora_rank=8))
    with pytest.raises(PatchError, match="vLLM"):
        export_adapter(vectors, folder.parent / "other")
