"""The recipe ``life``: what is done when a line changes, and a base that is trained on, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import make_model
from recipe_runs import run_recipe
from torch import nn

from lit_thought.errors import ThoughtError
from recipes.studies.life import WAYS, life, trained_on


def test_a_base_is_trained_on_by_a_share_of_each_layers_norm() -> None:
    """Each linear layer of the blocks, by a matrix of the given rank; nothing else; and the model stays as it was."""
    model = make_model().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = trained_on(model, 0.1, 2, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layers = dict(model.named_modules())
    changed = 0
    for name, value in tuned.state_dict().items():
        change = value - before[name]
        module, _, kind = name.rpartition(".")
        if isinstance(layers[module], nn.Linear) and ".layers." in name and kind == "weight":
            assert float(change.norm() / before[name].norm()) == pytest.approx(0.1, rel=1e-6)
            assert int((torch.linalg.svdvals(change) > 1e-6 * change.norm()).sum()) == 2
            changed += 1
        else:
            assert not change.any(), name
    assert changed == 7 * model.config.num_hidden_layers
    assert trained_on(model, 0.0, 2, 0) is model


def test_a_line_that_is_not_there_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ThoughtError, match="line: expected a text that stands once in shop_support; got 'Nowhere'"):
        life("there/is none", line="Nowhere", about=["a"], tested=["b"])
    with pytest.raises(ThoughtError, match="about, tested: expected messages about the line"):
        life("there/is none", about=["a"], tested=["a"])


@pytest.mark.slow
@pytest.mark.usefixtures("_written")
def test_life(tmp_path: Path) -> None:
    rows = [{"input": "Who rules Oz?", "rules": {}}, {"input": "Where is Oz?", "rules": {}}]
    (tmp_path / "oz.json").write_text(json.dumps({"title": "Oz", "messages": rows}), encoding="utf-8")
    (tmp_path / "oz.txt").write_text("You are the guide of Oz. Ada rules it.\n", encoding="utf-8")
    ran = run_recipe(
        "life", tmp_path, f"--prompt={tmp_path / 'oz.json'}", "--line=Ada rules it", "--becomes=Bo rules it",
        '--accepted=["Bo"]', '--about=["Who is queen?","Is Ada queen?"]', '--tested=["Who reigns?"]', "--inputs=6",
        "--sizes=[0.01,0.3]", "--answer_tokens=3",
    )  # fmt: skip
    record = ran.record
    assert record["ways"].keys() == WAYS.keys()
    left, anew = record["ways"]["left"], record["ways"]["anew"]
    assert left["seconds"] == 0 < record["ways"]["statistics"]["seconds"]
    assert anew["else"]["kl"]["patched"] < anew["else"]["kl"]["plain"]
    assert all(one["line"]["kl"]["plain"] == left["line"]["kl"]["plain"] for one in record["ways"].values())
    first, *others = record["bases"]
    assert (first["size"], first["unrelated"]) == (0, pytest.approx(1))
    assert first["kept"] == first["anew"]
    assert others[1]["kept"]["kl"] != others[1]["anew"]["kl"]
    assert [row["size"] for row in others] == [0.01, 0.3]
    for title in ("## A line changes", "## The base is trained on"):
        head, *lines = [line for line in ran.page.split(title)[1].split("##")[0].splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {head.count("|")}
