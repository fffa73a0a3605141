"""Which prompts may be asked, in an order that depends on their text and a seed alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from rlhf_core.config import DataConfig
from rlhf_core.data.rows import SPLITS
from rlhf_core.data.split import normalise, prompt_hash, split_of
from rlhf_core.stages.prepare import fault

Row = dict[str, Any]
HELD_OUT = "held out: on the evaluation's side of the split"
MOVED = "on the other side of the split since its version was made"
ASKED, TWICE = "asked before", "there twice"


def askable(
    rows: Iterable[Row], config: DataConfig, asked: AbstractSet[str], *, held_out: bool, raw: bool = False
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """The rows (`prompt`, `messages`, `source`) that may be asked, by side of the split, and how many may
    not, by reason.

    What is held out stays so wherever it comes from: in every training votes on it measure a reward model,
    and teach none. Without `held_out` they are not asked for. `asked` are hashes of prompts (`prompt_hash`).

    A row that says on which side it was prepared (`split`) must be there still: after another
    data.eval_fraction policies have learnt from what is held out now. `raw` rows went through no `prepare`,
    so its rules on length and personal data hold here.
    """
    kept: dict[str, list[Row]] = {side: [] for side in SPLITS}
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for row in rows:
        key, side = prompt_hash(row["prompt"]), split_of(row["prompt"], config.eval_fraction)
        if row.get("split", side) != side:
            reason: str | None = MOVED
        elif side == "eval" and not held_out:
            reason = HELD_OUT
        elif key in asked:
            reason = ASKED
        elif key in seen:
            reason = TWICE
        else:
            reason = fault(row, "prompts", config) if raw else None
        seen.add(key)
        if reason is None:
            kept[side].append(row)
        else:
            left_out[reason] += 1
    return kept, left_out


def in_drawn_order(rows: Iterable[Row], seed: str) -> list[Row]:
    return sorted(rows, key=lambda row: drawn_key(seed, row["prompt"]))


def drawn_key(seed: str, text: str) -> str:
    """As good as random, and the same for the same seed and text."""
    return hashlib.sha256(f"collect\0{seed}\0{normalise(text)}".encode()).hexdigest()
