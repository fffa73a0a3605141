"""How many floating-point operations a training needs, to set beside what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Operations of the products with weights: two a weight and token (Kaplan et al. 2020, section 2.1).

    Left out, since they are small in texts of some hundred tokens: adapters, norms, and attention's own
    products, which `attention` gives.
    """

    trunk: int  # weights that every token meets
    head: int  # weights that a predicted token meets too
    trains_all: bool  # else the gradient passes through frozen weights without one of their own
    read: int = 0  # numbers of the queries of all blocks, each multiplied with a key and then with a value

    @classmethod
    def of(cls, model: PreTrainedModel, finetuning: str) -> Flops:
        linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
        trunk = sum(linear.weight.numel() for linear in linears)
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        read = config.num_hidden_layers * config.num_attention_heads * size
        return cls(trunk, model.get_input_embeddings().weight.numel(), finetuning == "full", read)

    def forward(self, tokens: int, predicted: int = 0) -> float:
        return 2.0 * (self.trunk * tokens + self.head * predicted)

    def training(self, tokens: int, predicted: int = 0) -> float:
        """Forward and backward; what gradient checkpointing computes again does not count."""
        return (3.0 if self.trains_all else 2.0) * self.forward(tokens, predicted)

    def attention(self, length: int, *, training: bool = False) -> float:
        """Of one row, where each token sees itself and all before it. Backward each product has two of its
        own, whatever is trained; what fused attention computes again does not count."""
        return (3.0 if training else 1.0) * 4.0 * self.read * length * (length + 1) / 2
