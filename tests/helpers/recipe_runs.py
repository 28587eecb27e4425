"""Recipes by the command line that their configs begin with, in this process, on tiny models."""

from __future__ import annotations

import atexit
import json
import re
import runpy
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from families import make_family
from models import make_model, make_tokenizer

from recipes.harness import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
COMMAND = re.compile(r"^# +python (?:-m )?(recipes\S+)(?: fit)? --config (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Ran:
    """What a recipe printed, its record and its page; ``out`` is the path of these, without suffix."""

    printed: str
    out: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.out.with_suffix(".json").read_text(encoding="utf-8"))

    @property
    def page(self) -> str:
        return self.out.with_suffix(".md").read_text(encoding="utf-8")


@cache
def models() -> Path:
    """A folder with the models "llama" and "gemma", float32, and a cache; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="recipes"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_model("llama").float().save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    make_family("gemma3_text").save_pretrained(folder / "gemma")
    make_tokenizer(bos=True).save_pretrained(folder / "gemma")
    return folder


def script_of(config: str) -> Path:
    """The script that a config's first line runs with it."""
    found = COMMAND.search(CONFIGS[config].read_text(encoding="utf-8"))
    assert found, f"{CONFIGS[config]}: it does not begin with the command that reads it"
    assert ROOT / found[2] == CONFIGS[config]
    return ROOT / (found[1] if found[1].endswith(".py") else f"{found[1].replace('.', '/')}.py")


def all_exist(tests: list[str]) -> bool:
    """Whether there are such files, with such tests in them."""
    for test in tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        if name and f"\ndef {name.partition('[')[0]}(" not in text:
            return False
    return True


def run_recipe(config: str, folder: Path, *arguments: str, model: str | None = "llama") -> Ran:
    """Run a recipe from the checkout with its config and these arguments; its results go to ``folder``.

    Args:
        config: the config's name.
        folder: where the results go.
        arguments: what is set otherwise than there.
        model: a name of :func:`models`; None where the recipe takes none.
    """
    out = folder / config
    words = [f"--config={CONFIGS[config]}", f"--out={out}", *arguments]
    words += [] if model is None else [f"--model={models() / model}"]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("LIT_THOUGHT_CACHE", str(models() / "cache"))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [str(script_of(config)), *words])
        runpy.run_path(sys.argv[0], run_name="__main__")
    return Ran(printed.getvalue(), out)
