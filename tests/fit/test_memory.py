"""Memory: where streams are kept, what a fit is said to need, and when it is refused."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fits
import psutil
import pytest
import torch
from families import make_family
from fits import INSTRUCTION, TOKENIZER, identical
from models import FAMILIES, make_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.cli import main
from lit_thought.errors import MemoryBudgetError, ThoughtError
from lit_thought.fit import budget, callback, preparing
from lit_thought.fit.budget import choose_place, free_disk, free_memory, room
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.estimate import Estimate, Load, estimate_bytes, estimate_seconds
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preserving import PreservationSource
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import PairBatch, make_batches
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs import storage
from lit_thought.runs.runner import StreamRunner, stages_of
from lit_thought.runs.storage import Storage
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import SITES
from lit_thought.solve.sums import Statistics

WORDS = ("hot", "big", "brown fox", "French", "quick", "the lazy dog", "what is the capital", "over")
PAIRS = [{"input": word, "output": "the " + WORDS[-i]} for i, word in enumerate(WORDS)]
BOTH = ("attn_out", "mlp_out")
GB = 10**9


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    return folder


make_patch = partial(fits.make_patch, pairs=PAIRS, rank=4, batch_size=3)


# --- where tensors are kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_what_is_kept_comes_back_as_it_was(place: storage.Place, dtype: torch.dtype) -> None:
    there = Storage(place)
    values = [torch.randn(2, 3, 700).to(dtype), torch.randn(5, 4).to(dtype).T, torch.ones(()).to(dtype)]
    values += [torch.zeros(0, 3, dtype=dtype), torch.randn(4, 6).to(dtype)[:, ::2]]
    kept = [there.put(value) for value in values]
    for value, home in zip(values, kept, strict=True):
        found = home.get()
        assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
        assert torch.equal(found, value)


def test_a_file_is_used_again_but_never_under_a_tensor_in_use() -> None:
    there = Storage("disk")
    first = there.put(torch.full((3000,), 1.0))
    in_use = first.get()
    in_use[:10] += 1  # private to this tensor
    assert torch.equal(first.get(), torch.full((3000,), 1.0))
    del first
    second = there.put(torch.full((3000,), 2.0))
    assert torch.equal(in_use[10:], torch.full((2990,), 1.0))
    size = os.fstat(there._arena.file.fileno()).st_size  # type: ignore[union-attr]
    del in_use, second
    for value in range(20):
        kept = there.put(torch.full((3000,), float(value)))
    assert kept.get()[0] == 19
    assert os.fstat(there._arena.file.fileno()).st_size == size  # type: ignore[union-attr]


def test_a_full_disk_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Storage("disk")
    there._arena.file.close()  # type: ignore[union-attr]
    there._arena.file = open("/dev/full", "wb", buffering=0)  # type: ignore[union-attr]  # noqa: SIM115
    with pytest.raises(MemoryBudgetError, match=r"cannot be written .*No space left.* TMPDIR"):
        there.put(torch.ones(3))
    there.close()


# --- the same patch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"order": "teacher-forced", "sites": ("attn_out", "mlp_in"), "parts": ("matrix",)}),
        ("mistral", {"steps": 2, "pairs_per_step": 4, "blocks": [1, 2]}),
        ("gpt2", {"sites": ("mlp_out",)}),
    ],
)
def test_the_patch_does_not_depend_on_the_place(family: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    wanted = make_patch(model, offload="device", **settings)
    for offload in ("disk", True):
        assert identical(make_patch(model, offload=offload, **settings), wanted), offload


def test_a_norm_after_the_projections() -> None:
    model = make_family("gemma3_text")
    assert identical(*(make_patch(model, offload=place) for place in ("device", "disk")))


# --- nothing is left ------------------------------------------------------------------------------------------


def open_files(folder: Path) -> list[str]:
    """Files in a folder, and deleted ones of it that this process still has open or mapped."""
    process = Path("/proc/self")
    descriptors = []
    for link in (process / "fd").iterdir():
        try:
            descriptors.append(os.readlink(link))
        except OSError:
            continue
    lines = [*descriptors, *(process / "maps").read_text().splitlines()]
    return [*map(str, folder.iterdir()), *(line for line in lines if str(folder) in line)]


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_nothing_is_left_on_disk(temporary: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    seen: list[list[str]] = []
    finish = StreamRunner.finish

    def watched(runner: StreamRunner, patch: SitePatch) -> None:
        seen.append(open_files(temporary))
        if error is not None and runner.stage == 3:
            raise error
        finish(runner, patch)

    monkeypatch.setattr(StreamRunner, "finish", watched)
    if error is None:
        make_patch(make_model(), offload="disk")
    else:
        with pytest.raises(type(error)):
            make_patch(make_model(), offload="disk")
    assert len(seen) == (6 if error is None else 4)
    assert all(seen), "the file is open during the fit"
    assert open_files(temporary) == []


# --- what is in memory ----------------------------------------------------------------------------------------


def tensors_in_memory() -> dict[int, int]:
    """Bytes of all living tensors, by where their storage begins."""
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}


class Watched:
    """A runner driven as a fit drives it; the most bytes of tensors that it keeps between two batches."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[PairBatch], sites: Sequence[str], place: storage.Place
    ) -> None:
        gc.collect()
        self.before, self.most = tensors_in_memory(), 0
        runner = StreamRunner(model, find_blocks(model), sites, storage=Storage(place))
        while runner.stage < runner.num_stages:
            for batch in batches:
                runner.observe(batch)
            self.look()
            runner.finish(SitePatch())
            self.look()

    def look(self) -> None:
        now = tensors_in_memory()
        self.most = max(self.most, sum(size for place, size in now.items() if place not in self.before))


