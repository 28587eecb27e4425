"""Fits of tiny models on random text for test_families.py, what they leave behind, and the table of its results."""

from __future__ import annotations

import datetime
import math
import random
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, HYBRID
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, __version__, transmute
from lit_thought.files import atomic_file
from lit_thought.model.blocks import JOINT, Block
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.settings import SITES

TEMPLATE = "{input}{output}"


def random_text(generator: random.Random, length: int) -> str:
    """Letters drawn at random, which the tests' tokenizers make random tokens of."""
    return "".join(generator.choices(string.ascii_letters, k=length))


@dataclass(frozen=True)
class Task:
    """A random chunk and random pairs."""

    instruction: str
    pairs: tuple[dict[str, str], ...]

    @classmethod
    def random(cls, pairs: int, length: int, seed: int = 0) -> Task:
        """``pairs`` inputs of ``length`` letters with an output of a space and two."""
        generator = random.Random(seed)
        drawn = [(random_text(generator, length), " " + random_text(generator, 2)) for _ in range(pairs)]
        return cls(random_text(generator, 14) + "\n", tuple({"input": x, "output": y} for x, y in drawn))

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedPair]:
        """The token ids of both runs."""
        template = PromptTemplate.parse(TEMPLATE)
        return [template.tokenise(tokenizer, self.instruction, pair["input"], pair["output"]) for pair in self.pairs]

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> ThoughtPatch:
        """A patch for this task alone: no preservation, and all tokens weigh the same."""
        return transmute(
            *(model, tokenizer, self.instruction, self.pairs, TEMPLATE),
            **{"preserve": None, "answer_weight": 1, "progress": False, **settings},
        )


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, prompts: Sequence[TokenisedPair], instructed: bool) -> Tensor:
    """What the model predicts at the compared tokens, (n, vocabulary), float64; a whole pass for each prompt."""
    found = []
    for prompt in prompts:
        ids = prompt.instructed_ids if instructed else prompt.plain_ids
        rows = prompt.instructed_positions if instructed else prompt.plain_positions
        logits = model(torch.tensor([ids], device=model.device)).logits[0]
        found.append(logits[list(rows)].double().log_softmax(-1))
    return torch.cat(found)


