"""Reading files of JSON: where each value stands, and errors that name file, line, key and rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from feedback.errors import InputError
from feedback.records import Annotator, Item, Message, Vote

SPACES = " \t\r\n"
M = TypeVar("M", bound=BaseModel)


class FormatError(InputError):
    """A file that cannot be read: names file, line, key, value and rule."""

    def __init__(self, path: Path, line: int, key: str, rule: str) -> None:
        super().__init__(f"{path}: line {line}: {key}: {rule}" if key else f"{path}: line {line}: {rule}")
        self.path, self.line, self.key, self.rule = path, line, key, rule


@dataclass(frozen=True)
class Element:
    """One JSON object of a file, and the line on which it starts."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, key: str, rule: str) -> FormatError:
        return FormatError(self.path, self.line, key, rule)

    def get(self, key: str, kind: type | tuple[type, ...], rule: str) -> Any:
        """The value at `key`, which must be of `kind`. Raises FormatError that says `rule`."""
        value = self.values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.error(key, f"{shown(value) if key in self.values else 'is missing'}; {rule}")
        return value

    def make(self, model: type[M], values: Mapping[str, Any], prefix: str = "") -> M:
        """A record of `model`. Raises FormatError for the first key that breaks a rule."""
        with self.place(prefix):
            return model.model_validate(values)

    @contextmanager
    def place(self, key: str) -> Iterator[None]:
        """Turn a ValueError inside the block into a FormatError at `key`."""
        try:
            yield
        except FormatError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            inner = ".".join(str(part) for part in (key, *first["loc"]) if part != "")
            raise self.error(inner, f"{shown(first['input'])}; {first['msg']}") from None
        except ValueError as error:
            raise self.error(key, str(error)) from None


@dataclass
class Imported:
    """What a file of another system held, and how much of it had no place here, by reason."""

    items: list[Item] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    annotators: dict[str, Annotator] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def read_objects(path: Path) -> Iterator[Element]:
    """The objects of a JSON array or of JSON lines. Raises FormatError with the line of the fault."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FormatError(path, line, "", "must be UTF-8 text") from None
    except OSError as error:
        raise FormatError(path, 0, "", f"cannot be read: {error.strerror}") from None
    if not text.strip():
        raise FormatError(path, 1, "", "the file is empty; it must hold JSON objects")
    found = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    for line, value in found:
        if not isinstance(value, dict):
            raise FormatError(path, line, "", f"{shown(value)}; must be a JSON object")
        yield Element(path, line, value)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, end = _decode(path, line, 0, number)
            if line[end:].strip():
                raise FormatError(path, number, "", f"{shown(line[end:])}; a line must hold one JSON object")
            yield number, value


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Elements one by one, so that a fault has a line; the last comma and bracket are checked too."""
    at, line = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    more = _after_spaces(text, at)
    if text[more : more + 1] == "]":
        _check_end(path, text, more + 1)
        return
    while True:
        start = _after_spaces(text, at)
        line += text.count("\n", at, start)
        value, at = _decode(path, text, start, line)
        yield line, value
        line += text.count("\n", start, at)
        end = _after_spaces(text, at)
        line += text.count("\n", at, end)
        at = end + 1
        if text[end : end + 1] == "]":
            return _check_end(path, text, at)
        if text[end : end + 1] != ",":
            raise FormatError(
                path, line, "", "a JSON array must go on with , or end with ]; is it truncated?"
            )


def _check_end(path: Path, text: str, at: int) -> None:
    if text[at:].strip():
        line = text.count("\n", 0, _after_spaces(text, at)) + 1
        raise FormatError(path, line, "", "nothing may follow the end of the JSON array")


def _after_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACES:
        at += 1
    return at


def _decode(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    try:
        value, end = decoder.raw_decode(text, _after_spaces(text, start))
    except json.JSONDecodeError as error:
        where = line + text.count("\n", start, error.pos)
        raise FormatError(
            path, where, "", f"not JSON: {error.msg}: {shown(text[start : start + 60])}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, line, "", f"not JSON: {error}") from None
    return value, end


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def identifier(prefix: str, *parts: Any) -> str:
    """An id that depends on the parts alone, so that a second import makes the same records."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
    return f"{prefix}-{digest[:16]}"


def messages_of(element: Element, value: Any, key: str) -> tuple[Message, ...]:
    """A text as one user's turn, or a list of role and content."""
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, list) or not value:
        raise element.error(
            key, f"{shown(value)}; must be a text or a list of messages with role and content"
        )
    return tuple(
        element.make(
            Message,
            {} if not isinstance(turn, dict) else {name: turn.get(name) for name in ("role", "content")},
            f"{key}.{i}",
        )
        for i, turn in enumerate(value)
    )


def prompt_value(item: Item) -> str | list[dict[str, str]]:
    """The inverse of `messages_of`: a single user's turn as a text."""
    if len(item.messages) == 1 and item.messages[0].role == "user":
        return item.messages[0].content
    return [message.model_dump() for message in item.messages]


def lines_of(objects: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines, keys sorted."""
    return "".join(
        json.dumps(one, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for one in objects
    )
