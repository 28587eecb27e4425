"""Preservation statistics against plain forwards in NumPy, and the cache that keeps them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from models import FAMILIES, make_model, make_tokenizer
from patches import make_patch
from quantised import quantise_
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lit_thought import transmute
from lit_thought.errors import ThoughtError
from lit_thought.files import default_cache_dir
from lit_thought.model.blocks import JOINT, find_blocks
from lit_thought.settings import DEFAULT_SITES, SITES
from lit_thought.solve.least_squares import Prior
from lit_thought.solve.nystrom import Sketch
from lit_thought.statistics import preserve, preserve_file
from lit_thought.statistics.preserve import WINDOW, preservation, window_of
from lit_thought.statistics.preserve_file import Preservation

WINDOWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31], [5, 5, 90, 91, 92], [77, 3, 77, 3]]


def make(
    model: PreTrainedModel, folder: Path, windows: Sequence[Sequence[int]] = WINDOWS, **options: Any
) -> tuple[Preservation, bool]:
    return preservation(model, find_blocks(model), windows, folder, **options)


def brute_force(model: PreTrainedModel, sites: Sequence[str] = DEFAULT_SITES) -> dict[tuple[int, str], np.ndarray]:
    """Mean of a aᵀ by block and site: one window and one token at a time."""
    grams: dict[tuple[int, str], np.ndarray] = {}
    inputs: dict[nn.Module, np.ndarray] = {}
    blocks = find_blocks(model)
    layers = {layer for block in blocks for site in block.sites.values() for layer in site.targets.values()}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0][0].double().numpy()}))
        for layer in layers
    ]
    for window in WINDOWS:
        with torch.no_grad():
            model(torch.tensor([window]), use_cache=False)
        for block in blocks:
            for name in block.stages(sites):
                targets = list(block.sites[name].targets.values())
                rows = [inputs[layer] for layer in (targets if name == JOINT else targets[:1])]
                for a in np.concatenate(rows, axis=1):
                    grams[block.index, name] = grams.get((block.index, name), 0) + np.outer(a, a)
    for handle in handles:
        handle.remove()
    return {key: gram / sum(map(len, WINDOWS)) for key, gram in grams.items()}


def grams(entry: Preservation) -> dict[tuple[int, str], np.ndarray]:
    """In any order."""
    places = [(block, name) for block, names in enumerate(entry.sites) for name in names]
    return {place: entry.prior(*place).gram().numpy() for place in places[::-1]}


def assert_close(found: dict, expected: dict, tol: float = 0.02) -> None:
    """Entry by entry, whatever the sizes of the channels."""
    assert found.keys() == expected.keys()
    for key, gram in expected.items():
        size = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
        assert (np.abs(found[key] - gram) <= tol * size).all(), key


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> list[Prior]:
    """What sketches gave, before it was rounded."""
    found: list[Prior] = []

    class Watched(Sketch):
        def prior(self) -> Prior:
            found.append(super().prior())
            return found[-1]

    monkeypatch.setattr(preserve, "Sketch", Watched)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_gram_matrices_equal_brute_force(
    family: str, batch_size: int, tmp_path: Path, sketched: list[Prior]
) -> None:
    """To the last bits as they are summed, and to 8 of them as they are kept. Padding is left out, and the mean is over
    tokens, not over windows; there are as many directions as channels, or nearly so."""
    model = make_model(family)
    entry, cached = make(model, tmp_path, batch_size=batch_size, sites=SITES)
    assert not cached
    wanted = brute_force(model, SITES)
    for (key, gram), prior in zip(wanted.items(), sketched, strict=True):
        assert np.linalg.norm(prior.gram().numpy() - gram) < 1e-9 * np.linalg.norm(gram), key
    assert_close(grams(entry), wanted)


@pytest.mark.parametrize("family", ["gpt_neox", "cohere"])
def test_parallel_blocks_have_the_joint_site(family: str, tmp_path: Path) -> None:
    model = make_family(family)
    entry, _ = make(model, tmp_path)
    wanted = brute_force(model)
    assert {name for _, name in wanted} == {JOINT}
    assert_close(grams(entry), wanted)


@pytest.mark.parametrize("directions", [1, 4, 12])
def test_few_directions_are_nearly_the_best(directions: int, tmp_path: Path) -> None:
    """And what is left is made up for in all directions alike."""
    model = make_model()
    entry, _ = make(model, tmp_path, directions=directions)
    for key, gram in brute_force(model).items():
        prior = entry.prior(*key)
        assert prior.factor.shape == (len(gram), directions)
        missed = gram - (prior.factor @ prior.factor.T).numpy()
        assert np.trace(missed) < 2 * np.linalg.eigvalsh(gram)[:-directions].sum()
        assert float(prior.rest) > 0


def test_a_bfloat16_model_is_summed_wider(tmp_path: Path, sketched: list[Prior]) -> None:
    model = make_model("llama", torch.bfloat16)
    entry, _ = make(model, tmp_path, batch_size=1)
    for gram, prior in zip(brute_force(model).values(), sketched, strict=True):
        assert np.linalg.norm(prior.gram().numpy() - gram) < 1e-5 * np.linalg.norm(gram)
    assert_close(grams(entry), brute_force(model))


def test_an_entry_is_one_file_of_a_byte_a_direction_and_channel(tmp_path: Path) -> None:
    entry, _ = make(make_model("gpt2"), tmp_path, sites=["mlp_out"], directions=50)
    (file,) = tmp_path.iterdir()
    assert entry.path == file
    assert file.match("preserve-" + 24 * "[0-9a-f]" + ".safetensors")
    with safe_open(file, framework="pt") as content:
        kinds = {name: (content.get_tensor(name).dtype, content.get_tensor(name).shape) for name in content.keys()}  # noqa: SIM118
    assert {name: kind for name, kind in kinds.items() if name.startswith("2.")} == {
        "2.mlp_out.factor": (torch.int8, (128, 50)),
        "2.mlp_out.scale": (torch.float32, (128,)),
        "2.mlp_out.rest": (torch.float32, ()),
    }
    assert entry.sizes == [{"mlp_out": 128}] * 3
    assert entry.manifest["directions"] == 50


def count_blocks(
    model: PreTrainedModel, folder: Path, windows: Sequence[Sequence[int]] = WINDOWS, **options: Any
) -> tuple[bool, int]:
    """Whether the entry came from the cache, and how often the model's first attention ran for it."""
    ran: list[int] = []
    layer = find_blocks(model)[0].sites["attn_out"].layer

    def count(*args: Any) -> None:
        ran.append(1)

    count.__module__ = "torch"  # whose hooks leave the model as it is; others have entries of their own
    handle = layer.register_forward_hook(count)
    _, cached = make(model, folder, windows, **options)
    handle.remove()
    return cached, len(ran)


