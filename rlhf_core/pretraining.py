"""Next-token training of every weight on the prepared text, which stage `pretrain` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.checkpoint import Checkpoints, inputs_digest
from rlhf_core.config import Params
from rlhf_core.data.rows import read_rows
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, encode_response, make_batch
from rlhf_core.modeling.loading import load_tokenizer, read_provenance, write_provenance
from rlhf_core.modeling.logprobs import response_hidden, token_logprobs
from rlhf_core.modeling.roles import FullRoles
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, Task, in_micro_batches, train

ROLE = "policy"
SHOWN_ROWS = 8


class TextTask(Task):
    """Next-token cross-entropy on whole texts."""

    def __init__(self, roles: FullRoles, eval_rows: Sequence[list[int]], micro_batch_size: int) -> None:
        self.roles = roles
        self.eval_rows = eval_rows
        self.micro_batch_size = micro_batch_size

    def length(self, row: list[int]) -> int:
        return len(row)

    def weight(self, rows: Sequence[list[int]]) -> float:
        return float(sum(len(row) - 1 for row in rows))

    def flops(self, rows: Sequence[list[int]]) -> float:
        return self.roles.flops(ROLE).training(sum(map(len, rows)), int(self.weight(rows)))

    def loss(self, rows: Sequence[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        pad = self.roles.tokenizer.pad_token_id
        batch = make_batch([row[:1] for row in rows], [row[1:] for row in rows], pad, self.roles.device)
        logits = self.roles.logits(ROLE, response_hidden(self.roles.hidden(ROLE, *batch.inputs), batch))
        targets = batch.responses[batch.response_mask]
        return -token_logprobs(logits, targets, temperature=1.0)[0].sum(), {}

    def describe(self, row: list[int]) -> dict[str, str]:
        return {"text": self.roles.tokenizer.decode(row)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        parts = ranks.share(in_micro_batches(self.eval_rows, self.micro_batch_size, len))
        with self.roles.gathered():
            sums = ranks.total([{"loss": self.loss(rows)[0]} for rows in parts])
        return {"eval/loss": sums["loss"] / self.weight(self.eval_rows)}


def pretrain(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.pretrain
    roles = FullRoles(load_tokenizer(layout.model("base")), params)
    roles.add(ROLE, path=layout.model("base"))
    roles.shard()
    files = {split: layout.prepared_file("demonstrations", split) for split in ("train", "eval")}
    texts = {split: encode_texts(roles, file, config.max_length) for split, file in files.items()}
    eval_rows = texts["eval"][: 4 * config.batch_size]
    task = TextTask(roles, eval_rows, config.batch_size)
    tracker.table("training_samples", [task.describe(row) for row in texts["train"][:SHOWN_ROWS]])
    schedule = Schedule(
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
        max_grad_norm=config.max_grad_norm,
        eval_every=max(1, config.num_steps // 10),
        checkpoint_seconds=config.checkpoint_seconds,
    )
    origin = {
        "params": params.model_dump(mode="json", include={"run", "model", "pretrain"}),
        "inputs": inputs_digest([layout.model("base"), *files.values()]),
    }
    checkpoints = Checkpoints(layout.run_dir("pretrain") / "checkpoints", origin)
    tracker.progress(0, 1, "evaluating before training")
    before = task.evaluate()["eval/loss"]
    after = train(
        task, texts["train"], roles.parameters(ROLE), schedule, checkpoints, tracker, seed=params.run.seed
    )
    roles.unshard()
    if ranks.is_first():
        with staged_dir(layout.model("pretrained")) as out:
            model = roles.export(ROLE, out, "CAUSAL_LM")
            model.to(getattr(torch, params.model.save_dtype)).save_pretrained(out)
            roles.tokenizer.save_pretrained(out)
            write_provenance(out, {"stage": "pretrain", "base": read_provenance(layout.model("base"))})
    checkpoints.clear()
    return {
        "pretrain/num_steps": config.num_steps,
        "pretrain/eval_loss_before": before,
        "pretrain/eval_loss": after["eval/loss"],
    }


def encode_texts(roles: FullRoles, path: Path, max_length: int) -> list[list[int]]:
    """Demonstrations as running text in the chat form, cut to `max_length` tokens."""
    tokenizer = roles.tokenizer
    return [
        (encode_prompt(tokenizer, row["messages"]) + encode_response(tokenizer, row["response"]))[:max_length]
        for row in read_rows(path)
    ]
