"""What a simulation came to: a table for the shell, and reports/simulation/NAME.{json,png}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_core.atomic import write_text
from tasks.simulation import Round, Simulation, champions

SIZE = (6.4, 3.6)  # inches
DPI = 110


def show(found: Simulation, home: Path, name: str) -> None:
    """Print the table, and write both files below `home`."""
    rounds = [one for one in found.rounds if one.done]
    directory = home / "reports" / "simulation"
    directory.mkdir(parents=True, exist_ok=True)
    live = champions(rounds)
    facts = {
        "asked": found.asked,
        "rounds": [asdict(one) | {"champion_measured": held} for one, held in zip(rounds, live, strict=True)],
    }
    write_text(directory / f"{name}.json", json.dumps(facts, indent=2) + "\n")
    draw(rounds, live, directory / f"{name}.png")
    console = Console()
    console.print(table(rounds, live))
    console.print(f"{directory / name}.json and .png", soft_wrap=True)


def table(rounds: Sequence[Round], live: Sequence[Mapping[str, float]]) -> Table:
    """A line a round: the candidate, what the gate said of it, and the champion after it."""
    made = Table(
        title="Gold win rate over the first SFT model, by round",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("round", "votes", "candidate", "gold", "KL", "RM right", "gate", "champion", "min"):
        made.add_column(column, justify="left" if column in ("round", "gate", "champion") else "right")
    for one, held in zip(rounds, live, strict=True):
        ours = one.measured
        made.add_row(
            str(one.number),
            str(one.votes),
            interval(ours, "win_rate"),
            f"{ours['gold']:+.3f}",
            f"{ours['kl']:.2f}",
            interval(ours, "reward_accuracy"),
            one.verdict or "-",
            f"v{one.champion}\n{held['win_rate']:.3f}" if one.champion else "SFT\n0.500",
            f"{sum(one.seconds.values()) / 60:.1f}",
        )
    return made


def interval(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return "-"
    low, high = values[f"{name}_low"], values[f"{name}_high"]
    return f"{values[name]:.3f}\n{low:.2f}-{high:.2f}"  # "to" would not fit into 80 columns


def draw(rounds: Sequence[Round], live: Sequence[Mapping[str, float]], path: Path) -> None:
    """Candidates with their intervals, the champion as a step line, one half as where nothing was won."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    numbers = [one.number for one in rounds]
    made = [one for one in rounds if one.number]
    rates = [one.measured["win_rate"] for one in made]
    below = [one.measured["win_rate"] - one.measured["win_rate_low"] for one in made]
    above = [one.measured["win_rate_high"] - one.measured["win_rate"] for one in made]
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    held = [one["win_rate"] for one in live]
    axes.step(numbers, held, where="post", color="#0072b2", label="champion")
    axes.errorbar(
        [one.number for one in made],
        rates,
        yerr=[below, above],
        fmt="o",
        color="#d55e00",
        capsize=4,
        label="candidate, with its interval",
    )
    axes.set_xticks(numbers)
    axes.set_xticklabels([f"{one.number}\n{one.votes} votes" for one in rounds])
    axes.set_xlabel("round")
    axes.set_ylabel("gold win rate over the first SFT model")
    axes.legend(loc="best", frameon=False)
    figure.savefig(path)
