"""Exports: what other programs read from them is what the patch does, and what cannot be exported is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import make_family
from fits import make_patch
from models import FAMILIES, make_model, make_tokenizer
from patches import logits_of, make_vectors, same, snapshot, uneven
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_thought.cli import main
from lit_thought.errors import PatchError, ThoughtError, UnsupportedModelError
from lit_thought.patch.export import VLLM_RANKS, export_adapter, export_merged
from lit_thought.patch.export_gguf import export_gguf
from lit_thought.patch.gguf_files import gguf_architecture
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors


def with_vectors(model: PreTrainedModel) -> ThoughtPatch:
    patch = uneven(model)
    return ThoughtPatch(patch.factors, patch.provenance, make_vectors(model))


def patched_logits(patch: ThoughtPatch, model: PreTrainedModel) -> torch.Tensor:
    with patch.applied(model, check=False):
        return logits_of(model)


# PEFT and vLLM


@pytest.mark.parametrize(("rank", "written"), [(None, 8), (16, 16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_has_one_rank_that_vllm_takes(family: str, rank: int | None, written: int, tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    patch = uneven(model)
    export_adapter(patch, tmp_path / "out", rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (written, written)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["bias"] == "none"
    assert not any(config[option] for option in ("lora_bias", "use_rslora", "use_dora"))
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert name.endswith(("lora_A.weight", "lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in name else 1] == written
    peft_model = PeftModel.from_pretrained(make_model(family, torch.float32), tmp_path / "out")
    torch.testing.assert_close(logits_of(peft_model), patched_logits(patch, model), rtol=0, atol=1e-5)
    assert (logits_of(peft_model) - logits_of(model)).abs().max() > 0.1
    loaded = ThoughtPatch.load(tmp_path / "out", model)
    for path, value in patch.factors.items():
        assert torch.equal(loaded.factors[path].A, value.A)
        assert torch.equal(loaded.factors[path].B, value.B)


def test_ranks_are_those_of_vllm() -> None:
    """``MaxLoRARanks`` in vLLM's ``config/lora.py``: as of 0.26, or, where vLLM is installed, as it is there."""
    known = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    if importlib.util.find_spec("vllm") is not None:
        from typing import get_args

        from vllm.config.lora import MaxLoRARanks

        known = get_args(MaxLoRARanks)
    assert known == VLLM_RANKS


def test_the_rank_is_the_smallest_that_will_do_or_refused(tmp_path: Path) -> None:
    for needed, rank, found in (
        *((1, None, 1), (2, None, 8), (8, None, 8), (129, None, 256), (257, None, 320), (512, None, 512)),
        (9, 12, r"rank=12; vLLM takes one of \(1, 8, 16"),
        (9, 0, "rank=0; vLLM takes one of"),
        (9, 8, r"rank=8 is less than the patch's, 9.*truncate\(8\)"),
        (513, None, r"rank 513; vLLM takes at most 512.*truncate\(512\)"),
    ):
        patch = ThoughtPatch({"x": Factors(torch.ones(needed, 3), torch.ones(2, needed))})
        out = tmp_path / f"{needed} {rank}"
        if isinstance(found, int):
            export_adapter(patch, out, rank)
            assert json.loads((out / "adapter_config.json").read_text())["r"] == found
            continue
        with pytest.raises(PatchError, match=found):
            export_adapter(patch, out, rank)
        assert not out.exists()


def test_vectors_are_refused_with_the_ways_out(tmp_path: Path) -> None:
    patch = with_vectors(make_model("llama", torch.float32))
    for export in (export_adapter, export_gguf):
        with pytest.raises(PatchError, match=r"6 thought vectors.*control-vector.*without_vectors\(\).*merged"):
            export(patch, tmp_path / "out")
        export(patch.without_vectors(), tmp_path / export.__name__)
    assert not (tmp_path / "out").exists()


