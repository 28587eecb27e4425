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

import jsonargparse
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, load_model, transmute
from lit_thought.errors import SingularSystemError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.unrelated import load_texts
from lit_thought.runs.runner import StreamRunner
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import SITES
from lit_thought.solve.least_squares import Prior, solve, solve_constrained
from lit_thought.solve.sums import Statistics
from lit_thought.theory import format_report, thought_matrix, thought_vector, thought_vectors, verify_exact
from recipes.harness import METHODS, SIX_TASKS, TEMPLATE, Split, load_split, write_results
from recipes.studies.baselines import steering

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "lit_thought", "figure.figsize": (7, 3.5), "savefig.bbox": "tight"})
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
    """Run the chapters and write the page.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        instruction: chunk of the exactness check; its text is English prose that the package ships.
        tokens: how many tokens of it.
        tasks: word tasks of the comparison; the first is the one whose statistics are looked into.
        methods: what to compare, of harness.METHODS; the function vector always comes along.
        seed: seed of the splits.
        shots: demonstrations in the instruction.
        fit: inputs to fit on.
        test: most pairs to test on.
        ridge: λ of the thought matrices that are looked into.
        max_new_tokens: longest output.
        out: path of the page and its figures, without suffix.
    """
    lm, tokenizer = load_model(model)
    splits = [load_split(task, seed, shots, fit, test) for task in tasks]
    record: dict[str, Any] = {"model": model}
    page = [
        f"# The theory on {model}",
        "",
        "`python -m recipes.studies.theory --config recipes/studies/theory.yaml`",
        "",
    ]
    chapters = (
        ("1. At one token, a prompt is a change of weights", lambda: exactness(lm, tokenizer, instruction, tokens)),
        ("2. One change for all tokens", lambda: condensation(lm, tokenizer, splits[0], ridge, max_new_tokens, out)),
        ("3. Six word tasks", lambda: comparison(lm, tokenizer, splits, methods, max_new_tokens)),
        ("4. What it explains", lambda: equivalences(lm, tokenizer, splits[0])),
    )
    for title, chapter in chapters:
        text, figures = chapter()
        page += [f"## {title}", "", text, ""]
        record[title] = figures
        print(f"## {title}\n\n{text}\n", flush=True)
    write_results(out, "\n".join(page), record)


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


def condensation(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    ridge: float,
    max_new_tokens: int,
    out: str,
) -> tuple[str, dict[str, Any]]:
    """Vector and matrix of each block from two thirds of the inputs, tried on the others."""
    data = PairDataModule(split.fit, split.instruction, TEMPLATE, max_new_tokens=max_new_tokens)
    prepare_pairs(data, lm, tokenizer)
    cut = 2 * len(split.fit) // 3
    fitted = _observe(lm, tokenizer, data, range(cut))
    held = _observe(lm, tokenizer, data, range(cut, len(split.fit)))
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
    _draw_errors(kept, f"{out}_kept.svg")
    _draw_spectra(spectra, f"{out}_spectra.svg")
    lines = [
        f"{split.name}: {cut} inputs to fit, {len(split.fit) - cut} others to try on, each block entered by the "
        "instructed stream. Share of Σ ‖δ‖² explained on the others (1: all of it; below 0: worse than nothing), over "
        "blocks; at attn_out δ is the paper's, and its vector the thought vector:",
        "",
        "| site, solver | mean | lowest | highest |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {' | '.join(_share(f(v)) for f in (mean, min, max))} |" for name, v in kept.items()),
        "",
        f"![Explained share by block]({Path(out).name}_kept.svg)",
        f"![Singular values of Δ by block]({Path(out).name}_spectra.svg)",
        "",
        f"The solver `exact`: {refusal or 'Z is invertible at every block.'}",
    ]
    return "\n".join(lines), {"explained": kept, "singular_values": [s[:64].tolist() for s in spectra]}


@torch.no_grad()
def _observe(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PairDataModule, members: range
) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]:
    """a, δ and weights by block and site; nothing is patched, every block is entered by the instructed stream."""
    data.select(tokenizer, members, lm.device)
    runner = StreamRunner(lm, find_blocks(lm), SITES, "teacher-forced")
    seen = {}
    for stage in runner.stages:
        rows = [runner.observe(batch) for batch in data.batches]
        parts = [[getattr(row, name) for row in rows] for name in ("a", "delta", "weights")]
        seen[stage.block, stage.site] = tuple(torch.cat(part).double() for part in parts)
        runner.finish(SitePatch())
    return seen  # type: ignore[return-value]


def _share(value: float) -> str:
    return f"{value:.2f}" if value > -10 else f"{value:.0e}"


