"""The recipe ``system_prompt``: its command line on a tiny model, its rules, and its figures against others."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import make_model, make_tokenizer
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors
from recipes import harness
from recipes.tasks import system_prompt_rules as rules
from recipes.tasks.chats import Chat, by_place
from recipes.tasks.system_prompt import FOLDER, VARIANTS, Task, follows, instructions_known, split, system_prompt

PIRATE = "You are a pirate."


@pytest.fixture(scope="module")
def chat() -> Chat:
    questions = ["Who rules the sea?", "What is a fox?", "Is it hot?"]
    return Chat(make_model("llama").float(), make_tokenizer(), PIRATE, questions, 6)


def test_system_prompt(tmp_path: Path) -> None:
    reduced = ["--instructions=[pirate,refuse,poet]", "--fit=6", "--test=4", "--rank=4", "--max_new_tokens=3"]
    ran = run_recipe("system_prompt", tmp_path, *reduced)
    assert "KL down by" in ran.printed
    record = ran.record
    assert record["settings"]["answer_weight"] == 10
    assert record["versions"]["torch"] == torch.__version__
    pirate, refuse, poet = record["runs"]
    assert [run["name"] for run in (pirate, refuse, poet)] == ["pirate", "refuse", "poet"]
    assert set(refuse["follows"]) == {"plain", "instructed", "patched"}
    assert poet["follows"] is None
    topic = {pair["input"] for pair in json.loads((FOLDER / "cooking.json").read_text())}
    assert [item["input"] in topic for item in refuse["items"]] == [True, True, False, False]
    for run in record["runs"]:
        assert run["output_kl"]["patched"] < run["output_kl"]["plain"]
        assert len(run["items"]) == run["tested"] == 4
    variants = {row["variant"]: row for row in record["variants"]}
    assert set(variants) == set(VARIANTS)
    assert {row["instruction"] for row in record["variants"]} == {"pirate"}
    assert variants["as above"]["output_kl"] == pirate["output_kl"]
    assert variants["half the questions, two sampled answers each"]["pairs"] == 6
    others = [
        row["output_kl"]["patched"] for name, row in variants.items() if "answer weight" in name or "rank" in name
    ]
    assert len(set(others)) > 3, "the changes must reach the fit"
    assert "| pirate, as above |" in ran.page


def test_unknown_instructions_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match=r"instructions: expected some of pirate.*got \['piratt'\]"):
        system_prompt(model="there/is none", instructions=["pirate", "piratt"])


def test_divergence_is_that_of_the_library_and_places_add_up(chat: Chat) -> None:
    patch = ThoughtPatch({"model.layers.1.mlp.down_proj": Factors(torch.zeros(4, 48), torch.zeros(32, 4))})
    expected = chat.evaluation.score(patch)
    assert chat.plain.means["kl"] == pytest.approx(expected["output_kl"]["plain"], rel=1e-4)
    assert chat.plain.means["agreement"] == pytest.approx(expected["output_agreement"]["plain"])
    assert expected["output_kl"]["plain"] > 0
    first, second, *_ = by_place(chat.plain.kl)
    assert first == pytest.approx(sum(float(own[0]) for own in chat.plain.kl) / 3)
    assert second == pytest.approx(float(torch.cat([own[1:4] for own in chat.plain.kl]).mean()))
    assert by_place([torch.tensor([1.0, 2.0])])[2] is None


def test_sampled_answers_differ_and_greedy_ones_are_the_models(chat: Chat) -> None:
    questions = ["Where is the fox?", "How big is it?"]
    greedy = chat.answer(questions)
    messages = [{"role": "system", "content": PIRATE}, {"role": "user", "content": questions[0]}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = chat.tokenizer(text, return_tensors="pt")["input_ids"]
    new = chat.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert greedy[0] == {"input": questions[0], "output": chat.tokenizer.decode(new).split("</s>")[0].strip()}
    drawn = chat.answer(questions, sampled=2)
    assert [pair["input"] for pair in drawn] == questions * 2
    assert drawn[0]["output"] != drawn[2]["output"]
    assert chat.answer([]) == []


def test_questions_are_distinct_and_splits_share_none() -> None:
    general, cooking = (
        [pair["input"] for pair in json.loads((FOLDER / f"{name}.json").read_text())]
        for name in ("questions", "cooking")
    )
    assert len(set(general) | set(cooking)) == len(general) + len(cooking) >= 120
    fit, test = split(general, cooking, 80, 30, 0)
    assert (len(fit), len(test)) == (80, 30)
    assert not set(fit) & set(test)
    assert len(set(fit)) == 80
    assert len(set(test) & set(cooking)) == 15
    assert len(set(fit) & set(cooking)) == 25
    assert split(general, [], 80, 30, 0) != split(general, [], 80, 30, 1)


def test_every_instruction_but_two_has_a_rule() -> None:
    known = instructions_known()
    assert len(known) == len(json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))) >= 6
    assert set(known) - set(rules.RULES) == {"poet", "wizard"}


def test_every_instruction_has_two_other_wordings() -> None:
    for entry in instructions_known().values():
        assert len({entry["instruction"], *entry["reworded"]}) == 3, entry["name"]


@pytest.mark.parametrize(
    ("rule", "follows", "breaks"),
    [
        (
            rules.talks_like_a_pirate,
            ["Arrr, that be so", "Aye!", "Ye must sail the seven seas", "As a pirate, I know"],
            ["The army has a mat.", "A cunning queen", "Yes, you are mated"],
        ),
        (
            rules.is_french,
            ["La capitale de l'Australie est Canberra.", "Le chat est sur la table et il dort dans un lit."],
            ["The capital of Australia is Canberra.", "", "En route to the city of La Paz, the train is on time."],
        ),
        (
            rules.is_one_sentence,
            ["Canberra is the capital.", "It is 3.5 metres long!", 'He said: "Go."', "  Why not?  "],
            ["Yes. It is.", "It is the capital of", "", "It is! Really", "One. Two"],
        ),
        (
            rules.is_archaic,
            ["What sayest thou?", "’Tis a lake", "It hath thee."],
            ["They art-direct", "The thyme", "It is a lake."],
        ),
        (
            rules.is_json_object,
            ['{"answer": "Canberra"}', " {} "],
            ['["a"]', '{"a": ', 'Sure: {"a": 1}', "Canberra", "3"],
        ),
        (rules.is_uppercase, ["CANBERRA IS IT.", "É: 12"], ["Canberra", "123", "", "CANBERRA is it"]),
        (
            rules.refuses,
            ["I'm sorry, but I can't help with cooking.", "I cannot discuss that", "I can’t talk about it."],
            ["I can help with cooking.", "Sorry for the delay: boil it.", "You cannot boil an egg without water."],
        ),
    ],
)
def test_rules(rule: Callable[[str], bool], follows: list[str], breaks: list[str]) -> None:
    assert [text for text in follows if not rule(text)] == []
    assert [text for text in breaks if rule(text)] == []


def test_outside_the_topic_a_refusal_breaks_the_rule() -> None:
    items = [
        {"input": "How do I cook rice?", "plain": "Boil it.", "patched": "I can't help with that."},
        {"input": "How do I cook beans?", "plain": "I cannot help.", "patched": "I cannot talk about it."},
        {"input": "What is a lake?", "plain": "Water.", "patched": "I can't help with that."},
    ]
    topic = frozenset({"How do I cook rice?", "How do I cook beans?"})
    task = Task("refuse", topic, [], cast(Any, None))
    assert (follows(task, items, "plain"), follows(task, items, "patched")) == (2, 2)
    assert follows(task._replace(topic=frozenset()), items, "patched") == 3


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    assert set(harness.provenance()) == {"commit", "versions"}
    monkeypatch.setattr(subprocess, "run", missing)
    assert harness.provenance()["commit"] is None
