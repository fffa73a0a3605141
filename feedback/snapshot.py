"""A data set made of what was collected: rows, the votes behind them, and a card. A DVC output.

    python -m feedback.snapshot records.jsonl data/feedback --license CC-BY-4.0 --ties soften

The same records and rules give the same bytes, whatever the order in which the records come; no clock and no
order of a database is in them. An excluded annotator leaves no trace: the bytes are those of a project in
which they never voted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feedback.card import card
from feedback.collection import Collection
from feedback.facts import describe
from feedback.files import whole_directory, write_whole
from feedback.rows import Row, RowRules, canonical, make_rows, pseudonym, utc

MANIFEST = "manifest.json"
CARD = "README.md"


class SnapshotConfig(BaseModel):
    """What a snapshot says of itself, and by which rules its rows are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: str = Field(min_length=1, pattern=r"\S")  # an SPDX id, or what holds instead
    consent: str = ""  # what the annotators agreed to
    rules: RowRules = RowRules()
    num_samples: int = Field(default=1000, ge=10)  # of the bootstrap of alpha
    seed: int = Field(default=0, ge=0)  # of the bootstrap


class Snapshot(BaseModel):
    """The files of a snapshot, by name, and its content hash."""

    model_config = ConfigDict(frozen=True)

    content_hash: str  # sha256 over the names and bytes of the data files
    files: dict[str, str]  # data files, the manifest and the card


def make_snapshot(collection: Collection, config: SnapshotConfig) -> Snapshot:
    """The files of a snapshot as texts. Files that would be empty are left out.

    Raises ValueError when no vote counts, or when items of one group have different prompts.
    """
    counted = collection.counted()
    if not counted.votes and not counted.decisions:
        raise ValueError(f"project {collection.project.id}: no vote counts; there is nothing to make data of")
    rows = make_rows(collection, config.rules)
    by_file = rows.files() | {"votes.jsonl": _vote_rows(counted, config.rules.pseudonym_key)}
    files = {name: jsonl(found) for name, found in by_file.items() if found}
    content_hash = hash_of(files)
    facts = describe(counted, config.rules.pseudonym_key, num_samples=config.num_samples, seed=config.seed)
    manifest = {
        "content_hash": content_hash,
        "files": {
            name: {"rows": len(by_file[name]), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in sorted(files.items())
        },
        "left_out": dict(sorted(rows.left_out.items())),
        "license": config.license,
        "consent": config.consent,
        # The key is a secret; that there is one is not.
        "rules": config.rules.model_dump(exclude={"pseudonym_key"}),
        **facts,
    }
    files[MANIFEST] = json.dumps(manifest, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    files[CARD] = card(manifest)
    return Snapshot(content_hash=content_hash, files=files)


def _vote_rows(counted: Collection, key: str) -> list[Row]:
    """Every vote that counts: ties too, whatever became of them in the rows."""
    found = [
        {
            "item": vote.item,
            "annotator": pseudonym(vote.annotator, key),
            "value": vote.value.model_dump(mode="json"),
            "sides": list(vote.sides),
            "seconds": vote.seconds,
            "at": utc(vote.at),
        }
        for vote in counted.votes
    ]
    return sorted(found, key=canonical)


def jsonl(rows: Sequence[Row]) -> str:
    return "".join(canonical(row) + "\n" for row in rows)


def rows_in(text: str) -> list[Row]:
    """The inverse of `jsonl`; other line separators, which a text of a row may hold, end no line."""
    return [json.loads(line) for line in text.split("\n") if line]


def hash_of(files: Mapping[str, str]) -> str:
    """One hash of named texts."""
    total = hashlib.sha256()
    for name, text in sorted(files.items()):
        total.update(f"{name}\0{len(text.encode())}\0{text}".encode())
    return total.hexdigest()


def write_snapshot(collection: Collection, config: SnapshotConfig, directory: Path) -> Snapshot:
    """Put a snapshot in the place of `directory`, whole or not at all.

    Raises ValueError as `make_snapshot`, and when `directory` holds something else than a snapshot.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory}: is not empty and holds no {MANIFEST}; it would be replaced")
    snapshot = make_snapshot(collection, config)
    with whole_directory(directory) as partial:
        for name, text in snapshot.files.items():
            write_whole(partial / name, text)
    return snapshot


def check_snapshot(directory: Path) -> dict[str, Any]:
    """The manifest of a snapshot whose files are as they were written.

    Raises ValueError that names the file which is missing, changed or not listed.
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"]
        files = {name: (directory / name).read_text(encoding="utf-8") for name in listed}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory}: not a whole snapshot: {error}") from None
    for name, text in files.items():
        if hashlib.sha256(text.encode()).hexdigest() != listed[name]["sha256"]:
            raise ValueError(f"{directory / name}: was changed after the snapshot was made")
    if hash_of(files) != manifest["content_hash"]:
        raise ValueError(f"{directory / MANIFEST}: content_hash is not that of the files")
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a snapshot of a file of records, or check one (`--check`)."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.check:
            manifest = check_snapshot(args.records)
            print(f"{args.records}: whole, content {manifest['content_hash']}")
            return 0
        if args.directory is None or not args.license:
            parser.error("a snapshot needs a directory and --license")
        from feedback.formats.jsonl import read_collection

        config = SnapshotConfig(license=args.license, consent=args.consent, rules=_rules(args))
        snapshot = write_snapshot(read_collection(args.records), config, args.directory)
    except (ValueError, OSError) as error:
        print(f"snapshot: {_readable(error)}", file=sys.stderr)
        return 2
    print(f"{args.directory}: {len(snapshot.files)} files, content {snapshot.content_hash}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m feedback.snapshot", description=main.__doc__)
    parser.add_argument("records", type=Path, help="records of one project; a snapshot with --check")
    parser.add_argument("directory", type=Path, nargs="?", help="is made, or replaced when it is a snapshot")
    parser.add_argument("--check", action="store_true", help="compare the snapshot's files with its manifest")
    parser.add_argument("--license", default="", help="an SPDX id, as CC-BY-4.0")
    parser.add_argument("--consent", default="", help="what the annotators agreed to")
    parser.add_argument("--pseudonym-key-file", type=Path, help="secret by which ids become pseudonyms")
    parser.add_argument("--consensus", default="majority", help="majority | dawid_skene")
    parser.add_argument("--ties", default="keep", help="keep | drop | soften")
    parser.add_argument("--disputed", default="keep", help="keep | drop: items that wait for an adjudicator")
    parser.add_argument("--min-votes", default=1, help="items with fewer give no row")
    parser.add_argument("--min-margin", default=1.0, help="of ratings that make a pair")
    parser.add_argument("--include-gold", action="store_true", help="items with a known answer too")
    return parser


def _rules(args: argparse.Namespace) -> RowRules:
    path = args.pseudonym_key_file
    return RowRules.model_validate(
        {
            "consensus": args.consensus,
            "ties": args.ties,
            "disputed": args.disputed,
            "min_votes": args.min_votes,
            "min_margin": args.min_margin,
            "include_gold": args.include_gold,
            "pseudonym_key": path.read_text(encoding="utf-8").strip() if path else "",
        }
    )


def _readable(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: {one['input']!r}: {one['msg']}" for one in error.errors()
    )


if __name__ == "__main__":
    sys.exit(main())
