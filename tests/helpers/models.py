"""Tiny models and tokenizers, built in process from fixed seeds: no download, no files."""

from __future__ import annotations

import os

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CORPUS = [
    "Q: hot\nA: cold\nQ: big\nA: small\nQ: up\nA: down\nQ: good\nA: bad\n",
    "You are a pirate. Talk like a pirate. Always answer in French. Antonyms of words.\n",
    "system user assistant The quick brown fox jumps over the lazy dog; what is the capital of France?\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|s|>system\nYou are a helpful fox<|e|>\n"
    "{% endif %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


def make_tokenizer(bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens; ``bos`` makes it put ``<s>`` before plain text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|s|>", "<|e|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|s|>", "<|e|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def make_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random three-block causal LM of the given family, in eval mode."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=512,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=256,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
        model: PreTrainedModel = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # GPT-2 starts with zero biases, which would hide mistakes with them
                torch.nn.init.normal_(parameter, std=0.2)
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8))
    else:
        raise KeyError(family)
    return model.to(dtype).eval()
