"""What the reward model learns from beside sure pairs, and ensembles of it."""

from __future__ import annotations

import csv

import pytest
import torch

from rlhf_core import training
from rlhf_core.data.rows import read_rows, write_rows
from rlhf_core.errors import InputError
from rlhf_core.modeling.pairs import Pair, RatingScales
from rlhf_core.modeling.reward import ScalarHead, load_reward_model, member_directories, member_role
from rlhf_core.modeling.roles import open_roles
from rlhf_core.stages.ppo import open_actors
from rlhf_core.stages.reward import PairwiseTask, rankings
from rlhf_core.stages.runner import run_stage

from .toy import BAD, GOOD, assert_same_outputs, make_workspace, run_broken_off

CHATS = [[{"role": "user", "content": "how are you on day 99?"}]] * 2


def changed(params, **sections):
    return params.model_copy(
        update={name: getattr(params, name).model_copy(update=values) for name, values in sections.items()}
    )


def relabel(layout, **values):
    """Give every pair of a workspace the same further values."""
    for split in ("train", "eval"):
        file = layout.preferences / f"{split}.parquet"
        write_rows(file, [row | values for row in read_rows(file)], "preferences")


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_members_are_whole_reward_models_that_differ(workspace, small_params, finetuning):
    params = changed(small_params, reward={"ensemble_size": 3}, model={"finetuning": finetuning})
    metrics = run_stage("reward", params, workspace)
    directories = member_directories(workspace.model("reward"))
    assert len(directories) == 3
    together = load_reward_model(workspace.model("reward"), params.run).member_scores(CHATS, [GOOD, BAD])
    assert together.shape == (3, 2)
    for i, directory in enumerate(directories[1:], start=1):
        alone = load_reward_model(directory, params.run).member_scores(CHATS, [GOOD, BAD])
        assert torch.equal(alone[0], together[i])
    assert len({tuple(own) for own in together.tolist()}) == 3
    assert all((own[0] > own[1]) for own in together)
    assert {f"reward/accuracy_member_{i}" for i in range(3)} <= set(metrics)


def test_ppo_scores_with_every_member_and_prices_their_doubt(workspace, small_params):
    params = changed(small_params, reward={"ensemble_size": 2}, ppo={"ensemble": "worst"})
    run_stage("reward", params, workspace)
    saved = load_reward_model(workspace.model("reward"), params.run)
    scorer = open_actors(params, workspace).scorer
    torch.testing.assert_close(
        scorer.member_scores(CHATS, [GOOD, BAD]),
        saved.member_scores(CHATS, [GOOD, BAD]),
        rtol=1e-4,
        atol=1e-4,
    )
    run_stage("ppo", params, workspace)
    rows = list(csv.DictReader(workspace.history("ppo").open()))
    doubts = [float(row["reward_part/disagreement"]) for row in rows]
    assert max(doubts) < 0.0


def test_loss_and_gradient_of_an_ensemble_are_means_of_the_members(small_params, tiny_model_dir):
    names = [member_role(i) for i in range(2)]
    roles = open_roles(small_params, tiny_model_dir, trained=names, seed=0)
    with roles.using(names[0]) as model:
        heads = [ScalarHead(model.config.hidden_size, seed) for seed in range(2)]
    rows = rankings([Pair([5, 6], [7, 2], [8, 9, 2], 0.0, "a", "ai:unit")])
    loss, stats = PairwiseTask(roles, heads, [], small_params.reward).loss(rows)
    loss.backward()
    gradients = [head.weight.grad.clone() for head in heads]
    first, _ = PairwiseTask(roles, heads[:1], [], small_params.reward).loss(rows)
    heads[0].weight.grad = None
    first.backward()
    torch.testing.assert_close(gradients[0], heads[0].weight.grad / 2)
    assert 0.0 <= stats["train/accuracy"] <= 1.0
    assert loss.item() != pytest.approx(first.item())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_broken_off_ensemble_ends_with_the_same_members(
    workspace, tmp_path, tiny_model_dir, small_params, monkeypatch
):
    params = changed(small_params, reward={"ensemble_size": 2})
    whole, broken = workspace, make_workspace(tmp_path / "broken", tiny_model_dir)
    run_stage("reward", params, whole)
    run_broken_off(monkeypatch, training, "train_step", 3, lambda: run_stage("reward", params, broken))
    run_stage("reward", params, broken)
    assert_same_outputs(whole, broken, "reward", "reward")
    scores = [
        load_reward_model(one.model("reward"), params.run).member_scores(CHATS, [GOOD, BAD])
        for one in (whole, broken)
    ]
    assert torch.equal(*scores)


def test_ties_leave_both_answers_alike_and_do_not_count_as_right_or_wrong(workspace, small_params):
    sure = run_stage("reward", small_params, workspace)
    relabel(workspace, probability=0.5)
    tied = run_stage("reward", small_params, workspace)
    assert tied["reward/num_train_ties"] == tied["reward/num_train_pairs"] == 32
    assert abs(tied["reward/margin"]) < 0.1 * sure["reward/margin"]
    rows = read_rows(workspace.preferences / "eval.parquet")
    rows[0]["probability"] = 1.0
    write_rows(workspace.preferences / "eval.parquet", rows, "preferences")
    metrics = run_stage("reward", small_params, workspace)
    assert (metrics["reward/num_eval_pairs"], metrics["reward/num_eval_ties"]) == (1, len(rows) - 1)


def test_ratings_are_regressed_to(workspace, small_params):
    params = changed(small_params, reward={"objective": "rating"})
    relabel(workspace, chosen_score=9.0, rejected_score=5.0)
    metrics = run_stage("reward", params, workspace)
    assert metrics["reward/accuracy"] == 1.0
    assert metrics["reward/num_unrated"] == 0
    # Ratings of one source have mean 0 and deviation 1 after scaling: the answers are 2 apart.
    assert metrics["reward/margin"] == pytest.approx(2.0, abs=0.4)
    with workspace.history("reward").open() as file:
        errors = [float(row["train/rating_error"]) for row in csv.DictReader(file)]
    assert errors[-1] < errors[0]


def test_regression_without_ratings_is_refused(workspace, small_params):
    params = changed(small_params, reward={"objective": "rating"})
    with pytest.raises(InputError, match=r"train\.parquet: no pair has ratings of both answers"):
        run_stage("reward", params, workspace)


def test_each_source_has_its_own_scale_of_ratings():
    def pair(source, ratings):
        return Pair([1], [2], [3], 0.0, "a", source, ratings=ratings)

    rows = [
        pair("human:a", (5.0, 1.0)),
        pair("ai:b", (0.5, -0.5)),
        pair("human:c", None),
    ]
    scales = RatingScales.of(rows)
    assert [row.ratings for row in scales.rated(rows)] == [(1.0, -1.0), (1.0, -1.0)]
    assert scales.rated([pair("ai:unseen", (1.0, 0.0))]) == []
