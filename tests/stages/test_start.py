"""PPO that starts where an earlier run's policy ended: what is taken over, and what KL is measured from."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch

from rlhf_core.config import parse_params
from rlhf_core.errors import InputError
from rlhf_core.modeling.loading import load_policy
from rlhf_core.stages.ppo import open_actors
from rlhf_core.stages.runner import run_stage


def with_values(params, **sections):
    tree = params.model_dump(mode="json", by_alias=True)
    for name, values in sections.items():
        tree[name] |= values
    return parse_params(tree, "test")


@pytest.fixture(params=["lora", "full"])
def continued(request, workspace, small_params):
    """A workspace whose champion is the policy of a first run, and parameters that start there."""
    first = with_values(small_params, model={"finetuning": request.param}, ppo={"num_updates": 2})
    run_stage("reward", first, workspace)
    run_stage("ppo", first, workspace)
    shutil.copytree(workspace.model("policy"), workspace.model("champion"))
    return workspace, with_values(first, ppo={"start": "champion", "num_updates": 1})


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits.float()


def test_actor_starts_as_the_champion_and_the_reference_stays_sft(continued):
    workspace, params = continued
    actors = open_actors(params, workspace)
    ids = torch.arange(5, 25)[None]
    for role, name in (("policy", "champion"), ("reference", "sft")):
        expected = logits_of(load_policy(workspace.model(name), params.run)[0], ids)
        with actors.roles.using(role) as model:
            # The champion was saved with its adapter merged in float32, which rounds once.
            torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    far = logits_of(load_policy(workspace.model("champion"), params.run)[0], ids)
    near = logits_of(load_policy(workspace.model("sft"), params.run)[0], ids)
    assert (far - near).abs().max() > 1e-2, "the champion has moved, so the test above can tell"


def test_kl_of_the_first_rollout_is_the_whole_way_from_sft(continued):
    workspace, params = continued

    def first_rollout():
        with workspace.history("ppo").open() as file:
            return next(csv.DictReader(file))

    from_sft = with_values(params, ppo={"start": "sft"})
    run_stage("ppo", from_sft, workspace)
    assert float(first_rollout()["objective/kl"]) == pytest.approx(0.0, abs=1e-4)
    run_stage("ppo", params, workspace)
    assert abs(float(first_rollout()["objective/kl"])) > 1e-3


def test_adapter_of_another_shape_is_refused(workspace, small_params):
    run_stage("reward", small_params, workspace)
    run_stage("ppo", with_values(small_params, ppo={"num_updates": 1}), workspace)
    shutil.copytree(workspace.model("policy"), workspace.model("champion"))
    other = with_values(small_params, ppo={"start": "champion"}, model={"lora": {"rank": 8, "alpha": 32.0}})
    with pytest.raises(InputError, match=r"champion: its adapter has rank 16 and alpha 32; .*rank 8"):
        open_actors(other, workspace)
    shutil.rmtree(workspace.model("champion") / "adapter")
    with pytest.raises(InputError, match=r"champion: has no adapter"):
        open_actors(with_values(small_params, ppo={"start": "champion"}), workspace)
