"""An instruction's hash in the place of its text, for files that must not tell it: a system prompt may be a secret.

A plain hash would tell a short text to whoever guesses it, and one table of guesses would serve for all adapters ever
made. So each hash has a salt of its own, which also hides that two of them are of one instruction, and the hash is
scrypt, for which every guess takes 16 MB and some hundredths of a second. It is still no encryption: a text that stands
in a list of likely ones can be found.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.prompts.pairs import pair_instructions

__all__ = ["check_instruction", "hash_text", "is_text_of"]

_SCHEME = "scrypt n=16384 r=8 p=1"


def hash_text(text: str) -> dict[str, str]:
    """What to keep of a text: the name of the hash, a random salt, and the hash, both as hexadecimal digits.

    Source:
        Percival and Josefsson 2016, The scrypt password-based key derivation function, RFC 7914.
    """
    salt = os.urandom(16)
    return {"scheme": _SCHEME, "salt": salt.hex(), "hash": _scrypt(text, salt).hex()}


def is_text_of(hashed: Any, text: str) -> bool:
    """Whether ``text`` is the one that :func:`hash_text` made ``hashed`` of.

    Raises:
        ThoughtError: when ``hashed`` is of another version, or damaged.
    """
    known = hashed if isinstance(hashed, Mapping) else {}
    if known.get("scheme") != _SCHEME:
        raise ThoughtError(
            f"the hash of a text is of the scheme {known.get('scheme')!r}, this lit_thought knows {_SCHEME!r}. Upgrade "
            "lit-thought."
        )
    try:
        salt, wanted = bytes.fromhex(known["salt"]), bytes.fromhex(known["hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise ThoughtError(f"the hash of a text is damaged ({error}). Get its file anew.") from error
    return hmac.compare_digest(_scrypt(text, salt), wanted)


def check_instruction(
    provenance: Mapping[str, Any], instruction: str | None, pairs: Sequence[Mapping[str, str]]
) -> None:
    """Check that pairs are evaluated with the instruction of a patch that keeps no more than its hash.

    Args:
        provenance: the patch's; others than such a patch's pass.
        instruction: the common instruction, or None.
        pairs: the pairs, which may have their own.

    Raises:
        ThoughtError: when it is missing or another one.
    """
    hashed = provenance.get("instruction_hash")
    if hashed is None:
        return
    if instruction is None and any("instruction" not in pair for pair in pairs):
        raise ThoughtError(
            "instruction is missing: this adapter keeps no more than a hash of its own. Give the instruction that it "
            "was made from, to the letter."
        )
    if not all(is_text_of(hashed, text) for text in set(pair_instructions(pairs, instruction))):
        raise ThoughtError(
            "instruction is not the one that this adapter was made from: its hash differs. Give that one to the "
            "letter; a line break at its end counts."
        )


def _scrypt(text: str, salt: bytes) -> bytes:
    return hashlib.scrypt(text.encode("utf-8", "surrogatepass"), salt=salt, n=2**14, r=8, p=1, dklen=32)
