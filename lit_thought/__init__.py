"""lit_thought: turn a prompt into weights, with no training.

The names below are the public API; they are imported when first used, so that ``import lit_thought`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_thought.errors import ThoughtError as ThoughtError
    from lit_thought.evaluation.compare import evaluate as evaluate
    from lit_thought.fit.api import transmute as transmute
    from lit_thought.fit.callback import ThoughtCallback as ThoughtCallback
    from lit_thought.fit.data import PairDataModule as PairDataModule
    from lit_thought.fit.module import ThoughtModule as ThoughtModule
    from lit_thought.model.loading import load_model as load_model
    from lit_thought.patch.patch import ThoughtPatch as ThoughtPatch
    from lit_thought.prompts.template import PromptTemplate as PromptTemplate

__version__ = "0.1.0"

_HOMES = {
    "transmute": "fit.api",
    "ThoughtModule": "fit.module",
    "ThoughtCallback": "fit.callback",
    "PairDataModule": "fit.data",
    "PromptTemplate": "prompts.template",
    "ThoughtPatch": "patch.patch",
    "ThoughtError": "errors",
    "load_model": "model.loading",
    "evaluate": "evaluation.compare",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_thought' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lit_thought.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
