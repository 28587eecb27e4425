"""Kinds of input for fuzzing.py that a caller writes: pairs, templates, settings, configs, texts, paths."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml

from lit_thought import PairDataModule, PromptTemplate, ThoughtCallback, ThoughtPatch, transmute
from lit_thought.cli import main
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.report.content import gather
from lit_thought.files import check_output_folder
from lit_thought.fit import api
from lit_thought.model import loading
from lit_thought.model.loading import context_window
from lit_thought.prompts.pairs import load_pairs
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import SavedStatistics
from recipes.robustness.fuzzing import Kind, Reached, ending, spoil_some_file
from recipes.robustness.mutations import ODD, spoil_file, spoil_text, spoil_value
from recipes.robustness.tiny import INSTRUCTION, PAIRS, TEXTS, tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


def _write_pairs(suffix: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        pairs = [*PAIRS, {"input": 'a "quoted", cell', "output": "two\nlines", "instruction": "Say it."}]
        file = folder / f"pairs.{suffix}"
        if suffix == "csv":
            text = io.StringIO(newline="")
            table = csv.DictWriter(text, ("input", "output", "instruction"))
            table.writeheader()
            table.writerows(pairs)
            file.write_text(text.getvalue(), encoding="utf-8")
        else:
            lines = "\n".join(map(json.dumps, pairs))
            file.write_text(json.dumps(pairs) if suffix == "json" else lines, encoding="utf-8")

    return write


def _read_pairs(suffix: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        data = PairDataModule(folder / f"pairs.{suffix}", INSTRUCTION, max_new_tokens=4)
        return data.tokenise(TOKENIZER, context_window(MODEL))

    return read


_PROMPTS: list[dict[str, Any]] = [
    {"template": "Q: {input}\nA: {output}\n"},
    {"template": {"text": "{instruction}\nQ: {input}\nA: {output}\n", "separator": "\n"}},
    {"template": {"user": "{input}", "system": "{instruction}", "options": {"enable_thinking": True}}},
    {"template": "chat", "chat_template": TOKENIZER.chat_template},
]


def _write_template(folder: Path) -> None:
    asked = {"instruction": INSTRUCTION, "input": "hot", "output": "cold"}
    (folder / "prompts.json").write_text(json.dumps([{**prompt, **asked} for prompt in _PROMPTS]), encoding="utf-8")


def _spoil_template(folder: Path, draw: Random) -> str:
    """One of the prompts: a value of it, or the characters of its template."""
    file = folder / "prompts.json"
    prompt = draw.choice(json.loads(file.read_text(encoding="utf-8")))
    key = draw.choice([key for key in ("template", "chat_template") if isinstance(prompt.get(key), str)] or [""])
    if key and draw.random() < 0.5:
        change, data = spoil_text(prompt[key].encode(), draw)
        prompt[key] = data.decode("utf-8", "replace")
    else:
        change, prompt = spoil_value(prompt, draw)
    file.write_text(json.dumps([prompt]), encoding="utf-8")
    return change


def _read_template(folder: Path) -> object:
    for prompt in json.loads((folder / "prompts.json").read_text(encoding="utf-8")):
        prompt = prompt if isinstance(prompt, dict) else {}
        value = prompt.get("template")
        template = PromptTemplate.from_dict(value) if isinstance(value, dict) else PromptTemplate.parse(value)
        with mock.patch.object(TOKENIZER, "chat_template", prompt.get("chat_template", TOKENIZER.chat_template)):
            asked = [prompt.get(key) for key in ("instruction", "input", "output")]
            for output in (None, asked[2]):
                template.tokenise(TOKENIZER, asked[0], asked[1], output)
    return None


_SETTINGS: dict[str, Any] = {
    "instruction": INSTRUCTION,
    "pairs": PAIRS,
    "template": "Q: {input}\nA: {output}\n",
    "sites": ["attn_out", "mlp_out"],
    "parts": ["matrix"],
    "blocks": [0, 1],
    "order": "sequential",
    "steps": 1,
    "step_size": 1.0,
    "pairs_per_step": 2,
    "rank": 2,
    "ridge": 0.03,
    "scale": 1.0,
    "preserve": TEXTS,
    "preserve_weight": 1.0,
    "preserve_tokens": 100,
    "answer_weight": 2.0,
    "generate": {"do_sample": True, "top_k": 5},
    "max_new_tokens": 4,
    "batch_size": 2,
    "val_pairs": PAIRS[:1],
    "offload": "auto",
    "memory_budget": 1.0,
    "statistics_dir": None,
    "resume_dir": None,
    "cache_dir": None,
    "store_instruction": True,
    "seed": 0,
}


def _write_settings(folder: Path) -> None:
    (folder / "settings.json").write_text(json.dumps(_SETTINGS), encoding="utf-8")


def _spoil_settings(folder: Path, draw: Random) -> str:
    file = folder / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    key = draw.choice(list(settings))
    change, settings[key] = spoil_value(settings[key], draw)
    file.write_text(json.dumps(settings), encoding="utf-8")
    return change


def _stop(*_: Any, **__: Any) -> Any:
    raise Reached


def _read_settings(folder: Path) -> object:
    return transmute(_stop, None, **json.loads((folder / "settings.json").read_text(encoding="utf-8")), progress=False)


def _write_config(folder: Path) -> None:
    settings = {key: value for key, value in _SETTINGS.items() if key not in ("pairs", "preserve", "val_pairs")}
    (folder / "pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    text = yaml.safe_dump({**settings, "model": "smollm2", "pairs": "pairs.json", "out": "adapter"}, sort_keys=False)
    (folder / "fit.yaml").write_text(text, encoding="utf-8")


def _spoil_config(folder: Path, draw: Random) -> str:
    file = folder / "fit.yaml"
    if draw.random() < 0.4:
        return spoil_file(file, draw)
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if draw.random() < 0.2:
        tags = ["!!python/object/apply:os.system ['true']", "!!binary x", "*none", "&a [*a]", "? [x]", "{{}}"]
        file.write_text(f"{file.read_text(encoding='utf-8')}\nsteps: {draw.choice(tags)}\n", encoding="utf-8")
        return "text: YAML tag"
    key = draw.choice(list(settings))
    change, settings[key] = spoil_value(settings[key], draw)
    file.write_text(json.dumps(settings), encoding="utf-8")
    return change


def _run_command(folder: Path, words: list[str], owner: Any, name: str, stand_in: Any) -> None:
    """The command line, with a function of the library replaced; bad usage ends with status 2 and a message.

    Raises:
        Reached: when the function is called.
        ThoughtError: for bad usage.
    """
    said = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        mock.patch.object(owner, name, stand_in),
    ):
        try:
            main(words)
        except SystemExit as error:
            if error.code == 2 and "error:" in said.getvalue():
                raise ThoughtError(said.getvalue()) from error
            if isinstance(error.__context__, Reached):  # the command takes it for a bug
                raise error.__context__ from None
            raise RuntimeError(f"status {error.code}: {said.getvalue()}") from error


def _read_config(folder: Path) -> object:
    return _run_command(folder, ["fit", "--config", "fit.yaml", "--progress", "false"], loading, "load_model", _stop)


def _write_instruction(folder: Path) -> None:
    (folder / "instruction.json").write_text(json.dumps(INSTRUCTION.strip()), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")


def _spoil_instruction(folder: Path, draw: Random) -> str:
    """What a parser could read as something else, alone, before or after other words."""
    odd = [
        "#",
        "# ",
        "~",
        "null",
        "None",
        "yes",
        "true",
        "0",
        "1e3",
        ".5",
        "2020-01-01",
        ":",
        "a: b",
        "- a",
        "-5",
        "--x",
    ]
    odd += [
        "[a]",
        "{a: 1}",
        "'",
        '"',
        "|",
        ">",
        "&a",
        "*a",
        "!!str x",
        "%",
        "@",
        "`",
        "\\n",
        "\n",
        "\t",
        "\ufeff",
        "é",
        "\u2028",
    ]
    text = draw.choice(["", "", " "]).join(draw.choices([*odd, "Say it", " "], k=draw.choice([1, 1, 2, 3])))
    (folder / "instruction.json").write_text(json.dumps(text), encoding="utf-8")
    return "value: instruction"


def _read_instruction(folder: Path) -> object:
    """The command line: as one word, as two, and from a file, the text that is typed arrives, to the letter."""
    text = json.loads((folder / "instruction.json").read_text(encoding="utf-8"))
    for words in ([f"--instruction={text}"], ["--instruction", text]):
        reached = mock.Mock(side_effect=Reached)
        with contextlib.suppress(Reached):
            _run_command(
                folder, ["fit", "--pairs", "pairs.json", "--out", "adapter", *words], api, "transmute", reached
            )
        if reached.call_args is None or reached.call_args.args[2] != text:
            raise RuntimeError(f"{text!r} arrived as {reached.call_args}")
    return None


def _write_text(folder: Path) -> None:
    (folder / "prose.txt").write_text(TEXTS[0] + "Ünïcode, too.\n", encoding="utf-8")


def _read_text(folder: Path) -> object:
    return text_windows(TOKENIZER, load_texts(folder / "prose.txt", "preserve", "preserve"), 16)


def _write_path(folder: Path) -> None:
    (folder / "path.json").write_text(json.dumps("nothing.json"), encoding="utf-8")


def _spoil_path(folder: Path, draw: Random) -> str:
    odd = [value for value in ODD if isinstance(value, str)]
    pieces = [*odd, "a" * 300, *(f"x.{suffix}" for suffix in ("json", "jsonl", "csv", "safetensors"))]
    pieces += ["..", "/dev/null", "/dev/zero", "-", "\n", "*"]
    path = "/".join(draw.choices(pieces, k=draw.choice([1, 2, 3]))) + draw.choice(["", ".json", ".safetensors"])
    (folder / "path.json").write_text(json.dumps(path), encoding="utf-8")
    return "value: path"


def _read_path(folder: Path) -> object:
    """All readers, each of which must refuse it; where output may go, it need not be refused."""
    path = json.loads((folder / "path.json").read_text(encoding="utf-8"))
    readers: tuple[Callable[[str], object], ...] = (
        load_pairs,
        ThoughtPatch.load,
        SavedStatistics.load,
        Preservation,
        gather,
        lambda path: load_texts(path, "preserve", "preserve"),
        lambda path: ThoughtCallback(output_dir=path, preserve=None),
        lambda path: ThoughtCallback(statistics_dir=path, preserve=None),
        lambda path: UnfinishedFit(path, {}),
        check_output_folder,
    )
    refused = [end for reader in readers if (end := ending(lambda reader=reader: reader(path))) != "read"]
    wrong = [end for end in refused if end != "refused"]
    if wrong:
        raise RuntimeError(wrong[0])
    raise ThoughtError(f"{len(refused)} of {len(readers)} refuse it")


INPUTS: dict[str, Kind] = {
    **{f"pairs, {x}": Kind(_write_pairs(x), _read_pairs(x), spoil_some_file) for x in ("json", "jsonl", "csv")},
    "templates": Kind(_write_template, _read_template, _spoil_template),
    "settings": Kind(_write_settings, _read_settings, _spoil_settings),
    "configs": Kind(_write_config, _read_config, _spoil_config),
    "instruction texts": Kind(_write_instruction, _read_instruction, _spoil_instruction),
    "texts": Kind(_write_text, _read_text, spoil_some_file),
    "paths": Kind(_write_path, _read_path, _spoil_path, valid=False),
}
