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

import jsonargparse
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation, unrelated_perplexity
from lit_thought.evaluation.metrics import token_kl
from lit_thought.patch.results import RUNS
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.pairs import load_pairs
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.runs.generate import generate
from recipes.harness import DATA, provenance, shown, write_results
from recipes.tasks.system_prompt_rules import RULES

FOLDER = DATA / "system_prompts"
TEMPLATE = PromptTemplate.chat()
INSTRUCTIONS = ("pirate", "french", "sentence", "shakespeare", "poet", "wizard", "json", "uppercase", "refuse")
PLACES = ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32), (32, None))
"""Parts of an answer, in tokens, whose divergence is shown apart."""
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


class Divergence(NamedTuple):
    """Of each tested answer, at each token that predicts a token of it: KL from the instructed run, in nats, and
    whether the likeliest token is the same."""

    kl: list[Tensor]
    agrees: list[Tensor]


class Task(NamedTuple):
    """An instruction, its questions, and what the instructed model makes of them."""

    name: str
    instruction: str
    topic: frozenset[str]
    fit: list[str]
    evaluation: Evaluation
    wanted: list[Tensor]
    plain: Divergence


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
    """Fit and test every instruction.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory; a chat model.
        instructions: names in recipes/data/system_prompts/instructions.json.
        fit: questions to fit on.
        test: other questions to test on.
        seed: seed of the shuffle of the questions.
        rank: rank of the adapters.
        ridge: λ.
        preserve_weight: ρ, weight of unrelated text.
        answer_weight: weight of the answer's tokens and the token before them.
        max_new_tokens: longest answer.
        unrelated_windows: windows of 512 tokens of unrelated text whose perplexity is measured.
        analysis: how many of the instructions the variants are tried on; 0 for none.
        samples: tested questions of each instruction whose answers are shown.
        out: path of the two result files, without suffix.
    """
    settings = {"fit": fit, "rank": rank, "ridge": ridge, "preserve_weight": preserve_weight}
    settings |= {"answer_weight": answer_weight, "max_new_tokens": max_new_tokens}
    known = {entry["name"]: entry for entry in json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))}
    unknown = sorted(set(instructions) - set(known))
    if unknown or not instructions:
        raise ThoughtError(f"instructions: expected some of {', '.join(known)}; got {unknown}; correct the names.")
    chosen = [known[name] for name in instructions]
    lm, tokenizer = load_model(model)
    windows = text_windows(tokenizer, load_texts("default", "evaluate", "unrelated"), 512)[:unrelated_windows]
    original = unrelated_perplexity(lm, windows)
    runs, variants = [], []
    for number, entry in enumerate(chosen):
        task = prepare(lm, tokenizer, entry, fit, test, seed, max_new_tokens)
        answers = answer(lm, tokenizer, task, task.fit, max_new_tokens)
        patch = fit_patch(lm, tokenizer, task, answers, settings)
        scored = score(lm, task, patch, windows, original)
        runs.append({**scored, **report(task, patch)})
        print(_table(runs[-1:]), flush=True)
        for name, changes in VARIANTS.items() if number < analysis else ():
            if changes:
                patch = fit_patch(lm, tokenizer, task, answers, {**settings, **changes})
                scored = score(lm, task, patch, windows, original)
            variants.append({"instruction": task.name, "variant": name, "changes": changes, **scored})
            print(_variant_table(variants[-1:]), flush=True)
    record = {"model": shown(model), "settings": {**settings, "test": test, "seed": seed}, **provenance()}
    record |= {"unrelated_perplexity": original, "runs": runs, "variants": variants}
    where = f"{shown(model)}, commit {record['commit']}"
    page = f"`python -m recipes.tasks.system_prompt` on {where}; settings: `{json.dumps(record['settings'])}`\n\n"
    page += _table(runs) + "\n" + _place_table(runs) + "\n"
    page += (_variant_table(variants) + "\n" if variants else "") + _sample_table(runs, samples)
    write_results(out, page, record)


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
    entry: Mapping[str, str],
    fit: int,
    test: int,
    seed: int,
    max_new_tokens: int,
) -> Task:
    """Split the questions and write the plain and the instructed answers of those to test on."""
    general = [pair["input"] for pair in load_pairs(FOLDER / "questions.json")]
    topical = [pair["input"] for pair in load_pairs(FOLDER / f"{entry['topic']}.json")] if "topic" in entry else []
    fitted, tested = split(general, topical, fit, test, seed)
    evaluation = Evaluation(
        *(model, tokenizer),
        instruction=entry["instruction"],
        pairs=[{"input": question} for question in tested],
        template=TEMPLATE,
        unrelated=None,
        max_new_tokens=max_new_tokens,
        progress=False,
    )
    wanted = answer_logits(model, evaluation.completed, instructed=True)
    plain = divergence(wanted, answer_logits(model, evaluation.completed))
    return Task(entry["name"], entry["instruction"], frozenset(topical), fitted, evaluation, wanted, plain)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[str],
    max_new_tokens: int,
    sampled: int = 0,
) -> list[dict[str, str]]:
    """Pairs of the questions and the instructed model's answers: the greedy one, or ``sampled`` drawn ones each."""
    prompts = [TEMPLATE.tokenise(tokenizer, task.instruction, question).instructed_ids for question in questions]
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else None
    given = generate(
        *(model, tokenizer, prompts * max(sampled, 1)),
        max_new_tokens=max_new_tokens,
        options=options,
        keep_special=True,
    )
    pairs = zip([*questions] * max(sampled, 1), given, strict=True)
    return [{"input": question, "output": written.text} for question, written in pairs]


