"""What a client may ask, in OpenAI's form; everything else is refused with key, value and rule.

A key that would change the answer and is not known here is refused rather than passed over, unless its value
is the one that changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from feedback.loading import explain
from rlhf_core.chat_form import sampling_of
from rlhf_core.config import SamplingConfig
from serving.errors import ApiError, bad

CONSENT_HEADER = "x-feedback-consent"
MOST_CHOICES = 8
DEFAULT_TOKENS = 256
MOST_SEED = 2**63 - 1
# Keys of OpenAI's that are nothing to this server, whatever they say.
PASSED_OVER = ("safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention", "verbosity")
# Keys that are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    "store": (None, False),
}


class _Given(BaseModel):
    """Types as JSON has them: "0.5" is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


def _whole(text: str) -> str:
    """JSON can carry half a surrogate pair, which is no character."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be Unicode text, without half a surrogate pair")
    return text


_Text = Annotated[str, AfterValidator(_whole)]


class _Part(_Given):
    type: Literal["text"]
    text: _Text


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_parts)]

    def plain(self) -> dict[str, str]:
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Given):
    include_usage: bool | None = None


def _listed(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


_Stop = Annotated[str, Field(min_length=1, max_length=500)]
_Tokens = Annotated[int, Field(ge=1)]


class _Chat(_Given):
    messages: list[_Message] = Field(min_length=1)
    model: str | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0)
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    stop: Annotated[list[_Stop], Field(max_length=4), BeforeValidator(_listed)] = []
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: _Text | None = Field(None, max_length=500)
    metadata: dict[_Text, _Text] | None = Field(None, max_length=16)


class _Feedback(_Given):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str = Field(min_length=1, max_length=100)
    rating: Literal["up", "down"]
    comment: _Text = Field("", max_length=5000)
    user: _Text | None = Field(None, max_length=500)
    index: int = Field(0, ge=0, lt=MOST_CHOICES)


@dataclass(frozen=True)
class Wanted:
    """A request that may be answered."""

    model: str
    messages: tuple[dict[str, str], ...]
    sampling: SamplingConfig
    says_length: bool  # else the answer may be shortened to what the model's context leaves
    stops: tuple[str, ...]
    copies: int
    stream: bool
    with_usage: bool
    consent: bool
    conversation: str  # the same for all requests of one conversation or user

    @property
    def decoding(self) -> dict[str, Any]:
        """How the answer was sampled, as feedback keeps it."""
        return self.sampling.model_dump() | ({"stop": list(self.stops)} if self.stops else {})


@dataclass(frozen=True)
class Rating:
    """A thumb for one choice of an answer."""

    answer: str
    good: bool
    comment: str
    user: str


def read_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError when the body is no JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(
            400, f"the body must be a JSON object, found {type(found).__name__}", code="invalid_json"
        )
    return found


def read_chat(body: dict[str, Any], headers: Mapping[str, str], most_tokens: int, slots: int) -> Wanted:
    """Raises ApiError 400 that names key, value and rule."""
    _refuse_unsupported(body)
    chat = _checked(_Chat, body)
    if chat.messages[-1].role != "user":
        raise bad("messages", f"must end with a user's turn, found {chat.messages[-1].role!r} last")
    copies = chat.n or 1
    if copies > slots:
        raise bad("n", f"must be at most {slots}, the slots of this server, found {copies}")
    if chat.stream_options is not None and not chat.stream:
        raise bad("stream_options", "goes with stream: true alone")
    seed = secrets.randbelow(2**31) if chat.seed is None else chat.seed
    given = chat.model_dump(include={"temperature", "top_p", "top_k"})
    sampling = sampling_of(given | {"max_tokens": _most_tokens(chat, most_tokens), "seed": seed})
    metadata = chat.metadata or {}
    messages = tuple(message.plain() for message in chat.messages)
    return Wanted(
        model=chat.model or "",
        messages=messages,
        sampling=sampling,
        says_length=(chat.max_tokens or chat.max_completion_tokens) is not None,
        stops=tuple(chat.stop),
        copies=copies,
        stream=bool(chat.stream),
        with_usage=bool(chat.stream_options and chat.stream_options.include_usage),
        consent="true" in (metadata.get("consent"), headers.get(CONSENT_HEADER, "").lower()),
        conversation=metadata.get("conversation") or chat.user or _opening(messages),
    )


def read_feedback(body: dict[str, Any]) -> Rating:
    """Raises ApiError 400 that names key, value and rule."""
    given = _checked(_Feedback, body)
    return Rating(choice_id(given.id, given.index), given.rating == "up", given.comment, given.user or "")


def choice_id(answer: str, index: int) -> str:
    """The name under which one choice of an answer is kept."""
    return f"{answer}:{index}" if index else answer


def _checked(kind: type[Any], body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        param = str(error.errors()[0]["loc"][0])
        raise ApiError(400, explain(error), param=param, code="invalid_value") from None


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for key, value in body.items():
        if key in _Chat.model_fields or key in PASSED_OVER:
            continue
        if key not in NEUTRAL or value not in NEUTRAL[key]:
            raise bad(key[:100], f"is not supported here, found {value!r:.80}", "unsupported_parameter")


def _most_tokens(chat: _Chat, most: int) -> int:
    """The longest answer asked for, under the one name or the other."""
    both = {
        key: value
        for key in ("max_tokens", "max_completion_tokens")
        if (value := getattr(chat, key)) is not None
    }
    if len(set(both.values())) > 1:
        raise bad("max_tokens", f"({chat.max_tokens}) and max_completion_tokens say different things")
    for key, value in both.items():
        if value > most:
            raise bad(key, f"must be at most {most} on this server, found {value}")
    return min(next(iter(both.values()), DEFAULT_TOKENS), most)


def _opening(messages: tuple[dict[str, str], ...]) -> str:
    """What stays while a conversation grows: everything up to the first turn of the user."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    text = json.dumps(messages[: first + 1], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
