"""The report of the suites as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rlhf_core.validation.expectations import Outcome

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f4b; --warn: #b26a00; --bad: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .6rem; }
tr { border-bottom: 1px solid var(--line); } td:last-child { font-variant-numeric: tabular-nums; }
.pass { color: var(--good); } .warning { color: var(--warn); } .critical { color: var(--bad); }
.state { font-weight: 600; white-space: nowrap; } .wide { overflow-x: auto; }
code { font-size: .9em; } .rows { margin: .3rem 0 .6rem 1rem; padding: 0; list-style: none; }
"""


def state(outcome: Outcome) -> str:
    return "pass" if outcome.passed else outcome.rule.severity


def render(results: Mapping[str, Sequence[Outcome]], facts: Mapping[str, object]) -> str:
    """The whole page; `results` by file, `facts` for the head."""
    counts = count_states(results)
    verdict = "not fit to train on" if counts["critical"] else "fit to train on"
    head = (
        f"{counts['pass']} expectations hold, {counts['warning']} warnings, "
        f"{counts['critical']} critical failures"
    )
    listed = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    sections = "".join(_section(name, outcomes) for name, outcomes in results.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Data validation</title><style>{STYLE}</style>"
        f"<h1>Data validation: {verdict}</h1><p>{head}</p>"
        f"<table>{listed}</table>{sections}</html>\n"
    )


def count_states(results: Mapping[str, Sequence[Outcome]]) -> dict[str, int]:
    states = [state(outcome) for outcomes in results.values() for outcome in outcomes]
    return {name: states.count(name) for name in ("pass", "warning", "critical")}


def _section(name: str, outcomes: Sequence[Outcome]) -> str:
    rows = "".join(_line(outcome) for outcome in outcomes)
    head = "<tr><th>state<th>expectation<th>found</tr>"
    return f"<h2>{escape(name)}</h2><div class=wide><table>{head}{rows}</table></div>"


def _line(outcome: Outcome) -> str:
    mark = state(outcome)
    shown = "".join(
        f"<li><code>{escape(row['source'])}:{row['row']}</code> {escape(row['text'])}</li>"
        for row in outcome.bad_rows
    )
    listed = f"<ul class=rows>{shown}</ul>" if shown else ""
    return (
        f"<tr><td class='state {mark}'>{mark}</td><td>{escape(outcome.rule.meaning)}{listed}</td>"
        f"<td>{escape(outcome.observed)}</td></tr>"
    )
