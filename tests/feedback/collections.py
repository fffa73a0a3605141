"""Collections for tests: short to write, and strategies for any."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from feedback.collection import Decision, collect
from feedback.records import (
    Annotator,
    Choice,
    Correction,
    Critique,
    Item,
    Label,
    Message,
    Project,
    Ranking,
    Ratings,
    Response,
    TaskKind,
    Vote,
)

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
CRITERIA = ("tone", "truth")
NUM_RESPONSES = {
    TaskKind.PAIRWISE: 2,
    TaskKind.RANKING: 3,
    TaskKind.RATING: 1,
    TaskKind.LABEL: 1,
    TaskKind.CRITIQUE: 1,
    TaskKind.CORRECTION: 1,
}


def project(kind="pairwise", **options):
    criteria = {"criteria": CRITERIA} if kind == "rating" else {}
    return Project(
        **({"id": "p", "name": "Tone", "kind": kind, "guidelines": "Be kind."} | criteria | options)
    )


def item(name, kind="pairwise", prompt=None, texts=None, **options):
    kind = TaskKind(kind)
    texts = [f"{name} answer {i}" for i in range(NUM_RESPONSES[kind])] if texts is None else texts
    return Item(
        id=name,
        project="p",
        kind=kind,
        messages=(Message(role="user", content=prompt or f"question {name}?"),),
        responses=tuple(Response(text=text, policy=f"m{i}") for i, text in enumerate(texts)),
        **options,
    )


def choice(letter):
    """`a` is "a, better"; `a3` is "a, much better"."""
    if letter in ("tie", "bad"):
        return Choice(choice=letter)
    return Choice(choice=letter[0], strength=int(letter[1:] or 2))


def vote(item_name, annotator, value, kind="pairwise", minutes=0, **options):
    value = choice(value) if isinstance(value, str) else value
    made = {
        "id": f"v-{item_name}-{annotator}-{minutes}",
        "project": "p",
        "item": item_name,
        "annotator": annotator,
        "kind": kind,
        "value": value,
        "seconds": 10.0,
        "at": START + timedelta(minutes=minutes),
    }
    return Vote(**(made | options))


def people(*names, excluded=()):
    return [Annotator(id=name, name=f"name of {name}", excluded=name in excluded) for name in names]


def pairs(table, *, kind="pairwise", excluded=(), items=None, decisions=()):
    """A collection from {item: {annotator: value}}."""
    names = sorted({who for given in table.values() for who in given} | {one.annotator for one in decisions})
    return collect(
        project(kind),
        items or [item(name, kind) for name in table],
        [vote(name, who, value, kind) for name, given in table.items() for who, value in given.items()],
        people(*names, excluded=excluded),
        decisions,
    )


def decision(item_name, value, annotator="judge"):
    return Decision(item=item_name, annotator=annotator, value=choice(value), at=START + timedelta(days=1))


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
VALUES = {
    "pairwise": st.sampled_from(["a1", "a2", "b1", "b3", "tie", "bad"]).map(choice),
    "ranking": st.sampled_from([(1, 2, 3), (3, 2, 1), (1, 1, 2), (2, 1, 2), (1, 1, 1)]).map(
        lambda ranks: Ranking(ranks=ranks)
    ),
    "rating": st.tuples(st.integers(1, 5), st.integers(1, 5)).map(
        lambda found: Ratings(ratings=dict(zip(CRITERIA, found)))
    ),
    "label": st.booleans().map(lambda good: Label(good=good)),
    "critique": TEXTS.map(lambda text: Critique(text=text)),
    "correction": TEXTS.map(lambda text: Correction(text=text)),
}
KINDS = st.sampled_from(sorted(VALUES))


@st.composite
def collections(draw, kinds=KINDS, gold=True):
    """Any collection: few prompts for many items, votes by four, some excluded, some cast twice."""
    kind = draw(kinds)
    prompts = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    items = []
    for i in range(draw(st.integers(1, 5))):
        number = draw(st.sampled_from(range(len(prompts))))
        texts = [draw(TEXTS) for _ in range(NUM_RESPONSES[TaskKind(kind)])]
        known = draw(st.none() | VALUES[kind]) if gold else None
        items.append(item(f"i{i}", kind, prompts[number], texts, gold=known, group=f"g{number}"))
    names = ["ann", "bob", "cat", "dan"]
    votes = [
        vote(one.id, who, draw(VALUES[kind]), kind, minutes, seconds=draw(st.integers(0, 50)) / 2)
        for one in items
        for who in names
        for minutes in range(draw(st.integers(0, 2)))
    ]
    decisions = [
        Decision(item=one.id, annotator=draw(st.sampled_from(names)), value=draw(VALUES[kind]), at=START)
        for one in items
        if draw(st.integers(0, 4)) == 0
    ]
    return collect(
        project(kind), items, votes, people(*names, excluded=draw(st.sets(st.sampled_from(names)))), decisions
    )
