"""What a fit loses with preservation statistics in few numbers, against all directions and against none.

    python -m recipes.studies.preservation_file --config recipes/studies/preservation_file.yaml

Writes the model's preservation statistics to files of several numbers of directions and tokens, as ``lit-thought
preserve`` does, and fits each task with each of them, and without preservation. With as many directions as a site has
inputs the mean Gram matrix is whole, but for the file's 8 bits. Splits and tests are those of word_tasks.py. Writes a
Markdown and a JSON table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from lit_thought import load_model
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.settings import DIRECTIONS, FitSettings
from lit_thought.statistics.preserve import WINDOW, preservation
from recipes.harness import SIX_TASKS, Trial, command_line, load_split, shown, table, write_results


def preservation_file(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0,),
    directions: Sequence[int | None] = (32, DIRECTIONS, None),
    preserve_tokens: Sequence[int] = (FitSettings.preserve_tokens, 12_000),
    rank: int = 16,
    shots: int = 10,
    fit: int = 30,
    test: int = 100,
    max_new_tokens: int = 12,
    out: str = "recipes/results/preservation_file",
) -> None:
    """Fit and test every task and seed with each file and without preservation."""
    lm, tokenizer = load_model(model)
    blocks = find_blocks(lm)
    texts = load_texts("default", "preserve", "texts")
    most = max(site.d_in for block in blocks for site in block.sites.values())
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        ways: dict[str, dict[str, Any]] = {"none": {"preserve": None}}
        files: dict[str, dict[str, Any]] = {}
        for count, kept in product(preserve_tokens, directions):
            name = f"{'all' if kept is None else kept} directions, {count} tokens"
            started = time.perf_counter()
            windows = text_windows(tokenizer, texts, WINDOW, count)
            found, _ = preservation(lm, blocks, windows, folder, directions=kept or most)
            files[name] = {"bytes": found.path.stat().st_size, "seconds": time.perf_counter() - started}
            ways[name] = {"preserve": found.path, "cache_dir": folder}
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
    settings = {"seeds": list(seeds), "rank": rank, "shots": shots, "fit": fit, "test": test}
    record = {"model": shown(model), "settings": settings, "files": files, "runs": runs}
    write_results(__file__, out, _page(runs, files), record)


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
    sizes = [[name, f"{file['bytes'] / 1e6:.1f} MB", f"{file['seconds']:.1f} s"] for name, file in files.items()]
    first = table([*head, "unrelated perplexity ×"], rows, left=2)
    return first + "\n" + table(["preservation", "size", "to compute"], sizes)


if __name__ == "__main__":
    command_line(preservation_file)
