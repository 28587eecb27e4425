"""Rivals at their best: what else makes weights of a prompt, from the same inputs that the model wrote itself.

    python -m recipes.studies.rivals --config recipes/studies/rivals.yaml

For each chunk (demonstrations, a system prompt, a document) the model writes inputs once, and the instructed model
their outputs. From these each method makes a change of the model:

- *lit_thought*: its default patch.
- *LoRA distillation*: AdamW on KL to the instructed model, all linear layers at rank 16 (distillation.py; at a
  document's 128 it comes less near), on all pairs. Each learning rate is trained for ``times`` the seconds of
  lit_thought, or until :data:`PATIENCE` measurements bring no gain on inputs that the model wrote besides, a fifth as
  many where it finds so many more, which no other method has; of all rates and measurements the adapter that is nearest
  on these counts: once of those up to lit_thought's seconds, and once of all. The seconds are those of that one rate's
  training, as if it had been known.
- *least squares alone*: the down projections alone, at full rank, with nothing preserved, as published for documents
  (PatchKV, arXiv 2609.39329), on these pairs.
- *thought vectors*: the paper's constants (Mazzawi et al. 2025) instead of matrices.
- *steering*: a mean difference at the prompt's last token, added to one block's output (Turner et al. 2023, Todd et al.
  2024); block and strength are chosen on inputs held back.

Reported are nearness to the instructed model along its outputs and along their own, what is right, unrelated text's
perplexity, how often the model still says what it said under *other* system messages, and the seconds from the pairs
to the change, side by side in one run. Writes a Markdown and a JSON table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch, load_model
from lit_thought.errors import check_counts
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.fitting import fit as fitted
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.prompts.alignment import TokenisedPair
from recipes.chunks.cases import Case, case_of, evaluation_of, known_chunks, right
from recipes.harness import (
    METHODS,
    command_line,
    earlier_runs,
    machine,
    measured_on,
    one_line,
    provenance,
    runs_record,
    shown,
    table,
    timed,
    write_results,
)
from recipes.studies.baselines import steering
from recipes.studies.distillation import distil, distillation_loss, lora_patch, student_logits, teach
from recipes.studies.side_effects import Others, unrelated

LONG, SHORT = "LoRA distillation, longer", "LoRA distillation, as long"
PATIENCE = 3
"""Measurements without a gain after which training ends."""
ELSE = 1_000
"""Added to the seed of the inputs that distillation is followed with."""


def rivals(
    model: str = "smollm2",
    chunks: Sequence[str] = ("common_words/antonym", "sentence", "vasparr"),
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    times: float = 5.0,
    count: int = 40,
    answer_tokens: int = 32,
    seeds: Sequence[int] = (0, 1, 2),
    out: str = "recipes/results/rivals",
    done: Sequence[str] = (),
) -> None:
    """Make and test every change for every chunk."""
    check_counts(count=count, answer_tokens=answer_tokens)
    known_chunks(chunks)
    settings = {"rates": list(rates), "times": times, "count": count, "answer_tokens": answer_tokens}
    runs = earlier_runs(done, shown(model), settings)
    if runs:  # together, also where nothing is left to do
        write_results(__file__, out, page(runs), runs_record(shown(model), settings, runs))
    finished = {(run["chunk"], run["seed"]) for run in runs}
    lm, tokenizer = load_model(model)
    for seed, name in product(seeds, chunks):
        if (name, seed) in finished:
            continue
        case = case_of(name, seed)
        others = Others(lm, tokenizer, unrelated("other instructions", name, count, seed), answer_tokens)
        evaluation = evaluation_of(lm, tokenizer, case)
        instructed = others.agreement(case.chunk, None)
        for method, (patch, seconds, rate) in changes(lm, tokenizer, case, rates, times, seed).items():
            scored = figures(evaluation, case, patch)
            scored |= {
                "rate": rate,
                "others": others.agreement(None, patch),
                "others_instructed": instructed,
            }
            about = {"chunk": name, "seed": seed, "method": method, "tested": len(case.tested)}
            where = {"machine": machine(lm.device), "commit": provenance()["commit"]}
            runs.append({**about, "seconds": seconds, **scored, **where})
        write_results(__file__, out, page(runs), runs_record(shown(model), settings, runs))


def changes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    rates: Sequence[float],
    times: float,
    seed: int,
) -> dict[str, tuple[ThoughtPatch, float, float | None]]:
    """Each method's change for a chunk, its seconds from the completed pairs on, and the learning rate it came to."""
    data = PairDataModule(None, case.chunk, case.fit_template, val_pairs=case.tested, seed=seed, **case.settings)
    prepare_pairs(data, model, tokenizer)
    given = [{"input": pair["input"]} for pair in data.pairs]

    def fit(kind: str | None = None, **settings: Any) -> ThoughtPatch:
        own = PairDataModule(data.pairs, case.chunk, data.template, kind=kind, seed=seed)
        own.known = data.written  # with whether each came to an end
        return fitted(ThoughtModule(model, tokenizer), own, ThoughtCallback(**settings), progress=False)

    methods: dict[str, Callable[[], ThoughtPatch]] = {
        "lit_thought": lambda: fit(kind=data.kind),
        "least squares alone": lambda: fit(sites=("mlp_out",), preserve=None, rank=None),
        "thought vectors": lambda: fit(**METHODS["vector"]),
        "steering": lambda: steering(model, tokenizer, case.chunk, given, data.template),
    }
    found: dict[str, tuple[ThoughtPatch, float, float | None]]
    found = {name: (*timed(method), None) for name, method in methods.items()}
    budget = found["lit_thought"][1]
    apart = PairDataModule(
        *(None, case.chunk, data.template),
        **{**case.settings, "inputs": max(1, len(data.pairs) // 5), "kind": data.kind, "seed": seed + ELSE},
        val_pairs=[*case.tested, *data.pairs],
    )
    prepare_pairs(apart, model, tokenizer)
    train = {"also_at": budget, "max_seconds": times * budget, "seed": seed}
    runs = [(trained(model, data.tokenised, apart.tokenised, learning_rate=rate, **train), rate) for rate in rates]
    for name, seconds in ((SHORT, budget), (LONG, float("inf"))):
        best, rate = min(((run.best(seconds), rate) for run, rate in runs), key=lambda one: one[0].kl)
        found[name] = best.patch, best.seconds, rate
    return found


class Best(NamedTuple):
    """The nearest adapter of a training, its KL on the inputs that this is followed with, and how long it took."""

    patch: ThoughtPatch
    kl: float
    seconds: float


class Trained(NamedTuple):
    """The measurements of a training, and the adapter at each that was nearer than all before it."""

    history: list[dict[str, float]]
    kept: dict[int, ThoughtPatch]

    def best(self, seconds: float) -> Best:
        """The nearest up to the first measurement after some seconds, up to which the training has to go on."""
        after = (at for at, entry in enumerate(self.history) if entry["seconds"] >= seconds)
        last = next(after, len(self.history) - 1)
        at = max(at for at in self.kept if at <= last)
        return Best(self.kept[at], self.history[at]["kl"], self.history[last]["seconds"])


def trained(
    model: PreTrainedModel, pairs: Sequence[TokenisedPair], others: Sequence[TokenisedPair], **settings: Any
) -> Trained:
    """A LoRA's training on ``pairs``, until :data:`PATIENCE` measurements on ``others`` bring no gain.

    Args:
        model: the model.
        pairs: what to train on.
        others: what to measure KL on.
        settings: :func:`distil`'s.
    """
    examples = teach(model, others)
    seen: list[float] = []
    kept: dict[int, ThoughtPatch] = {}

    def score(student: PreTrainedModel) -> dict[str, float]:
        losses = [
            float(distillation_loss(own.teacher, student_logits(student, [own]).detach())) * len(own.teacher)
            for own in examples
        ]
        kl = sum(losses) / sum(len(own.teacher) for own in examples)
        if not seen or kl < min(seen):
            kept[len(seen)] = copy.deepcopy(lora_patch(student))
        seen.append(kl)
        return {"kl": kl}

    def finished(figures: Mapping[str, float]) -> bool:
        return len(seen) > PATIENCE and min(seen[-PATIENCE:]) >= min(seen[:-PATIENCE])

    how = {"batch_size": 32, "warmup_steps": 3, "max_steps": 10_000, "every": 5, "finished": finished, **settings}
    return Trained(distil(model, pairs, score, **how).history, kept)


def figures(evaluation: Evaluation, case: Case, patch: ThoughtPatch) -> dict[str, Any]:
    """What is reported of a change."""
    scored = evaluation.score(patch)
    kept = {key: scored[key] for key in ("output_kl", "fidelity", "perplexity_ratio")}
    rank = max((own.A.shape[0] for own in patch.factors.values()), default=0)
    return {**kept, "own_kl": scored["own_text"]["kl"], "right": right(case, scored["items"]), "rank": rank}


HEAD = ["method", "KL, down by", "KL along its own text", "same output", "right", "unrelated perplexity ×"]
HEAD += ["other instructions: tokens that stay", "rank", "seconds"]


FIGURES: list[tuple[Callable[[Mapping[str, Any]], float | None], str]] = [
    (lambda run: 1 - run["output_kl"]["patched"] / run["output_kl"]["plain"], ".1%"),
    (lambda run: run["own_kl"], ".3f"),
    (lambda run: run["fidelity"], ".2f"),
    (lambda run: run["right"] and run["right"]["patched"], "g"),
    (lambda run: run["perplexity_ratio"], ".4f"),
    (lambda run: run["others"], ".3f"),
    (lambda run: run["rank"], "g"),
    (lambda run: run["seconds"], ".0f"),
]
"""What a run says under :data:`HEAD`, and how it is written."""


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table for each chunk: of several seeds the mean of each figure, and the least and the most of it."""
    parts = []
    for chunk in dict.fromkeys(run["chunk"] for run in runs):
        own = [run for run in runs if run["chunk"] == chunk]
        first = [run for run in own if run["method"] == own[0]["method"]]
        said = ""
        if own[0]["right"]:
            right, plain = (spread([run["right"][key] for run in first]) for key in ("instructed", "plain"))
            said = f"The instructed model has {right} of {own[0]['tested']} right, the plain one {plain}. "
        others = spread([run["others_instructed"] for run in first], ".3f")
        said += f"With the chunk in the prompt, {others} of the tokens under other system messages stay."
        if len(first) > 1:
            said += f" Of {len(first)} seeds, the mean (the least to the most)."
        rows = []
        for method in dict.fromkeys(run["method"] for run in own):
            same = [run for run in own if run["method"] == method]
            rates = sorted({run["rate"] for run in same if run["rate"] is not None})
            cells = [f"{method} ({', '.join(f'{rate:g}' for rate in rates)})" if rates else method]
            rows.append([*cells, *(spread([figure(run) for run in same], form) for figure, form in FIGURES)])
        parts.append(f"## {one_line(chunk, 60)}\n\n{said}\n\n{table(HEAD, rows)}")
    parts.append(measured_on(runs))
    return "\n".join(parts)


def spread(values: Sequence[float | None], form: str = "g") -> str:
    """The mean of some figures, and the least and the most of them where they differ; – where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    shown = [f"{value:{form}}" for value in (sum(known) / len(known), min(known), max(known))]
    shown[0] = f"{sum(known) / len(known):.1f}" if form == "g" and shown[1] != shown[2] else shown[0]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    command_line(rivals)
