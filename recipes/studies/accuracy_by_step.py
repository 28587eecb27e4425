"""Accuracy by step at the paper's site: thought matrix and thought vector together, and each alone.

    python -m recipes.studies.accuracy_by_step --config recipes/studies/accuracy_by_step.yaml

The figures of Mazzawi et al. 2025 (arXiv 2510.08734) for any task: each step takes the next pairs, and adds a part of
its solution to the patch; after it, held-out pairs are generated. Lightning's CSVLogger keeps the figures of each run.
Writes an SVG, a Markdown table and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib import pyplot
from matplotlib.axes import Axes
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, load_model
from recipes.harness import METHODS, TEMPLATE, load_split, write_results

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "lit_thought", "figure.figsize": (7, 3.5), "savefig.bbox": "tight"})
LABELS = {"mlp_in": "ΔW and δ", "matrix": "ΔW alone", "vector": "δ alone"}
Record = Mapping[str, Sequence[Mapping[str, float]]]
"""By method, the validation pairs' figures after each step: ``ThoughtCallback.history``."""


def accuracy_by_step(
    model: str = "smollm2",
    task: str = "common_words/antonym",
    methods: Sequence[str] = ("mlp_in", "matrix", "vector"),
    steps: int = 6,
    step_size: float = 0.5,
    pairs_per_step: int | None = 10,
    seed: int = 0,
    shots: int = 10,
    fit: int = 30,
    test: int = 40,
    max_new_tokens: int = 12,
    logs: str = "lightning_logs",
    out: str = "recipes/results/accuracy_by_step",
) -> None:
    """Fit step by step with each method and draw what the held-out pairs do.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        task: a word task below recipes/data, or a JSON, JSONL or CSV file of input/output pairs.
        methods: what to compare, of harness.METHODS.
        steps: steps of each fit.
        step_size: part of each step's solution that is added.
        pairs_per_step: pairs a step; null for all of them in every step.
        seed: seed of the split.
        shots: demonstrations in the instruction.
        fit: inputs to fit on; their outputs are not used.
        test: most held-out pairs.
        max_new_tokens: longest output.
        logs: folder of the loggers.
        out: path of the results, without suffix.
    """
    lm, tokenizer = load_model(model)
    split = load_split(task, seed, shots, fit, test)
    record: dict[str, Any] = {}
    for name in methods:
        callback = ThoughtCallback(**METHODS[name], steps=steps, step_size=step_size, pairs_per_step=pairs_per_step)
        data = PairDataModule(
            split.fit, split.instruction, TEMPLATE, max_new_tokens=max_new_tokens, val_pairs=split.test
        )
        record[name] = follow(lm, tokenizer, callback, data, CSVLogger(logs, name=f"{split.name}_{name}"))
        print(name, [f"{entry['accuracy']:.2f}" for entry in record[name]], flush=True)
    _draw(record, split.name, Path(out).with_suffix(".svg"))
    table = step_table(record, split.name) + f"\n![Accuracy by step]({Path(out).name}.svg)\n"
    print("\n" + table)
    settings: dict[str, Any] = {"steps": steps, "step_size": step_size, "pairs_per_step": pairs_per_step}
    settings["methods"] = {name: METHODS[name] for name in methods}
    write_results(out, table, {"model": model, "task": task, "seed": seed, "settings": settings, "history": record})


def follow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    callback: ThoughtCallback,
    data: PairDataModule,
    logger: Logger | bool = False,
) -> list[dict[str, float]]:
    """Run one fit; how the data's validation pairs do before it and after each step."""
    trainer = Trainer(
        accelerator="cpu" if model.device.type == "cpu" else "auto",
        devices=1,
        max_epochs=-1,
        callbacks=[callback],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ThoughtModule(model, tokenizer), datamodule=data)
    return callback.history


def step_table(record: Record, task: str) -> str:
    """One line for each method."""
    first = next(iter(record.values()))
    steps = [int(entry["step"]) for entry in first]
    lines = [
        f"{task}, held-out accuracy by step; instructed: {first[0]['instructed_accuracy']:.2f}",
        "",
        f"| method | {' | '.join(map(str, steps))} |",
        "|---|" + "---:|" * len(steps),
    ]
    for method, history in record.items():
        lines.append(f"| {LABELS.get(method, method)} | " + " | ".join(f"{e['accuracy']:.2f}" for e in history) + " |")
    return "\n".join(lines) + "\n"


def plot_steps(axes: Axes, record: Record, task: str) -> None:
    """One line for each method, and the instructed model's accuracy."""
    for method, history in record.items():
        accuracy = [entry["accuracy"] for entry in history]
        axes.plot([entry["step"] for entry in history], accuracy, "o-", label=LABELS.get(method, method))
    instructed = next(iter(record.values()))[0]["instructed_accuracy"]
    axes.axhline(instructed, color="grey", linestyle="--", label="instructed")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02), title=task)
    axes.legend(fontsize="small")


def _draw(record: Record, task: str, file: Path) -> None:
    figure, axes = pyplot.subplots()
    plot_steps(axes, record, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    jsonargparse.auto_cli(accuracy_by_step)
