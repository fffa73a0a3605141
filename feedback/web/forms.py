"""From the fields of a form to a vote's value. Forms speak of positions on the page, votes of responses."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError
from starlette.datastructures import FormData

from feedback.assignment import Shown
from feedback.errors import InputError
from feedback.records import (
    Choice,
    Correction,
    Critique,
    Label,
    Ranking,
    Ratings,
    Record,
    TaskKind,
)
from feedback.web.context import text_field


def read_value(form: FormData, shown: Shown) -> Record:
    """Raises InputError that says which field is missing or wrong."""
    try:
        return READERS[shown.item.kind](form, shown)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def _choice(form: FormData, shown: Shown) -> Record:
    """`choice` is tie, bad, or POSITION:STRENGTH."""
    text = text_field(form, "choice")
    if text in ("tie", "bad"):
        return Choice(choice=text)
    position, _, strength = text.partition(":")
    if position not in ("0", "1") or not strength.isdecimal():
        raise InputError("choose an answer, a tie, or both bad")
    side = shown.sides[int(position)]
    return Choice.model_validate({"choice": "ab"[side], "strength": int(strength[:3])})


def _ranking(form: FormData, shown: Shown) -> Record:
    """`rank-POSITION` from 1; gaps are closed."""
    given = [text_field(form, f"rank-{position}") for position in range(len(shown.sides))]
    if not all(rank.isdecimal() and len(rank) < 3 for rank in given):
        raise InputError("give every answer a rank")
    order = sorted({int(rank) for rank in given})
    ranks = [0] * len(given)
    for position, rank in enumerate(given):
        ranks[shown.sides[position]] = order.index(int(rank)) + 1
    return Ranking(ranks=tuple(ranks))


def _ratings(form: FormData, shown: Shown) -> Record:
    ratings = {}
    for number, criterion in enumerate(shown.project.criteria):
        text = text_field(form, f"rating-{number}")
        if not text.isdecimal():
            raise InputError(f"rate {criterion} too")
        ratings[criterion] = int(text[:3])
    return Ratings(ratings=ratings)


def _label(form: FormData, shown: Shown) -> Record:
    text = text_field(form, "label")
    if text not in ("good", "bad"):
        raise InputError("choose good or bad")
    return Label(good=text == "good")


def _text(kind: type[Critique] | type[Correction]):
    def read(form: FormData, shown: Shown) -> Record:
        text = text_field(form, "text").strip()
        if not text:
            raise InputError("write something first")
        return kind(text=text)

    return read


READERS = {
    TaskKind.PAIRWISE: _choice,
    TaskKind.CHAT: _choice,
    TaskKind.RANKING: _ranking,
    TaskKind.RATING: _ratings,
    TaskKind.LABEL: _label,
    TaskKind.CRITIQUE: _text(Critique),
    TaskKind.CORRECTION: _text(Correction),
}


def by_position(shown: Shown, values: Sequence[str]) -> list[str]:
    """What belongs to each response, in the order of the page."""
    return [values[response] for response in shown.sides]
