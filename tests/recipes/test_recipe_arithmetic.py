"""The recipe ``arithmetic``: its command line at a reduced setting, its texts, its labels and its splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from recipe_runs import models, run_recipe

from lit_thought import load_model
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors
from recipes.studies.accuracy_by_step import step_table
from recipes.tasks import arithmetic_model
from recipes.tasks.arithmetic import (
    arithmetic,
    choose,
    instructed_texts,
    prepare_pretrained,
    prepare_tiny,
    ratio,
    right_when_instructed,
    verdict,
)
from recipes.tasks.arithmetic_model import (
    OPERATIONS,
    TEMPLATE,
    WORDINGS,
    Texts,
    Training,
    answer_labels,
    cache_key,
    solved,
    split_pairs,
    trained_model,
)

TINY = [f"tiny, {chunk}, preserving both" for chunk in ("wording", "demonstrations")]
SMALL = {"largest": 5, "layers": 2, "width": 16, "heads": 2, "steps": 5, "batch_size": 8}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(models() / "cache"))


def test_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reduced = ["--fit=10", "--test=6", "--steps=2", "--rank=4", "--max_new_tokens=3"]
    reduced += [
        "--preserving=[both]",
        "--pairs_per_step=5",
        *(f"--training.{name}={value}" for name, value in SMALL.items()),
    ]
    ran = run_recipe("arithmetic", tmp_path, f"--models=[tiny,{models() / 'llama'}]", *reduced, model=None)
    printed, record, page = ran.printed, ran.record, ran.page
    assert "The tiny model was " in printed
    assert list(record["runs"]) == [*TINY, "llama"]
    assert record["training"]["settings"] == vars(Training(**SMALL))
    held_out = len(split_pairs(Training(**SMALL))[1])
    for runs in record["runs"].values():
        assert set(runs) == {"sum", "product"}
        for name, own in runs.items():
            assert set(own["cross"]) == {"no patch", "sum", "product"}
            assert own["cross"]["no patch"] == own["correct"]["instructed"]
            assert {len(items) for items in [*own["cross"].values(), *own["correct"].values()]} == {own["pairs"]}
            assert own["accuracy"]["patched"] == pytest.approx(sum(own["correct"]["patched"]) / own["pairs"])
            assert own["output_kl"]["patched"] < own["output_kl"]["plain"], name
    tiny = record["runs"][TINY[0]]["sum"]
    assert (tiny["pairs"], sum(tiny["untrained"]), tiny["fitted"]) == (6 + held_out, held_out, 10)
    assert {len(history) for one in record["history"].values() for history in one.values()} == {3}
    assert list(record["history"]["sum"]) == ["mlp_in", "matrix", "vector"]
    assert ran.out.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
    assert page.startswith("`python -m recipes.tasks.arithmetic` on tiny, llama; settings: ")
    assert "(arithmetic.svg)" in page
    assert "the bar of 0.95 is" in page

    sizes = {"fit": 10, "test": 6, "rank": 4, "max_new_tokens": 3}
    kept: dict[str, Any] = {"chunks": ["wording"], "preserving": ["both"], "methods": []}
    arithmetic(["tiny"], Training(**SMALL), **kept, **sizes, out=str(tmp_path / "again"))
    assert "The tiny model was in the cache." in capsys.readouterr().out
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again["training"] == record["training"]
    assert again["runs"][TINY[0]]["sum"]["correct"] == tiny["correct"]
    assert again["history"] == {}


def test_trained_models_are_told_apart_by_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Training(**SMALL)
    assert cache_key(one) == cache_key(Training(**SMALL))
    assert len({cache_key(Training(**{**SMALL, name: 6})) for name in SMALL if name not in ("width", "heads")}) == 4
    before = cache_key(one)
    monkeypatch.setitem(arithmetic_model.WORDINGS, "sum", ("sum :",))
    assert cache_key(one) != before


def test_a_training_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arithmetic_model, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        trained_model(Training(**SMALL))
    assert not list(tmp_path.iterdir())


def test_training_is_seeded() -> None:
    training = Training(**SMALL)
    tokenizer = arithmetic_model.make_tokenizer(training.largest)
    (first, loss), (second, again) = (arithmetic_model.train(training, tokenizer) for _ in range(2))
    other, _ = arithmetic_model.train(Training(**{**SMALL, "seed": 1}), tokenizer)
    assert loss == again
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_pairs_held_out_are_known_in_the_other_order_only() -> None:
    trained, held_out = split_pairs(Training(largest=9, held_out=0.4))
    assert len(held_out) == 18  # of 45 pairs of two different numbers of 0 to 9
    assert sorted([*trained, *held_out]) == [(a, b) for a in range(10) for b in range(10)]
    assert all((b, a) in trained for a, b in held_out)
    assert {a < b for a, b in held_out} == {True, False}


def test_training_texts_hold_right_answers_to_trained_pairs_only() -> None:
    training = Training(largest=9, queries=3, instructed=0.6, steps=50, batch_size=8)
    texts, trained = Texts(training), set(split_pairs(training)[0])
    alone = {"sum": 0, "product": 0}
    for index in range(len(texts)):
        words = texts[index].split()
        start = words.index(":") + 1 if ":" in words else 0
        rows = [words[i : i + 5] for i in range(start, len(words), 5)]
        assert len(rows) == 3
        operation = None
        for a, b, equals, answer, end in rows:
            assert (equals, end) == ("=", ";")
            assert (int(a), int(b)) in trained
            fits = {name for name, of in OPERATIONS.items() if of(int(a), int(b)) == int(answer)}
            operation = fits if operation is None else operation & fits
        assert operation, texts[index]
        if start:
            assert any(" ".join(words[:start]) in WORDINGS[name] for name in operation)
        elif len(operation) == 1:
            alone[operation.pop()] += 1
    assert sum(alone.values()) == pytest.approx(0.4 * len(texts), abs=60)
    assert min(alone.values()) > 0.35 * sum(alone.values())


def test_answers_are_learned_and_nothing_else() -> None:
    tokenizer = arithmetic_model.make_tokenizer(9)
    ids = tokenizer(["sum : 3 7 = 10 ; 2 2 = 4 ;", "3 7 = 21 ;"], padding=True, return_tensors="pt")["input_ids"]
    labels = answer_labels(ids, tokenizer.convert_tokens_to_ids("="))
    learned = [[tokenizer.decode(i) for i in row if i >= 0] for row in labels]
    assert learned == [["10", ";", "4", ";"], ["21", ";"]]
    assert (labels[labels >= 0] == ids[labels >= 0]).all()


def test_prompts_with_and_without_an_instruction_differ_by_it_alone() -> None:
    tokenizer = arithmetic_model.make_tokenizer(19)
    pair = TEMPLATE.tokenise(tokenizer, "sum :", "3 17", "20")
    assert tokenizer.decode(pair.plain_ids) == "<s> 3 17 = 20 ;"
    assert tokenizer.decode(pair.instructed_ids) == "<s> sum : 3 17 = 20 ;"
    assert pair.exact
    assert len(pair.plain_positions) == len(pair.plain_ids)
    assert tokenizer.decode(tokenizer(str(19 * 19))["input_ids"]) == "<s> 361"


def test_what_is_shown_fitted_tested_and_preserved_is_disjoint() -> None:
    training = Training(**SMALL)
    folder, _ = trained_model(training)
    loaded = load_model(folder)
    setting = prepare_tiny(*loaded, training, "demonstrations", "other", 10, 8, 6, 0)
    shown = setting.instructions["sum"]
    parts = [[tuple(map(int, row.split()[:2])) for row in shown.split(" ;")[:-1]], setting.fit, setting.test]
    assert [len(part) for part in parts] == [3, 8, 6 + len(setting.untrained)]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert not {(0, 0), (2, 2)} & set().union(*parts), "whose sum is their product"
    for operation in OPERATIONS:
        kept = setting.preserve[operation]
        assert isinstance(kept, list)
        rows = [row.split() for text in kept for row in text.partition(" : ")[2].split(" ;")[:-1]]
        assert not {(int(row[0]), int(row[1])) for row in rows} & set(setting.test)
        wrong = [row for row in rows if int(row[3]) == OPERATIONS[operation](int(row[0]), int(row[1]))]
        assert all(int(row[0]) + int(row[1]) == int(row[0]) * int(row[1]) for row in wrong), "the other operation"
    assert len(prepare_tiny(*loaded, training, "wording", "both", 10, 8, 6, 0).preserve["sum"] or "") > len(kept)
    setting = prepare_tiny(*loaded, training, "wording", "nothing", 10, 8, 6, 0)
    assert setting.preserve == {"sum": None, "product": None}
    assert setting.instructions == {"sum": "sum :", "product": "product :"}


def test_a_pretrained_model_is_shown_numbers_of_one_digit() -> None:
    setting = prepare_pretrained(str(models() / "llama"), 4, 100, 100, 0)
    every = {*setting.fit, *setting.test}
    assert len(every) == len(setting.fit) + len(setting.test) == 80 - 4
    assert len(setting.fit) == 38
    assert {digit for pair in every for digit in pair} == set(range(1, 10))
    assert setting.instructions["product"].count("\nA: ") == 4
    assert not any(f"Q: {a} {b}\n" in setting.instructions["sum"] for a, b in every)


def test_texts_of_an_operation_take_its_wordings_in_turn() -> None:
    assert solved([(3, 7), (12, 5)], "product") == "3 7 = 21 ; 12 5 = 60 ;"
    texts = instructed_texts([(1, n) for n in range(9)], "sum", 2)
    assert texts[0] == "sum : 1 0 = 1 ; 1 1 = 2 ;"
    assert texts[4] == "sum : 1 8 = 9 ;"
    assert len({text.split(" : ")[0] for text in texts}) == 4


def test_choices_are_disjoint_and_seeded() -> None:
    pairs = [(a, b) for a in range(5) for b in range(5)]
    first, second = choose(pairs, (10, 100), 3)
    assert sorted([*first, *second]) == sorted(set(pairs) - {(0, 0), (2, 2)})
    assert [first, second] == choose(pairs, (10, 100), 3)
    assert first != choose(pairs, (10, 100), 4)[0]


def test_a_patch_is_in_place_while_the_instructed_prompts_are_answered() -> None:
    model, tokenizer = make_model("llama").float(), make_tokenizer()
    rows = [{"input": "hot", "output": "x"}, {"input": "big", "output": "x"}]
    evaluation = Evaluation(model, tokenizer, instruction="up", pairs=rows, unrelated=None, max_new_tokens=3)
    target = "model.layers.1.mlp.down_proj"
    torch.manual_seed(0)
    patch = ThoughtPatch({target: Factors(torch.randn(4, 48), torch.randn(32, 4))})
    with patch.applied(model):
        changed = Evaluation(model, tokenizer, instruction="up", pairs=rows, unrelated=None, max_new_tokens=3)
    for row, answer in zip(evaluation.rows, changed.instructed, strict=True):
        row["output"] = answer.text
    assert [answer.text for answer in changed.instructed] != [answer.text for answer in evaluation.instructed]
    assert right_when_instructed(evaluation, patch) == [True, True]
    assert right_when_instructed(evaluation, 0.0 * patch) != [True, True]


def test_the_verdict_is_of_the_lower_ratio() -> None:
    def runs(total: float, product: float) -> dict[str, Any]:
        return {
            "sum": {"accuracy": {"instructed": 1.0, "patched": total}},
            "product": {"accuracy": {"instructed": 0.8, "patched": product}},
        }

    assert ratio(runs(1.0, 0.6)["product"]) == pytest.approx(0.75)
    assert "0.750 at least (product); the bar of 0.95 is missed" in verdict({TINY[0]: runs(1.0, 0.6)})
    assert "0.960 at least (sum); the bar of 0.95 is reached" in verdict({TINY[0]: runs(0.96, 0.8)})
    for one in (runs(float("nan"), 0.8), runs(1.0, float("nan"))):
        assert "nan at least" in verdict({TINY[0]: one})
        assert verdict({TINY[0]: one}).endswith("is missed.\n")
    assert verdict({"smollm2": runs(1.0, 1.0)}) == ""


def test_step_table_has_a_line_for_each_method() -> None:
    history = [{"step": i, "accuracy": i / 2, "instructed_accuracy": 1.0} for i in range(3)]
    table = step_table({"mlp_in": history, "vector": history[:3]}, "sum")
    assert "| ΔW and δ | 0.00 | 0.50 | 1.00 |" in table
    assert table.splitlines()[0] == "sum, held-out accuracy by step; instructed: 1.00"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"width": 30}, "training.width"), ({"held_out": 0.0}, "training.held_out"), ({"queries": 1}, "training.queries")],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        Training(**wrong)


def test_the_trained_model_loads_as_any_other() -> None:
    folder, _ = trained_model(Training(**SMALL))
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    model, tokenizer = load_model(folder)
    assert tokenizer("3 5 =")["input_ids"][0] == tokenizer.bos_token_id
    assert model.config.num_hidden_layers == 2
