"""How often the instructed model agrees with itself when its prompt is disturbed, beside the patch.

    python -m recipes.studies.self_agreement --config recipes/studies/self_agreement.yaml

A patch copies one prompt, and is scored by how many outputs are the same (fidelity). The prompt is one of many that
mean the same, and this is how many outputs stay the same when another takes its place: the demonstrations in another
order, other demonstrations of the same task (of inputs that are fitted, never of the test), the system message in other
words, and the same prompt with the model in bfloat16. Beside them stands the patch of the library's default fit of the
prompt alone. A mismatch is *narrow* where the undisturbed model hardly preferred its likeliest token to the second, at
the first token that differs. Divergence is measured along the undisturbed outputs. Writes a Markdown and a JSON table.

    python -m recipes.studies.self_agreement --config recipes/studies/self_agreement.yaml --tasks "[]" \\
        --instructions "[pirate,french,sentence,shakespeare,poet,wizard,json,uppercase,refuse]"
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError, check_counts
from lit_thought.evaluation.compare import Evaluation
from lit_thought.evaluation.metrics import token_kl
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.runs.generate import generate
from recipes.chunks.cases import Case, evaluation_of, message_case
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import (
    SIX_TASKS,
    TEMPLATE,
    Trial,
    check_names,
    command_line,
    demonstrations,
    load_split,
    share,
    shown,
    table,
    write_results,
)

NARROW = 0.5
"""Margin, in nats of log probability, below which a mismatch is narrow."""
SELF = {"shuffled": "word tasks", "reworded": "system messages"}
"""The disturbance that the patch is set against, and of what."""


class Prompt(NamedTuple):
    """One prompt: its undisturbed run with the logits along the outputs, as :func:`answer_logits` returns them, the
    chunks to put in its chunk's place by kind, its patch and, of a system message with a rule, when an answer follows
    it."""

    name: str
    evaluation: Evaluation
    wanted: list[Tensor]
    chunks: Mapping[str, Sequence[str]]
    patch: ThoughtPatch
    judge: Callable[[Mapping[str, str], str], bool | None] | None = None


def self_agreement(
    model: str = "smollm2",
    dtype: str = "float32",
    tasks: Sequence[str] = SIX_TASKS,
    instructions: Sequence[str] = (),
    seed: int = 0,
    shuffles: int = 3,
    bfloat16: bool = False,
    shots: int = 10,
    inputs: int | None = None,
    test: int = 60,
    max_new_tokens: int = 12,
    questions: int = 30,
    answer_tokens: int = 48,
    out: str = "recipes/results/self_agreement",
) -> None:
    """Disturb the prompt of every task and instruction, and fit it."""
    check_counts(shuffles=shuffles, shots=shots, **({} if inputs is None else {"inputs": inputs}))
    if bfloat16 and dtype == "bfloat16":
        raise ThoughtError("bfloat16: expected a dtype of more precision to compare it with; got dtype bfloat16.")
    known = instructions_known()
    check_names("instructions", instructions, known)
    splits = [load_split(task, seed, shots, max(inputs or shots, shots), test) for task in tasks]
    for split in splits:
        if not split.test:
            raise ThoughtError(
                f"inputs: expected words of {split.name} left to test; got {inputs}; set fewer, or fewer shots."
            )
    lm, tokenizer = load_model(model, dtype=dtype)
    low = load_model(model, dtype="bfloat16")[0] if bfloat16 else None
    messages = [(known[name], message_case(known[name], seed, questions, answer_tokens)) for name in instructions]
    prompts = chain(
        (of_words(Trial(lm, tokenizer, split, max_new_tokens), inputs, shuffles, seed) for split in splits),
        (of_message(evaluation_of(lm, tokenizer, case, unrelated=False), case, entry) for entry, case in messages),
    )
    runs: list[dict[str, Any]] = []
    undisturbed = {}
    for prompt in prompts:
        both = zip(prompt.evaluation.rows, prompt.evaluation.instructed, strict=True)
        undisturbed[prompt.name] = [{"input": row["input"], "output": own.text} for row, own in both]
        found = measure(prompt, low)
        print(_run_table(found), flush=True)
        runs += found
    settings = {
        "dtype": dtype,
        "seed": seed,
        "shuffles": shuffles,
        "shots": shots,
        "inputs": inputs,
        "test": test,
        "max_new_tokens": max_new_tokens,
        "questions": questions,
        "answer_tokens": answer_tokens,
    }
    record = {"model": shown(model), "settings": settings}
    write_results(__file__, out, _page(runs), {**record, "undisturbed": undisturbed, "runs": runs})


def of_words(trial: Trial, inputs: int | None, shuffles: int, seed: int) -> Prompt:
    """A word task: its demonstrations in other orders, and as many of the inputs to fit in their place; its patch is of
    so many of these inputs, or of those that the model writes."""
    evaluation, generator, given = trial.evaluation(unrelated=None), random.Random(seed), trial.split.shown
    chunks = {
        "shuffled": [demonstrations(generator.sample(given, len(given))) for _ in range(shuffles)],
        "other demonstrations": [demonstrations(trial.split.labelled[: len(given)])],
    }
    wanted = answer_logits(trial.model, evaluation.completed, instructed=True)
    words = None if inputs is None else trial.split.fit[:inputs]
    settings: dict[str, Any] = {"max_new_tokens": trial.max_new_tokens, "progress": False}
    settings["val_pairs"] = trial.split.test  # so that the model writes none of them
    patch = transmute(trial.model, trial.tokenizer, trial.split.instruction, words, TEMPLATE, **settings)
    return Prompt(trial.split.name, evaluation, wanted, chunks, patch)


def of_message(evaluation: Evaluation, case: Case, entry: Mapping[str, Any]) -> Prompt:
    """A system message: its other wordings; its patch is of nothing but its text."""
    wanted = answer_logits(evaluation.model, evaluation.completed, instructed=True)
    patch = transmute(evaluation.model, evaluation.tokenizer, case.chunk, val_pairs=case.tested, progress=False)
    return Prompt(case.name, evaluation, wanted, {"reworded": entry["reworded"]}, patch, case.judge)


def measure(prompt: Prompt, low: PreTrainedModel | None) -> list[dict[str, Any]]:
    """The runs of a prompt: disturbed in each way, by the model in bfloat16 if there is one, and patched."""
    model, own = prompt.evaluation.model, prompt.evaluation.instructions[0]
    runs = [respond(prompt, kind, model, chunk) for kind, chunks in prompt.chunks.items() for chunk in chunks]
    runs += [respond(prompt, "bfloat16", low, own)] if low is not None else []
    with prompt.patch.applied(model):
        return [*runs, respond(prompt, "patched", model, own, instructed=False)]


def respond(prompt: Prompt, kind: str, model: PreTrainedModel, chunk: str, instructed: bool = True) -> dict[str, Any]:
    """What a model, as it is now, writes, beside what the undisturbed run wrote.

    Args:
        prompt: what is disturbed.
        kind: how it is.
        model: the model that writes.
        chunk: what stands in the place of the prompt's own.
        instructed: whether it does; without, the prompts are the plain ones.

    Returns:
        ``task``, ``kind``, ``chunk`` (None if not instructed), ``outputs``; ``margins``, as of :func:`margins`;
        ``kl``: KL from the undisturbed run along its outputs, in nats, mean over the tokens that predict them or what
        follows; ``follows``: how many outputs follow the rule, ``undisturbed`` and ``disturbed``, None without a rule.
    """
    evaluation, judge, inputs = prompt.evaluation, prompt.judge, [row["input"] for row in prompt.evaluation.rows]
    template, tokenizer, before = evaluation.template, evaluation.tokenizer, evaluation.instructed
    asked = [template.tokenise(tokenizer, chunk, text) for text in inputs]
    written = generate(
        *(model, tokenizer, [one.instructed_ids if instructed else one.plain_ids for one in asked]),
        max_new_tokens=evaluation.max_new_tokens,
        **template.ending(tokenizer),
    )
    outputs = [one.text for one in written]
    along = [
        template.tokenise(tokenizer, chunk, text, own.text, own.finished)
        for text, own in zip(inputs, before, strict=True)
    ]
    got = answer_logits(model, along, instructed)
    both = {"undisturbed": [own.text for own in before], "disturbed": outputs}
    return {
        "task": prompt.name,
        "kind": kind,
        "chunk": chunk if instructed else None,
        "outputs": outputs,
        "margins": margins(evaluation, prompt.wanted, outputs),
        "kl": float(torch.cat([token_kl(a, b) for a, b in zip(prompt.wanted, got, strict=True)]).mean()),
        "follows": judge and {run: sum(map(bool, map(judge, evaluation.rows, texts))) for run, texts in both.items()},
    }


@torch.no_grad()
def answer_logits(model: PreTrainedModel, pairs: Sequence[TokenisedPair], instructed: bool = False) -> list[Tensor]:
    """Logits at the tokens of one run that predict the answer's tokens and what follows them, (n, vocabulary) each."""
    logits = []
    for pair in pairs:
        start, stop = pair.output_span
        places = list(range(start - 1, stop))
        if instructed:
            counterpart = dict(zip(pair.plain_positions, pair.instructed_positions, strict=True))
            places = [counterpart[place] for place in places]
        ids = torch.tensor([pair.instructed_ids if instructed else pair.plain_ids], device=model.device)
        logits.append(model(ids, use_cache=False).logits[0, places])
    return logits


