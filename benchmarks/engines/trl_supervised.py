"""SFT and reward model of TRL 1.16.0, in an environment of its own without this project."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def common(case: dict) -> dict[str, Any]:
    return {
        "output_dir": case["directory"],
        "per_device_train_batch_size": case["batch"],
        "max_steps": case["batches"] + 1,
        "learning_rate": 1e-5,
        "bf16": case["bf16"],
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "max_length": case["max_length"],
        "seed": 0,
        # Its rows come in the order given, so that both engines see the same batches.
        "train_sampling_strategy": "sequential",
    }


def sft_trainer(case: dict) -> Any:
    from trl import SFTConfig, SFTTrainer

    options = {"packing": case["packing"], "completion_only_loss": True}
    rows = [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in case["rows"]]
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    config = SFTConfig(**common(case), **options)
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[CLOCK])


def reward_trainer(case: dict) -> Any:
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in case["rows"]]
    model = AutoModelForSequenceClassification.from_pretrained(
        case["model"], num_labels=1, dtype=torch.float32
    )
    config = RewardConfig(**common(case))
    return RewardTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[CLOCK])


CLOCK = Clock()


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    trainer = {"sft": sft_trainer, "reward": reward_trainer}[case["task"]](case)
    trainer.train()
    seconds = [b - a for a, b in zip(CLOCK.ends, CLOCK.ends[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds[1:], "phases": {}, "tokens": case["tokens"][1:], "peak_gib": peak}))


if __name__ == "__main__":
    main()
