"""Settings chosen on held-back pairs: the rule, its figures, the second solve, and what a fit makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from fits import INSTRUCTION, TEXTS, Untouched, distance, identical, readable
from models import make_model, make_tokenizer
from scipy.special import log_softmax
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from lit_thought.cli import main
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.held_back import HeldBack
from lit_thought.fit import growing, selection
from lit_thought.fit.api import transmute
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.selection import AUTO, choose, format_selection, select_settings, split
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.template import PromptTemplate
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import _cached_priors, solve_saved, solve_several

TOKENIZER = make_tokenizer()
BOS = make_tokenizer(bos=True)
WORDS = ["hot", "big", "brown fox", "French", "quick", "lazy", "dog", "capital", "answer", "pirate"]
PAIRS = [{"input": word, "output": answer} for word, answer in zip(WORDS, WORDS[3:] + WORDS[:3], strict=True)]
USUAL = {"preserve": TEXTS, "rank": 4, "progress": False}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def chosen_patch(pairs: Sequence[dict[str, str]] = PAIRS, **settings: Any) -> ThoughtPatch:
    return transmute(make_model("llama").float(), TOKENIZER, INSTRUCTION, pairs, **{**USUAL, **settings})


# --- the rule -------------------------------------------------------------------------------------------------


def tensors(*rows: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


@pytest.mark.parametrize(
    ("rows", "drifts", "expected"),
    [
        ([[1.0, 1.0, 1.1, 0.9], [0.5, 0.5, 0.6, 0.4]], [0.01, 0.01], 1),  # better on every pair
        ([[1.0, 1.0, 1.0, 1.0], [0.0, 1.2, 0.8, 1.9]], [0.01, 0.01], 0),  # better on the mean, by less than its error
        ([[9.0, 1.0, 5.0, 0.5], [8.9, 0.9, 4.9, 0.4]], [0.01, 0.01], 1),  # a small gain, on every pair
        ([[1.0, 1.0], [0.5, 0.5], [0.7, 0.7]], [0.01, 0.05, 0.02], 2),  # the best drifts too far
        ([[1.0, 1.0], [0.5, 0.5], [0.7, 0.7]], [0.01, 0.05, 0.06], 0),  # so do all others
        ([[1.0, 1.0], [1.5, 1.5], [1.2, 1.2]], [0.05, 0.01, 0.02], 2),  # the default does, and the others are worse
        ([[1.0, 1.0], [0.5, 0.5], [0.7, 0.7]], [0.09, 0.07, 0.06], 2),  # all do: the least
        ([[1.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]], [0.01, 0.0, 0.0], 0),
        ([[1.0], [0.5]], [0.01, 0.01], 0),  # a single pair has no error to compare with
    ],
)
def test_rule_on_hand_made_curves(rows: list[list[float]], drifts: list[float], expected: int) -> None:
    assert choose(tensors(*rows), drifts.__getitem__, limit=0.04) == expected


def test_drift_is_measured_only_where_the_choice_depends_on_it() -> None:
    asked: list[int] = []

    def drift(index: int) -> float:
        asked.append(index)
        return 0.0

    choose(tensors([1.0, 1.0], [2.0, 2.0], [0.5, 0.5], [0.7, 0.7]), drift)
    assert sorted(set(asked)) == [0, 2]


@pytest.mark.parametrize(("count", "held"), [(8, 4), (15, 4), (16, 4), (30, 7), (100, 25), (200, 50), (1000, 50)])
def test_split_is_seeded_and_holds_back_a_quarter(count: int, held: int) -> None:
    rest, back = split(count, 3)
    assert sorted([*rest, *back]) == list(range(count))
    assert (len(back), split(count, 3)) == (held, (rest, back))
    assert split(count, 4) != (rest, back)


# --- the figures ----------------------------------------------------------------------------------------------


def logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return log_softmax(model(torch.tensor([list(ids)])).logits[0].double().numpy(), axis=-1)


def pair_kl(model: Any, patch: ThoughtPatch, pair: TokenisedPair) -> float:
    """By whole runs of one pair."""
    wanted = logits(model, pair.instructed_ids)[list(pair.instructed_positions)]
    with patch.applied(model):
        got = logits(model, pair.plain_ids)[list(pair.plain_positions)]
    start, stop = pair.output_span
    heavy = [row for row, at in enumerate(pair.plain_positions) if start - 1 <= at < stop]
    return float((np.exp(wanted) * (wanted - got)).sum(-1)[heavy].mean())


@pytest.mark.parametrize(("batch_size", "numbers"), [(1, 2**26), (2, 2**26), (32, 2**26), (32, 1)])
@pytest.mark.parametrize("instructions", [["a b c"] * 5, ["a b c", "d e", "a b c", "a b c", "French fox"]])
def test_divergence_of_each_pair_and_drift_are_those_of_whole_runs(
    instructions: list[str], batch_size: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_thought.runs.logits._NUMBERS", numbers)
    model, template = make_model("llama"), PromptTemplate.parse("Q: {input}\nA: {output}")  # ends in the output
    pairs = [
        template.tokenise(TOKENIZER, chunk + "\n", pair["input"], pair["output"])
        for chunk, pair in zip(instructions, PAIRS[:5], strict=True)
    ]
    patch = transmute(model, TOKENIZER, INSTRUCTION, PAIRS, **{**USUAL, "preserve": None})
    held = HeldBack(model, TOKENIZER, pairs, instructions, TEXTS, batch_size)
    found = held.divergences(patch)
    expected = [pair_kl(model, patch, pair) for pair in pairs]
    assert np.allclose(sorted(found.tolist()), sorted(expected), rtol=1e-6)
    windows = [TOKENIZER(text)["input_ids"][:128] for text in TEXTS]
    before = [logits(model, ids) for ids in windows]
    with patch.applied(model):
        after = [logits(model, ids) for ids in windows]
    kl = np.concatenate([(np.exp(one) * (one - two)).sum(-1) for one, two in zip(before, after, strict=True)])
    assert held.drift(patch) == pytest.approx(kl.mean(), rel=1e-6)


def test_pairs_without_outputs_cannot_be_compared() -> None:
    pair = PromptTemplate.parse("Q: {input}\nA:{output}").tokenise(TOKENIZER, "a b\n", "fox")
    with pytest.raises(ThoughtError, match="empty outputs"):
        HeldBack(make_model("llama"), TOKENIZER, [pair], ["a b\n"], TEXTS, 4)


# --- the second solve -----------------------------------------------------------------------------------------


CANDIDATES: list[dict[str, Any]] = [{}, {"ridge": 0.3}, {"preserve_weight": 0.0}, {"preserve_weight": 20.0, "rank": 2}]


def kept(model: Any, tokenizer: Any, pairs: int = 4, **settings: Any) -> SavedStatistics:
    data = PairDataModule(PAIRS[:pairs], INSTRUCTION, answer_weight=3.0)
    usual: dict[str, Any] = {"preserve": TEXTS, "rank": 4, "statistics_dir": "sums", "overwrite": True}
    fit(ThoughtModule(model, tokenizer), data, ThoughtCallback(**{**usual, **settings}), progress=False)
    return SavedStatistics.load("sums")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_several_are_those_solved_one_by_one_where_that_is_exact(family: str) -> None:
    model = make_model("llama") if family == "llama" else make_family(family)
    saved = kept(model, BOS, order="teacher-forced", sites=["mlp_out"])
    assert saved.coupling() is None
    for candidate, patch in zip(CANDIDATES, solve_several(saved, CANDIDATES), strict=True):
        assert distance(solve_saved(saved, **candidate), patch) < 1e-4


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_several_at_the_settings_of_the_fit_are_its_patch(order: str) -> None:
    saved = kept(make_model("llama"), TOKENIZER, order=order)
    assert distance(solve_saved(saved), solve_several(saved, [{}])[0]) < 1e-4


@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_several_carry_on_what_a_candidate_leaves(order: str) -> None:
    """The formula by dense matrices: a block's error grows by what its predecessors correct less than in the fit."""
    saved = kept(make_model("llama"), TOKENIZER, pairs=1, order=order, rank=None)
    priors = _cached_priors(saved, None)
    (patch,) = solve_several(saved, [{"ridge": 0.3, "preserve_weight": 0.5}])
    left: Any = 0.0
    block, changed = 0, []
    for stage in saved.stages():
        assert stage.matrix is not None
        rows = stage.matrix.rows()
        assert rows is not None
        a, delta = (each.double().numpy() for each in rows)
        gram = priors(stage.head.block, stage.head.site).gram().numpy()

        def solved(error: np.ndarray, ridge: float, rho: float, a: Any = a, z: Any = gram, stage: Any = stage) -> Any:
            z = a.T @ a / stage.matrix.weight + rho * z
            return (
                error.T
                @ a
                / stage.matrix.weight
                @ np.linalg.inv(z + ridge * (z * z).sum() / z.trace() * np.eye(len(z)))
            )

        if order == "teacher-forced" and stage.head.block > block:
            left = 0.0
        block = stage.head.block
        new = solved(delta + left, 0.3, 0.5)
        changed.append(np.linalg.norm(new - solved(delta, 0.3, 0.5)) / np.linalg.norm(new))
        left = left + a @ (solved(delta, 3e-2, 8.0) - new).T
        found = patch.factors[stage.head.targets[0]].delta().double().numpy()
        assert np.linalg.norm(found - new) < 1e-4 * np.linalg.norm(new)
    assert [change > 0.01 for change in changed] == [(order == "sequential" and i > 0) or i % 2 == 1 for i in range(6)]


