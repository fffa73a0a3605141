"""What is expected of each kind of data, as a list of rules; the adapter turns them into Great Expectations.

Critical: training on such data would be wrong. Warning: a person should look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.config import ValidateConfig
from rlhf_core.data.rows import SPLITS, TEXTS, TIE

Severity = Literal["critical", "warning"]


@dataclass(frozen=True)
class Rule:
    """One expectation: its name in Great Expectations, its arguments, and how bad its failure is."""

    expectation: str
    arguments: dict[str, Any]
    severity: Severity
    meaning: str  # shown to people

    @property
    def column(self) -> str:
        return self.arguments.get("column", "")


def never(column: str, severity: Severity, meaning: str, mostly: float = 1.0) -> Rule:
    """No row (or at most a share of 1 - mostly) has True in `column`."""
    arguments = {"column": column, "value_set": [False], "mostly": mostly}
    return Rule("ExpectColumnValuesToBeInSet", arguments, severity, meaning)


def suite(kind: str, split: str, config: ValidateConfig) -> list[Rule]:
    """The rules for one file of prepared data; `split` is train, eval, or file for one not yet split."""
    names = ("prompt", *TEXTS[kind])
    required = config.min_rows if split == "train" and kind != "preferences" else 0
    rules = [
        Rule("ExpectColumnToExist", {"column": name}, "critical", f"there is a column {name}")
        for name in names
    ]
    if required:
        rules.append(
            Rule(
                "ExpectTableRowCountToBeBetween",
                {"min_value": required},
                "critical",
                f"at least {required} rows (validate.min_rows)",
            )
        )
    for name in names:
        rules.append(never(f"{name}_blank", "critical", f"{name} is not empty or blank"))
        limit = config.max_prompt_tokens if name == "prompt" else config.max_response_tokens
        key = "max_prompt_tokens" if name == "prompt" else "max_response_tokens"
        rules.append(
            Rule(
                "ExpectColumnValuesToBeBetween",
                {"column": f"{name}_tokens", "max_value": limit},
                "critical",
                f"{name} has at most {limit} tokens (validate.{key})",
            )
        )
    share = config.max_duplicate_fraction
    rules.append(
        never(
            "duplicate",
            "warning",
            f"at most {share:.0%} repeat another row (validate.max_duplicate_fraction)",
            1 - share,
        )
    )
    if split in SPLITS:
        rules.append(never("leaks", "critical", "the prompt stands on one side of the train/eval split only"))
    if kind == "preferences":
        rules += _preference_rules(config)
    return rules


def _preference_rules(config: ValidateConfig) -> list[Rule]:
    low, high = config.min_longer_chosen, config.max_longer_chosen
    return [
        never("same_answer", "critical", "chosen and rejected differ"),
        Rule(
            "ExpectColumnValuesToBeBetween",
            {"column": "probability", "min_value": TIE, "max_value": 1.0},
            "critical",
            f"the probability that the chosen answer is better is from {TIE} (a tie) to 1",
        ),
        never("contradicts", "warning", "no other row prefers the same answers the other way round"),
        Rule(
            "ExpectColumnMeanToBeBetween",
            {"column": "longer_chosen", "min_value": low, "max_value": high},
            "warning",
            f"the longer answer is chosen in {low:.0%} to {high:.0%} of pairs "
            "(validate.min_longer_chosen, max_longer_chosen)",
        ),
    ]
