"""What a reward model is worth on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.atomic import write_text
from rlhf_core.config import Params
from rlhf_core.evaluation.statistics import (
    accuracy_with_interval,
    brier_score,
    expected_calibration_error,
    length_baseline_accuracy,
)
from rlhf_core.modeling.pairs import Pair
from rlhf_core.modeling.reward import Normalisation
from rlhf_core.rl.losses import pairwise_loss

SUBSETS: dict[str, Callable[[Pair], bool]] = {
    "ai": lambda pair: pair.source.startswith("ai:"),
    "human": lambda pair: pair.source.startswith("human:"),
    "longer_chosen": lambda pair: len(pair.chosen) > len(pair.rejected),
    "shorter_chosen": lambda pair: len(pair.chosen) < len(pair.rejected),
}


def evaluate_reward_model(
    rows: Sequence[Pair], scores: tuple[Tensor, Tensor], params: Params
) -> dict[str, float]:
    """Accuracy on held-out pairs with its interval, beside what the answers' length alone can tell.

    `scores` are the raw ones of the chosen and of the rejected responses, (members, B) each; their mean over
    the members counts.
    """
    chosen, rejected = (side.mean(dim=0) for side in scores)
    loss, _ = pairwise_loss(chosen, rejected)
    correct = (chosen > rejected).tolist()
    probabilities = torch.sigmoid(chosen.double() - rejected.double()).tolist()
    confidence, seed = params.reward.confidence, params.run.seed
    interval = accuracy_with_interval(correct, [row.group for row in rows], confidence=confidence, seed=seed)
    metrics = {
        "reward/num_eval_pairs": len(rows),
        "reward/accuracy": interval.estimate,
        "reward/accuracy_low": interval.low,
        "reward/accuracy_high": interval.high,
        "reward/length_baseline_accuracy": length_baseline_accuracy(
            [len(row.chosen) for row in rows], [len(row.rejected) for row in rows]
        ),
        "reward/loss": float(loss) / len(rows),
        "reward/margin": float((chosen - rejected).mean()),
        "reward/brier": brier_score(probabilities),
        "reward/ece": expected_calibration_error(probabilities),
    }
    for name, belongs in SUBSETS.items():
        own = [c for c, row in zip(correct, rows, strict=True) if belongs(row)]
        if own:
            metrics[f"reward/accuracy_{name}"] = sum(own) / len(own)
            metrics[f"reward/num_eval_pairs_{name}"] = len(own)
    return metrics


def ensemble_metrics(scores: tuple[Tensor, Tensor], constants: Sequence[Normalisation]) -> dict[str, float]:
    """Accuracy of each member, and how far members disagree on the gap of pairs they get right and wrong.

    An ensemble is worth its price when it disagrees more where it is wrong.
    """
    gaps = scores[0].double() - scores[1].double()
    right = gaps.mean(dim=0) > 0
    metrics = {f"reward/accuracy_member_{i}": (own > 0).double().mean().item() for i, own in enumerate(gaps)}
    scaled = gaps / torch.tensor([constant.std for constant in constants], dtype=torch.double)[:, None]
    spread = scaled.std(dim=0, unbiased=False)
    for name, where in (("right", right), ("wrong", ~right)):
        if where.any():
            metrics[f"reward/disagreement_{name}"] = spread[where].mean().item()
    return metrics


def write_pairs(
    path: Path, rows: Sequence[Pair], scores: tuple[Tensor, Tensor], constants: Sequence[Normalisation]
) -> None:
    """One line a held-out pair: normalised scores, and the probability given to the chosen answer.

    Means over the members of an ensemble, of which `scores` holds the raw ones, (members, B) each.
    """
    sides = [side.double() for side in scores]
    probabilities = torch.sigmoid((sides[0] - sides[1]).mean(dim=0)).tolist()
    normalised = [
        torch.stack([constant.apply(own) for constant, own in zip(constants, side, strict=True)])
        for side in sides
    ]
    columns = [side.mean(dim=0).tolist() for side in normalised]
    lines = ["source,longer,chosen,rejected,probability"]
    for row, a, b, p in zip(rows, *columns, probabilities, strict=True):
        longer = "chosen" if len(row.chosen) > len(row.rejected) else "rejected"
        longer = "neither" if len(row.chosen) == len(row.rejected) else longer
        lines.append(f"{row.source.partition(':')[0]},{longer},{a:.6g},{b:.6g},{p:.6g}")
    write_text(path, "\n".join(lines) + "\n")
