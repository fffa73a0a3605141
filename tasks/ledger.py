"""Who became champion, when, by whom: an append-only ledger in the registry, from which aliases follow.

MLflow sets an alias without looking at what stood there before, so two promotions at once would both succeed.
What its store does by itself is to number the versions of a registered model, one after the other. The ledger
is a registered model `NAME-moves`, of which each version is one decision, whole, in tags written with it. A
decision names the head that it was made on; in the order of numbers, the first one on a head counts and moves
the head, every later one on the same head is void. So two decisions never both count, also from two machines
on one store; and whoever dies between deciding and moving the aliases leaves a decision that the next
reader carries out.

It does not protect from somebody who sets aliases by hand (the next decision sees that, and takes the alias
as the truth), who deletes versions of the ledger, or from a model server that goes on with what it loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlflow.exceptions import MlflowException

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
PROMOTE, REJECT, ROLLBACK = "promote", "reject", "rollback"
APPLIED = "applied"
FIELDS = ("kind", "base", "promotion", "was", "version", "by", "reason", "time")


@dataclass(frozen=True)
class Entry:
    """One decision: on the head `base`, with the champion `was` (empty: none), about `version`."""

    number: int
    kind: str
    base: int
    promotion: str  # MLflow run of the promotion; of a rollback, its own
    was: str
    version: str
    by: str
    reason: str
    time: str
    applied: bool = False  # the aliases have been moved


@dataclass(frozen=True)
class Standing:
    """What a ledger comes to. `champions` is a stack: a rollback takes the last one off."""

    head: int = 0  # number of the last decision that moved the champion
    champions: tuple[str, ...] = ()
    decided: Mapping[str, Entry] = field(default_factory=dict)  # the decision that counts, by promotion
    void: frozenset[int] = frozenset()

    @property
    def champion(self) -> str:
        return self.champions[-1] if self.champions else ""

    @property
    def previous(self) -> str:
        return self.champions[-2] if len(self.champions) > 1 else ""


def replay(entries: Iterable[Entry]) -> Standing:
    """Read decisions in the order of their numbers; pure."""
    head = 0
    champions: list[str] = []
    decided: dict[str, Entry] = {}
    void: set[int] = set()
    for entry in sorted(entries, key=lambda e: e.number):
        moves = entry.kind != REJECT
        if entry.promotion in decided or (moves and entry.base != head):
            void.add(entry.number)
            continue
        decided[entry.promotion] = entry
        if not moves:
            continue
        head = entry.number
        if entry.was and entry.was != (champions[-1] if champions else ""):
            champions.append(entry.was)  # somebody had set the alias by hand
        if entry.kind == PROMOTE:
            if champions[-1:] != [entry.version]:  # else its alias was taken away by hand, and comes back
                champions.append(entry.version)
        else:
            champions = champions[:-1]
    return Standing(head, tuple(champions), decided, frozenset(void))


class Ledger:
    """The ledger of one registered model, and its aliases."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self.name, self._moves = client, name, f"{name}-moves"

    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        token = None
        while True:
            page = self._client.search_model_versions(
                f"name='{self._moves}'", max_results=1000, page_token=token
            )
            found += [_entry(version) for version in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda e: e.number)

    def standing(self) -> Standing:
        return replay(self.entries())

    def append(self, *, run_id: str, source: str, **facts: str) -> int:
        """Write one decision; its number. Whether it counts, `standing` says afterwards."""
        with contextlib.suppress(MlflowException):  # it is there already
            self._client.create_registered_model(
                self._moves, description="Every decision about the champion; read by rlhf, not to be edited."
            )
        tags = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        missing = set(FIELDS) - set(tags)
        assert not missing, missing
        made = self._client.create_model_version(
            self._moves, source, run_id=run_id, tags={key: tags[key] for key in FIELDS}
        )
        return int(made.version)

    def aliases(self) -> dict[str, str]:
        """The version behind each alias, as the registry has it now."""
        found = self._client.get_registered_model(self.name).aliases
        return {alias: str(version) for alias, version in found.items()}

    def settle(self) -> Standing:
        """Carry out the last decision, if whoever made it did not get that far; the standing."""
        entries = self.entries()
        standing = replay(entries)
        head = next((entry for entry in entries if entry.number == standing.head), None)
        if head is not None and not head.applied:
            return self.apply()
        return standing

    def apply(self) -> Standing:
        """Move `champion` and `previous` to where the ledger says; again when it has grown meanwhile."""
        while True:
            standing = self.standing()
            for alias, version in ((PREVIOUS, standing.previous), (CHAMPION, standing.champion)):
                self._set(alias, version)
            if standing.head:
                self._client.set_model_version_tag(self._moves, str(standing.head), APPLIED, "true")
            if self.standing().head == standing.head:
                return standing

    def withdraw_candidate(self, version: str) -> None:
        """Take the alias `candidate` from `version`; another version keeps it."""
        if self.aliases().get(CANDIDATE) == version:
            self._client.delete_registered_model_alias(self.name, CANDIDATE)

    def _set(self, alias: str, version: str) -> None:
        if version:
            self._client.set_registered_model_alias(self.name, alias, version)
        elif alias in self.aliases():
            self._client.delete_registered_model_alias(self.name, alias)


def _entry(version: Any) -> Entry:
    tags = {name: version.tags.get(name, "") for name in FIELDS}
    base = int(tags.pop("base") or 0)
    return Entry(number=int(version.version), base=base, applied=APPLIED in version.tags, **tags)
