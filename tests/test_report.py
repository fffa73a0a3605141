import io
import json

import pytest
from rich.console import Console

from rlhf_core.json_lines import lines_of
from rlhf_core.layout import Layout
from rlhf_core.report import run_report
from rlhf_core.stages import STAGES


def text(layout, width=100, registered=""):
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    console.print(run_report(layout, registered))
    return console.export_text()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def interval(name, estimate, half):
    return {name: estimate, f"{name}_low": estimate - half, f"{name}_high": estimate + half}


@pytest.fixture
def finished(tmp_path):
    """A workspace as a run leaves it."""
    layout = Layout(tmp_path)
    for i, stage in enumerate(STAGES):
        perf = {"perf/seconds": 10.0 * i, "perf/peak_memory_gib": 0.5 + i}
        put(layout.run_dir(stage) / "perf.json", perf)
    put(
        layout.metrics("reward"),
        interval("reward/accuracy", 0.75, 0.0625)
        | {"reward/length_baseline_accuracy": 0.5625, "reward/num_eval_pairs": 224},
    )
    put(
        layout.metrics("evaluate"),
        {"eval/num_prompts": 160, "eval/kl_budget": 12.0}
        | interval("eval/gold_sft", 0.25, 0.0625)
        | interval("eval/gold_policy", 0.5, 0.125)
        | interval("eval/gold_gain_over_sft", 0.25, 0.125)
        | interval("eval/proxy_sft", -0.5, 0.25)
        | interval("eval/proxy_policy", 1.0, 0.25)
        | interval("eval/proxy_gain_over_sft", 1.5, 0.5)
        | interval("eval/length_sft", 16.0, 1.0)
        | interval("eval/length_policy", 20.0, 1.0)
        | interval("eval/win_rate_over_sft", 0.6875, 0.0625)
        | interval("eval/kl", 4.5, 0.25),
    )
    rows = [
        {
            "prompt": f"prompt {i}",
            "sft": f"old {i}",
            "policy": f"new [b]{i}",
            "gold_sft": -0.25,
            "gold_policy": 1.0,
        }
        for i in range(5)
    ]
    put(layout.evaluation / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(layout.evaluation / "report.html", "<!doctype html>")
    return layout


def test_samples_are_shown_whatever_line_separator_a_text_holds(finished):
    row = {"prompt": "how\u2028so", "sft": "a\x85b", "policy": "c\u2029d"}
    (finished.evaluation / "samples.jsonl").write_text(lines_of([row]), encoding="utf-8")
    shown = text(finished)
    assert all(found in shown for found in ("how so", "a b", "c d"))


def test_report_shows_every_result(finished):
    shown = text(finished)
    for expected in (
        "160 held-out prompts",
        "0.250",
        "0.188 to 0.312",
        "+0.125 to +0.375",
        "-0.75 to -0.25",
        "68.8% (62.5% to 75.0%), gold",
        "4.50 (4.25 to 4.75) nats per answer, budget 12",
        "0.750 (0.688 to 0.812) on 224 held-out pairs; by length alone 0.562",
        "reports/evaluation/report.html",
        "rlhf chat --compare",
        "dvc push",
    ):
        assert expected in shown, expected


def test_report_shows_time_and_memory(finished):
    lines = [line.split() for line in text(finished).splitlines()]
    assert ["ppo", "70", "7.5"] in lines
    assert ["all", "360", "8.5"] in lines


def test_report_shows_three_samples_as_they_are(finished):
    shown = text(finished)
    assert "new [b]2" in shown  # markup in an answer is text
    assert "old 0" in shown
    assert "gold +1.00" in shown
    assert "prompt 3" not in shown


@pytest.mark.parametrize("width", [80, 120])
def test_report_fits_the_terminal(finished, width):
    shown = text(finished, width, "rlhf-policy version 3, alias candidate")
    assert max(map(len, shown.splitlines())) <= width
    # Nothing is cut short, and an interval stays on one line.
    assert "…" not in shown
    assert "+0.125 to +0.375" in shown
    assert "rlhf-policy version 3, alias candidate" in shown


def test_empty_workspace_shows_dashes(tmp_path):
    shown = text(Layout(tmp_path), 80)
    assert ["gold", "reward", "-", "-", "-"] in [line.split() for line in shown.splitlines()]
    assert "win rate over SFT      -" in shown


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"eval/kl": null}', '{"eval/kl": "high"}'])
def test_damaged_files_show_dashes(finished, content):
    put(finished.metrics("evaluate"), content)
    put(finished.evaluation / "samples.jsonl", content)
    put(finished.run_dir("ppo") / "perf.json", content)
    assert "KL to SFT              - nats" in text(finished)
