"""A policy that has learnt to say something nice, beside the tiny one that says anything."""

from __future__ import annotations

import shutil

import pytest
import torch

from rlhf_core.config import parse_params, read_yaml

NICE = "that is great! i love the sea and the sun."


@pytest.fixture(scope="session")
def nice_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model after some steps on one nice sentence."""
    from rlhf_core.config import RunConfig
    from rlhf_core.modeling.encoding import encode_prompt, encode_response
    from rlhf_core.modeling.loading import load_policy

    directory = tmp_path_factory.mktemp("nice") / "policy"
    shutil.copytree(tiny_model_dir, directory)
    model, tokenizer = load_policy(tiny_model_dir, RunConfig.alone(), dtype=torch.float32)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "how are you?"}])
    ids = torch.tensor([prompt + encode_response(tokenizer, NICE)], device=model.device)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def duel_params(root):
    """Small, and with guard-rails that a model of one sentence does not break."""
    tree = read_yaml(root / "params.yaml")
    tree["run"] |= {"device": "cpu", "precision": "float32"}
    tree["promotion"] |= {"num_prompts": 24, "min_comparisons": 20, "num_demonstrations": 4, "num_samples": 3}
    tree["promotion"] |= {"max_kl": 1e4, "max_length_ratio": 50.0, "min_distinct_ratio": 0.0}
    tree["promotion"] |= {"max_perplexity_ratio": 1e4, "max_repeated": 1.0}
    tree["promotion"]["sampling"] |= {"max_new_tokens": 16}
    return parse_params(tree, "test")
