"""The cache's name among the arguments of a model's forward, which depends on the version of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import DynamicCache

from lit_thought.model.calls import cache_arguments


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
        return cache


@pytest.mark.parametrize("kind", [Old, New])
def test_the_cache_goes_by_the_name_that_forward_has_for_it(kind: type[nn.Module]) -> None:
    module, cache = kind(), DynamicCache()
    assert module(None, **cache_arguments(module, cache)) is cache
