"""A fit against what one would otherwise do: LoRA context distillation with AdamW.

    python -m recipes.speed.benchmark_baselines --config recipes/speed/benchmark_baselines.yaml

Both start from the same inputs with the outputs that the instructed model wrote for them, and end with an adapter of
the same rank in memory; loading the model and writing the outputs count for neither. Our preservation statistics come
from their cache, whose own cost is printed beside. The rival's clock runs from the teacher's pass on, and stands still
while it is tested; at each learning rate it goes on until it has reached our accuracy and our KL on the test words, or
its steps or seconds are up. Its time to either is that of the learning rate that was soonest there; its figures are
those of the rate that copied best. Prints Markdown tables and writes them with a JSON record.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from lit_thought import ThoughtCallback, ThoughtModule, ThoughtPatch, load_model
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.fitting import fit
from recipes.harness import Trial, command_line, load_split, machine, shown, table, write_results
from recipes.studies.distillation import distil, lora_patch

STEP_PARTS = ("forward", "backward", "optimizer")


def benchmark(
    model: str = "smollm2",
    dtype: str = "float32",
    device: str | None = None,
    tasks: Sequence[str] = ("common_words/antonym", "function_vectors/capitalize"),
    pairs: Sequence[int] = (30, 300),
    rank: int = 16,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    targets: str | list[str] = "all-linear",
    batch_size: int = 32,
    warmup_steps: int = 3,
    every: int = 10,
    max_steps: int = 300,
    max_times: float = 10.5,
    seed: int = 0,
    test: int = 100,
    max_new_tokens: int = 12,
    repeats: int = 2,
    out: str = "recipes/results/benchmark_baselines",
) -> None:
    """Fit, distil at each learning rate, compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    lm, tokenizer = load_model(model, dtype=dtype, device=device)
    train = {"rank": rank, "targets": targets, "batch_size": batch_size, "warmup_steps": warmup_steps}
    train |= {"every": every, "max_steps": max_steps, "seed": seed}
    rows: list[dict[str, Any]] = []
    first = None
    with tempfile.TemporaryDirectory() as cache:
        for task in tasks:
            counts = [count for count in pairs if load_split(task, seed, fit=count, test=test).test]
            if not counts:
                raise ThoughtError(
                    f"pairs={list(pairs)}: {task!r} has too few to leave any for the test; ask for fewer."
                )
            most = load_split(task, seed, fit=max(counts), test=test)
            evaluation = Trial(lm, tokenizer, most, max_new_tokens).evaluation()
            quick = copy.copy(evaluation)
            quick.unrelated = None  # training is followed without the unrelated text
            for count in counts:
                trial = Trial(lm, tokenizer, replace(most, labelled=most.labelled[:count]), max_new_tokens)
                start = time.perf_counter()
                given = trial.completed()
                outputs = time.perf_counter() - start
                data = trial.prepared(given)
                run = partial(fit_once, trial, given, {"rank": rank, "cache_dir": cache})
                if first is None:
                    first = run()[2]["preserve"]
                fits = [run() for _ in range(repeats)]
                ours = _figures(evaluation, fits[0][0])
                ours |= {"seconds": median(taken for _, taken, _ in fits), "stages": fits[0][2]}
                limits = {"also_at": ours["seconds"], "max_seconds": max_times * ours["seconds"]}
                rival = partial(distil, lm, data.tokenised, partial(held_out, quick), **train, **limits)
                runs, patches = [], []
                for rate in learning_rates:
                    found = rival(learning_rate=rate, finished=partial(reached, ours=ours))
                    runs.append(summary(rate, found.history, found.seconds, ours))
                    patches.append(found.patch)
                    last = runs[-1]["last"]
                    print(
                        f"{most.name}, {count} pairs, learning rate {rate:g}: {last['step']} steps, "
                        f"{last['seconds']:.1f} s, accuracy {last['accuracy']:.2f}, KL {last['output_kl']:.3f}",
                        flush=True,
                    )
                best = min(range(len(runs)), key=lambda index: order(runs[index]))
                runs[best] |= {"best": True, "scored": _figures(evaluation, patches[best])}
                row = {"task": most.name, "pairs": count, "test": len(most.test), "outputs_seconds": outputs}
                rows.append({**row, "ours": ours, "rival": runs})
    environment = machine(lm.device)
    page = f"{_page(rows)}\nPreservation statistics, once per model: {first:.1f} s. {environment}\n"
    settings = {"dtype": dtype, **train, "max_times": max_times}
    record = {"model": shown(model), "settings": settings, "rows": rows, "environment": environment}
    write_results(__file__, out, page, record | {"preserve_seconds_once": first})