def fit_patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    answers: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
) -> ThoughtPatch:
    """A patch fitted with one setting, to the greedy ``answers`` it asks for or to sampled ones."""
    arguments = dict(settings)
    count, sampled = round(arguments.pop("fit") * arguments.pop("share", 1.0)), arguments.pop("sampled", 0)
    if sampled:
        answers = answer(model, tokenizer, task, task.fit[:count], settings["max_new_tokens"], sampled)
    else:
        answers = answers[:count]
    return transmute(model, tokenizer, task.instruction, answers, TEMPLATE, progress=False, **arguments)


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


def divergence(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Divergence:
    """Of a run from the instructed one, both as :func:`answer_logits` returns them."""
    both = list(zip(wanted, got, strict=True))
    return Divergence([token_kl(a, b) for a, b in both], [(a.argmax(-1) == b.argmax(-1)).float() for a, b in both])


def by_place(values: Sequence[Tensor]) -> list[float | None]:
    """Means over the answers' tokens in each of :data:`PLACES`; None where no answer is as long."""
    parts = [torch.cat([own[start:stop] for own in values]) for start, stop in PLACES]
    return [float(part.mean()) if len(part) else None for part in parts]


def score(
    model: PreTrainedModel, task: Task, patch: ThoughtPatch, windows: Sequence[Sequence[int]], original: float
) -> dict[str, Any]:
    """How close a patch comes to the instructed run along its answers, and what it does to unrelated text."""
    with patch.applied(model):
        patched = divergence(task.wanted, answer_logits(model, task.evaluation.completed))
        perplexity = unrelated_perplexity(model, windows)
    found = {"plain": task.plain, "patched": patched}
    kl = {run: float(torch.cat(own.kl).mean()) for run, own in found.items()}
    return {
        "output_kl": kl,
        "output_kl_down": 1 - kl["patched"] / kl["plain"],
        "output_agreement": {run: float(torch.cat(own.agrees).mean()) for run, own in found.items()},
        "output_kl_by_place": {run: by_place(own.kl) for run, own in found.items()},
        "perplexity_ratio": perplexity / original,
        "pairs": patch.provenance["settings"]["pairs"],
    }


def report(task: Task, patch: ThoughtPatch) -> dict[str, Any]:
    """The patched model's own answers beside the plain and the instructed ones, and how many follow the rule."""
    result = task.evaluation.score(patch)
    return {
        "name": task.name,
        "instruction": task.instruction,
        "follows": {run: follows(task, result["items"], run) for run in RUNS} if task.name in RULES else None,
        "tested": len(result["items"]),
        "fidelity": result["fidelity"],
        "kl": result["kl"],
        "agreement": result["agreement"],
        "prompt_tokens": result["prompt_tokens"],
        "items": [{key: item[key] for key in ("input", *RUNS)} for item in result["items"]],
    }


def follows(task: Task, items: Sequence[Mapping[str, str]], run: str) -> int:
    """How many of a run's answers follow the rule; outside a topic to refuse, those which it does not apply to."""
    rule = RULES[task.name]
    return sum(rule(item[run]) == (not task.topic or item["input"] in task.topic) for item in items)


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each instruction, and their mean."""
    lines = [
        "| instruction | follows: plain | instructed | patched | KL along the answer, plain | patched | down by "
        "| agreement, plain | patched | unrelated perplexity × | prompt tokens, instructed | plain and patched |",
        "|---|" + "---:|" * 11,
    ]
    for run in runs:
        kl, agreement, tokens = run["output_kl"], run["output_agreement"], run["prompt_tokens"]
        counts = run["follows"]
        cells = [run["name"], *(f"{counts[which]} of {run['tested']}" if counts else "–" for which in RUNS)]
        cells += [f"{kl['plain']:.3f}", f"{kl['patched']:.3f}", f"{run['output_kl_down']:.1%}"]
        cells += [f"{agreement['plain']:.3f}", f"{agreement['patched']:.3f}", f"{run['perplexity_ratio']:.4f}"]
        cells += [f"{tokens['instructed']:.1f}", f"{tokens['plain']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    down = [run["output_kl_down"] for run in runs]
    worst = max(run["perplexity_ratio"] for run in runs)
    lines += ["", f"KL down by {mean(down):.1%} on average, {min(down):.1%} at least; perplexity at most × {worst:.4f}"]
    return "\n".join(lines) + "\n"


def _place_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """KL along the answer, by token."""
    names = [f"{start + 1}" if stop == start + 1 else f"{start + 1}–{stop or ''}" for start, stop in PLACES]
    lines = ["| KL at the answer's tokens | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for run in runs:
        for which, values in run["output_kl_by_place"].items():
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {run['name']}, {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _variant_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each variant."""
    lines = [
        "| instruction, variant | pairs | KL along the answer | down by | agreement | unrelated perplexity × |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        cells = [f"{row['instruction']}, {row['variant']}", str(row["pairs"]), f"{row['output_kl']['patched']:.4f}"]
        cells += [f"{row['output_kl_down']:.1%}", f"{row['output_agreement']['patched']:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{row['perplexity_ratio']:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def _sample_table(runs: Sequence[Mapping[str, Any]], samples: int) -> str:
    """The first tested questions of each instruction with the three answers."""
    lines = ["| instruction | question | " + " | ".join(RUNS) + " |", "|---|---|" + "---|" * len(RUNS)]
    for run in runs:
        for item in run["items"][:samples]:
            texts = (" ".join(item[key].split()).replace("|", "\\|")[:160] for key in ("input", *RUNS))
            lines.append(f"| {run['name']} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jsonargparse.auto_cli(system_prompt)
