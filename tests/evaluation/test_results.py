import math

import pytest

from rlhf_core.evaluation.results import ModelResult, flat_metrics, rounded, sample_rows, summarise
from rlhf_core.generation import Generation


def answer(text, tokens, finished=True):
    return Generation(text=text, token_ids=tuple(range(tokens)), finished=finished)


@pytest.fixture
def models():
    return {
        "base": ModelResult([answer("a b", 3), answer("a b", 5)], [0.0, 0.2], [-1.0, 0.0], [-3.0, -5.0]),
        "sft": ModelResult([answer("c d", 2), answer("e f", 4, False)], [0.1, 0.5], [0.0, 0.0], [-6.0, -6.0]),
        "policy": ModelResult([answer("g", 4), answer("g", 4)], [0.4, 0.5], [1.0, 2.0], [-4.0, -12.0]),
    }


@pytest.fixture
def tree(models, params):
    return summarise(models, [1.0, 3.0], params.evaluate, kl_budget=12.0, seed=0)


def test_comparison_by_hand(tree):
    found = tree["comparison"]
    assert found["win_rate_over_sft"]["estimate"] == 0.75  # a win and a tie
    assert found["gold_gain_over_sft"]["estimate"] == pytest.approx(0.15)
    assert found["gold_gain_over_base"]["estimate"] == pytest.approx(0.35)
    assert found["proxy_gain_over_sft"]["estimate"] == 1.5
    assert found["kl"]["estimate"] == 2.0
    assert (found["kl"]["low"], found["kl"]["high"]) == (1.0, 3.0)


def test_models_by_hand(tree):
    models = tree["models"]
    assert models["sft"]["gold"]["estimate"] == pytest.approx(0.3)
    assert models["sft"]["length"]["estimate"] == 3.0
    assert models["sft"]["eos_rate"] == 0.5
    assert models["base"]["distinct_1"] == 0.5  # a b a b
    assert models["policy"]["base_perplexity"] == pytest.approx(math.exp(16 / 8))


def test_flat_metrics_name_every_number(tree):
    metrics = flat_metrics(tree)
    assert metrics["eval/num_prompts"] == 2
    assert metrics["eval/kl_budget"] == 12.0
    assert metrics["eval/win_rate_over_sft"] == 0.75
    assert metrics["eval/win_rate_over_sft_low"] == tree["comparison"]["win_rate_over_sft"]["low"]
    assert metrics["eval/gold_policy"] == pytest.approx(0.45)
    assert metrics["eval/gold_policy_high"] == 0.5
    assert metrics["eval/eos_rate_sft"] == 0.5
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_sample_rows_keep_the_order(models):
    prompts = [{"prompt": "p", "source": "s", "row": 7}, {"prompt": "q", "source": "s", "row": 2}]
    rows = sample_rows(prompts, models, [1.0, 3.0])
    assert [row["prompt"] for row in rows] == ["p", "q"]
    assert rows[1]["sft"] == "e f"
    assert rows[1]["gold_base"] == 0.2
    assert rows[0]["length_policy"] == 4
    assert rows[1]["kl"] == 3.0


def test_rounded_keeps_six_digits():
    tree = {"a": [1 / 3, 12345.678], "b": math.nan, "c": 7, "d": "text"}
    assert rounded(tree) == {"a": [0.333333, 12345.7], "b": None, "c": 7, "d": "text"}