def margins(evaluation: Evaluation, wanted: Sequence[Tensor], outputs: Sequence[str]) -> list[float | None]:
    """Of each output, how sure the undisturbed run was at the first token that differs.

    Args:
        evaluation: holds the undisturbed run.
        wanted: its logits along its outputs, (n + 1, vocabulary) for one of n tokens.
        outputs: as many others.

    Returns:
        log p₁ − log p₂ of the two likeliest tokens there, in nats; None where the outputs are the same. Where one ends
        first, its end is what differs.
    """
    found: list[float | None] = []
    for row, pair, own, logits, text in zip(
        evaluation.rows, evaluation.completed, evaluation.instructed, wanted, outputs, strict=True
    ):
        if text == own.text:
            found.append(None)
            continue
        other = evaluation.template.tokenise(evaluation.tokenizer, evaluation.instructions[0], row["input"], text)
        mine, theirs = (one.plain_ids[slice(*one.output_span)] for one in (pair, other))
        common = min(len(mine), len(theirs))
        place = next((i for i in range(common) if mine[i] != theirs[i]), common)
        first, second = logits[place].float().topk(2).values.tolist()
        found.append(first - second)
    return found


def same(run: Mapping[str, Any]) -> list[bool]:
    """Of a run's outputs, which are those of the undisturbed run."""
    return [margin is None for margin in run["margins"]]


