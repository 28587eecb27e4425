"""Preservation statistics as one file: what it holds, its checks, fits with it, the commands."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from lit_thought.cli.fit import preserve
from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.model.blocks import find_blocks
from lit_thought.model.loading import fingerprint, model_name
from lit_thought.prompts.unrelated import text_windows
from lit_thought.settings import DEFAULT_SITES, DIRECTIONS, FitSettings
from lit_thought.solve.least_squares import Prior
from lit_thought.statistics.preserve import WINDOW, preservation
from lit_thought.statistics.preserve_file import Preservation, config_hash, rounded
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved

TOKENIZER = make_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 14
DEMONSTRATIONS = "Q: hot\nA: cold\nQ: big\nA: small\n"
PAIRS = [{"input": word, "output": "down"} for word in ("up", "good", "fox", "dog", "brown")]
METADATA = "lit_thought_preservation"


# --- what is kept of a matrix --------------------------------------------------------------------------------------


def make_factor(size: int = 40, directions: int = 12, seed: int = 0) -> Tensor:
    """Channels and directions that differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, directions, generator=generator, dtype=torch.float64)
    channels = torch.randn(size, generator=generator, dtype=torch.float64).mul(2).exp()
    return noise * channels[:, None] * torch.exp(-torch.arange(directions) / 6).double()


@pytest.mark.parametrize("directions", [1, 12, 40])
def test_each_channel_is_rounded_to_a_part_of_its_own_largest_entry(directions: int) -> None:
    factor = make_factor(directions=directions)
    parts = rounded(Prior(factor, torch.tensor(0.3).double()))
    assert (parts["factor"].dtype, parts["factor"].shape) == (torch.int8, (40, directions))
    assert (parts["scale"].dtype, parts["scale"].shape) == (torch.float32, (40,))
    assert (parts["rest"].dtype, float(parts["rest"])) == (torch.float32, pytest.approx(0.3))
    found = parts["factor"].double() * parts["scale"].double()[:, None]
    largest = factor.abs().amax(1, keepdim=True)
    assert bool(((found - factor).abs() <= largest / 254 * (1 + 1e-6)).all())
    assert int(parts["factor"].abs().max()) == 127
    assert bool((found - factor).any()), "nothing was rounded"


def test_a_channel_that_is_zero_or_next_to_it_is_kept_as_zero() -> None:
    factor = make_factor()
    factor[3] = 0
    parts = rounded(Prior(factor, torch.tensor(0.0).double()))
    assert not parts["factor"][3].any()
    assert float(parts["scale"][3]) == 0
    tiny = rounded(Prior(factor * 1e-60, torch.tensor(0.0).double()))  # its scale is zero in single precision
    assert not tiny["factor"].any()


# --- the file ----------------------------------------------------------------------------------------------------


def entry_of(model: PreTrainedModel, folder: Path, tokens: int = 400, **options: Any) -> Preservation:
    windows = text_windows(TOKENIZER, [TEXT], WINDOW, tokens)
    return preservation(model, find_blocks(model), windows, folder, **options)[0]


def written(folder: Path, model: PreTrainedModel | None = None, overwrite: bool = False, **options: Any) -> Path:
    path = folder / "shared.safetensors"
    entry_of(make_model() if model is None else model, folder / "own", **options).save(path, overwrite)
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_is_the_entry(family: str, tmp_path: Path) -> None:
    entry = entry_of(make_model(family), tmp_path / "own")
    entry.save(tmp_path / "shared.safetensors")
    again = Preservation(tmp_path / "shared.safetensors")
    assert again.digest == entry.digest == hashlib.sha256(again.path.read_bytes()).hexdigest()
    assert (again.manifest, again.sites, again.sizes) == (entry.manifest, entry.sites, entry.sizes)
    assert again.sites == [["attn_out", "mlp_out"]] * 3
    for block, names in enumerate(again.sites):
        for site in names:
            mine, theirs = entry.prior(block, site), again.prior(block, site)
            assert torch.equal(mine.factor, theirs.factor)
            assert torch.equal(mine.rest, theirs.rest)
            assert mine.factor.dtype == mine.rest.dtype == torch.float64