def test_second_time_comes_from_the_cache_without_a_forward(tmp_path: Path) -> None:
    model = make_model()
    steps: list[int] = []
    first, cached = make(model, tmp_path, progress=steps.append)
    assert (cached, steps) == (False, [1, 2, 3])
    assert count_blocks(make_model(), tmp_path) == (True, 0)  # the same model, loaded again
    moved = make_model()
    moved.name_or_path = "elsewhere/tiny"
    assert count_blocks(moved, tmp_path) == (True, 0)
    again, cached = make(model, tmp_path, batch_size=1)
    assert cached
    assert_close(grams(again), grams(first), tol=0)
    assert len(list(tmp_path.iterdir())) == 1


def test_whatever_changes_the_content_makes_another_entry(tmp_path: Path) -> None:
    """Weights by as little as one number, architecture, configuration, dtype, text, tokens, windows; and what is asked
    of it, sites and directions."""
    base = make_model()
    one_number, rotary = copy.deepcopy(base), make_model()
    with torch.no_grad():
        find_blocks(one_number)[2].sites["mlp_out"].layer.weight[0, 0] += 1e-9
    rotary.config.rope_parameters = {**rotary.config.rope_parameters, "rope_theta": 77.0}
    rotary.model.rotary_emb = type(rotary.model.rotary_emb)(rotary.config)
    others: list[tuple[PreTrainedModel, list[list[int]], dict[str, Any]]] = [
        (make_model(seed=1), WINDOWS, {}),
        (one_number, WINDOWS, {}),
        (rotary, WINDOWS, {}),
        (make_model("mistral"), WINDOWS, {}),
        (make_model(dtype=torch.float32), WINDOWS, {}),
        (base, WINDOWS[:-1], {}),
        (base, [*WINDOWS[:-1], WINDOWS[-1][:-1]], {}),
        (base, [*WINDOWS[:-1], [77, 3, 77, 4]], {}),
        (base, [*WINDOWS[:-2], WINDOWS[-2] + WINDOWS[-1]], {}),
        (base, WINDOWS[::-1], {}),
        (base, WINDOWS, {"sites": ["mlp_out"]}),
        (base, WINDOWS, {"sites": ["attn_out", "mlp_in", "mlp_out"]}),
        (base, WINDOWS, {"directions": 7}),
        (base, WINDOWS, {"directions": 119}),
    ]
    assert count_blocks(base, tmp_path)[0] is False
    for other in others:
        cached, ran = count_blocks(other[0], tmp_path, other[1], **other[2])
        assert not cached
        assert ran > 0
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    assert count_blocks(base, tmp_path) == (True, 0)
    assert count_blocks(base, tmp_path, sites=DEFAULT_SITES) == (True, 0)
    for other in others:
        assert count_blocks(other[0], tmp_path, other[1], **other[2]) == (True, 0)


def test_another_format_makes_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier version computed otherwise is not taken for this one's, whatever its file looks like."""
    make(make_model(), tmp_path)
    monkeypatch.setattr(preserve, "FORMAT", 99)
    monkeypatch.setattr(preserve_file, "FORMAT", 99)
    assert count_blocks(make_model(), tmp_path)[0] is False
    assert len(list(tmp_path.iterdir())) == 2


