"""The picture of a stage's curves."""

from __future__ import annotations

import json

from matplotlib.image import imread

from rlhf_core.curves import DPI, PANEL, PANELS, draw_curves, read_lines


def size_of(picture, path):
    path.write_bytes(picture)
    rows, columns = imread(path).shape[:2]
    return columns, rows


def test_one_panel_for_each_group_of_metrics_that_has_numbers(tmp_path):
    width, height = (round(side * DPI) for side in PANEL)
    scores = {"objective/scores": [(1, 0.1), (2, 0.4)]}
    one = draw_curves("ppo", scores)
    assert size_of(one, tmp_path / "one.png") == (width, height)
    three = draw_curves("ppo", scores | {"objective/kl": [(1, 0.0)], "objective/entropy": [(1, 2.0)]})
    assert size_of(three, tmp_path / "three.png") == (2 * width, 2 * height)
    assert draw_curves("ppo", scores) == one
    assert draw_curves("ppo", {"objective/scores": [(1, 0.1), (2, 0.5)]}) != one


def test_nothing_to_draw_gives_no_picture():
    assert draw_curves("prepare", {"train/loss": [(1, 1.0)]}) is None
    assert draw_curves("ppo", {"train/loss": [(1, 1.0)]}) is None
    assert draw_curves("ppo", {}) is None


def test_a_line_that_is_being_written_and_what_is_not_finite_are_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    assert read_lines(path) == {}
    rows = [{"step": 1, "a": 1.5}, {"step": 2, "a": float("nan"), "b": 2.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "a')
    assert read_lines(path) == {"a": [(1, 1.5)], "b": [(2, 2.0)]}


def test_every_panel_names_a_metric_that_its_stage_logs(root):
    sources = "".join(
        path.read_text() for path in (root / "rlhf_core").rglob("*.py") if path.stem != "curves"
    )
    for panels in PANELS.values():
        for panel in panels:
            assert any(f'"{name}"' in sources for name in panel.lines), panel
