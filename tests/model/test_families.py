"""Every family of helpers/families.py, from the fit to the adapter and back; ``--support-table`` writes the results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, FLOAT32_ONLY, HYBRID, make_family
from fits import Untouched
from models import make_tokenizer
from peft import PeftModel
from support import SupportTable, Task, log_probabilities, mean_kl, notes, site_names
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch
from lit_thought.errors import UnsupportedModelError
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.batches import make_batches
from lit_thought.solve.factors import Factors
from lit_thought.solve.least_squares import solve
from lit_thought.statistics import stage
from lit_thought.statistics.stage import StageSums

pytestmark = pytest.mark.slow

REFUSED = ("hrm_text", "gemma3n_text", "opt-post", "jetmoe", "longcat_flash", "deepseek_v4", *HYBRID)
SUPPORTED = tuple(name for name in FAMILIES if name not in REFUSED)
POST_NORM = tuple(name for name in SUPPORTED if FAMILIES[name].kind == "post-norm")
MOE = tuple(name for name in SUPPORTED if FAMILIES[name].kind == "moe")
MLP_IN = """
    llama mistral ministral ministral3 qwen2 qwen3 gpt2 gpt_bigcode gemma phi3 gpt_neo gpt_neox-serial opt bloom mpt
    falcon-alibi
    olmo starcoder2 stablelm smollm3 glm nemotron persimmon helium arcee apertus seed_oss hunyuan_v1_dense ernie4_5
    internlm3 biogpt xglm jais2 nanochat cwm bitnet diffllama doge vaultgemma youtu iquestcoder ctrl modernbert-decoder
    gpt_neox_japanese qwen2_moe qwen3_moe deepseek_v2 deepseek_v2-lite deepseek_v3 glm4_moe glm4_moe_lite dots1
    llama4_text ernie4_5_moe exaone_moe mimo_v2_flash laguna hy_v3 mellum
""".split()  # noqa: SIM905
VARIED = (
    *("llama", "gpt2", "granite", "opt", "gemma2", "gemma4_text", "glm4", "gptj", "cohere2", "mixtral", "qwen2_moe"),
    *("deepseek_v3", "llama4_text", "dbrx"),
)
"""Representatives: plain, Conv1D, multiplier, rows as a list, norms after, parallel, experts alone or beside an MLP."""

BARS = {"pre-norm": 0.9, "parallel": 0.9, "post-norm": 0.8, "moe": 0.8}
"""By how much the KL to the instructed run must go down."""

# 19 tokens, and every layer that is patched has at least 20 inputs: full rank can hit all of them.
SHORT = Task.random(pairs=3, length=3)
LONG = Task.random(pairs=20, length=8, seed=1)
EXACTLY = {"rank": None, "ridge": 1e-8}

unbuilt: set[str] = set()


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer(bos=True)


def build(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The family's tiny model, or a skip where transformers cannot build it."""
    try:
        model = make_family(name, dtype or (torch.float32 if name in FLOAT32_ONLY else torch.float64))
    except Exception as error:
        unbuilt.add(name)
        pytest.skip(f"transformers {version('transformers')} cannot build {name}: {type(error).__name__}: {error}")
    if dtype == torch.bfloat16:
        model.set_experts_implementation("eager")  # the default one wants wider experts
    return model


def plain_kl(model: PreTrainedModel, wanted: Tensor, task: Task, patch: ThoughtPatch | None = None) -> float:
    """KL(instructed ‖ plain) of the model, with the patch if there is one."""
    if patch is None:
        return mean_kl(wanted, log_probabilities(model, task.prompts(tokenizer()), instructed=False))
    with patch.applied(model):
        return plain_kl(model, wanted, task)


