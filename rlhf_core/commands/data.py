"""`rlhf data check`: the suites of the pipeline on any file, before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True)

SHOWN_ROWS = 20


@app.callback()
def data() -> None:
    """Look at data files before they are used."""


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="JSONL, CSV or Parquet files.")],
    kind: Annotated[
        str,
        typer.Option(help="demonstrations, preferences or prompts; found from the columns when not given."),
    ] = "",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model directory that counts tokens; models/base when it is there.")
    ] = None,
) -> None:
    """Check rows for what would harm training. Names file and line of each bad row; exits 1 when there is
    one."""
    from rich.console import Console

    from rlhf_core.data.rows import KINDS
    from rlhf_core.errors import InputError

    if kind and kind not in KINDS:
        raise InputError(f"--kind {kind!r}: must be one of {', '.join(KINDS)}")
    console = Console()
    results = check_files(files, kind, tokenizer)
    bad = sum(len(outcomes["rows"]) for outcomes in results.values())
    for outcomes in results.values():
        for row in outcomes["rows"][:SHOWN_ROWS]:
            console.print(
                f"{row['file']}:{row['line']}: {row['reason']}: {row['text']!r}", markup=False, soft_wrap=True
            )
        if len(outcomes["rows"]) > SHOWN_ROWS:
            console.print(f"... and {len(outcomes['rows']) - SHOWN_ROWS} more bad rows")
    for path, facts in results.items():
        console.print(_summary(path, facts))
    failed = any(outcome.critical for outcomes in results.values() for outcome in outcomes["outcomes"])
    if bad or failed:
        raise typer.Exit(1)


def check_files(files: list[Path], kind: str, tokenizer: Path | None) -> dict[str, dict[str, Any]]:
    """By file: its kind, the outcomes of its suite, and its bad rows (file, line, reason, text).

    Raises InputError when a file cannot be read. Rows that repeat across files count as duplicates.
    """
    from rlhf_core.config import load_params
    from rlhf_core.data.formats import detect_kind
    from rlhf_core.data.sources import read_file
    from rlhf_core.layout import Layout
    from rlhf_core.validation.columns import derive
    from rlhf_core.validation.expectations import check as run_suite
    from rlhf_core.validation.suites import suite

    layout = Layout.here()
    params = load_params(layout.params)
    count_tokens = _token_counter(tokenizer or layout.model("base"))
    results: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, ...], str] = {}
    for path in files:
        raw = list(read_file(path))
        found = kind or detect_kind(raw[0].values)
        rows, bad = _rows(raw, found, path)
        bad += _repeats(rows, found, seen)
        outcomes = []
        if rows:
            frame = derive(rows, found, count_tokens, set())
            outcomes = run_suite(frame, suite(found, "file", params.validate_), path.name)
        for outcome in outcomes:
            if outcome.critical:
                bad += [
                    _bad(path, r["row"], f"expected that {outcome.rule.meaning}", r["text"])
                    for r in outcome.bad_rows
                ]
        bad.sort(key=lambda row: row["line"])
        results[str(path)] = {"kind": found, "num_rows": len(raw), "outcomes": outcomes, "rows": bad}
    return results


def _rows(raw: list[Any], kind: str, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Well-formed rows, and the others with their reason."""
    from rlhf_core.data.formats import RowError, to_rows

    rows, bad = [], []
    for item in raw:
        try:
            place = {"source": str(path), "row": item.number}
            rows += [row | place for row in to_rows(item.values, kind)]
        except RowError as error:
            bad.append(_bad(path, item.number, str(error), str(item.values)))
    return rows, bad


def _repeats(rows: list[dict[str, Any]], kind: str, seen: dict[tuple[str, ...], str]) -> list[dict[str, Any]]:
    from rlhf_core.data.rows import TEXTS
    from rlhf_core.data.split import normalise

    bad = []
    for row in rows:
        key = (kind, normalise(row["prompt"]), *(normalise(row[name]) for name in TEXTS[kind]))
        place = f"{row['source']}:{row['row']}"
        if key in seen:
            bad.append(_bad(Path(row["source"]), row["row"], f"repeats {seen[key]}", row["prompt"]))
        seen.setdefault(key, place)
    return bad


def _bad(path: Path, line: int, reason: str, text: str) -> dict[str, Any]:
    return {"file": str(path), "line": line, "reason": reason, "text": text[:80]}


def _token_counter(directory: Path):
    """Tokens as the model counts them; words and signs where there is no model yet."""
    from rlhf_core.validation.columns import tokens_by_file

    if (directory / "tokenizer.json").is_file():
        return tokens_by_file(directory / "tokenizer.json")
    import re

    return lambda texts: [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def _summary(path: str, facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{path}: {facts['num_rows']} rows of {facts['kind']}, {len(facts['rows'])} bad"
    table = Table("expectation", "state", "found", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    if not facts["outcomes"]:
        table.add_row("rows have the form of their kind", "critical", "no row has it")
    for outcome in facts["outcomes"]:
        state = "pass" if outcome.passed else outcome.rule.severity
        table.add_row(outcome.rule.meaning, state, outcome.observed)
    return table
