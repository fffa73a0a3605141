"""One thread that writes all answers of one model, token by token, as long as there are any.

Orders enter as slots come free, in the order in which they came; a long answer takes one slot and holds up
nobody else. A prompt is read whole between two tokens of the others, so at most `PROMPT_TOKENS` enter at a
time. A model whose rows cannot join a running batch (of another shape than `blocks.SHAPES`) gets a further
one, stepped in turn.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from serving.batch import Answer, Batch, Failure, Order
from serving.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_TOKENS = 512
log = logging.getLogger(__name__)


class Engine:
    """`slots` answers at once; at most `queue` more wait. `longest`: tokens of a prompt with its answer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int,
        queue: int,
        longest: int,
        name: str = "",
    ) -> None:
        self._model, self._tokenizer, self._longest = model, tokenizer, longest
        self._slots, self._queue = slots, queue
        self._waiting: deque[Order] = deque()
        self._batches: list[Batch] = []
        self._entering = 0  # answers that left the queue and are in no batch yet
        self._changed = threading.Condition()
        self._closing = False
        self.tokens = 0  # drawn since the start
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers in slots."""
        return sum(len(batch.answers) for batch in list(self._batches))

    @property
    def waiting(self) -> int:
        """Answers that have no slot yet."""
        with self._changed:
            return self._num_waiting()

    def submit(self, order: Order) -> None:
        """Put an order into the queue. Raises ApiError 429 when it is full, 503 when the engine is closed."""
        with self._changed:
            if self._closing:
                raise ApiError(503, "this model is no longer served; ask again", code="shutting_down")
            waiting = self._num_waiting()
            free = self._slots - self.running - self._entering
            if waiting + order.copies > self._queue + max(free, 0):
                raise ApiError(
                    429, f"all {self._slots} slots are taken and {waiting} wait; try again", code="queue_full"
                )
            self._waiting.append(order)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; orders that are not answered yet get a Failure. The model may be freed then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _num_waiting(self) -> int:
        return sum(order.copies for order in self._waiting)

    def _work(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._admit()
                    for batch in self._batches:
                        self.tokens += batch.advance()
                    self._batches = [batch for batch in self._batches if batch.joins or batch.answers]
                except Exception:
                    # Whatever a model does, the orders in work are told, and the next ones are tried.
                    log.exception("the engine failed")
                    self._fail("the model failed while answering")
        self._fail("the server is shutting down")
        del self._model, self._tokenizer

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        with self._changed:
            while not (self._closing or self._waiting or self.running):
                self._changed.wait()
            return not self._closing

    def _admit(self) -> None:
        """Let orders in, oldest first, as far as slots and the prompt's tokens allow."""
        taken: dict[int, list[Order]] = {}  # by number of copies
        with self._changed:
            self._waiting = deque(order for order in self._waiting if not order.cancelled)
            free, tokens = self._slots - self.running, 0
            while self._waiting:
                order = self._waiting[0]
                tokens += len(order.prompt)
                if order.copies > free or (taken and tokens > PROMPT_TOKENS):
                    break
                self._waiting.popleft()
                free -= order.copies
                taken.setdefault(order.copies, []).append(order)
                self._entering += order.copies
        for number, (copies, orders) in enumerate(taken.items()):
            try:
                self._open_batch().enter(orders)
                self._entering -= copies * len(orders)
            except Exception:
                self._entering = 0
                lost = [order for rest in list(taken.values())[number:] for order in rest]
                _tell(lost, "the model failed while reading the prompt")
                raise

    def _open_batch(self) -> Batch:
        if not self._batches or not self._batches[0].joins:
            self._batches.append(Batch(self._model, self._tokenizer, self._longest))
        return self._batches[-1]

    def _fail(self, message: str) -> None:
        """Tell every order in work; those that wait too, when the engine closes."""
        with self._changed:
            broken: list[Answer] = [answer for batch in self._batches for answer in batch.answers]
            orders = [answer.order for answer in broken]
            self._batches = []
            if self._closing:
                orders += self._waiting
                self._waiting.clear()
        _tell(orders, message)


def _tell(orders: list[Order], message: str) -> None:
    for order in {id(order): order for order in orders}.values():
        order.sink(Failure(message))
