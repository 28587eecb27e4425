"""Fits on several processes (gloo, CPU): the sums, the patch, the files and the errors of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import distributed_fit as script
import pytest
import torch
from distributed_fit import Run, difference
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from models import make_model, make_tokenizer
from torch import Tensor

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.fit.strategy import ThoughtDDPStrategy
from lit_thought.statistics.distributed import (
    gather_json,
    rank_and_size,
    reduce_statistics,
    reduce_vector,
    share,
    share_json,
    share_tensors,
)

pytestmark = pytest.mark.slow

EXACT = 1e-9
STORED = {"float32": 1e-5, "stored": 1e-6}
THREE = ("many", "dual", "across", "unequal", "preserving", "stored")
"""The fits that are run on three processes, too."""

Launch = Callable[..., Run]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Start the script in a folder of its own and wait for the last of its processes."""

    def start(devices: int, strategy: str, fits: list[str], *launcher: str, **plan: Any) -> Run:
        plan |= {"devices": devices, "strategy": strategy, "fits": fits}
        return script.run_script(
            script.__file__, tmp_path_factory.mktemp(f"{strategy}-{devices}"), plan, *launcher, timeout=420
        )

    return start


@pytest.fixture(scope="module")
def two(launch: Launch) -> Run:
    """By torchrun, one fit with all that Lightning writes and shows."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return launch(
        2, "thought_ddp", [*script.FITS, "not finite", "not preserved", "rank 1 fails"], *torchrun, noisy=["stored"]
    )


@pytest.fixture(scope="module")
def three(launch: Launch) -> Run:
    """By the strategy, which starts the script again."""
    return launch(3, "object", [*THREE, "collectives", "rank 0 fails"])


@pytest.fixture(scope="module")
def spawned(launch: Launch) -> Run:
    return launch(2, "thought_ddp_spawn", ["stored", "rank 1 fails"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What this process sees of a fit."""
    return script.alone_in(tmp_path_factory.mktemp("alone"), script.FITS, script.fit)


Several = pytest.mark.parametrize("processes", ["two", "three"])
Every = pytest.mark.parametrize(
    ("processes", "name"), [*(("two", name) for name in script.FITS), *(("three", name) for name in THREE)]
)


