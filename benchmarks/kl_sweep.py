"""Gold and proxy reward against sqrt(KL) for several prices of KL (Gao et al. 2022, section 3).

    python -m benchmarks.kl_sweep 0 0.02 0.05 0.1 0.2

Runs PPO from the SFT and the reward model of a finished run (`rlhf run`) with the values of params.yaml, no
budget of KL and twice the updates, and writes a table and a plot of all updates to .rlhf/kl-sweep.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.config import Params, load_params
from rlhf_core.evaluation.plots import History, read_history
from rlhf_core.layout import Layout
from rlhf_core.stages.runner import run_stage

NO_BUDGET = 1e6
MEASURES = {"objective/gold": "gold reward (the judge)", "objective/scores": "proxy reward (normalised)"}


def run_price(price: float, updates: int, params: Params, here: Layout, root: Path) -> History:
    """The history of PPO with this price; one that has finished is not run again."""
    layout = Layout(root / f"kl_coef-{price:g}")
    if not layout.metrics("ppo").is_file():
        for path in (here.model("sft"), here.model("reward"), here.prepared):
            link = layout.root / path.relative_to(here.root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
        changes = {"kl_coef": price, "kl_budget": NO_BUDGET, "num_updates": updates}
        run_stage("ppo", params.model_copy(update={"ppo": params.ppo.model_copy(update=changes)}), layout)
    return read_history(layout.history("ppo"))


def points(history: History, measure: str) -> tuple[list[float], list[float]]:
    """sqrt(KL) and the measure, by update. The estimate of a small KL may be negative, and counts as 0."""
    kl, values = dict(history["objective/kl"]), dict(history[measure])
    steps = sorted(kl.keys() & values.keys())
    return [math.sqrt(max(0.0, kl[step])) for step in steps], [values[step] for step in steps]


def draw(histories: dict[float, History], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    colors = plt.get_cmap("viridis")([i / max(1, len(histories) - 0.6) for i in range(len(histories))])
    for panel, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for color, (price, history) in zip(colors, histories.items(), strict=True):
            x, y = points(history, measure)
            panel.plot(x, y, "o-", color=color, label=f"{price:g}", markersize=4, linewidth=1.2)
        panel.set_xlabel("sqrt(KL to SFT), KL in nats per answer")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(title="ppo.kl_coef", frameon=False)
    figure.savefig(path, dpi=120)


def table(histories: dict[float, History]) -> str:
    """Markdown: where each run ends, means over its last three rollouts."""
    lines = [
        "| `ppo.kl_coef` | KL | proxy | gold | sqrt(KL) |",
        "|" + " --- |" * 5,
    ]
    for price, history in histories.items():
        kl, proxy, gold = (
            _end(history, name) for name in ("objective/kl", "objective/scores", "objective/gold")
        )
        lines.append(f"| {price:g} | {kl:.1f} | {proxy:+.2f} | {gold:.2f} | {math.sqrt(max(0.0, kl)):.2f} |")
    return "\n".join(lines)


def _end(history: History, name: str, last: int = 3) -> float:
    values: Sequence[tuple[float, float]] = history[name][-last:]
    return sum(value for _, value in values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prices", type=float, nargs="+")
    parser.add_argument("--updates", type=int, help="of each run; twice ppo.num_updates when not given")
    parser.add_argument("--directory", type=Path, default=Path(".rlhf/kl-sweep"))
    options = parser.parse_args()
    os.environ["RLHF_TRACKING"] = "off"
    here = Layout.here()
    params = load_params(here.params)
    root = options.directory.resolve()
    updates = options.updates or 2 * params.ppo.num_updates
    histories = {price: run_price(price, updates, params, here, root) for price in options.prices}
    draw(histories, root / "kl-sweep.png")
    print(table(histories))


if __name__ == "__main__":
    main()
