"""Fits on several processes, started by test_distributed.py: ``python distributed_fit.py PLAN.json``.

The plan names the fits, which share one process group. Every process writes what it saw of each to ``<fit>-<rank>.pt``
beside the plan.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from families import make_family
from fits import INSTRUCTION, PAIRS, TEXTS, readable
from lightning.pytorch import Callback, LightningModule, Trainer
from models import SMALL, make_model, make_tokenizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_thought import errors
from lit_thought.errors import ThoughtError
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.strategy import ThoughtDDPStrategy
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.sums import Statistics, VectorStatistics
from lit_thought.statistics import preserve
from lit_thought.statistics.distributed import (
    gather_json,
    rank_and_size,
    reduce_statistics,
    reduce_vector,
    share,
    share_json,
    share_tensors,
)
from lit_thought.statistics.stage import StageSums

OTHER = "Antonyms of words.\n"
LINES = "good\nbad\nup\ndown\n"
MANY = [{"input": pair["input"], "output": other["output"]} for pair in PAIRS for other in PAIRS[:3]]
MIXED = [{"input": p["input"]} if i else p for i, p in enumerate(PAIRS)]

# name: model (family, dtype, whether it writes letters only), settings of the callback and of the data, how the
# processes differ from the single one ("shuffled"), and how closely they must agree ("exact": without float32 patches).
FITS: dict[str, dict[str, Any]] = {
    "many": {"pairs": MANY, "shuffled": {"batch_size": 1}, "thought": {"rank": 4}},
    "dual": {"pairs": PAIRS[:2], "shuffled": {"batch_size": 2}, "thought": {"rank": None}},
    "across": {"pairs": MANY[:8], "shuffled": {"batch_size": 32}, "thought": {"rank": 0.9, "sites": ["mlp_out"]}},
    "unequal": {"pairs": MANY[:4], "shuffled": {"batch_size": 1}, "thought": {"rank": 2, "blocks": [0, 2]}},
    "generated": {
        "model": ("llama", "float64", True),
        "pairs": MIXED,
        "data": {"max_new_tokens": 4},
        "shuffled": {"batch_size": 2},
    },
    "inputs": {
        "model": ("llama", "float64", True),
        "pairs": PAIRS[:2],
        "data": {"max_new_tokens": 3, "instruction": LINES, "template": "{input}\n{output}\n", "inputs": 7},
        "shuffled": {"batch_size": 2},
    },
    "instructions": {
        "pairs": [{**p, "instruction": (INSTRUCTION, OTHER)[i % 3 == 1]} for i, p in enumerate(MANY[:7])],
        "data": {"instruction": None},
        "shuffled": {"batch_size": 2},
    },
    "weighed": {
        "pairs": [{**p, "instruction": (INSTRUCTION, OTHER)[i > 3]} for i, p in enumerate(PAIRS)],
        "data": {"instruction": None, "kind": "document"},
        "shuffled": {"batch_size": 1},
        "thought": {"rank": 4},
    },
    "mlp_in": {"pairs": PAIRS, "shuffled": None, "thought": {"sites": ["mlp_in"], "steps": 2, "pairs_per_step": 3}},
    "vectors": {"pairs": PAIRS, "shuffled": {"batch_size": 2}, "thought": {"parts": ["vector"], "sites": ["attn_out"]}},
    "preserving": {
        "pairs": PAIRS,
        "shuffled": {"batch_size": 1},
        "thought": {"preserve": TEXTS, "order": "teacher-forced", "offload": "disk", "rank": 3},
        "writes": True,
    },
    "gains": {
        "model": ("gemma3_text", "float64", False),
        "pairs": PAIRS,
        "shuffled": {"batch_size": 2},
        "thought": {"rank": 4, "blocks": [0, 1]},
    },
    "float32": {
        "model": ("llama", "float32", False),
        "pairs": MANY,
        "shuffled": {"batch_size": 2},
        "thought": {"ridge": 3e-2},
        "exact": False,
    },
    "stored": {"pairs": MANY, "shuffled": {"batch_size": 2}, "exact": False, "writes": True},
    "followed": {
        "model": ("llama", "float64", True),
        "pairs": PAIRS,
        "data": {"max_new_tokens": 3, "val_pairs": [{"input": "up"}, {"input": "good", "output": "bad"}]},
        "shuffled": {"batch_size": 2},
        "thought": {"steps": 2, "sites": ["mlp_out"]},
    },
}
BROKEN: dict[str, dict[str, Any]] = {
    "not finite": {"pairs": PAIRS, "broken": {"rank": 1, "how": "nan"}},
    "not preserved": {"pairs": PAIRS, "thought": {"preserve": TEXTS[::-1]}, "broken": {"how": "preserve"}},
    "rank 1 fails": {"pairs": PAIRS, "broken": {"rank": 1, "how": "raise", "busy": 0}, "output": "never"},
    "rank 0 fails": {"pairs": PAIRS, "broken": {"rank": 0, "how": "raise", "busy": 2}, "output": "never"},
}
MESSAGE = "process {} broke down"
FAILURE_SECONDS = 60


# --- fits --------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Notes what one process does in a fit, breaks it where asked to, and writes the notes down."""

    def __init__(self, name: str, folder: Path | None, exact: bool, broken: dict[str, Any] | None) -> None:
        self.name, self.folder, self.exact, self.broken = name, folder, exact, broken
        self.seen: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.seen = {"rank": trainer.global_rank, "size": trainer.world_size, "sums": [], "shares": [], "solved": []}
        self.seen |= {"written": 0, "computed": 0, "batches": 0}
        self._spies = [
            _spy(StageSums, "reduce", self._reduced),
            _spy(StageSums, "solve", lambda run, sums, *rest: self.seen["solved"].append(sums.name) or run()),
            _spy(ThoughtPatch, "save_adapter", lambda run, *rest, **_: self._count("written") or run()),
            _spy(preserve, "_compute", self._computed),
        ]
        if self.exact:
            self._spies += _unrounded()
        for spy in self._spies:
            spy.start()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        modules = [trainer.strategy.model, *pl_module.modules()]
        self.seen["wrapped"] = any(isinstance(module, DistributedDataParallel) for module in modules)
        own = {id(parameter) for parameter in pl_module.parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.seen["trained"] = sum(id(parameter) in own for group in groups for parameter in group["params"])
        self.seen["sampler"] = type(trainer.train_dataloader.sampler).__name__
        self.seen["outputs"] = data.outputs
        self.runner = pl_module.runner
        if self.broken is not None:
            failing, busy = trainer.global_rank == self.broken["rank"], trainer.global_rank == self.broken.get("busy")
            if failing or busy:
                pl_module.model.model.layers[1].register_forward_hook(self._break if failing else self._linger)

    def _break(self, module: Any, inputs: Any, output: Any) -> Any:
        return broken_output(self.runner, self.broken, self.folder, output)

    def _linger(self, module: Any, inputs: Any, output: Any) -> None:
        """A process that is busy, and so does not notice that another one has gone."""
        if self.runner.stage == 2:
            time.sleep(70)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen["batches"] += batch is not None

    def _count(self, what: str) -> None:
        self.seen[what] += 1

    def _computed(self, run: Callable[[], Any], *rest: Any) -> Any:
        self._count("computed")
        if self.broken is not None and self.broken["how"] == "preserve":
            raise ThoughtError(MESSAGE.format(self.seen["rank"]))
        return run()

    def _reduced(self, run: Callable[[], None], sums: StageSums, owner: int, device: torch.device) -> None:
        parts = [part for part in (sums.matrix, sums.vector) if part is not None]
        self.seen["shares"].append([part.weight for part in parts])
        run()
        rank, _ = rank_and_size()
        found: dict[str, Any] = {"owner": owner}
        if rank == owner and sums.matrix is not None:
            matrix = sums.matrix
            found |= {"gram": matrix.gram.clone(), "cross": matrix.cross.clone(), "energy": matrix.energy.clone()}
            found |= {"weight": matrix.weight, "folded": matrix.folded, "tokens": matrix.tokens}
        if rank == owner and sums.vector is not None:
            vector = sums.vector
            found |= {"vector_total": vector.total.clone(), "vector_energy": vector.energy.clone()}
            found |= {"vector_weight": vector.weight}
        self.seen["sums"].append(found)

    def _end(self, trainer: Trainer, **more: Any) -> None:
        for spy in self._spies:
            spy.stop()
        thought = next(c for c in trainer.callbacks if isinstance(c, ThoughtCallback))  # type: ignore[attr-defined]
        module = trainer.lightning_module
        self.seen["gradients"] = any(p.grad is not None for p in module.parameters())
        self.seen["patch"] = {
            (*key, part): value
            for key, patch in thought._solved.patches.items()
            for part, value in (
                ("matrix", patch.matrix and patch.matrix.B.double() @ patch.matrix.A.double()),
                ("vector", patch.vector),
            )
            if value is not None
        }
        self.seen |= {"history": thought.history, "diagnostics": thought._solved.figures, **more}
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.name}-{self.seen['rank']}.pt")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if "rank" in self.seen:  # not in the process that spawns the others
            self._end(trainer, error=(type(exception).__name__, str(exception)))


