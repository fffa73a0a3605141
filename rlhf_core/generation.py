"""Making text: one decoding loop for rollouts, AI feedback, evaluation, chat and serving.

Every sample draws from its own row of one table of random numbers, so that the same seed gives the same
texts whatever the batch size (up to rounding). The samples of one prompt share its prefill; answers that
ended make room for the next prompts. Beam search, penalties and speculative decoding are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from rlhf_core.config import SamplingConfig
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.logprobs import rows_at_once
from rlhf_core.modeling.running import open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PART = 8  # one in so many slots has to be free before others are given them
PIECE = 256  # tokens of the vocabulary that are searched together
Drawn: TypeAlias = tuple[int, float]  # a token and its log-probability


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` ends with EOS exactly when `finished`."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] = ()  # of each token under the distribution it was drawn from


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Scale logits (B, V) by temperature, then cut to top-k and top-p; cut tokens get -inf. float32."""
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
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
    rows = rows_at_once(logits)
    parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
    tokens, logprobs = zip(*(_draw(*part, sampling) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    probs = filter_logits(logits, sampling).softmax(dim=-1)
    # Two steps, since the running sum of a whole vocabulary takes longer than all the rest here: first the
    # piece in which the token stands, then the token in it.
    pieces = nn.functional.pad(probs, (0, -probs.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE))
    ends = pieces.sum(dim=-1).double().cumsum(dim=-1)
    # Scaled by the total, since a sum of rounded probabilities is not exactly 1.
    threshold = uniforms.double()[:, None] * ends[:, -1:]
    piece = torch.searchsorted(ends, threshold, right=True)
    before = nn.functional.pad(ends, (1, 0)).gather(-1, piece)
    inside = pieces.gather(1, piece[..., None].expand(-1, -1, PIECE)).squeeze(1).double().cumsum(dim=-1)
    # Rounding must not lead beyond the last likely token of the piece.
    rest = torch.minimum(threshold - before, inside[:, -1:] * (1.0 - 1e-9))
    tokens = piece * PIECE + torch.searchsorted(inside, rest, right=True)
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
    table = random_table(len(prompts) * samples_per_prompt, sampling)
    order = sorted(wanted, key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // samples_per_prompt)
    results: dict[int, list[Generation]] = {}
    ended: dict[int, dict[int, Generation]] = {}  # by prompt and row of the table
    desk = _Desk(model, tokenizer, prompts, order, samples_per_prompt, per_batch, sampling) if order else None
    for answer in desk.write(table) if desk else ():
        own = ended.setdefault(answer.prompt, {})
        own[answer.row] = finish(tokenizer, answer.drawn)
        if len(own) == samples_per_prompt:
            results[answer.prompt] = [own[row] for row in sorted(own)]
            if on_progress:
                on_progress(len(results), len(order))
    return [results[i] for i in wanted]


def random_table(rows: int, sampling: SamplingConfig) -> Tensor:
    """(rows, max_new_tokens) float32 in [0, 1), the randomness of each row its own.

    The first row is the same however many follow.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(rows, sampling.max_new_tokens, generator=generator)


def finish(tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Drawn]) -> Generation:
    """The answer that these tokens are."""
    ids = [token for token, _ in drawn]
    finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Generation(text, tuple(ids), finished, tuple(logprob for _, logprob in drawn))


@dataclass
class _Answer:
    """One answer while it is written."""

    prompt: int  # whose
    row: int  # of the table of random numbers
    drawn: list[Drawn] = field(default_factory=list)


class _Desk:
    """Answers in work, each in a slot of `RunningRows`.

    Slots whose answers ended are given to the next prompts, or left out of further steps; some of them at a
    time, since both take time too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        order: Sequence[int],
        copies: int,
        at_once: int,
        sampling: SamplingConfig,
    ) -> None:
        longest = max(len(prompts[i]) for i in order) + sampling.max_new_tokens
        slots = min(at_once, len(order)) * copies
        self._rows = open_rows(model, slots, longest)
        self._at_once = at_once
        self._prompts, self._copies, self._sampling = prompts, copies, sampling
        self._eos = tokenizer.eos_token_id
        self._waiting = deque(order)
        self._held: list[_Answer | None] = [None] * slots
        self._logits = torch.empty(0)  # (slots, V)

    def write(self, table: Tensor) -> Iterator[_Answer]:
        """Each answer as it ends; `table` (answers, max_new_tokens) holds the random numbers."""
        while self._waiting or any(self._held):
            self._fill()
            following, ended = self._draw(table)
            yield from ended
            following = self._thin(following)
            if any(self._held):
                self._logits = self._rows.step(torch.tensor(following, device=self._logits.device))

    def _fill(self) -> None:
        """Let the next prompts in, where there is room for enough of them."""
        copies = self._copies
        if not self._waiting or (not self._rows.joins and any(self._held)):
            return
        if not self._rows.joins:  # as many slots as rows enter together
            self._held = [None] * (min(self._at_once, len(self._waiting)) * copies)
        slots = len(self._held)
        free = [slot for slot, answer in enumerate(self._held) if answer is None]
        if len(free) < max(copies, slots // PART):
            return
        taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), len(free) // copies))]
        new = [_Answer(i, i * copies + copy) for i in taken for copy in range(copies)]
        used = free[: len(new)]
        first = self._rows.enter(used, [self._prompts[i] for i in taken], copies)
        if len(self._logits) != slots:
            self._logits = first.new_empty(slots, first.shape[-1])
        self._logits[used] = first
        for slot, answer in zip(used, new, strict=True):
            self._held[slot] = answer

    def _draw(self, table: Tensor) -> tuple[list[int], list[_Answer]]:
        """The next token of every answer: what to step each slot with, and the answers that it ends."""
        running = [(slot, answer) for slot, answer in enumerate(self._held) if answer is not None]
        every = len(running) == len(self._held)
        own = self._logits if every else self._logits[[slot for slot, _ in running]]
        uniforms = table[[answer.row for _, answer in running], [len(answer.drawn) for _, answer in running]]
        tokens, logprobs = draw(own, uniforms.to(own.device), self._sampling)
        following = [0] * len(self._held)
        ended = []
        for (slot, answer), token, logprob in zip(running, tokens.tolist(), logprobs.tolist(), strict=True):
            answer.drawn.append((token, logprob))
            following[slot] = token
            if token == self._eos or len(answer.drawn) == self._sampling.max_new_tokens:
                self._held[slot] = None
                ended.append((slot, answer))
        self._rows.leave([slot for slot, _ in ended])
        return following, [answer for _, answer in ended]

    def _thin(self, following: list[int]) -> list[int]:
        """Go on with fewer slots, when no prompt can have the free ones; what to step those with."""
        slots = len(self._held)
        keep = [slot for slot, answer in enumerate(self._held) if answer is not None]
        few = max(1, slots // PART) if self._rows.joins else 1
        if not keep or (self._rows.joins and self._waiting) or len(keep) > slots - few:
            return following
        self._rows.keep(torch.tensor(keep, dtype=torch.int64, device=self._logits.device))
        self._held = [self._held[slot] for slot in keep]
        return [following[slot] for slot in keep]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    sampling: SamplingConfig,
) -> Iterator[str]:
    """Yield one answer piece by piece; the same text that `generate` gives for the same seed."""
    prompt = encode_prompt(tokenizer, messages)
    uniforms = random_table(1, sampling)[0].to(model.device)
    with torch.inference_mode():
        rows = open_rows(model, 1, len(prompt) + sampling.max_new_tokens)
        logits = rows.enter([0], [prompt], 1)
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
            logits = rows.step(token)
