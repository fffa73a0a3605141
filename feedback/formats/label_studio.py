"""Label Studio: a labelling configuration, tasks with annotations out, exported annotations (JSON) in.

Written against the forms in its documentation (task format; tags Pairwise, Ranker, Rating, Choices and
TextArea). docs/feedback-data.md says what is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from pydantic import TypeAdapter

from feedback.collection import Collection
from feedback.formats.reading import Element, Imported, identifier, messages_of, read_objects, shown
from feedback.records import (
    Annotator,
    Choice,
    Correction,
    Critique,
    Item,
    Label,
    Project,
    Ranking,
    Ratings,
    Record,
    Response,
    TaskKind,
    Value,
    Vote,
    check_value,
)

SIDES = {"left": "a", "right": "b"}
TEXT_KINDS = {TaskKind.CRITIQUE: "critique", TaskKind.CORRECTION: "correction"}
VALUE: TypeAdapter[Value] = TypeAdapter(Value)
Names = Mapping[str, str]


def label_config(project: Project) -> str:
    """The labelling configuration (XML) whose results `read_annotations` understands.

    Raises ValueError for chats, which have no such form.
    """
    text = '  <Text name="prompt" value="$prompt"/>\n'
    one = '  <Text name="response" value="$response"/>\n'
    if project.kind is TaskKind.PAIRWISE:
        body = (
            '  <Pairwise name="choice" toName="a,b"/>\n'
            '  <Text name="a" value="$response_a"/>\n  <Text name="b" value="$response_b"/>\n'
            '  <Choices name="verdict" toName="prompt" choice="single">\n'
            '    <Choice value="tie"/>\n    <Choice value="bad"/>\n  </Choices>\n'
            '  <Rating name="strength" toName="prompt" maxRating="3"/>\n'
        )
    elif project.kind is TaskKind.RANKING:
        buckets = "".join(f'    <Bucket name="{rank}" title="{rank}"/>\n' for rank in range(1, 10))
        body = (
            '  <List name="responses" value="$responses"/>\n'
            f'  <Ranker name="ranking" toName="responses">\n{buckets}  </Ranker>\n'
        )
    elif project.kind is TaskKind.RATING:
        body = one + "".join(
            f'  <Rating name={quoteattr(name)} toName="response" maxRating="{project.scale}"/>\n'
            for name in project.criteria
        )
    elif project.kind is TaskKind.LABEL:
        choices = '    <Choice value="good"/>\n    <Choice value="bad"/>\n'
        body = one + f'  <Choices name="label" toName="response" choice="single">\n{choices}  </Choices>\n'
    elif project.kind in TEXT_KINDS:
        body = one + f'  <TextArea name="{TEXT_KINDS[project.kind]}" toName="response" maxSubmissions="1"/>\n'
    else:
        raise ValueError(f"project {project.id}: Label Studio has no form for a {project.kind} project")
    return f"<View>\n{text}{body}</View>\n"


def tasks(collection: Collection) -> list[dict[str, Any]]:
    """The tasks to import, each with the annotations that count.

    Raises ValueError for chats. `completed_by` holds annotator ids in the place of e-mail addresses.
    """
    label_config(collection.project)
    counted = collection.counted()
    return [_task(item, counted.by_item.get(item.id, ())) for item in counted.items]


def _task(item: Item, votes: tuple[Vote, ...]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "id": item.id,
        "prompt": item.prompt,
        "messages": [message.model_dump() for message in item.messages],
        "group": item.group,
        "policies": [response.policy for response in item.responses],
        "decoding": [response.decoding for response in item.responses],
    }
    texts = [response.text for response in item.responses]
    if item.kind is TaskKind.PAIRWISE:
        data |= {"response_a": texts[0], "response_b": texts[1]}
    elif item.kind is TaskKind.RANKING:
        data["responses"] = [{"id": str(i), "title": "", "body": text} for i, text in enumerate(texts)]
    elif texts:
        data["response"] = texts[0]
    annotations = [_annotation(vote.value) | _given(vote) for vote in votes]
    if item.gold is not None:
        annotations.append(_annotation(item.gold) | {"ground_truth": True})
    return {"data": data, "annotations": annotations}


def _given(vote: Vote) -> dict[str, Any]:
    return {
        "unique_id": vote.id,
        "completed_by": {"email": vote.annotator},
        "created_at": vote.at.isoformat(),
        "lead_time": vote.seconds,
        "was_cancelled": False,
    }


def _annotation(value: Record) -> dict[str, Any]:
    return {"result": [_result(*one) for one in _results(value)]}


def _result(name: str, to: str, kind: str, value: Any) -> dict[str, Any]:
    key = {"pairwise": "selected", "textarea": "text"}.get(kind, kind)
    return {"from_name": name, "to_name": to, "type": kind, "value": {key: value}}


def _results(value: Record) -> list[tuple[str, str, str, Any]]:
    """Name of the control, name of its object, type and value of each result."""
    if isinstance(value, Choice):
        if value.choice in ("tie", "bad"):
            return [("verdict", "prompt", "choices", [value.choice])]
        side = {letter: side for side, letter in SIDES.items()}[value.choice]
        return [("choice", "a,b", "pairwise", side), ("strength", "prompt", "rating", value.strength)]
    if isinstance(value, Ranking):
        buckets: dict[str, list[str]] = {}
        for response, rank in enumerate(value.ranks):
            buckets.setdefault(str(rank), []).append(str(response))
        return [("ranking", "responses", "ranker", buckets)]
    if isinstance(value, Ratings):
        return [(name, "response", "rating", rating) for name, rating in value.ratings.items()]
    if isinstance(value, Label):
        return [("label", "response", "choices", ["good" if value.good else "bad"])]
    assert isinstance(value, Critique | Correction), value
    return [(value.kind, "response", "textarea", [value.text])]


def read_annotations(path: Path, project: Project, names: Names | None = None) -> Imported:
    """Items, votes and annotators of a JSON export (not JSON-MIN).

    `names` gives your own names for ours, of data keys and controls: {"response_a": "text1", "choice": "pw"}.
    Cancelled annotations and those without a result are left out and counted; an annotation marked as ground
    truth becomes the item's gold. Raises FormatError that names file, line, key and rule.
    """
    label_config(project)
    reader = _Reader(project, names or {})
    for element in read_objects(path):
        reader.task(element)
    return reader.found


class _Reader:
    """Reads tasks of one project."""

    def __init__(self, project: Project, names: Names) -> None:
        self.project, self.names = project, names
        self.found = Imported()
        self.ids: list[str] = []  # of the ranked answers of the task that is read

    def name(self, ours: str) -> str:
        return self.names.get(ours, ours)

    def task(self, element: Element) -> None:
        data = element.get("data", dict, "must be the object with the task's texts")
        annotations = element.values.get("annotations", [])
        if not isinstance(annotations, list):
            raise element.error("annotations", f"{shown(annotations)}; must be a list")
        item = self.item(element, data)
        for i, annotation in enumerate(annotations):
            key = f"annotations.{i}"
            if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
                raise element.error(f"{key}.result", "is missing; must be a list")
            if annotation.get("was_cancelled"):
                self.found.skip("cancelled annotation")
            elif not annotation["result"]:
                self.found.skip("annotation without a result")
            else:
                value = self.value(element, annotation["result"], f"{key}.result", len(item.responses))
                if annotation.get("ground_truth"):
                    item = element.make(Item, item.model_dump() | {"gold": value.model_dump()}, key)
                if annotation.get("completed_by") is not None:
                    self.vote(element, annotation, item, value, key)
        self.found.items.append(item)

    def item(self, element: Element, data: dict[str, Any]) -> Item:
        given = data.get(self.name("id"))
        if not isinstance(given, str):
            given = f"ls-{element.get('id', (int, str), 'a task needs an id')}"
        key = self.name("messages" if data.get(self.name("messages")) else "prompt")
        if key not in data:
            raise element.error(f"data.{key}", "is missing; a task needs prompt or messages")
        record = {
            "id": given,
            "project": self.project.id,
            "kind": self.project.kind,
            "messages": messages_of(element, data[key], f"data.{key}"),
            "responses": self.responses(element, data),
            "group": data.get(self.name("group")) or "",
        }
        return element.make(Item, record, "data")

    def responses(self, element: Element, data: dict[str, Any]) -> list[Response]:
        if self.project.kind is TaskKind.RANKING:
            key = self.name("responses")
            given = data.get(key)
            if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
                raise element.error(
                    f"data.{key}", f"{shown(given)}; must be a list of objects with id and body"
                )
            texts = [one.get("body") or one.get("title") for one in given]
            self.ids = [str(one.get("id")) for one in given]
        else:
            pair = self.project.kind is TaskKind.PAIRWISE
            keys = [self.name(key) for key in (("response_a", "response_b") if pair else ("response",))]
            if self.project.kind is TaskKind.CORRECTION and keys[0] not in data:
                keys = []
            for key in keys:
                if not isinstance(data.get(key), str):
                    raise element.error(f"data.{key}", f"{shown(data.get(key))}; must be a text")
            texts = [data[key] for key in keys]
        policies = data.get("policies") or [""] * len(texts)
        decoding = data.get("decoding") or [{}] * len(texts)
        if not len(texts) == len(policies) == len(decoding):
            raise element.error("data.policies", f"must be as long as the responses, {len(texts)}")
        return [
            element.make(Response, {"text": text, "policy": policy, "decoding": how}, f"data.responses.{i}")
            for i, (text, policy, how) in enumerate(zip(texts, policies, decoding, strict=True))
        ]

    def value(self, element: Element, results: list[Any], key: str, num_responses: int) -> Value:
        """The value of an annotation. Raises FormatError when a result is of another form."""
        found: dict[str, Any] = {}
        for i, result in enumerate(results):
            try:
                kind = result["type"]
                inner = {"pairwise": "selected", "textarea": "text"}.get(kind, kind)
                found[result["from_name"]] = result["value"][inner]
            except (KeyError, TypeError):
                rule = "must have from_name, type and a value of that type"
                raise element.error(f"{key}.{i}", f"{shown(result)}; {rule}") from None
        with element.place(key):
            value = VALUE.validate_python(self.parts(found))
            check_value(value, self.project.kind, num_responses, self.project)
            return value

    def parts(self, found: dict[str, Any]) -> dict[str, Any]:
        """The value's fields from results by control. Raises ValueError that names what is missing."""

        def of(name: str) -> Any:
            if self.name(name) not in found:
                raise ValueError(f"no result of {self.name(name)!r}, found {', '.join(map(str, found))}")
            return found[self.name(name)]

        kind = self.project.kind
        if kind is TaskKind.PAIRWISE:
            if self.name("verdict") in found:
                return {"kind": "choice", "choice": one_of(of("verdict"), ("tie", "bad"))}
            side = one_of(of("choice"), tuple(SIDES))
            return {"kind": "choice", "choice": SIDES[side], "strength": found.get(self.name("strength"), 1)}
        if kind is TaskKind.RANKING:
            return {"kind": "ranking", "ranks": ranks_of(of("ranking"), self.ids)}
        if kind is TaskKind.RATING:
            return {"kind": "ratings", "ratings": {name: of(name) for name in self.project.criteria}}
        if kind is TaskKind.LABEL:
            return {"kind": "label", "good": one_of(of("label"), ("good", "bad")) == "good"}
        texts = of(TEXT_KINDS[kind])
        return {"kind": TEXT_KINDS[kind], "text": "\n".join(texts) if isinstance(texts, list) else texts}

    def vote(self, element: Element, annotation: dict[str, Any], item: Item, value: Value, key: str) -> None:
        annotator = self.annotator(element, annotation["completed_by"], key)
        given = annotation.get("unique_id") or identifier(
            "vote", self.project.id, item.id, annotator, annotation.get("id", key)
        )
        if not isinstance(annotation.get("created_at"), str):
            rule = "must be a time in ISO 8601"
            raise element.error(f"{key}.created_at", f"{shown(annotation.get('created_at'))}; {rule}")
        record = {
            "id": given,
            "project": self.project.id,
            "item": item.id,
            "annotator": annotator,
            "kind": item.kind,
            "value": value.model_dump(),
            "seconds": annotation.get("lead_time") or 0.0,
            "at": annotation.get("created_at"),
        }
        self.found.votes.append(element.make(Vote, record, key))

    def annotator(self, element: Element, completed_by: Any, key: str) -> str:
        """The id of an annotator: `ls-NUMBER`, or one that an e-mail address gives."""
        if isinstance(completed_by, dict):
            completed_by = completed_by.get("email") or completed_by.get("id")
        if isinstance(completed_by, bool) or not isinstance(completed_by, int | str):
            rule = "must be a user's number, or an object with email"
            raise element.error(f"{key}.completed_by", f"{shown(completed_by)}; {rule}")
        name = str(completed_by)
        plain = isinstance(completed_by, str) and "@" not in name
        own = name if plain else f"ls-{name}" if name.isdigit() else identifier("annotator", name)
        self.found.annotators[own] = element.make(Annotator, {"id": own, "name": name}, f"{key}.completed_by")
        return own


