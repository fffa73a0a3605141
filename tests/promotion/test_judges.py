import pytest

from rlhf_core.config import parse_params, read_yaml
from rlhf_core.errors import InputError
from rlhf_core.promotion.judges import FunctionJudge, ModelJudge, ScoreJudge, both_orders, make_judge


def length(prompts, responses):
    return [float(len(text)) for text in responses]


def test_scores_decide_the_same_in_both_orders_and_are_asked_for_once():
    asked = []

    def score(prompts, responses):
        asked.extend(zip(prompts, responses))
        return length(prompts, responses)

    judge = ScoreJudge(score)
    found = both_orders(judge, ["p", "q", "r"], ["long", "s", "same"], ["x", "longer", "even"])
    assert found == [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)]
    assert len(asked) == len(set(asked)) == 6


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A judge that likes the first place, unless an answer is much longer."""
    (tmp_path / "taste_for_first.py").write_text(
        "def prefer(prompts, first, second):\n"
        "    return [len(a) - len(b) + 2 for a, b in zip(first, second)]\n\n"
        "def short(prompts, first, second):\n    return [1.0]\n\n"
        "def broken(prompts, first, second):\n    return [float('nan')] * len(prompts)\n"
    )
    return tmp_path


def test_a_liking_for_the_first_place_cancels(target):
    judge = FunctionJudge("taste_for_first:prefer", target)
    found = both_orders(judge, ["p", "q"], ["abc", "abcdef"], ["abc", "a"])
    assert found == [(1.0, 0.0), (1.0, 1.0)]  # equal answers: half each; the better one wins in both


def test_a_function_that_answers_wrongly_is_refused(target):
    with pytest.raises(InputError, match="gave 1 preferences for 2 prompts"):
        FunctionJudge("taste_for_first:short", target).compare(["p", "q"], ["a", "b"], ["c", "d"])
    with pytest.raises(InputError, match="preference 0 is nan"):
        FunctionJudge("taste_for_first:broken", target).compare(["p"], ["a"], ["c"])


def test_a_local_model_judges_pairs_antisymmetrically_once_orders_are_averaged(tiny_model_dir, params):
    judge = ModelJudge(tiny_model_dir, params.run)
    prompts, ours, theirs = ["hello?", "sun?"], ["good", "i like rain"], ["bad day", "no"]
    there = both_orders(judge, prompts, ours, theirs)
    back = both_orders(judge, prompts, theirs, ours)
    assert [sum(pair) for pair in there] == [2 - sum(pair) for pair in back]
    assert all(outcome in (0.0, 0.5, 1.0) for pair in there for outcome in pair)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "reward_model", "judge_target": "x"}, "must be a version of the registered reward model"),
        ({"compare": "pairs"}, "needs promotion.judge judge or function, not vader"),
        ({"judge": "function"}, "promotion.judge_target must say which one"),
        ({"min_comparisons": 300}, r"promotion.min_comparisons \(300\) must not exceed"),
        ({"margin": -0.1}, "promotion.margin = -0.1"),
    ],
)
def test_judges_that_cannot_be_are_refused_with_the_params(root, changes, message):
    tree = read_yaml(root / "params.yaml")
    tree["promotion"] |= changes
    with pytest.raises(InputError, match=message):
        parse_params(tree, "test")


def test_the_default_judge_scores(params):
    judge = make_judge(params.promotion, params.run)
    assert judge.compare(["p"], ["this is great"], ["this is awful"]) == [1.0]
