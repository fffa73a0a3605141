"""The policy as an MLflow model that answers chat requests, and how it is logged.

A request is `{"messages": [...]}` with optional temperature, top_k, top_p, max_tokens and seed; the reply
has the form of an OpenAI chat completion.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

EXAMPLE = {"messages": [{"role": "user", "content": "What do you like to do on weekends?"}], "max_tokens": 32}


class ChatPolicy(mlflow.pyfunc.PythonModel):
    """A Hugging Face policy directory behind MLflow's pyfunc interface."""

    def load_context(self, context: Any) -> None:
        from rlhf_core.config import RunConfig
        from rlhf_core.modeling.loading import load_policy

        self._model, self._tokenizer = load_policy(Path(context.artifacts["policy"]), RunConfig.alone())

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints
        """One chat completion for a request; a list of them for several rows."""
        replies = [self._complete(request) for request in requests_of(model_input)]
        return replies[0] if len(replies) == 1 else replies

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        from rlhf_core.chat_form import Choice, completion, sampling_of
        from rlhf_core.generation import generate
        from rlhf_core.modeling.encoding import encode_prompt

        messages = [{"role": m["role"], "content": m["content"]} for m in request["messages"]]
        ((answer,),) = generate(self._model, self._tokenizer, [messages], sampling_of(request))
        reason = "stop" if answer.finished else "length"
        choice = Choice(answer.text, reason, len(answer.token_ids))
        prompt_tokens = len(encode_prompt(self._tokenizer, messages))
        return completion([choice], prompt_tokens, model="rlhf-policy")


def requests_of(model_input: Any) -> list[dict[str, Any]]:
    """Requests from what MLflow hands over: a dict, a list of dicts, or a data frame with a row each."""
    if isinstance(model_input, dict):
        return [model_input]
    if isinstance(model_input, list):
        return model_input
    rows = model_input.to_dict(orient="records")
    return [{key: value for key, value in row.items() if not _is_null(value)} for row in rows]


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def signature() -> ModelSignature:
    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    options = {
        "temperature": "double",
        "top_k": "long",
        "top_p": "double",
        "max_tokens": "long",
        "seed": "long",
    }
    inputs = [ColSpec(Array(message), "messages")]
    inputs += [ColSpec(DataType[kind], name, required=False) for name, kind in options.items()]
    usage = [Property(n, DataType.long) for n in ("prompt_tokens", "completion_tokens", "total_tokens")]
    choice = Object(
        [
            Property("index", DataType.long),
            Property("message", message),
            Property("finish_reason", DataType.string),
        ]
    )
    outputs = [
        ColSpec(DataType.string, "id"),
        ColSpec(DataType.string, "object"),
        ColSpec(DataType.long, "created"),
        ColSpec(DataType.string, "model"),
        ColSpec(Array(choice), "choices"),
        ColSpec(Object(usage), "usage"),
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def log_policy(directory: Path, registered_name: str) -> Any:
    """Log the policy in `directory` to the active MLflow run, and register it as `registered_name`."""
    tokenizer_config = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    pins = [
        f"{name}=={version(name).partition('+')[0]}"
        for name in ("torch", "transformers", "mlflow", "pydantic")
    ]
    # An `input_example` would have MLflow load the policy and answer it, for a warning at most.
    facts = {"task": "llm/v1/chat", "chat_template": tokenizer_config, "example": json.dumps(EXAMPLE)}
    with warnings.catch_warnings():  # about type hints and that example: the signature says it all
        warnings.simplefilter("ignore")
        return mlflow.pyfunc.log_model(
            name="policy",
            python_model=str(Path(__file__).with_name("serving_entry.py")),
            artifacts={"policy": str(directory)},
            code_paths=[str(Path(__file__).parent)],
            signature=signature(),
            pip_requirements=pins,
            metadata=facts,
            registered_model_name=registered_name,
        )
