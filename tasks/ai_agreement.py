"""The AI labeler of `preferences` on items that people have judged, and how far the two agree.

    python -m tasks.ai_agreement COMPARISONS.json RESULT.json

A judge model may need the memory that training needs next, so it runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feedback.against_ai import Agreement, Comparison, agreements, comparisons, label_of
from feedback.history import Votes
from rlhf_core.config import Params, load_params
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.evaluation.statistics import accuracy_with_interval
from rlhf_core.labelers import make_labeler
from rlhf_core.layout import Layout
from tasks.processes import run_command
from tasks.stages import stage_environment


@dataclass(frozen=True)
class Measured:
    """Agreement on one criterion, with an interval over prompts."""

    project: str
    criterion: str
    num: int
    observed: float
    low: float
    high: float
    kappa: float | None

    def row(self) -> dict[str, Any]:
        """A line of a table for people."""
        kappa = "not defined" if self.kappa is None else f"{self.kappa:.3f}"
        return {
            "project": self.project,
            "criterion": self.criterion,
            "comparisons": self.num,
            "agreement": f"{self.observed:.1%} ({self.low:.1%} to {self.high:.1%})",
            "Cohen's kappa": kappa,
        }

    def metrics(self) -> dict[str, float]:
        name = f"feedback/ai_agreement/{_plain(self.project)}/{_plain(self.criterion)}"
        found = {name: self.observed, f"{name}_low": self.low, f"{name}_high": self.high}
        return found | ({} if self.kappa is None else {f"{name}_kappa": self.kappa})


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def measure(root: Path, params: Params, votes: Votes, say: Callable[[str], None]) -> list[Measured]:
    """Agreement on `retrain.agreement_share` of what people judged, by project and criterion."""
    share, seed = params.retrain.agreement_share, params.run.seed
    found = [one for each in votes.collections for one in comparisons(each, share, seed)]
    if not found:
        return []
    place = Layout(root).run_dir("ai_agreement")
    place.mkdir(parents=True, exist_ok=True)
    asked, told = place / "comparisons.json", place / "labels.json"
    told.unlink(missing_ok=True)
    asked.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
    done = run_command(
        [sys.executable, "-m", "tasks.ai_agreement", str(asked), str(told)],
        cwd=root,
        env=stage_environment(root, params),
        on_line=say,
        log_file=place / "output.log",
        time_limit=params.flow.stage_time_limit,
    )
    if done.timed_out or done.returncode != 0:
        words = "took too long (flow.stage_time_limit)" if done.timed_out else done.tail.strip()
        error = InputError if done.returncode == InputError.exit_code else RLHFError
        raise error(f"the AI labeler, asked about what people judged: {words}")
    labels = json.loads(told.read_text(encoding="utf-8"))
    return [with_interval(one, params) for one in agreements(found, labels)]


def with_interval(found: Agreement, params: Params) -> Measured:
    interval = accuracy_with_interval(
        found.equal, found.groups, confidence=params.reward.confidence, seed=params.run.seed
    )
    return Measured(
        found.project,
        found.criterion,
        found.num,
        interval.estimate,
        interval.low,
        interval.high,
        None if math.isnan(found.kappa) else found.kappa,
    )


def ask_labeler(params: Params, found: Sequence[Comparison]) -> list[str]:
    """The labeler's a, b or tie on each comparison; each answer is scored once."""
    config = params.preferences
    labeler = make_labeler(config.labeler, config.labeler_target, params.run)
    answers = sorted({(one.prompt, text) for one in found for text in (one.first, one.second)})
    scores = labeler.score([prompt for prompt, _ in answers], [text for _, text in answers])
    by_answer = dict(zip(answers, scores, strict=True))
    return [
        label_of(by_answer[one.prompt, one.first], by_answer[one.prompt, one.second], config.min_margin)
        for one in found
    ]


def main() -> None:
    asked, told = map(Path, sys.argv[1:])
    try:
        params = load_params(Layout.here().params)
        found = [Comparison(**one) for one in json.loads(asked.read_text(encoding="utf-8"))]
        told.write_text(json.dumps(ask_labeler(params, found)), encoding="utf-8")
    except RLHFError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
