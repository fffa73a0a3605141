"""A place in which the whole loop runs apart from everything of the user's, and what its rounds came to.

A clone of the checkout at its last commit, with `params.yaml` as it lies in the checkout: own votes, own
registry, own DVC cache, no remote. What a round has reached stands in state.json; what a step left behind
without saying so (it was killed) is found in the stores, so no step is done twice that counts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_core.atomic import write_text
from rlhf_core.cli import QUIET
from rlhf_core.config import change_params, load_params, parse_overrides, profile_values
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client
from rlhf_core.parent_death import die_with_parent
from tasks import retraining, worktrees
from tasks.ledger import CHAMPION, Ledger
from tasks.processes import run_command

OURS = ("PREFECT_", "MLFLOW_", "RLHF_")  # settings of whoever starts the simulation
STEP_SECONDS = 6 * 3600.0
METRICS = {
    "eval/win_rate_over_sft": "win_rate",
    "eval/win_rate_over_sft_low": "win_rate_low",
    "eval/win_rate_over_sft_high": "win_rate_high",
    "eval/gold_policy": "gold",
    "eval/gold_sft": "gold_sft",
    "eval/kl": "kl",
    "reward/accuracy": "reward_accuracy",
    "reward/accuracy_low": "reward_accuracy_low",
    "reward/accuracy_high": "reward_accuracy_high",
    "reward/num_eval_pairs": "reward_eval_pairs",
}


@dataclass
class Round:
    """What a round has reached; round 0 is the first version, whose SFT model all rounds are held against."""

    number: int
    project: str = ""
    votes: int = 0  # in all projects, when this round had voted
    event: int = 0  # of the log, when this round had voted
    registered: str = ""  # version
    verdict: str = ""  # of the gate
    champion: str = ""  # version, after this round
    measured: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by step

    @property
    def done(self) -> bool:
        return bool(self.measured) and (self.number == 0 or bool(self.verdict))


@dataclass
class Simulation:
    """The directory of one simulation, and its rounds."""

    directory: Path
    asked: dict[str, Any]  # what it was begun with: another profile would be another simulation
    rounds: list[Round] = field(default_factory=list)

    @property
    def checkout(self) -> Path:
        return self.directory / "checkout"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    def save(self) -> None:
        facts = {"asked": self.asked, "rounds": [asdict(one) for one in self.rounds]}
        write_text(self.state, json.dumps(facts, indent=2) + "\n")

    def round(self, number: int) -> Round:
        """The round of that number, begun when it was not."""
        while len(self.rounds) <= number:
            self.rounds.append(Round(len(self.rounds)))
        return self.rounds[number]


def open_simulation(home: Path, name: str, profile: str, overrides: Sequence[str]) -> Simulation:
    """Take up the simulation NAME, or begin it.

    Raises InputError for values that are not valid, and for a simulation that was begun with other ones.
    """
    directory = Layout(home).state / "simulations" / name
    asked = {"profile": profile, "overrides": list(overrides)}
    found = Simulation(directory, asked)
    if found.state.is_file():
        known = json.loads(found.state.read_text(encoding="utf-8"))
        if known["asked"] != asked:
            raise InputError(
                f"{directory}: was begun with {known['asked']}, and not with {asked}; give another "
                "--name, or delete the directory"
            )
        found.rounds = [Round(**one) for one in known["rounds"]]
        return found
    make_checkout(home, found.checkout, profile, overrides)
    found.save()
    return found


def make_checkout(home: Path, checkout: Path, profile: str, overrides: Sequence[str]) -> None:
    """Clone `home`, put the values into params.yaml, and commit them; whole, or made again."""
    values = (profile_values(profile, home) if profile else {}) | parse_overrides(overrides)
    shutil.rmtree(checkout, ignore_errors=True)
    checkout.parent.mkdir(parents=True, exist_ok=True)
    worktrees.git(home, "clone", "-q", "--no-hardlinks", str(home), str(checkout))
    shutil.copyfile(Layout(home).params, Layout(checkout).params)
    change_params(Layout(checkout).params, values)
    forget_remotes(checkout)
    worktrees.git(checkout, "add", "-A")
    worktrees.git(
        checkout, *worktrees.NOBODY, "commit", "-q", "--no-verify", "--allow-empty", "-m", "Simulate"
    )


def forget_remotes(checkout: Path) -> None:
    """Nothing of a simulation is sent anywhere, nor kept twice."""
    from dvc.config import Config

    with Config(str(checkout / ".dvc"), validate=False).edit("repo") as config:
        config["remote"] = {}
        config.get("core", {}).pop("remote", None)


def forget_settings() -> None:
    """From now on, in this process, no setting leads to the user's stores and servers."""
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(QUIET)