def test_adapters_are_swapped_on_one_base(tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    plain = logits_of(model)
    patches = {name: uneven(model, seed) for name, seed in (("one", 1), ("two", 5))}
    wanted = {name: patched_logits(patch, model) for name, patch in patches.items()}
    for name, patch in patches.items():
        export_adapter(patch, tmp_path / name)
    served = PeftModel.from_pretrained(model, tmp_path / "one", adapter_name="one")
    served.load_adapter(tmp_path / "two", adapter_name="two")
    assert (wanted["one"] - wanted["two"]).abs().max() > 0.1
    for name in ("one", "two", "one"):
        served.set_adapter(name)
        torch.testing.assert_close(logits_of(served), wanted[name], rtol=0, atol=1e-5)
        with served.disable_adapter():
            assert torch.equal(logits_of(served), plain)


# GGUF

# model_type -> architecture, by llama.cpp's own table
NAMES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gpt2", "phi3")},
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "phi": "phi2",
    "gpt_neox": "gptneox",
    "cohere": "command-r",
    "olmo3": "olmo2",
}
LAYERS = {
    **dict.fromkeys(("o_proj", "dense", "attn.c_proj"), "attn_output"),
    **dict.fromkeys(("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"), "ffn_down"),
}
"""Endings of transformers' names -> llama.cpp's."""