def _spy(owner: Any, name: str, watch: Callable[..., Any]) -> Any:
    """A patch of a function by ``watch(run, *arguments)``, where ``run()`` calls the genuine one."""
    genuine = getattr(owner, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        return watch(partial(genuine, *args, **kwargs), *args, **kwargs)

    return mock.patch.object(owner, name, instead)


def _unrounded() -> list[Any]:
    """Patches under which nothing that is float64 becomes float32: neither thought patches nor inside norms."""
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {k: torch.float64 if k == "dtype" else v for k, v in kwargs.items()}
        return to(x, *args, **kwargs)

    def wide(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x, *args, **kwargs)

    def narrow(run: Callable[[], Any], *rest: Any) -> Any:
        """A file of preservation statistics is rounded all the same."""
        with mock.patch.object(torch.Tensor, "float", to_float), mock.patch.object(torch.Tensor, "to", to):
            return run()

    patches = [mock.patch.object(torch.Tensor, "float", wide), mock.patch.object(torch.Tensor, "to", keep)]
    return [*patches, _spy(preserve, "rounded", narrow)]


def build(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """A tiny model, the same in every process."""
    if family in ("odd", "deep"):
        sizes = {"intermediate_size": 49, "vocab_size": 511} if family == "odd" else {"num_hidden_layers": 5}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes})).to(dtype).eval()
    return make_model(family, dtype) if family in ("llama", "gpt2") else make_family(family, dtype)


