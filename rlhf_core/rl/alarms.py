"""What goes wrong in PPO, seen early in its metrics, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

History = Sequence[Mapping[str, float]]

DEAD_CRITIC_UPDATES = 4
MOST_LOGPROB_GAP = 0.2  # nats per token; bfloat16 alone makes some hundredths


def alarms(history: History, kl_budget: float) -> dict[str, str]:
    """Warnings by name for the rollouts so far, the newest last; each names the remedy."""
    first, last = history[0], history[-1]
    found = {}

    def ratio(name: str) -> float:
        return last[name] / first[name] if first[name] > 0.0 else 1.0

    if last["objective/kl"] > 0.75 * kl_budget:
        found["kl_runs_away"] = (
            f"KL is {last['objective/kl']:.1f} of a budget of {kl_budget:g} nats; raise ppo.kl_coef or lower "
            "ppo.learning_rate"
        )
    if last["objective/kl"] < -1.0:
        found["kl_negative"] = (
            f"KL is {last['objective/kl']:.1f} nats, clearly below 0: answers are not sampled from the "
            "distribution that is trained"
        )
    if ratio("rollout/response_length") > 2.0:
        found["length_runs_away"] = (
            f"answers grew {ratio('rollout/response_length'):.1f} times as long; set ppo.length_penalty, or "
            "raise ppo.missing_eos_penalty"
        )
    if ratio("rollout/eos_rate") < 0.5:
        found["answers_do_not_end"] = (
            f"answers that end fell from {first['rollout/eos_rate']:.0%} to {last['rollout/eos_rate']:.0%}; "
            "raise ppo.missing_eos_penalty"
        )
    if ratio("objective/entropy") < 1 / 3:
        found["entropy_collapses"] = (
            f"entropy fell from {first['objective/entropy']:.2f} to {last['objective/entropy']:.2f} nats a "
            "token; raise ppo.entropy_coef or ppo.kl_coef"
        )
    if last.get("rollout/logprob_gap", 0.0) > MOST_LOGPROB_GAP:
        found["rollout_differs"] = (
            f"generation and training differ by {last['rollout/logprob_gap']:.2f} nats a token in what they "
            "hold likely; log-probabilities are taken from training from now on; set run.precision to float32"
        )
    explained = [row["value/explained_variance"] for row in history if "value/explained_variance" in row]
    if len(explained) > DEAD_CRITIC_UPDATES and max(explained[-DEAD_CRITIC_UPDATES:]) < 0.0:
        found["dead_critic"] = (
            f"the critic explained nothing in {DEAD_CRITIC_UPDATES} updates; raise ppo.critic_learning_rate "
            "or ppo.cliprange_value"
        )
    return found
