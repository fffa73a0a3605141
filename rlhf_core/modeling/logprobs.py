"""Log-probabilities of response tokens. Logits exist for response tokens only, in float32, never as (B, T,
V)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core.modeling.encoding import TokenBatch, length_order, make_batch
from rlhf_core.modeling.trunk import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 2**19  # logits in float32 at once on a CPU, for its cache
GPU_CHUNK = 2**27  # elsewhere, for memory: 512 MiB, and a vocabulary of 150,000 is long enough to fill a GPU


def response_hidden(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """Pick the hidden states that predict the response tokens.

    `hidden` is (S, T, D); the result is (N, D), N response tokens of the batch in row order.
    """
    return hidden.flatten(0, 1)[batch.predictors]


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, in nats.

    logits (N, V) of any type, tokens (N,); returns (N,) and (N,) in float32, the entropy without gradient
    unless `entropy_gradient` asks for it.
    """
    if not entropy_gradient:
        return _TokenLogprobs.apply(logits, tokens, temperature)
    scaled = logits.float() / temperature
    log_norm = torch.logsumexp(scaled, dim=-1)
    logprobs = scaled.gather(-1, tokens[:, None]).squeeze(-1) - log_norm
    probs = torch.exp(scaled - log_norm[:, None])
    return logprobs, log_norm - (probs * scaled).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    """Some rows at a time: what stands between logits and result in float32 stays in the processor's cache,
    or takes a bounded part of a GPU's memory, and only the logits themselves are kept for the backward pass,
    in their own type."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy, log_norm = torch.empty(3, len(tokens), device=logits.device)
        for rows in _slices(logits):
            scaled = _scaled(logits[rows], temperature)
            norm = log_norm[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs[rows] = scaled.gather(-1, tokens[rows, None]).squeeze(-1) - norm
            probs = torch.exp(scaled - norm[:, None])
            entropy[rows] = norm - torch.linalg.vecdot(probs, scaled)
        ctx.save_for_backward(logits, tokens, log_norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """d log p(token) / d logits = (1 of the token - p) / temperature."""
        logits, tokens, log_norm = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _slices(logits):
            scaled = _scaled(logits[rows], ctx.temperature)
            share = grad[rows, None] / ctx.temperature
            probs = scaled.sub_(log_norm[rows, None]).exp_().mul_(-share)
            found[rows] = probs.scatter_add_(-1, tokens[rows, None], share)
        return found, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, always a copy, in float32."""
    wide = logits.to(torch.float32, copy=True)
    return wide if temperature == 1.0 else wide.div_(temperature)


def _slices(logits: Tensor) -> list[slice]:
    step = rows_at_once(logits)
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def rows_at_once(logits: Tensor) -> int:
    """How many rows of logits (N, V) are looked at together."""
    chunk = CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    return max(1, chunk // logits.shape[-1])


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Put (N,) values back where `mask` (B, R) is True; zeros elsewhere."""
    full = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return full.masked_scatter(mask, values)


@torch.no_grad()
def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> list[Tensor]:
    """Log-probability of each response token under a causal language model.

    Returns, in the order given, one float32 tensor (length of the response,) per row, on the CPU.
    Rows are batched by length so that little is spent on padding.
    """
    order = length_order(prompts, responses)
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = make_batch(
            [prompts[i] for i in rows],
            [responses[i] for i in rows],
            pad_token_id=model.config.pad_token_id or 0,
            device=model.device,
        )
        hidden = last_hidden(model, *batch.inputs)
        logits = model.get_output_embeddings()(response_hidden(hidden, batch))
        logprobs, _ = token_logprobs(logits, batch.responses[batch.response_mask], temperature)
        for i, part in zip(rows, logprobs.cpu().split([len(responses[i]) for i in rows]), strict=True):
            found[i] = part
    return [found[i] for i in range(len(prompts))]
