import json

import pytest
import torch
from torch import nn

from rlhf_core.checkpoint import Checkpoints, load_optimizer_tensors, optimizer_tensors

ORIGIN = {"params": {"sft": {"learning_rate": 0.1}}, "inputs": {"a": "1"}}


def save(checkpoints, step):
    checkpoints.save(step, {"w": torch.full((2,), float(step))}, {"step": step})


def test_latest_checkpoint_comes_back_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, ORIGIN)
    assert checkpoints.load_latest() is None
    for step in (1, 2, 10):
        save(checkpoints, step)
    found = checkpoints.load_latest()
    assert found.state == {"step": 10}
    assert found.tensors["w"].tolist() == [10.0, 10.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "absent"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage, capsys):
    checkpoints = Checkpoints(tmp_path, ORIGIN)
    save(checkpoints, 1)
    save(checkpoints, 2)
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])
    assert checkpoints.load_latest().state == {"step": 1}
    assert "step-00000002: passed over" in capsys.readouterr().err


def test_half_written_checkpoint_is_never_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, ORIGIN)
    save(checkpoints, 1)
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"step": 2}))
    assert checkpoints.load_latest().state == {"step": 1}


def test_checkpoint_of_other_parameters_is_passed_over_with_the_difference_named(tmp_path, capsys):
    save(Checkpoints(tmp_path, ORIGIN), 1)
    other = Checkpoints(tmp_path, {"params": {"sft": {"learning_rate": 0.2}}, "inputs": {"a": "1"}})
    assert other.load_latest() is None
    assert "params.sft.learning_rate was 0.1, is 0.2" in capsys.readouterr().err


def test_optimizer_goes_on_exactly_from_its_tensors():
    def steps(model, optimizer, count, start=0):
        for i in range(start, start + count):
            optimizer.zero_grad()
            (model(torch.full((1, 3), float(i + 1))).sum() ** 2).backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    whole, whole_optimizer = fresh()
    steps(whole, whole_optimizer, 5)
    part, part_optimizer = fresh()
    steps(part, part_optimizer, 2)
    resumed, resumed_optimizer = fresh()
    resumed.load_state_dict(part.state_dict())
    load_optimizer_tensors(resumed_optimizer, "o", optimizer_tensors(part_optimizer, "o"))
    steps(resumed, resumed_optimizer, 3, start=2)
    assert torch.equal(resumed.weight, whole.weight)
