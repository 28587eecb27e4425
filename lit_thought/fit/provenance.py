"""What a patch remembers of how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lit_thought
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.estimate import Estimate
from lit_thought.fit.preserving import PreservationSource
from lit_thought.model.blocks import Block
from lit_thought.model.loading import model_name, unpacked_from
from lit_thought.patch.weights import made_for
from lit_thought.prompts.instruction_hash import hash_text
from lit_thought.prompts.pairs import pair_instructions
from lit_thought.settings import FitSettings, check_parts
from lit_thought.statistics.manifest import OF_THE_PAIRS
from lit_thought.timing import Stopwatch

__all__ = ["costs", "describe", "identity_of", "kept_settings", "versions"]


def describe(
    settings: Mapping[str, Any],
    model: PreTrainedModel,
    blocks: Sequence[Block],
    identity: str,
    data: PairDataModule,
    store_instruction: bool,
) -> dict[str, Any]:
    """The model, the prompt, the settings and the versions behind a patch, as JSON values.

    Args:
        settings: what :func:`kept_settings` gives.
        model: the model it was fitted on, with its ``blocks`` and its fingerprint, ``identity``.
        data: the pairs, prepared.
        store_instruction: keep the instruction, or only a hash of it.
    """
    return {
        "model": model_name(model),
        "base_model": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        **made_for(model, identity),
        **({} if (file := unpacked_from(model)) is None else {"gguf_file": file}),
        "model_type": model.config.model_type,
        "fan_in_fan_out": any(site.fan_in_fan_out for block in blocks for site in block.sites.values()),
        **_instructions(data, store_instruction),
        "template": data.template.to_dict(),
        **_inputs(data, store_instruction),
        "settings": dict(settings),
        "versions": versions(),
    }


def identity_of(
    settings: Mapping[str, Any],
    texts: Sequence[str] | None,
    identity: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: PairDataModule,
    processes: int,
    summing: bool,
) -> dict[str, Any]:
    """What two fits share exactly when one may go on with the other's finished stages, as JSON values.

    Args:
        settings: what :func:`kept_settings` gives.
        texts: unrelated texts to preserve.
        identity: the model's fingerprint, its configuration's, and the hooks that are on it.
        tokenizer: the model's, whose words and chat template make the prompts.
        data: the pairs.
        processes: of the fit.
        summing: whether it keeps its sums.
    """
    return {
        "model": list(identity),
        "tokenizer": _tokenizer_hash(tokenizer),
        "chat_template": tokenizer.chat_template,
        "settings": {name: value for name, value in settings.items() if name not in OF_THE_PAIRS},
        "pairs": data.given,
        "instructions": [data.instruction, *pair_instructions(data.given, data.instruction)],
        "val_pairs": [data.val_pairs, data.val_instructions],
        "template": None if data.given_template is None else data.given_template.to_dict(),
        "preserve": texts,
        "batch_size": data.settings.batch_size,
        "processes": processes,
        "statistics": summing,  # stages are kept with their sums, too
    }


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes tokens of a text; how the last call padded and cut them is not in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        made: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        made = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return hashlib.sha256(json.dumps([made, special], sort_keys=True).encode()).hexdigest()


def _instructions(data: PairDataModule, store: bool) -> dict[str, Any]:
    """The instruction, or those of the pairs; of one that is not to be stored a hash, of several nothing."""
    every = sorted(set(data.instructions))
    if store:
        return {"instruction": every[0] if len(every) == 1 else every}
    return {"instruction": None, "instruction_hash": hash_text(every[0]) if len(every) == 1 else None}


def _inputs(data: PairDataModule, store: bool) -> dict[str, Any]:
    """The inputs that were written, or where no text is to be stored a hash of them; nothing where none were."""
    inputs = data.inputs()
    if inputs is None:
        return {}
    written = inputs["pairs"]
    kept = {"pairs": written} if store else {"hash": hash_text(json.dumps(written))}
    return {"inputs": {"kind": inputs["kind"], "count": len(written), **kept}}


def versions() -> dict[str, str]:
    """Of lit_thought and the packages that its results depend on."""
    packages = ("torch", "transformers", "peft", "lightning")
    return {"lit_thought": lit_thought.__version__, **{package: version(package) for package in packages}}


def kept_settings(
    settings: FitSettings, preserved: PreservationSource, data: PairDataModule, longest: int
) -> dict[str, Any]:
    """Every setting that a fit's result depends on, as JSON values.

    Args:
        settings: the callback's, settled, with the sites that the model has.
        preserved: the unrelated text, or a file of its statistics.
        data: the pairs, with settings of their own.
        longest: the most tokens of an output that is written.
    """
    sites = settings.sites or ()
    kept = settings.options(passing=False) | data.settings.options(data=True, passing=False)
    if data.settings.answer_weight is None:
        kept["answer_weight"] = settings.answer_weight
    if not preserved:
        kept |= {"preserve_weight": 0.0, "preserve_tokens": 0}
    elif preserved.file is not None:
        kept["preserve_tokens"] = preserved.file.manifest["tokens"]
    return {
        **kept,
        "sites": list(sites),
        "parts": {site: list(own) for site, own in check_parts(settings.parts, sites).items()},
        "generate": dict(data.settings.generate or {}),
        "max_new_tokens": longest,
        "preserve_file": None if preserved.file is None else preserved.file.digest,
        "pairs": len(data.pairs),
        "generated_outputs": len(data.missing),
    }


def costs(stopwatch: Stopwatch, estimate: Estimate | None) -> dict[str, Any]:
    """What a fit took so far, as JSON values: ``seconds`` by phase, and in ``memory``, in bytes, the ``peak`` (of the
    process, or on the GPU, model included), by how much each phase ``raised`` it, and what was ``estimated``."""
    memory: dict[str, Any] = {"peak": stopwatch.peak, "raised": dict(stopwatch.raised)}
    if estimate is not None:
        parts = {"streams": estimate.streams_bytes, "shared prompts": estimate.lead_bytes}
        memory["estimated"] = {**parts, "statistics": estimate.statistics_bytes, "solve": estimate.solve_bytes}
    return {"seconds": {name: round(value, 4) for name, value in stopwatch.seconds.items()}, "memory": memory}
