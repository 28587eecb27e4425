"""Six word-level tasks: demonstrations become adapters, scored beside the instructed model.

    python -m recipes.tasks.word_tasks --config recipes/tasks/word_tasks.yaml

For each task and seed, the first 10 pairs of a shuffle are the instruction, the next 30 inputs are fitted (their
outputs are not used: the instructed model writes its own), and up to 100 others are the test. Both sites together are
compared with either alone. Intervals are of 95 % (Wilson; of differences on the same words, Newcombe), over the words
of all seeds together. A word is *left out* where the first token of its answer is no token of any output that was
fitted or shown: what the patch gets right there it cannot have copied. Writes a Markdown and a JSON table.

    python -m recipes.tasks.word_tasks --config recipes/tasks/word_tasks_auto.yaml    # beside settings "auto"
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import jsonargparse
from lit_thought.evaluation.intervals import paired_difference, wilson

from lit_thought import PairDataModule, PromptTemplate, load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.patch.results import RUNS
from recipes.harness import METHODS, SIX_TASKS, TEMPLATE, Split, load_split, provenance, shown, write_results


def word_tasks(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0, 1, 2),
    sites: Sequence[str] = ("both", "attn_out", "mlp_out"),
    rank: int = 16,
    shots: int = 10,
    fit: int = 30,
    test: int = 100,
    max_new_tokens: int = 12,
    out: str = "recipes/results/word_tasks",
    done: Sequence[str] = (),
) -> None:
    """Fit and test every task, seed and choice of sites.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        tasks: names below recipes/data, or JSON, JSONL or CSV files of input/output pairs.
        seeds: seeds of the splits.
        sites: names of harness.METHODS: "both", "attn_out", "mlp_out", or "auto" (both, all settings "auto").
        rank: rank of the adapters, but for "auto".
        shots: demonstrations in the instruction.
        fit: inputs to fit on.
        test: most pairs to test on.
        max_new_tokens: longest output.
        out: path of the two result files, without suffix.
        done: JSON files of earlier runs with the same settings, which are taken over instead of repeated; so that
            seeds can be spread over processes.
    """
    lm, tokenizer = load_model(model)
    runs: list[dict[str, Any]] = []
    settings, versions = None, None
    commits: list[str] = []
    for record in (json.loads(Path(file).read_text(encoding="utf-8")) for file in done):
        runs += record["runs"]
        settings, versions = record["settings"], record["versions"]
        commits.append(record["commit"])
    finished = {(run["task"], run["seed"]) for run in runs}
    for task, seed in product(tasks, seeds):
        if (Path(task).stem, seed) in finished:
            continue
        split = load_split(task, seed, shots, fit, test)
        common = {"instruction": split.instruction, "template": TEMPLATE, "max_new_tokens": max_new_tokens}
        evaluation = Evaluation(lm, tokenizer, pairs=split.test, progress=False, **common)
        left_out = _left_out(lm, tokenizer, split, max_new_tokens)
        for where in sites:
            chosen: dict[str, Any] = {"rank": rank, **METHODS[where]}
            patch = transmute(lm, tokenizer, pairs=split.fit, **chosen, progress=False, **common)
            result = evaluation.score(patch)
            items = result.pop("items")
            correct = {run: [item[run].strip() == item["reference"].strip() for item in items] for run in RUNS}
            about = {"task": split.name, "seed": seed, "sites": where, "adapter_bytes": _size(patch)}
            about["selection"] = patch.provenance.get("selection")
            runs.append({**about, **result, "correct": correct, "left_out": left_out})
            accuracy = result["accuracy"]
            print(
                f"{split.name}, seed {seed}, {where}: "
                f"accuracy {accuracy['instructed']:.2f} → {accuracy['patched']:.2f}, "
                f"fidelity {result['fidelity']:.2f}, perplexity × {result['perplexity_ratio']:.3f}",
                flush=True,
            )
            commits.append(provenance()["commit"] or "unknown")
            if settings is None or about["selection"] is None:
                settings, versions = patch.provenance["settings"], patch.provenance["versions"]
    settings = {key: value for key, value in (settings or {}).items() if key != "sites"}
    table = _table(runs, sites)
    print("\n" + table)
    record = {
        "model": shown(model),
        "commit": ", ".join(dict.fromkeys(commits)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": versions,
        "runs": runs,
    }
    where = f"{shown(model)}, commit {record['commit']}"
    header = f"`python -m recipes.tasks.word_tasks` on {where}; settings: `{json.dumps(settings)}`\n\n"
    write_results(out, header + table, record)


def _left_out(lm: Any, tokenizer: Any, split: Split, max_new_tokens: int) -> list[bool]:
    """Whether the first token of each test word's answer is in no output that is fitted or shown."""
    template = PromptTemplate.parse(TEMPLATE)
    data = PairDataModule(split.fit, split.instruction, TEMPLATE, max_new_tokens=max_new_tokens)
    prepare_pairs(data, lm, tokenizer)
    written = [text for _, text, _ in data.written]
    shown = [line.removeprefix("A: ") for line in split.instruction.splitlines() if line.startswith("A: ")]

    def tokens(output: str) -> tuple[int, ...]:
        pair = template.tokenise(tokenizer, split.instruction, "x", output)
        return pair.plain_ids[slice(*pair.output_span)]

    targets = {token for output in [*written, *shown] if output.strip() for token in tokens(output)}
    return [tokens(pair["output"])[0] not in targets for pair in split.test]