def comparison(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Sequence[Split],
    methods: Sequence[str],
    max_new_tokens: int,
) -> tuple[str, dict[str, Any]]:
    """Accuracy, fidelity and unrelated perplexity of every method on every task."""
    unrelated = [text[:5000] for text in load_texts("default", "evaluate", "unrelated")][:1]
    results: dict[str, dict[str, Any]] = {}
    for split in splits:
        common = {"instruction": split.instruction, "template": TEMPLATE, "max_new_tokens": max_new_tokens}
        evaluation = Evaluation(lm, tokenizer, pairs=split.test, unrelated=unrelated, progress=False, **common)
        for name in (*methods, "function vector"):
            if name == "function vector":
                patch = steering(lm, tokenizer, split, strengths=(1.0,))
            else:
                patch = transmute(lm, tokenizer, pairs=split.fit, progress=False, **common, **METHODS[name])
            result = evaluation.score(patch)
            del result["items"]
            results.setdefault(name, {})[split.name] = result
            print(f"{split.name}, {name}: {result['accuracy']['patched']:.2f}", flush=True)
        results.setdefault("plain", {})[split.name] = {"accuracy": {"patched": result["accuracy"]["plain"]}}
        results.setdefault("instructed", {})[split.name] = {"accuracy": {"patched": result["accuracy"]["instructed"]}}
    tasks = [split.name for split in splits]
    order = ("plain", "function vector", *methods, "instructed")
    lines = [
        f"Accuracy on up to {max(len(s.test) for s in splits)} unseen words; then means over tasks: fidelity (outputs "
        "equal to the instructed model's), KL to it on its own outputs, perplexity of unrelated text against the "
        "original model's.",
        "",
        f"| method | {' | '.join(tasks)} | fidelity | KL, nats | perplexity × |",
        "|---|" + "---:|" * (len(tasks) + 3),
    ]
    for name in order:
        own = results[name]
        cells = [name, *(f"{own[task]['accuracy']['patched']:.2f}" for task in tasks)]
        if "fidelity" in own[tasks[0]]:
            cells.append(f"{mean(own[task]['fidelity'] for task in tasks):.2f}")
            cells.append(f"{mean(own[task]['output_kl']['patched'] for task in tasks):.2f}")
            cells.append(f"{mean(own[task]['perplexity_ratio'] for task in tasks):.3f}")
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    settings = {name: METHODS[name] for name in methods}
    lines += ["", f"Settings other than the defaults: `{json.dumps(settings)}`."]
    return "\n".join(lines), results


def equivalences(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Split) -> tuple[str, dict[str, float]]:
    """Our solutions beside formulas written down independently; the largest relative difference of each."""
    found = {
        "contrastive mean difference (activation steering), every block": _steering(lm, tokenizer, split),
        **_editing(),
    }
    lines = ["| equivalence | largest relative difference |", "|---|---:|"]
    lines += [f"| {name} | {value:.1e} |" for name, value in found.items()]
    return "\n".join(lines), found


def _steering(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Split) -> float:
    """Thought vectors of demonstrations against wrong ones, and one forward a prompt with `output_hidden_states`."""
    wrong = split.instruction.replace("A:", "B:")
    inputs = split.fit[:10]
    ours = thought_vectors(lm, tokenizer, split.instruction, inputs, contrast=wrong, template=TEMPLATE, tokens="last")
    differences = []
    for pair in inputs:
        last = []
        for chunk in (split.instruction, wrong):
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


def _draw_errors(kept: dict[str, list[float]], file: str) -> None:
    figure, axes = pyplot.subplots()
    for name in ("attn_out, vector", "attn_out, ridge", "mlp_in, ridge", "mlp_out, vector", "mlp_out, ridge"):
        axes.plot([max(value, -0.5) for value in kept[name]], label=name.replace("ridge", "matrix"))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="block", ylabel="explained share, unseen inputs", ylim=(-0.55, 1.05))
    axes.legend(fontsize="small", ncol=2)
    _save(figure, file)


def _draw_spectra(spectra: Sequence[Tensor], file: str) -> None:
    figure, axes = pyplot.subplots()
    colours = pyplot.get_cmap("viridis")
    for index, values in enumerate(spectra):
        shown = values[:64].clamp_min(1e-12)
        colour = colours(index / max(1, len(spectra) - 1))
        axes.semilogy(range(1, len(shown) + 1), shown, color=colour, linewidth=0.8)
    scale = pyplot.cm.ScalarMappable(cmap=colours, norm=pyplot.Normalize(0, len(spectra) - 1))
    figure.colorbar(scale, ax=axes, label="block")
    axes.set(xlabel="index", ylabel="singular value of Δ at mlp_in")
    _save(figure, file)


def _save(figure: Any, file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    jsonargparse.auto_cli(theory)
