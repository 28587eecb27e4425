"""The theory on a real model: prompts are changes of weights, and what that explains.

    python -m recipes.studies.theory --config recipes/studies/theory.yaml

Writes recipes/results/theory.md, its figures (SVG) and theory.json. The functions below are its chapters:

1. `exactness`: with its own rank-1 change of weights and vector at every token, the plain run *is* the instructed run.
2. `condensation`: one vector, or one matrix, in the place of all those: how much is kept on unseen inputs.
3. `comparison`: on the six word tasks, vector and matrix at the paper's site, our sites, and a function vector.
4. `equivalences`: activation steering, ROME and MEMIT are the same least squares, to rounding.

recipes/studies/accuracy_by_step.py draws the paper's figures for any task, recipes/tasks/edit_fact.py edits a fact.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib import cm, colormaps, colors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import load_model
from lit_thought.errors import SingularSystemError
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.unrelated import load_texts
from lit_thought.runs.runner import StreamRunner
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import SITES
from lit_thought.solve.least_squares import Prior, solve, solve_constrained
from lit_thought.solve.sums import Statistics
from lit_thought.theory import format_report, thought_matrix, thought_vector, thought_vectors, verify_exact
from recipes.harness import (
    METHODS,
    SIX_TASKS,
    TEMPLATE,
    Trial,
    command_line,
    load_split,
    panels,
    save_figure,
    shown,
    table,
    write_results,
)
from recipes.studies.baselines import steering

SOLVERS = ("isotropic", "orthogonal", "min_norm", "ridge")


def theory(
    model: str = "smollm2",
    instruction: str = "You are a pirate. Talk like a pirate.\n",
    tokens: int = 256,
    tasks: Sequence[str] = SIX_TASKS,
    methods: Sequence[str] = ("vector", "mlp_in", "mlp_out", "attn_out", "both"),
    seed: int = 0,
    shots: int = 10,
    fit: int = 30,
    test: int = 30,
    ridge: float = 0.03,
    max_new_tokens: int = 12,
    out: str = "recipes/results/theory",
) -> None:
    """Run the chapters and write the page."""
    lm, tokenizer = load_model(model)
    trials = [Trial(lm, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens) for task in tasks]
    chapters = (
        ("1. At one token, a prompt is a change of weights", lambda: exactness(lm, tokenizer, instruction, tokens)),
        ("2. One change for all tokens", lambda: condensation(trials[0], ridge, out)),
        ("3. Six word tasks", lambda: comparison(trials, methods)),
        ("4. What it explains", lambda: equivalences(trials[0])),
    )
    record: dict[str, Any] = {"model": shown(model)}
    page = []
    for title, chapter in chapters:
        text, record[title] = chapter()
        page.append(f"## {title}\n\n{text}\n")
        print(page[-1], flush=True)
    write_results(__file__, out, "\n".join(page), record)


def exactness(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instruction: str, tokens: int
) -> tuple[str, dict[str, Any]]:
    """The exact patches of every token, put on the model, in float32 and in bfloat16."""
    (text,) = load_texts("default", "preserve", "text")[:1]
    report = verify_exact(lm, tokenizer, instruction, text, tokens=tokens)
    rounded = verify_exact(copy.deepcopy(lm).bfloat16(), tokenizer, instruction, text, tokens=tokens)
    said = (
        f"In bfloat16, rounding alone leaves a largest logit error of {rounded.patched.absolute:.2g} and a greedy "
        f"agreement of {rounded.patched.agreement:.4f} (plain: {rounded.plain.agreement:.4f})."
    )
    return f"{format_report(report)}\n\n{said}", {"float32": report.to_dict(), "bfloat16": rounded.to_dict()}


def condensation(trial: Trial, ridge: float, out: str) -> tuple[str, dict[str, Any]]:
    """Vector and matrix of each block from two thirds of the inputs, tried on the others."""
    count = len(trial.split.fit)
    cut = 2 * count // 3
    fitted, held = _observe(trial, range(cut), range(cut, count))
    kept: dict[str, list[float]] = {f"mlp_in, {solver}": [] for solver in SOLVERS}
    kept |= {f"{site}, {form}": [] for site in ("attn_out", "mlp_out") for form in ("vector", "ridge")}
    spectra, refusal = [], ""
    for (block, site), (a, delta, weights) in fitted.items():
        a_held, delta_held, weights_held = held[block, site]

        def score(found: Tensor, rows: tuple[Tensor, ...] = (delta_held, weights_held)) -> float:
            error = ((rows[0] - found).square().sum(1) * rows[1]).sum()
            return 1 - float(error / (rows[0].square().sum(1) * rows[1]).sum())

        if site != "mlp_in":
            kept[f"{site}, vector"].append(score(thought_vector(delta, weights)))
        for solver in SOLVERS if site == "mlp_in" else ("ridge",):
            matrix = thought_matrix(a, delta, solver, weights=weights, ridge=ridge)
            kept[f"{site}, {solver}"].append(score(a_held @ matrix.T))
        if site == "mlp_in":
            spectra.append(torch.linalg.svdvals(matrix))
            try:
                thought_matrix(a, delta, "exact", weights=weights)
            except SingularSystemError as error:
                refusal = str(error)
    _draw_errors(kept, f"{out}_kept")
    _draw_spectra(spectra, f"{out}_spectra")
    rows = [[name, *(_share(of(values)) for of in (mean, min, max))] for name, values in kept.items()]
    lines = [
        f"{trial.split.name}: {cut} inputs to fit, {count - cut} others to try on, each block entered by the "
        "instructed stream. Share of Σ ‖δ‖² explained on the others (1: all of it; below 0: worse than nothing), over "
        "blocks; at attn_out δ is the paper's, and its vector the thought vector:",
        "",
        table(["site, solver", "mean", "lowest", "highest"], rows),
        f"![Explained share by block]({Path(out).name}_kept.svg)",
        f"![Singular values of Δ by block]({Path(out).name}_spectra.svg)",
        "",
        f"The solver `exact`: {refusal or 'Z is invertible at every block.'}",
    ]
    return "\n".join(lines), {"explained": kept, "singular_values": [s[:64].tolist() for s in spectra]}


@torch.no_grad()
def _observe(trial: Trial, *parts: range) -> list[dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]]:
    """a, δ and weights by block and site, of parts of the inputs; nothing is patched, every block is entered by the
    instructed stream."""
    lm, data = trial.model, trial.prepared()
    found = []
    for members in parts:
        data.select(members, 10.0, lm.device)
        runner = StreamRunner(lm, find_blocks(lm), SITES, "teacher-forced")
        seen = {}
        for stage in runner.stages:
            rows = [runner.observe(batch) for batch in data.batches]
            every = [[getattr(row, name) for row in rows] for name in ("a", "delta", "weights")]
            seen[stage.block, stage.site] = tuple(torch.cat(own).double() for own in every)
            runner.finish(SitePatch())
        found.append(seen)
    return found  # type: ignore[return-value]


def _share(value: float) -> str:
    return f"{value:.2f}" if value > -10 else f"{value:.0e}"


def comparison(trials: Sequence[Trial], methods: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Accuracy, fidelity and unrelated perplexity of every method on every task."""
    unrelated = [text[:5000] for text in load_texts("default", "evaluate", "unrelated")][:1]
    results: dict[str, dict[str, Any]] = {}
    for trial in trials:
        evaluation, task = trial.evaluation(unrelated=unrelated), trial.split.name
        for name in (*methods, "function vector"):
            vector = name == "function vector"
            own = (trial.model, trial.tokenizer, trial.split.instruction, trial.split.fit)
            patch = steering(*own) if vector else trial.fit(**METHODS[name])
            result = evaluation.score(patch)
            del result["items"]
            results.setdefault(name, {})[task] = result
            print(f"{task}, {name}: {result['accuracy']['patched']:.2f}", flush=True)
        for run in ("plain", "instructed"):
            results.setdefault(run, {})[task] = {"accuracy": {"patched": result["accuracy"][run]}}
    tasks = [trial.split.name for trial in trials]
    rows = []
    for name in ("plain", "function vector", *methods, "instructed"):
        own = [results[name][task] for task in tasks]
        cells = [name, *(f"{result['accuracy']['patched']:.2f}" for result in own)]
        if "fidelity" in own[0]:
            cells.append(f"{mean(result['fidelity'] for result in own):.2f}")
            cells.append(f"{mean(result['output_kl']['patched'] for result in own):.2f}")
            cells.append(f"{mean(result['perplexity_ratio'] for result in own):.3f}")
        rows.append([*cells, *[""] * (len(tasks) + 4 - len(cells))])
    text = (
        f"Accuracy on up to {max(len(trial.split.test) for trial in trials)} unseen words; then means over tasks: "
        "fidelity (outputs equal to the instructed model's), KL to it on its own outputs, perplexity of unrelated text "
        f"against the original model's.\n\n{table(['method', *tasks, 'fidelity', 'KL, nats', 'perplexity ×'], rows)}\n"
    )
    settings = {name: METHODS[name] for name in methods}
    return f"{text}Settings other than the defaults: `{json.dumps(settings)}`.", results