def fit_once(
    trial: Trial, pairs: list[dict[str, str]], settings: dict[str, Any]
) -> tuple[ThoughtPatch, float, dict[str, float]]:
    """From pairs with outputs to a patch: the patch, seconds, seconds by stage."""
    callback = ThoughtCallback(**settings)
    start = callback.stopwatch.now()
    patch = fit(ThoughtModule(trial.model, trial.tokenizer), trial.data(pairs), callback, progress=False)
    return patch, callback.stopwatch.now() - start, dict(callback.stopwatch.seconds)


def held_out(evaluation: Evaluation, student: PreTrainedModel) -> dict[str, float]:
    """What is followed of a student while it is trained."""
    result = evaluation.score(lora_patch(student))
    return {
        "accuracy": result["accuracy"]["patched"],
        "fidelity": result["fidelity"],
        "output_kl": result["output_kl"]["patched"],
    }


def reached(figures: Mapping[str, float], ours: Mapping[str, float]) -> bool:
    """Whether figures are as good as ours in accuracy and KL."""
    return figures["accuracy"] >= ours["accuracy"] and figures["output_kl"] <= ours["output_kl"]


def summary(
    rate: float, history: Sequence[Mapping[str, float]], seconds: Mapping[str, float], ours: Mapping[str, Any]
) -> dict[str, Any]:
    """When a run reached our accuracy and our KL (None: never), and where it was at its first test after our fit."""

    def when(good: Any) -> float | None:
        return next((entry["seconds"] for entry in history if good(entry)), None)

    last = history[-1]
    return {
        "learning_rate": rate,
        "best": False,
        "seconds_to_accuracy": when(lambda entry: entry["accuracy"] >= ours["accuracy"]),
        "seconds_to_kl": when(lambda entry: entry["output_kl"] <= ours["output_kl"]),
        "at_our_end": next((dict(entry) for entry in history if entry["seconds"] >= ours["seconds"]), None),
        "last": dict(last),
        "seconds": dict(seconds),
        "history": [dict(entry) for entry in history],
    }


def order(run: Mapping[str, Any]) -> tuple[float, bool, float]:
    """The run of the best copy first: our KL soonest, then those that reached our accuracy, then the lowest KL."""
    to_kl = run["seconds_to_kl"]
    return (inf if to_kl is None else to_kl, run["seconds_to_accuracy"] is None, run["last"]["output_kl"])


def soonest(runs: Sequence[Mapping[str, Any]], what: str) -> Mapping[str, Any]:
    """The run that reached our accuracy or KL first; where none did, the one that went on longest."""

    def key(run: Mapping[str, Any]) -> tuple[float, float]:
        seconds = run[f"seconds_to_{what}"]
        return (inf if seconds is None else seconds, -run["last"]["seconds"])

    return min(runs, key=key)


def _figures(evaluation: Evaluation, patch: ThoughtPatch) -> dict[str, Any]:
    """What is compared of a patch; the KL of the output and of all compared tokens."""
    result = evaluation.score(patch)
    return {
        "instructed_accuracy": result["accuracy"]["instructed"],
        "accuracy": result["accuracy"]["patched"],
        "fidelity": result["fidelity"],
        "output_kl": result["output_kl"]["patched"],
        "kl": result["kl"]["patched"],
        "perplexity_ratio": result["perplexity_ratio"],
        "parameters": patch.num_parameters,
    }


def reaching(run: Mapping[str, Any], what: str, unit: float = 1.0) -> str:
    """When a run reached our accuracy or KL, in units of so many seconds; where it never did, how long it went on."""
    seconds = run[f"seconds_to_{what}"]
    return f"{seconds / unit:.1f}" if seconds is not None else f"> {run['last']['seconds'] / unit:.1f}"


