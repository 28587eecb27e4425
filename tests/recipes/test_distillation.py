"""The baseline of recipes/studies/distillation.py: its loss, its tokens, its teacher, its student."""

from __future__ import annotations

import time

import numpy
import pytest
import torch
from fits import Untouched
from models import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_thought import PairDataModule
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.prompts.alignment import TokenisedPair
from recipes.speed.benchmark_baselines import held_out, order, soonest, summary
from recipes.studies.distillation import (
    distil,
    distillation_loss,
    lora_patch,
    student_logits,
    teach,
    with_lora,
)

INSTRUCTION = "Q: hot\nA: cold\nQ: big\nA: small\n"
PAIRS = [
    {"input": "up", "output": "down"},
    {"input": "good", "output": "bad lazy dog"},
    {"input": "quick fox", "output": "lazy"},
    {"input": "lazy brown fox", "output": "quick"},
]
TEMPLATE = "Q: {input}\nA: {output}\n"


@pytest.fixture
def data(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PairDataModule:
    data = PairDataModule(PAIRS, INSTRUCTION, TEMPLATE, batch_size=2)
    prepare_pairs(data, llama, tokenizer)
    return data


def whole_pass(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Log probabilities at every token of one sequence, alone, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def answers(pair: TokenisedPair) -> list[tuple[int, int]]:
    """Plain and instructed places of the compared tokens from the one before the output to its last."""
    start, stop = pair.output_span
    both = zip(pair.plain_positions, pair.instructed_positions, strict=True)
    return [(p, q) for p, q in both if start - 1 <= p <= stop - 1]


def test_loss_is_the_mean_divergence_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for token in range(5):
        own, other = (numpy.exp(x[token].numpy()) / numpy.exp(x[token].numpy()).sum() for x in (p, q))
        for v in range(7):
            expected += own[v] * (numpy.log(own[v]) - numpy.log(other[v])) / 5
    assert float(distillation_loss(p.log_softmax(-1), q)) == pytest.approx(expected, rel=1e-12)
    assert distillation_loss(p.log_softmax(-1), q.bfloat16()).dtype == torch.float32


def test_tokens_are_those_that_a_fit_makes_heavier(data: PairDataModule, llama: PreTrainedModel) -> None:
    examples = teach(llama, data.tokenised)
    mine = sorted(example.ids[: len(example.ids) - n] for example in examples for n in range(len(example.teacher)))
    theirs = []
    leads = {batch.index: batch.plain.ids[0].tolist() for batch in data.batches if batch.plain and batch.lead is None}
    for batch in data.batches:
        heavy = {int(row) for row, weight in zip(batch.plain_rows, batch.weights, strict=True) if weight == 30}
        for row in heavy:
            at, column = divmod(row, batch.plain.ids.shape[1])
            theirs.append((*leads.get(batch.lead, []), *batch.plain.ids[at, : column + 1].tolist()))
    assert len(theirs) == sum(len(answers(pair)) for pair in data.tokenised)
    assert mine == sorted(theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_teacher_and_student_see_what_whole_prompts_give(family: str, batch_size: int) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    data = PairDataModule(PAIRS, INSTRUCTION, TEMPLATE)
    prepare_pairs(data, model, tokenizer)
    examples = teach(model, data.tokenised, batch_size)
    with torch.no_grad():
        got = student_logits(model, examples).log_softmax(-1)
    wanted_plain = []
    for example, pair in zip(examples, data.tokenised, strict=True):
        plain, instructed = zip(*answers(pair), strict=True)
        whole = whole_pass(model, pair.instructed_ids)[list(instructed)]
        assert torch.allclose(example.teacher.double(), whole, atol=1e-5)
        wanted_plain.append(whole_pass(model, pair.plain_ids)[list(plain)])
    assert torch.allclose(got, torch.cat(wanted_plain), atol=1e-9)
    assert not torch.allclose(got, torch.cat([e.teacher for e in examples]).double(), atol=0.1)


def test_gradient_goes_through_what_the_prompts_share(data: PairDataModule, llama: PreTrainedModel) -> None:
    examples = teach(llama, data.tokenised)
    student = with_lora(llama, 4, "all-linear")
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    base = student.get_base_model()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    loss = distillation_loss(torch.cat([e.teacher for e in examples]), student_logits(base, examples))
    got = torch.autograd.grad(loss, trained)
    alone = [base(torch.tensor([e.ids])).logits[0, -len(e.teacher) :] for e in examples]
    wanted = torch.autograd.grad(distillation_loss(torch.cat([e.teacher for e in examples]), torch.cat(alone)), trained)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()  # PEFT's factors are in float32


@pytest.mark.parametrize("targets", ["all-linear", "sites"])
def test_student_learns_and_leaves_the_model_alone(
    data: PairDataModule, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, targets: str
) -> None:
    before = Untouched(llama)
    examples = teach(llama, data.tokenised)

    def score(student: PreTrainedModel) -> dict[str, float]:
        return {
            "kl": float(distillation_loss(torch.cat([e.teacher for e in examples]), student_logits(student, examples)))
        }

    settings = {"learning_rate": 2e-2, "rank": 4, "targets": targets, "warmup_steps": 2}
    found = distil(llama, data.tokenised, score, max_steps=60, every=20, **settings)
    before.check()
    start = score(llama)["kl"]
    curve = [entry["kl"] for entry in found.history]
    assert [entry["step"] for entry in found.history] == [20, 40, 60]
    assert curve[-1] < 0.02 * start
    assert curve[-1] < curve[0]
    names = {path.rpartition(".")[2] for path in found.patch.targets}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == (every if targets == "all-linear" else {"o_proj", "down_proj"})
    with found.patch.applied(llama):
        assert score(llama)["kl"] == pytest.approx(curve[-1], rel=1e-4)
    again = distil(llama, data.tokenised, score, max_steps=60, every=20, **settings)
    assert [entry["kl"] for entry in again.history] == curve


def test_clock_stands_still_while_the_student_is_tested(data: PairDataModule, llama: PreTrainedModel) -> None:
    def slow(student: PreTrainedModel) -> dict[str, float]:
        time.sleep(0.5)
        return {}

    found = distil(llama, data.tokenised, slow, learning_rate=1e-3, max_steps=6, every=2)
    assert found.seconds["evaluate"] >= 1.5
    assert found.history[-1]["seconds"] < found.seconds["evaluate"] / 2 + sum(
        found.seconds[part] for part in ("teacher", "adapter", "forward", "backward", "optimizer")
    )
    parts = sum(taken for part, taken in found.seconds.items() if part != "evaluate")
    assert parts == pytest.approx(found.history[-1]["seconds"])
    assert found.seconds["other"] >= 0


def test_stops_when_it_is_good_enough_and_is_measured_when_asked(data: PairDataModule, llama: PreTrainedModel) -> None:
    common = {"learning_rate": 1e-3, "every": 2, "max_steps": 9}
    found = distil(llama, data.tokenised, lambda student: {}, finished=lambda figures: True, **common)
    assert [entry["step"] for entry in found.history] == [2]
    found = distil(llama, data.tokenised, lambda student: {}, also_at=0.0, **common)
    assert [entry["step"] for entry in found.history] == [1, 2, 4, 6, 8, 9]
    found = distil(llama, data.tokenised, lambda student: {}, max_seconds=0.0, **common)
    assert [entry["step"] for entry in found.history] == [1]
    found = distil(llama, data.tokenised, lambda student: {}, batch_size=2, **common)
    assert [entry["step"] for entry in found.history] == [2, 4, 6, 8, 9]


def test_held_out_figures_are_those_of_the_student(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    common = {"instruction": INSTRUCTION, "template": TEMPLATE, "max_new_tokens": 4}
    evaluation = Evaluation(llama, tokenizer, pairs=PAIRS, unrelated=None, progress=False, **common)
    student = with_lora(llama, 2, "all-linear")
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    base = student.get_base_model()
    examples = teach(llama, evaluation.completed)
    with torch.no_grad():
        loss = distillation_loss(torch.cat([e.teacher for e in examples]), student_logits(base, examples))
    found = held_out(evaluation, base)
    assert found["output_kl"] == pytest.approx(float(loss), rel=1e-4)
    assert found["output_kl"] != pytest.approx(evaluation.score(0 * lora_patch(base))["output_kl"]["patched"], rel=1e-3)


def test_pairs_without_output_are_left_out(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    data = PairDataModule([*PAIRS, {"input": "France"}], INSTRUCTION, TEMPLATE)
    data.tokenise(tokenizer, 256)
    prompts = data.tokenised
    assert len(teach(llama, prompts)) == len(PAIRS)
    with pytest.raises(ThoughtError, match="pairs: expected at least one with an output"):
        teach(llama, prompts[-1:])


def test_summary_finds_when_a_run_was_as_good_as_ours() -> None:
    history = [
        {"step": 5, "seconds": 2.0, "accuracy": 0.5, "output_kl": 0.3},
        {"step": 10, "seconds": 4.0, "accuracy": 0.8, "output_kl": 0.2},
        {"step": 15, "seconds": 6.0, "accuracy": 0.7, "output_kl": 0.1},
    ]
    ours = {"seconds": 3.0, "accuracy": 0.8, "output_kl": 0.15}
    fast = summary(1e-3, history, {}, ours)
    assert (fast["seconds_to_accuracy"], fast["seconds_to_kl"], fast["at_our_end"]["step"]) == (4.0, 6.0, 10)
    never = summary(1e-3, history, {}, {"seconds": 9.0, "accuracy": 0.9, "output_kl": 0.05})
    assert (never["seconds_to_accuracy"], never["seconds_to_kl"], never["at_our_end"]) == (None, None, None)
    slow = summary(1e-3, [{**entry, "seconds": 2 * entry["seconds"]} for entry in history], {}, ours)
    worse = summary(1e-3, history[:2], {}, ours)
    assert sorted([never, slow, worse, fast], key=order) == [fast, slow, worse, never]
    assert soonest([slow, worse], "accuracy") is worse
    assert soonest([worse, slow], "kl") is slow
    assert soonest([worse, never], "kl") is never, "it went on longer"
