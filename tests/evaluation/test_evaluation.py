"""The three-way comparison against brute force: one prompt at a time, whole forward passes, NumPy in float64."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import INSTRUCTION, PAIRS, TEXTS, Untouched, make_patch, mixed_model, readable, written
from models import FAMILIES, make_model, make_tokenizer
from report_run import LONG_RESULT
from scipy.special import log_softmax
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.evaluation import compare as evaluation
from lit_thought.evaluation.compare import Evaluation, evaluate, format_result
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.results import RUNS, three_way
from lit_thought.patch.verdict import warnings
from lit_thought.prompts.chat import ChatForm
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs import logits
from lit_thought.runs.generate import Generation
from lit_thought.solve.factors import Factors

LIMIT = 6
INPUTS = ["good", "the lazy dog", "Antonyms", "up", "capital of France"]


def test_a_result_is_a_dict_that_is_told_in_a_line(tmp_path: Path) -> None:
    model = make_model("llama")
    result = compare(model, make_tokenizer(), make_patch(model), unrelated=TEXTS, perplexity_interval=None)
    plain = dict(result)
    assert result == plain
    assert json.loads(json.dumps(result)) == plain
    assert {**result} == copy.deepcopy(result) == pickle.loads(pickle.dumps(result))
    fidelity = f"same output as instructed {result['fidelity']:.2f} (plain {result['fidelity_plain']:.2f})"
    ratio = f"unrelated perplexity × {result['perplexity_ratio']:.3f}"
    assert repr(result).startswith(f"EvaluationResult({fidelity}; 5 pairs; {ratio}")
    assert "\n" not in repr(result)
    assert result._repr_markdown_() == format_result(plain)
    page = result._repr_html_()
    assert "<th></th><th>plain</th><th>instructed</th><th>patched</th>" in page
    row = re.search(r"output equal to the instructed one</th>(.*?)</tr>", page)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
    assert cells == [f"{result['fidelity_plain']:.2f}", "–", f"{result['fidelity']:.2f}"]
    assert page.count("Warning: ") == len(result["warnings"])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, patch: Any, **settings: Any) -> dict[str, Any]:
    usual = {"instruction": INSTRUCTION, "pairs": [{"input": text} for text in INPUTS], "unrelated": None}
    usual |= {"max_new_tokens": LIMIT, "batch_size": 2, "progress": False}
    return evaluate(model, tokenizer, patch, **{**usual, **settings})


def brute_force(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    patch: ThoughtPatch,
    instructions: Sequence[str],
    inputs: Sequence[str] = INPUTS,
) -> dict[str, Any]:
    """The outputs, whether they are finished, and the divergences, by the plainest means there are."""
    found: dict[str, Any] = {run: [] for run in RUNS}
    sums = {(run, part): np.zeros(3) for run in ("plain", "patched") for part in ("all", "output")}
    for instruction, text in zip(instructions, inputs, strict=True):
        query = f"Q: {text}\nA:"
        found["plain"].append(written(model, tokenizer, query, LIMIT)[0])
        output, finished = written(model, tokenizer, instruction + query, LIMIT)
        found["instructed"].append(output)
        with patch.applied(model):
            found["patched"].append(written(model, tokenizer, query, LIMIT)[0])
        tokens = PromptTemplate().tokenise(tokenizer, instruction, text, output, finished)
        wanted = log_probabilities(model, tokens.instructed_ids)[list(tokens.instructed_positions)]
        start, stop = tokens.output_span
        inside = [start < stop and start - 1 <= p < stop for p in tokens.plain_positions]
        for run in ("plain", "patched"):
            with patch.applied(model) if run == "patched" else nullcontext():
                got = log_probabilities(model, tokens.plain_ids)[list(tokens.plain_positions)]
            kl = (np.exp(wanted) * (wanted - got)).sum(-1)
            agree = wanted.argmax(-1) == got.argmax(-1)
            for part, weights in (("all", np.ones(len(kl))), ("output", np.array(inside, dtype=float))):
                sums[run, part] += [(kl * weights).sum(), (agree * weights).sum(), weights.sum()]
    for part, prefix in (("all", ""), ("output", "output_")):
        for place, name in enumerate(("kl", "agreement")):
            found[prefix + name] = {run: sums[run, part][place] / sums[run, part][2] for run in ("plain", "patched")}
    return found


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return log_softmax(logits.double().numpy(), axis=-1)


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    patch: ThoughtPatch,
    special: bool = True,
    limit: int = LIMIT,
) -> dict[str, Any]:
    """The figures of the patched model's own text: each token by a whole forward pass of the prompt and what came
    before it, the prompts as the tokenizer makes them of their texts, shares counted over strings of token ids."""
    kl: dict[str, list[float]] = {"kl": [], "kl_reverse": []}
    said: dict[str, list[list[int]]] = {run: [] for run in RUNS}
    for text in INPUTS:
        prompts = {run: prompt_ids(tokenizer, text, run, special) for run in RUNS}
        for run, ids in prompts.items():
            with patch.applied(model) if run == "patched" else nullcontext():
                said[run].append(tokens_written(model, tokenizer, ids, "\n" if special else None, limit))
        for end in range(len(said["patched"][-1])):
            before = said["patched"][-1][:end]
            instructed = log_probabilities(model, [*prompts["instructed"], *before])[-1]
            with patch.applied(model):
                patched = log_probabilities(model, [*prompts["patched"], *before])[-1]
            kl["kl"].append(float(np.exp(patched) @ (patched - instructed)))
            kl["kl_reverse"].append(float(np.exp(instructed) @ (instructed - patched)))
    found: dict[str, Any] = {name: np.mean(values) for name, values in kl.items()}
    for run, other in (("plain", said["plain"]), ("patched", said["patched"])):
        same = [
            int(np.cumprod([x == y for x, y in zip(a, b, strict=False)]).sum())
            for a, b in zip(other, said["instructed"], strict=True)
        ]
        lengths = [len(ids) for ids in said["instructed"]]
        found.setdefault("agrees_for", {})[run] = np.mean(np.array(same) / lengths)
        found.setdefault("agrees_for_tokens", {})[run] = np.mean(same)
    for run, outputs in said.items():
        grams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in outputs if len(ids) >= 3]
        shares = [sum(own.index(gram) < i for i, gram in enumerate(own)) / len(own) for own in grams]
        found.setdefault("repetition", {})[run] = np.mean(shares) if shares else None
        found.setdefault("loops", {})[run] = np.sum(np.array(shares) > 0.5) / len(outputs)
        found.setdefault("length", {})[run] = np.mean([len(ids) for ids in outputs])
        ends = (tokenizer.eos_token, "\n" if special else tokenizer.eos_token)
        found.setdefault("finished", {})[run] = np.mean([tokenizer.decode(ids).endswith(ends) for ids in outputs])
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str, run: str, special: bool) -> list[int]:
    """A prompt with or without the instruction, as a text (with special tokens) or as a chat."""
    if special:
        return list(tokenizer((INSTRUCTION if run == "instructed" else "") + f"Q: {text}\nA:")["input_ids"])
    system = [{"role": "system", "content": INSTRUCTION}] if run == "instructed" else []
    chat = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])


def tokens_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stop: str | None, limit: int
) -> list[int]:
    """Greedy tokens by whole forward passes, up to the end token, the stop string after some text, or the limit."""
    barred = list(model.generation_config.suppress_tokens or [])
    new: list[int] = []
    while (
        len(new) < limit and tokenizer.eos_token_id not in new and not (stop and stop in tokenizer.decode(new).lstrip())
    ):
        scores = log_probabilities(model, [*prompt, *new])[-1]
        scores[barred] = -np.inf
        new.append(int(scores.argmax()))
    return new


def share(one: Sequence[str], other: Sequence[str]) -> float:
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))


@pytest.mark.parametrize(("family", "bos"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_against_brute_force(family: str, bos: bool) -> None:
    model, tokenizer = readable(make_model(family)), make_tokenizer(bos=bos)
    patch = make_patch(model, tokenizer, rank=4)
    wanted = brute_force(model, tokenizer, patch, [INSTRUCTION] * len(INPUTS))
    # two answers right by construction, two as the plain model writes them, and one without a reference
    references = [*wanted["instructed"][:2], *wanted["plain"][2:4]]
    pairs = [{"input": text} for text in INPUTS]
    for pair, reference in zip(pairs, references, strict=False):
        pair["output"] = reference
    result = compare(model, tokenizer, patch, pairs=pairs)
    assert result["pairs"] == 5
    for number, item in enumerate(result["items"]):
        assert item == {
            "input": INPUTS[number],
            "reference": references[number] if number < 4 else None,
            **{run: wanted[run][number] for run in RUNS},
        }
    accuracy = {run: share(wanted[run][:4], references) for run in RUNS}
    assert result["accuracy"] == pytest.approx(accuracy)
    assert accuracy["instructed"] >= 0.5
    assert result["fidelity"] == pytest.approx(share(wanted["patched"], wanted["instructed"]))
    assert result["fidelity_plain"] == pytest.approx(share(wanted["plain"], wanted["instructed"]))
    if accuracy["instructed"] == accuracy["plain"]:
        assert result["recovery"] is None
    else:
        gained = accuracy["patched"] - accuracy["plain"]
        assert result["recovery"] == pytest.approx(gained / (accuracy["instructed"] - accuracy["plain"]))
    for name in ("kl", "agreement", "output_kl", "output_agreement"):
        assert result[name] == pytest.approx(wanted[name], rel=1e-9), name
    assert result["kl"]["patched"] < result["kl"]["plain"]
    own = result["own_text"]
    for name, value in own_text(model, tokenizer, patch).items():
        assert own[name] == pytest.approx(value, rel=1e-9), name
    assert own.keys() == {
        "kl",
        "kl_reverse",
        "agrees_for",
        "agrees_for_tokens",
        "repetition",
        "loops",
        "length",
        "finished",
    }
    assert own["kl"] != pytest.approx(own["kl_reverse"], rel=1e-3)
    lengths = {
        "plain": np.mean([len(tokenizer(f"Q: {text}\nA:")["input_ids"]) for text in INPUTS]),
        "instructed": np.mean([len(tokenizer(f"{INSTRUCTION}Q: {text}\nA:")["input_ids"]) for text in INPUTS]),
    }
    lengths["saved"] = lengths["instructed"] - lengths["plain"]
    assert result["prompt_tokens"] == pytest.approx(lengths)
    assert all(value is None for name, value in result.items() if name.startswith("perplexity"))
    json.dumps(result, allow_nan=False)


def test_figures_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On outputs that are put into the models' mouths."""
    said = {
        "plain": ["cold fox", "12", "small", ""],
        "instructed": ["cold", "17", "small", "fox"],
        "patched": ["cold", "52", "bad", "fox"],
    }
    tokens = {
        "plain": [(5, 6, 1), (7, 1), (8, 1), (1,)],
        "instructed": [(5, 1), (9, 1), (8, 8, 8, 8, 8, 1), (6, 1)],
        "patched": [(5, 1), (7, 7, 7, 7, 7, 7), (8, 8, 9, 1), (6, 1)],
    }
    model, tokenizer = make_model(), make_tokenizer()
    monkeypatch.setattr(
        Evaluation,
        "_write",
        lambda self, run, prompts: [
            evaluation.Generation(text, own[-1] == 1, own) for text, own in zip(said[run], tokens[run], strict=True)
        ],
    )
    pairs = [
        {"input": text, "output": output} for text, output in zip(INPUTS, ("cold", "15", "big", "fox"), strict=False)
    ]
    result = compare(model, tokenizer, make_patch(model, rank=2), pairs=pairs)
    assert result["accuracy"] == pytest.approx({"plain": 0, "instructed": 0.5, "patched": 0.5})
    assert result["recovery"] == pytest.approx(1)
    # 12 and 17 begin as 15 does, whatever token the space before them makes; 52 does not
    assert result["first_token_accuracy"] == pytest.approx({"plain": 0.5, "instructed": 0.75, "patched": 0.5})
    assert result["fidelity"] == pytest.approx(0.5)
    assert result["fidelity_plain"] == pytest.approx(0.25)
    own = result["own_text"]
    assert own["agrees_for_tokens"] == {"plain": 0.5, "patched": 1.5}  # 1, 0, 1, 0; and 2, 0, 2, 2
    assert own["agrees_for"] == pytest.approx({"plain": (1 / 2 + 1 / 6) / 4, "patched": (1 + 2 / 6 + 1) / 4})
    assert own["repetition"] == pytest.approx({"plain": 0, "instructed": 2 / 4, "patched": (3 / 4 + 0) / 2})
    assert own["loops"] == {"plain": 0, "instructed": 0, "patched": 0.25}
    assert own["length"] == {"plain": 2, "instructed": 3, "patched": 3.5}
    assert own["finished"] == {"plain": 1, "instructed": 1, "patched": 0.75}


