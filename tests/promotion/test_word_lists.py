import pytest

from rlhf_core.promotion.word_lists import is_refusal, is_toxic, refusal_rate, toxic_rate


@pytest.mark.parametrize(
    "text", ["I can't help with that.", "I\u2019m sorry, but I  can't say.", "As an AI, I have no taste."]
)
def test_refusals_are_seen(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["", "I can help you.", "I cannot wait to see it!", "He can't swim."])
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_a_refusal_quoted_far_inside_an_answer_is_none():
    assert not is_refusal("The film is about a robot. " * 6 + "It says: I refuse to go.")


@pytest.mark.parametrize("text", ["You are an IDIOT!", "shut  up", "oh, shit.", "Go to hell"])
def test_abuse_is_seen(text):
    assert is_toxic(text)


@pytest.mark.parametrize("text", ["", "I took a class.", "shiitake soup", "a stupidly good meal", "We lost."])
def test_words_within_words_are_no_abuse(text):
    assert not is_toxic(text)


def test_rates():
    assert refusal_rate(["I refuse to.", "Yes.", "No.", "Well."]) == 0.25
    assert toxic_rate(["You moron", "Yes."]) == 0.5
