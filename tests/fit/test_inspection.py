"""What inspect says of a model, against the model's own modules and a fit's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import make_family
from models import make_model, make_tokenizer
from quantised import quantise_
from safetensors.torch import load_file

from lit_thought import transmute
from lit_thought.cli import main
from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.fit.inspection import Inspection, format_inspection, inspect_model

SMALL = {"tokens": 40, "chunk_tokens": 10, "rank": 4, "preserve_tokens": 100}


def fitted(found: Inspection) -> set[str]:
    return {f"{kind.blocks} {site.name}" for kind in found.kinds for site in kind.sites if site.fitted}


def test_a_dense_model() -> None:
    model = make_model("llama")
    found = inspect_model(model, **SMALL)
    (kind,) = found.kinds
    assert kind.blocks == (0, 1, 2)
    assert kind.norm_before_mlp == "post_attention_layernorm"
    assert kind.experts is None
    assert kind.missing == {}
    sites = {site.name: site for site in kind.sites}
    assert sites["mlp_in"].layers == ("mlp.gate_proj", "mlp.up_proj")
    assert (sites["mlp_out"].layers, sites["mlp_out"].d_in, sites["mlp_out"].d_out) == (("mlp.down_proj",), 48, 32)
    assert sites["mlp_out"].statistics_bytes == 8 * (48 * 48 + 48 * 32)
    assert [name for name, site in sites.items() if site.fitted] == ["attn_out", "mlp_out"]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.width, found.dtype, found.device) == (32, "float64", "cpu")
    assert set(found.seconds) == {"forward", "statistics", "solve", "preservation"}
    assert all(value >= 0 for value in found.seconds.values())
    text = format_inspection(found)
    assert "blocks 0 to 2: attention, then MLP\n" in text
    assert "* mlp_out          mlp.down_proj  48 → 32; added as it is; statistics 30.7 kB" in text
    assert "  mlp_in           mlp.gate_proj, mlp.up_proj  32 → 32" in text
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("sites", [None, ("mlp_in",), ("attn_out",)])
def test_sizes_are_those_of_a_fit(sites: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = make_model("qwen3").float()
    cache = tmp_path / "cache"
    patch = transmute(
        model,
        make_tokenizer(),
        "Talk like a pirate.\n",
        [{"input": word, "output": "down"} for word in ("hot", "big", "up", "good")],
        sites=sites,
        parts=("matrix",),
        rank=4,
        preserve_tokens=100,
        cache_dir=cache,
        progress=False,
    )
    found = inspect_model(model, sites, **SMALL)
    assert found.adapter_bytes == patch.nbytes
    (entry,) = cache.iterdir()
    content = load_file(entry)  # the file also holds names
    assert found.preservation_bytes == sum(tensor.nbytes for tensor in content.values() if tensor.ndim)


def test_what_stands_between_a_layer_and_the_residual_stream() -> None:
    text = format_inspection(inspect_model(make_family("gemma3_text"), **SMALL))
    assert "attention, then MLP; a norm on what they put out" in text
    model = make_family("gemma3_text")
    gains = torch.cat([(1 + layer.post_feedforward_layernorm.weight).abs() for layer in model.model.layers])
    shown = f"through post_feedforward_layernorm (|gain| {gains.min():.2g} to {gains.max():.2g}, "
    assert shown in text
    assert "not here: a norm follows the MLP" in text
    assert "times 0.4" in format_inspection(inspect_model(make_family("granite"), **SMALL))
    parallel = inspect_model(make_family("phi"), **SMALL)
    assert fitted(parallel) == {"(0, 1, 2) attn_out+mlp_out"}
    assert "in parallel" in format_inspection(parallel)


def test_mixtures_of_experts_block_by_block() -> None:
    found = inspect_model(make_family("qwen2_moe"), **SMALL)
    text = format_inspection(found)
    assert "blocks 0, 2 to 3: " in text
    assert "block 1: " in text
    assert "mixture of experts: mlp.experts" in text
    assert "mlp.shared_expert.down_proj" in text
    assert "times the sigmoid of mlp.shared_expert_gate" in text
    mixtral = inspect_model(make_family("mixtral"), **SMALL)
    assert fitted(mixtral) == {"(0, 1, 2) attn_out"}
    with pytest.raises(UnsupportedModelError, match="no block has the site 'mlp_out': its MLP is a mixture of experts"):
        inspect_model(make_family("mixtral"), ("mlp_out",), **SMALL)


def test_quantised_layers_are_named_so() -> None:
    model = make_model("llama").float()
    quantise_(model, "8bit")
    text = format_inspection(inspect_model(model, **SMALL))
    assert text.count("quantised: the patch stays beside the weight") == 2
    assert "mlp_in           not here: the MLP's first linear layers are quantised" in text


@pytest.mark.parametrize("change", [{"tokens": 0}, {"rank": 1.5}, {"chunk_tokens": -1}, {"preserve_tokens": True}])
def test_bad_settings(change: dict[str, object]) -> None:
    with pytest.raises(ThoughtError, match=next(iter(change))):
        inspect_model(make_model(), **{**SMALL, **change})  # type: ignore[arg-type]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").float().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--tokens=40", "--preserve_tokens=100"])
    assert "* attn_out         self_attn.o_proj" in capsys.readouterr().out
    main(["inspect", f"--model={tmp_path}", "--json=true", "--tokens=40", "--sites=[mlp_in]"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 40
    assert [site["name"] for site in record["kinds"][0]["sites"] if site["fitted"]] == ["mlp_in"]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--sites=[nowhere]"])
    assert "sites must name" in capsys.readouterr().err
