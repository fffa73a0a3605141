"""The pictures of the evaluation report: PNG bytes, the same in a repetition, in a light and a dark theme.

A picture whose numbers are absent is left out. Colour-blind readers can tell the colours apart (Okabe, Ito).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.evaluation.results import MODELS
from rlhf_core.evaluation.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = dict[str, list[tuple[float, float]]]  # metric -> (step, value) where the step logged it
Tree = dict[str, Any]

THEMES = {
    "light": {
        "back": "#ffffff",
        "text": "#24292f",
        "grid": "#d8dee4",
        "base": "#8c959f",
        "sft": "#0072b2",
        "policy": "#d55e00",
    },
    "dark": {
        "back": "#161b22",
        "text": "#d5dbe1",
        "grid": "#353c45",
        "base": "#8b949e",
        "sft": "#56b4e9",
        "policy": "#f0883e",
    },
}
LABELS = {"base": "base", "sft": "SFT", "policy": "policy"}
SIZE = (6.4, 3.8)  # inches
DPI = 130
CALIBRATION_BINS = 5


@dataclass(frozen=True)
class Figures:
    """What the plots are drawn from: results.json, samples.jsonl, histories, and the scored pairs."""

    tree: Tree
    samples: Sequence[Tree]
    histories: Mapping[str, History]
    pairs: Sequence[Mapping[str, float]] = ()  # chosen, rejected, probability of each held-out pair


Plot = Callable[["Axes", Figures, dict[str, str]], bool]  # False: there are no numbers for it


def read_history(path: Path) -> History:
    """The columns of a history.csv; an absent file gives none."""
    history: History = {}
    if not path.is_file():
        return history
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            for name, text in row.items():
                value = float(text) if text else math.nan
                if math.isfinite(value):
                    history.setdefault(name, []).append((step, value))
    return history


def read_pairs(path: Path) -> list[dict[str, float]]:
    """The held-out pairs as the reward model scored them; an absent file gives none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        names = ("chosen", "rejected", "probability")
        return [{name: float(row[name]) for name in names} for row in csv.DictReader(file)]


def style(theme: str) -> Tree:
    """matplotlib's settings for a picture in one of THEMES."""
    colors = THEMES[theme]
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
        "font.size": 10,
        "figure.facecolor": colors["back"],
        "axes.facecolor": colors["back"],
        "axes.edgecolor": colors["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colors["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), colors["text"]
        ),
    }


def draw_plots(figures: Figures, theme: str) -> dict[str, bytes]:
    """PNG bytes by name, in the order of PLOTS, as far as there are numbers for them."""
    import matplotlib

    colors = THEMES[theme]
    with matplotlib.rc_context(style(theme)):
        pictures = {name: _draw(plot, figures, colors) for name, plot in PLOTS.items()}
    return {name: data for name, data in pictures.items() if data is not None}


