"""What several commands need: the model to load, and the instruction."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lit_thought.cli.output import say, timed
from lit_thought.errors import ThoughtError

__all__ = ["Dtype", "Loading", "read_instruction"]

Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]


@dataclass(frozen=True)
class Loading:
    """The model

    Args:
        model: smollm2 (the embedded default), a hub id, a local directory or a .gguf file.
        dtype: dtype to load the model in; float32, or bfloat16 with quantization, when left out.
        device: where to put it, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        quantization: 8bit or 4bit, by bitsandbytes on a CUDA device.
        trust_remote_code: run code that a hub model brings along.
    """

    model: str = "smollm2"
    dtype: Dtype | None = None
    device: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Before torch is imported, which takes seconds, look whether there is such a model.

        Raises:
            ThoughtError: if there is none.
        """
        from lit_thought.model.source import find_source

        find_source(self.model, self.gguf_file, self.revision)

    @property
    def place(self) -> str | None:
        """Where the model is, for :func:`~lit_thought.files.check_output_folder` to keep; None for the embedded one."""
        return None if self.model == "smollm2" else self.model

    def flags(self) -> str:
        """What of this is not as it is when left out, as one types it, for a command that is to load the same model."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = {field.name: field.default for field in fields(self)}
        words = [
            f" --{name}" if value is True else f" --{name} {shlex.quote(str(value))}"
            for name, value in given.items()
            if value != usual[name]
        ]
        return "".join(words)

    def load(self) -> Any:
        """The model and its tokenizer; not annotated so, since jsonargparse would import transformers for it.

        Raises:
            ThoughtError: if the model cannot be had.
        """
        from lit_thought.model.loading import load_model

        options = asdict(self)
        name = options.pop("model")
        say(f"Loading {name} …")
        with timed("loading the model"):
            return load_model(name, **options)


def read_instruction(text: str | None, file: str | None) -> str | None:
    """The instruction, given as text or as the name of a UTF-8 file.

    Raises:
        ThoughtError: for both, or a file that cannot be read.
    """
    from lit_thought.files import expanded

    if text is not None and file is not None:
        raise ThoughtError("instruction and instruction_file exclude each other; give one of them.")
    if file is None:
        return text
    try:
        return expanded(file, "instruction_file").read_text(encoding="utf-8-sig")  # some editors write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ThoughtError(f"instruction_file={file!r} cannot be read as a UTF-8 text file ({error}).") from error