def one_of(value: Any, allowed: tuple[str, ...]) -> str:
    """A single choice, which Label Studio writes as a list of one. Raises ValueError for anything else."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if found not in allowed:
        raise ValueError(f"{shown(value)} must be one of {', '.join(allowed)}")
    return str(found)


def ranks_of(ranker: Any, ids: list[str]) -> list[int]:
    """Ranks by response, from ids best first, or from buckets named 1, 2, ... whose answers are ties.

    Raises ValueError when an answer is missing, stands twice or is unknown.
    """
    if isinstance(ranker, dict):
        if not all(name.isdigit() for name in ranker):
            raise ValueError(f"buckets {sorted(ranker)} must be named by their rank, 1, 2, ...")
        groups = [ranker[name] for name in sorted(ranker, key=int) if ranker[name]]
    elif isinstance(ranker, list):
        groups = [[one] for one in ranker]
    else:
        raise ValueError(f"{shown(ranker)} must be a list of ids or an object of buckets")
    ranks = {str(one): rank for rank, group in enumerate(groups, start=1) for one in group}
    if sorted(ranks) != sorted(ids) or sum(map(len, groups)) != len(ids):
        raise ValueError(f"the ranking {shown(ranker)} must hold each of the ids {ids} once")
    return [ranks[one] for one in ids]