def test_the_manifest_says_what_the_statistics_are(tmp_path: Path) -> None:
    model = make_model()
    path = written(tmp_path, model, sites=("mlp_in", "mlp_out"), directions=9)
    with safe_open(path, framework="pt") as content:
        manifest = json.loads(content.metadata()[METADATA])
    windows = text_windows(TOKENIZER, [TEXT], WINDOW, 400)
    assert manifest == {
        "format": 2,
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "config": config_hash(model),
        "dtype": "torch.float64",
        "tokens": 400,
        "windows": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "blocks": 3,
        "sites": [["mlp_in", "mlp_out"]] * 3,
        "directions": 9,
    }
    assert Preservation(path).manifest == manifest


def test_a_file_holds_nothing_of_the_text(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    assert not any(word.encode() in data for word in ("quick", "fox", "lazy", "dog"))


def test_a_file_is_saved_under_its_suffix_and_over_nothing(tmp_path: Path) -> None:
    entry, path = entry_of(make_model(), tmp_path / "own"), tmp_path / "a.safetensors"
    with pytest.raises(ThoughtError, match=r"path='a.txt' must end in .safetensors"):
        entry.save("a.txt")
    entry.save(path)
    with pytest.raises(ThoughtError, match="exists"):
        entry.save(path)
    path.write_bytes(b"")
    entry.save(path, overwrite=True)
    assert Preservation(path).digest == entry.digest


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
    "format": (rewritten(lambda t, m: m.update(format=3)), "its format is 3, this version reads 2"),
    "no fingerprint": (rewritten(lambda t, m: m.pop("fingerprint")), "is damaged or of another version: 'fingerprint'"),
    "no name": (rewritten(lambda t, m: m.update(windows=3)), "a name in its manifest is no text"),
    "fewer directions": (rewritten(lambda t, m: m.update(directions=3)), "block 0, attn_out has a wrong size"),
    "no direction": (rewritten(lambda t, m: m.update(directions=0)), "its number of directions is 0"),
    "half a direction": (rewritten(lambda t, m: m.update(directions=2.5)), "its number of directions is 2.5"),
    "other numbers": (
        rewritten(lambda t, m: t.update({"0.attn_out.factor": t["0.attn_out.factor"].float()})),
        "0.attn_out.factor is of the dtype F32",
    ),
    "blocks": (rewritten(lambda t, m: m.update(blocks=4)), "numbers of tokens or blocks are wrong"),
    "site": (rewritten(lambda t, m: m.update(sites=[["../x"]] * 3)), "names an unknown site"),
    "a matrix less": (rewritten(lambda t, m: t.pop("1.attn_out.factor")), "its matrices are not those"),
    "other size": (
        rewritten(lambda t, m: t.update({"2.mlp_out.scale": torch.ones(9)})),
        "block 2, mlp_out has a wrong size",
    ),
    "other shape": (
        rewritten(lambda t, m: t.update({"2.mlp_out.rest": torch.ones(48)})),
        "block 2, mlp_out has a wrong size",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_before_anything_runs(damage: Damage, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    damage(path)
    with pytest.raises(ThoughtError, match=message):
        ThoughtCallback(preserve=str(path))


def test_what_is_damaged_or_of_another_version_says_how_to_write_it_anew(tmp_path: Path) -> None:
    path = written(tmp_path)
    rewritten(lambda t, m: m.update(format=1))(path)
    remedy = r"Write it anew: lit-thought preserve MODEL --out shared\.safetensors --overwrite\.$"
    with pytest.raises(ThoughtError, match=remedy):
        Preservation(path)


@pytest.mark.parametrize(("part", "value"), [("scale", float("nan")), ("rest", float("inf")), ("rest", -1.0)])
def test_numbers_of_no_gram_matrix_are_refused_and_not_kept(part: str, value: float, tmp_path: Path) -> None:
    path = written(tmp_path)
    rewritten(lambda t, m: t[f"1.mlp_out.{part}"].fill_(value))(path)
    with pytest.raises(ThoughtError, match=NAME + " is damaged: block 1, mlp_out is no Gram matrix"):
        fitted(make_model(), preserve=path, cache_dir=tmp_path / "theirs")
    assert not list(tmp_path.glob("theirs/*"))


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
        Preservation(path).check_model(fingerprint(model), model)
    with pytest.raises(ThoughtError, match=message):
        fitted(model, preserve=path)


def test_a_configuration_is_the_same_wherever_it_was_loaded(tmp_path: Path) -> None:
    path, model = written(tmp_path), make_model()
    model.config.architectures, model.config.transformers_version = ["Other"], "9.9"
    model.config._name_or_path = "elsewhere"
    Preservation(path).check_model(fingerprint(model), model)


# --- fits with it ------------------------------------------------------------------------------------------------


def fitted(model: PreTrainedModel, **settings: Any) -> ThoughtPatch:
    usual: dict[str, Any] = {"rank": 4, "preserve_tokens": 400, "progress": False}
    return transmute(model, TOKENIZER, DEMONSTRATIONS, PAIRS, **{**usual, **settings})


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fit_with_the_file_is_that_with_the_cache(family: str, order: str, tmp_path: Path) -> None:
    model = make_model(family)
    own = {"order": order, "cache_dir": tmp_path / "own"}
    found = fitted(model, preserve=written(tmp_path, model), **own)
    assert distance(found, fitted(model, preserve=[TEXT], **own)) <= ROUNDING
    assert distance(found, fitted(model, preserve=None)) > 0.01


def test_the_fewer_directions_the_further_from_all_of_them(tmp_path: Path) -> None:
    """Beside what no preservation at all does it is little."""
    model, exact = make_model(), entry_of(make_model(), tmp_path / "own")
    patch = fitted(model, preserve=[TEXT], cache_dir=tmp_path / "own")
    assert all(min(there.values()) == exact.prior(0, "attn_out").factor.shape[1] == 32 for there in exact.sizes)
    lost = [
        distance(patch, fitted(model, preserve=written(tmp_path, directions=k, overwrite=True), cache_dir=tmp_path))
        for k in (48, 16, 2)
    ]
    none = distance(patch, fitted(model, preserve=None))
    assert lost == sorted(lost)
    assert lost[0] < 1e-3
    assert lost[1] < 0.5 * none


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text"])
def test_joint_sites_and_gains_are_fitted_with_the_file(family: str, tmp_path: Path) -> None:
    model = make_family(family)
    path = written(tmp_path, model)
    assert Preservation(path).sites == [list(block.stages(DEFAULT_SITES)) for block in find_blocks(model)]
    found = fitted(model, preserve=path, cache_dir=tmp_path / "theirs")
    assert distance(found, fitted(model, preserve=[TEXT], cache_dir=tmp_path / "own")) <= ROUNDING


def test_the_file_is_used_without_its_text_and_named_by_its_hash(tmp_path: Path) -> None:
    model, path = make_model(), written(tmp_path, directions=8)
    patch = fitted(model, preserve=str(path), cache_dir=tmp_path / "theirs", preserve_tokens=5)
    settings = patch.provenance["settings"]
    assert settings["preserve_file"] == Preservation(path).digest
    assert (settings["preserve_tokens"], settings["preserve_weight"]) == (400, 8.0)
    assert str(tmp_path) not in json.dumps(patch.provenance)
    assert not (tmp_path / "theirs").exists()  # nothing is to be found later
    moved = path.rename(tmp_path / "moved.safetensors")
    assert ThoughtCallback(preserve=moved, preserve_weight=0).preserved.texts is None
    for _ in range(2):
        again = fitted(
            model, preserve=moved, cache_dir=tmp_path / "theirs", statistics_dir=tmp_path / "sums", overwrite=True
        )
        assert distance(again, patch) <= ROUNDING
        (copy,) = (tmp_path / "theirs").iterdir()
        assert Preservation(copy).digest == settings["preserve_file"]
    assert fitted(model, preserve=[TEXT]).provenance["settings"]["preserve_file"] is None


def test_a_site_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(ThoughtError, match=r"has the sites .* of block 0; the fit needs \['mlp_in'\], too"):
        fitted(make_model(), preserve=path, sites=["mlp_in"])
    path = written(tmp_path, sites=["mlp_in"], overwrite=True)
    fitted(make_model(), preserve=path, sites=["mlp_in"])


# --- saved statistics --------------------------------------------------------------------------------------------


def test_saved_statistics_are_solved_with_the_file(tmp_path: Path) -> None:
    """With the copy that the fit kept, or with the file itself where there is no cache."""
    path = written(tmp_path, directions=8)
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
    other = written(tmp_path, overwrite=True)
    found = solve_saved(saved, preserve=other, cache_dir=tmp_path / "empty", approximate=True)
    assert distance(found, patch) > 1e-4
    assert found.provenance["settings"]["preserve_file"] == Preservation(other).digest
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
    main(["preserve", "model", "--out=kept.safetensors", "--text_file=text.txt", "--preserve_tokens=300"])
    assert "MB of preservation statistics to kept.safetensors" in capsys.readouterr().err
    known = Preservation("kept.safetensors").manifest
    assert (known["tokens"], known["directions"]) == (300, DIRECTIONS)
    main([*fit_arguments(tmp_path, "text"), "--preserve=text.txt"])
    main([*fit_arguments(tmp_path, "file"), "--preserve=kept.safetensors", "--statistics_dir=sums"])
    file = ThoughtPatch.load("file")
    assert distance(ThoughtPatch.load("text"), file) <= ROUNDING
    Path("cache").rename("away")
    main(["solve", "--statistics=sums", "--out=solved", "--preserve=kept.safetensors"])
    assert distance(ThoughtPatch.load("solved"), file) <= SOLVE_ROUNDING


def test_a_file_with_chats_is_what_a_fit_on_a_text_template_preserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    arguments = ["preserve", "model", "--preserve_tokens=300", "--chats"]
    main([*arguments, "--out=kept.safetensors"])
    assert Preservation("kept.safetensors").manifest["tokens"] == 600
    main(fit_arguments(tmp_path, "default"))
    main([*fit_arguments(tmp_path, "file"), "--preserve=kept.safetensors"])
    assert distance(ThoughtPatch.load("default"), ThoughtPatch.load("file")) <= ROUNDING
    make_tokenizer(chat=False).save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(SystemExit):
        main([*arguments, "--out=other.safetensors"])
    assert "--chats: expected a model whose tokenizer has a chat template" in capsys.readouterr().err
    assert not Path("other.safetensors").exists()


def test_the_command_keeps_what_a_fit_would() -> None:
    """Its defaults are those of the settings."""
    defaults = {name: argument.default for name, argument in inspect.signature(preserve).parameters.items()}
    assert (defaults["directions"], defaults["preserve_tokens"]) == (DIRECTIONS, FitSettings.preserve_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.bin"], "--out a.bin must end in .safetensors"),
        (["--out=a.safetensors", "--directions=0"], "directions must be"),
        (["--out=a.safetensors", "--sites=[mlp]"], "sites must name"),
        (["--out=a.safetensors", "--text_file=nothing.txt"], "--text_file nothing.txt cannot be read"),
        (["--out=a.safetensors", "--preserve_tokens=0"], "preserve_tokens must be"),
        (["--out=there.safetensors"], "exists"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_file("there.safetensors") as there:
        there.touch()
    with pytest.raises(SystemExit):
        main(["preserve", "smollm2", *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert "Loading" not in error