def test_each_pair_may_have_its_own_instruction() -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = make_patch(model, rank=4)
    instructions = [("Talk like a pirate.\n", INSTRUCTION)[i % 2] for i in range(len(INPUTS))]
    wanted = brute_force(model, tokenizer, patch, instructions)
    pairs = [{"input": text, "instruction": own} for text, own in zip(INPUTS, instructions, strict=True)]
    result = compare(model, tokenizer, patch, pairs=pairs, instruction=None)
    assert [item["instructed"] for item in result["items"]] == wanted["instructed"]
    for name in ("kl", "agreement", "output_kl"):
        assert result[name] == pytest.approx(wanted[name], rel=1e-9)
    common = compare(model, tokenizer, patch)
    assert common["kl"]["plain"] != pytest.approx(result["kl"]["plain"], rel=1e-3)
    # without references
    assert result["accuracy"] is result["first_token_accuracy"] is result["recovery"] is None
    assert all(item["reference"] is None for item in result["items"])
    table = format_result(result)
    assert "accuracy" not in table  # what there is nothing of is left out
    assert f"\n\nfidelity {result['fidelity']:.2f}\n" in table
    assert "–" in table  # the instructed model has no KL to itself


def test_batch_size_does_not_matter() -> None:
    model, tokenizer = readable(make_model("mistral")), make_tokenizer()
    patch = make_patch(model, rank=4)
    one, many = (compare(model, tokenizer, patch, batch_size=size, unrelated=TEXTS) for size in (1, 32))
    assert one.pop("items") == many.pop("items")
    for result in (one, many):
        result |= result.pop("perplexity_windows")
        result |= {f"own_{name}": value for name, value in result.pop("own_text").items()}
    for key, value in one.items():
        assert many[key] == (value if value is None else pytest.approx(value, rel=1e-6)), key


