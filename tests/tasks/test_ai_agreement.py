"""The AI labeler on what people judged: in a process of its own, each answer once, and told when it fails."""

from __future__ import annotations

import shutil

import pytest

from feedback.against_ai import agreements, comparisons
from rlhf_core.config import change_params
from rlhf_core.errors import InputError
from tasks import ai_agreement

from .test_retraining import PROMPTS, votes_on

LABELER = """
def by_goodness(prompts, responses):
    with open("asked.txt", "a") as file:
        file.writelines(f"{prompt}: {response}\\n" for prompt, response in zip(prompts, responses))
    return [float("good" in response) for response in responses]
def contrary(prompts, responses):
    return [-float("good" in response) for response in responses]
"""


@pytest.fixture
def place(tmp_path, root):
    shutil.copy(root / "params.yaml", tmp_path)
    (tmp_path / "taste.py").write_text(LABELER)
    return tmp_path


def measured(place, target, share=1.0):
    values = {"preferences.labeler": "function", "preferences.labeler_target": target}
    params = change_params(place / "params.yaml", values | {"retrain.agreement_share": share})
    said = []
    return ai_agreement.measure(place, params, votes_on(PROMPTS), said.append), said


def test_who_likes_the_same_agrees_and_who_likes_the_opposite_does_not(place):
    (found,), _ = measured(place, "taste:by_goodness")
    assert (found.project, found.criterion, found.num) == ("p-pairwise", "choice", 60)
    assert found.observed == 1.0
    assert 0.9 < found.low < found.high == 1.0, "60 of 60 is not certainty"
    assert found.kappa is None, "people gave one label only"
    assert set(found.metrics()) == {
        f"feedback/ai_agreement/p_pairwise/choice{end}" for end in ("", "_low", "_high")
    }
    assert found.row()["agreement"].startswith("100.0% (9")
    lines = (place / "asked.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 120, "each answer is scored once"
    (found,), _ = measured(place, "taste:contrary")
    assert (found.observed, found.low) == (0.0, 0.0)


def test_a_share_asks_about_fewer(place):
    (found,), _ = measured(place, "taste:by_goodness", share=0.3)
    assert 5 <= found.num <= 35


def test_a_labeler_that_fails_is_told_in_its_own_words(place):
    with pytest.raises(InputError, match=r"asked about what people judged: .*has no function 'nobody'"):
        measured(place, "taste:nobody")


def test_kappa_stands_beside_the_raw_agreement(params):
    found = comparisons(votes_on(PROMPTS[:10]).collections[0])
    (one,) = agreements(found, ["a"] * 8 + ["b"] * 2)
    shown = ai_agreement.with_interval(one, params)
    assert shown.observed == pytest.approx(0.8)
    assert shown.low < 0.8 < shown.high
    # By chance: people say a always, so 10/10 * 8/10 = 0.8, and nothing is beyond chance.
    assert shown.kappa == pytest.approx(0.0)
    assert shown.metrics()["feedback/ai_agreement/p_pairwise/choice_kappa"] == shown.kappa
