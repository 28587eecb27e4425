"""Preservation statistics as one file: the compact form against NumPy, its checks, fits with it, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import fit_arguments, make_files
from families import make_family
from fits import ROUNDING, SOLVE_ROUNDING, distance
from models import make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch, transmute
from lit_thought.cli import main
from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.model.blocks import JOINT, find_blocks
from lit_thought.prompts.unrelated import text_windows
from lit_thought.statistics.preserve import WINDOW, Preservation, preservation, unpack
from lit_thought.statistics.preserve_file import PreservationFile, Storage, expand, pack
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved

TOKENIZER = make_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 14
DEMONSTRATIONS = "Q: hot\nA: cold\nQ: big\nA: small\n"
PAIRS = [{"input": word, "output": "down"} for word in ("up", "good", "fox", "dog", "brown")]
METADATA = "lit_thought_preservation"


def gram_matrix(size: int, rank: int, seed: int = 0) -> np.ndarray:
    """A mean of outer products whose channels and directions differ in size by orders of magnitude."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(rank, size)) * np.exp(generator.normal(size=size) * 2)
    return rows.T @ (rows * np.exp(-np.arange(rank) / 6)[:, None]) / rank


def packed(gram: np.ndarray, rank: int | None, storage: Storage) -> dict[str, Tensor]:
    values, vectors = np.linalg.eigh(gram)
    return pack(torch.tensor(values).clamp_min(0), torch.tensor(vectors), rank, storage)


def by_hand(gram: np.ndarray, rank: int) -> np.ndarray:
    """The best matrix of a rank, and what it leaves of the diagonal."""
    values, vectors = np.linalg.eigh(gram)
    best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return best + np.diag(np.diag(gram - best))


# --- the compact form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("rank", [2, 7, 39, 40])
def test_the_compact_form_is_the_best_of_its_rank_and_a_diagonal(rank: int, storage: Storage, tolerance: float) -> None:
    gram = gram_matrix(40, 60)
    found = expand(**packed(gram, rank, storage)).numpy()
    expected = by_hand(gram, rank)
    root = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))  # entry by entry, whatever the sizes of the channels
    assert np.abs((found - expected) / root).max() < tolerance
    if storage != "float32":
        assert np.abs((found - expected) / root).max() > 1e-6, "nothing was rounded"


@pytest.mark.parametrize("storage", ["int8", "float16", "float32"])
@pytest.mark.parametrize("rank", [1, 5, 20, 31, 32, 100, None])
@pytest.mark.parametrize("true_rank", [3, 32, 50])
def test_the_compact_form_is_positive_semi_definite_and_small(
    true_rank: int, rank: int | None, storage: Storage
) -> None:
    gram = gram_matrix(32, true_rank, seed=true_rank)
    parts = packed(gram, rank, storage)
    found = expand(**parts)
    least, most = np.linalg.eigvalsh(found.numpy())[[0, -1]]
    assert least > -1e-12 * most
    k = 32 if rank is None else min(rank, 32)
    assert len(parts["factor"]) == sum(min(i + 1, k) for i in range(32))
    assert parts["factor"].dtype == getattr(torch, storage)
    assert bool((parts["rest"] >= 0).all())


def test_a_channel_that_is_always_zero_stays_so() -> None:
    gram = gram_matrix(12, 20)
    gram[3], gram[:, 3] = 0, 0
    for storage in ("int8", "float32"):
        found = expand(**packed(gram, 5, storage)).numpy()
        assert np.abs(found[3]).max() < 1e-12
        assert np.isfinite(found).all()


# --- the file ----------------------------------------------------------------------------------------------------


def entry_of(model: PreTrainedModel, folder: Path, tokens: int = 400) -> Preservation:
    windows = text_windows(TOKENIZER, [TEXT], WINDOW, tokens)
    return preservation(model, find_blocks(model), windows, folder)[0]