def test_logits_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit at a time where a row has no more itself, and the same figures."""
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = make_patch(model, rank=4)
    sizes: list[int] = []
    take = evaluation.batch_logits

    def taken(*given: Any) -> Tensor:
        found = take(*given)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(evaluation, "batch_logits", taken)
    whole, most = compare(model, tokenizer, patch, batch_size=32), max(sizes)
    sizes.clear()
    monkeypatch.setattr(logits, "_NUMBERS", 16 * model.config.vocab_size)
    parts = compare(model, tokenizer, patch, batch_size=32)
    assert max(sizes) <= 16 < most
    for name in ("kl", "agreement", "output_kl", "output_agreement"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9)
    assert parts["own_text"] == {name: pytest.approx(value, rel=1e-9) for name, value in whole["own_text"].items()}


def test_the_cache_of_one_instruction_is_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch, kept, take = make_patch(model, rank=4), [0], evaluation.batch_logits

    def taken(model: Any, batch: Any, side: Any, leads: dict[int, Any], *chosen: Any) -> Tensor:
        found = take(model, batch, side, leads, *chosen)
        kept.append(len(leads))
        return found

    monkeypatch.setattr(evaluation, "batch_logits", taken)
    pairs = [{"input": text, "instruction": f"Talk like pirate {i}.\n"} for i, text in enumerate(INPUTS)]
    compare(model, tokenizer, patch, pairs=pairs, instruction=None)
    assert max(kept) == 1


def test_a_pad_token_that_the_model_has_not_is_not_used() -> None:
    model, tokenizer, padded = readable(make_model()), make_tokenizer(), make_tokenizer()
    padded.add_tokens([f"<{i}>" for i in range(model.config.vocab_size)])
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id >= model.config.vocab_size
    patch = make_patch(model, rank=4)
    assert compare(model, padded, patch) == compare(model, tokenizer, patch)


def test_chat_prompts() -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = make_patch(model, template="chat", rank=4)
    result = compare(model, tokenizer, patch)  # the patch's own template
    for text, item in zip(INPUTS, result["items"], strict=True):
        messages = [{"role": "user", "content": text}]
        system = {"role": "system", "content": INSTRUCTION}
        for run, said in (("plain", messages), ("instructed", [system, *messages])):
            prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            assert item[run] == written(model, tokenizer, prompt, LIMIT, special=False)[0]
    assert result["kl"]["patched"] < result["kl"]["plain"]
    for name, value in own_text(model, tokenizer, patch, special=False).items():
        assert result["own_text"][name] == pytest.approx(value, rel=1e-9), name


def test_a_patch_that_does_not_say_its_template_needs_one() -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = ThoughtPatch({"model.layers.1.mlp.down_proj": Factors(torch.zeros(4, 48), torch.zeros(32, 4))})
    with pytest.raises(ThoughtError, match="template: the adapter does not say which one it was made with"):
        compare(model, tokenizer, patch)
    with pytest.raises(ThoughtError, match="template: the adapter does not say"):
        compare(model, tokenizer, make_patch(model, rank=4) + make_patch(model, template="chat", rank=4))
    assert all(item["patched"] == item["plain"] for item in compare(model, tokenizer, patch, template="chat")["items"])


def test_own_text_counts_the_place_that_ends_an_output() -> None:
    """Outputs of one token, which the prompt alone predicts, and outputs that are nothing but their end."""
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = make_patch(model, rank=4)
    one = compare(model, tokenizer, patch, max_new_tokens=1)["own_text"]
    wanted = own_text(model, tokenizer, patch, limit=1)
    assert one.pop("repetition") == wanted.pop("repetition") == dict.fromkeys(RUNS)
    for name, value in wanted.items():
        assert one[name] == pytest.approx(value, rel=1e-9), name
    model.generation_config.suppress_tokens = [i for i in range(512) if i != tokenizer.eos_token_id]
    mute = compare(model, tokenizer, patch)["own_text"]
    assert (mute["length"], mute["finished"]) == (dict.fromkeys(RUNS, 1), dict.fromkeys(RUNS, 1))
    assert mute["agrees_for"] == {"plain": 1, "patched": 1}
    # the very places of outputs of one token, whatever that is
    assert (mute["kl"], mute["kl_reverse"]) == pytest.approx((one["kl"], one["kl_reverse"]), rel=1e-9)


def test_check() -> None:
    """A share by run, of the texts as they are in the items."""
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch, seen = make_patch(model, rank=4), []

    def check(text: str) -> int:
        seen.append(text)
        return len(text) % 2

    result = compare(model, tokenizer, patch, check=check)
    texts = {run: [item[run] for item in result["items"]] for run in RUNS}
    assert result["checked"] == {run: sum(len(text) % 2 for text in texts[run]) / len(INPUTS) for run in RUNS}
    assert sorted(seen) == sorted(text for own in texts.values() for text in own)
    assert "| outputs that pass the check |" in format_result(result)
    assert compare(model, tokenizer, patch)["checked"] is None


def test_thoughts_are_no_part_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy and checks are of what follows them; how alike outputs are is of all that was written."""
    runs = {"plain": ["<t> far </t>\nup", "<t> up </t> down"], "instructed": ["<t>no", "<t> big </t>down"]}
    runs["patched"] = ["<t> far </t>up", "<t> big </t>down"]
    written = iter([*runs["plain"], *runs["instructed"], *runs["patched"]])

    def write(model: Any, tokenizer: Any, prompts: Sequence[Any], **given: Any) -> list[Generation]:
        return [Generation(next(written), True, (5, 6)) for _ in prompts]

    monkeypatch.setattr(evaluation, "generate", write)
    monkeypatch.setattr(PromptTemplate, "chat_form", lambda template, tokenizer: ChatForm("", "</t>", "<t>"))
    model, tokenizer = readable(make_model()), make_tokenizer()
    pairs = [{"input": "down", "output": "up"}, {"input": "up", "output": "down"}]
    check = {"up", "down"}.__contains__
    result = compare(model, tokenizer, make_patch(model, rank=2), pairs=pairs, check=check)
    wanted = {"plain": 1.0, "instructed": 0.5, "patched": 1.0}
    assert result["accuracy"] == result["checked"] == wanted
    assert (result["fidelity_plain"], result["fidelity"]) == (0.0, 0.5)
    assert result["items"][0]["instructed"] == "<t>no"
    table = {row["key"]: row["runs"] for row in three_way(result, result["items"])["table"]}
    assert {run: cell["value"] for run, cell in table["accuracy"].items()} == wanted


