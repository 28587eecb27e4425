"""The record of how a patch was made, read from a file that anyone may have written.

Adapters keep it in ``thought.json``, saved statistics in their manifest; cards and reports take their figures from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_thought.errors import PatchError
from lit_thought.files import is_own_file, read_json

__all__ = ["FORMAT_VERSION", "are_figures", "check_record", "is_number", "read_object", "read_record"]

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
    parts = value if isinstance(value, Mapping) else {"": ""}
    return parts.keys() <= {"peak", "raised", "estimated"} and all(
        own is None or (is_number(own) if name == "peak" else are_figures(own)) for name, own in parts.items()
    )


def _truncation(value: Any) -> bool:
    return are_figures(value, "rank", "relative_error")


_TEXT, _OBJECT = _is(str), _is(Mapping)
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("model", "base_model", "revision", "fingerprint", "model_type", "date"), _TEXT),
    **dict.fromkeys(("versions", "selection", "instruction_hash"), _OBJECT),
    "settings": _settings,
    "fan_in_fan_out": _is(bool),
    "instruction": _texts,
    "template": _is(str, Mapping),
    "diagnostics": _layers,
    "history": lambda value: isinstance(value, list) and all(map(are_figures, value)),
    "seconds": lambda value: are_figures(value, *value),
    "memory": _memory,
    "scale": is_number,
    "truncated": _truncation,
}
"""What is read of a record elsewhere, and how it can be told; every value may be None."""


def check_record(record: Any, where: str) -> dict[str, Any]:
    """A record, if it is one of a fit or of a sum of patches; keys that are not known here are not looked at.

    Args:
        record: a value from JSON.
        where: the file, for messages.

    Raises:
        PatchError: naming the key whose value is none that this package writes.
    """
    if not isinstance(record, dict):
        raise PatchError(f"{where}: provenance is a {type(record).__name__}; expected an object.")
    for key, is_right in _CHECKS.items():
        if record.get(key) is not None and not is_right(record[key]):
            raise PatchError(f"{where} is damaged: {key} is {_shortened(record[key])}. Save or copy it again.")
    parts = record.get("parts", [])
    if not isinstance(parts, list):
        raise PatchError(f"{where} is damaged: parts is {_shortened(parts)}. Save or copy it again.")
    for part in parts:
        check_record(part, where)
    return record


def read_record(file: Path) -> dict[str, Any] | None:
    """The provenance in ``thought.json``; None where there is no such file.

    Raises:
        PatchError: when it is damaged, or of another version.
    """
    if not file.exists() and not file.is_symlink():
        return None
    thought = read_object(file)
    version = thought.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise PatchError(
            f"{file.name}: format_version is {version!r}, this lit_thought reads {FORMAT_VERSION}. Upgrade "
            "lit-thought, or delete the file to read the weights without their history."
        )
    return check_record(thought.get("provenance", {}), file.name)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter folder.

    Raises:
        PatchError: when there is no such file in that folder, or it holds something else.
    """
    folder = file.parent.name
    if not is_own_file(file):
        raise PatchError(f"{folder!r} has no {file.name} of its own. Expected a folder that save_adapter wrote.")
    try:
        value = read_json(file)
    except (ValueError, OSError) as error:
        raise PatchError(f"{file.name} in {folder!r} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise PatchError(f"{file.name} in {folder!r} holds a {type(value).__name__}; expected an object.")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