def narrow(run: Mapping[str, Any]) -> float | None:
    """Of a run's mismatches, the share whose margin is below :data:`NARROW`; None without any."""
    found = [margin < NARROW for margin in run["margins"] if margin is not None]
    return mean(found) if found else None


def _run_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run."""
    rows = []
    for run in runs:
        thin, counts = narrow(run), run["follows"]
        rows.append([run["task"], run["kind"], share(same(run)), len(run["outputs"]) - sum(same(run))])
        rows[-1] += [None if thin is None else f"{thin:.2f}", f"{run['kl']:.3f}"]
        rows[-1] += [counts and f"{counts['disturbed']} ({counts['undisturbed']}) of {len(run['outputs'])}"]
    head = [
        "task",
        "run",
        "same output",
        "mismatches",
        f"of these narrow, below {NARROW} nats",
        "KL of the output, nats",
    ]
    return table([*head, "follows the rule (undisturbed)"], rows, left=2)


def _summary(runs: Sequence[Mapping[str, Any]], against: str) -> str:
    """The patch against one kind of self-agreement: a line for each task that has it, and their mean; or nothing."""
    tasks = list(dict.fromkeys(run["task"] for run in runs if run["kind"] == against))
    if not tasks:
        return ""
    kinds = list(dict.fromkeys(run["kind"] for run in runs if run["task"] in tasks))
    rows = []
    for name, some in [*((task, [task]) for task in tasks), ("mean", tasks)]:
        own = [run for run in runs if run["task"] in some]
        shares = {kind: mean(mean(same(run)) for run in own if run["kind"] == kind) for kind in kinds}
        rows.append([name, *(f"{shares[kind]:.2f}" for kind in kinds), f"{shares['patched'] - shares[against]:+.2f}"])
    return table([SELF[against], *kinds, f"patched − {against}"], rows)


def _divergences(runs: Sequence[Mapping[str, Any]], against: str) -> str:
    """The same in KL and in rules followed, which say more of long outputs; a disturbance's are means of its runs."""
    tasks = list(dict.fromkeys(run["task"] for run in runs if run["kind"] == against))
    if not tasks:
        return ""
    kinds = list(dict.fromkeys(run["kind"] for run in runs if run["task"] in tasks))
    judged = any(run["follows"] for run in runs if run["task"] in tasks)
    rows = []
    for task in tasks:
        own = {kind: [run for run in runs if run["task"] == task and run["kind"] == kind] for kind in kinds}
        cells = [f"{mean(run['kl'] for run in some):.3f}" for some in own.values()]
        if own[against][0]["follows"]:
            cells.append(f"{own[against][0]['follows']['undisturbed']}")
            cells += [f"{mean(run['follows']['disturbed'] for run in some):g}" for some in own.values()]
        rows.append([task, *cells])
    means = [mean(run["kl"] for run in runs if run["task"] in tasks and run["kind"] == kind) for kind in kinds]
    rows.append(["mean", *(f"{one:.3f}" for one in means)])
    head = [SELF[against], f"KL, {kinds[0]}", *kinds[1:], *(["rule followed: undisturbed", *kinds] if judged else [])]
    return table(head, [[*row, *[None] * (len(head) - len(row))] for row in rows])


def _page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The patch against self-agreement, and every run."""
    parts = ["Share of outputs that are those of the undisturbed instructed model:\n"]
    parts += [_summary(runs, kind) for kind in SELF]
    parts += ["KL to it along its outputs, nats a token, and outputs that follow the rule:\n"]
    parts += [_divergences(runs, kind) for kind in SELF]
    parts += ["Each run, with the 95 % interval (Wilson):\n", _run_table(runs)]
    return "\n".join(filter(None, parts))


if __name__ == "__main__":
    command_line(self_agreement)