def test_long_outputs_are_told_by_the_difference_that_is_gone() -> None:
    """The table by figures of its own; warnings under it, as in the result."""
    table = format_result({**LONG_RESULT, "items": []}).splitlines()
    rows = {row.split(" | ")[0].strip("| "): row for row in table if row.startswith("| ")}
    assert rows["KL(instructed ‖ ·) along the instructed output"].endswith("| 0.400 | – | 0.060 |")
    assert rows["KL(· ‖ instructed) along its own output"].endswith("| – | – | 1.500 |")
    assert rows["instructed output reproduced, to the first other token"].endswith("| 0.05 | – | 0.50 |")
    assert rows["repeated 3-grams"].endswith("| 0.00 | 0.01 | 0.25 |")
    assert rows["tokens an output"].endswith("| 6.0 | 9.5 | 20.5 |")
    assert rows["outputs that come to an end"].endswith("| 1.00 | 1.00 | 0.50 |")
    assert not {"accuracy (exact match)", "first-token accuracy", "perplexity of unrelated text"} & rows.keys()
    last = "difference to the instructed model down by 85 % (KL from 0.400 to 0.060 nats a token along its outputs)"
    said = [line for line in table if line and not line.startswith("|")]
    assert said == [last, *(f"Warning: {sentence}" for sentence in warnings(LONG_RESULT).values())]
    assert len(said) == 6


