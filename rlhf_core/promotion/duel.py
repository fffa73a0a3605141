"""Candidate and opponent answer the same frozen prompts with the same seeds, one after the other.

`python -m rlhf_core.promotion.duel SPEC OUT` reads a `Spec` and fills the directory OUT: results.jsonl (a
line a prompt: answers, scores, outcomes in both orders), measurements.json, and the frozen prompts'
fingerprint in it. It is a process of its own, so that waiting for a person afterwards holds no memory of a
GPU.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params, parse_params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.evaluation.results import rounded
from rlhf_core.evaluation.text_metrics import distinct, perplexity, repeated_share
from rlhf_core.generation import Generation, generate
from rlhf_core.json_lines import Row, lines_of, read_lines
from rlhf_core.modeling.encoding import encode_prompt, encode_response
from rlhf_core.modeling.loading import check_model_dir, load_policy
from rlhf_core.modeling.logprobs import response_logprobs
from rlhf_core.promotion.guardrails import Measurements, TextFacts
from rlhf_core.promotion.judges import Judge, ScoreJudge, both_orders, make_judge
from rlhf_core.promotion.word_lists import refusal_rate, toxic_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESULTS, MEASUREMENTS = "results.jsonl", "measurements.json"


@dataclass(frozen=True)
class Spec:
    """Where everything lies that a comparison reads; `data` is a directory like data/prepared."""

    candidate: Path
    opponent: Path
    sft: Path  # the reference that the candidate started from; may be the opponent itself
    data: Path
    params: Params
    reward_accuracy: float  # of the candidate's reward model on held-out pairs; nan when nobody knows
    reward_model: Path | None = None  # only where it judges

    def save(self, path: Path) -> None:
        tree = {name: str(getattr(self, name)) for name in ("candidate", "opponent", "sft", "data")}
        tree |= {"reward_model": str(self.reward_model or "")}
        accuracy = None if math.isnan(self.reward_accuracy) else self.reward_accuracy
        params = self.params.model_dump(mode="json", by_alias=True)
        path.write_text(json.dumps(tree | {"reward_accuracy": accuracy, "params": params}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Spec:
        tree = json.loads(path.read_text(encoding="utf-8"))
        paths = {name: Path(tree[name]) for name in ("candidate", "opponent", "sft", "data")}
        accuracy = math.nan if tree["reward_accuracy"] is None else tree["reward_accuracy"]
        reward_model = Path(tree["reward_model"]) if tree["reward_model"] else None
        params = parse_params(tree["params"], str(path))
        return cls(**paths, params=params, reward_accuracy=accuracy, reward_model=reward_model)


def duel(spec: Spec, out: Path) -> None:
    """Compare, and fill the directory `out`, whole or not at all.

    Raises InputError for a model or data that is missing, or when there are too few held-out prompts.
    """
    config = spec.params.promotion
    for directory in (spec.candidate, spec.opponent, spec.sft):
        check_model_dir(directory)
    prompts = frozen_prompts(spec)
    demonstrations = frozen_demonstrations(spec)
    conversations = {row["prompt"]: row["messages"] for row in prompts}
    # Before any answer is made: a judge that cannot be had should not be found out minutes later.
    judge = make_judge(config, spec.params.run, reward_model=spec.reward_model, conversations=conversations)
    answering = Answering(spec, [row["messages"] for row in prompts], demonstrations)
    answering.run()
    rows = _result_rows(prompts, answering, judge)
    measurements = Measurements(
        candidate=text_facts(answering.flat("candidate")),
        opponent=text_facts(answering.flat("opponent")),
        kl=answering.kl(),
        perplexity=answering.perplexities["candidate"],
        sft_perplexity=answering.perplexities["sft"],
        reward_accuracy=spec.reward_accuracy,
    )
    facts = {"prompts_sha256": fingerprint(prompts), "num_demonstrations": len(demonstrations)}
    with staged_dir(out) as directory:
        (directory / RESULTS).write_text(lines_of(rows), encoding="utf-8")
        tree = rounded(measurements.as_dict()) | facts
        (directory / MEASUREMENTS).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read_duel(directory: Path) -> tuple[list[Row], Measurements, Row]:
    """What `duel` wrote: rows by prompt, measurements, and facts about what was compared."""
    tree = json.loads((directory / MEASUREMENTS).read_text(encoding="utf-8"))
    facts = {name: tree.pop(name) for name in ("prompts_sha256", "num_demonstrations")}
    known = {name: math.nan if value is None else value for name, value in tree.items()}  # JSON has no nan
    return read_lines(directory / RESULTS), Measurements.from_dict(known), facts


def outcomes_of(rows: Sequence[Row]) -> list[list[tuple[float, float]]]:
    """By prompt and sample, the candidate's outcome in both orders."""
    return [[(first, second) for first, second in row["outcomes"]] for row in rows]


def frozen_prompts(spec: Spec) -> list[Row]:
    """`num_prompts` held-out prompts, drawn by run.seed: the same for every promotion on the same data.

    Raises InputError when there are fewer than promotion.min_comparisons.
    """
    config = spec.params.promotion
    path = spec.data / "prompts" / "eval.parquet"
    rows = {row["prompt"]: row for row in read_rows(path)}  # a prompt that stands there twice is one prompt
    if len(rows) < config.min_comparisons:
        raise InputError(
            f"{path}: {len(rows)} held-out prompts, and promotion.min_comparisons ({config.min_comparisons}) "
            "asks for more; raise data.max_prompts or data.eval_fraction, or lower it"
        )
    ordered = [rows[text] for text in sorted(rows)]
    return random.Random(f"promote {spec.params.run.seed}").sample(
        ordered, min(config.num_prompts, len(ordered))
    )


