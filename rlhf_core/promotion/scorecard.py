"""The scorecard of a promotion: the same facts as a page, as Markdown for Prefect's form, and in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf_core.evaluation.theme import CSS
from rlhf_core.promotion.guardrails import GuardRail
from rlhf_core.promotion.verdict import Verdict

Row = dict[str, Any]
TONES = {"pass": "good", "proxy only": "unclear", "fail": "bad"}
SENTENCES = {
    "pass": "The gate holds: the candidate is better, and no guard-rail is broken.",
    "proxy only": "The gate holds by a proxy only: a person has to judge whether the candidate is better.",
    "fail": "The gate does not hold: the candidate cannot be promoted.",
}
MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}
OUTCOMES = {1.0: "candidate wins", 0.5: "tie", 0.0: "opponent wins"}
FOOTER = (
    '<footer class="soft"><p>The win rate counts a prompt once: its comparisons in both orders are averaged. '
    "The lower bound is Wilson's score bound with the variance of ties taken out; the chance is that of an "
    "exact randomisation test over prompts. Values of guard-rails are estimates on these prompts. Every "
    "answer and outcome stands in results.jsonl, every number in report.json.</p></footer>"
)
STYLE = (
    ".holds { color: var(--good); } .broken { color: var(--bad); font-weight: 600; } "
    ".verdict ul { margin: 8px 0 0; font-size: 1rem; } "
    ".answer.opponent { border-color: var(--sft); } .answer.candidate { border-color: var(--policy); }"
)


@dataclass(frozen=True)
class Card:
    """What a scorecard shows; `candidate` and `opponent` are the names of what was compared."""

    candidate: str
    opponent: str
    judge: str
    decoding: str
    confidence: float
    verdict: Verdict
    rows: Sequence[Row]  # of results.jsonl, in the order drawn
    num_samples: int

    @property
    def headline(self) -> str:
        gate = self.verdict.gate
        return (
            f"win rate {gate.win_rate:.1%} on {gate.num_prompts} prompts, ties one half; "
            f"{self.confidence:.0%} lower bound {gate.low:.1%}, must exceed {gate.required:.1%}"
        )


def line(card: Card) -> str:
    """One line for a log."""
    return f"{card.candidate} against {card.opponent}: {card.verdict.outcome}; {card.headline}"


def markdown(card: Card, samples: int = 3) -> str:
    """For an artifact or the description of a form; shows `samples` of the prompts."""
    verdict = card.verdict
    rails = [
        f"| {MARKS[rail.holds]} | {rail.name.replace('_', ' ')} | {rail.value:.3g} | {rail.rule} |"
        for rail in verdict.rails
    ]
    parts = [
        f"## {card.candidate} against {card.opponent}",
        f"**{SENTENCES[verdict.outcome]}**",
        f"{card.headline}. Judge: {card.judge}.",
        "\n".join(f"- {reason}" for reason in verdict.reasons),
        "\n".join(["| | guard-rail | value | must be |", "| --- | --- | --- | --- |", *rails]),
        *map(_markdown_sample, card.rows[:samples]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_sample(row: Row) -> str:
    ours, theirs = row["candidate"][0]["text"], row["opponent"][0]["text"]
    return (
        f"**{_flat(row['prompt'])}** ({_outcome(row)})\n\n"
        f"- candidate: {_flat(ours)}\n- opponent: {_flat(theirs)}"
    )


def html(card: Card) -> str:
    """The page: one file that loads nothing, and a repetition gives the same bytes."""
    parts = [
        f"<h1>{escape(card.candidate)} against {escape(card.opponent)}</h1>",
        f'<p class="soft">{card.verdict.gate.num_prompts} held-out prompts, judge {escape(card.judge)} in '
        f"both orders, {escape(card.decoding)}, the same random numbers for both.</p>",
        _verdict(card),
        f'<section class="cards">{_cards(card)}</section>',
        "<h2>Guard-rails</h2>",
        _rails(card.verdict.rails),
        "<h2>Samples</h2>",
        '<p class="soft">Prompts in the order drawn by the seed; nothing was picked by hand.</p>',
        *map(_sample, card.rows[: card.num_samples]),
        FOOTER,
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Scorecard</title>\n<style>{CSS}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(card: Card) -> str:
    verdict = card.verdict
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f'<div class="verdict {TONES[verdict.outcome]}">{escape(SENTENCES[verdict.outcome])}{listed}</div>'


def _cards(card: Card) -> str:
    gate = card.verdict.gate
    found = [
        (
            "win rate, ties one half",
            f"{gate.win_rate:.1%}",
            f"one-sided {card.confidence:.0%} bounds {gate.low:.1%} and {gate.high:.1%}",
        ),
        ("must exceed", f"{gate.required:.1%}", "the lower bound"),
        ("chance if both were the same", f"{gate.p_value:.2g}", f"at most {1 - card.confidence:.2g}"),
        ("prompts", str(gate.num_prompts), f"{gate.ties:.0%} of them ties"),
        ("turned by the order of answers", f"{card.verdict.order_gap:.0%}", "of the comparisons"),
    ]
    return "".join(
        f'<div class="card"><span class="name">{escape(name)}</span><b>{value}</b>'
        f'<span class="soft">{escape(note)}</span></div>'
        for name, value, note in found
    )


def _rails(rails: Sequence[GuardRail]) -> str:
    rows = "".join(
        f'<tr><td class="{"holds" if rail.holds else "broken"}">{MARKS[rail.holds]} '
        f"{'holds' if rail.holds else 'broken'}</td>"
        f'<th>{escape(rail.name.replace("_", " "))}<span class="soft">{escape(rail.meaning)}</span></th>'
        f"<td>{rail.value:.3g}</td><td>{escape(rail.rule)}</td></tr>"
        for rail in rails
    )
    heads = "<th></th><th>guard-rail</th><th>value</th><th>must be</th>"
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _sample(row: Row) -> str:
    answers = "".join(
        f'<div class="answer {side}"><span class="soft">{escape(side)}{_score(row[side][0])}</span>'
        f"<p>{escape(row[side][0]['text']) or '<i>(empty)</i>'}</p></div>"
        for side in ("opponent", "candidate")
    )
    return (
        f'<article class="sample"><p class="prompt">{escape(row["prompt"])}</p>'
        f'<p class="soft">{_outcome(row)}</p><div class="answers">{answers}</div></article>'
    )


def _score(answer: Row) -> str:
    return "" if answer["score"] is None else f" · judge {answer['score']:+.2f}"


def _outcome(row: Row) -> str:
    """Of the first pair of answers, both orders."""
    first, second = row["outcomes"][0]
    if first == second:
        return OUTCOMES[first]
    return f"{OUTCOMES[first]} when it stands first, {OUTCOMES[second]} when second"


def _flat(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would read as its own."""
    plain = " ".join(escape(text, quote=False).split())
    for mark in "\\`*_[]|#":
        plain = plain.replace(mark, f"\\{mark}")
    return plain or "(empty)"
