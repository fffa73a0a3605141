"""Making text: one decoding loop for rollouts, AI feedback, evaluation, chat and serving.

Every sample draws from its own row of one table of random numbers, so that the same seed gives the same
texts whatever the batch size (up to rounding). The samples of one prompt share its prefill, and finished
sequences leave the batch. Beam search, penalties and speculative decoding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core.config import SamplingConfig
from rlhf_core.modeling.encoding import encode_prompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` ends with EOS exactly when `finished`."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] = ()  # of each token under the distribution it was drawn from


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Scale logits (B, V) by temperature, then cut to top-k and top-p; cut tokens get -inf. float32."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        cut = probs.cumsum(dim=-1) - probs >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the distribution function, and give its log-probability.

    logits (B, V), uniforms (B,) in [0, 1) -> (B,) int64 and (B,) float32.
    """
    probs = filter_logits(logits, sampling).softmax(dim=-1)
    cumulative = probs.double().cumsum(dim=-1)
    # Scaled by the total, since a sum of rounded probabilities is not exactly 1.
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), probs.gather(-1, tokens).squeeze(-1).log()


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    sampling: SamplingConfig,
    *,
    samples_per_prompt: int = 1,
    batch_size: int = 64,
    only: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Generation]]:
    """Answer each conversation `samples_per_prompt` times; results in the order given.

    `batch_size` bounds the sequences decoded at once; prompts of similar length go together. With `only`
    just those conversations are answered, with the texts that a call for all would give them.
    """
    wanted = range(len(conversations)) if only is None else only
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    table = _uniforms(len(prompts) * samples_per_prompt, sampling)
    order = sorted(wanted, key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // samples_per_prompt)
    results: dict[int, list[Generation]] = {}
    for start in range(0, len(order), per_batch):
        rows = order[start : start + per_batch]
        uniforms = torch.cat([table[i * samples_per_prompt : (i + 1) * samples_per_prompt] for i in rows])
        drawn = _decode(model, [prompts[i] for i in rows], samples_per_prompt, uniforms, sampling, tokenizer)
        for j, i in enumerate(rows):
            mine = drawn[j * samples_per_prompt : (j + 1) * samples_per_prompt]
            results[i] = [_finish(tokenizer, tokens) for tokens in mine]
        if on_progress:
            on_progress(len(results), len(order))
    return [results[i] for i in wanted]


def _uniforms(rows: int, sampling: SamplingConfig) -> Tensor:
    """(rows, max_new_tokens) float32 in [0, 1), the randomness of each row its own."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(rows, sampling.max_new_tokens, generator=generator)


def _finish(tokenizer: PreTrainedTokenizerBase, drawn: list[tuple[int, float]]) -> Generation:
    ids = [token for token, _ in drawn]
    finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Generation(text, tuple(ids), finished, tuple(logprob for _, logprob in drawn))


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    samples_per_prompt: int,
    uniforms: Tensor,
    sampling: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[tuple[int, float]]]:
    """Tokens of len(prompts) * samples_per_prompt answers with log-probabilities, each cut after its EOS."""
    device = model.device
    uniforms = uniforms.to(device)
    input_ids, mask = _left_pad(prompts, tokenizer.pad_token_id)
    mask = mask.to(device)
    logits, cache = _prefill(model, input_ids.to(device), mask)
    if samples_per_prompt > 1:
        cache.batch_repeat_interleave(samples_per_prompt)
        logits = logits.repeat_interleave(samples_per_prompt, dim=0)
        mask = mask.repeat_interleave(samples_per_prompt, dim=0)

    answers: list[list[tuple[int, float]]] = [[] for _ in range(len(uniforms))]
    live = torch.arange(len(uniforms), device=device)  # rows of `answers` that the batch still holds
    for step in range(sampling.max_new_tokens):
        tokens, logprobs = draw(logits, uniforms[live, step], sampling)
        for row, *drawn in zip(live.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            answers[row].append((drawn[0], drawn[1]))
        going = tokens != tokenizer.eos_token_id
        if step == sampling.max_new_tokens - 1 or not bool(going.any()):
            break
        if not bool(going.all()):
            keep = going.nonzero().squeeze(-1)
            live, tokens, mask = live[keep], tokens[keep], mask[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        logits = _forward(model, tokens[:, None], mask, positions, cache)
    return answers


def _left_pad(prompts: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """input_ids (B, longest) and a mask of it, True on real tokens."""
    longest = max(map(len, prompts))
    rows = [[pad_token_id] * (longest - len(p)) + p for p in prompts]
    mask = torch.arange(longest) >= torch.tensor([longest - len(p) for p in prompts])[:, None]
    return torch.tensor(rows), mask


def _prefill(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return _forward(model, input_ids, mask, positions, cache), cache


def _forward(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits (B, V) after the last position."""
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=None if bool(mask.all()) else mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return model.get_output_embeddings()(hidden[:, -1])


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    sampling: SamplingConfig,
) -> Iterator[str]:
    """Yield one answer piece by piece; the same text that `generate` gives for the same seed."""
    with torch.inference_mode():
        prompt = torch.tensor([encode_prompt(tokenizer, messages)], device=model.device)
        uniforms = _uniforms(1, sampling)[0].to(model.device)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        logits, cache = _prefill(model, prompt, mask)
    ids: list[int] = []
    shown = ""
    for step in range(sampling.max_new_tokens):
        with torch.inference_mode():
            token, _ = draw(logits, uniforms[step : step + 1], sampling)
        if int(token) == tokenizer.eos_token_id:
            break
        ids.append(int(token))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished UTF-8 character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
        if step == sampling.max_new_tokens - 1:
            break
        with torch.inference_mode():
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            logits = _forward(model, token[:, None], mask, mask.sum(dim=1, keepdim=True) - 1, cache)
