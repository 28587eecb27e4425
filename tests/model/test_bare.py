"""What a user hands over as a model: wrappers come off and go on again, all else is refused by name at every door; and
what is saved does in PEFT what the patch does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fits import INSTRUCTION, PAIRS, ROUNDING, TEXTS, TOKENIZER, Untouched, distance, fail_at, identical, make_patch
from models import make_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from wrapped_models import (
    ELSEWHERE,
    REFUSED,
    TAKEN_OFF,
    compiled,
    compiled_layers,
    data_parallel,
    offloaded,
    small,
    start_processes,
    vision,
)

from lit_thought import ThoughtModule, evaluate, transmute
from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.fit.inspection import inspect_model
from lit_thought.model.bare import bare_model, unwrap
from lit_thought.model.blocks import find_blocks
from lit_thought.model.loading import fingerprint
from lit_thought.patch import weights
from lit_thought.patch.export import export_merged
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.statistics.preserve import preservation
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved
from lit_thought.theory.vectors import thought_vectors, vector_patch
from lit_thought.theory.verify import verify_exact

IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(autouse=True)
def _processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    start_processes(tmp_path)
    yield
    dist.destroy_process_group()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def state_of(model: Any) -> dict[str, Any]:
    """Which modules are where, and what is compiled."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        name: (id(module), vars(module).get("_compiled_call_impl"), vars(module).get("forward"))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("wrap", TAKEN_OFF, ids=lambda wrap: wrap.__name__)
