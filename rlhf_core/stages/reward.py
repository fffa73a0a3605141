"""Stage `reward`: a pairwise reward model (Bradley-Terry) from the SFT model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.checkpoint import Checkpoints, inputs_digest
from rlhf_core.config import Params, RewardConfig
from rlhf_core.data.rows import TIE
from rlhf_core.errors import InputError
from rlhf_core.evaluation.reward_model import ensemble_metrics, evaluate_reward_model, write_pairs
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import make_batch
from rlhf_core.modeling.loading import read_provenance, write_provenance
from rlhf_core.modeling.pairs import Pair, Ranking, RatingScales, encode_pairs, rankings
from rlhf_core.modeling.reward import (
    Normalisation,
    ScalarHead,
    last_response_hidden,
    member_directory,
    member_role,
    save_reward_model,
)
from rlhf_core.modeling.roles import Roles, open_roles
from rlhf_core.rl.losses import pairwise_loss, rating_loss
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, Task, in_micro_batches, train

NORMALISATION_PAIRS = 64  # 128 scores: a mean to within a tenth of a standard deviation

SHOWN_PAIRS = 8


class PairwiseTask(Task):
    """-log sigmoid(score of chosen - score of rejected) over rankings, or regression on the answers' ratings.

    All pairs of one prompt are in one micro-batch, so each answer is scored once, and count 1 together
    (Ouyang et al. 2022, section 3.5: 1 / C(K, 2) each), so a prompt with many answers is not overfitted.
    With several heads each has a role of its own, and losses and metrics are means over these members.
    """

    def __init__(
        self, roles: Roles, heads: Sequence[ScalarHead], eval_rows: Sequence[Pair], config: RewardConfig
    ) -> None:
        self.roles, self.heads = roles, heads
        self.eval_rows = eval_rows
        self.config = config

    def length(self, row: Ranking) -> int:
        return max(map(len, row))

    def weight(self, rows: Sequence[Ranking]) -> float:
        return float(len(rows))

    def flops(self, rows: Sequence[Ranking]) -> float:
        """Each prompt counts once, and so does each of its answers."""
        answers = [{tuple(side) for pair in row for side in (pair.chosen, pair.rejected)} for row in rows]
        tokens = sum(len(row[0].prompt) for row in rows)
        tokens += sum(len(answer) for own in answers for answer in own)
        return len(self.heads) * self.roles.flops(member_role(0)).training(tokens)

    def loss(self, rows: Sequence[Ranking]) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [pair for row in rows for pair in row]
        weights = [1.0 / len(row) / len(self.heads) for row in rows for _ in row]
        chosen, rejected = self.scores(pairs)
        return objective(pairs, chosen, rejected, weights, self.config)

    def scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Raw scores of the chosen and the rejected responses, (members, B) each."""
        sides = [(tuple(pair.prompt), tuple(pair.chosen)) for pair in pairs]
        sides += [(tuple(pair.prompt), tuple(pair.rejected)) for pair in pairs]
        index = {side: i for i, side in enumerate(dict.fromkeys(sides))}
        batch = make_batch(
            [prompt for prompt, _ in index],
            [response for _, response in index],
            self.roles.tokenizer.pad_token_id,
            self.roles.device,
        )
        hidden = (self.roles.hidden(member_role(i), *batch.inputs) for i in range(len(self.heads)))
        scores = [
            head(last_response_hidden(own, batch)) for head, own in zip(self.heads, hidden, strict=True)
        ]
        chosen, rejected = torch.stack(scores)[:, [index[side] for side in sides]].chunk(2, dim=-1)
        return chosen, rejected

    @torch.no_grad()
    def all_scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Raw scores in the order of `pairs`, (members, B) each."""
        index = {id(pair): i for i, pair in enumerate(pairs)}
        chosen, rejected = torch.zeros(2, len(self.heads), len(pairs))
        parts = in_micro_batches(rankings(pairs), self.config.micro_batch_size, self.length)
        parts = [[pair for row in rows for pair in row] for rows in parts]
        with self.roles.gathered():
            own = [torch.stack(self.scores(part)).cpu() for part in ranks.share(parts)]
        scores = ranks.gather(own)
        for part, found in zip(parts, scores, strict=True):
            where = [index[id(pair)] for pair in part]
            chosen[:, where], rejected[:, where] = found
        return chosen, rejected

    def describe(self, row: Ranking) -> dict[str, Any]:
        decode = self.roles.tokenizer.decode
        return {
            "prompt": decode(row[0].prompt),
            "pairs": [{"chosen": decode(pair.chosen), "rejected": decode(pair.rejected)} for pair in row],
        }

    def evaluate(self) -> dict[str, float]:
        rows = self.eval_rows
        plain = {"margin_scale": 0.0, "label_smoothing": 0.0, "centering_coef": 0.0}
        config = self.config.model_copy(update=plain)  # the likelihood alone, to compare across settings
        chosen, rejected = self.all_scores(rows)
        loss, stats = objective(rows, chosen, rejected, [1.0] * len(rows), config)
        count = len(rows) * len(self.heads)
        named = {"eval/loss": loss} | {name.replace("train/", "eval/"): x for name, x in stats.items()}
        return {name: float(value) / count for name, value in named.items()}


def objective(
    pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor, weights: Sequence[float], config: RewardConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and metrics of scores, (members, B) each; every member counts each pair its weight."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), device=chosen.device)

    loss, stats = pairwise_loss(
        chosen,
        rejected,
        weights=column(weights),
        probabilities=column(pair.probability for pair in pairs),
        margins=config.margin_scale * column(pair.margin for pair in pairs),
        label_smoothing=config.label_smoothing,
        centering_coef=config.centering_coef,
    )
    if config.objective == "pairwise":
        return loss, stats
    rated = [pair.ratings for pair in pairs if pair.ratings is not None]
    ratings = column(rating[side] for side in (0, 1) for rating in rated)
    halves = column(weights).repeat(2) / 2  # an answer counts as each of its pairs does
    regression, errors = rating_loss(torch.cat([chosen, rejected], dim=-1), ratings, weights=halves)
    return regression, stats | errors


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.reward
    files = {split: layout.preferences / f"{split}.parquet" for split in ("train", "eval")}
    names = [member_role(i) for i in range(config.ensemble_size)]
    roles = open_roles(params, layout.model("sft"), trained=names, seed=params.run.seed)
    train_rows, too_long = encode_pairs(roles.tokenizer, files["train"], config.max_length)
    eval_rows, _ = encode_pairs(roles.tokenizer, files["eval"], config.max_length)
    for split, file in files.items():
        tracker.dataset("preferences", file, "training" if split == "train" else "evaluation")

    used = train_rows
    if config.objective == "rating":
        scales = RatingScales.of(train_rows)
        used, eval_rows = scales.rated(train_rows), scales.rated(eval_rows)
    if not used or not eval_rows:
        raise InputError(
            f"{files['eval' if used else 'train']}: no pair has ratings of both answers, which "
            "reward.objective = rating needs; use pairwise"
        )
    with roles.using(names[0]) as model:
        size = model.config.hidden_size
    heads = [ScalarHead(size, params.run.seed + i).to(roles.device) for i in range(len(names))]
    watched = eval_rows[:: math.ceil(len(eval_rows) / config.num_watched_pairs)]  # of every source
    task = PairwiseTask(roles, heads, watched, config)
    origin = {
        "params": params.model_dump(mode="json", include={"run", "model", "reward"}),
        "inputs": inputs_digest([layout.model("sft"), *files.values()]),
    }
    checkpoints = Checkpoints(layout.run_dir("reward") / "checkpoints", origin)
    parameters = [p for name in names for p in roles.parameters(name)]
    parameters += [p for head in heads for p in head.parameters()]
    rows = rankings(used)
    schedule = make_schedule(config, len(rows))
    train(task, rows, parameters, schedule, checkpoints, tracker, seed=params.run.seed)
    decided = [row for row in eval_rows if row.probability > TIE] or eval_rows
    tracker.progress(schedule.num_steps, schedule.num_steps, "scoring held-out pairs")
    scores = task.all_scores(decided)
    tracker.progress(schedule.num_steps, schedule.num_steps, "fitting the normalisation")
    constants = fit_normalisation(task, used)
    tracker.progress(schedule.num_steps, schedule.num_steps, "saving")
    metrics = evaluate_reward_model(decided, scores, params)
    metrics |= ensemble_metrics(scores, constants) if len(heads) > 1 else {}
    roles.unshard()
    if ranks.is_first():
        write_pairs(layout.pair_scores, decided, scores, constants)
        tracker.table("held_out_pairs", sample_pairs(task, decided, scores))
        _save(roles, heads, constants, params, layout)
    checkpoints.clear()
    return {
        "reward/num_train_pairs": len(used),
        "reward/num_train_prompts": len(rows),
        "reward/num_too_long": too_long,
        "reward/num_unrated": len(train_rows) - len(used),
        "reward/num_train_ties": sum(pair.probability == TIE for pair in used),
        "reward/num_eval_ties": len(eval_rows) - len(decided),
        "reward/score_mean": constants[0].mean,
        "reward/score_std": constants[0].std,
        **metrics,
    }


def sample_pairs(
    task: PairwiseTask, rows: Sequence[Pair], scores: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """Some held-out pairs, from the one that the model has most wrong to the one that it is surest of.

    `scores` holds the raw ones of chosen and rejected responses, (members, B) each.
    """
    probabilities = torch.sigmoid((scores[0] - scores[1]).mean(dim=0)).tolist()
    order = sorted(range(len(rows)), key=probabilities.__getitem__)
    shown = [order[round(i * (len(order) - 1) / (SHOWN_PAIRS - 1))] for i in range(SHOWN_PAIRS)]
    decode = task.roles.tokenizer.decode
    return [
        {
            "probability of chosen": round(probabilities[i], 3),
            "prompt": decode(rows[i].prompt),
            "chosen": decode(rows[i].chosen),
            "rejected": decode(rows[i].rejected),
            "source": rows[i].source,
        }
        for i in dict.fromkeys(shown)
    ]


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


def fit_normalisation(task: PairwiseTask, rows: Sequence[Pair]) -> list[Normalisation]:
    """By member: mean and standard deviation of the raw scores on answers of the SFT model, PPO's reference.

    Human pairs hold no such answers; they are used only where there is nothing else.
    """
    own = [row for row in rows if row.source.startswith("ai:")] or list(rows)
    own = own[:: math.ceil(len(own) / NORMALISATION_PAIRS)]
    scores = torch.cat(task.all_scores(own), dim=-1).double()
    return [
        Normalisation(mean=own.mean().item(), std=max(own.std(unbiased=False).item(), 1e-6)) for own in scores
    ]


def _save(
    roles: Roles,
    heads: Sequence[ScalarHead],
    constants: Sequence[Normalisation],
    params: Params,
    layout: Layout,
) -> None:
    dtype = getattr(torch, params.model.save_dtype)
    facts: dict[str, object] = {
        "stage": "reward",
        "finetuning": params.model.finetuning,
        "base": read_provenance(layout.model("sft")),
    }
    with staged_dir(layout.model("reward")) as out:
        for i, (head, normalisation) in enumerate(zip(heads, constants, strict=True)):
            directory = member_directory(out, i)
            directory.mkdir(parents=True, exist_ok=True)
            trunk = roles.export(member_role(i), directory, "SEQ_CLS", more_to_come=i + 1 < len(heads))
            save_reward_model(trunk, head, normalisation, directory, dtype)
            roles.tokenizer.save_pretrained(directory)
            write_provenance(directory, facts)