def test_several_are_closer_to_new_fits_than_sums_left_as_they_are() -> None:
    """Where blocks add little to the residual stream, as in trained models, what is left stays in it."""
    model = make_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.1)
    saved = kept(model, TOKENIZER, pairs=1)
    data = PairDataModule(PAIRS[:1], INSTRUCTION, answer_weight=3.0)
    settings: dict[str, Any] = {"preserve": TEXTS, "rank": 4, "ridge": 0.5}
    new = fit(ThoughtModule(model, TOKENIZER), data, ThoughtCallback(**settings), progress=False)

    def off(patch: ThoughtPatch) -> float:
        return sum(float((patch.factors[path].delta() - new.factors[path].delta()).norm()) for path in new.targets)

    assert off(solve_several(saved, [{"ridge": 0.5}])[0]) < 0.8 * off(solve_saved(saved, ridge=0.5, approximate=True))


# --- the whole ------------------------------------------------------------------------------------------------


def test_best_ridge_of_brute_force_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact sums (one site, teacher-forced): the choice is that of real fits of the same pairs at each ridge."""
    monkeypatch.setattr(selection, "MAX_DRIFT", 100.0)
    monkeypatch.setattr(selection, "_other_values", lambda name, value, largest: [1e-4, 0.3, 30.0])
    model = make_model("llama")
    settings: dict[str, Any] = {"preserve": TEXTS, "rank": 4, "order": "teacher-forced", "sites": ["mlp_out"]}
    data = PairDataModule(PAIRS, INSTRUCTION, answer_weight=3.0)
    found = select_settings(ThoughtModule(model, BOS), data, ["ridge"], progress=False, **settings)
    rest, held = split(len(PAIRS))
    template = PromptTemplate.parse("Q: {input}\nA: {output}\n")
    pairs = [template.tokenise(BOS, INSTRUCTION, PAIRS[i]["input"], PAIRS[i]["output"]) for i in held]
    means = {}
    for ridge in (3e-2, 1e-4, 0.3, 30.0):
        part = PairDataModule([PAIRS[i] for i in rest], INSTRUCTION, answer_weight=3.0)
        callback = ThoughtCallback(**settings, ridge=ridge)
        patch = fit(ThoughtModule(model, BOS), part, callback, progress=False)
        means[ridge] = [pair_kl(model, patch, pair) for pair in pairs]
    measured = {each["settings"]["ridge"]: each["kl"] for each in found.provenance["candidates"]}
    assert measured == pytest.approx({ridge: np.mean(each) for ridge, each in means.items()}, rel=1e-4)
    default = np.array(means[3e-2])
    gains = {ridge: default - each for ridge, each in means.items() if ridge != 3e-2}
    sure = [r for r, gain in gains.items() if gain.mean() > gain.std(ddof=1) / len(held) ** 0.5]
    best = min(sure, key=lambda ridge: np.mean(means[ridge])) if sure else 3e-2
    assert found.settings["ridge"] == best


def test_final_fit_is_of_all_pairs_with_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "choose", lambda scores, drift: len(scores) - 1)  # always the last one tried
    model, pairs = readable(make_model("llama").float()), [{"input": word} for word in WORDS]
    state = Untouched(model)
    every = dict.fromkeys(AUTO, "auto")
    patch = transmute(model, TOKENIZER, INSTRUCTION, pairs, preserve=TEXTS, progress=False, max_new_tokens=4, **every)
    state.check()
    record = patch.provenance["selection"]
    assert record["chosen"] == {"ridge": 0.09, "preserve_weight": 24.0, "rank": 32, "scale": 1.2, "blocks": None}
    assert [each["chosen"] for each in record["candidates"]].count(True) == 1
    settings: dict[str, Any] = {"ridge": 0.09, "preserve_weight": 24.0, "rank": 32, "scale": 1.2}
    same = transmute(model, TOKENIZER, INSTRUCTION, pairs, preserve=TEXTS, progress=False, max_new_tokens=4, **settings)
    assert identical(patch, same)
    assert patch.provenance["settings"] == same.provenance["settings"]
    assert same.provenance["scale"] == patch.provenance["scale"] == 1.2


def test_candidates_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    record = chosen_patch(ridge="auto").provenance["selection"]
    assert json.loads(json.dumps(record)) == record
    assert [each["settings"]["ridge"] for each in record["candidates"]] == [0.03, 0.01, 0.09]
    assert (record["held_back"], record["names"], set(record["chosen"])) == ([4, 10], ["ridge"], {"ridge"})
    default = record["candidates"][0]
    assert default["drift"] > 0
    assert default["gain"] == 0
    lines = format_selection(record).splitlines()
    assert len(lines) == 4
    assert sum("chosen" in line for line in lines[1:]) == 1
    assert "ridge 0.09" in lines[3]


def test_layers_belong_to_their_blocks() -> None:
    owners = selection._owners(ThoughtModule(make_model("llama"), TOKENIZER))
    assert set(owners.values()) == {0, 1, 2}
    assert all(f".{block}." in path for path, block in owners.items())


def test_seed_chooses_the_pairs_held_back() -> None:
    one, two, other = (chosen_patch(scale="auto", seed=seed).provenance["selection"] for seed in (1, 1, 2))
    assert one["candidates"] == two["candidates"]
    assert one["candidates"][0]["kl"] != other["candidates"][0]["kl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": "auto", "pairs": PAIRS[:7]}, "8 pairs or more.*got 7"),
        ({"rank": "auto", "pairs_per_step": 2}, "pairs_per_step"),
        ({"preserve_weight": "auto", "preserve": None}, "preserve is None"),
        ({"ridge": "automatic"}, "ridge must be"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": "big"}, "scale must be a finite number"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(settings: dict[str, Any], message: str) -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    with pytest.raises(ThoughtError, match=message):
        transmute(load, None, INSTRUCTION, **{"pairs": PAIRS, **settings})


MAMBA = MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "auto", "blocks": [99]}, "blocks"),
        ({"ridge": "auto", "rank": 10**6}, "rank"),
        ({"pairs": None, "inputs": "auto", "blocks": [99]}, "blocks"),
        ({"scale": "auto", "model": MambaForCausalLM(MAMBA)}, "Mamba"),
        ({"pairs": None, "inputs": "auto", "model": MambaForCausalLM(MAMBA)}, "Mamba"),
    ],
)
def test_what_a_model_does_not_have_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any, **options: Any) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(selection, "write_outputs", write)
    monkeypatch.setattr(growing, "write_inputs", write)
    given: dict[str, Any] = {"pairs": [{"input": str(i)} for i in range(9)], "template": "Q: {input}\nA: {output}\n"}
    given |= settings
    model = given.pop("model", None) or make_model("llama")
    with pytest.raises(ThoughtError, match=message):
        transmute(model, TOKENIZER, INSTRUCTION, **given)


@pytest.mark.parametrize("name", ["ridge", "rank", "preserve_weight", "blocks"])
def test_callback_says_where_settings_are_chosen(name: str) -> None:
    with pytest.raises(ThoughtError, match=f'{name}="auto".*transmute.*select_settings'):
        ThoughtCallback(**{name: "auto"})


def test_unknown_names_are_refused() -> None:
    module, data = ThoughtModule(make_model("llama"), TOKENIZER), PairDataModule(PAIRS, INSTRUCTION)
    with pytest.raises(ThoughtError, match="answer_weight"):
        select_settings(module, data, ["answer_weight"])


def test_command_line_prints_the_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").float().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    flags = ["--rank=4", "--ridge=auto", "--scale=auto", "--preserve_tokens=300", "--progress=false", "--blocks=auto"]
    main(["fit", "--model=model", "--pairs=pairs.json", f"--instruction={INSTRUCTION}", "--out=adapter", *flags])
    printed = capsys.readouterr().out
    assert "Chosen on 4 of 10 pairs" in printed
    assert "scale 1.2" in printed
    record = ThoughtPatch.load("adapter").provenance["selection"]
    assert record["names"] == ["blocks", "scale", "ridge"]


def test_a_part_of_given_pairs_asks_for_no_more() -> None:
    """Though ``inputs`` says how many there are in all."""
    data = PairDataModule(PAIRS, INSTRUCTION, inputs=len(PAIRS))
    part = selection.part_of(data, range(3), [])
    assert part.pairs == PAIRS[:3]
    assert not part.to_write
