import math

import pytest

from rlhf_core.evaluation.text_metrics import distinct, perplexity, repeated_share


def test_distinct_by_hand():
    texts = ["the cat saw the cat", "The dog"]
    assert distinct(texts, 1) == 4 / 7  # the cat saw dog
    assert distinct(texts, 2) == 4 / 5  # the-cat twice, cat-saw, saw-the, the-dog
    assert distinct(["one"], 2) == 0.0
    assert distinct([], 1) == 0.0


def test_repeated_share_by_hand():
    # 7 words have 4 four-grams, the last of which is the first again.
    assert repeated_share(["a b c a b c a"], 4) == 1 / 4
    assert repeated_share(["a b c a b c a", "short text"], 4) == 1 / 8
    assert repeated_share(["all the words are different here"], 4) == 0.0
    assert repeated_share([]) == 0.0


def test_perplexity_weighs_by_tokens():
    # 1 token of probability 1/2, 3 tokens of probability 1/8 each: (1/2 * 1/512)^(-1/4) = 2^(10/4)
    assert perplexity([math.log(1 / 2), 3 * math.log(1 / 8)], [1, 3]) == pytest.approx(2**2.5)
    with pytest.raises(ValueError, match="no tokens"):
        perplexity([], [])
