"""What only a GPU can show: its numbers are the CPU's, a killed stage resumes, a whole run works there."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_core.generation import generate
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.logprobs import response_logprobs
from rlhf_core.modeling.roles import adapter_roles
from rlhf_core.stages import sft
from rlhf_core.stages.runner import run_stage
from tests.pipeline import checkouts
from tests.stages.conftest import small_params, workspace  # noqa: F401
from tests.stages.test_devices import CHATS, on
from tests.stages.toy import make_workspace, run_broken_off, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
ENDS_ALIKE = {
    "rel": 1e-2,
    "abs": 1e-3,
}  # short trainings in float32: Adam enlarges what differs


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "off")


def on_both(directory, params, work):
    return [work(*load_policy(directory, on(params, device).run)) for device in ("cpu", "cuda")]


def test_logprobs_in_float32_are_the_cpus(tiny_model_dir, small_params):  # noqa: F811
    prompts, responses = [[5, 6, 7], [8, 9], [8, 9]], [[3, 4, 5, 6], [1, 2], [7]]
    cpu, gpu = on_both(
        tiny_model_dir, small_params, lambda model, _: response_logprobs(model, prompts, responses)
    )
    # Sums in another order, in numbers of some 10: a few units of the last place of float32.
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


def test_greedy_texts_are_the_cpus(tiny_model_dir, small_params):  # noqa: F811
    sampling = small_params.ppo.sampling.model_copy(update={"top_k": 1, "max_new_tokens": 24})
    cpu, gpu = on_both(tiny_model_dir, small_params, lambda *loaded: generate(*loaded, CHATS, sampling))
    assert [a.token_ids for (a,) in gpu] == [a.token_ids for (a,) in cpu]


def test_ligers_kernels_give_the_plain_numbers_and_gradients(tiny_model_dir, small_params):  # noqa: F811
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    run = on(small_params, "cuda").run
    found = {}
    for kernels in ("plain", "liger"):  # in this order: the rotations stay patched
        model, tokenizer = load_policy(tiny_model_dir, run, kernels=kernels)
        roles = adapter_roles(model, tokenizer, small_params)
        roles.add("policy", seed=0)
        hidden = roles.hidden("policy", torch.tensor([[5, 9, 3, 7], [8, 2, 6, 1]]).to(roles.device))
        roles.logits("policy", hidden).logsumexp(-1).sum().backward()
        found[kernels] = [hidden.detach(), *(p.grad for p in roles.parameters("policy"))]
    torch.testing.assert_close(found["liger"], found["plain"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", ["plain", "liger"])
def test_greedy_texts_do_not_depend_on_the_kernels(tiny_model_dir, small_params, kernels):  # noqa: F811
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    sampling = small_params.ppo.sampling.model_copy(update={"top_k": 1, "max_new_tokens": 24})
    expected = generate(*load_policy(tiny_model_dir, on(small_params, "cpu").run), CHATS, sampling)
    model = load_policy(tiny_model_dir, on(small_params, "cuda").run, kernels=kernels)
    assert [a.token_ids for (a,) in generate(*model, CHATS, sampling)] == [a.token_ids for (a,) in expected]


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_stages_end_as_on_the_cpu(tmp_path, tiny_model_dir, small_params, finetuning):  # noqa: F811
    one, other = (make_workspace(tmp_path / name, tiny_model_dir) for name in ("cpu", "gpu"))
    for stage in ("sft", "reward", "ppo", "evaluate"):
        expected = run_stage(stage, on(small_params, "cpu", finetuning), one)
        found = run_stage(stage, on(small_params, "cuda", finetuning), other)
        assert found == pytest.approx(expected, nan_ok=True, **ENDS_ALIKE), stage


def test_a_stage_in_bfloat16_learns(workspace, small_params):  # noqa: F811
    tree = small_params.model_copy(
        update={"run": small_params.run.model_copy(update={"device": "cuda", "precision": "auto"})}
    )
    found = run_stage("sft", tree, workspace)
    assert found["sft/eval_loss"] < 0.5 * found["sft/eval_loss_before"]


def test_a_killed_stage_resumes_to_the_same_numbers(
    tmp_path,
    tiny_model_dir,
    small_params,  # noqa: F811
    monkeypatch,
):
    params = small_params.model_copy(update={"run": small_params.run.model_copy(update={"device": "cuda"})})
    whole, broken = (make_workspace(tmp_path / name, tiny_model_dir) for name in ("whole", "broken"))
    expected = run_stage("sft", params, whole)
    run_broken_off(monkeypatch, sft.CompletionTask, "weight", 7, lambda: run_stage("sft", params, broken))
    # Not the same bits: see `use_determinism`.
    assert run_stage("sft", params, broken) == pytest.approx(expected, **ENDS_ALIKE)
    for name, tensor in weights(broken.model("sft")).items():
        torch.testing.assert_close(tensor, weights(whole.model("sft"))[name], rtol=1e-2, atol=1e-3)


def test_the_gpus_memory_is_measured(workspace, small_params):  # noqa: F811
    run_stage("sft", on(small_params, "cuda"), workspace)
    perf = json.loads((workspace.run_dir("sft") / "perf.json").read_text())
    assert 0.0 < perf["perf/peak_gpu_memory_gib"] < 4.0


def test_the_smoke_run_ends(root, tmp_path):
    checkout = checkouts.make_checkout(root, tmp_path)
    command = ["rlhf", "run", "--profile", "smoke", "-S", "run.device=cuda"]
    done = checkouts.run(command, checkout, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    perf = json.loads((checkout / ".rlhf" / "runs" / "ppo" / "perf.json").read_text())
    assert perf["perf/peak_gpu_memory_gib"] > 0.0
