"""The whole fit on tiny random models: what the patch does, what it depends on, and what it leaves alone."""

from __future__ import annotations

import csv
import datetime
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import (
    INSTRUCTION,
    PAIRS,
    TEXTS,
    TOKENIZER,
    Untouched,
    dense,
    distance,
    fail_at,
    identical,
    make_patch,
    mixed_model,
    readable,
    tensors,
    written,
)
from full_forwards import BruteForce, trace
from least_squares import Problem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from models import FAMILIES, make_model, make_tokenizer
from peft import PeftModel
from scipy.special import log_softmax
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_thought.errors import ThoughtError
from lit_thought.evaluation import compare as evaluation
from lit_thought.evaluation.compare import evaluate
from lit_thought.fit import callback, growing, preparing
from lit_thought.fit.api import transmute
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.model.loading import fingerprint
from lit_thought.patch import adapter
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.template import PromptTemplate
from lit_thought.prompts.unrelated import chat_windows, load_texts, text_windows
from lit_thought.runs.generate import Generation
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import SITES, check_parts
from lit_thought.solve import sums as statistics
from lit_thought.solve.factors import Factors
from lit_thought.statistics import stage
from lit_thought.statistics.preserve_file import Preservation


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    patch: ThoughtPatch,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    pairs: Sequence[dict[str, str]] = PAIRS,
    instruction: str | None = INSTRUCTION,
    template: str = "Q: {input}\nA: {output}\n",
) -> tuple[float, float]:
    """Mean KL(instructed ‖ plain) of the compared tokens without and with the patch, by whole forward passes."""

    def log_probabilities(ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, list(positions)]
        return log_softmax(logits.double().numpy(), axis=-1)

    before, after = [], []
    for pair in pairs:
        chunk = pair.get("instruction", instruction)
        tokens = PromptTemplate.parse(template).tokenise(tokenizer, chunk, pair["input"], pair["output"])
        wanted = log_probabilities(tokens.instructed_ids, tokens.instructed_positions)
        plain = log_probabilities(tokens.plain_ids, tokens.plain_positions)
        with patch.applied(model):
            patched = log_probabilities(tokens.plain_ids, tokens.plain_positions)
        for kept, got in ((before, plain), (after, patched)):
            kept.append((np.exp(wanted) * (wanted - got)).sum(-1))
    return float(np.concatenate(before).mean()), float(np.concatenate(after).mean())


# --- what the patch does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_plain_run_follows_the_instructed_run(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    before, after = divergence(model, make_patch(model, ridge=1e-8))
    assert before > 0.01
    assert after < 0.1 * before


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["chat", "chat-user", "Q: {input}\n{instruction}A: {output}\n"])
def test_other_templates_and_bos(template: str, bos: bool) -> None:
    model, tokenizer = make_model(), make_tokenizer(bos=bos)
    patch = make_patch(model, tokenizer, template=template, ridge=1e-8)
    before, after = divergence(model, patch, tokenizer, template=template)
    assert before > 0.01
    assert after < 0.1 * before


@pytest.mark.parametrize(
    "sites", [("attn_out",), ("mlp_in",), ("mlp_out",), ("mlp_out", "attn_out"), ("mlp_in", "attn_out")]
)
@pytest.mark.parametrize("order", ["sequential", "teacher-forced"])
def test_sites_and_orders(sites: tuple[str, ...], order: str) -> None:
    model = make_model()
    patch = make_patch(model, sites=sites, order=order, ridge=1e-8)
    layers = {
        "attn_out": ["self_attn.o_proj"],
        "mlp_in": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp_out": ["mlp.down_proj"],
    }
    assert set(patch.factors) == {
        f"model.layers.{i}.{name}" for i in range(3) for site in sites for name in layers[site]
    }
    assert set(patch.vectors) == {f"model.layers.{i}.mlp.down_proj" for i in range(3) if "mlp_in" in sites}
    before, after = divergence(model, patch)
    assert after < (0.9 if (sites, order) == (("mlp_in",), "teacher-forced") else 0.5) * before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts_of_the_first_block_do_not_depend_on_each_other(family: str) -> None:
    """At mlp_in; from the second block on each sees what the other has changed."""
    model = make_model(family)
    both = make_patch(model, sites="mlp_in")
    matrix, vector = (make_patch(model, sites="mlp_in", parts=(part,)) for part in ("matrix", "vector"))
    assert identical(both, make_patch(model, sites="mlp_in", parts=("vector", "matrix")))
    assert (matrix.vectors, vector.factors) == ({}, {})
    assert tensors(both).keys() == {**tensors(matrix), **tensors(vector)}.keys()
    for name, value in tensors(both).items():
        same = torch.equal(value, {**tensors(matrix), **tensors(vector)}[name])
        assert same == (".0." in name), name
    assert divergence(model, matrix)[1] < 0.5 * divergence(model, matrix)[0]
    assert divergence(model, vector)[1] < divergence(model, vector)[0]


def test_some_of_the_blocks() -> None:
    model = make_model()
    whole = make_patch(model)
    for blocks in ([1], [0], (2, 0)):
        patch = make_patch(model, blocks=blocks)
        assert {int(path.split(".")[2]) for path in patch.targets} == set(blocks)
        assert patch.provenance["settings"]["blocks"] == sorted(blocks)
        assert set(patch.provenance["diagnostics"]) == set(patch.targets)
        assert all(("." + path.split(".")[2] + ".") in path for path in patch.targets)
        first = [name for name in tensors(patch) if ".0." in name]  # nothing before it is patched in either fit
        assert all(torch.equal(tensors(patch)[name], tensors(whole)[name]) for name in first)
        before, after = divergence(model, patch)
        assert after < before


