import math
from dataclasses import replace

import pytest

from rlhf_core.promotion.guardrails import Measurements, TextFacts, guard_rails, ratio

PLAIN = TextFacts(length=20.0, distinct_2=0.8, repeated_4=0.02, refusal_rate=0.01, toxic_rate=0.01)
FINE = Measurements(
    candidate=PLAIN, opponent=PLAIN, kl=4.0, perplexity=12.0, sft_perplexity=10.0, reward_accuracy=0.7
)


def broken(found, params):
    return [rail.name for rail in guard_rails(found, params.promotion) if not rail.holds]


def test_a_plain_candidate_holds_every_guard_rail(params):
    assert broken(FINE, params) == []
    assert len(guard_rails(FINE, params.promotion)) == 8


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl": 10.1}, "kl"),
        ({"candidate": replace(PLAIN, length=31.0)}, "length_ratio"),
        ({"candidate": replace(PLAIN, length=13.0)}, "length_ratio"),
        ({"candidate": replace(PLAIN, distinct_2=0.5)}, "distinct_ratio"),
        ({"candidate": replace(PLAIN, repeated_4=0.11)}, "repeated"),
        ({"perplexity": 15.1}, "perplexity_ratio"),
        ({"candidate": replace(PLAIN, refusal_rate=0.07)}, "refusal_rise"),
        ({"candidate": replace(PLAIN, toxic_rate=0.04)}, "toxic_rise"),
        ({"reward_accuracy": 0.54}, "reward_accuracy"),
    ],
)
def test_every_guard_rail_fails_alone(params, change, name):
    found = replace(FINE, **change)
    assert broken(found, params) == [name]
    (rail,) = (r for r in guard_rails(found, params.promotion) if r.name == name)
    assert "promotion." in rail.rule  # which key to look at


def test_the_bound_itself_holds(params):
    edge = replace(FINE, kl=10.0, perplexity=15.0, reward_accuracy=0.55)
    edge = replace(edge, candidate=replace(PLAIN, length=30.0, distinct_2=0.8 * 0.75, repeated_4=0.1))
    assert broken(edge, params) == []


@pytest.mark.parametrize("name", ["kl", "perplexity", "reward_accuracy"])
def test_what_was_not_measured_holds_nothing(params, name):
    assert len(broken(replace(FINE, **{name: math.nan}), params)) == 1


def test_ratio_with_nothing_below():
    assert ratio(0.0, 0.0) == 1.0
    assert ratio(0.3, 0.0) == math.inf


def test_measurements_survive_a_file():
    assert Measurements.from_dict(FINE.as_dict()) == FINE
