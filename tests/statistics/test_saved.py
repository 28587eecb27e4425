"""Statistics on disk: what is read is what was written, what is solved again is what a new fit finds, sums add."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import fit_arguments, make_files
from families import make_family
from fits import INSTRUCTION, PAIRS, SOLVE_ROUNDING, TEXTS, dense, distance, fail_at
from models import make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought.cli import main
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import default_cache_dir
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.model.blocks import find_blocks
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.least_squares import Prior
from lit_thought.solve.sums import Statistics, VectorStatistics
from lit_thought.statistics.manifest import Manifest
from lit_thought.statistics.saved import MANIFEST, SavedStatistics, StatisticsWriter
from lit_thought.statistics.solve import solve_saved
from lit_thought.statistics.stage import StageSums

Make = Callable[[], PreTrainedModel]
BOS = make_tokenizer(bos=True)  # every plain token has a counterpart
EXACT = {"order": "teacher-forced", "sites": ["mlp_out"], "steps": 1, "step_size": 1.0}
LATER = {**EXACT, "tokenizer": make_tokenizer(), "order": "sequential", "blocks": [1]}  # exact for there is one stage
NEW = {"ridge": 0.3, "rank": 3, "preserve_weight": 0.4, "step_size": 0.7}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def fitted(
    model: PreTrainedModel,
    folder: str = "saved",
    pairs: Sequence[Mapping[str, str]] = PAIRS,
    tokenizer: Any = BOS,
    instruction: str = INSTRUCTION,
    **settings: Any,
) -> ThoughtPatch:
    """The patch of a fit that leaves its statistics in ``folder``."""
    usual = {"preserve": TEXTS, "rank": 4, "ridge": 1e-2}
    usual |= {} if settings.get("preserve", "") is None else {"preserve_weight": 2.0}
    data = PairDataModule(pairs, instruction, answer_weight=3.0, batch_size=2)
    return fit(
        ThoughtModule(model, tokenizer),
        data,
        ThoughtCallback(statistics_dir=folder, **{**usual, **settings}),
        progress=False,
    )


def gemma() -> PreTrainedModel:
    """One with norms after the projections."""
    return make_family("gemma2", torch.float64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ThoughtPatch]:
    """A folder with ``saved``, the statistics of an exact fit, and with its ``cache``; and the patch of the fit."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LIT_THOUGHT_CACHE", str(root / "cache"))
        return root, fitted(make_model(), str(root / "saved"), **EXACT)


@pytest.fixture
def exact(made: tuple[Path, ThoughtPatch], tmp_path: Path) -> ThoughtPatch:
    """The patch of an exact fit, whose statistics are in ``saved``."""
    root, patch = made
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return patch


def reread(folder: str = "saved") -> SavedStatistics:
    return SavedStatistics.load(folder)