# Settings of a fit, for which the whole loop is done once more without the library
LOOPS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sites": ("mlp_in",), "steps": 2, "step_size": 0.5, "pairs_per_step": 3}),
    ("gpt2", {"sites": ("attn_out", "mlp_in"), "order": "teacher-forced", "blocks": [2, 0], "rank": 4, "steps": 2}),
    ("qwen2", {"sites": SITES, "preserve": TEXTS, "preserve_weight": 0.5, "answer_weight": 3.0, "rank": 5}),
    ("llama", {"parts": "vector", "steps": 2, "step_size": 0.5, "preserve": TEXTS, "preserve_weight": 0.5}),
    ("mistral", {"sites": ("mlp_out",), "blocks": [1], "rank": 3, "steps": 3, "step_size": 0.7, "pairs_per_step": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "settings"), LOOPS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@torch.no_grad()
def test_the_patched_model_is_that_of_the_whole_loop_by_hand(
    family: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """By hand in float64: of a bfloat16 model the weights are the same numbers, only the fit's activations differ."""
    model = make_model(family, dtype)
    patch = make_patch(model, **settings)
    model = model.double()
    changed, errors = loop(model, **settings)
    # the library keeps 8 bits of the inputs to preserve
    tolerance = 1e-2 if "preserve" in settings and settings.get("parts") != "vector" else 1e-5
    tolerance = 0.1 if dtype == torch.bfloat16 else tolerance
    for tokens in tokenised():
        ids = torch.tensor([tokens.plain_ids])
        original, wanted = model(ids).logits, changed(ids).logits
        with patch.applied(model, check=False):
            found = model(ids).logits
        assert (found - wanted).norm() < tolerance * (wanted - original).norm()
    diagnostics = patch.provenance["diagnostics"]
    assert len(diagnostics) == len(errors)
    assert [entry["error_before"] for entry in diagnostics.values()] == pytest.approx(errors, rel=tolerance)


def loop(
    model: PreTrainedModel,
    sites: Sequence[str] = ("attn_out", "mlp_out"),
    parts: str | None = None,
    blocks: Sequence[int] = (0, 1, 2),
    order: str = "sequential",
    steps: int = 1,
    step_size: float = 1.0,
    pairs_per_step: int = len(PAIRS),
    rank: int | None = None,
    preserve: Sequence[str] | None = None,
    preserve_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> tuple[PreTrainedModel, list[float]]:
    """Transmute by full forwards of single sequences and dense matrices: the changed model, and what each stage of
    the last step had to explain."""
    grams: dict[tuple[int, str], np.ndarray] = {}
    if preserve is not None:
        seen = [trace(model, window)[1] for window in text_windows(TOKENIZER, preserve, 256, 6_000)]
        for key in seen[0]:
            inputs = np.concatenate([entry[key][0].numpy() for entry in seen])
            grams[key] = inputs.T @ inputs / len(inputs)
    patches: dict[tuple[int, str], SitePatch] = {}
    for step in range(steps):
        errors = []
        here = [tokenised()[i % len(PAIRS)] for i in range(step * pairs_per_step, (step + 1) * pairs_per_step)]
        brute = BruteForce(model, here, order, answer_weight)
        brute.install(patches)
        for key in [(block, site) for block in sorted(blocks) for site in sites]:
            a, delta, shift, weights = (x.numpy() for x in brute.observe(*key))
            problem = Problem(a, delta, weights, 1e-2, grams.get(key), preserve_weight)
            there, solved = patches.get(key, SitePatch()), check_parts(parts, sites)[key[1]]
            matrix, vector = there.matrix, there.vector
            if "matrix" in solved:
                total = step_size * (problem.least_squares() if rank is None else problem.reduced_rank(rank))
                if matrix is not None:
                    total = total + matrix.A.numpy()
                    total = total if rank is None else problem.truncated(total, rank)
                matrix = Factors(torch.tensor(total), torch.eye(32, dtype=torch.float64))
            if "vector" in solved:
                mean = torch.tensor(step_size * (problem.share * shift).sum(0) / (1 + preserve_weight))
                vector = mean if vector is None else vector + mean
            goal = delta if "matrix" in solved else shift
            errors.append(float((problem.share * goal**2).sum()))
            patches[key] = SitePatch(matrix, vector)
            brute.install({key: patches[key]})
    return brute.changed, errors


@pytest.mark.parametrize(
    ("sites", "order", "step_size", "steps"),
    [
        (("mlp_in",), "sequential", 1.0, (1, 2)),
        (("mlp_in",), "teacher-forced", 0.5, (2, 3)),
        (("attn_out", "mlp_in"), "teacher-forced", 1.0, (1, 2)),
        (("attn_out", "mlp_out"), "sequential", 1.0, (1, 2)),
    ],
)
def test_a_further_step_leaves_less(
    sites: tuple[str, ...], order: str, step_size: float, steps: tuple[int, ...]
) -> None:
    """It has to explain what those before it have left, which is not much after a whole step."""
    model = make_model()
    patches = [make_patch(model, sites=sites, order=order, steps=n, step_size=step_size) for n in steps]
    errors = [
        np.mean([entry["error_before"] for entry in patch.provenance["diagnostics"].values()]) for patch in patches
    ]
    assert errors[1] < 0.8 * errors[0]
    assert divergence(model, patches[1])[1] < divergence(model, patches[0])[1]


def test_the_progress_bar_counts_the_stages_of_all_steps(capsys: pytest.CaptureFixture[str]) -> None:
    make_patch(make_model(), sites="mlp_out", blocks=[0, 2], steps=3, progress=True)
    assert "| 6/6 [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sites", "expected"),
    [(("mlp_in",), (1.0, 100.0, 2, 0.5)), (("attn_out", "mlp_in"), (8.0, 30.0, 1, 1.0)), (None, (8.0, 30.0, 1, 1.0))],
)
def test_settings_that_depend_on_the_sites(sites: tuple[str, ...] | None, expected: tuple, tmp_path: Path) -> None:
    """Recorded, and used: the same patch as with the settings written out."""
    names = ("preserve_weight", "answer_weight", "steps", "step_size")
    common = {"instruction": INSTRUCTION, "pairs": PAIRS, "preserve": TEXTS, "cache_dir": tmp_path, "progress": False}
    common |= {"sites": sites} if sites else {}
    model = make_model()
    own = transmute(model, TOKENIZER, rank=4, **common)
    assert tuple(own.provenance["settings"][name] for name in names) == expected
    assert identical(own, transmute(model, TOKENIZER, rank=4, **common, **dict(zip(names, expected, strict=True))))


def test_pairs_of_a_step_are_told_by_what_will_be_written() -> None:
    """120 turns for a short system prompt; of a document nobody knows yet."""
    for kind, count, most in (("system", 121, 120), ("demonstrations", 101, 100)):
        data = PairDataModule(None, INSTRUCTION, kind=kind)
        with pytest.raises(ThoughtError, match=f"pairs_per_step={count} is more than the {most} pairs"):
            data.check_step(count, TOKENIZER)
        data.check_step(most, TOKENIZER)
    data = PairDataModule(None, INSTRUCTION, kind="document")
    data.check_step(1000, TOKENIZER)
    data.add([{"input": "x"}] * 7, PromptTemplate("Q: {input}\nA: {output}\n"), "document")
    with pytest.raises(ThoughtError, match="more than the 7 pairs"):
        data.check_step(8, TOKENIZER)


def test_each_step_takes_the_next_pairs() -> None:
    model = make_model()
    few = make_patch(model, pairs_per_step=2)
    assert identical(few, make_patch(model, pairs=PAIRS[:2]))
    assert distance(few, make_patch(model)) > 1e-2
    paper: dict[str, Any] = {"sites": "mlp_in", "pairs_per_step": 3, "steps": 2}
    twice = make_patch(model, **paper)  # the pairs 0, 1, 2 and 3, 4, 0
    assert identical(twice, make_patch(model, pairs=[*PAIRS, PAIRS[0]], **paper))
    other = [*PAIRS[:4], {"input": "lazy", "output": "jumps"}]
    assert distance(twice, make_patch(model, pairs=other, **paper)) > 1e-3


def test_orders_differ_only_after_the_first_block() -> None:
    patches = [make_patch(make_model(), order=order) for order in ("sequential", "teacher-forced")]
    one, other = map(dense, patches)
    for path in one:
        same = torch.allclose(one[path], other[path], rtol=1e-9)
        assert same == path.startswith("model.layers.0."), path


def test_bfloat16_model() -> None:
    model = make_model("llama", torch.bfloat16)
    untouched = Untouched(model)
    patch = make_patch(model, rank=8)
    untouched.check()
    assert all(torch.isfinite(f.A).all() and torch.isfinite(f.B).all() for f in patch.factors.values())
    before, after = divergence(model, patch)
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("family", "sites"),
    [*((family, ("attn_out", "mlp_out")) for family in FAMILIES), ("llama", ("mlp_in",)), ("gpt2", SITES)],
)
@torch.no_grad()
def test_peft_computes_what_the_patched_model_computes(family: str, sites: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    patch = make_patch(model, rank=4, sites=sites)
    patch.save_adapter(tmp_path / "adapter")
    ids = torch.tensor([TOKENIZER("Q: hot\nA: cold\n")["input_ids"]])
    original = model(ids).logits
    with patch.applied(model):
        wanted = model(ids).logits
    assert (wanted - original).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(make_model(family, torch.float32), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    if patch.vectors and family != "gpt2":
        return  # PEFT cannot merge a bias into a layer without one
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_each_pair_may_have_its_own_instruction() -> None:
    model = make_model()
    common = make_patch(model, ridge=1e-8)
    same = [{**pair, "instruction": INSTRUCTION} for pair in PAIRS]
    assert identical(common, make_patch(model, pairs=same, instruction=None, ridge=1e-8))
    assert identical(common, make_patch(model, pairs=same, instruction="overridden\n", ridge=1e-8))
    mixed = [{**pair, "instruction": ("Talk like a pirate.\n", INSTRUCTION)[i % 2]} for i, pair in enumerate(PAIRS)]
    patch = make_patch(model, pairs=mixed, instruction=None, ridge=1e-8)
    assert distance(common, patch) > 1e-2
    assert patch.provenance["instruction"] == sorted({INSTRUCTION, "Talk like a pirate.\n"})
    before, after = divergence(model, patch, pairs=mixed, instruction=None)
    assert after < 0.1 * before


def test_answer_weight_counts_the_outputs_tokens_more() -> None:
    model = make_model()
    heavier = make_patch(model, answer_weight=5.0)
    assert distance(make_patch(model), heavier) > 1e-3
    weights = [5 if a <= p < b else 1 for t in tokenised() for a, b in [answer(t)] for p in range(len(t.plain_ids))]
    diagnostics = heavier.provenance["diagnostics"]["model.layers.0.self_attn.o_proj"]
    assert diagnostics["error_before"] == pytest.approx(attention_error(make_model(), weights), rel=1e-6)


def tokenised() -> list[Any]:
    return [PromptTemplate().tokenise(TOKENIZER, INSTRUCTION, p["input"], p["output"]) for p in PAIRS]


def answer(tokens: Any) -> tuple[int, int]:
    return tokens.output_span[0] - 1, tokens.output_span[1]


def attention_error(model: PreTrainedModel, weights: Sequence[float]) -> float:
    """Weighted mean squared difference of block 0's residual stream after attention, instructed less plain."""
    errors: list[float] = []
    for tokens in tokenised():
        plain, instructed = (entrance_of_mlp(model, ids) for ids in (tokens.plain_ids, tokens.instructed_ids))
        assert tokens.sink  # without BOS the first token is compared with itself
        errors.append(0.0)
        for p, q in zip(tokens.plain_positions, tokens.instructed_positions, strict=True):
            errors.append(float((instructed[q] - plain[p]).square().sum()))
    return float(np.average(errors, weights=weights))


def test_diagnostics() -> None:
    model = make_model()
    patch = make_patch(model, rank=4)
    diagnostics = patch.provenance["diagnostics"]
    assert set(diagnostics) == set(patch.targets)
    for path, found in diagnostics.items():
        assert found["error_after"] <= found["error_before"]
        assert found["rank"] == patch.factors[path].rank == 4
        assert found["norm"] == pytest.approx(float(patch.factors[path].delta(torch.float64).norm()), rel=1e-5)
        assert 0 < found["truncation_loss"] < 1
        assert found["condition"] > 1
    weights = [1] * sum(len(tokens.plain_ids) for tokens in tokenised())
    first = diagnostics["model.layers.0.self_attn.o_proj"]
    assert first["error_before"] == pytest.approx(attention_error(model, weights), rel=1e-6)


def test_predicted_error_is_the_error() -> None:
    """``error_after`` of block 0's attention, recomputed through the patched model."""
    model = make_model()
    patch = make_patch(model, rank=4, sites="attn_out")
    path = "model.layers.0.self_attn.o_proj"
    original = make_model()
    errors = []
    for tokens in tokenised():
        wanted = entrance_of_mlp(original, tokens.instructed_ids)
        unpatched = entrance_of_mlp(original, tokens.plain_ids)
        with ThoughtPatch({path: patch.factors[path]}).applied(model):
            got = entrance_of_mlp(model, tokens.plain_ids)
        errors.append(float((got[0] - unpatched[0]).square().sum()))  # the sink should stay
        pairs = zip(tokens.plain_positions, tokens.instructed_positions, strict=True)
        errors += [float((wanted[q] - got[p]).square().sum()) for p, q in pairs]
    assert patch.provenance["diagnostics"][path]["error_after"] == pytest.approx(np.mean(errors), rel=1e-5)


@torch.no_grad()
def entrance_of_mlp(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Block 0's residual stream after attention, (length, d)."""
    seen: list[Tensor] = []
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].clone()))
    try:
        model(input_ids=torch.tensor([list(ids)]))
    finally:
        handle.remove()
    return seen[0]


