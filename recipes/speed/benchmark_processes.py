"""One process against several, one thread each: how a fit scales, and that its patch stays the same.

    python -m recipes.speed.benchmark_processes --config recipes/speed/benchmark_processes.yaml

Each count is a run of its own (this script again, with ``--worker``), by ``Trainer(strategy="thought_ddp")``. Timed is
the fit from its prepared pairs to the patch, on the process that took longest: loading the model and starting processes
is left out, and so are the preservation statistics, which are in the cache by then. What the machine itself allows
shows in a fit of half the pairs, alone and beside another that it shares nothing with but the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch, load_model
from lit_thought.errors import ThoughtError
from lit_thought.statistics.distributed import gather_json
from recipes.harness import ROOT, TEMPLATE, command_line, load_split, patch_difference, shown, table, write_results


def benchmark(
    model: str = "smollm2",
    task: str = "function_vectors/capitalize",
    pairs: int = 300,
    processes: Sequence[int] = (1, 2),
    rank: int = 16,
    repeats: int = 2,
    out: str = "recipes/results/benchmark_processes",
    worker: int = 0,  # for the script itself: the number of processes of this run,
    folder: str = "",  # and where it leaves its adapter and figures
) -> None:
    """Time the fit on each number of processes."""
    if worker:
        work(model, task, pairs, worker, rank, repeats, Path(folder))
        return
    common = [f"--model={model}", f"--task={task}", f"--rank={rank}", f"--repeats={repeats}"]
    with tempfile.TemporaryDirectory() as temporary:
        places = [Path(temporary) / str(count) for count in processes]
        rows = [
            run_beside([[*common, f"--pairs={pairs}", f"--worker={count}", f"--folder={place}"]], [place])[0]
            for count, place in zip(processes, places, strict=True)
        ]
        patches = [ThoughtPatch.load(place / "adapter") for place in places]
        halves = [Path(temporary) / f"half {index}" for index in range(3)]
        half = [[*common, f"--pairs={pairs // 2}", "--worker=1", f"--folder={place}"] for place in halves]
        (alone,) = run_beside(half[:1], halves[:1])
        beside = max(figures["seconds"] for figures in run_beside(half[1:], halves[1:]))
    names = ("forward", "statistics", "reduce", "solve")
    lines = []
    for row, patch in zip(rows, patches, strict=True):
        row["speed_up"], row["difference"] = rows[0]["seconds"] / row["seconds"], patch_difference(patches[0], patch)
        cells = [row["processes"], f"{row['seconds']:.2f}", f"{row['speed_up']:.2f}"]
        lines.append([*cells, *(f"{row['stages'][name]:.2f}" for name in names), f"{row['difference']:.1e}"])
    head = ["processes", "fit, s", "speed-up", *(f"{name}, s" for name in names), "patch: largest relative difference"]
    page = f"{os.cpu_count()} CPU cores; stages are those of the first process, with its waiting for others in reduce "
    page += f"and solve.\n\n{table(head, lines, left=0)}\n"
    page += f"{pairs // 2} pairs in one process take {alone['seconds']:.2f} s, and {beside:.2f} s beside another such "
    page += f"process: the machine slows each down × {beside / alone['seconds']:.2f}, whatever they do together.\n"
    record = {"model": shown(model), "settings": {"pairs": pairs, "rank": rank}, "rows": rows}
    write_results(__file__, out, page, record | {"half": {"alone": alone["seconds"], "beside": beside}})


def run_beside(commands: Sequence[Sequence[str]], places: Sequence[Path]) -> list[dict[str, Any]]:
    """Workers at the same time, each with one thread; the figures that each leaves in its folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
    running = []
    for command, place in zip(commands, places, strict=True):
        place.mkdir()
        whole = [sys.executable, "-m", "recipes.speed.benchmark_processes", *command]
        running.append(subprocess.Popen(whole, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise ThoughtError(f"a worker ended with exit code {next(filter(None, codes))}; its error is above.")
    return [json.loads((place / "figures.json").read_text(encoding="utf-8")) for place in places]


class _Timed(ThoughtCallback):
    """Notes how long the fit took, from the first stage to the patch."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("start")
        self._begun = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = max(gather_json(time.perf_counter() - self._begun, pl_module.device))


def work(model: str, task: str, pairs: int, processes: int, rank: int, repeats: int, folder: Path) -> None:
    """Fit on ``processes`` processes, of which this is one, and leave the adapter and the seconds in ``folder``."""
    torch.set_num_threads(1)
    lm, tokenizer = load_model(model)
    split = load_split(task, 0, fit=pairs)
    fits = []
    for _ in range(repeats):
        callback = _Timed(rank=rank)
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="thought_ddp" if processes > 1 else "auto",
            max_epochs=-1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            ThoughtModule(lm, tokenizer), datamodule=PairDataModule(split.labelled, split.instruction, TEMPLATE)
        )
        fits.append({"seconds": callback.seconds, "stages": dict(callback.stopwatch.seconds)})
    if trainer.is_global_zero:
        assert callback.patch is not None
        callback.patch.save_adapter(folder / "adapter")
        best = min(fits, key=lambda fit: fit["seconds"])
        figures = {"processes": processes, **best, "all_seconds": [fit["seconds"] for fit in fits]}
        (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    command_line(benchmark)
