"""Rows of the prepared data sets and their Parquet files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.errors import InputError

KINDS = ("demonstrations", "preferences", "prompts")
SPLITS = ("train", "eval")
# The texts of a row that a model must not see empty, by kind; `messages` holds the prompt as a conversation.
TEXTS = {"demonstrations": ("response",), "preferences": ("chosen", "rejected"), "prompts": ()}
TIE = 0.5
# `probability`: that people prefer the chosen answer, from TIE to 1. NaN or null where a number is unknown.
PREFERENCE_NUMBERS = ("probability", "margin", "chosen_score", "rejected_score")


def _schema(kind: str):
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = [("prompt", pa.string()), ("messages", pa.list_(message))]
    fields += [(name, pa.string()) for name in TEXTS[kind]]
    if kind == "preferences":
        fields += [(name, pa.float64()) for name in PREFERENCE_NUMBERS]
    return pa.schema([*fields, ("source", pa.string()), ("row", pa.int64())])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Write rows of `kind`; a key that a row lacks becomes null. The same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema(kind)), path, compression="zstd")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file of rows. Raises InputError when it is absent or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the stage that makes it, or `rlhf run`") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file: {error}") from None


def known(value: float | None, otherwise: float) -> float:
    """A number of a row, or `otherwise` where the row has none."""
    return otherwise if value is None or math.isnan(value) else float(value)


def is_tie(row: Mapping[str, Any]) -> bool:
    return known(row["probability"], 1.0) == TIE


def readable(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as one text: the turn itself when there is one, else `role: content` lines."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
