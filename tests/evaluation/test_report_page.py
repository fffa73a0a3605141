"""Findings, plots and the page, from numbers made up here."""

import copy
import re
from html.parser import HTMLParser

import pytest
import torch

from rlhf_core.evaluation.findings import verdict, warnings
from rlhf_core.evaluation.html import report_html
from rlhf_core.evaluation.plots import PLOTS, Figures, draw_plots, read_history, read_pairs
from rlhf_core.evaluation.results import MODELS
from rlhf_core.evaluation.reward_model import write_pairs
from rlhf_core.modeling.pairs import Pair
from rlhf_core.modeling.reward import Normalisation

REWARD = {
    "reward/accuracy": 0.8,
    "reward/accuracy_low": 0.7,
    "reward/accuracy_high": 0.9,
    "reward/length_baseline_accuracy": 0.55,
}


def interval(estimate, half=0.05):
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half}


def model(gold, proxy):
    return {
        "gold": interval(gold),
        "proxy": interval(proxy),
        "length": interval(20.0, 1.0),
        "eos_rate": 0.9,
        "distinct_1": 0.3,
        "distinct_2": 0.7,
        "repeated_4": 0.01,
        "base_perplexity": 12.0,
    }


@pytest.fixture
def tree(params):
    return {
        "num_prompts": 12,
        "gold": "vader",
        "confidence": 0.95,
        "kl_budget": 12.0,
        "sampling": params.evaluate.sampling.model_dump(),
        "models": {"base": model(0.1, -0.5), "sft": model(0.2, 0.0), "policy": model(0.5, 1.0)},
        "comparison": {
            "kl": interval(4.0),
            "win_rate_over_sft": interval(0.7),
            "win_rate_over_base": interval(0.8),
            "gold_gain_over_sft": interval(0.3),
            "gold_gain_over_base": interval(0.4),
            "proxy_gain_over_sft": interval(1.0),
            "proxy_gain_over_base": interval(1.5),
        },
    }


@pytest.fixture
def samples():
    rows = []
    for i in range(12):
        row = {"prompt": f"prompt {i}", "source": "s", "row": i, "kl": 4.0}
        for j, name in enumerate(MODELS):
            row |= {name: f"answer {i} of {name}", f"gold_{name}": (i - 5 + j) / 10}
            row |= {f"proxy_{name}": float(j), f"length_{name}": 10 + i}
        rows.append(row)
    rows[3]["gold_policy"], rows[8]["gold_policy"] = -0.9, 0.2
    rows[4]["prompt"] = "<script>alert('x')</script> & co"
    rows[5]["policy"] = ""
    return rows


@pytest.fixture
def histories(tmp_path):
    (tmp_path / "ppo.csv").write_text(
        "step,objective/kl,objective/scores,objective/gold,objective/rlhf_reward,rollout/response_length\n"
        "0,-0.01,0.1,0.2,0.1,20\n1,1.5,0.5,0.3,0.4,21\n2,3.5,0.9,0.4,0.7,22\n"
    )
    (tmp_path / "sft.csv").write_text("step,eval/loss,train/loss\n1,3.5,3.6\n2,,3.4\n3,3.1,3.0\n")
    (tmp_path / "reward.csv").write_text("step,eval/accuracy,train/accuracy\n1,0.5,0.5\n2,0.7,0.8\n")
    return {name: read_history(tmp_path / f"{name}.csv") for name in ("ppo", "sft", "reward")}


def changed(tree, path, value):
    tree = copy.deepcopy(tree)
    node = tree
    *parents, leaf = path.split("/")
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return tree


def test_verdict_follows_the_interval(tree):
    assert verdict(tree)[0] == "good"
    assert verdict(changed(tree, "comparison/gold_gain_over_sft", interval(-0.3)))[0] == "bad"
    tone, sentence = verdict(changed(tree, "comparison/gold_gain_over_sft", interval(0.03)))
    assert tone == "unclear"
    assert "+0.030 (-0.020 to +0.080)" in sentence


