"""What is typed is what a command gets: texts to the letter, lists in every form, and names with a typing mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub
from huggingface_hub import constants

from lit_thought.cli import COMMANDS, main
from lit_thought.cli.command import _parse
from lit_thought.cli.errors import as_typed
from lit_thought.cli.model import read_instruction
from lit_thought.cli.parser import command_parser
from lit_thought.errors import ThoughtError
from lit_thought.model import loading
from lit_thought.model.source import SMOLLM2_NAME

FIT = ["fit", "--pairs=pairs.jsonl", "--out=new"]
TEXTS = [
    "# Give the opposite",  # what YAML makes nothing of
    "#",
    "~",
    "null",
    "Null",
    "",
    " ",
    "yes",  # a truth value, numbers, a date, a time: jsonargparse#135
    "no",
    "12",
    "1e-3",
    "0x10",
    "1_000",
    "2020-01-01",
    "12:30:00",
    "Answer:",  # a mapping: jsonargparse#262
    "a: b",
    "{a}",
    "{'value': 'test'}",
    "[a, b]",
    "- a",
    "-",
    "-5 degrees",  # a flag: cpython#138950
    "-5",
    "--- a",
    "-> the opposite",
    "a=b",
    "'quoted'",  # jsonargparse#28
    '"quoted"',
    "' '",
    "a # b",
    "ends in blanks  ",
    "\tends in a tab\t",
    "ends in a line\n",
    "\n# two\n\n# lines\n",
    "&anchor",
    "*alias",
    "!tag",
    "%directive",
    "@at",
    "`ticks`",
    "---",
    "...",
    "<<",
    "Give the opposite, --pairs or not",
    "Répondez : « oui » \U0001f642",
]


def values(*words: str) -> dict[str, Any]:
    return _parse(list(words))[1]


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lit-thought: error: ")
    return line


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--instruction", text], [f"--instruction={text}"]):
        for command in (FIT, ["evaluate", "--adapter=a", "--pairs=p"], ["verify"]):
            assert values(*command, *words)["instruction"] == text
    assert values(*FIT, "--template", text, "--instruction", text)["template"] == text
    assert values("push", "a", "me/a", "--message", text)["message"] == text
    with pytest.raises(SystemExit):  # and once more, from what it says that it was
        main([*FIT, "--instruction", text, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["instruction"] == text
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    assert values("fit", f"--config={tmp_path / 'printed.yaml'}")["instruction"] == text


@pytest.mark.parametrize("text", ["#1/", "~", "12", "yes", "-x", "a, b", "a b", "a:", "[a]"])
def test_so_are_names_and_paths(text: str) -> None:
    found = values("evaluate", "--pairs", text, "--adapter", text, "--out", text, "--unrelated", text, "--device", text)
    assert {found[name] for name in ("pairs", "adapter", "out", "unrelated", "device")} == {text}
    found = values(*FIT, "--statistics_dir", text, "--cache_dir", text, "--val_pairs", text)
    assert {found[name] for name in ("statistics_dir", "cache_dir", "val_pairs")} == {text}
    if not text.startswith("["):  # a list of texts
        assert values(*FIT, "--preserve", text)["preserve"] == text


def test_null_is_nothing_where_nothing_is_something() -> None:
    assert values(*FIT, "--preserve=null")["preserve"] is None
    found = values("evaluate", "--pairs=p", "--adapter=a", "--unrelated=null", "--perplexity_interval", "null")
    assert (found["unrelated"], found["perplexity_interval"]) == (None, None)
    found = values(*FIT, "--rank=null", "--statistics_dir=null", "--device=null", "--sites=null", "--blocks", "null")
    assert {found[name] for name in ("rank", "statistics_dir", "device", "sites", "blocks")} == {None}


def test_a_forgotten_value_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--instruction", "--rank", "3"], ["--instruction", "--rank=3"], ["--instruction"]):
        assert "--instruction: expected one argument" in fails([*FIT, *flags], capsys)
    assert "--instruction: expected one argument" in fails(["verify", "--instruction", "-h"], capsys)
    assert "into quotes" in fails([*FIT, "--instruction", "-5", "degrees"], capsys)


def test_a_negative_number_is_a_number() -> None:
    assert values(*FIT, "--scale", "-1e-3", "--seed", "-1")["scale"] == -1e-3


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("yes", "yes"),
        ("12", "12"),
        ("0.50", "0.50"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("~", None),
        ("'null'", "null"),
        ('"~"', "~"),
        ('"# Give"', "# Give"),
        ('""', ""),
        ("|\n  # two\n  # lines", "# two\n# lines\n"),
        ("Give # the opposite", "Give"),  # as YAML has it
    ],
)
def test_a_text_in_a_config(line: str, text: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"instruction: {line}\n", encoding="utf-8")
    assert values(*FIT, f"--config={tmp_path / 'a.yaml'}")["instruction"] == text


@pytest.mark.parametrize("line", ["instruction: # Give", "instruction:", "sites:", "generate: {top_k: }"])
def test_an_empty_value_in_a_config_is_refused(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(f"# of a fit\n{line}\n", encoding="utf-8")
    said = fails([*FIT, f"--config={tmp_path / 'a.yaml'}"], capsys)
    assert re.search(r"no value here.*quotes.*line 2", said)


def test_numbers_and_switches_in_a_config_are_such(tmp_path: Path) -> None:
    lines = "rank: 8\nridge: 1e-3\nscale: 1\nstep_size: .5\nquiet: yes\nprogress: false\noffload: true\nseed: 1_000\n"
    lines += "blocks: [0, 1]\ngenerate: {do_sample: yes, top_k: 3, temperature: 0.7, bad: no, eos: ~}\n"
    (tmp_path / "a.yaml").write_text(lines, encoding="utf-8")
    found = values(*FIT, f"--config={tmp_path / 'a.yaml'}")
    assert (found["rank"], found["ridge"], found["scale"], found["step_size"]) == (8, 1e-3, 1.0, 0.5)
    assert (found["quiet"], found["progress"], found["offload"], found["seed"]) == (True, False, True, 1000)
    assert found["blocks"] == [0, 1]
    assert found["generate"] == {"do_sample": True, "top_k": 3, "temperature": 0.7, "bad": False, "eos": None}


def test_a_mark_before_a_file_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfGive the opposite.\n")
    assert read_instruction(None, str(tmp_path / "a.txt")) == "Give the opposite.\n"


@pytest.mark.parametrize(
    ("flag", "text", "warned"),
    [
        ("instruction", r"Q: hot\nA: cold", True),
        ("template", r"{input}\n{output}", True),
        ("instruction", "a path\\name\nof two lines", False),
        ("instruction", "Q: hot\nA: cold", False),
    ],
)
def test_a_backslash_and_an_n_are_no_newline(
    flag: str,
    text: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--pairs=missing.jsonl", "--out=new", "--instruction=x", f"--{flag}={text}"])
    said = capsys.readouterr()
    assert (rf"Warning: --{flag} holds a backslash and an n" in said.err) == (r"$'…\n'" in said.err) == warned
    assert said.out == ""


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--sites", "attn_out"], ["attn_out"]),
        (["--sites=attn_out"], ["attn_out"]),
        (["--sites", "attn_out", "mlp_out"], ["attn_out", "mlp_out"]),
        (["--sites", "attn_out,mlp_out"], ["attn_out", "mlp_out"]),
        (["--sites=attn_out,mlp_out"], ["attn_out", "mlp_out"]),
        (["--sites", "attn_out,", "mlp_out"], ["attn_out", "mlp_out"]),  # corso#1145
        (["--sites", "attn_out mlp_out"], ["attn_out", "mlp_out"]),
        (["--sites", "[attn_out, mlp_out]"], ["attn_out", "mlp_out"]),
        (["--sites", "[attn_out,", "mlp_out]"], ["attn_out", "mlp_out"]),  # as a shell splits it
        (["--sites", '["attn_out"]'], ["attn_out"]),
        (["--sites+=attn_out", "--sites+", "mlp_out"], ["attn_out", "mlp_out"]),
        (["--sites", "attn_out", "mlp_out", "--rank", "3"], ["attn_out", "mlp_out"]),
        (["--parts", "matrix", "vector"], ["matrix", "vector"]),
        (["--blocks", "0", "1", "2"], [0, 1, 2]),
        (["--blocks", "0,1", "2"], [0, 1, 2]),
        (["--blocks=7"], [7]),
        (["--blocks", "[0, 1]"], [0, 1]),
        (["--blocks", "-1"], [-1]),  # which the settings refuse
        (["--blocks", "auto"], "auto"),
        (["--blocks=null"], None),
        (["--sites", "null"], None),
        (["--preserve", "[a text, another]"], ["a text", "another"]),
    ],
)
def test_a_list_in_every_form(words: list[str], found: Any) -> None:
    assert values(*FIT, *words)[words[0].strip("-").partition("=")[0].rstrip("+")] == found


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["en"], "en"),
        (["no"], "no"),  # Norwegian: huggingface_hub#797
        (["en", "no"], ["en", "no"]),
        (["en,no"], ["en", "no"]),
        (["[en, no]"], ["en", "no"]),
        (["null"], None),
    ],
)
def test_a_language_or_several(words: list[str], found: Any) -> None:
    assert values("push", "a", "me/a", "--language", *words)["language"] == found


def test_a_list_in_a_config(tmp_path: Path) -> None:
    for line, found in (("attn_out", ["attn_out"]), ("attn_out, mlp_out", ["attn_out", "mlp_out"]), ("[a]", ["a"])):
        (tmp_path / "a.yaml").write_text(f"sites: {line}\n", encoding="utf-8")
        assert values(*FIT, f"--config={tmp_path / 'a.yaml'}")["sites"] == found


def test_an_empty_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sites: expected one argument" in fails([*FIT, "--sites", "--rank=3"], capsys)
    assert "--sites must name one or more" in fails([*FIT, "--sites="], capsys)
    assert "--blocks must be indices" in fails([*FIT, "--blocks", "-1"], capsys)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["fit", "--pair", "x"], "--pairs"),
        (["fit", "--pair=x"], "--pairs"),
        (["fit", "-pairs", "x"], "--pairs"),
        ([*FIT, "--instrction", "x"], "--instruction"),
        ([*FIT, "--instruction-file", "x"], "--instruction_file"),
        ([*FIT, "--RANK=3"], "--rank"),
        ([*FIT, "--rank=3", "--overwrit"], "--overwrite"),
        (["inspect", "--hel"], "--help"),  # clypi#173
        (["inspect", "--confg=a.yaml"], "--config"),
        (["--versoin"], "--version"),
        (["ft"], "fit"),
        (["Fit"], "fit"),
        (["evalute", "--adapter=a"], "evaluate"),
        (["--config=unknown.yaml", "inspect"], "tokens"),
        (["inspect", "--config=unknown.yaml"], "tokens"),
    ],
)
def test_a_name_with_a_typing_mistake(
    words: list[str],
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unknown.yaml").write_text("tokns: 3\n" if words[0] == "inspect" else "inspect: {tokns: 3}\n")
    assert f" Did you mean {nearest}? See lit-thought" in fails(words, capsys)


def test_what_is_near_nothing_suggests_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no flag --bogus. See" in fails([*FIT, "--bogus=1"], capsys)
    assert "'xyzzy' is no command (choose from fit, " in fails(["xyzzy"], capsys)
    assert "required: --out. See" in fails(["fit"], capsys)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        (SMOLLM2_NAME, "'smollm2' is HuggingFaceTB/SmolLM2-135M-Instruct, without a download."),
        (
            "HuggingFaceTB/SmolLM2-135M-Instrcut",
            "'smollm2' is HuggingFaceTB/SmolLM2-135M-Instruct, without a download.",
        ),
        ("owner/smal-model", "Did you mean 'owner/small-model'?"),
        ("nobody/nothing", "so the hub is not asked. Check the spelling"),
    ],
)
def test_offline_a_name_is_looked_up_in_the_cache_before_torch_is_there(name: str, near: str, tmp_path: Path) -> None:
    (tmp_path / "models--owner--small-model").mkdir()
    code = (
        "import sys, lit_thought.cli as c\n"
        f"try: c.main(['inspect', {name!r}])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "2 False False\n"
    assert f"--model {name} is no directory here, and is not in the cache" in done.stderr
    assert near in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm", "smollm-2", "smol-lm2"])
def test_a_typing_mistake_in_the_models_name_asks_nobody(name: str, hub: Hub) -> None:
    with pytest.raises(ThoughtError, match=r"is no model\. Did you mean 'smollm2'\?"):
        loading.load_model(name)
    assert hub.requests == []


def test_one_request_tells_that_there_is_no_such_model(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model nobody/nothing is no directory here, and no model on the hub" in fails(
        ["inspect", "nobody/nothing"], capsys
    )
    assert len(hub.sent("nobody/nothing")) == 1


def test_without_a_network_it_is_told_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "nobody/nothing"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "the hub cannot be reached" in said
    assert "Retrying" not in said
    with pytest.raises(ThoughtError, match=r"tokenizer='nobody/words'.*cannot be reached"):
        loading.load_model(tokenizer="nobody/words")


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("path='new' exists. Choose another path, or pass overwrite=True.", "--out new exists. Choose another path, or "
         "pass --overwrite."),
        ("instruction must be a text. Pass instruction=..., or", "--instruction must be a text. Pass --instruction …, "
         "or"),
        ("instruction and instruction_file exclude each other", "--instruction and --instruction_file exclude each "
         "other"),
        ("parts=['matrix', 'vector'] with sites=['mlp_out']: at", "--parts matrix vector with --sites mlp_out: at"),
        ("name='a b' is a file", "--model 'a b' is a file"),
        ("name is empty; expected", "--model is empty; expected"),
        ("rank=8 has no use. Leave rank out.", "--rank 8 has no use. Leave --rank out."),
        ("Pass preserve_weight=0, or prior_of.", "Pass --preserve_weight 0, or prior_of."),
        ('order="teacher-forced" does, progress=False too', "--order teacher-forced does, --progress false too"),
        ("pairs: the file has rank_one=True", "--pairs: the file has rank_one=True"),
        ("rank is what rank does; x.rank=3, f(rank=3)", "--rank is what rank does; x.rank=3, f(rank=3)"),
        ("patch has vectors; model types", "patch has vectors; model types"),
        ("state a larger memory_budget, or cache_dir.", "state a larger --memory_budget, or --cache_dir."),
        ("in 'batch_size' of x.batch_size, batch_size(", "in 'batch_size' of x.batch_size, batch_size("),
        ("expected one of ['a', 'b']; got None. Use None", "expected one of a, b; got none. Use null"),
    ],
)  # fmt: skip
def test_errors_speak_of_flags(message: str, typed: str) -> None:
    assert as_typed(message, values(*FIT)) == typed
    assert as_typed(message, ()) == message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*FIT, "--kind=poem"], "--kind: expected demonstrations, system or document; got poem. See"),
        ([*FIT, "--kind=documnt"], "--kind: expected demonstrations, system or document; got documnt. Did you"),
        ([*FIT, "--inputs=many"], "--inputs: expected a whole number or auto; got many. See"),
        ([*FIT, "--rank=x"], "--rank: expected a number, usual, auto or null; got x. See"),
        ([*FIT, "--steps=1.5"], "--steps: expected a whole number; got 1.5. See"),
        ([*FIT, "--blocks", "1", "two"], "--blocks: expected auto or whole numbers; got 1 two. See"),
        ([*FIT, "--offload=dsk"], "--offload: expected auto, device, cpu, disk, true or false; got dsk. Did you"),
        ([*FIT, "--overwrite=perhaps"], "--overwrite: expected true or false; got perhaps. See"),
        ([*FIT, "--generate=3"], "--generate: expected options and their values, as in --generate.top_k 3; got 3. See"),
        (["export", "a", "--out=b", "--format=ggf"], "or control-vector; got ggf. Did you mean gguf? See"),
        (["inspect", "--dtype=float"], "--dtype: expected float32, bfloat16, float16, float64 or auto; got float."),
        (["inspect", "--config=types.yaml"], "--tokens: expected a whole number; got many. See"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_told_in_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("types.yaml").write_text("tokens: many\n", encoding="utf-8")
    line = fails(words, capsys)
    assert said in line
    assert "Union" not in line
    assert "<class" not in line


def test_every_flag_can_say_what_it_expects(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        for action in command_parser(command)._actions:
            if "str" not in str(getattr(action, "_typehint", str)):  # a text can be anything
                line = fails([name, f"--{action.dest}=%"], capsys)
                assert re.search(rf"error: --{action.dest}: expected [^<]+; got %\. See", line), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--pairs=pairs.jsonl", "--out=full"], "--out full is a folder that is not empty. Choose another path, "
         "or pass --overwrite to"),
        (["fit", "--pairs=pairs.jsonl", "--out=new"], "Pass --instruction …, or give each pair its own."),
        (["fit", "--pairs=none.jsonl", "--out=new", "--instruction=x"], "error: --pairs: expected a file"),
        (["fit", "--pairs=pairs.jsonl", "--out=new", "--instruction=x", "--instruction_file=y"],
         "error: --instruction and --instruction_file exclude each other"),
        ([*FIT, "--instruction=x", "--sites=mlp_out", "--parts", "matrix", "vector"],
         "error: --parts matrix vector with --sites mlp_out: at mlp_out"),
        (["verify", "--out=full"], "error: --out full is a folder; expected a file"),
        (["preserve", "smollm2", "--out=taken.safetensors"],
         "--out taken.safetensors exists. Choose another path, or pass --overwrite."),
        (["inspect", "full/nothing/model"], "error: --model full/nothing/model looks like a directory"),
        (["inspect", "full"], "error: --model full is a directory without a config.json"),
        (["inspect", "smollm2", "--revision=main"], "error: --revision main applies to hub models"),
        (["inspect", "smollm2", "--rank=0"], "error: --rank must be a whole number of 1 or more"),
        (["inspect", "--quiet", "--verbose"], "error: --quiet and --verbose exclude each other"),
        ([*FIT, "--instruction=x", "--sites=attn_ou"], "--sites must name one or more of attn_out, mlp_in, mlp_out, "
         "each once; got attn_ou. Did you mean 'attn_out'?"),
        ([*FIT, "--instruction=x", "--template=chatt"], "'chat-user' or a text with the fields {input} and {output}; "
         "got 'chatt'. Did you mean 'chat'?"),
        ([*FIT, "--instruction=x", "--rank=0"], "got 0. Use null for full rank."),
        ([*FIT, "--instruction=x", "--val_pairs=no.json"], "error: --val_pairs: expected a file, but there is none"),
        ([*FIT, "--instruction=x", "--statistics_dir=full"], "error: --statistics_dir full is a folder"),
        ([*FIT, "--instruction=x", "--statistics_dir=new/sums"],
         "--statistics_dir and --out must be folders of their own"),
        ([*FIT, "--instruction=x", "--resume_dir=new"], "--resume_dir and --out must be folders of their own"),
        (["fit", "--out=new"], "error: --instruction must be a text that is not empty, for which the model writes "
         "inputs; got none."),
        (["evaluate", "nothing", "--pairs=pairs.jsonl"], "error: --adapter nothing is not a folder; expected"),
        (["evaluate", "full", "--pairs=pairs.jsonl", "--out=full"], "or pass --overwrite to"),
        *[([*command, f"--out={out}", "--overwrite"],
           f"--out {out} with --overwrite would delete the adapter 'full/deep'.")
          for command in (["evaluate", "full/deep", "--pairs=pairs.jsonl"], ["export", "full/deep"],
                          ["export", "full/deep", "--format=merged"]) for out in ("full", "full/deep")],
        *[([*command, f"--out={out}", "--overwrite", "--model=base/model"],
           f"--out {out} with --overwrite would delete the model 'base/model'.")
          for command in ([*FIT, "--instruction=x"], ["evaluate", "full", "--pairs=pairs.jsonl"],
                          ["export", "full", "--format=merged"], ["solve", "full"]) for out in ("base", "base/model")],
        *[([*command, "--out=data", "--overwrite"], f"--out data with --overwrite would delete the {what} 'data/")
          for command, what in (
              (["fit", "--pairs=data/pairs.jsonl", "--instruction=x"], "pairs"),
              (["fit", "--instruction_file=data/x.txt"], "instruction file"),
              ([*FIT[:2], "--instruction=x", "--preserve=data/x.txt"], "preserve"),
              (["fit", "--config=data/fit.yaml"], "config"),
              (["evaluate", "full", "--pairs=pairs.jsonl", "--unrelated=data/x.txt"], "unrelated"),
              (["evaluate", "full", "--pairs=pairs.jsonl", "--check_schema=data/s.json"], "check schema"),
              (["solve", "full", "--preserve=data/x.txt"], "preserve"),
              (["evaluate", "full", "--pairs=data/pairs.jsonl"], "pairs"))],
        (["solve", "full", "--out=full", "--overwrite"], "would delete the statistics 'full'."),
        (["fit", "--pairs=data/pairs.jsonl", "--instruction=x", "--out=new", "--statistics_dir=data", "--overwrite"],
         "error: --statistics_dir data with --overwrite would delete the pairs 'data/"),
        ([*FIT, "--instruction=x", "--cache_dir=new/cache"], "--cache_dir and --out must be folders of their own"),
        (["evaluate", "full", "--pairs=pairs.jsonl", "--out=new", "--cache_dir=new"],
         "--cache_dir and --out must be folders of their own"),
        (["solve", "full", "--out=new", "--dtype=bfloat16"], "error: --dtype bfloat16 has no use without --model"),
        (["solve", "full", "--out=new", "--trust_remote_code"], "error: --trust_remote_code"),
        (["export", "full", "--format=gguf", "--out=new.gguf", "--trust_remote_code"],
         "has no use for the format gguf"),
        (["evaluate", "full", "--pairs=pairs.jsonl", "--samples=-1"], "error: --samples must be a whole number of 0"),
        (["report", "nothing"], "error: --adapter nothing is not a folder; expected"),
        (["solve", "nothing", "--out=new"], "error: --statistics nothing is not a folder; expected"),
        (["solve", "full", "--out=new", "--device=foo"], "error: --device foo is no device; expected"),
        (["push", "nothing", "me/x"], "error: --adapter nothing is not a folder; expected"),
    ],
)  # fmt: skip
def test_failing_commands_speak_of_flags(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    Path("full/deep").mkdir()
    Path("full/deep/file").touch()
    Path("base/model").mkdir(parents=True)
    Path("base/model/config.json").touch()
    Path("data").mkdir()
    for name in ("pairs.jsonl", "x.txt"):
        Path("data", name).write_text('{"input": "hot", "output": "cold"}\n')
    Path("data/fit.yaml").write_text("pairs: pairs.jsonl\ninstruction: x\n")
    Path("data/s.json").write_text("{}")
    Path("taken.safetensors").touch()
    Path("pairs.jsonl").write_text('{"input": "hot", "output": "cold"}\n')
    line = fails(words, capsys)
    assert said in line
    flags = [action.dest for action in command_parser(COMMANDS[words[0]])._actions]
    assert not re.search(rf"\b({'|'.join(flags)})=", line)


def test_what_is_typed_wins_over_a_config_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 8\nridge: 0.5\nout: old\noverwrite: true\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("ridge: 0.7\n", encoding="utf-8")
    config = ["--config", str(tmp_path / "a.yaml")]
    for words in (["--out", "new", "--rank=3", *config], [*config, "--out", "new", "--rank=3"]):
        found = values("fit", *words, f"--config={tmp_path / 'b.yaml'}")
        assert (found["out"], found["rank"], found["ridge"], found["overwrite"]) == ("new", 3, 0.7, True)
    (tmp_path / "m.yaml").write_text("model: ./other\n", encoding="utf-8")
    assert values("inspect", "./mine", f"--config={tmp_path / 'm.yaml'}")["model"] == "./mine"


def test_numbers_in_lists_of_options_are_such(tmp_path: Path) -> None:
    wanted = {"suppress_tokens": [3, 4], "bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[8, 9], -2.5]]}
    (tmp_path / "a.yaml").write_text(f"generate: {json.dumps(wanted)}\n", encoding="utf-8")
    assert values(*FIT, f"--config={tmp_path / 'a.yaml'}")["generate"] == wanted
    flags = [f"--generate.{name}={json.dumps(value)}" for name, value in wanted.items()]
    assert values(*FIT, *flags)["generate"] == wanted
    assert values(*FIT, '--preserve=["1984 was a year", "7"]')["preserve"] == ["1984 was a year", "7"]
    assert values(*FIT, '--generate.names=["a1", "-", "b"]')["generate"] == {"names": ["a1", "-", "b"]}


@pytest.mark.parametrize("line", ["rank: 8\nridge: 1\nrank: 64", "generate: {top_k: 3, top_k: 4}"])
def test_a_key_that_comes_twice_in_a_config_is_refused(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(f"{line}\n", encoding="utf-8")
    said = fails([*FIT, f"--config={tmp_path / 'a.yaml'}"], capsys)
    assert re.search(r"'(rank|top_k)' stands here twice; keep one of them", said)
