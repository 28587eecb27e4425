"""System prompts: personas, languages, formats, a topic to refuse; and questions to ask under them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from recipes.harness import DATA

FOLDER = DATA / "system_prompts"


def instructions_known() -> dict[str, dict[str, Any]]:
    """The entries of the data, by name: ``instruction``, the same ``reworded``, and perhaps a ``topic``."""
    entries = json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def split(
    general: Sequence[str], topical: Sequence[str], fit: int, test: int, seed: int
) -> tuple[list[str], list[str]]:
    """Questions to fit and to test on: with a topic, half of the latter are about it, and up to half of the former."""
    general, topical = list(general), list(topical)
    generator = random.Random(seed)
    generator.shuffle(general)
    generator.shuffle(topical)
    tested = topical[: test // 2]
    fitted = topical[len(tested) :][: fit // 2]
    tested += general[: test - len(tested)]
    fitted += general[test:][: fit - len(fitted)]
    generator.shuffle(fitted)
    return fitted, tested
