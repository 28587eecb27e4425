"""Control vectors: what is in the file, that it does what the patch does, and what cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import make_family
from models import FAMILIES, make_model
from patches import IDS, make_patch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.errors import PatchError, UnsupportedModelError
from lit_thought.model.loading import fingerprint
from lit_thought.patch.control_vector import write_control_vector
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors


def down(family: str, block: int) -> str:
    return f"transformer.h.{block}.mlp.c_proj" if family == "gpt2" else f"model.layers.{block}.mlp.down_proj"


def make_steering(model: PreTrainedModel, blocks: tuple[int, ...] = (1, 2), seed: int = 0) -> ThoughtPatch:
    generator = torch.Generator().manual_seed(seed)
    vectors = {down(model.config.model_type, block): torch.randn(32, generator=generator) for block in blocks}
    return ThoughtPatch({}, {"fingerprint": fingerprint(model), "instruction": "Be brief."}, vectors)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_what_llama_cpp_reads(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    patch = make_steering(model, blocks=(2, 1))
    patch.save_control_vector(tmp_path / "steer.gguf", model)
    assert [file.name for file in tmp_path.iterdir()] == ["steer.gguf"]
    reader = gguf.GGUFReader(tmp_path / "steer.gguf")
    hint = "llama" if family == "mistral" else family
    for key, value, kind in (
        ("general.architecture", "controlvector", gguf.GGUFValueType.STRING),
        ("controlvector.model_hint", hint, gguf.GGUFValueType.STRING),
        ("controlvector.layer_count", 2, gguf.GGUFValueType.UINT32),
    ):
        field = reader.get_field(key)
        assert field is not None
        assert (field.contents(), field.types) == (value, [kind])
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for block, tensor in zip((1, 2), reader.tensors, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.dtype == np.float32
        np.testing.assert_array_equal(tensor.data, patch.vectors[down(family, block)].numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_to_block_outputs_is_what_the_patch_does(family: str, tmp_path: Path) -> None:
    """As llama.cpp does it: direction.N is added to the output of block N."""
    model = make_model(family)
    patch = make_steering(model)
    write_control_vector(patch, tmp_path / "steer.gguf", model)
    directions = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "steer.gguf").tensors}
    blocks = model.transformer.h if family == "gpt2" else model.model.layers

    def adding(vector: Tensor) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return hook

    handles = [
        block.register_forward_hook(adding(directions[f"direction.{index}"]))
        for index, block in enumerate(blocks)
        if f"direction.{index}" in directions
    ]
    assert len(handles) == 2
    with torch.no_grad():
        steered = model(IDS).logits
    for handle in handles:
        handle.remove()
    for same in (patch, ThoughtPatch.load_control_vector(tmp_path / "steer.gguf", model)):
        with torch.no_grad(), same.applied(model):
            torch.testing.assert_close(model(IDS).logits, steered, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert (model(IDS).logits - steered).abs().max() > 0.1  # a negative control


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_round_trip(family: str, tmp_path: Path) -> None:
    """By way of an adapter, too."""
    model = make_model(family)
    patch = make_steering(model, blocks=(2,))
    patch.save_control_vector(tmp_path / "steer.gguf", model)
    model.name_or_path = "someone/base"
    loaded = ThoughtPatch.load_control_vector(tmp_path / "steer.gguf", model)
    size = 128 if family == "gpt2" else 48
    wanted = {"model": "someone/base", "d_in": {down(family, 2): size}}
    assert loaded.provenance == ({**wanted, "fan_in_fan_out": True} if family == "gpt2" else wanted)
    loaded.save_adapter(tmp_path / "adapter")
    for found in (loaded, ThoughtPatch.load(tmp_path / "adapter", model)):
        assert (found.factors, list(found.vectors)) == ({}, [down(family, 2)])
        assert torch.equal(found.vectors[down(family, 2)], patch.vectors[down(family, 2)])


def test_what_cannot_be_a_control_vector(tmp_path: Path) -> None:
    model = make_model("llama")
    steering = make_steering(model)

    def refused(patch: ThoughtPatch, message: str, model: PreTrainedModel = model) -> None:
        with pytest.raises(PatchError, match=message):
            patch.save_control_vector(tmp_path / "steer.gguf", model)
        assert list(tmp_path.iterdir()) == []

    refused(make_patch(model), r"changes 6 weights.*save_adapter")
    refused(make_patch(model) + steering, r"only_vectors\(\)")
    attention = ThoughtPatch({}, None, {"model.layers.1.self_attn.o_proj": torch.ones(32)})
    refused(steering + attention, r"'model\.layers\.1\.self_attn\.o_proj'.*mlp_out alone, or export with save_adapter")
    refused(make_steering(model, blocks=(0, 1)), r"block 0.*Fit blocks from 1 on.*save_adapter")
    refused(steering, "c_proj|down_proj", make_model("gpt2"))
    refused(ThoughtPatch({}, None, {down("llama", 1): torch.ones(7)}), "has 32 outputs.*7 entries")
    refused(steering, "made for", make_model("llama", seed=1))
    steering.save_control_vector(tmp_path / "steer.gguf", make_model("llama", seed=1), check=False)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3_text", "a norm, a gate or a factor stands between its MLP and its output"),
        ("granite", "a norm, a gate or a factor"),
        ("mixtral", "its MLP is a mixture of experts"),
    ],
)
def test_only_blocks_that_return_their_mlps_sum(family: str, why: str, tmp_path: Path) -> None:
    """Behind a norm, adding to the projection's output is not adding to the block's."""
    model = make_family(family)
    patch = ThoughtPatch({}, None, {down("llama", 1): torch.ones(32)})
    for refused in (
        lambda: write_control_vector(patch, tmp_path / "steer.gguf", model),
        lambda: ThoughtPatch.load_control_vector(tmp_path / "steer.gguf", model),
    ):
        with pytest.raises(UnsupportedModelError, match=f"not supported: a vector on the output of block 0: {why}"):
            refused()


def write_gguf(file: Path, architecture: str = "controlvector", hint: str = "llama", **tensors: Any) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string("controlvector.model_hint", hint)
    for name, data in tensors.items():
        writer.add_tensor(name.replace("_", "."), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONES = np.ones(32, np.float32)


def test_files_of_others_are_read(tmp_path: Path) -> None:
    for number, hint in enumerate(("llama", "mistral", "")):  # llama.cpp's name, repeng's, none
        write_gguf(tmp_path / f"{number}.gguf", hint=hint, direction_2=ONES, direction_1=2 * ONES)
        loaded = ThoughtPatch.load_control_vector(tmp_path / f"{number}.gguf", make_model("mistral"))
        assert {path: vector.unique().tolist() for path, vector in loaded.vectors.items()} == {
            "model.layers.1.mlp.down_proj": [2.0],
            "model.layers.2.mlp.down_proj": [1.0],
        }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"architecture": "llama", "direction_1": ONES}, "holds 'llama'; expected a control vector"),
        ({"hint": "qwen2", "direction_1": ONES}, "made for the architecture 'qwen2', the model is 'llama'"),
        ({}, "holds no vector"),
        ({"direction_0": ONES}, "'direction.0'; expected 'direction.N' with N from 1 to 2"),
        ({"direction_3": ONES}, "'direction.3'; expected"),
        ({"direction_01": ONES}, "'direction.01'; expected"),
        ({"direction_1": ONES, "directions": ONES}, "the tensor 'directions'"),
        ({"direction_1": ONES[:31]}, r"'direction.1' is F32 \(31,\); expected F32 \(32,\)"),
        ({"direction_1": ONES.reshape(2, 16)}, r"is F32 \(2, 16\)"),
        ({"direction_1": ONES.astype(np.float16)}, r"is F16 \(32,\)"),
        ({"direction_1": ONES * np.nan}, "NaN or infinite"),
    ],
)
def test_other_files_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "steer.gguf", **content)
    with pytest.raises(PatchError, match=message):
        ThoughtPatch.load_control_vector(tmp_path / "steer.gguf", make_model("llama"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    file = tmp_path / "steer.gguf"
    with pytest.raises(PatchError, match="is not a file"):
        ThoughtPatch.load_control_vector(file, model)
    make_steering(model).save_control_vector(file, model)
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[:-200], whole[:30], whole[:80]):
        file.write_bytes(damaged)
        with pytest.raises(PatchError, match="not a readable GGUF file"):
            ThoughtPatch.load_control_vector(file, model)


def test_a_patch_that_is_on_the_model_does_not_matter(tmp_path: Path) -> None:
    model = make_model("llama")
    patch = make_steering(model)
    other = ThoughtPatch({down("llama", 1): Factors(torch.ones(1, 48), torch.ones(32, 1))})
    with other.applied(model), patch.applied(model):
        patch.save_control_vector(tmp_path / "steer.gguf", model)
        loaded = ThoughtPatch.load_control_vector(tmp_path / "steer.gguf", model)
    assert set(loaded.vectors) == set(patch.vectors)
