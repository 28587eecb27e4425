"""Every code block of README.md, recipes/*.md and the site's own pages is run, or at least read, as a reader would; so
is each ``lit-thought`` line between words there, and in the help.

Python runs as it stands, on a tiny model in the place of the named one; only README.md's runs on the embedded model
itself. ``lit-thought`` and ``torchrun`` lines run with small settings added. Other programs are in :data:`READ`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from patches import make_vectors, uneven
from peft import PeftModel
from transformers import AutoModelForCausalLM
from written import Written

import lit_thought
from lit_thought import ThoughtPatch
from lit_thought.cli import COMMANDS, main
from lit_thought.inputs import pen
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *ROOT.glob("recipes/*.md"), *ROOT.glob("recipes/site/pages/**/*.md"))
}
MODELS = ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m")
SMALL = {
    "fit": ["--model=base", "--preserve_tokens=300", "--max_new_tokens=3", "--progress=false"],
    "chat": ["--model=base", "--max_new_tokens=3"],
    "evaluate": ["--model=base", "--max_new_tokens=3", "--progress=false"],
    "inputs": ["--model=base", "--progress=false"],
    "preserve": ["--preserve_tokens=300", "--progress=false"],
    "verify": ["--model=base", "--tokens=20"],
}
"""What is added to a command's line."""

INLINE = re.compile(r"`(lit-thought\s[a-z]+\s[^`]*)`")
"""A command between words: run where it is whole, that is names what it works on, in the pages' names of files."""

NOT_RUN = {"demo", "push"}
"""Commands whose lines are only checked against the options that there are: they need a hub, or serve until Ctrl-C."""

READ = {"curl", "llama-server", "mkdocs", "mypy", "pip", "python", "ruff", "vllm"}
"""Programs whose lines are only read: they need a server, or .ci/run or another test has them run. ``python`` runs
recipes (test_recipes.py), pytest, and llama.cpp's converter."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[list[str]]:
    """The lines of a page's shell blocks as words, joined at backslashes, apart at ``&&``, without comments."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def with_tiny_model(text: str) -> str:
    for name in MODELS:
        text = text.replace(f'"{name}"', '"base"')
    return text


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages name: models, adapters, pairs, texts."""
    folder = tmp_path_factory.mktemp("material")
    model = make_model("llama", torch.bfloat16).float()
    model.save_pretrained(folder / "base")
    make_tokenizer(chat=True).save_pretrained(folder / "base")
    for seed, name in ((1, "antonym"), (5, "pirate")):
        patch = uneven(model, seed)
        known = {**patch.provenance, "template": PromptTemplate(DEFAULT_TEMPLATE).to_dict()}
        ThoughtPatch(patch.factors, known).save_adapter(folder / name)
    vectors = {path: value for path, value in make_vectors(model).items() if re.search(r"[12]\.mlp", path)}
    known = {**uneven(model).provenance, "d_in": dict.fromkeys(vectors, 48)}
    ThoughtPatch({}, known, vectors).save_adapter(folder / "cats")
    (folder / "instruction.txt").write_text("Q: tall\nA: short\n", encoding="utf-8")
    (folder / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    words = ("hot", "big", "up", "good", "fox", "dog", "brown", "quick")
    rows = [{"input": word, "output": "down"} for word in words]
    for name, some in (("pairs.jsonl", rows), ("test.jsonl", rows[:2])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _words_for_tiny_models(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """About the document of the tutorial."""
    if "smollm2" not in request.fixturenames:
        monkeypatch.setattr(pen, "generate", Written("Orrin"))


@pytest.fixture
def place(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of it, as the current folder."""
    shutil.copytree(material, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(material.with_name("kept")))
    return tmp_path / "here"


def test_blocks_are_in_languages_that_are_run() -> None:
    assert len(PAGES) > 15
    for page, text in PAGES.items():
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert set(fences) <= {"python", "sh", ""}, page
        assert len(blocks(page, "python")) + len(blocks(page, "sh")) == len(fences) / 2, page


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "README.md"])
def test_python(page: str, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(with_tiny_model(block), page, "exec"), names)
    if page == "recipes/serving.md":
        assert {"antonym", "pirate"} == set(names["model"].peft_config)
    elif page.endswith("resume.md"):
        assert ThoughtPatch.load("both").rank == 8
    elif page.endswith("theory.md"):
        assert Path("steering.gguf").is_file()
    elif page.endswith("secret_instruction.md"):
        written = "".join(path.read_text("utf-8") for path in Path("secret").iterdir() if path.suffix != ".safetensors")
        assert "Heron" not in written


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_shell(page: str, place: Path) -> None:
    for words in commands(page):
        if words[0] == "lit-thought":
            run_ours(words[1:])
        elif words[0] == "torchrun":
            run_script(page, words)
        else:
            read(words)


def lines_in_text() -> dict[str, list[str]]:
    """The examples of the help, and the pages' lines between words that can be run as they stand."""
    found = {}
    for name, command in COMMANDS.items():
        for line in re.findall(r"^ *Example: (.*)$", command.__doc__ or "", re.MULTILINE):
            words = shlex.split(line)
            found[f"{name} --help"] = words[words.index("lit-thought") :]
    for page, text in PAGES.items():
        for line in INLINE.findall(text):
            words = shlex.split(line)
            if words[1] in COMMANDS and "--out" in line and not re.search("…|[A-Z]{4}", line):
                found[f"{page}: {' '.join(words[:2])}"] = words
    return found


