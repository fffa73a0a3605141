"""Where everything of a workspace lies. The names of dvc.yaml's outputs, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Paths below the workspace `root`, the directory that holds params.yaml and dvc.yaml."""

    root: Path

    @classmethod
    def here(cls) -> Layout:
        return cls(Path.cwd())

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def sources(self) -> Path:
        """Links to the files that the data sources name, for DVC."""
        return self.root / "data" / "sources"

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    def prepared_file(self, kind: str, split: str) -> Path:
        """Parquet file of `kind` (demonstrations, preferences, prompts) and `split` (train, eval)."""
        return self.prepared / kind / f"{split}.parquet"

    @property
    def quarantine(self) -> Path:
        return self.root / "data" / "quarantine.jsonl"

    @property
    def preferences(self) -> Path:
        return self.root / "data" / "preferences"

    def model(self, name: str) -> Path:
        """Directory of a finished model: base, pretrained, sft, reward or policy."""
        return self.root / "models" / name

    @property
    def validation(self) -> Path:
        return self.root / "reports" / "validation"

    @property
    def evaluation(self) -> Path:
        return self.root / "reports" / "evaluation"

    def metrics(self, stage: str) -> Path:
        """The stage's final numbers: only what a repetition gives again, byte for byte."""
        return self.root / "reports" / stage / "metrics.json"

    def history(self, stage: str) -> Path:
        """The stage's numbers by step, for `dvc plots`."""
        return self.root / "reports" / stage / "history.csv"

    @property
    def pair_scores(self) -> Path:
        """What the reward model gives to the held-out pairs."""
        return self.root / "reports" / "reward" / "pairs.csv"

    @property
    def state(self) -> Path:
        """Ignored by git and DVC: locks, logs, checkpoints in progress, times."""
        return self.root / ".rlhf"

    @property
    def worktrees(self) -> Path:
        """Where runs with a place of their own work, a directory each."""
        return self.state / "worktrees"

    @property
    def home(self) -> Path:
        """The checkout that keeps what its runs share: the root itself, or the one whose worktree it is."""
        parents = self.root.resolve().parents
        is_worktree = [p.name for p in parents[:2]] == ["worktrees", ".rlhf"]
        return parents[2] if is_worktree else self.root

    def run_dir(self, stage: str) -> Path:
        return self.state / "runs" / stage
