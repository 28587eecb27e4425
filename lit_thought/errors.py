"""Every error that lit_thought raises on purpose, so that a caller can catch them in one clause.

A message names the argument, what was expected, what came, and what to do.
"""

from __future__ import annotations

__all__ = ["PatchError", "SingularSystemError", "ThoughtError", "UnsupportedModelError"]


class ThoughtError(ValueError):
    """Bad input: an argument, a file, a prompt or a model that lit_thought cannot work with."""


class UnsupportedModelError(ThoughtError):
    """A model whose blocks lit_thought does not know how to read (yet)."""


class SingularSystemError(ThoughtError):
    """A least-squares system that is singular or not finite; names its block and the cause."""


class PatchError(ThoughtError):
    """A patch or adapter that does not fit the model, or a damaged adapter folder."""
