"""The weights of a GGUF file, unpacked some rows at a time, each at once in the dtype that is asked for.

transformers unpacks a tensor as a whole, into several copies in float32: for a vocabulary of 150,000 they take more
than a small model does. What goes where and how it is laid out is transformers' own knowledge, used as it is; a file
that takes more than renaming and rearranging one tensor at a time is left to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["PackedModel", "PackedWeight", "open_gguf", "quick_reader"]

_CHUNK = 2**18  # numbers that are unpacked at once
_ANY = np.float32(-1)  # a number that transformers' processors can work on; one takes the logarithm of its negative


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is read, unpacked and cast when it is sliced, as transformers slices what it loads.

    Attributes:
        file: the GGUF file.
        tensor: gguf's description of the tensor in it.
        shape: as it is unpacked.
        dtype: of the weight.
        processor: transformers' own, where it changes the unpacked tensor.
    """

    file: Path
    tensor: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    processor: Any = None

    def __getitem__(self, _: Any) -> Tensor:
        if self.processor is None:
            return self._unpack(self.dtype)
        values = self._unpack(torch.float32).numpy()
        values = self.processor.process(weights=values, name=self.tensor.name).weights
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)

    def _unpack(self, dtype: torch.dtype) -> Tensor:
        from gguf import dequantize

        unpacked, packed = torch.empty(self.shape, dtype=dtype), self.tensor.data
        with self.file.open("rb") as stream:  # not mapped: what has been read would count as memory in use
            stream.seek(self.tensor.data_offset)
            for rows in unpacked.view(-1, self.shape[-1]).split(max(1, _CHUNK // self.shape[-1])):
                part = np.fromfile(stream, packed.dtype, len(rows) * packed.shape[-1]).reshape(len(rows), -1)
                rows.copy_(torch.from_numpy(dequantize(part, self.tensor.tensor_type)))
        return unpacked


@dataclass(frozen=True)
class PackedModel:
    """A model whose weights are still in a GGUF file: its class, and what ``from_pretrained`` takes."""

    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    state_dict: dict[str, PackedWeight]


def open_gguf(file: Path, dtype: torch.dtype) -> PackedModel | None:
    """The model of a GGUF file, with weights that are unpacked when they are loaded, into ``dtype``.

    Returns:
        None where transformers has a newer loader for the architecture, where a weight is made of several tensors (a
        mixture's experts), and where anything is not as expected: transformers then loads it by itself, or says what
        is wrong.
    """
    try:
        return _open(file, dtype)
    except Exception:
        return None


def _open(file: Path, dtype: torch.dtype) -> PackedModel | None:
    gguf: Any = import_module("gguf")
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with quick_reader():
        values, _ = PreTrainedConfig.get_config_dict(file.parent, gguf_file=str(file))
        reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    if is_gguf_arch_supported(architecture) or reader.byte_order != "I":
        return None
    processors: dict[str, Any] = TENSOR_PROCESSORS
    processor = processors.get(architecture, TensorProcessor)(config=copy.deepcopy(values))
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    names = get_gguf_hf_weights_map(skeleton, processor)
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(map(int, reversed(tensor.shape)))
        if len(shape) > 2:
            return None
        before = np.broadcast_to(_ANY, shape)
        besides: dict[str, dict[str, Any]] = {"tensors": {}}
        after = processor.process(weights=before, name=tensor.name, tensor_key_mapping=names, parsed_parameters=besides)
        if after.name is None or besides["tensors"]:
            return None
        if after.name in names:
            changed = None if after.weights is before else processor
            weights[names[after.name]] = PackedWeight(file, tensor, shape, dtype, changed)
    return PackedModel(type(skeleton), config, weights)


@contextmanager
def quick_reader() -> Iterator[None]:
    """Inside, GGUF files are opened three times as fast, by transformers as well, which opens one for its
    configuration and again for its tokenizer."""
    gguf: Any = import_module("gguf")
    quick = _quick_reader()
    gguf.GGUFReader = quick
    try:
        yield
    finally:
        gguf.GGUFReader = quick.__base__


@cache
def _quick_reader() -> type:
    from gguf import GGUFReader

    class QuickReader(GGUFReader):
        """gguf takes the vocabulary apart by slicing a memmap, which costs several times what a plain array does."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = mapped.view(np.ndarray)

    return QuickReader
