"""Ten steps of each training on a bigram model, against the same ten steps written out in NumPy float64.

The model: state(token) = E[token], logits = W state, score or value = w . state + b. What is predicted at a
position depends on the token before it alone, so a target that is off by one place is seen at once.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_core.checkpoint import Checkpoints
from rlhf_core.generation import Generation
from rlhf_core.modeling.flops import Flops
from rlhf_core.modeling.pairs import Pair, rankings
from rlhf_core.modeling.reward import ScalarHead
from rlhf_core.rl.ppo import episode_order, update
from rlhf_core.rl.rollout import Actors, Rollout
from rlhf_core.stages.reward import PairwiseTask
from rlhf_core.stages.sft import CompletionTask, Example
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, step_rows, train

V, D, STEPS, RATE = 13, 5, 10, 0.05


class Tokenizer:
    pad_token_id = 0


class Bigram:
    """What the trainings ask of their models, by table lookup. Roles have weights of their own."""

    tokenizer = Tokenizer()
    device = torch.device("cpu")

    def __init__(self, *roles):
        generator = torch.Generator().manual_seed(0)
        draw = lambda: nn.Parameter(torch.randn(V, D, generator=generator))  # noqa: E731
        self.E, self.W = {role: draw() for role in roles}, {role: draw() for role in roles}

    def hidden(self, role, input_ids, position_ids=None, visible=None, lengths=None):
        return self.E[role][input_ids]

    def gathered(self):
        return contextlib.nullcontext()

    def logits(self, role, hidden):
        return hidden @ self.W[role].T

    def flops(self, role):
        return Flops(trunk=0, head=V * D, trains_all=True)

    def parameters(self, role):
        return [self.E[role], self.W[role]] if role == "policy" else [self.E[role]]


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) after a clip of the global norm."""

    def __init__(self, arrays, eps, max_norm):
        self.arrays, self.eps, self.max_norm = arrays, eps, max_norm
        self.m, self.v = [np.zeros_like(a) for a in arrays], [np.zeros_like(a) for a in arrays]
        self.t = 0

    def step(self, gradients, rate):
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1.0, self.max_norm / (norm + 1e-6))
        self.t += 1
        for a, m, v, g in zip(self.arrays, self.m, self.v, gradients, strict=True):
            m += 0.1 * (scale * g - m)
            v += 0.001 * ((scale * g) ** 2 - v)
            a -= rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + self.eps)
        return norm


def array(tensor):
    return tensor.detach().double().numpy().copy()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def texts(rng, count):
    """Prompts and responses of random tokens; 1 to 6 each."""
    draw = lambda: rng.integers(1, V, rng.integers(1, 7)).tolist()  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


def before(prompt, response):
    """The token before each response token."""
    return [prompt[-1], *response[:-1]]


def schedule(batch_size):
    return Schedule(
        num_steps=STEPS,
        batch_size=batch_size,
        micro_batch_size=3,
        learning_rate=RATE,
        warmup_fraction=0.3,
        max_grad_norm=0.5,
        eval_every=1000,
        decay="linear",
    )


def run_training(task, rows, parameters, plan, tmp_path):
    tracker = Tracker("unit", tmp_path / "run")
    train(task, rows, parameters, plan, Checkpoints(tmp_path / "checkpoints", {}), tracker, seed=4)
    tracker.close_bar()
    return tracker.history


