"""PPO of TRL 1.12.0, the last release that has it, in an environment of its own without this project."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Seconds of each batch, and of generation within it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.generation: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def time_generation(clock: Clock, pad: int) -> None:
    """Wrap TRL's own function, to see its share and how long the answers were."""
    module = sys.modules[PPOTrainer.__module__]
    plain = module.batch_generation

    def timed(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        started = time.perf_counter()
        found = plain(model, queries, *rest)
        clock.generation.append(time.perf_counter() - started)
        clock.tokens.append(int((found[0][:, queries.shape[1] :] != pad).sum()))
        return found

    module.batch_generation = timed


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(case["model"], padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token or "<|pad|>"})
    causal = lambda: AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)  # noqa: E731

    def scorer() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(
            case["model"], num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    minibatches, batch = case["minibatches"], case["batch"]
    config = PPOConfig(
        output_dir=case["directory"],
        per_device_train_batch_size=batch // minibatches,
        gradient_accumulation_steps=minibatches,
        num_mini_batches=minibatches,
        num_ppo_epochs=case["epochs"],
        local_rollout_forward_batch_size=batch,
        response_length=case["response_length"],
        stop_token="eos" if case["stop"] else None,
        total_episodes=batch * (case["batches"] + 1),
        temperature=1.0,
        learning_rate=1e-5,
        num_sample_generations=0,
        bf16=case["bf16"],
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    peft = None
    if case["lora"]:
        from peft import LoraConfig

        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = case["prompts"] * (1 + (case["batches"] + 2) * batch // len(case["prompts"]))
    dataset = Dataset.from_dict({"input_ids": rows})
    clock = Clock()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=causal(),
        ref_model=None if case["lora"] else causal(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(batch)),
        callbacks=[clock],
        peft_config=peft,
    )
    time_generation(clock, tokenizer.pad_token_id)
    clock.ends.append(time.perf_counter())
    trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    print(
        json.dumps(
            {
                "seconds": seconds[1:],
                "phases": {"generation": sum(clock.generation[1:]) / case["batches"]},
                "tokens": clock.tokens[1:],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