def _size(patch: Any) -> int:
    with TemporaryDirectory() as folder:
        patch.save_adapter(Path(folder) / "adapter")
        return (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size


def _on_left_out(own: Sequence[dict[str, Any]], correct: dict[str, list[bool]]) -> str:
    """Accuracy of the instructed and the patched run on words left out, the latter with its interval; how many."""
    there = [one for run in own for one in run["left_out"]]
    count = sum(there)
    if not count:
        return "0 words"
    hits = {k: sum(a and b for a, b in zip(correct[k], there, strict=True)) for k in ("instructed", "patched")}
    low, high = wilson(hits["patched"], count)
    patched = f"{hits['patched'] / count:.3f} ({low:.2f} to {high:.2f})"
    return f"{hits['instructed'] / count:.3f}, {patched}, {count}"


def _table(runs: list[dict[str, Any]], sites: Sequence[str]) -> str:
    """Means over seeds by task and sites, and the mean ratio and fidelity of each choice of sites."""
    lines = [
        "| task | sites | plain | instructed | patched | patched ÷ instructed | patched − instructed "
        "| left out: instructed, patched, of words | fidelity | KL of the output, nats | perplexity × (worst) "
        "| adapter |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ratios: dict[str, dict[str, float]] = {where: {} for where in sites}
    fidelities: dict[str, list[float]] = {where: [] for where in sites}
    for task, where in product(dict.fromkeys(run["task"] for run in runs), sites):
        own = [run for run in runs if run["task"] == task and run["sites"] == where]
        accuracy = {k: mean(run["accuracy"][k] for run in own) for k in ("plain", "instructed", "patched")}
        ratio = accuracy["patched"] / accuracy["instructed"] if accuracy["instructed"] else float("nan")
        fidelity = mean(run["fidelity"] for run in own)
        perplexity = [run["perplexity_ratio"] for run in own]
        ratios[where][task] = ratio
        fidelities[where].append(fidelity)
        correct = {k: [one for run in own for one in run["correct"][k]] for k in accuracy}
        low, high = wilson(sum(correct["patched"]), len(correct["patched"]))
        cells = [task, where, *(f"{accuracy[k]:.3f}" for k in accuracy), f"{ratio:.3f}"]
        cells[4] += f" ({low:.2f} to {high:.2f})"
        difference = paired_difference(correct["patched"], correct["instructed"])
        cells.append("{:+.3f} ({:+.2f} to {:+.2f})".format(*difference))
        cells += [_on_left_out(own, correct), f"{fidelity:.3f}"]
        cells.append(f"{mean(run['output_kl']['patched'] for run in own):.3f}")
        cells.append(f"{mean(perplexity):.4f} ({max(perplexity):.4f})")
        cells.append(f"{own[0]['adapter_bytes'] / 1e6:.2f} MB")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for where in sites:
        strong = {task: ratio for task, ratio in ratios[where].items() if task != "english-french"}
        line = f"- {where}: mean fidelity {mean(fidelities[where]):.3f}"
        line += f"; patched ÷ instructed: mean {mean(ratios[where].values()):.3f}"
        if strong:
            worst = min(strong, key=lambda task: strong[task])
            line += (
                f"; patched ÷ instructed without english-french: mean {mean(strong.values()):.3f}, "
                f"lowest {strong[worst]:.3f} ({worst})"
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jsonargparse.auto_cli(word_tasks)
