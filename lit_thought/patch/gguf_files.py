"""GGUF files, through the ``gguf`` package: llama.cpp's names of architectures, and files complete or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file

__all__ = ["gguf_architecture", "gguf_writer", "import_gguf"]

_NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "cohere": "command-r",
    "phi": "phi2",
    "gpt_bigcode": "starcoder",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "olmo3": "olmo2",
    "glm": "chatglm",
    "ministral3": "mistral3",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "granitemoeshared": "granitemoe",
    "solar_open": "glm4moe",
    "mimo_v2_flash": "mimo2",
}
"""transformers' ``model_type`` -> llama.cpp's name, where they differ in more than punctuation (its ``conversion``)."""


def import_gguf() -> ModuleType:
    """The ``gguf`` package.

    Raises:
        ThoughtError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ThoughtError(
            "GGUF files need the package that reads and writes them, which is not installed. "
            'Run `pip install "lit-thought[gguf]"`.'
        ) from error
    return gguf


def gguf_architecture(model_type: str) -> str | None:
    """llama.cpp's name of the architecture that transformers calls ``model_type``; None where gguf knows none."""
    gguf = import_gguf()
    known = {_letters(name): name for arch, name in gguf.MODEL_ARCH_NAMES.items() if arch in gguf.MODEL_TENSORS}
    plain = model_type.removesuffix("_text")
    return known.get(_letters(_NAMES.get(plain, plain)))


@contextmanager
def gguf_writer(
    path: str | os.PathLike[str], architecture: str, overwrite: bool, model: str | Path | None = None
) -> Iterator[Any]:
    """Yield a ``gguf.GGUFWriter``; when the block ends well, what was added to it is written to ``path``.

    On any exception nothing is left, and ``path`` stays as it was. The ``model``, a file or folder, is never replaced.

    Raises:
        ThoughtError: if ``path`` cannot be written, or the ``gguf`` package is missing.
    """
    gguf = import_gguf()
    with atomic_file(path, overwrite, model=model) as file:
        writer = gguf.GGUFWriter(file, architecture)
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
