"""The memory that loading takes: the weights in the dtype asked for, and little beside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import loading_peak
import pytest
import torch
from gguf_files import write_gguf
from models import SMALL, make_model
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 200 MB in float32, two thirds of it the vocabulary's, and a tiny one; as folders and GGUF files."""
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": 2**15, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    large = LlamaForCausalLM(LlamaConfig(**SMALL | size))
    for name, model in (("tiny", make_model("llama", torch.float32)), ("large", large)):
        model.save_pretrained(folder / name)
        write_gguf(folder / f"{name}.gguf", tokens=False, model=model)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suffix", ["", ".gguf"], ids=["folder", "gguf"])
def test_a_model_is_loaded_once_in_its_dtype(saved: Path, suffix: str, dtype: str) -> None:
    if suffix:
        pytest.importorskip("gguf")
    command = [sys.executable, loading_peak.__file__, saved / f"tiny{suffix}", saved / f"large{suffix}", dtype]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    took = json.loads(ended.stdout)
    # the file of a folder is mapped: its pages count as resident, but the system takes them back when it needs them
    assert took["resident" if suffix else "anonymous"] < 1.3, took