def equivalences(trial: Trial) -> tuple[str, dict[str, float]]:
    """Our solutions beside formulas written down independently; the largest relative difference of each."""
    found = {"contrastive mean difference (activation steering), every block": _steering(trial), **_editing()}
    rows = [[name, f"{value:.1e}"] for name, value in found.items()]
    return table(["equivalence", "largest relative difference"], rows), found


def _steering(trial: Trial) -> float:
    """Thought vectors of demonstrations against wrong ones, and one forward a prompt with `output_hidden_states`."""
    lm, tokenizer, right = trial.model, trial.tokenizer, trial.split.instruction
    wrong, inputs = right.replace("A:", "B:"), trial.split.fit[:10]
    ours = thought_vectors(lm, tokenizer, right, inputs, contrast=wrong, template=TEMPLATE, tokens="last")
    differences = []
    for pair in inputs:
        last = []
        for chunk in (right, wrong):
            prompt = chunk + TEMPLATE.split(" {output}")[0].replace("{input}", pair["input"])
            with torch.no_grad():
                states = lm(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states
            last.append(np.stack([state[0, -1].double().numpy() for state in states[1:-1]]))  # the last one is normed
        differences.append(last[0] - last[1])
    theirs = np.mean(differences, axis=0)
    return float(max(np.linalg.norm(ours[:-1].numpy() - theirs, axis=1) / np.linalg.norm(theirs, axis=1)))


def _editing(d_in: int = 96, d_out: int = 48, tokens: int = 40) -> dict[str, float]:
    """ROME and MEMIT by the formulas of Meng et al. in numpy, on random keys, values and covariance."""
    rng = np.random.default_rng(0)
    covariance = (x := rng.standard_normal((d_in, 3 * d_in))) @ x.T / (3 * d_in)
    keys, values = rng.standard_normal((tokens, d_in)), rng.standard_normal((tokens, d_out))
    prior = Prior.from_gram(torch.from_numpy(covariance))

    key, value = keys[0], values[0]
    direction = np.linalg.solve(covariance, key)
    rome = np.outer(value, direction) / (key @ direction)
    ours = solve_constrained(torch.from_numpy(keys[:1]), torch.from_numpy(values[:1]), prior=prior).numpy()
    difference = {"ROME: one key, equality constraint": float(np.linalg.norm(ours - rome) / np.linalg.norm(rome))}

    strength = 15.0
    memit = values.T @ keys @ np.linalg.inv(strength * covariance + keys.T @ keys)
    stats = Statistics(d_in, d_out)
    stats.update(torch.from_numpy(keys), torch.from_numpy(values))
    solution = solve(stats, 0.0, prior, strength / tokens)
    error = np.linalg.norm((solution.B @ solution.A).numpy() - memit) / np.linalg.norm(memit)
    return {**difference, f"MEMIT: {tokens} keys": float(error)}


def _draw_errors(kept: dict[str, list[float]], out: str) -> None:
    figure, (axes,) = panels(1, 7, 3.5)
    for name in ("attn_out, vector", "attn_out, ridge", "mlp_in, ridge", "mlp_out, vector", "mlp_out, ridge"):
        axes.plot([max(value, -0.5) for value in kept[name]], label=name.replace("ridge", "matrix"))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="block", ylabel="explained share, unseen inputs", ylim=(-0.55, 1.05))
    axes.legend(fontsize="small", ncol=2)
    save_figure(figure, out)


def _draw_spectra(spectra: Sequence[Tensor], out: str) -> None:
    figure, (axes,) = panels(1, 7, 3.5)
    colours = cm.ScalarMappable(colors.Normalize(0, max(1, len(spectra) - 1)), colormaps["viridis"])
    for index, values in enumerate(spectra):
        first = values[:64].clamp_min(1e-12)
        axes.semilogy(range(1, len(first) + 1), first, color=colours.to_rgba(index), linewidth=0.8)
    figure.colorbar(colours, ax=axes, label="block")
    axes.set(xlabel="index", ylabel="singular value of Δ at mlp_in")
    save_figure(figure, out)


if __name__ == "__main__":
    command_line(theory)