def test_wrappers_come_off_for_a_fit_and_go_on_again(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    wanted = make_patch(small())
    model = small()
    given = wrap(model)
    before, state = logits(given), state_of(given)
    patch = make_patch(given)
    assert identical(patch, wanted)
    assert patch.provenance["fingerprint"] == wanted.provenance["fingerprint"] == fingerprint(small())
    assert state_of(given) == state
    assert unwrap(given) is model
    assert torch.equal(logits(given), before)
    with patch.applied(given):
        assert state_of(given) == state
        patched = logits(given)
    assert torch.equal(logits(given), before)
    assert (patched - before).abs().max() > 1e-2
    patch.save_adapter(tmp_path / "adapter")
    torch.testing.assert_close(in_peft(small(), tmp_path / "adapter"), patched, rtol=1e-4, atol=1e-4)


def in_peft(model: PreTrainedModel, folder: Path) -> Tensor:
    """Logits with an adapter, all of whose targets and weights PEFT has found."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(model, folder)
    layers = {path for path, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert layers == set(ThoughtPatch.load(folder).factors)
    assert all(bool(value.any()) for name, value in loaded.named_parameters() if "lora_B" in name)
    return logits(loaded)


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(make_model, family, torch.float32) for family in ("llama", "mistral", "qwen3", "gpt2")),
        functools.partial(small, tie_word_embeddings=True),
        functools.partial(small, tie_word_embeddings=False),
        vision,
    ],
    ids=["llama", "mistral", "qwen3", "gpt2", "tied", "untied", "vision"],
)
@pytest.mark.parametrize("sites", [("attn_out", "mlp_out"), ("mlp_in",)], ids="+".join)
def test_no_adapter_is_saved_that_peft_loads_to_no_effect(
    make: Callable[[], PreTrainedModel], sites: tuple[str, ...], tmp_path: Path
) -> None:
    patch = make_patch(make(), sites=sites, parts=("matrix",))
    patch.save_adapter(tmp_path / "adapter")
    model = make()
    before = logits(model)
    with patch.applied(model):
        patched = logits(model)
    found = in_peft(make(), tmp_path / "adapter")
    assert (found - before).abs().max() > 1e-2
    torch.testing.assert_close(found, patched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_bare_causal_lm_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    model = make()
    state = state_of(model)
    for attempt in (
        *([] if isinstance(model, str) else [lambda: make_patch(model)]),  # which loads a model by its name
        lambda: find_blocks(model),
        lambda: inspect_model(model),
        lambda: verify_exact(model, TOKENIZER, INSTRUCTION, "hot and cold"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt()
    assert state_of(model) == state


@pytest.mark.parametrize(("make", "message"), REFUSED[:3] + REFUSED[5:6], ids=["lora", "disabled", "merged", "FSDP1"])
def test_patches_refuse_wrappers_that_change_something(make: Callable[[], Any], message: str) -> None:
    model, patch = make(), make_patch(small())
    state, before = state_of(model), logits(model)
    for attempt in (patch.apply_, patch.validate, patch.remove_, lambda model: patch.applied(model).__enter__()):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt(model)
    assert state_of(model) == state
    assert torch.equal(logits(model), before)


def in_parts(*disk: str) -> dict[str, str]:
    names = (
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    return {name: "disk" if name in disk else "cpu" for name in names}


@pytest.mark.parametrize(
    ("place", "first"),
    [
        ({"": "disk"}, r"model\.embed_tokens\.weight"),
        (in_parts("model.layers.2"), r"model\.layers\.2\.self_attn\.q_proj\.weight"),
        (in_parts("lm_head"), r"lm_head\.weight"),
    ],
    ids=["all on disk", "a block on disk", "the head on disk"],
)
def test_weights_that_a_device_map_has_put_elsewhere_are_refused(place: dict, first: str, tmp_path: Path) -> None:
    model = offloaded(place, tmp_path)
    before = logits(model)
    for attempt in (
        *([] if isinstance(model, str) else [lambda: make_patch(model)]),  # which loads a model by its name
        lambda: find_blocks(model),
        lambda: evaluate(model, TOKENIZER, make_patch(small()), instruction=INSTRUCTION, pairs=PAIRS, unrelated=None),
    ):
        with pytest.raises(UnsupportedModelError, match=ELSEWHERE.format(first)):
            attempt()
    assert torch.equal(logits(model), before)


def test_a_device_map_of_one_place_is_taken(tmp_path: Path) -> None:
    """What is read from a file lies elsewhere in memory, so that some processors round its products otherwise."""
    assert distance(make_patch(offloaded({"": "cpu"}, tmp_path)), make_patch(small())) <= ROUNDING


def test_weights_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")

    model = small()
    model.lm_head.weight = Elsewhere(model.lm_head.weight.detach().clone(), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"several devices \('model.embed.* on cpu, 'lm_head.* on cuda:1\)"):
        make_patch(model)


def test_weights_without_float64_are_refused() -> None:
    class Apple(nn.Parameter):
        device = torch.device("mps:0")

    model = small()
    for name, value in list(model.named_parameters()):
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Apple(value.detach().clone(), requires_grad=False))
    with pytest.raises(UnsupportedModelError, match=r"on mps:0, which has no float64 .*load_model\(name, device='cpu'"):
        make_patch(model)


def doors(patch: ThoughtPatch, vectors: ThoughtPatch, folder: Path) -> dict[str, Callable[[Any], Any]]:
    """Everything public that takes a model, beside fits."""
    saved = SavedStatistics.load(folder / "statistics")
    return {
        "ThoughtModule": lambda model: ThoughtModule(model, TOKENIZER),
        "evaluate": lambda model: evaluate(
            *(model, TOKENIZER, patch),
            instruction=INSTRUCTION,
            pairs=PAIRS,
            unrelated=TEXTS,
            max_new_tokens=2,
            progress=False,
        ),
        "auto": lambda model: make_patch(model, pairs=PAIRS * 2, scale="auto").provenance["selection"]["chosen"],
        "inspect_model": lambda model: inspect_model(model).kinds,
        "find_blocks": lambda model: [sorted(block.sites) for block in find_blocks(model)],
        "preservation": lambda model: preservation(model, find_blocks(model), [[5, 6, 7, 8]])[1],
        "solve_saved": lambda model: sorted(solve_saved(saved, model=model).factors),
        "verify_exact": lambda model: verify_exact(model, TOKENIZER, INSTRUCTION, "hot and cold").blocks,
        "thought_vectors": lambda model: thought_vectors(model, TOKENIZER, INSTRUCTION, PAIRS).sum(),
        "vector_patch": lambda model: sorted(vector_patch(model, {1: torch.ones(32)}).vectors),
        "save_control_vector": lambda model: vectors.save_control_vector(folder / "v.gguf", model, overwrite=True),
        "load_control_vector": lambda model: sorted(ThoughtPatch.load_control_vector(folder / "w.gguf", model).vectors),
        "export_merged": lambda model: export_merged(patch, model, folder / "merged", overwrite=True),
    }


NAMES = [
    *("ThoughtModule", "evaluate", "auto", "inspect_model", "find_blocks", "preservation", "solve_saved"),
    *("verify_exact", "thought_vectors", "vector_patch", "save_control_vector", "load_control_vector", "export_merged"),
]


@pytest.fixture
def ways(tmp_path: Path) -> dict[str, Callable[[Any], Any]]:
    patch = make_patch(small(), sites=("mlp_in",), parts=("matrix",), statistics_dir=tmp_path / "statistics")
    vectors = vector_patch(small(), {1: torch.ones(32)})
    if find_spec("gguf") is not None:
        vectors.save_control_vector(tmp_path / "w.gguf", small())
    found = doors(patch, vectors, tmp_path)
    assert list(found) == NAMES
    return found


@pytest.mark.parametrize("wrap", [compiled, compiled_layers, data_parallel], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_door_takes_wrappers_off(name: str, wrap: Callable[[Any], Any], ways: dict[str, Any]) -> None:
    if "control_vector" in name:
        pytest.importorskip("gguf")
    model = small()
    untouched = Untouched(model)
    wanted = ways[name](model)
    untouched.check()
    given = wrap(model)
    state = state_of(given)
    found = ways[name](given)
    if name not in ("ThoughtModule", "evaluate", "preservation"):
        assert str(found) == str(wanted)
    if name == "evaluate":
        assert found["items"] == wanted["items"]
        assert found["kl"] == wanted["kl"]
    assert state_of(given) == state


@pytest.mark.parametrize("name", NAMES)
def test_every_door_refuses_a_model_without_its_head(name: str, ways: dict[str, Any]) -> None:
    if "control_vector" in name:
        pytest.importorskip("gguf")
    with pytest.raises(UnsupportedModelError, match=r"got LlamaModel, .*AutoModelForCausalLM"):
        ways[name](small().model)


def test_merged_models_have_the_names_of_plain_ones(ways: dict[str, Any], tmp_path: Path) -> None:
    ways["export_merged"](compiled_layers(small()))
    again = type(small()).from_pretrained(tmp_path / "merged")
    assert (logits(again) - logits(small())).abs().max() > 1e-2


# --- arguments in each other's places, and loaders --------------------------------------------------------------------


def test_model_and_tokenizer_in_each_others_places() -> None:
    for attempt in (
        lambda: transmute(TOKENIZER, small(), INSTRUCTION, PAIRS),  # type: ignore[arg-type]
        lambda: evaluate(TOKENIZER, small(), make_patch(small()), instruction=INSTRUCTION, pairs=PAIRS),  # type: ignore[arg-type]
    ):
        with pytest.raises(ThoughtError, match=r"got \w*Tokenizer\w*, a tokenizer\. The model comes first"):
            attempt()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "tokenizer is missing"),
        ("smollm2", "tokenizer must be a tokenizer of transformers; got str"),
        (small(), "tokenizer must be .*; got LlamaForCausalLM"),
        (TOKENIZER.backend_tokenizer, "tokenizer must be .*; got Tokenizer"),
        (type("Processor", (), {"tokenizer": TOKENIZER})(), r"got Processor\. Pass its \.tokenizer"),
    ],
    ids=["missing", "name", "model", "of tokenizers", "processor"],
)
def test_what_is_no_tokenizer_is_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        make_patch(small(), tokenizer)
    with pytest.raises(ThoughtError, match=message):
        verify_exact(small(), tokenizer, INSTRUCTION, "hot and cold")


class Loader:
    def __call__(self) -> Any:
        return small(), TOKENIZER


@pytest.mark.parametrize(
    "loader",
    [
        Loader(),
        Loader().__call__,
        functools.partial(lambda it: (it, TOKENIZER), small()),
        lambda: [compiled(small()), TOKENIZER],
    ],
)
def test_anything_that_can_be_called_without_arguments_is_a_loader(loader: Any) -> None:
    assert identical(make_patch(loader, None), make_patch(small()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (small, r"must return \(model, tokenizer\); got LlamaForCausalLM"),
        (lambda: (small(),), "got 1 things"),
        (lambda: (small(), TOKENIZER, None), "got 3 things"),
        (lambda: None, "got NoneType"),
        (lambda: "ab", "got str"),
        (lambda: (TOKENIZER, small()), "a tokenizer. The model comes first"),
        (lambda: (small().model, TOKENIZER), "language modelling head; got LlamaModel"),
        (lambda name: (small(), TOKENIZER), "got function"),
    ],
)
def test_what_a_loader_returns_is_checked(loader: Any, message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        make_patch(loader, TOKENIZER)


# --- weights made in inference mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_made_in_inference_mode_are_patched_and_restored(family: str) -> None:
    plain = make_model(family)
    with torch.inference_mode():
        model = make_model(family)
    assert all(value.is_inference() for value in model.parameters())
    patch = make_patch(model)
    assert identical(patch, make_patch(plain))
    untouched = Untouched(model)
    with patch.applied(plain):
        wanted = logits(plain)
    with patch.applied(model):
        assert torch.equal(logits(model), wanted)
        with torch.inference_mode():
            patch.remove_(model)
            patch.apply_(model)
        with pytest.raises(KeyError), (2 * patch).applied(model):
            raise KeyError
        assert torch.equal(logits(model), wanted)
    untouched.check()


def test_a_failure_midway_takes_a_patch_off_inference_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        model = make_model()
    patch, untouched = make_patch(model), Untouched(model)
    monkeypatch.setattr(weights, "_add", fail_at(3, MemoryError(), weights._add))
    with pytest.raises(MemoryError):
        patch.apply_(model)
    untouched.check()


def test_inference_weights_go_back_bit_for_bit() -> None:
    with torch.inference_mode():
        model = make_model("qwen2", torch.bfloat16)
    patch = make_patch(model, parts=("vector",), sites=("mlp_out",))
    matrices = make_patch(model)
    untouched = Untouched(model)
    with patch.applied(model), matrices.applied(model), torch.inference_mode(), (3 * patch).applied(model):
        pass
    untouched.check()
    assert bare_model(model) is model
