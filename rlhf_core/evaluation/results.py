"""From answers and their scores to the numbers of the report: pure, no model is opened here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.config import EvaluateConfig
from rlhf_core.evaluation.statistics import Interval, bootstrap_mean, paired_difference, win_rate
from rlhf_core.evaluation.text_metrics import distinct, perplexity, repeated_share

if TYPE_CHECKING:
    from rlhf_core.generation import Generation

MODELS = ("base", "sft", "policy")
Tree = dict[str, Any]


@dataclass(frozen=True)
class ModelResult:
    """What one model answered, in the order of the prompts, and what the judges say."""

    answers: Sequence[Generation]
    gold: Sequence[float]
    proxy: Sequence[float]
    logprobs: Sequence[float]  # of each answer under the base model at temperature 1, summed over its tokens


def summarise(
    models: dict[str, ModelResult],
    kl: Sequence[float],
    config: EvaluateConfig,
    *,
    kl_budget: float,
    seed: int,
) -> Tree:
    """The tree of results.json. `kl` is log p_policy - log p_sft of each answer of the policy, in nats."""
    options: dict[str, Any] = {
        "confidence": config.confidence,
        "samples": config.bootstrap_samples,
        "seed": seed,
    }
    policy = models["policy"]
    comparison = {"kl": bootstrap_mean(kl, **options)}
    for name in ("sft", "base"):
        other = models[name]
        comparison[f"win_rate_over_{name}"] = win_rate(policy.gold, other.gold, **options)
        comparison[f"gold_gain_over_{name}"] = paired_difference(other.gold, policy.gold, **options)
        comparison[f"proxy_gain_over_{name}"] = paired_difference(other.proxy, policy.proxy, **options)
    return {
        "num_prompts": len(kl),
        "gold": config.gold,
        "confidence": config.confidence,
        "kl_budget": kl_budget,
        "sampling": config.sampling.model_dump(mode="json"),
        "models": {name: _describe(models[name], options) for name in MODELS},
        "comparison": {name: asdict(interval) for name, interval in comparison.items()},
    }


def _lengths(answers: Sequence[Generation]) -> list[int]:
    return [len(answer.token_ids) for answer in answers]


def _describe(model: ModelResult, options: dict[str, Any]) -> Tree:
    texts = [answer.text for answer in model.answers]
    lengths = _lengths(model.answers)
    return {
        "gold": asdict(bootstrap_mean(model.gold, **options)),
        "proxy": asdict(bootstrap_mean(model.proxy, **options)),
        "length": asdict(bootstrap_mean(lengths, **options)),
        "eos_rate": sum(answer.finished for answer in model.answers) / len(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repeated_4": repeated_share(texts, 4),
        "base_perplexity": perplexity(model.logprobs, lengths),
    }


def flat_metrics(tree: Tree) -> dict[str, float]:
    """The metrics of the stage: eval/NAME, eval/NAME_low, eval/NAME_high, eval/NAME_MODEL."""
    metrics: dict[str, float] = {"eval/num_prompts": tree["num_prompts"]}
    for name, value in tree["comparison"].items():
        metrics |= Interval(**value).as_metrics(f"eval/{name}")
    metrics["eval/kl_budget"] = tree["kl_budget"]
    for model, facts in tree["models"].items():
        for name, value in facts.items():
            key = f"eval/{name}_{model}"
            metrics |= Interval(**value).as_metrics(key) if isinstance(value, dict) else {key: value}
    return metrics


def rounded(value: Any) -> Any:
    """The same tree with six significant digits: more would only show the order of float32 sums."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def sample_rows(prompts: Sequence[Tree], models: dict[str, ModelResult], kl: Sequence[float]) -> list[Tree]:
    """One row per prompt: where it comes from, the three answers, their scores."""
    return [
        {"prompt": prompt["prompt"], "source": prompt["source"], "row": prompt["row"]}
        | {name: models[name].answers[i].text for name in MODELS}
        | {f"gold_{name}": rounded(models[name].gold[i]) for name in MODELS}
        | {f"proxy_{name}": rounded(models[name].proxy[i]) for name in MODELS}
        | {f"length_{name}": len(models[name].answers[i].token_ids) for name in MODELS}
        | {"kl": rounded(kl[i])}
        for i, prompt in enumerate(prompts)
    ]
