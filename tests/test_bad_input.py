"""Bad input, through the public doors: a ThoughtError that names the argument, before the model has run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from fits import INSTRUCTION, PAIRS, TEXTS, Untouched, fail_at, make_patch
from huggingface_hub import constants
from models import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, evaluate, load_model, transmute
from lit_thought.errors import PatchError, SingularSystemError, ThoughtError, UnsupportedModelError
from lit_thought.fit.fitting import fit
from lit_thought.patch import adapter
from lit_thought.patch.patch import ThoughtPatch

TOKENIZER = make_tokenizer()
DECODER = type(make_model().get_decoder())


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("malformed.jsonl").write_text('{"input": "hot"}\n\n{"input": "big",\n')
    Path("no_input.jsonl").write_text('{"input": "hot"}\n{"output": "small"}\n')
    Path("empty.jsonl").write_text("\n")
    Path("taken").mkdir()
    Path("taken/precious.txt").write_text("mine")


def forbid_runs(monkeypatch: pytest.MonkeyPatch, decoder: type) -> None:
    """Any run of such a decoder fails the test, but for the one on four tokens that finds the blocks."""
    original = decoder.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids is None or input_ids.shape != (1, 4):
            pytest.fail("the model has run")
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)


@pytest.fixture
def _no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_runs(monkeypatch, DECODER)


OWN = [{**pair, "instruction": INSTRUCTION} for pair in PAIRS]

# What is wrong, as arguments of transmute, and the beginning of the message
FIT = [
    ({"pairs": ()}, "pairs is empty"),
    ({"pairs": []}, "pairs is empty"),
    ({"pairs": "empty.jsonl"}, "pairs is empty"),
    ({"pairs": "nothing.jsonl"}, r"pairs: .*nothing\.jsonl"),
    ({"pairs": "malformed.jsonl"}, r"pairs: malformed JSON in malformed\.jsonl, line 3"),
    ({"pairs": "no_input.jsonl"}, r"no_input\.jsonl, line 2: the required key 'input' is missing"),
    ({"pairs": [{"output": "cold"}]}, r"pairs\[0\]: the required key 'input'"),
    ({"pairs": [{"input": "hot", "answer": "cold"}]}, r"pairs\[0\]: unknown key 'answer'"),
    ({"pairs": [{"input": 5}]}, r"pairs\[0\]: expected 'input' to be a string"),
    ({"pairs": {"input": "hot"}}, "pairs: expected a path"),
    ({"template": "Q: {question}\nA: {output}\n"}, r"template: expected the field \{input\}"),
    ({"template": "Q: {input}\n"}, r"template: expected the field \{output\}"),
    ({"template": "chatter"}, "template: expected"),
    ({"inputs": 0}, "inputs must be"),
    ({"kind": "poem"}, "kind must be one of"),
    ({"instruction": None}, "instruction must be a text that is not empty"),
    ({"instruction": ""}, "instruction must be a text that is not empty"),
    ({"instruction": " \n"}, "instruction must be a text that is not empty"),
    ({"instruction": 5}, "instruction must be a text that is not empty"),
    ({"instruction": "hot " * 300}, "instruction: expected room for it in the model's context window of 256"),
    ({"pairs": [*PAIRS, {"input": "hot " * 300, "output": "cold"}]}, r"pairs\[5\]: expected at most 256 tokens"),
    ({"pairs": [*PAIRS, {"input": "hot"}], "max_new_tokens": 240}, r"pairs\[5\]: expected at most 256 tokens"),
    ({"rank": 33}, "rank must be between 1 and 32, .*got 33"),
    ({"rank": 0}, "rank must be between 1 and .*got 0"),
    ({"rank": -2}, "rank must be between 1 and .*got -2"),
    ({"rank": 1.5}, "rank must be an integer, a fraction .*got 1.5"),
    ({"rank": 0.0}, "rank must be an integer, a fraction"),
    ({"rank": math.nan}, "rank must be an integer, a fraction"),
    ({"rank": True}, "rank must be an integer, a fraction .*got True"),
    ({"rank": "16"}, "rank must be an integer, a fraction"),
    ({"ridge": -1e-3}, "ridge must be a finite number ≥ 0; got -0.001"),
    ({"ridge": math.nan}, "ridge must be a finite number ≥ 0; got nan"),
    ({"ridge": math.inf}, "ridge must be a finite number"),
    ({"ridge": "0.1"}, "ridge must be a finite number"),
    ({"preserve_weight": -1.0}, "preserve_weight must be a finite number ≥ 0; got -1.0"),
    ({"preserve_weight": math.nan}, "preserve_weight must be a finite number"),
    ({"preserve_tokens": 1}, "preserve_tokens must be a whole number of 2 or more; got 1"),
    ({"preserve_tokens": 1e3}, "preserve_tokens must be a whole number"),
    ({"preserve": "nothing.txt"}, "preserve='nothing.txt' cannot be read"),
    ({"preserve": []}, "preserve must hold one or more texts"),
    ({"preserve": 5}, "preserve must be a text file"),
    ({"preserve": ["a"]}, "the unrelated text gives no window"),
    ({"sites": ("mlp",)}, r"sites must name one or more of .*got \['mlp'\]"),
    ({"sites": ()}, "sites must name one or more"),
    ({"sites": 2}, r"sites must name one or more of .*got \[2\]"),
    ({"sites": ("mlp_out", "mlp_out")}, "sites must name one or more"),
    ({"parts": ()}, r"parts must name one or both of .*got \[\]"),
    ({"parts": "bias"}, r"parts must name one or both of .*got \['bias'\]"),
    ({"parts": ["vector", "vector"]}, "parts must name one or both of .*each once"),
    ({"parts": 2}, r"parts must name one or both of .*got \[2\]"),
    ({"parts": ("matrix", "vector")}, r"parts=.* with sites=\['attn_out', 'mlp_out'\]: at attn_out a matrix and"),
    ({"parts": ("vector", "matrix"), "sites": ("mlp_in", "mlp_out")}, "parts=.*: at mlp_out a matrix and a vector"),
    ({"blocks": []}, r"blocks must be indices of blocks, from 0 on; got \[\]"),
    ({"blocks": [0, -1]}, r"blocks must be indices of blocks, from 0 on; got \[0, -1\]"),
    ({"blocks": 1}, "blocks must be indices of blocks, from 0 on; got 1"),
    ({"blocks": "12"}, "blocks must be indices of blocks, from 0 on; got '12'"),
    ({"blocks": [1.0]}, "blocks must be indices of blocks"),
    ({"blocks": [True]}, "blocks must be indices of blocks"),
    ({"blocks": [1, 0, 1]}, r"blocks must name each block once; got \[1, 0, 1\]"),
    ({"blocks": [3, 0]}, "blocks: the model has blocks 0 to 2; got 3"),
    ({"steps": 0}, "steps must be a whole number of 1 or more; got 0"),
    ({"steps": 1.5}, "steps must be a whole number of 1 or more; got 1.5"),
    ({"step_size": 0}, "step_size must be above 0 and at most 1; got 0"),
    ({"step_size": 1.1}, "step_size must be above 0 and at most 1; got 1.1"),
    ({"step_size": -0.5}, "step_size must be above 0 and at most 1; got -0.5"),
    ({"step_size": math.nan}, "step_size must be above 0 and at most 1; got nan"),
    ({"step_size": True}, "step_size must be above 0 and at most 1; got True"),
    ({"step_size": "1"}, "step_size must be above 0 and at most 1; got '1'"),
    ({"pairs_per_step": 0}, "pairs_per_step must be a whole number of 1 or more; got 0"),
    ({"pairs_per_step": 6}, "pairs_per_step=6 is more than the 5 pairs there are"),
    ({"pairs_per_step": 0.5}, "pairs_per_step must be a whole number of 1 or more; got 0.5"),
    ({"val_pairs": []}, "val_pairs: pairs is empty"),
    ({"val_pairs": "nothing.jsonl"}, r"val_pairs: .*nothing\.jsonl"),
    ({"val_pairs": [{"input": "hot", "answer": "cold"}]}, r"val_pairs: pairs\[0\]: unknown key 'answer'"),
    ({"val_pairs": PAIRS, "instruction": None, "pairs": OWN}, "val_pairs: instruction must be a text that is not"),
    ({"val_pairs": [*PAIRS, {"input": "hot " * 300}]}, r"val_pairs: pairs\[5\]: expected at most 256 tokens"),
    ({"order": "parallel"}, "order must be one of .*got 'parallel'"),
    ({"batch_size": 0}, "batch_size must be a whole number"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
    ({"answer_weight": 0}, "answer_weight must be a finite number above 0"),
    ({"generate": {"num_beams": 3}, "pairs": [{"input": "hot"}]}, "generate: 'num_beams' is not supported"),
]


@pytest.mark.usefixtures("_no_forward")
@pytest.mark.parametrize(("settings", "message"), FIT, ids=[str(settings)[:40] for settings, _ in FIT])
def test_transmute(settings: dict[str, Any], message: str) -> None:
    model = make_model()
    untouched = Untouched(model)
    arguments = {"instruction": INSTRUCTION, "pairs": PAIRS, "preserve": None, "progress": False, **settings}
    with pytest.raises(ThoughtError, match=f"^{message}"):
        transmute(model, TOKENIZER, **arguments)
    untouched.check()


@pytest.mark.usefixtures("_no_forward")
def test_the_largest_rank_is_that_of_the_chosen_sites_and_blocks() -> None:
    model = make_model()
    attention = model.model.layers[1].self_attn  # two heads of 8
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(32, 16, bias=False, dtype=torch.float64))
    attention.o_proj, attention.num_key_value_groups = torch.nn.Linear(16, 32, dtype=torch.float64), 1
    for settings, limit in (
        ({"sites": ("attn_out", "mlp_out")}, 16),
        ({"sites": ("attn_out",)}, 16),
        ({"sites": ("mlp_out",)}, 32),
        ({"sites": ("mlp_in",)}, 32),
        ({"sites": ("attn_out",), "blocks": [2, 0]}, 32),
    ):
        with pytest.raises(ThoughtError, match=f"rank must be between 1 and {limit},"):
            make_patch(model, **settings, rank=33)


@pytest.mark.usefixtures("_no_forward")
def test_output_folder_is_checked_first() -> None:
    with pytest.raises(ThoughtError, match=r"output_dir='taken' is a folder that is not empty.*overwrite=True"):
        ThoughtCallback(output_dir="taken")
    with pytest.raises(ThoughtError, match="is a file; expected a folder"):
        ThoughtCallback(output_dir="taken/precious.txt", overwrite=True)
    ThoughtCallback(output_dir="taken", overwrite=True)
    assert Path("taken/precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("opt-post", "not supported: architecture 'opt' .*post-layer-norm"),
        ("jetmoe", "not supported: architecture 'jetmoe' .*no linear layer that mixes tokens writes to the residual"),
        ("gemma3n_text", "not supported: architecture 'gemma3n_text' .*several residual streams at once"),
        ("lfm2", r"not supported: architecture 'lfm2' .*other state between tokens than keys and values \(conv\)"),
        ("qwen3_next", r"not supported: architecture 'qwen3_next' .*\(linear_attention\)"),
    ],
)
def test_unsupported_models(family: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family(family)
    untouched = Untouched(model)
    forbid_runs(monkeypatch, type(model.get_decoder()))
    with pytest.raises(UnsupportedModelError, match=f"^{message}"):
        make_patch(model)
    untouched.check()


def test_something_else_than_a_model() -> None:
    with pytest.raises(ThoughtError, match="model must be a transformers causal LM; got int"):
        transmute(7, TOKENIZER, INSTRUCTION, PAIRS)  # type: ignore[arg-type]
    with pytest.raises(ThoughtError, match="tokenizer comes with a model that is given by name"):
        transmute("smollm2", TOKENIZER, INSTRUCTION, PAIRS)


def test_unknown_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (
        ("no-such-model-anywhere", "name='no-such-model-anywhere'"),
        (tmp_path / "nowhere", "there is none"),
        ("taken/precious.txt", "is a file"),
        (tmp_path / "taken", r"without a config\.json"),
        ("", "name is empty"),
    ):
        with pytest.raises(ThoughtError, match=message):
            load_model(name)
    with pytest.raises(ThoughtError, match="dtype='int8'"):
        load_model("smollm2", dtype="int8")


# --- numbers that are not ----------------------------------------------------------------------------------


def poison(model: PreTrainedModel, path: str, value: float = math.nan) -> None:
    with torch.no_grad():
        model.get_submodule(path).weight[1, 2] = value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.embed_tokens", "block 0, attn_out"),
        ("model.layers.1.self_attn.o_proj", "block 1, attn_out"),
        ("model.layers.1.mlp.up_proj", "block 1, mlp_out"),
        ("model.layers.2.mlp.down_proj", "block 2, mlp_out"),
        ("model.layers.1.post_attention_layernorm", "block 1, mlp_in"),
    ],
)
def test_nan_in_the_weights(path: str, place: str, dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    sites = ("attn_out", "mlp_in") if place.endswith("mlp_in") else ("attn_out", "mlp_out")
    if path == "model.embed_tokens":
        with torch.no_grad():
            model.get_submodule(path).weight[:, 2] = math.nan
    elif path.endswith("layernorm"):
        with torch.no_grad():
            model.get_submodule(path).weight[2] = math.nan
    else:
        poison(model, path)
    untouched = Untouched(model)
    for parts in (None, "vector") if place != "block 1, mlp_in" else (None,):  # whose vector is of what comes before
        with pytest.raises(SingularSystemError, match=f"^{place}: the activations contain NaN"):
            make_patch(model, sites=sites, parts=parts)
    untouched.check()


@pytest.mark.parametrize("path", ["self_attn.v_proj", "mlp.down_proj", "post_attention_layernorm"])
def test_nan_in_the_first_block_is_found_before_any_pair_is_read(path: str) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_submodule(f"model.layers.0.{path}").weight[2] = math.nan
    untouched = Untouched(model)
    with pytest.raises(SingularSystemError, match=r"^block 0 puts out NaN or infinite values"):
        make_patch(model)
    untouched.check()


def test_activations_that_overflow() -> None:
    model = make_model("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    untouched = Untouched(model)
    with pytest.raises(SingularSystemError, match=r"^block 1, mlp_out: .*float16 overflows"):
        make_patch(model)
    untouched.check()


def test_nan_on_the_text_to_preserve(tmp_path: Path) -> None:
    model = make_model()
    poison(model, "model.layers.1.mlp.up_proj")
    with pytest.raises(ThoughtError, match=r"^preserve: block 1 gives NaN"):
        make_patch(model, preserve=TEXTS, cache_dir=tmp_path / "kept")
    assert not list(tmp_path.glob("kept/*"))  # nothing half-made is kept


def test_no_ridge_and_too_few_tokens() -> None:
    with pytest.raises(SingularSystemError, match=r"^block 0, attn_out: the system is singular .*Use ridge > 0"):
        make_patch(make_model(), pairs=PAIRS[:1], ridge=0)


def test_a_layer_whose_inputs_all_vanish() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    with pytest.raises(SingularSystemError, match=r"^block 1, attn_out: all inputs of the layer are zero"):
        make_patch(model)


# --- patches and folders -----------------------------------------------------------------------------------


def test_a_patch_of_another_model(request: pytest.FixtureRequest) -> None:
    patch = make_patch(make_model("llama", seed=1), rank=2)
    other = make_model("llama", seed=2)
    untouched = Untouched(other)
    request.getfixturevalue("_no_forward")
    with pytest.raises(PatchError, match="this patch was made for"):
        patch.apply_(other)
    with pytest.raises(PatchError, match="this patch was made for"):
        evaluate(other, TOKENIZER, patch, instruction=INSTRUCTION, pairs=PAIRS, progress=False)
    with pytest.raises(PatchError, match=r"model\.layers"):
        patch.apply_(make_model("gpt2"), check=False)
    untouched.check()


def test_adapter_folder_with_a_missing_tensor() -> None:
    model = make_model()
    make_patch(model, rank=2).save_adapter("out")
    tensors = load_file("out/adapter_model.safetensors")
    lost = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({key: value for key, value in tensors.items() if key != lost}, "out/adapter_model.safetensors")
    for load in (ThoughtPatch.load, lambda path: evaluate(model, TOKENIZER, path, instruction="a", pairs=PAIRS)):
        with pytest.raises(PatchError, match=r"adapter_model\.safetensors lacks 1 of the tensors") as raised:
            load("out")
        assert lost in str(raised.value)


def test_interrupted_fit_keeps_the_old_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    thought = ThoughtCallback(preserve=None, output_dir="taken", overwrite=True)
    monkeypatch.setattr(adapter, "model_card", fail_at(1, OSError("disk full"), adapter.model_card))
    with pytest.raises(OSError, match="disk full"):
        fit(ThoughtModule(make_model(), TOKENIZER), PairDataModule(PAIRS, INSTRUCTION), thought, progress=False)
    assert [file.name for file in Path("taken").iterdir()] == ["precious.txt"]