def fit(
    name: str,
    spec: dict[str, Any],
    folder: Path | None,
    work: Path,
    shuffled: bool,
    more: Callable[[], Sequence[Callback]] = tuple,
    **launch: Any,
) -> dict[str, Any]:
    """One fit, with ``more()`` callbacks where files are written; returns what this process saw of it, unless others
    were spawned for it."""
    family, dtype, letters = spec.get("model", ("llama", "float64", False))
    model = build(family, getattr(torch, dtype))
    if letters:
        readable(model)
    if name in ("many", "gains"):
        model.requires_grad_(False)
    pairs, settings = list(spec["pairs"]), {"instruction": INSTRUCTION, "answer_weight": 3.0, **spec.get("data", {})}
    if shuffled and spec.get("shuffled"):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1)).tolist()
        pairs, settings = [pairs[i] for i in order], {**settings, **spec["shuffled"]}
    output = work / (spec.get("output") or f"adapter-{name}") if spec.get("writes") or spec.get("output") else None
    usual = {"preserve": None, "ridge": 1e-2, "cache_dir": work / "cache", "output_dir": output}
    if spec.get("resumes"):
        usual["resume_dir"] = work / "progress"
    module = ThoughtModule(model, make_tokenizer())
    for _ in range(spec.get("repeats", 1)):  # again with a module that is sharded already
        watch = Watch(name, folder, spec.get("exact", True), spec.get("broken") if more is tuple else None)
        thought = ThoughtCallback(**{**usual, **spec.get("thought", {})})
        callbacks = [watch, thought, *(more() if folder is not None else ())]
        trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=callbacks, **launch)
        trainer.fit(module, datamodule=PairDataModule(pairs, **settings))
    return watch.seen


