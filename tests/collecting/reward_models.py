"""Reward models of random heads on a tiny trunk."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_core.config import RunConfig
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.reward import Normalisation, ScalarHead, member_directory, save_reward_model


def make_reward_model(tiny_model_dir: Path, directory: Path, members: int = 1) -> Path:
    for number in range(members):
        model, tokenizer = load_policy(tiny_model_dir, RunConfig.alone(), dtype=torch.float32)
        own = member_directory(directory, number)
        own.mkdir(parents=True, exist_ok=True)
        head = ScalarHead(model.config.hidden_size, seed=number)
        save_reward_model(model, head, Normalisation(0.0, 1.0), own, torch.float32)
        tokenizer.save_pretrained(own)
    return directory