@dataclass
class Case:
    """A family's model, what was measured before the fit, and the patch."""

    name: str
    model: PreTrainedModel
    state: Untouched
    wanted: Tensor
    before: float  # KL(instructed ‖ plain)
    others: Tensor  # token ids that the fit has not seen, (2, 12)
    logits: Tensor  # of those
    patch: ThoughtPatch

    def left(self, **settings: Any) -> float:
        """The share of the KL that another fit leaves."""
        patch = SHORT.fit(self.model, tokenizer(), **settings)
        return plain_kl(self.model, self.wanted, SHORT, patch) / self.before

    @torch.no_grad()
    def other_logits(self, model: nn.Module) -> Tensor:
        return model(self.others).logits


@pytest.fixture(scope="module", params=SUPPORTED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(family: str) -> Case:
    model = build(family)
    others = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = log_probabilities(model, SHORT.prompts(tokenizer()), instructed=True)
    with torch.no_grad():
        logits = model(others).logits
    state = Untouched(model)
    before = plain_kl(model, wanted, SHORT)
    return Case(family, model, state, wanted, before, others, logits, SHORT.fit(model, tokenizer(), **EXACTLY))


def test_the_chunk_is_a_lead_that_all_pairs_share() -> None:
    """So that the fits below go the usual way: the chunk runs once, and what follows reads its keys and values."""
    prompts = SHORT.prompts(tokenizer())
    lead, *others = make_batches(prompts, 32)
    assert lead.plain is not None
    assert len(lead.plain.ids) == len(lead.target.ids) == 1
    assert lead.target.ids.shape[1] - lead.plain.ids.shape[1] >= 14
    assert others
    assert all(batch.lead == lead.index for batch in others)
    assert len(lead.plain_rows) + sum(len(batch.plain_rows) for batch in others) < 20


def test_a_state_notices_what_is_left_behind() -> None:
    model = build("llama")
    state = Untouched(model)
    state.check()
    layer = model.get_submodule("model.layers.1.mlp")
    handle = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        state.check()
    handle.remove()
    layer.forward = layer.forward
    with pytest.raises(AssertionError):
        state.check()
    del layer.forward
    state.check()
    zero = next(model.parameters()).data[0, :1].zero_()
    state = Untouched(model)
    zero.neg_()  # -0.0
    with pytest.raises(AssertionError):
        state.check()


def test_the_patched_plain_run_is_the_instructed_run(
    case: Case, record_property: Callable[[str, object], None]
) -> None:
    """At the fitted tokens; the instructed run is whole passes of the model as it was."""
    blocks = find_blocks(case.model)
    for key, value in {
        "class": type(case.model).__name__,
        "sites": site_names(blocks),
        "notes": notes(blocks),
        "parallel": any(block.parallel for block in blocks),
    }.items():
        record_property(key, value)
    after = plain_kl(case.model, case.wanted, SHORT, case.patch)
    record_property("kl", (case.before, after))
    assert case.before > 0.02
    assert after <= 1e-6 * case.before  # there is a patch that hits every token
    assert any("mlp_in" in block.sites for block in blocks) == (case.name in MLP_IN)


def test_removal_restores_every_bit(case: Case, record_property: Callable[[str, object], None]) -> None:
    case.state.check()  # after the fit
    with case.patch.applied(case.model):
        assert not torch.equal(case.other_logits(case.model), case.logits)
        with pytest.raises(AssertionError):
            case.state.check()
    case.state.check()
    assert torch.equal(case.other_logits(case.model), case.logits)
    record_property("restored", True)


def visible(patch: ThoughtPatch, model: PreTrainedModel) -> ThoughtPatch:
    """The patch with every change a fifth of its weight: once attention is right there is little left for an MLP."""
    factors = {}
    for path, change in patch.factors.items():
        weight: Any = model.get_submodule(path).weight
        factor = float(0.2 * weight.norm() / (change.B @ change.A).norm())
        factors[path] = Factors(change.A, factor * change.B)
    return ThoughtPatch(factors, patch.provenance)


def test_the_adapter_in_peft_equals_the_patched_model(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """On tokens that the fit has not seen, and so that each target matters."""
    patch = visible(case.patch, case.model)
    with patch.applied(case.model):
        wanted = case.other_logits(case.model)
    scale = wanted.abs().max()
    assert (wanted - case.logits).abs().max() > 0.05 * scale
    patch.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copy.deepcopy(case.model), str(tmp_path / "adapter"))
    difference = float((case.other_logits(adapted) - wanted).abs().max() / scale)
    record_property("peft", difference)
    assert difference <= 1e-5
    loaded = [path for path, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert sorted(loaded) == sorted(patch.targets)


@pytest.mark.parametrize("family", REFUSED)
def test_refusal(family: str, record_property: Callable[[str, object], None]) -> None:
    """The message names the architecture, and nothing is left on the model."""
    model = build(family)
    state = Untouched(model)
    with pytest.raises(UnsupportedModelError) as caught:
        SHORT.fit(model, tokenizer())
    message = str(caught.value)
    record_property("class", type(model).__name__)
    record_property("reason", message)
    assert message.startswith("not supported")
    assert type(model).__name__ in message
    state.check()


@pytest.mark.parametrize("family", MOE, indirect=True)
def test_attention_alone_in_mixtures_of_experts(case: Case) -> None:
    """The site that every family has."""
    assert case.left(sites=("attn_out",), **EXACTLY) <= 1 - BARS["moe"]


@pytest.mark.parametrize("family", MLP_IN, indirect=True)
def test_mlp_in(case: Case) -> None:
    """One full step: norm(m) is right at the fitted tokens, m itself on average only."""
    everywhere = all("mlp_in" in block.sites for block in find_blocks(case.model))
    assert case.left(sites=("mlp_in",), steps=1, step_size=1.0, **EXACTLY) <= (0.6 if everywhere else 0.95)


@pytest.mark.parametrize("family", VARIED, indirect=True)
def test_teacher_forced(case: Case) -> None:
    assert case.left(order="teacher-forced", **EXACTLY) <= 1 - BARS[FAMILIES[case.name].kind]


@pytest.mark.parametrize("family", VARIED)
def test_bfloat16_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are float64 all the same, and a patch of rounded weights still does its work."""
    dtypes: set[torch.dtype] = set()

    genuine = StageSums.solve

    def solve(sums: StageSums, *args: Any) -> Any:
        assert sums.matrix is not None
        dtypes.update(x.dtype for x in (sums.matrix.energy, *(sums.matrix.rows() or (sums.matrix.gram,))))
        return genuine(sums, *args)

    monkeypatch.setattr(StageSums, "solve", solve)
    model = build(family, torch.bfloat16)
    wanted = log_probabilities(model, SHORT.prompts(tokenizer()), instructed=True)
    patch = SHORT.fit(model, tokenizer(), rank=None, ridge=1e-4)
    assert dtypes == {torch.float64}
    assert plain_kl(model, wanted, SHORT, patch) <= 0.5 * plain_kl(model, wanted, SHORT)


def spread_gains(model: PreTrainedModel) -> dict[str, Tensor]:
    """Give the norms after attention and MLP scales of very different sizes and both signs, four of them zero.

    Returns:
        By path of each layer before such a norm, which channels are cut off.
    """
    generator = torch.Generator().manual_seed(0)
    cut = {}
    for block in find_blocks(model):
        for site in block.sites.values():
            norm = site.projections[-1].norm
            if norm is None:
                continue
            weight: Any = norm.weight
            gain = torch.randn(len(weight), generator=generator).exp() * 0.7
            gain[torch.rand(len(gain), generator=generator) < 0.5] *= -1
            gain[torch.randperm(len(gain), generator=generator)[:4]] = 0
            for offset in (0, -1):  # Gemma's norms scale by 1 + weight
                weight.data.copy_(gain + offset)
                if torch.allclose(norm(torch.ones_like(weight)[None])[0], gain.to(weight), rtol=1e-3):
                    break
            else:
                raise AssertionError(f"{type(norm).__name__} is not understood")
            cut[site.path] = gain == 0
    return cut


@pytest.mark.parametrize("family", POST_NORM)
def test_uneven_gains_and_more_tokens_than_inputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is out of reach of a patch of rank 8 that knows nothing of the gains; default ridge."""
    model = build(family)
    cut = spread_gains(model)
    assert cut
    prompts = LONG.prompts(tokenizer())
    assert sum(len(prompt.plain_positions) for prompt in prompts) > 200
    wanted = log_probabilities(model, prompts, instructed=True)
    before = plain_kl(model, wanted, LONG)
    patch = LONG.fit(model, tokenizer(), rank=8)
    monkeypatch.setattr(stage, "solve_with_gains", lambda stats, gain, *args: solve(stats, *args))
    without = LONG.fit(model, tokenizer(), rank=8)
    assert plain_kl(model, wanted, LONG, patch) <= 0.5 * before < plain_kl(model, wanted, LONG, without)
    assert not any(patch.factors[path].B[rows].any() for path, rows in cut.items())


def test_transformers_builds_enough_of_them() -> None:
    assert len(set(SUPPORTED) - unbuilt) >= 25


def report(name: str, test: str, outcome: str = "passed", **figures: Any) -> Any:
    """What pytest says of a test that is over."""
    return SimpleNamespace(
        user_properties=[("family", name), *figures.items()],
        nodeid=f"tests/test_families.py::{test}[{name}]",
        when="teardown",
        failed=outcome == "failed",
        skipped=outcome == "skipped",
        longrepr=("file", 1, "Skipped: cannot build it") if outcome == "skipped" else None,
    )


def test_the_table_is_written_when_all_families_ran(tmp_path: Path) -> None:
    table = SupportTable(tmp_path / "families.md", "python -m pytest")
    figures = {"class": "A", "kl": (0.5, 0.01), "peft": 2e-7, "restored": True, "sites": "attn_out", "notes": ""}
    for name in SUPPORTED[3:]:
        table.pytest_runtest_logreport(report(name, "test_x", **figures))
    for name in REFUSED:
        table.pytest_runtest_logreport(report(name, "test_refusal", **{"class": "B", "reason": "no | such\nthing"}))
    table.pytest_runtest_logreport(report(SUPPORTED[0], "test_x", **figures))
    table.pytest_runtest_logreport(report(SUPPORTED[0], "test_y", "failed"))
    table.pytest_runtest_logreport(report(SUPPORTED[1], "test_x", "skipped"))
    del figures["peft"]
    table.pytest_runtest_logreport(report(SUPPORTED[2], "test_x", **figures))
    table.pytest_sessionfinish()
    assert "1 of" in table.message  # a family lacks a figure
    assert not list(tmp_path.iterdir())
    table.pytest_runtest_logreport(report(SUPPORTED[2], "test_y", peft=1e-6))
    table.waiting.add("a test that was deselected")
    table.pytest_sessionfinish()
    assert "1 tests did not run" in table.message
    assert not list(tmp_path.iterdir())
    table.waiting.clear()
    table.pytest_sessionfinish()
    assert [file.name for file in tmp_path.iterdir()] == ["families.md"]
    text = (tmp_path / "families.md").read_text()
    assert "| attn_out | 0.500 | 1.0e-02 | 98.00 % | 2e-07 | failed: test_y |" in text
    assert f"| {SUPPORTED[1]} |  | pre-norm |  |  |  |  |  |  | Skipped: cannot build it |" in text
    assert f"| {REFUSED[0]} | B | no \\| such thing | passed |" in text
    assert f"{len(SUPPORTED) - 2} of {len(SUPPORTED)} families passed; {len(REFUSED)} more are refused" in text
