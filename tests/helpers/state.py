"""All of a caller's state that a call of the library could change: the process's, a model's and a tokenizer's."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fits import Untouched
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_LOGGERS = ("", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "transformers", "lit_thought")


def of_the_process() -> dict[str, Any]:
    """Random generators, torch's switches, environment, warnings, logging, signals, streams."""
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": [str(part) for part in np.random.get_state()],
        "python generator": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        "warning filters": list(warnings.filters),
        "logging": {name: (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in _LOGGERS},
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "folder": os.getcwd(),
        "hook of exceptions": sys.excepthook,
    }


def of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Padding, truncation, special tokens, chat template."""
    return {
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "backend": (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation),
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "length": (len(tokenizer), tokenizer.model_max_length),
    }


@contextmanager
def unchanged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """All of it is after the block what it was before, and each parameter has the gradient that it had."""
    before, mine, model_before = of_the_process(), of_the_tokenizer(tokenizer), Untouched(model)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    yield
    for name, value in of_the_process().items():
        assert value == before[name], name
    assert of_the_tokenizer(tokenizer) == mine
    model_before.check()
    for name, parameter in model.named_parameters():
        had = gradients[name]
        assert (parameter.grad is None) == (had is None), name
        assert had is None or torch.equal(parameter.grad, had), name
