"""The PPO step on a tiny model: its invariants, and that it learns a reward whose optimum is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rlhf_core.config import LoRAConfig, RunConfig
from rlhf_core.modeling.encoding import encode_prompt, encode_response, make_batch
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.reward import Normalisation, ScalarHead, last_response_hidden
from rlhf_core.modeling.roles import REFERENCE, AdapterRoles
from rlhf_core.rl import ppo
from rlhf_core.rl.ppo import ppo_step, update
from rlhf_core.rl.rollout import Actors, collect, rollout_metrics, with_advantages

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
CHATS = [
    [{"role": "user", "content": text}] for text in ("hello", "how are you today?", "no", "rain or sun?")
]


class LowercaseScorer:
    """A reward with a known optimum, 1: the share of lower-case letters."""

    def member_scores(self, conversations, responses):
        return torch.tensor([[sum(map(str.islower, text)) / max(1, len(text)) for text in responses]])


@pytest.fixture
def config(params):
    return params.ppo.model_copy(
        update={
            "rollout_batch_size": 16,
            "samples_per_prompt": 4,
            "minibatch_size": 8,
            "micro_batch_size": 4,
            "num_ppo_epochs": 2,
            "missing_eos_penalty": 0.0,
            "kl_coef": 0.0,
            "sampling": params.ppo.sampling.model_copy(update={"temperature": 1.0, "max_new_tokens": 8}),
        }
    )


@pytest.fixture
def actors(tiny_model_dir):
    return make_actors(tiny_model_dir)


def make_actors(directory, seed=0):
    model, tokenizer = load_policy(directory, RUN)
    roles = AdapterRoles(model, tokenizer, LoRAConfig(rank=8, alpha=16.0))
    roles.add("policy", seed=seed)
    roles.add("critic", seed=seed + 1)
    return Actors(roles, ScalarHead(model.config.hidden_size, seed=seed), LowercaseScorer())


def optimizers(actors, rate=1e-2):
    return (
        torch.optim.AdamW(actors.policy_parameters(), lr=rate, weight_decay=0.0),
        torch.optim.AdamW(actors.critic_parameters(), lr=rate, weight_decay=0.0),
    )


def test_before_the_first_update_the_policy_is_the_reference(actors, config):
    rollout = collect(actors, CHATS, config, seed=1)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=1e-4, atol=1e-5)
    exact = config.model_copy(update={"old_logprobs": "trainer"})
    rollout = collect(actors, CHATS, exact, seed=1)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=0)
    assert not rollout.kl.any()
    assert rollout_metrics(rollout, exact)["objective/kl"] == 0.0


def test_first_step_has_ratio_one_and_clips_nothing(actors, config):
    rollout = collect(actors, CHATS, config, seed=1)
    metrics = ppo_step(actors, *optimizers(actors), rollout, config, config.kl_coef)
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clipfrac"] == 0.0
    # Whitened advantages have mean 0, so at ratio 1 the loss is 0 too.
    assert metrics["policy/loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 16])
def test_cut_into_micro_batches_changes_no_gradient(actors, config, micro_batch_size):
    rollout = collect(actors, CHATS, config, seed=1)
    found = []
    for size in (8, micro_batch_size):
        fresh = copy.deepcopy(actors)
        steps = [torch.optim.SGD(p, lr=1.0) for p in (fresh.policy_parameters(), fresh.critic_parameters())]
        metrics = ppo_step(fresh, *steps, rollout, config.model_copy(update={"micro_batch_size": size}), 0.0)
        found.append(
            (metrics, [p.detach().clone() for p in fresh.policy_parameters() + fresh.critic_parameters()])
        )
    (plain, weights), (cut, cut_weights) = found
    assert cut == pytest.approx(plain, rel=1e-4, abs=1e-5)
    for a, b in zip(weights, cut_weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_pass(config):
    """One step that sees all episodes of a rollout in one pass."""
    return config.model_copy(update={"minibatch_size": 16, "micro_batch_size": 16, "num_ppo_epochs": 1})


def critic_passes(actors, monkeypatch):
    """Counts the critic's passes from now on."""
    passes = []
    plain = actors.roles.hidden

    def counted(role, *inputs):
        passes.append(role)
        return plain(role, *inputs)

    monkeypatch.setattr(actors.roles, "hidden", counted)
    return lambda: passes.count("critic")


