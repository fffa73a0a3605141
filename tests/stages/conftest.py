"""Parameters and a workspace for the training stages on a tiny model."""

from __future__ import annotations

import pytest

from rlhf_core.config import parse_params, read_yaml

from .toy import make_workspace


@pytest.fixture
def small_params(root):
    tree = read_yaml(root / "params.yaml")
    tree["run"] |= {"device": "cpu", "precision": "float32"}
    tree["model"] |= {"save_dtype": "float32"}
    tree["sft"] |= {
        "num_rows": 32,
        "batch_size": 8,
        "micro_batch_size": 4,
        "num_epochs": 3,
        "learning_rate": 2e-2,
    }
    tree["sft"] |= {"num_eval_rows": 8, "eval_every": 4, "checkpoint_seconds": 0.0}
    tree["reward"] |= {"batch_size": 8, "micro_batch_size": 4, "num_epochs": 3, "learning_rate": 1e-2}
    tree["reward"] |= {"checkpoint_seconds": 0.0}
    tree["ppo"] |= {"num_updates": 4, "rollout_batch_size": 8, "minibatch_size": 4, "micro_batch_size": 4}
    tree["ppo"] |= {
        "kl_budget": 12.0,
        "checkpoint_every": 1,
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
    }
    tree["ppo"]["sampling"] |= {"max_new_tokens": 8}
    return parse_params(tree, "test")


@pytest.fixture
def workspace(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "off")
    return make_workspace(tmp_path / "whole", tiny_model_dir)
