"""Which fit the statistics in a folder are of, and when those of two fits may be put together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.patch.provenance import check_provenance
from lit_thought.settings import ORDERS, check_solve_settings

__all__ = ["OF_THE_PAIRS", "Manifest"]

_ENTRY = re.compile(r"preserve-[0-9a-f]{24}(\.safetensors)?")
_TOLD = ("instruction", "instruction_hash")
"""What a provenance says of the instructions: the texts, or the hash of one that it must not tell."""
_NEEDED = ("order", "rank", "ridge", "preserve_weight", "step_size")
OF_THE_PAIRS = ("pairs", "generated_outputs")
"""Settings that count pairs: they add as the sums do."""
_OF_THE_OUTPUTS = ("generate", "max_new_tokens", "seed", "inputs", "kind")
"""Settings of how pairs were written, in which merged sets of them may differ."""


@dataclass(frozen=True)
class Manifest:
    """Which fit the statistics are of.

    Attributes:
        provenance: how the fit's patch was made: model, revision, fingerprint, instruction, template, settings and
            versions, as JSON values; and its ``scale``.
        preservation: name of the cache entry with the preservation statistics, or None without preservation.
        uncompared: tokens of the plain runs, padding apart, that are not compared, so that nothing holds them to the
            instructed run.
        approximate: whether sums were combined that depend on patches.
    """

    provenance: dict[str, Any]
    preservation: str | None = None
    uncompared: int = 0
    approximate: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The fit's settings."""
        found: dict[str, Any] = self.provenance["settings"]
        return found

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """The manifest's part on the fit.

        Raises:
            ValueError: for one that :class:`StatisticsWriter` would not have written.
        """
        found = cls(value["provenance"], value["preservation"], value["uncompared"], value["approximate"])
        if not isinstance(found.provenance, dict) or not isinstance(found.provenance.get("settings"), dict):
            raise ValueError("its provenance has no settings")
        lacking = [name for name in _NEEDED if name not in found.settings]
        if lacking or not isinstance(found.provenance.get("fingerprint"), str):
            raise ValueError(f"its provenance lacks {lacking[0] if lacking else 'the fingerprint'}")
        check_provenance(found.provenance, "provenance")
        _check_settings(found.settings)
        entry = found.preservation
        if entry is not None and not (isinstance(entry, str) and _ENTRY.fullmatch(entry)):
            raise ValueError(f"{entry!r} is no name of preservation statistics")
        if type(found.uncompared) is not int or type(found.approximate) is not bool:
            raise ValueError("a value of it has a wrong type")
        return found

    def combined(self, other: Manifest, sign: int, approximate: bool) -> Manifest:
        """That of both sets of pairs, or of this one without the other.

        Raises:
            ThoughtError: naming what else differs than the pairs, their instructions and how outputs were generated.
        """
        mine, theirs = self.provenance, other.provenance
        names = ("fingerprint", "on_top_of", "model_type", "fan_in_fan_out", "template")
        pairs = {name: (mine.get(name), theirs.get(name)) for name in names}
        for key in dict.fromkeys([*self.settings, *other.settings]):
            if key not in (*OF_THE_PAIRS, *_OF_THE_OUTPUTS):
                pairs[f"settings: {key}"] = (self.settings.get(key), other.settings.get(key))
        pairs["scale"] = (mine.get("scale", 1.0), theirs.get("scale", 1.0))
        pairs["preservation"] = (self.preservation, other.preservation)
        for name, (one, two) in pairs.items():
            if one != two:
                raise ThoughtError(
                    f"statistics of different fits cannot be combined: {name} is {one!r} and {two!r}. Both must be of "
                    "one model, fitted with the same settings."
                )
        settings = dict(self.settings)
        for key in OF_THE_PAIRS:
            settings[key] = max(0, settings.get(key, 0) + sign * other.settings.get(key, 0))
        for key in _OF_THE_OUTPUTS:
            settings[key] = settings.get(key) if settings.get(key) == other.settings.get(key) else None
        told, other_told = ({key: entry[key] for key in _TOLD if key in entry} for entry in (mine, theirs))
        told = _both_told(told, other_told) if sign > 0 else _told_without(told, other_told)
        rest = {key: value for key, value in mine.items() if key not in (*_TOLD, "inputs")}
        return Manifest(
            {**rest, **told, "settings": settings},
            self.preservation,
            max(0, self.uncompared + sign * other.uncompared),
            approximate or self.approximate or other.approximate,
        )


def _both_told(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of the instructions of two sets of pairs; what either hides stays hidden."""
    if mine == theirs:
        return mine
    every = [told.get("instruction") for told in (mine, theirs)]
    if None in every:
        return {"instruction": None}
    one, two = (texts if isinstance(texts, list) else [texts] for texts in every)
    return {"instruction": sorted({*one, *two})}


def _told_without(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of the instructions once those pairs are out; of the same ones, others may be left."""
    texts, out = mine.get("instruction"), theirs.get("instruction")
    if mine == theirs or not isinstance(texts, list) or out is None:
        return mine
    left = [text for text in texts if text not in ([out] if isinstance(out, str) else out)]
    return {"instruction": left[0] if len(left) == 1 else left or texts}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings that are used as they are read.

    Raises:
        ValueError: for one that is none of a fit.
    """
    check_solve_settings(*(settings[name] for name in ("ridge", "rank", "preserve_weight", "step_size")))
    counts = [settings[name] + 1 for name in OF_THE_PAIRS if name in settings]
    wrong = not all(type(count) is int and count > 0 for count in counts)
    if wrong or settings["order"] not in ORDERS:
        raise ValueError("a setting of its provenance is out of range")
