"""JSON lines, of which each ends at a line feed and nowhere else.

`str.splitlines` would also end one at U+2028, U+0085 and others, which JSON leaves as they are inside a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def text_lines(path: Path) -> list[str]:
    """The lines that are not empty; the last one may be unfinished where the file still grows."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_lines(path: Path) -> list[Row]:
    """The objects of a file that `lines_of` gave the text of."""
    return [json.loads(line) for line in text_lines(path)]


def lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line, in letters that people can read."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
