"""Stage `evaluate`: base, SFT and policy answer the same held-out prompts; what changed, with intervals.

The gold judge never took part in training; the proxy is the reward model that PPO optimised.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params
from rlhf_core.data.rows import read_rows
from rlhf_core.evaluation import html, plots
from rlhf_core.evaluation.statistics import Interval, bootstrap_mean, win_rates
from rlhf_core.evaluation.text_metrics import distinct, repeated_share
from rlhf_core.generation import Generation, generate
from rlhf_core.labelers import make_labeler
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.logprobs import response_logprobs
from rlhf_core.modeling.reward import load_reward_model
from rlhf_core.stages.preferences import choose
from rlhf_core.tracking import Tracker

DIRECTORIES = {"base": "pretrained", "sft": "sft", "policy": "policy"}


@dataclass
class Answers:
    """One model's answers to the held-out prompts, with what was measured of each."""

    generations: list[Generation]
    gold: list[float] = field(default_factory=list)
    proxy: list[float] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [generation.text for generation in self.generations]


@dataclass(frozen=True)
class Comparison:
    """All results; `intervals` by metric name, `numbers` are plain values."""

    intervals: dict[str, Interval]
    numbers: dict[str, float]


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.evaluate
    gold = make_labeler(config.gold, config.gold_target, params.run)
    prompt_file = layout.prepared_file("prompts", "eval")
    rows = choose(read_rows(prompt_file), config.num_prompts, params.run.seed + 1)
    tracker.dataset("prompts", prompt_file, "evaluation")
    answers = answer_all(rows, params, layout, tracker)
    kl = kl_by_prompt(rows, answers["policy"], params, layout)
    perplexity = {name: base_perplexity(rows, found, params, layout) for name, found in answers.items()}

    scorer = load_reward_model(layout.model("reward"), params.run)
    for found in answers.values():
        found.gold = gold.score([row["prompt"] for row in rows], found.texts)
        found.proxy = scorer.score([row["messages"] for row in rows], found.texts)
    comparison = compare(answers, kl, perplexity, params)
    samples = sample_rows(rows, answers)
    with staged_dir(layout.evaluation) as out:
        (out / "results.json").write_text(json.dumps(as_tree(comparison), indent=2) + "\n")
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        pictures = plots.draw_all(out, answers, comparison.intervals, params, layout)
        page = html.render(comparison, samples[: config.num_samples], pictures, params)
        (out / "report.html").write_text(page, encoding="utf-8")
    tracker.table("samples", samples[: config.num_samples])
    tracker.artifact(layout.evaluation)
    return flat_metrics(comparison)


def answer_all(
    rows: Sequence[dict[str, Any]], params: Params, layout: Layout, tracker: Tracker
) -> dict[str, Answers]:
    """The answers of each model, one model in memory at a time, all from the same random numbers."""
    total = len(DIRECTORIES) * len(rows)
    found = {}
    for index, (name, directory) in enumerate(DIRECTORIES.items()):
        model, tokenizer = load_policy(layout.model(directory), params.run)
        grouped = generate(
            model,
            tokenizer,
            [row["messages"] for row in rows],
            params.evaluate.sampling,
            batch_size=params.evaluate.batch_size,
            on_progress=lambda done, _, i=index, n=name: tracker.progress(i * len(rows) + done, total, n),
        )
        found[name] = Answers([group[0] for group in grouped])
        del model
        gc.collect()
    return found


def _logprobs(
    rows: Sequence[dict[str, Any]], answers: Answers, directory: str, temperature: float, params: Params, layout: Layout
) -> list[Any]:
    model, tokenizer = load_policy(layout.model(directory), params.run)
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in rows]
    responses = [list(generation.token_ids) for generation in answers.generations]
    return response_logprobs(model, prompts, responses, temperature=temperature)


def kl_by_prompt(
    rows: Sequence[dict[str, Any]], answers: Answers, params: Params, layout: Layout
) -> list[float]:
    """KL of the policy from SFT: log-ratio of each answer of the policy, summed over its tokens, in nats."""
    temperature = params.evaluate.sampling.temperature
    ours = _logprobs(rows, answers, "policy", temperature, params, layout)
    theirs = _logprobs(rows, answers, "sft", temperature, params, layout)
    return [float((a - b).sum()) for a, b in zip(ours, theirs)]


def base_perplexity(rows: Sequence[dict[str, Any]], answers: Answers, params: Params, layout: Layout) -> float:
    """Perplexity per token of the answers under the base model: does it still look like language."""
    import math

    found = _logprobs(rows, answers, "pretrained", 1.0, params, layout)
    return math.exp(-sum(float(part.sum()) for part in found) / sum(len(part) for part in found))


def compare(
    answers: dict[str, Answers], kl: Sequence[float], perplexity: dict[str, float], params: Params
) -> Comparison:
    config = params.evaluate
    options = {"confidence": config.confidence, "samples": config.bootstrap_samples, "seed": params.run.seed}
    intervals = {"kl": bootstrap_mean(kl, **options)}
    numbers: dict[str, float] = {"num_prompts": len(kl), "kl_budget": params.ppo.kl_budget}
    policy = answers["policy"]
    for name, found in answers.items():
        lengths = [float(len(generation.token_ids)) for generation in found.generations]
        intervals[f"gold_{name}"] = bootstrap_mean(found.gold, **options)
        intervals[f"proxy_{name}"] = bootstrap_mean(found.proxy, **options)
        intervals[f"length_{name}"] = bootstrap_mean(lengths, **options)
        numbers[f"eos_rate_{name}"] = sum(g.finished for g in found.generations) / len(lengths)
        numbers[f"distinct_2_{name}"] = distinct(found.texts, 2)
        numbers[f"repeated_3_{name}"] = repeated_share(found.texts, 3)
        numbers[f"base_perplexity_{name}"] = perplexity[name]
        if name == "policy":
            continue
        for judge in ("gold", "proxy"):
            ours, theirs = getattr(policy, judge), getattr(found, judge)
            gains = [a - b for a, b in zip(ours, theirs)]
            intervals[f"{judge}_gain_over_{name}"] = bootstrap_mean(gains, **options)
        intervals[f"win_rate_over_{name}"] = bootstrap_mean(win_rates(policy.gold, found.gold), **options)
    return Comparison(intervals, numbers)


def flat_metrics(comparison: Comparison) -> dict[str, float]:
    metrics: dict[str, float] = {f"eval/{name}": value for name, value in comparison.numbers.items()}
    for name, interval in comparison.intervals.items():
        metrics[f"eval/{name}"] = interval.estimate
        metrics[f"eval/{name}_low"] = interval.low
        metrics[f"eval/{name}_high"] = interval.high
    return dict(sorted(metrics.items()))


def as_tree(comparison: Comparison) -> dict[str, Any]:
    intervals = {name: asdict(interval) for name, interval in sorted(comparison.intervals.items())}
    return {"intervals": intervals, "numbers": dict(sorted(comparison.numbers.items()))}


def sample_rows(rows: Sequence[dict[str, Any]], answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Prompt, answers and scores side by side, in the order the prompts were drawn: not picked by outcome."""
    return [
        {"prompt": row["prompt"]}
        | {name: found.texts[i] for name, found in answers.items()}
        | {f"{judge}_{name}": round(getattr(found, judge)[i], 4) for name, found in answers.items() for judge in ("gold", "proxy")}
        for i, row in enumerate(rows)
    ]
