"""Provenance: how a patch was made, as JSON values. Its keys, its checks, and the file of an adapter that holds it.

Adapters keep it in ``thought.json``, which anyone may have written, saved statistics in their manifest; cards and
reports take their figures from it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import check_version, finite, own_file, read_json
from lit_thought.model.source import HUB_ID, place_and_file
from lit_thought.prompts.template import PromptTemplate

__all__ = [
    "FORMAT_VERSION",
    "THOUGHT",
    "added",
    "are_figures",
    "base_here",
    "beneath",
    "check_provenance",
    "fitted_on",
    "is_hub_id",
    "is_number",
    "json_text",
    "plain_json",
    "public",
    "public_name",
    "read_object",
    "read_provenance",
    "scaled",
    "summands",
    "template_of",
    "thought_text",
]

THOUGHT = "thought.json"
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")

FORMAT_VERSION = 1
"""Of ``thought.json``; rises when an older reader would misread the file."""

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds)


def is_number(value: Any) -> bool:
    """Whether it is a number that float can hold."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def are_figures(value: Any, *names: str) -> bool:
    """Whether these are numbers by name, some of which may be None, ``names`` among them, which may not."""
    if not isinstance(value, Mapping):
        return False
    every = all(entry is None or is_number(entry) for entry in value.values())
    return every and all(value.get(name) is not None for name in names)


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _settings(value: Any) -> bool:
    counts = ("pairs", "generated_outputs", "preserve_tokens", "preserve_weight")
    if not isinstance(value, Mapping) or not are_figures({name: value.get(name) for name in counts}):
        return False
    return not value.get("preserve_weight") or value.get("preserve_tokens") is not None


def _layers(value: Any) -> bool:
    return _OBJECT(value) and all(are_figures(own) or not isinstance(own, (Mapping, list)) for own in value.values())


def _memory(value: Any) -> bool:
    figures = value if isinstance(value, Mapping) else {"": ""}
    return figures.keys() <= {"peak", "raised", "estimated"} and all(
        own is None or (is_number(own) if name == "peak" else are_figures(own)) for name, own in figures.items()
    )


def _stack(value: Any) -> bool:
    patches = value.get("patches") if isinstance(value, Mapping) else None
    fine = isinstance(patches, list) and all(isinstance(digest, str) for digest in patches)
    return fine and isinstance(value.get("fingerprint", ""), str)


def _truncation(value: Any) -> bool:
    return are_figures(value, "rank", "relative_error")


_TEXT, _OBJECT = _is(str), _is(Mapping)
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("model", "base_model", "revision", "fingerprint", "model_type", "gguf_file", "date"), _TEXT),
    **dict.fromkeys(("versions", "selection", "instruction_hash", "growth"), _OBJECT),
    "inputs": lambda value: _OBJECT(value) and is_number(value.get("count")),
    "settings": _settings,
    "fan_in_fan_out": _is(bool),
    "instruction": _texts,
    "template": _is(str, Mapping),
    "diagnostics": _layers,
    "history": lambda value: isinstance(value, list) and all(are_figures(row, "step") for row in value),
    "seconds": lambda value: _OBJECT(value) and are_figures(value, *value),
    "memory": _memory,
    "scale": is_number,
    "truncated": _truncation,
    "on_top_of": _stack,
}
"""What is read of provenance elsewhere, and how it can be told; every value may be None."""


def check_provenance(value: Any, where: str) -> dict[str, Any]:
    """Provenance, if it is that of a fit or of a sum of patches; keys that are not known here are not looked at.

    Args:
        value: from JSON.
        where: the file, for messages.

    Raises:
        PatchError: naming the key whose value is none that this package writes.
    """
    if not isinstance(value, dict):
        raise PatchError(f"{where}: provenance is a {type(value).__name__}; expected an object.")
    for key, is_right in _CHECKS.items():
        if value.get(key) is not None and not is_right(value[key]):
            raise PatchError(f"{where} is damaged: {key} is {_shortened(value[key])}. Save or copy it again.")
    parts = value.get("parts", [])
    if not isinstance(parts, list):
        raise PatchError(f"{where} is damaged: parts is {_shortened(parts)}. Save or copy it again.")
    for summand in parts:
        check_provenance(summand, where)
    return value


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """The provenance in an adapter folder's ``thought.json``; None where there is no such file.

    Raises:
        PatchError: when it is damaged, or of another version.
    """
    file = folder / THOUGHT
    if not file.exists() and not file.is_symlink():
        return None
    thought = read_object(file)
    remedy = "Upgrade lit-thought, or delete the file to read the weights without their history."
    check_version(thought, "format_version", FORMAT_VERSION, THOUGHT, remedy, PatchError)
    return check_provenance(thought.get("provenance", {}), THOUGHT)


def template_of(provenance: Mapping[str, Any], given: str | PromptTemplate | None = None) -> PromptTemplate:
    """The template given; left out, the one that a patch, or each part of a sum, was made with.

    Raises:
        ThoughtError: where there is none, or several.
    """
    if given is not None:
        return PromptTemplate.parse(given)
    stored = [part.get("template") for part in summands(provenance)]
    if stored[0] is None or any(one != stored[0] for one in stored):
        raise ThoughtError("template: the adapter does not say which one it was made with. Give that one.")
    return PromptTemplate.from_dict(stored[0])


