"""Who says how good an answer is: a sentiment lexicon, a function, a local judge model, or an endpoint.

A labeler gives one number per answer; higher is better. Scales differ (vader and endpoint: -1 to 1; judge:
log-odds), so `min_margin` is read in the labeler's own scale. Pairwise judging is left out.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError, RLHFError

if TYPE_CHECKING:
    import httpx

API_KEY = "RLHF_LABELER_API_KEY"
QUESTION = (
    "Here is a message and an answer to it.\n\nMessage: {prompt}\n\nAnswer: {response}\n\n"
    "Is this a good answer? Reply with yes or no only."
)
RATING_REQUEST = (
    "Rate how good the answer to the message is, from 1 (bad) to 10 (very good). Reply with the number only."
    "\n\nMessage: {prompt}\n\nAnswer: {response}"
)


class Labeler(Protocol):
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number per response, in the order given; higher is better."""
        ...


def make_labeler(kind: str, target: str, run: RunConfig) -> Labeler:
    """The labeler `kind` (vader, function, judge, endpoint); `target` says which one.

    Raises InputError when it cannot be made. Nothing is sent anywhere except by `endpoint`.
    """
    if kind == "vader":
        return VaderLabeler()
    if kind == "function":
        return FunctionLabeler(target, Path.cwd())
    if kind == "judge":
        return JudgeLabeler(Path(target), run)
    if kind == "endpoint":
        return EndpointLabeler(target)
    raise InputError(f"labeler {kind!r}: must be vader, function, judge or endpoint")


class VaderLabeler:
    """Compound sentiment of the response in [-1, 1] (Hutto and Gilbert 2014). The prompt is not looked at."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in responses]


class FunctionLabeler:
    """`module:function(prompts, responses) -> list of numbers`, imported from the workspace."""

    def __init__(self, target: str, root: Path) -> None:
        self._target = target
        self._function = import_function(target, root)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Raises InputError when the function gives the wrong number of scores, or one that is no number."""
        scores = list(self._function(list(prompts), list(responses)))
        if len(scores) != len(responses):
            raise InputError(
                f"labeler {self._target}: gave {len(scores)} scores for {len(responses)} responses; "
                "must give one per response"
            )
        return [self._checked(score, i) for i, score in enumerate(scores)]

    def _checked(self, score: object, index: int) -> float:
        try:
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(
                f"labeler {self._target}: score {index} is {score!r}; every score must be a finite number"
            )
        return value


def import_function(target: str, root: Path) -> Callable[[list[str], list[str]], Sequence[float]]:
    module_name, _, name = target.partition(":")
    with _importable(root):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's module may fail in any way; all of them are bad input
            raise InputError(
                f"labeler {target}: cannot import {module_name} from {root}: {type(error).__name__}: {error}"
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"labeler {target}: {module_name} has no function {name!r}")
    return function


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(root))


