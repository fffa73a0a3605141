"""The records of the annotation service: plain, frozen, and valid by construction.

Every part speaks in these: the store keeps them, agreement and consensus reduce them, the formats write them.
No database, no web and no training package is known here. A record that is wrong raises pydantic's
ValidationError, a ValueError that names the field, the value and the rule.

Answers have one numbering, that of `Item.responses`: response 0 is `a`, response 1 is `b`, whatever side they
were shown on. `Vote.sides` says which response stood where: `sides[position] = response`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

MOST_TEXT = 100_000  # characters of one text: an answer, a critique, the guidelines
MOST_RESPONSES = 9  # as many as there are digit keys
STRENGTHS = (1, 2, 3)  # slightly better, better, much better

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Written = Annotated[str, Field(min_length=1, max_length=MOST_TEXT, pattern=r"\S")]
Identifier = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class Record(BaseModel):
    """Frozen, and no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskKind(StrEnum):
    """What is asked about an item; a project asks one kind."""

    PAIRWISE = "pairwise"  # which of two answers is better, and by how much
    RANKING = "ranking"  # K answers from best to worst
    RATING = "rating"  # each criterion of one answer, 1 to the scale's end
    LABEL = "label"  # one answer, good or bad
    CRITIQUE = "critique"  # a free text about one answer
    CORRECTION = "correction"  # a better answer, which becomes a demonstration
    CHAT = "chat"  # a blind conversation with two policies, then as pairwise


RESPONSES = {
    TaskKind.PAIRWISE: (2, 2),
    TaskKind.RANKING: (2, MOST_RESPONSES),
    TaskKind.RATING: (1, 1),
    TaskKind.LABEL: (1, 1),
    TaskKind.CRITIQUE: (1, 1),
    TaskKind.CORRECTION: (0, 1),
    TaskKind.CHAT: (2, 2),
}
"""The least and the most answers of an item, by kind. Those of a chat item name policies and have no text."""


class Role(StrEnum):
    """What a person may do; each role may do what those before it may."""

    ANNOTATOR = "annotator"
    ADJUDICATOR = "adjudicator"
    MANAGER = "manager"

    def includes(self, other: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: Text


class Response(Record):
    """One answer, with where it came from; annotators see the text alone."""

    text: Text = ""
    policy: str = Field(default="", max_length=500)  # a model's name, version or URL; "human" for a person's
    decoding: dict[str, Any] = Field(default_factory=dict)  # temperature, seed, ... as it was sampled


class Choice(Record):
    """A vote on a pair (pairwise, chat): `a` is response 0, `b` response 1, not the side shown."""

    kind: Literal["choice"] = "choice"
    choice: Literal["a", "b", "tie", "bad"]  # bad: both are
    strength: int = Field(default=0, ge=0, le=STRENGTHS[-1])  # 0 where neither is better

    @model_validator(mode="after")
    def check_strength(self) -> Self:
        if (self.choice in ("a", "b")) != (self.strength > 0):
            raise ValueError(
                f"strength ({self.strength}) must be 1 to 3 for a or b and 0 otherwise ({self.choice})"
            )
        return self


class Ranking(Record):
    """`ranks[response]`: 1 is the best; equal ranks are ties; ranks have no gaps (1, 2, 2, 3)."""

    kind: Literal["ranking"] = "ranking"
    ranks: tuple[int, ...] = Field(min_length=2, max_length=MOST_RESPONSES)

    @model_validator(mode="after")
    def check_ranks(self) -> Self:
        if sorted(set(self.ranks)) != list(range(1, len(set(self.ranks)) + 1)):
            raise ValueError(f"ranks {list(self.ranks)} must count from 1 without gaps")
        return self


class Ratings(Record):
    """A whole number per criterion; the project says which criteria and how far the scale goes."""

    kind: Literal["ratings"] = "ratings"
    ratings: dict[str, Annotated[int, Field(ge=1, le=10)]] = Field(min_length=1)


class Label(Record):
    kind: Literal["label"] = "label"
    good: bool


class Critique(Record):
    kind: Literal["critique"] = "critique"
    text: Written


class Correction(Record):
    """The answer that the annotator would have given."""

    kind: Literal["correction"] = "correction"
    text: Written


Value = Annotated[Choice | Ranking | Ratings | Label | Critique | Correction, Field(discriminator="kind")]
VALUES: Mapping[TaskKind, type[Record]] = {
    TaskKind.PAIRWISE: Choice,
    TaskKind.CHAT: Choice,
    TaskKind.RANKING: Ranking,
    TaskKind.RATING: Ratings,
    TaskKind.LABEL: Label,
    TaskKind.CRITIQUE: Critique,
    TaskKind.CORRECTION: Correction,
}


class Project(Record):
    """A question put to people, with the rules of its queue."""

    id: Identifier
    name: Name
    kind: TaskKind
    guidelines: Text = ""  # Markdown
    criteria: tuple[Name, ...] = ()  # for ratings, and only for them
    scale: Literal[5, 10] = 5  # ratings go from 1 to this
    overlap_votes: int = Field(default=1, ge=1, le=100)  # votes on each item of the overlapping share
    overlap_share: float = Field(default=0.0, ge=0.0, le=1.0)  # the other items get one vote
    gold_share: float = Field(
        default=0.1, ge=0.0, le=0.5
    )  # of what an annotator is shown, while there are any
    lease_seconds: int = Field(default=1800, ge=1)
    seed: int = Field(default=0, ge=0)  # of the overlapping share and of sides

    @model_validator(mode="after")
    def check_criteria(self) -> Self:
        if bool(self.criteria) != (self.kind is TaskKind.RATING):
            raise ValueError(f"criteria {list(self.criteria)}: a rating project has some, a {self.kind} none")
        if len(set(self.criteria)) != len(self.criteria):
            raise ValueError(f"criteria {list(self.criteria)} must differ")
        return self


class Item(Record):
    """One thing to vote on. `group` names items that belong together, as the pairs of one prompt."""

    id: Identifier
    project: Identifier
    kind: TaskKind
    messages: tuple[Message, ...] = ()  # the prompt as a conversation, the user's turn last
    responses: tuple[Response, ...] = ()
    group: str = Field(default="", max_length=500)
    gold: Value | None = None  # the right vote, where it is known; annotators do not see it

    @model_validator(mode="after")
    def check_parts(self) -> Self:
        least, most = RESPONSES[self.kind]
        if not least <= len(self.responses) <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f"a {self.kind} item has {expected} responses, found {len(self.responses)}")
        if self.kind is not TaskKind.CHAT and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("messages must end with a user's turn")
        if self.gold is not None:
            check_value(self.gold, self.kind, len(self.responses))
        return self

    @property
    def prompt(self) -> str:
        """The turn itself when there is one, else `role: content` lines."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)


class Vote(Record):
    """What one annotator said about one item. `id` was made by the client: a vote sent twice counts once."""

    id: Identifier
    project: Identifier
    item: Identifier
    annotator: Identifier
    kind: TaskKind
    value: Value
    seconds: float = Field(ge=0.0)  # from the first look to the vote
    sides: tuple[int, ...] = ()  # sides[position] = response shown there
    at: AwareDatetime

    @model_validator(mode="after")
    def check_parts(self) -> Self:
        check_value(self.value, self.kind, len(self.sides) if self.sides else None)
        if sorted(self.sides) != list(range(len(self.sides))):
            raise ValueError(f"sides {list(self.sides)} must be an order of the responses")
        return self


class Annotator(Record):
    """A person, or a program that votes. The secret's hash is kept elsewhere."""

    id: Identifier
    name: Name
    role: Role = Role.ANNOTATOR
    active: bool = True  # may sign in
    excluded: bool = False  # votes are kept, and count nowhere


