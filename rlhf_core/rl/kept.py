"""The critic's pass over a rollout, kept for the step that would compute it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from rlhf_core.rl.rollout import Rollout

Episode: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # its prompt and its response


@dataclass
class _Pass:
    values: Tensor  # (B, R), with its graph
    places: dict[Episode, int]  # the row of each episode
    versions: list[int]  # of the critic's parameters


class KeptValues:
    """Values (B, R) with their graph, until they are taken.

    A step that sees a whole rollout in one pass meets the critic that made the rollout's values, on the same
    episodes: the pass of the rollout serves both. Written parameters or other episodes are told by what is
    kept beside the values, so nothing stale is ever taken.
    """

    def __init__(self) -> None:
        self._kept: _Pass | None = None

    def __deepcopy__(self, memo: object) -> KeptValues:
        return KeptValues()  # a graph leads to the parameters it was made with, not to their copies

    def keep(self, part: Rollout, values: Tensor, parameters: Sequence[Tensor]) -> None:
        places = {episode: row for row, episode in enumerate(_episodes(part))}
        self._kept = _Pass(values, places, _versions(parameters))

    def take(self, part: Rollout, parameters: Sequence[Tensor]) -> Tensor | None:
        """The values of the episodes of `part`, once; None where they have to be computed."""
        kept, self._kept = self._kept, None
        episodes = _episodes(part)
        if kept is None or kept.versions != _versions(parameters) or not kept.places.keys() >= set(episodes):
            return None
        return kept.values[[kept.places[episode] for episode in episodes], : part.response_mask.shape[1]]


def _episodes(part: Rollout) -> list[Episode]:
    pairs = zip(part.prompts, part.answers, strict=True)
    return [(tuple(prompt), answer.token_ids) for prompt, answer in pairs]


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    return [parameter._version for parameter in parameters]
