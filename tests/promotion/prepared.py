"""Prepared data for a comparison: held-out prompts and demonstrations."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.data.rows import write_rows


def write_prepared(directory: Path, count: int = 30) -> Path:
    asked = [f"how are you on day {i}?" for i in range(count)]
    rows = [
        {"prompt": text, "messages": [{"role": "user", "content": text}], "source": "test", "row": i}
        for i, text in enumerate(asked)
    ]
    write_rows(directory / "prompts" / "eval.parquet", rows, "prompts")
    told = [row | {"response": "i like long walks and good books."} for row in rows[:6]]
    write_rows(directory / "demonstrations" / "eval.parquet", told, "demonstrations")
    return directory
