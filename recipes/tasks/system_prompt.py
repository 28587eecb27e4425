"""System prompts become adapters: a persona, a language, a format, a topic to refuse.

    python -m recipes.tasks.system_prompt --config recipes/tasks/system_prompt.yaml

For each instruction, as the system message of a chat model, the patch is fitted to questions which the instructed model
answers itself, and tested on other questions. The plain run has the model's default system message: what a server sends
for a user without one. Three measures: how many answers follow the rule (functions of the text, in
system_prompt_rules.py), how far the next-token distributions are from the instructed model's along its own answers (KL
and top-1 agreement), and the perplexity of unrelated text. The analysis fits the first instructions in other ways and
shows where in the answer the patched model falls behind. Writes a Markdown and a JSON table.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import ThoughtPatch, load_model
from lit_thought.patch.results import RUNS
from lit_thought.prompts.pairs import load_pairs
from recipes.harness import DATA, Unrelated, check_names, command_line, one_line, shown, table, write_results
from recipes.tasks.chats import Chat, place_table
from recipes.tasks.system_prompt_rules import RULES

FOLDER = DATA / "system_prompts"
VARIANTS: dict[str, dict[str, Any]] = {
    "as above": {},
    "10 questions": {"fit": 10},
    "40 questions": {"fit": 40},
    "half the questions, two sampled answers each": {"share": 0.5, "sampled": 2},
    "answer weight 1": {"answer_weight": 1.0},
    "answer weight 3": {"answer_weight": 3.0},
    "rank 8": {"rank": 8},
    "rank 32": {"rank": 32},
    "preservation weight 0.1": {"preserve_weight": 0.1},
    "preservation weight 1": {"preserve_weight": 1.0},
    "preservation weight 3": {"preserve_weight": 3.0},
}
"""Changes of the setting that the analysis tries: of ``transmute``'s arguments, of how many of the questions are used
(``fit``, or ``share`` of them) and of how they are answered (``sampled`` times each, instead of greedily)."""


class Task(NamedTuple):
    """An instruction with its questions: those about its topic, if it has one, those to fit on, and the others."""

    name: str
    topic: frozenset[str]
    fit: list[str]
    chat: Chat


def system_prompt(
    model: str = "smollm2",
    instructions: Sequence[str] = (
        "pirate",
        "french",
        "sentence",
        "shakespeare",
        "poet",
        "json",
        "uppercase",
        "refuse",
    ),
    fit: int = 80,
    test: int = 30,
    seed: int = 0,
    rank: int = 16,
    ridge: float = 0.03,
    preserve_weight: float = 0.3,
    answer_weight: float = 10.0,
    max_new_tokens: int = 48,
    unrelated_windows: int = 4,
    analysis: int = 1,
    samples: int = 2,
    out: str = "recipes/results/system_prompt",
) -> None:
    """Fit and test every instruction."""
    settings = {"fit": fit, "rank": rank, "ridge": ridge, "preserve_weight": preserve_weight}
    settings |= {"answer_weight": answer_weight, "max_new_tokens": max_new_tokens}
    known = instructions_known()
    check_names("instructions", instructions or [""], known)
    lm, tokenizer = load_model(model)
    unrelated = Unrelated(lm, tokenizer, unrelated_windows)
    runs, variants = [], []
    for number, name in enumerate(instructions):
        task = prepare(lm, tokenizer, known[name], fit, test, seed, max_new_tokens)
        answers = task.chat.answer(task.fit)
        patch = fit_patch(task, answers, settings)
        scored = score(task, patch, unrelated)
        runs.append({**scored, **report(task, patch)})
        print(_table(runs[-1:]), flush=True)
        for variant, changes in VARIANTS.items() if number < analysis else ():
            if changes:
                scored = score(task, fit_patch(task, answers, {**settings, **changes}), unrelated)
            variants.append({"instruction": task.name, "variant": variant, "changes": changes, **scored})
            print(_variant_table(variants[-1:]), flush=True)
    record = {"model": shown(model), "settings": {**settings, "test": test, "seed": seed}}
    record |= {"unrelated_perplexity": unrelated.perplexity, "runs": runs, "variants": variants}
    parts = [_table(runs), place_table(runs, "name"), _variant_table(variants), _sample_table(runs, samples)]
    write_results(__file__, out, "\n".join(filter(None, parts)), record)


def instructions_known() -> dict[str, dict[str, Any]]:
    """The entries of the data, by name: ``instruction``, the same ``reworded``, and perhaps a ``topic``."""
    entries = json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def split(
    general: Sequence[str], topical: Sequence[str], fit: int, test: int, seed: int
) -> tuple[list[str], list[str]]:
    """Questions to fit and to test on: with a topic, half of the latter are about it, and up to half of the former."""
    general, topical = list(general), list(topical)
    generator = random.Random(seed)
    generator.shuffle(general)
    generator.shuffle(topical)
    tested = topical[: test // 2]
    fitted = topical[len(tested) :][: fit // 2]
    tested += general[: test - len(tested)]
    fitted += general[test:][: fit - len(fitted)]
    generator.shuffle(fitted)
    return fitted, tested


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: Mapping[str, Any],
    fit: int,
    test: int,
    seed: int,
    max_new_tokens: int,
) -> Task:
    """Split the questions and write the plain and the instructed answers of those to test on."""
    general = [pair["input"] for pair in load_pairs(FOLDER / "questions.json")]
    topical = [pair["input"] for pair in load_pairs(FOLDER / f"{entry['topic']}.json")] if "topic" in entry else []
    fitted, tested = split(general, topical, fit, test, seed)
    chat = Chat(model, tokenizer, entry["instruction"], tested, max_new_tokens)
    return Task(entry["name"], frozenset(topical), fitted, chat)


def fit_patch(task: Task, answers: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> ThoughtPatch:
    """A patch fitted with one setting, to the greedy ``answers`` it asks for or to sampled ones."""
    arguments = dict(settings)
    count, sampled = round(arguments.pop("fit") * arguments.pop("share", 1.0)), arguments.pop("sampled", 0)
    answers = task.chat.answer(task.fit[:count], sampled=sampled) if sampled else answers[:count]
    return task.chat.fit(answers, **arguments)


def score(task: Task, patch: ThoughtPatch, unrelated: Unrelated) -> dict[str, Any]:
    """How close a patch comes to the instructed run along its answers, and what it does to unrelated text."""
    scored, _ = task.chat.score(patch, unrelated)
    kl = scored["output_kl"]
    scored["output_kl_down"] = 1 - kl["patched"] / kl["plain"]
    return {**scored, "pairs": patch.provenance["settings"]["pairs"]}


def report(task: Task, patch: ThoughtPatch) -> dict[str, Any]:
    """The patched model's own answers beside the plain and the instructed ones, and how many follow the rule."""
    result = task.chat.evaluation.score(patch)
    return {
        "name": task.name,
        "instruction": task.chat.chunk,
        "follows": {run: follows(task, result["items"], run) for run in RUNS} if task.name in RULES else None,
        "tested": len(result["items"]),
        **{key: result[key] for key in ("fidelity", "kl", "agreement", "prompt_tokens")},
        "items": [{key: item[key] for key in ("input", *RUNS)} for item in result["items"]],
    }


