"""Values worked by hand, and what must not change a choice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.collecting.choosing import (
    choose_disagreement,
    choose_drawn,
    choose_uncertain,
    mean_gap,
    member_variance,
    side_gap,
)


def test_member_variance_of_a_pair_by_hand():
    # Gaps by member: 1 - 0 = 1, 2 - 4 = -2, 0 - 2 = -2. Mean -1, squares 4, 1, 1: variance 6 / 3 = 2.
    assert member_variance([[1.0, 0.0], [2.0, 4.0], [0.0, 2.0]]) == pytest.approx(2.0)


def test_member_variance_of_three_answers_is_the_mean_over_pairs():
    # Two members. Gaps of answers 0-1: 1, 3 (variance 1); 0-2: 0, 4 (4); 1-2: -1, 1 (1). Mean 6 / 3 = 2.
    assert member_variance([[1.0, 0.0, 1.0], [5.0, 2.0, 1.0]]) == pytest.approx(2.0)


def test_gaps_by_hand():
    # One member, scores 0, 1, 4: gaps 1, 4, 3, mean 8 / 3.
    assert mean_gap([[0.0, 1.0, 4.0]]) == pytest.approx(8 / 3)
    # Two members, means 1 and 3.
    assert mean_gap([[0.0, 5.0], [2.0, 1.0]]) == pytest.approx(2.0)
    # Means by answer 2, 4, 9: first policy (2 + 4) / 2 = 3, second 9.
    assert side_gap([[1.0, 4.0, 9.0], [3.0, 4.0, 9.0]], [True, True, False]) == pytest.approx(6.0)


def test_an_ensemble_is_asked_for_its_variance_and_one_model_for_its_least_gap():
    # Members agree on the first prompt (a wide gap) and on the second (none), and differ on the third.
    prompts = [[[3.0, 0.0], [3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 2.0]]]
    found = choose_uncertain(prompts, 1)
    assert (found.places, found.values) == ([2], [4.0])  # gaps 2 and -2: variance 4
    assert "variance between the 2 members" in found.how
    single = choose_uncertain([own[:1] for own in prompts], 2)
    assert (single.places, single.values) == ([1, 2], [0.0, 2.0])
    assert "least gap" in single.how


def test_disagreement_takes_the_widest_gap_between_the_policies():
    prompts = [[[0.0, 1.0]], [[5.0, 1.0]], [[0.0, -3.0]]]
    found = choose_disagreement(prompts, [True, False], 2)
    assert (found.places, found.values) == ([1, 2], [4.0, 3.0])


def test_drawn_ones_are_the_first():
    assert choose_drawn(5, 3).places == [0, 1, 2]
    assert choose_drawn(2, 3).places == [0, 1]


numbers = st.integers(-50, 50).map(float)


@st.composite
def scored(draw):
    """(prompts, members, answers)."""
    members, answers = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    row = st.lists(numbers, min_size=answers, max_size=answers)
    one = st.lists(row, min_size=members, max_size=members)
    return draw(st.lists(one, min_size=1, max_size=6))


@given(scored(), st.integers(1, 8), st.lists(numbers, min_size=3, max_size=3))
def test_what_a_member_gives_to_all_answers_changes_no_choice(prompts, count, offsets):
    moved = [
        [[score + offset for score in own] for own, offset in zip(scores, offsets)] for scores in prompts
    ]
    assert choose_uncertain(moved, count).places == choose_uncertain(prompts, count).places
    assert choose_uncertain(moved, count).values == pytest.approx(choose_uncertain(prompts, count).values)


@given(scored(), st.integers(1, 8))
def test_a_choice_is_of_the_right_size_without_repetition_and_none_left_is_better(prompts, count):
    is_first = [i % 2 == 0 for i in range(len(prompts[0][0]))]
    for found, sign in (
        (choose_disagreement(prompts, is_first, count), 1),
        (choose_uncertain(prompts, count), 1 if len(prompts[0]) > 1 else -1),
    ):
        assert len(found.places) == len(set(found.places)) == min(count, len(prompts))
        assert [sign * value for value in found.values] == sorted(
            (sign * value for value in found.values), reverse=True
        )
    every = choose_disagreement(prompts, is_first, len(prompts))
    assert choose_disagreement(prompts, is_first, count).places == every.places[:count]
