"""Choose the defaults of sites, ridge, preservation and answer weight, from fit pairs only.

    python -m recipes.studies.sweep --config recipes/studies/sweep.yaml

For each task and seed the instruction and the 30 fit inputs are those of `word_tasks.py`; its test words are
never read. Twenty of the inputs are fitted, the other ten are held back: fidelity and KL to the instructed model
are measured on them. The preservation text's first three quarters are preserved, perplexity is measured on
5,000 characters of its last quarter. Writes a Markdown and a JSON table, best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from lit_thought import load_model
from lit_thought.prompts.unrelated import load_texts
from recipes.harness import (
    METHODS,
    SIX_TASKS,
    Trial,
    check_names,
    command_line,
    load_split,
    shown,
    table,
    write_results,
)

NAMES = ("sites", "preserve_weight", "preserve_tokens", "ridge", "answer_weight", "rank")


def sweep(
    out: str = "recipes/results/sweep",
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0,),
    sites: Sequence[str] = ("both",),
    preserve_weights: Sequence[float] = (1.0, 3.0, 10.0),
    preserve_tokens: Sequence[int] = (9000,),
    ridges: Sequence[float] = (0.01, 0.03, 0.1),
    answer_weights: Sequence[float] = (30.0,),
    ranks: Sequence[int] = (16,),
) -> None:
    """Fit and score every combination of settings on every task and seed."""
    check_names("sites", sites, METHODS)
    lm, tokenizer = load_model(model)
    text = load_texts("default", "preserve", "preserve")[0]
    cut = text.rindex("\n", 0, len(text) * 3 // 4)
    grid = list(product(sites, preserve_weights, preserve_tokens, ridges, answer_weights, ranks))
    scores: dict[tuple[Any, ...], list[dict[str, Any]]] = {setting: [] for setting in grid}
    for task, seed in product(tasks, seeds):
        trial = Trial(lm, tokenizer, load_split(task, seed))
        held_back = trial.evaluation(trial.split.fit[20:], unrelated=[text[cut : cut + 5000]])
        for setting in grid:
            where, *numbers = setting
            chosen = {**METHODS[where], **dict(zip(NAMES[1:], numbers, strict=True)), "preserve": [text[:cut]]}
            result = held_back.score(trial.fit(trial.split.fit[:20], **chosen))
            found = {"fidelity": result["fidelity"], "output_kl": result["output_kl"]["patched"]}
            scores[setting].append(found | {"perplexity_ratio": result["perplexity_ratio"]})
            print(task, seed, setting, *scores[setting][-1].values(), flush=True)
            scores[setting][-1] |= {"task": task, "seed": seed}
    rows = [
        {
            **dict(zip(NAMES, setting, strict=True)),
            **{key: mean(run[key] for run in runs) for key in ("fidelity", "output_kl", "perplexity_ratio")},
            "worst_perplexity_ratio": max(run["perplexity_ratio"] for run in runs),
            "runs": runs,
        }
        for setting, runs in scores.items()
    ]
    rows.sort(key=lambda row: row["output_kl"])
    lines = [
        [*(row[name] for name in NAMES), f"{row['fidelity']:.3f}", f"{row['output_kl']:.3f}"]
        + [f"{row[key]:.4f}" for key in ("perplexity_ratio", "worst_perplexity_ratio")]
        for row in rows
    ]
    settings = {"tasks": list(tasks), "seeds": list(seeds)}
    page = table([*NAMES, "fidelity", "output KL", "perplexity ×", "worst ×"], lines)
    write_results(__file__, out, page, {"model": shown(model), "settings": settings, "rows": rows})


if __name__ == "__main__":
    command_line(sweep)
