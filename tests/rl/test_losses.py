import math

import pytest
import torch

from rlhf_core.rl.losses import pairwise_loss, policy_loss, rating_loss, value_loss

CLIP = {"cliprange_low": 0.2, "cliprange_high": 0.2}


def policy(*tensors, cliprange):
    return policy_loss(*tensors, cliprange_low=cliprange, cliprange_high=cliprange)


def example(rows=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, advantages = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([4, 2, 1][:rows])[:, None]
    return logprobs, old, advantages, mask


def test_policy_loss_by_hand():
    # ratios 1.5 and 0.5, clip range 0.2: min(1.5*2, 1.2*2) = 2.4; min(0.5*-1, 0.8*-1) = -0.8
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]])
    loss, stats = policy_loss(
        logprobs,
        torch.zeros(1, 2),
        torch.tensor([[2.0, -1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        **CLIP,
    )
    assert loss.item() == pytest.approx(-(2.4 - 0.8))
    assert stats["policy/clipfrac"].item() == 2.0
    k3 = (1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5))
    assert stats["policy/approx_kl"].item() == pytest.approx(k3)


def test_policy_loss_equals_its_definition_token_by_token():
    logprobs, old, advantages, mask = example()
    loss, _ = policy_loss(logprobs, old, advantages, mask, **CLIP)
    expected = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[i, t] - old[i, t])
        a = advantages[i, t].item()
        expected -= min(ratio * a, max(0.8, min(1.2, ratio)) * a)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_policy_loss_before_the_first_update_has_ratio_one():
    logprobs, _, advantages, mask = example()
    loss, stats = policy_loss(logprobs, logprobs.clone(), advantages, mask, **CLIP)
    assert stats["policy/approx_kl"] == 0
    assert stats["policy/clipfrac"] == 0
    assert stats["policy/ratio"] == mask.sum()
    torch.testing.assert_close(loss, -advantages[mask].sum())


def test_policy_gradient_raises_good_tokens_and_not_padding():
    logprobs, _, _, mask = example()
    logprobs = logprobs.requires_grad_()
    advantages = torch.ones_like(logprobs)
    loss, _ = policy_loss(logprobs, logprobs.detach().clone(), advantages, mask, **CLIP)
    loss.backward()
    assert (logprobs.grad[mask] < 0).all()  # a step against the gradient raises the log-probability
    assert not logprobs.grad[~mask].any()


def test_policy_loss_stops_pushing_outside_the_clip_range():
    logprobs = torch.tensor([[math.log(1.5)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), mask, **CLIP)[0].backward()
    assert logprobs.grad.item() == 0.0


def test_upper_clip_range_is_separate():
    logprobs = torch.tensor([[math.log(1.25), math.log(1.25), math.log(0.75)]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    wide = {"cliprange_low": 0.2, "cliprange_high": 0.3}
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, **wide)
    assert loss.item() == pytest.approx(-(1.25 - 1.25 - 0.8))
    loss.backward()
    assert (logprobs.grad != 0).tolist() == [[True, True, False]]


def test_dual_clip_by_hand_and_only_below_zero():
    logprobs = torch.tensor([[math.log(10.0), math.log(10.0), math.log(2.0)]], requires_grad=True)
    advantages = torch.tensor([[-1.0, 1.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, **CLIP, dual_clip=3.0)
    # max(-10, -3) = -3;  min(10, 1.2) = 1.2;  -2 stays
    assert loss.item() == pytest.approx(-(-3.0 + 1.2 - 2.0))
    loss.backward()
    assert (logprobs.grad != 0).tolist() == [[False, False, True]]


@pytest.mark.parametrize("loss", [policy, value_loss])
def test_losses_are_sums_so_the_cut_into_micro_batches_changes_nothing(loss):
    logprobs, old, advantages, mask = example()
    extra = (advantages,)
    whole, stats = loss(logprobs, old, *extra, mask, cliprange=0.2)
    parts = [loss(logprobs[i], old[i], advantages[i], mask[i], cliprange=0.2) for i in ([0], [1, 2])]
    torch.testing.assert_close(whole, sum(part for part, _ in parts))
    for name, value in stats.items():
        torch.testing.assert_close(value, sum(part[name] for _, part in parts))


@pytest.mark.parametrize("loss", [policy, value_loss])
def test_losses_ignore_what_stands_outside_the_mask(loss):
    logprobs, old, advantages, mask = example()
    plain, _ = loss(logprobs, old, advantages, mask, cliprange=0.2)
    dirty = [tensor.masked_fill(~mask, 1e4) for tensor in (logprobs, old, advantages)]
    torch.testing.assert_close(loss(*dirty, mask, cliprange=0.2)[0], plain, rtol=0, atol=0)


def test_value_loss_by_hand():
    # returns 1; V = 3, old 0, clip .5: clipped .5; max(4, .25) = 4. V = .6, old 0: clipped .5, max(.16, .25)
    loss, stats = value_loss(
        torch.tensor([[3.0, 0.6]]),
        torch.zeros(1, 2),
        torch.ones(1, 2),
        torch.ones(1, 2, dtype=torch.bool),
        cliprange=0.5,
    )
    assert loss.item() == pytest.approx(0.5 * (4.0 + 0.25))
    assert stats["value/clipfrac"].item() == 1.0


def test_pairwise_loss_by_hand_and_its_gradient():
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss, stats = pairwise_loss(chosen, rejected)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2)))
    assert stats["train/accuracy"].item() == 1
    assert stats["train/margin"].item() == -1.0
    loss.backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_pairwise_loss_with_margin_smoothing_and_centring_equals_its_definition():
    generator = torch.Generator().manual_seed(4)
    chosen, rejected, margins = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    loss, _ = pairwise_loss(chosen, rejected, margins=margins.abs(), label_smoothing=0.1, centering_coef=0.01)
    expected = 0.0
    for w, r, m in zip(chosen.tolist(), rejected.tolist(), margins.abs().tolist()):
        right = 1 / (1 + math.exp(-(w - r - m)))
        expected += -0.9 * math.log(right) - 0.1 * math.log(1 - right) + 0.01 * (w + r) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_smoothing_is_least_where_the_odds_are_those_of_the_labels():
    """With a tenth of the labels wrong the best gap is log 9, not infinity."""
    gap = torch.tensor([math.log(9.0)], dtype=torch.float64, requires_grad=True)
    pairwise_loss(gap, torch.zeros(1, dtype=torch.float64), label_smoothing=0.1)[0].backward()
    assert gap.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_a_margin_keeps_the_gradient_on_pairs_that_are_already_right():
    chosen = torch.tensor([2.0, 2.0], requires_grad=True)
    pairwise_loss(chosen, torch.zeros(2), margins=torch.tensor([0.0, 3.0]))[0].backward()
    assert chosen.grad[1] < chosen.grad[0] < 0


def test_pairwise_loss_counts_each_pair_its_weight():
    chosen, rejected = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.0, 1.5, 3.0])
    weights = torch.tensor([0.5, 0.25, 2.0])
    loss, stats = pairwise_loss(chosen, rejected, weights=weights, centering_coef=0.1, label_smoothing=0.1)
    parts = [
        pairwise_loss(c[None], r[None], centering_coef=0.1, label_smoothing=0.1)
        for c, r in zip(chosen, rejected)
    ]
    assert loss.item() == pytest.approx(sum(w * p.item() for w, (p, _) in zip(weights.tolist(), parts)))
    assert stats["train/accuracy"].item() == 0.5  # the first pair alone is right
    assert stats["train/margin"].item() == pytest.approx(0.5 * 1.0 - 0.25 * 1.0 - 2.0 * 5.0)


