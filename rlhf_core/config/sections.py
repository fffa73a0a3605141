"""Every value a run can change: one model per section of params.yaml, frozen and strict.

No section does I/O, no field has a default, and nothing rewrites a value after it was loaded.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf_core.config.collect import CollectConfig
from rlhf_core.config.parts import SamplingConfig, Section, check_target
from rlhf_core.config.promotion import PromotionConfig
from rlhf_core.config.retrain import RetrainConfig
from rlhf_core.config.simulate import SimulateConfig
from rlhf_core.config.vllm import VLLMConfig, check_vllm


class RunConfig(Section):
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "float32", "bfloat16"]
    num_processes: PositiveInt
    sharding: Literal["none", "moments", "weights"]

    @classmethod
    def alone(cls) -> Self:
        """Of a model that is only talked to, outside of any workspace."""
        return cls(seed=0, device="auto", num_processes=1, sharding="none", precision="auto")


class LoRAConfig(Section):
    rank: PositiveInt
    alpha: PositiveFloat

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class ScratchConfig(Section):
    vocab_size: int = Field(ge=300, description="256 bytes, the special tokens and some merges")
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.scratch.hidden_size ({self.hidden_size}) must be a multiple of "
                f"2 x model.scratch.num_heads ({self.num_heads}): rotary positions turn pairs of a head"
            )
        return self


class ModelConfig(Section):
    source: Literal["package", "path", "hub", "scratch"]
    name: str
    revision: str
    save_dtype: Literal["bfloat16", "float32"]
    finetuning: Literal["lora", "full"]
    gradient_checkpointing: bool
    kernels: Literal["plain", "liger"]
    lora: LoRAConfig
    scratch: ScratchConfig

    @model_validator(mode="after")
    def check_name(self) -> Self:
        if self.source in ("path", "hub") and not self.name:
            raise ValueError(f"model.name must name the model when model.source is {self.source}")
        if self.source in ("package", "scratch") and self.name:
            raise ValueError(f"model.name ({self.name!r}) must be empty when model.source is {self.source}")
        return self


class DataConfig(Section):
    demonstrations: tuple[str, ...] = Field(min_length=1)
    preferences: tuple[str, ...]
    prompts: tuple[str, ...] = Field(min_length=1)
    eval_fraction: float = Field(gt=0.0, lt=1.0)
    max_demonstrations: PositiveInt
    max_preferences: PositiveInt
    max_prompts: PositiveInt
    min_prompt_chars: PositiveInt
    max_prompt_chars: PositiveInt
    min_response_chars: PositiveInt
    max_response_chars: PositiveInt
    drop_personal_data: bool

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        for name in ("prompt", "response"):
            low, high = getattr(self, f"min_{name}_chars"), getattr(self, f"max_{name}_chars")
            if low > high:
                raise ValueError(
                    f"data.min_{name}_chars ({low}) must not exceed data.max_{name}_chars ({high})"
                )
        return self


class ValidateConfig(Section):
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    min_rows: PositiveInt
    max_duplicate_fraction: float = Field(ge=0.0, le=1.0)
    max_quarantined_fraction: float = Field(ge=0.0, le=1.0)
    min_longer_chosen: float = Field(ge=0.0, le=1.0)
    max_longer_chosen: float = Field(ge=0.0, le=1.0)

    @model_validator(mode="after")
    def check_balance(self) -> Self:
        if self.min_longer_chosen > self.max_longer_chosen:
            raise ValueError(
                f"validate.min_longer_chosen ({self.min_longer_chosen}) must not exceed "
                f"validate.max_longer_chosen ({self.max_longer_chosen})"
            )
        return self


class TrainingSection(Section):
    learning_rate: PositiveFloat
    max_grad_norm: PositiveFloat


class PretrainConfig(TrainingSection):
    num_steps: NonNegativeInt
    batch_size: PositiveInt
    max_length: int = Field(ge=8)
    warmup_fraction: float = Field(ge=0.0, lt=1.0)
    checkpoint_seconds: NonNegativeFloat


def _check_multiple(section: str, large: tuple[str, int], small: tuple[str, int]) -> None:
    if large[1] % small[1]:
        raise ValueError(
            f"{section}.{large[0]} ({large[1]}) must be a multiple of {section}.{small[0]} ({small[1]})"
        )


class WatchedTraining(TrainingSection):
    """A training that is evaluated on held-out rows while it runs."""

    num_epochs: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    max_length: int = Field(ge=8)
    warmup_fraction: float = Field(ge=0.0, lt=1.0)
    decay: Literal["cosine", "linear", "constant"]
    eval_every: PositiveInt
    keep: Literal["last", "best"]
    patience: NonNegativeInt
    checkpoint_seconds: NonNegativeFloat


class SFTConfig(WatchedTraining):
    num_rows: PositiveInt
    num_eval_rows: PositiveInt
    loss_on: Literal["response", "assistant", "all"]
    packing: bool
    neftune_alpha: NonNegativeFloat

    @model_validator(mode="after")
    def check_batch_sizes(self) -> Self:
        _check_multiple("sft", ("batch_size", self.batch_size), ("micro_batch_size", self.micro_batch_size))
        return self


class PreferencesConfig(Section):
    num_prompts: NonNegativeInt
    num_eval_prompts: NonNegativeInt
    responses_per_prompt: int = Field(ge=2)
    pairs_per_prompt: PositiveInt
    max_human_pairs: NonNegativeInt
    labeler: Literal["vader", "judge", "endpoint", "function"]
    labeler_target: str
    min_margin: NonNegativeFloat
    keep_ties: bool
    label_temperature: NonNegativeFloat
    balance_length: bool
    label_noise: float = Field(ge=0.0, lt=0.5)
    sampling: SamplingConfig
    batch_size: PositiveInt

    @model_validator(mode="after")
    def check_labeler(self) -> Self:
        most = self.responses_per_prompt * (self.responses_per_prompt - 1) // 2
        if self.pairs_per_prompt > most:
            raise ValueError(
                f"preferences.pairs_per_prompt ({self.pairs_per_prompt}) must be at most {most}, the pairs "
                f"among preferences.responses_per_prompt ({self.responses_per_prompt}) answers"
            )
        check_target("preferences.labeler", self.labeler, self.labeler_target)
        return self


class RewardConfig(WatchedTraining):
    confidence: float = Field(gt=0.5, lt=1.0)
    num_watched_pairs: PositiveInt
    ensemble_size: PositiveInt
    objective: Literal["pairwise", "rating"]
    margin_scale: NonNegativeFloat
    label_smoothing: float = Field(ge=0.0, lt=0.5)
    centering_coef: NonNegativeFloat

    @model_validator(mode="after")
    def check_batch_sizes(self) -> Self:
        _check_multiple(
            "reward", ("batch_size", self.batch_size), ("micro_batch_size", self.micro_batch_size)
        )
        return self


class PPOConfig(TrainingSection):
    start: Literal["sft", "champion"]
    num_updates: PositiveInt
    rollout_batch_size: PositiveInt
    samples_per_prompt: PositiveInt
    num_ppo_epochs: PositiveInt
    minibatch_size: PositiveInt
    micro_batch_size: PositiveInt
    critic_learning_rate: PositiveFloat
    warmup_updates: NonNegativeInt
    critic_warmup_updates: NonNegativeInt
    ema_decay: float = Field(ge=0.0, lt=1.0)
    kl_coef: NonNegativeFloat
    kl_in: Literal["reward", "loss"]
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_target: NonNegativeFloat
    kl_horizon: PositiveFloat
    kl_budget: PositiveFloat
    approx_kl_stop: NonNegativeFloat
    advantages: Literal["gae", "rloo", "grpo", "reinforce++"]
    old_logprobs: Literal["generation", "trainer"]
    gamma: float = Field(gt=0.0, le=1.0)
    gae_lambda: float = Field(ge=0.0, le=1.0)
    cliprange_low: float = Field(gt=0.0, lt=1.0)
    cliprange_high: PositiveFloat
    cliprange_value: PositiveFloat
    dual_clip: NonNegativeFloat
    entropy_coef: NonNegativeFloat
    ptx_coef: NonNegativeFloat
    ptx_batch_size: PositiveInt
    missing_eos_penalty: NonNegativeFloat
    length_penalty: NonNegativeFloat
    repetition_penalty: NonNegativeFloat
    score_scaling: Literal["none", "running", "batch"]
    whiten_rewards: bool
    score_clip: NonNegativeFloat
    ensemble: Literal["mean", "worst", "uncertainty"]
    uncertainty_coef: NonNegativeFloat
    reward_function: str = Field(pattern=r"^$|^[\w.]+:\w+$")
    checkpoint_every: PositiveInt
    rollout_engine: Literal["own", "vllm"]
    vllm: VLLMConfig
    sampling: SamplingConfig

    @property
    def prompts_per_update(self) -> int:
        return self.rollout_batch_size // self.samples_per_prompt

    @model_validator(mode="after")
    def check_batch_sizes(self) -> Self:
        rollout = ("rollout_batch_size", self.rollout_batch_size)
        minibatch = ("minibatch_size", self.minibatch_size)
        _check_multiple("ppo", rollout, ("samples_per_prompt", self.samples_per_prompt))
        _check_multiple("ppo", rollout, minibatch)
        _check_multiple("ppo", minibatch, ("micro_batch_size", self.micro_batch_size))
        return self

    @property
    def has_critic(self) -> bool:
        """GAE needs value estimates; the other advantages are taken from the samples alone."""
        return self.advantages == "gae"

    @model_validator(mode="after")
    def check_objective(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "ppo.kl_estimator (k1) must be k2 or k3 where ppo.kl_in is loss: as a loss, k1 has an "
                "expected gradient of 0"
            )
        if self.critic_warmup_updates >= self.num_updates:
            raise ValueError(
                f"ppo.critic_warmup_updates ({self.critic_warmup_updates}) must be fewer than "
                f"ppo.num_updates ({self.num_updates})"
            )
        if self.critic_warmup_updates and not self.has_critic:
            raise ValueError(
                f"ppo.critic_warmup_updates ({self.critic_warmup_updates}) must be 0 where ppo.advantages is "
                f"{self.advantages}, which has no critic"
            )
        if self.advantages in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.samples_per_prompt ({self.samples_per_prompt}) must be at least 2 where "
                f"ppo.advantages is {self.advantages}: it compares the samples of one prompt"
            )
        if 0.0 < self.dual_clip <= 1.0 + self.cliprange_high:
            raise ValueError(
                f"ppo.dual_clip ({self.dual_clip}) must be 0, or above 1 + ppo.cliprange_high "
                f"({self.cliprange_high})"
            )
        return self

    @model_validator(mode="after")
    def check_sampling(self) -> Self:
        if self.sampling.top_k != 0 or self.sampling.top_p != 1.0:
            raise ValueError(
                f"ppo.sampling.top_k ({self.sampling.top_k}) must be 0 and ppo.sampling.top_p "
                f"({self.sampling.top_p}) must be 1: a truncated distribution biases the probability ratio"
            )
        return self


class EvaluateConfig(Section):
    num_prompts: PositiveInt
    gold: Literal["vader", "function"]
    gold_target: str
    confidence: float = Field(gt=0.5, lt=1.0)
    bootstrap_samples: int = Field(ge=100)
    num_samples: PositiveInt
    sampling: SamplingConfig
    batch_size: PositiveInt

    @model_validator(mode="after")
    def check_gold(self) -> Self:
        check_target("evaluate.gold", self.gold, self.gold_target)
        return self


class FlowConfig(Section):
    stage_time_limit: PositiveInt
    stage_retries: NonNegativeInt
    registered_model: str = Field(pattern=r"^[A-Za-z0-9._-]+$")


class Params(Section):
    """The whole of params.yaml."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    validate_: ValidateConfig = Field(alias="validate")
    pretrain: PretrainConfig
    sft: SFTConfig
    preferences: PreferencesConfig
    reward: RewardConfig
    ppo: PPOConfig
    evaluate: EvaluateConfig
    promotion: PromotionConfig
    collect: CollectConfig
    retrain: RetrainConfig
    simulate: SimulateConfig
    flow: FlowConfig

    @model_validator(mode="after")
    def check_relations(self) -> Self:
        if self.model.source == "scratch" and self.pretrain.num_steps == 0:
            raise ValueError("pretrain.num_steps (0) must be positive when model.source is scratch")
        if self.model.kernels == "liger" and self.run.device == "cpu":
            raise ValueError("model.kernels (liger) must be plain when run.device is cpu")
        if self.ppo.ensemble != "mean" and self.reward.ensemble_size == 1:
            raise ValueError(
                f"ppo.ensemble ({self.ppo.ensemble}) must be mean when reward.ensemble_size is 1: one "
                "model does not disagree with itself"
            )
        if self.model.source != "scratch":
            return self
        longest = self.data_tokens_needed()
        if longest > SCRATCH_CONTEXT:
            raise ValueError(
                f"a max_length of {longest} exceeds the {SCRATCH_CONTEXT} positions of a scratch model"
            )
        return self

    @model_validator(mode="after")
    def check_rollout_engine(self) -> Self:
        if self.ppo.rollout_engine == "vllm":
            run, model = self.run, self.model
            check_vllm(run.num_processes, run.sharding, model.finetuning, model.lora.rank)
        return self

    def data_tokens_needed(self) -> int:
        return max(self.pretrain.max_length, self.sft.max_length, self.reward.max_length)


SCRATCH_CONTEXT = 512
