"""Stage `sft`: supervised fine-tuning on demonstrations, the loss on response tokens only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core.atomic import staged_dir
from rlhf_core.checkpoint import Checkpoints, inputs_digest
from rlhf_core.config import Params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, encode_response, make_batch
from rlhf_core.modeling.loading import read_provenance, write_provenance
from rlhf_core.modeling.logprobs import response_hidden
from rlhf_core.modeling.roles import Roles, open_roles
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, in_micro_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = "policy"


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]  # ends with EOS

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class CompletionTask:
    """Next-token cross-entropy on the responses of (prompt, response) rows."""

    def __init__(self, roles: Roles, eval_rows: Sequence[Example], micro_batch_size: int) -> None:
        self.roles = roles
        self.eval_rows = eval_rows
        self.micro_batch_size = micro_batch_size

    def length(self, row: Example) -> int:
        return len(row)

    def weight(self, rows: Sequence[Example]) -> float:
        return float(sum(len(row.response) for row in rows))

    def loss(self, rows: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = make_batch(
            [r.prompt for r in rows],
            [r.response for r in rows],
            self.roles.tokenizer.pad_token_id,
            self.roles.device,
        )
        hidden = response_hidden(self.roles.hidden(ROLE, batch.input_ids), batch)
        logits = self.roles.logits(ROLE, hidden).float()  # (N, V), N response tokens
        targets = batch.responses[batch.response_mask]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss, {"train/token_accuracy": (logits.argmax(-1) == targets).sum()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        loss = correct = 0.0
        for rows in in_micro_batches(self.eval_rows, self.micro_batch_size, len):
            part, stats = self.loss(rows)
            loss += float(part)
            correct += float(stats["train/token_accuracy"])
        weight = self.weight(self.eval_rows)
        return {
            "eval/loss": loss / weight,
            "eval/perplexity": math.exp(loss / weight),
            "eval/token_accuracy": correct / weight,
        }


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.sft
    train_file = layout.prepared_file("demonstrations", "train")
    eval_file = layout.prepared_file("demonstrations", "eval")
    roles = open_roles(params, layout.model("pretrained"), trained=ROLE, seed=params.run.seed)
    train_rows, too_long = encode_file(
        roles.tokenizer, train_file, config.max_length, config.num_rows, params.run.seed, config.loss_on
    )
    eval_rows, _ = encode_file(
        roles.tokenizer, eval_file, config.max_length, config.num_eval_rows, params.run.seed
    )
    tracker.dataset("demonstrations", train_file, "training")
    tracker.dataset("demonstrations", eval_file, "evaluation")

    task = CompletionTask(roles, eval_rows, config.micro_batch_size)
    before = task.evaluate()
    schedule = Schedule(
        num_steps=config.num_epochs * math.ceil(len(train_rows) / config.batch_size),
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
    origin = {
        "params": params.model_dump(mode="json", include={"run", "model", "sft"}),
        "inputs": inputs_digest([layout.model("pretrained"), train_file, eval_file]),
    }
    checkpoints = Checkpoints(layout.run_dir("sft") / "checkpoints", origin)
    after = train(
        task, train_rows, roles.parameters(ROLE), schedule, checkpoints, tracker, seed=params.run.seed
    )
    save_causal_model(roles, layout.model("sft"), params, read_provenance(layout.model("pretrained")))
    checkpoints.clear()
    return {
        "sft/num_rows": len(train_rows),
        "sft/num_eval_rows": len(eval_rows),
        "sft/num_too_long": too_long,
        "sft/num_steps": schedule.num_steps,
        "sft/eval_loss_before": before["eval/loss"],
        "sft/eval_loss": after["eval/loss"],
        "sft/eval_perplexity_before": before["eval/perplexity"],
        "sft/eval_perplexity": after["eval/perplexity"],
        "sft/eval_token_accuracy": after["eval/token_accuracy"],
    }


def encode_file(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    max_length: int,
    num_rows: int,
    seed: int,
    loss_on: str = "response",
) -> tuple[list[Example], int]:
    """At most `num_rows` examples, chosen by seed among those that fit; and how many were too long.

    With `loss_on` all, everything after the first token counts as response.

    Raises InputError when no row fits.
    """
    rows = read_rows(path)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    examples: list[Example] = []
    too_long = 0
    for i in order:
        if len(examples) == num_rows:
            break
        prompt = encode_prompt(tokenizer, rows[i]["messages"])
        response = encode_response(tokenizer, rows[i]["response"])
        # The first token has nothing before it that could predict it.
        example = (
            Example(prompt[:1], prompt[1:] + response) if loss_on == "all" else Example(prompt, response)
        )
        if len(example) > max_length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: none of {len(rows)} rows fits into {max_length} tokens (max_length)")
    return examples, too_long


def save_causal_model(roles: Roles, final: Path, params: Params, origin: dict[str, object]) -> None:
    """Write the trained policy as a plain Hugging Face directory, its adapter beside it."""
    with staged_dir(final) as out:
        model = roles.export(ROLE, out, "CAUSAL_LM")
        model.to(getattr(torch, params.model.save_dtype)).save_pretrained(out)
        roles.tokenizer.save_pretrained(out)
        write_provenance(out, {"stage": final.name, "finetuning": params.model.finetuning, "base": origin})
