"""A tiny random Llama and a tokenizer of bytes, for recipes that ask how the library behaves, not what a model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

INSTRUCTION = "Answer with the opposite.\n"
PAIRS = [
    {"input": "hot", "output": "cold"},
    {"input": "big", "output": "small"},
    {"input": "open", "output": "shut"},
    {"input": "rich"},
]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 2]
_SPECIAL = ("<s>", "</s>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_model(blocks: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random float32 Llama of ``blocks`` blocks, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=blocks,
                num_attention_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    return model.eval()


def tiny_tokenizer(corpus: Sequence[str] = (), size: int = 258) -> PreTrainedTokenizerFast:
    """One token a byte, besides a beginning and an end; with a chat template.

    Args:
        corpus: texts whose most frequent strings become tokens, too.
        size: tokens at the most.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_SPECIAL), initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
