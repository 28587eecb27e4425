"""Choose the defaults of sites, ridge, preservation and answer weight, from fit pairs only.

    python -m recipes.studies.sweep --config recipes/studies/sweep.yaml

For each task and seed the instruction and the 30 fit inputs are those of `word_tasks.py`; its test words are
never read. Twenty of the inputs are fitted, the other ten are held back: fidelity and KL to the instructed model
are measured on them. The preservation text's first three quarters are preserved, perplexity is measured on
5,000 characters of its last quarter. Writes a Markdown and a JSON table, best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import jsonargparse

from lit_thought import load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from recipes.harness import METHODS, SIX_TASKS, TEMPLATE, load_split, write_results


def sweep(
    out: str = "recipes/results/sweep",
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0,),
    sites: Sequence[str] = ("both",),
    preserve_weights: Sequence[float] = (1.0, 3.0, 10.0),
    preserve_tokens: Sequence[int] = (9000,),
    ridges: Sequence[float] = (0.01, 0.03, 0.1),
    answer_weights: Sequence[float] = (10.0,),
    ranks: Sequence[int] = (16,),
) -> None:
    """Fit and score every combination of settings on every task and seed.

    Args:
        out: path of the two result files, without suffix.
        model: "smollm2", a hub id or a local directory.
        tasks: word tasks.
        seeds: seeds of the splits.
        sites: names of harness.METHODS.
        preserve_weights: values of ρ.
        preserve_tokens: tokens of unrelated text behind the preservation term.
        ridges: values of λ.
        answer_weights: weights of the answer's tokens.
        ranks: ranks.
    """
    lm, tokenizer = load_model(model)
    text = files("lit_thought").joinpath("text", "preserve.txt").read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, len(text) * 3 // 4)
    grid = list(product(sites, preserve_weights, preserve_tokens, ridges, answer_weights, ranks))
    scores: dict[tuple, list[dict[str, Any]]] = {setting: [] for setting in grid}
    for task, seed in product(tasks, seeds):
        split = load_split(task, seed)
        held_back = Evaluation(
            lm,
            tokenizer,
            instruction=split.instruction,
            pairs=split.fit[20:],
            template=TEMPLATE,
            unrelated=[text[cut : cut + 5000]],
            max_new_tokens=12,
            progress=False,
        )
        pairs: list[dict[str, str]] = split.fit[:20]
        for setting in grid:
            where, rho, tokens, ridge, answer, rank = setting
            patch = transmute(
                lm,
                tokenizer,
                split.instruction,
                pairs,
                TEMPLATE,
                **METHODS[where],
                rank=rank,
                ridge=ridge,
                preserve=[text[:cut]],
                preserve_weight=rho,
                preserve_tokens=tokens,
                answer_weight=answer,
                max_new_tokens=12,
                progress=False,
            )
            result = held_back.score(patch)
            scores[setting].append(
                {
                    "task": task,
                    "seed": seed,
                    "fidelity": result["fidelity"],
                    "output_kl": result["output_kl"]["patched"],
                    "perplexity_ratio": result["perplexity_ratio"],
                }
            )
            print(task, seed, setting, *(scores[setting][-1][k] for k in ("fidelity", "output_kl", "perplexity_ratio")))
        print(f"{task}, seed {seed}: done", flush=True)
    _write(Path(out), scores)


def _write(out: Path, scores: dict[tuple, list[dict[str, Any]]]) -> None:
    names = ("sites", "preserve_weight", "preserve_tokens", "ridge", "answer_weight", "rank")
    rows = [
        {
            **dict(zip(names, setting, strict=True)),
            "fidelity": mean(r["fidelity"] for r in results),
            "output_kl": mean(r["output_kl"] for r in results),
            "perplexity_ratio": mean(r["perplexity_ratio"] for r in results),
            "worst_perplexity_ratio": max(r["perplexity_ratio"] for r in results),
            "runs": results,
        }
        for setting, results in scores.items()
    ]
    rows.sort(key=lambda row: row["output_kl"])
    head = [*names, "fidelity", "output KL", "perplexity ×", "worst ×"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row[name]) for name in names]
        cells += [f"{row['fidelity']:.3f}", f"{row['output_kl']:.3f}"]
        cells += [f"{row['perplexity_ratio']:.4f}", f"{row['worst_perplexity_ratio']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    print(table)
    write_results(out, table, {"rows": rows})


if __name__ == "__main__":
    jsonargparse.auto_cli(sweep)