def frozen_demonstrations(spec: Spec) -> list[Row]:
    """Held-out demonstrations behind the perplexity; raises InputError when there are none."""
    path = spec.data / "demonstrations" / "eval.parquet"
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: no held-out demonstrations for the guard-rail of perplexity")
    count = min(spec.params.promotion.num_demonstrations, len(rows))
    return random.Random(f"promote {spec.params.run.seed}").sample(rows, count)


def fingerprint(prompts: Sequence[Row]) -> str:
    """sha256 of the prompts in their order: equal for comparisons on the same prompts."""
    text = json.dumps([row["prompt"] for row in prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Answering:
    """The pass over candidate, opponent and SFT model: answers, likelihoods, perplexity."""

    def __init__(self, spec: Spec, conversations: list[list[dict[str, str]]], demonstrations: Sequence[Row]):
        self.spec, self.conversations, self.demonstrations = spec, conversations, demonstrations
        self.answers: dict[str, list[list[Generation]]] = {}
        self.perplexities: dict[str, float] = {}
        self._logprobs: dict[str, list[float]] = {}  # of the candidate's answers, under candidate and SFT

    def run(self) -> None:
        spec = self.spec
        self._visit(spec.candidate, ("candidate",))
        if spec.opponent == spec.sft:
            self._visit(spec.opponent, ("opponent", "sft"))
        else:
            self._visit(spec.opponent, ("opponent",))
            self._visit(spec.sft, ("sft",))

    def flat(self, name: str) -> list[Generation]:
        return [answer for group in self.answers[name] for answer in group]

    def kl(self) -> float:
        """Mean log p_candidate - log p_sft of the candidate's answers at the sampling temperature, in nats.

        It estimates KL(candidate || SFT) per answer; without bias only when top-k and top-p are off.
        """
        pairs = list(zip(self._logprobs["candidate"], self._logprobs["sft"], strict=True))
        return math.fsum(ours - reference for ours, reference in pairs) / len(pairs)

    def _visit(self, directory: Path, roles: tuple[str, ...]) -> None:
        print(f"{' and '.join(roles)}: {directory}", flush=True)
        model, tokenizer = load_policy(directory, self.spec.params.run)
        for name in roles:
            if name != "sft":
                self.answers[name] = self._generate(model, tokenizer)
            if name != "opponent":
                self._logprobs[name] = self._answer_logprobs(model, tokenizer)
                self.perplexities[name] = self._perplexity(model, tokenizer)
        del model
        gc.collect()

    def _generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[Generation]]:
        config = self.spec.params.promotion
        return generate(
            model,
            tokenizer,
            self.conversations,
            config.sampling,
            samples_per_prompt=config.samples_per_prompt,
            batch_size=config.batch_size,
        )

    def _answer_logprobs(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
        """Of each answer of the candidate, summed over its tokens."""
        groups = zip(self.conversations, self.answers["candidate"], strict=True)
        pairs = [
            (encode_prompt(tokenizer, asked), answer.token_ids) for asked, own in groups for answer in own
        ]
        logprobs = response_logprobs(
            model,
            [prompt for prompt, _ in pairs],
            [ids for _, ids in pairs],
            temperature=self.spec.params.promotion.sampling.temperature,
        )
        return [part.double().sum().item() for part in logprobs]

    def _perplexity(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        prompts = [encode_prompt(tokenizer, row["messages"]) for row in self.demonstrations]
        responses = [tuple(encode_response(tokenizer, row["response"])) for row in self.demonstrations]
        logprobs = response_logprobs(model, prompts, responses, temperature=1.0)
        return perplexity([part.double().sum().item() for part in logprobs], list(map(len, responses)))


def text_facts(answers: Sequence[Generation]) -> TextFacts:
    texts = [answer.text for answer in answers]
    return TextFacts(
        length=sum(len(answer.token_ids) for answer in answers) / len(answers),
        distinct_2=distinct(texts, 2),
        repeated_4=repeated_share(texts, 4),
        refusal_rate=refusal_rate(texts),
        toxic_rate=toxic_rate(texts),
    )


def _result_rows(prompts: Sequence[Row], answering: Answering, judge: Judge) -> list[Row]:
    """One row a prompt; every answer of the candidate meets the opponent's of the same random numbers."""
    samples = len(answering.answers["candidate"][0])
    rows = [{"prompt": row["prompt"], "source": row["source"], "row": row["row"]} for row in prompts]
    for row in rows:
        row |= {"candidate": [], "opponent": [], "outcomes": []}
    asked = [row["prompt"] for row in prompts]
    for sample in range(samples):
        ours, theirs = (
            [group[sample].text for group in answering.answers[n]] for n in ("candidate", "opponent")
        )
        found = both_orders(judge, asked, ours, theirs)
        for row, a, b, outcome in zip(rows, ours, theirs, found, strict=True):
            row["candidate"].append(_shown(judge, row["prompt"], a))
            row["opponent"].append(_shown(judge, row["prompt"], b))
            row["outcomes"].append(list(outcome))
    return rows


def _shown(judge: Judge, prompt: str, text: str) -> Row:
    score = judge.known[(prompt, text)] if isinstance(judge, ScoreJudge) else None
    return {"text": text, "score": rounded(score)}


def main() -> None:
    spec, out = (Path(argument) for argument in sys.argv[1:3])
    try:
        duel(Spec.load(spec), out)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