class EventType(StrEnum):
    PROJECT_CREATED = "project_created"
    PROJECT_CHANGED = "project_changed"
    ITEM_ADDED = "item_added"
    ANNOTATOR_ADDED = "annotator_added"
    ANNOTATOR_CHANGED = "annotator_changed"  # role, active, excluded
    ITEM_LEASED = "item_leased"
    LEASE_RELEASED = "lease_released"
    VOTE_CAST = "vote_cast"
    VOTE_UNDONE = "vote_undone"
    ITEM_SKIPPED = "item_skipped"
    SKIP_UNDONE = "skip_undone"
    ITEM_FLAGGED = "item_flagged"
    FLAG_CLEARED = "flag_cleared"
    CHAT_TURN = "chat_turn"
    ITEM_ADJUDICATED = "item_adjudicated"
    PERSON_ERASED = "person_erased"
    COLLECTION_OPENED = "collection_opened"  # these change no view; feedback/watching.py reads them
    COLLECTION_ENDED = "collection_ended"
    COLLECTION_CLAIMED = "collection_claimed"  # a watcher is about to tell of the end
    COLLECTION_ANNOUNCED = "collection_announced"
    SIGNED_IN = "signed_in"  # the audit log's own events change no view
    SIGN_IN_FAILED = "sign_in_failed"
    SIGNED_OUT = "signed_out"
    REQUEST_REFUSED = "request_refused"
    EXPORTED = "exported"


class Event(Record):
    """An entry of the log. Entries are only added; erasing a person empties the payloads with their data."""

    number: int = Field(ge=1)  # in the order of the log
    at: AwareDatetime
    actor: str  # an annotator's id, "system", or "erased"
    type: EventType
    payload: dict[str, Any]


def check_value(
    value: Record, kind: TaskKind, num_responses: int | None = None, project: Project | None = None
) -> None:
    """Raises ValueError when `value` does not answer a `kind` item with so many responses (None: unknown)."""
    if not isinstance(value, VALUES[kind]):
        raise ValueError(
            f"a {kind} item takes a {VALUES[kind].__name__.lower()}, found {type(value).__name__}"
        )
    if isinstance(value, Ranking) and num_responses is not None and len(value.ranks) != num_responses:
        raise ValueError(f"{len(value.ranks)} ranks for {num_responses} responses")
    if isinstance(value, Ratings) and project is not None:
        if set(value.ratings) != set(project.criteria):
            raise ValueError(
                f"ratings {sorted(value.ratings)} must name the criteria {sorted(project.criteria)}"
            )
        if max(value.ratings.values()) > project.scale:
            raise ValueError(f"ratings {value.ratings} must be from 1 to {project.scale}")


def parse_time(text: str) -> datetime:
    """A time as events keep it, in ISO 8601 with its offset."""
    return datetime.fromisoformat(text)
