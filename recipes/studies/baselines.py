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

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import jsonargparse
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtPatch, load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.evaluation.metrics import token_kl
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.solve.intervals import wilson
from lit_thought.theory import apply_token_patches, best_block, thought_vectors, token_patches, vector_patch
from recipes.harness import (
    METHODS,
    SIX_TASKS,
    TEMPLATE,
    Split,
    demonstrations,
    load_split,
    provenance,
    shown,
    write_results,
)
from recipes.studies.distillation import distil

Patched = Callable[[], ThoughtPatch]
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
    """Fit and test every method on every task.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        tasks: names below recipes/data, or JSON, JSONL or CSV files of input/output pairs.
        seed: seed of the splits and of the LoRA factors.
        shots: demonstrations in the instruction.
        fit: inputs to fit on; their outputs are not used.
        test: most pairs to test on.
        rank: rank of the adapters.
        learning_rate: of AdamW in the distillation.
        steps: of AdamW in the distillation.
        max_new_tokens: longest output.
        out: path of the two result files, without suffix.
    """
    lm, tokenizer = load_model(model)
    runs: list[dict[str, Any]] = []
    for task in tasks:
        split = load_split(task, seed, shots, fit, test)
        common = {"instruction": split.instruction, "template": TEMPLATE, "max_new_tokens": max_new_tokens}
        evaluation = Evaluation(lm, tokenizer, pairs=split.test, progress=False, **common)
        data = PairDataModule(split.fit, split.instruction, TEMPLATE, max_new_tokens=max_new_tokens)
        prepare_pairs(data, lm, tokenizer)  # every method may start from the outputs that the instructed model writes
        given = [{**pair, "output": text} for pair, text in zip(data.pairs, data.outputs, strict=True)]
        patch = partial(transmute, lm, tokenizer, pairs=given, rank=rank, progress=False, **common)
        train = {"learning_rate": learning_rate, "max_steps": steps, "every": steps, "rank": rank, "seed": seed}
        methods: dict[str, Patched] = {
            "thought vector": partial(patch, **METHODS["vector"]),
            "thought matrix and vector": partial(patch, **METHODS["mlp_in"]),
            "contrastive steering": partial(steering, lm, tokenizer, split, mixed_up(split.instruction, seed)),
            "function vector": partial(steering, lm, tokenizer, split, strengths=(1.0,)),
            "LoRA distillation": partial(distilled, lm, data, train),
            "lit_thought": partial(patch, **METHODS["both"]),
        }
        for name, method in methods.items():
            start = time.perf_counter()
            found = method()
            seconds = time.perf_counter() - start
            runs.append({"task": split.name, "method": name, "seconds": seconds, **_scored(evaluation.score(found))})
            print(_line(split.name, runs[-1]), flush=True)
        start = time.perf_counter()
        exact = token_exact(lm, tokenizer, evaluation)
        runs.append({"task": split.name, "method": "token-exact", "seconds": time.perf_counter() - start, **exact})
        print(_line(split.name, runs[-1]), flush=True)
        rows = [(row["output"].strip(), *texts) for row, *texts in _written(evaluation)]
        for name, index in (("plain", 1), ("instructed", 2)):
            correct = [row[0] == row[index] for row in rows]
            equal = [row[index] == row[2] for row in rows]
            runs.append({"task": split.name, "method": name, "correct": correct, "equal": equal})
    settings = {"seed": seed, "shots": shots, "fit": fit, "test": test, "rank": rank, "learning_rate": learning_rate}
    settings |= {"steps": steps, "strengths": STRENGTHS, "max_new_tokens": max_new_tokens}
    record = {"model": shown(model), **provenance(), "settings": settings, "runs": runs}
    page = f"`python -m recipes.studies.baselines --config recipes/studies/baselines.yaml` on {shown(model)}, commit "
    page += f"{record['commit']}; settings: `{json.dumps(settings)}`\n\n{table(runs)}"
    print("\n" + page)
    write_results(out, page, record)


def mixed_up(instruction: str, seed: int) -> str:
    """The demonstrations with their outputs in another order, none in its own place if that can be."""
    blocks = [line.split("\nA: ") for line in instruction.removesuffix("\n").split("\nQ: ")]
    outputs = [output for _, output in blocks]
    order = list(range(len(outputs)))
    random.Random(seed).shuffle(order)
    turned = {place: outputs[order[(at + 1) % len(order)]] for at, place in enumerate(order)}
    return "\nQ: ".join(f"{blocks[place][0]}\nA: {turned[place]}" for place in range(len(blocks))) + "\n"


def steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    contrast: str | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> ThoughtPatch:
    """The mean difference at the last token of the prompt, at one block's output.

    Block and strength are chosen on the last third of the inputs, which the vectors have not seen; a strength of 1
    alone leaves the block to be chosen.

    Args:
        model, tokenizer: the model.
        split: instruction and inputs.
        contrast: what the instruction is set against; the plain prompt when left out.
        strengths: factors to try.
    """
    cut = 2 * len(split.fit) // 3
    chunk: dict[str, Any] = {"instruction": split.instruction, "template": TEMPLATE}
    vectors = thought_vectors(model, tokenizer, pairs=split.fit[:cut], contrast=contrast, tokens="last", **chunk)
    tried = []
    for strength in strengths:
        block, kl = best_block(model, tokenizer, vectors, pairs=split.fit[cut:], scale=strength, **chunk)
        tried.append((kl[block], strength, block))
    _, strength, block = min(tried)
    return vector_patch(model, {block: vectors[block]}, strength)


def distilled(model: PreTrainedModel, data: PairDataModule, train: Mapping[str, Any]) -> ThoughtPatch:
    """A LoRA on all linear layers, trained to copy the instructed model."""
    return distil(model, data.tokenised, lambda student: {}, batch_size=32, warmup_steps=3, **train).patch


@torch.no_grad()
def token_exact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: Evaluation) -> dict[str, Any]:
    """The test prompts with the instructed model's own output, each token with its own patch.

    Greedy decoding would write the same output where the likeliest token is the instructed run's all along it; that is
    what counts as equal.
    """
    equal, correct, divergences = [], [], []
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
        equal.append(bool((wanted.argmax(-1) == got.argmax(-1)).all()))
        correct.append(equal[-1] and instructed == row["output"].strip())
    return {"correct": correct, "equal": equal, "output_kl": float(torch.cat(divergences).mean())}


def _written(evaluation: Evaluation) -> list[tuple[dict[str, Any], str, str]]:
    """Each test pair with the plain and the instructed output."""
    outputs = ([output.text.strip() for output in run] for run in (evaluation.plain, evaluation.instructed))
    return list(zip(evaluation.rows, *outputs, strict=True))


def _scored(result: Mapping[str, Any]) -> dict[str, Any]:
    items = result["items"]
    return {
        "correct": [item["patched"].strip() == item["reference"].strip() for item in items],
        "equal": [item["patched"].strip() == item["instructed"].strip() for item in items],
        "output_kl": result["output_kl"]["patched"],
        "perplexity_ratio": result["perplexity_ratio"],
    }


def _line(task: str, run: Mapping[str, Any]) -> str:
    return f"{task}, {run['method']}: accuracy {mean(run['correct']):.2f}, KL {run['output_kl']:.3f}"


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by task and method, and means over the tasks."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    order = [
        "plain",
        *(name for name in dict.fromkeys(run["method"] for run in runs) if name not in ("plain", "instructed")),
    ]
    lines = [
        f"Accuracy on up to {max(len(run['correct']) for run in runs)} unseen words by task, and on all of them with a "
        "95 % interval; then means over the tasks: fidelity (outputs equal to the instructed model's), KL to it along "
        "its own outputs, in nats, perplexity of unrelated text against the original model's, seconds from the "
        "instructed model's outputs to the patch. Token-exact patches belong to one text and are made from the "
        "instructed run of the tested words themselves: a bound, not a rival.",
        "",
        f"| method | {' | '.join(tasks)} | all words | fidelity | KL | perplexity × | seconds |",
        "|---|" + "---:|" * (len(tasks) + 5),
    ]
    for name in [*order, "instructed"]:
        own = {run["task"]: run for run in runs if run["method"] == name}
        every = [one for run in own.values() for one in run["correct"]]
        low, high = wilson(sum(every), len(every))
        cells = [name, *(f"{mean(own[task]['correct']):.2f}" for task in tasks)]
        cells += [f"{mean(every):.3f} ({low:.2f} to {high:.2f})"]
        cells.append(f"{mean(mean(run['equal']) for run in own.values()):.3f}")
        for key, form in (("output_kl", ".3f"), ("perplexity_ratio", ".3f"), ("seconds", ".1f")):
            known = [run[key] for run in own.values() if key in run]
            cells.append(format(mean(known), form) if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jsonargparse.auto_cli(baselines)
