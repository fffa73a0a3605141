import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from rlhf_core.config import (
    change_params,
    known_keys,
    load_params,
    parse_overrides,
    parse_params,
    profile_values,
    read_yaml,
)
from rlhf_core.errors import InputError


@pytest.fixture
def file(root, tmp_path):
    return Path(shutil.copy(root / "params.yaml", tmp_path))


@pytest.fixture
def tree(root):
    return read_yaml(root / "params.yaml")


def change(tree, key, value):
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ppo.cliprange_low", 1.5, "ppo.cliprange_low = 1.5: Input should be less than 1"),
        (
            "ppo.micro_batch_size",
            5,
            r"ppo.minibatch_size \(16\) must be a multiple of ppo.micro_batch_size \(5\)",
        ),
        (
            "sft.micro_batch_size",
            7,
            r"sft.batch_size \(\d+\) must be a multiple of sft.micro_batch_size \(7\)",
        ),
        ("ppo.sampling.top_k", 50, r"ppo.sampling.top_k \(50\) must be 0"),
        ("ppo.sampling.top_p", 0.9, r"ppo.sampling.top_p \(0.9\) must be 1"),
        (
            "model.source",
            "scratch",
            r"pretrain.num_steps \(0\) must be positive when model.source is scratch",
        ),
        ("model.source", "hub", "model.name must name the model when model.source is hub"),
        ("model.source", "gguf", "model.source = 'gguf': Input should be 'package'"),
        ("preferences.pairs_per_prompt", 99, r"preferences.pairs_per_prompt \(99\) must be at most"),
        ("preferences.labeler", "judge", "preferences.labeler_target must say which one"),
        (
            "evaluate.gold_target",
            "x:y",
            r"evaluate.gold_target \('x:y'\) must be empty when evaluate.gold is vader",
        ),
        (
            "data.min_prompt_chars",
            999,
            r"data.min_prompt_chars \(999\) must not exceed data.max_prompt_chars",
        ),
        ("ppo.kl_in", "loss", r"ppo.kl_estimator \(k1\) must be k2 or k3 where ppo.kl_in is loss"),
        ("ppo.dual_clip", 1.1, r"ppo.dual_clip \(1.1\) must be 0, or above 1 \+ ppo.cliprange_high \(0.2\)"),
        ("ppo.reward_function", "no colon", "ppo.reward_function = 'no colon'"),
        ("ppo.start", "policy", "ppo.start = 'policy': Input should be 'sft' or 'champion'"),
        ("retrain.min_votes", 0, "retrain.min_votes = 0: Input should be greater than 0"),
        ("retrain.license", " ", "retrain.license = ' ': String should match pattern"),
        ("retrain.agreement_share", 1.5, "retrain.agreement_share = 1.5: Input should be less than"),
        ("run.seed", -1, "run.seed = -1: Input should be greater than or equal to 0"),
        ("collect.first", "best", "collect.first = 'best': String should match pattern"),
        ("collect.samples", 1, "collect.samples = 1: Input should be greater than or equal to 2"),
        (
            "collect.held_out_share",
            1.1,
            "collect.held_out_share = 1.1: Input should be less than or equal to 1",
        ),
        ("collect.votes_wanted", 301, r"collect.votes_wanted \(301\) must not exceed the 300 votes"),
        ("ppo.learning_rate", float("nan"), "ppo.learning_rate = nan: Input should be"),
        ("sft.num_epochs", "many", "sft.num_epochs = 'many': Input should be a valid integer"),
    ],
)
def test_fault_names_key_value_and_rule(tree, key, value, message):
    change(tree, key, value)
    with pytest.raises(InputError, match=message):
        parse_params(tree, "params.yaml")


def test_where_policies_disagree_there_must_be_two(tree):
    tree["collect"] |= {"choose": "disagreement", "first": "candidate"}
    with pytest.raises(InputError, match=r"collect.choose \(disagreement\) needs two policies"):
        parse_params(tree, "params.yaml")
    tree["collect"]["first"] = 7
    assert parse_params(tree, "params.yaml").collect.first == "7"


