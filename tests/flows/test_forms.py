"""The form of the deployment `train`: what it renders, and that what is typed holds as an override."""

from __future__ import annotations

import json
from typing import get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from flows import forms
from flows.train import train
from rlhf_core.config import Params, load_params, parse_overrides
from rlhf_core.errors import InputError
from tasks.workspace import resolve_params


@pytest.fixture
def schema(params):
    return forms.for_reader(parameter_schema(train).model_dump(), params)


def fields(schema):
    for section, group in forms.GROUPS.items():
        for key, field in schema["definitions"][group.__name__]["properties"].items():
            yield section, key, field


def section_of(name):
    return next(f.annotation for key, f in Params.model_fields.items() if (f.alias or key) == name)


def test_no_field_has_a_type_switcher_and_each_has_title_help_and_no_default(schema):
    shown = list(fields(schema))
    assert len(shown) >= 20
    assert "anyOf" not in json.dumps(schema)
    assert "oneOf" not in json.dumps(schema)
    for section, key, field in shown:
        assert field["title"] != key, (section, key)
        assert len(field["description"]) > 10
        assert "default" not in field
    for name in forms.GROUPS:
        assert schema["properties"][name]["default"] == {}
        assert schema["properties"][name]["title"][0].isupper()
    for parameter in schema["properties"].values():
        assert parameter["description"][0].isupper()


def test_each_field_has_the_type_bounds_and_choices_of_its_key(schema):
    rules = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum", "type")
    for section, key, field in fields(schema):
        rule = section_of(section).model_json_schema()["properties"][key]
        assert {k: v for k, v in field.items() if k in rules} == {
            k: v for k, v in rule.items() if k in rules
        }, (section, key)


def test_help_says_what_params_yaml_says(schema, params):
    said = {(section, key): field["description"] for section, key, field in fields(schema)}
    assert said["ppo", "kl_coef"].endswith(f"params.yaml: {params.ppo.kl_coef}")
    assert said["data", "prompts"].endswith("params.yaml: package:chitchat")
    assert said["model", "name"].endswith("params.yaml: nothing")


def test_empty_form_says_nothing(schema):
    empty = {"ppo": {"kl_coef": None, "advantages": None}, "model": {"name": ""}, "data": {"prompts": []}}
    groups = {name: group.model_validate(empty.get(name, {})) for name, group in forms.GROUPS.items()}
    assert list(forms.overrides_of(groups)) == []
    assert validate({name: {} for name in forms.GROUPS}, schema, raise_on_error=True) == []


def test_server_refuses_what_breaks_a_bound_before_a_run_starts(schema):
    for wrong in ({"ppo": {"kl_coef": -1}}, {"ppo": {"advantages": "best"}}, {"sft": {"num_rows": 0}}):
        with pytest.raises(Exception, match="Validation failed"):
            validate(wrong, schema, raise_on_error=True)
    with pytest.raises(ValidationError):
        forms.PPOForm(kl_coefficient=1.0)


def examples(annotation):
    if get_origin(annotation) is list:
        return st.lists(st.text(min_size=1), min_size=1, max_size=3)
    if choices := get_args(annotation):
        return st.sampled_from(choices)
    texts = st.text(min_size=1).filter(lambda text: not _is_number(text))
    return {int: st.integers(1, 10**6), float: st.floats(1e-8, 1e3), str: texts}[annotation]


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@settings(deadline=None)  # a loaded machine is slow now and then
@given(st.data())
def test_what_is_typed_arrives_unchanged(data):
    typed = {}
    groups = {}
    for section, group in forms.GROUPS.items():
        values = {
            key: data.draw(examples(field.annotation))
            for key, field in group.model_fields.items()
            if data.draw(st.booleans())
        }
        groups[section] = group.model_construct(**values)
        typed |= {f"{section}.{key}": value for key, value in values.items()}
    assert parse_overrides(list(forms.overrides_of(groups))) == typed


def test_typed_values_hold_over_the_profile_and_are_checked(root, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((root / "params.yaml").read_text())
    (tmp_path / "configs").symlink_to(root / "configs")
    typed = {"ppo": forms.PPOForm(kl_coef=0.3), "sft": forms.SFTForm(num_rows=50)}
    changed = resolve_params(tmp_path, "smoke", list(forms.overrides_of(typed)))
    assert (changed.ppo.kl_coef, changed.sft.num_rows) == (0.3, 50)
    assert changed.ppo.num_updates == 3  # of the profile
    assert changed.ppo.gamma == load_params(root / "params.yaml").ppo.gamma

    wrong = {"ppo": forms.PPOForm(rollout_batch_size=33)}
    with pytest.raises(InputError, match=r"ppo.rollout_batch_size \(33\) must be a multiple"):
        resolve_params(tmp_path, "", list(forms.overrides_of(wrong)))
