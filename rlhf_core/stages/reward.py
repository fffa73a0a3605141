"""Stage `reward`: a pairwise reward model (Bradley-Terry) from the SFT model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir, write_text
from rlhf_core.checkpoint import Checkpoints, inputs_digest
from rlhf_core.config import Params, RewardConfig
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, encode_response, make_batch
from rlhf_core.modeling.loading import read_provenance, write_provenance
from rlhf_core.modeling.reward import Normalisation, ScalarHead, last_response_hidden, save_reward_model
from rlhf_core.modeling.roles import Roles, open_roles
from rlhf_core.rl.losses import pairwise_loss
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, Task, in_micro_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = "reward"
NORMALISATION_PAIRS = 64  # 128 scores: a mean to within a tenth of a standard deviation


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]  # ends with EOS
    rejected: list[int]  # ends with EOS
    margin: float  # of the labels, 0 when there is none
    group: str  # pairs of one prompt are not independent
    source: str  # "human:..." or "ai:..."

    def __len__(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


SUBSETS: dict[str, Callable[[Pair], bool]] = {
    "ai": lambda pair: pair.source.startswith("ai:"),
    "human": lambda pair: pair.source.startswith("human:"),
    "longer_chosen": lambda pair: len(pair.chosen) > len(pair.rejected),
    "shorter_chosen": lambda pair: len(pair.chosen) < len(pair.rejected),
}


Ranking = tuple[Pair, ...]  # the pairs of one prompt


def rankings(pairs: Sequence[Pair]) -> list[Ranking]:
    """The pairs of each prompt together, in the order in which the prompts first come."""
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(tuple(pair.prompt), []).append(pair)
    return [tuple(group) for group in groups.values()]


class PairwiseTask(Task):
    """-log sigmoid(score of chosen - score of rejected) over rankings.

    All pairs of one prompt are in one micro-batch, so each answer is scored once, and count 1 together
    (Ouyang et al. 2022, section 3.5: 1 / C(K, 2) each), so a prompt with many answers is not overfitted.
    """

    def __init__(
        self, roles: Roles, head: ScalarHead, eval_rows: Sequence[Pair], config: RewardConfig
    ) -> None:
        self.roles, self.head = roles, head
        self.eval_rows = eval_rows
        self.config = config

    def length(self, row: Ranking) -> int:
        return max(map(len, row))

    def weight(self, rows: Sequence[Ranking]) -> float:
        return float(len(rows))

    def loss(self, rows: Sequence[Ranking]) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [pair for row in rows for pair in row]
        device = self.roles.device
        return pairwise_loss(
            *self.scores(pairs),
            weights=torch.tensor([1.0 / len(row) for row in rows for _ in row], device=device),
            margins=self.config.margin_scale * torch.tensor([pair.margin for pair in pairs], device=device),
            label_smoothing=self.config.label_smoothing,
            centering_coef=self.config.centering_coef,
        )

    def scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Raw scores of the chosen and the rejected responses, (B,) each."""
        sides = [(tuple(pair.prompt), tuple(pair.chosen)) for pair in pairs]
        sides += [(tuple(pair.prompt), tuple(pair.rejected)) for pair in pairs]
        index = {side: i for i, side in enumerate(dict.fromkeys(sides))}
        batch = make_batch(
            [prompt for prompt, _ in index],
            [response for _, response in index],
            self.roles.tokenizer.pad_token_id,
            self.roles.device,
        )
        scores = self.head(last_response_hidden(self.roles.hidden(ROLE, *batch.inputs), batch))
        chosen, rejected = scores[[index[side] for side in sides]].chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def all_scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Raw scores in the order of `pairs`."""
        index = {id(pair): i for i, pair in enumerate(pairs)}
        chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
        parts = in_micro_batches(rankings(pairs), self.config.micro_batch_size, self.length)
        parts = [[pair for row in rows for pair in row] for rows in parts]
        scores = ranks.gather([torch.stack(self.scores(part)).cpu() for part in ranks.share(parts)])
        for part, found in zip(parts, scores, strict=True):
            where = [index[id(pair)] for pair in part]
            chosen[where], rejected[where] = found
        return chosen, rejected

    def describe(self, row: Ranking) -> dict[str, Any]:
        decode = self.roles.tokenizer.decode
        return {
            "prompt": decode(row[0].prompt),
            "pairs": [{"chosen": decode(pair.chosen), "rejected": decode(pair.rejected)} for pair in row],
        }

    def evaluate(self) -> dict[str, float]:
        loss, stats = pairwise_loss(*self.all_scores(self.eval_rows))
        count = len(self.eval_rows)
        return {
            "eval/loss": float(loss) / count,
            "eval/accuracy": float(stats["train/accuracy"]) / count,
            "eval/margin": float(stats["train/margin"]) / count,
        }


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.reward
    files = {split: layout.preferences / f"{split}.parquet" for split in ("train", "eval")}
    roles = open_roles(params, layout.model("sft"), trained=ROLE, seed=params.run.seed)
    train_rows, too_long = encode_pairs(roles.tokenizer, files["train"], config.max_length)
    eval_rows, _ = encode_pairs(roles.tokenizer, files["eval"], config.max_length)
    for split, file in files.items():
        tracker.dataset("preferences", file, "training" if split == "train" else "evaluation")

    with roles.using(ROLE) as model:
        head = ScalarHead(model.config.hidden_size, seed=params.run.seed).to(roles.device)
    watched = eval_rows[:: math.ceil(len(eval_rows) / config.num_watched_pairs)]  # of every source
    task = PairwiseTask(roles, head, watched, config)
    origin = {
        "params": params.model_dump(mode="json", include={"run", "model", "reward"}),
        "inputs": inputs_digest([layout.model("sft"), *files.values()]),
    }
    checkpoints = Checkpoints(layout.run_dir("reward") / "checkpoints", origin)
    parameters = [*roles.parameters(ROLE), *head.parameters()]
    rows = rankings(train_rows)
    schedule = make_schedule(config, len(rows))
    train(task, rows, parameters, schedule, checkpoints, tracker, seed=params.run.seed)
    scores = task.all_scores(eval_rows)
    metrics = evaluate_reward_model(eval_rows, scores, params)
    normalisation = fit_normalisation(task, train_rows)
    write_pairs(layout.pair_scores, eval_rows, scores, normalisation)
    _save(roles, head, normalisation, params, layout)
    checkpoints.clear()
    return {
        "reward/num_train_pairs": len(train_rows),
        "reward/num_train_prompts": len(rows),
        "reward/num_too_long": too_long,
        "reward/score_mean": normalisation.mean,
        "reward/score_std": normalisation.std,
        **metrics,
    }


def make_schedule(config: RewardConfig, num_rows: int) -> Schedule:
    return Schedule(
        num_steps=config.num_epochs * math.ceil(num_rows / config.batch_size),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        learning_rate=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
        max_grad_norm=config.max_grad_norm,
        eval_every=config.eval_every,
        decay=config.decay,
        keep=config.keep,
        patience=config.patience,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def encode_pairs(tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int) -> tuple[list[Pair], int]:
    """The pairs of `path` that fit, and how many did not. Raises InputError when none fits."""
    rows = read_rows(path)
    pairs = [
        Pair(
            prompt=encode_prompt(tokenizer, row["messages"]),
            chosen=encode_response(tokenizer, row["chosen"]),
            rejected=encode_response(tokenizer, row["rejected"]),
            margin=margin_of(row),
            group=row["prompt"],
            source=row["source"],
        )
        for row in rows
    ]
    fitting = [pair for pair in pairs if len(pair) <= max_length]
    if not fitting:
        raise InputError(
            f"{path}: none of {len(rows)} pairs fits into reward.max_length = {max_length} tokens"
        )
    return fitting, len(pairs) - len(fitting)


def margin_of(row: Mapping[str, Any]) -> float:
    """The labels' margin of a row, 0 when it has none."""
    margin = row["margin"]
    return 0.0 if margin is None or math.isnan(margin) else float(margin)