def test_provenance_tells_where_the_patch_comes_from() -> None:
    model = make_model()
    model.name_or_path = "tiny/llama"
    patch = make_patch(
        model,
        pairs=[*PAIRS, {"input": "dog"}],
        rank=3,
        ridge=0.1,
        max_new_tokens=4,
        preserve=TEXTS,
        preserve_weight=0.5,
        preserve_tokens=40,
        sites=("mlp_in", "mlp_out"),
        blocks=[2, 0],
        steps=2,
        step_size=0.5,
        pairs_per_step=4,
    )
    known = patch.provenance
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    assert known["model"] == known["base_model"] == "tiny/llama"
    assert known["fingerprint"] == fingerprint(model)
    assert known["instruction"] == INSTRUCTION
    assert PromptTemplate.from_dict(known["template"]) == PromptTemplate()
    assert known["fan_in_fan_out"] is False
    assert known["settings"] == {
        "inputs": None,
        "kind": None,
        "sites": ["mlp_in", "mlp_out"],
        "parts": {"mlp_in": ["matrix", "vector"], "mlp_out": ["matrix"]},
        "blocks": [0, 2],
        "order": "sequential",
        "steps": 2,
        "step_size": 0.5,
        "pairs_per_step": 4,
        "rank": 3,
        "ridge": 0.1,
        "preserve_weight": 0.5,
        "preserve_tokens": 40,
        "preserve_file": None,
        "pairs": 6,
        "generated_outputs": 1,
        "generate": {},
        "max_new_tokens": 4,
        "answer_weight": 1.0,
        "seed": 0,
    }
    assert known["d_in"] == {f"model.layers.{i}.mlp.down_proj": 48 for i in (0, 2)}
    assert list(known["diagnostics"]) == [
        f"model.layers.{i}.mlp.{name}" for i in (0, 2) for name in ("mlp_in", "down_proj")
    ]
    assert known["history"] == []
    assert {"lit_thought", "torch", "transformers", "peft", "lightning"} <= set(known["versions"])
    made = datetime.datetime.fromisoformat(known["date"])
    assert abs(datetime.datetime.now(datetime.UTC) - made) < datetime.timedelta(minutes=5)
    plain = make_patch(make_model("gpt2"), rank=2).provenance
    assert plain["fan_in_fan_out"] is True
    assert (plain["settings"]["blocks"], plain["settings"]["pairs_per_step"]) == (None, None)
    assert "d_in" not in plain


