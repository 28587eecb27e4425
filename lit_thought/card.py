"""The README.md of an adapter folder, written from the patch's provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_thought.patch import ThoughtPatch

__all__ = ["fenced", "interval", "model_card", "number", "with_results"]

_LONGEST = 4000
_BEGIN, _END = "<!-- results, from lit-thought report -->", "<!-- end of results -->"
_FENCE = re.compile(r"`{3,}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def model_card(patch: ThoughtPatch) -> str:
    """Markdown with the hub's YAML header. No licence is claimed: it depends on the base model's."""
    known = patch.provenance
    base = str(known.get("base_model") or known.get("model") or "")
    on_hub = _HUB_ID.fullmatch(base) is not None and not base.endswith(".gguf")
    tags = ["peft", "lora", "lit-thought", "thought-patch"]
    lines = ["---", *([f"base_model: {json.dumps(base)}"] if on_hub else []), "library_name: peft"]
    lines += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [
        "# Instruction as weights",
        "",
        f"A LoRA adapter for {f'`{base}`' if base else 'a causal language model'} that stands in for an "
        "instruction in the prompt: give the model with the adapter the prompt *without* the instruction. "
        "It was solved for in closed form by lit_thought, with no gradient training.",
        "",
        f"Rank {patch.rank}, {len(patch.factors)} weights changed, {patch.num_parameters:,} parameters.",
        "",
    ]
    if patch.vectors:
        lines += [
            f"It also adds {len(patch.vectors)} thought vectors to the outputs of layers, as PEFT's `lora_bias`. PEFT "
            "reads this; vLLM and llama.cpp refuse the adapter. PEFT can merge it only where the base layers have "
            "biases (GPT-2); otherwise (Llama, Qwen) `merge_and_unload` raises an error: keep the adapter unmerged.",
            "",
        ]
    parts = known.get("parts", [known])
    if len(parts) > 1:
        lines += [f"It is the sum of {len(parts)} patches.", ""]
    for number, part in enumerate(parts, start=1):
        if len(parts) > 1:
            lines += [f"## Part {number}, times {part.get('scale', 1.0):g}", ""]
        lines += _part(part)
    if "truncated" in known:
        cut = known["truncated"]
        lines += [f"Truncated to rank {cut['rank']}; relative error {cut['relative_error']:.2e}.", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({(base if on_hub else 'the base model')!r})",
        'model = PeftModel.from_pretrained(model, "this folder")',
        "```",
        "",
        'With lit_thought, removable without a trace: `with ThoughtPatch.load("this folder").applied(model): ...`',
        "",
        "`thought.json` holds the whole record of how the adapter was made.",
        "",
    ]
    return "\n".join(lines)


def with_results(card: str, evaluation: Mapping[str, Any] | None) -> str:
    """The card with a section of results, in place of the one it has; without an evaluation there is none.

    Args:
        card: Markdown that :func:`model_card` wrote, edited or not.
        evaluation: the ``evaluation`` of a report.
    """
    lines = card.split("\n")
    marks = [i for i in _outside_fences(lines) if lines[i] in (_BEGIN, _END)]
    if [lines[i] for i in marks[:2]] == [_BEGIN, _END]:
        place = marks[0]
        del lines[place : marks[1] + 2]  # and the blank line after it
    else:
        place = next((i for i in _outside_fences(lines) if lines[i] == "## Use"), len(lines))
    section = [] if evaluation is None else [_BEGIN, *_results(evaluation), _END, ""]
    return "\n".join(lines[:place] + section + lines[place:])


def number(value: float | None, digits: int = 2) -> str:
    """A figure of an evaluation with as many decimals."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(cell: Mapping[str, float] | None, digits: int = 2) -> str:
    """The bounds of a figure's confidence interval, or nothing."""
    return "" if not cell or "low" not in cell else f"{cell['low']:.{digits}f}–{cell['high']:.{digits}f}"


def _results(evaluation: Mapping[str, Any]) -> list[str]:
    """A table of the figures that a reader asks for first."""
    lines = ["## Results", "", f"On {evaluation['pairs']} held-out pairs, with 95 % intervals:", ""]
    lines += ["| | plain | instructed | patched |", "|---|---:|---:|---:|"]
    for row in evaluation["table"]:
        cells = (_figure(row["runs"][run], row["digits"]) for run in ("plain", "instructed", "patched"))
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    ratio = evaluation["perplexity_ratio"]
    return [*lines, "", *([f"Perplexity of unrelated text × {_figure(ratio, 3)}.", ""] if ratio is not None else [])]


def _figure(cell: Mapping[str, float] | None, digits: int) -> str:
    bounds = interval(cell, digits)
    return f"{number(cell['value'] if cell else None, digits)}{f' ({bounds})' if bounds else ''}"


def _outside_fences(lines: Sequence[str]) -> Iterator[int]:
    """Indices of the lines that are in no literal block: what instructions quote is never a mark."""
    fence = ""
    for index, line in enumerate(lines):
        match = _FENCE.match(line)
        if fence:
            if match and len(match[0]) >= len(fence) and line == match[0]:
                fence = ""
        elif match:
            fence = match[0]
        else:
            yield index


def _part(known: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if known.get("instruction"):
        lines += ["The instruction that the adapter replaces:", "", *fenced(str(known["instruction"])), ""]
    elif known.get("instruction_hash"):
        lines += ["The adapter keeps no more than a hash of the instruction that it replaces.", ""]
    if known.get("template"):
        template = known["template"]
        text = template if isinstance(template, str) else json.dumps(template, indent=2, ensure_ascii=False)
        lines += ["Prompt template:", "", *fenced(text), ""]
    settings, diagnostics = known.get("settings"), known.get("diagnostics")
    if isinstance(diagnostics, Mapping) and diagnostics and all(isinstance(v, Mapping) for v in diagnostics.values()):
        lines += ["Figures of the fit, by layer:", "", *_by_layer(diagnostics), ""]
        diagnostics = None
    for title, table in (("Settings", settings), ("Figures of the fit", diagnostics)):
        rows = list(_rows(table)) if isinstance(table, Mapping) else []
        if rows:
            lines += [f"{title}:", "", "| | |", "|---|---|", *rows, ""]
    record = {key: known[key] for key in ("date", "versions", "fingerprint") if known.get(key)}
    if record:
        lines += ["| | |", "|---|---|", *_rows(record), ""]
    return lines


def _by_layer(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row a layer and one column a figure that tells how good its patch is; the rest stays in thought.json."""
    columns = ("error_before", "error_after", "effective_rank", "condition", "truncation_loss")
    lines = [f"| layer | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for layer, figures in diagnostics.items():
        cells = (f"{figures[c]:.3g}" if isinstance(figures.get(c), (int, float)) else "" for c in columns)
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines


def _rows(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One row per value; a nested table's keys are joined by dots; long lists stay in thought.json."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        elif not isinstance(value, list) or len(value) <= 8:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown = " ".join(shown.split())
            if len(shown) <= 200:
                escaped = shown.replace("\\", "\\\\").replace("|", "\\|")
                yield f"| {prefix}{key} | {escaped} |"


def fenced(text: str) -> list[str]:
    """The text as a literal block, whatever backticks it holds; a very long one is cut, and says so."""
    longest_run = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest_run + 1)
    cut = text[:_LONGEST]
    note = [] if cut == text else ["", f"(the first {_LONGEST} of {len(text)} characters; all of it in thought.json)"]
    return [f"{fence}text", cut, fence, *note]
