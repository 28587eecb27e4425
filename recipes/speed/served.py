"""A patch in a server: one adapter and several, against the instructed prompt and its cached prefix.

    python -m recipes.speed.served --config recipes/speed/served.yaml --vllm ENVIRONMENT/bin/python
    python -m recipes.speed.served --config recipes/speed/served_llama_cpp.yaml

Adapters are fitted, exported and loaded into a server that answers over HTTP: vLLM's, in a process and an environment
of its own, or llama.cpp's, on a GGUF file. The same questions go to the model plain, with a long system prompt (whose
keys and values the server keeps after the first request: prefix caching), with that prompt's adapter, and with all
adapters in turn. Their number and what is in the server at a time are fixed; every answer has the same number of
tokens. Reported are tokens a second, and medians of the time to the first token. What is answered is compared, token by
token, with PEFT's own greedy outputs (a batch in which each row has its own adapter): where the two part, by how much
the model prefers its own token. llama.cpp takes a scale with each request, so there the first adapter is also asked
for at others. Prints a Markdown table and writes it with a JSON record.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.errors import ThoughtError, check_counts
from lit_thought.evaluation.metrics import agrees_for
from lit_thought.model.source import find_source
from lit_thought.patch.export import export_adapter
from lit_thought.patch.export_gguf import export_gguf
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import DATA, command_line, machine, shown, table, write_results

START = 900
"""Seconds that the server may take to start."""
FITTED, WRITTEN = 8, 24
"""Inputs of each fit, and tokens of their outputs: an adapter's speed does not depend on them."""


ENGINES = ("vllm", "llama.cpp")
BASE = "__base__"
"""PEFT's name for the model without an adapter."""
KEPT = "__kept__"
"""Ours for the same, where what was read of a prompt's beginning is kept for the next."""


@dataclass(frozen=True)
class Served:
    """An answer: its tokens, seconds to the first and to the last."""

    tokens: list[int]
    first: float
    last: float


@dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes:
        address: host and port.
        path: where a completion is asked for.
        options: what every request says.
        wishes: what a request says besides to have an adapter, by the adapter's name, :data:`BASE` or :data:`KEPT`.
        length: the request's name for the number of tokens.
        started: seconds that it took.
        version: of the engine.
    """

    address: tuple[str, int]
    path: str
    options: Mapping[str, Any]
    wishes: Mapping[str, Mapping[str, Any]]
    length: str
    started: float
    version: str


def served(
    model: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    engine: str = "vllm",
    vllm: str = "python",
    dtype: str = "float32",
    prompt: str = "museum_guide",
    adapters: int = 8,
    concurrency: Sequence[int] = (1, 8, 32),
    requests: int = 32,
    new_tokens: int = 16,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    tie: float = 0.05,
    seed: int = 0,
    out: str = "recipes/results/served",
) -> None:
    """Fit, serve, ask and compare."""
    check_counts(adapters=adapters, requests=requests, new_tokens=new_tokens)
    own = DATA / "long_prompts" / f"{prompt}.txt"
    if not own.is_file():
        known = ", ".join(sorted(file.stem for file in own.parent.glob("*.txt")))
        raise ThoughtError(f"prompt: expected one of {known}; got {prompt!r}.")
    chunks = [own.read_text(encoding="utf-8"), *(one["instruction"] for one in instructions_known().values())][
        :adapters
    ]
    if len(chunks) < adapters:
        raise ThoughtError(f"adapters: there are system prompts for {len(chunks)}; got {adapters}; ask for fewer.")
    if engine not in ENGINES:
        raise ThoughtError(f"engine: expected one of {', '.join(ENGINES)}; got {engine!r}.")
    weights = find_source(model, None, None).gguf_file if engine == "llama.cpp" else None
    if engine == "llama.cpp" and (weights is None or importlib.util.find_spec("xllamacpp") is None):
        raise ThoughtError(f'model={model!r}: llama.cpp takes a GGUF file, or "smollm2", and the package xllamacpp.')
    if engine == "vllm" and shutil.which(vllm) is None:
        raise ThoughtError(f"vllm={vllm!r} cannot be run; give the path of a Python that has vLLM.")
    messages = json.loads(own.with_suffix(".json").read_text(encoding="utf-8"))["messages"]
    questions = [one["input"] for one in messages]
    lm, tokenizer = load_model(model, dtype=dtype)
    template = PromptTemplate.chat()
    asked = [template.tokenise(tokenizer, chunks[0], one) for one in islice(cycle(questions), requests)]
    plain, instructed = [list(one.plain_ids) for one in asked], [list(one.instructed_ids) for one in asked]
    with TemporaryDirectory() as place:
        names = fit(lm, tokenizer, chunks, questions, Path(place), seed)
        turns = list(islice(cycle(names), requests))
        own_scales = {f"scaled{i}": scale for i, scale in enumerate(scales)} if engine == "llama.cpp" else {}
        patch = ThoughtPatch.load(Path(place) / names[0])
        for name, scale in own_scales.items():
            (scale * patch).save_adapter(Path(place) / name)
        base = PeftModel.from_pretrained(lm, str(Path(place) / names[0]), adapter_name=names[0])
        for name in (*names[1:], *own_scales):
            base.load_adapter(str(Path(place) / name), adapter_name=name)
        cases = {
            "plain": (plain, [BASE] * requests),
            "instructed, prefix cached": (instructed, [KEPT] * requests),
            "patched, 1 adapter": (plain, names[:1] * requests),
            f"patched, {adapters} adapters": (plain, turns),
        }
        checked = {name: cases[name] for name in cases if name != "instructed, prefix cached"}
        checked |= {f"patched, scale {scale:g}": (plain, [name] * requests) for name, scale in own_scales.items()}
        wanted = {name: written(base, tokenizer, *case, new_tokens) for name, case in checked.items()}
        longest, most = max(map(len, instructed)) + new_tokens, max(concurrency)
        if engine == "vllm":
            running = vllm_server(vllm, model, dtype, {name: Path(place) / f"{name}.vllm" for name in names}, longest)
        else:
            assert weights is not None
            files = [Path(place) / f"{name}.gguf" for name in names]
            running = llama_cpp_server(weights, dict(zip(names, files, strict=True)), own_scales, longest, most)
        rows, answers = [], {}
        with running as up:
            (cold,) = ask(up, instructed[:1], [BASE], 1, new_tokens)
            for name, case in cases.items():
                ask(up, *case, most, 2)  # compiles, and fills the prefix cache
                for count in concurrency:
                    start = time.perf_counter()
                    answers[name] = ask(up, *case, count, new_tokens)
                    spent = time.perf_counter() - start
                    rows.append(
                        {
                            "case": name,
                            "concurrency": count,
                            "prompt_tokens": sum(map(len, case[0])) / requests,
                            "tokens_per_second": sum(len(one.tokens) for one in answers[name]) / spent,
                            "first_token": median(one.first for one in answers[name]),
                        }
                    )
            for name in checked.keys() - cases.keys():
                answers[name] = ask(up, *checked[name], most, new_tokens)
        compared = [
            {"case": name, **compare(base, *case, wanted[name][0], answers[name], tie)}
            for name, case in checked.items()
        ]
    spent = {"alone": wanted["patched, 1 adapter"][1], "mixed": wanted[f"patched, {adapters} adapters"][1]}
    peft = {name: requests * new_tokens / seconds for name, seconds in spent.items()}
    settings = {"dtype": dtype, "prompt": prompt, "adapters": adapters, "requests": requests, "new_tokens": new_tokens}
    settings |= {"tie": tie, engine: up.version}
    record = {"model": shown(model), "settings": settings, "rows": rows, "compared": compared, "peft": peft}
    record |= {"cold_first_token": cold.first, "started": up.started, "environment": machine(lm.device)}
    write_results(__file__, out, page(record), record)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunks: Sequence[str],
    questions: Sequence[str],
    place: Path,
    seed: int,
) -> list[str]:
    """An adapter of each chunk below ``place``, and beside it what vLLM and llama.cpp take; their names."""
    names = []
    for number, chunk in enumerate(chunks):
        pairs = [{"input": text} for text in questions[:FITTED]]
        patch: ThoughtPatch = transmute(
            model, tokenizer, chunk, pairs, "chat", max_new_tokens=WRITTEN, seed=seed, preserve=None, progress=False
        )
        names.append(f"adapter{number}")
        patch.save_adapter(place / names[-1])
        export_adapter(patch, place / f"{names[-1]}.vllm")
        export_gguf(patch, place / f"{names[-1]}.gguf")
    return names


@torch.inference_mode()
def written(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    new_tokens: int,
) -> tuple[list[list[int]], float]:
    """What PEFT's model writes, each prompt with its own adapter, in batches of eight, and the seconds."""
    found, start = [], time.perf_counter()
    for first in range(0, len(prompts), 8):
        rows, whose = prompts[first : first + 8], list(adapters[first : first + 8])
        inputs = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side="left", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, adapter_names=whose)
        ends = ids[:, inputs["input_ids"].shape[1] :].tolist()
        found += [_to_its_end(row, model.generation_config.eos_token_id) for row in ends]
    return found, time.perf_counter() - start


