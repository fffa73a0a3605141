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

from rlhf_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARED_PROMPT = 8  # tokens from which on a prompt is laid out once for its responses
SHARED_ROW = 256  # tokens that such a row may always have; longer only where one sequence alone is

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


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """A conversation, and which of its tokens the assistant wrote: its answers, each ended by EOS.

    Whatever stands before an answer is tokenised as a prompt is, so training sees what generation will. The
    template needs no generation marks, but has to write earlier turns the same way when more follow.

    Raises InputError for a template that does not.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    written = ""  # of the whole text, what `ids` hold

    def text_of(count: int, *, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages[:count]), add_generation_prompt=prompt, tokenize=False
        )
        if not str(text).startswith(written):
            raise InputError(
                "the chat template writes earlier turns anew when a turn is added, so the answers before the "
                "last one cannot be told apart; use sft.loss_on: response"
            )
        return str(text)

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text_of(i, prompt=True)
        answer = encode_response(tokenizer, message["content"])
        context = tokenizer(before[len(written) :], add_special_tokens=False)["input_ids"]
        ids += [*context, *answer]
        is_answer += [False] * len(context) + [True] * len(answer)
        written = before + message["content"]
        if i + 1 < len(messages):
            ended = written + tokenizer.eos_token
            written = ended if text_of(i + 1, prompt=False).startswith(ended) else written
    return ids, is_answer


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and their responses, laid out for one forward pass.

    Responses to one prompt share its tokens: they follow it in one row, and each sees the prompt and itself
    alone, at the positions it would have behind the prompt. Rows may also hold several prompts. B responses,
    R the longest; S rows of T tokens, padded on the right.

    With one sequence to a row, causal attention needs no mask: a real token never sees the padding after it.
    """

    input_ids: Tensor  # (S, T) int64
    position_ids: Tensor | None  # (S, T) int64; None: one sequence to a row
    visible: Tensor | None  # (S, T, T) bool, True where a token (row) may see another (column); None likewise
    lengths: tuple[int, ...]  # S, tokens of each row that are no padding; never falling
    predictors: Tensor  # (N,) int64, where in S * T the token before each response token stands, by response
    last: Tensor  # (B,) int64, where in S * T the last response token stands
    responses: Tensor  # (B, R) int64, padded on the right
    response_mask: Tensor  # (B, R) bool, True on response tokens (EOS included)

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
        """What a model is called with."""
        return self.input_ids, self.position_ids, self.visible, self.lengths

    @property
    def num_tokens(self) -> int:
        return int(self.response_mask.sum())


def length_order(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[int]:
    """Indices by length, so that little is spent on padding, with equal prompts together."""
    keys = [tuple(prompt) for prompt in prompts]
    longest: dict[tuple[int, ...], int] = {}
    for key, response in zip(keys, responses, strict=True):
        longest[key] = max(longest.get(key, 0), len(key) + len(response))
    return sorted(range(len(keys)), key=lambda i: (longest[keys[i]], keys[i]))


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    *,
    row_tokens: int = 0,
) -> TokenBatch:
    """Lay out token ids, equal prompts once; every prompt and response must hold at least one token.

    With `row_tokens` > 0 prompts are packed into rows of about that many tokens, first fit, longest first.
    """
    assert len(prompts) == len(responses)
    assert all(responses)
    assert all(prompts)
    rows = _fill_rows(prompts, responses, _same_prompts(prompts, responses), row_tokens)
    rows.sort(key=len)  # rows of about one length attend together
    width = max(map(len, rows))
    shared = any(row.responses > 1 for row in rows)

    starts = {i: n * width + start for n, row in enumerate(rows) for i, start in row.starts.items()}
    before = {i: n * width + end for n, row in enumerate(rows) for i, end in row.before.items()}
    predictors = [
        index
        for i, response in enumerate(responses)
        for index in (before[i], *range(starts[i], starts[i] + len(response) - 1))
    ]
    last = [starts[i] + len(response) - 1 for i, response in enumerate(responses)]
    return TokenBatch(
        input_ids=_pad([row.ids for row in rows], pad_token_id).to(device),
        position_ids=_pad([row.positions for row in rows], 0).to(device) if shared else None,
        visible=_visible(rows).to(device) if shared else None,
        lengths=tuple(map(len, rows)),
        predictors=torch.tensor(predictors).to(device),
        last=torch.tensor(last).to(device),
        responses=_pad(responses, pad_token_id).to(device),
        response_mask=_lengths_mask([len(r) for r in responses]).to(device),
    )


class _Row:
    """One row of a batch while it is filled: prompts, each followed by its responses."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.prompt_of: list[int] = []  # which prompt of the row a token belongs to
        self.response_of: list[int] = []  # 0 in a prompt, else which response of the row
        self.starts: dict[int, int] = {}  # response -> where its first token stands
        self.before: dict[int, int] = {}  # response -> where the last token of its prompt stands
        self.prompts = self.responses = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, prompt: Sequence[int], members: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        self.prompts += 1
        self._extend(prompt, 0, response=0)
        end = len(self.ids) - 1
        for i in members:
            self.responses += 1
            self.starts[i], self.before[i] = len(self.ids), end
            self._extend(responses[i], len(prompt), response=self.responses)

    def _extend(self, tokens: Sequence[int], position: int, *, response: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))
        self.prompt_of += [self.prompts] * len(tokens)
        self.response_of += [response] * len(tokens)


def _same_prompts(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows with equal prompts, as far as sharing pays: attention costs the square of what stands together."""
    most = max(SHARED_ROW, 2 * max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)))
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, ...], int] = {}
    sizes: list[int] = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        n = open_groups.get(tuple(prompt))
        if n is None or len(prompt) < SHARED_PROMPT or sizes[n] + len(response) > most:
            n = open_groups[tuple(prompt)] = len(groups)
            groups.append([])
            sizes.append(len(prompt))
        groups[n].append(i)
        sizes[n] += len(response)
    return groups


def _fill_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    row_tokens: int,
) -> list[_Row]:
    """A row to each group, or first fit with the longest first (Johnson 1973) up to `row_tokens`."""

    def size(group: Sequence[int]) -> int:
        return len(prompts[group[0]]) + sum(len(responses[i]) for i in group)

    rows: list[_Row] = []
    for group in sorted(groups, key=size, reverse=True) if row_tokens else groups:
        row = next((row for row in rows if len(row) + size(group) <= row_tokens), None)
        if row is None:
            row = _Row()
            rows.append(row)
        row.add(prompts[group[0]], group, responses)
    return rows


def _visible(rows: Sequence[_Row]) -> Tensor:
    """(S, T, T): a token sees what stands before it in its own prompt and in its own response."""
    prompt_of = _pad([row.prompt_of for row in rows], 0)  # 0 is padding, which sees padding
    response_of = _pad([row.response_of for row in rows], 0)
    same_prompt = prompt_of[:, :, None] == prompt_of[:, None, :]
    same_response = response_of[:, :, None] == response_of[:, None, :]
    return (same_prompt & (same_response | (response_of == 0)[:, None, :])).tril()


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(number of rows, longest row) with `value` on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


def _lengths_mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
