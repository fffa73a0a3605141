"""Columns on which the expectations look: plain facts of each row, so that the suites need no custom code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.data.rows import TEXTS, TIE, is_tie, known
from rlhf_core.data.split import normalise

if TYPE_CHECKING:
    import pandas as pd

CountTokens = Callable[[Sequence[str]], list[int]]


def tokens_by_file(file: Path) -> CountTokens:
    """By a tokenizer.json, special tokens not added; what it says of cutting and padding does not count."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(file))
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [len(e.ids) for e in fast.encode_batch(list(texts), add_special_tokens=False)]


def derive(
    rows: Sequence[dict[str, Any]],
    kind: str,
    count_tokens: CountTokens,
    other_prompts: set[str],
) -> pd.DataFrame:
    """One line a row: source and row number, texts, and what is checked of them.

    `other_prompts` holds the normalised prompts of the other split, on which no prompt of this one may stand.
    """
    import pandas as pd

    names = ("prompt", *TEXTS[kind])
    frame = pd.DataFrame([{key: row.get(key) for key in ("source", "row", *names)} for row in rows])
    if not len(frame):
        return pd.DataFrame(columns=["source", "row", *names])
    normal = {name: [normalise(text or "") for text in frame[name]] for name in names}
    for name in names:
        frame[f"{name}_blank"] = [not text for text in normal[name]]
        frame[f"{name}_tokens"] = count_tokens([text or "" for text in frame[name]])
    keys = pd.Series(list(zip(*normal.values())))
    frame["duplicate"] = keys.duplicated(keep="first").to_numpy()
    frame["leaks"] = [prompt in other_prompts for prompt in normal["prompt"]]
    if kind == "preferences":
        frame["same_answer"] = [a == b for a, b in zip(normal["chosen"], normal["rejected"])]
        frame["probability"] = [known(row["probability"], 1.0) for row in rows]
        longer = _longer(frame["chosen_tokens"], frame["rejected_tokens"])
        frame["longer_chosen"] = [TIE if is_tie(row) else x for row, x in zip(rows, longer)]
        frame["contradicts"] = _contradictions(normal)
    return frame


def _longer(chosen: Sequence[int], rejected: Sequence[int]) -> list[float]:
    """1 where the chosen answer is longer, 0 where it is shorter, 1/2 for equal lengths."""
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(chosen, rejected)]


def _contradictions(normal: dict[str, list[str]]) -> list[bool]:
    """True where another row prefers the same two answers the other way round."""
    pairs = set(zip(normal["prompt"], normal["chosen"], normal["rejected"]))
    rows = zip(normal["prompt"], normal["chosen"], normal["rejected"])
    return [c != r and (p, r, c) in pairs for p, c, r in rows]