def after_an_update(actors, rollout, config):
    steps = [torch.optim.SGD(p, lr=1.0) for p in (actors.policy_parameters(), actors.critic_parameters())]
    metrics = update(actors, *steps, rollout, config, seed=5)
    return metrics, [p.detach().clone() for p in actors.critic_parameters()]


def test_values_pass_of_a_rollout_serves_the_step_that_sees_it_whole(tiny_model_dir, one_pass, monkeypatch):
    found = []
    for kept in (True, False):
        actors = make_actors(tiny_model_dir)
        passes = critic_passes(actors, monkeypatch)
        rollout = collect(actors, CHATS, one_pass, seed=1)
        assert not rollout.values.requires_grad
        if not kept:
            actors.kept_values.take(rollout, actors.critic_parameters())
        found.append(after_an_update(actors, rollout, one_pass))
        assert passes() == (1 if kept else 2)
    (metrics, weights), (plain, plain_weights) = found
    assert metrics == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert metrics["value/grad_norm"] > 0.0
    for a, b in zip(weights, plain_weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", ["minibatch_size", "micro_batch_size"])
def test_values_pass_is_not_kept_for_a_part_of_the_rollout(actors, one_pass, monkeypatch, size):
    passes = critic_passes(actors, monkeypatch)
    config = one_pass.model_copy(update={size: 8})
    after_an_update(actors, collect(actors, CHATS, config, seed=1), config)
    assert passes() == (4 if size == "micro_batch_size" else 3)


def test_kept_values_are_taken_for_the_weights_and_episodes_they_are_of(actors, one_pass):
    rollout = collect(actors, CHATS, one_pass, seed=1)
    taken = actors.kept_values.take(rollout.select(range(15, -1, -1)), actors.critic_parameters())
    torch.testing.assert_close(taken.detach(), rollout.values.flip(0))
    assert actors.kept_values.take(rollout, actors.critic_parameters()) is None  # once

    rollout = collect(actors, CHATS, one_pass, seed=1)
    with torch.no_grad():
        actors.critic_parameters()[0].mul_(1.5)
    assert actors.kept_values.take(rollout, actors.critic_parameters()) is None

    collect(actors, CHATS, one_pass, seed=1)
    other = collect(actors, CHATS, one_pass.model_copy(update={"minibatch_size": 8}), seed=2)
    assert actors.kept_values.take(other, actors.critic_parameters()) is None


def test_rollout_scores_and_masks_belong_to_their_answers(actors, config):
    rollout = collect(actors, CHATS, config, seed=2)
    lengths = [len(answer.token_ids) for answer in rollout.answers]
    assert rollout.response_mask.sum(dim=1).tolist() == lengths
    (expected,) = LowercaseScorer().member_scores(None, [answer.text for answer in rollout.answers])
    torch.testing.assert_close(rollout.scores, expected)
    part = rollout.select([3, 0])
    assert part.answers == [rollout.answers[3], rollout.answers[0]]
    assert part.response_mask.shape[1] == max(lengths[3], lengths[0])
    torch.testing.assert_close(part.logprobs[1], rollout.logprobs[0, : part.logprobs.shape[1]])


def test_unfinished_answers_pay_the_penalty(actors, config):
    plain = collect(actors, CHATS, config, seed=3)
    fined = collect(actors, CHATS, config.model_copy(update={"missing_eos_penalty": 2.0}), seed=3)
    unfinished = torch.tensor([not answer.finished for answer in plain.answers])
    assert unfinished.any()
    torch.testing.assert_close(fined.scores, plain.scores - 2.0 * unfinished)


METHODS = ["gae", "rloo", "grpo", "reinforce++"]


def learn(actors, config, num_updates, seed=0):
    """Mean score of each rollout."""
    policy_optimizer, critic_optimizer = optimizers(actors)
    if not config.has_critic:
        actors, critic_optimizer = replace(actors, value_head=None), None
    scores = []
    for number in range(num_updates):
        rollout = collect(actors, CHATS, config, seed=1000 * seed + 100 + number)
        scores.append(rollout.scores.mean().item())
        metrics = update(actors, policy_optimizer, critic_optimizer, rollout, config, seed=number)
        metrics |= rollout_metrics(rollout, config)
        assert config.has_critic == any(name.startswith("value/") for name in metrics)
        assert config.has_critic == bool(rollout.values.any())
    return scores


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_reward_and_leaves_the_reference_alone(tiny_model_dir, config, method):
    actors = make_actors(tiny_model_dir, seed=1)
    before = actors.roles.hidden(REFERENCE, torch.tensor([[5, 6, 7]])).clone()
    scores = learn(actors, config.model_copy(update={"advantages": method}), 14, seed=1)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15
    torch.testing.assert_close(
        actors.roles.hidden(REFERENCE, torch.tensor([[5, 6, 7]])), before, rtol=0, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seeds"), [("gae", 4), ("rloo", 4), ("grpo", 5), ("reinforce++", 4)])
def test_every_method_reaches_the_optimum(tiny_model_dir, config, method, seeds):
    """At least 0.9 of the best reward in three rollouts in a row, within 60 updates; it starts below 0.4.

    On five of five seeds. REINFORCE++ compares answers of different prompts with each other, and may settle
    on the second-best answer of one: four of five. So may RLOO, eight or nine of ten seeds by the number of
    threads, and GAE, whose fourth seed ended at 0.77 and 0.84 in two runs on a Zen 4: rounding decides on the
    way.
    """
    config = config.model_copy(update={"advantages": method})
    reached = {}
    for seed in range(5):
        scores = learn(make_actors(tiny_model_dir, seed), config, 60, seed)
        assert scores[0] < 0.4
        reached[seed] = max(min(scores[i : i + 3]) for i in range(58))
    assert sum(score >= 0.9 for score in reached.values()) >= seeds, reached


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_as_a_loss_keeps_the_policy_nearer_to_the_reference(actors, config, estimator):
    final = {}
    for kl_coef in (0.0, 1.0):
        mine = copy.deepcopy(actors)
        priced = config.model_copy(update={"kl_coef": kl_coef, "kl_in": "loss", "kl_estimator": estimator})
        steps = optimizers(mine)
        for number in range(8):
            rollout = collect(mine, CHATS, priced, seed=200 + number)
            metrics = update(mine, *steps, rollout, priced, seed=number)
        assert metrics["policy/kl_loss"] > 0
        final[kl_coef] = collect(mine, CHATS, priced, seed=300).kl.mean().item()
    assert final[1.0] < 0.5 * final[0.0]


def test_kl_in_the_loss_is_not_in_the_reward_too(actors, config):
    in_loss = config.model_copy(update={"kl_coef": 1.0, "kl_in": "loss", "kl_estimator": "k2"})
    update(actors, *optimizers(actors), collect(actors, CHATS, config, seed=1), config, seed=0)
    rollout = collect(actors, CHATS, in_loss, seed=2)
    assert rollout.kl.abs().sum() > 0
    free = collect(actors, CHATS, config.model_copy(update={"kl_coef": 0.0}), seed=2)
    torch.testing.assert_close(rollout.returns, free.returns)


def test_whitened_rewards_have_variance_one_and_the_mean_they_had(actors, config):
    plain = config.model_copy(update={"gamma": 1.0, "gae_lambda": 1.0, "kl_coef": 0.0})
    whitened = plain.model_copy(update={"whiten_rewards": True})
    rollout = collect(actors, CHATS, plain, seed=0)
    mask = rollout.response_mask
    rewards = {}
    for name, choice in (("plain", plain), ("whitened", whitened)):
        to_go = with_advantages(rollout, choice, 0.0).returns  # of the Monte Carlo return: sums to the end
        later = torch.nn.functional.pad(to_go, (0, 1))[:, 1:] * torch.nn.functional.pad(mask, (0, 1))[:, 1:]
        rewards[name] = (to_go - later)[mask]
    torch.testing.assert_close(rewards["whitened"].mean(), rewards["plain"].mean(), rtol=1e-4, atol=1e-4)
    assert rewards["whitened"].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)
    assert rewards["plain"].var(unbiased=False).item() != pytest.approx(1.0, abs=1e-2)


def test_entropy_bonus_keeps_the_policy_more_random(actors, config):
    entropies = {}
    for entropy_coef in (0.0, 0.5):
        mine = copy.deepcopy(actors)
        keen = config.model_copy(update={"entropy_coef": entropy_coef})
        steps = optimizers(mine)
        for number in range(8):
            update(mine, *steps, collect(mine, CHATS, keen, seed=400 + number), keen, seed=number)
        entropies[entropy_coef] = rollout_metrics(collect(mine, CHATS, keen, seed=500), keen)[
            "objective/entropy"
        ]
    assert entropies[0.5] > entropies[0.0] + 0.1


def test_passes_end_where_the_policy_has_moved_too_far(actors, config):
    rollout = collect(actors, CHATS, config, seed=1)
    free = copy.deepcopy(actors)
    # 16 episodes by 8, twice
    assert update(free, *optimizers(free), rollout, config, seed=0)["policy/num_steps"] == 4
    careful = config.model_copy(update={"approx_kl_stop": 1e-6})
    mine = copy.deepcopy(actors)
    # The first step starts at ratio 1, so the second is the first that can be over.
    assert update(mine, *optimizers(mine), rollout, careful, seed=0)["policy/num_steps"] == 2


def test_kl_price_keeps_the_policy_nearer_to_the_reference(actors, config):
    final = {}
    for kl_coef in (0.0, 0.5):
        mine = copy.deepcopy(actors)
        priced = config.model_copy(update={"kl_coef": kl_coef})
        steps = optimizers(mine)
        for number in range(8):
            update(mine, *steps, collect(mine, CHATS, priced, seed=200 + number), priced, seed=number)
        final[kl_coef] = collect(mine, CHATS, priced, seed=300).kl.mean().item()
    assert final[0.5] < 0.5 * final[0.0]


def test_reward_head_reads_the_last_response_token_whatever_the_padding(actors):
    tokenizer = actors.roles.tokenizer
    prompts = [encode_prompt(tokenizer, messages) for messages in CHATS[:2]]
    answers = [encode_response(tokenizer, text) for text in ("yes", "i like long walks and good books")]
    together = make_batch(prompts, answers, tokenizer.pad_token_id, torch.device("cpu"))
    read = last_response_hidden(actors.roles.hidden(REFERENCE, *together.inputs), together)
    for i in range(2):
        alone = make_batch(
            prompts[i : i + 1], answers[i : i + 1], tokenizer.pad_token_id, torch.device("cpu")
        )
        expected = actors.roles.hidden(REFERENCE, alone.input_ids)[:, -1]
        torch.testing.assert_close(read[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_folding_the_normalisation_into_a_head_gives_normalised_values():
    head = ScalarHead(4, seed=0)
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    normalisation = Normalisation(mean=2.0, std=3.0)
    expected = normalisation.apply(head(hidden))
    normalisation.fold_into(head)
    torch.testing.assert_close(head(hidden), expected)


def test_every_pass_takes_each_prompt_once_in_an_order_of_its_own(actors, config, monkeypatch):
    rollout = collect(actors, CHATS, config, seed=0)

    def orders(seed):
        seen = []
        monkeypatch.setattr(ppo, "ppo_step", lambda *arguments: seen.append(arguments[3].prompts) or {})
        update(actors, None, None, rollout, config.model_copy(update={"num_ppo_epochs": 6}), seed)
        prompts = [tuple(prompt) for minibatch in seen for prompt in minibatch[:: config.samples_per_prompt]]
        return [prompts[i : i + len(CHATS)] for i in range(0, len(prompts), len(CHATS))]

    passes = orders(seed=3)
    assert len(passes) == 6
    assert all(sorted(order) == sorted(passes[0]) and len(set(order)) == len(CHATS) for order in passes)
    assert len(set(map(tuple, passes))) > 1
    assert orders(seed=3) == passes != orders(seed=4)
