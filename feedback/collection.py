"""Everything that was collected for one project, checked and in one order.

A database gives rows in any order and a vote may come twice; here they stand sorted, once each, and refer to
things that exist. What is made of a collection depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Collection as Ids
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from pydantic import AwareDatetime

from feedback.records import Annotator, Identifier, Item, Project, Record, Value, Vote, check_value


class Decision(Record):
    """How an adjudicator settled an item; it stands above the votes."""

    item: Identifier
    annotator: Identifier
    value: Value
    at: AwareDatetime


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Collection:
    """The records of one project; make it with `collect`."""

    project: Project
    items: tuple[Item, ...]  # by id
    votes: tuple[Vote, ...]  # by item, annotator, time
    annotators: tuple[Annotator, ...]  # by id
    decisions: tuple[Decision, ...]  # by item, time

    @cached_property
    def by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}

    @cached_property
    def decided(self) -> dict[str, Decision]:
        """The last decision on each item that has one."""
        return {decision.item: decision for decision in self.decisions}

    @cached_property
    def by_item(self) -> dict[str, tuple[Vote, ...]]:
        """The votes on each item that has some."""
        grouped: dict[str, list[Vote]] = {}
        for vote in self.votes:
            grouped.setdefault(vote.item, []).append(vote)
        return {item: tuple(votes) for item, votes in grouped.items()}

    def counted(self) -> Collection:
        """Without excluded annotators, and with the last vote of each annotator on each item alone."""
        kept = self.without([person.id for person in self.annotators if person.excluded])
        last = {(vote.item, vote.annotator): vote for vote in kept.votes}
        return replace(kept, votes=tuple(last.values()))

    def without(self, annotators: Ids[str]) -> Collection:
        """As if these annotators had never been there: their votes and decisions go with them."""
        gone = frozenset(annotators)
        return replace(
            self,
            votes=tuple(vote for vote in self.votes if vote.annotator not in gone),
            annotators=tuple(person for person in self.annotators if person.id not in gone),
            decisions=tuple(decision for decision in self.decisions if decision.annotator not in gone),
        )


def collect(
    project: Project,
    items: Iterable[Item] = (),
    votes: Iterable[Vote] = (),
    annotators: Iterable[Annotator] = (),
    decisions: Iterable[Decision] = (),
) -> Collection:
    """The records in one order, each once.

    Raises ValueError for two different records of one id, for an item of another project or kind, and for a
    vote or decision that names an unknown item or annotator or does not answer its item.
    """
    found = Collection(
        project,
        _unique(items, "item", lambda item: item.id),
        tuple(sorted(_unique(votes, "vote", lambda vote: vote.id), key=_vote_order)),
        _unique(annotators, "annotator", lambda person: person.id),
        tuple(sorted(set_of(decisions), key=lambda it: (it.item, it.at, it.annotator, it.model_dump_json()))),
    )
    for item in found.items:
        if (item.project, item.kind) != (project.id, project.kind):
            raise ValueError(
                f"item {item.id}: is a {item.kind} item of project {item.project}; "
                f"this is the {project.kind} project {project.id}"
            )
    people = {person.id for person in found.annotators}
    answers: list[Vote | Decision] = [*found.votes, *found.decisions]
    for answer in answers:
        _check_answer(answer, found, people)
    return found


def _vote_order(vote: Vote) -> tuple[object, ...]:
    return vote.item, vote.annotator, vote.at, vote.id


def set_of(records: Iterable[R]) -> list[R]:
    """The records without repetition; pydantic records that hold dicts cannot be hashed."""
    return list({record.model_dump_json(): record for record in records}.values())


def _unique(records: Iterable[R], name: str, key: Callable[[R], str]) -> tuple[R, ...]:
    found: dict[str, R] = {}
    for record in records:
        other = found.setdefault(key(record), record)
        if other != record:
            raise ValueError(f"{name} {key(record)}: there are two different records with this id")
    return tuple(found[name] for name in sorted(found))


def _check_answer(answer: Vote | Decision, found: Collection, people: set[str]) -> None:
    name = f"vote {answer.id}" if isinstance(answer, Vote) else f"decision on {answer.item}"
    item = found.by_id.get(answer.item)
    if item is None:
        raise ValueError(f"{name}: item {answer.item!r} is not in the project")
    if answer.annotator not in people:
        raise ValueError(f"{name}: annotator {answer.annotator!r} is not known")
    if isinstance(answer, Vote) and answer.project != found.project.id:
        raise ValueError(f"{name}: is of project {answer.project}, this is {found.project.id}")
    try:
        check_value(answer.value, item.kind, len(item.responses), found.project)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
