"""The one place that talks to Great Expectations."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.validation.suites import Rule

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 20


@dataclass(frozen=True)
class Outcome:
    """What one rule found in one file."""

    rule: Rule
    passed: bool
    observed: str  # what was seen, in words
    num_bad: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)  # the first MAX_ROWS: source, row, text

    @property
    def critical(self) -> bool:
        return not self.passed and self.rule.severity == "critical"


def check(frame: pd.DataFrame, rules: Sequence[Rule], name: str) -> list[Outcome]:
    """Run `rules` over `frame`; one outcome a rule, in order."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    for noisy in ("great_expectations", "great_expectations.data_context"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations as gx

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
        batch = asset.add_batch_definition_whole_dataframe(name).get_batch({"dataframe": frame})
        suite = gx.ExpectationSuite(name=name)
        for rule in rules:
            expectation = getattr(gx.expectations, rule.expectation)
            suite.add_expectation(expectation(**rule.arguments, severity=rule.severity))
        result = batch.validate(suite, result_format="COMPLETE")
    # Results come in the order of the configurations they carry, not always in the order given.
    found = {_key(r.expectation_config.type, dict(r.expectation_config.kwargs)): r for r in result.results}
    return [_outcome(rule, found[_rule_key(rule)], frame) for rule in rules]


def _key(kind: str, arguments: dict[str, Any]) -> str:
    return f"{kind}:{arguments.get('column', '')}"


def _rule_key(rule: Rule) -> str:
    import great_expectations as gx

    return _key(getattr(gx.expectations, rule.expectation).expectation_type, rule.arguments)


def _outcome(rule: Rule, result: Any, frame: pd.DataFrame) -> Outcome:
    facts = result.result or {}
    if (result.exception_info or {}).get("raised_exception"):
        return Outcome(rule, False, f"could not be checked: column {rule.column!r} is missing")
    bad = facts.get("unexpected_index_list") or []  # positions in the frame
    rows = [_show(frame, int(position)) for position in bad[:MAX_ROWS]]
    return Outcome(
        rule, bool(result.success), _observed(facts), int(facts.get("unexpected_count") or 0), rows
    )


def _observed(facts: dict[str, Any]) -> str:
    if "observed_value" in facts and facts["observed_value"] is not None:
        value = facts["observed_value"]
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if "unexpected_count" in facts:
        return f"{facts['unexpected_count']} of {facts.get('element_count', 0)} rows fail"
    return ""


def _show(frame: pd.DataFrame, position: int) -> dict[str, Any]:
    line = frame.iloc[position]
    texts = [
        str(line[name]) for name in ("prompt", "response", "chosen", "rejected") if name in frame.columns
    ]
    return {"source": line["source"], "row": int(line["row"]), "text": " | ".join(texts)[:80]}
