"""Text as the decoding loop of the pipeline makes it, whoever is written beside it."""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from rlhf_core.config import SamplingConfig
from rlhf_core.generation import generate
from rlhf_core.modeling import blocks
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.running import open_rows
from serving.batch import Batch, Failure, Order
from serving.engine import Engine
from serving.errors import ApiError
from serving.text import Writing

from .conftest import until

TEXTS = ["hello", "how are you today my friend?", "no", "i like long walks and good books, what about you?"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def sampling(**changes):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24, "seed": 5}
    return SamplingConfig(**values | changes)


class Asked:
    """An order with what came back."""

    def __init__(self, tokenizer, messages, config, copies=1, stops=()):
        self.events = queue.Queue()
        self.copies = copies
        self.order = Order(encode_prompt(tokenizer, messages), config, copies, stops, self.events.put)

    def pieces(self):
        ended = 0
        while ended < self.copies:
            event = self.events.get(timeout=30)
            if isinstance(event, Failure):
                raise AssertionError(event.message)
            ended += bool(event.finish)
            yield event

    def answers(self):
        texts, ends = [""] * self.copies, [""] * self.copies
        for piece in self.pieces():
            texts[piece.choice] += piece.text
            ends[piece.choice] = ends[piece.choice] or piece.finish
        return list(zip(texts, ends))


@pytest.fixture
def make_engine(loaded):
    made = []

    def make(slots=4, queue=64, longest=400):
        made.append(Engine(*loaded, slots=slots, queue=queue, longest=longest))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def expected(loaded, messages, config, copies=1):
    (group,) = generate(*loaded, [messages], config, samples_per_prompt=copies)
    return [(answer.text, "stop" if answer.finished else "length") for answer in group]


CASES = [
    (CHATS[0], sampling(), 1),
    (CHATS[1], sampling(seed=6, temperature=0.7, top_p=0.9), 1),
    (CHATS[2], sampling(seed=7, max_new_tokens=90), 3),
    (CHATS[3], sampling(seed=8, top_k=1), 1),
    (CHATS[1], sampling(seed=9, max_new_tokens=1), 2),
    (CHATS[3], sampling(seed=10, max_new_tokens=60), 1),
]


def test_alone_the_text_is_that_of_generate(loaded, make_engine):
    engine = make_engine()
    for messages, config, copies in CASES:
        asked = Asked(loaded[1], messages, config, copies)
        engine.submit(asked.order)
        assert asked.answers() == expected(loaded, messages, config, copies)


@pytest.mark.parametrize("slots", [3, 8])
def test_among_others_that_come_and_go_the_text_is_the_same(loaded, make_engine, slots):
    """Every request twice, sent from threads while others run, with too few slots for all."""
    engine = make_engine(slots=slots)
    wanted = [expected(loaded, *case) for case in CASES]
    found = [None] * (2 * len(CASES))

    def ask(number):
        messages, config, copies = CASES[number % len(CASES)]
        asked = Asked(loaded[1], messages, config, copies)
        engine.submit(asked.order)
        found[number] = asked.answers()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted + wanted
    assert engine.running == engine.waiting == 0


def test_models_whose_rows_cannot_join_are_batched_too(loaded, make_engine, monkeypatch):
    """As on a GPU: rows of transformers' own cache."""
    monkeypatch.setattr(blocks, "applies_to", lambda model: False)
    test_among_others_that_come_and_go_the_text_is_the_same(loaded, make_engine, 4)


def test_a_long_answer_does_not_hold_up_a_short_one(loaded, make_engine):
    engine = make_engine(slots=2)
    long = Asked(loaded[1], CHATS[2], sampling(seed=3, max_new_tokens=300))
    assert len(generate(*loaded, [CHATS[2]], sampling(seed=3, max_new_tokens=300))[0][0].token_ids) > 100
    engine.submit(long.order)
    next(long.pieces())
    short = Asked(loaded[1], CHATS[0], sampling(max_new_tokens=3))
    engine.submit(short.order)
    short.answers()
    assert engine.running == 1  # the long one goes on
    long.answers()


def test_a_cancelled_order_frees_its_slot(loaded, make_engine):
    engine = make_engine(slots=1)
    first = Asked(loaded[1], CHATS[2], sampling(seed=3, max_new_tokens=390 - 20))
    second = Asked(loaded[1], CHATS[0], sampling(max_new_tokens=3))
    engine.submit(first.order)
    next(first.pieces())
    engine.submit(second.order)
    first.order.cancel()
    second.answers()
    assert sum(piece.finish != "" for piece in list(first.events.queue)) == 0
    waiting = Asked(loaded[1], CHATS[0], sampling())
    waiting.order.cancel()
    engine.submit(waiting.order)
    until(lambda: engine.waiting == 0)
    assert waiting.events.empty()


