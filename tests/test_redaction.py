"""Passwords and keys in addresses are taken out of what is said, and refused in params.yaml."""

from __future__ import annotations

import pytest

from rlhf_core.config import change_params, parse_params, read_yaml
from rlhf_core.errors import InputError
from rlhf_core.redaction import holds_secret, without_secrets

SAID = [
    ("cannot open postgresql://ann:p%40ss@db:5432/x now", "cannot open postgresql://***@db:5432/x now"),
    ("http://host/api and https://u:p@ss@host/x", "http://host/api and https://***@host/x"),
    ("https://host/v1?api_key=abc&model=m", "https://host/v1?api_key=***&model=m"),
    ("https://host/v1?a=1&Token=abc", "https://host/v1?a=1&Token=***"),
]
HARMLESS = ["s3://bucket/a@b", "http://127.0.0.1:8000/v1#model@2", "ann@example.org", "models:/p@candidate"]


@pytest.mark.parametrize(("text", "expected"), SAID)
def test_what_is_said_holds_no_secret(text, expected):
    assert without_secrets(text) == expected
    assert holds_secret(text)
    assert not holds_secret(expected.replace("***@", "").replace("=***", ""))


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_stay(text):
    assert without_secrets(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("preferences", "labeler_target", "https://ann:hunter2@host/v1"),
        ("preferences", "labeler_target", "https://host/v1?api_key=hunter2"),
        ("data", "prompts", ["my.jsonl", "https://ann:hunter2@host/my.jsonl"]),
    ],
)
def test_a_secret_in_the_parameters_is_refused_and_not_repeated(root, section, key, value):
    tree = read_yaml(root / "params.yaml")
    tree[section][key] = value
    with pytest.raises(InputError, match=rf"{section}\.{key}: a password or key") as caught:
        parse_params(tree, "params.yaml")
    assert "hunter2" not in str(caught.value)


def test_an_override_with_a_secret_leaves_the_file_as_it_was(root, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((root / "params.yaml").read_text())
    before = path.read_bytes()
    with pytest.raises(InputError, match="labeler_target"):
        change_params(path, {"preferences.labeler_target": "https://ann:hunter2@host/v1"})
    assert path.read_bytes() == before