def _to_its_end(tokens: Sequence[int], ends: int | Sequence[int]) -> list[int]:
    stops = {ends} if isinstance(ends, int) else set(ends)
    last = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: last + 1])


@torch.inference_mode()
def compare(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    wanted: Sequence[Sequence[int]],
    answers: Sequence[Served],
    tie: float,
) -> dict[str, Any]:
    """How many answers are PEFT's to the token, up to its end; of the others that are no shorter, by how many nats
    PEFT's model prefers its own token where they part."""
    margins, short = [], 0
    for prompt, adapter, own, answer in zip(prompts, adapters, wanted, answers, strict=True):
        other = answer.tokens[: len(own)]
        at = agrees_for(own, other)
        short += at == len(other) < len(own)
        if at < len(other):
            if adapter != BASE:
                model.set_adapter(adapter)
            with model.disable_adapter() if adapter == BASE else nullcontext():
                logits = model(torch.tensor([[*prompt, *own[:at]]])).logits[0, -1].double()
            margins.append(float(logits[own[at]] - logits[other[at]]))
    near = sum(margin <= tie for margin in margins)
    equal, others = len(wanted) - len(margins) - short, len(margins) - near + short
    return {"answers": len(wanted), "equal": equal, "near_ties": near, "others": others, "margins": sorted(margins)}


