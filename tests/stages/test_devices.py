"""The stages on a pretended GPU: nothing mixes devices, and the numbers are the CPU's.

Of the code for a GPU this shows where tensors are and what is computed, not how fast, in which kernels or how
exactly: `tests/gpu` does, where there is one.
"""

from __future__ import annotations

import pytest
import torch

from rlhf_core.config import parse_params
from rlhf_core.generation import generate
from rlhf_core.modeling import encoding
from rlhf_core.modeling.loading import load_policy
from rlhf_core.stages.runner import run_stage
from tests.pretended_gpu import MixedDevicesError, OnGPU, pretended_gpu

from .toy import make_workspace

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; see tests/gpu")
CHATS = [[{"role": "user", "content": text}] for text in ("hello", "how are you today my friend?", "no")]


def on(params, device, finetuning="lora"):
    """Each stage as short as it can be."""
    tree = params.model_dump(mode="json", by_alias=True)
    tree["run"]["device"] = device
    tree["model"]["finetuning"] = finetuning
    # The first steps of AdamW go by the sign of a gradient, also of one that only rounding keeps from 0, as
    # that of the mean score is: at the rates of the other tests it moved by 2 %, on some machines.
    tree["sft"] |= {
        "num_rows": 8,
        "batch_size": 4,
        "num_epochs": 1,
        "num_eval_rows": 4,
        "learning_rate": 1e-3,
    }
    tree["reward"] |= {"batch_size": 16, "num_epochs": 1, "learning_rate": 1e-3}
    tree["ppo"] |= {"num_updates": 1, "learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    tree["evaluate"] |= {"num_prompts": 4, "bootstrap_samples": 100}
    return parse_params(tree, "test")


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_stages_do_on_a_gpu_what_they_do_on_a_cpu(
    tmp_path, tiny_model_dir, small_params, monkeypatch, finetuning
):
    monkeypatch.setenv("RLHF_TRACKING", "off")
    one, other = (make_workspace(tmp_path / name, tiny_model_dir) for name in ("cpu", "gpu"))
    for stage in ("sft", "reward", "ppo", "evaluate"):
        expected = run_stage(stage, on(small_params, "cpu", finetuning), one)
        with pretended_gpu(monkeypatch):
            found = run_stage(stage, on(small_params, "cuda", finetuning), other)
        # Other sums in attention and norms, and an optimizer that enlarges what differs: not bit for bit.
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-3, nan_ok=True), stage


def test_generation_on_a_gpu_gives_the_texts_of_the_cpu(tiny_model_dir, small_params, monkeypatch):
    sampling = small_params.ppo.sampling.model_copy(update={"max_new_tokens": 12})
    model, tokenizer = load_policy(tiny_model_dir, small_params.run)
    expected = generate(model, tokenizer, CHATS, sampling, samples_per_prompt=2, batch_size=4)
    with pretended_gpu(monkeypatch):
        model, tokenizer = load_policy(tiny_model_dir, on(small_params, "cuda").run)
        assert isinstance(next(model.parameters()), OnGPU)
        found = generate(model, tokenizer, CHATS, sampling, samples_per_prompt=2, batch_size=4)
    texts = [[answer.token_ids for answer in group] for group in found]
    assert texts == [[answer.token_ids for answer in group] for group in expected]


def test_a_tensor_left_on_the_cpu_is_found(tiny_model_dir, small_params, monkeypatch, tmp_path):
    """The pretence itself: it sees the fault that it is there to see."""
    monkeypatch.setenv("RLHF_TRACKING", "off")
    layout = make_workspace(tmp_path, tiny_model_dir)
    real = encoding._pad
    monkeypatch.setattr(encoding, "_pad", lambda rows, value: Stuck(real(rows, value)))
    with pretended_gpu(monkeypatch), pytest.raises(MixedDevicesError, match="of the CPU"):
        run_stage("sft", on(small_params, "cuda"), layout)


class Stuck:
    """A tensor whose move to the device was forgotten."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor
