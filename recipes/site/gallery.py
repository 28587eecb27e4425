"""Before and after: what a model answers plain, instructed and patched, by kind of chunk, failures among them.

    python -m recipes.site.gallery --config recipes/site/gallery.yaml

Draws the gallery of the documentation out of what studies have recorded; nothing is fitted here. The questions that are
shown are fixed: the same for every system prompt, the first test words of a word task, the first questions about a
document; none is picked by its answers. Figures are those of the study, over all its questions. Sentences say what
there is against a case. Another model has a gallery of its own, once the studies have run on it:

    python -m recipes.site.gallery --config recipes/site/gallery.yaml --out recipes/results/gallery_qwen \\
        --records "[instruction_alone_qwen, instruction_alone_documents_qwen]" \\
        --cases "[pirate, french, antonym, present-past, brindlemark, vasparr]"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.patch.results import RUNS
from recipes.chunks.documents import load_document
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import (
    ROOT,
    SIX_TASKS,
    check_names,
    command_line,
    load_split,
    nearer,
    one_line,
    table,
    write_results,
)

CASES = ("pirate", "wizard", "french", "sentence", "json", "antonym", "present-past", "brindlemark", "kestrel_station")
KEPT = ("name", "seed", "tested", "right", "items", "warnings", "prompt_tokens", "output_kl", "perplexity_ratio")
HALF = 0.5
"""Below this share of what the instructed model has right, a case is said to lose them."""


def gallery(
    records: Sequence[str] = ("instruction_alone_system", "instruction_alone_words", "instruction_alone_documents"),
    cases: Sequence[str] = CASES,
    asked: Sequence[str] = ("What can I do on a rainy Sunday?", "Who was Cleopatra?", "What is jazz?"),
    out: str = "recipes/results/gallery",
) -> None:
    """Write the page out of the records."""
    read = [_record(name) for name in records]
    models = {record["model"] for record in read}
    if len(models) > 1:
        raise ThoughtError(f"records: expected those of one model; got {sorted(models)}; give each model a gallery.")
    known = {run["name"]: run for record in read for run in _runs(record)}
    check_names("cases", cases, known)
    shown = [{**known[name], "items": picked(known[name], asked)} for name in cases]
    record = {"model": models.pop(), "settings": {"records": list(records), "asked": list(asked)}, "runs": shown}
    write_results(__file__, out, page(shown), record)


def picked(run: Mapping[str, Any], asked: Sequence[str]) -> list[dict[str, str]]:
    """Of a system prompt's items those asked, of another chunk's the first, as many."""
    if run["kind"] != "system prompt":
        return list(run["items"][: len(asked)])
    items = {item["input"]: item for item in run["items"]}
    check_names("asked", asked, items)
    return [items[question] for question in asked]


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """All cases in one table, then each with its answers."""
    head = ["chunk", "right: plain", "instructed", "patched", "of", "nearer by", "unrelated ×", "tokens"]
    lines = [[f"[{run['name']}](#{run['name']}), {run['kind']}", *_figures(run)] for run in runs]
    text = (
        "*Right*: the answer follows the system prompt's rule, is the list's word, has an accepted answer about the "
        "document; a dash is where no rule can tell. *Nearer*: how much of KL(instructed ‖ plain), along the "
        "instructed answers, is gone with the patch. *Unrelated*: perplexity of unrelated text. *Tokens*: of a prompt, "
        "instructed → patched. Answers stop where the study stopped them. The questions below are the same for every "
        "system prompt, and the first that were tested of the others.\n"
    )
    return "\n".join([text, table(head, lines), *map(section, runs)])


def section(run: Mapping[str, Any]) -> str:
    """One case: the chunk, what there is against it, the three answers."""
    rows = [[_cut(item["input"], 80), *(_cut(item[which], 220) for which in RUNS)] for item in run["items"]]
    parts = [f"## {run['name']}\n", f"> {_cut(chunk_of(run), 300)}\n"]
    parts += [f"**{sentence}**\n" for sentence in against(run)]
    return "\n".join([*parts, table(["question", *RUNS], rows, left=4)])


def chunk_of(run: Mapping[str, Any]) -> str:
    """The chunk of a case, by its name and kind."""
    if run["kind"] == "system prompt":
        return str(instructions_known()[run["name"]]["instruction"])
    if run["kind"] == "document":
        return load_document(run["name"]).chunk
    (task,) = (task for task in SIX_TASKS if Path(task).stem == run["name"])
    return load_split(task, run["seed"]).instruction


def against(run: Mapping[str, Any]) -> list[str]:
    """What there is to say against a case, in sentences."""
    said, counts = [], run["right"]
    if counts is not None and not counts["instructed"]:
        said.append("The instructed model does not follow this chunk itself: there is nothing to copy.")
    elif counts is not None and counts["patched"] <= HALF * counts["instructed"]:
        had, kept = counts["instructed"], counts["patched"]
        said.append(f"Of {had} answers that the instructed model has right, {kept} are left.")
    return [*said, *run["warnings"]]


def _cut(text: str, longest: int) -> str:
    """A text on one line, to the letter, cut at a word."""
    line = one_line(text, len(text) + text.count("|"))
    if len(line) > longest:
        line = line[:longest].rpartition(" ")[0] + " …"
    return re.sub(r"([*_<`])", r"\\\1", line)


def _record(name: str) -> dict[str, Any]:
    path = ROOT / f"recipes/results/{name}.json"
    path = path if path.is_file() else Path(name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert {"model", "runs"} <= found.keys(), "it has no model or runs"
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise ThoughtError(
            f"records: expected names below recipes/results, or JSON files, that the studies wrote; got {name!r} "
            f"({type(error).__name__}: {error}); run the study first."
        ) from error
    return dict(found)


def _runs(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The fits of a record on what the model wrote, of the first of its seeds."""
    first = min((run["seed"] for run in record["runs"]), default=0)
    for run in record["runs"]:
        if (run["fit"], run["seed"]) == ("written", first):
            yield {"kind": run["door"], **{key: run[key] for key in KEPT}}


def _figures(run: Mapping[str, Any]) -> list[Any]:
    counts, kl, ratio, tokens = run["right"], run["output_kl"], run["perplexity_ratio"], run["prompt_tokens"]
    cells: list[Any] = [None if counts is None else counts[which] for which in RUNS]
    cells += [
        run["tested"] if counts is None else counts["of"],
        nearer(kl, 0),
        None if ratio is None else f"{ratio:.3f}",
    ]
    return [*cells, None if tokens is None else f"{tokens['instructed']:.0f} → {tokens['plain']:.0f}"]


if __name__ == "__main__":
    command_line(gallery)