class JudgeLabeler:
    """A local chat model; the score is its log-odds of "yes" against "no" as the first word of its reply."""

    def __init__(self, path: Path, run: RunConfig, words: tuple[str, str] = ("yes", "no")) -> None:
        from rlhf_core.modeling.loading import load_policy

        self._model, self._tokenizer = load_policy(path, run)
        self._yes, self._no = _reply_tokens(self._tokenizer, path, words)

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16) -> list[float]:
        asked = [
            QUESTION.format(prompt=prompt, response=response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return self.log_odds(asked, batch_size)

    def log_odds(self, asked: Sequence[str], batch_size: int = 16) -> list[float]:
        """Log-odds of the first of the two words against the second, as the reply to each question."""
        from rlhf_core.modeling.encoding import encode_prompt

        questions = [encode_prompt(self._tokenizer, [{"role": "user", "content": text}]) for text in asked]
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        scores = [0.0] * len(questions)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for i, score in zip(rows, self._log_odds([questions[i] for i in rows]), strict=True):
                scores[i] = score
        return scores

    def _log_odds(self, questions: list[list[int]]) -> list[float]:
        """Padding stands on the right, where causal attention never looks."""
        import torch

        longest = max(map(len, questions))
        padded = [q + [self._tokenizer.pad_token_id] * (longest - len(q)) for q in questions]
        with torch.inference_mode():
            input_ids = torch.tensor(padded, device=self._model.device)
            hidden = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            last = hidden[
                torch.arange(len(questions)), torch.tensor([len(q) - 1 for q in questions])
            ]  # (B, D)
            logits = self._model.get_output_embeddings()(last).float()  # (B, V)
            odds = logits[:, self._yes].logsumexp(-1) - logits[:, self._no].logsumexp(-1)
        return odds.tolist()


def _reply_tokens(tokenizer: Any, path: Path, words: tuple[str, str]) -> tuple[list[int], list[int]]:
    """First tokens of the spellings of each word, without those that begin both (a lone space)."""

    def first_tokens(word: str) -> set[int]:
        spellings = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in spellings}

    yes, no = map(first_tokens, words)
    if not yes - no or not no - yes:
        raise InputError(
            f"judge {path}: its tokenizer does not tell the beginnings of {' and '.join(words)} apart"
        )
    return sorted(yes - no), sorted(no - yes)


class EndpointLabeler:
    """A rating from 1 to 10 by an OpenAI-compatible server, scaled to [-1, 1].

    `url` is the API's root, such as http://127.0.0.1:8000/v1, or the whole address of its chat/completions;
    the model's name stands behind a `#`. A key comes from the environment variable RLHF_LABELER_API_KEY only.
    """

    def __init__(
        self, url: str, *, attempts: int = 4, wait_s: float = 0.5, timeout_s: float = 60.0, workers: int = 8
    ) -> None:
        address, _, model = url.partition("#")
        if not re.match(r"https?://[^/\s]+", address):
            raise InputError(f"labeler endpoint {url!r}: must begin with http:// or https://")
        address = address.rstrip("/")
        self.url = address if address.endswith("/chat/completions") else f"{address}/chat/completions"
        self._model = model or "default"
        self._attempts, self._wait_s, self._timeout_s, self._workers = attempts, wait_s, timeout_s, workers

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Raises InputError when the server refuses, RLHFError when it fails in every attempt."""
        import httpx

        key = os.environ.get(API_KEY, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            httpx.Client(headers=headers, timeout=self._timeout_s) as client,
            ThreadPoolExecutor(self._workers) as pool,
        ):
            futures = [pool.submit(self._rate, client, p, r) for p, r in zip(prompts, responses, strict=True)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # one refusal is enough: do not send the rest
                raise

    def _rate(self, client: httpx.Client, prompt: str, response: str) -> float:
        """One rating in at most `attempts` requests; what may pass (busy, no number) is tried again."""
        import httpx

        body = {
            "model": self._model,
            "messages": [
                {"role": "user", "content": RATING_REQUEST.format(prompt=prompt, response=response)}
            ],
            "temperature": 0.0,
            "max_tokens": 8,
        }
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._wait_s * 2 ** (attempt - 1))
            try:
                reply = client.post(self.url, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                rating, problem = _read_rating(reply)
                if rating is not None:
                    return (rating - 5.5) / 4.5
            elif reply.status_code == 429 or reply.status_code >= 500:
                problem = _describe(reply)
            else:
                raise InputError(f"labeler endpoint {self.url}: {_describe(reply)}")
        raise RLHFError(
            f"labeler endpoint {self.url}: failed {self._attempts} times; the last time: {problem}"
        )


def _read_rating(reply: httpx.Response) -> tuple[float | None, str]:
    """The first number from 1 to 10 of the reply, or None and what was there instead."""
    try:
        content = reply.json()["choices"][0]["message"]["content"]
        found = re.search(r"(?<![\d.])(?:10|[1-9])(?:\.\d+)?(?![\d.]*\d)", content)
    except (ValueError, LookupError, TypeError):
        return None, f"not a chat completion: {_excerpt(reply.text)}"
    if found and float(found.group()) <= 10:
        return float(found.group()), ""
    return None, f"no rating from 1 to 10 in {_excerpt(content)!r}"


def _describe(reply: httpx.Response) -> str:
    return f"HTTP {reply.status_code}: {_excerpt(reply.text)}"


def _excerpt(text: str) -> str:
    """Some servers repeat the key that they refuse."""
    key = os.environ.get(API_KEY)
    return " ".join((text.replace(key, "***") if key else text).split())[:200]
