"""GGUF files of tiny models."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from models import make_model, make_tokenizer
from transformers import PreTrainedModel


def write_gguf(
    file: Path, tokens: bool = True, leave_out: str = "nothing", model: PreTrainedModel | None = None
) -> None:
    """A llama, the tiny one if none is given, as llama.cpp stores it: the rows of q and k in pairs, linear weights in
    blocks of Q8_0.

    Args:
        file: where.
        tokens: with the tokenizer's.
        leave_out: weights whose names have this in them.
        model: in float32.
    """
    import gguf

    model = make_model("llama", torch.float32) if model is None else model
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        core = json.loads(make_tokenizer().backend_tokenizer.to_str())
        words = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words + [f"<unused{i}>" for i in range(config.vocab_size - len(words))])
        writer.add_token_types([3 if word.startswith("<") and len(word) > 1 else 1 for word in words])
        writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    own = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    own |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    own |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    own |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    for name, value in model.state_dict().items():
        if leave_out in name:
            continue
        for theirs, ours in own.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        array = value.numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    _write(writer)


def write_like(file: Path, model: PreTrainedModel) -> None:
    """A model of another family under llama.cpp's names, in blocks of many types, without its tokens.

    Nothing is rearranged as llama.cpp would, so it is another model that is loaded.
    """
    import gguf
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    config, family = model.config, model.config.model_type.removesuffix("_text")
    architecture = family.replace("_", "")
    writer = gguf.GGUFWriter(file, architecture)
    for key, attribute in GGUF_CONFIG_MAPPING[family].items():
        value = getattr(config, attribute or "", None)
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, kinds = gguf.get_tensor_name_map(number, config.num_hidden_layers), cycle(["Q8_0", "Q4_1", "BF16", "Q5_0"])
    for name, value in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        stem = names.get_name(layer) or names.get_name(layer.partition(".")[2])
        parts = {f"{stem}.{part}": value}
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if part == "gate_up_proj":
            which = (f"blk.{name.split('.')[2]}.ffn_{one}_exps.weight" for one in ("gate", "up"))
            parts = dict(zip(which, value.chunk(2, 1), strict=True))
        elif part == "down_proj":
            parts = {f"blk.{name.split('.')[2]}.ffn_down_exps.weight": value}
        elif value.ndim == 2 and type(model.get_submodule(layer)).__name__ == "Conv1D":
            parts = {f"{stem}.{part}": value.T}
        for own, tensor in parts.items():
            array = tensor.contiguous().numpy()
            kind = gguf.GGMLQuantizationType["F32" if array.ndim < 2 or array.shape[-1] % 32 else next(kinds)]
            writer.add_tensor(own, gguf.quants.quantize(array, kind), raw_dtype=kind)
    _write(writer)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
