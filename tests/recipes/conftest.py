"""What the recipes' tests share."""

from __future__ import annotations

import pytest
from written import Written

from lit_thought.inputs import pen


@pytest.fixture
def _written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, and words of a list, for a tiny model."""
    monkeypatch.setattr(pen, "generate", Written("Oz"))