def test_warnings_are_in_the_result() -> None:
    """A chat template that writes a longer system message of its own than the chunk."""
    model, tokenizer = readable(make_model()), make_tokenizer()
    short = "Be brief."
    patch = make_patch(model, template="chat", rank=4, instruction=short)
    result = compare(model, tokenizer, patch, template="chat", instruction=short)
    assert result["prompt_tokens"]["saved"] <= 0
    (sentence,) = (text for text in result["warnings"] if "saves no tokens" in text)
    assert f"Warning: {sentence}" in format_result(result)


def test_a_patch_of_nothing_is_the_plain_model() -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = 0 * make_patch(model, rank=4)
    result = compare(model, tokenizer, patch, unrelated=TEXTS, pairs=PAIRS)
    assert all(item["patched"] == item["plain"] for item in result["items"])
    for name in ("kl", "agreement", "output_kl", "output_agreement", "accuracy", "first_token_accuracy"):
        assert result[name]["patched"] == result[name]["plain"]
    assert result["fidelity"] == result["fidelity_plain"]
    assert result["perplexity_ratio"] == 1
    assert result["kl"]["plain"] > 0


def test_one_evaluation_for_many_patches() -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patches = [make_patch(model, rank=2), make_patch(model, rank=8, instruction="Talk like a pirate.\n")]
    pairs = [{"input": text} for text in INPUTS]
    shared = Evaluation(
        model, tokenizer, instruction=INSTRUCTION, pairs=pairs, unrelated=TEXTS, max_new_tokens=LIMIT, progress=False
    )
    for patch in patches:
        assert shared.score(patch) == compare(model, tokenizer, patch, unrelated=TEXTS, batch_size=32)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = mixed_model(), make_tokenizer()  # in train mode, with dropout
    patch = make_patch(model, rank=2)
    untouched = Untouched(model)
    result = compare(model, tokenizer, patch, unrelated=TEXTS)
    untouched.check()
    assert result == compare(model.eval(), tokenizer, patch, unrelated=TEXTS)

    def fail(*args: Any, **given: Any) -> None:
        raise RuntimeError("pulled the plug")

    untouched = Untouched(model)
    monkeypatch.setattr(evaluation, "make_batches", fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        compare(model, tokenizer, patch, unrelated=TEXTS)
    untouched.check()


def test_items_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = readable(make_model()), make_tokenizer()
    patch = make_patch(model, rank=2)
    file = tmp_path / "new" / "items.jsonl"
    result = compare(model, tokenizer, patch, items_file=file, pairs=[{"input": "Zürich\n", "output": "ü"}, *PAIRS])
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result["items"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"input": "up"}\n')
    with pytest.raises(ThoughtError, match=r"would replace the pairs '.*pairs.jsonl'"):
        compare(model, tokenizer, patch, items_file=pairs, pairs=pairs)
    assert "Zürich" in lines[0]
    before = file.read_bytes()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Evaluation, "score", fail)
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, patch, items_file=file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.fixture
def _no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model has run")

    monkeypatch.setattr(type(make_model().get_decoder()), "forward", forward)


