"""Argilla 2: records as its SDK writes them (`dataset.records.to_json`), in and out.

A record is {"id", "fields", "metadata", "suggestions", "responses", "vectors"}; `responses` holds for each
question a list of {"value", "user_id"}. docs/feedback-data.md says what is lost.
"""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

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

VALUE: TypeAdapter[Value] = TypeAdapter(Value)
TEXT_KINDS = {TaskKind.CRITIQUE: "critique", TaskKind.CORRECTION: "correction"}


def questions(project: Project) -> dict[str, dict[str, Any]]:
    """The questions of a data set for this project: by name, the type and its options.

    Raises ValueError for chats, which have no such form.
    """
    if project.kind is TaskKind.PAIRWISE:
        return {
            "choice": {"type": "label", "labels": ["a", "b", "tie", "bad"]},
            "strength": {"type": "rating", "values": [1, 2, 3], "required": False},
        }
    if project.kind is TaskKind.RANKING:
        return {"ranking": {"type": "ranking"}}
    if project.kind is TaskKind.RATING:
        values = list(range(1, project.scale + 1))
        return {name: {"type": "rating", "values": values} for name in project.criteria}
    if project.kind is TaskKind.LABEL:
        return {"label": {"type": "label", "labels": ["good", "bad"]}}
    if project.kind in TEXT_KINDS:
        return {TEXT_KINDS[project.kind]: {"type": "text"}}
    raise ValueError(f"project {project.id}: Argilla has no form for a {project.kind} project")


def user_id(annotator: str) -> str:
    """The UUID that stands for an annotator; the id does not show."""
    return str(uuid5(NAMESPACE_URL, f"annotator:{annotator}"))


def records(collection: Collection) -> list[dict[str, Any]]:
    """The records, each with the responses that count. Raises ValueError for chats."""
    questions(collection.project)
    counted = collection.counted()
    return [_record(item, counted.by_item.get(item.id, ())) for item in counted.items]


def _record(item: Item, votes: tuple[Vote, ...]) -> dict[str, Any]:
    responses: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for vote in votes:
        for question, answer in _answers(vote.value).items():
            responses[question].append({"value": answer, "user_id": user_id(vote.annotator)})
    names = _response_names(item.kind, len(item.responses))
    texts = {name: response.text for name, response in zip(names, item.responses, strict=True)}
    metadata = {"group": item.group} if item.group else {}
    for name, response in zip(names, item.responses, strict=True):
        if response.policy:
            metadata[f"{name}_policy"] = response.policy
        if response.decoding:
            metadata[f"{name}_decoding"] = json.dumps(response.decoding, sort_keys=True)
    return {
        "id": item.id,
        "fields": {"prompt": [message.model_dump() for message in item.messages], **texts},
        "metadata": metadata,
        "suggestions": {},
        "responses": dict(responses),
        "vectors": {},
    }


def _response_names(kind: TaskKind, count: int) -> list[str]:
    if kind is TaskKind.PAIRWISE:
        return ["response_a", "response_b"]
    return [f"response_{i}" for i in range(count)]


def _answers(value: Record) -> dict[str, Any]:
    """The answers to each question. Argilla's rankings hold no ties: equal ranks go in the items' order."""
    if isinstance(value, Choice):
        strength = {"strength": value.strength} if value.strength else {}
        return {"choice": value.choice} | strength
    if isinstance(value, Ranking):
        order = sorted(range(len(value.ranks)), key=lambda response: (value.ranks[response], response))
        return {"ranking": [f"response_{response}" for response in order]}
    if isinstance(value, Ratings):
        return dict(value.ratings)
    if isinstance(value, Label):
        return {"label": "good" if value.good else "bad"}
    assert isinstance(value, Critique | Correction), value
    return {value.kind: value.text}


def read_records(path: Path, project: Project, at: datetime) -> Imported:
    """Items, votes and annotators of exported records, a JSON array or JSON lines.

    The form holds no times: every vote gets the time `at` and 0 seconds. Responses whose `status` is not
    `submitted` are left out and counted. Raises FormatError that names file, line, key and rule.
    """
    questions(project)
    found = Imported()
    for element in read_objects(path):
        item = _item(element, project)
        found.items.append(item)
        for user, answers in _by_user(element, project, found).items():
            with element.place(f"responses (user {user})"):
                value = VALUE.validate_python(_parts(answers, project, len(item.responses)))
                check_value(value, project.kind, len(item.responses), project)
            record = {
                "id": identifier("vote", project.id, item.id, user),
                "project": project.id,
                "item": item.id,
                "annotator": user,
                "kind": item.kind,
                "value": value.model_dump(),
                "seconds": 0.0,
                "at": at,
            }
            found.votes.append(element.make(Vote, record, "responses"))
            found.annotators[user] = element.make(Annotator, {"id": user, "name": user}, "responses")
    return found


