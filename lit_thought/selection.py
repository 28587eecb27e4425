"""Settings chosen on pairs that are held back: the documented name of :mod:`lit_thought.fit.selection`."""

from lit_thought.fit.selection import *  # noqa: F403
from lit_thought.fit.selection import __all__ as __all__
