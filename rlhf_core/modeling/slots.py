"""Rows in slots for models that transformers computes on a GPU: keys and values stand in place, so that a
step always runs over the same memory, and can be recorded once and replayed as one CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_core.modeling import blocks
from rlhf_core.modeling.blocks import Heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step: TypeAlias = Callable[[], Tensor]
WIDTH = 256  # columns by which the memory of keys and values grows
PLAIN_STEPS = 4  # over the same memory, after which recording pays


def record_cuda_graph(step: Step) -> Step:
    """Record `step` once; what is returned repeats it on whatever its memory holds then."""
    now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(now)
    with torch.cuda.stream(aside):  # what libraries set up at a first call must not be recorded
        step()
    now.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class SlotRows:
    """`RunningRows` over transformers' blocks; `record` makes one call of a step, None leaves them plain.

    A recorded step is held against a plain one before it is used. One that cannot be made, or that differs,
    is given up, and steps stay plain.
    """

    joins = True

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        longest: int,
        record: Callable[[Step], Step] | None = record_cuda_graph,
    ) -> None:
        self._model, self._longest, self._record = model, longest, record
        self._dtype, self._device = blocks.computing_type(model), model.device
        heads = Heads.of(model)
        shape = 2, slots, heads.keys, 0, heads.size  # keys, then values
        self._caches = [
            torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in model.base_model.layers
        ]
        self._held = [0] * slots  # tokens of each place, known without waiting for the GPU
        self._move(list(range(slots)))

    def _move(self, places: list[int]) -> None:
        """Slots are numbered as the places in memory again, and those are new: nothing recorded fits them."""
        self._slots = places
        self._where = torch.tensor(places, device=self._device)
        self._each = torch.arange(len(self._held), device=self._device)
        self._lengths = torch.tensor(self._held, device=self._device)
        self._tokens = torch.zeros_like(self._lengths)
        self._columns = torch.arange(self._caches[0].shape[3], device=self._device)
        self._recorded: Step | None = None
        self._trusted, self._steps = False, 0

    def enter(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        from transformers import DynamicCache

        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self._widen(longest + 1)
        ids = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        cache = DynamicCache(config=self._model.config)
        # Padded on the right, where no real token looks; what it leaves behind a row is hidden from it.
        hidden = self._model.base_model(
            input_ids=ids.to(self._device), past_key_values=cache, use_cache=True
        ).last_hidden_state
        places = [self._slots[slot] for slot in slots]
        where = torch.tensor(places, device=self._device)
        for own, read in zip(self._caches, cache.layers, strict=True):
            both = torch.stack([read.keys.to(self._dtype), read.values.to(self._dtype)])
            own[:, where, :, :longest] = both.repeat_interleave(copies, dim=1)
        for n, place in enumerate(places):
            self._held[place] = lengths[n // copies]
        self._lengths.copy_(torch.tensor(self._held))
        last = torch.tensor([length - 1 for length in lengths], device=self._device)
        logits = self._head(hidden[torch.arange(len(prompts), device=self._device), last])
        return logits.repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        self._widen(max(self._held) + 1)
        self._tokens[self._where] = tokens
        logits = self._next()[self._where]
        self._held = [min(held + 1, self._longest - 1) for held in self._held]
        self._lengths.add_(1).clamp_(max=self._longest - 1)
        return logits

    def leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._held[self._slots[slot]] = 0
        if slots:
            self._lengths.copy_(torch.tensor(self._held))

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots only, numbered anew; one named twice becomes two.

        Memory stays as it is, and what is recorded with it, until half of it is free or more is needed.
        """
        places = [self._slots[slot] for slot in slots.tolist()]
        width = -(-(max(self._held[place] for place in places) + 1) // WIDTH) * WIDTH
        roomy = 2 * len(places) <= len(self._held) or 2 * width <= self._caches[0].shape[3]
        if len(set(places)) == len(places) and not roomy:
            self._slots, self._where = places, torch.tensor(places, device=self._device)
            self._held = [held if i in places else 0 for i, held in enumerate(self._held)]
            self._lengths.copy_(torch.tensor(self._held))
            return
        index = torch.tensor(places, device=self._device)
        self._held = [self._held[place] for place in places]
        self._caches = [cache[:, :, :, :width].index_select(1, index) for cache in self._caches]
        self._move(list(range(len(places))))

    def _widen(self, width: int) -> None:
        more = -(-width // WIDTH) * WIDTH - self._caches[0].shape[3]
        if more > 0:
            self._caches = [F.pad(cache, (0, 0, 0, more)) for cache in self._caches]
            self._move(self._slots)

    def _next(self) -> Tensor:
        """Logits (places, V) after the tokens that stand in `_tokens`."""
        if self._recorded is not None and self._trusted:
            return self._recorded()
        logits = self._plain()
        self._steps += 1
        if self._record is None or self._steps < PLAIN_STEPS:
            return logits
        try:
            if self._recorded is None:
                self._recorded = self._record(self._plain)
            elif _same(self._recorded(), logits):  # recorded a step ago, when the rows were shorter
                self._trusted = True
            else:
                self._give_up("its numbers differ")
        except Exception as error:  # whatever it was, plain steps need none of it
            self._give_up(str(error).split("\n")[0])
        return logits

    def _give_up(self, fault: str) -> None:
        self._record = self._recorded = None
        print(f"decoding goes on without a CUDA graph: {fault}", file=sys.stderr)

    def _plain(self) -> Tensor:
        """One step. Repeated over the same tokens and lengths it does the same."""
        visible = (self._columns <= self._lengths[:, None])[:, None, None]  # (places, 1, 1, T)
        with _any_kernels():
            hidden = self._model.base_model(
                input_ids=self._tokens[:, None],
                attention_mask=visible,
                position_ids=self._lengths[:, None],
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
            return self._head(hidden[:, -1])

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """What transformers asks of a cache: put the new ones (places, KV, 1, d) by, and give all."""
        cache = self._caches[layer]
        new = torch.stack([keys[:, :, 0].to(self._dtype), values[:, :, 0].to(self._dtype)], dim=1)
        cache[:, self._each, :, self._lengths] = new
        return cache[0], cache[1]

    def _head(self, hidden: Tensor) -> Tensor:
        return self._model.get_output_embeddings()(hidden)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Up to the last bit of the largest."""
    bound = torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= bound).all())


@contextmanager
def _any_kernels() -> Iterator[None]:
    """Each place is written once a step, so the slower kernels for several writes to one change nothing."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
