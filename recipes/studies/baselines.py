"""What else turns a prompt into a change of the model, on the same words and with the same measures.

    python -m recipes.studies.baselines --config recipes/studies/baselines.yaml

Each method gets the same demonstrations and the same inputs without outputs, and is tested on the same other words:

- *plain* and *instructed*: the model without and with the demonstrations.
- *thought vector*: one vector for each block, the mean error of the residual stream (Mazzawi et al. 2025).
- *thought matrix and vector*: the paper's patch of the MLP's first layers and output.
- *contrastive steering*: the demonstrations against the same ones with their outputs mixed up, mean difference at the
  last token of the prompt, added to the output of one block (Turner et al. 2023); block and strength are chosen on
  inputs held back, by KL to the instructed model.
- *function vector*: the same against the plain prompt (after Todd et al. 2024).
- *LoRA distillation*: AdamW on KL to the instructed model, for a fixed number of steps (distillation.py).
- *lit_thought*: its default patch.
- *token-exact*: with its own patch for every token of every test prompt (Dherin et al. 2025): what no single patch can
  beat. These patches are made from the instructed run of the very words that are tested.

Writes a Markdown and a JSON table.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model
from lit_thought.evaluation.compare import Evaluation
from lit_thought.evaluation.metrics import token_kl
from lit_thought.theory import apply_token_patches, best_block, thought_vectors, token_patches, vector_patch
from lit_thought.timing import Stopwatch
from recipes.harness import (
    METHODS,
    SIX_TASKS,
    TEMPLATE,
    Trial,
    command_line,
    demonstrations,
    equal,
    load_split,
    share,
    shown,
    table,
    timed,
    write_results,
)
from recipes.studies.distillation import distil

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Factors on a steering vector that are tried on the inputs held back."""


def baselines(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seed: int = 0,
    shots: int = 10,
    fit: int = 30,
    test: int = 50,
    rank: int = 16,
    learning_rate: float = 3e-3,
    steps: int = 40,
    max_new_tokens: int = 12,
    out: str = "recipes/results/baselines",
) -> None:
    """Fit and test every method on every task."""
    lm, tokenizer = load_model(model)
    runs: list[dict[str, Any]] = []
    for task in tasks:
        trial = Trial(lm, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens)
        evaluation = trial.evaluation()
        given = trial.completed()  # every method may start from the outputs that the instructed model writes
        patch = partial(trial.fit, given, rank=rank)
        steer = partial(steering, lm, tokenizer, trial.split.instruction, trial.split.fit)
        train = {"learning_rate": learning_rate, "max_steps": steps, "every": steps, "rank": rank, "seed": seed}
        methods: dict[str, Callable[[], ThoughtPatch]] = {
            "thought vector": partial(patch, **METHODS["vector"]),
            "thought matrix and vector": partial(patch, **METHODS["mlp_in"]),
            "contrastive steering": partial(steer, contrast=mixed_up(trial.split.shown, seed)),
            "function vector": steer,
            "LoRA distillation": partial(distilled, trial, given, train),
            "lit_thought": partial(patch, **METHODS["both"]),
        }
        for name in (*methods, "token-exact"):
            if name in methods:
                found, seconds = timed(methods[name])
                scored = _scored(evaluation.score(found))
            else:
                start = Stopwatch.now()
                scored = token_exact(evaluation)
                seconds = Stopwatch.now() - start
            runs.append({"task": trial.split.name, "method": name, "seconds": seconds, **scored})
            accuracy = mean(scored["correct"])
            print(f"{trial.split.name}, {name}: accuracy {accuracy:.2f}, KL {scored['output_kl']:.3f}", flush=True)
        rows = [(row["output"].strip(), *texts) for row, *texts in _written(evaluation)]
        for name, index in (("plain", 1), ("instructed", 2)):
            correct = [row[0] == row[index] for row in rows]
            same = [row[index] == row[2] for row in rows]
            runs.append({"task": trial.split.name, "method": name, "correct": correct, "equal": same})
    settings = {"seed": seed, "shots": shots, "fit": fit, "test": test, "rank": rank, "learning_rate": learning_rate}
    settings |= {"steps": steps, "strengths": STRENGTHS, "max_new_tokens": max_new_tokens}
    write_results(__file__, out, page(runs), {"model": shown(model), "settings": settings, "runs": runs})


