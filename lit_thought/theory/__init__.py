"""The theory: prompts as changes of weights, exact for one token and condensed over many; no Lightning needed."""

from lit_thought.theory.condense import SOLVERS, thought_matrix, thought_vector
from lit_thought.theory.exact import TokenPatches, apply_token_patches, token_patches
from lit_thought.theory.vectors import best_block, thought_vectors, vector_patch
from lit_thought.theory.verify import ExactReport, format_report, verify_exact

__all__ = [
    "SOLVERS",
    "ExactReport",
    "TokenPatches",
    "apply_token_patches",
    "best_block",
    "format_report",
    "thought_matrix",
    "thought_vector",
    "thought_vectors",
    "token_patches",
    "vector_patch",
    "verify_exact",
]