def long_batches(template: str = "start", batch_size: int = 4) -> list[PairBatch]:
    prompts = PromptTemplate.parse({"start": "{input}{output}", "after": "{input}\n{instruction}A: {output}"}[template])
    texts = ["".join(WORDS[(i + j) % 8] + " " for j in range(3)) for i in range(8)]
    pairs: list[TokenisedPair] = [
        prompts.tokenise(TOKENIZER, INSTRUCTION * 3, text, pair["output"])
        for text, pair in zip(texts, PAIRS, strict=True)
    ]
    return make_batches(pairs, batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sites", "template"),
    [
        *((family, BOTH, "start") for family in ("llama", "gpt2", "gemma3_text", "phi", "granite", "mixtral")),
        *(("llama", sites, "after") for sites in (BOTH, ("mlp_in",), ("mlp_out",), ("attn_out",), SITES)),
    ],
)
def test_the_estimate_is_what_the_streams_take(family: str, sites: tuple[str, ...], template: str) -> None:
    """Within -20 and +30 %, against a count of all living tensors; with a chunk that all share, and with one inside."""
    model = make_model(family, torch.float32) if family in FAMILIES else make_family(family, torch.float32)
    blocks, batches = find_blocks(model), long_batches(template)
    stages = stages_of(blocks, sites)
    found = estimate_bytes(model, blocks, stages, Load.of(batches), 100)
    kept = Watched(model, batches, sites, "device").most
    assert 0.8 * kept < found.held_bytes < 1.3 * kept, (found.held_bytes / kept, found)


def test_what_is_done_with_is_let_go() -> None:
    """Batch by batch: the targets of a site that is seen for the last time, and what a known output makes of no use."""
    model, batches = make_model("llama", torch.float32), long_batches()
    runner = StreamRunner(model, find_blocks(model), BOTH)
    for targets in ({"mlp_out"}, set()):
        for batch in batches:
            runner.observe(batch)
            assert runner._pairs[batch.index].goals.keys() == targets
        runner.finish(SitePatch())
    pair = runner._pairs[batches[0].index]
    assert (pair.after, pair.middle) == (None, None)


def test_on_disk_no_stream_stays_in_memory() -> None:
    """One more batch of the same kind makes no difference; on the device it does."""
    model, batches = make_model("llama", torch.float32), long_batches("after", batch_size=1)
    few, many = (Watched(model, batches[:n], BOTH, "disk").most for n in (3, 8))
    ids = [batch.target.ids.numel() + batch.plain.ids.numel() for batch in batches[3:] if batch.plain is not None]
    assert many - few < 32 * sum(ids)  # ids, masks and rows: less than a tenth of a stream's 128 bytes a token each
    device = Watched(model, batches, BOTH, "device").most
    assert many < device / 5


def test_the_sums_take_what_is_said() -> None:
    """While there are few tokens these, then Z and C, against the tensors of the statistics."""
    model = make_model()
    blocks = find_blocks(model)
    site, stages = blocks[0].sites["mlp_out"], stages_of(blocks, BOTH)
    for tokens in (10, 100):
        stats = Statistics(site.d_in, site.d_out)
        stats.update(torch.randn(tokens, site.d_in), torch.randn(tokens, site.d_out))
        size = sum(x.numel() * x.element_size() for x in stats.to_tensors().values() if x.ndim == 2)
        found = estimate_bytes(model, blocks, stages, Load.typical(tokens, 0), tokens)
        assert found.statistics_bytes == size
        assert found.widest == ("mlp_out", site.d_in)


