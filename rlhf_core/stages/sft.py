"""Stage `sft`: supervised fine-tuning on demonstrations, the loss on response tokens only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.checkpoint import Checkpoints, inputs_digest
from rlhf_core.config import Params, SFTConfig
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, encode_response, encode_turns, make_batch
from rlhf_core.modeling.loading import read_provenance, write_provenance
from rlhf_core.modeling.logprobs import response_hidden, token_logprobs
from rlhf_core.modeling.roles import Roles, open_roles
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, Task, in_micro_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLE = "policy"
SHOWN_ROWS = 8


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]  # ends with EOS
    targets: list[bool]  # which tokens of `response` are learnt

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class CompletionTask(Task):
    """Next-token cross-entropy on the target tokens of (prompt, response) rows."""

    def __init__(self, roles: Roles, eval_rows: Sequence[Example], config: SFTConfig, seed: int) -> None:
        self.roles = roles
        self.eval_rows = eval_rows
        self.config = config
        self.noise = torch.Generator().manual_seed(seed)
        self._seed = seed

    def start_step(self, step: int) -> None:
        """The noise of a step follows from the seed and the step, so a resume needs no state of it."""
        self.noise.manual_seed(self._seed * 1_000_003 + step)

    def length(self, row: Example) -> int:
        return len(row)

    def weight(self, rows: Sequence[Example]) -> float:
        return float(sum(sum(row.targets) for row in rows))

    def flops(self, rows: Sequence[Example]) -> float:
        return self.roles.flops(ROLE).training(sum(map(len, rows)), sum(sum(row.targets) for row in rows))

    def loss(self, rows: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.config.neftune_alpha:
            return self._loss(rows)
        with self.roles.using(ROLE) as model, noisy_embeddings(model, self.config.neftune_alpha, self.noise):
            return self._loss(rows)

    def _loss(self, rows: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = make_batch(
            [r.prompt for r in rows],
            [r.response for r in rows],
            self.roles.tokenizer.pad_token_id,
            self.roles.device,
            row_tokens=self.config.max_length if self.config.packing else 0,
        )
        learnt = torch.tensor([target for row in rows for target in row.targets], device=self.roles.device)
        hidden = response_hidden(self.roles.hidden(ROLE, *batch.inputs), batch)[learnt]
        logits = self.roles.logits(ROLE, hidden)  # (N, V), N target tokens
        targets = batch.responses[batch.response_mask][learnt]
        loss = -token_logprobs(logits, targets, temperature=1.0)[0].sum()
        return loss, {"train/token_accuracy": (logits.argmax(-1) == targets).sum()}

    def describe(self, row: Example) -> dict[str, str]:
        decode = self.roles.tokenizer.decode
        return {"prompt": decode(row.prompt), "response": decode(row.response)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        parts = []
        with self.roles.gathered():
            for rows in ranks.share(in_micro_batches(self.eval_rows, self.config.micro_batch_size, len)):
                loss, stats = self._loss(rows)
                parts.append({"loss": loss, "correct": stats["train/token_accuracy"]})
        sums, weight = ranks.total(parts), self.weight(self.eval_rows)
        return {
            "eval/loss": sums["loss"] / weight,
            "eval/perplexity": math.exp(sums["loss"] / weight),
            "eval/token_accuracy": sums["correct"] / weight,
        }


@contextlib.contextmanager
def noisy_embeddings(model: PreTrainedModel, alpha: float, generator: torch.Generator) -> Iterator[None]:
    """Add noise, uniform in (-1, 1) * alpha / sqrt(T D), to embedded rows (S, T, D) (Jain et al. 2023)."""

    def add_noise(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        noise = torch.empty(embedded.shape).uniform_(-1.0, 1.0, generator=generator)
        scale = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + (scale * noise).to(embedded)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.sft
    train_file = layout.prepared_file("demonstrations", "train")
    eval_file = layout.prepared_file("demonstrations", "eval")
    roles = open_roles(params, layout.model("pretrained"), trained=[ROLE], seed=params.run.seed)
    train_rows, too_long = encode_file(
        roles.tokenizer, train_file, config.max_length, config.num_rows, params.run.seed, config.loss_on
    )
    eval_rows, _ = encode_file(
        roles.tokenizer, eval_file, config.max_length, config.num_eval_rows, params.run.seed
    )
    tracker.dataset("demonstrations", train_file, "training")
    tracker.dataset("demonstrations", eval_file, "evaluation")

    task = CompletionTask(roles, eval_rows, config, params.run.seed)
    tracker.table("training_samples", [task.describe(row) for row in train_rows[:SHOWN_ROWS]])
    tracker.progress(0, 1, "evaluating before training")
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

    Raises InputError when no row fits.
    """
    rows = read_rows(path)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    examples: list[Example] = []
    too_long = 0
    for i in order:
        if len(examples) == num_rows:
            break
        example = encode_example(tokenizer, rows[i], loss_on)
        if len(example) > max_length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: none of {len(rows)} rows fits into {max_length} tokens (max_length)")
    return examples, too_long


def encode_example(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], loss_on: str = "response"
) -> Example:
    """A demonstration as tokens, and which of them are learnt.

    The last response; or with `loss_on` assistant every turn of the assistant, with all everything but the
    first token, which has nothing before it that could predict it.
    """
    if loss_on == "assistant":
        turns = [*row["messages"], {"role": "assistant", "content": row["response"]}]
        ids, learnt = encode_turns(tokenizer, turns)
        start = learnt.index(True)
        return Example(ids[:start], ids[start:], learnt[start:])
    prompt = encode_prompt(tokenizer, row["messages"])
    response = encode_response(tokenizer, row["response"])
    if loss_on == "all":
        prompt, response = prompt[:1], prompt[1:] + response
    return Example(prompt, response, [True] * len(response))


def save_causal_model(roles: Roles, final: Path, params: Params, origin: dict[str, object]) -> None:
    """Write the trained policy as a plain Hugging Face directory, its adapter beside it."""
    roles.unshard()
    if not ranks.is_first():
        return
    with staged_dir(final) as out:
        model = roles.export(ROLE, out, "CAUSAL_LM")
        model.to(getattr(torch, params.model.save_dtype)).save_pretrained(out)
        roles.tokenizer.save_pretrained(out)
        write_provenance(out, {"stage": final.name, "finetuning": params.model.finetuning, "base": origin})
