"""The file params.yaml: reading and checking, profiles, `key=value` overrides, writes that keep comments."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_core.config.sections import Params
from rlhf_core.errors import InputError
from rlhf_core.redaction import holds_secret

PROFILES_DIR = Path("configs/profiles")


def load_params(path: Path) -> Params:
    """Read and check `path`.

    Raises InputError that names the file and, for each fault, the key, its value and the rule.
    """
    return parse_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run this in the directory that holds params.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must hold sections, found {type(tree).__name__}")
    return tree


def parse_params(tree: Mapping[str, Any], origin: str) -> Params:
    _refuse_secrets(tree, origin)
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {line}" for line in _explain(error))
        raise InputError(f"{origin}: {error.error_count()} fault(s)\n{faults}") from None


def _refuse_secrets(tree: Mapping[str, Any], origin: str) -> None:
    """Raises InputError that names the key of an address with a password, and does not repeat it."""
    for key, value in flatten(tree):
        if any(holds_secret(str(one)) for one in (value if isinstance(value, list) else [value])):
            raise InputError(
                f"{origin}: {key}: a password or key in an address would be kept in git, DVC and MLflow; "
                "give it by the environment (docs/servers.md#secrets)"
            )


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key{_suggest(key)}"
        elif fault["type"] == "missing":
            yield f"{key}: missing"
        elif fault["type"] == "value_error":
            yield str(fault["ctx"]["error"])
        else:
            yield f"{key} = {fault['input']!r}: {fault['msg']}"


def _suggest(key: str) -> str:
    near = difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def known_keys(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """Dotted names of every leaf key."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, key + ".")
        else:
            yield key


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["ppo.kl_coef=0.1"]` into `{"ppo.kl_coef": 0.1}`; values are YAML.

    Raises InputError for a text without `=` or with an unknown key.
    """
    known = set(known_keys())
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(f"override {text!r}: must have the form section.key=value")
        if key not in known:
            raise InputError(f"override {text!r}: unknown key {key}{_suggest(key)}")
        values[key] = _parse_value(text, value)
    return values


def _parse_value(text: str, value: str) -> Any:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override {text!r}: {value!r} is not a YAML value") from None
    if parsed is None:
        return ""  # `model.name=` empties a text
    if isinstance(parsed, str):
        try:
            return float(parsed)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return parsed
    return parsed


def profile_values(name: str, root: Path) -> dict[str, Any]:
    """The dotted keys and values that configs/profiles/NAME.yaml sets."""
    directory = root / PROFILES_DIR
    path = directory / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in directory.glob("*.yaml"))) or "none"
        raise InputError(f"profile {name!r}: no such profile in {directory}; there are: {names}")
    return dict(flatten(read_yaml(path)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def change_params(path: Path, values: Mapping[str, Any]) -> Params:
    """Set dotted keys in the file at `path`, keeping its comments; checked before it is written.

    Raises InputError, with the file as it was, when the result would not be valid.
    """
    from ruamel.yaml import YAML  # here: only commands that write need it

    from rlhf_core.atomic import write_text

    if not values:
        return load_params(path)
    read_yaml(path)
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 200
    tree = editor.load(path.read_text(encoding="utf-8"))
    put(tree, {k: _flow_list(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()})
    buffer = io.StringIO()
    editor.dump(tree, buffer)
    text = buffer.getvalue()
    params = parse_params(
        yaml.safe_load(text), f"{path} with " + ", ".join(f"{k}={v}" for k, v in values.items())
    )
    if text != path.read_text(encoding="utf-8"):
        write_text(path, text)
    return params


def put(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys in a tree of sections, in place."""
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value


def _flow_list(values: Sequence[Any]) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    sequence = CommentedSeq(values)
    sequence.fa.set_flow_style()
    return sequence
