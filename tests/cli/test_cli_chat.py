"""``lit-thought chat``, from a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import DEMONSTRATIONS, fit_arguments
from system import posix

from lit_thought import ThoughtPatch, load_model
from lit_thought.cli import main


@pytest.fixture
def adapter(files: Path) -> Path:
    main([*fit_arguments(files), "--quiet"])
    return files / "adapter"


def test_a_pipe_gets_plain_text(
    adapter: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\n\n/scale 0\nup\n/sclae 2\n/instruction\n/quit\nnever\n"))
    main(["chat", str(adapter), "--model", str(files / "model"), "--max_new_tokens", "4"])
    out, err = capsys.readouterr()
    assert re.findall(r"^> (.*)$", out, re.M) == ["fox", "up"]
    patch, (model, tokenizer) = ThoughtPatch.load(adapter), load_model(files / "model")
    chat = patch.chat(model, tokenizer, max_new_tokens=4)
    assert str(chat.ask("fox")) in out
    chat.scale = 0
    assert str(chat.ask("up")) in out
    assert "\x1b" not in out
    assert "The patch is off." in err
    assert "/sclae is no command. Did you mean 'scale'?" in err
    assert DEMONSTRATIONS in err


def test_a_pipe_of_another_encoding_is_refused(
    adapter: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as stopped:
        main(["chat", str(adapter), "--model", str(files / "model")])
    assert stopped.value.code == 2
    assert "standard input: expected UTF-8 text" in capsys.readouterr().err


def test_json(adapter: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\n"))
    main(["chat", f"--adapter={adapter}", f"--model={files / 'model'}", "--max_new_tokens=4", "--json"])
    (answers,) = json.loads(capsys.readouterr().out)["answers"]
    assert answers["message"] == "fox"
    assert (
        answers["instructed"]["prompt_tokens"]
        > answers["patched"]["prompt_tokens"]
        == answers["plain"]["prompt_tokens"]
    )


@pytest.mark.slow
def test_a_terminal_shows_three_columns(adapter: Path, files: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lit_thought", "chat", str(adapter), "--model", str(files / "model")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(
        [*command, "--max_new_tokens=4"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 300
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")

    until("> ")
    seen = ""
    os.write(ours, b"fox\n")
    until("> ")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"plain · \d+ tokens .* instructed · \d+ tokens .* patched · \d+ tokens", shown)
    seen = ""
    os.write(ours, b"/off\n")
    until("The patch is off.")
    seen = seen.partition("The patch is off.")[2]
    until("> ")  # what is typed before would be read by the terminal, not by the line's editor
    os.write(ours, b"\x04")
    assert process.wait(timeout=300) == 0
    os.close(ours)


@posix
def test_a_reader_that_has_seen_enough_is_no_error(
    adapter: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\nup\n"))
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main(["chat", str(adapter), "--model", str(files / "model"), "--max_new_tokens", "4"])
        monkeypatch.undo()
    assert "error" not in capsys.readouterr().err


def test_a_blank_instruction_is_refused_before_the_model_is_loaded(
    adapter: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_thought.cli.model.Loading.load", lambda self: pytest.fail("it was loaded"))
    for command in ("chat", "demo"):
        with pytest.raises(SystemExit, match="2"):
            main([command, str(adapter), f"--model={files / 'model'}", "--instruction", " "])
        assert "--instruction must be a text that is not empty" in capsys.readouterr().err
