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

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib.axes import Axes
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, load_model
from recipes.harness import (
    METHODS,
    Trial,
    check_names,
    command_line,
    load_split,
    panels,
    save_figure,
    shown,
    table,
    write_results,
)

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
    """Fit step by step with each method and draw what the held-out pairs do."""
    check_names("methods", methods, METHODS)
    lm, tokenizer = load_model(model)
    trial = Trial(lm, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens)
    name = trial.split.name
    history: dict[str, Any] = {}
    for method in methods:
        callback = ThoughtCallback(**METHODS[method], steps=steps, step_size=step_size, pairs_per_step=pairs_per_step)
        logger = CSVLogger(logs, name=f"{name}_{method}")
        history[method] = follow(lm, tokenizer, callback, trial.data(val_pairs=trial.split.test), logger)
        print(method, [f"{entry['accuracy']:.2f}" for entry in history[method]], flush=True)
    figure, (axes,) = panels(1, 7, 3.5)
    plot_steps(axes, history, name)
    save_figure(figure, out)
    page = step_table(history, name) + f"\n![Accuracy by step]({Path(out).name}.svg)\n"
    settings: dict[str, Any] = {"steps": steps, "step_size": step_size, "pairs_per_step": pairs_per_step}
    settings["methods"] = {method: METHODS[method] for method in methods}
    record = {"model": shown(model), "task": task, "seed": seed, "settings": settings, "history": history}
    write_results(__file__, out, page, record)


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
    rows = [[LABELS.get(name, name), *(f"{entry['accuracy']:.2f}" for entry in own)] for name, own in record.items()]
    title = f"{task}, held-out accuracy by step; instructed: {first[0]['instructed_accuracy']:.2f}"
    return f"{title}\n\n{table(['method', *(int(entry['step']) for entry in first)], rows)}"


def plot_steps(axes: Axes, record: Record, task: str) -> None:
    """One line for each method, and the instructed model's accuracy."""
    for method, history in record.items():
        accuracy = [entry["accuracy"] for entry in history]
        axes.plot([entry["step"] for entry in history], accuracy, "o-", label=LABELS.get(method, method))
    instructed = next(iter(record.values()))[0]["instructed_accuracy"]
    axes.axhline(instructed, color="grey", linestyle="--", label="instructed")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02), title=task)
    axes.legend(fontsize="small")


if __name__ == "__main__":
    command_line(accuracy_by_step)