def random_patch(model: PreTrainedModel, endings: tuple[str, ...], rank: int = 3) -> ThoughtPatch:
    """A random patch of the layers whose names end so; every other one of rank 1."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for path, module in model.named_modules():
        if path.endswith(endings):
            d_out, d_in = (module.nf, module.nx) if hasattr(module, "nf") else module.weight.shape
            own = rank if len(factors) % 2 else 1
            factors[path] = Factors(
                torch.randn(own, d_in, generator=generator), torch.randn(d_out, own, generator=generator)
            )
    return ThoughtPatch(factors, {"model_type": model.config.model_type, "base_model": "someone/base"})


@pytest.mark.parametrize("family", NAMES)
def test_the_gguf_file_holds_what_llama_cpp_reads(family: str, tmp_path: Path) -> None:
    """As ``llama-adapter.cpp`` reads it: pairs by name, a.ne = (d_in, r), b.ne = (r, d_out), scale alpha / b.ne[0]."""
    model = make_family(family)
    patch = random_patch(model, tuple(LAYERS))
    blocks = model.config.num_hidden_layers
    assert len(patch.targets) == 2 * blocks
    export_gguf(patch, tmp_path / "out.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {
        "general.architecture": (NAMES[family], gguf.GGUFValueType.STRING),
        "general.type": ("adapter", gguf.GGUFValueType.STRING),
        "adapter.type": ("lora", gguf.GGUFValueType.STRING),
        "adapter.lora.alpha": (3.0, gguf.GGUFValueType.FLOAT32),
        "general.base_model.0.name": ("someone/base", gguf.GGUFValueType.STRING),
    }
    for key, (value, kind) in fields.items():
        field = reader.get_field(key)
        assert field is not None
        assert (field.contents(), field.types) == (value, [kind])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(patch.targets)
    for path, value in patch.factors.items():
        number = re.search(r"\.(\d+)\.", path)
        assert number is not None
        layer = next(name for ending, name in LAYERS.items() if path.endswith(ending))
        a, b = (tensors[f"blk.{number[1]}.{layer}.weight.{part}"] for part in ("lora_a", "lora_b"))
        assert a.tensor_type == b.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(a.shape) == [value.A.shape[1], 3]  # GGUF counts the fastest dimension first
        assert list(b.shape) == [3, value.B.shape[0]]
        missing = 3 - value.rank
        assert a.data.tobytes() == np.pad(value.A.numpy(), ((0, missing), (0, 0))).tobytes()
        assert b.data.tobytes() == np.pad(value.B.numpy(), ((0, 0), (0, missing))).tobytes()


@pytest.mark.parametrize(
    ("family", "endings", "layers"),
    [
        ("llama", ("gate_proj", "up_proj"), {"ffn_gate", "ffn_up"}),
        ("gpt2", ("c_fc",), {"ffn_up"}),
        ("phi3", ("gate_up_proj",), {"ffn_up"}),
        ("qwen2_moe", ("shared_expert.down_proj",), {"ffn_down_shexp"}),
    ],
)
def test_layers_at_other_sites(family: str, endings: tuple[str, ...], layers: set[str], tmp_path: Path) -> None:
    model = make_family(family)
    export_gguf(random_patch(model, endings), tmp_path / "out.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors]
    assert (
        len(names) == len(set(names)) == 2 * len([path for path, _ in model.named_modules() if path.endswith(endings)])
    )
    assert {name.split(".")[2] for name in names} == layers


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    factors = Factors(torch.ones(1, 3), torch.ones(2, 1))
    patch = ThoughtPatch({"model.language_model.layers.7.mlp.down_proj": factors}, {"model_type": "gemma3"})
    export_gguf(patch, tmp_path / "out.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").tensors[0].name == "blk.7.ffn_down.weight.lora_a"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gguf_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    patch = uneven(make_model("llama", torch.float32))
    export_gguf(patch, tmp_path / "out.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    kind = "F16" if dtype == torch.float16 else "BF16"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for path, value in patch.factors.items():
        name = path.replace("model.layers", "blk").replace("self_attn.o_proj", "attn_output")
        a = tensors[f"{name.replace('mlp.down_proj', 'ffn_down')}.weight.lora_a"]
        assert a.tensor_type.name == kind
        bits = np.frombuffer(a.data.tobytes(), np.int16).reshape(5, -1)[: value.rank]
        assert np.array_equal(bits, value.A.to(dtype).view(torch.int16).numpy())
    huge = ThoughtPatch(
        {path: Factors(1e30 * value.A, value.B) for path, value in patch.factors.items()}, patch.provenance
    )
    if dtype == torch.float16:
        with pytest.raises(PatchError, match=r"float16 cannot hold the factors of 'model\.layers\.0.*overflows"):
            export_gguf(huge, tmp_path / "huge.gguf", dtype=dtype)
        assert not (tmp_path / "huge.gguf").exists()


def test_what_cannot_be_a_gguf_adapter(tmp_path: Path) -> None:
    factors = Factors(torch.ones(1, 3), torch.ones(2, 1))

    def refused(path: str, model_type: str | None, message: str, kind: type[ThoughtError] = PatchError) -> None:
        known = {} if model_type is None else {"model_type": model_type}
        with pytest.raises(kind, match=message):
            export_gguf(ThoughtPatch({path: factors}, known), tmp_path / "out.gguf")
        assert list(tmp_path.iterdir()) == []

    down = "model.layers.0.mlp.down_proj"
    refused(down, None, "does not say which architecture.*Pass model_type")
    refused(down, "opt", "model_type='opt': the gguf package knows no such architecture", UnsupportedModelError)
    refused("model.layers.0.mlp.down_proj", "falcon_h1", "stores its layers scaled", UnsupportedModelError)
    refused("model.layers.0.mlp.experts.1.down_proj", "mixtral", "has no name for it", UnsupportedModelError)
    refused("model.layers.0.mlp.w9", "llama", r"w9': the gguf package has no name for it", UnsupportedModelError)
    refused("model.layers.0.self_attn.q_proj", "llama", r"q_proj' is neither.*convert_lora_to_gguf\.py")
    refused("lm_head", "llama", "'lm_head' is neither")
    with pytest.raises(PatchError, match=r"dtype=torch\.float64; expected one of"):
        export_gguf(ThoughtPatch({down: factors}), tmp_path / "out.gguf", "llama", torch.float64)
    export_gguf(ThoughtPatch({down: factors}), tmp_path / "out.gguf", "llama")
    with pytest.raises(ThoughtError, match="overwrite=True"):
        export_gguf(ThoughtPatch({down: factors}), tmp_path / "out.gguf", "llama")
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]


STEERING = ThoughtPatch({}, None, {"model.layers.1.mlp.down_proj": torch.ones(32)})


def write_adapter(file: Path, factor: float, overwrite: bool = False) -> None:
    export_gguf(factor * uneven(make_model("llama", torch.float32)), file, overwrite=overwrite)


def write_vector(file: Path, factor: float, overwrite: bool = False) -> None:
    (factor * STEERING).save_control_vector(file, make_model("llama"), overwrite)


@pytest.mark.parametrize("write", [write_adapter, write_vector])
def test_gguf_is_written_whole_or_not_at_all(
    write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "out.gguf"
    write(file, 1)
    before = file.read_bytes()
    with pytest.raises(ThoughtError, match="overwrite=True"):
        write(file, 2)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(file, 2, overwrite=True)
    assert [entry.name for entry in file.parent.iterdir()] == ["out.gguf"]
    assert file.read_bytes() == before
    write(file, 2, overwrite=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    "action",
    [
        lambda file: write_adapter(file, 1),
        lambda file: write_vector(file, 1),
        lambda file: ThoughtPatch.load_control_vector(file, make_model("llama")),
    ],
)
def test_gguf_is_asked_for_where_it_is_missing(
    action: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ThoughtError, match=r'pip install "lit-thought\[gguf\]"'):
        action(tmp_path / "out.gguf")


def test_architectures_that_gguf_lacks_have_no_name() -> None:
    assert gguf_architecture("opt") is None
    assert gguf_architecture("granite_swa") is None
    assert gguf_architecture("gpt_oss") == "gpt-oss"
    assert gguf_architecture("qwen3_moe") == "qwen3moe"
    assert gguf_architecture("llama4_text") == "llama4"


# A merged model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_patched_one(family: str, tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    patch = uneven(model)
    before = snapshot(model)
    export_merged(patch, model, tmp_path / "out", make_tokenizer())
    assert same(model, before)
    assert not list((tmp_path / "out").glob("*.bin"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), patched_logits(patch, model), rtol=0, atol=1e-5)
    assert (logits_of(merged) - logits_of(model)).abs().max() > 0.1
    assert merged.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Q: hot").input_ids == make_tokenizer()("Q: hot").input_ids
    assert json.loads((tmp_path / "out" / "thought.json").read_text())["provenance"] == patch.provenance


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_half_precision_stays_and_sums_are_rounded_once(stored: torch.dtype | None, tmp_path: Path) -> None:
    """A base in bfloat16, the patch fitted on it in float32 as fits load it; or a base in float32, stored in half."""
    half = make_model("llama", torch.bfloat16)
    whole = make_model("llama", torch.bfloat16).float()
    patch = uneven(whole)
    export_merged(patch, half if stored is None else whole, tmp_path / "out", dtype=stored)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in whole.state_dict().items():
        change = patch.factors.get(name.removesuffix(".weight"))
        wanted = value if change is None else value + torch.from_numpy(change.B.numpy() @ change.A.numpy())
        # one unit in the last place, where the two float32 products differ at a rounding boundary
        torch.testing.assert_close(found[name].float(), wanted.bfloat16().float(), rtol=2**-7, atol=0)
    assert sum(not torch.equal(found[name].float(), whole.state_dict()[name]) for name in found) == 6
    assert whole.dtype == torch.float32
    with pytest.raises(PatchError, match="made for"):
        export_merged(patch, make_model("llama", torch.bfloat16, seed=1), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_models_own_folder_is_not_replaced(tmp_path: Path) -> None:
    make_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(ThoughtError, match=r"folder=.* with overwrite=True would delete the model"):
        export_merged(uneven(model), model, tmp_path / "base", overwrite=True)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = make_model("gpt2", torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    patch = uneven(model)
    for dtype in (None, torch.bfloat16):
        export_merged(patch, model, tmp_path / "out", dtype=dtype, overwrite=True)
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert merged.lm_head.weight is merged.transformer.wte.weight


def test_vectors_are_merged_where_there_are_biases(tmp_path: Path) -> None:
    gpt2 = make_model("gpt2", torch.float32)
    patch = with_vectors(gpt2)
    export_merged(patch, gpt2, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), patched_logits(patch, gpt2), rtol=0, atol=1e-5)
    llama = make_model("llama", torch.float32)
    homeless, matrices = with_vectors(llama), uneven(llama)
    message = r"has no bias in this architecture.*save_adapter"
    with pytest.raises(PatchError, match=message):
        export_merged(homeless, llama, tmp_path / "llama")
    # nor may the bias be one that another patch has made
    with homeless.only_vectors().applied(llama), pytest.raises(PatchError, match=message):
        export_merged(matrices, llama, tmp_path / "llama")
    with homeless.only_vectors().applied(llama), pytest.raises(PatchError, match=message):
        export_merged(homeless, llama, tmp_path / "llama")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("own", "stored", "least"),
    [
        (torch.bfloat16, torch.float32, 0.9),
        (torch.float16, torch.bfloat16, 0.99),
        (torch.bfloat16, torch.float16, 0.99),
    ],
)
def test_sums_are_not_rounded_to_the_dtype_that_is_left(
    own: torch.dtype, stored: torch.dtype, least: float, tmp_path: Path
) -> None:
    """A patch that the model's own dtype would lose much of, against NumPy's sum in float64."""
    model = make_model("llama", own)
    patch = 1e-3 * uneven(model)
    export_merged(patch, model, tmp_path / "out", dtype=stored)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for path, change in patch.factors.items():
        weight = model.get_submodule(path).weight.detach().double().numpy()
        wanted = torch.from_numpy(weight + change.B.double().numpy() @ change.A.double().numpy())
        # but for a few at a rounding boundary
        assert (found[f"{path}.weight"] == wanted.to(stored)).double().mean() > least
    assert model.dtype == own


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_a_patch_that_is_on_the_model_is_not_merged_twice(stored: torch.dtype | None, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    patch = uneven(model)
    with patch.applied(model), pytest.raises(PatchError, match="applied to the model already"):
        export_merged(patch, model, tmp_path / "out", dtype=stored)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    from quantised import quantise_

    model = make_model("llama", torch.float32)
    patch = uneven(model)
    with pytest.raises(PatchError, match=r"dtype=torch\.int8"):
        export_merged(patch, model, tmp_path / "out", dtype=torch.int8)
    with pytest.raises(PatchError, match="made for"):
        export_merged(patch, make_model("llama", torch.float32, seed=1), tmp_path / "out")
    export_merged(patch, make_model("llama", torch.float32, seed=1), tmp_path / "unchecked", check=False)
    with pytest.raises(PatchError, match=r"float16 cannot hold the merged model"):
        export_merged(1e8 * patch, model, tmp_path / "out", dtype=torch.float16)
    half = make_model("llama", torch.float16)
    before = snapshot(half)
    with pytest.raises(PatchError, match=r"float16 cannot hold 'model\..*' with the patch on it: a value overflows"):
        export_merged(1e8 * patch, half, tmp_path / "out", check=False)
    assert same(half, before)
    assert not (tmp_path / "out").exists()
    quantise_(model, "8bit")
    with pytest.raises(PatchError, match=r"quantised weight cannot hold the patch.*peft and gguf"):
        export_merged(patch, model, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


# The command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a base in bfloat16, and adapters that were fitted on it in float32."""
    base = make_model("llama", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    patch = uneven(base.float())
    patch.save_adapter(tmp_path / "adapter")
    vectors = {path: value for path, value in make_vectors(base).items() if re.search(r"[12]\.mlp", path)}
    with_inputs = {**patch.provenance, "d_in": dict.fromkeys(vectors, 48)}
    ThoughtPatch({}, with_inputs, vectors).save_adapter(tmp_path / "steering")
    return tmp_path


def test_the_command_writes_every_format(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = ThoughtPatch.load(files / "adapter")
    main(["export", str(files / "adapter"), "--out", str(files / "served"), "--rank=16", "--dtype=bfloat16"])
    assert "Loading" not in capsys.readouterr().err
    assert json.loads((files / "served" / "adapter_config.json").read_text())["r"] == 16
    assert {t.dtype for t in load_file(files / "served" / "adapter_model.safetensors").values()} == {torch.bfloat16}

    main(["export", f"--adapter={files / 'adapter'}", "--format=gguf", f"--out={files / 'a.gguf'}"])
    export_gguf(patch, files / "b.gguf")
    assert (files / "a.gguf").read_bytes() == (files / "b.gguf").read_bytes()
    assert capsys.readouterr().err.endswith(f"Wrote 0.0 MB to {files / 'a.gguf'}\n")

    base = f"--model={files / 'base'}"
    main(["export", str(files / "adapter"), "--format=merged", base, f"--out={files / 'merged'}"])
    merged = AutoModelForCausalLM.from_pretrained(files / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    with patch.applied(half := make_model("llama", torch.bfloat16), check=False):
        assert same(half, merged.state_dict())
    assert (files / "merged" / "tokenizer.json").is_file()
    main(["export", str(files / "adapter"), "--format=merged", base, f"--out={files / 'whole'}", "--dtype=float32"])
    assert AutoModelForCausalLM.from_pretrained(files / "whole", dtype="auto").dtype == torch.float32

    main(["export", str(files / "steering"), "--format=control-vector", base, f"--out={files / 'steer.gguf'}"])
    names = [tensor.name for tensor in gguf.GGUFReader(files / "steer.gguf").tensors]
    assert names == ["direction.1", "direction.2"]


@pytest.mark.parametrize("fitted", [torch.float32, torch.bfloat16])
def test_the_command_merges_into_another_dtype_than_the_bases(fitted: torch.dtype, tmp_path: Path) -> None:
    """A base that is stored in float32, with a patch that was fitted on it in the one or the other dtype."""
    base = make_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    patch = uneven(base.to(fitted))
    patch.save_adapter(tmp_path / "adapter")
    options = [f"--model={tmp_path / 'base'}", f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]
    main(["export", str(tmp_path / "adapter"), "--format=merged", *options])
    found = load_file(tmp_path / "out" / "model.safetensors")
    with patch.applied(base, check=False):
        assert all(torch.equal(value, base.state_dict()[name].bfloat16()) for name, value in found.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=gguf", "--rank=8"], "--rank 8 has no use for the format gguf"),
        (["--model=smollm2"], "--model smollm2 has no use for the format peft"),
        (["--format=merged", "--model_type=llama"], "--model_type llama has no use for the format merged"),
        (["--format=control-vector", "--model=base"], "changes 6 weights"),
        (["--format=onnx"], "onnx"),
        (["--adapter=nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    files: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(["export", str(files / "adapter"), f"--out={files / 'out'}", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


def test_what_is_there_is_kept_unless_asked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, out in (
        ("peft", "adapter"),
        ("gguf", "base/config.json"),
        ("merged", "base"),
        ("control-vector", "base"),
    ):
        adapter = files / ("steering" if kind == "control-vector" else "adapter")
        with pytest.raises(SystemExit):
            main(["export", str(adapter), f"--format={kind}", f"--out={files / out}"])
        assert re.search("pass --overwrite|is a folder; expected a file", error := capsys.readouterr().err)
        assert "Loading" not in error
    main(["export", str(files / "adapter"), "--format=gguf", f"--out={files / 'base/config.json'}", "--overwrite=true"])
    assert (files / "base" / "config.json").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_patch_stands_on_is_asked_for_in_half_precision_too(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_model("llama", torch.bfloat16)
    whole = make_model("llama", torch.bfloat16).float()
    beneath = uneven(whole)
    with beneath.applied(whole):
        above = make_patch(whole, rank=2)
    with pytest.raises(PatchError, match="made on top of 1 other"):
        export_merged(above, base.to(dtype), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_merged(beneath + above, base, tmp_path / "both")


def test_a_merge_leaves_the_config_and_asks_for_a_tokenizer_first(tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    patch, before = uneven(model), {name: repr(value) for name, value in vars(model.config).items()}
    with pytest.raises(ThoughtError, match="tokenizer must be a tokenizer"):
        export_merged(patch, model, tmp_path / "out", "smollm2")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    export_merged(patch, model, tmp_path / "out", make_tokenizer())
    assert {name: repr(value) for name, value in vars(model.config).items()} == before