def _item(element: Element, project: Project) -> Item:
    fields = element.get("fields", dict, "must be the object with the record's texts")
    metadata = element.values.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise element.error("metadata", f"{shown(metadata)}; must be an object")
    if "prompt" not in fields:
        raise element.error("fields.prompt", "is missing; a record needs a prompt")
    pair = project.kind is TaskKind.PAIRWISE
    count = sum(f"response_{i}" in fields for i in range(len(fields)))
    responses = []
    for name in ["response_a", "response_b"] if pair else _response_names(project.kind, count):
        with element.place(f"metadata.{name}_decoding"):
            decoding = json.loads(metadata.get(f"{name}_decoding") or "{}")
        values = {
            "text": fields.get(name),
            "policy": metadata.get(f"{name}_policy", ""),
            "decoding": decoding,
        }
        responses.append(element.make(Response, values, f"fields.{name}"))
    record = {
        "id": element.get("id", str, "must be a text"),
        "project": project.id,
        "kind": project.kind,
        "messages": messages_of(element, fields["prompt"], "fields.prompt"),
        "responses": responses,
        "group": metadata.get("group") or "",
    }
    return element.make(Item, record, "fields")


def _by_user(element: Element, project: Project, found: Imported) -> dict[str, dict[str, Any]]:
    """Each user's answers, by question."""
    responses = element.values.get("responses") or {}
    if not isinstance(responses, dict):
        raise element.error(
            "responses", f"{shown(responses)}; must be an object with a list for each question"
        )
    answers: dict[str, dict[str, Any]] = defaultdict(dict)
    for question, given in responses.items():
        if question not in questions(project):
            found.skip(f"answers to the question {question!r}")
            continue
        for i, one in enumerate(given if isinstance(given, list) else [given]):
            if not isinstance(one, dict) or "value" not in one or not isinstance(one.get("user_id"), str):
                rule = "must be an object with value and user_id"
                raise element.error(f"responses.{question}.{i}", f"{shown(one)}; {rule}")
            if one.get("status") not in (None, "submitted"):
                found.skip(f"{one['status']} answer")
                continue
            answers[one["user_id"]][question] = one["value"]
    return dict(answers)


def _parts(answers: dict[str, Any], project: Project, num_responses: int) -> dict[str, Any]:
    """The value's fields. Raises ValueError that names a question without an answer."""
    for name, question in questions(project).items():
        if name not in answers and question.get("required", True):
            raise ValueError(f"no answer to {name!r}, found {', '.join(answers)}")
    kind = project.kind
    if kind is TaskKind.PAIRWISE:
        default = 1 if answers["choice"] in ("a", "b") else 0
        return {
            "kind": "choice",
            "choice": answers["choice"],
            "strength": answers.get("strength", default) if default else 0,
        }
    if kind is TaskKind.RANKING:
        return {"kind": "ranking", "ranks": _ranks(answers["ranking"], num_responses)}
    if kind is TaskKind.RATING:
        return {"kind": "ratings", "ratings": {name: answers[name] for name in project.criteria}}
    if kind is TaskKind.LABEL:
        if answers["label"] not in ("good", "bad"):
            raise ValueError(f"label {shown(answers['label'])} must be good or bad")
        return {"kind": "label", "good": answers["label"] == "good"}
    return {"kind": TEXT_KINDS[kind], "text": answers[TEXT_KINDS[kind]]}


def _ranks(ranking: Any, count: int) -> list[int]:
    """From names best first, or from {"value", "rank"} as Argilla 1 wrote, where ranks may be equal."""
    expected = [f"response_{i}" for i in range(count)]
    given = ranking if isinstance(ranking, list) else []
    if all(isinstance(one, dict) and isinstance(one.get("rank"), int) for one in given):
        ranks = {str(one.get("value")): one["rank"] for one in given}
    else:
        ranks = {str(one): rank for rank, one in enumerate(given)}
    if sorted(ranks) != expected or len(given) != count:
        raise ValueError(f"ranking {shown(ranking)} must hold each of {', '.join(expected)} once")
    levels = sorted(set(ranks.values()))
    return [levels.index(ranks[name]) + 1 for name in expected]
