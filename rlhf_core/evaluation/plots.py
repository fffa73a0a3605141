"""The pictures of a run. The same numbers give the same bytes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlhf_core.config import Params
    from rlhf_core.layout import Layout

COLOURS = {"base": "#8a8f98", "sft": "#3b76af", "policy": "#d1662a"}
GOLD, PROXY = "#b8860b", "#7a4fa3"


def new_figure(columns: int, width: float = 5.2, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None}, facecolor="white")
    return path


def draw_all(
    out: Path, answers: Mapping[str, Any], intervals: Mapping[str, Interval], params: Params, layout: Layout
) -> dict[str, Path]:
    """Every picture of the report, by title."""
    pictures = {
        "Scores before and after": save(draw_scores(answers, intervals), out / "scores.png"),
        "Answers": save(draw_answers(answers), out / "answers.png"),
    }
    ppo = read_history(layout.history("ppo"))
    if ppo:
        pictures["PPO by update"] = save(draw_ppo(ppo, params.ppo.kl_budget), out / "ppo.png")
    sft, reward = read_history(layout.history("sft")), read_history(layout.history("reward"))
    if sft and reward:
        pictures["SFT and reward model"] = save(draw_supervised(sft, reward), out / "supervised.png")
    return pictures


def draw_scores(answers: Mapping[str, Any], intervals: Mapping[str, Interval]) -> Figure:
    """Mean gold and proxy score of each model, with intervals."""
    figure, axes = new_figure(2)
    for ax, judge, title in zip(axes, ("gold", "proxy"), ("gold judge", "reward model (proxy)")):
        for i, name in enumerate(answers):
            found = intervals[f"{judge}_{name}"]
            error = [[found.estimate - found.low], [found.high - found.estimate]]
            ax.bar(i, found.estimate, yerr=error, color=COLOURS[name], capsize=5, width=0.6)
            ax.annotate(f"{found.estimate:.2f}", (i, found.estimate), ha="left", va="bottom", xytext=(6, 2), textcoords="offset points")
        ax.set_xticks(range(len(answers)), list(answers))
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(f"mean score by the {title}")
    return figure


def draw_answers(answers: Mapping[str, Any]) -> Figure:
    """How the gold scores and the lengths of answers are spread, SFT against policy."""
    figure, (left, right) = new_figure(2)
    for name in ("sft", "policy"):
        found = answers[name]
        style = {"histtype": "stepfilled", "alpha": 0.45, "color": COLOURS[name], "label": name}
        left.hist(found.gold, bins=21, **style)
        right.hist([len(g.token_ids) for g in found.generations], bins=20, **style)
    left.set(title="gold score of an answer", ylabel="prompts")
    right.set(title="tokens of an answer")
    left.legend(frameon=False)
    return figure


def draw_ppo(history: Sequence[Mapping[str, float]], kl_budget: float) -> Figure:
    figure, axes = new_figure(3)
    score, kl, length = axes
    line(score, history, "objective/scores", "proxy (reward model)", PROXY)
    gold = score.twinx()
    gold.spines["top"].set_visible(False)
    line(gold, history, "objective/gold", "gold (only watched)", GOLD)
    score.set(title="score of the rollouts", ylabel="proxy")
    gold.set_ylabel("gold")
    handles = [*score.get_lines(), *gold.get_lines()]
    score.legend(handles=handles, frameon=False, loc="lower right", fontsize=8)
    line(kl, history, "objective/kl", "KL to SFT", COLOURS["policy"])
    kl.axhline(kl_budget, color="#c62828", linestyle="--", linewidth=1, label="budget")
    kl.set(title="KL to the reference, nats per answer")
    kl.legend(frameon=False, fontsize=8)
    line(length, history, "rollout/response_length", "tokens", COLOURS["sft"])
    length.set(title="tokens of an answer")
    length.set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("update")
    return figure


def draw_supervised(sft: Sequence[Mapping[str, float]], reward: Sequence[Mapping[str, float]]) -> Figure:
    figure, (left, right) = new_figure(2)
    line(left, sft, "train/loss", "training", "#9bb7d4")
    line(left, sft, "eval/loss", "held out", COLOURS["sft"], marker="o")
    left.set(title="SFT loss per token", xlabel="step")
    line(right, reward, "train/accuracy", "training", "#cbb8df")
    line(right, reward, "eval/accuracy", "held out", PROXY, marker="o")
    right.set(title="reward model: accuracy on pairs", xlabel="step")
    right.set_ylim(0, 1.02)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    return figure


def line(ax: Axes, history: Sequence[Mapping[str, float]], name: str, label: str, colour: str, marker: str = "") -> None:
    points = [(row["step"], row[name]) for row in history if name in row]
    if points:
        ax.plot(*zip(*points), color=colour, label=label, marker=marker, markersize=4)


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv; empty when there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
