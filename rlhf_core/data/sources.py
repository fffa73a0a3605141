"""Reading raw rows from where a user keeps them: JSONL, CSV or Parquet files, a hub, or the default package.

A source is a text: `package:chitchat`, `hub:owner/name[:split]`, or a path.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import InputError

ARRAY = "{}: line 1: a JSON array; this must be JSON lines, one object a line"
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class RawRow:
    """One row as it was found; `number` is the 1-based line of a text file, else the row of the source."""

    number: int
    values: dict[str, Any]


def read_source(source: str, kind: str, root: Path) -> Iterator[RawRow]:
    """The raw rows of `source` for data of `kind`; relative paths start at `root`.

    Raises InputError that names file, line, what was found and the rule.
    """
    if source == "package:chitchat":
        from rlhf_core.data.chitchat import chitchat_rows

        return chitchat_rows(kind)
    if source.startswith("package:"):
        raise InputError(f"data source {source!r}: the only package is package:chitchat")
    if source.startswith("hub:"):
        return _read_hub(source)
    return read_file(root / source)


def read_file(path: Path) -> Iterator[RawRow]:
    """The raw rows of a file, by its suffix."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file that ends with {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise InputError(f"{path}: unknown kind of file; must end with {', '.join(SUFFIXES)}")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    found = False
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        for number, line in _lines(path, file):
            if line.strip():
                found = True
                yield RawRow(number, _parse_object(path, number, line))
    if not found:
        raise InputError(f"{path}: holds no rows, only blank lines")


def _lines(path: Path, file: Any) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            yield number, line
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise InputError(f"{path}: truncated or damaged after line {number}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number + 1} is not UTF-8 text: {error.reason}") from None


def _parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith("["):
            raise InputError(
                f"{path}: line 1: a JSON array; this must be JSON lines, one object a line"
            ) from None
        rest = "" if line.endswith("\n") else " (the last line; is the file truncated?)"
        raise InputError(f"{path}: line {number}: not JSON: {error.msg}{rest}: {line[:60]!r}") from None
    if number == 1 and isinstance(value, list):
        raise InputError(ARRAY.format(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: line {number}: must be a JSON object, found {type(value).__name__}")
    return value


def _read_csv(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        found = False
        try:
            names = reader.fieldnames or ()
            for values in reader:
                found = True
                if None in values or None in values.values():
                    raise InputError(
                        f"{path}: line {reader.line_num}: must have {len(names)} cells, as line 1"
                    )
                yield RawRow(reader.line_num, dict(values))
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {reader.line_num + 1} is not UTF-8 text: {error.reason}"
            ) from None
    if not found:
        raise InputError(f"{path}: holds no rows, only {'a header' if names else 'blank lines'}")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file: {error}") from None
    if table.num_rows == 0:
        raise InputError(f"{path}: holds no rows")
    for number, values in enumerate(table.to_pylist(), start=1):
        yield RawRow(number, values)


def _read_hub(source: str) -> Iterator[RawRow]:
    from datasets import load_dataset

    _, name, *split = source.split(":")
    try:
        rows = load_dataset(name, split=split[0] if split else "train")
    except Exception as error:  # the library raises many kinds for "not there"
        message = " ".join(str(error).split())[:300]
        raise InputError(f"data source {source!r}: cannot read it from the hub: {message}") from error
    for number, values in enumerate(rows, start=1):
        yield RawRow(number, values)
