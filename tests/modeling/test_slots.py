"""Steps over memory that stays in place have the logits of whole rows, recorded or not; without a GPU what
records them is a stand-in."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.modeling import slots as slots_module
from rlhf_core.modeling.slots import SlotRows

from .test_blocks import CONFIGS, PROMPTS, make


class Recorder:
    """Stands for CUDA graphs: what it gives repeats the step, and counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, step):
        self.recorded += 1

        def replay():
            self.replayed += 1
            return step()

        return replay


def failing(step):
    raise RuntimeError("no graph\nat all")


def frozen(step):
    """What a graph would be that holds on to the numbers of its recording."""
    logits = step().clone()
    return lambda: logits


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Memory grows, and steps are recorded, within the few tokens of a test."""
    monkeypatch.setattr(slots_module, "WIDTH", 16)
    monkeypatch.setattr(slots_module, "PLAIN_STEPS", 2)


class Story:
    """Rows as they are written, and the logits that they must have: those of the model over whole rows."""

    def __init__(self, model, record):
        self.model, self.rows = model, SlotRows(model, 4, 60, record)
        self.texts: dict[int, list[int]] = {}  # by slot
        self.generator = torch.Generator().manual_seed(3)

    def check(self, logits, slots=None):
        for slot in self.texts if slots is None else slots:
            expected = self.model(torch.tensor([self.texts[slot]])).logits[0, -1]
            torch.testing.assert_close(logits[slot], expected, rtol=1e-3, atol=1e-4)

    def enter(self, slots, prompts, copies):
        for n, slot in enumerate(slots):
            self.texts[slot] = list(prompts[n // copies])
        logits = self.rows.enter(slots, prompts, copies)
        self.check(dict(zip(slots, logits, strict=True)), slots)

    def step(self, count, slots):
        for _ in range(count):
            tokens = torch.randint(0, 97, (slots,), generator=self.generator)
            for slot, text in self.texts.items():
                text.append(int(tokens[slot]))
            self.check(self.rows.step(tokens))

    def keep(self, slots):
        self.rows.leave([slot for slot in self.texts if slot not in slots])
        self.rows.keep(torch.tensor(slots))
        self.texts = {new: list(self.texts[old]) for new, old in enumerate(slots)}


@pytest.mark.parametrize("make_record", [lambda: None, Recorder, lambda: failing, lambda: frozen])
@torch.inference_mode()
def test_slots_have_the_logits_of_whole_rows(model, make_record, capsys):
    """Ragged prompts in copies; a row leaves and another takes its slot; few go on, one becomes two."""
    record = make_record()
    story = Story(model, record)
    story.enter([0, 1, 2, 3], [PROMPTS[0], PROMPTS[3]], 2)
    story.step(7, 4)  # beyond the first 16 columns
    story.rows.leave([1])
    story.enter([1], [PROMPTS[2]], 1)
    story.step(2, 4)
    story.keep([3, 1, 0])  # in the same memory
    story.step(6, 3)
    story.keep([2, 0])  # half of it is free
    story.step(2, 2)
    story.keep([0, 1, 0, 0])
    story.step(5, 4)
    said = capsys.readouterr().err
    assert ("no graph" in said) == (record is failing)
    assert ("its numbers differ" in said) == (record is frozen)
    if isinstance(record, Recorder):
        assert record.recorded >= 3
        assert record.replayed > 10


@torch.inference_mode()
def test_what_is_recorded_outlives_rows_that_end():
    record = Recorder()
    story = Story(make(CONFIGS["llama"]), record)
    story.enter([0, 1, 2, 3], PROMPTS, 1)
    story.step(3, 4)
    story.keep([0, 2, 3])
    story.step(1, 3)
    assert (record.recorded, record.replayed) == (1, 2)  # held against a plain step, then used
