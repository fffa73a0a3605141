"""How often the gate passes, by simulation: for the tables of docs/promotion.md, and for planning.

`python -m rlhf_core.promotion.power` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from rlhf_core.promotion.gate import exchange_p_value, score_bounds

PROMPTS = (64, 128, 256, 512)
WIN_RATES = (0.50, 0.54, 0.56, 0.58, 0.60, 0.65, 0.70)
TIE_SHARES = (0.0, 0.3)
CONFIDENCE = 0.95
TRIALS = 4000


def pass_rate(
    win_rate: float,
    prompts: int,
    *,
    ties: float = 0.0,
    margin: float = 0.0,
    confidence: float = CONFIDENCE,
    trials: int = TRIALS,
    seed: int = 0,
) -> float:
    """Share of simulated promotions that pass, when the candidate's true win rate, ties half, is `win_rate`.

    Each prompt is a tie with probability `ties`, else won or lost. Raises ValueError for impossible chances.
    """
    win = win_rate - ties / 2
    if not 0.0 <= win <= 1.0 - ties:
        raise ValueError(f"a win rate of {win_rate} is impossible with a share of {ties} ties")
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(prompts, [win, ties, 1.0 - win - ties], size=trials)
    # With one comparison a prompt the decision depends on the counts alone, of which there are few.
    found, times = np.unique(drawn, axis=0, return_counts=True)
    passed = sum(
        int(count) * _passes(*(int(n) for n in row), margin=margin, confidence=confidence)
        for row, count in zip(found, times, strict=True)
    )
    return passed / trials


def _passes(wins: int, ties: int, losses: int, *, margin: float, confidence: float) -> bool:
    low, _ = score_bounds([1.0] * wins + [0.5] * ties + [0.0] * losses, confidence)
    if not low > 0.5 + margin:
        return False
    return exchange_p_value([1] * wins + [-1] * losses) <= 1.0 - confidence


def prompts_needed(
    win_rate: float,
    *,
    power: float = 0.8,
    ties: float = 0.0,
    margin: float = 0.0,
    confidence: float = CONFIDENCE,
) -> int:
    """About how many prompts make the gate pass with chance `power` (normal approximation).

    n = ((z_confidence s_0 + z_power s_1) / (win_rate - 0.5 - margin))^2, with s_0 and s_1 the deviation of a
    prompt's share at the bound and at the true win rate.
    """
    effect = win_rate - 0.5 - margin
    if effect <= 0:
        raise ValueError(
            f"a win rate of {win_rate} is not above 0.5 + {margin}: no number of prompts is enough"
        )
    z_confidence, z_power = (NormalDist().inv_cdf(p) for p in (confidence, power))
    bound = 0.5 + margin
    deviations = [math.sqrt(max(0.0, p * (1.0 - p) - ties / 4)) for p in (bound, win_rate)]
    return math.ceil(((z_confidence * deviations[0] + z_power * deviations[1]) / effect) ** 2)


def power_rows() -> Iterator[list[str]]:
    """The table of pass rates: true win rate and share of ties by row, number of prompts by column."""
    for ties in TIE_SHARES:
        for win_rate in WIN_RATES:
            rates = [pass_rate(win_rate, prompts, ties=ties) for prompts in PROMPTS]
            yield [f"{win_rate:.0%}", f"{ties:.0%}", *(f"{rate:.1%}" for rate in rates)]


def needed_rows() -> Iterator[list[str]]:
    """The table of prompts needed, for a power of 80 % and of 90 %."""
    for win_rate in WIN_RATES[1:]:
        counts = [
            prompts_needed(win_rate, power=power, ties=ties) for power in (0.8, 0.9) for ties in TIE_SHARES
        ]
        yield [f"{win_rate:.0%}", *(f"{count:,}" for count in counts)]


def main() -> None:
    for rows in (power_rows(), needed_rows()):
        print("\n".join(f"| {' | '.join(row)} |" for row in rows), end="\n\n")


if __name__ == "__main__":
    main()
