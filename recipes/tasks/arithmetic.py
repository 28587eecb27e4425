"""Sum or product: the instruction that says what to do with two numbers becomes weights.

    python -m recipes.tasks.arithmetic --config recipes/tasks/arithmetic.yaml

The first experiment of Mazzawi et al. 2025 (arXiv 2510.08734): two numbers, and an instruction that says what to do
with them, in words or by demonstrations. Small pretrained models can hardly multiply, so this recipe first trains one
that can (arithmetic_model.py, in minutes and once: it is kept in the cache) and transmutes its instructions. The inputs
to fit on have no outputs (the instructed model writes them), and are of pairs the model was trained on; it is tested on
others of these and on all pairs that it was never trained on.

Three parts: the default method for each operation and model; what each patch does to prompts with an instruction, its
own and the other one; and, for the trained model, the paper's method step by step, thought matrix and thought vector
together and each alone. Writes a Markdown page, a figure and JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, PromptTemplate, ThoughtCallback, ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from lit_thought.runs.generate import generate
from recipes.harness import (
    METHODS,
    TEMPLATE,
    command_line,
    demonstrations,
    difference,
    panels,
    save_figure,
    share,
    shown,
    table,
    write_results,
)
from recipes.studies.accuracy_by_step import Record, follow, plot_steps, step_table
from recipes.tasks.arithmetic_model import (
    OPERATIONS,
    WORDINGS,
    Pair,
    Training,
    question,
    solved,
    split_pairs,
    told,
    trained_model,
)
from recipes.tasks.arithmetic_model import TEMPLATE as TINY_TEMPLATE

TINY = "tiny"
BAR = 0.95
TRAINING = Training()
NOTE = """\
The inputs to fit on are of other pairs than those tested. A pair *never trained on* is in no training text of the
tiny model in this order, only in the other one. Shares have intervals of 95 % (Wilson; of differences, Newcombe). The
second table is of prompts that have their instruction: what a patch changes there, its own operation and the other one.
"""
Chunk = Literal["wording", "demonstrations"]
Preserving = Literal["both", "other", "nothing"]


class Setting(NamedTuple):
    """One model and what it is asked: the instruction of each operation, operands to fit on and to test on."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    instructions: dict[str, str]
    fit: list[Pair]
    test: list[Pair]
    untrained: frozenset[Pair]
    preserve: dict[str, str | list[str] | None]


def arithmetic(
    models: Sequence[str] = (TINY, "smollm2"),
    training: Training = TRAINING,
    chunks: Sequence[Chunk] = ("wording", "demonstrations"),
    shots: int = 10,
    fit: int = 80,
    test: int = 60,
    rank: int = 16,
    preserving: Sequence[Preserving] = ("both", "other", "nothing"),
    preserve_weight: float | None = None,
    max_new_tokens: int = 6,
    methods: Sequence[str] = ("mlp_in", "matrix", "vector"),
    steps: int = 6,
    step_size: float = 0.5,
    pairs_per_step: int | None = 20,
    seed: int = 0,
    out: str = "recipes/results/arithmetic",
) -> None:
    """Fit and test both operations on every model."""
    settings = {"chunks": list(chunks), "shots": shots, "fit": fit, "test": test, "rank": rank}
    settings |= {"preserving": list(preserving), "preserve_weight": preserve_weight, "max_new_tokens": max_new_tokens}
    by_step = {"methods": list(methods), "steps": steps, "step_size": step_size, "pairs_per_step": pairs_per_step}
    unknown = sorted(set(methods) - set(METHODS))
    if unknown or not (models and chunks and preserving):
        raise ThoughtError(
            f"models={list(models)}, chunks={list(chunks)}, preserving={list(preserving)}: expected at least one of "
            f"each, and methods of harness.METHODS, which does not have {unknown}."
        )
    record: dict[str, Any] = {"model": ", ".join(map(shown, models)), "settings": settings | by_step | {"seed": seed}}
    runs: dict[str, Any] = {}
    histories: dict[str, Record] = {}
    for name in models:
        if name == TINY:
            folder, trained_now = trained_model(training)
            record["training"] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            print(f"The tiny model was {'trained' if trained_now else 'in the cache'}.", flush=True)
            loaded = load_model(folder)
            choices = product(chunks, preserving)
            tried = [prepare_tiny(*loaded, training, *choice, shots, fit, test, seed) for choice in choices]
        else:
            tried = [prepare_pretrained(name, shots, fit, test, seed)]
        for setting in tried:
            runs[setting.name] = transmute_both(setting, rank, preserve_weight, max_new_tokens)
            own = {setting.name: runs[setting.name]}
            print(result_table(own) + "\n" + cross_table(own), flush=True)
        if name == TINY and methods:
            histories = steps_of(tried[0], by_step, max_new_tokens)
    page = f"Training: `{json.dumps(record['training'])}`\n\n" if "training" in record else ""
    page += "\n".join([NOTE, result_table(runs), verdict(runs), cross_table(runs)])
    if histories:
        figure, every = panels(len(histories), 9, 3.5, sharey=True)
        for axes, (operation, history) in zip(every, histories.items(), strict=True):
            plot_steps(axes, history, operation)
        save_figure(figure, out)
        page += "\n" + "\n".join(step_table(history, operation) for operation, history in histories.items())
        page += f"\n![Accuracy by step]({Path(out).name}.svg)\n"
    write_results(__file__, out, page, {**record, "runs": runs, "history": histories})


