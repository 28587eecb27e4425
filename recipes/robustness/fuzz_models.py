"""Kinds of input for fuzzing.py that come with a model: what its generation config holds, and what it is wrapped in."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

from lit_thought import ThoughtPatch, transmute
from lit_thought.errors import ThoughtError
from lit_thought.runs.generate import generate
from recipes.robustness.fuzzing import Kind
from recipes.robustness.mutations import ODD, spoil_value
from recipes.robustness.tiny import INSTRUCTION, PAIRS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
_PROMPTS = [TOKENIZER(f"{INSTRUCTION}Q: {pair['input']}\nA:")["input_ids"] for pair in PAIRS]
_OPTIONS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 1,
    "suppress_tokens": [5, 6],
    "eos_token_id": [1, 40],
}
_CHECKPOINT: dict[str, Any] = {
    "use_cache": False,
    "num_beams": 2,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "cache_implementation": "static",
    "stop_strings": ["a"],
    "prompt_lookup_num_tokens": 3,
    "repetition_penalty": 2.0,
    "max_length": 20,
    "do_sample": True,
    "temperature": 0.1,
    "guidance_scale": 1.5,
    "forced_eos_token_id": 1,
}


def _write_generation(folder: Path) -> None:
    (folder / "generation.json").write_text(json.dumps({"checkpoint": {}, "options": {}}), encoding="utf-8")


def _spoil_generation(folder: Path, draw: Random) -> str:
    """Some settings of a checkpoint, and some options, one of them spoilt more often than not."""
    checkpoint = {name: _CHECKPOINT[name] for name in draw.sample(list(_CHECKPOINT), draw.choice([0, 1, 1, 2, 3]))}
    options = {name: _OPTIONS[name] for name in draw.sample(list(_OPTIONS), draw.choice([0, 1, 2, 3]))}
    change = "options: drawn"
    if options and draw.random() < 0.6:
        change, options = spoil_value(options, draw)
        change = f"options: {change}"
    if checkpoint and draw.random() < 0.3:
        checkpoint[draw.choice(list(checkpoint))] = draw.choice(ODD)
    text = json.dumps({"checkpoint": checkpoint, "options": options}, default=str)
    (folder / "generation.json").write_text(text, encoding="utf-8")
    return change


def _read_generation(folder: Path) -> object:
    """What is written with the checkpoint's settings must be what is written without; the config stays as it is."""
    given = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    model, checkpoint, options = tiny_model(), GenerationConfig(), given["options"]
    bare = GenerationConfig()
    for name, value in given["checkpoint"].items():
        setattr(checkpoint, name, value)  # a checkpoint may hold what transformers would not let through
    if not isinstance(options, dict):
        raise ThoughtError("options must be a mapping")  # FitSettings refuses it
    found = []
    for config in (bare, checkpoint):
        model.generation_config, before = config, dict(vars(config))
        found.append(generate(model, TOKENIZER, _PROMPTS, max_new_tokens=4, options=options))
        if model.generation_config is not config or repr(vars(config)) != repr(before):
            raise RuntimeError("the generation config was changed")
    if found[0] != found[1]:
        raise RuntimeError(f"the checkpoint's settings changed what is written: {found}")
    return None


class _Foreign(nn.Module):
    """Somebody's own module around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _lora(model: Any, initial: bool = True) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=initial))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "LoRA that changes something": lambda model: _lora(model, initial=False),
    "LoRA": _lora,
    "foreign": _Foreign,
    "Sequential": lambda model: nn.Sequential(model),
    "decoder": lambda model: getattr(model, "model", model),
    "head": lambda model: getattr(model, "lm_head", model),
    "class": type,
    "name": lambda model: "tiny",
    "None": lambda model: None,
    "list": lambda model: [model],
    "loader": lambda model: lambda: (model, TOKENIZER),
    "loader of a model alone": lambda model: lambda: model,
    "loader of nothing": lambda model: lambda: None,
    "loader the wrong way round": lambda model: lambda: (TOKENIZER, model),
    "loader that asks for something": lambda model: lambda name: (model, TOKENIZER),
    "weights": lambda model: model.state_dict() if isinstance(model, nn.Module) else model,
    "tokenizer": lambda model: TOKENIZER,
}
"""What somebody may pass for a model, made of one."""


def _write_wrappers(folder: Path) -> None:
    (folder / "wrappers.json").write_text(json.dumps([]), encoding="utf-8")


def _spoil_wrappers(folder: Path, draw: Random) -> str:
    chain = [draw.choice(list(WRAPPERS)) for _ in range(draw.choice([1, 1, 2, 3]))]
    (folder / "wrappers.json").write_text(json.dumps(chain), encoding="utf-8")
    return f"wrapper: {chain[-1]}"


def _read_wrappers(folder: Path) -> object:
    """Whatever is taken for a model must give the bare model's own patch, and leave its weights as they are."""
    chain, model = json.loads((folder / "wrappers.json").read_text(encoding="utf-8")), tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped: Any = model
    for name in chain:
        try:
            wrapped = WRAPPERS[name](wrapped)
        except Exception as error:
            raise ThoughtError(f"{name} cannot be put around it") from error
    tokenizer = None if callable(wrapped) and not isinstance(wrapped, (nn.Module, type)) else TOKENIZER
    patch = _fitted(wrapped, tokenizer)
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before):
        raise RuntimeError("the model was changed")
    bare = _bare_patch()
    if patch.targets != bare.targets:
        raise RuntimeError(f"another patch: of {patch.targets[:1]}")
    for path, factors in bare.factors.items():
        if not torch.allclose(factors.delta(), patch.factors[path].delta(), atol=1e-4):
            raise RuntimeError("another patch")
    return None


@cache
def _bare_patch() -> ThoughtPatch:
    return _fitted(tiny_model(), TOKENIZER)


def _fitted(model: Any, tokenizer: Any) -> ThoughtPatch:
    return transmute(model, tokenizer, INSTRUCTION, PAIRS[:2], preserve=None, blocks=[0], rank=2, progress=False)


MODELS: dict[str, Kind] = {
    "generation configs": Kind(_write_generation, _read_generation, _spoil_generation),
    "model wrappers": Kind(_write_wrappers, _read_wrappers, _spoil_wrappers),
}
