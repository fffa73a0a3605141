"""Reward models: a trunk, a scalar head on the last response token, and the constants that normalise scores.

An ensemble is several such members; the first stands in the model's directory, the others, each a whole
reward model, below its `members/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError
from rlhf_core.modeling.encoding import TokenBatch, encode_prompt, encode_response, length_order, make_batch
from rlhf_core.modeling.loading import (
    check_model_dir,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    use_determinism,
)
from rlhf_core.modeling.roles import Roles
from rlhf_core.modeling.trunk import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALISATION_FILE = "normalisation.json"


class ScalarHead(nn.Module):
    """One number from a hidden state, in float32. Weights start at N(0, 1/(d + 1)), the bias at 0."""

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...)."""
        return hidden.float() @ self.weight + self.bias


@dataclass(frozen=True)
class Normalisation:
    """Scores are (raw - mean) / std: mean 0 and std 1 on samples of the reference policy (Ziegler et al.
    2019)."""

    mean: float
    std: float

    def apply(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def fold_into(self, head: ScalarHead) -> None:
        """Make the head itself give normalised scores: how a critic starts from a reward model."""
        with torch.no_grad():
            head.weight /= self.std
            head.bias.copy_((head.bias - self.mean) / self.std)


def last_response_hidden(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """Hidden state (B, D) at the last response token; `hidden` is (S, T, D)."""
    return hidden.flatten(0, 1)[batch.last]


def save_reward_model(
    trunk: PreTrainedModel,
    head: ScalarHead,
    normalisation: Normalisation,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """Save as a sequence classification model with one label, which transformers opens on its own.

    Its head has no bias in transformers; ours differs by the constant kept with the normalisation.
    """
    from transformers import AutoModelForSequenceClassification

    config = type(trunk.config).from_dict({**trunk.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, trunk.base_model)
    classifier.score.weight = nn.Parameter(head.weight.detach()[None])
    classifier.to(dtype).save_pretrained(directory)
    facts = asdict(normalisation) | {"head_bias": head.bias.item()}
    (directory / NORMALISATION_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    _save_head(head, directory)


def _save_head(head: ScalarHead, directory: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    (directory / "adapter").mkdir(exist_ok=True)
    save_file(state, directory / "adapter" / "head.safetensors")


def load_head(directory: Path, hidden_size: int) -> ScalarHead:
    """The float32 head of a saved reward model."""
    from safetensors.torch import load_file

    head = ScalarHead(hidden_size, seed=0)
    head.load_state_dict(load_file(directory / "adapter" / "head.safetensors"))
    return head


def member_role(member: int) -> str:
    """The role of a member of the ensemble: reward, reward_1, reward_2, ..."""
    return f"reward_{member}" if member else "reward"


def member_directory(directory: Path, member: int) -> Path:
    return directory / "members" / str(member) if member else directory


def member_directories(directory: Path) -> list[Path]:
    """Where the members of a saved reward model stand, the first one first."""
    found = [directory]
    while (following := member_directory(directory, len(found))).is_dir():
        found.append(following)
    return found


def load_normalisation(directory: Path) -> Normalisation:
    path = directory / NORMALISATION_FILE
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {directory} is no finished reward model") from None
    return Normalisation(facts["mean"], facts["std"])


@dataclass(frozen=True)
class Member:
    """One model of an ensemble; `trunk` gives the last hidden states (S, T, D) of `TokenBatch.inputs`."""

    trunk: Callable[..., Tensor]
    head: ScalarHead
    normalisation: Normalisation

    def scores(self, batch: TokenBatch) -> Tensor:
        """Normalised, (B,)."""
        return self.normalisation.apply(self.head(last_response_hidden(self.trunk(*batch.inputs), batch)))


class RewardScorer:
    """Gives normalised scores to texts; the reward model may have a tokenizer and a template of its own."""

    def __init__(self, members: Sequence[Member], tokenizer: PreTrainedTokenizerBase) -> None:
        self.members, self._tokenizer = members, tokenizer

    def score(
        self, conversations: Sequence[Sequence[dict[str, str]]], responses: Sequence[str]
    ) -> list[float]:
        """One score per response, in the order given: the mean of the members'."""
        return self.member_scores(conversations, responses).mean(dim=0).tolist()

    @torch.no_grad()
    def member_scores(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        responses: Sequence[str],
        batch_size: int = 32,
    ) -> Tensor:
        """What each member says of each response, (members, B). Text goes in, never token ids."""
        prompts = [encode_prompt(self._tokenizer, messages) for messages in conversations]
        answers = [encode_response(self._tokenizer, text) for text in responses]
        order = length_order(prompts, answers)
        scores = torch.zeros(len(self.members), len(order))
        device = next(self.members[0].head.parameters()).device
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = make_batch(
                [prompts[i] for i in rows], [answers[i] for i in rows], self._tokenizer.pad_token_id, device
            )
            scores[:, rows] = torch.stack([member.scores(batch) for member in self.members]).cpu()
        return scores


def load_reward_model(path: Path, run: RunConfig) -> RewardScorer:
    """Open a saved reward model on its own, without adapters.

    Raises InputError for a directory that is no finished reward model.
    """
    device = resolve_device(run)
    use_determinism(device)
    members = [_load_member(directory, run, device) for directory in member_directories(path)]
    return RewardScorer(members, load_tokenizer(path))


def _load_member(path: Path, run: RunConfig, device: torch.device) -> Member:
    from transformers import AutoModel

    check_model_dir(path)
    normalisation = load_normalisation(path)
    trunk = (
        AutoModel.from_pretrained(path, dtype=resolve_dtype(run, device), local_files_only=True)
        .to(device)
        .eval()
    )
    return Member(
        partial(last_hidden, trunk), load_head(path, trunk.config.hidden_size).to(device), normalisation
    )


def scorer_of_roles(
    roles: Roles, heads: Sequence[ScalarHead], constants: Sequence[Normalisation], path: Path
) -> RewardScorer:
    """The reward roles of a running training as a scorer, with the tokenizer of the model at `path`."""
    members = [
        Member(partial(roles.hidden, member_role(i)), head, normalisation)
        for i, (head, normalisation) in enumerate(zip(heads, constants, strict=True))
    ]
    return RewardScorer(members, load_tokenizer(path))