def choose(pairs: Sequence[Pair], counts: Sequence[int], seed: int) -> list[list[Pair]]:
    """Disjoint choices of so many pairs each, as far as they reach, none with a sum that is its product as well."""
    left = [(a, b) for a, b in pairs if a + b != a * b]
    random.Random(seed).shuffle(left)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [left[start : start + count] for start, count in zip(starts, counts, strict=True)]


def prepare_tiny(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    chunk: Chunk,
    preserving: Preserving,
    shots: int,
    fit: int,
    test: int,
    seed: int,
) -> Setting:
    """The trained model, its instructions, and the texts that its patches should leave alone."""
    trained, untrained = split_pairs(training)
    counts = (min(shots, training.queries - 1), fit, test, len(trained))
    demonstrated, fitted, tested, others = choose(trained, counts, seed)
    instructions = {name: WORDINGS[name][0] for name in OPERATIONS}
    if chunk == "demonstrations":
        instructions = {name: solved(demonstrated, name) for name in OPERATIONS}
    texts = {name: instructed_texts([*others, *fitted], name, training.queries) for name in OPERATIONS}
    preserve: dict[str, str | list[str] | None] = dict.fromkeys(OPERATIONS)
    if preserving != "nothing":
        kept = {name: [other for other in OPERATIONS if preserving == "both" or other != name] for name in OPERATIONS}
        preserve = {name: [text for other in kept[name] for text in texts[other]] for name in OPERATIONS}
    pairs = [*tested, *untrained]
    name, never = f"{TINY}, {chunk}, preserving {preserving}", frozenset(untrained)
    return Setting(name, model, tokenizer, TINY_TEMPLATE, instructions, fitted, pairs, never, preserve)