# --- what it does not depend on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fixed"),
    [
        *((family, {"rank": rank}) for family in ("llama", "mistral", "gpt2") for rank in (None, 4)),
        ("llama", {"rank": 4, "sites": ("mlp_in",), "steps": 2, "blocks": [0, 2]}),
    ],
)
def test_batches_and_order_do_not_matter(family: str, fixed: dict[str, Any]) -> None:
    model = make_model(family)

    def first(patch: ThoughtPatch) -> ThoughtPatch:
        path = patch.targets[0]
        return ThoughtPatch({path: patch.factors[path]})

    patch = make_patch(model, **fixed)
    left = make_tokenizer()
    left.padding_side = "left"
    for settings in (
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_size": 3, "pairs": PAIRS[::-1]},
        {"tokenizer": left},
        {"tokenizer": left, "batch_size": 2},
        {"offload": "disk"},
    ):
        other = make_patch(model, **fixed, **settings)
        assert distance(first(patch), first(other)) < (1e-7 if "steps" not in fixed else 1e-6)
        assert distance(patch, other) < 1e-6  # each block sees the float32 rounding of those before it
    assert left.padding_side == "left"
    assert distance(first(patch), first(make_patch(model, pairs=PAIRS[:-1], **fixed))) > 1e-2


def test_the_model_may_be_in_train_mode() -> None:
    """Dropout stays off while the instructed model writes the outputs, too."""
    pairs = [{"input": pair["input"]} for pair in PAIRS]
    trained = readable(make_model("gpt2", torch.float32)).train()
    assert trained.config.resid_pdrop > 0
    calm = readable(make_model("gpt2", torch.float32))
    settings: dict[str, Any] = {"pairs": pairs, "max_new_tokens": 8, "preserve": TEXTS, "preserve_weight": 1.0}
    assert identical(make_patch(calm, **settings, cache_dir="calm"), make_patch(trained, **settings, cache_dir="train"))


