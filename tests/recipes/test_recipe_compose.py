"""The recipe ``compose``: its command line on a tiny model, and its sums of patches against other ways to them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import torch
from models import make_model, make_tokenizer
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.model.loading import fingerprint
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.solve.factors import Factors
from recipes.chunks.cases import evaluation_of, message_case
from recipes.harness import Unrelated
from recipes.tasks import compose as recipe
from recipes.tasks.compose import SCALED, WAYS, distance, follows, instructions, measure

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compose")
    reduced = ["--fit=6", "--test=4", "--rank=4", "--max_new_tokens=3", "--scales=[0,1,2]", "--unrelated_windows=1"]
    ran = run_recipe("compose", folder, *reduced)
    assert "'A + B', 'the two patches added'" in ran.printed
    assert "| A + B | the two patches added |" in ran.page
    assert ran.page.startswith("`python -m recipes.tasks.compose` on llama; settings: ")
    assert ran.out.with_suffix(".svg").read_text(encoding="utf-8").count("<svg") == 1
    assert str(folder) not in ran.page
    return ran.record


def test_every_way_is_measured(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert set(rows) == {"plain", "instructed: A", "instructed: B", "instructed: joint", *WAYS}
    assert record["versions"]["torch"] == torch.__version__
    assert record["instructions"]["joint"] == f"{record['instructions']['A']} {record['instructions']['B']}"
    for row in rows.values():
        assert len(row["answers"]) == len(record["questions"]) == 4
        assert row["follows"]["both"] == [
            a and b for a, b in zip(row["follows"]["A"], row["follows"]["B"], strict=True)
        ]
    ranks = {name: rows[name]["rank"] for name in WAYS}
    assert (ranks["A"], ranks["A + B"], ranks["(A + B) − B"], ranks["one fit"], ranks["2 × statistics"]) == (
        *(4, 8, 12),
        *(4, 4),
    )
    assert ranks["A, then B"] == 8


def test_fits_come_closer_to_what_they_aim_at(record: dict[str, Any]) -> None:
    kl = {name: row["kl"] for name, row in record["rows"].items() if "kl" in row}
    assert kl["joint"]["joint"] < kl["plain"]["joint"]
    assert kl["A"]["A"] < kl["plain"]["A"]
    assert kl["joint"]["joint"] == min(values["joint"] for values in kl.values())
    assert len({values["joint"] for values in kl.values()}) >= 10, "the ways must differ"


def test_what_is_taken_off_again_leaves_no_trace(record: dict[str, Any]) -> None:
    gaps = {(entry["patch"], entry["from"]): entry["relative"] for entry in record["distances"]}
    assert gaps["(A + B) − B", "A"] < 1e-6
    assert all(value > 0.01 for key, value in gaps.items() if key[0] != "(A + B) − B")
    one, other = record["rows"]["A"], record["rows"]["(A + B) − B"]
    assert other["kl"]["A"] == pytest.approx(one["kl"]["A"], rel=1e-3)
    assert other["answers"] == one["answers"]


def test_scales_begin_at_the_plain_model_and_pass_the_patch(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert set(record["scales"]) == set(SCALED)
    for name, points in record["scales"].items():
        assert [point["scale"] for point in points] == [0, 1, 2]
        nothing, whole, twice = points
        assert nothing["kl"]["joint"] == rows["plain"]["kl"]["joint"]
        assert nothing["perplexity_ratio"] == 1
        assert whole["kl"]["joint"] == rows[name]["kl"]["joint"]
        assert twice["kl"]["joint"] not in (whole["kl"]["joint"], nothing["kl"]["joint"])


def test_follows_asks_each_rule_of_each_answer() -> None:
    answers = ["Arrr, it be Canberra.", "Ahoy! It be Canberra.", "It is Canberra.", "It is Canberra. So it is."]
    found = follows(answers, ("pirate", "sentence"))
    assert found == {"A": [True, True, False, False], "B": [True, False, True, False], "both": [True, *[False] * 3]}


def test_distance_is_that_of_the_dense_weights() -> None:
    generator = torch.Generator().manual_seed(0)

    def patch(*paths: str) -> ThoughtPatch:
        draw = [
            (torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator), path) for path in paths
        ]
        return ThoughtPatch({path: Factors(A, B) for A, B, path in draw})

    def dense(patch: ThoughtPatch, path: str) -> numpy.ndarray:
        own = patch.factors.get(path)
        return numpy.zeros((3, 5)) if own is None else own.B.double().numpy() @ own.A.double().numpy()

    one, two = patch("a", "b"), patch("b", "c")
    gap = sum(numpy.linalg.norm(dense(one, path) - dense(two, path)) ** 2 for path in "abc")
    size = sum(numpy.linalg.norm(dense(two, path)) ** 2 for path in "bc")
    assert distance(one, two) == pytest.approx(numpy.sqrt(gap / size))
    assert distance(one, one) == pytest.approx(0, abs=1e-7)
    assert distance(3 * one, one) == pytest.approx(2)


def test_a_fit_after_another_is_of_the_patched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama").float()
    down = model.get_submodule(DOWN)
    generator = torch.Generator().manual_seed(1)
    one, two = (
        Factors(torch.randn(2, 48, generator=generator), torch.randn(32, 2, generator=generator)) for _ in range(2)
    )
    original = down.weight.clone()
    before, later = (ThoughtPatch({DOWN: own}, {"fingerprint": fingerprint(model)}) for own in (one, two))
    case = message_case({"name": "B", "instruction": "Be kind."}, 0, 2, 4, fit=3)
    seen = []

    def transmute(of: Any, tokenizer: Any, chunk: str, pairs: Any, template: Any, **settings: Any) -> ThoughtPatch:
        seen.append(of.get_submodule(DOWN).weight.clone())
        assert (chunk, pairs) == ("Be kind.", case.given)
        assert not any("output" in pair for pair in pairs), "the patched model must answer them"
        assert settings.pop("rank") == 2
        assert Path(settings.pop("cache_dir")).is_dir(), "statistics of the changed model must not stay in the cache"
        assert settings == {"progress": False}
        return later

    monkeypatch.setattr(recipe, "transmute", transmute)
    evaluation = SimpleNamespace(model=model, tokenizer=None)
    after = recipe.fit_after(before, cast(Any, evaluation), case, {"rank": 2})
    (weight,) = seen
    torch.testing.assert_close(weight, original + one.B @ one.A)
    assert torch.equal(down.weight, original)
    with after.applied(model):
        torch.testing.assert_close(down.weight, original + one.B @ one.A + two.B @ two.A)


def test_measure_is_of_the_patched_model_and_leaves_it_alone() -> None:
    model, tokenizer = make_model("llama").float(), make_tokenizer()
    entries = instructions("pirate", "sentence")
    cases = {key: message_case(entries[key], 0, 3, 4) for key in ("A", "joint")}
    evaluations = {key: evaluation_of(model, tokenizer, case, unrelated=False) for key, case in cases.items()}
    nothing = ThoughtPatch({DOWN: Factors(torch.zeros(4, 48), torch.zeros(32, 4))})
    unrelated = Unrelated(model, tokenizer, 1)
    unrelated.windows = [list(range(5, 60))]
    with torch.no_grad():
        loss = model(torch.tensor(unrelated.windows), labels=torch.tensor(unrelated.windows)).loss
    unrelated.perplexity = 2 * float(loss.exp())
    found = measure(evaluations, nothing, ("joint", "A"), unrelated, ("pirate", "sentence"))
    assert found["perplexity_ratio"] == pytest.approx(0.5, rel=1e-4)
    assert found["answers"] == [one.text for one in evaluations["joint"].plain]
    for aim in ("joint", "A"):
        plain = evaluations[aim].score(nothing)
        assert found["kl"][aim] == pytest.approx(plain["output_kl"]["plain"], rel=1e-4)
        assert found["agreement"][aim] == plain["output_agreement"]["plain"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("piratt", "sentence", r"first: expected one of pirate.*got 'piratt'"),
        ("pirate", "refuse", r"second: expected one of pirate.*got 'refuse'"),
        ("poet", "pirate", r"first: expected one of .*got 'poet'"),
        ("pirate", "pirate", r"first and second are both 'pirate'"),
    ],
)
def test_instructions_that_cannot_be_used_are_refused(first: str, second: str, message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        instructions(first, second)