@pytest.fixture(scope="module")
def fitted(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The material, with what one fit as in the help wrote of it: an adapter, and its sums."""
    folder = tmp_path_factory.mktemp("fitted") / "here"
    shutil.copytree(material, folder, ignore=shutil.ignore_patterns("antonym"))
    with pytest.MonkeyPatch.context() as patching:
        patching.chdir(folder)
        patching.setenv("LIT_THOUGHT_CACHE", str(material.with_name("kept")))
        words = next(words for name, words in lines_in_text().items() if name == "fit --help")
        run_ours([*words[1:], "--statistics_dir", "sums"])
    return folder


@pytest.mark.parametrize("name", lines_in_text())
def test_lines_between_words(name: str, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = lines_in_text()[name][1:]
    shutil.copytree(fitted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(fitted.parents[1] / "kept"))
    if words[0] == "fit":
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    if words[0] == "report":
        pytest.importorskip("matplotlib")
    run_ours(words)


def test_the_lines_between_words_are_those() -> None:
    page = "recipes/site/pages/command_line/index.md"
    assert {f"{name} --help" for name in COMMANDS} | {f"{page}: lit-thought solve"} <= lines_in_text().keys()


def test_a_control_vector_needs_a_fit_of_vectors(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted)
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(fitted.parents[1] / "kept"))
    export = ["export", "--format", "control-vector", "--model", "base", "--out", str(tmp_path / "a.gguf")]
    with pytest.raises(SystemExit):
        main([*export, "--adapter", "antonym"])
    said = capsys.readouterr().err
    assert "Loading" not in said
    advice = re.search(r"lit-thought (fit --sites .* --blocks 1 2) …, all blocks but 0", said)
    assert advice is not None
    run_ours(
        [*advice[1].split(), *["--pairs", "pairs.jsonl", "--instruction", "x", "--out"], str(tmp_path / "vectors")]
    )
    main([*export, "--adapter", str(tmp_path / "vectors")])
    assert (tmp_path / "a.gguf").is_file()


def run_ours(words: list[str]) -> None:
    """A line of ours, in this process; it must do what it says, and write what it names."""
    words = ["base" if word in MODELS else word for word in words]
    if words[0] in NOT_RUN:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code in (0, None)
        return
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(sys, "stdin", StringIO("How do I bake bread?\n"))  # what chat is asked
        main([*words, *SMALL.get(words[0], [])])
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()


def run_script(page: str, words: list[str]) -> None:
    """The page's Python block under the name that the line gives it."""
    (block,) = blocks(page, "python")
    Path(words[-1]).write_text(with_tiny_model(block), encoding="utf-8")
    environment = {**os.environ, "PET_STANDALONE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr or "MEMBER: 2/2" in done.stderr
    assert ThoughtPatch.load("antonym").rank == 16


def read(words: list[str]) -> None:
    """What can be said of a line without running it."""
    assert words[0] in READ
    if words[0] == "curl":
        json.loads(words[words.index("-d") + 1])
    if words[0] == "python" and "recipes" in words[1] + words[2]:
        script = words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py"
        assert (ROOT / script).is_file()
        assert words[-2] == "--config"
        assert (ROOT / words[-1]).is_file()
    if words[0] == "mkdocs":
        assert (ROOT / words[words.index("-f") + 1]).is_file()


def test_the_lines_that_are_only_read_are_those() -> None:
    programs = {words[0] for page in PAGES for words in commands(page)}
    assert programs == {"lit-thought", "torchrun"} | READ
    exported = [words for words in commands("recipes/serving.md") if words[:2] == ["lit-thought", "export"]]
    assert {words[words.index("--format") + 1] for words in exported} == {"peft", "gguf", "merged", "control-vector"}


@pytest.mark.real_model
def test_the_python_of_the_readme(smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model of all tests in the place of one loaded anew, and fitted to fewer and shorter inputs."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(lit_thought, "load_model", lambda name: (asked.append(name), smollm2)[1])
    monkeypatch.setattr(lit_thought, "transmute", partial(lit_thought.transmute, inputs=16, max_new_tokens=12))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, dtype: (asked.append(f"{name}, {dtype}"), smollm2[0])[1]
    )
    before = {name: value.clone() for name, value in smollm2[0].state_dict().items()}
    job, chat, peft = blocks("README.md", "python")
    names: dict[str, Any] = {}
    exec(job, names)
    assert names["patch"].provenance["inputs"]["kind"] == "system"
    assert (tmp_path / "pirate" / "adapter_config.json").is_file()
    exec(chat, names)
    assert names["answers"].patched.text != names["answers"].plain.text
    exec(peft, names)  # last, since PEFT changes the model in place
    assert isinstance(names["served"], PeftModel)
    names["served"].unload()
    assert asked == ["smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct, float32"]
    assert all(before[name].equal(value) for name, value in smollm2[0].state_dict().items())


def test_the_readme_quotes_what_was_written() -> None:
    """In its table of three answers; an answer that goes on is cut at an ellipsis."""
    (quoted,) = re.findall(r"^\| chunk, question .*\n\|[-|]+\n((?:\|.*\n)+)", PAGES["README.md"], re.MULTILINE)
    items = {}
    for study, name in (("words", "antonym"), ("system", "pirate")):
        record = json.loads((ROOT / f"recipes/results/instruction_alone_{study}.json").read_text("utf-8"))
        (run,) = (run for run in record["runs"] if (run["name"], run["fit"], run["seed"]) == (name, "written", 0))
        items |= {item["input"]: item for item in run["items"]}
    for row in quoted.splitlines():
        question, *answers = (cell.strip() for cell in row.strip("|").split(" | "))
        (item,) = (item for asked, item in items.items() if question.replace("*", "").endswith(f" {asked}"))
        for run, answer in zip(("plain", "instructed", "patched"), answers, strict=True):
            assert item[run].startswith(answer.removesuffix(" …"))
            assert answer.endswith(" …") or item[run] == answer
    assert len(quoted.splitlines()) >= 2