def prepare_pretrained(name: str, shots: int, fit: int, test: int, seed: int) -> Setting:
    """A pretrained model, demonstrations as the instruction, numbers from 1 to 9."""
    model, tokenizer = load_model(name)
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    demonstrated, rest = choose(pairs, (shots, len(pairs)), seed)
    count = min(fit, len(rest) // 2)
    form = PromptTemplate(TEMPLATE)
    instructions = {
        operation: demonstrations([{"input": question(pair), "output": str(answer(*pair))} for pair in demonstrated])
        for operation, answer in OPERATIONS.items()
    }
    tested = rest[count : count + test]
    preserve = dict.fromkeys(OPERATIONS, "default")
    return Setting(shown(name), model, tokenizer, form, instructions, rest[:count], tested, frozenset(), preserve)


def instructed_texts(pairs: Sequence[Pair], operation: str, queries: int) -> list[str]:
    """The pairs in rows of ``queries``, each behind a wording of the operation, the wordings in turn."""
    wordings = WORDINGS[operation]
    rows = [pairs[start : start + queries] for start in range(0, len(pairs), queries)]
    return [told(wordings[i % len(wordings)], row, operation) for i, row in enumerate(rows)]


def inputs(pairs: Sequence[Pair], operation: str | None = None) -> list[dict[str, str]]:
    """The pairs as the library takes them; with an operation, the answers too."""
    if operation is None:
        return [{"input": question(pair)} for pair in pairs]
    return [{"input": question(pair), "output": str(OPERATIONS[operation](*pair))} for pair in pairs]


def transmute_both(
    setting: Setting, rank: int, preserve_weight: float | None, max_new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Of each operation the evaluation of its patch, ``correct`` by run and item, and ``cross``: which answers to the
    prompts with each instruction are right, without a patch and with each of the two."""
    evaluations, patches = {}, {}
    for name, instruction in setting.instructions.items():
        common = {"instruction": instruction, "template": setting.template, "max_new_tokens": max_new_tokens}
        patches[name] = transmute(
            *(setting.model, setting.tokenizer),
            pairs=inputs(setting.fit),
            rank=rank,
            preserve=setting.preserve[name],
            preserve_weight=None if setting.preserve[name] is None else preserve_weight,
            progress=False,
            **common,
        )
        evaluations[name] = Evaluation(
            *(setting.model, setting.tokenizer),
            pairs=inputs(setting.test, name),
            unrelated=None,
            progress=False,
            **common,
        )
    runs = {}
    for name, evaluation in evaluations.items():
        result = evaluation.score(patches[name])
        items = result["items"]
        correct = {run: [item[run] == item["reference"] for item in items] for run in RUNS}
        (other,) = OPERATIONS.keys() - {name}
        cross = {"no patch": correct["instructed"]}
        cross |= {of: right_when_instructed(evaluation, patch) for of, patch in patches.items()}
        runs[name] = {
            **{key: value for key, value in result.items() if key not in ("items", "perplexity_windows")},
            "instruction": setting.instructions[name],
            "fitted": len(setting.fit),
            "preserve_weight": patches[name].provenance["settings"]["preserve_weight"],
            "correct": correct,
            "plain_is_other": [
                item["plain"] == row["output"] for item, row in zip(items, inputs(setting.test, other), strict=True)
            ],
            "untrained": [pair in setting.untrained for pair in setting.test],
            "cross": cross,
        }
    return runs


def right_when_instructed(evaluation: Evaluation, patch: ThoughtPatch) -> list[bool]:
    """Which of the patched model's answers to the prompts with their instruction are right."""
    with patch.applied(evaluation.model):
        answers = generate(
            *(evaluation.model, evaluation.tokenizer),
            [prompt.instructed_ids for prompt in evaluation.prompts],
            stop=evaluation.template.stop,
            max_new_tokens=evaluation.max_new_tokens,
        )
    return [answer.text == row["output"] for answer, row in zip(answers, evaluation.rows, strict=True)]


def steps_of(
    setting: Setting, by_step: Mapping[str, Any], max_new_tokens: int
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By operation and method, how the tested pairs do after each step."""
    chosen = {key: value for key, value in by_step.items() if key != "methods"}
    histories: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, instruction in setting.instructions.items():
        histories[name] = {}
        for method in by_step["methods"]:
            callback = ThoughtCallback(**{**METHODS[method], **chosen}, preserve=setting.preserve[name])
            data = PairDataModule(
                *(inputs(setting.fit), instruction, setting.template),
                max_new_tokens=max_new_tokens,
                val_pairs=inputs(setting.test, name),
            )
            histories[name][method] = follow(setting.model, setting.tokenizer, callback, data)
    return histories


def ratio(run: Mapping[str, Any]) -> float:
    """Patched ÷ instructed accuracy; NaN where the instructed model gets nothing right."""
    accuracy = run["accuracy"]
    return accuracy["patched"] / accuracy["instructed"] if accuracy["instructed"] else float("nan")


def result_table(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One line for each model and operation."""
    head = ["model", "operation", "tested", "plain", "plain gives the other operation's", "instructed", "patched"]
    head += ["patched ÷ instructed", "patched − instructed", "never trained on: instructed", "patched", "of"]
    rows = []
    for (model, operation), run in _flat(models):
        correct, kl = run["correct"], run["output_kl"]
        new = {which: [a for a, b in zip(correct[which], run["untrained"], strict=True) if b] for which in RUNS}
        cells = [model, operation, run["pairs"], f"{run['accuracy']['plain']:.3f}"]
        cells += [f"{sum(run['plain_is_other']) / run['pairs']:.3f}", share(correct["instructed"], 3)]
        cells += [share(correct["patched"], 3), f"{ratio(run):.3f}"]
        cells.append(difference(correct["patched"], correct["instructed"], 3))
        cells += [f"{sum(new[w]) / len(new[w]):.3f}" if new[w] else None for w in ("instructed", "patched")]
        cells += [len(new["patched"]) or None, f"{run['fidelity']:.3f}", f"{kl['plain']:.4f}", f"{kl['patched']:.4f}"]
        rows.append(cells)
    return table([*head, "output equal to the instructed one", "KL of the answer, plain", "patched"], rows, left=2)


def cross_table(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What the patches do to prompts that have an instruction."""
    rows = []
    for (model, operation), run in _flat(models):
        before, cross = run["cross"]["no patch"], run["cross"]
        changes = [f"{share(cross[other], 3)}, {difference(cross[other], before, 3)}" for other in OPERATIONS]
        rows.append([model, operation, share(before, 3), *changes])
    head = ["model", "prompts that ask for the", "no patch", *(f"patch of the {name}, change" for name in OPERATIONS)]
    return table(head, rows, left=2)


def _flat(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    return [((model, operation), run) for model, runs in models.items() for operation, run in runs.items()]


def verdict(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Whether the tiny model reaches the bar for both operations, with the first chunk and texts preserved."""
    name = next((name for name in models if name.startswith(f"{TINY},")), None)
    if name is None:
        return ""
    ratios = {operation: ratio(run) for operation, run in models[name].items()}
    lowest = min(ratios, key=lambda operation: (not isnan(ratios[operation]), ratios[operation]))
    value = ratios[lowest]
    reached = "reached" if value >= BAR else "missed"
    return f"Patched ÷ instructed of {name}: {value:.3f} at least ({lowest}); the bar of {BAR} is {reached}.\n"


if __name__ == "__main__":
    command_line(arithmetic)