# --- budgets --------------------------------------------------------------------------------------------------


def needing(held: int, work: int, place: storage.Place = "device") -> Estimate:
    return Estimate(1000, ("mlp_out", 48), held - 1, 1, work - 1, 1, place=place)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "rooms", "place"),
    [
        (CUDA, {"device": 70, "main": 0, "disk": 0}, "device"),
        (CUDA, {"device": 69, "main": 120, "disk": 0}, "cpu"),
        (CUDA, {"device": 69, "main": 119, "disk": 60}, "disk"),  # pinned memory may take twice as much
        (CUDA, {"device": 9, "main": 1000, "disk": 1000}, None),
        (CPU, {"device": 70, "main": 70, "disk": 0}, "device"),
        (CPU, {"device": 69, "main": 69, "disk": 60}, "disk"),
        (CPU, {"device": 69, "main": 69, "disk": 59}, None),
        (CPU, {"device": 9, "main": 9, "disk": 1000}, None),
    ],
)
def test_the_first_place_where_it_fits(device: torch.device, rooms: dict[str, int], place: str | None) -> None:
    needed = needing(held=60, work=10)
    if place is not None:
        assert choose_place(needed, "auto", device, rooms) == place
        assert choose_place(needed, place, device, rooms) == place
        return
    with pytest.raises(MemoryBudgetError, match="70 bytes besides the model"):
        choose_place(needed, "auto", device, rooms)


def test_another_place_is_not_taken_unasked() -> None:
    rooms = {"device": 50 * GB, "main": 50 * GB, "disk": 1000 * GB}
    needed = needing(60 * GB, 10 * GB)
    assert choose_place(needed, "auto", CPU, rooms) == "disk"
    with pytest.raises(
        MemoryBudgetError, match=r"offload='device'.* 70.0 GB .*50.0 GB on the device.*1000.0 GB on disk"
    ) as e:
        choose_place(needed, "device", CPU, rooms)
    assert 'offload="auto" or "disk"' in str(e.value)


def test_room_is_a_share_of_what_is_free_or_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 10 * GB)
    monkeypatch.setattr(budget, "free_disk", lambda: 100 * GB)
    assert room(CPU) == {"device": 8 * GB, "main": 8 * GB, "disk": 80 * GB}
    assert room(CPU, processes=4) == {"device": 2 * GB, "main": 2 * GB, "disk": 20 * GB}
    assert room(CUDA, processes=4) == {"device": 8 * GB, "main": 2 * GB, "disk": 20 * GB}
    assert room(CPU, memory_budget=0.5) == {"device": GB // 2, "main": GB // 2, "disk": 80 * GB}


def test_control_groups_limit_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the group around the process's own counts; files that are cached give way."""
    outer = tmp_path / "slice"
    (outer / "job").mkdir(parents=True)
    for name, text in (("max", "5000"), ("current", "3000"), ("stat", "anon 2500\ninactive_file 400\n")):
        (outer / f"memory.{name}").write_text(text)
    (outer / "job" / "memory.max").write_text("max\n")
    monkeypatch.setattr(budget, "_CGROUPS", tmp_path)
    monkeypatch.setattr(budget, "_OWN_GROUPS", tmp_path / "own")
    assert free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "own").write_text("0::/slice/job\n")
    assert free_memory(CPU) == 2400
    (tmp_path / "memory" / "job").mkdir(parents=True)  # version 1
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "300"), ("stat", "total_inactive_file 7\n")):
        (tmp_path / "memory" / "job" / f"memory.{name}").write_text(text)
    (tmp_path / "own").write_text("4:memory:/job\n1:cpu:/job\n")
    assert free_memory(CPU) == 607