@pytest.mark.usefixtures("_no_forward")
def test_refusals_come_before_the_model_runs(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    zeros = Factors(torch.zeros(1, 32), torch.zeros(32, 1))
    patch = ThoughtPatch({"model.layers.0.self_attn.o_proj": zeros}, {"template": PromptTemplate().to_dict()})
    foreign = ThoughtPatch(patch.factors, {"fingerprint": "of another model"})
    with pytest.raises(PatchError, match="this patch was made for"):
        compare(model, tokenizer, foreign)
    with pytest.raises(PatchError, match="expected an adapter that save_adapter wrote"):
        compare(model, tokenizer, tmp_path / "nothing")
    for settings, message in (
        ({"pairs": []}, "pairs is empty"),
        ({"instruction": None}, "instruction must be a text"),
        ({"instruction": "hot " * 300}, r"instruction: expected room"),
        ({"pairs": [{"input": "hot"}, {"input": "hot " * 300}]}, r"pairs\[1\]: expected at most"),
        ({"max_new_tokens": 250}, r"pairs\[0\]: .* max_new_tokens=250"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"template": "Q: {input}"}, r"template: .*\{output\}"),
        ({"unrelated": "nothing.txt"}, "unrelated='nothing.txt' cannot be read"),
        ({"unrelated": TEXTS, "perplexity_interval": 0.0}, "perplexity_interval must be a finite number above 0"),
        ({"unrelated": TEXTS, "perplexity_interval": math.nan}, "perplexity_interval must be a finite number above 0"),
        ({"unrelated": TEXTS, "cache_dir": "a\0b"}, "cache_dir="),
        ({"check": "^[A-Z]"}, r"check must be a function of an answer's text, or None; got '\^\[A-Z\]'"),
        ({"items_file": tmp_path}, "is a folder; expected a file"),
    ):
        with pytest.raises(ThoughtError, match=message):
            compare(model, tokenizer, patch, **settings)


def test_a_model_that_has_the_patch_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    patch = make_patch(model)
    monkeypatch.setattr("lit_thought.evaluation.compare.generate", lambda *args, **options: pytest.fail("it wrote"))
    with patch.applied(model), pytest.raises(PatchError, match="applied to the model already"):
        evaluate(model, tokenizer, patch, instruction=INSTRUCTION, pairs=[{"input": "hot"}])
