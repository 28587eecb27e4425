"""What a fit loses with preservation statistics from one small file, against the full ones and against none.

    python -m recipes.studies.preservation_file --config recipes/studies/preservation_file.yaml

Writes the model's preservation statistics to a file, as ``lit-thought preserve`` does, and fits each task with the full
statistics, with the file, and without preservation. Splits and tests are those of word_tasks.py. Writes a Markdown and
a JSON table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lit_thought import load_model
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.statistics.preserve import WINDOW, Preservation, preservation
from recipes.harness import SIX_TASKS, Trial, command_line, load_split, shown, table, write_results


def preservation_file(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0,),
    file_ranks: Sequence[int | None] = (768,),
    storage: Literal["int8", "float16", "float32"] = "int8",
    preserve_tokens: int = 12_000,
    rank: int = 16,
    shots: int = 10,
    fit: int = 30,
    test: int = 100,
    max_new_tokens: int = 12,
    out: str = "recipes/results/preservation_file",
) -> None:
    """Fit and test every task and seed with the full statistics, with each file and with none."""
    lm, tokenizer = load_model(model)
    blocks = find_blocks(lm)
    windows = text_windows(tokenizer, load_texts("default", "preserve", "texts"), WINDOW, preserve_tokens)
    entry, _ = preservation(lm, blocks, windows)
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        ways: dict[str, dict[str, Any]] = {"full": {"preserve": "default", "preserve_tokens": preserve_tokens}}
        files: dict[str, dict[str, Any]] = {"full": {"bytes": _bytes(entry.folder), "load_seconds": None}}
        for kept in file_ranks:
            name = f"file, {storage}, {'full rank' if kept is None else f'rank {kept}'}"
            path = Path(folder) / f"{kept}.safetensors"
            entry.save(path, lm, blocks, rank=kept, storage=storage)
            started = time.perf_counter()
            Preservation.load(path, lm, blocks, cache_dir=folder)
            files[name] = {"bytes": path.stat().st_size, "load_seconds": time.perf_counter() - started}
            ways[name] = {"preserve": path, "cache_dir": folder}
        ways["none"] = {"preserve": None}
        for task, seed in product(tasks, seeds):
            trial = Trial(lm, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens)
            evaluation = trial.evaluation()
            for name, way in ways.items():
                result = evaluation.score(trial.fit(**way, rank=rank))
                del result["items"]
                runs.append({"task": trial.split.name, "seed": seed, "preserve": name, **result})
                print(
                    f"{trial.split.name}, seed {seed}, {name}: accuracy {result['accuracy']['patched']:.2f}, "
                    f"fidelity {result['fidelity']:.2f}, perplexity × {result['perplexity_ratio']:.3f}",
                    flush=True,
                )
    settings = {"seeds": list(seeds), "rank": rank, "shots": shots, "fit": fit, "test": test, "tokens": preserve_tokens}
    record = {"model": shown(model), "settings": settings, "files": files, "runs": runs}
    write_results(__file__, out, _page(runs, files), record)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _page(runs: Sequence[dict[str, Any]], files: dict[str, dict[str, Any]]) -> str:
    """Means over seeds by task, over the tasks, and the sizes of the statistics."""
    head = ["task", "preservation", "instructed", "patched", "fidelity", "KL of the output, nats"]
    rows = []
    names = [*dict.fromkeys(run["task"] for run in runs), "all"]
    for task, way in product(names, dict.fromkeys(run["preserve"] for run in runs)):
        own = [run for run in runs if run["preserve"] == way and task in (run["task"], "all")]
        cells = [f"{mean(run['accuracy'][which] for run in own):.3f}" for which in ("instructed", "patched")]
        cells += [f"{mean(run['fidelity'] for run in own):.3f}"]
        cells += [f"{mean(run['output_kl']['patched'] for run in own):.3f}"]
        rows.append([task, way, *cells, f"{mean(run['perplexity_ratio'] for run in own):.4f}"])
    sizes = [
        [name, f"{file['bytes'] / 1e6:.1f} MB", file["load_seconds"] and f"{file['load_seconds']:.1f} s"]
        for name, file in files.items()
    ]
    first = table([*head, "unrelated perplexity ×"], rows, left=2)
    return first + "\n" + table(["preservation", "size", "first use"], sizes)


if __name__ == "__main__":
    command_line(preservation_file)
