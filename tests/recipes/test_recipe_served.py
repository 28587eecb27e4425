"""What the recipe ``served`` asks a server and makes of its answers, against a server of the standard library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import PAIRS, TOKENIZER, make_patch
from models import make_model
from peft import PeftModel
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from recipes.speed.served import BASE, Served, Server, ask, compare, served, written


class _Answering(BaseHTTPRequestHandler):
    """Answers with the prompt's own tokens, two at a time, as vLLM streams them, or llama.cpp."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(200 if body.get("model") != "nobody" else 404)
        self.end_headers()
        ids = body["prompt"][: body["count"]]
        for i in range(0, len(ids), 2):
            new = ids[i : i + 2]
            said = {"choices": [{"token_ids": new}]} if self.path == "/vllm" else {"tokens": new}
            self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        yield ("127.0.0.1", own.server_address[1])
        own.shutdown()


@pytest.mark.parametrize("path", ["/vllm", "/completion"])
def test_every_prompt_is_asked_of_its_own_adapter(path: str, address: tuple[str, int]) -> None:
    _Answering.asked.clear()
    wishes = {name: {"model": name} for name in (BASE, "one", "two", "nobody")}
    server = Server(address, path, {"temperature": 0}, wishes, "count", 1.0, "1")
    found = ask(server, [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [BASE, "one", "two"], 2, 3)
    assert [one.tokens for one in found] == [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert all(0 < one.first <= one.last for one in found)
    asked = {tuple(body["prompt"]): body["model"] for body in _Answering.asked}
    assert asked == {(1, 2, 3): BASE, (4, 5): "one", (6, 7, 8, 9): "two"}
    assert all(body["temperature"] == 0 for body in _Answering.asked)
    with pytest.raises(ThoughtError, match="refused a request"):
        ask(server, [[1]], ["nobody"], 1, 1)


@pytest.mark.real_model
def test_llama_cpp_serves_what_peft_writes_at_every_scale(tmp_path: Path) -> None:
    """On the packaged 4-bit file, in small: the scale that a request asks for is that of PEFT's adapter."""
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    ran = run_recipe(
        "served_llama_cpp", tmp_path, "--prompt=ticket_labels", "--adapters=2", "--concurrency=[1,2]",
        "--requests=4", "--new_tokens=4", "--scales=[0.0,1.0]", "--tie=1.0", model=None,
    )  # fmt: skip
    record = ran.record
    assert [one["case"] for one in record["compared"]] == [
        *("plain", "patched, 1 adapter", "patched, 2 adapters", "patched, scale 0", "patched, scale 1")
    ]
    assert all(one["answers"] == 4 and one["others"] == 0 for one in record["compared"])
    assert all(row["tokens_per_second"] > 0 and row["first_token"] > 0 for row in record["rows"])
    assert len(record["rows"]) == 8
    assert "| patched, scale 0 | 4 |" in ran.page


@torch.no_grad()
def test_answers_are_compared_with_those_of_each_rows_own_adapter(tmp_path: Path) -> None:
    model = make_model()
    for name, scale in (("one", 1.0), ("two", -1.0)):
        (scale * make_patch(model, rank=2)).save_adapter(tmp_path / name)
    both = PeftModel.from_pretrained(model, str(tmp_path / "one"), adapter_name="one")
    both.load_adapter(str(tmp_path / "two"), adapter_name="two")
    both.eval()
    prompts = [TOKENIZER(pair["input"])["input_ids"] for pair in PAIRS[:3]]
    whose = ["one", "two", "one"]
    wanted, _ = written(both, TOKENIZER, prompts, whose, 4)
    for prompt, name, own in zip(prompts, whose, wanted, strict=True):
        both.set_adapter(name)
        ids = list(prompt)
        for token in own:
            assert int(both(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    same = [Served([*own, 0, 0], 0.1, 0.2) for own in wanted]  # what comes after the end does not count
    found = compare(both, prompts, whose, wanted, same, 0.05)
    assert (found["equal"], found["near_ties"], found["others"]) == (3, 0, 0)
    less = [Served([], 0.1, 0.2), Served(wanted[1][:-1], 0.1, 0.2), same[2]]
    found = compare(both, prompts, whose, wanted, less, 0.05)
    assert (found["equal"], found["near_ties"], found["others"], found["margins"]) == (1, 0, 2, [])
    both.set_adapter("two")
    logits = both(torch.tensor([[*prompts[1], *wanted[1][:1]]])).logits[0, -1].double()
    worst = int(logits.argmin())
    same[1] = Served([wanted[1][0], worst, *wanted[1][2:]], 0.1, 0.2)
    margin = float(logits.max() - logits.min())
    assert compare(both, prompts, whose, wanted, same, margin + 0.01)["near_ties"] == 1
    found = compare(both, prompts, whose, wanted, same, margin - 0.01)
    assert (found["equal"], found["near_ties"], found["others"]) == (2, 0, 1)
    assert found["margins"] == pytest.approx([margin], rel=1e-5)


def test_what_cannot_be_served_is_said_before_anything_is_fitted(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"prompt: expected one of clinic_desk, .*got 'none'"):
        served(prompt="none")
    with pytest.raises(ThoughtError, match="adapters: there are system prompts for"):
        served(adapters=1000)
    with pytest.raises(ThoughtError, match=r"vllm='no-such-command' cannot be run"):
        served(vllm="no-such-command")
    with pytest.raises(ThoughtError, match=r"engine: expected one of vllm, llama.cpp; got 'tgi'"):
        served(engine="tgi")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ThoughtError, match=r"llama.cpp takes a GGUF file"):
        served(str(tmp_path), engine="llama.cpp")
