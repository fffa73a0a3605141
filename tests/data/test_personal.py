import pytest

from rlhf_core.data.personal import mask, personal_data


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.doe+x@mail.example.org", "e-mail address"),
        ("jo @ example . com works too", "e-mail address"),
        ("look at https://example.org/x", "link"),
        ("see example.com for more", "link"),
        ("call me: (555) 123-4567 now", "phone number"),
        ("555-1234", "phone number"),
        ("+44 20 7946 0958", "phone number"),
        ("i am @someone there", "social handle"),
        ("my snapchat is someone", "social handle"),
    ],
)
def test_found_and_masked(text, kind):
    assert personal_data(text) == kind
    masked = mask(text)
    assert personal_data(masked) is None
    assert f"[{kind}]" in masked


@pytest.mark.parametrize(
    "text",
    [
        "i was born in 1987",
        "it costs 12,500 dollars",
        "meet me at 5:30",
        "i like facebook",
        "a @ b",
        "10 000",
    ],
)
def test_ordinary_text_stays(text):
    assert personal_data(text) is None
    assert mask(text) == text