def environment(checkout: Path) -> dict[str, str]:
    """Of a step: the checkout's own code. Settings that lead elsewhere were forgotten."""
    return dict(os.environ) | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}


def run_step(
    simulation: Simulation,
    step: str,
    words: Sequence[str],
    say: Callable[[str], None],
    ok: Sequence[int] = (0,),
) -> int:
    """Run `python -m WORDS` in the simulation's checkout; its status. Raises RLHFError for another one."""
    log = simulation.directory / "logs" / f"{step}.log"
    done = run_command(
        [sys.executable, "-m", *words],
        cwd=simulation.checkout,
        env=environment(simulation.checkout),
        on_line=say,
        log_file=log,
        time_limit=STEP_SECONDS,
    )
    if done.timed_out or done.returncode not in ok:
        raise RLHFError(f"{step}: ended with status {done.returncode} ({log}):\n{done.tail[-1500:]}")
    return done.returncode


def serve(simulation: Simulation, port: int) -> subprocess.Popen[bytes]:
    """The annotation service on the simulation's votes; it ends with this process."""
    log = simulation.directory / "logs" / "feedback.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "feedback.cli", "serve", "--port", str(port)],
            cwd=simulation.checkout,
            env=environment(simulation.checkout),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )


def version_trained_to(checkout: Path, event: int) -> str:
    """The version that has used the votes up to `event` and no later ones of ours; empty where none has."""
    name = load_params(Layout(checkout).params).flow.registered_model
    found = [
        (int(one.tags[retraining.USED_TO]), str(one.version))
        for one in _versions(checkout, name)
        if int(one.tags.get(retraining.USED_TO, 0)) >= event
    ]
    return min(found, default=(0, ""))[1]


def newest_version(checkout: Path) -> str:
    """The version registered last; empty where there is none."""
    name = load_params(Layout(checkout).params).flow.registered_model
    return max((str(found.version) for found in _versions(checkout, name)), key=int, default="")


def _versions(checkout: Path, name: str) -> list[Any]:
    return list(open_client(checkout).search_model_versions(f"name='{name}'", max_results=1000))


def tags_of(checkout: Path, version: str) -> dict[str, str]:
    name = load_params(Layout(checkout).params).flow.registered_model
    return dict(open_client(checkout).get_model_version(name, version).tags)


def champion_of(checkout: Path) -> str:
    """The champion's version; empty where there is none."""
    name = load_params(Layout(checkout).params).flow.registered_model
    return Ledger(open_client(checkout), name).aliases().get(CHAMPION, "")


def measured_of(checkout: Path, version: str) -> dict[str, float]:
    """What the run that made `version` measured, by the names of a round."""
    run = open_client(checkout).get_run(tags_of(checkout, version)["mlflow.parent_run"])
    found = {ours: run.data.metrics[name] for name, ours in METRICS.items() if name in run.data.metrics}
    if "win_rate" not in found:
        raise RLHFError(f"version {version}: its run has no eval/win_rate_over_sft")
    return found


def check_same_sft(checkout: Path, first: str, version: str) -> None:
    """Raises RLHFError unless both versions were measured against the same SFT model, byte for byte."""
    ours, theirs = (tags_of(checkout, one).get("dvc.models.sft", "") for one in (version, first))
    if not ours or ours != theirs:
        raise RLHFError(
            f"version {version} was held against the SFT model {ours or 'unknown'}, and version {first} "
            f"against {theirs or 'unknown'}: their win rates do not compare"
        )


def champions(rounds: Sequence[Round]) -> list[Mapping[str, float]]:
    """What the champion after each round had measured; that of the SFT model itself where there is none.

    Against itself the SFT model would win one half and be at KL 0.
    """
    by_version = {one.registered: one.measured for one in rounds[1:]}
    sft = {"win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5, "kl": 0.0}
    sft["gold"] = rounds[0].measured["gold_sft"]
    return [by_version[one.champion] if one.champion else sft for one in rounds]
