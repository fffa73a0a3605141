"""The report of an evaluation as one page that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.evaluation.statistics import Interval

if TYPE_CHECKING:
    from rlhf_core.config import Params
    from rlhf_core.stages.evaluate import Comparison

STYLE = """
:root { color-scheme: light dark; --line: #8884; --card: #8881; --accent: #d1662a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.card small { opacity: .75; }
table { border-collapse: collapse; width: 100%; } tr { border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; border-radius: .4rem; }
.samples td { width: 30%; } .samples td:first-child { width: 22%; font-weight: 600; }
.score { display: block; opacity: .65; font-size: .85rem; }
"""


def render(
    comparison: Comparison, samples: Sequence[Mapping[str, Any]], pictures: Mapping[str, Path], params: Params
) -> str:
    """The whole page."""
    found, numbers = comparison.intervals, comparison.numbers
    images = "".join(f"<h2>{escape(title)}</h2>{_image(path, title)}" for title, path in pictures.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>What the run changed</title><style>{STYLE}</style>"
        f"<h1>What the run changed</h1><p>{_headline(found, numbers, params)}</p>"
        f"<div class=cards>{_cards(found, numbers)}</div>{images}"
        f"<h2>All three models</h2><div class=wide>{_models_table(found, numbers)}</div>"
        f"<h2>Answers side by side</h2><p>The first held-out prompts as drawn, not picked by outcome.</p>"
        f"<div class=wide>{_samples_table(samples)}</div></html>\n"
    )


def _headline(found: Mapping[str, Interval], numbers: Mapping[str, float], params: Params) -> str:
    gain = found["gold_gain_over_sft"]
    if gain.low > 0:
        verdict = "The policy is better than the SFT model by the gold judge"
    elif gain.high < 0:
        verdict = "The policy is <strong>worse</strong> than the SFT model by the gold judge"
    else:
        verdict = "The gold judge cannot tell the policy from the SFT model"
    within = "within" if found["kl"].estimate <= numbers["kl_budget"] else "<strong>above</strong>"
    return (
        f"{verdict} ({escape(params.evaluate.gold)}), on {int(numbers['num_prompts'])} held-out prompts; its KL to SFT "
        f"is {within} the budget. Intervals hold {params.evaluate.confidence:.0%}, resampled over prompts."
    )


def _cards(found: Mapping[str, Interval], numbers: Mapping[str, float]) -> str:
    budget = f"nats per answer, budget {numbers['kl_budget']:g}"
    cards = [
        ("Win rate over SFT", found["win_rate_over_sft"], "by the gold judge, ties a half"),
        ("Gold reward gained", found["gold_gain_over_sft"], "policy minus SFT, paired by prompt"),
        ("Proxy reward gained", found["proxy_gain_over_sft"], "by the reward model that PPO optimised"),
        ("KL to SFT", found["kl"], budget),
    ]
    return "".join(
        f"<div class=card>{escape(title)}<b>{value.estimate:.2f}</b>{value.low:.2f} to {value.high:.2f}<br>"
        f"<small>{escape(note)}</small></div>"
        for title, value, note in cards
    )


def _models_table(found: Mapping[str, Interval], numbers: Mapping[str, float]) -> str:
    names = ("base", "sft", "policy")
    rows = [(label, [_interval(found[f"{key}_{name}"]) for name in names]) for label, key in INTERVAL_ROWS]
    rows += [(label, [f"{numbers[f'{key}_{name}']:.3g}" for name in names]) for label, key in NUMBER_ROWS]
    head = "".join(f"<th>{name}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for label, cells in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


INTERVAL_ROWS = (("gold reward", "gold"), ("proxy reward", "proxy"), ("tokens of an answer", "length"))
NUMBER_ROWS = (
    ("answers that end", "eos_rate"),
    ("different word pairs (distinct-2)", "distinct_2"),
    ("repeated word triples", "repeated_3"),
    ("perplexity under the base model", "base_perplexity"),
)


def _interval(value: Interval) -> str:
    return f"{value.estimate:.2f} <small>({value.low:.2f} to {value.high:.2f})</small>"


def _samples_table(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['prompt'])}</td>"
        + "".join(
            f"<td>{escape(row[name])}<span class=score>gold {row[f'gold_{name}']:.2f}, "
            f"proxy {row[f'proxy_{name}']:.2f}</span></td>"
            for name in ("sft", "policy")
        )
        + "</tr>"
        for row in samples
    )
    return f"<table class=samples><tr><th>prompt</th><th>SFT</th><th>policy</th></tr>{rows}</table>"


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escape(title)}' src='data:image/png;base64,{data}'>"
