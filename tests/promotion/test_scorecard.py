from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rlhf_core.promotion import scorecard
from rlhf_core.promotion.verdict import decide

from .test_guardrails import FINE, PLAIN


def row(i, outcome):
    ours, theirs = f"nice <b>{i}</b> | *", "dull"
    shown = [{"text": ours, "score": 0.5}], [{"text": theirs, "score": None}]
    return {"prompt": f"what about {i}?", "candidate": shown[0], "opponent": shown[1], "outcomes": [outcome]}


def card(params, found=FINE, proxy="", wins=90, losses=20):
    rows = [row(i, [1.0, 1.0]) for i in range(wins)] + [row(i, [0.0, 0.0]) for i in range(losses)]
    outcomes = [[tuple(pair) for pair in r["outcomes"]] for r in rows]
    verdict = decide(outcomes, found, params.promotion, proxy)
    return scorecard.Card(
        "rlhf-policy version 2", "champion 1", "vader", "temperature 0.7", 0.95, verdict, rows, 3
    )


def well_formed(page):
    """Every tag that is opened is closed, in order."""
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(page)
    return not open_tags


def test_page_shows_verdict_numbers_and_samples_and_escapes_what_models_wrote(params):
    page = scorecard.html(card(params))
    assert well_formed(page)
    assert "The gate holds" in page
    assert "81.8%" in page
    assert page.count('<article class="sample">') == 3
    assert "nice &lt;b&gt;0&lt;/b&gt;" in page
    assert "<b>0</b>" not in page
    assert "http" not in page


def test_proxy_only_is_told_and_needs_a_person(params):
    shown = card(params, proxy="proxy only: the judge is the reward model that was optimised")
    assert shown.verdict.outcome == "proxy only"
    for text in (scorecard.html(shown), scorecard.markdown(shown)):
        assert "a person has to judge" in text
        assert "proxy only: the judge is the reward model" in text


@pytest.mark.parametrize("proxy", ["", "proxy only: the judge"])
def test_a_broken_guard_rail_fails_the_gate_whoever_judges(params, proxy):
    shown = card(params, replace(FINE, candidate=replace(PLAIN, toxic_rate=0.5)), proxy=proxy)
    assert shown.verdict.outcome == "fail"
    assert shown.verdict.reasons[0].startswith("toxic_rise is 0.49, must be at most 0.02")
    assert "\N{BALLOT X} broken" in scorecard.html(shown)


def test_markdown_keeps_its_table_whatever_models_write(params):
    text = scorecard.markdown(card(params), samples=1)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8
    assert {line.count("|") for line in rows} == {5}
    assert r"nice &lt;b&gt;0&lt;/b&gt; \| \*" in text


def test_metrics_name_the_win_rate_and_every_guard_rail(params):
    found = card(params).verdict.metrics()
    assert found["promotion/win_rate"] == 90 / 110
    assert found["promotion/kl"] == 4.0
    assert len([name for name in found if name.startswith("promotion/")]) == 7 + 8
