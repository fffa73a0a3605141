"""Which prompts may be asked, in an order that depends on their text and a seed alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from rlhf_core.config import DataConfig
from rlhf_core.data.split import normalise, prompt_hash, split_of
from rlhf_core.stages.prepare import fault

Row = dict[str, Any]
HELD_OUT = "held out: on the evaluation's side of the split"
ASKED, TWICE = "asked before", "there twice"


def askable(
    rows: Iterable[Row], config: DataConfig, asked: AbstractSet[str], *, raw: bool = False
) -> tuple[list[Row], Counter[str]]:
    """The rows (`prompt`, `messages`, `source`) that may be asked, and how many may not, by reason.

    What is held out stays so wherever it comes from: a policy that learnt from votes on it could not be
    measured by it. `asked` are hashes of prompts (`prompt_hash`). `raw` rows went through no `prepare`, so
    its rules on length and personal data hold here.
    """
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for row in rows:
        key = prompt_hash(row["prompt"])
        if split_of(row["prompt"], config.eval_fraction) == "eval":
            reason: str | None = HELD_OUT
        elif key in asked:
            reason = ASKED
        elif key in seen:
            reason = TWICE
        else:
            reason = fault(row, "prompts", config) if raw else None
        seen.add(key)
        if reason is None:
            kept.append(row)
        else:
            left_out[reason] += 1
    return kept, left_out


def in_drawn_order(rows: Iterable[Row], seed: str) -> list[Row]:
    return sorted(rows, key=lambda row: drawn_key(seed, row["prompt"]))


def drawn_key(seed: str, text: str) -> str:
    """As good as random, and the same for the same seed and text."""
    return hashlib.sha256(f"collect\0{seed}\0{normalise(text)}".encode()).hexdigest()