@contextmanager
def vllm_server(vllm: str, model: str, dtype: str, adapters: dict[str, Path], longest: int) -> Iterator[Server]:
    """vLLM's server with these adapters.

    Raises:
        ThoughtError: when it does not start; its last words are in the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    rank = max(json.loads((folder / "adapter_config.json").read_text())["r"] for folder in adapters.values())
    command = [
        vllm,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        dtype,
    ]
    command += ["--max-model-len", str(longest + 64), "--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--max-loras", str(len(adapters)), "--lora-modules", *modules]
    start = time.perf_counter()
    with TemporaryDirectory() as place, (Path(place) / "log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_own_environment(), cwd=place)
        try:
            while not _is_up(port):
                if process.poll() is not None or time.perf_counter() - start > START:
                    log.seek(0)
                    raise ThoughtError(f"vllm={vllm!r} did not start:\n{''.join(log.readlines()[-30:])}")
                time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=5) as answer:
                version = json.load(answer)["version"]
            options = {"stream": True, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            wishes = {BASE: {"model": model}, KEPT: {"model": model}, **{name: {"model": name} for name in adapters}}
            spent = time.perf_counter() - start
            yield Server(("127.0.0.1", port), "/v1/completions", options, wishes, "max_tokens", spent, version)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def llama_cpp_server(
    model: str, adapters: dict[str, Path], scaled: Mapping[str, float], longest: int, slots: int
) -> Iterator[Server]:
    """llama.cpp's server on a GGUF file with these adapters, and the first of them at other scales by name too."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = model, 0
    settings.n_parallel, settings.n_ctx = slots, slots * (longest + 64)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.ui = settings.fit_params = False
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 0.0) for file in adapters.values()]
    start = time.perf_counter()
    server = xllamacpp.Server(settings)
    port = int(server.listening_address.rpartition(":")[2])
    while not _is_up(port):
        time.sleep(0.1)

    def wish(scales: Mapping[str, float], kept: bool = False) -> dict[str, Any]:
        chosen = [{"id": i, "scale": scales.get(name, 0.0)} for i, name in enumerate(adapters)]
        return {"lora": chosen, "cache_prompt": kept}  # what is kept of a prompt is of the scales that it was read at

    wishes = {BASE: wish({}), KEPT: wish({}, kept=True), **{name: wish({name: 1.0}) for name in adapters}}
    wishes |= {name: wish({next(iter(adapters)): scale}) for name, scale in scaled.items()}
    options = {"stream": True, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    spent = time.perf_counter() - start
    yield Server(("127.0.0.1", port), "/completion", options, wishes, "n_predict", spent, xllamacpp.__version__)
    del server


def ask(
    server: Server, prompts: Sequence[Sequence[int]], adapters: Sequence[str], concurrency: int, new_tokens: int
) -> list[Served]:
    """The answers to all prompts, ``concurrency`` of them in the server at a time."""

    def one(prompt: Sequence[int], adapter: str) -> Served:
        body = {"prompt": list(prompt), server.length: new_tokens, **server.options, **server.wishes[adapter]}
        start, first, tokens = time.perf_counter(), 0.0, []
        connection = http.client.HTTPConnection(*server.address, timeout=START)
        connection.request("POST", server.path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ThoughtError(f"the server refused a request: {answer.read().decode()[:300]}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            new = said["choices"][0].get("token_ids") if "choices" in said else said.get("tokens")
            first = first or (time.perf_counter() - start if new else 0.0)
            tokens += new or []
        connection.close()
        return Served(tokens, first, time.perf_counter() - start)

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, prompts, adapters))


def _own_environment() -> dict[str, str]:
    """The server's: it has its own packages, and on a CPU 2 GB of keys and values."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {"VLLM_CPU_KVCACHE_SPACE": "2", **environment}


def page(record: dict[str, Any]) -> str:
    """Markdown."""
    head = ["model", "in the server", "prompt tokens", "tokens a second", "to the first token, ms"]
    rows = [
        [
            row["case"],
            row["concurrency"],
            f"{row['prompt_tokens']:.0f}",
            f"{row['tokens_per_second']:.1f}",
            f"{1000 * row['first_token']:.0f}",
        ]
        for row in record["rows"]
    ]
    lines = [table(head, rows)]
    lines.append(
        f"The first instructed request, with nothing cached: {1000 * record['cold_first_token']:.0f} ms to its first "
        f"token. The server started in {record['started']:.0f} s. transformers' `generate` with PEFT, batches of "
        f"eight: {record['peft']['alone']:.1f} tokens a second with one adapter, {record['peft']['mixed']:.1f} with "
        f"each row's own.\n"
    )
    tie, head = record["settings"]["tie"], ["answers of", "all", "PEFT's, to the token", "near ties", "others"]
    lines.append(
        table(
            head,
            [[one[key] for key in ("case", "answers", "equal", "near_ties", "others")] for one in record["compared"]],
        )
    )
    lines.append(
        f"Near ties: where the two part, PEFT's model prefers its own token by {tie:g} nats or less.\n\n"
        f"{record['environment']}\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    command_line(served)
