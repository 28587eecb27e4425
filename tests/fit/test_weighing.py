"""Answers weighed by what the chunk changes: against one full forward for each pair and run, in NumPy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from batches import Seen, from_batches
from families import make_family
from fits import INSTRUCTION, PAIRS, TOKENIZER, Untouched, distance, make_patch, mixed_model
from models import make_model
from scipy.special import log_softmax
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lit_thought.fit import preparing, weighing
from lit_thought.fit.estimate import Load, weighing_operations
from lit_thought.fit.weighing import EVEN, MOST, weighed_by_change
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import make_batches
from lit_thought.prompts.template import PromptTemplate
from lit_thought.runs import logits
from lit_thought.runs.logits import batch_logits

WEIGHT = 5.0


def build(family: str) -> PreTrainedModel:
    return make_family(family).double().eval() if family == "gemma2" else make_model(family)


def tokenised(template: str = "Q: {input}\nA: {output}\n", answers: bool = True) -> list[TokenisedPair]:
    parsed = PromptTemplate.parse(template)
    rows = [*PAIRS, {"input": "lazy"}]  # one without an output
    return [
        parsed.tokenise(TOKENIZER, INSTRUCTION, row["input"], row.get("output") if answers else None) for row in rows
    ]


@torch.no_grad()
def by_hand(model: PreTrainedModel, pairs: Sequence[TokenisedPair], most: float) -> Seen:
    rows, changes = [], []
    for pair in pairs:
        runs = [
            log_softmax(model(torch.tensor([ids])).logits[0].numpy(), -1)
            for ids in (pair.plain_ids, pair.instructed_ids)
        ]
        if pair.sink:
            rows.append(((pair.plain_ids[:1], pair.plain_ids[:1]), None))
        start, stop = pair.output_span
        for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True):
            change = None
            if start < stop and start - 1 <= p < stop:
                change = float((np.exp(runs[1][q]) * (runs[1][q] - runs[0][p])).sum())
                changes.append(change)
            rows.append(((pair.plain_ids[: p + 1], pair.instructed_ids[: q + 1]), change))
    mean = np.mean(changes)
    found: Seen = defaultdict(float)
    for key, change in rows:
        found[key] += 1.0 if change is None else WEIGHT * (EVEN + (1 - EVEN) * min(change / mean, most))
    return dict(found)


@pytest.mark.parametrize("numbers", [1, 2**24])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("template", ["Q: {input}\nA: {output}\n", "chat"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weights_are_those_by_hand(
    family: str, template: str, batch_size: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batches, and the parts in which they are run; the caller's model stays as it was."""
    monkeypatch.setattr(logits, "_NUMBERS", numbers)
    monkeypatch.setattr(weighing, "MOST", 1.5)  # which some of these changes exceed
    model = build(family)
    model.train()
    untouched = Untouched(model)
    pairs = tokenised(template)
    batches = make_batches(pairs, batch_size, answer_weight=WEIGHT)
    found = weighed_by_change(model, batches, WEIGHT)
    untouched.check()
    wanted = by_hand(model.eval(), pairs, 1.5)
    assert from_batches(found) == pytest.approx(wanted, rel=1e-9)
    assert len({round(value, 6) for value in wanted.values()}) > 10
    assert from_batches(batches) != pytest.approx(wanted, rel=0.05)
    for before, after in zip(batches, found, strict=True):
        assert after.plain_rows is before.plain_rows
        assert torch.equal(after.answers, before.answers)


def test_the_mean_weight_of_answers_stays() -> None:
    assert MOST > 10
    batches = make_batches(tokenised(), 3, answer_weight=WEIGHT)
    found = weighed_by_change(make_model(), batches, WEIGHT)
    before, after = (sum(float((b.weights * (b.answers > 0)).sum()) for b in own) for own in (batches, found))
    assert after == pytest.approx(before, rel=1e-9)


def test_nothing_to_weigh_leaves_the_weights() -> None:
    """Without outputs, and where the chunk changes nothing."""
    model = make_model()
    batches = make_batches(tokenised(answers=False), 3, answer_weight=WEIGHT)
    assert from_batches(weighed_by_change(model, batches, WEIGHT)) == from_batches(batches)
    model.get_output_embeddings().weight.data.zero_()  # every token is as likely, whatever was read
    batches = make_batches(tokenised(), 3, answer_weight=WEIGHT)
    assert from_batches(weighed_by_change(model, batches, WEIGHT)) == from_batches(batches)


@pytest.mark.parametrize(("family", "template"), [("llama", "Q: {input}\nA: {output}\n"), ("gpt2", "chat")])
def test_the_estimate_counts_what_weighing_takes(family: str, template: str) -> None:
    """Against PyTorch's own count, less attention's, which grows with the prompts and not with the weights."""
    model = make_model(family)
    batches = make_batches(tokenised(template), 4)
    with FlopCounterMode(display=False) as counter:
        weighed_by_change(model, batches, WEIGHT)
    counts = {str(one): count for one, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for one, count in counts.items() if "mm" in one and "bmm" not in one)
    load = Load.of(batches)
    assert load.answers == sum(int((batch.answers > 0).sum()) for batch in batches) > 0
    assert weighing_operations(model, find_blocks(model), load) == pytest.approx(products, rel=0.1)
    assert load.longer(7).answers == load.answers + 7


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_a_full_forward(family: str) -> None:
    """With the output embedding's own hooks called for them alone; softcapping is the model's."""
    model = build(family)
    batches = make_batches(tokenised(), 4)
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].numel()))
    leads: dict[int, Any] = {}
    for batch in batches:
        chosen = torch.rand(len(batch.answers), generator=torch.Generator().manual_seed(0)) < 0.5
        found = batch_logits(model, batch, "target", leads, chosen)
        assert seen.pop() == found.numel()
        for place, row_logits in zip(batch.target_rows[chosen].tolist(), found, strict=True):
            row, column = divmod(place, batch.target.ids.shape[1])
            ids = batch.target.ids[row : row + 1, : column + 1]
            if batch.lead is not None:
                ids = torch.cat([batches[batch.lead].target.ids, ids], dim=1)
            torch.testing.assert_close(row_logits, model(ids).logits[0, -1], rtol=1e-9, atol=1e-9)
            seen.clear()
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "steps", "pairs_per_step", "times"),
    [
        ("document", 1, None, 1),
        ("document", 2, None, 1),
        ("document", 2, 3, 2),
        ("system", 1, None, 0),
        (None, 1, None, 0),
    ],
)
def test_documents_are_fitted_with_these_weights(
    kind: Any, steps: int, pairs_per_step: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the pairs of a step, with the answer weight of the fit."""
    seen: list[float] = []

    def noted(model: Any, batches: Any, answer_weight: float, progress: bool) -> Any:
        seen.append(answer_weight)
        return weighed_by_change(model, batches, answer_weight, progress)

    monkeypatch.setattr(preparing, "weighed_by_change", noted)
    how = {"kind": kind, "steps": steps, "pairs_per_step": pairs_per_step, "sites": "mlp_out", "answer_weight": 7.0}
    patch = make_patch(make_model(), **how)
    assert seen == [7.0] * times
    monkeypatch.setattr(preparing, "weighed_by_change", lambda model, batches, *_: list(batches))
    assert (distance(patch, make_patch(make_model(), **how)) > 1e-3) == bool(times)


def test_failing_while_weighing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_model("llama")
    untouched = Untouched(model)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(weighing, "token_kl", fail)
    with pytest.raises(RuntimeError, match="no room"):
        make_patch(model, kind="document", rank=2)
    untouched.check()
