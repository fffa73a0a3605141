"""What the numbers of an evaluation mean, in sentences: the verdict, and what a reader should watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Tree = dict[str, Any]
# How far a side effect may go before the report points at it; matters of taste, so told with their numbers.
LENGTH_RATIO = 1.5
DIVERSITY_RATIO = 0.75
PERPLEXITY_RATIO = 1.5
REPEATED_SHARE = 0.1
EOS_DROP = 0.15


def verdict(tree: Tree) -> tuple[str, str]:
    """("good" | "bad" | "unclear", one sentence), by the interval of the paired gold difference."""
    gold, wins = tree["comparison"]["gold_gain_over_sft"], tree["comparison"]["win_rate_over_sft"]
    numbers = (
        f"gold score {gold['estimate']:+.3f} ({gold['low']:+.3f} to {gold['high']:+.3f}), "
        f"win rate {wins['estimate']:.0%} ({wins['low']:.0%} to {wins['high']:.0%})"
    )
    if gold["low"] > 0:
        return "good", f"The policy is better than the SFT model on held-out prompts: {numbers}."
    if gold["high"] < 0:
        return "bad", f"The policy is worse than the SFT model on held-out prompts: {numbers}."
    return "unclear", f"No clear difference between the policy and the SFT model: {numbers}."


def warnings(tree: Tree) -> list[str]:
    """Side effects of the training that the score does not show."""
    return [*_about_scores(tree), *_about_text(tree["models"]["sft"], tree["models"]["policy"])]


def _about_scores(tree: Tree) -> Iterator[str]:
    comparison = tree["comparison"]
    kl, budget = comparison["kl"]["estimate"], tree["kl_budget"]
    if kl > budget:
        yield f"KL to the SFT model is {kl:.1f} nats per answer, above the budget of {budget:g}."
    if comparison["proxy_gain_over_sft"]["low"] > 0 and comparison["gold_gain_over_sft"]["low"] <= 0:
        yield (
            "The reward model's score rose while the gold score did not clearly: "
            "a sign of over-optimisation. Raise ppo.kl_coef, or lower ppo.num_updates."
        )


def _about_text(sft: Tree, policy: Tree) -> Iterator[str]:
    before, after = sft["length"]["estimate"], policy["length"]["estimate"]
    if max(before, after) > LENGTH_RATIO * min(before, after):
        yield f"Answers changed in length from {before:.1f} to {after:.1f} tokens."
    if policy["distinct_2"] < DIVERSITY_RATIO * sft["distinct_2"]:
        yield (
            f"Answers are less varied: distinct word pairs fell from {sft['distinct_2']:.0%} "
            f"to {policy['distinct_2']:.0%}."
        )
    if policy["repeated_4"] > max(REPEATED_SHARE, 2 * sft["repeated_4"]):
        yield f"Answers repeat themselves: {policy['repeated_4']:.0%} of their four-word runs."
    if policy["eos_rate"] < sft["eos_rate"] - EOS_DROP:
        yield (
            f"Fewer answers end by themselves: {policy['eos_rate']:.0%} instead of {sft['eos_rate']:.0%}; "
            "the others are cut at the maximum length."
        )
    if policy["base_perplexity"] > PERPLEXITY_RATIO * sft["base_perplexity"]:
        yield (
            f"The base model finds the answers stranger: perplexity {policy['base_perplexity']:.1f} "
            f"instead of {sft['base_perplexity']:.1f}."
        )


def _interval(name: str, form: str) -> Callable[[Tree], str]:
    def text(model: Tree) -> str:
        value = model[name]
        low, high = value["low"], value["high"]
        return f"{value['estimate']:{form}} ({low:{form}} to {high:{form}})"

    return text


def _number(name: str, form: str) -> Callable[[Tree], str]:
    return lambda model: format(model[name], form)


# Rows of the table of models: label, what it means, and the text of a cell.
MODEL_ROWS: tuple[tuple[str, str, Callable[[Tree], str]], ...] = (
    ("gold score", "mean over prompts, with its interval", _interval("gold", "+.3f")),
    (
        "proxy score",
        "of the reward model; 0 is the mean and 1 the spread of SFT answers",
        _interval("proxy", "+.2f"),
    ),
    ("length", "tokens of an answer, end included", _interval("length", ".1f")),
    ("ends by itself", "share of answers that end before the maximum length", _number("eos_rate", ".0%")),
    ("distinct words", "different words over all words", _number("distinct_1", ".1%")),
    ("distinct word pairs", "different neighbours over all neighbours", _number("distinct_2", ".1%")),
    (
        "repetition",
        "share of four-word runs said before in the same answer",
        _number("repeated_4", ".1%"),
    ),
    (
        "perplexity",
        "of the answers under the base model; lower reads more usual to it",
        _number("base_perplexity", ".1f"),
    ),
)
