"""The life of a patch: its prompt changes by a line, and its base is trained on.

    python -m recipes.studies.life --config recipes/studies/life.yaml

*A line changes.* A patch is fitted on a prompt, on inputs that the model writes and some about one line. Then the line
says something else. What is there to do: leave the patch; fit it anew; take the statistics of the inputs about the line
off the fit's, add those with the new prompt, and solve again; or fit the inputs about the line alone. Each is tested
with other messages about the line, and with messages about all else.

*The base is trained on.* Random LoRA factors of a given size are merged into every linear layer of the model's blocks,
as a stand-in for a little fine-tuning. What the patch still does on the model so changed stands beside a fit on it, and
beside what the change does to unrelated text. Writes a Markdown and a JSON table.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError, check_counts
from lit_thought.evaluation.compare import Evaluation
from lit_thought.inputs.write import write_pairs
from lit_thought.model.blocks import find_blocks
from lit_thought.model.loading import fingerprint
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved
from lit_thought.timing import Stopwatch
from recipes.chunks.cases import evaluation_of, prompt_case
from recipes.chunks.long_prompts import load_prompt
from recipes.chunks.rules import contains
from recipes.harness import Unrelated, command_line, nearer, shown, table, write_results

TEMPLATE = PromptTemplate.chat()
WAYS = {
    "left": "the patch of the old prompt",
    "anew": "all inputs, fitted with the new prompt",
    "statistics": "statistics about the line subtracted, and added with the new prompt",
    "line alone": "the inputs about the line, fitted with the new prompt",
}
"""What can be done when a line changes."""


def life(
    model: str = "smollm2",
    dtype: str = "float32",
    prompt: str = "shop_support",
    line: str = "Tools can be returned within 45 days",
    becomes: str = "Tools can be returned within 14 days",
    accepted: Sequence[str] = ("14",),
    about: Sequence[str] = (),
    tested: Sequence[str] = (),
    inputs: int = 60,
    sizes: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
    lora_rank: int = 8,
    test: int = 20,
    answer_tokens: int = 48,
    seed: int = 0,
    out: str = "recipes/results/life",
) -> None:
    """Change a line, then the base."""
    check_counts(inputs=inputs, lora_rank=lora_rank, test=test, answer_tokens=answer_tokens)
    own = load_prompt(prompt)
    if own.chunk.count(line) != 1:
        raise ThoughtError(f"line: expected a text that stands once in {prompt}; got {line!r}; correct it.")
    if not about or not tested or set(about) & set(tested):
        raise ThoughtError("about, tested: expected messages about the line, and others to test with; give both.")
    lm, tokenizer = load_model(model, dtype=dtype)
    how: dict[str, Any] = {"max_new_tokens": answer_tokens, "seed": seed, "progress": False}
    others = [row for row in own.messages[:test] if not contains(line, row["rules"].get("states", ()))]
    asked = {"line": tested, "else": [row["input"] for row in others]}  # what the line answers is about it, too
    apart = [{"input": text} for text in (*tested, *asked["else"])]
    written = write_pairs(lm, tokenizer, own.chunk, TEMPLATE, total=inputs, seed=seed, apart=apart)
    how["kind"] = written.kind
    pairs, few = [*written.pairs, *({"input": text} for text in about)], [{"input": text} for text in about]
    record: dict[str, Any] = {"model": shown(model), "prompt": prompt, "line": line, "becomes": becomes}
    record["settings"] = {"dtype": dtype, "inputs": inputs, "lora_rank": lora_rank, "test": test, "seed": seed}
    record["settings"]["answer_tokens"] = answer_tokens
    new = own.chunk.replace(line, becomes)
    patches, seconds = mended(lm, tokenizer, own.chunk, new, pairs, few, how)

    def evaluated(lm: PreTrainedModel, chunk: str, key: str) -> Evaluation:
        case = prompt_case(own.name, chunk, asked[key], answer_tokens)
        return evaluation_of(lm, tokenizer, case, unrelated=False)

    evaluations = {key: evaluated(lm, new, key) for key in asked}
    record["ways"] = {}
    for way, patch in patches.items():
        scored = {key: figures(evaluation, patch) for key, evaluation in evaluations.items()}
        items = scored["line"].pop("items")
        right = {run: sum(contains(item[run], accepted) for item in items) for run in ("instructed", "patched")}
        scored["else"].pop("items")
        record["ways"][way] = {"seconds": seconds[way], "right": right, "of": len(tested), **scored}
    record["bases"] = []
    unrelated = Unrelated(lm, tokenizer, 2)
    for size in (0.0, *sizes):
        tuned = trained_on(lm, size, lora_rank, seed)
        evaluation = evaluated(tuned, own.chunk, "else")
        kept = anew = figures(evaluation, moved(patches["left"], tuned))
        if size:
            anew = figures(evaluation, transmute(tuned, tokenizer, own.chunk, pairs, TEMPLATE, **how))
        row = {"size": size, "unrelated": unrelated.ratio(tuned)}
        for name, found in (("kept", kept), ("anew", anew)):
            row[name] = {key: value for key, value in found.items() if key != "items"}
        record["bases"].append(row)
        write_results(__file__, out, page(record), record)


def mended(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    old: str,
    new: str,
    pairs: Sequence[Mapping[str, str]],
    few: Sequence[Mapping[str, str]],
    how: Mapping[str, Any],
) -> tuple[dict[str, ThoughtPatch], dict[str, float]]:
    """A patch for each of :data:`WAYS`, and the seconds that it takes once the old fit is there."""
    with TemporaryDirectory() as place:

        def fit(chunk: str, rows: Sequence[Mapping[str, str]], name: str, **same: Any) -> tuple[ThoughtPatch, float]:
            start, more = Stopwatch.now(), {**how, **same, "statistics_dir": Path(place) / name}
            patch = transmute(model, tokenizer, chunk, rows, TEMPLATE, **more)
            return patch, Stopwatch.now() - start

        patches, seconds = {}, {"left": 0.0}
        patches["left"], _ = fit(old, pairs, "old")
        patches["anew"], seconds["anew"] = fit(new, pairs, "new")
        patches["line alone"], seconds["line alone"] = fit(new, few, "line alone")
        start = Stopwatch.now()
        whole = patches["left"].provenance["settings"]  # sums go together where their settings are the same
        same = {name: whole[name] for name in ("ridge", "preserve_weight")}
        fit(old, few, "old line", **same)
        fit(new, few, "new line", **same)
        sums = {name: SavedStatistics.load(Path(place) / name) for name in ("old", "old line", "new line")}
        changed = sums["old"].subtract(sums["old line"], approximate=True).merge(sums["new line"], approximate=True)
        patches["statistics"] = solve_saved(changed)
        seconds["statistics"] = Stopwatch.now() - start
    return {way: patches[way] for way in WAYS}, seconds


def figures(evaluation: Evaluation, patch: ThoughtPatch) -> dict[str, Any]:
    """What is reported of a patch, and the answers."""
    scored = evaluation.score(patch)
    return {"kl": scored["output_kl"], "own_kl": scored["own_text"]["kl"], "items": scored["items"]}


def trained_on(model: PreTrainedModel, size: float, rank: int, seed: int) -> PreTrainedModel:
    """A copy with W + size ‖W‖ B A / ‖B A‖ in every linear layer of its blocks, ‖·‖ Frobenius norms, A (rank, d_in) and
    B (d_out, rank) of standard normal numbers; the model itself at size 0."""
    if not size:
        return model
    tuned, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    layers = {id(layer): layer for block in find_blocks(tuned) for layer in block.module.modules()}
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            d_out, d_in = layer.weight.shape
            change = torch.randn(d_out, rank, generator=draw) @ torch.randn(rank, d_in, generator=draw)
            scale = size * float(layer.weight.data.norm()) / float(change.norm())
            layer.weight.data += scale * change.to(layer.weight)
    return tuned


def moved(patch: ThoughtPatch, model: PreTrainedModel) -> ThoughtPatch:
    """The patch as one for another model, whose layers are as large."""
    return ThoughtPatch(patch.factors, {**patch.provenance, "fingerprint": fingerprint(model)}, patch.vectors)


def page(record: Mapping[str, Any]) -> str:
    """Both tables."""
    ways, (first, *_) = record["ways"], record["ways"].values()
    lines = [f"On `{record['prompt']}`.\n\n## A line changes\n"]
    lines.append(
        f"“{record['line']}” becomes “{record['becomes']}”. The instructed model has {first['right']['instructed']}"
    )
    lines[-1] += f" of {first['of']} questions about it right.\n"
    head = ["what is done", "", "seconds", "right about the line", "KL about the line, down by", "elsewhere, down by"]
    head += ["KL along its own text: line", "elsewhere"]
    rows = []
    for way, one in ways.items():
        about, other = one["line"], one["else"]
        cells = [way, WAYS[way], f"{one['seconds']:.0f}", one["right"]["patched"], nearer(about["kl"])]
        rows.append([*cells, nearer(other["kl"]), f"{about['own_kl']:.3f}", f"{other['own_kl']:.3f}"])
    lines += [table(head, rows, left=2), "## The base is trained on\n"]
    head = [
        "‖ΔW‖ ÷ ‖W‖",
        "unrelated perplexity ×",
        "KL, plain",
        "patched as before",
        "down by",
        "fitted anew",
        "down by",
    ]
    rows = []
    for row in record["bases"]:
        kept, anew = row["kept"]["kl"], row["anew"]["kl"]
        cells = [f"{row['size']:g}", f"{row['unrelated']:.3f}", f"{kept['plain']:.3f}"]
        rows.append([*cells, f"{kept['patched']:.3f}", nearer(kept), f"{anew['patched']:.3f}", nearer(anew)])
    return "\n".join([*lines, table(head, rows)])


if __name__ == "__main__":
    command_line(life)
