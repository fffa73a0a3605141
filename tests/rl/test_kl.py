import math

import pytest
import torch

from rlhf_core.rl.kl import KLController, kl_estimate

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TRUE_KL = (P * (P / Q).log()).sum()


def test_estimators_by_hand():
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    found = {name: kl_estimate(logprobs, ref_logprobs, name).item() for name in ("k1", "k2", "k3")}
    log2 = math.log(2)
    assert found == pytest.approx({"k1": log2, "k2": log2**2 / 2, "k3": 0.5 - 1 + log2})


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_have_the_kl_as_their_mean_under_the_policy(estimator):
    mean = (P * kl_estimate(P.log(), Q.log(), estimator)).sum()
    torch.testing.assert_close(mean, TRUE_KL)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_divergence_from_oneself(estimator):
    assert not kl_estimate(P.log(), P.log(), estimator).any()


def test_k2_and_k3_are_never_negative_and_k1_may_be():
    log_ratio = torch.linspace(-3, 3, 61, dtype=torch.float64)
    zero = torch.zeros_like(log_ratio)
    assert (kl_estimate(log_ratio, zero, "k2") >= 0).all()
    assert (kl_estimate(log_ratio, zero, "k3") >= -1e-15).all()
    assert (kl_estimate(log_ratio, zero, "k1") < 0).any()


@pytest.mark.parametrize(("estimator", "right"), [("k2", True), ("k1", False)])
def test_gradient_of_k2_is_that_of_the_kl_and_of_k1_is_none(estimator, right):
    """As loss terms: the mean over samples of the gradient of the estimate, against the KL's own gradient."""
    logits = P.log().clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - Q.log())).sum(), logits, retain_graph=True)
    sampled = (
        P * kl_estimate(logprobs, Q.log(), estimator)
    ).sum()  # P without gradient: where samples came from
    (found,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(found, true if right else torch.zeros(3, dtype=torch.float64))


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4' must be k1, k2 or k3"):
        kl_estimate(P, Q, "k4")


def test_coefficient_stays_without_a_target():
    controller = KLController(0.05)
    controller.update(kl=50.0, episodes=1000)
    assert controller.coef == 0.05


def test_coefficient_adapts_by_hand():
    controller = KLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl=6.6, episodes=512)  # error 0.1
    assert controller.coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))


@pytest.mark.parametrize(("kl", "error"), [(100.0, 0.2), (0.0, -0.2), (-5.0, -0.2)])
def test_error_is_clipped_and_the_coefficient_stays_positive(kl, error):
    controller = KLController(1.0, target=6.0, horizon=100)
    controller.update(kl=kl, episodes=100)
    assert controller.coef == pytest.approx(1 + error)
