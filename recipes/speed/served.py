"""A patch in a server: vLLM with one adapter and with several, against the instructed prompt and its cached prefix.

    python -m recipes.speed.served --config recipes/speed/served.yaml --vllm ENVIRONMENT/bin/python

Adapters are fitted, exported and loaded into vLLM's server, which answers over its OpenAI interface, in a process and
an environment of its own. The same questions go to the model plain, with a long system prompt (whose keys and values
the server keeps after the first request: prefix caching), with that prompt's adapter, and with all adapters in turn.
Their number and what is in the server at a time are fixed; every answer has the same number of tokens. Reported are
tokens a second, and medians of the time to the first token. What the adapters answer is compared, token by token, with
PEFT's own greedy outputs (a batch in which each row has its own adapter): where the two part, by how much the model
prefers its own token. Prints a Markdown table and writes it with a JSON record.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from lit_thought.patch.export import export_adapter
from recipes.harness import DATA, command_line, machine, shown, table, write_results
from recipes.tasks.system_prompt import instructions_known

START = 900
"""Seconds that the server may take to start."""
FITTED, WRITTEN = 8, 24
"""Inputs of each fit, and tokens of their outputs: an adapter's speed does not depend on them."""


@dataclass(frozen=True)
class Served:
    """An answer: its tokens, seconds to the first and to the last."""

    tokens: list[int]
    first: float
    last: float


def served(
    model: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    vllm: str = "python",
    dtype: str = "float32",
    prompt: str = "museum_guide",
    adapters: int = 8,
    concurrency: Sequence[int] = (1, 8, 32),
    requests: int = 32,
    new_tokens: int = 16,
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
    if shutil.which(vllm) is None:
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
        base = PeftModel.from_pretrained(lm, str(Path(place) / names[0]), adapter_name=names[0])
        for name in names[1:]:
            base.load_adapter(str(Path(place) / name), adapter_name=name)
        alone, seconds_alone = written(base, tokenizer, plain, names[:1] * requests, new_tokens)
        mixed, seconds = written(base, tokenizer, plain, turns, new_tokens)
        folders = {name: Path(place) / f"{name}-vllm" for name in names}
        cases = [
            ("plain", plain, [""] * requests),
            ("instructed, prefix cached", instructed, [""] * requests),
            ("patched, 1 adapter", plain, names[:1] * requests),
            (f"patched, {adapters} adapters", plain, turns),
        ]
        longest = max(map(len, instructed)) + new_tokens
        with server(vllm, model, dtype, folders, longest) as (address, started, version):
            (cold,) = ask(address, model, instructed[:1], [""], 1, new_tokens)
            rows, answers = [], {}
            for name, prompts, whose in cases:
                ask(address, model, prompts, whose, 8, 2)  # compiles, and fills the prefix cache
                for count in concurrency:
                    start = time.perf_counter()
                    found = ask(address, model, prompts, whose, count, new_tokens)
                    spent = time.perf_counter() - start
                    answers[name] = found
                    rows.append(
                        {
                            "case": name,
                            "concurrency": count,
                            "prompt_tokens": sum(map(len, prompts)) / requests,
                            "tokens_per_second": sum(len(one.tokens) for one in found) / spent,
                            "first_token": median(one.first for one in found),
                        }
                    )
        compared = [
            {"case": name, **compare(base, plain, whose, wanted, answers[name], tie)}
            for (name, _, whose), wanted in zip(cases[2:], (alone, mixed), strict=True)
        ]
    peft = {"alone": requests * new_tokens / seconds_alone, "mixed": requests * new_tokens / seconds}
    settings = {"dtype": dtype, "prompt": prompt, "adapters": adapters, "requests": requests, "new_tokens": new_tokens}
    settings |= {"tie": tie, "vllm": version}
    record = {"model": shown(model), "settings": settings, "rows": rows, "compared": compared, "peft": peft}
    record |= {"cold_first_token": cold.first, "started": started, "environment": machine(lm.device)}
    write_results(__file__, out, page(record), record)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunks: Sequence[str],
    questions: Sequence[str],
    place: Path,
    seed: int,
) -> list[str]:
    """An adapter of each chunk below ``place``, and beside it what vLLM takes; their names."""
    names = []
    for number, chunk in enumerate(chunks):
        pairs = [{"input": text} for text in questions[:FITTED]]
        patch: ThoughtPatch = transmute(
            model, tokenizer, chunk, pairs, "chat", max_new_tokens=WRITTEN, seed=seed, preserve=None, progress=False
        )
        names.append(f"adapter{number}")
        patch.save_adapter(place / names[-1])
        export_adapter(patch, place / f"{names[-1]}-vllm")
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
    """How many answers are PEFT's to the token, up to its end; of the others, by how many nats PEFT's model prefers its
    own token where they part."""
    margins = []
    for prompt, adapter, own, answer in zip(prompts, adapters, wanted, answers, strict=True):
        other = answer.tokens[: len(own)]
        at = agrees_for(own, other)
        if at < len(other):
            model.set_adapter(adapter)
            logits = model(torch.tensor([[*prompt, *own[:at]]])).logits[0, -1].double()
            margins.append(float(logits[own[at]] - logits[other[at]]))
    near = sum(margin <= tie for margin in margins)
    count = len(wanted)
    return {"answers": count, "equal": count - len(margins), "near_ties": near, "others": len(margins) - near} | {
        "margins": sorted(margins)
    }


@contextmanager
def server(
    vllm: str, model: str, dtype: str, adapters: dict[str, Path], longest: int
) -> Iterator[tuple[tuple[str, int], float, str]]:
    """vLLM's server with these adapters; its address, the seconds that it took to start, and its version.

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
            yield ("127.0.0.1", port), time.perf_counter() - start, version
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


def ask(
    address: tuple[str, int],
    model: str,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    concurrency: int,
    new_tokens: int,
) -> list[Served]:
    """The answers to all prompts, ``concurrency`` of them in the server at a time."""

    def one(prompt: Sequence[int], adapter: str) -> Served:
        body = {"model": adapter or model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
        start, first, tokens = time.perf_counter(), 0.0, []
        connection = http.client.HTTPConnection(*address, timeout=START)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ThoughtError(f"the server refused a request: {answer.read().decode()[:300]}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            new = choice.get("token_ids") or []
            first = first or (time.perf_counter() - start if new else 0.0)
            tokens += new
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
