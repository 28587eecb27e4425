"""The recipe ``self_agreement``: its command line on a tiny model, and its figures against others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from recipe_runs import run_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from recipes.chunks.system_prompts import instructions_known
from recipes.harness import TEMPLATE, Split, Trial
from recipes.studies import self_agreement as recipe
from recipes.studies.self_agreement import answer_logits, margins, measure, narrow, of_words, same, self_agreement

PAIRS = [
    {"input": word, "output": other}
    for word, other in (("hot", "cold"), ("up", "down"), ("big", "good"), ("fox", "dog"), ("red", "blue"))
]


@pytest.fixture
def trial() -> Trial:
    tested = [{"input": word, "output": ""} for word in ("quick", "brown", "good", "lazy", "pirate", "French")]
    return Trial(make_model("llama").float(), make_tokenizer(), Split("words", PAIRS[:2], PAIRS[2:], tested), 4)


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    """What the model writes token by token, each time from all of the text, up to a line break or its end."""
    ids, new = tokenizer(prompt)["input_ids"], []
    for _ in range(count):
        new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        text = tokenizer.decode(new)
        if new[-1] == tokenizer.eos_token_id or "\n" in text.lstrip():
            break
    return tokenizer.decode(new, skip_special_tokens=True).strip().split("\n")[0].strip()


@torch.no_grad()
def margin(trial: Trial, one: str, other: str) -> float:
    """log p₁ − log p₂ of the model at the first token in which two texts differ."""
    mine, theirs = (trial.tokenizer(text)["input_ids"] for text in (one, other))
    place = [a == b for a, b in zip(mine, theirs, strict=False)].index(False)
    logs = trial.model(torch.tensor([mine])).logits[0, place - 1].log_softmax(-1).sort(descending=True).values
    return float(logs[0] - logs[1])


def prompt(shown: Sequence[dict[str, str]], word: str) -> str:
    return "".join(f"Q: {pair['input']}\nA: {pair['output']}\n" for pair in shown) + f"Q: {word}\nA:"


def test_self_agreement(tmp_path: Path) -> None:
    reduced = ["--tasks=[common_words/antonym]", "--shuffles=2", "--shots=5", "--inputs=4", "--test=3"]
    reduced += ["--instructions=[pirate,poet]", "--questions=2", "--answer_tokens=3"]
    ran = run_recipe("self_agreement", tmp_path, *reduced, "--max_new_tokens=3", "--bfloat16=true")
    runs = {name: [run for run in ran.record["runs"] if run["task"] == name] for name in ("antonym", "pirate", "poet")}
    kinds = ["shuffled", "shuffled", "other demonstrations", "bfloat16", "patched"]
    assert [run["kind"] for run in runs["antonym"]] == kinds
    for name in ("pirate", "poet"):
        assert [run["kind"] for run in runs[name]] == ["reworded", "reworded", "bfloat16", "patched"]
        assert [run["chunk"] for run in runs[name][:2]] == instructions_known()[name]["reworded"]
    one, two, others, low, patched = runs["antonym"]
    lines = [sorted(run["chunk"].splitlines()) for run in (one, two, others, low)]
    assert lines[0] == lines[1] == lines[3] != lines[2]
    assert not {line for line in lines[2] if line.startswith("Q")} & {line for line in lines[0] if line.startswith("Q")}
    assert len({run["chunk"] for run in (one, two, others, low)}) == 4
    assert 0 < low["kl"] < min(one["kl"], others["kl"])
    assert patched["chunk"] is None
    tested = ran.record["undisturbed"]["antonym"]
    assert not any(f"Q: {item['input']}\n" in run["chunk"] for item in tested for run in (one, others))
    for run in runs["antonym"]:
        equal = [text == item["output"] for text, item in zip(run["outputs"], tested, strict=True)]
        assert equal == [value is None for value in run["margins"]]
        assert run["follows"] is None
    assert set(runs["pirate"][0]["follows"]) == {"undisturbed", "disturbed"}
    assert runs["poet"][0]["follows"] is None
    assert "| word tasks | shuffled | other demonstrations | bfloat16 | patched | patched − shuffled |" in ran.page
    assert "| system messages | reworded | bfloat16 | patched | patched − reworded |" in ran.page
    head = "| system messages | KL, reworded | bfloat16 | patched | rule followed: undisturbed | reworded | bfloat16 |"
    rows = ran.page.partition(head)[2].splitlines()[2:5]
    kls = {name: [run["kl"] for run in runs[name]] for name in ("pirate", "poet")}
    means = {name: [(one[0] + one[1]) / 2, *one[2:]] for name, one in kls.items()}
    for row, wanted in zip(
        rows, [*means.values(), [sum(pair) / 2 for pair in zip(*means.values(), strict=True)]], strict=True
    ):
        assert [float(cell) for cell in row.split(" | ")[1:4]] == pytest.approx(wanted, abs=5e-4)
    counts = [run["follows"]["disturbed"] for run in runs["pirate"]]
    cells = [float(cell) for cell in rows[0].rstrip(" |").split(" | ")[4:]]
    assert cells == [runs["pirate"][0]["follows"]["undisturbed"], (counts[0] + counts[1]) / 2, *counts[2:]]
    assert rows[1].endswith("| – | – | – | – |")


def test_agreement_is_that_of_texts_written_token_by_token(trial: Trial) -> None:
    model, tokenizer, words = trial.model, trial.tokenizer, [pair["input"] for pair in trial.split.test]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    case = of_words(trial, inputs=2, shuffles=3, seed=0)
    shuffled, other, patched = (
        [run for run in measure(case, None) if run["kind"] == kind]
        for kind in ("shuffled", "other demonstrations", "patched")
    )
    own = [greedy(model, tokenizer, prompt(PAIRS[:2], word), 4) for word in words]
    reference = {
        f"Q: {a['input']}\nA: {a['output']}\nQ: {b['input']}\nA: {b['output']}\n": [
            greedy(model, tokenizer, prompt([a, b], word), 4) == text for word, text in zip(words, own, strict=True)
        ]
        for a, b in (PAIRS[:2], PAIRS[1::-1], PAIRS[2:4])
    }
    assert {run["chunk"] for run in shuffled} | {other[0]["chunk"]} == set(reference)
    assert all(same(run) == reference[run["chunk"]] for run in [*shuffled, *other])
    scored = case.evaluation.score(case.patch)
    assert sum(same(patched[0])) / len(words) == scored["fidelity"]
    assert patched[0]["outputs"] == [item["patched"] for item in scored["items"]]
    assert patched[0]["kl"] == pytest.approx(scored["output_kl"]["patched"], rel=1e-4)
    assert min(run["kl"] for run in shuffled) == 0, "the order that is the undisturbed one"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("inputs", "pairs"), [(None, None), (2, [{"input": "big"}, {"input": "fox"}])])
def test_words_to_fit(trial: Trial, inputs: int | None, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the task, or those that the model writes."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(recipe, "transmute", lambda *args, **settings: calls.append((*args, settings)))
    of_words(trial, inputs, shuffles=1, seed=0)
    [(model, _, instruction, given, template, settings)] = calls
    assert (model, given) == (trial.model, pairs)
    assert (instruction, template) == (trial.split.instruction, TEMPLATE)
    assert settings == {"max_new_tokens": 4, "progress": False, "val_pairs": trial.split.test}


def test_margins_are_the_models_at_the_first_token_that_differs(trial: Trial) -> None:
    evaluation = trial.evaluation(unrelated=None)
    wanted = answer_logits(trial.model, evaluation.completed, instructed=True)
    own = [one.text for one in evaluation.instructed]
    others = [own[0], "zebra", own[2] + " fox", own[3][:-1], "", own[5]]
    found = margins(evaluation, wanted, others)
    assert [value is None for value in found] == [True, False, False, False, False, True]
    for place in (1, 2, 3):
        ahead = prompt(PAIRS[:2], trial.split.test[place]["input"])
        one, other = (f"{ahead} {text}\n" for text in (own[place], others[place]))
        assert found[place] == pytest.approx(margin(trial, one, other), abs=1e-4)
    assert narrow({"margins": [None, 0.1, 0.49, 0.5, 3.0]}) == 0.5
    assert narrow({"margins": [None]}) is None


def test_what_leaves_nothing_to_test_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"inputs: expected words of antonym left to test; got 60"):
        self_agreement(model="there/is none", tasks=["common_words/antonym"], inputs=60)
    with pytest.raises(ThoughtError, match=r"shuffles must be a whole number of 1 or more"):
        self_agreement(model="there/is none", shuffles=0)
