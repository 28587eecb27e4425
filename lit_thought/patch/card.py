"""The README.md of an adapter folder, written from the patch's provenance, with the header that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCardData, RepoCard

from lit_thought.errors import ThoughtError
from lit_thought.files import is_own_file
from lit_thought.model.source import place_and_file
from lit_thought.patch.change import Change
from lit_thought.patch.display import escaped, title
from lit_thought.patch.provenance import beneath, is_hub_id, public_name, summands
from lit_thought.prompts.chat import DEFAULT_OPTIONS
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate

__all__ = [
    "CARD",
    "fenced",
    "flat",
    "for_hub",
    "interval",
    "model_card",
    "number",
    "read_card",
    "with_metadata",
    "with_results",
]

CARD = "README.md"
_LONGEST = 4000
_BEGIN, _END = "<!-- results, from lit-thought report -->", "<!-- end of results -->"
_FENCE = re.compile(r"`{3,}")
_INDEX = "lit_thought adapter"
"""The name of our entry of a card's model index, until the adapter's repository has one."""
_NO_BASE, _FOLDER = "the base model", "this folder"
_USE = "## Use"
_BASE_LINE = "base = {!r}"
_BASE_TAG = "base_model:adapter:"
_MODEL = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
"""A model on the hub, those of its early days, without an owner, among them."""
_SHORT, _QUESTION = 600, 200
"""Characters of an instruction that is not folded away, and of the question that is asked."""
_PEFT_LINE = 'model = PeftModel.from_pretrained(model, "{}")'
_LOAD_LINE = 'With lit_thought, removable without a trace: `with ThoughtPatch.{}("{}").applied(model): ...`'


def read_card(folder: Path) -> str | None:
    """The card in an adapter folder; None where there is none.

    Raises:
        ThoughtError: when it is no text.
    """
    file = folder / CARD
    try:
        return file.read_text(encoding="utf-8") if is_own_file(file) else None
    except ValueError as error:
        raise ThoughtError(f"{CARD} in {folder.name!r} is no UTF-8 text ({error}). Delete it.") from error


def model_card(patch: Change) -> str:
    """Markdown with the hub's YAML header: what the adapter does, how to use it, and, folded away, how it was made. No
    licence is claimed: it depends on the base model's.

    Source:
        https://huggingface.co/docs/hub/model-cards for the keys of the header.
    """
    known = patch.provenance
    every = summands(known)
    name, file = _base(known)
    on_hub = is_hub_id(name)
    header = ModelCardData(
        base_model=name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=_tags(name if on_hub else None),
    )
    base = f"`{name}`" if name else _NO_BASE
    stands_in = "an instruction" if len(every) == 1 else f"{len(every)} instructions"
    lines = ["---", header.to_yaml(), "---", "", f"# {escaped(title(known))}", ""]
    lines += [
        f"A LoRA adapter with which {base} answers as if {stands_in} stood in the prompt, and does not need "
        f"{'it' if len(every) == 1 else 'them'} there: prompt it as below, without. Solved for in closed form by "
        "lit_thought, with no gradient training.",
        "",
    ]
    for summand in every:
        lines += _instruction(summand)
    if len(every) == 1 and every[0].get("scale") not in (None, 1):
        lines += [f"It is the change that was fitted, times {every[0]['scale']:g}.", ""]
    if file is not None:
        lines += [
            f"The base that it was fitted on is what the GGUF file `{file}` holds: quantised weights, unpacked. With "
            f"other weights of {base}, such as those before quantisation, figures differ.",
            "",
        ]
    if patch.vectors:
        lines += [
            f"It also adds {len(patch.vectors)} thought vectors to the outputs of layers, as PEFT's `lora_bias`. PEFT "
            "reads this; vLLM and llama.cpp refuse the adapter. PEFT can merge it only where the base layers have "
            "biases (GPT-2); otherwise (Llama, Qwen) `merge_and_unload` raises an error: keep the adapter unmerged.",
            "",
        ]
    if needed := beneath(known):
        lines += [
            f"It was made on top of {len(needed)} other patch{'es' if len(needed) > 1 else ''} ("
            f"{', '.join(digest[:12] for digest in needed)}) and means nothing without: load it beside these, or share "
            "their sum.",
            "",
        ]
    lines += [_USE, "", "```python", *_example(known, name if on_hub else _NO_BASE, file), "```", ""]
    lines += [_LOAD_LINE.format("load", _FOLDER), ""]
    lines += ["<details>", "<summary>How it was made</summary>", ""]
    lines += [f"Rank {patch.rank}, {len(patch.factors)} weights changed, {patch.num_parameters:,} parameters.", ""]
    for number, summand in enumerate(every, start=1):
        if len(every) > 1:
            lines += [f"### Part {number}, times {summand.get('scale', 1.0):g}", ""]
        lines += _record(summand)
    if cut := known.get("truncated"):
        lines += [f"Truncated to rank {cut['rank']}; relative error {cut['relative_error']:.2e}.", ""]
    lines += ["`thought.json` holds the whole record.", "", "</details>", ""]
    return "\n".join(lines)


def _base(known: Mapping[str, Any]) -> tuple[str, str | None]:
    """The base model's public name, and the GGUF file that its weights were unpacked from."""
    name = public_name(str(known.get("base_model") or known.get("model") or ""))
    place, file = place_and_file(name)
    return place, file or known.get("gguf_file") or (name if name.endswith(".gguf") else None)