def mean_kl(wanted: Tensor, found: Tensor) -> float:
    """KL(wanted ‖ found), nats a token, from log probabilities."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def notes(blocks: Sequence[Block]) -> str:
    """What is special about how these blocks write to the residual stream."""
    writers = [part for block in blocks for site in block.sites.values() for part in site.projections]
    multipliers = sorted({round(writer.multiplier, 4) for writer in writers} - {1.0})
    experts = [block for block in blocks if block.experts]
    shared = [block for block in experts if "mlp_out" in block.sites]
    found = {
        "a norm after the projections": any(writer.norm is not None for writer in writers),
        f"multiplier {', '.join(map(str, multipliers))}": bool(multipliers),
        f"experts{_share(len(experts), len(blocks))}": bool(experts),
        f"an MLP beside them{_share(len(shared), len(experts))}": bool(shared),
        "gated by token": any(writer.gate is not None for writer in writers),
        "blocks return tuples": blocks[0].like is not None,
        "Conv1D": any(site.fan_in_fan_out for block in blocks for site in block.sites.values()),
    }
    return ", ".join(note for note, there in found.items() if there)


def site_names(blocks: Sequence[Block]) -> str:
    """The sites that these blocks have, and in how many of them."""
    counts = {name: sum(name in block.sites for block in blocks) for name in (*SITES, JOINT)}
    return ", ".join(
        ("joint" if name == JOINT else name) + _share(count, len(blocks)) for name, count in counts.items() if count
    )


def _share(count: int, total: int) -> str:
    return "" if count == total else f" in {count} of {total} blocks"


@dataclass
class _Row:
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def complete(self) -> bool:
        known = {"reason"} <= self.figures.keys() or {"kl", "peft", "restored"} <= self.figures.keys()
        return known or bool(self.failed or self.skipped)

    @property
    def result(self) -> str:
        return f"failed: {', '.join(self.failed)}" if self.failed else self.skipped or "passed"


class SupportTable:
    """Plugin of pytest that writes what test_families.py found, by family, if it was run as a whole.

    Args:
        path: the Markdown file.
        command: how it is made.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path, self.command = path, command
        self.rows = {name: _Row() for name in (*FAMILIES, *HYBRID)}
        self.waiting: set[str] = set()
        self.message = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Give each report its test's family; before -k takes tests out."""
        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            if item.path.name == "test_families.py" and "family" in params:
                item.user_properties.append(("family", params["family"]))
                self.waiting.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what a test recorded, and how it ended."""
        figures = dict(report.user_properties)
        name = figures.pop("family", None)
        if name is None:
            return
        row, test = self.rows[name], report.nodeid.rpartition("::")[2].partition("[")[0]
        row.figures |= figures
        if report.failed and test not in row.failed:
            row.failed.append(test)
        elif report.skipped and isinstance(report.longrepr, tuple):
            row.skipped = report.longrepr[2]
        if report.when == "teardown":
            self.waiting.discard(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the table, complete or not at all."""
        missing = [name for name, row in self.rows.items() if not row.complete]
        if missing or self.waiting:
            self.message = (
                f"{self.path} was not written: {len(self.waiting)} tests did not run, and of {len(missing)} of "
                f"{len(self.rows)} families the results are not complete. Run all of tests/model/test_families.py."
            )
            return
        with atomic_file(self.path) as file:
            file.write_text(self.render(), encoding="utf-8")
        self.message = f"wrote {self.path}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what became of it."""
        terminalreporter.write_line(self.message)

    def render(self) -> str:
        """The page."""
        versions = {name: version(name) for name in ("transformers", "torch", "peft")} | {"lit_thought": __version__}
        refused = {name: row for name, row in self.rows.items() if "reason" in row.figures}
        fitted = {name: row for name, row in self.rows.items() if name not in refused}
        passed = sum(row.result == "passed" for row in fitted.values())
        lines = [
            "# Supported architectures",
            "",
            f"`{self.command}`",
            "",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {', '.join(map(' '.join, versions.items()))}.",
            "",
            "Written by the tests from what they measured. Each row is a tiny random model of the family, built by",
            "transformers with random norm scales and biases, in float64 or, where the family has none, float32.",
            "The patch is fitted to three pairs of random tokens and a random chunk, at full rank, default sites.",
            "KL is KL(instructed ‖ plain) in nats a fitted token, from whole passes of the model, without and with",
            "the patch. PEFT is the largest difference of logits between the patched model and the adapter as",
            "`PeftModel` loads it, over the largest logit, on other tokens; for it every change was made a fifth of",
            "its weight, so that each counts. Passed: all tests of the family did, among them that removing the",
            "patch restores every bit.",
            "",
            f"{passed} of {len(fitted)} families passed; {len(refused)} more are refused, with the reason.",
            "",
            "| family | class | kind | notes | sites | KL before | after | down by | PEFT | result |",
            "|---|---|---|---|---|---:|---:|---:|---:|---|",
            *(_line(name, row) for name, row in fitted.items()),
            "",
            "## Refused",
            "",
            "| family | class | message | result |",
            "|---|---|---|---|",
            *(
                f"| {name} | {row.figures['class']} | {_escape(row.figures['reason'])} | {row.result} |"
                for name, row in refused.items()
            ),
        ]
        return "\n".join(lines) + "\n"


def _line(name: str, row: _Row) -> str:
    family, figures = {**FAMILIES, **HYBRID}[name], row.figures
    kind = "MoE" if family.kind == "moe" else family.kind
    if family.kind == "moe" and figures.get("parallel"):
        kind += ", parallel"
    kl = figures.get("kl")
    measured = [""] * 3
    if kl:
        down = math.floor(1e4 * (1 - kl[1] / kl[0])) / 100  # not rounded up to 100 %
        measured = [f"{kl[0]:.3f}", f"{kl[1]:.1e}", f"{down:.2f} %"]
    peft = f"{figures['peft']:.0e}".replace("0e+00", "0") if "peft" in figures else ""
    found = [figures.get(key, "") for key in ("class", "notes", "sites")]
    return f"| {' | '.join([name, found[0], kind, *found[1:], *measured, peft, _escape(row.result)])} |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def command_line(arguments: Sequence[str]) -> str:
    """How pytest was called."""
    return f"python -m pytest {shlex.join(arguments)}"
