"""Who wins a prompt: by the scores of a labeler, or by a judge that sees both answers, in both orders.

A judge that reads two answers likes the first or the second place; asked in both orders and counted half
each, that liking cancels. Scores know no order, and give the same outcome twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.config import PromotionConfig, RunConfig
from rlhf_core.errors import InputError
from rlhf_core.labelers import JudgeLabeler, Labeler, import_function, make_labeler
from rlhf_core.promotion.gate import LOSS, TIE, WIN

Messages = Sequence[dict[str, str]]
CHOICE = (
    "Here is a message and two answers to it.\n\nMessage: {prompt}\n\nAnswer A: {first}\n\n"
    "Answer B: {second}\n\nWhich answer is better? Reply with A or B only."
)


class Judge(Protocol):
    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """By prompt: 1 where the first answer is better, 0 where the second is, 1/2 for a tie."""
        ...


class ScoreJudge:
    """The answer with the higher score wins; each answer is scored once, whatever the order."""

    def __init__(self, score: Callable[[Sequence[str], Sequence[str]], Sequence[float]]) -> None:
        self._score = score
        self.known: dict[tuple[str, str], float] = {}

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        ours, theirs = self.scores(prompts, first), self.scores(prompts, second)
        return [outcome(a - b) for a, b in zip(ours, theirs, strict=True)]

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = list(zip(prompts, responses, strict=True))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self.known))
        if new:
            found = self._score([prompt for prompt, _ in new], [response for _, response in new])
            self.known |= dict(zip(new, map(float, found), strict=True))
        return [self.known[pair] for pair in pairs]


class FunctionJudge:
    """`module:function(prompts, first, second) -> list of numbers`, above 0 where the first is better."""

    def __init__(self, target: str, root: Path) -> None:
        self._target = target
        self._function: Callable[..., Sequence[Any]] = import_function(target, root)

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Raises InputError when it gives the wrong number of preferences, or one that is no number."""
        found = list(self._function(list(prompts), list(first), list(second)))
        if len(found) != len(prompts):
            raise InputError(
                f"judge {self._target}: gave {len(found)} preferences for {len(prompts)} "
                f"prompts; must give one "
                "for each"
            )
        for i, value in enumerate(found):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(
                    f"judge {self._target}: preference {i} is {value!r}; every one must be a finite number"
                )
        return [outcome(float(value)) for value in found]


class ModelJudge:
    """A local chat model that is asked which of two answers is better; its log-odds of "A" against "B"."""

    def __init__(self, path: Path, run: RunConfig) -> None:
        self._judge = JudgeLabeler(path, run, words=("A", "B"))

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        questions = [
            CHOICE.format(prompt=prompt, first=a, second=b)
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        return [outcome(odds) for odds in self._judge.log_odds(questions)]


def outcome(preference: float) -> float:
    """A win, a tie or a loss, by the sign."""
    if preference == 0.0:
        return TIE
    return WIN if preference > 0.0 else LOSS


def make_judge(
    config: PromotionConfig,
    run: RunConfig,
    *,
    reward_model: Path | None = None,
    conversations: Mapping[str, Messages] | None = None,
) -> Judge:
    """The judge that section `promotion` names.

    A reward model that judges stands in `reward_model`, and reads the `conversations` behind the prompts.
    Raises InputError when the judge cannot be made.
    """
    if config.judge == "reward_model":
        return ScoreJudge(_reward_scores(reward_model, conversations or {}, run))
    if config.compare == "scores":
        labeler: Labeler = make_labeler(config.judge, config.judge_target, run)
        return ScoreJudge(labeler.score)
    if config.judge == "function":
        return FunctionJudge(config.judge_target, Path.cwd())
    return ModelJudge(Path(config.judge_target), run)


def _reward_scores(
    directory: Path | None, conversations: Mapping[str, Messages], run: RunConfig
) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    from rlhf_core.modeling.reward import load_reward_model

    if directory is None:
        raise InputError("promotion.judge = 'reward_model': the directory of the reward model is not given")
    scorer = load_reward_model(directory, run)
    return lambda prompts, responses: scorer.score([conversations[text] for text in prompts], responses)


def both_orders(
    judge: Judge, prompts: Sequence[str], candidate: Sequence[str], opponent: Sequence[str]
) -> list[tuple[float, float]]:
    """By prompt, the candidate's outcome when its answer stands first, and when it stands second."""
    first = judge.compare(prompts, candidate, opponent)
    second = [1.0 - found for found in judge.compare(prompts, opponent, candidate)]
    return list(zip(first, second, strict=True))
