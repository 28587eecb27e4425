"""The recipe ``gallery``: its command line on a tiny model, for which somebody else writes; what it says of a case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import run_recipe

from lit_thought.inputs import pen
from lit_thought.runs.generate import Generation
from recipes.site.gallery import failures


@pytest.fixture(autouse=True)
def _written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model writes no inputs that could be kept."""
    numbers: Iterator[int] = count()

    def write(model: Any, tokenizer: Any, prompts: list[Any], **options: Any) -> list[Generation]:
        return [Generation(f"is {next(numbers)} of Oz?", True) for _ in prompts]

    monkeypatch.setattr(pen, "generate", write)


def test_gallery(tmp_path: Path) -> None:
    rows = [{"input": text, "outputs": ["Ada"]} for text in ("Who rules Oz?", "Where is Oz?", "What is Oz?")]
    oz = {"title": "Oz", "passage": "Ada rules Oz. The city is green.", "questions": rows}
    (tmp_path / "oz.json").write_text(json.dumps(oz))
    reduced = ["--tasks=[common_words/antonym]", "--instructions=[pirate,wizard]"]
    reduced += [f"--documents=[{tmp_path / 'oz.json'}]", '--asked=["Who are you?", "Is it 0 of Oz?"]', "--test=3"]
    ran = run_recipe(
        "gallery",
        tmp_path,
        *reduced,
        "--answer_tokens=3",
        "--word_tokens=3",
        "--document_tokens=3",
        "--document_rank=4",
    )
    runs = ran.record["runs"]
    assert [(run["kind"], run["name"]) for run in runs] == [
        *[("system prompt", name) for name in ("pirate", "wizard")],
        *[("word task", "antonym"), ("document", "oz")],
    ]
    for run in runs[:2]:
        assert [item["input"] for item in run["items"]][:2] == ["Who are you?", "Is it 0 of Oz?"]
        assert len(run["items"]) == run["tested"] == 3
        assert run["output_kl"]["patched"] < run["output_kl"]["plain"]
    summary, *cases = ran.page.split("\n## ")
    assert [case.splitlines()[0] for case in cases] == [run["name"] for run in runs]
    for run, case in zip(runs, cases, strict=True):
        assert f"[{run['name']}](#{run['name']})" in summary
        assert f"> {run['chunk'].split()[0]}" in case
        lines = [line for line in case.splitlines() if line.startswith("| ")]
        assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {item['input']}" for item in run["items"][:2]]
        assert all(sentence in case for sentence in failures(run))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (None, ""),
        ({"plain": 0, "instructed": 0, "patched": 0}, "nothing to copy"),
        ({"plain": 0, "instructed": 10, "patched": 4}, "Of 10 answers that the instructed model has right"),
        ({"plain": 0, "instructed": 10, "patched": 5}, ""),
    ],
)
def test_a_failure_is_called_one(counts: dict[str, int] | None, said: str) -> None:
    (*found,) = failures({"right": counts, "warnings": []})
    assert [said in sentence for sentence in found] == ([True] if said else [])
    assert failures({"right": None, "warnings": ["It saves nothing."]}) == ["It saves nothing."]
