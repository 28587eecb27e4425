"""Fits and patches of sharded models (FSDP2, gloo, CPU): those of one process and of dense arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import distributed_fit as base
import fsdp_fit as script
import pytest
import torch
from distributed_fit import Run, difference
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from models import make_model, make_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_thought import ThoughtError, ThoughtModule, ThoughtPatch
from lit_thought.errors import UnsupportedModelError
from lit_thought.fit.strategy import ThoughtFSDPStrategy, shard_model
from lit_thought.model.blocks import find_blocks
from lit_thought.model.layers import layer_shape
from lit_thought.model.loading import fingerprint

pytestmark = pytest.mark.slow

EXACT = 1e-9
STORED = {"stored": 1e-6}
PATCHED = [f"patched {family} {dtype}" for family in script.PATCHED for dtype in ("float64", "float32", "bfloat16")]


Launch = Callable[..., Run]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Start the script on two processes, in a folder of its own, and wait for the last of them."""

    def start(strategy: str, fits: list[str]) -> Run:
        folder = tmp_path_factory.mktemp(strategy)
        plan = {"devices": 2, "strategy": strategy, "fits": fits}
        return base.run_script(script.__file__, folder, plan)

    return start


@pytest.fixture(scope="module")
def sharded(launch: Launch) -> Run:
    return launch("thought_fsdp", [*PATCHED, "not finite", *script.FITS, "rank 1 fails"])


