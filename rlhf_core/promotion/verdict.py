"""From stored comparisons and measurements to the verdict: pure, so a report can be judged again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf_core.config import PromotionConfig
from rlhf_core.evaluation.results import rounded
from rlhf_core.promotion.gate import GateResult, judge_outcomes
from rlhf_core.promotion.guardrails import GuardRail, Measurements, guard_rails

Outcome = Literal["pass", "proxy only", "fail"]


@dataclass(frozen=True)
class Verdict:
    """What the gate says. `pass` can be approved by the parameter `auto`; `proxy only` needs a person."""

    outcome: Outcome
    gate: GateResult
    rails: tuple[GuardRail, ...]
    order_gap: float  # share of comparisons that the order of the answers turned
    proxy: str  # why the judge says no more than the reward that was optimised; empty when it does

    @property
    def reasons(self) -> list[str]:
        """Why it does not pass, or what a person has to know before saying yes."""
        broken = [
            f"{rail.name} is {rail.value:.3g}, must be {rail.rule}" for rail in self.rails if not rail.holds
        ]
        return [*self.gate.reasons, *broken, *([self.proxy] if self.proxy else [])]

    def as_dict(self) -> dict[str, Any]:
        gate = asdict(self.gate) | {"reasons": list(self.gate.reasons)}
        rails = [asdict(rail) for rail in self.rails]
        return rounded(
            {
                "outcome": self.outcome,
                "reasons": self.reasons,
                "proxy": self.proxy,
                "order_gap": self.order_gap,
                "gate": gate,
                "guard_rails": rails,
            }
        )

    def metrics(self) -> dict[str, float]:
        """promotion/NAME of the win rate, its bounds, and every guard-rail."""
        gate = self.gate
        found = {
            "win_rate": gate.win_rate,
            "win_rate_low": gate.low,
            "win_rate_high": gate.high,
            "p_value": gate.p_value,
            "num_prompts": float(gate.num_prompts),
            "ties": gate.ties,
            "order_gap": self.order_gap,
        }
        found |= {rail.name: rail.value for rail in self.rails}
        return {f"promotion/{name}": value for name, value in found.items()}


def decide(
    outcomes: Sequence[Sequence[tuple[float, float]]],
    measurements: Measurements,
    config: PromotionConfig,
    proxy: str = "",
) -> Verdict:
    """The verdict on `outcomes`: by prompt, for each pair of answers, the candidate's outcome in both orders.

    `proxy` says why the judge is the reward that was optimised; empty for a judge of its own.
    """
    pairs = [pair for row in outcomes for pair in row]
    gate = judge_outcomes(
        [[outcome for pair in row for outcome in pair] for row in outcomes],
        margin=config.margin,
        confidence=config.confidence,
        min_comparisons=config.min_comparisons,
    )
    rails = tuple(guard_rails(measurements, config))
    holds = gate.passes and all(rail.holds for rail in rails)
    return Verdict(
        outcome=("proxy only" if proxy else "pass") if holds else "fail",
        gate=gate,
        rails=rails,
        order_gap=sum(first != second for first, second in pairs) / len(pairs),
        proxy=proxy,
    )
