"""Before and after: what one model answers plain, instructed and patched, by kind of chunk, failures among them.

    python -m recipes.site.gallery --config recipes/site/gallery.yaml

Each chunk becomes a patch by ``transmute(model, tokenizer, chunk)`` alone. The questions that are shown are fixed: the
same for every system prompt, the first test words of a word task, the first questions about a document; none is picked
by its answers. Figures are of these and of others like them. A sentence says where a case fails. Writes the page of the
documentation, Markdown and JSON; another model has one of its own:

    python -m recipes.site.gallery --config recipes/site/gallery.yaml --model Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --out recipes/results/gallery_qwen
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lit_thought import load_model, transmute
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.results import RUNS
from recipes.harness import check_names, command_line, one_line, shown, table, write_results
from recipes.studies.instruction_alone import Case, document_case, message_case, right, word_case
from recipes.tasks.document_data import load_document
from recipes.tasks.system_prompt import instructions_known

HALF = 0.5
"""Below this share of what the instructed model has right, a case is called a failure."""


def gallery(
    model: str = "smollm2",
    instructions: Sequence[str] = ("pirate", "wizard", "french", "sentence", "json"),
    tasks: Sequence[str] = ("common_words/antonym", "function_vectors/present-past"),
    documents: Sequence[str] = ("brindlemark", "harrowick"),
    asked: Sequence[str] = ("What can I do on a rainy Sunday?", "Who was Cleopatra?", "What is jazz?"),
    test: int = 20,
    answer_tokens: int = 48,
    word_tokens: int = 12,
    document_tokens: int = 24,
    document_rank: int = 64,
    seed: int = 0,
    out: str = "recipes/results/gallery",
) -> None:
    """Fit every chunk, and ask the three models."""
    known = instructions_known()
    check_names("instructions", instructions, known)
    cases = [asking(message_case(known[name], seed, test, answer_tokens), asked, test) for name in instructions]
    cases += [word_case(task, seed, test, word_tokens) for task in tasks]
    cases += [document_case(load_document(name), document_tokens, {"rank": document_rank}) for name in documents]
    lm, tokenizer = load_model(model)
    runs = []
    for case in cases:
        evaluation = Evaluation(
            *(lm, tokenizer),
            instruction=case.chunk,
            pairs=case.tested,
            template=case.template,
            max_new_tokens=case.max_new_tokens,
            progress=False,
        )
        how = {"seed": seed, "max_new_tokens": min(64, 2 * case.max_new_tokens), "progress": False, **case.settings}
        template = case.template if case.given or case.door == "document" else None
        start = time.perf_counter()
        patch = transmute(lm, tokenizer, case.chunk, None, template, **how)
        seconds = time.perf_counter() - start
        result = evaluation.score(patch)
        written = {pair["input"] for pair in patch.provenance["inputs"]["pairs"]}
        run = {"kind": case.door, "name": case.name, "chunk": case.chunk, "seconds": seconds}
        run |= {"right": right(case, result["items"]), "tested": len(case.tested)}
        run |= {"fitted": [item["input"] in written for item in result["items"][: len(asked)]]}
        run |= {key: value for key, value in result.items() if key != "perplexity_windows"}
        runs.append(run)
        print(section(run, len(asked)), flush=True)
    settings = {"test": test, "answer_tokens": answer_tokens, "word_tokens": word_tokens}
    settings |= {"document_tokens": document_tokens, "document_rank": document_rank, "seed": seed, "asked": list(asked)}
    write_results(__file__, out, page(runs, len(asked)), {"model": shown(model), "settings": settings, "runs": runs})


def asking(case: Case, asked: Sequence[str], test: int) -> Case:
    """A case whose first questions are those asked."""
    first = [{"input": text} for text in asked]
    return case._replace(tested=[*first, *(pair for pair in case.tested if pair not in first)][:test])


def page(runs: Sequence[Mapping[str, Any]], samples: int) -> str:
    """All cases in one table, then each with its answers."""
    lines = [[f"[{run['name']}](#{run['name']})", run["kind"], *_figures(run)] for run in runs]
    head = ["chunk", "kind", "right: plain", "instructed", "patched", "of", "nearer to the instructed model by"]
    head += ["unrelated perplexity ×", "prompt tokens, instructed", "patched", "seconds"]
    failed = [run for run in runs if failures(run)]
    text = (
        f"{len(runs)} chunks, each made into a patch by itself. Of {len(failed)} there is something to be said against "
        "the patch, below. *Right*: the answer follows the system prompt's rule, is the list's word, has an accepted "
        "answer about the document. *Nearer*: how much of KL(instructed ‖ plain), along its answers, is gone "
        "with the patch.\n"
    )
    return "\n".join([text, table(head, lines, left=2), *(section(run, samples) for run in runs)])


def section(run: Mapping[str, Any], samples: int) -> str:
    """One case: the chunk, what is to be said against it, the three answers to the first questions."""
    rows = [
        [f"{one_line(item['input'], 80)}{' (fitted, too)' * fitted}", *(one_line(item[which], 220) for which in RUNS)]
        for item, fitted in zip(run["items"][:samples], run["fitted"], strict=True)
    ]
    parts = [f"## {run['name']}\n", f"> {one_line(run['chunk'], 300)}{' …' * (len(run['chunk']) > 300)}\n"]
    parts += [f"**{sentence}**\n" for sentence in failures(run)]
    return "\n".join([*parts, table(["question", *RUNS], rows, left=4)])


def failures(run: Mapping[str, Any]) -> list[str]:
    """What is to be said against a case, in sentences."""
    said, counts = [], run["right"]
    if counts is not None and not counts["instructed"]:
        said.append("The instructed model does not follow this chunk itself: there is nothing to copy.")
    elif counts is not None and counts["patched"] < HALF * counts["instructed"]:
        had, kept = counts["instructed"], counts["patched"]
        said.append(f"Of {had} answers that the instructed model has right, the patched model has {kept}.")
    return [*said, *run["warnings"]]


def _figures(run: Mapping[str, Any]) -> list[Any]:
    counts, kl, ratio = run["right"], run["output_kl"], run["perplexity_ratio"]
    cells: list[Any] = [None if counts is None else counts[which] for which in RUNS]
    cells += [None if counts is None else run["tested"], f"{1 - kl['patched'] / kl['plain']:.0%}", f"{ratio:.3f}"]
    tokens = run["prompt_tokens"]
    return [*cells, f"{tokens['instructed']:.0f}", f"{tokens['plain']:.0f}", f"{run['seconds']:.0f}"]


if __name__ == "__main__":
    command_line(gallery)
