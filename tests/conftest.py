"""Options and fixtures of more than one test module; what they build is in helpers/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import open_browser
from command_line import make_files
from models import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table",
        type=Path,
        metavar="FILE",
        help="write what test_families.py measures, by family, to this Markdown file",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--support-table")) is not None:
        from support import SupportTable, command_line

        config.pluginmanager.register(SupportTable(path, command_line(config.invocation_params.args)), "support-table")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, a pairs file, a test file and an instruction file."""
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    make_files(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from open_browser(tmp_path_factory.mktemp("profile"))
