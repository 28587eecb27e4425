"""The settings of a fit, and that everything that takes, checks, keeps or documents one derives from them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from fits import INSTRUCTION, PAIRS, make_patch
from models import make_model

from lit_thought import PairDataModule, ThoughtCallback, ThoughtError, settings, transmute
from lit_thought.cli import COMMANDS
from lit_thought.cli.parser import command_parser
from lit_thought.fit.selection import AUTO
from lit_thought.settings import FitSettings, takes_settings


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_one_home() -> None:
    """A new setting is a field and a line of the docstring; the rest follows."""
    every = {one.name: one.default for one in dataclasses.fields(FitSettings)}
    assert len(every) <= 26
    documented = [line.strip().partition(":")[0] for line in (FitSettings.__doc__ or "").splitlines()]
    assert [name for name in documented if name in every] == list(every)
    taken = {"transmute": parameters(transmute), "callback": parameters(ThoughtCallback)}
    data = parameters(PairDataModule)
    for name, default in every.items():
        places = [taken["transmute"], data if name in FitSettings.names(data=True) else taken["callback"]]
        assert all(place[name].default is default or place[name].default == default for place in places), name
    assert not data.keys() & set(FitSettings.names(data=False))
    assert not taken["callback"].keys() & set(FitSettings.names(data=True))
    flags = vars(command_parser(COMMANDS["fit"]).parse_args(["--pairs=p", "--out=o"]))
    assert {name: flags[name] for name in every} == every
    assert set(AUTO) == {"blocks", "scale", "rank", "ridge", "preserve_weight"}
    kept = make_patch(make_model()).provenance["settings"]
    assert set(FitSettings.names(passing=False)) <= kept.keys()
    assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize(
    ("answers", "ridge", "weight"),
    [(0, 0.03, 3.0), (120, 0.03, 3.0), (1920, 0.001875, 1.5), (1200, 0.003, 3.0 / 10**0.25), (1_200_000, 0.001, 0.3)],
)
def test_prior_against_answers(answers: int, ridge: float, weight: float) -> None:
    found = FitSettings().settled().weighed(answers)
    assert (found.ridge, found.preserve_weight) == (pytest.approx(ridge), pytest.approx(weight))
    larger = FitSettings().settled().weighed(answers, larger=True)
    assert (larger.ridge, larger.preserve_weight) == (found.ridge, pytest.approx(weight * 8 / 3))
    given = FitSettings(ridge=0.2, preserve_weight=0.0).settled().weighed(answers, larger=True)
    assert (given.ridge, given.preserve_weight) == (0.2, 0.0)
    alone = FitSettings(sites=["mlp_in"]).settled().weighed(answers)
    assert (alone.ridge, alone.preserve_weight) == (0.03, 1.0)


def test_what_depends_on_the_sites() -> None:
    settled = FitSettings().settled()
    assert (settled.steps, settled.step_size, settled.preserve_weight, settled.answer_weight) == (1, 1.0, None, 30.0)
    alone = FitSettings(sites="mlp_in", steps=5).settled()
    assert (alone.steps, alone.step_size, alone.preserve_weight, alone.answer_weight) == (5, 0.5, 1.0, 100.0)
    assert alone.sites == ("mlp_in",)
    assert FitSettings(sites=["mlp_out", "attn_out"], blocks=(2, 0)).blocks == [0, 2]
    assert [FitSettings(offload=place).offload for place in (True, False)] == ["cpu", "device"]


def test_auto_is_found_and_not_checked_as_a_number() -> None:
    assert FitSettings(ridge="auto", rank="auto", blocks="auto").auto == ("blocks", "rank", "ridge")
    with pytest.raises(ThoughtError, match="ridge must be a finite number ≥ 0; got 'automatic'"):
        FitSettings(ridge="automatic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transmute(None, None, "x", PAIRS, rnk=3), r"transmute\(\) got an .*'rnk'\. Did you mean 'rank'\?"),
        (lambda: PairDataModule(PAIRS, INSTRUCTION, ridge=1), "PairDataModule.__init__.* argument 'ridge'"),
        (lambda: ThoughtCallback(batch_sise=3), "ThoughtCallback.__init__.* argument 'batch_sise'"),
    ],
)
def test_an_unknown_setting_is_a_mistake_with_a_suggestion(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_the_signature_names_the_settings_that_are_taken() -> None:
    @takes_settings(auto=True)
    def function(first: int, *, last: int = 0, **settings: Any) -> dict[str, Any]:
        """Text."""
        return {"first": first, "last": last, **settings}

    assert list(parameters(function)) == ["first", "last", *FitSettings.names(auto=True)]
    assert (function.__name__, function.__doc__) == ("function", "Text.")
    assert function(1, rank=2) == {"first": 1, "last": 0, "rank": 2}
    with pytest.raises(TypeError, match="seed"):
        function(1, seed=3)


def test_the_page_says_what_is_taken_where_settings_are_left_out() -> None:
    """Of demonstrations, short system messages, and long ones or documents."""
    page = (Path(__file__).parents[1] / "recipes/site/pages/how_to/only_an_instruction.md").read_text(encoding="utf-8")
    lines = page.partition("| setting |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {cells[0]: cells[1:] for line in lines for cells in [[cell.strip() for cell in line.strip("| ").split("|")]]}
    both, alone = (", ".join(f"`{name}`" for name in sites) for sites in (settings.DEFAULT_SITES, settings.LONG_SITES))
    few, many = f"{settings.DIRECTIONS} directions", f"{settings.LONG_DIRECTIONS:,} directions"
    ridge, larger = f"{settings.RIDGE:g}", f"{settings.LARGER_PRESERVE_WEIGHT:g}"
    outputs = settings.OUTPUT_TOKENS, settings.LONG_OUTPUT_TOKENS
    assert rows == {
        "`rank`": [f"{settings.RANK}", f"{settings.RANK}", f"{settings.LONG_RANK}"],
        "`sites`": [both, both, alone],
        f"`ridge`, for up to {settings.FEW_ANSWERS} tokens of answers": [ridge] * 3,
        "`preserve_weight`, likewise": [larger, f"{settings.PRESERVE_WEIGHT:g}", larger],
        "preserved": [f"text and chats, {few}", f"text, {few}", f"text, {many}"],
        "`max_new_tokens`": [f"{outputs[0]}", f"{outputs[0]}", f"{outputs[1]}"],
    }