def test_memory_that_poses_as_a_disk_has_no_room(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_disk() == pytest.approx(psutil.disk_usage(str(temporary)).free, rel=0.05)
    if not Path("/dev/shm").is_mount():
        pytest.skip("no tmpfs here")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert free_disk() == 0


# --- the fit --------------------------------------------------------------------------------------------------


def run_fit(model: PreTrainedModel, pairs: Sequence[dict[str, str]] = PAIRS, **settings: Any) -> ThoughtCallback:
    thought = ThoughtCallback(**{"preserve": None, "rank": 4, **settings})
    fit(ThoughtModule(model, TOKENIZER), PairDataModule(pairs, INSTRUCTION, batch_size=3), thought, progress=False)
    return thought


def test_a_fit_goes_to_disk_when_memory_is_short_and_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    roomy = run_fit(model).estimate
    assert roomy is not None
    assert (roomy.place, dict(roomy.seconds)) == ("device", {})  # too short to be worth timing
    assert "streams of" in roomy.parts()
    monkeypatch.setattr(budget, "free_memory", lambda device: (roomy.total_bytes - 1) / 0.8)
    short = run_fit(model)
    assert short.estimate is not None
    assert short.estimate.place == "disk"
    assert "streams on disk" in str(short.estimate)
    assert short.patch is not None
    stated = run_fit(model, memory_budget=roomy.total_bytes / 1e9 + 1e-9).estimate
    assert stated is not None
    assert stated.place == "device"


@pytest.mark.parametrize("missing", [False, True], ids=["outputs given", "outputs missing"])
@pytest.mark.parametrize("settings", [{"memory_budget": 1e-6}, {"memory_budget": 1.8e-4, "offload": "device"}])
def test_a_fit_that_cannot_fit_is_refused_before_any_forward(
    settings: dict[str, Any], missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model has run")

    pairs = [{"input": pair["input"]} for pair in PAIRS] if missing else PAIRS
    thought = ThoughtCallback(preserve="default", rank=4, **settings)
    data = PairDataModule(pairs, INSTRUCTION, max_new_tokens=2)
    blocks = find_blocks(model)  # runs the model to find out about it; from here on it must not
    monkeypatch.setattr(callback, "find_blocks", lambda model: blocks)
    for module in (model, model.model, model.model.layers[0]):
        module.register_forward_pre_hook(fail)
    with pytest.raises(MemoryBudgetError) as error:
        fit(ThoughtModule(model, TOKENIZER), data, thought, progress=False)
    text = str(error.value)
    assert ("at least" in text) == missing
    for part in ("streams of", "keys and values", "widest site (mlp_out, 48 inputs)", "its solve", "memory_budget"):
        assert part in text
    assert ("fewer pairs or sites with fewer inputs" in text) == ("offload" not in settings)
    assert ("a smaller chunk" in text) == ("offload" in settings)


def test_what_the_model_writes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that only its written outputs make too large is refused once they are there."""
    pairs = [{"input": pair["input"]} for pair in PAIRS]
    model = make_model()
    model.generation_config.suppress_tokens = [i for i in range(512) if i != TOKENIZER.convert_tokens_to_ids("a")]
    thought, data = ThoughtCallback(preserve=None, rank=4), PairDataModule(pairs, INSTRUCTION, max_new_tokens=20)
    seen: list[Estimate] = []
    real = preparing.plan

    def watched(*args: Any, **kwargs: Any) -> Estimate:
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(preparing, "plan", watched)
    fit(ThoughtModule(model, TOKENIZER), data, thought, progress=False)
    assert len(seen) == 2
    assert seen[0].streams_bytes < seen[1].streams_bytes
    limit = (seen[0].total_bytes + seen[1].total_bytes) / 2e9
    thought = ThoughtCallback(preserve=None, rank=4, memory_budget=limit, offload="device")
    with pytest.raises(MemoryBudgetError, match=r"the fit needs [0-9]"):
        fit(ThoughtModule(model, TOKENIZER), data, thought, progress=False)
    assert data.written


def test_what_a_fit_takes_is_said_before_any_long_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And again only where the outputs that were written move the streams to another place."""
    pairs, model = [{"input": pair["input"]} for pair in PAIRS], make_model()
    model.generation_config.suppress_tokens = [i for i in range(512) if i != TOKENIZER.convert_tokens_to_ids("a")]
    said: list[list[str]] = []
    estimates: list[Estimate] = []

    def note() -> None:
        said.append([line for line in capsys.readouterr().err.splitlines() if "This fit takes" in line])

    def noting(genuine: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **settings: (note(), genuine(*args, **settings))[1]

    def plan(*args: Any, genuine: Callable[..., Any] = preparing.plan, **settings: Any) -> Estimate:
        estimates.append(genuine(*args, **settings))
        return estimates[-1]

    monkeypatch.setattr(preparing, "plan", plan)
    monkeypatch.setattr(preparing, "write_outputs", noting(preparing.write_outputs))
    monkeypatch.setattr(PreservationSource, "load", noting(PreservationSource.load))

    def run(**settings: Any) -> list[list[str]]:
        said.clear()
        data = PairDataModule(pairs, INSTRUCTION, max_new_tokens=20)
        thought = ThoughtCallback(preserve=None, rank=4, **settings)
        fit(ThoughtModule(model, TOKENIZER), data, thought, progress=True)
        note()
        return said

    assert [len(lines) for lines in run()] == [1, 0, 0]  # before preservation, before outputs, in the end
    between = (estimates[0].total_bytes + estimates[1].total_bytes) / 2e9
    first, none, second = run(memory_budget=between)
    assert none == []
    assert ("on disk" in first[0], "on disk" in second[0]) == (False, True)


def test_a_process_without_pairs_plans_as_well() -> None:
    model = make_model()
    blocks = find_blocks(model)
    settings = {"offload": "auto", "memory_budget": None, "directions": 120, "processes": 3, "steps": 1, "missing": 0}
    settings |= {"weighings": 1}
    found = budget.plan(model, blocks, stages_of(blocks, SITES), [], **settings)
    assert found.place == "device"
    assert sum(found.seconds.values()) == 0


@pytest.mark.parametrize(
    ("settings", "data", "times"),
    [
        ({}, {"kind": "document"}, 1),
        ({"steps": 3}, {"kind": "document"}, 1),
        ({"steps": 3, "pairs_per_step": 3}, {"kind": "document"}, 3),
        ({}, {}, 0),
    ],
)
def test_weighing_is_in_the_estimate(
    settings: dict[str, Any], data: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it is done."""
    said: list[float] = []
    monkeypatch.setattr(budget, "fit_operations", lambda *_: {"forward": 0.0})
    monkeypatch.setattr(budget, "weighing_operations", lambda *_: 1.0)
    monkeypatch.setattr(budget, "estimate_seconds", lambda operations, *_: said.append(operations["forward"]) or {})
    thought = ThoughtCallback(preserve=None, rank=4, **settings)
    fit(ThoughtModule(make_model(), TOKENIZER), PairDataModule(PAIRS, INSTRUCTION, **data), thought, progress=False)
    assert said == [times]


def test_what_is_said_while_outputs_are_missing() -> None:
    estimate = replace(needing(60 * GB, 10 * GB), seconds={"forward": 8.0, "solve": 2.0})
    assert str(estimate) == "This fit takes about 10.0 s and 70.0 GB besides the model."
    text = str(replace(estimate, most_seconds=30.0))
    wanted = (
        "This fit takes about 10.0 s to 30.0 s, once the outputs are written, and at least 70.0 GB besides the model."
    )
    assert text == wanted


@pytest.mark.parametrize(
    "setting",
    [
        {"offload": "gpu"},
        {"offload": 1.0},
        {"offload": None},
        {"memory_budget": 0},
        {"memory_budget": float("nan")},
        {"memory_budget": True},
        {"memory_budget": "1GB"},
    ],
)
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(ThoughtError, match=f"^{next(iter(setting))} must be"):
        ThoughtCallback(**setting)


def test_seconds_follow_from_the_speed_of_this_machine() -> None:
    layer = nn.Linear(512, 512)
    assert estimate_seconds({"forward": 1e9, "statistics": 1e9, "solve": 1e9}, layer, CPU, 64) == {}
    found = estimate_seconds({"forward": 1e12, "statistics": 2e12, "solve": 1e12}, layer, CPU, 512)
    assert found.keys() == {"forward", "statistics", "solve"}
    assert all(0.1 < seconds < 10_000 for seconds in found.values())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model().float().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.csv").write_text("input,output\nhot,cold\nbig,small\n")
    command = [
        "fit",
        f"--model={tmp_path / 'model'}",
        f"--pairs={tmp_path / 'pairs.csv'}",
        "--rank=2",
        "--preserve_weight=0",
    ]
    command += [f"--instruction={INSTRUCTION}", f"--out={tmp_path / 'out'}", "--overwrite=true"]
    for options in (["--offload=disk"], ["--offload=true"], ["--memory_budget=1.5"]):
        main([*command, "--progress=false", *options])
    assert "This fit takes" not in capsys.readouterr().err
    main(command)
    assert "This fit takes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--memory_budget=1e-6"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lit-thought: error: --memory_budget")
