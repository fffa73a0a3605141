"""Stage `prepare`: read the sources, put unusable rows aside with their reason, split by prompt, write
Parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.atomic import staged_dir, write_text
from rlhf_core.config import DataConfig, Params
from rlhf_core.data.formats import RowError, to_rows
from rlhf_core.data.own_files import link_files
from rlhf_core.data.personal import mask, personal_data
from rlhf_core.data.rows import KINDS, SPLITS, TEXTS, write_rows
from rlhf_core.data.sources import read_source
from rlhf_core.data.split import normalise, order_key, split_of
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.tracking import Tracker


@dataclass
class Collected:
    """What became of the rows of one kind."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    num_read: int = 0


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    link_files(params.data, layout)
    collected = {}
    for done, kind in enumerate(KINDS):
        tracker.progress(done, len(KINDS), kind)
        collected[kind] = collect(kind, params.data, layout)
    metrics: dict[str, float] = {}
    with staged_dir(layout.prepared) as out:
        for kind, found in collected.items():
            rows = split_rows(found.kept, getattr(params.data, f"max_{kind}"), params.data.eval_fraction)
            for split in SPLITS:
                write_rows(out / kind / f"{split}.parquet", rows[split], kind)
                metrics[f"prepare/{kind}_{split}"] = len(rows[split])
            metrics[f"prepare/{kind}_read"] = found.num_read
            metrics[f"prepare/{kind}_dropped"] = len(found.quarantined)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for found in collected.values()
        for row in found.quarantined
    ]
    write_text(layout.quarantine, "".join(lines))
    tracker.table("dropped", _reasons_table(collected))
    tracker.progress(len(KINDS), len(KINDS))
    return metrics


def collect(kind: str, config: DataConfig, layout: Layout) -> Collected:
    """Read every source of `kind`; usable rows in an order that depends on their content only.

    Raises InputError when a source cannot be read, or when no row of it can be used.
    """
    found = Collected()
    seen: set[tuple[str, ...]] = set()
    for source in getattr(config, kind):
        before = len(found.kept)
        for row, reason in _checked_rows(source, kind, config, layout, seen):
            found.num_read += 1
            if reason is None:
                found.kept.append(row)
            else:
                found.reasons[reason] += 1
                found.quarantined.append(_quarantine_line(row, kind, reason))
        if len(found.kept) == before:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in found.reasons.most_common(3))
            raise InputError(f"{source}: none of its rows can be used as {kind}: {reasons}")
    found.kept.sort(key=lambda row: order_key(row["prompt"], _texts(row, kind)))
    return found


def _checked_rows(
    source: str, kind: str, config: DataConfig, layout: Layout, seen: set[tuple[str, ...]]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row of `source` and why it cannot be used, None when it can."""
    for raw in read_source(source, kind, layout.root):
        place = {"source": source, "row": raw.number}
        try:
            rows = to_rows(raw.values, kind)
        except RowError as error:
            yield place | {"prompt": str(raw.values)[:200]}, str(error)
            continue
        for row in rows:
            reason = fault(row, kind, config)
            key = (normalise(row["prompt"]), *(row[name] for name in TEXTS[kind]))
            if reason is None and key in seen:
                reason = "duplicate"
            seen.add(key)
            yield row | place, reason


def fault(row: dict[str, Any], kind: str, config: DataConfig) -> str | None:
    """Why a well-formed row is not usable, or None."""
    texts = {"prompt": row["prompt"], **{name: row[name] for name in TEXTS[kind]}}
    for name, text in texts.items():
        bounds = "prompt" if name == "prompt" else "response"
        low, high = getattr(config, f"min_{bounds}_chars"), getattr(config, f"max_{bounds}_chars")
        if not text.strip():
            return f"{name} is empty"
        if len(text) < low:
            return f"{name} is shorter than data.min_{bounds}_chars"
        if len(text) > high:
            return f"{name} is longer than data.max_{bounds}_chars"
    if config.drop_personal_data:
        for text in texts.values():
            if found := personal_data(text):
                return f"personal data: {found}"
    if kind == "preferences" and normalise(row["chosen"]) == normalise(row["rejected"]):
        return "chosen equals rejected"
    return None


def _texts(row: dict[str, Any], kind: str) -> str:
    return "\0".join(row[name] for name in TEXTS[kind])


def split_rows(
    rows: list[dict[str, Any]], most: int, eval_fraction: float
) -> dict[str, list[dict[str, Any]]]:
    """The first `most` rows by split; capped before the split, so that the share of held-out rows stays."""
    split: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in rows[:most]:
        split[split_of(row["prompt"], eval_fraction)].append(row)
    return split


def _quarantine_line(row: dict[str, Any], kind: str, reason: str) -> dict[str, Any]:
    text = " | ".join(str(row[name]) for name in ("prompt", *TEXTS[kind]) if name in row)
    shown = mask(text) if reason.startswith("personal data") else text
    return {"source": row["source"], "row": row["row"], "kind": kind, "reason": reason, "text": shown[:300]}


def _reasons_table(collected: dict[str, Collected]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "reason": reason, "rows": count}
        for kind, found in collected.items()
        for reason, count in found.reasons.most_common()
    ]