# --- sums and messages -------------------------------------------------------------------------------------

D_IN, D_OUT = 12, 5
ROWS = {
    "few": (1, 2, 2),
    "one short": (4, 4, 3),
    "as many as fold": (4, 4, 4),
    "too many together": (6, 4, 9),
    "folded, rows, nothing": (13, 2, 0),
    "nothing, rows, folded": (0, 3, 13),
    "only the second": (0, 3, 0),
    "only the second, folded": (0, 30, 0),
    "only the last": (0, 0, 1),
    "all folded": (12, 13, 14),
    "none": (0, 0, 0),
}
VALUES: list[Any] = [3, -0.1, None, "Größe ≤ λ", [1, [2.5, "x"]], {"error": ["a", "b"]}, {}, [], 1e-310, "x" * 9999]
ERRORS = ("ThoughtError", "UnsupportedModelError", "SingularSystemError", "PatchError")


class OwnError(ThoughtError):
    """One that lit_thought does not know."""


def tokens(rank: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What one process adds to its sums."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(rank), dtype=dtype)
    return draw(count, D_IN), draw(count, D_OUT), draw(count).abs() + 0.1


def tensors() -> list[Tensor]:
    return [
        torch.linspace(0, 1, 6).view(2, 3),
        torch.arange(5.0, dtype=torch.float64) / 3,
        torch.zeros(0, 4),
        torch.tensor(2.5),
        torch.arange(12.0).view(3, 4).T,
        torch.ones(3, dtype=torch.bfloat16),
    ]


def summed(counts: Sequence[int], dtype: torch.dtype, ranks: Sequence[int]) -> tuple[Statistics, VectorStatistics]:
    """The sums of some processes' tokens; of each a token at a time."""
    matrix, vector = Statistics(D_IN, D_OUT), VectorStatistics(D_OUT)
    for rank in ranks:
        for a, delta, weight in zip(*tokens(rank, counts[rank], dtype), strict=True):
            matrix.update(a[None], delta[None], weight[None])
            vector.update(delta[None], weight[None])
    return matrix, vector


def _raised(run: Callable[[], Any]) -> tuple[str, str] | None:
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def collectives(folder: Path) -> None:
    """Everything in distributed.py that talks, on three processes."""
    rank, size = rank_and_size()
    cpu = torch.device("cpu")
    found: dict[str, Any] = {"rank": rank, "size": size, "share": [list(share(range(n))) for n in range(9)]}
    for name, counts in ROWS.items():
        for dtype in (torch.float64, torch.float32):
            for owner in range(size):
                mine, vector = summed(counts, dtype, [rank])
                total = reduce_statistics(mine, owner, cpu)
                reduce_vector(vector, owner, cpu)
                if rank == owner:
                    found[name, dtype, owner] = total, vector
                else:
                    found.setdefault("others' own", []).append(total is mine)
    found["json"] = [[share_json(v if rank == o else "mine", o, cpu) for v in VALUES] for o in range(size)]
    found["gathered"] = [gather_json([rank, v], cpu) for v in VALUES]
    found["errors"] = [
        [
            _raised(lambda e=e, o=o: share_json(e(f"no ≤ {o}") if rank == o else None, o, cpu))  # type: ignore[misc]
            for e in [*(getattr(errors, name) for name in ERRORS), OwnError]
        ]
        for o in range(size)
    ]
    refused = errors.PatchError("only mine") if rank == 1 else rank
    found["gathered error"] = _raised(lambda: gather_json(refused, cpu))
    found["not shared"] = share_json(errors.PatchError("not the owner's") if rank == 1 else 5, 0, cpu)
    found["tensors"] = [share_tensors(tensors() if rank == o else None, o, cpu) for o in range(size)]
    found["own ignored"] = share_tensors([torch.full((7,), float(rank))], 1, cpu)
    found["no tensors"] = share_tensors([] if rank == 0 else None, 0, cpu)
    torch.save(found, folder / f"collectives-{rank}.pt")


# --- the script --------------------------------------------------------------------------------------------

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def noted(folder: Path, name: str) -> Iterator[None]:
    """Goes on after an error that all processes raise."""
    try:
        yield
    except ThoughtError as error:
        (folder / f"{name}-{os.environ.get('LOCAL_RANK', 0)}.txt").write_text(f"{type(error).__name__}: {error}")


def main(path: str) -> None:
    folder = Path(path).parent
    plan = json.loads(Path(path).read_text())
    for name in plan["fits"]:
        strategy = ThoughtDDPStrategy() if plan["strategy"] == "object" else plan["strategy"]
        launch = {**({} if name in plan.get("noisy", ()) else QUIET), "devices": plan["devices"], "strategy": strategy}
        if name in FITS:
            fit(name, FITS[name], folder, folder, plan.get("shuffled", True), **launch)
        elif name in ("not finite", "not preserved"):
            with noted(folder, name):
                fit(name, BROKEN[name], folder, folder, False, **launch)
        elif name == "collectives":
            collectives(folder)
        else:
            fit(name, BROKEN[name], folder, folder, False, **launch)
    if dist.is_initialized():
        dist.destroy_process_group()


def broken_output(runner: Any, broken: dict[str, Any], folder: Path | None, output: Tensor) -> Tensor:
    """A layer's output, from the third stage on not finite, or an error whose time is noted in the folder."""
    if runner.stage < 2:
        return output
    if broken["how"] == "nan":
        return torch.full_like(output, torch.nan)
    assert folder is not None
    (folder / "failed").write_text(str(time.time()))
    raise RuntimeError(MESSAGE.format(broken["rank"]))


@dataclass(frozen=True)
class Run:
    """One launch of a script: its folder, how it ended, and when."""

    folder: Path
    code: int
    output: str
    ended: float

    def seen(self, name: str) -> list[dict[str, Any]]:
        """What each process noted of a fit, by rank."""
        files = sorted(self.folder.glob(f"{name}-[0-9].pt"))
        assert files, f"{name} was not run.\n{self.output}"
        return [torch.load(file, weights_only=False) for file in files]

    def check_failure(self, rank: int) -> None:
        """It ended with the error of a process that broke down, soon, and nothing was written."""
        assert self.code != 0
        assert f"RuntimeError: {MESSAGE.format(rank)}" in self.output
        assert self.ended - float((self.folder / "failed").read_text()) < FAILURE_SECONDS
        assert not list(self.folder.glob("*never*"))


def run_script(script: str, folder: Path, plan: dict[str, Any], *launcher: str, timeout: int = 300) -> Run:
    """Run a script on a plan in its folder, and wait for the last of its processes."""
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    known = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    process = subprocess.Popen(
        [sys.executable, *launcher, script, str(folder / "plan.json")],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in known} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:  # until all of them have closed their output
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"{process.communicate()[0]}\nended after {timeout} s"
    return Run(folder, process.returncode, output, time.time())


def alone_in(folder: Path, fits: dict[str, Any], run: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """What a single process sees of the ``fits``, by name, each run once with files below ``folder``."""
    known: dict[str, dict[str, Any]] = {}

    def seen(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = run(name, fits[name], None, folder, False, devices=1, **QUIET)
            known[name]["folder"] = folder
        return known[name]

    return seen


def difference(one: Any, other: Any) -> float:
    """Relative, in the Frobenius norm."""
    one, other = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    assert one.shape == other.shape
    return float((one - other).norm() / one.norm())


if __name__ == "__main__":
    main(sys.argv[1])
