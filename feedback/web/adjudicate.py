"""The adjudicators' pages: items on which votes are too far apart, and the decision on them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from feedback.assignment import Shown, conversation, draw_sides
from feedback.collection import Collection
from feedback.consensus import adjudication_queue
from feedback.errors import InputError
from feedback.gathering import adjudicate, gather
from feedback.records import (
    Annotator,
    Choice,
    Correction,
    Critique,
    Label,
    Ranking,
    Ratings,
    Record,
    TaskKind,
)
from feedback.store import Store
from feedback.web.annotate import shown_values
from feedback.web.context import Adjudicator, Form, StoreOf, done, page, text_field
from feedback.web.forms import by_position, read_value

router = APIRouter()
STRENGTH = {1: "slightly better", 2: "better", 3: "much better"}


@router.get("/adjudicate/{project_id}")
def next_dispute(request: Request, project_id: str, session: Adjudicator, store: StoreOf) -> Response:
    collection = gather(store, project_id)
    queue = adjudication_queue(collection)
    if not queue:
        return page(request, "adjudicated.html", session, project=collection.project)
    wished = request.query_params.get("item", queue[0].item)
    dispute = next((one for one in queue if one.item == wished), queue[0])
    shown = _shown(store, collection, dispute.item, session.who)
    values = shown_values(shown) | {"turns": []}
    counted = collection.counted().by_item.get(shown.item.id, ())
    return page(
        request,
        "adjudicate.html",
        session,
        **values,
        queue=queue,
        dispute=dispute,
        votes=[describe(vote.value, shown.sides) for vote in counted],
        talks=_talks(store, shown, [vote.annotator for vote in counted]),
    )


@router.post("/adjudicate/{project_id}")
def decide(request: Request, project_id: str, session: Adjudicator, store: StoreOf, form: Form) -> Response:
    collection = gather(store, project_id)
    shown = _shown(store, collection, text_field(form, "item"), session.who)
    adjudicate(store, session.who.id, project_id, shown.item, read_value(form, shown))
    return done(request, f"/adjudicate/{project_id}")


def _shown(store: Store, collection: Collection, item_id: str, who: Annotator) -> Shown:
    item = collection.by_id.get(item_id)
    if item is None:
        raise InputError(f"there is no item {item_id!r} in this project")
    with store.read() as connection:
        turns = conversation(connection, item.id, who.id)
    return Shown(collection.project, item, draw_sides(collection.project, item, who), turns)


def _talks(store: Store, shown: Shown, voters: list[str]) -> list[list[tuple[str, list[str]]]]:
    """Of a chat what each voter and the two said, by the letters of this page and without names."""
    if shown.item.kind is not TaskKind.CHAT:
        return []
    with store.read() as connection:
        turns = [conversation(connection, shown.item.id, voter) for voter in voters]
    return [[(turn.user, by_position(shown, turn.replies)) for turn in talk] for talk in turns]


def describe(value: Record, sides: tuple[int, ...]) -> str:
    """A vote in words; answers have the letters of their positions."""
    letters = {response: "ABCDEFGHI"[position] for position, response in enumerate(sides)}
    match value:
        case Choice(choice="tie"):
            return "a tie"
        case Choice(choice="bad"):
            return "both bad"
        case Choice():
            return f"{letters['ab'.index(value.choice)]} {STRENGTH[value.strength]}"
        case Ranking():
            order = sorted(range(len(value.ranks)), key=lambda response: value.ranks[response])
            return ", ".join(f"{value.ranks[response]}. {letters[response]}" for response in order)
        case Ratings():
            return ", ".join(f"{name} {rating}" for name, rating in value.ratings.items())
        case Label():
            return "good" if value.good else "bad"
        case Critique() | Correction():
            return value.text
    raise TypeError(f"no words for {type(value).__name__}")