# --- the Lightning side ------------------------------------------------------------------------------------


def make_trainer(thought: ThoughtCallback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": -1,
            "callbacks": [thought],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )


def make_data(**settings: Any) -> PairDataModule:
    return PairDataModule(PAIRS, INSTRUCTION, **{"answer_weight": 1.0, **settings})


def train(
    model: PreTrainedModel, thought: ThoughtCallback, data: PairDataModule | None = None, **settings: Any
) -> Trainer:
    trainer = make_trainer(thought, **settings)
    trainer.fit(ThoughtModule(model, TOKENIZER), datamodule=data or make_data())
    return trainer


def test_trainer_makes_the_patch_that_transmute_makes() -> None:
    model = make_model()
    thought = ThoughtCallback(preserve=None, ridge=1e-2, rank=4)
    trainer = train(model, thought)
    assert trainer.current_epoch == 6
    assert thought.patch is not None
    assert identical(thought.patch, make_patch(model, rank=4))
    assert set(thought.stopwatch.seconds) >= {"forward", "statistics", "solve", "patch"}


def test_a_callback_can_be_used_again() -> None:
    thought = ThoughtCallback(preserve=None, ridge=1e-2, rank=4)
    train(make_model("llama", seed=1), thought)
    first = thought.patch
    train(make_model("llama", seed=2), thought)
    assert first is not None
    assert thought.patch is not None
    assert identical(first, make_patch(make_model("llama", seed=1), rank=4))
    assert identical(thought.patch, make_patch(make_model("llama", seed=2), rank=4))


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"sites": ("attn_out", "mlp_out")}, 6),
        ({"sites": ("mlp_out",)}, 3),
        ({"sites": SITES, "steps": 2, "blocks": [2], "pairs_per_step": 2}, 6),
    ],
)
def test_max_epochs(settings: dict[str, Any], stages: int) -> None:
    for allowed in (stages, stages + 3, None):
        thought = ThoughtCallback(**settings, preserve=None)
        assert train(make_model(), thought, max_epochs=allowed).current_epoch == stages
        assert thought.patch is not None
    thought = ThoughtCallback(**settings, preserve=None)
    with pytest.raises(ThoughtError, match=rf"max_epochs={stages - 1} .*need {stages}"):
        train(make_model(), thought, max_epochs=stages - 1)
    assert thought.patch is None


VAL_PAIRS = [{"input": text} for text in ("up", "hot", "good", "big", "quick")]


def test_validation_pairs_are_followed_step_by_step(tmp_path: Path) -> None:
    """Step 0 is the plain model, step n what ``evaluate`` says of the patch of n steps."""
    model = readable(make_model(dtype=torch.float32, seed=1))
    common: dict[str, Any] = {"sites": ("attn_out", "mlp_in"), "rank": None, "ridge": 1e-2, "pairs_per_step": 3}
    known = {"instruction": INSTRUCTION, "max_new_tokens": 3, "unrelated": None, "progress": False}
    patches = [make_patch(model, **common, steps=n) for n in (1, 2)]
    written = evaluate(model, TOKENIZER, patches[0], pairs=VAL_PAIRS, **known)["items"]
    runs = ["instructed"] * 4 + ["plain"]
    answered = [{"input": item["input"], "output": item[run]} for item, run in zip(written, runs, strict=True)]
    results = [evaluate(model, TOKENIZER, patch, pairs=answered, **known) for patch in patches]
    wanted = [
        {
            "step": step,
            "accuracy": results[max(step, 1) - 1]["accuracy"][run],
            "instructed_accuracy": results[0]["accuracy"]["instructed"],
            "fidelity": results[max(step, 1) - 1]["fidelity" if step else "fidelity_plain"],
            "output_kl": results[max(step, 1) - 1]["output_kl"][run],
            "output_agreement": results[max(step, 1) - 1]["output_agreement"][run],
            **({"own_text_kl": results[step - 1]["own_text"]["kl"]} if step else {}),
        }
        for step, run in enumerate(("plain", "patched", "patched"))
    ]
    assert len({entry["output_kl"] for entry in wanted}) == 3
    assert wanted[1]["fidelity"] > wanted[0]["fidelity"] != wanted[0]["accuracy"]
    untouched = Untouched(model)
    thought = ThoughtCallback(**common, steps=2, preserve=None)
    data = make_data(val_pairs=answered, max_new_tokens=3)
    train(model, thought, data, logger=CSVLogger(tmp_path, "log", ""), log_every_n_steps=1)
    untouched.check()
    for found, entry in zip(thought.history, wanted, strict=True):
        assert found == pytest.approx(entry)
    assert thought.patch is not None
    assert thought.patch.provenance["history"] == thought.history
    assert identical(thought.patch, patches[1])  # nothing is fitted on them
    assert thought.stopwatch.seconds["validate"] > 0
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/accuracy")]
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    for row, entry in zip(rows, wanted, strict=True):
        assert {name: float(row[f"val/{name}"]) for name in entry if name != "step"} == pytest.approx(
            {name: value for name, value in entry.items() if name != "step"}
        )
    patch = make_patch(model, **common, val_pairs=VAL_PAIRS, max_new_tokens=3)  # without outputs
    assert identical(patch, patches[0])
    known = ("accuracy", "instructed_accuracy")
    for found, entry in zip(patch.provenance["history"], wanted[:2], strict=True):
        assert found == pytest.approx({name: value for name, value in entry.items() if name not in known})