def fit_normalisation(task: PairwiseTask, rows: Sequence[Pair]) -> Normalisation:
    """Mean and standard deviation of the raw scores on answers of the SFT model, which is PPO's reference.

    Human pairs hold no such answers; they are used only where there is nothing else.
    """
    own = [row for row in rows if row.source.startswith("ai:")] or list(rows)
    own = own[:: math.ceil(len(own) / NORMALISATION_PAIRS)]
    scores = torch.cat(task.all_scores(own)).double()
    return Normalisation(mean=scores.mean().item(), std=max(scores.std(unbiased=False).item(), 1e-6))


def evaluate_reward_model(
    rows: Sequence[Pair], scores: tuple[Tensor, Tensor], params: Params
) -> dict[str, float]:
    """Accuracy on held-out pairs with its interval, beside what the answers' length alone can tell.

    `scores` are the raw ones of the chosen and of the rejected responses, (B,) each.
    """
    from rlhf_core.evaluation.statistics import (
        accuracy_with_interval,
        brier_score,
        expected_calibration_error,
        length_baseline_accuracy,
    )

    chosen, rejected = scores
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


def write_pairs(
    path: Path, rows: Sequence[Pair], scores: tuple[Tensor, Tensor], normalisation: Normalisation
) -> None:
    """One line a held-out pair: normalised scores, and the probability given to the chosen answer."""
    if not ranks.is_first():
        return
    chosen, rejected = (side.double() for side in scores)
    probabilities = torch.sigmoid(chosen - rejected).tolist()
    columns = [normalisation.apply(side).tolist() for side in (chosen, rejected)]
    lines = ["source,longer,chosen,rejected,probability"]
    for row, a, b, p in zip(rows, *columns, probabilities, strict=True):
        longer = "chosen" if len(row.chosen) > len(row.rejected) else "rejected"
        longer = "neither" if len(row.chosen) == len(row.rejected) else longer
        lines.append(f"{row.source.partition(':')[0]},{longer},{a:.6g},{b:.6g},{p:.6g}")
    write_text(path, "\n".join(lines) + "\n")


def _save(
    roles: Roles, head: ScalarHead, normalisation: Normalisation, params: Params, layout: Layout
) -> None:
    if not ranks.is_first():
        return
    with staged_dir(layout.model("reward")) as out:
        trunk = roles.export(ROLE, out, "SEQ_CLS")
        save_reward_model(trunk, head, normalisation, out, getattr(torch, params.model.save_dtype))
        roles.tokenizer.save_pretrained(out)
        facts: dict[str, object] = {
            "stage": "reward",
            "finetuning": params.model.finetuning,
            "base": read_provenance(layout.model("sft")),
        }
        write_provenance(out, facts)