def test_what_is_held_out_leaves_something_to_choose(tree):
    tree["collect"] |= {"num_prompts": 2, "held_out_share": 0.8}  # round(1.6) = 2
    assert parse_params(tree, "params.yaml").collect.num_held_in == 0  # to measure alone is a collection too
    for choose in ("uncertain", "disagreement"):
        tree["collect"]["choose"] = choose
        with pytest.raises(
            InputError, match=rf"held_out_share \(0.8\) leaves none of collect.num_prompts \(2\) .*{choose}"
        ):
            parse_params(tree, "params.yaml")
    tree["collect"]["num_prompts"] = 3
    assert parse_params(tree, "params.yaml").collect.num_held_in == 1


def test_votes_that_would_all_weigh_nothing_are_refused(tree):
    tree["retrain"] |= {"new_weight": 0.0, "old_weight": 0.0}
    with pytest.raises(InputError, match=r"retrain.new_weight \(0.0\) and .* must not both be 0"):
        parse_params(tree, "params.yaml")
    tree["retrain"]["labels"] = "ai"
    assert parse_params(tree, "params.yaml").retrain.labels == "ai"


def test_unknown_and_missing_keys_are_refused(tree):
    tree["ppo"]["kl_cof"] = tree["ppo"].pop("kl_coef")
    with pytest.raises(InputError) as error:
        parse_params(tree, "params.yaml")
    assert "ppo.kl_cof: unknown key; did you mean ppo.kl_coef?" in str(error.value)
    assert "ppo.kl_coef: missing" in str(error.value)
    assert "2 fault(s)" in str(error.value)


def test_params_are_frozen(params):
    with pytest.raises(ValidationError):
        params.ppo.kl_coef = 1.0


def test_overrides_change_the_file_and_keep_its_comments(file):
    before = file.read_text()
    params = change_params(
        file, parse_overrides(["ppo.kl_coef=1e-1", "data.prompts=[a.jsonl, b.csv]", "run.seed=7"])
    )
    assert params.ppo.kl_coef == 0.1
    assert params.data.prompts == ("a.jsonl", "b.csv")
    assert load_params(file) == params
    comments = [line.partition("#")[2] for line in before.splitlines()]
    assert [line.partition("#")[2] for line in file.read_text().splitlines()] == comments


def test_refused_override_leaves_the_file_as_it_was(file):
    before = file.read_text()
    with pytest.raises(InputError, match="cliprange_low=3"):
        change_params(file, {"ppo.cliprange_low": 3})
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo.kl_cof=1", "unknown key ppo.kl_cof; did you mean ppo.kl_coef"),
        ("ppo.kl_coef", "must have the form section.key=value"),
        ("ppo.kl_coef=[", "is not a YAML value"),
    ],
)
def test_bad_override_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_overrides([text])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must hold sections, found list"),
        ("", "must hold sections, found NoneType"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_params(path)
    assert str(path) in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"params.yaml: no such file"):
        load_params(tmp_path / "params.yaml")


def test_the_default_profile_takes_back_what_the_others_set_and_is_what_is_shipped(root, tree):
    default, smoke, simulate = (profile_values(name, root) for name in ("default", "smoke", "simulate"))
    assert set(default) == set(smoke) | set(simulate)
    for key, value in default.items():
        node = tree
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    with pytest.raises(InputError, match="there are: default, simulate, smoke"):
        profile_values("big", root)


def test_profiles_are_valid(root, file):
    params = change_params(file, profile_values("smoke", root))
    assert params.model.source == "scratch"
    assert change_params(file, profile_values("default", root)) == load_params(root / "params.yaml")


def test_every_key_of_params_yaml_has_a_comment(root):
    lines = (root / "params.yaml").read_text().splitlines()
    near = "\n".join(lines)
    for key in known_keys():
        leaf = key.split(".")[-1]
        at = [i for i, line in enumerate(lines) if line.strip().startswith(f"{leaf}:")]
        assert any("#" in lines[i] or "#" in lines[i - 1] for i in at), key
    assert yaml.safe_load(near).keys() == {key.split(".")[0] for key in known_keys()}