def _page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ours and the best run side by side, every run, and where the time goes."""
    runs = [(row, run) for row in rows for run in row["rival"]]
    best = [(row, run) for row, run in runs if run["best"]]
    parts = {
        "Seconds: ours, the rival's at the learning rate that was soonest there, and at all rates together; × is over "
        "ours.": [_times(row) for row in rows],
        "On the test words: ours, the best of the rival's rates at its first test after our fit has ended (then), and "
        "at the end of the best rate. KL(instructed ‖ ·) in nats a token: of the output, which is what the rival is "
        "trained on, and of all compared tokens.": [_quality(row, run) for row, run in best],
        "Every learning rate:": [_course(row, run) for row, run in runs],
        "Where the time goes, in seconds: the rival's teacher, putting on its adapter, its steps; ours by stage.": [
            _parts(row, run) for row, run in best
        ],
    }
    return "\n".join(f"{text}\n\n{table(list(lines[0]), map(dict.values, lines))}" for text, lines in parts.items())


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['task']}, {row['pairs']}"


def _times(row: Mapping[str, Any]) -> dict[str, str]:
    ours, tuning = row["ours"]["seconds"], sum(run["last"]["seconds"] for run in row["rival"])
    accuracy, kl = (soonest(row["rival"], what) for what in ("accuracy", "kl"))
    return {
        "task, pairs": _name(row),
        "ours": f"{ours:.1f}",
        "to our accuracy (rate)": f"{reaching(accuracy, 'accuracy')} ({accuracy['learning_rate']:g})",
        "to our KL (rate)": f"{reaching(kl, 'kl')} ({kl['learning_rate']:g})",
        "all rates": f"{tuning:.1f}",
        "×, accuracy": reaching(accuracy, "accuracy", ours),
        "×, KL": reaching(kl, "kl", ours),
        "×, all rates": f"{tuning / ours:.1f}",
        "(outputs, both)": f"{row['outputs_seconds']:.1f}",
    }


def _quality(row: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    ours, end = row["ours"], run["scored"]
    then = [own["at_our_end"] for own in row["rival"] if own["at_our_end"] is not None]
    return {
        "task, pairs": _name(row),
        "rate": f"{run['learning_rate']:g}",
        "instructed": f"{ours['instructed_accuracy']:.2f}",
        "accuracy: ours": f"{ours['accuracy']:.2f}",
        "then": f"{max(own['accuracy'] for own in then):.2f}" if then else "–",
        "end": f"{end['accuracy']:.2f}",
        "KL: ours": f"{ours['output_kl']:.3f}",
        "then ": f"{min(own['output_kl'] for own in then):.3f}" if then else "–",
        "end ": f"{end['output_kl']:.3f}",
        "KL of all: ours": f"{ours['kl']:.3f}",
        "end  ": f"{end['kl']:.3f}",
        "unrelated perplexity ×: ours": f"{ours['perplexity_ratio']:.3f}",
        "end   ": f"{end['perplexity_ratio']:.3f}",
    }


def _course(row: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    last = run["last"]
    return {
        "task, pairs": _name(row),
        "rate": f"{run['learning_rate']:g}",
        "to our accuracy, s": reaching(run, "accuracy"),
        "to our KL, s": reaching(run, "kl"),
        "steps": f"{last['step']}",
        "seconds": f"{last['seconds']:.1f}",
        "accuracy": f"{last['accuracy']:.2f}",
        "KL": f"{last['output_kl']:.3f}",
    }


def _parts(row: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    spent, steps = run["seconds"], run["last"]["step"]
    return {
        "task, pairs": _name(row),
        "rate": f"{run['learning_rate']:g}",
        "teacher": f"{spent['teacher']:.2f}",
        "adapter": f"{spent['adapter']:.2f}",
        "steps": f"{steps}",
        **{f"{part} a step": f"{spent[part] / steps:.3f}" for part in STEP_PARTS},
        "ours": ", ".join(f"{stage} {taken:.2f}" for stage, taken in row["ours"]["stages"].items()),
    }


if __name__ == "__main__":
    command_line(benchmark)