def mixed_up(pairs: Sequence[Mapping[str, str]], seed: int) -> str:
    """The demonstrations with their outputs in another order, none in its own place if that can be."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    other = {place: pairs[order[(at + 1) % len(order)]]["output"] for at, place in enumerate(order)}
    return demonstrations([{"input": pair["input"], "output": other[place]} for place, pair in enumerate(pairs)])


def steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    inputs: Sequence[Mapping[str, str]],
    template: str | PromptTemplate = TEMPLATE,
    contrast: str | None = None,
) -> ThoughtPatch:
    """The mean difference at the last token of the prompt, at one block's output.

    Block and strength are chosen on the last third of the inputs, which the vectors have not seen.

    Args:
        model, tokenizer: the model.
        instruction: the chunk.
        inputs: pairs without outputs.
        template: how they make prompts.
        contrast: what the instruction is set against; the plain prompt when left out.
    """
    cut = 2 * len(inputs) // 3
    chunk: dict[str, Any] = {"instruction": instruction, "template": template}
    vectors = thought_vectors(model, tokenizer, pairs=inputs[:cut], contrast=contrast, tokens="last", **chunk)
    tried = []
    for strength in STRENGTHS:
        block, kl = best_block(model, tokenizer, vectors, pairs=inputs[cut:], scale=strength, **chunk)
        tried.append((kl[block], strength, block))
    _, strength, block = min(tried)
    return vector_patch(model, {block: vectors[block]}, strength)


def distilled(trial: Trial, pairs: Sequence[Mapping[str, str]], train: Mapping[str, Any]) -> ThoughtPatch:
    """A LoRA on all linear layers, trained to copy the instructed model."""
    return distil(
        trial.model, trial.prepared(pairs).tokenised, lambda student: {}, batch_size=32, warmup_steps=3, **train
    ).patch


@torch.no_grad()
def token_exact(evaluation: Evaluation) -> dict[str, Any]:
    """The test prompts with the instructed model's own output, each token with its own patch.

    Greedy decoding would write the same output where the likeliest token is the instructed run's all along it; that is
    what counts as equal.
    """
    model, tokenizer = evaluation.model, evaluation.tokenizer
    same, correct, divergences = [], [], []
    for (row, _, instructed), pair in zip(_written(evaluation), evaluation.completed, strict=True):
        text = demonstrations([{"input": row["input"], "output": instructed}])
        instruction = evaluation.instructions[0] or ""
        patches = token_patches(model, tokenizer, instruction, text)
        ids, places = patches[0].token_ids, patches[0].target_positions
        start, stop = pair.output_span
        there = slice(start - 1, min(stop, len(ids)))
        whole = tokenizer(instruction + text, return_tensors="pt").input_ids.to(model.device)
        wanted = model(whole).logits[0, places][there]
        with apply_token_patches(model, patches):
            got = model(ids[None]).logits[0][there]
        divergences.append(token_kl(wanted, got).cpu())
        same.append(bool((wanted.argmax(-1) == got.argmax(-1)).all()))
        correct.append(same[-1] and instructed == row["output"].strip())
    return {"correct": correct, "equal": same, "output_kl": float(torch.cat(divergences).mean())}


def _written(evaluation: Evaluation) -> list[tuple[dict[str, Any], str, str]]:
    """Each test pair with the plain and the instructed output."""
    outputs = ([output.text.strip() for output in run] for run in (evaluation.plain, evaluation.instructed))
    return list(zip(evaluation.rows, *outputs, strict=True))


def _scored(result: Mapping[str, Any]) -> dict[str, Any]:
    items = result["items"]
    scored = {"correct": equal(items, "patched"), "equal": equal(items, "patched", "instructed")}
    return scored | {"output_kl": result["output_kl"]["patched"], "perplexity_ratio": result["perplexity_ratio"]}


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by task and method, and means over the tasks."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    names = [name for name in dict.fromkeys(run["method"] for run in runs) if name not in ("plain", "instructed")]
    rows = []
    for name in ("plain", *names, "instructed"):
        own = {run["task"]: run for run in runs if run["method"] == name}
        every = [one for run in own.values() for one in run["correct"]]
        cells = [name, *(f"{mean(own[task]['correct']):.2f}" for task in tasks), share(every, 3)]
        cells.append(f"{mean(mean(run['equal']) for run in own.values()):.3f}")
        for key, form in (("output_kl", ".3f"), ("perplexity_ratio", ".3f"), ("seconds", ".1f")):
            known = [run[key] for run in own.values() if key in run]
            cells.append(format(mean(known), form) if known else "")
        rows.append(cells)
    head = ["method", *tasks, "all words", "fidelity", "KL", "perplexity ×", "seconds"]
    return (
        f"Accuracy on up to {max(len(run['correct']) for run in runs)} unseen words by task, and on all of them with a "
        "95 % interval; then means over the tasks: fidelity (outputs equal to the instructed model's), KL to it along "
        "its own outputs, in nats, perplexity of unrelated text against the original model's, seconds from the "
        "instructed model's outputs to the patch. Token-exact patches belong to one text and are made from the "
        f"instructed run of the tested words themselves: a bound, not a rival.\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    command_line(baselines)
