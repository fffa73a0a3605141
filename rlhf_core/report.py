"""The table at the end of a run, from the files that the stages left. What is missing shows as `-`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf_core.json_lines import read_lines
from rlhf_core.layout import Layout
from rlhf_core.stages import STAGES

MISSING = "-"
SHOWN_SAMPLES = 3
STYLES = {"sft": "blue", "policy": "dark_orange"}
NEXT_STEPS = (
    ("rlhf chat --compare", "talk to SFT and policy side by side"),
    ("rlhf promote", "compare the candidate with the champion"),
    ("make up", "Prefect and MLflow in the browser"),
    ("rlhf run -S ppo.kl_coef=0.1", "change a value, run what it touches"),
    ("dvc push", "copy data and models to the DVC remote"),
    ("git add dvc.lock reports; git commit", "keep this run"),
)


def run_report(layout: Layout, registered: str = "") -> RenderableType:
    """Results with intervals, samples, time and memory by stage, where to look and what to do next.

    `registered` names the version in the registry, when the run made one. Never raises for missing files.
    """
    return Group(
        _stages_table(layout),
        _results_table(layout),
        _facts(layout),
        *_samples(layout),
        _places(layout, registered),
        _next_steps(),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _stages_table(layout: Layout) -> Table:
    """Times of the last real run of each stage; DVC may have taken its outputs from the cache since."""
    table = _table("Stages", "stage", "seconds", "peak memory, GiB")
    runs = {stage: _read(layout.run_dir(stage) / "perf.json") for stage in STAGES}
    for stage, perf in runs.items():
        seconds, memory = _number(perf, "perf/seconds", ".0f"), _number(perf, "perf/peak_memory_gib", ".1f")
        table.add_row(stage, seconds, memory)
    totals = {
        "perf/seconds": sum(perf.get("perf/seconds", 0.0) for perf in runs.values()),
        "perf/peak_memory_gib": max(perf.get("perf/peak_memory_gib", 0.0) for perf in runs.values()),
    }
    table.add_section()
    table.add_row(
        "all", *(_number(totals, name, form) for name, form in zip(totals, (".0f", ".1f"), strict=True))
    )
    return table


def _results_table(layout: Layout) -> Table:
    found = _read(layout.metrics("evaluate"))
    count = _number(found, "eval/num_prompts", "d")
    table = _table(f"Results on {count} held-out prompts", "", "before (SFT)", "after (policy)", "difference")
    for label, key, form in (("gold reward", "gold", ".3f"), ("proxy reward", "proxy", ".2f")):
        before, after = (_cell(found, f"eval/{key}_{name}", form) for name in ("sft", "policy"))
        table.add_row(label, before, after, _cell(found, f"eval/{key}_gain_over_sft", f"+{form}"))
    before, after = (_cell(found, f"eval/length_{name}", ".1f") for name in ("sft", "policy"))
    table.add_row("response length, tokens", before, after, "")
    return table


def _facts(layout: Layout) -> Table:
    """What has no before and after."""
    reward, found = _read(layout.metrics("reward")), _read(layout.metrics("evaluate"))
    pairs, length = (
        _number(reward, "reward/num_eval_pairs", "d"),
        _number(reward, "reward/length_baseline_accuracy", ".3f"),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row(
        "win rate over SFT", f"{_interval(found, 'eval/win_rate_over_sft', '.1%')}, gold, ties one half"
    )
    budget = _number(found, "eval/kl_budget", "g")
    table.add_row("KL to SFT", f"{_interval(found, 'eval/kl', '.2f')} nats per answer, budget {budget}")
    accuracy = _interval(reward, "reward/accuracy", ".3f")
    table.add_row("reward-model accuracy", f"{accuracy} on {pairs} held-out pairs; by length alone {length}")
    table.add_row()
    return table


def _samples(layout: Layout) -> Iterator[RenderableType]:
    """The first prompts in the order drawn by the seed, not picked by outcome."""
    for row in _first_rows(layout.evaluation / "samples.jsonl", SHOWN_SAMPLES):
        grid = Table.grid(padding=(0, 2))
        prompt = " ".join(str(row.get("prompt", MISSING)).split())
        grid.add_row(Text("prompt", style="bold"), "", Text(prompt, style="bold"))
        for name, label in (("sft", "before"), ("policy", "after")):
            gold = _number(row, f"gold_{name}", "+.2f")
            text = Text(" ".join(str(row.get(name, MISSING)).split()))
            grid.add_row(Text(label, style=f"bold {STYLES[name]}"), Text(f"gold {gold}", style="dim"), text)
        yield Panel(grid, border_style="dim")


def _first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        return [row for row in read_lines(path)[:count] if isinstance(row, dict)]
    except (OSError, ValueError):
        return []


def _places(layout: Layout, registered: str) -> Table:
    table = _table(f"Where to look, below {layout.root}", "what", "where")
    table.columns[1].justify = "left"
    table.columns[1].overflow = "fold"
    places = {
        "evaluation": layout.evaluation / "report.html",
        "data validation": layout.validation / "index.html",
        "rows put aside": layout.quarantine,
        "policy": layout.model("policy"),
    }
    for name, path in places.items():
        table.add_row(name, str(path.relative_to(layout.root)) if path.exists() else MISSING)
    table.add_row("registered as", registered or MISSING)
    return table


def _next_steps() -> Table:
    table = _table("What to do next", "", "")
    table.show_header = False
    table.columns[0].style = "bold green"
    table.columns[0].no_wrap = True
    table.columns[1].justify = "left"
    for command, meaning in NEXT_STEPS:
        table.add_row(command, meaning)
    return table


def _number(found: Mapping[str, Any], name: str, form: str) -> str:
    value = found.get(name)
    if not isinstance(value, (int, float)):
        return MISSING
    return format(int(value) if form == "d" else value, form)


def _bounds(found: Mapping[str, Any], name: str, form: str) -> str:
    low, high = _number(found, f"{name}_low", form), _number(found, f"{name}_high", form)
    return f"{low} to {high}" if MISSING not in (low, high) else ""


def _interval(found: Mapping[str, Any], name: str, form: str) -> str:
    estimate, bounds = _number(found, name, form), _bounds(found, name, form)
    return f"{estimate} ({bounds})" if bounds else estimate


def _cell(found: Mapping[str, Any], name: str, form: str) -> Text:
    """Estimate above its interval: side by side, three of them do not fit 80 columns."""
    bounds = _bounds(found, name, form)
    return Text.assemble((_number(found, name, form), "bold"), (f"\n{bounds}" if bounds else "", "dim"))