def test_same_weights_rotated_otherwise_have_other_matrices(tmp_path: Path) -> None:
    """Why the configuration is in the key: the weights do not tell these two apart."""
    base, rotary = make_model(), make_model()
    rotary.config.rope_parameters = {**rotary.config.rope_parameters, "rope_theta": 77.0}
    rotary.model.rotary_emb = type(rotary.model.rotary_emb)(rotary.config)
    for model in (base, rotary):
        entry, _ = make(model, tmp_path)
        assert_close(grams(entry), brute_force(model))
    left, right = (brute_force(model)[2, "mlp_out"] for model in (base, rotary))
    assert np.linalg.norm(left - right) > 1e-3 * np.linalg.norm(left)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "other keys", "no manifest", "another model's", "a bit", "not finite", "other sizes"],
)
def test_a_damaged_entry_is_made_anew(damage: str, tmp_path: Path) -> None:
    model = make_model()
    make(model, tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as content:
        header = content.metadata()
    tensors = load_file(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other keys":
        save_file({key: value for key, value in tensors.items() if "attn_out" not in key}, file, header)
    elif damage == "no manifest":
        save_file(tensors, file)
    elif damage == "a bit":
        data = bytearray(file.read_bytes())
        data[-1000] ^= 4
        file.write_bytes(data)
    elif damage in ("not finite", "other sizes"):  # as if it had been written so
        tensors["1.mlp_out.rest"].fill_(float("nan") if damage == "not finite" else 0)
        if damage == "other sizes":
            tensors |= {key: value[:32, :32].clone() for key, value in tensors.items() if key.endswith("factor")}
            tensors |= {key: value[:32].clone() for key, value in tensors.items() if key.endswith("scale")}
        save_file(tensors, file, {key: value for key, value in header.items() if "sha256" not in key})
    else:  # another model's entry under this one's name
        make(make_model(seed=1), tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        other.replace(file)
        (tmp_path / "other").rmdir()
    entry, cached = make(model, tmp_path)
    assert not cached
    assert_close(grams(entry), brute_force(model))
    assert make(model, tmp_path)[1]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_computation_leaves_no_entry(error: type[BaseException], tmp_path: Path) -> None:
    model = make_model()

    def interrupt(done: int) -> None:
        if done == 2:
            raise error

    with pytest.raises(error):
        make(model, tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert make(model, tmp_path)[1] is False


def test_activations_that_are_not_finite_are_refused_and_not_kept(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        find_blocks(model)[1].sites["attn_out"].layer.weight[3, 3] = float("nan")
    with pytest.raises(ThoughtError, match="preserve: block 1"):
        make(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIT_THOUGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lit_thought"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "lit_thought"
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    model = make_model()
    preservation(model, find_blocks(model), WINDOWS)
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_patches_beside_quantised_layers_and_other_hooks_have_entries_of_their_own(tmp_path: Path) -> None:
    """The weights, and so their fingerprint, are the same with them."""
    model = quantise_(make_model("llama").float(), "8bit")
    bare = grams(make(model, tmp_path)[0])
    patch = make_patch(model, size=20.0)
    with patch.applied(model):
        other, cached = make(model, tmp_path)
        assert not cached
        assert_apart(grams(other), bare)
        assert make(model, tmp_path)[1]
    handle = find_blocks(model)[0].sites["attn_out"].layer.register_forward_hook(lambda layer, args, output: 9 * output)
    other, cached = make(model, tmp_path)
    assert not cached
    assert_apart(grams(other), bare)
    handle.remove()
    again, cached = make(model, tmp_path)
    assert cached
    assert_close(grams(again), bare)


def assert_apart(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> None:
    assert max(np.linalg.norm(one[key] - other[key]) / np.linalg.norm(other[key]) for key in other) > 0.1


def test_windows_are_no_longer_than_the_context(tmp_path: Path) -> None:
    """Positions are learned: one too many is an error."""
    model = make_model("gpt2")
    assert window_of(model) == min(WINDOW, model.config.n_positions)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=512)
    short = AutoModelForCausalLM.from_config(config).eval()
    assert window_of(short) == 64
    patch = transmute(
        short,
        make_tokenizer(),
        "Q: up\nA: down\n",
        [{"input": "hot"}],
        preserve=["fox " * 300],
        rank=2,
        max_new_tokens=3,
        cache_dir=tmp_path,
        progress=False,
    )
    assert patch.rank == 2


def test_sums_are_not_taken_in_half_precision(tmp_path: Path) -> None:
    model = make_model("llama").float()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ThoughtError, match=r"torch\.autocast is on"):
        make(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_told_before_the_pass(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    steps: list[int] = []
    with pytest.raises(ThoughtError, match=r"cache_dir=.*no permission"):
        make(make_model(), tmp_path, progress=steps.append)
    assert not steps