@pytest.mark.parametrize(("name", "number"), [("generate", 2), ("generate", 3), ("batch_logits", 5)])
def test_failing_while_validating_leaves_nothing_behind(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch is on the model while its outputs are written."""
    model = mixed_model("llama")
    untouched = Untouched(model)
    monkeypatch.setattr(evaluation, name, fail_at(number, RuntimeError("no room"), getattr(evaluation, name)))
    with pytest.raises(RuntimeError, match="no room"):
        make_patch(model, sites="mlp_in", rank=2, val_pairs=VAL_PAIRS, max_new_tokens=3)
    untouched.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_train_batches": 1}, "limit_train_batches"),
        ({"limit_train_batches": 0.5}, "limit_train_batches"),
        ({"overfit_batches": 1}, "limit_train_batches"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed'"),
        ({"precision": "bf16-true"}, "precision='bf16-true'"),
    ],
)
def test_trainer_settings_that_would_spoil_the_sums(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        train(make_model(), ThoughtCallback(preserve=None), **settings)


def test_module_data_and_callback_belong_together() -> None:
    with pytest.raises(ThoughtError, match="datamodule=PairDataModule"):
        make_trainer(ThoughtCallback(preserve=None)).fit(
            ThoughtModule(make_model(), TOKENIZER), train_dataloaders=[torch.zeros(1)]
        )
    with pytest.raises(ThoughtError, match="ThoughtCallback"):
        make_trainer(ThoughtCallback(preserve=None), callbacks=[]).fit(
            ThoughtModule(make_model(), TOKENIZER), datamodule=make_data()
        )
    with pytest.raises(ThoughtError, match="model must be a transformers causal LM; got Linear"):
        ThoughtModule(nn.Linear(2, 2), TOKENIZER)  # type: ignore[arg-type]


# --- preservation ------------------------------------------------------------------------------------------


@torch.no_grad()
def drift(model: PreTrainedModel, patch: ThoughtPatch, text: str) -> float:
    """Mean squared change of the hidden states on a text that the patch should leave alone."""
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    before = model(ids, output_hidden_states=True).hidden_states
    with patch.applied(model):
        after = model(ids, output_hidden_states=True).hidden_states
    return sum(float((a - b).square().mean()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_preservation_keeps_the_patch_away_from_other_text(family: str) -> None:
    model = make_model(family)
    free, kept = make_patch(model), make_patch(model, preserve=TEXTS, preserve_weight=10.0)
    assert distance(free, kept) > 1e-2
    assert drift(model, kept, TEXTS[0]) < 0.3 * drift(model, free, TEXTS[0])
    before, after = divergence(model, kept)
    assert after < before


def test_no_weight_is_no_preservation(tmp_path: Path) -> None:
    model = make_model()
    patch = make_patch(model, preserve=TEXTS, preserve_weight=0, cache_dir=tmp_path / "unused")
    assert identical(patch, make_patch(model))
    assert not (tmp_path / "unused").exists()


def test_preservation_is_computed_once_for_each_model_and_text(tmp_path: Path) -> None:
    cached = []
    patches = []
    one, other = TEXTS[:1], TEXTS[1:]  # of which as many tokens are used
    for seed, texts in ((0, one), (0, one), (0, other), (1, one), (1, one)):
        thought = ThoughtCallback(preserve=texts, preserve_tokens=30, cache_dir=tmp_path / "kept")
        model = make_model("llama", torch.float32, seed)
        patches.append(fit(ThoughtModule(model, TOKENIZER), make_data(), thought, False))
        cached.append(thought.preserve_cached)
    assert cached == [False, True, False, False, True]
    assert identical(patches[0], patches[1])
    assert identical(patches[3], patches[4])
    assert distance(patches[0], patches[2]) > 1e-3
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_line_before_a_fit_says_where_preservation_statistics_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"preserve": TEXTS[:1], "preserve_tokens": 30, "cache_dir": tmp_path / "kept", "progress": True}
    said = []
    for _ in range(2):
        make_patch(make_model("llama", torch.float32), **options)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("This fit takes")]
        said.append(line.partition("besides the model. ")[2])
    first = (
        f"First, once per model and kind of fit, 30 tokens of unrelated text go through it, for {tmp_path / 'kept'}."
    )
    assert said == [first, f"Statistics of unrelated text: in {tmp_path / 'kept'}."]


@pytest.mark.parametrize(
    ("tokenizer", "template", "kind", "preserve", "chats"),
    [
        (TOKENIZER, None, None, "default", True),
        (make_tokenizer(chat=False), None, None, "default", False),
        (TOKENIZER, "chat", None, "default", False),
        (TOKENIZER, "chat", "document", "default", False),
        (TOKENIZER, "chat", "system", "default", False),
        (TOKENIZER, None, None, TEXTS, False),
    ],
)
def test_chats_are_preserved_where_the_template_is_no_chat(
    tokenizer: Any,
    template: str | None,
    kind: Any,
    preserve: Any,
    chats: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = text_windows(tokenizer, load_texts(preserve, "preserve", "preserve"), 256, 60)
    tokens = sum(map(len, [*texts, *(chat_windows(tokenizer, 256, 60) if chats else [])]))
    assert tokens == (120 if chats else 60)
    data = PairDataModule(PAIRS, INSTRUCTION, template=template, kind=kind, answer_weight=1.0)
    thought = ThoughtCallback(preserve=preserve, preserve_tokens=60, cache_dir=tmp_path / "kept", rank=2)
    patch = fit(ThoughtModule(make_model("llama", torch.float32), tokenizer), data, thought, True)
    (file,) = (tmp_path / "kept").glob("preserve-*")
    assert Preservation(file).manifest["tokens"] == tokens
    said = f"{tokens} tokens of unrelated text{' and chats' if chats else ''} go through it"
    assert said in " ".join(capsys.readouterr().err.split())
    times = max(1.0, data.answer_tokens() / 120)
    larger = template is None or kind == "document"
    assert patch.provenance["settings"]["preserve_weight"] == pytest.approx((8.0 if larger else 3.0) / times**0.25)


@pytest.mark.parametrize(
    ("data", "longest"),
    [({}, 32), ({"kind": "system"}, 32), ({"kind": "document"}, 64), ({"kind": "document", "max_new_tokens": 5}, 5)],
)
def test_the_longest_output(data: dict[str, Any], longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used wherever an output is written, and kept."""
    asked: list[int] = []

    def noted(model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, **_: Any) -> list[Generation]:
        asked.append(max_new_tokens)
        return [Generation("cold", True)] * len(prompts)

    monkeypatch.setattr(preparing, "generate", noted)
    monkeypatch.setattr(evaluation, "generate", noted)
    both: dict[str, Any] = {"val_pairs": VAL_PAIRS, "rank": 2, **data}
    patch = make_patch(make_model(), pairs=[{"input": "hot"}], **both)
    assert patch.provenance["settings"]["max_new_tokens"] == longest
    assert set(asked) == {longest}
    assert len(asked) > 2


# --- what it leaves alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = mixed_model(family)
    untouched = Untouched(model)
    patch = make_patch(
        model,
        pairs=[*PAIRS, {"input": "dog"}],
        max_new_tokens=4,
        preserve=TEXTS,
        preserve_tokens=60,
        rank=2,
        sites=SITES,
        steps=2,
        pairs_per_step=4,
        val_pairs=VAL_PAIRS,
    )
    untouched.check()
    with patch.applied(model), pytest.raises(AssertionError):
        untouched.check()  # the check can fail


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (stage, "solve", 1),
        (stage, "solve", 4),
        (statistics.Statistics, "update", 7),
        (callback.StreamRunner, "finish", 2),
        (callback.StreamRunner, "observe", 5),
        (adapter, "save_file", 1),
        (PairDataModule, "complete", 1),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("pulled the plug"), KeyboardInterrupt("ctrl-c")])