def test_a_full_queue_refuses(loaded, make_engine):
    engine = make_engine(slots=1, queue=2)
    asked = [Asked(loaded[1], CHATS[2], sampling(seed=3, max_new_tokens=300)) for _ in range(4)]
    engine.submit(asked[0].order)
    next(asked[0].pieces())
    for one in asked[1:3]:
        engine.submit(one.order)
    with pytest.raises(ApiError, match="all 1 slots are taken and 2 wait") as told:
        engine.submit(asked[3].order)
    assert (told.value.status, told.value.headers) == (429, {"Retry-After": "2"})


def test_an_order_whose_prompt_is_being_read_has_its_slot(loaded, make_engine, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    enter = Batch.enter

    def slowly(self, orders):
        reading.set()
        go_on.wait(30)
        enter(self, orders)

    monkeypatch.setattr(Batch, "enter", slowly)
    engine = make_engine(slots=1, queue=1)
    asked = [Asked(loaded[1], CHATS[0], sampling(max_new_tokens=3)) for _ in range(3)]
    engine.submit(asked[0].order)
    assert reading.wait(30)
    engine.submit(asked[1].order)
    with pytest.raises(ApiError, match="1 wait"):
        engine.submit(asked[2].order)
    go_on.set()
    for one in asked[:2]:
        one.answers()
    engine.submit(asked[2].order)
    asked[2].answers()


def test_closing_tells_everybody(loaded, make_engine):
    engine = make_engine(slots=1)
    asked = [Asked(loaded[1], CHATS[2], sampling(seed=3, max_new_tokens=300)) for _ in range(2)]
    for one in asked:
        engine.submit(one.order)
    next(asked[0].pieces())
    engine.close()
    for one in asked:
        with pytest.raises(AssertionError, match="shutting down"):
            one.answers()
    with pytest.raises(ApiError, match="no longer served"):
        engine.submit(asked[0].order)


def test_a_model_that_fails_costs_the_answers_in_work_alone(loaded, make_engine, monkeypatch):
    from rlhf_core.modeling.running import StaticRows

    engine = make_engine(slots=2)
    step, calls = StaticRows.step, []

    def failing(self, tokens):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return step(self, tokens)

    monkeypatch.setattr(StaticRows, "step", failing)
    asked = Asked(loaded[1], CHATS[1], sampling())
    engine.submit(asked.order)
    with pytest.raises(AssertionError, match="the model failed"):
        asked.answers()
    again = Asked(loaded[1], CHATS[1], sampling())
    engine.submit(again.order)
    assert again.answers() == expected(loaded, CHATS[1], sampling())


def test_rows_that_are_doubled_and_cut_go_on_as_before(loaded):
    """A slot named twice becomes two rows with one past; keys and values get no wider than their rows."""
    model, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, CHATS[3]), encode_prompt(tokenizer, CHATS[0])]
    with torch.inference_mode():
        rows = open_rows(model, 2, 200)
        rows.enter([0, 1], prompts, 1)
        wanted = rows.step(torch.tensor([5, 7]))[1]
        rows = open_rows(model, 2, 200)
        rows.enter([0, 1], prompts, 1)
        wide = rows._caches[0].shape[3]
        rows.leave([0])
        rows.keep(torch.tensor([1, 1, 0]))
        assert rows._caches[0].shape[3] < wide
        found = rows.step(torch.tensor([7, 7, 0]))
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], wanted)


class Letters:
    """A tokenizer of one token a byte, so that characters of several bytes come in parts."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stops", "pieces", "whole", "stopped"),
    [
        ("  hi you ", (), ["", "", "h", "i", "", " y", "o", "u", "", ""], "hi you", False),
        ("aé!", (), ["a", "", "é", "!", ""], "aé!", False),
        ("ab END c", ("END",), ["a", "b", "", "", "", ""], "ab", True),
        ("a EN b", ("END",), ["a", "", "", "", " EN", " b", ""], "a EN b", False),
        ("one\ntwo", ("wo", "\n"), ["o", "n", "e", ""], "one", True),
        ("xyxyz", ("xyz",), ["", "", "xy", "", ""], "xy", True),
        ("a\n", (), ["a", "", ""], "a", False),
        ("\n.", ("\n",), [""], "", True),
    ],
)
def test_pieces_of_text_by_hand(text, stops, pieces, whole, stopped):
    writing, found = Writing(Letters(), stops), []
    for token in text.encode():
        found.append(writing.add(token))
        if writing.stopped:
            break
    if not writing.stopped:
        found.append(writing.end())
    assert "".join(found) == whole
    assert writing.stopped == stopped
    assert found == pieces


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    writing = Writing(Letters())
    assert [writing.add(token) for token in b"a\xc3"] == ["a", ""]
    assert writing.end() == "\ufffd"
