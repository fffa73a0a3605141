"""Answers that are written side by side, each in a slot of `RunningRows`, which they enter and leave at any
time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core.config import SamplingConfig
from rlhf_core.generation import draw, random_table
from rlhf_core.modeling.running import open_rows
from serving.text import Writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """More text of one choice. `finish` says why it ended, stop or length; empty while it goes on."""

    choice: int
    text: str
    finish: str = ""
    tokens: int = 0  # of the choice so far, its end-of-sequence token included


@dataclass(frozen=True)
class Failure:
    """The order will not be answered (any further)."""

    message: str


Sink = Callable[[Piece | Failure], None]


@dataclass
class Order:
    """A prompt to be answered `copies` times. `sink` runs on the engine's thread; it must not block."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    copies: int
    stops: tuple[str, ...]
    sink: Sink
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its slots are freed before the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass
class Answer:
    """One choice of an order while it is written."""

    order: Order
    choice: int
    uniforms: Tensor  # (max_new_tokens,)
    writing: Writing

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.order.prompt) + self.writing.tokens

    @property
    def decoding(self) -> tuple[float, int, float]:
        """What answers that are drawn together have in common."""
        sampling = self.order.sampling
        return sampling.temperature, sampling.top_k, sampling.top_p

    def take(self, token: int, eos: int | None) -> bool:
        """Add a token and tell of it; whether the answer goes on."""
        piece = self.writing.add(token)
        at_end = token == eos or self.writing.stopped
        if not at_end and self.writing.tokens < self.order.sampling.max_new_tokens:
            if piece:
                self.order.sink(Piece(self.choice, piece, tokens=self.writing.tokens))
            return True
        piece += self.writing.end()
        finish = "stop" if at_end else "length"
        self.order.sink(Piece(self.choice, piece, finish, self.writing.tokens))
        return False


class Batch:
    """Answers at work on one model. The number of slots follows that of the answers, by powers of two."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self._rows = open_rows(model, 1, longest)
        self._tokenizer, self._device = tokenizer, model.device
        self._held: list[Answer | None] = [None]
        self._logits = torch.empty(0)  # (slots, V)
        self._widest = 0  # tokens of the longest row since the slots were last numbered anew

    @property
    def joins(self) -> bool:
        """Whether more may enter; else the batch ends with its answers."""
        return self._rows.joins

    @property
    def answers(self) -> list[Answer]:
        return [answer for answer in self._held if answer is not None]

    def enter(self, orders: Sequence[Order]) -> None:
        """Read the prompts of `orders`, which have the same number of copies each."""
        copies = orders[0].copies
        new = [
            Answer(order, choice, uniforms, Writing(self._tokenizer, order.stops))
            for order in orders
            for choice, uniforms in enumerate(random_table(copies, order.sampling))
        ]
        self._make_room(len(new))
        slots = [slot for slot, answer in enumerate(self._held) if answer is None][: len(new)]
        first = self._rows.enter(slots, [order.prompt for order in orders], copies)
        if len(self._logits) != len(self._held):
            self._logits = first.new_empty(len(self._held), first.shape[-1])
        self._logits[slots] = first
        for slot, answer in zip(slots, new, strict=True):
            self._held[slot] = answer

    def advance(self) -> int:
        """Draw the next token of every answer and compute what follows it; how many tokens were drawn."""
        for slot, answer in enumerate(self._held):
            if answer is not None and answer.order.cancelled:
                self._held[slot] = None
        tokens = self._draw()
        for slot, token in tokens.items():
            answer = self._held[slot]
            assert answer is not None
            if not answer.take(token, self._tokenizer.eos_token_id):
                self._held[slot] = None
        following = self._thin([tokens.get(slot, 0) for slot in range(len(self._held))])
        if any(self._held):
            # Free slots are stepped too: without this their rows would grow, and all others with them.
            self._rows.leave([slot for slot, answer in enumerate(self._held) if answer is None])
            self._logits = self._rows.step(torch.tensor(following, device=self._device))
        return len(tokens)

    def _draw(self) -> dict[int, int]:
        """The next token by slot. Answers that are decoded alike are drawn together."""
        alike: dict[tuple[float, int, float], list[int]] = {}
        for slot, answer in enumerate(self._held):
            if answer is not None:
                alike.setdefault(answer.decoding, []).append(slot)
        found: dict[int, int] = {}
        for slots in alike.values():
            running = [answer for slot in slots if (answer := self._held[slot]) is not None]
            uniforms = torch.stack([answer.uniforms[answer.writing.tokens] for answer in running])
            tokens, _ = draw(self._logits[slots], uniforms.to(self._device), running[0].order.sampling)
            found.update(zip(slots, tokens.tolist(), strict=True))
        return found

    def _make_room(self, more: int) -> None:
        used = len(self.answers)
        slots = 1 << (used + more - 1).bit_length()
        if not self.joins:
            self._held = [None] * more
        elif slots > len(self._held):
            self._keep([*range(len(self._held)), *[0] * (slots - len(self._held))])
            self._held += [None] * (slots - len(self._held))

    def _thin(self, following: list[int]) -> list[int]:
        """Go on with fewer slots where half of them are free, and no wider than twice the longest row: both
        make every step dearer. What to step the slots with."""
        kept = [slot for slot, answer in enumerate(self._held) if answer is not None]
        longest = max((answer.length for answer in self.answers), default=0)
        self._widest = max(self._widest, longest)
        if self.joins:
            slots = 1 << max(len(kept) - 1, 0).bit_length()
            free = [slot for slot in range(len(self._held)) if slot not in kept]
            kept += free[: slots - len(kept)]
        if not kept or (len(kept) == len(self._held) and 2 * longest >= self._widest):
            return following
        self._widest = longest
        self._rows.leave([slot for slot, answer in enumerate(self._held) if answer is None])
        self._keep(kept)
        self._held = [self._held[slot] for slot in kept]
        return [following[slot] for slot in kept]

    def _keep(self, slots: list[int]) -> None:
        self._rows.keep(torch.tensor(slots, dtype=torch.int64, device=self._device))
        if len(self._logits):
            self._logits = self._logits[slots]
