"""One version of the data set that feedback is: the pairs of all projects, old and new, merged by weight.

    VERSION/preferences.jsonl      pairs, each with its `weight` and `origin` (new, old, base)
    VERSION/demonstrations.jsonl   corrections, then those it was filled up with
    VERSION/projects/ID/           the snapshot of each project, whole: what the pairs were made of
    VERSION/manifest.json          counts, rules, hashes; README.md says the same for people

The same votes, rules and base rows give the same bytes and the same VERSION, a hash of the content. A stage
names its file, so other content is another parameter, and DVC sees that it has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback.files import whole_directory, write_whole
from feedback.history import Votes
from feedback.merge import Merged, Source, merge
from feedback.rows import Row, canonical, utc
from feedback.snapshot import Snapshot, SnapshotConfig, hash_of, jsonl, make_snapshot, rows_in

MANIFEST, CARD = "manifest.json", "README.md"
PREFERENCES, DEMONSTRATIONS = "preferences.jsonl", "demonstrations.jsonl"
VERSION_LENGTH = 12
NEW, OLD, BASE = "new", "old", "base"


@dataclass(frozen=True)
class Blend:
    """How much each origin of pairs counts; see `feedback.merge.merge`."""

    new: float = 1.0
    old: float = 1.0
    base: float = 0.0
    half_life_days: float | None = None
    num_rows: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class DataSet:
    """The files of a version, by path below its directory."""

    version: str
    files: Mapping[str, str]
    manifest: Mapping[str, Any]
    preferences: Sequence[Row] = field(default_factory=list)
    corrections: Sequence[Row] = field(default_factory=list)

    def write(self, directory: Path) -> Path:
        """Put the version in the place of whatever `directory` held; its own directory below it."""
        with whole_directory(directory) as partial:
            for name, text in self.files.items():
                path = partial / self.version / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, text)
        return directory / self.version


def make_dataset(
    votes: Votes,
    config: SnapshotConfig,
    blend: Blend,
    base: Sequence[Row] = (),
    filling: Sequence[Row] = (),
) -> DataSet:
    """The data set of everything that counts in `votes`, with `base` pairs merged in.

    `filling` are demonstrations that stand beside corrections; without corrections there is no such file.
    Raises ValueError when no vote counts, and as `make_snapshot` and `merge` do.
    """
    if votes.at is None or not votes.collections:
        raise ValueError("no vote counts; there is nothing to make data of")
    snapshots = {one.project.id: make_snapshot(one, config) for one in votes.collections}
    pairs = _rows(snapshots, PREFERENCES)
    merged = _merge(pairs, votes, blend, base)
    corrections = _rows(snapshots, DEMONSTRATIONS)
    files = {PREFERENCES: jsonl(merged.rows)}
    if corrections:
        files[DEMONSTRATIONS] = jsonl([*corrections, *filling])
    version = hash_of(files)[:VERSION_LENGTH]
    manifest = {
        "version": version,
        "store": votes.store,
        "last_event": votes.number,
        "last_event_at": utc(votes.at),
        "since_event": votes.since,
        "votes": votes.num_votes,
        "new_votes": len(votes.new),
        "pairs": {"kept": merged.kept, "superseded": merged.superseded, "not_drawn": merged.not_drawn},
        "corrections": len(corrections),
        "filled_up_with": len(filling) if corrections else 0,
        "blend": dict(vars(blend)),
        "projects": {name: snapshot.content_hash for name, snapshot in snapshots.items()},
        "license": config.license,
        "consent": config.consent,
        "rules": config.rules.model_dump(exclude={"pseudonym_key"}),
    }
    for name, snapshot in snapshots.items():
        files |= {f"projects/{name}/{file}": text for file, text in snapshot.files.items()}
    files[MANIFEST] = json.dumps(manifest, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    files[CARD] = card(manifest)
    return DataSet(version, files, manifest, merged.rows, corrections)


def _rows(snapshots: Mapping[str, Snapshot], file: str) -> list[Row]:
    """The rows of one file of all projects, in an order by content."""
    found = [row for one in snapshots.values() for row in rows_in(one.files.get(file, ""))]
    return sorted(found, key=canonical)


def _merge(pairs: Sequence[Row], votes: Votes, blend: Blend, base: Sequence[Row]) -> Merged:
    """A pair is new when one of its items was judged since; base pairs are as old as the last event."""
    assert votes.at is not None
    new = [row for row in pairs if votes.new_items & set(row["items"])]
    old = [row for row in pairs if not votes.new_items & set(row["items"])]
    return merge(
        [
            Source(NEW, new, blend.new),
            Source(OLD, old, blend.old),
            Source(BASE, base, blend.base, at=votes.at),
        ],
        now=votes.at,
        half_life_days=blend.half_life_days,
        num_rows=blend.num_rows,
        seed=blend.seed,
    )


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of the one version below `directory`; None where there is none, or not a whole one."""
    found = sorted(directory.glob(f"*/{MANIFEST}"))
    if len(found) != 1:
        return None
    manifest: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
    data = {
        name: (found[0].parent / name).read_text(encoding="utf-8")
        for name in (PREFERENCES, DEMONSTRATIONS)
        if (found[0].parent / name).is_file()
    }
    return manifest if hash_of(data)[:VERSION_LENGTH] == manifest["version"] else None


def card(manifest: Mapping[str, Any]) -> str:
    """The facts of the manifest for people."""
    pairs = manifest["pairs"]
    table = [
        f"| {name} | {pairs['kept'][name]} | {pairs['superseded'][name]} | {pairs['not_drawn'][name]} |"
        for name in (NEW, OLD, BASE)
    ]
    projects = [f"- `{name}`, content `{content[:12]}`" for name, content in manifest["projects"].items()]
    return "\n".join(
        [
            f"# Feedback, version {manifest['version']}",
            "",
            f"{manifest['votes']} votes that count, {manifest['new_votes']} of them new, up to event "
            f"{manifest['last_event']} of log `{manifest['store']}` ({manifest['last_event_at']}).",
            f"{manifest['corrections']} corrections as demonstrations.",
            "",
            "| pairs | kept | superseded | not drawn |",
            "| --- | --- | --- | --- |",
            *table,
            "",
            "Projects, each with its snapshot and card below `projects/`:",
            "",
            *projects,
            "",
            f"Licence: {manifest['license']}. Consent: {manifest['consent'] or 'not stated'}.",
            "",
        ]
    )
