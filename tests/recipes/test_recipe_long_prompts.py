"""The recipe ``long_prompts``: its data, rules, and command line on a tiny model, for which somebody else writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.inputs.words import normalised
from lit_thought.patch.results import RUNS
from recipes.chunks.long_prompts import FOLDER, RULES, LongPrompt, kept, load_prompt
from recipes.chunks.rules import contains
from recipes.studies.long_prompts import WAYS, answer_line, checked, long_prompts

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
CALL = '{"tool": "dim", "arguments": {"room": "Hall", "percent": 10}}'
CODE = '```python\ndef add(a: int, b: int) -> int:\n    """Return the sum."""\n    return max(a + b, 0)\n```'

CASES: list[tuple[str, Any, list[str], list[str]]] = [
    ("states", ["5", "five"], ["It costs 5 euros.", "Five euros"], ["It costs 15 euros.", ""]),
    ("omits", ["use to"], ["They used to.", "use it to"], ["they Use, to", ""]),
    ("lacks", "St.", ["Mill Street"], ["Mill St. 3", " "]),
    ("begins_with", "Edited: ", ["Edited: A dog."], ["Edited:", "Edited: ", "A dog. Edited: A dog."]),
    (
        "ends_with",
        "The desk",
        ["Five.\nThe desk\n", "Five.\n\n The desk"],
        ["Five. The desk", "The desk", "a\nThe desk."],
    ),
    ("at_most_words", 3, ["one", "one two, three"], ["one two three four", " "]),
    (
        "language",
        "English",
        ["It is here.", "A first visit takes 30 minutes.", "7:30", "Oona Tressel\nHappy gardening!"],
        ["Il est dans la cour.", "Die Karte kostet hier 8 Euro.", " "],
    ),
    ("language", "French", ["Il est dans la cour.", "45 jours.", "7:30"], ["It is in the yard.", ""]),
    ("refuses", True, ["I cannot discuss that here."], ["Take two.", ""]),
    ("refuses", False, ["At 7:30."], ["I can't help with that.", ""]),
    (
        "json_keys",
        ["tool", "arguments"],
        [CALL],
        [f"{CALL} Done.", '{"tool": "dim"}', "[]", CALL.replace("}}", '}, "a": 1}')],
    ),
    (
        "label",
        "billing",
        ['{"label": "billing"}', 'Here: {"label": "billing"} {'],
        ['{"label": "Billing"}', "billing", "{"],
    ),
    ("priority", "low", ['{"label": "billing", "priority": "low"}'], ['{"label": "low"}', '{"priority": ["low"]}']),
    ("tool", "dim", [CALL, f"```\n{CALL}\n```"], [CALL.replace("dim", "dim_light"), '"dim"']),
    (
        "arguments",
        {"room": ["hall"], "percent": [10]},
        [CALL],
        [CALL.replace("10", '"10"'), CALL.replace("Hall", "office"), '{"tool": "dim"}', '{"arguments": [1]}'],
    ),
    (
        "code_block",
        "python",
        [CODE, f"\n{CODE}\n", CODE[:-3], CODE[:-20]],
        [f"Here:\n{CODE}", f"{CODE}\n{CODE}", CODE.replace("python", ""), "def add(): ..."],
    ),
    (
        "function",
        "add",
        [CODE, "def add(): ...", CODE[:-20]],
        [CODE.replace("add", "plus"), "add", "```python\nadd(1, 2)"],
    ),
    ("annotated", True, [CODE], [CODE.replace("b: int", "b"), CODE.replace(" -> int", ""), ""]),
    (
        "docstring",
        True,
        [CODE],
        [CODE.replace("sum.", "sum"), CODE.replace("sum.", "sum\n    of all."), "def add(): ..."],
    ),
    ("uncommented", True, [CODE], [CODE.replace("0)", "0)  # the sum"), "no code"]),
    ("calls_none_of", ["abs", "print"], [CODE, "def f(): ..."], [CODE.replace("max", "print"), "def f(:"]),
]


@pytest.mark.parametrize(("rule", "wanted", "right", "wrong"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_rules(rule: str, wanted: Any, right: list[str], wrong: list[str]) -> None:
    assert isinstance(wanted, RULES[rule].wants)
    assert [text for text in right if not kept(text, {rule: wanted})[rule]] == []
    assert [text for text in wrong if kept(text, {rule: wanted})[rule]] == []


def test_every_rule_is_tested_and_stated() -> None:
    used = {
        rule
        for name in NAMES
        for row in load_prompt(name).messages
        for rule in load_prompt(name).rules_of(row["input"])
    }
    assert used == set(RULES) == {case[0] for case in CASES}


def test_a_function_is_read_and_not_run(tmp_path: Path) -> None:
    text = f'def add():\n    """Sum."""\n\nopen({str(tmp_path / "ran")!r}, "w")'
    assert kept(text, {"function": "add", "docstring": True}) == {"function": True, "docstring": True}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_prompts_answer_their_messages(name: str) -> None:
    own = load_prompt(name)
    prompt = normalised(own.chunk)
    asked = [normalised(row["input"]) for row in own.messages]
    assert len(set(asked)) == len(asked) == 30
    assert [text for text in asked if text in prompt] == [], "no message stands in the prompt"
    for row in own.messages:
        rules = own.rules_of(row["input"])
        assert rules
        for rule in ("label", "priority", "tool"):
            assert rule not in rules or f'"{rules[rule]}"' in own.chunk, row
        if name != "style_editor":  # whose answers are what a rule makes of the message
            assert "states" not in rules or contains(own.chunk, rules["states"]), row
    for rule in ("ends_with", "begins_with"):
        assert rule not in own.rules or own.rules[rule].strip() in own.chunk


def test_prompts_are_of_three_lengths() -> None:
    words = sorted(len(load_prompt(name).chunk.split()) for name in NAMES)
    assert [350 < n < 450 for n in words[:3]] == [700 < n < 1300 for n in words[3:6]] == [True] * 3
    assert all(n > 2000 for n in words[6:])
    assert len(words) >= 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"title": "Oz"}, "KeyError: 'messages'"),
        ({"title": "Oz", "messages": [{"input": "Who?", "rules": {"rhymes": True}}]}, "KeyError: 'rhymes'"),
        (
            {"title": "Oz", "messages": [{"input": "Who?", "rules": {"states": "Ada"}}]},
            "states wants a list, not 'Ada'",
        ),
        ({"title": "Oz", "messages": [{"input": "Who?", "rules": {"language": "Dutch"}}]}, "KeyError: 'Dutch'"),
    ],
)
def test_bad_prompts_are_refused_before_the_model_is_loaded(data: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "oz.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "oz.txt").write_text("You are Oz.", encoding="utf-8")
    with pytest.raises(ThoughtError, match=f"prompts: expected some of clinic_desk, .*{message}.* correct the name"):
        long_prompts(model="there/is none", prompts=[str(tmp_path / "oz.json")])


def test_other_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"prompts: expected some of .*FileNotFoundError"):
        long_prompts(model="there/is none", prompts=["oz"])
    with pytest.raises(ThoughtError, match="timed must be a whole number"):
        long_prompts(model="there/is none", timed=0)
    (tmp_path / "done.json").write_text('{"model": "other", "settings": {}, "runs": []}', encoding="utf-8")
    with pytest.raises(ThoughtError, match=r"done: expected results of none .* is of other"):
        long_prompts(model="none", done=[str(tmp_path / "done.json")])


def test_rules_are_counted_by_kind() -> None:
    messages = ({"input": "Who?", "rules": {"states": ["Ada"]}}, {"input": "Where?", "rules": {"omits": ["Ada"]}})
    own = LongPrompt("oz", "Oz", "You are Oz.", {"at_most_words": 2}, messages)
    items: list[dict[str, Any]] = [
        {"input": "Who?", "plain": "It is me.", "instructed": "Ada.", "patched": "Queen Ada"},
        {"input": "Where?", "plain": "Here.", "instructed": "Here.", "patched": "At Ada's place"},
    ]
    assert checked(own, items)["rules"] == {
        "at_most_words": {"stated": 2, "plain": 1, "instructed": 2, "patched": 1},
        "states": {"stated": 1, "plain": 0, "instructed": 1, "patched": 1},
        "omits": {"stated": 1, "plain": 1, "instructed": 1, "patched": 0},
    }
    assert items[1]["missed"] == {"plain": [], "instructed": [], "patched": ["at_most_words", "omits"]}


def made_run(name: str, instructed: int, patched: int, ratio: float | None) -> dict[str, Any]:
    counts = {"stated": 10, "plain": 1, "instructed": instructed, "patched": patched}
    query = {"instructed": 4.0, "prompt kept": 2.0, "patched": 1.0, "reading": 2.5, "tokens": 32}
    run = {"name": name, "seed": 0, "rules": {"states": counts}, "query": query, "prompt_tokens": {"saved": 500.0}}
    run |= {"others": {"instructed": 0.8, "patched": 0.9}}
    return run | {"seconds": 60.0, "pass_seconds": 5.0, "perplexity_ratio": ratio}


def test_the_answer_is_of_the_runs() -> None:
    line = answer_line([made_run("a", 8, 4, 1.01), made_run("b", 8, 8, 1.02), made_run("c", 0, 0, None)])
    assert "(patches: 3; tokens saved a query: 500 to 500) follows 12 of 30 rules" in line
    assert "follows 16 and the plain one 3: 0.75 times as many as instructed, 0.50 at least (a, seed 0)" in line
    assert "a query with an answer of 32 tokens takes 1.00 s in the place of 4.00 s (2.00 s where the prompt's" in line
    assert "60 s, 12.0 times one pass over its inputs with the prompt, unrelated perplexity is × 1.0200 at most" in line
    assert line.endswith("0.900 of the plain model's tokens stay (0.800 with the prompt before them).")
    assert "with the prompt, and under other" in answer_line([made_run("c", 0, 0, None)])


@pytest.mark.slow
@pytest.mark.usefixtures("_written")
def test_long_prompts(tmp_path: Path) -> None:
    rows = [
        {"input": "Who rules Oz?", "rules": {"states": ["Ada"]}},
        {"input": "Where is Oz?", "rules": {"omits": ["x"]}},
    ]
    for name in ("oz", "ev"):
        data = {"title": name, "rules": {"at_most_words": 9}, "messages": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
        (tmp_path / f"{name}.txt").write_text(f"You are the guide of {name}. Ada rules it.\n", encoding="utf-8")
    reduced = [
        "--answer_tokens=3",
        "--timed=1",
        "--timed_tokens=4",
        "--count=2",
        "--unrelated=false",
        "--fit={rank: 4, inputs: 6}",
    ]
    first = [f"--prompts=[{tmp_path / 'oz.json'}]", *reduced]
    one = run_recipe("long_prompts", tmp_path, *first).record
    (run,) = one["runs"]
    assert run["rules"].keys() == {"at_most_words", "states", "omits"}
    assert run["rules"]["at_most_words"]["stated"] == 2
    assert all(0 <= counts[which] <= counts["stated"] for counts in run["rules"].values() for which in RUNS)
    assert run["checked"]["patched"] == run["rules"]["at_most_words"]["patched"] / 2
    assert (run["inputs"]["kind"], run["inputs"]["count"], run["fitted"]) == ("system", 6, 6)
    assert run["output_kl"]["patched"] < run["output_kl"]["plain"]
    assert run["prompt_tokens"]["saved"] > 5
    assert run["seconds"] > run["pass_seconds"] > 0
    assert all(run["query"][what] > 0 for what in (*WAYS, "reading"))
    assert run["query"]["tokens"] == 4
    assert all(0 <= run["others"][which] <= 1 for which in ("instructed", "patched"))
    both = [f"--prompts=[{tmp_path / 'oz.json'},{tmp_path / 'ev.json'}]", "--seeds=[0,1]", *reduced]
    (tmp_path / "more").mkdir()
    more = run_recipe("long_prompts", tmp_path / "more", *both, f"--done=[{tmp_path / 'long_prompts.json'}]")
    assert more.record["runs"][0] == run
    found = [(run["name"], run["seed"]) for run in more.record["runs"]]
    assert found == [("oz", 0), ("oz", 1), ("ev", 0), ("ev", 1)]
    assert more.page.splitlines()[2].startswith("**A patch made of nothing but a prompt (patches: 4;")
    assert "## Rules by kind" in more.page
    for title in ("## Rules\n", "## Rules by kind\n", "## Costs\n"):
        head, *lines = [line for line in more.page.split(title)[1].split("##")[0].splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {head.count("|")}
