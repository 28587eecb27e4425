"""The report: its figures against hand-made records, numpy and scipy; its three forms; what it does with bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from command_line import fit_arguments
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from report_run import (
    ATTACK,
    INSTRUCTION,
    ITEMS,
    LONG_ITEMS,
    LONG_RESULT,
    RESULT,
    SCRIPT,
    make_patch,
    make_run,
    write_evaluation,
)

from lit_thought import ThoughtPatch
from lit_thought.cli import main
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.evaluation.report import gather, render, write_report
from lit_thought.evaluation.report.content import singular_values
from lit_thought.evaluation.report.figures import _three_way
from lit_thought.evaluation.report.render import differences
from lit_thought.patch.results import RUNS, write_result
from lit_thought.patch.verdict import headline, warnings
from lit_thought.solve.factors import Factors
from lit_thought.solve.intervals import perplexity_ratio

OUTPUTS = ("report.html", "report.md", "report.json")


class Page(HTMLParser):
    """The tags of a page, its tables by caption as rows of cells, and its literal blocks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.literal: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._into = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif tag == "pre":
            self.literal.append("")
        elif tag == "small":
            self._rows[-1][-1] += " "
        self._into = {"caption": "caption", "th": "cell", "td": "cell", "pre": "pre"}.get(tag, self._into)

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption] = self._rows
        if tag in ("caption", "th", "td", "pre"):
            self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "caption":
            self._caption += data
        elif self._into == "cell":
            self._rows[-1][-1] += data
        elif self._into == "pre":
            self.literal[-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("written") / "adapter")
    write_report(run)
    return run


# Content


def test_singular_values_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = Factors(torch.randn(4, 9, generator=generator), torch.randn(6, 4, generator=generator))
    wanted = np.linalg.svd((factors.B @ factors.A).double().numpy(), compute_uv=False)[:4]
    assert singular_values(factors) == pytest.approx(wanted, rel=1e-5)


def test_evaluation_figures(written: Path) -> None:
    found = gather(written)["evaluation"]
    rows = {row["key"]: row["runs"] for row in found["table"]}

    def wanted(successes: int, count: int) -> dict[str, Any]:
        bounds = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
        return pytest.approx({"value": successes / count, "low": bounds.low, "high": bounds.high, "count": count})

    assert rows["accuracy"] == {"plain": wanted(1, 4), "instructed": wanted(3, 4), "patched": wanted(3, 4)}
    assert rows["first_token_accuracy"]["patched"] == wanted(4, 4)
    assert rows["fidelity"] == {"plain": wanted(0, 5), "instructed": None, "patched": wanted(2, 5)}
    assert rows["kl"] == {"plain": {"value": 3.25}, "instructed": None, "patched": {"value": 0.0625}}
    assert rows["perplexity"] == {"plain": {"value": 20.0}, "instructed": None, "patched": {"value": 20.25}}
    assert rows["prompt_tokens"]["patched"] == {"value": 6.0}
    value, low, high = perplexity_ratio(**RESULT["perplexity_windows"])
    assert found["perplexity_ratio"] == {"value": 20.25 / 20.0, "low": low, "high": high}
    assert low < value < high
    assert [row["value"] for row in found["differences"]] == [0.0, 0.5, 0.4]
    assert found["differences"][1]["label"] == "accuracy, patched − plain"
    assert (found["pairs"], found["answered"], found["tokens_saved"], found["recovery"]) == (5, 4, 80, 1.0)
    keys = ("input", "reference", "plain", "instructed", "patched")
    assert [tuple(item[key] for key in keys) for item in found["samples"]] == ITEMS
    assert [item["input"] for item in gather(written, samples=2)["evaluation"]["samples"]] == ["hot", "big"]


