"""Stage `evaluate`: base, SFT and policy answer the same held-out prompts with the same random numbers.

One model is in memory at a time. PPO optimised the reward model (proxy); the gold judge says what that was
worth.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.evaluation.html import report_html
from rlhf_core.evaluation.plots import Figures, draw_plots, read_history, read_pairs
from rlhf_core.evaluation.results import MODELS, ModelResult, flat_metrics, rounded, sample_rows, summarise
from rlhf_core.generation import Generation, generate
from rlhf_core.labelers import make_labeler
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import check_model_dir, load_policy
from rlhf_core.modeling.logprobs import response_logprobs
from rlhf_core.modeling.reward import load_reward_model
from rlhf_core.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# "base" is what SFT starts from: for a model from scratch, the pretrained one.
DIRECTORIES = {"base": "pretrained", "sft": "sft", "policy": "policy"}
EXTRA_STEPS = 7  # of the progress bar: three models measured, three scored, one report
Row = dict[str, Any]


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.evaluate
    # Before any answer is made: what is missing should not be found out minutes later.
    labeler = make_labeler(config.gold, config.gold_target, params.run)
    for name in (*DIRECTORIES.values(), "reward"):
        check_model_dir(layout.model(name))
    prompts = _choose_prompts(params, layout)
    tracker.dataset("prompts", layout.prepared_file("prompts", "eval"), "evaluation")
    answering = Answering(params, layout, prompts, tracker)
    answering.run()
    if not ranks.is_first():
        return {}  # what is left is short, and one writes

    scorer = load_reward_model(layout.model("reward"), params.run)
    conversations, asked = [row["messages"] for row in prompts], [row["prompt"] for row in prompts]
    models = {}
    for name in MODELS:
        texts = [answer.text for answer in answering.answers[name]]
        models[name] = ModelResult(
            answers=answering.answers[name],
            gold=labeler.score(asked, texts),
            proxy=scorer.score(conversations, texts),
            logprobs=answering.base_logprobs[name],
        )
        answering.advance("scored")
    kl = answering.kl()
    tree = rounded(summarise(models, kl, config, kl_budget=params.ppo.kl_budget, seed=params.run.seed))
    samples = sample_rows(prompts, models, kl)
    write_report(tree, samples, layout, config.num_samples)
    tracker.artifact(layout.evaluation)
    tracker.table("samples", [_sample_cells(row) for row in samples[: config.num_samples]])
    answering.advance("report written")
    return flat_metrics(tree)


def _choose_prompts(params: Params, layout: Layout) -> list[Row]:
    """`num_prompts` held-out prompts, or all there are, in an order given by the seed."""
    path = layout.prepared_file("prompts", "eval")
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: no held-out prompts; evaluate needs at least one (data.eval_fraction)")
    count = min(params.evaluate.num_prompts, len(rows))
    # A text of its own as the seed, so that it draws other prompts than the preferences stage.
    return random.Random(f"evaluate {params.run.seed}").sample(rows, count)


class Answering:
    """The pass over the three models: their answers, and how likely these are under each other."""

    def __init__(self, params: Params, layout: Layout, prompts: Sequence[Row], tracker: Tracker) -> None:
        self.params, self.layout, self.tracker = params, layout, tracker
        self.conversations = [row["messages"] for row in prompts]
        self.answers: dict[str, list[Generation]] = {}
        self.base_logprobs: dict[str, list[float]] = {}  # of each model's answers, under base
        self._policy_logprobs: dict[str, list[float]] = {}  # of the policy's answers, under policy and SFT
        self._steps = 0

    def run(self) -> None:
        # The policy first and the base last: each is opened once, when the answers it reads are there.
        for name in ("policy", "sft", "base"):
            model, tokenizer = load_policy(self.layout.model(DIRECTORIES[name]), self.params.run)
            self.answers[name] = self._generate(name, model, tokenizer)
            self._measure(name, model, tokenizer)
            self.advance(f"{name} measured")
            del model
            gc.collect()

    def kl(self) -> list[float]:
        """log p_policy - log p_sft of each answer of the policy, at the sampling temperature, in nats.

        Its mean estimates KL(policy || sft) per sequence; without bias only when top-k and top-p are off.
        """
        pairs = zip(self._policy_logprobs["policy"], self._policy_logprobs["sft"], strict=True)
        return [ours - reference for ours, reference in pairs]

    def advance(self, note: str) -> None:
        self._steps += 1
        self._show(len(self.answers) * len(self.conversations), note)

    def _show(self, answered: int, note: str) -> None:
        total = len(DIRECTORIES) * len(self.conversations) + EXTRA_STEPS
        self.tracker.progress(answered + self._steps, total, note)

    def _generate(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[Generation]:
        config = self.params.evaluate
        before = len(self.answers) * len(self.conversations)
        groups = generate(
            model,
            tokenizer,
            self.conversations,
            config.sampling,
            batch_size=config.batch_size,
            only=ranks.share(range(len(self.conversations))),
            on_progress=lambda done, total: self._show(before + done, f"{name} answers"),
        )
        return ranks.gather([group[0] for group in groups])

    def _measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        prompts = [encode_prompt(tokenizer, messages) for messages in self.conversations]

        def sums(author: str, temperature: float) -> list[float]:
            token_ids = [answer.token_ids for answer in self.answers[author]]
            own = ranks.share(list(zip(prompts, token_ids, strict=True)))
            logprobs = response_logprobs(
                model, [prompt for prompt, _ in own], [ids for _, ids in own], temperature=temperature
            )
            return ranks.gather([part.double().sum().item() for part in logprobs])

        if name == "base":
            self.base_logprobs = {author: sums(author, 1.0) for author in MODELS}
        else:
            self._policy_logprobs[name] = sums("policy", self.params.evaluate.sampling.temperature)


def write_report(tree: Row, samples: list[Row], layout: Layout, num_samples: int) -> None:
    """Fill reports/evaluation: results.json, samples.jsonl, the plots and report.html."""
    histories = {stage: read_history(layout.history(stage)) for stage in ("sft", "reward", "ppo")}
    figures = Figures(tree, samples, histories, read_pairs(layout.pair_scores))
    light, dark = draw_plots(figures, "light"), draw_plots(figures, "dark")
    page = report_html(tree, samples, _reward_metrics(layout), light, dark, num_samples)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
    with staged_dir(layout.evaluation) as out:
        (out / "results.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")
        for name, data in light.items():
            (out / f"{name}.png").write_bytes(data)


def _reward_metrics(layout: Layout) -> dict[str, float]:
    path = layout.metrics("reward")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sample_cells(row: Row) -> Row:
    names = ("prompt", *MODELS, *(f"{judge}_{name}" for judge in ("gold", "proxy") for name in MODELS))
    return {name: row[name] for name in names}