def written(folder: Path, model: PreTrainedModel | None = None, **settings: Any) -> Path:
    model = make_model() if model is None else model
    path = folder / "shared.safetensors"
    entry_of(model, folder / "own").save(path, model, find_blocks(model), **settings)
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_round_trip_keeps_the_matrices(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    blocks = find_blocks(model)
    entry = entry_of(model, tmp_path / "own")
    path = written(tmp_path, model, rank=None, storage="float32")
    steps: list[int] = []
    again = Preservation.load(path, make_model(family), blocks, cache_dir=tmp_path / "theirs", progress=steps.append)
    assert steps == [1, 2, 3]
    for block in blocks:
        for site in ("attn_out", "mlp_out"):
            mine, theirs = entry.prior(block, site), again.prior(block, site)
            expected = mine.gram().numpy()
            for found in (theirs.gram(), theirs.gram(rounded=True)):
                assert np.linalg.norm(found.double().numpy() - expected) < 1e-6 * np.linalg.norm(expected)
            np.testing.assert_allclose(theirs.vectors.T @ theirs.vectors, np.eye(len(expected)), atol=1e-5)
            assert bool((theirs.values >= 0).all())
    assert unpack(PreservationFile(path), torch.device("cpu"), tmp_path / "theirs", steps.append)[1]
    assert steps == [1, 2, 3], "the second time it comes from the cache"


def test_the_manifest_says_what_the_statistics_are(tmp_path: Path) -> None:
    path = written(tmp_path, sites=("mlp_in", "mlp_out"), rank=9)
    with safe_open(path, framework="pt") as content:
        manifest = json.loads(content.metadata()[METADATA])
    (own,) = (tmp_path / "own").iterdir()
    kept = json.loads((own / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("model", "fingerprint", "dtype", "tokens", "windows", "blocks")} == {
        name: kept[name] for name in ("model", "fingerprint", "dtype", "tokens", "windows", "blocks")
    }
    assert manifest["tokens"] == 400
    assert (manifest["format"], manifest["rank"], manifest["storage"]) == (1, 9, "int8")
    assert manifest["sites"] == [["mlp_in", "mlp_out"]] * 3
    assert PreservationFile(path).sites == manifest["sites"]


def test_parallel_blocks_keep_their_joint_site(tmp_path: Path) -> None:
    model = make_family("gpt_neox")
    path = written(tmp_path, model)
    assert PreservationFile(path).sites == [[JOINT]] * len(find_blocks(model))


def test_the_default_file_is_a_fraction_of_the_cache(tmp_path: Path) -> None:
    path = written(tmp_path, rank=8)
    cache = sum(file.stat().st_size for file in (tmp_path / "own").rglob("*.safetensors"))
    assert path.stat().st_size < cache / 6


Damage = Callable[[Path], object]


def rewritten(change: Callable[[dict[str, Tensor], dict[str, Any]], object], key: str = METADATA) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as content:
            manifest = json.loads(content.metadata()[METADATA])
        change(tensors, manifest)
        save_file(tensors, path, metadata={key: json.dumps(manifest)})

    return damage


NAME = r"^preserve='.*shared.safetensors'"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda path: path.unlink(), NAME + " cannot be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), NAME + " cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), NAME + " cannot be read"),
    "text": (lambda path: path.write_text(TEXT), NAME + " cannot be read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), NAME + " cannot be read"),
    "an adapter": (lambda path: save_file({"A": torch.ones(2)}, path), NAME + " is a safetensors file without"),
    "other key": (rewritten(lambda t, m: None, "other"), NAME + " is a safetensors file without"),
    "format": (rewritten(lambda t, m: m.update(format=2)), "its format is 2, this version reads 1"),
    "no fingerprint": (rewritten(lambda t, m: m.pop("fingerprint")), "is damaged or of another version: 'fingerprint'"),
    "no name": (rewritten(lambda t, m: m.update(windows=3)), "a name in its manifest is no text"),
    "rank": (rewritten(lambda t, m: m.update(rank=3)), "block 0, attn_out has a wrong size"),
    "storage": (rewritten(lambda t, m: m.update(storage="int4")), "storage must be one of"),
    "blocks": (rewritten(lambda t, m: m.update(blocks=4)), "numbers of tokens or blocks are wrong"),
    "site": (rewritten(lambda t, m: m.update(sites=[["../x"]] * 3)), "names an unknown site"),
    "a matrix less": (rewritten(lambda t, m: t.pop("1.attn_out.factor")), "its matrices are not those"),
    "other size": (
        rewritten(lambda t, m: t.update({"2.mlp_out.rest": torch.ones(9)})),
        "block 2, mlp_out has a wrong size",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_before_anything_runs(damage: Damage, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    damage(path)
    with pytest.raises(ThoughtError, match=message):
        ThoughtCallback(preserve=str(path))


@pytest.mark.parametrize(("part", "value"), [("scale", float("nan")), ("rest", float("inf")), ("rest", -1.0)])
def test_numbers_of_no_gram_matrix_are_refused_and_not_kept(part: str, value: float, tmp_path: Path) -> None:
    path = written(tmp_path)
    rewritten(lambda t, m: t[f"1.mlp_out.{part}"].fill_(value))(path)
    model = make_model()
    with pytest.raises(ThoughtError, match="is damaged: block 1, mlp_out is no Gram matrix"):
        Preservation.load(path, model, find_blocks(model), cache_dir=tmp_path / "theirs")
    assert not list((tmp_path / "theirs").iterdir())


def rotated() -> PreTrainedModel:
    """The same weights under another configuration."""
    model = make_model()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}
    return model


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "weights": (lambda: make_model(seed=1), "whose weights are not the model's"),
    "family": (lambda: make_model("mistral"), "whose weights are not the model's"),
    "dtype": (lambda: make_model(dtype=torch.float32), r"in torch.float64; the model is in torch.float32. Load it so"),
    "configuration": (rotated, "the same weights, but another configuration"),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused(other: Callable[[], PreTrainedModel], message: str, tmp_path: Path) -> None:
    path, model = written(tmp_path), other()
    with pytest.raises(ThoughtError, match=message):
        Preservation.load(path, model, find_blocks(model))
    with pytest.raises(ThoughtError, match=message):
        fitted(model, preserve=path)


def test_a_configuration_is_the_same_wherever_it_was_loaded(tmp_path: Path) -> None:
    path, model = written(tmp_path), make_model()
    model.config.architectures, model.config.transformers_version = ["Other"], "9.9"
    model.config._name_or_path = "elsewhere"
    Preservation.load(path, model, find_blocks(model), cache_dir=tmp_path / "theirs")


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    model = make_model()
    blocks, entry = find_blocks(model), entry_of(model, tmp_path / "own")
    path = tmp_path / "a.safetensors"
    for settings, message in (
        ({"rank": 0}, "rank must be"),
        ({"rank": 0.5}, "rank must be"),
        ({"storage": "int4"}, "storage must be"),
        ({"sites": ["mlp"]}, "sites must name"),
    ):
        with pytest.raises(ThoughtError, match=message):
            entry.save(path, model, blocks, **settings)
    with pytest.raises(ThoughtError, match=r"path='a.txt' must end in .safetensors"):
        entry.save("a.txt", model, blocks)
    assert not path.exists()
    entry.save(path, model, blocks)
    with pytest.raises(ThoughtError, match="exists"):
        entry.save(path, model, blocks)
    entry.save(path, model, blocks, overwrite=True)
    again = Preservation.load(path, model, blocks, cache_dir=tmp_path / "theirs")
    with pytest.raises(ThoughtError, match="from a file"):
        again.save(tmp_path / "b.safetensors", model, blocks)


# --- fits with it ------------------------------------------------------------------------------------------------


def fitted(model: PreTrainedModel, **settings: Any) -> ThoughtPatch:
    usual: dict[str, Any] = {"rank": 4, "preserve_tokens": 400, "progress": False}
    return transmute(model, TOKENIZER, DEMONSTRATIONS, PAIRS, **{**usual, **settings})


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_a_fit_with_the_file_is_that_with_the_cache(order: str, tmp_path: Path) -> None:
    """At full rank in float32 to rounding; with less, nearer than without preservation, and nearer the more is kept."""
    model = make_model()
    own = {"order": order, "cache_dir": tmp_path / "own"}
    exact = fitted(model, preserve=[TEXT], **own)
    assert distance(exact, fitted(model, preserve=written(tmp_path, rank=None, storage="float32"), **own)) < 1e-5
    lost = [
        distance(exact, fitted(model, preserve=written(tmp_path, rank=rank, storage="int8", overwrite=True), **own))
        for rank in (None, 24, 4)
    ]
    none = distance(exact, fitted(model, preserve=None))
    assert lost == sorted(lost)
    assert lost[0] < 0.05
    assert lost[-1] < 0.5 * none


def test_the_file_is_used_without_its_text_and_named_by_its_hash(tmp_path: Path) -> None:
    model, path = make_model(), written(tmp_path, rank=8)
    patch = fitted(model, preserve=str(path), cache_dir=tmp_path / "theirs", preserve_tokens=5)
    settings = patch.provenance["settings"]
    assert settings["preserve_file"] == PreservationFile(path).digest
    assert (settings["preserve_tokens"], settings["preserve_weight"]) == (400, 3.0)
    assert str(tmp_path) not in json.dumps(patch.provenance)
    (unpacked,) = (tmp_path / "theirs").iterdir()
    assert json.loads((unpacked / "manifest.json").read_text())["file"] == settings["preserve_file"]
    moved = path.rename(tmp_path / "moved.safetensors")
    assert ThoughtCallback(preserve=moved, preserve_weight=0).preserved.texts is None
    again = fitted(model, preserve=moved, cache_dir=tmp_path / "theirs")
    assert distance(again, patch) <= ROUNDING
    assert len(list((tmp_path / "theirs").iterdir())) == 1
    assert fitted(model, preserve=[TEXT]).provenance["settings"]["preserve_file"] is None


def test_a_site_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(ThoughtError, match=r"has the sites .* of block 0; the fit needs \['mlp_in'\], too"):
        fitted(make_model(), preserve=path, sites=["mlp_in"])
    path = written(tmp_path, sites=["mlp_in"], overwrite=True)
    fitted(make_model(), preserve=path, sites=["mlp_in"])


# --- saved statistics --------------------------------------------------------------------------------------------


def test_saved_statistics_are_solved_with_the_file(tmp_path: Path) -> None:
    """With the entry that the fit unpacked, or with the file itself where there is no cache."""
    path = written(tmp_path, rank=8)
    patch = fitted(
        make_model(),
        preserve=path,
        cache_dir=tmp_path / "theirs",
        statistics_dir=tmp_path / "sums",
    )
    saved = SavedStatistics.load(tmp_path / "sums")
    assert distance(solve_saved(saved, cache_dir=tmp_path / "theirs"), patch) <= SOLVE_ROUNDING
    with pytest.raises(ThoughtError, match=r"text \(or file\) writes them anew; or pass a file"):
        solve_saved(saved, cache_dir=tmp_path / "empty")
    assert distance(solve_saved(saved, preserve=path, cache_dir=tmp_path / "empty"), patch) <= SOLVE_ROUNDING
    other = written(tmp_path, rank=None, overwrite=True)
    found = solve_saved(saved, preserve=other, cache_dir=tmp_path / "empty", approximate=True)
    assert distance(found, patch) > 1e-4
    assert found.provenance["settings"]["preserve_file"] == PreservationFile(other).digest
    with pytest.raises(ThoughtError, match="another preserve_file than the fit's would change the sums"):
        solve_saved(saved, preserve=other, cache_dir=tmp_path / "empty")
    with pytest.raises(ThoughtError, match="fit needs"):
        solve_saved(saved, preserve=written(tmp_path, sites=["attn_out"], overwrite=True))
    with pytest.raises(ThoughtError, match="whose weights are not the model's"):
        solve_saved(saved, preserve=written(tmp_path, make_model(seed=1), overwrite=True))


# --- the command line --------------------------------------------------------------------------------------------


def test_preserve_then_fit_and_solve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    command = ["preserve", "model", "--output=kept.safetensors", "--texts=text.txt", "--rank=full"]
    main([*command, "--storage=float32", "--preserve_tokens=300", "--progress=false"])
    assert "MB of preservation statistics to kept.safetensors" in capsys.readouterr().err
    known = PreservationFile("kept.safetensors").manifest
    assert (known["tokens"], known["rank"], known["storage"]) == (300, None, "float32")
    main([*fit_arguments(tmp_path, "text"), "--preserve=text.txt"])
    main([*fit_arguments(tmp_path, "file"), "--preserve=kept.safetensors", "--statistics_dir=sums"])
    file = ThoughtPatch.load("file")
    assert distance(ThoughtPatch.load("text"), file) < 1e-5
    Path("cache").rename("away")
    main(["solve", "--statistics=sums", "--out=solved", "--preserve=kept.safetensors"])
    assert distance(ThoughtPatch.load("solved"), file) <= SOLVE_ROUNDING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=a.bin"], "output='a.bin' must end in .safetensors"),
        (["--output=a.safetensors", "--rank=0"], "rank must be a whole number"),
        (["--output=a.safetensors", "--sites=[mlp]"], "sites must name"),
        (["--output=a.safetensors", "--texts=nothing.txt"], "texts='nothing.txt' cannot be read"),
        (["--output=a.safetensors", "--preserve_tokens=0"], "preserve_tokens must be"),
        (["--output=there.safetensors"], "exists"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_file("there.safetensors") as there:
        there.touch()
    with pytest.raises(SystemExit):
        main(["preserve", "no/such/model", *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert "Loading" not in error
