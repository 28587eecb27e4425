"""lit_thought: turn a prompt into weights, with no training."""

__version__ = "0.1.0"
