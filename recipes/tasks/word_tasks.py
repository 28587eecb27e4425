"""Six word-level tasks: demonstrations become adapters, scored beside the instructed model.

    python -m recipes.tasks.word_tasks --config recipes/tasks/word_tasks.yaml

For each task and seed, the first 10 pairs of a shuffle are the instruction, the next 30 inputs are fitted (their
outputs are not used: the instructed model writes its own), and up to 100 others are the test. Both sites together are
compared with either alone, and with both at settings that are chosen on pairs held back (`auto`). Intervals are of
95 % (Wilson; of differences on the same words, Newcombe), over the words of all seeds together. A word is *left out*
where the first token of its answer is no token of any output that was fitted or shown: what the patch gets right there
it cannot have copied. Writes a Markdown and a JSON table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from lit_thought import PromptTemplate, ThoughtPatch, load_model
from lit_thought.patch.results import RUNS
from recipes.harness import (
    METHODS,
    SIX_TASKS,
    TEMPLATE,
    Trial,
    check_names,
    command_line,
    difference,
    earlier_runs,
    equal,
    load_split,
    provenance,
    runs_record,
    share,
    shown,
    table,
    write_results,
)


def word_tasks(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seeds: Sequence[int] = (0, 1, 2),
    sites: Sequence[str] = ("both", "attn_out", "mlp_out", "auto"),
    rank: int = 16,
    shots: int = 10,
    fit: int = 30,
    test: int = 100,
    max_new_tokens: int = 12,
    out: str = "recipes/results/word_tasks",
    done: Sequence[str] = (),
) -> None:
    """Fit and test every task, seed and choice of sites."""
    settings = {
        "sites": list(sites),
        "rank": rank,
        "shots": shots,
        "fit": fit,
        "test": test,
        "max_new_tokens": max_new_tokens,
    }
    runs = earlier_runs(done, shown(model), settings)
    finished = {(run["task"], run["seed"]) for run in runs}
    check_names("sites", sites, METHODS)
    lm, tokenizer = load_model(model)
    for task, seed in product(tasks, seeds):
        if (Path(task).stem, seed) in finished:
            continue
        trial = Trial(lm, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens)
        evaluation = trial.evaluation()
        left_out = _left_out(trial)
        for where in sites:
            patch = trial.fit(**{"rank": rank, **METHODS[where]})
            result = evaluation.score(patch)
            items = result.pop("items")
            about = {"task": trial.split.name, "seed": seed, "sites": where, "adapter_bytes": _size(patch)}
            about |= {key: patch.provenance.get(key) for key in ("settings", "selection")}
            correct = {run: equal(items, run) for run in RUNS}
            about |= {"correct": correct, "left_out": left_out, "commit": provenance()["commit"]}
            about["words"] = [pair["input"] for pair in trial.split.test]
            runs.append({**about, **result})
            print(
                f"{trial.split.name}, seed {seed}, {where}: accuracy {result['accuracy']['instructed']:.2f} → "
                f"{result['accuracy']['patched']:.2f}, fidelity {result['fidelity']:.2f}, "
                f"perplexity × {result['perplexity_ratio']:.3f}",
                flush=True,
            )
    write_results(__file__, out, _page(runs, sites), runs_record(shown(model), settings, runs))


def _left_out(trial: Trial) -> list[bool]:
    """Whether the first token of each test word's answer is in no output that is fitted or shown."""
    template, split = PromptTemplate.parse(TEMPLATE), trial.split
    written = [text for _, text, _ in trial.prepared().written]

    def tokens(output: str) -> tuple[int, ...]:
        pair = template.tokenise(trial.tokenizer, split.instruction, "x", output)
        return pair.plain_ids[slice(*pair.output_span)]

    targets = {
        token
        for output in [*written, *(pair["output"] for pair in split.shown)]
        if output.strip()
        for token in tokens(output)
    }
    return [tokens(pair["output"])[0] not in targets for pair in split.test]


def _size(patch: ThoughtPatch) -> int:
    with TemporaryDirectory() as folder:
        patch.save_adapter(Path(folder) / "adapter")
        return (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size


def _first(words: Iterable[str]) -> list[bool]:
    """Whether each word is there for the first time: seeds may test the same one, and these are not independent."""
    seen: set[str] = set()
    found = []
    for word in words:
        found.append(word not in seen)
        seen.add(word)
    return found


def _on_left_out(own: Sequence[dict[str, Any]], correct: dict[str, list[bool]], once: Sequence[bool]) -> str:
    """Accuracy of the instructed and the patched run on words left out, the latter with its interval; how many."""
    there = [one for run in own for one in run["left_out"]]
    if not any(there):
        return "0 words"
    instructed, patched = (
        [hit for hit, left in zip(correct[k], there, strict=True) if left] for k in ("instructed", "patched")
    )
    apart = [first for first, left in zip(once, there, strict=True) if left]
    return f"{mean(instructed):.3f}, {share(patched, 3, apart if any(apart) else None)}, {sum(there)}"


def _page(runs: list[dict[str, Any]], sites: Sequence[str]) -> str:
    """Means over seeds by task and sites, and the mean ratio and fidelity of each choice of sites."""
    head = ["task", "sites", "plain", "instructed", "patched", "patched ÷ instructed", "patched − instructed"]
    head += ["left out: instructed, patched, of words", "fidelity", "KL of the output, nats"]
    rows = []
    ratios: dict[str, dict[str, float]] = {where: {} for where in sites}
    fidelities: dict[str, list[float]] = {where: [] for where in sites}
    for task, where in product(dict.fromkeys(run["task"] for run in runs), sites):
        own = [run for run in runs if run["task"] == task and run["sites"] == where]
        accuracy = {k: mean(run["accuracy"][k] for run in own) for k in RUNS}
        ratio = accuracy["patched"] / accuracy["instructed"] if accuracy["instructed"] else float("nan")
        fidelity = mean(run["fidelity"] for run in own)
        perplexity = [run["perplexity_ratio"] for run in own]
        ratios[where][task] = ratio
        fidelities[where].append(fidelity)
        correct = {k: [one for run in own for one in run["correct"][k]] for k in RUNS}
        once = _first(word for run in own for word in run["words"])
        cells = [task, where, f"{accuracy['plain']:.3f}", f"{accuracy['instructed']:.3f}"]
        cells += [share(correct["patched"], 3, once), f"{ratio:.3f}"]
        cells.append(difference(correct["patched"], correct["instructed"], 3, once))
        cells.append(_on_left_out(own, correct, once))
        cells += [f"{fidelity:.3f}", f"{mean(run['output_kl']['patched'] for run in own):.3f}"]
        cells += [f"{mean(perplexity):.4f} ({max(perplexity):.4f})", f"{own[0]['adapter_bytes'] / 1e6:.2f} MB"]
        rows.append(cells)
    lines = [table([*head, "perplexity × (worst)", "adapter"], rows, left=2)]
    lines.append("Intervals are of each word once, though several seeds may test it.\n")
    for where in sites:
        strong = {task: ratio for task, ratio in ratios[where].items() if task != "english-french"}
        line = f"- {where}: mean fidelity {mean(fidelities[where]):.3f}"
        line += f"; patched ÷ instructed: mean {mean(ratios[where].values()):.3f}"
        if strong:
            worst = min(strong, key=lambda task: strong[task])
            line += f"; patched ÷ instructed without english-french: mean {mean(strong.values()):.3f}, "
            line += f"lowest {strong[worst]:.3f} ({worst})"
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line(word_tasks)