def test_fit_figures(written: Path) -> None:
    found = gather(written)
    (fit,) = found["fits"]
    assert [(layer["block"], layer["kind"]) for layer in fit["layers"][:3]] == [
        (0, "self_attn.o_proj"),
        (0, "mlp.down_proj"),
        (1, "self_attn.o_proj"),
    ]
    assert [layer["block"] for layer in fit["layers"][::2]] == list(range(12))  # 10 comes after 9
    assert [layer["error_left"] for layer in fit["layers"][:2]] == pytest.approx([0.1 / 0.5, 1.0 / 2.0])
    assert list(fit["seconds"]) == ["prepare", "forward", "solve"]
    assert fit["instructions"] == [INSTRUCTION]
    assert found["spectrum"][3]["layer"] == "model.layers.1.mlp.down_proj"
    assert len(found["spectrum"][3]["values"]) == 3
    assert found["adapter"]["bytes"] == (written / "adapter_model.safetensors").stat().st_size


def test_inputs_that_the_model_wrote_are_told(written: Path) -> None:
    for page in ("report.html", "report.md"):
        assert "Fitted to 30 inputs, 28 of which the model wrote" in (written / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("factor", [1, -0.5])
def test_a_scale_is_told(factor: float, tmp_path: Path) -> None:
    (factor * make_patch(2)).save_adapter(tmp_path / "one")
    write_report(tmp_path / "one")
    for page in ("report.html", "report.md"):
        text = (tmp_path / "one" / page).read_text(encoding="utf-8")
        assert ("The patch is the change that was fitted, times -0.5." in text) == (factor != 1)


def test_summands_are_told_apart(tmp_path: Path) -> None:
    total = make_patch(2, instruction="One.") + 0.5 * make_patch(2, instruction="Two.", diagnostics={})
    total.save_adapter(tmp_path / "sum")
    found = write_report(tmp_path / "sum")
    assert [(fit["instructions"], fit["scale"]) for fit in found["fits"]] == [(["One."], 1.0), (["Two."], 0.5)]
    assert found["adapter"]["rank"] == 6
    html = (tmp_path / "sum" / "report.html").read_text(encoding="utf-8")
    assert "Part 2, times 0.5" in html
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


# The three forms


def test_the_three_forms_have_the_same_figures(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    record = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert record == gather(written)
    lines = (written / "report.md").read_text(encoding="utf-8").splitlines()
    for row, cells in zip(record["evaluation"]["table"], page.tables["Three-way comparison"][1:], strict=True):
        shown = []
        for run in ("plain", "instructed", "patched"):
            cell, digits = row["runs"][run], row["digits"]
            bounds = f" {cell['low']:.2f}–{cell['high']:.2f}" if cell and "low" in cell else ""
            shown.append(f"{cell['value']:.{digits}f}{bounds}" if cell else "–")
        assert cells == [row["label"], *shown]
        bracketed = [re.sub(r" (.+)", r" (\1)", text) for text in shown]
        assert f"| {row['label']} | {' | '.join(bracketed)} |" in lines
    for layer, cells in zip(
        record["fits"][0]["layers"],
        next(rows for caption, rows in page.tables.items() if caption.startswith("Figures by layer"))[1:],
        strict=True,
    ):
        errors = [f"{layer[key]:.3g}" for key in ("error_before", "error_after", "error_left")]
        assert cells[:4] == [layer["layer"], *errors]
        assert "| " + " | ".join([cells[0].replace("_", r"\_"), *cells[1:]]) + " |" in lines
    stages = [["prepare", "0.5 s", "–"], ["forward", "1.0 s", "–"], ["solve", "2.5 s", "30.0 MB"]]
    assert page.tables["By phase"][1:] == stages
    assert "| solve | 2.5 s | 30.0 MB |" in lines
    spectrum = [f"{value:.3g}" for value in record["spectrum"][0]["values"]]
    assert page.tables["Singular values of each changed weight's ΔW"][1][1].split() == spectrum
    assert page.tables["Figures by step"][2][:2] == ["1", "0.65"]


def test_what_a_reader_asks_first_comes_first(written: Path) -> None:
    order = ["Before and after", "By block", "Side effects", "Results", "What was asked", "The fit", "Time and memory"]
    page = (written / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == [*order, "Settings and versions"]
    assert page.index('<dl class="summary">') < page.index("<h2")
    text = (written / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", re.sub(r"`{4}.*?`{4}", "", text, flags=re.S), re.M) == [*order[:-1], "Spectrum"]
    assert text.index("**Accuracy, patched: 0.75**") < text.index("## Before and after")
    table = text.split("|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 5  # a row each, nothing between
    assert all(line.startswith("| ") and line.endswith(" |") for line in table)
    content = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert f"<h1>{escape(content['title'])}</h1>" in page
    layers = [
        layer for layer in content["fits"][0]["layers"] if layer["kind"] == content["fits"][0]["layers"][0]["kind"]
    ]
    left = [layer["error_after"] / layer["error_before"] for layer in layers]
    assert f"| {'▁▂▃▄▅▆▇█'[int(left[0] * 7.99)]}" in text.split("## By block")[1]


def test_text_of_others_is_escaped(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert page.tags["script"] == page.tags["img"] == 0
    assert not page.handlers
    assert page.literal[0] == "\n" + INSTRUCTION  # browsers leave a first line break out
    sample = page.tables["Samples, side by side"][5]
    assert sample[:3] == [ATTACK, "–", SCRIPT]
    assert sample[3] == f"one two three {ATTACK}"  # two is struck through
    assert sample[4] == "one two three"
    text = (written / "report.md").read_text(encoding="utf-8")
    quoted = text.split("````")
    assert INSTRUCTION in quoted[1]
    assert "<" not in quoted[2]
    assert "49" not in re.sub(r"\d+\.\d+|[0-9a-f]{64}", "", text.split("## The fit")[0])  # 7 * 7 was not computed


def test_the_page_needs_nothing_else(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)|@import""", html)
    assert all((link or url).startswith(("data:", "#")) for link, url in links)
    assert "default-src 'none'" in html
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", html))
    assert not colours  # all are the page's variables, light or dark


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")), st.sampled_from([" ", "\n", "  "]))
def test_differences_rebuild_both_texts(text: list[str], reference: list[str], space: str) -> None:
    parts = differences(space.join(text), " ".join(reference))
    words = [(kind, part.split()) for kind, part in parts]
    assert [word for kind, part in words if kind != "delete" for word in part] == text
    if set(text) & set(reference) or not text:
        assert [word for kind, part in words if kind != "insert" for word in part] == reference


def test_differences_of_words() -> None:
    assert differences("the red cat", "the cat sat") == [
        ("equal", "the "),
        ("insert", "red "),
        ("equal", "cat"),
        ("delete", "sat"),
    ]
    assert differences("dog", "cat") == [("insert", "dog")]
    assert differences(" ", "cat") == [("delete", "cat")]
    assert differences("cat\n", " cat") == [("equal", "cat")]


# Long outputs


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("long") / "adapter"
    make_patch(2, diagnostics={"model.layers.0.mlp.down_proj": {"error_before": 2.0, "error_after": 1.0}}).save_adapter(
        run
    )
    write_evaluation(run / "evaluation", long=True)
    write_report(run)
    return run


def test_long_outputs_have_a_headline_of_their_own(long: Path) -> None:
    """The same in page, Markdown, record and card; what is empty is left out, and no words are marked."""
    found = json.loads((long / "report.json").read_text(encoding="utf-8"))["evaluation"]
    assert found["headline"] == headline(LONG_RESULT)
    assert found["warnings"] == list(warnings(LONG_RESULT).values())
    keys = ["checked", "fidelity", "kl", "agreement", "output_kl", "own_kl", "agrees_for", "repetition", "length"]
    rows = {row["key"]: row["runs"] for row in found["table"]}
    assert list(rows) == [*keys, "finished", "prompt_tokens"]
    bounds = scipy.stats.binomtest(1, 2).proportion_ci(method="wilson")
    share = pytest.approx({"value": 0.5, "low": bounds.low, "high": bounds.high, "count": 2})
    assert rows["checked"]["patched"] == rows["finished"]["patched"] == share
    assert rows["own_kl"] == {"plain": None, "instructed": None, "patched": {"value": 1.5}}
    text = (long / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["del"] == 0 == page.tags["ins"]
    assert page.tables["Samples, side by side"][0] == ["input", "plain", "patched", "instructed"]
    assert page.tables["Samples, side by side"][1] == [LONG_ITEMS[0][place] for place in (0, 2, 4, 3)]
    assert "same output as instructed" not in text
    layers = next(rows for caption, rows in page.tables.items() if caption.startswith("Figures by layer"))
    assert layers[0] == ["layer", "error before", "error after", "error left"]
    markdown = (long / "report.md").read_text(encoding="utf-8")
    assert "| input | plain | patched | instructed |\n|---|---|---|---|\n| How do" in markdown
    assert "| layer | error before | error after | error left |\n|---|---:|---:|---:|\n" in markdown
    assert "**Bake" not in markdown
    card = (long / "README.md").read_text(encoding="utf-8")
    note = "KL from 0.400 to 0.060 nats a token along its outputs"
    top = f"**Difference to the instructed model: down by 85 %** ({note}).\n"
    for form in (markdown, card):
        assert form.count(top) == 1
        for sentence in found["warnings"]:
            assert form.count(f"\n**Warning.** {sentence}\n") == 1
    for sentence in found["warnings"]:
        assert text.count(f'<p class="warning"><b>Warning.</b> {sentence}</p>') == 1
    assert "<dt>difference to the instructed model</dt><dd>" in text
    assert "down by 85\u00a0%" in text
    assert "with a reference output" not in text + markdown


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"own_text": []}, "own_text"),
        ({"own_text": {**LONG_RESULT["own_text"], "length": {"instructed": 9.5}}}, "own_text"),
        ({"own_text": {**LONG_RESULT["own_text"], "kl": "1"}}, "own_text"),
        ({"own_text": {key: value for key, value in LONG_RESULT["own_text"].items() if key != "kl"}}, "own_text"),
        ({"own_text": {**LONG_RESULT["own_text"], "finished": {**LONG_RESULT["checked"], "patched": 7}}}, "own_text"),
        ({"checked": {**LONG_RESULT["checked"], "patched": -1}}, "checked"),
        ({"checked": {"patched": 1}}, "checked"),
        ({"own_text": {**LONG_RESULT["own_text"], "loops": [1]}}, "own_text"),
        ({"own_text": {**LONG_RESULT["own_text"], "loops": {**LONG_RESULT["checked"], "patched": 7}}}, "own_text"),
        ({"first_token_accuracy": {**LONG_RESULT["checked"], "patched": 1.5}}, "first_token_accuracy"),
        ({"output_kl": 3}, "output_kl"),
        ({"fidelity": "all"}, "fidelity"),
        ({"fidelity_plain": "all"}, "fidelity_plain"),
    ],
)
def test_damaged_figures_are_refused_by_name(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    make_patch(2).save_adapter(tmp_path / "adapter")
    write_evaluation(tmp_path / "adapter" / "evaluation", long=True, **changes)
    with pytest.raises(ThoughtError, match=f"'evaluation' is damaged: {key} is "):
        gather(tmp_path / "adapter")


# What is missing, and what is wrong


def test_without_an_evaluation_it_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_patch(2).save_adapter(tmp_path / "adapter")
    main(["report", str(tmp_path / "adapter")])
    assert "no evaluation yet" in capsys.readouterr().err
    for name in OUTPUTS[:2]:
        assert "lit-thought evaluate ADAPTER" in (tmp_path / "adapter" / name).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "adapter" / "report.json").read_text())["evaluation"] is None
    assert "## Results" not in re.sub(r"`{4}.*?`{4}", "", (tmp_path / "adapter" / "README.md").read_text(), flags=re.S)


def test_an_adapter_without_provenance(tmp_path: Path) -> None:
    make_patch(2).save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "thought.json").unlink()
    (tmp_path / "adapter" / "README.md").unlink()
    write_evaluation(tmp_path / "elsewhere", accuracy=None, first_token_accuracy=None, perplexity=None)
    found = write_report(tmp_path / "adapter", tmp_path / "elsewhere", tmp_path / "out" / "report")
    assert {path.name for path in (tmp_path / "out" / "report").iterdir()} == set(OUTPUTS)
    assert found["fits"][0]["layers"] == found["fits"][0]["instructions"] == []
    html = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert html.count('class="missing"') >= 4
    assert "## Results" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_names_of_figures_are_escaped_and_what_is_missing_is_left_out(tmp_path: Path) -> None:
    """Of an adapter that somebody else wrote."""
    known = make_patch(2).provenance
    history = [{"step": 1, "<img src=x onerror=alert(1)>": 0.5}]
    known |= {"history": history, "seconds": {"forward": 1.0}, "memory": {"peak": 1e9, "estimated": {"<script>": 3}}}
    ThoughtPatch(make_patch(2).factors, known).save_adapter(tmp_path / "adapter")
    write_report(tmp_path / "adapter")
    page = Page((tmp_path / "adapter" / "report.html").read_text(encoding="utf-8"))
    assert page.tags["script"] == page.tags["img"] == 0
    after = (tmp_path / "adapter" / "report.md").read_text(encoding="utf-8").split("````")[2]  # the instruction
    assert "onerror" in after
    assert "estimated to need" in after
    assert "<" not in after


def test_vectors_alone(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.down_proj"
    figures = {path: {"vector_error_before": 4.0, "vector_error_after": 1.0, "vector_norm": 2.0}}
    patch = ThoughtPatch({}, {"d_in": {path: 5}, "diagnostics": figures}, {path: torch.ones(4)})
    patch.save_adapter(tmp_path / "adapter")
    found = write_report(tmp_path / "adapter")
    assert found["fits"][0]["layers"][0]["error_left"] == 0.25
    assert found["spectrum"] == []


def _change(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        file = run / "evaluation" / name
        file.write_text(change(file.read_text()))

    return spoil


def _of_another(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    write_evaluation(run / "evaluation", adapter="0" * 64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "evaluation" / "items.jsonl").unlink(), r"items\.jsonl"),
        (_change("items.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1])), "outputs of 5 pairs"),
        (_change("items.jsonl", lambda text: text.replace('"It is warm"', "3")), "outputs of 5 pairs"),
        (_change("result.json", lambda text: text.replace('"kl":', '"KL":')), r"lacks \['kl'\]"),
        (_change("result.json", lambda text: text.replace('"kl": {', '"kl": [{}], "was": {')), "is damaged: kl is"),
        (_change("result.json", lambda text: "{"), "cannot be read"),
        (_of_another, "of other weights"),
        (lambda run: (run / "report.json").mkdir(), "is a folder"),
    ],
)
def test_bad_runs_are_refused_and_nothing_is_written(tmp_path: Path, spoil: Any, message: str) -> None:
    run = make_run(tmp_path / "adapter", blocks=2)
    spoil(run)
    before = sorted(path.name for path in run.rglob("*"))
    card = (run / "README.md").read_bytes()
    with pytest.raises(ThoughtError, match=message):
        write_report(run)
    assert sorted(path.name for path in run.rglob("*")) == before
    assert (run / "README.md").read_bytes() == card


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "adapter", blocks=2)
    with pytest.raises(PatchError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ThoughtError, match="evaluation="):
        write_report(run, tmp_path / "nowhere")
    with pytest.raises(ThoughtError, match="samples must be"):
        write_report(run, samples=-1)
    with pytest.raises(ThoughtError, match=r"out=.*is a file"):
        write_report(run, out=run / "README.md")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ThoughtError, match=r"needs matplotlib.*lit-thought\[report\]"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_failure_on_the_way_leaves_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "adapter", blocks=2)
    write_report(run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def fail(content: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "render_markdown", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(run, samples=1)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


# The card, and the command line


def test_the_card_gets_the_figures_once_and_keeps_its_reader_s_edits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "adapter", blocks=2)
    card = run / "README.md"
    plain = card.read_text(encoding="utf-8").replace("\n# ", "\n# My adapter: ", 1)
    card.write_text(plain, encoding="utf-8")
    write_report(run)
    first = card.read_text(encoding="utf-8")
    row = "| accuracy (exact match) | 0.25 (0.05–0.70) | 0.75 (0.30–0.95) | 0.75 (0.30–0.95) |"  # as scipy has it
    assert first.count(row) == 1
    assert first.count("**Accuracy, patched: 0.75** (instructed 0.75, plain 0.25).\n") == 1
    assert re.search(r"\n\nPerplexity of unrelated text × 1\.012 \(0\.973–1\.056\)\.\n", first)
    assert INSTRUCTION in first
    assert first.index(INSTRUCTION) < first.index(row) < first.rindex("\n## Use\n")
    write_report(run)
    assert card.read_text(encoding="utf-8") == first
    shutil.rmtree(run / "evaluation")
    write_report(run)
    assert card.read_text(encoding="utf-8") == plain
    assert ThoughtPatch.load(run).rank == 3  # the folder is an adapter still


def test_fit_evaluate_report(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*fit_arguments(files), f"--val_pairs={files / 'test.json'}"])
    adapter = files / "adapter"
    known = ThoughtPatch.load(adapter).provenance
    assert set(known["seconds"]) >= {"prepare", "preserve", "forward", "statistics", "solve", "validate"}
    assert all(seconds >= 0 for seconds in known["seconds"].values())
    assert known["memory"]["peak"] > 50e6  # Python with torch takes more
    assert known["memory"]["estimated"]["streams"] > 0
    options = ["--max_new_tokens=4", "--progress=false", f"--model={files / 'model'}", f"--pairs={files / 'test.json'}"]
    main(["evaluate", f"--adapter={adapter}", f"--out={adapter / 'evaluation'}", *options])
    main(["report", str(adapter)])
    assert "Wrote report.html" in capsys.readouterr().err
    record = json.loads((adapter / "report.json").read_text(encoding="utf-8"))
    result = json.loads((adapter / "evaluation" / "result.json").read_text(encoding="utf-8"))
    rows = {row["key"]: row["runs"] for row in record["evaluation"]["table"]}
    assert rows["accuracy"]["patched"]["value"] == result["accuracy"]["patched"]
    assert rows["fidelity"]["patched"]["value"] == result["fidelity"]
    assert result["adapter"] == record["adapter"]["sha256"]
    assert record["fits"][0]["steps"][-1]["step"] == 1


def test_the_figure_says_which_run_is_which() -> None:
    """A run that the first row lacks is named where it comes first."""
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {"label": "alike", "runs": {"plain": cell, "instructed": None, "patched": cell}},
        {"label": "finished", "runs": dict.fromkeys(RUNS, cell)},
    ]
    with rc_context({"svg.fonttype": "none"}):
        svg = str(_three_way({"table": rows, "pairs": 3}).svg)
    assert sorted(re.findall(rf">({'|'.join(RUNS)})<", svg)) == sorted(RUNS)


def test_a_result_on_disk_is_json(tmp_path: Path) -> None:
    result = {"kl": {"plain": float("nan"), "patched": float("inf")}, "items": []}
    write_result(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail) == {
        "kl": {"plain": None, "patched": None}
    }
