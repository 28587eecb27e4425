"""The report on the exact theorems, and its command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CORPUS, make_model, make_tokenizer
from theorems import CASES, INSTRUCTION, TEXT, hooks_on, largest, make_any, record, tokens_of, unchanged

from lit_thought.cli import main
from lit_thought.model.blocks import find_blocks
from lit_thought.model.layers import weight_of
from lit_thought.prompts.unrelated import load_texts
from lit_thought.theory import ExactReport, format_report, token_patches, verify_exact
from lit_thought.theory import verify as verify_module


@pytest.mark.parametrize("bos", [False, True], ids=["sink", "bos"])
@pytest.mark.parametrize(("family", "output"), CASES)
def test_both_theorems_hold(family: str, output: str, bos: bool) -> None:
    model = make_any(family)
    with unchanged(model):
        report = verify_exact(model, make_tokenizer(bos=bos), INSTRUCTION, TEXT, output=output)
    assert [block.block for block in report.blocks] == list(range(len(find_blocks(model))))
    for block in report.blocks:
        assert block.patched
        assert block.unreachable == 0
        assert block.alone <= 1e-9
        assert block.sequence <= 1e-9
        assert block.alone_plain > 0.05
        assert block.sequence_plain > 0.1
    assert report.patched.relative <= 1e-9
    assert report.patched.absolute <= 1e-9
    assert report.patched.agreement == 1
    assert abs(report.patched.kl) <= 1e-9
    assert report.plain.relative > 0.1
    assert report.plain.agreement < 1
    assert report.plain.kl > 0.01
    assert report.dtype == "float64"
    assert report.output == output


def test_the_default_output_suits_the_model() -> None:
    tokenizer = make_tokenizer()
    for family, output in (("llama", "vector"), ("gpt2", "vector"), ("gemma3", "norm_scale")):
        assert verify_exact(make_any(family), tokenizer, INSTRUCTION, TEXT, tokens=5).output == output


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_figures_against_others_computed_here(family: str) -> None:
    """Everything that is not an error of rounding, from runs and weights of our own."""
    model, tokenizer = make_any(family), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    bare, wanted = record(model, plain), record(model, instructed)
    report = verify_exact(model, tokenizer, INSTRUCTION, TEXT)
    patches = token_patches(model, tokenizer, INSTRUCTION, TEXT)
    assert report.tokens == plain.shape[1]
    assert report.instruction_tokens == instructed.shape[1] - plain.shape[1]
    for block, module in zip(report.blocks, find_blocks(model), strict=True):
        i = block.block
        target = wanted["o"][i][positions]
        assert block.sequence_plain == pytest.approx(largest(bare["o"][i], target))
        layers = module.firsts.values()
        changes = (
            torch.stack(
                [
                    torch.cat([torch.outer(*patches[i].rank_one(weight_of(layer), x)) for layer in layers]).norm()
                    for x in range(report.tokens)
                ]
            )
            / torch.cat([weight_of(layer) for layer in layers]).norm()
        )
        assert block.weight_change_mean == pytest.approx(changes.mean().item())
        assert block.weight_change_max == pytest.approx(changes.max().item())
        m = wanted["m"][i][positions] - patches[i].delta  # in sequence
        assert block.shift_mean == pytest.approx(float((patches[i].delta.norm(dim=1) / m.norm(dim=1)).mean()))
    got, target = bare["logits"], wanted["logits"][positions]
    assert report.plain.absolute == pytest.approx(float((got - target).abs().max()))
    assert report.plain.relative == pytest.approx(largest(got, target))
    assert report.plain.agreement == float((got.argmax(1) == target.argmax(1)).double().mean())
    p, q = target.softmax(1), got.softmax(1)
    assert report.plain.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))


def test_a_block_alone_unpatched_is_that_block_on_the_instructed_input() -> None:
    model, tokenizer = make_any("llama"), make_tokenizer()
    plain, instructed, positions = tokens_of(tokenizer)
    wanted = record(model, instructed)
    report = verify_exact(model, tokenizer, INSTRUCTION, TEXT)
    for block in find_blocks(model):
        entrance = wanted["entrance"][block.index][positions][None]
        handle = block.module.register_forward_pre_hook(lambda _, given, h=entrance: (h, *given[1:]))
        got = record(model, plain)["o"][block.index]
        handle.remove()
        error = largest(got, wanted["o"][block.index][positions])
        assert report.blocks[block.index].alone_plain == pytest.approx(error)


def test_only_some_blocks() -> None:
    model, tokenizer = make_any("llama"), make_tokenizer()
    report = verify_exact(model, tokenizer, INSTRUCTION, TEXT, blocks=[0, 1])
    last = report.blocks[2]
    assert [block.patched for block in report.blocks] == [True, True, False]
    assert report.blocks[1].sequence <= 1e-9
    assert last.alone == last.alone_plain > 0.05
    assert last.sequence > 0.05
    assert last.weight_change_mean is last.weight_change_max is last.shift_mean is last.unreachable is None
    assert report.patched.relative > 0.05
    assert "patches of 2 of 3 blocks" in format_report(report)
    assert format_report(report).splitlines()[-3].endswith("| – | – | – |")
    assert not report.agrees
    assert format_report(report).splitlines()[-1].startswith("The two runs do not agree: ")


def test_what_no_patch_reaches_is_counted() -> None:
    model, tokenizer = make_any("gemma3"), make_tokenizer()
    weight_of(find_blocks(model)[1].sites["mlp_out"].layer).data[5] = 0
    report = verify_exact(model, tokenizer, INSTRUCTION, TEXT)
    assert [block.unreachable for block in report.blocks] == [0, report.tokens, 0, 0]
    assert report.blocks[1].sequence > 1e-3
    assert f"{report.tokens} patches cannot be exact" in format_report(report)
    assert "cannot be exact" not in format_report(verify_exact(model, tokenizer, INSTRUCTION, TEXT, output="vector"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrower_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    report = verify_exact(make_model("llama").to(dtype), make_tokenizer(), INSTRUCTION, TEXT)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert 0 < report.patched.relative <= tolerance < report.plain.relative


def test_logits_that_overflow_agree_with_nothing() -> None:
    model = make_model("llama")
    model.lm_head.weight.data[3, 3] = math.nan
    report = verify_exact(model, make_tokenizer(), INSTRUCTION, TEXT)
    assert math.isnan(report.patched.absolute)
    assert math.isnan(report.patched.relative)
    assert not report.agrees
    assert "do not agree" in format_report(report)
    assert report.to_dict()["patched"]["relative"] is None


def test_as_json_and_as_a_table() -> None:
    report = verify_exact(make_model("llama"), make_tokenizer(), INSTRUCTION, TEXT)
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["model"] == "LlamaForCausalLM"
    assert stored["patched"]["agreement"] == 1
    assert stored["agrees"] is report.agrees is True
    assert stored["blocks"][2]["sequence"] == report.blocks[2].sequence
    assert report.seconds > 0
    lines = format_report(report).splitlines()
    rows = [line for line in lines if line.startswith("| 2 |")]
    assert len(rows) == 1
    assert f"{report.blocks[2].sequence_plain:.1e}" in rows[0]
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables[:6]} == {4}
    assert {line.count("|") for line in tables[6:]} == {9}
    broken = ExactReport(**{**vars(report), "seconds": math.nan})
    assert broken.to_dict()["seconds"] is None


def test_an_exception_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_any("gemma3").train()
    runs = [0]
    original = verify_module.TokenRuns._run

    def fail_late(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        trace = original(self, *args, **kwargs)
        if runs[0] == 4:  # the first patched run
            assert hooks_on(model) > 0
            raise KeyboardInterrupt
        return trace

    monkeypatch.setattr(verify_module.TokenRuns, "_run", fail_late)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        verify_exact(model, make_tokenizer(), INSTRUCTION, TEXT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in a folder, and a text file."""
    make_model("llama").float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(CORPUS[2], encoding="utf-8")
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", f"--model={folder / 'model'}", "--tokens=20", f"--out={folder / 'report.json'}"])
    printed = capsys.readouterr()
    assert printed.out.startswith("Exact per-token patches of 3 of 3 blocks")
    assert "| top-1 agreement |" in printed.out
    assert "Wrote the report" in printed.err
    report = json.loads((folder / "report.json").read_text())
    assert report["tokens"] == 20
    assert report["dtype"] == "float32"
    assert report["patched"]["agreement"] == 1
    assert report["patched"]["relative"] < 1e-4 < report["plain"]["relative"]
    chunk = len(make_tokenizer()("You are a pirate. Talk like a pirate.\n")["input_ids"])
    assert report["instruction_tokens"] == chunk


