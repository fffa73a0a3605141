import pytest

from rlhf_core.rl.alarms import alarms

WELL = {
    "objective/kl": 2.0,
    "objective/entropy": 1.5,
    "rollout/response_length": 20.0,
    "rollout/eos_rate": 0.8,
    "rollout/logprob_gap": 0.02,
    "value/explained_variance": 0.1,
}


def test_a_run_that_goes_well_raises_none():
    assert alarms([WELL] * 8, kl_budget=12.0) == {}


@pytest.mark.parametrize(
    ("change", "name", "remedy"),
    [
        ({"objective/kl": 9.1}, "kl_runs_away", "raise ppo.kl_coef"),
        ({"objective/kl": -1.1}, "kl_negative", "not sampled from the distribution"),
        ({"rollout/response_length": 41.0}, "length_runs_away", "ppo.length_penalty"),
        ({"rollout/eos_rate": 0.39}, "answers_do_not_end", "ppo.missing_eos_penalty"),
        ({"rollout/logprob_gap": 0.3}, "rollout_differs", "run.precision"),
        ({"objective/entropy": 0.4}, "entropy_collapses", "ppo.entropy_coef"),
    ],
)
def test_each_fault_has_its_alarm_and_remedy(change, name, remedy):
    found = alarms([WELL, WELL, WELL | change], kl_budget=12.0)
    assert list(found) == [name]
    assert remedy in found[name]


def test_a_critic_is_dead_only_after_some_updates_below_zero():
    dead = WELL | {"value/explained_variance": -0.2}
    assert alarms([dead] * 4, 12.0) == {}
    assert list(alarms([WELL] + [dead] * 4, 12.0)) == ["dead_critic"]
    assert alarms([dead] * 4 + [WELL], 12.0) == {}


def test_without_a_critic_there_is_none_to_be_dead():
    without = {name: value for name, value in WELL.items() if not name.startswith("value/")}
    assert alarms([without] * 8, 12.0) == {}
