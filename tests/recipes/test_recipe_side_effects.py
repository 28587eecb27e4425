"""The recipe ``side_effects``: its prompts, its figures against passes one by one, and its command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fits import make_patch
from models import make_model, make_tokenizer
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from recipes.chunks.system_prompts import instructions_known
from recipes.studies.side_effects import KINDS, TEMPLATE, Others, Prompt, side_effects, unrelated


def test_prompts_are_of_five_kinds_and_leave_the_chunk_alone() -> None:
    own = {kind: unrelated(kind, "pirate", 100, 0) for kind in KINDS}
    assert [len(own[kind]) for kind in KINDS] == [100, 100, 100, 40, 40]
    assert all(len(set(prompts)) > 0.9 * len(prompts) for prompts in own.values())
    first, second, answer = own["sums"][0].message.rstrip("?").split()[2], own["sums"][0].message, own["sums"][0]
    assert int(first) + int(second.rstrip("?").split()[-1]) == int(answer.accepted[0])
    systems = {prompt.system for prompt in own["other instructions"]}
    assert systems == {one["instruction"] for name, one in instructions_known().items() if name != "pirate"}
    assert all(prompt.accepted for kind in KINDS[:2] for prompt in own[kind])


@torch.no_grad()
def test_agreement_is_that_of_single_passes() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [Prompt("hot"), Prompt("a longer message", "Be brief."), Prompt("cold", None, ("x",))]
    others = Others(model, tokenizer, prompts, 5)
    patch = make_patch(model, rank=2, scale=0.1)
    found = others.compared("Some chunk.", patch)
    hits, same = [], []
    for prompt, before in zip(prompts, others.answers, strict=True):
        system = "Some chunk." if prompt.system is None else f"Some chunk.\n\n{prompt.system}"
        plain = list(TEMPLATE.conversation(tokenizer, prompt.system, [], prompt.message))
        ids = list(TEMPLATE.conversation(tokenizer, system, [], prompt.message))
        own = list(ids)
        for number, token in enumerate(before.tokens):
            assert int(model(torch.tensor([plain])).logits[0, -1].argmax()) == token
            plain.append(token)
            with patch.applied(model):
                hits.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token)
                own.append(int(model(torch.tensor([own])).logits[0, -1].argmax()))
            ids.append(token)
            assert number < 5
        same.append(own[-len(before.tokens) :] == list(before.tokens))
    assert found["agreement"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < found["agreement"] < 1
    assert found["same"] == pytest.approx(sum(same) / len(same))
    assert "right" not in found  # the first prompt has no accepted answer
    assert others.compared(None, None)["agreement"] == 1


@pytest.mark.usefixtures("_written")
def test_side_effects(tmp_path: Path) -> None:
    words = ("--chunks=[pirate]", "--preserve_weights=[1]", "--count=3", "--answer_tokens=4")
    ran = run_recipe("side_effects", tmp_path, *words, "--fit={inputs: 4, preserve_tokens: 50}")
    default, other = ran.record["runs"]
    assert (default["default"], other["default"], other["preserve_weight"]) == (True, False, 1)
    assert default["kinds"].keys() == set(KINDS)
    assert default["kinds"]["code"]["instructed"] == other["kinds"]["code"]["instructed"]
    assert ran.page.count("| pirate, instructed |") == 1
    assert ran.page.count("| pirate, patched |") == 2
    assert ran.out.with_suffix(".svg").is_file()


def test_unknown_chunks_are_refused() -> None:
    with pytest.raises(ThoughtError, match=r"chunks: expected some of .*got \['nothing'\]"):
        side_effects(chunks=["nothing"])
