"""A formula that is broken on purpose must fail a test: a suite that passes any code proves none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MUTATIONS = {
    "sign of the log ratio": ("rl/losses.py", "(logprobs - old_logprobs)", "(old_logprobs - logprobs)"),
    "upper bound for lower": (
        "rl/losses.py",
        "torch.minimum(surrogate, clipped)",
        "torch.maximum(surrogate, clipped)",
    ),
    "mask of the surrogate": (
        "rl/losses.py",
        "-masked_sum(objective, response_mask)",
        "-objective.sum()",
    ),
    "value clip that helps": (
        "rl/losses.py",
        "torch.maximum(error, clipped_error)",
        "torch.minimum(error, clipped_error)",
    ),
    "rejected preferred": (
        "rl/losses.py",
        "gap = chosen_scores - rejected_scores",
        "gap = rejected_scores - chosen_scores",
    ),
    "label smoothing forgotten": (
        "rl/losses.py",
        "q = sure * (1.0 - label_smoothing) + (1.0 - sure) * label_smoothing",
        "q = sure",
    ),
    "soft labels upside down": ("rl/losses.py", "-q * logsigmoid(wanted)", "-(1.0 - q) * logsigmoid(wanted)"),
    "away from the ratings": ("rl/losses.py", "(scores - ratings) ** 2", "(scores + ratings) ** 2"),
    "doubt rewarded": ("rl/rewards.py", "-config.uncertainty_coef *", "config.uncertainty_coef *"),
    "discount forgotten": ("rl/advantages.py", "gamma * gae_lambda * running", "gae_lambda * running"),
    "next value off by one": ("rl/advantages.py", "values[:, 1:]", "values[:, :-1]"),
    "score one token early": (
        "rl/advantages.py",
        "response_mask.sum(dim=1) - 1",
        "(response_mask.sum(dim=1) - 2).clamp(min=0)",
    ),
    "sign of the KL price": ("rl/advantages.py", "(-kl_coef * kl)", "(kl_coef * kl)"),
    "sample compared with itself": ("rl/advantages.py", "/ (group_size - 1)", "/ group_size"),
    "biased KL estimate": ("rl/kl.py", "torch.exp(-log_ratio) - 1.0", "torch.exp(log_ratio) - 1.0"),
    "temperature upside down": ("modeling/logprobs.py", "logits.float() / temp", "logits.float() * temp"),
    "states shifted by one": (
        "modeling/encoding.py",
        "(before[i], *range(starts[i], starts[i] + len(response) - 1))",
        "range(starts[i], starts[i] + len(response))",
    ),
    "responses see each other": ("modeling/encoding.py", "(same_response | (", "(True | ("),
    "response seen from its prompt's end": (
        "modeling/encoding.py",
        "self._extend(responses[i], len(prompt), ",
        "self._extend(responses[i], len(self.ids), ",
    ),
    "mean over padding": ("rl/tensor_ops.py", "masked_sum(values, mask) / mask.sum()", "values.mean()"),
    "rollout keeps its graph": ("rl/rollout.py", "@torch.no_grad()\ndef collect", "def collect"),
    "same permutation each pass": (
        "rl/ppo.py",
        "torch.randperm(count // samples_per_prompt, generator=generator).tolist()",
        "list(range(count // samples_per_prompt))",
    ),
    "step divided by micro-batch": (
        "rl/ppo.py",
        "(counts * loss / num_tokens).backward()",
        "(counts * loss / mask.sum()).backward()",
    ),
    "whitened rewards lose their mean": (
        "rl/tensor_ops.py",
        "white if shift_mean else white + mean",
        "white",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_formula_fails_a_test(root, tmp_path, name):
    file, old, new = MUTATIONS[name]
    for part in ("rlhf_core", "tests/rl", "tests/modeling"):
        shutil.copytree(root / part, tmp_path / part)
    for part in ("tests/conftest.py", "tests/two_processes.py", "params.yaml", "pyproject.toml"):
        shutil.copy(root / part, tmp_path / part)
    source = tmp_path / "rlhf_core" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{file} no longer holds {old!r} once"
    source.write_text(text.replace(old, new))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "tests/rl", "tests/modeling"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"no test noticed: {name}\n{done.stdout[-1500:]}"