def rates():
    """Three steps up, then linearly to 0."""
    return [RATE / 3, 2 * RATE / 3, RATE, *(RATE * (1 - i / 7) for i in range(7))]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(params, tmp_path, packing):
    rows = [Example(p, r, [True] * len(r)) for p, r in texts(np.random.default_rng(1), 20)]
    config = params.sft.model_copy(update={"packing": packing})
    roles = Bigram("policy")
    E, W = array(roles.E["policy"]), array(roles.W["policy"])
    task = CompletionTask(roles, rows[:2], config, seed=0)
    history = run_training(task, rows, roles.parameters("policy"), schedule(6), tmp_path)

    adam = Adam([E, W], 1e-8, 0.5)
    for step, rate in enumerate(rates()):
        batch = [rows[i] for i in step_rows(len(rows), 6, step, 4)]
        x = np.array([t for row in batch for t in before(row.prompt, row.response)])
        y = np.array([t for row in batch for t in row.response])
        logp = log_softmax(E[x] @ W.T)
        loss = -logp[np.arange(len(y)), y].mean()
        accuracy = (logp.argmax(-1) == y).mean()
        error = (np.exp(logp) - np.eye(V)[y]) / len(y)
        dE = np.zeros_like(E)
        np.add.at(dE, x, error @ W)
        norm = adam.step([dE, error.T @ E[x]], rate)
        found = history[step]
        assert found["train/loss"] == pytest.approx(loss, rel=1e-4)
        assert found["train/token_accuracy"] == pytest.approx(accuracy)
        assert found["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert found["train/learning_rate"] == pytest.approx(rate)
    np.testing.assert_allclose(array(roles.E["policy"]), E, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(array(roles.W["policy"]), W, rtol=1e-3, atol=1e-4)


def test_reward_model(params, tmp_path):
    rng = np.random.default_rng(2)
    pairs = []
    for n, (prompt, _) in enumerate(texts(rng, 9)):
        answers = [r for _, r in texts(rng, 3)]
        for a, b in [(0, 1), (0, 2), (2, 1)][: 1 + n % 3]:
            asked, sure = [*prompt, n + 1], (1.0, 0.7, 0.5)[n % 3]
            pairs.append(Pair(asked, answers[a], answers[b], 0.5 * n, str(n), "ai:unit", sure))
    changes = {"margin_scale": 0.3, "label_smoothing": 0.1, "centering_coef": 0.02, "micro_batch_size": 2}
    config = params.reward.model_copy(update=changes)
    roles, head = Bigram("reward"), ScalarHead(D, seed=3)
    E, w, b = array(roles.E["reward"]), array(head.weight), array(head.bias)
    rows = rankings(pairs)
    task = PairwiseTask(roles, [head], pairs[:2], config)
    history = run_training(task, rows, [roles.E["reward"], *head.parameters()], schedule(4), tmp_path)

    adam = Adam([E, w, b], 1e-8, 0.5)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for step, rate in enumerate(rates()):
        batch = [rows[i] for i in step_rows(len(rows), 4, step, 4)]
        loss, dE, dw, db = 0.0, np.zeros_like(E), np.zeros_like(w), np.zeros_like(b)
        for row in batch:
            for pair in row:
                weight = 1 / len(row) / len(batch)
                ends = pair.chosen[-1], pair.rejected[-1]
                s_w, s_l = (E[end] @ w + b for end in ends)
                gap = s_w - s_l - 0.3 * pair.margin
                q = 0.9 * pair.probability + 0.1 * (1 - pair.probability)
                loss -= weight * (q * np.log(sigmoid(gap)) + (1 - q) * np.log(sigmoid(-gap)))
                loss += weight * 0.02 * (s_w + s_l) ** 2
                slope = -q * sigmoid(-gap) + (1 - q) * sigmoid(gap)
                for end, g in zip(ends, (slope, -slope), strict=True):
                    g = weight * (g + 0.04 * (s_w + s_l))
                    dE[end] += g * w
                    dw += g * E[end]
                    db += g
        norm = adam.step([dE, dw, db], rate)
        assert history[step]["train/loss"] == pytest.approx(loss, rel=1e-4)
        assert history[step]["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    np.testing.assert_allclose(array(roles.E["reward"]), E, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(array(head.weight), w, rtol=1e-3, atol=1e-4)


def make_rollout(roles, rng, temperature):
    """Twelve random episodes whose old log-probabilities are near the policy's, so that some steps clip."""
    rows = texts(rng, 12)
    mask = np.zeros((12, max(len(r) for _, r in rows)), dtype=bool)
    fields = {name: np.zeros(mask.shape) for name in ("logprobs", "advantages", "values", "returns")}
    E, W = array(roles.E["policy"]), array(roles.W["policy"])
    for i, (prompt, response) in enumerate(rows):
        n = len(response)
        mask[i, :n] = True
        logp = log_softmax(E[before(prompt, response)] @ W.T / temperature)[np.arange(n), response]
        fields["logprobs"][i, :n] = logp + 0.1 * rng.standard_normal(n)
        for name in ("advantages", "values", "returns"):
            fields[name][i, :n] = rng.standard_normal(n)
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in fields.items()}
    return rows, Rollout(
        conversations=[[{"role": "user", "content": ""}]] * 12,
        answers=[Generation("", tuple(r), True, (0.0,) * len(r)) for _, r in rows],
        prompts=[p for p, _ in rows],
        response_mask=torch.tensor(mask),
        ref_logprobs=torch.zeros(mask.shape),
        parts={},
        scores=torch.zeros(12),
        **tensors,
    )


def test_ppo(params):
    """Ten minibatches: clipped surrogate at a temperature, dual clip, entropy bonus, clipped value loss."""
    T, low, high, dual, bonus, clip_value = 0.7, 0.2, 0.3, 3.0, 0.05, 0.2
    changes = {"num_ppo_epochs": 5, "minibatch_size": 6, "micro_batch_size": 2, "samples_per_prompt": 1}
    changes |= {"cliprange_low": low, "cliprange_high": high, "dual_clip": dual, "entropy_coef": bonus}
    changes |= {"cliprange_value": clip_value, "max_grad_norm": 0.5, "kl_coef": 0.0}
    changes["sampling"] = params.ppo.sampling.model_copy(update={"temperature": T})
    config = params.ppo.model_copy(update=changes)
    roles, head = Bigram("policy", "critic"), ScalarHead(D, seed=3)
    E, W = array(roles.E["policy"]), array(roles.W["policy"])
    Ec, w, b = array(roles.E["critic"]), array(head.weight), array(head.bias)
    rows, rollout = make_rollout(roles, np.random.default_rng(5), T)
    old, adv, values, returns = (
        array(getattr(rollout, name)) for name in ("logprobs", "advantages", "values", "returns")
    )
    actors = Actors(roles, head, scorer=None)
    optimizers = [
        torch.optim.AdamW(parameters, lr=RATE, eps=1e-5, weight_decay=0.0)
        for parameters in (actors.policy_parameters(), actors.critic_parameters())
    ]
    found = update(actors, *optimizers, rollout, config, seed=8)

    policy, critic = Adam([E, W], 1e-5, 0.5), Adam([Ec, w, b], 1e-5, 0.5)
    generator = torch.Generator().manual_seed(8)
    names = ("policy/loss", "policy/clipfrac", "policy/approx_kl", "policy/grad_norm")
    sums = dict.fromkeys((*names, "value/loss", "value/clipfrac", "value/grad_norm"), 0.0)
    for _ in range(5):
        order = episode_order(12, 1, generator)
        for part in (order[:6], order[6:]):
            tokens = sum(len(rows[i][1]) for i in part)
            dE, dW, dEc, dw, db = (np.zeros_like(a) for a in (E, W, Ec, w, b))
            for i in part:
                prompt, response = rows[i]
                for t, (x, y) in enumerate(zip(before(prompt, response), response, strict=True)):
                    logp = log_softmax(W @ E[x] / T)
                    p = np.exp(logp)
                    ratio, A = np.exp(logp[y] - old[i, t]), adv[i, t]
                    clipped = np.clip(ratio, 1 - low, 1 + high) * A
                    gain, slope = ratio * A, ratio * A
                    if clipped < gain:
                        gain, slope = clipped, 0.0
                        sums["policy/clipfrac"] += 1 / tokens
                    if A < 0 and dual * A > gain:
                        gain, slope = dual * A, 0.0
                    sums["policy/loss"] -= gain / tokens
                    sums["policy/approx_kl"] += (ratio - 1 - logp[y] + old[i, t]) / tokens
                    entropy = -(p * logp).sum()
                    dlogits = -slope * (np.eye(V)[y] - p) + bonus * p * (logp + entropy)
                    dlogits /= T * tokens
                    dE[x] += W.T @ dlogits
                    dW += np.outer(dlogits, E[x])

                    value, G = Ec[x] @ w + b, returns[i, t]
                    near = np.clip(value, values[i, t] - clip_value, values[i, t] + clip_value)
                    error, near_error = (value - G) ** 2, (near - G) ** 2
                    slope = (value - G) if error >= near_error else (near - G) * (near == value)
                    sums["value/loss"] += 0.5 * max(error, near_error) / tokens
                    sums["value/clipfrac"] += (near_error > error) / tokens
                    dEc[x] += slope * w / tokens
                    dw += slope * Ec[x] / tokens
                    db += slope / tokens
            sums["policy/grad_norm"] += policy.step([dE, dW], RATE)
            sums["value/grad_norm"] += critic.step([dEc, dw, db], RATE)
    assert found["policy/num_steps"] == STEPS
    assert 0 < found["policy/clipfrac"] < 1
    assert 0 < found["value/clipfrac"] < 1
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / STEPS, rel=2e-3, abs=1e-5), name
    for tensor, expected in ((roles.E["policy"], E), (roles.W["policy"], W), (roles.E["critic"], Ec)):
        np.testing.assert_allclose(array(tensor), expected, rtol=2e-3, atol=2e-4)
