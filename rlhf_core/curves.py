"""The training curves of one stage as a picture, while it trains and when it is done."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.evaluation.plots import THEMES, History, style
from rlhf_core.json_lines import text_lines

PANEL = (4.6, 2.9)  # inches
DPI = 90  # a picture of two panels has some 30 KiB
COLORS = ("policy", "sft", "base")  # of THEMES, for the lines of a panel


@dataclass(frozen=True)
class Panel:
    """One set of axes: metrics of the history with their labels."""

    title: str
    ylabel: str
    lines: Mapping[str, str]


_LOSS = {"eval/loss": "held out", "train/loss": "training"}
PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (Panel("Loss", "nats per token", _LOSS),),
    "sft": (
        Panel("Loss", "nats per token", _LOSS),
        Panel("Tokens guessed right", "share", {"eval/token_accuracy": "held out"}),
    ),
    "reward": (
        Panel("Loss", "nats per pair", _LOSS),
        Panel("Pairs ordered right", "share", {"eval/accuracy": "held out", "train/accuracy": "training"}),
    ),
    "ppo": (
        Panel("Score", "mean", {"objective/scores": "reward model", "objective/gold": "gold"}),
        Panel("KL to the SFT model", "nats per answer", {"objective/kl": ""}),
        Panel("Length", "tokens per answer", {"rollout/response_length": ""}),
        Panel("Entropy", "nats per token", {"objective/entropy": ""}),
    ),
}


def read_lines(path: Path) -> History:
    """The metrics of a history.jsonl by step; a line that is still being written waits for the next look."""
    history: History = {}
    try:
        lines = text_lines(path)
    except OSError:
        return history
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        step = row.pop("step")
        for name, value in row.items():
            if math.isfinite(value):
                history.setdefault(name, []).append((step, value))
    return history


def draw_curves(stage: str, history: History) -> bytes | None:
    """PNG bytes of the panels of `stage` that have numbers; None where there are none."""
    shown = [
        (panel, found)
        for panel in PANELS.get(stage, ())
        if (found := {name: history[name] for name in panel.lines if name in history})
    ]
    if not shown:
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(style("light")):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        for number, (panel, found) in enumerate(shown, start=1):
            axes = figure.add_subplot(rows, columns, number)
            for color, (name, points) in zip(COLORS, found.items()):
                steps, values = zip(*points, strict=True)
                marker = "o" if len(points) < 40 else ""
                label = panel.lines[name] or None
                axes.plot(
                    steps, values, color=THEMES["light"][color], label=label, lw=1.6, ms=3, marker=marker
                )
            axes.set(title=panel.title, xlabel="step", ylabel=panel.ylabel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if any(panel.lines[name] for name in found):
                axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
