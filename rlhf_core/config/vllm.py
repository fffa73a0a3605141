"""Section `ppo.vllm` of params.yaml: the server that writes rollouts where `ppo.rollout_engine` is vllm."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from rlhf_core.config.parts import Section

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM makes room for


class VLLMConfig(Section):
    program: str = Field(min_length=1)
    memory_share: float = Field(gt=0.0, lt=1.0)
    start_seconds: PositiveFloat
    rollout_seconds: PositiveFloat


def rank_with_room(rank: int) -> int:
    """The least that vLLM can be told so that adapters of `rank` fit."""
    return next(room for room in RANKS if room >= rank)


def check_vllm(num_processes: int, sharding: str, finetuning: str, rank: int) -> None:
    for key, found, must, why in (
        ("model.finetuning", finetuning, "lora", "the policy is sent to it as an adapter"),
        ("run.num_processes", num_processes, 1, "it answers one process"),
        ("run.sharding", sharding, "none", "it answers one process"),
    ):
        if found != must:
            raise ValueError(f"{key} ({found}) must be {must} where ppo.rollout_engine is vllm: {why}")
    if rank > RANKS[-1]:
        raise ValueError(
            f"model.lora.rank ({rank}) must not exceed {RANKS[-1]} where ppo.rollout_engine is vllm"
        )