def test_the_command_with_texts_of_the_users(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "instruction.txt").write_text("Always answer in French.\n", encoding="utf-8")
    tokenizer = make_tokenizer()
    for flag in (f"--instruction_file={folder / 'instruction.txt'}", "--instruction=Talk. "):
        main(
            [
                "verify", f"--model={folder / 'model'}", flag, f"--text_file={folder / 'text.txt'}", "--output=vector",
                "--dtype=float64", f"--out={folder / 'report.json'}", "--overwrite",
            ]
        )  # fmt: skip
        report = json.loads((folder / "report.json").read_text())
        chunk = "Always answer in French.\n" if "file" in flag else "Talk. "
        assert report["instruction_tokens"] == len(tokenizer(chunk)["input_ids"])
        assert report["tokens"] == len(tokenizer(CORPUS[2])["input_ids"])
        assert report["patched"]["relative"] <= 1e-9


@pytest.mark.parametrize(
    ("flag", "message", "loads"),
    [
        ("--out=.", "is a folder", False),
        ("--text_file=missing.txt", "--text_file missing.txt", False),
        ("--instruction_file=missing.txt", "--instruction_file missing.txt", False),
        ("--instruction= ", "instruction", False),
        ("--tokens=1", "--tokens 1;", False),
        ("--output=norm_scale", "--output norm_scale", True),
        ("--tokens=400", "256 tokens", True),
    ],
)
def test_bad_input_ends_in_one_line(
    folder: Path, flag: str, message: str, loads: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", f"--model={folder / 'model'}", f"--out={folder / 'report.json'}", flag])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.strip().splitlines()[-1].startswith("lit-thought: error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (folder / "report.json").exists()
    assert ("Loading" in captured.err) == loads


def test_verify_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]
    assert len(options) >= 11
    for option in options:
        flag, explanation = re.split(r"\s{2,}", option, maxsplit=1)
        assert not explanation.startswith("(type:"), f"an option without explanation: --{flag}"


@pytest.mark.real_model
def test_smollm2_without_its_instruction_is_smollm2_with_it(smollm2: Any) -> None:
    model, tokenizer = smollm2
    text = load_texts("default", "evaluate", "text")[0]
    with unchanged(model):
        report = verify_exact(model, tokenizer, INSTRUCTION, text, tokens=60)
    assert report.tokens == 60
    assert report.patched.agreement == 1
    assert report.patched.absolute <= 1e-3
    assert max(block.sequence for block in report.blocks) <= 1e-5
    assert max(block.alone for block in report.blocks) <= 1e-5
    assert report.plain.agreement < 0.95
    assert report.plain.absolute > 5
