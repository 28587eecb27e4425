"""What the recipes' tests share."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from lit_thought.inputs import pen
from lit_thought.runs.generate import Generation


@pytest.fixture
def _written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, and words of a list, for a tiny model, which writes none that could be kept."""
    numbers = count()

    def write(model: Any, tokenizer: Any, prompts: list[Any], **options: Any) -> list[Generation]:
        return [Generation(f"is {next(numbers)} of Oz?", True) for _ in prompts]

    monkeypatch.setattr(pen, "generate", write)
