"""The flags of ``lit-thought``: help, common flags, the settings of a fit, completion in the shell."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import lit_thought
from lit_thought.cli import COMMANDS, main
from lit_thought.cli.command import _POSITIONAL
from lit_thought.cli.errors import EXIT_CODES
from lit_thought.cli.output import Result
from lit_thought.cli.parser import call, command_parser
from lit_thought.cli.words import positional
from lit_thought.errors import ThoughtError
from lit_thought.settings import FitSettings

COMMON = ("config", "json", "quiet", "verbose", "traceback")


def parsed(command: str, *flags: str) -> dict[str, Any]:
    return dict(vars(command_parser(COMMANDS[command]).parse_args(list(flags))))


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_and_gives_an_example(name: str) -> None:
    text = command_parser(COMMANDS[name]).format_help()
    assert re.search(rf"^Example: lit-thought {name} ", text, flags=re.MULTILINE)
    options = text.split("options:")[1].split("\n  --")[1:]
    flags = {}
    for option in options:
        flag, explanation = re.split(r"\s{2,}", option, maxsplit=1)
        assert not explanation.startswith("(type:"), f"a flag without explanation: --{flag}"
        flags[re.split(r"[ ,]", flag)[0]] = explanation
    assert set(COMMON) <= flags.keys()
    assert not re.search(r":\w+:`|\bNone\b", text), "a terminal has no references, and a flag's None is null"


def test_examples_can_be_parsed() -> None:
    for command in COMMANDS.values():
        line = re.search(r"Example: lit-thought (.*)", inspect.getdoc(command) or "")
        assert line is not None
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line[1])]
        command_parser(command).parse_args(positional(words, _POSITIONAL)[1:])


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("fit", "lit-thought fit --out OUT [flags]"),
        ("push", "lit-thought push ADAPTER REPO_ID [flags]"),
        ("inspect", "lit-thought inspect [MODEL] [flags]"),
        ("evaluate", "lit-thought evaluate ADAPTER --pairs PAIRS [flags]"),
    ],
)
def test_usage_says_what_may_stand_by_place(name: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert capsys.readouterr().out.splitlines()[0] == f"usage: {usage}"


def test_the_top_says_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  lit-thought {name} " in text
    assert dict(re.findall(r"^  (\d+) +(.*)$", text, flags=re.MULTILINE)) == {
        str(code): meaning for code, meaning in EXIT_CODES.items()
    }
    assert {0, 1, 2, 70, 130} == EXIT_CODES.keys()


def test_version_names_what_results_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    packages = ("torch", "transformers", "peft", "lightning")
    assert lines == [f"lit-thought {lit_thought.__version__}", *(f"{name} {version(name)}" for name in packages)]


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--json"], True),
        (["--json", "true"], True),
        (["--json=true"], True),
        (["--json=false"], False),
        (["--json", "--tokens=3"], True),
        ([], False),
    ],
)
def test_a_switch_needs_no_value(flags: list[str], value: bool) -> None:
    assert parsed("inspect", *flags)["json"] is value


def test_switches_of_a_command_need_none_either() -> None:
    found = parsed("solve", "--statistics=s", "--out=o", "--approximate", "--overwrite=false")
    assert (found["approximate"], found["overwrite"]) == (True, False)


def test_words_after_the_command_have_a_place() -> None:
    places = {"push": ("adapter", "repo_id"), "report": ("adapter",)}
    assert positional(["push", "a", "me/a", "--private"], places) == [
        "push",
        "--adapter=a",
        "--repo_id=me/a",
        "--private",
    ]
    assert positional(["push", "a", "--repo_id=b"], places) == ["push", "--adapter=a", "--repo_id=b"]
    assert positional(["report", "--adapter=a", "b"], places) == ["report", "--adapter=a", "b"]
    assert positional(["fit", "a"], places) == ["fit", "a"]
    assert positional([], places) == []


def test_values_go_where_they_belong() -> None:
    seen: dict[str, Any] = {}

    def command(pairs: str, *, loading: Any, settings: Any) -> Any:
        seen.update(pairs=pairs, loading=loading, settings=settings)

    flags = parsed("inspect", "--model=smollm2", "--trust_remote_code")
    kept = ("model", "dtype", "device", "revision", "gguf_file", "quantization", "trust_remote_code")
    settings = FitSettings(rank=3).options()
    call(command, {"config": None, "pairs": "p", **settings, **{name: flags[name] for name in kept}})
    assert (seen["pairs"], seen["settings"]) == ("p", settings)
    assert (seen["loading"].model, seen["loading"].trust_remote_code, seen["loading"].dtype) == ("smollm2", True, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "not provided. See lit-thought --help."),
        (["nothing"], "). See lit-thought --help."),
        (["fit", "--bogus=1"], "--bogus"),
        (["fit", "--out=o"], "pairs"),
        (["inspect", "--tokens=many"], "tokens"),
        (["inspect", "--quant=8bit"], "--quant"),  # no abbreviations, which a later flag could make ambiguous
        (["inspect", "--config=missing.yaml"], "missing.yaml"),
        (["inspect", "--config=unknown.yaml"], "bogus"),
        (["inspect", "--config=bytes.yaml"], "UTF-8"),
        (["inspect", "--quiet", "--verbose"], "--quiet and --verbose"),
    ],
)
def test_bad_usage_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unknown.yaml").write_text("bogus: 1\n")
    Path("bytes.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"lit-thought: error: [^\n]+\n", said.err)
    assert message in said.err


def test_a_config_may_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("subcommand: solve\nsolve: {statistics: sums, out: a.yaml, quiet: true}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--config=a.yaml"])
    assert stop.value.code == 2
    assert "--out a.yaml is a file; expected a folder" in capsys.readouterr().err


def test_no_parser_imports_torch() -> None:
    code = (
        "import sys, lit_thought.cli as c, lit_thought.cli.parser as p\n"
        "for command in c.COMMANDS.values(): p.command_parser(command).format_help()\n"
        "print([name for name in ('torch', 'transformers', 'lightning', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- completion ---------------------------------------------------------------------------------------------------


def completions(line: str, folder: Path, start: int = 1) -> set[str]:
    """What the shell is told, the way that it asks: variables, and the answer on descriptor 8."""
    pytest.importorskip("argcomplete")
    asking = {"_ARGCOMPLETE": str(start), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    asking |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asking |= {"PYTHONPATH": str(Path(lit_thought.__file__).parent.parent)}
    command = f"{sys.executable} -m lit_thought 8>&1 9>&2 1>/dev/null"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **asking}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n"))


@pytest.mark.skipif(os.name == "nt", reason="a shell of its own")
def test_the_shell_completes(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert completions("lit-thought ", tmp_path) >= COMMANDS.keys()
    assert completions("lit-thought export antonym/ --format ", tmp_path) == {
        "peft",
        "gguf",
        "merged",
        "control-vector",
    }
    assert completions("lit-thought fit --pairs ", tmp_path) == {"pairs.jsonl"}
    assert completions("python -m lit_thought solve --over", tmp_path, start=3) == {"--overwrite"}
    assert completions("lit-thought fit --template chat", tmp_path) == {"chat", "chat-empty", "chat-user"}
    assert completions("lit-thought fit --sites ", tmp_path) == {"attn_out", "mlp_in", "mlp_out"}


@pytest.mark.skipif(os.name == "nt", reason="a shell of its own")
def test_the_shell_knows_models_and_words_with_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--owner--small-model").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--owner--rows").mkdir()
    assert completions("lit-thought inspect ", tmp_path) == {"smollm2", "owner/small-model", "hub/"}
    assert completions("lit-thought fit --model ow", tmp_path) == {"owner/small-model"}
    assert completions("lit-thought report h", tmp_path) == {"hub/"}
    assert completions("lit-thought inspect smollm2 --dtype b", tmp_path) == {"bfloat16"}


def test_the_script_is_marked_for_argcomplete() -> None:
    source = Path(sys.modules["lit_thought.cli"].__file__ or "").read_text(encoding="utf-8")
    assert "PYTHON_ARGCOMPLETE_OK" in source[:1024]


def test_a_config_beside_the_outputs_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without an output, and where a command has no statistics_dir."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "c.yaml").touch()

    def command(out: str | None = None, overwrite: bool = False) -> Result:
        return Result({"out": out})

    for out in ("old", "new", None):
        found = call(command, {"config": ["c.yaml"], "out": out, "overwrite": True})
        assert found.values == {"out": out}
    with pytest.raises(ThoughtError, match="out='~nobody-here/x' cannot be looked up"):
        call(command, {"config": ["c.yaml"], "out": "~nobody-here/x", "overwrite": True})
    (tmp_path / "old" / "c.yaml").touch()
    with pytest.raises(ThoughtError, match="would delete the config"):
        call(command, {"config": ["c.yaml", "old/c.yaml"], "out": "old", "overwrite": True})