def _tags(base: str | None) -> list[str]:
    """As PEFT writes them, and our own."""
    return [*([] if base is None else [_BASE_TAG + base]), "lora", "transformers", "lit_thought", "thought-patch"]


def _example(known: Mapping[str, Any], base: str, file: str | None) -> list[str]:
    """Python from loading to the answer of one question, which stands in the prompt as in the fit."""
    summand = summands(known)[0]
    written = (summand.get("inputs") or {}).get("pairs")
    first = written[0] if isinstance(written, list) and written else {}
    question = first.get("input") if isinstance(first, Mapping) else None
    question = question if isinstance(question, str) and 0 < len(question.strip()) <= _QUESTION else "Hello"
    kept = summand.get("template") or DEFAULT_TEMPLATE
    try:
        template = PromptTemplate(kept) if isinstance(kept, str) else PromptTemplate.from_dict(kept)
    except ThoughtError:  # of whoever wrote the record
        template = PromptTemplate()
    prompt, options = template.plain(question), ""
    recorded = str(known.get("base_model") or known.get("model"))  # the embedded model's file is not where it leads
    of_file = f", gguf_file={file!r}" if file is not None and file in recorded else ""
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        _BASE_LINE.format(base),
        f"tokenizer = AutoTokenizer.from_pretrained(base{of_file})",
        f"model = AutoModelForCausalLM.from_pretrained(base{of_file})",
        _PEFT_LINE.format(_FOLDER),
        "",
    ]
    if isinstance(prompt, str):
        lines += [f"prompt = {prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']
        options = "" if template.stop is None else f", stop_strings={template.stop!r}, tokenizer=tokenizer"
    else:
        asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        asked |= {**DEFAULT_OPTIONS, **template.options}
        lines += [
            f"messages = {prompt!r}",
            f"options = {asked!r}",
            "inputs = tokenizer.apply_chat_template(messages, **options)",
        ]
    return [
        *lines,
        f"output = model.generate(**inputs, max_new_tokens=64, do_sample=False{options})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def with_results(card: str, evaluation: Mapping[str, Any] | None) -> str:
    """The card with a section of results, in place of the one it has, and with its figures in the header's model
    index; without an evaluation there is neither.

    Args:
        card: Markdown that :func:`model_card` wrote, edited or not.
        evaluation: see :func:`~lit_thought.patch.results.three_way`.

    Raises:
        ThoughtError: if the card's header cannot be read.
    """
    known = _model_index(card)
    index = [entry for entry in known if entry.get("name") != _INDEX]
    if evaluation is not None:
        index.append(_index_entry(evaluation))
    lines = (card if index == known else with_metadata(card, {"model-index": index or None})).split("\n")
    marks = [i for i in _outside_fences(lines) if lines[i] in (_BEGIN, _END)]
    if [lines[i] for i in marks[:2]] == [_BEGIN, _END]:
        place = marks[0]
        end = marks[1] + 1
        del lines[place : end + (lines[end : end + 1] == [""])]  # and the blank line after it, where there is one
    else:
        place = next((i for i in _outside_fences(lines) if lines[i] == _USE), len(lines))
    section = [] if evaluation is None else [_BEGIN, *_results(evaluation), _END, ""]
    return "\n".join(lines[:place] + section + lines[place:])


def with_metadata(card: str, entries: Mapping[str, Any]) -> str:
    """The card with these entries in its YAML header; one that is None is taken out. The others stay as they are.

    Raises:
        ThoughtError: if the header cannot be read.
    """
    parsed = _parsed(card)
    known = parsed.data.to_dict()
    data = {key: value for key, value in {**known, **entries}.items() if value is not None}
    if data == known:
        return card
    parsed.data = CardData(**data)
    return str(parsed.content) if data else parsed.text


def for_hub(card: str, repo_id: str, base_model: str | None = None, entries: Mapping[str, Any] | None = None) -> str:
    """The card as it stands in a repository, whose name takes the place of the folder's.

    Args:
        card: Markdown that :func:`model_card` wrote, edited or not.
        repo_id: ``owner/name``.
        base_model: hub id of the base model, in the place of what the card says; when left out, and the card says a
            folder of this machine, as PEFT writes it, that is taken out.
        entries: more entries of the header, such as ``license``; those that are None leave the card's own.

    Raises:
        ThoughtError: if the card's header cannot be read.
    """
    place = {
        _PEFT_LINE.format(_FOLDER): _PEFT_LINE.format(repo_id),
        _LOAD_LINE.format("load", _FOLDER): _LOAD_LINE.format("from_pretrained", repo_id),
    }
    given = {key: value for key, value in (entries or {}).items() if value is not None}
    header = _parsed(card).data.to_dict()
    theirs = header.get("base_model")
    if base_model is None and isinstance(theirs, str) and not _MODEL.fullmatch(theirs):
        name = public_name(theirs)  # of a snapshot in the hub's cache, its hub id
        base_model = name if is_hub_id(name) else ""
    if base_model is not None:
        tags = [tag for tag in header.get("tags") or [] if not str(tag).startswith(_BASE_TAG)]
        given |= {"base_model": None, "base_model_relation": None, "tags": tags or None}
    if base_model:
        place[_BASE_LINE.format(_NO_BASE)] = _BASE_LINE.format(base_model)
        tags = [_BASE_TAG + base_model, *tags]
        given |= {"base_model": base_model, "base_model_relation": "adapter", "tags": tags}
    if index := _model_index(card):
        name = repo_id.partition("/")[2]
        given["model-index"] = [{**own, "name": name} if own.get("name") == _INDEX else own for own in index]
    return with_metadata("\n".join(place.get(line, line) for line in card.split("\n")), given)


def _parsed(card: str) -> RepoCard:
    if not card.lstrip().startswith("---"):
        card = f"---\n\n---\n{card}"  # without a header the hub's library warns
    try:
        return RepoCard(card)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise ThoughtError(f"{CARD}: its YAML header cannot be read ({cause}). Correct or delete it.") from error


def _model_index(card: str) -> list[dict[str, Any]]:
    """The entries of the card's model index; of anything else there, none."""
    index = _parsed(card).data.get("model-index")
    return index if isinstance(index, list) and all(isinstance(entry, dict) for entry in index) else []


def _index_entry(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The patched model's figures, as the hub's model index has them.

    Source:
        https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    figures = [(row["key"], row["label"], row["runs"]["patched"]) for row in evaluation["table"]]
    figures = [figure for figure in figures if figure[0] != "prompt_tokens"]
    figures.append(
        ("perplexity_ratio", "perplexity of unrelated text, patched / plain", evaluation["perplexity_ratio"])
    )
    metrics = [
        {"type": key, "value": float(f"{cell['value']:.6g}"), "name": label}
        for key, label, cell in figures
        if cell is not None
    ]
    dataset = {"name": f"{evaluation['pairs']} held-out pairs", "type": "held-out-pairs"}
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
    return {"name": _INDEX, "results": [result]}


def number(value: float | None, digits: int = 2) -> str:
    """A figure of an evaluation with as many decimals."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(cell: Mapping[str, float] | None, digits: int = 2) -> str:
    """The bounds of a figure's confidence interval, or nothing."""
    return "" if not cell or "low" not in cell else f"{cell['low']:.{digits}f}–{cell['high']:.{digits}f}"


def _results(evaluation: Mapping[str, Any]) -> list[str]:
    """A table of the figures that a reader asks for first."""
    lines = ["## Results", ""]
    if (top := evaluation.get("headline")) is not None:
        note = f" ({top['note']})" if top["note"] else ""
        lines += [f"**{top['label'].capitalize()}: {top['value']}**{note}.", ""]
    lines += [f"On {evaluation['pairs']} held-out pairs, with 95 % intervals:", ""]
    lines += ["| | plain | instructed | patched |", "|---|---:|---:|---:|"]
    for row in evaluation["table"]:
        cells = (_figure(row["runs"][run], row["digits"]) for run in ("plain", "instructed", "patched"))
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    ratio = evaluation["perplexity_ratio"]
    lines += ["", *([f"Perplexity of unrelated text × {_figure(ratio, 3)}.", ""] if ratio is not None else [])]
    return lines + [line for sentence in evaluation.get("warnings", ()) for line in (f"**Warning.** {sentence}", "")]


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


def _instruction(known: Mapping[str, Any]) -> list[str]:
    """What the adapter stands in for, folded away where it is long."""
    instruction = known.get("instruction")
    if instruction:
        text = str(instruction)
        shown = [*fenced(text), ""]
        if len(text) <= _SHORT:
            return shown
        return [
            "<details>",
            f"<summary>The instruction, {len(text):,} characters</summary>",
            "",
            *shown,
            "</details>",
            "",
        ]
    if known.get("instruction_hash"):
        return ["The adapter keeps no more than a hash of the instruction.", ""]
    return []


def _record(known: Mapping[str, Any]) -> list[str]:
    """Template, figures, settings and versions of one fit."""
    lines: list[str] = []
    if known.get("template"):
        template = known["template"]
        text = template if isinstance(template, str) else json.dumps(template, indent=2, ensure_ascii=False)
        lines += ["Prompt template:", "", *fenced(text), ""]
    settings, diagnostics = known.get("settings"), known.get("diagnostics")
    if isinstance(diagnostics, Mapping) and diagnostics and all(isinstance(v, Mapping) for v in diagnostics.values()):
        lines += ["Figures of the fit, by layer:", "", *_by_layer(diagnostics), ""]
        diagnostics = None
    for heading, table in (("Settings", settings), ("Figures of the fit", diagnostics)):
        rows = list(_rows(table)) if isinstance(table, Mapping) else []
        if rows:
            lines += [f"{heading}:", "", "| | |", "|---|---|", *rows, ""]
    origin = {key: known[key] for key in ("date", "versions", "fingerprint") if known.get(key)}
    if origin:
        lines += ["| | |", "|---|---|", *_rows(origin), ""]
    return lines


def _by_layer(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row a layer and one column a figure that tells how good its patch is; the rest stays in thought.json."""
    columns = ("error_before", "error_after", "effective_rank", "condition", "truncation_loss")
    lines = [f"| layer | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for layer, figures in diagnostics.items():
        cells = (f"{figures[c]:.3g}" if isinstance(figures.get(c), (int, float)) else "" for c in columns)
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its key; a nested table's keys are joined by dots."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(table: Mapping[str, Any]) -> Iterator[str]:
    """One row per value; long lists stay in thought.json."""
    for key, value in flat(table):
        if not isinstance(value, list) or len(value) <= 8:
            shown = " ".join((f"{value:.4g}" if isinstance(value, float) else str(value)).split())
            if len(shown) <= 200:
                escaped = shown.replace("\\", "\\\\").replace("|", "\\|")
                yield f"| {key} | {escaped} |"


def fenced(text: str) -> list[str]:
    """The text as a literal block, whatever backticks it holds; a very long one is cut, and says so."""
    longest_run = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest_run + 1)
    cut = text[:_LONGEST]
    note = [] if cut == text else ["", f"(the first {_LONGEST} of {len(text)} characters; all of it in thought.json)"]
    return [f"{fence}text", cut, fence, *note]
