"""A fit on a quantised or low-precision base: the statistics do not depend on how the weights are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import make_model, make_tokenizer
from peft import PeftModel
from quantised import KINDS, dequantise_, quantise_

from lit_thought import evaluate, transmute
from lit_thought.errors import UnsupportedModelError
from lit_thought.model.loading import fingerprint

INSTRUCTION = "You are a pirate. Talk like a pirate.\n"
PAIRS = [{"input": word, "output": "down"} for word in ("hot", "big fox", "up", "good", "the dog")]
IDS = torch.arange(5, 25)[None]


def fit(model, **settings):
    common = {"rank": 4, "preserve": ["The quick brown fox jumps over the lazy dog."], "progress": False}
    common["preserve_weight"] = 1.0  # the text is near to the pairs
    return transmute(model, make_tokenizer(), INSTRUCTION, PAIRS, **{**common, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_the_patch_is_that_of_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    model = quantise_(make_model("llama").float(), kind)
    plain = dequantise_(quantise_(make_model("llama").float(), kind))
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)
    before = fingerprint(model)
    patch = fit(model, cache_dir=tmp_path / "a")
    reference = fit(plain, cache_dir=tmp_path / "b")
    with patch.applied(model), reference.applied(plain):
        assert (model(IDS).logits - plain(IDS).logits).abs().max() < 1e-3
    assert fingerprint(model) == before
    assert (patch.provenance["settings"]["sites"]) == ["attn_out", "mlp_out"]
    asked = {"instruction": INSTRUCTION, "pairs": PAIRS[:2], "unrelated": None, "progress": False}
    found = evaluate(model, make_tokenizer(), patch, **asked)["kl"]
    wanted = evaluate(plain, make_tokenizer(), reference, **asked)["kl"]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found["patched"] != pytest.approx(found["plain"], rel=0.1)


def test_peft_puts_the_adapter_beside_a_quantised_weight(tmp_path: Path) -> None:
    model = quantise_(make_model("llama").float(), "8bit")
    patch = fit(model)
    patch.save_adapter(tmp_path / "adapter")
    with patch.applied(model):
        expected = model(IDS).logits
    found = PeftModel.from_pretrained(model, tmp_path / "adapter")(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_papers_site_needs_plain_first_layers() -> None:
    model = quantise_(make_model("llama").float(), "8bit")
    with pytest.raises(UnsupportedModelError, match="the MLP's first linear layers are quantised"):
        fit(model, sites=("mlp_in",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_and_wide_sums(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    reference = fit(model.float())  # the same weights, rounded already
    model = make_model("llama").to(dtype)
    patch = fit(model)
    for path, factors in reference.factors.items():
        found, wanted = patch.factors[path].delta(), factors.delta()
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.9, path
        assert found.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype
