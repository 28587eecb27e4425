"""Preservation matrices against plain forwards in NumPy, and the cache that keeps them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, make_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lit_thought.errors import ThoughtError
from lit_thought.files import default_cache_dir
from lit_thought.model.blocks import find_blocks
from lit_thought.settings import SITES
from lit_thought.statistics.preserve import Preservation, preservation

WINDOWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31], [5, 5, 90, 91, 92], [77, 3, 77, 3]]


def make(model: PreTrainedModel, folder: Path, windows: Sequence[Sequence[int]] = WINDOWS, **options):
    return preservation(model, find_blocks(model), windows, folder, **options)


def brute_force(model: PreTrainedModel) -> dict[tuple[int, str], np.ndarray]:
    """Mean of a aᵀ by block and site: one window and one token at a time."""
    grams: dict[tuple[int, str], np.ndarray] = {}
    handles = []
    for block in find_blocks(model):
        for name, site in block.sites.items():

            def see(module: nn.Module, args: tuple, key=(block.index, name)) -> None:
                for a in args[0][0].double().numpy():
                    grams[key] = grams.get(key, 0) + np.outer(a, a)

            handles.append(next(iter(site.targets.values())).register_forward_pre_hook(see))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: gram / sum(map(len, WINDOWS)) for key, gram in grams.items()}


def grams(entry: Preservation, model: PreTrainedModel) -> dict[tuple[int, str], np.ndarray]:
    """In any order."""
    blocks = find_blocks(model)[::-1]
    return {(block.index, name): entry.prior(block, name).gram().numpy() for name in SITES for block in blocks}


def assert_close(found: dict, expected: dict, tol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for key, gram in expected.items():
        assert np.linalg.norm(found[key] - gram) <= tol * np.linalg.norm(gram), key


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_gram_matrices_equal_brute_force(family: str, batch_size: int, tmp_path: Path) -> None:
    """Padding is left out, and the mean is over tokens, not over windows."""
    model = make_model(family)
    entry, cached = make(model, tmp_path, batch_size=batch_size)
    assert not cached
    assert_close(grams(entry, model), brute_force(model))
    for block in find_blocks(model):
        for name, site in block.sites.items():
            prior = entry.prior(block, name)
            assert bool((prior.values >= 0).all())
            np.testing.assert_allclose(prior.vectors.T @ prior.vectors, np.eye(site.d_in), atol=1e-5)


def test_a_bfloat16_model_is_summed_in_double(tmp_path: Path) -> None:
    model = make_model("llama", torch.bfloat16)
    entry, _ = make(model, tmp_path, batch_size=1)
    assert_close(grams(entry, model), brute_force(model))


def count_blocks(model: PreTrainedModel, folder: Path, windows: Sequence[Sequence[int]] = WINDOWS) -> tuple[bool, int]:
    """Whether the entry came from the cache, and how often the model's first attention ran for it."""
    ran: list[int] = []
    layer = find_blocks(model)[0].sites["attn_out"].layer
    handle = layer.register_forward_hook(lambda *args: ran.append(1))
    _, cached = make(model, folder, windows)
    handle.remove()
    return cached, len(ran)


def test_second_time_comes_from_the_cache_without_a_forward(tmp_path: Path) -> None:
    model = make_model()
    steps: list[int] = []
    first, cached = make(model, tmp_path, progress=steps.append)
    assert (cached, steps) == (False, [1, 2, 3])
    assert count_blocks(make_model(), tmp_path) == (True, 0)  # the same model, loaded again
    again, cached = make(model, tmp_path, batch_size=1)
    assert cached
    assert_close(grams(again, model), grams(first, model), tol=0)
    assert len(list(tmp_path.iterdir())) == 1


def test_whatever_changes_the_content_makes_another_entry(tmp_path: Path) -> None:
    """Weights by as little as one number, architecture, configuration, dtype, text, tokens, windows."""
    base = make_model()
    one_number, rotary = copy.deepcopy(base), make_model()
    with torch.no_grad():
        find_blocks(one_number)[2].sites["mlp_out"].layer.weight[0, 0] += 1e-9
    rotary.config.rope_parameters = {**rotary.config.rope_parameters, "rope_theta": 77.0}
    rotary.model.rotary_emb = type(rotary.model.rotary_emb)(rotary.config)
    others: list[tuple[PreTrainedModel, list[list[int]]]] = [
        (make_model(seed=1), WINDOWS),
        (one_number, WINDOWS),
        (rotary, WINDOWS),
        (make_model("mistral"), WINDOWS),
        (make_model(dtype=torch.float32), WINDOWS),
        (base, WINDOWS[:-1]),
        (base, [*WINDOWS[:-1], WINDOWS[-1][:-1]]),
        (base, [*WINDOWS[:-1], [77, 3, 77, 4]]),
        (base, [*WINDOWS[:-2], WINDOWS[-2] + WINDOWS[-1]]),
        (base, WINDOWS[::-1]),
    ]
    assert count_blocks(base, tmp_path)[0] is False
    for model, windows in others:
        cached, ran = count_blocks(model, tmp_path, windows)
        assert not cached
        assert ran > 0
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    assert count_blocks(base, tmp_path) == (True, 0)
    for model, windows in others:
        assert count_blocks(model, tmp_path, windows) == (True, 0)


def test_same_weights_rotated_otherwise_have_other_matrices(tmp_path: Path) -> None:
    """Why the configuration is in the key: the weights do not tell these two apart."""
    base, rotary = make_model(), make_model()
    rotary.config.rope_parameters = {**rotary.config.rope_parameters, "rope_theta": 77.0}
    rotary.model.rotary_emb = type(rotary.model.rotary_emb)(rotary.config)
    for model in (base, rotary):
        entry, _ = make(model, tmp_path)
        assert_close(grams(entry, model), brute_force(model))
    left, right = (brute_force(model)[2, "mlp_out"] for model in (base, rotary))
    assert np.linalg.norm(left - right) > 1e-3 * np.linalg.norm(left)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "missing", "other keys", "manifest", "no manifest", "swapped"]
)
def test_a_damaged_entry_is_made_anew(damage: str, tmp_path: Path) -> None:
    model = make_model()
    make(model, tmp_path)
    (folder,) = tmp_path.iterdir()
    file, manifest = folder / "block-0001.safetensors", folder / "manifest.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif damage == "other keys":
        tensors = load_file(file)
        save_file({key: value for key, value in tensors.items() if not key.startswith("mlp_in")}, file)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-30])
    elif damage == "no manifest":
        manifest.unlink()
    else:  # another model's entry under this one's name
        make(make_model(seed=1), tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        shutil.rmtree(folder)
        other.rename(folder)
        (tmp_path / "other").rmdir()
    entry, cached = make(model, tmp_path)
    assert not cached
    assert_close(grams(entry, model), brute_force(model))
    assert make(model, tmp_path)[1]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


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