def thought_text(provenance: Mapping[str, Any]) -> str:
    """What ``thought.json`` holds."""
    return json_text({"format_version": FORMAT_VERSION, "provenance": provenance})


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON file of an adapter folder."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter folder.

    Raises:
        PatchError: when there is no such file in that folder, or it holds something else.
    """
    folder = file.parent.name
    try:
        value = read_json(own_file(file, "a folder that save_adapter wrote", PatchError))
    except (ValueError, OSError) as error:
        raise PatchError(f"{file.name} in {folder!r} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise PatchError(f"{file.name} in {folder!r} holds a {type(value).__name__}; expected an object.")
    return value


def plain_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy as JSON would store it; NaN and infinities, which JSON lacks, become None.

    Raises:
        PatchError: if it is not JSON, or its ``d_in`` does not hold whole numbers.
    """
    try:
        plain = json.loads(json.dumps(finite(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PatchError(
            f"provenance must hold JSON values only ({error}). Convert tensors and paths first."
        ) from error
    if not isinstance(plain, dict):
        raise PatchError(f"provenance must be a dict, got {type(provenance).__name__}.")
    d_in = plain.get("d_in", {})
    if not isinstance(d_in, dict) or any(type(number) is not int or number < 1 for number in d_in.values()):
        raise PatchError(f"provenance['d_in'] must map module paths to numbers of inputs, got {d_in!r}.")
    return plain


def scaled(provenance: dict[str, Any], factor: float) -> dict[str, Any]:
    """Provenance of a patch times ``factor``: each summand's ``scale`` is."""
    known = {key: value for key, value in provenance.items() if key != "digest"}
    if "parts" in known:
        return {**known, "parts": [scaled(summand, factor) for summand in known["parts"]]}
    return {**known, "scale": provenance.get("scale", 1.0) * factor}


def added(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Provenance of a sum: what identifies the model, which must agree, and its summands, as ``parts``."""
    together: dict[str, Any] = {}
    for key in ("model", "model_type", "base_model", "gguf_file", "fingerprint", "fan_in_fan_out"):
        found = [entry[key] for entry in (mine, theirs) if entry.get(key) is not None]
        if key in ("fingerprint", "fan_in_fan_out") and len(found) == 2 and found[0] != found[1]:
            names = [entry.get("model") or "an unnamed model" for entry in (mine, theirs)]
            raise PatchError(
                f"patches of different models cannot be added: {key} is {str(found[0])[:12]} ({names[0]}) "
                f"and {str(found[1])[:12]} ({names[1]}). Fit both on the same model."
            )
        if found:
            together[key] = found[0]
    if d_in := {**mine.get("d_in", {}), **theirs.get("d_in", {})}:
        together["d_in"] = d_in
    together["parts"] = [summand for entry in (mine, theirs) for summand in _addends(entry)]
    there = {entry.get("digest") for entry in (mine, theirs, *together["parts"])}
    needed = [digest for entry in (mine, theirs) for digest in beneath(entry) if digest not in there]
    if needed:
        together["on_top_of"] = {"patches": list(dict.fromkeys(needed))}
    return together


def beneath(provenance: Mapping[str, Any]) -> list[str]:
    """Digests of the patches that were on the model when a patch was made, and without which it means nothing."""
    return list((provenance.get("on_top_of") or {}).get("patches", []))


def fitted_on(provenance: Mapping[str, Any]) -> str:
    """The fingerprint of the weights that a patch was fitted on, with the patches that were on them."""
    return str((provenance.get("on_top_of") or {}).get("fingerprint") or provenance["fingerprint"])


def _addends(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """What a patch adds to a sum; a truncated sum is one summand, since its own no longer add up to it."""
    return [provenance] if provenance.get("truncated") else list(provenance.get("parts", [provenance]))


def base_here(provenance: Mapping[str, Any]) -> Path | None:
    """The folder or GGUF file that a patch's model was loaded from, where it is here."""
    found = Path(*(part for part in place_and_file(str(provenance.get("model") or "")) if part))
    return found if found.is_absolute() and os.path.exists(found) else None  # which raises nothing


def summands(provenance: Mapping[str, Any]) -> list[Any]:
    """Provenance of each patch that a sum was made of, also of sums in it; of one that is no sum, its own."""
    if "parts" not in provenance:
        return [provenance]
    return [summand for part in provenance["parts"] for summand in summands(part)]


def public(provenance: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Provenance without the folders that models were loaded from; with a ``base_model``, by that name."""
    known = {**provenance, **({} if base_model is None else {"base_model": base_model})}
    for key in ("model", "base_model"):
        if known.get(key):
            known[key] = public_name(str(known[key]))
    if "parts" in known:
        known["parts"] = [public(summand, base_model) for summand in known["parts"]]
    return known


def is_hub_id(name: str) -> bool:
    """Whether a model's name is ``owner/name`` on the hub, and no file or folder here."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf") and not os.path.exists(name)


def public_name(name: str) -> str:
    """A model's name without the folders of the machine it was loaded on.

    Args:
        name: what :func:`lit_thought.model.loading.model_name` gives: a hub id, a folder, a file, or one of the two
            with ``(file.gguf)`` after it. Of a snapshot in the hub's cache, its hub id.
    """
    place, file = place_and_file(name)
    cached = _SNAPSHOT.search(place)
    if cached:
        place = cached[1].replace("--", "/", 1)
    elif not is_hub_id(place):
        place = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    return place if file is None else f"{place} ({file})"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
