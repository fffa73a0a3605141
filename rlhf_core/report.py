"""The table at the end of a run, from the files that the stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf_core.layout import Layout
from rlhf_core.stages import STAGES

MISSING = "-"
SHOWN_SAMPLES = 3


def run_report(layout: Layout, registered: str = "") -> RenderableType:
    """Time and memory by stage, results with intervals, samples, where to look and what to do next."""
    parts: list[RenderableType] = [
        _results_table(layout),
        _stages_table(layout),
        *_samples(layout),
        _places(layout, registered),
        _next_steps(),
    ]
    return Group(*parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _stages_table(layout: Layout) -> Table:
    table = _table("Stages", "stage", "seconds", "peak memory, GiB")
    total = 0.0
    for stage in STAGES:
        perf = _read(layout.run_dir(stage) / "perf.json")
        total += perf.get("perf/seconds", 0.0)
        table.add_row(stage, _number(perf, "perf/seconds", ".0f"), _number(perf, "perf/peak_memory_gib", ".1f"))
    table.add_section()
    table.add_row("all", f"{total:.0f}", "")
    return table


def _results_table(layout: Layout) -> Table:
    reward = _read(layout.metrics("reward"))
    found = _read(layout.metrics("evaluate"))
    table = _table("Results on held-out prompts and pairs", "", "before (SFT)", "after (policy)", "difference")
    accuracy = _interval(reward, "reward/accuracy")
    baseline = _number(reward, "reward/length_baseline_accuracy", ".3f")
    table.add_row("reward-model accuracy", f"{baseline} by length only", accuracy, "")
    table.add_section()
    for label, key in (("gold reward", "gold"), ("proxy reward", "proxy")):
        sft, policy = (_interval(found, f"eval/{key}_{name}") for name in ("sft", "policy"))
        table.add_row(label, sft, policy, _interval(found, f"eval/{key}_gain_over_sft"))
    sft, policy = (_interval(found, f"eval/length_{name}", ".1f") for name in ("sft", "policy"))
    table.add_row("response length, tokens", sft, policy, "")
    table.add_row("win rate over SFT, gold", "", _interval(found, "eval/win_rate_over_sft"), "")
    budget = _number(found, "eval/kl_budget", "g")
    table.add_row("KL to SFT, nats per answer", f"budget {budget}", _interval(found, "eval/kl"), "")
    return table


def _samples(layout: Layout) -> list[RenderableType]:
    path = layout.evaluation / "samples.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:SHOWN_SAMPLES]]
    shown = []
    for row in rows:
        text = Text()
        text.append("before  ", style="bold blue")
        text.append(row["sft"].replace("\n", " ") + "\n")
        text.append("after   ", style="bold dark_orange")
        text.append(row["policy"].replace("\n", " "))
        shown.append(Panel(text, title=Text(row["prompt"][:100]), title_align="left"))
    return shown


def _places(layout: Layout, registered: str) -> Table:
    table = Table(title="Where to look", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    places = {
        "report": layout.evaluation / "report.html",
        "data validation": layout.validation / "index.html",
        "policy": layout.model("policy"),
        "rows put aside": layout.quarantine,
    }
    for name, path in places.items():
        table.add_row(name, str(path) if path.exists() else MISSING)
    table.add_row("registered as", registered or MISSING)
    return table


def _next_steps() -> Text:
    steps = (
        ("rlhf chat --compare", "talk to SFT and policy side by side"),
        ("make up", "Prefect and MLflow in the browser"),
        ("rlhf run -S ppo.kl_coef=0.1", "change a value and run what it touches"),
        ("dvc push", "copy data and models of this run to the DVC remote"),
        ("git add dvc.lock reports && git commit", "keep this run"),
    )
    text = Text("What to do next\n", style="bold")
    for command, meaning in steps:
        text.append(f"  {command:<40}", style="bold green")
        text.append(f"{meaning}\n", style="default")
    return text


def _number(found: Mapping[str, Any], name: str, form: str) -> str:
    value = found.get(name)
    return MISSING if value is None else format(value, form)


def _interval(found: Mapping[str, Any], name: str, form: str = ".3f") -> str:
    values = [found.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    if any(value is None for value in values):
        return MISSING
    estimate, low, high = (format(value, form) for value in values)
    return f"{estimate} ({low} to {high})"
