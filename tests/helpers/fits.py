"""A small fit and what tests ask of it: its inputs, patches compared bit by bit, a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import make_model, make_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_thought.fit.api import transmute
from lit_thought.patch.patch import ThoughtPatch

TOKENIZER = make_tokenizer()
INSTRUCTION = "Q: good\nA: bad\nQ: up\nA: down\n"
PAIRS = [
    {"input": "hot", "output": "cold"},
    {"input": "big", "output": "small"},
    {"input": "brown fox", "output": "the lazy dog"},
    {"input": "French", "output": "what is the capital"},
    {"input": "quick", "output": "over"},
]
ROUNDING = 1e-3
"""Of :func:`distance`, between two runs of one fit: other kernels for all its products (SSE in the place of AVX-512)
move tiny fits by up to 3e-5, another setting by more than 1e-2."""
SOLVE_ROUNDING = 1e-6
"""The same between two solves of the same sums, which are float64; the patch is float32."""
TEXTS = ["The quick brown fox jumps over the lazy dog; " * 4, "Always answer in French. You are a pirate. " * 4]


def readable(model: PreTrainedModel) -> PreTrainedModel:
    """Let the model write letters, spaces and newlines only, or end: random models write broken UTF-8 otherwise."""
    words = {i: TOKENIZER.decode([i]) for i in range(len(TOKENIZER))}
    letters = {i for i, word in words.items() if word.isascii() and word.replace(" ", "x").isalpha()}
    allowed = {*letters, TOKENIZER.convert_tokens_to_ids("Ċ"), TOKENIZER.eos_token_id}
    model.generation_config.suppress_tokens = [i for i in range(512) if i not in allowed]
    return model


def make_patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    pairs: Sequence[dict[str, str]] = PAIRS,
    instruction: str | None = INSTRUCTION,
    **settings: Any,
) -> ThoughtPatch:
    usual = {"preserve": None, "rank": None, "ridge": 1e-2, "answer_weight": 1.0, "progress": False}
    usual |= {"steps": 1, "step_size": 1.0}
    return transmute(model, tokenizer, instruction, pairs, **{**usual, **settings})


def dense(patch: ThoughtPatch) -> dict[str, Tensor]:
    """Each target's ΔW, and its vector under the name of its bias."""
    weights = {path: factors.delta(torch.float64) for path, factors in patch.factors.items()}
    return {**weights, **{f"{path}.bias": vector.double() for path, vector in patch.vectors.items()}}


def distance(one: ThoughtPatch, other: ThoughtPatch) -> float:
    """Largest relative difference of any target's ΔW, in the Frobenius norm, or vector."""
    mine, theirs = dense(one), dense(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[path] - theirs[path]).norm() / mine[path].norm()) for path in mine)


def tensors(patch: ThoughtPatch) -> dict[str, Tensor]:
    matrices = {(path, name): getattr(factors, name) for path, factors in patch.factors.items() for name in "AB"}
    return {**{" ".join(key): value for key, value in matrices.items()}, **patch.vectors}


def identical(one: ThoughtPatch, other: ThoughtPatch) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


class Untouched:
    """What a fit must leave as it found it, taken when created and compared by :meth:`check`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.before = self._state()

    def _state(self) -> dict[str, Any]:
        tensors = {**self.model.state_dict(), **dict(self.model.named_buffers())}  # some are in no state_dict
        return {
            "bits": {n: v.detach().contiguous().flatten().view(torch.uint8).clone() for n, v in tensors.items()},
            "shapes": {n: (v.shape, v.dtype) for n, v in tensors.items()},
            "types": {n: type(m) for n, m in self.model.named_modules()},
            "places": {n: (p.data_ptr(), p.device, p.dtype) for n, p in self.model.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "grad": {n for n, p in self.model.named_parameters() if p.grad is not None or p.is_inference()},
            "training": {n: m.training for n, m in self.model.named_modules()},
            "attributes": {n: sorted(vars(m)) for n, m in self.model.named_modules()},
            "hooks": {
                (n, kind): len(hooks)
                for n, m in self.model.named_modules()
                for kind, hooks in vars(m).items()
                if kind.endswith("_hooks")
            },
            "generation_config": self.model.generation_config.to_dict(),
            "config": self.model.config.to_dict(),
        }

    def check(self) -> None:
        now = self._state()
        assert now["bits"].keys() == self.before["bits"].keys()
        assert all(torch.equal(value, self.before["bits"][name]) for name, value in now["bits"].items())
        for key in now.keys() - {"bits"}:
            assert now[key] == self.before[key], key
        assert not any("forward" in names for names in now["attributes"].values())


def mixed_model(family: str = "gpt2", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In train mode with dropout, but for one block; half of the parameters ask for gradients."""
    model = make_model(family, dtype)
    model.train()
    next(module for name, module in model.named_modules() if name.endswith(".1")).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    return model


def fail_at(number: int, error: BaseException, genuine: Callable[..., Any]) -> Callable[..., Any]:
    """``genuine``, but its ``number``-th call raises."""
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return genuine(*args, **kwargs)

    return failing


def written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int, special: bool = True
) -> tuple[str, bool]:
    """What the model writes after a prompt, one prompt at a time and without a cache; stops at a newline."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=special)["input_ids"]])
    new: list[int] = []
    for _ in range(limit):
        output = model.generate(ids, max_new_tokens=1, do_sample=False, use_cache=False, pad_token_id=1)
        token = int(output[0, -1])
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(new).strip(), True
        new.append(token)
        ids = output
        text = tokenizer.decode(new)
        if special and "\n" in text.lstrip():
            return text.lstrip().partition("\n")[0].strip(), True
    return tokenizer.decode(new, skip_special_tokens=True).strip(), False
