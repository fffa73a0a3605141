"""Tiny policies answer, in this process and in one of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from rlhf_core.collecting import answers as answering
from rlhf_core.collecting.answers import ANSWERS, Spec, answer, read_answers
from rlhf_core.config import parse_params, read_yaml
from rlhf_core.errors import InputError

from .reward_models import make_reward_model

LABELS = ("rlhf-policy/1", "rlhf-policy/2")


def write_prompts(path, count=12, held_out=0):
    """The last `held_out` of them are so."""
    rows = [f"how are you on day {i}?" for i in range(count)]
    lines = [
        json.dumps(
            {
                "prompt": text,
                "messages": [{"role": "user", "content": text}],
                "source": "test",
                "held_out": i >= count - held_out,
            }
        )
        for i, text in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def day(prompt):
    return int(prompt.removeprefix("how are you on day ").removesuffix("?"))


@pytest.fixture(scope="module")
def other_model_dir(tiny_model_dir, tmp_path_factory):
    """A policy that says other things."""
    from rlhf_core.config import RunConfig
    from rlhf_core.modeling.loading import load_policy

    directory = tmp_path_factory.mktemp("other") / "policy"
    shutil.copytree(tiny_model_dir, directory)
    model, _ = load_policy(tiny_model_dir, RunConfig.alone())
    model.get_input_embeddings().weight.data.mul_(-1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def spec(root, tmp_path, tiny_model_dir, other_model_dir):
    return make_spec(root, tmp_path, tiny_model_dir, other_model_dir)


def make_spec(root, tmp_path, first, second, reward=None, held_out=0, **collect):
    tree = read_yaml(root / "params.yaml")
    tree["run"] |= {"device": "cpu", "precision": "float32"}
    tree["collect"] |= {"num_prompts": 5, "held_out_share": 0.0} | collect
    tree["collect"]["sampling"] |= {"max_new_tokens": 8, "temperature": 1.0}
    params = parse_params(tree, "test")
    prompts = write_prompts(tmp_path / "prompts.jsonl", held_out=held_out)
    return Spec(first, second, reward, prompts, LABELS, 5, "collect-x", params)


def test_each_policy_answers_and_a_repetition_is_the_same_bytes(spec, tmp_path):
    answer(spec, tmp_path / "one")
    rows, facts = read_answers(tmp_path / "one")
    assert len(rows) == 5
    assert facts["num_answered"] == 12
    for row in rows:
        assert sorted(response["policy"] for response in row["responses"]) == list(LABELS)
        assert {r["policy"]: r["decoding"]["seed"] for r in row["responses"]} == dict(zip(LABELS, (10, 11)))
    firsts = [row["responses"][0]["policy"] for row in rows]
    assert set(firsts) == set(LABELS)  # neither policy always stands first
    answer(spec, tmp_path / "two")
    assert (tmp_path / "one" / ANSWERS).read_bytes() == (tmp_path / "two" / ANSWERS).read_bytes()


def test_a_policy_alone_gives_all_answers_and_they_differ(root, tmp_path, tiny_model_dir):
    alone = make_spec(root, tmp_path, tiny_model_dir, None, samples=3)
    answer(alone, tmp_path / "out")
    rows, _ = read_answers(tmp_path / "out")
    for row in rows:
        assert {response["policy"] for response in row["responses"]} == {LABELS[0]}
        assert sorted(response["decoding"]["sample"] for response in row["responses"]) == [0, 1, 2]
        assert len({response["text"] for response in row["responses"]}) > 1


def test_policies_that_are_alike_give_different_answers_where_a_choice_is_drawn(
    root, tmp_path, tiny_model_dir
):
    answer(make_spec(root, tmp_path, tiny_model_dir, tiny_model_dir), tmp_path / "out")
    assert len(read_answers(tmp_path / "out")[0]) == 5


def test_of_an_odd_number_the_first_policy_gives_one_more(root, tmp_path, tiny_model_dir, other_model_dir):
    spec = make_spec(root, tmp_path, tiny_model_dir, other_model_dir, samples=3, num_prompts=2)
    answer(spec, tmp_path / "out")
    for row in read_answers(tmp_path / "out")[0]:
        assert sorted(response["policy"] for response in row["responses"]) == [LABELS[0], *LABELS]


def test_prompts_whose_answers_are_the_same_are_not_asked(root, tmp_path, tiny_model_dir):
    # The same weights, and the same random numbers where disagreement is sought.
    spec = make_spec(root, tmp_path, tiny_model_dir, tiny_model_dir, choose="disagreement")
    with pytest.raises(InputError, match="all 12 prompts have answers that are the same"):
        answer(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("members", [1, 2])
def test_choice_by_the_reward_model_is_that_of_its_scores(
    root, tmp_path, tiny_model_dir, other_model_dir, members
):
    """The prompts chosen are those that a slow definition puts first, on scores that are asked one by one."""
    from rlhf_core.modeling.reward import load_reward_model

    reward = make_reward_model(tiny_model_dir, tmp_path / "reward", members)
    spec = make_spec(
        root, tmp_path, tiny_model_dir, other_model_dir, reward, choose="uncertain", num_prompts=4
    )
    answer(spec, tmp_path / "out")
    rows, facts = read_answers(tmp_path / "out")
    assert ("variance" in facts["how"]) == (members == 2)

    every = make_spec(root, tmp_path, tiny_model_dir, other_model_dir, num_prompts=12)
    answer(every, tmp_path / "all")
    scorer = load_reward_model(reward, spec.params.run)
    doubt = {}
    for row in read_answers(tmp_path / "all")[0]:
        texts = [response["text"] for response in row["responses"]]
        a, b = (scorer.member_scores([row["messages"]], [text])[:, 0].tolist() for text in texts)
        gaps = [x - y for x, y in zip(a, b)]
        mean = sum(gaps) / members
        spread = sum((gap - mean) ** 2 for gap in gaps) / members
        doubt[row["prompt"]] = spread if members > 1 else -abs(mean)
    wanted = sorted(doubt, key=lambda prompt: -doubt[prompt])[:4]
    assert {row["prompt"] for row in rows} == set(wanted)

    # Of twelve prompts the last six are held out: the doubt chooses among the others alone, and of those
    # the first ones are taken, whatever the doubt.
    share = make_spec(
        root,
        tmp_path,
        tiny_model_dir,
        other_model_dir,
        reward,
        held_out=6,
        choose="uncertain",
        num_prompts=4,
        held_out_share=0.5,
    )
    answer(share, tmp_path / "share")
    rows = read_answers(tmp_path / "share")[0]
    by_doubt = [day(prompt) for prompt in sorted(doubt, key=lambda prompt: -doubt[prompt])]
    asked = {side: {day(row["prompt"]) for row in rows if row["held_out"] is side} for side in (True, False)}
    assert asked[False] == set([i for i in by_doubt if i < 6][:2])
    assert asked[True] == {6, 7}
    assert set([i for i in by_doubt if i >= 6][:2]) != {6, 7}, "else the test shows nothing"


def test_prompts_to_spare_take_the_place_of_those_with_one_answer(
    root, tmp_path, tiny_model_dir, other_model_dir, monkeypatch
):
    """By hand: of six on each side the second and the third have one answer only; three are asked."""
    spec = make_spec(
        root, tmp_path, tiny_model_dir, other_model_dir, held_out=6, num_prompts=6, held_out_share=0.5
    )
    real = answering._all_answers

    def some_alike(*arguments):
        return [
            [r | {"text": "the same" if place in (1, 2, 7, 8) else f"answer {i}"} for i, r in enumerate(own)]
            for place, own in enumerate(real(*arguments))
        ]

    monkeypatch.setattr(answering, "_all_answers", some_alike)
    answer(spec, tmp_path / "out")
    rows, facts = read_answers(tmp_path / "out")
    days = {
        side: sorted(day(row["prompt"]) for row in rows if row["held_out"] is side) for side in (True, False)
    }
    assert days == {False: [0, 3, 4], True: [6, 9, 10]}
    assert (facts["num_answered"], facts["num_same"]) == (12, 4)


def test_a_spec_survives_its_file(spec, tmp_path):
    spec.save(tmp_path / "spec.json")
    assert Spec.load(tmp_path / "spec.json") == spec


def test_a_missing_model_is_told_before_anything_is_made(spec, tmp_path, root):
    broken = make_spec(root, tmp_path, tmp_path / "gone", None)
    broken.save(tmp_path / "spec.json")
    done = subprocess.run(
        [sys.executable, "-m", answering.__name__, tmp_path / "spec.json", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == InputError.exit_code
    assert "gone: no such model directory" in done.stderr
    assert not (tmp_path / "out").exists()
