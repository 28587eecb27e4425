"""GGUF weights that are unpacked as they are loaded: those that transformers unpacks, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from gguf_files import write_gguf, write_like
from models import FAMILIES, make_model, make_tokenizer
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from lit_thought.model import loading, unpacking
from lit_thought.model.loading import load_model

gguf = pytest.importorskip("gguf")

STREAMED = {
    "llama": {},  # the rows of q and k are rearranged
    "qwen2": {},  # has biases
    "gemma3_text": {},  # one is taken from the norms' weights; embeddings are tied, and scaled by a buffer
    "gpt2": {"n_positions": 1024},  # matrices are transposed, embeddings tied
    "bloom": {},  # names are those of the inner model, q, k and v are rearranged together, embeddings tied
}
LEFT = {
    "gpt2": {"n_positions": 1024, "tie_word_embeddings": False},  # the head goes another way than by its name
    "qwen3_moe": {"moe_intermediate_size": 768, "mlp_only_layers": [], "attention_bias": False},
}


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A GGUF file of a tiny model, of some family with some of its configuration changed."""
    family, changes = request.param
    file = tmp_path / "tiny.gguf"
    model = make_model(family, torch.float32) if family in FAMILIES else make_family(family, torch.float32)
    if changes:
        model = type(model)(type(model.config).from_dict({**model.config.to_dict(), **changes}))
    if family == "llama":
        write_gguf(file, tokens=False, model=model)
    else:
        write_like(file, model)
    return file


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that tells two models apart; tensors as bytes, so that -0 and NaN count."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}  # some buffers are in no state_dict
    places = {name: value.data_ptr() for name, value in tensors.items()}
    bits = {name: value.contiguous().view(-1).view(torch.uint8).tolist() for name, value in tensors.items()}
    return {
        "dtypes": {name: (value.dtype, value.shape, value.device) for name, value in tensors.items()},
        "bits": {name: (value.dtype, bits[name]) for name, value in tensors.items()},
        "tied": {(one, other) for one in places for other in places if places[one] == places[other]},
        "modules": {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def by_transformers(file: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    with monkeypatch.context() as alone:
        alone.setattr(loading, "open_gguf", lambda file, dtype: None)
        return load_model(file, dtype=dtype, tokenizer=make_tokenizer())[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("file", STREAMED.items(), indirect=True, ids=list(STREAMED))
def test_the_model_is_the_one_that_transformers_unpacks(
    file: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "_CHUNK", 100)  # several parts a tensor, the last of them shorter
    packed = unpacking.open_gguf(file, getattr(torch, dtype))
    assert packed is not None
    seen: list[str] = []
    unpack = unpacking.PackedWeight.__getitem__
    monkeypatch.setattr(
        unpacking.PackedWeight, "__getitem__", lambda self, at: seen.append(self.tensor.name) or unpack(self, at)
    )
    found = state(load_model(file, dtype=dtype, tokenizer=make_tokenizer())[0])
    assert sorted(seen) == sorted(weight.tensor.name for weight in packed.state_dict.values())
    wanted = state(by_transformers(file, dtype, monkeypatch))
    for key, value in wanted.items():
        assert found[key] == value, key


@pytest.mark.parametrize("file", [("llama", {})], indirect=True)
def test_weights_that_a_model_keeps_in_float32(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["mlp.down_proj"])
    found = state(load_model(file, dtype="bfloat16", tokenizer=make_tokenizer())[0])
    assert found["dtypes"]["model.layers.0.mlp.down_proj.weight"][0] == torch.float32
    assert found["dtypes"]["model.layers.0.mlp.up_proj.weight"][0] == torch.bfloat16
    assert found == state(by_transformers(file, "bfloat16", monkeypatch))


@pytest.mark.parametrize("file", LEFT.items(), indirect=True, ids=list(LEFT))
def test_what_takes_more_is_left_to_transformers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpacking.open_gguf(file, torch.float32) is None
    model, _ = load_model(file, tokenizer=make_tokenizer())
    assert state(model) == state(by_transformers(file, "float32", monkeypatch))


@pytest.mark.parametrize("file", [("llama", {})], indirect=True)
def test_architectures_that_transformers_has_a_newer_loader_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.gguf import utils

    monkeypatch.setitem(utils.GGUF_ARCHS, "llama", None)
    assert unpacking.open_gguf(file, torch.float32) is None


@pytest.mark.parametrize("file", [("llama", {})], indirect=True)
def test_the_quick_reader_reads_what_gguf_reads(file: Path) -> None:
    genuine = gguf.GGUFReader
    with unpacking.quick_reader():
        quick = gguf.GGUFReader(file)
        with pytest.raises(FileNotFoundError), unpacking.quick_reader():
            gguf.GGUFReader(file.parent / "none.gguf")
    assert gguf.GGUFReader is genuine
    assert type(quick) is not genuine
    slow = genuine(file)
    assert list(quick.fields) == list(slow.fields)
    assert all(quick.fields[name].contents() == field.contents() for name, field in slow.fields.items())
    for mine, theirs in zip(quick.tensors, slow.tensors, strict=True):
        assert (mine.name, mine.tensor_type, mine.data_offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert (mine.data == theirs.data).all()