def follows(task: Task, items: Sequence[Mapping[str, str]], run: str) -> int:
    """How many of a run's answers follow the rule; outside a topic to refuse, those which it does not apply to."""
    rule = RULES[task.name]
    return sum(rule(item[run]) == (not task.topic or item["input"] in task.topic) for item in items)


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each instruction, and their mean."""
    head = ["instruction", "follows: plain", "instructed", "patched", "KL along the answer, plain", "patched"]
    head += [
        "down by",
        "agreement, plain",
        "patched",
        "unrelated perplexity ×",
        "prompt tokens, instructed",
        "plain and patched",
    ]
    rows = []
    for run in runs:
        kl, agreement, tokens = run["output_kl"], run["output_agreement"], run["prompt_tokens"]
        counts = run["follows"]
        cells = [run["name"], *(counts and f"{counts[which]} of {run['tested']}" for which in RUNS)]
        cells += [f"{kl['plain']:.3f}", f"{kl['patched']:.3f}", f"{run['output_kl_down']:.1%}"]
        cells += [f"{agreement['plain']:.3f}", f"{agreement['patched']:.3f}", f"{run['perplexity_ratio']:.4f}"]
        rows.append([*cells, f"{tokens['instructed']:.1f}", f"{tokens['plain']:.1f}"])
    down = [run["output_kl_down"] for run in runs]
    worst = max(run["perplexity_ratio"] for run in runs)
    line = f"KL down by {mean(down):.1%} on average, {min(down):.1%} at least; perplexity at most × {worst:.4f}"
    return f"{table(head, rows)}\n{line}\n"


def _variant_table(variants: Sequence[Mapping[str, Any]]) -> str:
    """One line for each variant; empty without any."""
    rows = []
    for own in variants:
        cells = [f"{own['instruction']}, {own['variant']}", own["pairs"], f"{own['output_kl']['patched']:.4f}"]
        cells += [f"{own['output_kl_down']:.1%}", f"{own['output_agreement']['patched']:.3f}"]
        rows.append([*cells, f"{own['perplexity_ratio']:.4f}"])
    head = ["instruction, variant", "pairs", "KL along the answer", "down by", "agreement", "unrelated perplexity ×"]
    return table(head, rows) if rows else ""


def _sample_table(runs: Sequence[Mapping[str, Any]], samples: int) -> str:
    """The first tested questions of each instruction with the three answers."""
    rows = [
        [run["name"], *(one_line(item[key], 160) for key in ("input", *RUNS))]
        for run in runs
        for item in run["items"][:samples]
    ]
    return table(["instruction", "question", *RUNS], rows, left=5)


if __name__ == "__main__":
    command_line(system_prompt)
