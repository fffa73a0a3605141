"""A project with its votes as the text of one file, in the form that somebody asks for."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from feedback.errors import InputError
from feedback.records import TaskKind

if TYPE_CHECKING:
    from feedback.collection import Collection
    from feedback.rows import RowRules

ROWS = {  # the file of a snapshot that a kind of task is for; all others give preferences
    TaskKind.LABEL: "labels.jsonl",
    TaskKind.CRITIQUE: "critiques.jsonl",
    TaskKind.CORRECTION: "demonstrations.jsonl",
}


class Export(StrEnum):
    """What can be written."""

    RECORDS = "records"
    ROWS = "rows"
    TRL = "trl"
    LABEL_STUDIO = "label-studio"
    ARGILLA = "argilla"


def text_of(found: Collection, form: Export, rules: RowRules | None = None) -> str:
    """The file's text; `rules` say how votes become rows, for `ROWS` and `TRL`.

    Raises InputError where the project has no such form.
    """
    from feedback.formats import argilla, label_studio
    from feedback.formats.jsonl import write_collection
    from feedback.snapshot import jsonl

    try:
        match form:
            case Export.LABEL_STUDIO:
                return json.dumps(label_studio.tasks(found), ensure_ascii=False, indent=1)
            case Export.ARGILLA:
                return json.dumps(argilla.records(found), ensure_ascii=False, indent=1)
            case Export.ROWS:
                return jsonl(_rows(found, rules))
            case Export.TRL:
                return jsonl(_trl(found, rules))
        return write_collection(found)
    except ValueError as error:
        raise InputError(str(error)) from None


def _rows(found: Collection, rules: RowRules | None) -> list[dict[str, Any]]:
    from feedback.rows import make_rows

    if found.project.kind is TaskKind.CHAT:
        raise ValueError("a chat gives no rows: two conversations that part have no prompt in common")
    return make_rows(found, rules).files()[ROWS.get(found.project.kind, "preferences.jsonl")]


def _trl(found: Collection, rules: RowRules | None) -> list[dict[str, Any]]:
    from feedback.formats import trl

    rows = _rows(found, rules)
    match found.project.kind:
        case TaskKind.CRITIQUE:
            raise ValueError("TRL has no form for critiques")
        case TaskKind.LABEL:
            return trl.unpaired_preference(rows)
        case TaskKind.CORRECTION:
            return trl.prompt_completion(rows)
    return trl.preference(rows)