def test_a_failing_fit_leaves_nothing_behind(
    error: BaseException, owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed_model()
    untouched = Untouched(model)
    monkeypatch.setattr(owner, name, fail_at(number, error, getattr(owner, name)))
    thought = ThoughtCallback(preserve=None, output_dir=tmp_path / "here" / "out")
    module = ThoughtModule(model, TOKENIZER)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(error), match=str(error) if isinstance(error, RuntimeError) else None):
        fit(module, make_data(), thought, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    untouched.check()
    assert module.runner is None  # or the streams would stay in memory
    assert not list(tmp_path.rglob("*out*"))


def test_failing_in_the_middle_of_a_block_removes_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_model("llama")
    untouched = Untouched(model)
    activation = model.model.layers[1].mlp.act_fn
    monkeypatch.setattr(type(activation), "forward", fail_at(9, RuntimeError("no room"), type(activation).forward))
    with pytest.raises(RuntimeError, match="no room"):
        make_patch(model)
    untouched.check()


def test_output_dir_holds_the_patch_at_the_end(tmp_path: Path) -> None:
    thought = ThoughtCallback(preserve=None, ridge=1e-2, rank=4, output_dir=tmp_path / "out")
    model = make_model()
    patch = fit(ThoughtModule(model, TOKENIZER), make_data(), thought, progress=False)
    loaded = ThoughtPatch.load(tmp_path / "out", model)
    assert identical(patch, loaded)
    assert loaded.provenance == patch.provenance


@pytest.mark.parametrize("name", ["output_dir", "statistics_dir"])
def test_no_output_replaces_the_model(name: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    model = type(make_model()).from_pretrained(tmp_path / "base")
    thought = ThoughtCallback(preserve=None, overwrite=True, **{name: tmp_path / "base"})
    with pytest.raises(ThoughtError, match=rf"{name}=.* with overwrite=True would delete the model"):
        fit(ThoughtModule(model, TOKENIZER), make_data(), thought, progress=False)
    assert (tmp_path / "base" / "config.json").exists()


# --- generated outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_what_the_instructed_model_writes(family: str, bos: bool) -> None:
    model, tokenizer = readable(make_model(family)), make_tokenizer(bos=bos)
    inputs = ["hot", "the lazy dog", "fox jumps over", "up", "capital of France", "big"]
    data = PairDataModule(
        [*({"input": text} for text in inputs), PAIRS[0]], INSTRUCTION, batch_size=4, max_new_tokens=7
    )
    prepare_pairs(data, model, tokenizer)
    ends = []
    for text, output, tokens in zip(inputs, data.outputs, data.tokenised, strict=False):
        wanted, finished = written(model, tokenizer, f"{INSTRUCTION}Q: {text}\nA:", 7)
        ends.append(finished)
        assert output == wanted
        space = " " if output[:1].strip() else ""
        completed = f"Q: {text}\nA:{space}{output}" + "\n" * finished
        assert list(tokens.plain_ids) == tokenizer(completed)["input_ids"]
    assert data.outputs[-1] == PAIRS[0]["output"]
    assert len(set(data.outputs)) > 2


def test_chat_outputs_are_what_the_instructed_model_writes() -> None:
    model = readable(make_model())
    data = PairDataModule([{"input": "hot"}, {"input": "the lazy dog"}], INSTRUCTION, "chat", max_new_tokens=7)
    prepare_pairs(data, model, TOKENIZER)
    for text, output in zip(("hot", "the lazy dog"), data.outputs, strict=True):
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
        prompt = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert output == written(model, TOKENIZER, prompt, 7, special=False)[0]


def test_sampled_outputs_depend_on_the_seed_alone() -> None:
    model = readable(make_model())
    pairs = [{"input": pair["input"]} for pair in PAIRS]

    def outputs(seed: int) -> list[str]:
        options = {"do_sample": True, "temperature": 1.5}
        data = PairDataModule(pairs, INSTRUCTION, max_new_tokens=6, generate=options, seed=seed)
        prepare_pairs(data, model, TOKENIZER)
        return data.outputs

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = outputs(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert outputs(1) == first
    assert outputs(2) != first


def test_under_autocast_a_fit_is_refused_and_an_evaluation_sees_the_patch() -> None:
    model = make_model("llama").float().requires_grad_(True)  # torch keeps its casts of such weights
    patch = make_patch(model)
    asked = {"instruction": INSTRUCTION, "pairs": PAIRS[:2], "unrelated": None, "progress": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ThoughtError, match=r"torch\.autocast is on"):
            make_patch(model)
        kl = evaluate(model, TOKENIZER, patch, **asked)["kl"]
    assert abs(kl["patched"] - kl["plain"]) > 0.01


def test_history_is_of_the_patch_at_its_scale() -> None:
    model = make_model("llama").float()
    plain, patched = make_patch(model, scale=0.0, val_pairs=PAIRS[:2]).provenance["history"]
    assert patched["output_kl"] == pytest.approx(plain["output_kl"], rel=1e-3)
    plain, patched = make_patch(model, val_pairs=PAIRS[:2]).provenance["history"]
    assert patched["output_kl"] != pytest.approx(plain["output_kl"], rel=1e-2)


def test_the_instructions_told_are_those_of_the_pairs() -> None:
    model = make_model("llama")
    own = [{**pair, "instruction": INSTRUCTION} for pair in PAIRS]
    assert make_patch(model, pairs=own, instruction="Nobody reads this.\n").provenance["instruction"] == INSTRUCTION
    some = [*own[:2], *PAIRS[2:]]
    told = make_patch(model, pairs=some, instruction="Be kind.\n").provenance["instruction"]
    assert told == ["Be kind.\n", INSTRUCTION]


@pytest.mark.parametrize("seed", ["x", 1.5, None, True, np.int64(1)])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ThoughtError, match="seed must be a whole number"):
        make_patch(make_model("llama"), seed=seed)


def test_what_can_be_told_at_once_is_told_before_inputs_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").float()
    patch = make_patch(model, preserve=TEXTS, preserve_weight=1.0, cache_dir=tmp_path)
    assert patch.rank > 0
    (entry,) = tmp_path.glob("preserve-*")
    monkeypatch.setattr(preparing, "write_inputs", lambda *args: pytest.fail("inputs are written"))
    written = {"pairs": None, "inputs": 3, "preserve": None}
    for settings, said in (
        ({"preserve": entry}, "whose weights are not the model's"),
        ({"preserve": ["a"]}, "the unrelated text gives no window"),
        ({"generate": {"do_sample": True, "temperature": -1.0}}, "temperature"),
    ):
        with pytest.raises(ThoughtError, match=said):
            make_patch(make_model("llama", seed=1).float(), **{**written, **settings})
    monkeypatch.setattr(growing, "write_inputs", lambda *args, **options: pytest.fail("inputs are written"))
    with pytest.raises(ThoughtError, match=r"pairs_per_step=60: with inputs=\"auto\""):
        make_patch(model, **{**written, "inputs": "auto"}, pairs_per_step=60, steps=2)


def test_outputs_that_would_delete_what_is_read_or_logged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "text.txt").write_text("fox " * 50)
    with pytest.raises(ThoughtError, match="would delete the preserve"):
        ThoughtCallback(output_dir=tmp_path / "run", overwrite=True, preserve=str(tmp_path / "run" / "text.txt"))
    with pytest.raises(ThoughtError, match="cache_dir and output_dir must be folders"):
        ThoughtCallback(output_dir=tmp_path / "run", overwrite=True, cache_dir=tmp_path / "run" / "cache")
    quiet = {"max_epochs": -1, "enable_checkpointing": False, "enable_progress_bar": False}

    def run(**folders: Any) -> None:
        logger = CSVLogger(tmp_path / "logs", name="x", version=0)
        trainer = Trainer(callbacks=[ThoughtCallback(preserve=None, rank=2, **folders)], logger=logger, **quiet)
        trainer.fit(ThoughtModule(make_model("llama"), TOKENIZER), datamodule=PairDataModule(PAIRS, INSTRUCTION))

    for name, place in (("output_dir", "logs"), ("statistics_dir", "logs/x"), ("output_dir", "logs/x/version_0")):
        with pytest.raises(
            ThoughtError, match=f"log_dir and {name} must be folders|{name} and log_dir must be folders"
        ):
            run(**{name: tmp_path / place}, overwrite=True)
    run(output_dir=tmp_path / "logs/x/version_0/adapter")
    assert (tmp_path / "logs/x/version_0/metrics.csv").exists()
