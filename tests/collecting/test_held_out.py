"""Held-out prompts are asked too: votes on them measure the reward model, and teach nothing."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback import accounts, assignment
from feedback.gathering import gather
from feedback.history import last_event, votes_at
from feedback.records import Choice
from feedback.watching import close_collection, find_collection
from rlhf_core.collecting import answers as answering
from rlhf_core.collecting.answers import Spec
from rlhf_core.config import change_params, parse_params, read_yaml
from rlhf_core.data.rows import SPLITS, read_rows
from rlhf_core.data.split import split_of
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.stages import preferences, prepare
from rlhf_core.tracking import SilentTracker
from tasks import asking, collecting, retraining, watching

from .registered import make_workspace, register
from .reward_models import make_reward_model

SIDES = ("train", "eval")


@pytest.fixture(scope="module")
def made(root, tiny_model_dir, tmp_path_factory):
    """A workspace with one version, and twelve prompts on each side of its split."""
    base = tmp_path_factory.mktemp("held-out")
    reward = make_reward_model(tiny_model_dir, base / "reward")
    tags = make_workspace(base / "home", root, tiny_model_dir, reward, count=12)
    register(base / "home", tags, tiny_model_dir, "candidate", "champion")
    return base / "home"


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", asking.DATABASE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "home"
    shutil.copytree(made, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setattr(collecting, "_run_answers", answer_here)
    monkeypatch.setattr(answering, "_all_answers", two_answers())
    return place


def answer_here(root, plan, on_line):
    """What the process of its own does, without the time that it takes to start."""
    place = plan.place(root)
    answering.answer(Spec.load(place / "spec.json"), place / "answers")


def two_answers(alike=()):
    """Stands for both policies: two answers to each prompt, which are the same at the places `alike`."""

    def answers(spec, conversations):
        return [
            [
                {"text": f"this is answer {0 if place in alike else side}", "policy": label, "decoding": {}}
                for side, label in enumerate(spec.labels)
            ]
            for place in range(len(conversations))
        ]

    return answers


def ask(home, said=None, **values):
    """The prompts of a collection, how many of them are on each side, and what the log says of it."""
    params = change_params(home / "params.yaml", {f"collect.{name}": value for name, value in values.items()})
    name = collecting.collect(home, params, [].append if said is None else said.append)
    with asking.open_store(home) as store:
        prompts = [item.prompt for item in gather(store, name).items]
        about = find_collection(store, name).about
        close_collection(store, "manager", name)
    sides = [split_of(prompt, params.data.eval_fraction) for prompt in prompts]
    return prompts, tuple(map(sides.count, SIDES)), about


@given(st.integers(1, 500), st.floats(0.0, 1.0))
def test_both_sides_are_the_collection_and_the_share_is_as_near_as_whole_prompts_are(root, count, share):
    tree = read_yaml(root / "params.yaml")
    tree["collect"] |= {"num_prompts": count, "held_out_share": share}
    config = parse_params(tree, "test").collect
    assert config.num_held_in + config.num_held_out == count
    assert 0 <= config.num_held_out <= count
    assert abs(config.num_held_out - share * count) <= 0.5
    for side, (asked, answered) in collecting.sizes(config).items():
        assert asked == (config.num_held_in if side == "train" else config.num_held_out)
        assert asked <= answered <= asked * 1.1 + 1
        assert (answered > asked) == (asked > 0)


def test_scores_choose_among_more_prompts_of_the_training_side_alone(root):
    tree = read_yaml(root / "params.yaml")
    for oversample, answered in ((3.0, 240), (1.0, 88)):
        tree["collect"] |= {"num_prompts": 100, "held_out_share": 0.2, "choose": "uncertain"}
        tree["collect"]["oversample"] = oversample
        found = collecting.sizes(parse_params(tree, "test").collect)
        assert found == {"train": (80, answered), "eval": (20, 22)}


def test_a_share_is_held_out_until_there_are_too_few_and_none_is_asked_twice(home):
    said: list[str] = []
    first, sides, about = ask(home, said, num_prompts=10, held_out_share=0.3)
    assert sides == (7, 3)
    assert (about["wanted"], about["items"], about["held_out"]) == (10, 10, 3)
    assert said[-1].endswith("7 to learn from, drawn at random; 3 held out, drawn at random")
    assert not any("are there to ask" in line for line in said)

    second, sides, about = ask(home, said, num_prompts=12, held_out_share=0.9)  # 11 of 12 - 3 that are left
    assert sides == (1, 9)
    assert (about["wanted"], about["items"], about["held_out"]) == (12, 10, 9)
    assert "9 held-out prompts are there to ask, and 11 are wanted" in said
    assert not set(first) & set(second)

    third, sides, about = ask(home, said, num_prompts=6, held_out_share=0.5)  # training prompts are left
    assert (sides, about["held_out"]) == ((3, 0), 0)
    assert "0 held-out prompts are there to ask, and 3 are wanted" in said
    with pytest.raises(InputError, match=r"none of 24 prompts may be asked; collect.ask_again"):
        ask(home, num_prompts=6, held_out_share=1.0)
    assert not set(third) & {*first, *second}


def test_without_a_share_nothing_of_the_other_side_is_asked_or_read(home):
    said: list[str] = []
    _, sides, about = ask(home, said, num_prompts=12, held_out_share=0.0)
    assert (sides, about["held_out"]) == ((12, 0), 0)
    assert not any("held out:" in line for line in said)


def test_what_was_left_out_is_said_and_kept(home, monkeypatch):
    """Four are answered for three that are asked of one side, and two for one of the other."""
    said: list[str] = []
    monkeypatch.setattr(answering, "_all_answers", two_answers(alike=(1, 4)))
    _, sides, about = ask(home, said, num_prompts=4, held_out_share=0.25)
    assert sides == (3, 1), "there were enough to spare"
    assert about["left_out"] == {"all answers the same": 2}

    monkeypatch.setattr(answering, "_all_answers", two_answers(alike=(1, 2, 4, 5)))
    _, sides, about = ask(home, said, num_prompts=4, held_out_share=0.25)
    assert sides == (2, 0)
    assert (about["wanted"], about["items"], about["held_out"]) == (4, 2, 0)
    assert about["left_out"] == {"all answers the same": 4}
    assert "left out: 4 x all answers the same" in said
    assert "2 of 4 prompts are asked: 2 to learn from" in said[-1]


def test_the_artifact_says_how_many_of_each_and_knows_older_collections():
    about = {"how": "least gap", "wanted": 8, "items": 7, "held_out": 2, "left_out": {"asked before": 1}}
    assert watching.asked(about) == [
        ("asked", "7 of 8 prompts"),
        ("to learn from", "5, least gap"),
        ("held out, to measure by", "2, drawn at random"),
        ("answered and left out", "1 x asked before"),
    ]
    assert watching.asked({"items": 50, "how": "drawn at random"}) == [
        ("asked", "50 prompts, drawn at random")
    ]
    assert watching.asked({}) == [("asked", "? prompts, ")]


def test_a_retraining_is_measured_on_peoples_pairs_alone_and_learns_none_of_them(home):
    """From the collection over votes, data set and `prepare` to the files that the reward stage reads."""
    prompts, sides, _ = ask(home, num_prompts=10, held_out_share=0.4)
    assert sides == (6, 4)
    with asking.open_store(home) as store:
        (project,) = {one.id for one in watching.list_collections(store)}
        ann, _ = accounts.add_annotator(store, "system", "ann")
        while shown := assignment.next_item(store, ann, project):
            vote = Choice(choice="a", strength=1)
            assignment.cast_vote(store, ann, shown.item.id, f"vote-{shown.item.id}", vote, 2.0)
        votes = votes_at(store, last_event(store), 0)
    assert votes.num_votes == 10

    params = change_params(home / "params.yaml", {"retrain.min_held_out": 5, "retrain.labels": "human"})
    data = retraining.build(home, params, votes)
    data.write(home / retraining.FEEDBACK)
    assert "preferences.num_eval_prompts" not in retraining.values_for(params, home, data.manifest, None)
    params = change_params(home / "params.yaml", {"retrain.min_held_out": 4})
    values = retraining.values_for(params, home, data.manifest, None)
    assert values["preferences.num_eval_prompts"] == 0

    params, layout = change_params(home / "params.yaml", values), Layout(home)
    for stage in (prepare, preferences):
        stage.run(params, layout, SilentTracker("test", layout.run_dir("test")))
    for side, count in zip(SPLITS, sides, strict=True):
        rows = read_rows(layout.preferences / f"{side}.parquet")
        assert len(rows) == count
        assert all(row["source"].startswith("human:") for row in rows)
        assert {row["prompt"] for row in rows} == {
            prompt for prompt in prompts if split_of(prompt, params.data.eval_fraction) == side
        }
    for kind in ("prompts", "demonstrations"):  # what PPO and SFT learn from
        learnt = {row["prompt"] for row in read_rows(layout.prepared_file(kind, "train"))}
        assert all(split_of(prompt, params.data.eval_fraction) == "train" for prompt in learnt)
