"""The recipe ``document``: its command line on a tiny model, its self-study, and its figures against others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import make_model, make_tokenizer
from recipe_runs import CONFIGS, run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.runs.generate import generate
from recipes.tasks import document_data
from recipes.tasks import document_tables as tables
from recipes.tasks.chats import TEMPLATE
from recipes.tasks.document import VARIANTS, check, document, mean_interval, token_f1
from recipes.tasks.document_data import contains, coverage, load_document

PASSAGE = "Oz is a land. Its queen is Ada."
QUESTIONS = ["Who rules Oz?", "What is Oz?", "Who is Ada?", "Is Oz a land?", "Is Ada a queen?", "Where is Ada?"]


@pytest.fixture(scope="module")
def oz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document whose accepted answers are those of the instructed model."""
    model, tokenizer = make_model("llama").float(), make_tokenizer()
    prompts = [
        TEMPLATE.tokenise(tokenizer, document_data.LEAD + PASSAGE, question).instructed_ids for question in QUESTIONS
    ]
    written = generate(model, tokenizer, prompts, max_new_tokens=3, keep_special=True)
    rows = [{"input": question, "outputs": [own.text]} for question, own in zip(QUESTIONS, written, strict=True)]
    rows = [row for row in rows if document_data.normalised(row["outputs"][0])]
    assert len(rows) >= 3
    data = {"title": "Oz", "passage": PASSAGE, "questions": rows, "fit": ["Is Oz old?", "Is Ada old?"]}
    file = tmp_path_factory.mktemp("documents") / "oz.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


@pytest.mark.parametrize("config", ["document", "document_variants"])
def test_document(config: str, oz: Path, tmp_path: Path) -> None:
    rows = json.loads(oz.read_text(encoding="utf-8"))["questions"]
    reduced = [f"--documents=[{oz}]", "--source=given", "--curved=[oz]", "--analysed=[oz]", "--rank=4", "--ranks=[1,2]"]
    reduced += ["--variants=[answer weight 1,no requests besides questions,two sampled answers to each question]"]
    reduced += ["--counts=[]", "--max_new_tokens=3", "--request_tokens=3"]
    ran = run_recipe(config, tmp_path, *reduced)
    assert "oz, as set: right plain" in ran.printed
    record = ran.record
    assert record["settings"]["rank"] == 4
    assert record["versions"]["torch"] == torch.__version__
    runs = {run["variant"]: run for run in record["runs"]}
    assert list(runs)[:3] == ["as set", "rank 1", "rank 2"]
    main = runs["as set"]
    assert main["right"]["instructed"] == [True] * len(rows)
    assert main["ratio"] == pytest.approx(sum(main["right"]["patched"]) / len(rows))
    assert main["texts"]["instructed"] == [row["outputs"][0] for row in rows]
    assert main["output_kl"]["patched"] < runs["rank 1"]["output_kl"]["patched"] < main["output_kl"]["plain"]
    low, high = main["output_kl_interval"]["patched"]
    assert low < main["output_kl"]["patched"] < high
    assert [main["pairs"], runs["no requests besides questions"]["pairs"]] == [11, 4]
    assert runs["two sampled answers to each question"]["pairs"] == 13
    assert len({run["output_kl"]["patched"] for run in runs.values()}) == len(runs), "the changes must reach the fit"
    assert ran.page.startswith("`python -m recipes.tasks.document` on llama; settings: ")
    assert "| oz, answer weight 1 |" in ran.page
    assert ran.out.with_suffix(".svg").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.parametrize("config", ["document", "document_variants"])
def test_configs_ask_for_what_there_is(config: str) -> None:
    values = yaml.safe_load(CONFIGS[config].read_text(encoding="utf-8"))
    parts = {argument: values[argument] for argument in ("curved", "analysed")}
    chosen = check(values["documents"], parts, values["variants"], values["source"])
    assert [own.name for own in chosen] == values["documents"]
    assert values["variants"]


def test_what_stands_for_nothing_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"title": "Oz"}', encoding="utf-8")
    few = {"title": "Oz", "passage": PASSAGE, "questions": [{"input": "Who rules Oz?", "outputs": ["Ada"]}]}
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    for arguments, message in [
        ({"documents": ["velmorra"]}, "documents: expected some of brindlemark, .* got 'velmorra'"),
        ({"documents": [str(tmp_path / "bad.json")]}, "title, passage and questions .*KeyError"),
        ({"documents": [str(tmp_path / "few.json")], "curved": [], "analysed": []}, "few has 1 questions to test with"),
        ({"documents": ["velmora", "velmora"]}, "each once"),
        ({"analysed": ["moon"]}, r"analysed: expected some of brindlemark, .* got \['moon'\]"),
        ({"curved": ["moon"]}, "curved: expected some of brindlemark"),
        ({"variants": ["rank -1"]}, r"variants: expected some of .* got \['rank -1'\]"),
        ({"documents": ["quillow"], "curved": [], "analysed": [], "source": "given"}, "quillow has no given questions"),
        (
            {"documents": ["quillow"], "curved": [], "analysed": ["quillow"], "variants": ["given questions"]},
            "quillow has no given questions",
        ),
    ]:
        with pytest.raises(ThoughtError, match=message):
            document(model="there/is none", **arguments)