def edit(change: Callable[[dict[str, Any]], Any], file: Path = Path("saved", MANIFEST)) -> None:
    """Change the value in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def same(one: Any, other: Any) -> bool:
    """Whether two statistics are the same bits, in the same form."""
    mine, theirs = one.to_tensors(), other.to_tensors()
    return mine.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in mine.items()
    )


def difference(one: SavedStatistics, other: SavedStatistics) -> float:
    """Largest relative difference of any sum but the number of rows, which shared first tokens make fewer."""
    worst = 0.0
    for a, b in zip(one.stages(), other.stages(), strict=True):
        sums: list[tuple[Tensor, Tensor]] = []
        if a.matrix is not None:
            sums += [(a.matrix.gram, b.matrix.gram), (a.matrix.cross, b.matrix.cross)]
        if a.vector is not None:
            sums += [(a.vector.total, b.vector.total)]
        for left, right in ((a.matrix, b.matrix), (a.vector, b.vector)):
            if left is not None:
                sums += [(left.energy, right.energy), (torch.tensor(left.weight), torch.tensor(right.weight))]
        worst = max(worst, *(float((x - y).norm() / y.norm()) for x, y in sums))
    return worst


# --- statistics as tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("n", [0, 2, 40])
def test_statistics_are_the_same_after_a_round_trip(n: int, rank_one: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stats, vector = Statistics(10, 4, rank_one=rank_one), VectorStatistics(4)
    for _ in range(2 if n else 0):
        a, delta, weights = (torch.rand(size, generator=generator).double() for size in ((n, 10), (n, 4), (n,)))
        stats.update(a, delta, weights)
        vector.update(delta, weights)
    again, other = Statistics.from_tensors(stats.to_tensors()), VectorStatistics.from_tensors(vector.to_tensors())
    assert same(again, stats)
    assert same(other, vector)
    assert (again.folded, again.num_rows) == (n == 40, 4 if n == 2 else 0)
    assert (again.weight, again.tokens, other.weight, other.tokens) == (stats.weight, 2 * n, vector.weight, 2 * n)
    assert type(again.weight) is float
    assert type(again.tokens) is int
    if n:
        assert same(again + again, stats + stats)
        assert same(again - again, stats - stats)


@pytest.mark.parametrize(
    "change",
    [
        {"cross": None},
        {"a": torch.zeros(2, 10)},
        {"gram": torch.zeros(10, 9, dtype=torch.float64)},
        {"gram": torch.zeros(10, 10)},
        {"gram": torch.zeros(10, dtype=torch.float64)},
        {"weight": torch.ones(2)},
        {"operators": torch.zeros(4, 9, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_are_no_statistics_are_refused(change: dict[str, Tensor | None]) -> None:
    stats = Statistics(10, 4)
    stats.update(torch.rand(40, 10), torch.rand(40, 4))
    tensors = {name: value for name, value in {**stats.to_tensors(), **change}.items() if value is not None}
    with pytest.raises(ThoughtError, match=r"^statistics: "):
        Statistics.from_tensors(tensors)


def test_tensors_that_are_no_vector_statistics_are_refused() -> None:
    tensors = VectorStatistics(4).to_tensors()
    for change in (
        {"total": torch.zeros(2, 2)},
        {"total": torch.zeros(4, dtype=torch.int64)},
        {"gram": torch.zeros(1)},
    ):
        with pytest.raises(ThoughtError, match=r"^(statistics|dtype of the statistics)"):
            VectorStatistics.from_tensors({**tensors, **change})


# --- the same patch again --------------------------------------------------------------------------------------

CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "sequential": (make_model, {}),
    "few tokens": (make_model, {"pairs": PAIRS[:1], "tokenizer": make_tokenizer()}),
    "full rank, no preservation": (make_model, {"rank": None, "preserve": None}),
    "share of the energy": (make_model, {"rank": 0.8}),
    "steps": (make_model, {"steps": 3, "step_size": 0.5, "pairs_per_step": 2}),
    "all sites of GPT-2": (lambda: make_model("gpt2"), {"sites": ["attn_out", "mlp_in", "mlp_out"]}),
    "the paper's": (make_model, {"sites": ["mlp_in"], "order": "teacher-forced"}),
    "vectors": (make_model, {"parts": "vector", "steps": 2, "blocks": [0, 2]}),
    "norms": (gemma, {}),
    "norms, vectors": (gemma, {"parts": "vector", "steps": 2}),
    "parallel": (lambda: make_family("gpt_neox", torch.float64), {"order": "teacher-forced"}),
}


@pytest.mark.parametrize("name", CASES)
def test_at_the_settings_of_the_fit_it_is_the_patch_of_the_fit(name: str) -> None:
    make, settings = CASES[name]
    model = make()
    patch = fitted(model, **settings)
    saved = reread()
    again = solve_saved(saved, model=model if "mlp_in" in settings.get("sites", ()) else None)
    assert distance(again, patch) <= SOLVE_ROUNDING
    assert list(again.factors) == list(patch.factors)
    kept = patch.provenance.keys() - {"history", "date", "seconds", "memory"}
    for key in kept - {"diagnostics"}:
        assert again.provenance[key] == patch.provenance[key]
    for label, figures in patch.provenance["diagnostics"].items():
        assert again.provenance["diagnostics"][label] == pytest.approx(figures, rel=1e-5, abs=1e-7)
    assert again.provenance["approximate"] is None
    assert again.provenance.keys() == kept | {"date", "approximate"}
    if name in ("sequential", "few tokens"):
        assert {stage.matrix.folded for stage in saved.stages()} == {False, name == "sequential"}
    saved.save("copy")
    for one, other in zip(reread("copy").stages(), saved.stages(), strict=True):
        assert one.head == other.head
        assert same(one, other)


def test_a_stage_is_read_as_it_was_written() -> None:
    model = gemma()
    fitted(model, sites=["mlp_out"], parts="vector", steps=2)
    saved, sites = reread(), [block.sites["mlp_out"] for block in find_blocks(model)]
    assert [(head.block, head.site) for head in saved.heads] == [(i, "mlp_out") for i in range(len(sites))]
    wanted = {"model", "revision", "fingerprint", "model_type", "template", "versions"}
    assert wanted <= saved.manifest.provenance.keys()
    for stage, site in zip(saved.stages(), sites, strict=True):
        assert torch.equal(stage.gain, site.gain)
        assert stage.head.projections == {site.path: site.d_in}
        assert stage.start.vector.dtype == torch.float32
        assert (stage.start.matrix, stage.matrix) == (None, None)
        assert (stage.head.tokens, stage.head.weight) == (stage.vector.tokens, stage.vector.weight)
        assert stage.vector.tokens > 0
    assert "stages=" in repr(saved)


# --- other settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_model, {}),
        (make_model, {"sites": ["attn_out"]}),
        (make_model, {"sites": ["mlp_in"]}),
        (make_model, {"sites": ["mlp_out"], "parts": "vector"}),
        (make_model, {"pairs": PAIRS[:1]}),
        (gemma, {}),
        (make_model, LATER),
    ],
    ids=["mlp_out", "attn_out", "mlp_in", "vector", "few tokens", "norms", "one block"],
)
def test_other_settings_are_what_a_new_fit_finds(make: Make, settings: dict[str, Any]) -> None:
    settings = {**EXACT, **settings}
    model = make()
    first = fitted(model, **settings)
    saved = reread()
    assert saved.coupling() is None
    found = solve_saved(saved, model=model, **NEW)
    wanted = fitted(model, "new", **{**settings, **NEW})
    assert distance(found, wanted) <= SOLVE_ROUNDING
    assert distance(found, first) > 1e-2
    assert found.provenance["settings"] == wanted.provenance["settings"]
    assert found.provenance["approximate"] is None


COUPLED: dict[str, tuple[Make, dict[str, Any], str]] = {
    "sequential": (make_model, {"order": "sequential"}, "order='sequential'"),
    "two sites": (make_model, {"sites": None}, "a block's second site"),
    "steps": (make_model, {"steps": 2}, "several steps"),
    "no BOS": (make_model, {"tokenizer": make_tokenizer()}, r"5 tokens of the plain runs .* no BOS"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_statistics_need_a_new_fit(name: str) -> None:
    """And rightly so: with approximate=True something else comes out than from a new fit."""
    make, settings, reason = COUPLED[name]
    model, settings = make(), {**EXACT, **settings}
    fitted(model, **settings)
    saved = reread()
    with pytest.raises(ThoughtError, match=f"another ridge, rank than the fit's .*{reason}.*approximate=True"):
        solve_saved(saved, ridge=0.3, rank=3)
    found = solve_saved(saved, ridge=0.3, rank=3, approximate=True)
    assert saved.coupling() == found.provenance["approximate"]
    wanted = fitted(model, "new", **{**settings, "ridge": 0.3, "rank": 3})
    apart = distance(found, wanted)
    assert apart > 1e-6
    assert solve_saved(saved, ridge=1e-2, rank=4).provenance["approximate"] is None  # those of the fit, spelled out


def test_sums_of_narrow_products_are_not_solved_at_a_ridge_that_needs_more() -> None:
    model = make_model()
    many = [{"input": f"word{i} and word{i + 1}", "output": f"{i}"} for i in range(20)]
    fitted(model, pairs=many, **EXACT)
    assert all(head.tokens > head.d_in for head in reread().heads)
    with pytest.raises(ThoughtError, match=r"another ridge than .*0\.001 or more, as this one at 0\.01, multiply"):
        solve_saved(reread(), ridge=1e-6)
    assert "multiply" in solve_saved(reread(), ridge=1e-6, approximate=True).provenance["approximate"]
    assert solve_saved(reread(), ridge=1e-3).provenance["approximate"] is None
    wanted = fitted(model, "fine", many, **{**EXACT, "ridge": 1e-4})
    assert distance(solve_saved(reread("fine"), ridge=1e-6), wanted) > 0
    fitted(model, "rows", PAIRS[:1], **EXACT)
    assert solve_saved(reread("rows"), ridge=1e-6).provenance["approximate"] is None


def test_settings_out_of_range_are_refused(exact: ThoughtPatch) -> None:
    for settings, message in (
        ({"ridge": -1}, "ridge must be"),
        ({"ridge": True}, "ridge must be"),
        ({"rank": 0.0}, "rank must be"),
        ({"rank": 99}, "rank must be between 1 and 32"),
        ({"rank": True}, "rank must be"),
        ({"preserve_weight": float("inf")}, "preserve_weight must be"),
        ({"step_size": 0}, "step_size must be"),
        ({"step_size": 1.1}, "step_size must be"),
    ):
        with pytest.raises(ThoughtError, match=f"^{message}"):
            solve_saved(reread(), **settings)
    full = solve_saved(reread(), rank=None, preserve_weight=0)  # the ends of their ranges
    assert distance(full, fitted(make_model(), "full", **EXACT, rank=None, preserve_weight=0)) <= SOLVE_ROUNDING


# --- preservation and the model ----------------------------------------------------------------------------------


def test_the_preservation_statistics_come_from_the_cache_of_the_fit(exact: ThoughtPatch, tmp_path: Path) -> None:
    saved, elsewhere = reread(), tmp_path / "elsewhere"
    shutil.move(default_cache_dir(), elsewhere)
    missing = rf"^the preservation .* {saved.manifest.preservation}, are not in .*cache_dir"
    with pytest.raises(ThoughtError, match=missing):
        solve_saved(saved)
    assert distance(solve_saved(saved, cache_dir=elsewhere), exact) <= SOLVE_ROUNDING
    assert distance(solve_saved(saved, preserve_weight=0), exact) > 1e-3
    entry = elsewhere / saved.manifest.preservation
    content, key = load_file(entry), "lit_thought_preservation"
    with safe_open(entry, framework="pt") as file:
        header = file.metadata()
    other = {**json.loads(header[key]), "fingerprint": "of another model"}
    save_file(content, entry, {**header, key: json.dumps(other)})
    with pytest.raises(ThoughtError, match="or are damaged"):
        solve_saved(saved, cache_dir=elsewhere)
    save_file({**content, "1.attn_out.rest": torch.tensor(9.0)}, entry, header)
    with pytest.raises(ThoughtError, match="or are damaged"):
        solve_saved(saved, cache_dir=elsewhere)
    entry.write_bytes(b"broken")
    with pytest.raises(ThoughtError, match="or are damaged"):
        solve_saved(saved, cache_dir=elsewhere)


def test_other_inputs_can_be_preserved(exact: ThoughtPatch) -> None:
    saved = reread()
    asked: list[tuple[int, str]] = []

    def prior_of(block: int, site: str) -> Prior:
        asked.append((block, site))
        return Prior.from_gram(torch.zeros(48, 48))

    found = solve_saved(saved, prior_of=prior_of)
    assert asked == [(i, "mlp_out") for i in range(3)]
    assert distance(found, solve_saved(saved, preserve_weight=0)) < 1e-6


def test_a_fit_without_preservation_has_none_to_weigh() -> None:
    fitted(make_model(), **EXACT, preserve=None)
    with pytest.raises(ThoughtError, match=r"^preserve_weight: the fit had no preservation statistics"):
        solve_saved(reread(), preserve_weight=1.0)


def test_a_matrix_at_mlp_in_needs_the_model_of_the_fit() -> None:
    model = make_model()
    patch = fitted(model, **{**EXACT, "sites": ["mlp_in"]})
    saved = reread()
    with pytest.raises(ThoughtError, match=r"^model is missing: the matrix of block 0, mlp_in"):
        solve_saved(saved)
    with pytest.raises(PatchError, match=r"^model is not the one"):
        solve_saved(saved, model=make_model(seed=1))
    assert distance(solve_saved(saved, model=model), patch) <= SOLVE_ROUNDING
    vectors = fitted(model, "vectors", **{**EXACT, "sites": ["mlp_in"], "parts": "vector"})
    assert distance(solve_saved(reread("vectors")), vectors) <= SOLVE_ROUNDING


# --- algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_model, {}),
        (make_model, {"sites": ["mlp_in"]}),
        (make_model, LATER),
        (gemma, {"sites": ["attn_out"]}),
        (gemma, {"parts": "vector"}),
    ],
    ids=["mlp_out", "mlp_in", "one block", "norms", "vectors behind norms"],
)
def test_halves_add_up_to_all_and_one_taken_off_leaves_the_other(make: Make, settings: dict[str, Any]) -> None:
    settings, model = {**EXACT, **settings}, make()
    whole = fitted(model, "all", **settings)
    fitted(model, "one", PAIRS[:2], **settings)
    fitted(model, "two", PAIRS[2:], **settings)
    every, one, two = map(reread, ("all", "one", "two"))
    both, rest = one + two, every - one
    assert difference(both, every) < 1e-9
    assert difference(rest, two) < 1e-9
    both.save("both")
    patch = solve_saved(reread("both"), model=model)
    assert distance(patch, whole) < 1e-5
    assert patch.provenance["settings"] == whole.provenance["settings"]
    assert patch.provenance["approximate"] is None
    assert both.manifest.uncompared == every.manifest.uncompared
    assert rest.manifest.settings["pairs"] == 3
    assert [head.weight for head in rest.heads] == pytest.approx([head.weight for head in two.heads])
    with pytest.raises(ThoughtError, match=r"^nothing is left"):
        every - every


def test_coupled_statistics_add_only_when_told_to() -> None:
    for name, pairs in (("one", PAIRS[:2]), ("two", PAIRS[2:])):
        fitted(make_model(), name, pairs)
    one, two = map(reread, ("one", "two"))
    for operation in (lambda: one + two, lambda: one.subtract(two)):
        with pytest.raises(ThoughtError, match=r"do not add exactly: order='sequential'.*approximate=True"):
            operation()
    one.merge(two, approximate=True).save("both")
    both = reread("both")
    assert both.manifest.approximate
    assert solve_saved(both).provenance["approximate"] == both.coupling()
    total = one.stage(0).matrix.gram + two.stage(0).matrix.gram
    torch.testing.assert_close(both.stage(0).matrix.gram, total, rtol=1e-12, atol=1e-12)
    fitted(make_model(), "steps", PAIRS[2:], steps=2)
    steps = reread("steps")
    with pytest.raises(ThoughtError, match=r"cannot be combined: .* several steps"):
        steps.merge(replace_settings(steps), approximate=True)


def replace_settings(saved: SavedStatistics, **settings: Any) -> SavedStatistics:
    """The same statistics, as of another fit."""
    provenance = {**saved.manifest.provenance, "settings": {**saved.manifest.settings, **settings}}
    return SavedStatistics(replace(saved.manifest, provenance=provenance), saved.heads, saved.stage, saved.device)


def test_statistics_of_other_fits_are_refused_by_name() -> None:
    model = make_model()
    fitted(model, "one", PAIRS[:2], **EXACT)
    one = reread("one")
    for settings, named in (
        ({"ridge": 0.5}, r"settings: ridge is 0\.01 and 0\.5"),
        ({"sites": ["attn_out"]}, "settings: sites"),
        ({"blocks": [0, 2]}, "settings: blocks"),
        ({"preserve_tokens": 30}, "settings: preserve_tokens is 6000 and 30"),
        ({"preserve": TEXTS[:1]}, r"preservation is 'preserve-\w{24}\.safetensors' and"),
        ({"model": make_model(seed=1)}, "fingerprint"),
    ):
        fitted(settings.pop("model", model), "two", PAIRS[2:], **{**EXACT, **settings}, overwrite=True)
        with pytest.raises(ThoughtError, match=f"^statistics of different fits cannot be combined: {named}"):
            one + reread("two")


def test_instructions_are_put_together_and_stages_must_match() -> None:
    model = make_model()
    fitted(model, "one", PAIRS[:2], **EXACT)
    fitted(model, "two", PAIRS[2:], instruction="Talk like a pirate.\n", **EXACT)
    one, two = map(reread, ("one", "two"))
    both = one + two
    assert both.manifest.provenance["instruction"] == sorted([INSTRUCTION, "Talk like a pirate.\n"])
    assert both.manifest.settings["pairs"] == 5
    shorter = SavedStatistics(two.manifest, two.heads[:2], two.stage, two.device)
    with pytest.raises(ThoughtError, match=r"^statistics of different stages cannot be combined: block 0, mlp_out"):
        one + shorter
    assert (one + replace_settings(two, seed=5)).manifest.settings["seed"] is None


# --- the folder ---------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "stage-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def swap(folder: Path) -> None:
    files = [folder / f"stage-000{i}.safetensors" for i in (0, 1)]
    content = [file.read_bytes() for file in files]
    for file, other in zip(files, content[::-1], strict=True):
        file.write_bytes(other)


def lead_out(folder: Path) -> None:
    file = folder / "stage-0001.safetensors"
    file.rename(folder.parent / file.name)
    file.symlink_to(folder.parent / file.name)


def foreign(folder: Path) -> None:
    fitted(make_model(), "foreign", **EXACT)
    shutil.copy(folder.parent / "foreign" / "stage-0001.safetensors", folder)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(change, folder / MANIFEST)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"'saved' has no manifest\.json"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "is not readable JSON"),
    "no object": (lambda folder: (folder / MANIFEST).write_text("[]"), "format_version is None"),
    "other version": (edited(lambda v: v.update(format_version=2)), "format_version is 2, this lit_thought reads 1"),
    "no stages": (edited(lambda v: v.update(stages=[])), "damaged"),
    "stages twice": (edited(lambda v: v["stages"].append(v["stages"][0])), "damaged"),
    "stages of another type": (edited(lambda v: v.update(stages=7)), "damaged"),
    "key missing": (edited(lambda v: v.pop("uncompared")), "damaged"),
    "no settings": (edited(lambda v: v["provenance"].pop("settings")), "damaged"),
    "setting missing": (
        edited(lambda v: v["provenance"]["settings"].pop("ridge")),
        "damaged .its provenance lacks ridge",
    ),
    "no fingerprint": (edited(lambda v: v["provenance"].pop("fingerprint")), "damaged"),
    "path for an entry": (edited(lambda v: v.update(preservation="../../etc")), "is no name of preservation"),
    "stage's key": (edited(lambda v: v["stages"][1].update(file="/etc/passwd")), "damaged"),
    "stage's size": (edited(lambda v: v["stages"][1].update(d_in=0)), "damaged"),
    "stage's site": (edited(lambda v: v["stages"][1].update(site="../x")), "damaged"),
    "stage's parts": (edited(lambda v: v["stages"][1].update(parts=["vector", "matrix"])), "damaged"),
    "stage without sums": (edited(lambda v: v["stages"][1].update(parts=[])), "names a stage without sums"),
    "stage's columns": (edited(lambda v: v["stages"][1].update(projections={"a": 3, "b": 4})), "damaged"),
    "file missing": (lambda folder: (folder / "stage-0002.safetensors").unlink(), "has no stage-0002"),
    "file truncated": (truncate, r"stage-0001\.safetensors in 'saved' is damaged"),
    "file not safetensors": (lambda folder: (folder / "stage-0000.safetensors").write_bytes(b"x" * 99), "damaged"),
    "link that leads out": (lead_out, r"has no stage-0001\.safetensors of its own"),
    "files swapped": (swap, "mixes two saves"),
    "file of another save": (foreign, "mixes two saves"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_when_it_is_opened(name: str, exact: ThoughtPatch, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(tmp_path / "saved")
    with pytest.raises(PatchError, match=message):
        reread()


def test_tensors_that_do_not_fit_the_manifest_are_refused(exact: ThoughtPatch) -> None:
    saved, file = reread(), Path("saved", "stage-0001.safetensors")
    genuine, first = load_file(file), saved.stage(0).matrix
    label = {"statistics": json.loads(Path("saved", MANIFEST).read_text())["id"], "block": "1", "site": "mlp_out"}
    for change in (
        {"matrix.a": None},
        {"matrix.delta": torch.zeros(42, 31, dtype=torch.float64)},
        {"matrix.extra": torch.zeros(1)},
        {"other": torch.zeros(1)},
        {"gain": torch.zeros(32)},
        {"start.A": torch.zeros(2, 48)},
        {"start.vector": torch.zeros(32)},
        {"patch.vector": torch.zeros(31)},
        {"patch.A": torch.zeros(0, 48), "patch.B": torch.zeros(32, 0)},
        {"patch.vector": torch.full((32,), float("nan"))},
    ):
        save_file({k: value for k, value in {**genuine, **change}.items() if value is not None}, file, label)
        assert same(reread().stage(0).matrix, first)
        with pytest.raises(PatchError, match=r"^stage-0001\.safetensors in 'saved' is damaged"):
            reread().stage(1)
    for header in ({"figures": "[1]"}, {"figures": '{"rank": "x"}'}, {"history": "{"}, {"history": "[[]]"}):
        save_file(genuine, file, {**label, **header})
        with pytest.raises(PatchError, match=r"^stage-0001\.safetensors in 'saved' is damaged"):
            reread().stage(1)


def write_and_fail(folder: str, saved: SavedStatistics) -> None:
    with StatisticsWriter(folder, saved.manifest) as writer:
        writer.add(saved.stage(0))
        _ = 1 / 0


def test_a_failed_or_empty_fit_leaves_nothing(
    exact: ThoughtPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, before = reread(), sorted(tmp_path.iterdir())
    with pytest.raises(ThoughtError, match="not empty"):
        StatisticsWriter("saved", saved.manifest)
    with pytest.raises(ZeroDivisionError):
        write_and_fail("new", saved)
    writer = StatisticsWriter("saved", saved.manifest, overwrite=True)
    writer.add(saved.stage(0))
    writer.abort()
    writer.abort()
    with pytest.raises(ThoughtError, match="no stage was added"):
        StatisticsWriter("new", saved.manifest).close()
    for owner, name, number in ((StatisticsWriter, "add", 2), (StageSums, "solve", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail_at(number, ZeroDivisionError(), getattr(owner, name)))
            with pytest.raises(ZeroDivisionError):
                fitted(make_model(), "new", **EXACT)
    assert sorted(tmp_path.iterdir()) == before
    assert len(reread()) == 3


def test_a_later_stage_takes_the_place_of_the_same_one(exact: ThoughtPatch, tmp_path: Path) -> None:
    saved = reread()
    with StatisticsWriter("new", saved.manifest) as writer:
        first = saved.stage(0)
        for stage in (replace(first, matrix=first.matrix + first.matrix), saved.stage(1), saved.stage(2), first):
            writer.add(stage)
    new = reread("new")
    assert [head.block for head in new.heads] == [0, 1, 2]
    assert same(new.stage(0).matrix, saved.stage(0).matrix)
    new.save("new", overwrite=True)  # read while it is replaced
    assert same(reread("new").stage(2).matrix, saved.stage(2).matrix)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        MANIFEST,
        *(f"stage-000{i}.safetensors" for i in range(3)),
    ]


def test_stages_know_the_patch_they_started_from() -> None:
    fitted(make_model(), **{**EXACT, "steps": 2, "step_size": 0.5})
    for stage in reread().stages():
        assert stage.head.start
        assert stage.start.matrix.A.shape == (4, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": "out", "statistics_dir": "out/sums"}, "neither in the other"),
        ({"output_dir": "out", "statistics_dir": "out"}, "neither in the other"),
        ({"resume_dir": "sums/unfinished", "statistics_dir": "sums"}, "statistics_dir and resume_dir .*neither in"),
    ],
)
def test_folders_that_would_fail_at_the_end(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        ThoughtCallback(**settings)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_files(tmp_path)
    main([*fit_arguments(tmp_path), "--statistics_dir=sums"])
    solve = ["solve", "--statistics=sums"]
    main([*solve, "--out=again"])
    assert distance(ThoughtPatch.load("again"), ThoughtPatch.load("adapter")) <= SOLVE_ROUNDING
    with pytest.raises(SystemExit):
        main([*solve, "--out=other", "--ridge=0.5"])
    assert "approximate" in capsys.readouterr().err
    main([*solve, "--out=other", "--rank=2", "--approximate=true"])
    assert ThoughtPatch.load("other").rank == 2


@pytest.mark.parametrize("scale", [0.5, 0.0, -2.0])
def test_a_fit_that_was_scaled_is_solved_so(scale: float) -> None:
    patch = fitted(make_model(), scale=scale, **EXACT)
    again = solve_saved(reread())
    assert (again.provenance.get("scale"), patch.provenance.get("scale")) == (scale, scale)
    for path, delta in dense(patch).items():
        assert torch.allclose(dense(again)[path], delta, rtol=1e-5, atol=1e-9)
    fitted(make_model(), "other", PAIRS[:2], scale=scale + 1, **EXACT)
    with pytest.raises(ThoughtError, match=f"scale is {scale} and {scale + 1}"):
        _ = reread() + reread("other")


def test_differences_and_sums_of_as_many_tokens_as_inputs_are_too_coarse_for_a_small_ridge() -> None:
    fitted(make_model().float(), **EXACT)
    fitted(make_model().float(), "some", PAIRS[:2], **EXACT)
    few = reread() - reread("some")
    assert all(head.tokens < head.d_in for head in few.heads)
    solve_saved(few, ridge=0.01)
    with pytest.raises(ThoughtError, match=r"another ridge .* multiply in the model's own dtype"):
        solve_saved(few, ridge=1e-7)
    assert "multiply" in solve_saved(few, ridge=1e-7, approximate=True).provenance["approximate"]
    kept = reread()
    kept.heads = tuple(replace(head, tokens=head.d_in) for head in kept.heads)
    with pytest.raises(ThoughtError, match=r"another ridge .* multiply in the model's own dtype"):
        solve_saved(kept, ridge=1e-7)


def test_what_is_preserved_without_weight_is_refused(exact: ThoughtPatch, tmp_path: Path) -> None:
    fitted(make_model(), "nothing", preserve=None, **EXACT)
    (entry,) = (tmp_path / "cache").glob("preserve-*")
    with pytest.raises(ThoughtError, match="preserve has no effect at preserve_weight=0"):
        solve_saved(reread("nothing"), preserve=entry)
    with pytest.raises(ThoughtError, match="prior_of has no effect at preserve_weight=0"):
        solve_saved(reread(), preserve_weight=0.0, prior_of=lambda block, site: pytest.fail("asked"))


def test_what_is_told_of_pairs_put_together_and_taken_out() -> None:
    common = {"versions": {}, "fingerprint": "f"}
    base = {"order": "teacher-forced", "pairs": 3}

    def manifest(instruction: Any, **settings: Any) -> Manifest:
        inputs = {"kind": "system", "count": 3, "pairs": []}
        return Manifest({**common, "instruction": instruction, "inputs": inputs, "settings": {**base, **settings}})

    both = manifest("a", inputs=20).combined(manifest("b", inputs=None), 1, False)
    assert both.provenance["instruction"] == ["a", "b"]
    assert "inputs" not in both.provenance
    assert both.settings["inputs"] is None
    left = both.combined(manifest("b", inputs=20), -1, False)
    assert (left.provenance["instruction"], left.settings["pairs"]) == ("a", 3)
    same = manifest("a").combined(manifest("a"), -1, False)
    assert same.provenance["instruction"] == "a"


def test_sums_of_a_long_instruction_add_only_when_told_to() -> None:
    """What an answer's token weighs depends on the mean over all pairs of its fit."""
    text = "The bridge was opened in 1893. It is long.\n"
    for name, pairs in (("one", PAIRS[:2]), ("two", PAIRS[2:]), ("all", PAIRS)):
        data = PairDataModule(pairs, text, kind="document", batch_size=2)
        options = {"preserve": None, "rank": 4, "ridge": 1e-2, "statistics_dir": name, **EXACT, "blocks": [1]}
        fit(ThoughtModule(make_model(), BOS), data, ThoughtCallback(**options), progress=False)
    one, two, every = map(reread, ("one", "two", "all"))
    assert every.coupling() is None  # of itself it is solved anew at any setting
    solve_saved(every, rank=2)
    for operation in (lambda: one + two, lambda: every - one):
        with pytest.raises(ThoughtError, match=r"do not add exactly: the instruction is a long one.*approximate=True"):
            operation()
    both = one.merge(two, approximate=True)
    assert difference(both, every) > 1e-3  # they are other sums
    both.save("both")
    assert solve_saved(reread("both")).provenance["approximate"] == every.inexact()
    fitted(make_model(), "short", PAIRS[2:], instruction=text, preserve=None, **{**EXACT, "blocks": [1]})
    with pytest.raises(ThoughtError, match="settings: "):
        one.merge(reread("short"), approximate=True)


def test_what_is_left_of_written_outputs_can_be_saved() -> None:
    """Of a set whose outputs were given, that of pairs with outputs that the model wrote is taken off."""
    for name, pairs in (("all", PAIRS), ("one", PAIRS[:2])):
        fitted(make_model(), name, pairs, **EXACT)
    rest = reread("all") - replace_settings(reread("one"), generated_outputs=2)
    rest.save("rest")
    assert reread("rest").manifest.settings["generated_outputs"] == 0


def test_other_inputs_to_preserve_change_coupled_sums_too() -> None:
    fitted(make_model(), "sequential")
    saved, prior = reread("sequential"), Prior.from_gram(torch.eye(48))
    others = {"attn_out": Prior.from_gram(torch.eye(32)), "mlp_out": prior}
    with pytest.raises(ThoughtError, match=r"^another prior_of than the fit's would change the sums"):
        solve_saved(saved, prior_of=lambda block, site: others[site])
    told = solve_saved(saved, prior_of=lambda block, site: others[site], approximate=True)
    assert told.provenance["approximate"] == saved.coupling()