def test_pairwise_loss_of_soft_labels_equals_its_definition():
    generator = torch.Generator().manual_seed(5)
    chosen, rejected = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    sure = torch.tensor([1.0, 0.8, 0.5, 0.6], dtype=torch.float64)
    loss, stats = pairwise_loss(chosen, rejected, probabilities=sure, label_smoothing=0.1)
    expected = right = 0.0
    for w, r, p in zip(chosen.tolist(), rejected.tolist(), sure.tolist()):
        s = 1 / (1 + math.exp(-(w - r)))
        q = 0.9 * p + 0.1 * (1 - p)
        expected -= q * math.log(s) + (1 - q) * math.log(1 - s)
        right += p if w > r else 1 - p
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert stats["train/accuracy"].item() == pytest.approx(right)


def test_a_tie_pulls_scores_together_whichever_side_is_higher():
    chosen = torch.tensor([2.0, -2.0, 1.0], requires_grad=True)
    rejected = torch.tensor([0.0, 0.0, 1.0])
    pairwise_loss(chosen, rejected, probabilities=torch.full((3,), 0.5))[0].backward()
    assert chosen.grad[0] > 0 > chosen.grad[1]
    assert chosen.grad[2] == 0.0


def test_sure_labels_are_the_same_to_the_bit_as_none():
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(6), requires_grad=True)
    losses = [pairwise_loss(*scores, probabilities=sure)[0] for sure in (None, torch.ones(50))]
    one, other = (torch.autograd.grad(loss, scores)[0] for loss in losses)
    assert losses[0] == losses[1]
    assert torch.equal(one, other)


def test_rating_loss_by_hand_and_its_gradient():
    scores = torch.tensor([1.0, -2.0], requires_grad=True)
    loss, stats = rating_loss(scores, torch.tensor([3.0, -1.0]), weights=torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(0.5 * (4.0 + 0.5 * 1.0))
    assert stats["train/rating_error"].item() == pytest.approx(4.5)
    loss.backward()
    assert scores.grad.tolist() == [-2.0, -0.5]


def test_pairwise_loss_does_not_change_when_all_scores_shift():
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 0.5])
    torch.testing.assert_close(
        pairwise_loss(chosen + 7, rejected + 7)[0], pairwise_loss(chosen, rejected)[0], rtol=1e-6, atol=1e-6
    )
