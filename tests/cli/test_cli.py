"""The command line, as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import DEMONSTRATIONS, INPUTS, fit_arguments
from fits import readable
from models import make_model

from lit_thought import ThoughtPatch
from lit_thought.cli import main
from lit_thought.errors import ThoughtError
from lit_thought.model import loading


def test_fit_then_evaluate(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(fit_arguments(files))
    patch = ThoughtPatch.load(files / "adapter")
    assert patch.rank == 4
    assert patch.provenance["instruction"] == DEMONSTRATIONS
    assert patch.provenance["settings"]["preserve_tokens"] == 300
    # the adapter knows its instruction and template, so that only held-out pairs are needed
    main(
        [
            "evaluate",
            f"--model={files / 'model'}",
            f"--adapter={files / 'adapter'}",
            f"--pairs={files / 'test.json'}",
            f"--out={files / 'result'}",
            "--max_new_tokens=4",
            "--perplexity_interval=null",
            f"--cache_dir={files / 'losses'}",
            "--progress=false",
        ]
    )
    printed = capsys.readouterr().out
    assert "| accuracy (exact match) |" in printed
    result = json.loads((files / "result" / "result.json").read_text())
    assert result["perplexity_tokens"]["measured"] == result["perplexity_tokens"]["text"] > 5000
    (losses,) = (files / "losses").iterdir()
    assert json.loads(losses.read_text())["losses"] == result["perplexity_windows"]["original"]
    assert result["pairs"] == 2
    assert result["prompt_tokens"]["saved"] > 10
    items = [json.loads(line) for line in (files / "result" / "items.jsonl").read_text().splitlines()]
    assert [item["input"] for item in items] == INPUTS[:2]


def test_a_config_file_means_the_same_as_flags(files: Path) -> None:
    main(fit_arguments(files))
    flags = [argument.removeprefix("--").split("=", 1) for argument in fit_arguments(files, "from_file")[1:]]
    config = {name: yaml.safe_load(value) for name, value in flags}
    (files / "recipe.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", f"--config={files / 'recipe.yaml'}"])
    one, two = ThoughtPatch.load(files / "adapter"), ThoughtPatch.load(files / "from_file")
    assert all(
        one.factors[t].A.equal(two.factors[t].A) and one.factors[t].B.equal(two.factors[t].B) for t in one.targets
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--pairs=missing.jsonl", "missing.jsonl"),
        ("--instruction=two of them", "exclude each other"),
        ("--instruction_file=missing.txt", "--instruction_file missing.txt cannot be read"),
        ("--rank=0", "rank must be"),
        ("--template=no field", "{input}"),
        ("--sites=[mlp_middle]", "mlp_middle"),
        ("--dtype=int8", "dtype"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    files: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*fit_arguments(files), change])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lit-thought: error: ")
    assert message in error
    assert not (files / "adapter").exists()


def test_an_existing_folder_is_refused_before_the_model_is_loaded(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "adapter").mkdir()
    (files / "adapter" / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit):
        main(fit_arguments(files))
    error = capsys.readouterr().err
    assert "not empty" in error
    assert "Loading" not in error
    assert (files / "adapter" / "mine.txt").read_text() == "keep"


def test_null_is_nothing_and_no_path_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise ThoughtError("all settings were read")

    monkeypatch.setattr(loading, "load_model", load)
    arguments = ["--instruction=Opposite.", "--preserve=null", "--statistics_dir=null", "--resume_dir=null"]
    (tmp_path / "pairs.jsonl").write_text('{"input": "hot", "output": "cold"}\n')
    with pytest.raises(SystemExit):
        main(["fit", f"--pairs={tmp_path / 'pairs.jsonl'}", f"--out={tmp_path / 'out'}", *arguments])
    assert "all settings were read" in capsys.readouterr().err


def test_a_fit_ends_with_its_verdict(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*fit_arguments(files, "two words"), "--verdict=2"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == (
        f"Talk to it: lit-thought chat '{files / 'two words'}' --model {files / 'model'}"
    )
    assert said.out.startswith("On 2 inputs of the fit itself: accuracy, patched ")
    assert "Unrelated text: perplexity × " in said.out
    assert re.search(r"^Each query saves \d+ of \d+ prompt tokens\.$", said.out, re.M)
    assert re.findall(r"^> (.*)$", said.out, re.M) == INPUTS[-2:]
    main([*fit_arguments(files, "validated"), f"--val_pairs={files / 'test.json'}", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"]["inputs"] == "validation inputs"
    command = ["evaluate", f"--model={files / 'model'}", f"--adapter={files / 'validated'}", "--json"]
    main([*command, f"--pairs={files / 'test.json'}", "--perplexity_interval=0.02"])
    other = json.loads(capsys.readouterr().out)
    assert {**record["verdict"], **other} == {**record["verdict"], "format": 1, "adapter": other["adapter"]}


def test_a_verdict_on_inputs_that_are_written_anew(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readable(make_model("llama").float()).save_pretrained(files / "model")
    arguments = [one for one in fit_arguments(files) if not one.startswith("--pairs")]
    main([*arguments, "--inputs=3", "--verdict=2", "--max_new_tokens=4", "--json"])
    found = json.loads(capsys.readouterr().out)["verdict"]
    fitted = ThoughtPatch.load(files / "adapter").provenance["inputs"]["pairs"]
    assert found["inputs"] == "other inputs, written anew"
    assert found["pairs"] == 2
    assert not {item["input"] for item in found["items"]} & {pair["input"] for pair in fitted}
    sums = [f"--statistics_dir={files / 'sums'}", "--store_instruction=false"]
    for number in range(2):  # the second replaces both folders
        main([*arguments, *sums, "--inputs=3", "--verdict=2", "--max_new_tokens=4", "--json", "--overwrite"])
        found = json.loads(capsys.readouterr().out)["verdict"]
        assert found["inputs"] == "inputs written anew, perhaps as for the fit", number
    main([*arguments, "--inputs=3", "--verdict=0", "--max_new_tokens=4", "--json", "--overwrite"])
    assert json.loads(capsys.readouterr().out)["verdict"] is None


@pytest.mark.parametrize("folder", [None, "half done"])
def test_an_interrupted_fit_says_how_to_go_on(
    folder: str | None, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        if folder is not None:
            (files / folder).mkdir(exist_ok=True)
            (files / folder / "fit.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_thought.fit.api.fit", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([*fit_arguments(files), *([] if folder is None else [f"--resume_dir={files / folder}"])])
    err = capsys.readouterr().err
    assert ("With --resume_dir FOLDER, the same command goes on" in err) == (folder is None)
    assert (f"What was finished is in {files / 'half done'}" in err) == (folder is not None)


def test_no_verdict_is_no_failure(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt and a verdict's outputs do not fit the window; the adapter is written all the same."""
    rows = [{"input": "fox " * 180, "output": "down"}] * 2
    (files / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([*fit_arguments(files, "long"), f"--pairs={files / 'long.jsonl'}", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] is None
    assert "There is no verdict: pairs[0]" in err
    assert (files / "long" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "ADAPTER", "--max_new_tokens=0"],
        ["demo", "ADAPTER", "--max_new_tokens=0", "--port=0"],
        ["evaluate", "ADAPTER", "--pairs=PAIRS", "--max_new_tokens=0"],
        ["evaluate", "ADAPTER", "--pairs=PAIRS", "--perplexity_interval=0"],
        ["chat", "ADAPTER", "--template={input}"],
    ],
)
def test_what_needs_no_model_is_told_before_one_is_loaded(
    words: list[str], files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*fit_arguments(files, "ready"), "--verdict=0", "--overwrite"])
    monkeypatch.setattr(loading, "load_model", lambda *args, **options: pytest.fail("the model is loaded"))
    known = {"ADAPTER": str(files / "ready"), "--pairs=PAIRS": f"--pairs={files / 'test.json'}"}
    with pytest.raises(SystemExit, match="2"):
        main([*(known.get(word, word) for word in words), f"--model={files / 'model'}"])
    assert re.search("error: --(max_new_tokens|perplexity_interval|template)", capsys.readouterr().err)


def test_texts_to_preserve_are_no_place(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "empty").mkdir()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_thought.fit.api.fit", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([*fit_arguments(files, "empty"), "--preserve", "[a text, another]"])