@pytest.fixture(scope="module")
def plain_strategy(launch: Launch) -> Run:
    return launch("object", ["many", "rank 0 fails"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a single process sees of a fit of the whole model."""
    return base.alone_in(tmp_path_factory.mktemp("alone"), script.FITS, script.fit)


Every = pytest.mark.parametrize("name", script.FITS)


# --- fits --------------------------------------------------------------------------------------------------


def check_patch(wanted: dict[str, Any], found: list[dict[str, Any]], limit: float) -> None:
    assert wanted["patch"]
    for seen in found:
        assert seen["patch"].keys() == wanted["patch"].keys()
        assert all(torch.equal(seen["patch"][key], value) for key, value in found[0]["patch"].items())
    assert max(difference(value, found[0]["patch"][key]) for key, value in wanted["patch"].items()) <= limit


@Every
def test_patch_is_that_of_one_process(name: str, sharded: Run, alone: Any) -> None:
    """Every process has it, whatever the batch size, the order of the pairs, and how many batches each process has."""
    check_patch(alone(name), sharded.seen(name), STORED.get(name, EXACT))


def test_patch_with_lightnings_own_strategy(plain_strategy: Run, alone: Any) -> None:
    check_patch(alone("many"), plain_strategy.seen("many"), EXACT)


@Every
def test_pairs_are_shared_out(name: str, sharded: Run, alone: Any) -> None:
    """Each is seen by one process: the weights of the shares add up."""
    wanted, found = alone(name), sharded.seen(name)
    for stage, shares in enumerate(wanted["shares"][-len(found[0]["shares"]) :]):
        for part, weight in enumerate(shares):
            parts = [seen["shares"][stage][part] for seen in found]
            assert min(parts) > 0
            assert math.fsum(parts) == pytest.approx(weight, rel=1e-12)


def test_processes_have_unequal_numbers_of_batches(sharded: Run) -> None:
    unequal = [name for name in script.FITS if len({seen["batches"] for seen in sharded.seen(name)}) == 2]
    assert {"many", "later blocks", "experts"} <= set(unequal)


@Every
def test_weights_are_sharded_all_along(name: str, sharded: Run) -> None:
    """Each process holds about half of them, and the whole of no other block than the current one."""
    for seen in sharded.seen(f"{name}-weights"):
        assert 0.4 < seen["share"] < 0.6
        assert seen["whole"] == {"the block"}
        assert seen["frozen"]
        assert seen["sharded"]


@Every
def test_weights_are_gathered_once_a_stage(name: str, sharded: Run) -> None:
    """Not for each batch: as often for one process as for the other, whatever their batches."""
    one, other = (seen["gathers"] for seen in sharded.seen(f"{name}-weights"))
    assert one == other
    settings = script.FITS[name].get("thought", {})
    passes = settings.get("steps", 1) + ("preserve" in settings)
    assert {count for path, count in one.items() if path} <= {1, 1 + passes}  # once when blocks are looked at
    if name not in ("generated", "one output missing", "followed"):  # where whole passes of the model follow each other
        assert one[""] == passes


@Every
def test_model_is_left_as_it_was(name: str, sharded: Run) -> None:
    """But for the shards: the same weights, after a patch was on them, too, and no hook besides FSDP's."""
    for seen in sharded.seen(f"{name}-weights"):
        (before, hooks), (after, now) = seen["before"], seen["after"]
        assert before == after
        assert (seen["patched"] == before) == (name == "own forward")  # there patches sit beside the weights
        blocks = len({path for path in seen["gathers"] if path})
        assert now - hooks == (0 if name == "again" else 2 * (blocks + 1))


def test_fingerprint_is_that_of_the_whole_model(sharded: Run) -> None:
    assert sharded.seen("many-weights")[0]["after"][0] == fingerprint(make_model())


def test_outputs_are_those_of_one_process(sharded: Run, alone: Any) -> None:
    wanted = alone("generated")["outputs"]
    assert len(set(wanted)) > 1
    for seen in sharded.seen("generated"):
        assert sorted(seen["outputs"]) == sorted(wanted)


def test_validation_is_followed(sharded: Run, alone: Any) -> None:
    wanted = alone("followed")["history"]
    assert [entry["step"] for entry in wanted] == [0, 1, 2]
    for seen in sharded.seen("followed"):
        assert len(seen["history"]) == 3
        for mine, entry in zip(seen["history"], wanted, strict=True):
            assert mine == pytest.approx(entry)


def test_one_process_writes(sharded: Run, alone: Any) -> None:
    for name, spec in script.FITS.items():
        assert [seen["written"] for seen in sharded.seen(name)] == [int(spec.get("writes", False)), 0]
    assert [seen["computed"] for seen in sharded.seen("preserving")] == [1, 1]
    assert len(list((sharded.folder / "cache").iterdir())) == 1
    left = {path.name for path in sharded.folder.iterdir() if path.suffix not in (".pt", ".txt", ".json")}
    assert left == {"cache", "failed", "adapter-preserving", "adapter-stored"}
    model = make_model()
    adapters = [ThoughtPatch.load(folder / "adapter-stored") for folder in (sharded.folder, alone("stored")["folder"])]
    for patch in adapters:
        patch.validate(model)  # with its fingerprint
    for path, factors in adapters[1].factors.items():
        found = adapters[0].factors[path]
        assert difference(factors.delta(torch.float64), found.delta(torch.float64)) <= STORED["stored"]


# --- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "rank"), [("sharded", 1), ("plain_strategy", 0)])
def test_a_failing_process_ends_the_run(run: str, rank: int, request: pytest.FixtureRequest) -> None:
    """With its error, though the other waits for weights; nothing is written."""
    request.getfixturevalue(run).check_failure(rank)


def test_errors_of_the_solve_are_raised_by_all(sharded: Run) -> None:
    """They can be caught, and the processes used on: "resumed" goes on with the finished stages."""
    texts = [(sharded.folder / f"not finite-{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("SingularSystemError: block 1, mlp_out")
    assert [len(seen["solved"]) for seen in sharded.seen("resumed")] != [3, 3]
    stages = sum(len(seen["solved"]) for seen in sharded.seen("resumed"))
    assert stages == 3  # of six


# --- patches on sharded weights ----------------------------------------------------------------------------


def dense(family: str, dtype: torch.dtype, patches: list[ThoughtPatch]) -> nn.Module:
    """The whole model with the patches added to its weights one after the other, each sum rounded to the dtype."""
    model = base.build(family, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        for patch in patches:
            for path, factors in patch.factors.items():
                layer: Any = model.get_submodule(path)
                change = factors.B.to(wide) @ factors.A.to(wide)
                layer.weight.copy_(layer.weight.to(wide) + (change.T if isinstance(layer, Conv1D) else change))
            for path, vector in patch.vectors.items():
                layer = model.get_submodule(path)
                if layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros(len(vector), dtype=dtype))
                layer.bias.copy_(layer.bias.to(wide) + vector)
    return model


@pytest.mark.parametrize("name", PATCHED)
def test_patch_on_sharded_weights(name: str, sharded: Run) -> None:
    """Is that of dense arithmetic, in the weights themselves; taking it off leaves the very bits, in any order.

    Of a layer with a forward of its own (Falcon's), which one process cannot try alone, it sits beside the weight.
    """
    _, family, kind = name.split()
    dtype = getattr(torch, kind)
    whole = base.build(family, dtype)
    sizes = {path: layer_shape(whole.get_submodule(path)) for path in script.PATCHED[family]}
    one, other = script.patches_for(family, sizes)
    eps = torch.finfo(dtype).eps
    for seen in sharded.seen(name):
        assert seen["sharded"] == [True, True]
        assert seen["beside"] == (2 if family == "falcon" else 0)
        states: dict[str, list[ThoughtPatch]] = {"plain": [], "both": [one, other], "other": [other], "again": []}
        if family == "falcon":
            states = {state: [] for state in states}
        for state, patches in states.items():
            wanted = dict(dense(family, dtype, patches).named_parameters())
            assert seen[state].keys() == wanted.keys()
            for path, value in wanted.items():
                limit = 8 * eps * float(value.detach().abs().max()) if patches else 0.0
                assert float((seen[state][path] - value).detach().abs().max()) <= limit, (state, path)
        ids = torch.tensor(script.IDS)
        for state, patches in (("logits", []), ("patched logits", [one, other])):
            with torch.no_grad():
                wanted_logits = dense(family, dtype, patches)(ids).logits
            assert difference(wanted_logits, seen[state]) <= 40 * eps
        assert seen["names"] == [path for path, _ in whole.named_parameters()]


# --- what cannot work --------------------------------------------------------------------------------------


def test_name_of_the_strategy() -> None:
    assert "thought_fsdp" in StrategyRegistry
    strategy = Trainer(accelerator="cpu", devices=2, strategy="thought_fsdp", logger=False).strategy
    assert isinstance(strategy, ThoughtFSDPStrategy)


class Mesh:
    """A device mesh of two dimensions, as far as it is looked at before anything is sharded."""

    ndim = 2

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __getitem__(self, name: str) -> Mesh:
        return Mesh(size=self.sizes[name])

    def size(self) -> int:
        return self.sizes["size"]


def test_tensor_parallelism_is_refused() -> None:
    module = ThoughtModule(make_model(), make_tokenizer())
    module._device_mesh = Mesh(data_parallel=1, tensor_parallel=2)  # type: ignore[assignment]
    with pytest.raises(ThoughtError, match=r'tensor_parallel_size=2 is not supported.*strategy="thought_fsdp"'):
        module.configure_model()


def test_weights_that_are_not_there_are_refused() -> None:
    mesh: Any = Mesh(data_parallel=2, tensor_parallel=1)
    model = make_model()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ThoughtError, match=r"'model.layers.1.mlp.up_proj.weight' is on the meta device"):
        shard_model(model, mesh)


def test_quantised_weights_are_refused() -> None:
    mesh: Any = Mesh(data_parallel=2, tensor_parallel=1)
    model = make_model()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ThoughtError, match=r"'model.layers.1.mlp.up_proj' is quantised"):
        shard_model(model, mesh)


def test_a_model_sharded_unseen_is_refused() -> None:
    """Its blocks cannot be run on noise any more."""

    class Sharded(type(make_model())):  # type: ignore[misc]
        def unshard(self) -> None: ...

    model = make_model()
    model.__class__ = Sharded
    with pytest.raises(UnsupportedModelError, match="was sharded before its blocks were known"):
        find_blocks(model)
