"""The form of the `train` deployment: the values that people change, grouped by section of params.yaml.

A field that is left empty says nothing: what params.yaml or the profile says holds. What is typed becomes an
override, so rlhf_core/config checks it as it checks every other value. Fields are not Optional, for which the
form would show a type switcher; None as their default is what makes them start out empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from rlhf_core.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    Params,
    PPOConfig,
    PreferencesConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    flatten,
)

BOUNDS = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}


def setting(section: type[BaseModel], key: str, title: str, text: str) -> Any:
    """A field that starts out empty, with the bounds of `section`'s key."""
    bounds = {
        name: getattr(rule, name)
        for rule in section.model_fields[key].metadata
        for kind, name in BOUNDS.items()
        if isinstance(rule, kind)
    }
    return Field(default=None, title=title, description=text, json_schema_extra=_starts_empty, **bounds)


def _starts_empty(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class Group(BaseModel):
    """Fields of one section of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_empty(cls, values: Any) -> Any:
        """A field that was typed into and emptied again arrives as null, an empty text or an empty list."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value not in (None, "", [])}

    @model_serializer
    def filled(self) -> dict[str, Any]:
        """The fields that say something."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}


class RunForm(Group):
    """The run as a whole."""

    seed: int = setting(
        RunConfig, "seed", "Seed", "Starts every random stream: data order, sampling, weights."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        RunConfig, "device", "Device", "auto takes the first GPU when there is one."
    )


class ModelForm(Group):
    """The model that everything starts from."""

    source: Literal["package", "path", "hub", "scratch"] = setting(
        ModelConfig,
        "source",
        "Source",
        "package: SmolLM2-135M-Instruct; path: a directory; hub: owner/name; scratch: a small one made here.",
    )
    name: str = setting(ModelConfig, "name", "Name", "The directory (path), or owner/name (hub).")
    finetuning: Literal["lora", "full"] = setting(
        ModelConfig, "finetuning", "Fine-tuning", "lora: adapters on one frozen base; full: every weight."
    )


_SOURCE = "package:chitchat, hub:owner/name, or the path of a .jsonl, .csv or .parquet file."


class DataForm(Group):
    """Where the text comes from."""

    demonstrations: list[str] = setting(
        DataConfig, "demonstrations", "Demonstrations", f"Prompts with the response to learn. {_SOURCE}"
    )
    preferences: list[str] = setting(
        DataConfig,
        "preferences",
        "Human preferences",
        f"Prompts with a chosen and a rejected response. {_SOURCE}",
    )
    prompts: list[str] = setting(DataConfig, "prompts", "Prompts", f"What the policy is to answer. {_SOURCE}")


class SFTForm(Group):
    """Supervised fine-tuning."""

    num_rows: int = setting(SFTConfig, "num_rows", "Demonstrations", "Rows trained on, chosen by the seed.")
    num_epochs: int = setting(SFTConfig, "num_epochs", "Epochs", "Passes over them.")
    batch_size: int = setting(SFTConfig, "batch_size", "Batch size", "Sequences of an optimizer step.")
    learning_rate: float = setting(SFTConfig, "learning_rate", "Learning rate", "At its peak.")


class PreferencesForm(Group):
    """Answers of the SFT model, labelled, beside the pairs of people."""

    num_prompts: int = setting(
        PreferencesConfig, "num_prompts", "Prompts", "Training prompts that the SFT model answers."
    )
    responses_per_prompt: int = setting(
        PreferencesConfig, "responses_per_prompt", "Responses per prompt", "Answers sampled to one prompt."
    )
    labeler: Literal["vader", "judge", "endpoint", "function"] = setting(
        PreferencesConfig,
        "labeler",
        "Labeler",
        "All but vader, a lexicon, want preferences.labeler_target too.",
    )
    label_noise: float = setting(
        PreferencesConfig, "label_noise", "Label noise", "Share of AI labels that are flipped on purpose."
    )


class RewardForm(Group):
    """The reward model."""

    num_epochs: int = setting(RewardConfig, "num_epochs", "Epochs", "Passes over the pairs; one is usual.")
    learning_rate: float = setting(RewardConfig, "learning_rate", "Learning rate", "At its peak.")
    ensemble_size: int = setting(
        RewardConfig,
        "ensemble_size",
        "Ensemble",
        "Reward models trained side by side, from different first weights.",
    )


class PPOForm(Group):
    """The policy against the reward model."""

    num_updates: int = setting(PPOConfig, "num_updates", "Updates", "Rollouts, each with passes over it.")
    rollout_batch_size: int = setting(
        PPOConfig, "rollout_batch_size", "Episodes per update", "A multiple of ppo.minibatch_size."
    )
    learning_rate: float = setting(PPOConfig, "learning_rate", "Learning rate", "Of the policy.")
    kl_coef: float = setting(
        PPOConfig, "kl_coef", "Price of KL", "Per nat of KL to the SFT model; higher stays closer to it."
    )
    kl_budget: float = setting(
        PPOConfig,
        "kl_budget",
        "KL budget",
        "Nats per sequence; training stops at an update whose mean is above.",
    )
    advantages: Literal["gae", "rloo", "grpo", "reinforce++"] = setting(
        PPOConfig, "advantages", "Advantages", "gae learns a critic; the others compare samples."
    )


class EvaluateForm(Group):
    """The comparison of base, SFT and policy."""

    num_prompts: int = setting(EvaluateConfig, "num_prompts", "Prompts", "Held-out prompts that all answer.")


# Section of params.yaml -> its group; the parameters of the flow have the same names.
GROUPS: dict[str, type[Group]] = {
    "run": RunForm,
    "model": ModelForm,
    "data": DataForm,
    "sft": SFTForm,
    "preferences": PreferencesForm,
    "reward": RewardForm,
    "ppo": PPOForm,
    "evaluate": EvaluateForm,
}


def overrides_of(groups: Mapping[str, Group]) -> Iterator[str]:
    """`section.key=value` for each field that was filled in, the value as YAML on one line."""
    for section, group in groups.items():
        for key, value in group.model_dump().items():
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n")
            yield f"{section}.{key}={text.rstrip()}"


TITLES = {
    "run": "The run",
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
}  # else the name with a capital


def for_reader(schema: dict[str, Any], params: Params) -> dict[str, Any]:
    """The deployment's schema with titles, and in the help of each field the value of params.yaml."""
    values = dict(flatten(params.model_dump(mode="json", by_alias=True)))
    for name, parameter in schema["properties"].items():
        parameter["title"] = TITLES.get(name, name.capitalize().replace("_", " "))
        said = parameter.get("description", "")  # from the docstring of the flow, where it goes on in a line
        parameter["description"] = said[:1].upper() + said[1:]
    for section, group in GROUPS.items():
        for key, field in schema["definitions"][group.__name__]["properties"].items():
            held = values[f"{section}.{key}"]
            said = ", ".join(held) if isinstance(held, list) else str(held)
            field["description"] = f"{field['description']} params.yaml: {said or 'nothing'}"
    return schema
