"""SFT, reward model and PPO as stages on a tiny model: they learn, and resume to the same weights."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

from rlhf_core import training
from rlhf_core.modeling.loading import load_policy, load_tokenizer
from rlhf_core.modeling.reward import load_reward_model
from rlhf_core.optim import DivergedError
from rlhf_core.rl import ppo
from rlhf_core.rl.losses import policy_loss
from rlhf_core.rl.rollout import collect
from rlhf_core.stages import ppo as ppo_stage
from rlhf_core.stages import reward as reward_stage
from rlhf_core.stages import sft
from rlhf_core.stages.ppo import DemonstrationMix, Training, open_actors
from rlhf_core.stages.runner import run_stage
from rlhf_core.stages.sft import encode_file
from rlhf_core.tracking import Tracker

from .toy import BAD, GOOD, assert_same_outputs, make_workspace, run_broken_off, weights


def test_sft_lowers_the_loss_on_held_out_rows_and_saves_a_plain_model(workspace, small_params):
    metrics = run_stage("sft", small_params, workspace)
    assert metrics["sft/eval_loss"] < 0.95 * metrics["sft/eval_loss_before"]
    model, tokenizer = load_policy(workspace.model("sft"), small_params.run)
    assert tokenizer.chat_template
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (workspace.model("sft") / "adapter" / "adapter_model.safetensors").is_file()
    assert not workspace.run_dir("sft").joinpath("checkpoints").exists()


@pytest.mark.parametrize(
    ("stage", "work", "said"),
    [
        ("sft", (sft.CompletionTask, "evaluate"), {0: "evaluating before training"}),
        (
            "reward",
            (reward_stage.PairwiseTask, "all_scores"),
            {-2: "scoring held-out pairs", -1: "fitting the normalisation"},
        ),
        ("ppo", (Training, "rollout"), {-1: "last rollout"}),
    ],
)
def test_work_around_the_steps_is_announced_and_counts_as_work(
    workspace, small_params, monkeypatch, stage, work, said
):
    if stage == "ppo":
        run_stage("reward", small_params, workspace)
    notes, at_work = [], []

    def told(tracker, done, total, note=""):
        notes.append(note)
        tell(tracker, done, total, note)

    def watched(*arguments):
        at_work.append(notes[-1] if notes else "")
        return do(*arguments)

    tell, do = Tracker.progress, getattr(*work)
    monkeypatch.setattr(Tracker, "progress", told)
    monkeypatch.setattr(*work, watched)
    run_stage(stage, small_params, workspace)
    for position, note in said.items():
        assert at_work[position] == note
    assert notes[0] == at_work[0] if 0 in said else notes[-1] == "saving", "loading and saving are only that"


def test_reward_model_learns_to_tell_the_pairs_apart_and_opens_again(workspace, small_params):
    metrics = run_stage("reward", small_params, workspace)
    assert metrics["reward/accuracy"] == 1.0
    scorer = load_reward_model(workspace.model("reward"), small_params.run)
    chat = [[{"role": "user", "content": "how are you on day 99?"}]] * 2
    good, bad = scorer.score(chat, [GOOD, BAD])
    assert good > bad
    # Normalised on the answers it was trained with: half of them good, half bad.
    assert good == pytest.approx(1.0, abs=0.3)
    assert bad == pytest.approx(-1.0, abs=0.3)


def test_saved_reward_model_opens_with_transformers_alone(workspace, small_params):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run_stage("reward", small_params, workspace)
    path = workspace.model("reward")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "how are you on day 3?"}]
    text = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        + GOOD
        + tokenizer.eos_token
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    raw = model(ids).logits.item()
    facts = json.loads((path / "normalisation.json").read_text())
    ours = load_reward_model(path, small_params.run).score([chat], [GOOD])[0]
    assert (raw + facts["head_bias"] - facts["mean"]) / facts["std"] == pytest.approx(ours, abs=1e-3)


def test_ppo_runs_and_starts_its_critic_from_the_reward_model(workspace, small_params):
    run_stage("reward", small_params, workspace)
    actors = open_actors(small_params, workspace)
    for critic, reward in zip(actors.roles.parameters("critic"), actors.roles.parameters("reward")):
        assert torch.equal(critic, reward)
    metrics = run_stage("ppo", small_params, workspace)
    assert metrics["ppo/num_updates"] == 4
    assert (workspace.model("policy") / "model.safetensors").is_file()
    history = workspace.history("ppo").read_text().splitlines()
    assert len(history) == 1 + 4 + 1  # header, updates, and the rollout that measures the end


def test_ppo_over_its_kl_budget_keeps_the_last_policy_within(workspace, small_params):
    run_stage("reward", small_params, workspace)
    tight = small_params.model_copy(
        update={"ppo": small_params.ppo.model_copy(update={"kl_budget": 1e-3, "learning_rate": 0.1})}
    )
    metrics = run_stage("ppo", tight, workspace)
    assert metrics["ppo/stopped_by_kl_budget"] == 1
    assert metrics["ppo/kl"] == pytest.approx(0.0, abs=1e-4)
    before, after = weights(workspace.model("sft")), weights(workspace.model("policy"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_fine_tuning_trains_every_weight_in_all_three_stages(workspace, small_params):
    full = small_params.model_copy(
        update={"model": small_params.model.model_copy(update={"finetuning": "full"})}
    )
    full = full.model_copy(update={"sft": full.sft.model_copy(update={"learning_rate": 3e-3})})
    before = weights(workspace.model("pretrained"))
    assert (
        run_stage("sft", full, workspace)["sft/eval_loss"]
        < run_stage("sft", full, workspace)["sft/eval_loss_before"]
    )
    after = weights(workspace.model("sft"))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert run_stage("reward", full, workspace)["reward/accuracy"] > 0.5
    assert run_stage("ppo", full, workspace)["ppo/num_updates"] >= 1
    changed = weights(workspace.model("policy"))
    assert any(not torch.equal(after[name], changed[name]) for name in after)


@pytest.mark.parametrize("kill_at", [1, 3, 6])
@pytest.mark.parametrize(("stage", "model"), [("sft", "sft"), ("reward", "reward")])
def test_broken_off_training_ends_with_the_same_weights(
    workspace, tmp_path, tiny_model_dir, small_params, monkeypatch, stage, model, kill_at
):
    whole, broken = workspace, make_workspace(tmp_path / "broken", tiny_model_dir)
    run_stage(stage, small_params, whole)
    run_broken_off(
        monkeypatch, training, "train_step", kill_at, lambda: run_stage(stage, small_params, broken)
    )
    assert not broken.metrics(stage).exists()
    run_stage(stage, small_params, broken)
    assert_same_outputs(whole, broken, stage, model)


@pytest.mark.parametrize("kill_at", [1, 3])
def test_broken_off_ppo_ends_with_the_same_weights(
    workspace, tmp_path, tiny_model_dir, small_params, monkeypatch, kill_at
):
    broken = make_workspace(tmp_path / "broken", tiny_model_dir)
    for layout in (workspace, broken):
        run_stage("reward", small_params, layout)
    run_stage("ppo", small_params, workspace)
    run_broken_off(monkeypatch, Training, "update", kill_at, lambda: run_stage("ppo", small_params, broken))
    run_stage("ppo", small_params, broken)
    assert_same_outputs(workspace, broken, "ppo", "policy")


@pytest.mark.parametrize("advantages", ["rloo", "reinforce++"])
def test_ppo_without_a_critic_goes_on_after_a_kill_with_its_kl_price(
    workspace, tmp_path, tiny_model_dir, small_params, monkeypatch, advantages
):
    changes = {"advantages": advantages, "kl_target": 0.5, "kl_horizon": 10.0}
    params = small_params.model_copy(update={"ppo": small_params.ppo.model_copy(update=changes)})
    broken = make_workspace(tmp_path / "broken", tiny_model_dir)
    for layout in (workspace, broken):
        run_stage("reward", params, layout)
    run_stage("ppo", params, workspace)
    run_broken_off(monkeypatch, Training, "update", 2, lambda: run_stage("ppo", params, broken))
    run_stage("ppo", params, broken)
    assert_same_outputs(workspace, broken, "ppo", "policy")
    rows = list(csv.DictReader(workspace.history("ppo").read_text().splitlines()))
    assert len({row["objective/kl_coef"] for row in rows}) == len(rows)  # it adapts with every rollout
    assert not any(name.startswith("value/") for name in rows[0])


def test_reward_function_of_a_user_is_added(workspace, small_params):
    run_stage("reward", small_params, workspace)
    (workspace.root / "mine.py").write_text(
        "def short(prompts, responses):\n    return [-10.0 for r in responses]\n"
    )
    changed = small_params.ppo.model_copy(update={"reward_function": "mine:short"})
    metrics = run_stage("ppo", small_params.model_copy(update={"ppo": changed}), workspace)
    assert metrics["ppo/score_before"] < -5.0
    assert "reward_part/function" in workspace.history("ppo").read_text().splitlines()[0]


def test_training_that_diverges_ends_and_says_what_to_try(workspace, small_params, monkeypatch):
    def broken_loss(*arguments, **options):
        loss, stats = policy_loss(*arguments, **options)
        return loss * float("nan"), stats

    run_stage("reward", small_params, workspace)
    monkeypatch.setattr(ppo, "policy_loss", broken_loss)
    many = small_params.model_copy(update={"ppo": small_params.ppo.model_copy(update={"num_updates": 9})})
    with pytest.raises(DivergedError, match="ppo, update 4: 5 steps in a row"):
        run_stage("ppo", many, workspace)
    assert not workspace.model("policy").exists()
    batch = json.loads((workspace.run_dir("ppo") / "skipped_batch.table.json").read_text())
    assert [row["update"] for row in batch] == [4] * many.ppo.rollout_batch_size
    assert batch[0]["prompt"].startswith("how are you on day")


def test_sft_keeps_the_batch_of_a_skipped_step(workspace, small_params, monkeypatch):
    monkeypatch.setattr(sft.CompletionTask, "weight", lambda task, rows: float("nan"))
    with pytest.raises(DivergedError, match="sft, step 5"):
        run_stage("sft", small_params, workspace)
    batch = json.loads((workspace.run_dir("sft") / "skipped_batch.table.json").read_text())
    assert len(batch) == small_params.sft.batch_size
    assert batch[0]["response"].startswith("that is great!")


def test_glossary_explains_every_metric_of_every_training(root, workspace, small_params):
    explained = set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", (root / "docs" / "metrics.md").read_text()))
    for stage in ("sft", "reward", "ppo"):
        run_stage(stage, small_params, workspace)
        logged = set(workspace.history(stage).read_text().splitlines()[0].split(",")) - {"step"}
        assert {name for name in logged if not name.startswith("reward_part/")} <= explained, stage


def test_loss_on_everything_counts_all_but_the_first_token(workspace, tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    file = workspace.prepared_file("demonstrations", "train")
    plain, _ = encode_file(tokenizer, file, 96, 8, seed=0)
    whole, _ = encode_file(tokenizer, file, 96, 8, seed=0, loss_on="all")
    for one, other in zip(plain, whole, strict=True):
        assert one.prompt + one.response == other.prompt + other.response
        assert len(other.prompt) == 1


def test_in_its_warm_up_only_the_critic_learns(workspace, small_params):
    run_stage("reward", small_params, workspace)
    changes = {"critic_warmup_updates": 2, "num_updates": 3, "kl_budget": 1000.0}
    warm = small_params.model_copy(update={"ppo": small_params.ppo.model_copy(update=changes)})
    run_stage("ppo", warm, workspace)
    rows = list(csv.DictReader(workspace.history("ppo").read_text().splitlines()))
    assert [abs(float(row["objective/kl"])) < 1e-4 for row in rows] == [True, True, True, False]
    assert [row["policy/loss"] == "" for row in rows] == [True, True, False, True]
    assert float(rows[0]["value/grad_norm"]) > 0


def test_moving_average_lags_behind_the_policy_and_survives_a_kill(
    workspace, tmp_path, tiny_model_dir, small_params, monkeypatch
):
    changes = {"ema_decay": 0.5, "kl_budget": 1000.0}
    params = small_params.model_copy(update={"ppo": small_params.ppo.model_copy(update=changes)})
    broken = make_workspace(tmp_path / "broken", tiny_model_dir)
    for layout in (workspace, broken):
        run_stage("reward", params, layout)
    seen = []
    real = Training.move_average

    def watched(self):
        real(self)
        seen.append((self.actors.policy_parameters()[1].detach().clone(), self.average[1].clone()))

    monkeypatch.setattr(Training, "move_average", watched)
    run_stage("ppo", params, workspace)
    expected = torch.zeros_like(seen[0][0])  # B of an adapter starts at 0
    for parameter, average in seen:
        expected = 0.5 * expected + 0.5 * parameter
        torch.testing.assert_close(average, expected)

    run_broken_off(monkeypatch, Training, "move_average", 2, lambda: run_stage("ppo", params, broken))
    run_stage("ppo", params, broken)
    assert_same_outputs(workspace, broken, "ppo", "policy")


def with_ptx(params, coef):
    ptx = {"ptx_coef": coef, "ptx_batch_size": 6}
    return params.model_copy(update={"ppo": params.ppo.model_copy(update=ptx)})


def test_ptx_adds_the_gradient_of_the_loss_on_demonstrations(workspace, small_params):
    run_stage("reward", small_params, workspace)
    params = with_ptx(small_params, 0.5)
    actors = open_actors(params, workspace)
    file = workspace.prepared_file("demonstrations", "train")
    mix = DemonstrationMix(actors.roles, params, file)
    loss = mix.backward(0)
    rows = [mix.rows[i] for i in training.step_rows(len(mix.rows), 6, 0, params.run.seed)]
    found = [p.grad.clone() for p in actors.policy_parameters()]
    for parameter in actors.policy_parameters():
        parameter.grad = None
    expected, _ = mix.task.loss(rows)
    expected = expected / sum(len(row.response) for row in rows)
    (0.5 * expected).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for one, parameter in zip(found, actors.policy_parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def test_ppo_with_ptx_keeps_what_sft_learnt_and_repeats_itself(workspace, small_params, tiny_model_dir):
    for stage in ("sft", "reward"):
        run_stage(stage, small_params, workspace)
    losses = {}
    for coef in (0.01, 10.0):
        run_stage("ppo", with_ptx(small_params, coef), workspace)
        rows = csv.DictReader(workspace.history("ppo").open())
        losses[coef] = [float(row["policy/ptx_loss"]) for row in rows if row["policy/ptx_loss"]]
    assert losses[10.0][-1] < losses[0.01][-1]
    first = workspace.history("ppo").read_bytes()
    run_stage("ppo", with_ptx(small_params, 10.0), workspace)
    assert workspace.history("ppo").read_bytes() == first


def test_a_wide_gap_between_generation_and_training_takes_the_trainers_logprobs_from_then_on(
    workspace, small_params, monkeypatch
):
    run_stage("reward", small_params, workspace)
    used = []
    monkeypatch.setattr(
        ppo_stage,
        "collect",
        lambda actors, prompts, config, *rest: (
            used.append(config.old_logprobs) or collect(actors, prompts, config, *rest)
        ),
    )
    run_stage("ppo", small_params, workspace)
    assert used == ["generation"] * 5
    assert all(
        float(row["rollout/logprob_gap"] or 0.0) < 1e-4
        for row in csv.DictReader(workspace.history("ppo").read_text().splitlines())
    )
    used.clear()
    monkeypatch.setattr(ppo_stage, "MOST_LOGPROB_GAP", -1.0)
    run_stage("ppo", small_params, workspace)
    assert used == ["generation"] + ["trainer"] * 4