@pytest.fixture
def several(processes: str, request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(processes)
    return found


# --- the same patch ----------------------------------------------------------------------------------------


@Every
def test_patch_does_not_depend_on_the_processes(name: str, several: Run, alone: Any) -> None:
    """Nor on batch size and order of the pairs; every process has it."""
    wanted, found = alone(name), several.seen(name)
    assert [seen["rank"] for seen in found] == list(range(found[0]["size"]))
    assert wanted["patch"]
    for seen in found:
        assert seen["patch"].keys() == wanted["patch"].keys()
        assert all(torch.equal(seen["patch"][key], value) for key, value in found[0]["patch"].items())
    worst = max(difference(value, found[0]["patch"][key]) for key, value in wanted["patch"].items())
    assert worst <= STORED.get(name, EXACT)


@Every
def test_sums_are_those_of_one_process(name: str, several: Run, alone: Any) -> None:
    """Each stage's, on the process that solves it; weights show that each pair was seen exactly once."""
    wanted, found = alone(name), several.seen(name)
    stages = len(wanted["sums"])
    limit = STORED.get(name, EXACT)
    assert all(len(seen["sums"]) == stages for seen in found)
    for stage, sums in enumerate(wanted["sums"]):
        owner = found[0]["sums"][stage]["owner"]
        reduced = found[owner]["sums"][stage]
        parts = [seen["shares"][stage] for seen in found]
        for key in sums.keys() - {"owner", "folded", "tokens"}:
            assert difference(sums[key], reduced[key]) <= (EXACT if "weight" in key else limit), (stage, key)
        for part, weight in enumerate(wanted["shares"][stage]):
            assert math.fsum(share[part] for share in parts) == pytest.approx(weight, rel=1e-12)
            shares = sum(share[part] > 0 for share in parts)
            assert shares == min(len(script.FITS[name]["pairs"]), len(found))
        if "gram" in sums:  # the dual where all processes' tokens together are few
            assert reduced["folded"] == (reduced["tokens"] >= len(sums["gram"]))
    solved = [seen["solved"] for seen in found]
    assert sorted(chain(*solved)) == sorted(wanted["solved"])
    assert all(solved[:stages])  # they take turns


def test_fits_cover_both_regimes(two: Run, three: Run) -> None:
    """Rows kept by all processes, and sums that some have folded on their own or that are folded together."""
    for run in (two, three):
        folded = {
            name: {sums["folded"] for seen in run.seen(name) for sums in seen["sums"] if "folded" in sums}
            for name in ("many", "dual", "across")
        }
        assert folded == {"many": {True}, "dual": {False}, "across": {True}}


def test_outputs_are_written_once_for_all(two: Run, alone: Any) -> None:
    wanted = alone("generated")["outputs"]
    assert len(set(wanted)) > 1
    for seen in two.seen("generated"):
        assert sorted(seen["outputs"]) == sorted(wanted)


@Several
def test_diagnostics_are_those_of_one_process(several: Run, alone: Any) -> None:
    wanted = alone("preserving")["diagnostics"]
    for seen in several.seen("preserving"):
        assert seen["diagnostics"].keys() == wanted.keys()
        for label, figures in wanted.items():
            left_out = {"tokens"}  # tokens shared by pairs are counted once a process
            assert {k: v for k, v in seen["diagnostics"][label].items() if k not in left_out} == pytest.approx(
                {k: v for k, v in figures.items() if k not in left_out}, rel=1e-6, abs=2e-8
            )


# --- nothing is trained, one process writes ----------------------------------------------------------------


@Every
def test_nothing_is_wrapped_or_trained(name: str, several: Run) -> None:
    for seen in several.seen(name):
        assert (seen["wrapped"], seen["trained"], seen["gradients"]) == (False, 0, False)
        assert "Distributed" not in seen["sampler"]


@Several
def test_one_process_writes(processes: str, several: Run, alone: Any) -> None:
    for name in script.FITS if processes == "two" else THREE:
        writes = int(script.FITS[name].get("writes", False))
        preserves = int("preserve" in script.FITS[name].get("thought", {}))
        others = [0] * (len(several.seen(name)) - 1)
        assert [seen["written"] for seen in several.seen(name)] == [writes, *others]
        assert [seen["computed"] for seen in several.seen(name)] == [preserves, *others]
    assert len(list((several.folder / "cache").iterdir())) == 1
    left = {path.name for path in several.folder.iterdir() if path.suffix not in (".pt", ".txt", ".json")}
    assert left - {"lightning_logs"} == {"cache", "failed", "adapter-preserving", "adapter-stored"}
    check_adapter(several, alone("stored"))


def check_adapter(run: Run, wanted: dict[str, Any]) -> None:
    found, mine = (
        ThoughtPatch.load(folder / "adapter-stored", make_model()) for folder in (run.folder, wanted["folder"])
    )
    assert found.targets == mine.targets
    for path, factors in mine.factors.items():
        assert difference(factors.delta(torch.float64), found.factors[path].delta(torch.float64)) <= STORED["stored"]
    assert found.provenance["settings"] == mine.provenance["settings"]


def test_validation_is_followed_by_one_process(two: Run, alone: Any) -> None:
    wanted, found = alone("followed")["history"], two.seen("followed")
    assert [entry["step"] for entry in wanted] == [0, 1, 2]
    assert [len(seen["history"]) for seen in found] == [3] + [0] * (len(found) - 1)
    for mine, entry in zip(found[0]["history"], wanted, strict=True):
        assert mine == pytest.approx(entry)


# --- how processes start -----------------------------------------------------------------------------------


def test_processes_that_are_spawned(spawned: Run, alone: Any) -> None:
    found, wanted = spawned.seen("stored"), alone("stored")
    assert [(seen["rank"], seen["size"], seen["written"]) for seen in found] == [(0, 2, 1), (1, 2, 0)]
    for key, value in wanted["patch"].items():
        assert difference(value, found[0]["patch"][key]) <= STORED["stored"]
        assert torch.equal(found[0]["patch"][key], found[1]["patch"][key])
    check_adapter(spawned, wanted)


def test_names_of_the_strategy() -> None:
    for name, method in (("thought_ddp", "popen"), ("thought_ddp_spawn", "spawn")):
        assert name in StrategyRegistry
        strategy = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
        assert isinstance(strategy, ThoughtDDPStrategy)
        assert strategy._start_method == method


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_find_unused_parameters_true"])
def test_strategies_that_train_are_refused(strategy: str) -> None:
    thought = ThoughtCallback(preserve=None)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=[thought], logger=False, max_epochs=-1)
    trainer.datamodule = PairDataModule(script.PAIRS, script.INSTRUCTION)  # type: ignore[attr-defined]
    with pytest.raises(ThoughtError, match=r'2 processes needs strategy="thought_ddp".*got DDPStrategy'):
        thought.setup(trainer, ThoughtModule(make_model(), make_tokenizer()), "fit")


# --- a process that fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "rank"), [("two", 1), ("three", 0), ("spawned", 1)])
def test_a_failing_process_ends_the_run(processes: str, rank: int, several: Run) -> None:
    """With its error and without waiting for others, one of which is busy for long; nothing is written."""
    several.check_failure(rank)


def test_errors_of_the_solve_are_raised_by_all(two: Run) -> None:
    """They can be caught, and the processes used on."""
    texts = [(two.folder / f"not finite-{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("SingularSystemError: block 1, mlp_out")
    assert [seen["error"][0] for seen in two.seen("not finite")] == ["SingularSystemError"] * 2
    assert all((1, "mlp_out", "matrix") not in seen["patch"] for seen in two.seen("not finite"))


def test_an_error_of_the_process_that_preserves_is_raised_by_all(two: Run) -> None:
    """The others wait for what it computes."""
    texts = [(two.folder / f"not preserved-{rank}.txt").read_text() for rank in (0, 1)]
    assert texts == ["ThoughtError: process 0 broke down"] * 2
    assert [seen["computed"] for seen in two.seen("not preserved")] == [1, 0]


# --- sums and messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", script.ROWS)
def test_reduced_sums(name: str, dtype: torch.dtype, three: Run) -> None:
    """Of rows, of folded sums and of both, whoever solves; few rows stay rows."""
    wanted, vector = script.summed(script.ROWS[name], dtype, range(3))
    limit = {"rel": 1e-12 if dtype == torch.float64 else 1e-5, "abs": 1e-12 if dtype == torch.float64 else 1e-5}
    for owner, seen in enumerate(three.seen("collectives")):
        found, total = seen[name, dtype, owner]
        assert (found.tokens, found.num_rows, found.folded) == (wanted.tokens, wanted.num_rows, wanted.folded)
        assert (found.d_in, found.d_out) == (wanted.d_in, wanted.d_out)
        for mine, other in ((found.gram, wanted.gram), (found.cross, wanted.cross), (total.total, vector.total)):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=limit["rel"], atol=limit["abs"])
        for one, other in ((found, wanted), (total, vector)):
            assert (one.weight, float(one.energy)) == pytest.approx((other.weight, float(other.energy)), **limit)
            assert one.tokens == other.tokens
        if rows := found.rows():
            assert [len(part) for part in rows] == [sum(script.ROWS[name])] * 2
    assert all(all(seen["others' own"]) for seen in three.seen("collectives"))


def test_shares_are_disjoint_and_complete(three: Run) -> None:
    shares = [seen["share"] for seen in three.seen("collectives")]
    for n in range(9):
        parts = [share[n] for share in shares]
        assert sorted(chain(*parts)) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_messages_reach_every_process(three: Run) -> None:
    for seen in three.seen("collectives"):
        assert seen["json"] == [script.VALUES] * 3
        assert seen["gathered"] == [[[rank, value] for rank in range(3)] for value in script.VALUES]
        assert seen["not shared"] == 5


def test_errors_reach_every_process(three: Run) -> None:
    """With their own class where lit_thought has it."""
    for seen in three.seen("collectives"):
        for owner, raised in enumerate(seen["errors"]):
            assert raised == [(name, f"no ≤ {owner}") for name in (*script.ERRORS, "ThoughtError")]
        assert seen["gathered error"] == ("PatchError", "only mine")


def test_tensors_reach_every_process(three: Run) -> None:
    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return len(one) == len(other) and all(
            x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, other, strict=True)
        )

    for seen in three.seen("collectives"):
        assert all(same(found, script.tensors()) for found in seen["tensors"])
        assert same(seen["own ignored"], [torch.full((7,), 1.0)])
        assert seen["no tensors"] == []


def test_one_process_keeps_what_it_has() -> None:
    cpu = torch.device("cpu")
    assert rank_and_size() == (0, 1)
    matrix, vector = script.summed((30,), torch.float64, [0])
    before = vector.to_tensors()
    assert reduce_statistics(matrix, 0, cpu) is matrix
    reduce_vector(vector, 0, cpu)
    assert all(torch.equal(vector.to_tensors()[name], value) for name, value in before.items())
    assert list(share(range(5))) == [0, 1, 2, 3, 4]
    value, tensors = {"a": object()}, script.tensors()
    assert share_json(value, 0, cpu) is value
    assert gather_json(value, cpu) == [value]
    assert all(one is other for one, other in zip(share_tensors(tensors, 0, cpu), tensors, strict=True))
    with pytest.raises(PatchError, match="own"):
        share_json(PatchError("own"), 0, cpu)
