"""lit_thought: turn a prompt into weights, with no training.

The names below are the public API; they are imported when first used, so that ``import lit_thought`` is cheap.

The packages come in the order of the data: :mod:`~lit_thought.prompts` and :mod:`~lit_thought.model` meet in
:mod:`~lit_thought.runs`, whose readings :mod:`~lit_thought.statistics` sums and :mod:`~lit_thought.solve` makes a
:mod:`~lit_thought.patch` of; :mod:`~lit_thought.evaluation` compares, :mod:`~lit_thought.inputs` writes what to fit to,
:mod:`~lit_thought.fit` drives all of it with Lightning, :mod:`~lit_thought.cli` is the command;
:mod:`~lit_thought.theory` is the paper, executable.

Six words that the code uses in one meaning each:

- *block*: a transformer block, by its index;
- *site*: where in a block a and δ are read and its weights change: attn_out, mlp_in, mlp_out;
- *part*: what a site's patch consists of: the thought matrix, the thought vector;
- *stage*: one site of one block, summed over all pairs, solved and installed;
- *step*: one time through the blocks, the patch so far in place;
- *provenance*: how a patch was made, as it is kept with it.
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
