"""The recipe ``translation``: its command line on a tiny model, its data, and its scores against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from recipes.tasks.translation import FOLDER, KINDS, LANGUAGES, load_translations, page, plainly, scores, translation


def test_translation(tmp_path: Path) -> None:
    reduced = ["--languages=[french,german]", "--kinds=[words]", "--seeds=[0,1]", "--shots=3", "--fit=4", "--test=3"]
    reduced += ["--rank=4", "--max_new_tokens=3", "--unrelated_windows=1", "--step_methods=[both]", "--steps=2"]
    reduced += ["--pairs_per_step=2", "--step_test=2", "--samples=1"]
    ran = run_recipe("translation", tmp_path, *reduced, model="gemma")
    record = ran.record
    runs = record["runs"]
    assert [(run["language"], run["seed"]) for run in runs] == [
        *(("french", 0), ("french", 1)),
        *(("german", 0), ("german", 1)),
    ]
    words = {entry["input"]: entry for entry in json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))}
    for run in runs:
        assert run["output_kl"]["patched"] < run["output_kl"]["plain"]
        assert run["prompt_tokens"]["plain"] < run["prompt_tokens"]["instructed"]
        assert run["perplexity_ratio"] != 1
        assert [item["accepted"] for item in run["items"]] == [
            words[item["input"]][run["language"]] for item in run["items"]
        ]
        assert len(run["items"]) == len(run["scores"]["patched"]["right"]) == 3
    history = record["by_step"]["history"]["german"]["both"]
    assert [entry["step"] for entry in history] == [0, 1, 2]
    assert history[2]["output_kl"] < history[0]["output_kl"]
    assert ran.page.startswith("`python -m recipes.tasks.translation` on gemma; settings: ")
    assert "| French, words | 6 | " in ran.page
    assert str(tmp_path) not in ran.page
    assert ran.out.with_suffix(".svg").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_data_has_enough_and_nothing_twice(kind: str) -> None:
    entries = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    inputs = [entry["input"] for entry in entries]
    assert len(set(inputs)) == len(inputs) >= 60
    for entry in entries:
        assert set(entry) == {"input", *LANGUAGES}
        for language in LANGUAGES:
            accepted = entry[language]
            assert accepted
            assert len({plainly(text) for text in accepted}) == len(accepted)
            assert all(text.strip() == text and text for text in accepted)


def test_splits_share_nothing_and_show_first_translations() -> None:
    split, accepted = load_translations("spanish", "words", 1, shots=5, fit=20, test=30)
    fit, test = ({pair["input"] for pair in part} for part in (split.fit, split.test))
    assert (len(fit), len(test), len(accepted)) == (20, 30, 30)
    assert not fit & test
    assert not any(f"Q: {word}\n" in split.instruction for word in fit | test)
    assert all(set(pair) == {"input"} for pair in split.fit)
    assert [pair["output"] for pair in split.test] == [own[0] for own in accepted]
    known = {entry["input"]: entry["spanish"][0] for entry in json.loads((FOLDER / "words.json").read_text())}
    assert split.instruction.count("Q: ") == 5
    for block in split.instruction.strip().split("Q: ")[1:]:
        word, translated = block.split("\nA: ")
        assert known[word] == translated.strip()
    assert (
        load_translations("spanish", "words", 2)[0].instruction
        != load_translations("spanish", "words", 1)[0].instruction
    )


def test_right_is_any_accepted_translation_case_and_marks_apart() -> None:
    accepted = [["le chat", "la chatte"], ["¿Dónde está?"], ["j'ai faim"], ["rojo"], ["groß"]]
    texts = ["La Chatte", "dónde está", " J’ai faim. ", "rojos", "GROSS"]
    assert scores(texts, accepted)["right"] == [True, True, True, False, True]
    assert plainly("é") == plainly("é")


def test_chrf_and_bleu_are_those_of_their_definitions() -> None:
    texts = ["the cat sat on a mat", "he drinks a large glass of milk", "we live in the city"]
    accepted = [
        ["the cat sat on the mat", "a cat was sitting on the mat"],
        ["he drinks a glass of milk"],
        ["we live in the big city", "we are living in the city"],
    ]
    found = scores(texts, accepted)
    # counted by the formulas: chrF of Popović 2015 (against the reference nearest to each text), BLEU of Papineni 2002
    assert found["chrf"] == pytest.approx(71.6916, abs=0.01)
    assert found["bleu"] == pytest.approx(54.7388, abs=0.01)
    same = scores([own[-1] for own in accepted], accepted)
    assert (same["chrf"], same["bleu"]) == pytest.approx((100, 100), abs=1e-3)
    assert scores(["", ""], [["a b"], ["c"]])["chrf"] == pytest.approx(0, abs=1e-3)


def test_page_means_and_ratios() -> None:
    def run(seed: int, plain: list[bool], instructed: list[bool], patched: list[bool]) -> dict[str, Any]:
        right = {"plain": plain, "instructed": instructed, "patched": patched}
        return {
            "language": "french",
            "kind": "words",
            "seed": seed,
            "fidelity": 0.5,
            "perplexity_ratio": 1 + seed / 100,
            "scores": {name: {"right": own, "chrf": 10.0 * seed, "bleu": 0.0} for name, own in right.items()},
            "output_kl": {"plain": 2.0, "patched": 0.1},
            "prompt_tokens": {"plain": 5.0, "instructed": 50.0},
            "items": [],
        }

    no, yes = [False] * 2, [True] * 2
    record = {
        "model": "m",
        "settings": {},
        "by_step": {"history": {}},
        "runs": [run(0, no, yes, yes), run(2, no, yes, [True, False])],
    }
    text = page(record, 1, "translation")
    assert "| French, words | 4 | 0.00 | 1.00 | 0.75 (0.30 to 0.95) | -0.25 (" in text
    assert "| 10.0, 10.0, 10.0 |" in text
    assert "| 2.000 → 0.100 | 1.0100 (1.0200) | 50 → 5 |" in text
    assert "Patched ÷ instructed accuracy: 0.75 on average, 0.75 at least." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": ["french", "latin"]}, r"languages: expected some of french.*got \['latin'\]"),
        ({"kinds": ["verbs"]}, r"kinds: expected some of words, sentences; got \['verbs'\]"),
        ({"step_methods": ["both", "all"]}, r"step_methods: expected some of both.*got \['all'\]"),
        ({"shots": 50, "fit": 30}, r"shots=50 and fit=30 leave no test: sentences has 80 entries"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        translation(model="there/is none", **arguments)