def test_no_side_effect_no_warning(tree):
    assert warnings(tree) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("comparison/kl", interval(12.5), "above the budget of 12"),
        ("comparison/gold_gain_over_sft", interval(0.01), "over-optimisation"),
        ("models/policy/length", interval(31.0), "from 20.0 to 31.0 tokens"),
        ("models/policy/length", interval(13.0), "from 20.0 to 13.0 tokens"),
        ("models/policy/distinct_2", 0.5, "less varied"),
        ("models/policy/repeated_4", 0.2, "repeat themselves: 20%"),
        ("models/policy/eos_rate", 0.7, "Fewer answers end"),
        ("models/policy/base_perplexity", 19.0, "stranger: perplexity 19.0"),
    ],
)
def test_each_side_effect_is_told(tree, path, value, words):
    (warning,) = warnings(changed(tree, path, value))
    assert words in warning


def test_history_reads_what_a_step_logged(histories):
    assert histories["sft"]["eval/loss"] == [(1.0, 3.5), (3.0, 3.1)]
    assert histories["sft"]["train/loss"] == [(1.0, 3.6), (2.0, 3.4), (3.0, 3.0)]


def test_absent_history_is_empty(tmp_path):
    assert read_history(tmp_path / "absent.csv") == {}


PAIRS = [{"chosen": 1.0 * i / 7, "rejected": 0.5 - 0.1 * (i % 3), "probability": i / 12} for i in range(12)]


def test_pairs_are_read_as_the_reward_stage_writes_them(tmp_path):
    rows = [
        Pair([5, 6], [7, 2], [8, 9, 2], 0.0, "a", "ai:vader"),
        Pair([5, 6], [7, 2], [8, 2], 0.0, "b", "human:x.jsonl"),
    ]
    scores = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    write_pairs(tmp_path / "pairs.csv", rows, scores, [Normalisation(mean=1.0, std=2.0)])
    assert (tmp_path / "pairs.csv").read_text().splitlines()[1].startswith("ai,rejected,1,0,0.88")
    first, second = read_pairs(tmp_path / "pairs.csv")
    assert first == {"chosen": 1.0, "rejected": 0.0, "probability": 0.880797}
    assert second == {"chosen": 0.0, "rejected": 0.5, "probability": 0.268941}


def test_plots_repeat_themselves_byte_for_byte(tree, samples, histories):
    figures = Figures(tree, samples, histories, PAIRS)
    light = draw_plots(figures, "light")
    assert list(light) == list(PLOTS)
    assert all(data.startswith(b"\x89PNG") for data in light.values())
    assert draw_plots(figures, "light") == light
    assert draw_plots(figures, "dark") != light
    assert len(set(light.values())) == len(light)


def test_plots_without_numbers_are_left_out(tree, samples):
    drawn = draw_plots(Figures(tree, samples, {"ppo": {}, "sft": {}, "reward": {}}), "light")
    assert list(drawn) == ["gold", "proxy", "gold_histogram", "length_histogram"]


def test_plots_without_gold_in_the_history(tree, samples, histories):
    del histories["ppo"]["objective/gold"]
    assert "gold_against_kl" in draw_plots(Figures(tree, samples, histories), "light")


class Balance(HTMLParser):
    VOID = {"meta", "img", "source", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tree, samples):
    picture = {"gold": b"\x89PNG light"}
    return report_html(tree, samples, REWARD, picture, {"gold": b"\x89PNG dark"}, 6)


def test_page_is_well_formed_and_loads_nothing(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    links = [value for tag, name, value in parser.attributes if name in ("src", "srcset", "href")]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_escapes_texts(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; co" in page
    assert "<i>(empty)</i>" in page


def test_page_shows_the_numbers_and_the_samples(page):
    assert "<b>70%</b>" in page  # win rate
    assert "length alone 55%" in page
    assert "answer 5 of sft" in page
    assert page.count("answer 9 of policy") == 0  # beyond num_samples, and no loss
    assert "fell on 2 of 12 prompts" in page
    losses = page[page.index("Where the gold score fell most") :]
    assert losses.index("prompt 3") < losses.index("prompt 8")  # -1.2 is worse than -0.2


def test_page_does_without_the_reward_stage(tree, samples):
    page = report_html(tree, samples, {}, {}, {}, 2)
    assert "length alone" not in page