def test_answers_contain_whole_words() -> None:
    assert contains("There are 90,000 people.", ["90000"])
    assert contains("It is OSKADEL's port", ["Oskadel"])
    assert contains("the Long-Night song", ["Long Night"])
    assert not contains("It is 18120 m", ["812"])
    assert not contains("the hamlet", ["ham", "let"])
    rows = [{"outputs": ["ham"]}, {"outputs": ["cup", "silver"]}]
    assert coverage(rows, ["hamlet", "a silver spoon", "the cup"]) == [0, 2]


def test_token_f1_is_that_of_squad() -> None:
    # "capital is oskadel" against "oskadel": precision 1/3, recall 1; the better of two forms counts
    assert token_f1(["The capital is Oskadel."], [["Oskadel"]]) == pytest.approx(0.5)
    assert token_f1(["The capital is Oskadel.", "salt"], [["Oskadel", "capital is"], ["tin"]]) == pytest.approx(0.4)


def test_interval_of_a_mean_over_answers_tokens() -> None:
    low, high = mean_interval([torch.full((3,), 0.2), torch.full((5,), 0.2)])
    assert (low, high) == pytest.approx((0.2, 0.2))
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(n, generator=generator) for n in (4, 6, 5, 3, 7, 5, 4, 6)]
    low, high = mean_interval(values)
    means = torch.tensor([float(own.mean()) for own in values])
    spread = 1.96 * float(means.std()) / len(values) ** 0.5
    assert float(torch.cat(values).mean()) - low == pytest.approx(spread, rel=0.5)
    assert high - float(torch.cat(values).mean()) == pytest.approx(spread, rel=0.5)


def made_run(document: str, variant: str, curve: str | None, ratio: float | None, **settings: int) -> dict[str, Any]:
    return {"document": document, "variant": variant, "curve": curve, "ratio": ratio, "rank": 64, "questions": 100} | (
        settings
    )


def test_curves_take_the_runs_that_change_one_setting() -> None:
    runs = [
        made_run("a", "as set", None, 0.9),
        made_run("a", "rank 8", "rank", 0.5, rank=8),
        made_run("a", "10 questions", "questions", 0.4, questions=10),
        made_run("a", "ridge 0.1", None, 0.1),
        made_run("b", "as set", None, None),
        made_run("b", "rank 8", "rank", 0.7, rank=8),
        made_run("c", "as set", None, 0.3),
    ]
    assert tables.curve(runs, "rank") == {8: {"a": 0.5, "b": 0.7}, 64: {"a": 0.9}}
    assert tables.curve(runs, "questions") == {10: {"a": 0.4}, 100: {"a": 0.9}}
    table = tables.curve_table(runs)
    assert "| mean | 0.60 | 0.90 | 0.40 | 0.90 |" in table
    assert "| b | 0.70 | – | – | – |" in table
    assert "| c |" not in table
    assert tables.curve_table(runs[-1:]) == ""


def test_coverage_counts_what_the_instructed_model_gets_right() -> None:
    run = {
        "coverage": [0, 0, 1, 2, 5, 2, 9],
        "right": {"instructed": [1, 1, 1, 1, 1, 0, 0], "patched": [0, 1, 1, 0, 1, 1, 1]},
    }
    assert tables.by_coverage(run) == [(1, 2), (1, 2), (1, 1), (0, 0)]


def test_verdict_names_what_falls_short() -> None:
    runs = [made_run("a", "as set", None, 0.95), made_run("b", "as set", None, 0.80)]
    assert "0.875 on average over 2 documents, 0.800 at least. The bar of 0.85 is reached; below it: b." in (
        tables.verdict(runs)
    )
    assert "is missed; below it: b." in tables.verdict(runs[1:])
    assert "no ratio" in tables.verdict([made_run("a", "as set", None, None)])


def test_the_documents_answer_their_questions() -> None:
    names = sorted(path.stem for path in document_data.FOLDER.glob("*.json"))
    assert len(names) >= 5
    for name in names:
        own = load_document(name)
        asked = [document_data.normalised(row["input"]) for row in own.questions]
        assert len(set(asked)) == len(asked) >= 12
        assert not {document_data.normalised(text) for text in own.given} & set(asked)
        for row in own.questions:
            assert contains(own.passage, row["outputs"]), row
    assert {name: bool(load_document(name).given) for name in names}["velmora"]
    assert all(VARIANTS.values())
