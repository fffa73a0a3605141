"""From messages and texts to token ids, one way everywhere: training, rollout, scoring, serving.

A prompt ends with the template's generation prompt; a response ends with the end-of-sequence token. The two
are tokenised apart, so the boundary lies at the same place in training and in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ChatML as SmolLM2 was trained on, without the system line that its own template puts in front.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For a tokenizer that has no chat template of its own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of `response`, ended by EOS."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@dataclass(frozen=True)
class TokenBatch:
    """Prompts followed by responses, padded on the right.

    With padding on the right, causal attention needs no mask: a real token never sees one that stands after
    it. B sequences, T longest prompt plus response, R longest response.
    """

    input_ids: Tensor  # (B, T) int64
    prompt_lengths: Tensor  # (B,) int64
    responses: Tensor  # (B, R) int64, padded on the right
    response_mask: Tensor  # (B, R) bool, True on response tokens (EOS included)

    @property
    def num_tokens(self) -> int:
        return int(self.response_mask.sum())


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
) -> TokenBatch:
    """Lay out token ids; every response must hold at least one token."""
    assert len(prompts) == len(responses)
    assert all(responses)
    assert all(prompts)
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    return TokenBatch(
        input_ids=_pad(rows, pad_token_id).to(device),
        prompt_lengths=torch.tensor([len(p) for p in prompts]).to(device),
        responses=_pad(responses, pad_token_id).to(device),
        response_mask=_lengths_mask([len(r) for r in responses]).to(device),
    )


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, longest row) with `value` on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


def _lengths_mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
