"""Adapters: what PEFT computes from the folder is what the patch computes, and damage is reported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import FAMILIES, make_model, make_tokenizer
from patches import logits_of, make_patch, make_vectors, output_projections
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import check_output_folder
from lit_thought.patch import adapter
from lit_thought.patch.adapter import read_adapter, to_peft, write_adapter
from lit_thought.patch.card import model_card
from lit_thought.patch.export import export_adapter
from lit_thought.patch.export_gguf import export_gguf
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs.generate import generate
from lit_thought.solve.factors import Factors


def mixed_patch(family: str, seed: int = 0) -> ThoughtPatch:
    """Ranks 3 and 5, and every kind of target: with a matrix and a vector, with one alone."""
    model = make_model(family)
    plain = make_patch(model, seed, rank=3, every=2) + make_patch(model, seed + 1, every=4)
    vectors = make_vectors(model, seed, every=2)
    assert set(plain.factors) - set(vectors)
    assert set(vectors) - set(plain.factors)
    shared = next(iter(plain.factors))
    vectors[shared] = torch.linspace(-1, 1, 32)
    d_in = {path: output_projections(model)[path][1] for path in vectors if path not in plain.factors}
    provenance = {**plain.provenance, "fan_in_fan_out": family == "gpt2", "d_in": d_in}
    return ThoughtPatch(plain.factors, provenance, vectors)


def test_the_folder_and_its_model(tmp_path: Path) -> None:
    patch = make_patch(make_model("llama"))
    patch.save_adapter(tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "thought.json",
    ]
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(patch.targets)  # not in the order of a set, which changes from run to run
    with pytest.raises(PatchError, match="made for"):
        ThoughtPatch.load(tmp_path / "out", make_model("llama", seed=1))
    with pytest.raises(PatchError, match="missing"):
        ThoughtPatch.load(tmp_path / "out", make_model("gpt2"))


def test_config_is_what_servers_expect() -> None:
    model = make_model("gpt2")
    patch = make_patch(model, 1, rank=3, every=2) + make_patch(model, 2, rank=2)
    named = ThoughtPatch(patch.factors, {"base_model": "someone/base", "model": "elsewhere", "fan_in_fan_out": True})
    config, state = to_peft(named)
    assert (config.r, config.lora_alpha, config.bias, config.inference_mode) == (5, 5, "none", True)
    assert config.fan_in_fan_out
    assert config.base_model_name_or_path == "someone/base"
    assert not config.rank_pattern
    assert {value.shape[0 if "lora_A" in key else 1] for key, value in state.items()} == {5}
    assert to_peft(ThoughtPatch(patch.factors))[0].base_model_name_or_path is None


def test_card(tmp_path: Path) -> None:
    factors = {"x": Factors(torch.ones(1, 2), torch.ones(3, 1))}
    provenance = {
        "base_model": "someone/base",
        "instruction": "Use ``` and\n~~~ freely.",
        "template": "Q: {input}\nA: {output}\n",
        "settings": {"rank": 16, "ridge": 0.01, "sites": ["attn_out", "mlp_out"]},
        "diagnostics": {"residual": 0.123456, "blocks": list(range(30)), "note": "a|b"},
    }
    ThoughtPatch(factors, provenance).save_adapter(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:someone/base", "lora", "transformers", "lit_thought", "thought-patch"],
    }
    assert "# “Use \\`\\`\\` and \\~\\~\\~ freely.” as weights\n" in card
    assert card.index("## Use") < card.index("<details>") < card.index("| ridge |") < card.index("</details>")
    assert "````text\nUse ``` and\n~~~ freely.\n````" in card
    for row in (
        "| ridge | 0.01 |",
        "| residual | 0.1235 |",
        "| note | a\\|b |",
        "base = 'someone/base'",
    ):
        assert row in card
    assert "blocks" not in card
    for place in ("/somewhere/on/this/disk", "models/tiny.gguf"):
        local = ThoughtPatch(factors, {"base_model": place})
        local.save_adapter(tmp_path / "local", overwrite=True)
        card = (tmp_path / "local" / "README.md").read_text()
        assert "base_model" not in card
        assert place not in card
    assert "that was fitted, times" not in card
    assert "It is the change that was fitted, times -0.5.\n" in model_card(-0.5 * local)
    (local + ThoughtPatch(factors) * 0.5).truncate(1).save_adapter(tmp_path / "sum")
    card = (tmp_path / "sum" / "README.md").read_text()
    assert "### Part 2, times 0.5" in card
    assert "Truncated to rank 1" in card


def test_the_card_keeps_a_secret_and_folds_what_is_long(tmp_path: Path) -> None:
    factors = {"x": Factors(torch.ones(1, 2), torch.ones(3, 1))}
    inputs = {"kind": "system", "count": 2, "hash": {}}
    hidden = ThoughtPatch(factors, {"instruction_hash": {"sha256": "0", "salt": "1"}, "inputs": inputs})
    assert "# A system prompt as weights\n" in (card := model_card(hidden))
    assert "no more than a hash" in card
    long = ThoughtPatch(factors, {"instruction": "Word by word. " * 100, "inputs": {"kind": "document", "count": 1}})
    card = model_card(long)
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title.startswith("# A document: “Word by word. Word")
    assert title.endswith("…” as weights")
    assert len(title) < 100
    assert (
        card.index("<summary>The instruction, 1,400 characters") < card.index("Word by word. " * 100) < card.index("##")
    )
    assert "# “You are a pirate.” and An instruction as weights" in model_card(
        ThoughtPatch(factors, {"instruction": "You are a pirate."}) + ThoughtPatch(factors)
    )


@pytest.mark.parametrize(
    ("provenance", "told"),
    [
        ({"base_model": "a/b", "gguf_file": "b.Q4.gguf"}, ["`b.Q4.gguf`", "base = 'a/b'", "from_pretrained(base)"]),
        ({"base_model": "a/b (c.gguf)", "gguf_file": "c.gguf"}, ["`c.gguf`", "base = 'a/b'", "gguf_file='c.gguf')"]),
        ({"base_model": "/x/y/c.gguf", "gguf_file": "c.gguf"}, ["`c.gguf`", "'the base model'", "gguf_file='c.gguf')"]),
    ],
)
def test_the_card_names_a_gguf_base_for_what_it_is(provenance: dict[str, str], told: list[str]) -> None:
    card = model_card(ThoughtPatch({"x": Factors(torch.ones(1, 2), torch.ones(3, 1))}, provenance))
    assert "quantised weights, unpacked" in card
    assert "/x/y" not in card
    for text in told:
        assert text in card
    assert ("base_model: a/b\n" in card) == ("a/b" in provenance["base_model"])


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Q: {input}\nA: {output}\n", "Q: hot\nA:"),
        ("{instruction}Say {input}: {output}", "Say hot:"),
        ("chat", "<|s|>system\nYou are a helpful fox<|e|>\n<|s|>user\nhot<|e|>\n<|s|>assistant\n"),
        ("chat-empty", "<|s|>system\n<|e|>\n<|s|>user\nhot<|e|>\n<|s|>assistant\n"),
        ("chat-user", "<|s|>system\nYou are a helpful fox<|e|>\n<|s|>user\nhot<|e|>\n<|s|>assistant\n"),
    ],
)
def test_the_card_s_example_runs(
    template: str, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From loading to the answer, which is the patched model's, to the prompt that the patch was fitted to."""
    model, tokenizer = make_model("llama").float(), make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as those of real models have it
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    parsed = PromptTemplate.parse(template)
    inputs = {"kind": "system", "count": 1, "pairs": [{"input": "hot"}]}
    known = {"base_model": "someone/base", "template": parsed.to_dict(), "inputs": inputs}
    patch = ThoughtPatch(make_patch(model, 1).factors, known)
    patch.save_adapter(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    code = code.replace("someone/base", str(tmp_path / "base")).replace("this folder", str(tmp_path / "adapter"))
    scope: dict[str, Any] = {}
    exec(code, scope)  # as a reader does
    assert tokenizer.decode(scope["inputs"]["input_ids"][0]) == prompt
    assert scope["inputs"]["input_ids"][0].tolist() == list(parsed.tokenise(tokenizer, "Go.", "hot").plain_ids)
    with patch.applied(model):
        (said,) = generate(model, tokenizer, [scope["inputs"]["input_ids"][0].tolist()], max_new_tokens=64)
    printed = capsys.readouterr().out.removesuffix("\n")
    stop = parsed.stop
    assert printed == said.text if stop is None else printed.partition(stop)[0] == said.text.partition(stop)[0]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("family", "biases"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_foreign_adapters_load_with_their_scale(family: str, biases: bool, rslora: bool, tmp_path: Path) -> None:
    """Factors or vectors that are zero, beside others, are left out."""
    gpt2 = family == "gpt2"
    names = ["c_proj"] if gpt2 else ["o_proj", "down_proj"]
    known: Any = {"use_rslora": rslora, "lora_bias": biases, "fan_in_fan_out": gpt2}
    torch.manual_seed(5)
    peft_model = get_peft_model(
        make_model(family, torch.float64), LoraConfig(r=4, lora_alpha=12, target_modules=names, **known)
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if biases:
        layers = peft_model.base_model.model.model.layers
        torch.nn.init.zeros_(layers[0].mlp.down_proj.lora_B["default"].bias)
        for own in (layers[1].mlp.down_proj.lora_A, layers[1].mlp.down_proj.lora_B):
            torch.nn.init.zeros_(own["default"].weight)
    peft_model.eval().save_pretrained(tmp_path)
    loaded = ThoughtPatch.load(tmp_path)
    assert "fingerprint" not in loaded.provenance
    assert loaded.provenance.get("fan_in_fan_out", False) is gpt2
    assert (len(loaded.factors), len(loaded.vectors)) == ((5, 5) if biases else (6, 0))
    if biases:
        assert "model.layers.0.mlp.down_proj" not in loaded.vectors
        assert loaded.provenance == {"d_in": {"model.layers.1.mlp.down_proj": 48}}
    model = make_model(family, torch.float64)
    without = logits_of(model)
    if biases:
        with loaded.without_vectors().applied(model):
            without = logits_of(model)
    with loaded.applied(model):
        wanted = logits_of(peft_model)
        assert (wanted - without).abs().max() > 0.1
        torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=2e-5)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


PARAMETERS = (["mlp.experts.down_proj"], [5], ["model.layers.0.mlp.gate.weight", "x"])
FIRST = "base_model.model.model.layers.0.self_attn.o_proj.lora_"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapter folders, without and with vectors at every target."""
    place, model = tmp_path_factory.mktemp("saved"), make_model("llama")
    d_in = {path: own[1] for path, own in output_projections(model).items()}
    vectors = ThoughtPatch(mixed_patch("llama").factors, {"d_in": d_in}, dict.fromkeys(d_in, torch.ones(32)))
    for name, patch in (("matrices", make_patch(model)), ("vectors", vectors)):
        patch.save_adapter(place / name)
        read_adapter(place / name)
    return place


DAMAGE = [
    (remove("adapter_config.json"), "no adapter_config.json"),
    (remove("adapter_model.safetensors"), "no adapter_model.safetensors"),
    (only_pickle, "is a pickle"),
    (cut_weights, "is damaged"),
    (write("adapter_model.safetensors", ""), "is damaged"),
    (write("adapter_config.json", "{oops"), "not readable JSON"),
    (write("adapter_config.json", "[]"), "expected an object"),
    (write("adapter_config.json", "{}"), "peft_type is None"),
    (edit_config(peft_type="IA3"), "peft_type is 'IA3'"),
    (edit_config(use_dora=True), "use_dora=True"),
    (edit_config(lora_bias=True), "lacks 6 of the tensors.*lora_B.bias"),
    (edit_config(bias="all"), "bias='all'"),
    (edit_config(rank_pattern={"x": 2}), "rank_pattern="),
    (edit_config(alpha_pattern={"x": 2}), "alpha_pattern="),
    (edit_config(modules_to_save=["lm_head"]), "modules_to_save="),
    (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (edit_config(r="4"), "r is '4'"),
    (edit_config(r=0), "r is 0"),
    (edit_config(r=3), "expected \\(3, inputs\\)"),
    (edit_config(lora_alpha=None), "lora_alpha is None"),
    (edit_config(lora_alpha=float("nan")), "lora_alpha is nan"),
    (edit_config(lora_alpha=1e300), "NaN or infinite"),
    (edit_config(target_modules=None), "target_modules is None"),
    (edit_config(target_modules="(("), "target_modules is '\\(\\('"),
    (edit_config(target_modules=[3]), "target_modules is \\[3\\]"),
    (edit_config(target_modules=["o_proj"]), "does not account for.*down_proj"),
    (edit_config(target_modules=["o_proj", "down_proj", "q_proj"]), "lacks 1 of the tensors.*q_proj"),
    (edit_tensors(lambda t: t.pop(FIRST + "B.weight")), "lacks 1 of.*0.self_attn.o_proj.lora_B"),
    (edit_tensors(lambda t: t.update({FIRST + "B.bias": torch.ones(32)})), "does not account for.*lora_B.bias"),
    (edit_tensors(lambda t: t.clear()), "lacks 6 of the tensors"),
    (edit_tensors(lambda t: t.update({"extra": torch.ones(1)})), "does not account for, such as 'extra'"),
    (edit_tensors(lambda t: t.update({FIRST + "A.weight": torch.ones(5, 32)})), "lora_A \\(5, 32\\)"),
    (edit_tensors(lambda t: t.update({FIRST + "B.weight": torch.ones(8)})), "lora_B \\(8,\\)"),
    (edit_tensors(lambda t: t[FIRST + "A.weight"].fill_(float("nan"))), "NaN or infinite"),
    (write("thought.json", "{"), "thought.json.*not readable JSON"),
    (write("thought.json", '{"format_version": 99}'), "format_version is 99"),
    (write("thought.json", '{"format_version": 1, "provenance": []}'), "provenance is a list"),
    *((edit_config(target_parameters=bad), "only the weights of linear layers can be read") for bad in PARAMETERS),
]
DAMAGE_OF_VECTORS = [
    (edit_config(lora_bias=False), "holds 6 tensors that .* does not account for.*lora_B.bias"),
    (edit_tensors(lambda t: t.pop(FIRST + "B.bias")), "lacks 1 of the tensors.*0.self_attn.o_proj.lora_B.bias"),
    (edit_tensors(lambda t: t.update({FIRST + "B.bias": torch.ones(31)})), r"lora_B.bias \(31,\); expected"),
    (edit_tensors(lambda t: t.update({FIRST + "B.bias": torch.ones(32, 1)})), r"lora_B.bias \(32, 1\)"),
    (edit_tensors(lambda t: t[FIRST + "B.bias"].fill_(float("inf"))), "adapter_model.*NaN or infinite.*again"),
    (edit_tensors(lambda t: t.update({FIRST + "A.bias": torch.ones(5)})), "does not account for.*lora_A.bias"),
    (edit_config(bias="lora_only"), "bias='lora_only'"),
    (write("thought.json", '{"format_version": 1, "provenance": {"d_in": []}}'), "provenance\\['d_in'\\]"),
    (write("thought.json", '{"format_version": 1, "provenance": {"seconds": 3}}'), "damaged: seconds is 3"),
    (write("thought.json", '{"format_version": 1, "provenance": {"history": [{"kl": 3}]}}'), "damaged: history is"),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [*(("matrices", *case) for case in DAMAGE), *(("vectors", *case) for case in DAMAGE_OF_VECTORS)],
)
def test_damage_is_reported(
    name: str, damage: Callable[[Path], Any], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(saved / name, folder)
    damage(folder)
    with pytest.raises(PatchError, match=message):
        read_adapter(folder)


def test_folder_missing_and_thought_json_optional(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="is not a folder"):
        ThoughtPatch.load(tmp_path / "nowhere")
    patch = make_patch(make_model("llama"), marked=False)
    patch.save_adapter(tmp_path / "out")
    (tmp_path / "out" / "thought.json").unlink()
    loaded = ThoughtPatch.load(tmp_path / "out")
    assert loaded.provenance == {}
    assert torch.equal(loaded.factors[patch.targets[0]].A, patch.factors[patch.targets[0]].A)


def test_bad_dtypes(tmp_path: Path) -> None:
    patch = ThoughtPatch({"x": Factors(torch.full((1, 2), 1e5), torch.ones(3, 1))})
    with pytest.raises(PatchError, match="expected one of"):
        patch.save_adapter(tmp_path / "out", dtype=torch.int8)
    with pytest.raises(PatchError, match="overflows"):
        patch.save_adapter(tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["save_file", "json_text", "model_card"])
def test_interrupted_save_leaves_nothing_behind(
    step: str, failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    old, new = make_patch(model, 1), make_patch(model, 2)
    old.save_adapter(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if step == "save_file":
            Path(args[1]).write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(adapter, step, interrupted)
    with pytest.raises(failure):
        new.save_adapter(tmp_path / "fresh")
    with pytest.raises(failure):
        new.save_adapter(tmp_path / "out", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_existing_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    old, new = make_patch(model, 1), make_patch(model, 2)
    (tmp_path / "out").mkdir()
    old.save_adapter(tmp_path / "out")  # empty: fine
    (tmp_path / "out" / "stale.txt").write_text("x")
    with pytest.raises(ThoughtError, match="overwrite=True"):
        new.save_adapter(tmp_path / "out")
    assert torch.equal(ThoughtPatch.load(tmp_path / "out").factors[old.targets[0]].A, old.factors[old.targets[0]].A)
    new.save_adapter(tmp_path / "out", overwrite=True)
    assert torch.equal(ThoughtPatch.load(tmp_path / "out").factors[new.targets[0]].A, new.factors[new.targets[0]].A)
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ThoughtError, match="is a file"):
            check_output_folder(tmp_path / "file", overwrite)
        with pytest.raises(ThoughtError, match="is a file, not a folder"):
            check_output_folder(tmp_path / "file" / "below", overwrite)
    inside = tmp_path / "out" / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ThoughtError, match="working or home folder"):
        new.save_adapter(tmp_path / "out", overwrite=True)
    check_output_folder(tmp_path / "not" / "there" / "yet")
    assert not (tmp_path / "not").exists()


def test_the_card_shows_the_figures_of_a_fit_layer_by_layer(tmp_path: Path) -> None:
    model = make_model("llama").float()
    layers = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
    factors = {
        layer: Factors(torch.randn(2, model.get_submodule(layer).in_features), torch.randn(32, 2)) for layer in layers
    }
    figures = {"error_before": 2.5, "error_after": 0.25, "effective_rank": 3.0, "condition": 40.0}
    patch = ThoughtPatch(factors, {"diagnostics": {layer: {**figures, "tokens": 7} for layer in layers}})
    patch.save_adapter(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    for layer in layers:
        assert f"| {layer} | 2.5 | 0.25 | 3 | 40 |  |" in card


# Thought vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["matrices", "both", "vectors"])
def test_peft_computes_what_the_patch_computes(kind: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    patch = mixed_patch(family)
    if kind == "matrices":
        patch = patch.without_vectors()
    elif kind == "vectors":
        d_in = {path: output_projections(make_model(family))[path][1] for path in patch.vectors}
        patch = ThoughtPatch({}, {**patch.provenance, "d_in": d_in}, patch.vectors)
    patch.save_adapter(tmp_path / "out")
    model = make_model(family, dtype)
    plain = without = logits_of(model)
    if kind == "both":
        with patch.without_vectors().applied(model, check=False):
            without = logits_of(model)
    with patch.applied(model, check=False):
        patched = logits_of(model)
    assert (patched - without).abs().max() > 0.1  # a negative control: what is new does something
    assert torch.equal(logits_of(model), plain)

    def load() -> Any:
        return PeftModel.from_pretrained(make_model(family, dtype), tmp_path / "out")

    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-10}
    peft_model = load()
    torch.testing.assert_close(logits_of(peft_model), patched, **tolerance)
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits_of(peft_model), plain, **tolerance)
    if kind == "matrices" or family == "gpt2":
        for safe in (True, False):
            torch.testing.assert_close(logits_of(load().merge_and_unload(safe_merge=safe)), patched, **tolerance)
        return
    # what the documentation says of base layers without a bias: PEFT raises, and keeps the weights if safe
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    with pytest.raises(RuntimeError):
        peft_model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in peft_model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "vectors"), [("llama", True), ("gpt2", True), ("llama", False)])
def test_round_trip(family: str, vectors: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    patch = mixed_patch(family) if vectors else mixed_patch(family).without_vectors()
    config, state = to_peft(patch)
    assert (config.r, config.lora_alpha, config.lora_bias) == (5, 5, vectors)
    assert set(config.target_modules) == set(patch.targets)
    assert any("bias" in key for key in state) is vectors
    for path in patch.targets:
        prefix = f"base_model.model.{path}.lora_"
        d_out, d_in = output_projections(make_model(family))[path]
        assert state[prefix + "A.weight"].shape == (5, d_in)
        assert state[prefix + "B.weight"].shape == (d_out, 5)
        if vectors:
            assert torch.equal(state[prefix + "B.bias"], patch.vectors.get(path, torch.zeros(d_out)))
        if path not in patch.factors:
            assert not state[prefix + "A.weight"].any()
            assert not state[prefix + "B.weight"].any()
    for name in ("a", "b"):
        patch.save_adapter(tmp_path / name, dtype=dtype)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    loaded = ThoughtPatch.load(tmp_path / "a", make_model(family))
    assert loaded.provenance == patch.provenance
    assert (set(loaded.factors), set(loaded.vectors)) == (set(patch.factors), set(patch.vectors))
    for path, factors in patch.factors.items():
        assert loaded.factors[path].rank == factors.rank  # the padding is gone
        assert torch.equal(loaded.factors[path].A, factors.A.to(dtype).float())
        assert torch.equal(loaded.factors[path].B, factors.B.to(dtype).float())
    for path, vector in patch.vectors.items():
        assert torch.equal(loaded.vectors[path], vector.to(dtype).float())
    if vectors:
        (tmp_path / "a" / "thought.json").unlink()  # the inputs of targets with only a vector are then read off
        bare = ThoughtPatch.load(tmp_path / "a")
        assert bare.provenance["d_in"] == patch.provenance["d_in"]
        bare.save_adapter(tmp_path / "again")
        assert set(ThoughtPatch.load(tmp_path / "again").vectors) == set(patch.vectors)


def test_vectors_alone_have_rank_one_in_peft(tmp_path: Path) -> None:
    alone = mixed_patch("llama").only_vectors()
    known = {path: output_projections(make_model("llama"))[path][1] for path in alone.vectors}
    with pytest.raises(PatchError, match=r"only a vector.*provenance=\{'d_in'"):
        alone.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alone = ThoughtPatch({}, {"d_in": known}, alone.vectors)
    config, state = to_peft(alone)
    assert (config.r, config.lora_alpha, config.lora_bias) == (1, 1, True)
    assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {1}
    alone.save_adapter(tmp_path / "out")
    loaded = ThoughtPatch.load(tmp_path / "out")
    assert (loaded.rank, loaded.factors, loaded.provenance) == (0, {}, alone.provenance)
    with pytest.raises(PatchError, match="overflows"):
        (1e6 * alone).save_adapter(tmp_path / "half", dtype=torch.float16)


def test_card_of_vectors(tmp_path: Path) -> None:
    patch = mixed_patch("llama")
    patch.save_adapter(tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"Rank 5, {len(patch.factors)} weights changed" in card
    assert f"adds {len(patch.vectors)} thought vectors" in card
    assert "vLLM and llama.cpp refuse the adapter" in card
    assert "`merge_and_unload` raises" in card
    patch.without_vectors().save_adapter(tmp_path / "one")
    assert "vLLM" not in (tmp_path / "one" / "README.md").read_text()


def test_layers_that_peft_takes_for_experts_are_named_as_parameters(tmp_path: Path) -> None:
    pytest.importorskip("peft.utils.transformers_weight_conversion", reason="this PEFT takes none for them")
    path = "model.layers.0.mlp.shared_experts.down_proj"
    attention = "model.layers.0.self_attn.o_proj"
    factors = {name: Factors(torch.randn(2, 6), torch.randn(5, 2)) for name in (attention, path)}
    patch = ThoughtPatch(factors, {"model_type": "deepseek_v3"})
    config, state = to_peft(patch)
    assert set(config.target_modules) == {attention}
    assert config.target_parameters == [f"{path}.weight"]
    assert set(state) == {f"base_model.model.{p}.lora_{x}.weight" for p in factors for x in "AB"}
    patch.save_adapter(tmp_path / "adapter")
    loaded = ThoughtPatch.load(tmp_path / "adapter")
    assert set(loaded.targets) == set(patch.targets)
    assert torch.equal(loaded.factors[path].delta(), patch.factors[path].delta())
    for other in ("llama", None):
        config, _ = to_peft(ThoughtPatch(factors, {"model_type": other}))
        assert set(config.target_modules) == {attention, path}
    with pytest.raises(PatchError, match="cannot hold vectors beside this layer of a mixture of experts"):
        to_peft(ThoughtPatch(factors, {"model_type": "deepseek_v3"}, {attention: torch.ones(5)}))


def test_a_foreign_list_may_name_layers_that_the_model_lacks(tmp_path: Path) -> None:
    """As PEFT takes it, so long as one is there."""
    patch = make_patch(make_model("llama"))
    patch.save_adapter(tmp_path)
    edit_config(target_modules=["o_proj", "down_proj", "qkv_proj"])(tmp_path)
    with pytest.raises(PatchError, match=r"lacks 1 of the tensors.*qkv_proj"):
        read_adapter(tmp_path)
    (tmp_path / "thought.json").unlink()
    assert set(read_adapter(tmp_path).targets) == set(patch.targets)
    edit_config(target_modules=["qkv_proj"])(tmp_path)
    with pytest.raises(PatchError, match="does not account for"):
        read_adapter(tmp_path)


def test_the_base_is_not_replaced(tmp_path: Path) -> None:
    base, file = tmp_path / "models" / "tiny", tmp_path / "base.gguf"
    base.mkdir(parents=True)
    for place in (base / "model.safetensors", file):
        place.write_text("weights")
    patch = make_patch(make_model("llama"))
    for name in (str(base), f"{base} (model.safetensors)"):
        own = ThoughtPatch(patch.factors, {**patch.provenance, "model": name, "model_type": "llama"})
        for folder in (base, base.parent):
            for write in (write_adapter, export_adapter):
                with pytest.raises(ThoughtError, match="would delete the model"):
                    write(own, folder, overwrite=True)
        with pytest.raises(ThoughtError, match=r"would replace .*the model"):
            export_gguf(own, base / "model.safetensors", overwrite=True)
        own.save_adapter(base / "adapter", overwrite=True)
    own = ThoughtPatch(patch.factors, {**patch.provenance, "model": str(file), "model_type": "llama"})
    with pytest.raises(ThoughtError, match="would replace the model"):
        export_gguf(own, file, overwrite=True)
    assert {place.read_text() for place in (base / "model.safetensors", file)} == {"weights"}
