"""Every value a run can change: the sections of params.yaml, and the file that holds them."""

from rlhf_core.config.collect import CollectConfig
from rlhf_core.config.file import (
    change_params,
    flatten,
    known_keys,
    load_params,
    parse_overrides,
    parse_params,
    profile_values,
    put,
    read_yaml,
)
from rlhf_core.config.parts import SamplingConfig
from rlhf_core.config.promotion import PromotionConfig
from rlhf_core.config.retrain import RetrainConfig
from rlhf_core.config.sections import (
    SCRATCH_CONTEXT,
    DataConfig,
    EvaluateConfig,
    LoRAConfig,
    ModelConfig,
    Params,
    PPOConfig,
    PreferencesConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    ScratchConfig,
    SFTConfig,
    ValidateConfig,
)
from rlhf_core.config.simulate import SimulateConfig
from rlhf_core.config.vllm import VLLMConfig, rank_with_room

__all__ = [
    "SCRATCH_CONTEXT",
    "CollectConfig",
    "DataConfig",
    "EvaluateConfig",
    "LoRAConfig",
    "ModelConfig",
    "PPOConfig",
    "Params",
    "PreferencesConfig",
    "PretrainConfig",
    "PromotionConfig",
    "RetrainConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "ScratchConfig",
    "SimulateConfig",
    "VLLMConfig",
    "ValidateConfig",
    "change_params",
    "flatten",
    "known_keys",
    "load_params",
    "parse_overrides",
    "parse_params",
    "profile_values",
    "put",
    "rank_with_room",
    "read_yaml",
]