def _draw(plot: Plot, figures: Figures, colors: dict[str, str]) -> bytes | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if not plot(figure.add_subplot(), figures, colors):
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scores(judge: str, title: str) -> Plot:
    def plot(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
        for x, name in enumerate(MODELS):
            score = figures.tree["models"][name][judge]
            y = score["estimate"]
            errors = [[y - score["low"]], [score["high"] - y]]
            axes.errorbar(x, y, errors, fmt="o", ms=8, capsize=6, lw=2, c=colors[name])
            axes.annotate(f"{y:+.2f}", (x, y), (12, -4), textcoords="offset points")
        axes.set_xticks(range(len(MODELS)), [LABELS[name] for name in MODELS])
        axes.set_xlim(-0.5, len(MODELS) - 0.3)
        axes.set_ylabel("mean over prompts")
        axes.set_title(f"{title}, {figures.tree['confidence']:.0%} intervals")
        return True

    return plot


def _histogram(axes: Axes, values: Mapping[str, Sequence[float]], edges: Any, colors: dict[str, str]) -> None:
    for name, column in values.items():
        axes.hist(column, bins=edges, color=colors[name], alpha=0.18)
        axes.hist(column, bins=edges, histtype="step", color=colors[name], lw=1.8, label=LABELS[name])
    axes.set_ylabel("answers")
    axes.legend()


def _gold_histogram(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    import numpy as np

    values = {name: [row[f"gold_{name}"] for row in figures.samples] for name in ("sft", "policy")}
    edges = np.histogram_bin_edges([v for column in values.values() for v in column], bins=20)
    _histogram(axes, values, edges, colors)
    axes.set_xlabel("gold score of an answer")
    axes.set_title("Gold score before and after PPO")
    return True


def _length_histogram(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    import numpy as np

    values = {name: [row[f"length_{name}"] for row in figures.samples] for name in MODELS}
    most = figures.tree["sampling"]["max_new_tokens"]
    width = max(1, round(most / 24))  # whole tokens, so that no bin holds more lengths than its neighbour
    _histogram(axes, values, np.arange(0.5, most + width + 0.5, width), colors)
    axes.set_xlabel(f"tokens of an answer (at most {most})")
    axes.set_title("Length of the answers")
    return True


def _line(
    axes: Axes, points: Sequence[tuple[float, float]], color: str, label: str = "", **style: Any
) -> None:
    steps, values = zip(*points, strict=True)
    style = {"marker": "o" if len(points) < 40 else "", "ms": 3.5, "lw": 1.8} | style
    axes.plot(steps, values, color=color, label=label or None, **style)


def _over_steps(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    _title(axes, title, xlabel, ylabel)


def _title(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _ppo_curve(metric: str, title: str, ylabel: str) -> Plot:
    def plot(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
        points = figures.histories["ppo"].get(metric)
        if not points:
            return False
        _line(axes, points, colors["policy"])
        _over_steps(axes, title, "PPO update", ylabel)
        return True

    return plot


def _ppo_scores(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    history = figures.histories["ppo"]
    if "objective/scores" not in history:
        return False
    _line(axes, history["objective/scores"], colors["policy"], "proxy (reward model)")
    if "objective/gold" in history:
        _line(axes, history["objective/gold"], colors["sft"], f"gold ({figures.tree['gold']})", marker="s")
    _over_steps(axes, "What PPO optimises, and what it is for", "PPO update", "mean score of a rollout")
    axes.legend()
    return True


def _ppo_kl(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    points = figures.histories["ppo"].get("objective/kl")
    if not points:
        return False
    budget = figures.tree["kl_budget"]
    _line(axes, points, colors["policy"])
    axes.axhline(budget, color=colors["text"], lw=1.2, ls="--")
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("budget", (0.01, budget), (0, -13), **where)
    values = [value for _, value in points]
    axes.set_ylim(min(0.0, *values, 0.0), 1.08 * max(budget, *values))
    _over_steps(axes, "KL to the SFT model during PPO", "PPO update", "nats per answer")
    return True


def _against_kl(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    history = figures.histories["ppo"]
    if not {"objective/scores", "objective/kl"} <= set(history):
        return False
    kl = dict(history["objective/kl"])
    for metric, color, label, marker in (
        ("objective/scores", "policy", "proxy (reward model)", "o"),
        ("objective/gold", "sft", f"gold ({figures.tree['gold']})", "s"),
    ):
        # The estimate of a KL near 0 can fall below it.
        points = sorted(
            (math.sqrt(max(0.0, kl[step])), y) for step, y in history.get(metric, []) if step in kl
        )
        if points:
            axes.scatter(*zip(*points, strict=True), s=26, color=colors[color], label=label, marker=marker)
    title = "Proxy up and gold down would be over-optimisation"
    _title(axes, title, "√KL to the SFT model, √nats per answer", "mean score of a rollout")
    axes.legend()
    return True


def _training(stage: str, title: str, metrics: Mapping[str, str], ylabel: str) -> Plot:
    """Curves of a supervised stage; `metrics` maps a column to its label."""

    def plot(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
        history = figures.histories[stage]
        found = {name: history[name] for name in metrics if name in history}
        for name, points in found.items():
            held_out = name.startswith("eval/")
            style = {"lw": 2.2, "zorder": 3} if held_out else {"lw": 1.2, "marker": ""}
            _line(axes, points, colors["policy" if held_out else "base"], metrics[name], **style)
        _over_steps(axes, title, "optimizer step", ylabel)
        if found:
            axes.legend()
        return bool(found)

    return plot


def _reward_calibration(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    """How often the answer held to be better was the chosen one, by how sure the reward model was."""
    if not figures.pairs:
        return False
    bins: dict[int, list[tuple[float, bool]]] = {}
    for pair in figures.pairs:
        confidence = max(pair["probability"], 1.0 - pair["probability"])
        which = min(int((confidence - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins.setdefault(which, []).append((confidence, pair["probability"] > 0.5))
    axes.plot([0.5, 1.0], [0.5, 1.0], ls="--", lw=1.2, color=colors["text"], label="as sure as right")
    for i, which in enumerate(sorted(bins)):
        confidence = sum(c for c, _ in bins[which]) / len(bins[which])
        right = sum(r for _, r in bins[which])
        interval = wilson(right, len(bins[which]), figures.tree["confidence"])
        y = right / len(bins[which])
        errors = [[max(0.0, y - interval.low)], [max(0.0, interval.high - y)]]
        label = "held-out pairs" if i == 0 else None
        axes.errorbar(confidence, y, errors, fmt="o", ms=6, capsize=4, c=colors["policy"], label=label)
        axes.annotate(str(len(bins[which])), (confidence, y), (7, -3), textcoords="offset points")
    _title(axes, "Reward model: confidence and accuracy", "probability of its choice", "share right")
    axes.set_ylim(0.0, 1.05)
    axes.legend(loc="lower right")
    return True


def _reward_scores(axes: Axes, figures: Figures, colors: dict[str, str]) -> bool:
    import numpy as np

    if not figures.pairs:
        return False
    values = {side: [pair[side] for pair in figures.pairs] for side in ("rejected", "chosen")}
    edges = np.histogram_bin_edges([v for column in values.values() for v in column], bins=24)
    for side, color in (("rejected", colors["sft"]), ("chosen", colors["policy"])):
        axes.hist(values[side], bins=edges, color=color, alpha=0.18)
        axes.hist(values[side], bins=edges, histtype="step", color=color, lw=1.8, label=side)
    _title(axes, "Scores of held-out pairs", "normalised score", "answers")
    axes.legend()
    return True


_LOSS = {"train/loss": "training", "eval/loss": "held out"}
_ACCURACY = {"train/accuracy": "training", "eval/accuracy": "held out"}
PLOTS: dict[str, Plot] = {
    "gold": _scores("gold", "Gold score of each model"),
    "proxy": _scores("proxy", "Proxy score (reward model) of each model"),
    "gold_histogram": _gold_histogram,
    "length_histogram": _length_histogram,
    "ppo_scores": _ppo_scores,
    "ppo_kl": _ppo_kl,
    "ppo_reward": _ppo_curve(
        "objective/rlhf_reward", "Score less the price of KL", "mean reward of a rollout"
    ),
    "ppo_length": _ppo_curve("rollout/response_length", "Length of answers during PPO", "tokens per answer"),
    "gold_against_kl": _against_kl,
    "sft_loss": _training("sft", "SFT loss", _LOSS, "nats per token"),
    "reward_accuracy": _training("reward", "Reward model: pairs ordered right", _ACCURACY, "share of pairs"),
    "reward_calibration": _reward_calibration,
    "reward_scores": _reward_scores,
}
