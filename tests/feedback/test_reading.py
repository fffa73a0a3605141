"""Files of JSON: any text is read, or told what is wrong with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.formats.reading import FormatError, read_objects
from tests.feedback.collections import TEXTS


@pytest.fixture(scope="module")
def given_file(tmp_path_factory):
    """A function that writes a text to a file, the same one each time."""
    path = tmp_path_factory.mktemp("reading") / "given.json"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


@settings(deadline=None)
@given(st.text() | st.lists(st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2)).map(json.dumps))
def test_any_text_is_read_or_told_what_is_wrong(given_file, text):
    try:
        found = [one.values for one in read_objects(given_file(text))]
    except FormatError as error:
        found = error
    if isinstance(found, FormatError):
        assert found.line >= 1
    elif text.lstrip().startswith("["):
        assert found == json.loads(text)
    else:
        assert found == [json.loads(line) for line in text.split("\n") if line.strip()]


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n{"prompt": "\xff"}\n')
    with pytest.raises(FormatError, match="line 2: must be UTF-8 text"):
        list(read_objects(path))
