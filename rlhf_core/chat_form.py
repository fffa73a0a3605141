"""Chat in OpenAI's form: replies of MLflow's model and of `rlhf serve`, and their default decoding."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.config import SamplingConfig

DEFAULTS: Mapping[str, Any] = {
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 1.0,
    "max_tokens": 64,
    "seed": 0,
}


@dataclass(frozen=True)
class Choice:
    """One answer to a request. `tokens` counts its end-of-sequence token too."""

    text: str
    finish_reason: str  # stop | length
    tokens: int


def sampling_of(values: Mapping[str, Any]) -> SamplingConfig:
    """The decoding that a request asks for; keys of `DEFAULTS`, absent or None for what stands there.

    Temperature 0 is the likeliest token each time.
    """
    wanted = {
        name: default if values.get(name) is None else values[name] for name, default in DEFAULTS.items()
    }
    greedy = wanted["temperature"] == 0
    return SamplingConfig(
        temperature=1.0 if greedy else wanted["temperature"],
        top_k=1 if greedy else int(wanted["top_k"]),
        top_p=wanted["top_p"],
        max_new_tokens=int(wanted["max_tokens"]),
        seed=int(wanted["seed"]),
    )


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion(
    choices: Sequence[Choice], prompt_tokens: int, *, model: str, name: str = ""
) -> dict[str, Any]:
    """A whole chat completion of the id `name` (empty: a new one)."""
    return {
        "id": name or new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
    }
