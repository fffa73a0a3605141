"""report.html: one file that holds all it shows. It loads nothing, and a repetition gives the same bytes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rlhf_core.evaluation.findings import MODEL_ROWS, verdict, warnings
from rlhf_core.evaluation.plots import LABELS
from rlhf_core.evaluation.results import MODELS
from rlhf_core.evaluation.theme import CSS

Tree = dict[str, Any]
NUM_LOSSES = 3  # samples shown of those where the gold score fell most
# A hyphen would read as a range between the names.
FROM_SFT = "policy \N{MINUS SIGN} SFT"


def report_html(
    tree: Tree,
    samples: Sequence[Tree],
    reward: Mapping[str, float],
    light: Mapping[str, bytes],
    dark: Mapping[str, bytes],
    num_samples: int,
) -> str:
    """The page. `light` and `dark` are the same plots in two themes; `reward` the reward stage's metrics."""
    plots = "".join(_figure(name, light[name], dark[name]) for name in light)
    parts = [
        _header(tree),
        f'<section class="cards">{"".join(_cards(tree, reward))}</section>',
        _warnings(tree),
        "<h2>Models</h2>",
        _model_table(tree),
        "<h2>Plots</h2>",
        f'<section class="plots">{plots}</section>',
        "<h2>Samples</h2>",
        '<p class="soft">Held-out prompts in the order drawn by the seed; nothing was picked by hand.</p>',
        *(_sample(row) for row in samples[:num_samples]),
        *_losses(samples),
        _footer(tree),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(tree: Tree) -> str:
    tone, sentence = verdict(tree)
    sampling = tree["sampling"]
    decoding = f"temperature {sampling['temperature']:g}"
    decoding += f", top-k {sampling['top_k']}" if sampling["top_k"] else ""
    decoding += f", top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    return (
        "<h1>Evaluation report</h1>\n"
        f'<p class="soft">{tree["num_prompts"]} held-out prompts, gold judge {escape(tree["gold"])}, '
        f"{decoding}, at most {sampling['max_new_tokens']} tokens, the same random numbers for all.</p>\n"
        f'<p class="verdict {tone}">{escape(sentence)}</p>'
    )


def _cards(tree: Tree, reward: Mapping[str, float]) -> Iterator[str]:
    """The headline numbers."""
    found, models = tree["comparison"], tree["models"]
    yield _interval_card("win rate over SFT", found["win_rate_over_sft"], ".0%")
    yield _interval_card("win rate over base", found["win_rate_over_base"], ".0%")
    yield _interval_card(f"gold score, {FROM_SFT}", found["gold_gain_over_sft"], "+.3f")
    yield _interval_card(f"proxy score, {FROM_SFT}", found["proxy_gain_over_sft"], "+.2f")
    yield _interval_card(f"KL to SFT, nats per answer; budget {tree['kl_budget']:g}", found["kl"], ".2f")
    before, after = (models[name]["length"]["estimate"] for name in ("sft", "policy"))
    yield _card("tokens of an answer, SFT → policy", f"{before:.1f} → {after:.1f}")
    before, after = (models[name]["base_perplexity"] for name in ("sft", "policy"))
    yield _card("perplexity under base, SFT → policy", f"{before:.1f} → {after:.1f}")
    if reward.get("reward/accuracy") is not None:
        baseline = reward["reward/length_baseline_accuracy"]
        value = {key: reward[f"reward/accuracy{end}"] for key, end in _ENDS.items()}
        yield _interval_card(f"reward-model accuracy; length alone {baseline:.0%}", value, ".0%")


_ENDS = {"estimate": "", "low": "_low", "high": "_high"}


def _interval_card(name: str, value: Mapping[str, float], form: str) -> str:
    return _card(name, format(value["estimate"], form), f"{value['low']:{form}} to {value['high']:{form}}")


def _card(name: str, value: str, bounds: str = "") -> str:
    note = f'<span class="soft">{bounds}</span>' if bounds else ""
    return f'<div class="card"><span class="name">{escape(name)}</span><b>{value}</b>{note}</div>'


def _warnings(tree: Tree) -> str:
    found = warnings(tree) or ["No side effect stands out in KL, length, variety, repetition or perplexity."]
    return "<h2>Side effects</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in found) + "</ul>"


def _model_table(tree: Tree) -> str:
    heads = "".join(f"<th>{LABELS[name]}</th>" for name in MODELS)
    rows = []
    for label, meaning, cell in MODEL_ROWS:
        cells = "".join(f"<td>{cell(tree['models'][name])}</td>" for name in MODELS)
        rows.append(f'<tr><th>{label}<span class="soft">{meaning}</span></th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(name: str, light: bytes, dark: bytes) -> str:
    def source(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode("ascii")

    alt = escape(name.replace("_", " "))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{source(dark)}">'
        f'<img alt="{alt}" src="{source(light)}"></picture></figure>'
    )


def _sample(row: Tree) -> str:
    prompt = escape(row["prompt"])
    answers = "".join(_answer(row, name) for name in MODELS)
    body = f'<p class="prompt">{prompt}</p><div class="answers">{answers}</div>'
    return f'<article class="sample">{body}</article>'


def _answer(row: Tree, name: str) -> str:
    scores = f"{LABELS[name]} · gold {row[f'gold_{name}']:+.2f} · proxy {row[f'proxy_{name}']:+.2f}"
    text = escape(row[name]) or "<i>(empty)</i>"
    return f'<div class="answer {name}"><span class="soft">{scores}</span><p>{text}</p></div>'


def _losses(samples: Sequence[Tree]) -> Iterator[str]:
    """The prompts where the gold score fell most from SFT to policy, if any did."""
    fallen = [row for row in samples if row["gold_policy"] < row["gold_sft"]]
    if not fallen:
        return
    yield "<h2>Where the gold score fell most</h2>"
    yield f'<p class="soft">It fell on {len(fallen)} of {len(samples)} prompts.</p>'
    fallen.sort(key=lambda row: row["gold_policy"] - row["gold_sft"])
    yield from (_sample(row) for row in fallen[:NUM_LOSSES])


def _footer(tree: Tree) -> str:
    return (
        f'<footer class="soft"><p>Ranges are {tree["confidence"]:.0%} intervals: percentile bootstrap over '
        "prompts, differences and wins paired by prompt, a tie counting one half. Gold is the judge "
        "named by evaluate.gold; proxy is the reward model that PPO optimised. KL is the mean over "
        "prompts of log p(policy) less log p(SFT) of the policy's own answers at the sampling temperature, "
        "summed over tokens. All numbers stand in results.json, every answer in samples.jsonl.</p></footer>"
    )
