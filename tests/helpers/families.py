"""Tiny random causal LMs of many decoder families of transformers, for the tests."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models import SMALL
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family."""

    name: str  # the model_type, with a suffix where a family has several forms
    kind: str  # "pre-norm", "post-norm" (a norm on what attention or MLP adds), "parallel" or "moe"
    config: str  # the class of the config, in transformers
    options: dict[str, Any]


def _without(options: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}


_TOKENS = {key: value for key, value in SMALL.items() if key.endswith("_id") or key == "vocab_size"}
_WIDE = {**SMALL, "head_dim": 16}  # the heads together are wider than the residual stream
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48, "initializer_range": 0.2}
_BIAS = {"attention_bias": True}
_BIASED = {**_BIAS, "mlp_bias": True}
_OPT = {
    **_TOKENS,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.2,
}
_STATE = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 4,
    "initializer_range": 0.2,
    "use_bias": True,
}
_SLIDING = {
    "num_hidden_layers": 4,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GRANITE = {
    "attention_bias": True,
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
_LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_ROUTED = {
    "num_hidden_layers": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_SHARED_EXPERT = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_CONV = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_bias": True}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
_D_MODEL = {**_TOKENS, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "initializer_range": 0.2}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
    "mamba_proj_bias": True,
}
_LINEAR = {
    "num_hidden_layers": 4,
    **_MIXED,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _partial_rope(share: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


def _family(name: str, kind: str, config: str, *shared: dict[str, Any], **own: Any) -> Family:
    """One of the tables below, of options that families share and its own."""
    options: dict[str, Any] = {}
    for some in (*shared, own):
        options |= some
    return Family(name, kind, config, options)


def _registry(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


FAMILIES: dict[str, Family] = _registry(
    # One norm before attention, one before the MLP.
    _family("llama", "pre-norm", "LlamaConfig", _WIDE, _BIASED),
    _family("mistral", "pre-norm", "MistralConfig", _WIDE, sliding_window=6),
    _family("ministral", "pre-norm", "MinistralConfig", _WIDE, _SLIDING),
    _family("ministral3", "pre-norm", "Ministral3Config", _WIDE),
    _family("qwen2", "pre-norm", "Qwen2Config", _WIDE, _SLIDING, use_sliding_window=True),
    _family("qwen3", "pre-norm", "Qwen3Config", _WIDE, _BIAS),
    _family("gpt2", "pre-norm", "GPT2Config", _GPT),
    _family("gpt_bigcode", "pre-norm", "GPTBigCodeConfig", _GPT),
    _family("gemma", "pre-norm", "GemmaConfig", _WIDE, _BIAS),
    _family("phi3", "pre-norm", "Phi3Config", _WIDE, _partial_rope(0.5), sliding_window=6),
    _family(
        "gpt_neo",
        "pre-norm",
        "GPTNeoConfig",
        _TOKENS,
        hidden_size=32,
        initializer_range=0.2,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
        max_position_embeddings=256,
    ),
    _family(
        "gpt_neox-serial",
        "pre-norm",
        "GPTNeoXConfig",
        SMALL,
        _partial_rope(0.5),
        use_parallel_residual=False,
        attention_bias=False,
    ),
    _family("opt", "pre-norm", "OPTConfig", _OPT),
    _family("bloom", "pre-norm", "BloomConfig", _TOKENS, hidden_size=32, initializer_range=0.2, n_layer=3, n_head=4),
    _family(
        "falcon-alibi",
        "pre-norm",
        "FalconConfig",
        SMALL,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        ffn_hidden_size=48,
    ),
    _family("mpt", "pre-norm", "MptConfig", _D_MODEL, expansion_ratio=2),
    _family("olmo", "pre-norm", "OlmoConfig", _WIDE, _BIAS, clip_qkv=2.0),
    _family("starcoder2", "pre-norm", "Starcoder2Config", _WIDE, sliding_window=6),
    _family("stablelm", "pre-norm", "StableLmConfig", SMALL, _partial_rope(0.5), use_qkv_bias=True, qk_layernorm=True),
    _family("granite", "pre-norm", "GraniteConfig", _WIDE, _GRANITE, mlp_bias=True),
    _family("smollm3", "pre-norm", "SmolLM3Config", _WIDE, _BIASED, num_hidden_layers=4, no_rope_layer_interval=2),
    _family("glm", "pre-norm", "GlmConfig", _WIDE, _partial_rope(0.5)),
    _family("nemotron", "pre-norm", "NemotronConfig", _WIDE, _BIASED),
    _family("persimmon", "pre-norm", "PersimmonConfig", SMALL, _partial_rope(0.5)),
    _family("helium", "pre-norm", "HeliumConfig", SMALL, _BIASED, head_dim=8),
    _family("arcee", "pre-norm", "ArceeConfig", _WIDE, _BIASED),
    _family("apertus", "pre-norm", "ApertusConfig", _WIDE, _BIAS),
    _family("seed_oss", "pre-norm", "SeedOssConfig", _WIDE, attention_out_bias=True, mlp_bias=True),
    _family("hunyuan_v1_dense", "pre-norm", "HunYuanDenseV1Config", _WIDE, _BIAS),
    _family("ernie4_5", "pre-norm", "Ernie4_5Config", _WIDE, use_bias=True),
    _family("internlm3", "pre-norm", "InternLM3Config", _WIDE, _BIASED),
    _family("minicpm3", "pre-norm", "MiniCPM3Config", _LATENT, mlp_bias=True, scale_emb=2.0, dim_model_base=16),
    _family("biogpt", "pre-norm", "BioGptConfig", SMALL),
    _family(
        "xglm",
        "pre-norm",
        "XGLMConfig",
        _TOKENS,
        d_model=32,
        ffn_dim=48,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=256,
        init_std=0.2,
    ),
    _family("jais2", "pre-norm", "Jais2Config", _WIDE),
    _family("nanochat", "pre-norm", "NanoChatConfig", _WIDE, _BIAS),
    _family("cwm", "pre-norm", "CwmConfig", _WIDE, _SLIDING, mlp_bias=True),
    _family("bitnet", "pre-norm", "BitNetConfig", SMALL, _BIAS),
    _family("diffllama", "pre-norm", "DiffLlamaConfig", _WIDE, _BIAS),
    _family("doge", "pre-norm", "DogeConfig", _WIDE, _BIASED),
    _family("vaultgemma", "pre-norm", "VaultGemmaConfig", _WIDE, _SLIDING, _BIAS),
    _family("granite_swa", "pre-norm", "GraniteSWAConfig", _WIDE, _SLIDING, _GRANITE, mlp_bias=True),
    _family("youtu", "pre-norm", "YoutuConfig", _LATENT),
    _family("iquestcoder", "pre-norm", "IQuestCoderConfig", _WIDE, _BIASED),
    _family("ctrl", "pre-norm", "CTRLConfig", _without(_GPT, "n_inner"), dff=48),
    _family(
        "modernbert-decoder",
        "pre-norm",
        "ModernBertDecoderConfig",
        SMALL,
        _BIASED,
        num_hidden_layers=4,
        local_attention=12,
        layer_types=["full_attention", "sliding_attention"] * 2,
        norm_bias=True,
    ),
    _family(
        "gpt_neox_japanese",
        "pre-norm",
        "GPTNeoXJapaneseConfig",
        _without(SMALL, "intermediate_size"),
        intermediate_multiple_size=2,
    ),
    # Its blocks run several times, in two stacks.
    _family("hrm_text", "pre-norm", "HrmTextConfig", _WIDE, _BIASED, prefix_lm=False),
    # A norm on what attention or the MLP adds to the residual stream, or on the sum.
    _family(
        "gemma2",
        "post-norm",
        "Gemma2Config",
        _WIDE,
        _SLIDING,
        _BIAS,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=4.0,
    ),
    _family("gemma3_text", "post-norm", "Gemma3TextConfig", _WIDE, _SLIDING, _BIAS, query_pre_attn_scalar=16),
    _family(
        "gemma3n_text",
        "post-norm",
        "Gemma3nTextConfig",
        _WIDE,
        _SLIDING,
        _BIAS,
        vocab_size_per_layer_input=500,
        hidden_size_per_layer_input=6,
        altup_num_inputs=3,
        laurel_rank=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    ),
    _family(
        "gemma4_text",
        "post-norm",
        "Gemma4TextConfig",
        _WIDE,
        _SLIDING,
        global_head_dim=24,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=6,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    ),
    _family("olmo2", "post-norm", "Olmo2Config", _WIDE, _BIAS),
    _family("olmo3", "post-norm", "Olmo3Config", _WIDE, _SLIDING, _BIAS),
    _family("glm4", "post-norm", "Glm4Config", _WIDE, _partial_rope(0.5)),
    _family("exaone4", "post-norm", "Exaone4Config", _WIDE, _SLIDING),
    # no per-layer inputs; the full layers have no value projection
    _family(
        "gemma4_text-tied",
        "post-norm",
        "Gemma4TextConfig",
        _WIDE,
        _SLIDING,
        _BIAS,
        global_head_dim=24,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
    ),
    _family("gemma4_unified_text", "post-norm", "Gemma4UnifiedTextConfig", _WIDE, _SLIDING, global_head_dim=24),
    _family("hyperclovax", "post-norm", "HyperCLOVAXConfig", _WIDE, _GRANITE, mlp_bias=True),
    # as opt-350m
    _family("opt-post", "post-norm", "OPTConfig", _OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    # Attention and MLP read the same residual stream.
    _family("phi", "parallel", "PhiConfig", SMALL, _partial_rope(0.5), qk_layernorm=True),
    _family("gpt_neox", "parallel", "GPTNeoXConfig", SMALL, _partial_rope(0.5)),
    _family("gptj", "parallel", "GPTJConfig", _GPT, rotary_dim=4),
    _family("codegen", "parallel", "CodeGenConfig", _GPT, rotary_dim=4),
    _family(
        "falcon",
        "parallel",
        "FalconConfig",
        SMALL,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        ffn_hidden_size=48,
    ),
    _family(
        "falcon-new",
        "parallel",
        "FalconConfig",
        SMALL,
        new_decoder_architecture=True,
        num_kv_heads=2,
        bias=True,
        ffn_hidden_size=48,
    ),
    _family("cohere", "parallel", "CohereConfig", SMALL, _BIAS, logit_scale=0.5, use_qk_norm=True),
    _family("cohere2", "parallel", "Cohere2Config", SMALL, _SLIDING, _BIAS, logit_scale=0.5),
    _family("stablelm-parallel", "parallel", "StableLmConfig", SMALL, _partial_rope(0.5), use_parallel_residual=True),
    # Mixtures of experts.
    _family("mixtral", "moe", "MixtralConfig", _WIDE, _LOCAL_EXPERTS, sliding_window=6),
    _family(
        "qwen2_moe", "moe", "Qwen2MoeConfig", _WIDE, _EXPERTS, _SHARED_EXPERT, num_hidden_layers=4, mlp_only_layers=[1]
    ),
    _family(
        "qwen3_moe",
        "moe",
        "Qwen3MoeConfig",
        _WIDE,
        _EXPERTS,
        _BIAS,
        num_hidden_layers=4,
        moe_intermediate_size=20,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    _family("olmoe", "moe", "OlmoeConfig", SMALL, _EXPERTS, _BIAS, clip_qkv=2.0),
    _family("flex_olmo", "moe", "FlexOlmoConfig", _WIDE, _EXPERTS, _BIAS),
    _family("gpt_oss", "moe", "GptOssConfig", _WIDE, _SLIDING, _LOCAL_EXPERTS),
    _family(
        "deepseek_v2",
        "moe",
        "DeepseekV2Config",
        _LATENT,
        _ROUTED,
        mlp_bias=True,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
    ),
    _family(
        "deepseek_v2-lite",
        "moe",
        "DeepseekV2Config",
        _LATENT,
        _ROUTED,
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=1,
    ),
    _family(
        "deepseek_v3", "moe", "DeepseekV3Config", _LATENT, _ROUTED, first_k_dense_replace=2, n_group=2, topk_group=1
    ),
    _family("glm4_moe", "moe", "Glm4MoeConfig", _WIDE, _ROUTED, _BIAS, use_qk_norm=True, first_k_dense_replace=2),
    _family("glm4_moe_lite", "moe", "Glm4MoeLiteConfig", _LATENT, _ROUTED),
    _family("solar_open", "moe", "SolarOpenConfig", _WIDE, _ROUTED, _BIAS),
    _family("dots1", "moe", "Dots1Config", _WIDE, _ROUTED, _SLIDING, _BIAS, first_k_dense_replace=1),
    _family(
        "llama4_text",
        "moe",
        "Llama4TextConfig",
        _WIDE,
        _LOCAL_EXPERTS,
        _BIAS,
        num_hidden_layers=4,
        intermediate_size_mlp=40,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=6,
        floor_scale=4,
    ),
    _family("granitemoe", "moe", "GraniteMoeConfig", _WIDE, _GRANITE, _LOCAL_EXPERTS),
    _family(
        "granitemoeshared",
        "moe",
        "GraniteMoeSharedConfig",
        _WIDE,
        _GRANITE,
        _LOCAL_EXPERTS,
        shared_intermediate_size=28,
    ),
    _family("phimoe", "moe", "PhimoeConfig", _WIDE, _LOCAL_EXPERTS, _BIAS, lm_head_bias=True, sliding_window=6),
    _family(
        "ernie4_5_moe",
        "moe",
        "Ernie4_5_MoeConfig",
        _WIDE,
        num_hidden_layers=4,
        use_bias=True,
        moe_intermediate_size=20,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_interval=2,
    ),
    _family("hunyuan_v1_moe", "moe", "HunYuanMoEV1Config", _WIDE, _BIAS, num_experts=4, moe_topk=2),
    _family("jetmoe", "moe", "JetMoeConfig", _without(SMALL, "num_attention_heads"), _LOCAL_EXPERTS, kv_channels=16),
    _family(
        "dbrx",
        "moe",
        "DbrxConfig",
        _D_MODEL,
        attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _family("minimax_m2", "moe", "MiniMaxM2Config", _WIDE, _LOCAL_EXPERTS),
    _family(
        "cohere2_moe",
        "moe",
        "Cohere2MoeConfig",
        _WIDE,
        _SLIDING,
        _EXPERTS,
        _DENSE_FIRST,
        _BIAS,
        logit_scale=0.5,
        num_shared_experts=1,
    ),
    _family("exaone_moe", "moe", "ExaoneMoeConfig", _WIDE, _SLIDING, _EXPERTS, moe_intermediate_size=20),
    _family(
        "afmoe",
        "moe",
        "AfmoeConfig",
        _WIDE,
        _SLIDING,
        _EXPERTS,
        _BIAS,
        moe_intermediate_size=20,
        num_shared_experts=1,
        mup_enabled=True,
        route_scale=1.5,
    ),
    _family("mimo_v2_flash", "moe", "MiMoV2FlashConfig", _WIDE, _ROUTED, _SLIDING, _BIAS, v_head_dim=12),
    _family(
        "longcat_flash",
        "moe",
        "LongcatFlashConfig",
        _without(_LATENT, "num_hidden_layers", "intermediate_size"),
        num_layers=3,
        head_dim=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=20,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        routed_scaling_factor=1.5,
    ),
    _family("laguna", "moe", "LagunaConfig", _WIDE, _SLIDING, _EXPERTS, _SHARED_EXPERT, _BIAS),
    _family("hy_v3", "moe", "HYV3Config", _WIDE, _EXPERTS, _BIASED, moe_intermediate_size=20),
    _family(
        "gemma4_text-moe",
        "moe",
        "Gemma4TextConfig",
        _WIDE,
        _SLIDING,
        global_head_dim=24,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=20,
    ),
    _family("mellum", "moe", "MellumConfig", _WIDE, _SLIDING, _EXPERTS, _DENSE_FIRST, _BIAS, moe_intermediate_size=20),
    _family("granitemoe_swa", "moe", "GraniteMoeSWAConfig", _WIDE, _SLIDING, _GRANITE, _LOCAL_EXPERTS),
    # Hyper-connections: the residual stream has several copies.
    _family(
        "deepseek_v4",
        "moe",
        "DeepseekV4Config",
        _WIDE,
        _ROUTED,
        num_key_value_heads=1,
        q_lora_rank=12,
        o_groups=2,
        o_lora_rank=6,
        index_topk=4,
        index_head_dim=8,
        index_n_heads=2,
        sliding_window=6,
        hc_mult=2,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
)

# State-space, convolutional and linear-attention blocks. With a cache, mamba, falcon_mamba, jamba and recurrent_gemma
# go on one token at a time only (several at once forget the state), and bamba wants position_ids.
HYBRID: dict[str, Family] = _registry(
    _family(
        "minimax",
        "moe",
        "MiniMaxConfig",
        _WIDE,
        _LOCAL_EXPERTS,
        num_hidden_layers=4,
        block_size=4,
        full_attn_alpha_factor=1.3,
        full_attn_beta_factor=0.8,
        linear_attn_alpha_factor=1.2,
        linear_attn_beta_factor=0.7,
        mlp_alpha_factor=1.1,
        mlp_beta_factor=0.9,
    ),
    _family("mamba", "pre-norm", "MambaConfig", _STATE),
    _family("mamba2", "pre-norm", "Mamba2Config", _STATE, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    _family("falcon_mamba", "pre-norm", "FalconMambaConfig", _STATE),
    _family(
        "jamba",
        "moe",
        "JambaConfig",
        _WIDE,
        _EXPERTS,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
        mamba_proj_bias=True,
        use_mamba_kernels=False,
    ),
    _family(
        "recurrent_gemma",
        "pre-norm",
        "RecurrentGemmaConfig",
        SMALL,
        _BIAS,
        num_hidden_layers=4,
        block_types=["recurrent", "attention"],
        attention_window_size=6,
    ),
    _family("lfm2", "pre-norm", "Lfm2Config", _WIDE, _CONV, block_auto_adjust_ff_dim=False),
    _family("lfm2_moe", "moe", "Lfm2MoeConfig", _WIDE, _EXPERTS, _CONV, moe_intermediate_size=20, num_dense_layers=1),
    _family(
        "qwen3_next", "moe", "Qwen3NextConfig", _WIDE, _EXPERTS, _LINEAR, _SHARED_EXPERT, _BIAS, mlp_only_layers=[1]
    ),
    _family("qwen3_5_text", "pre-norm", "Qwen3_5TextConfig", _WIDE, _LINEAR, _BIAS),
    _family("olmo_hybrid", "post-norm", "OlmoHybridConfig", _WIDE, _LINEAR, _BIAS),
    _family("bamba", "pre-norm", "BambaConfig", _WIDE, _MAMBA, _BIASED, num_hidden_layers=4, attn_layer_indices=[1, 3]),
    _family(
        "granitemoehybrid",
        "moe",
        "GraniteMoeHybridConfig",
        _WIDE,
        _GRANITE,
        _LOCAL_EXPERTS,
        _MAMBA,
        _MIXED,
        num_hidden_layers=4,
        shared_intermediate_size=28,
        position_embedding_type="rope",
    ),
    _family(
        "falcon_h1",
        "parallel",
        "FalconH1Config",
        _WIDE,
        _MAMBA,
        _BIASED,
        mamba_d_ssm=64,
        projectors_bias=True,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        key_multiplier=0.7,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.8,
        ssm_in_multiplier=1.1,
        ssm_out_multiplier=0.6,
        mlp_multipliers=[0.9, 1.2],
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
    ),
    _family(
        "kimi_linear",
        "moe",
        "KimiLinearConfig",
        _LATENT,
        _without(_ROUTED, "n_routed_experts"),
        _MIXED,
        q_lora_rank=None,
        num_local_experts=4,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    _family(
        "lfm3",
        "post-norm",
        "Lfm3Config",
        _WIDE,
        _BIAS,
        num_hidden_layers=6,
        sliding_window=6,
        layer_types=["conv", "sliding_attention", "full_attention"] * 2,
        conv_bias=True,
    ),
    # the scan floors its steps at time_step_min, the one-token update does not
    _family(
        "zamba2",
        "pre-norm",
        "Zamba2Config",
        _without(SMALL, "num_key_value_heads"),
        num_hidden_layers=5,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        mamba_d_state=4,
        mamba_ngroups=2,
        time_step_min=1e-6,
        n_mamba_heads=8,
        chunk_size=4,
        num_mem_blocks=1,
        use_shared_attention_adapter=True,
        adapter_rank=4,
        use_mem_rope=True,
        add_bias_linear=True,
        use_mamba_kernels=False,
    ),
    # time_step_min as for zamba2
    _family(
        "nemotron_h",
        "pre-norm",
        "NemotronHConfig",
        _WIDE,
        _BIASED,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=4,
        time_step_min=1e-6,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=4,
        n_routed_experts=4,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=28,
        use_mamba_kernels=False,
    ),
)

_ROUTER_BIASES = ("e_score_correction_bias", "expert_bias")

# Families that cannot run, or whose logits do not come, in float64.
FLOAT32_ONLY = {
    "xglm",  # its attention puts the least float64 into a float32 scalar
    "mamba",  # its logits are cast to float32, as are those of the three below
    "mamba2",
    "falcon_mamba",
    "nemotron_h",
}


def _fill_constants(model: PreTrainedModel) -> None:
    """Random values for what starts constant: norm scales, biases, and other scales."""
    tensors = dict(model.named_parameters())
    tensors.update(
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith((*_ROUTER_BIASES, "layer_scalar"))
    )
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.min() != tensor.max():
            continue
        if leaf in _ROUTER_BIASES:
            tensor.data.normal_(std=0.1)
        elif leaf.endswith("bias"):
            tensor.data.normal_(std=0.2)
        else:
            tensor.data.add_(0.3 * torch.randn_like(tensor))


def make_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny random causal LM of the family, in eval mode."""
    family = FAMILIES[name] if name in FAMILIES else HYBRID[name]
    config = getattr(transformers, family.config)(**copy.deepcopy(family.options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _fill_constants(model)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one has no float64
    return model.to(dtype).eval()
