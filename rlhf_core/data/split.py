"""Which rows are held out: decided by the prompt alone, so no prompt ever stands on both sides."""

from __future__ import annotations

import hashlib
import unicodedata


def normalise(text: str) -> str:
    """The form in which two prompts count as the same: Unicode NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()


def split_of(prompt: str, eval_fraction: float) -> str:
    """ "eval" for a share `eval_fraction` of all prompts, "train" for the others; never changes for a
    prompt."""
    return "eval" if int(prompt_hash(prompt)[:13], 16) / 16**13 < eval_fraction else "train"


def order_key(prompt: str, text: str = "") -> str:
    """Sorts rows in an order that depends on their content only, and not on the split."""
    return hashlib.sha256(f"order\0{normalise(prompt)}\0{text}".encode()).hexdigest()
