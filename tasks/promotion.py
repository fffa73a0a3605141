"""A promotion from its beginning to its verdict: what is compared, how it is recorded and found again.

Its record is a run of MLflow, named `promote`: state, candidate, opponent, verdict and decision as tags, the
scorecard and every comparison as artifacts below `promotion/`. Nothing of it lives in a process, so a
promotion waits for days and through restarts, and goes on from any machine on the same store. Decisions are
made in tasks/decisions.py.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from rlhf_core.config import Params, flatten
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import experiment_id, open_client, registered_model_dir, tracking_uri
from rlhf_core.promotion import scorecard
from rlhf_core.promotion.duel import Spec, outcomes_of, read_duel
from rlhf_core.promotion.verdict import Verdict, decide
from tasks import products
from tasks.ledger import CANDIDATE, CHAMPION, Ledger
from tasks.processes import run_command
from tasks.stages import stage_environment

RUN_NAME = "promote"
ARTIFACTS = "promotion"
STATE = "promotion.state"
COMPARING, PENDING, FAILED = "comparing", "pending", "failed"
PROMOTED, REJECTED, LOST, ROLLED_BACK = "promoted", "rejected", "lost", "rollback"
SFT = "SFT"


@dataclass(frozen=True)
class Promotion:
    """One promotion as its run says."""

    run_id: str
    name: str  # of the registered model
    tags: Mapping[str, str]

    @property
    def short_id(self) -> str:
        return self.run_id[:8]

    @property
    def state(self) -> str:
        return self.tags[STATE]

    @property
    def candidate(self) -> str:
        return self.tags["promotion.candidate"]

    @property
    def opponent(self) -> str:
        """The champion's version; empty where the candidate met its SFT model."""
        return self.tags["promotion.opponent"]

    @property
    def outcome(self) -> str:
        return self.tags.get("gate.verdict", "")

    @property
    def title(self) -> str:
        other = f"champion {self.opponent}" if self.opponent else "its SFT model"
        return f"{self.name} version {self.candidate} against {other}"


def open_promotion(root: Path, params: Params, version: str, origin: Mapping[str, str]) -> Promotion:
    """Begin a promotion of `version`, or of the one with alias `candidate` when that is empty.

    A flow run that is started again (`prefect.flow_run` in `origin`) goes on with the promotion it began.
    Raises InputError when there is no such version, or when it is the champion already.
    """
    client = open_client(root)
    name = params.flow.registered_model
    if begun := begun_by(root, name, origin.get("prefect.flow_run", "")):
        return begun
    ledger = Ledger(client, name)
    try:
        standing, aliases = ledger.settle(), ledger.aliases()
    except MlflowException:
        raise InputError(
            f"{name}: no such registered model in {tracking_uri(root)}; `rlhf run` registers a candidate"
        ) from None
    candidate = version or aliases.get(CANDIDATE, "")
    if not candidate:
        raise InputError(f"{name}: no version has the alias candidate; name one with --version")
    try:
        client.get_model_version(name, candidate)
    except MlflowException:
        raise InputError(f"{name}: there is no version {candidate} in {tracking_uri(root)}") from None
    champion = aliases.get(CHAMPION, "")
    if champion == candidate:
        raise InputError(f"{name}: version {candidate} is the champion already")
    tags = {
        STATE: COMPARING,
        "promotion.model": name,
        "promotion.candidate": candidate,
        "promotion.opponent": champion,
        "promotion.head": str(standing.head),
        **origin,
    }
    run = client.create_run(experiment_id(client, root), run_name=RUN_NAME, tags=tags)
    client.set_model_version_tag(name, candidate, "gate.run", run.info.run_id)
    return Promotion(run.info.run_id, name, tags)


def compare(root: Path, params: Params, promotion: Promotion, on_line: Callable[[str], None]) -> Promotion:
    """Let candidate and opponent answer anew, and write verdict and scorecard; the state after that.

    A promotion that has its verdict keeps it. Raises RLHFError when the comparison fails.
    """
    if promotion.state != COMPARING:
        return promotion
    client = open_client(root)
    client.update_run(promotion.run_id, status="RUNNING")
    tags = client.get_model_version(promotion.name, promotion.candidate).tags
    place = Layout(root).state / "promotions" / promotion.run_id
    try:
        spec = make_spec(root, params, promotion, tags, place)
        _run_duel(root, params, spec, place, on_line)
        verdict = _conclude(root, promotion, spec, place / "duel", proxy_reason(client, params, tags))
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        client.set_terminated(promotion.run_id, status)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    on_line(f"{promotion.title}: {verdict.outcome}")
    return read(root, promotion.run_id)


def make_spec(root: Path, params: Params, promotion: Promotion, tags: Mapping[str, str], place: Path) -> Spec:
    """Bring everything that the comparison reads; models and data that DVC holds come by their md5."""
    home = Layout(root).home

    def by_md5(output: str) -> Path:
        key = f"dvc.{output.replace('/', '.')}"
        if not tags.get(key):
            raise InputError(
                f"{promotion.name} version {promotion.candidate}: has no tag {key}, so the {output} it "
                "was made with cannot be found; register it by `rlhf run`"
            )
        return products.fetch(home, tags[key], place / output, f"{output} of version {promotion.candidate}")

    def policy(version: str) -> Path:
        return registered_model_dir(f"models:/{promotion.name}/{version}", root)

    sft = by_md5("models/sft")
    return Spec(
        candidate=policy(promotion.candidate),
        opponent=policy(promotion.opponent) if promotion.opponent else sft,
        sft=sft,
        data=by_md5("data/prepared"),
        params=params,
        reward_accuracy=_number(tags.get("reward.accuracy", "")),
        reward_model=_judging_reward_model(root, params, tags, place),
    )


def _judging_reward_model(root: Path, params: Params, tags: Mapping[str, str], place: Path) -> Path | None:
    """Where a reward model that judges was put; None where something else judges."""
    if params.promotion.judge != "reward_model":
        return None
    md5 = _judge_md5(open_client(root), params, tags)
    return products.fetch(
        Layout(root).home, md5, place / "judge", "the reward model of promotion.judge_target"
    )


def _judge_md5(client: Any, params: Params, tags: Mapping[str, str]) -> str:
    """md5 of the reward model that judges. Raises InputError for a version that is not registered."""
    version = params.promotion.judge_target
    if not version:
        return tags.get("dvc.models.reward", "")
    name = f"{params.flow.registered_model}-reward"
    try:
        return client.get_model_version(name, version).tags["dvc.md5"]
    except (MlflowException, KeyError):
        raise InputError(f"promotion.judge_target = {version!r}: {name} has no such version") from None


def proxy_reason(client: Any, params: Params, tags: Mapping[str, str]) -> str:
    """Why the judge says no more than what was optimised; empty when it is another one.

    Compared are contents: the md5 of the reward model, and the function that added to its scores.
    """
    config = params.promotion
    if config.judge == "reward_model" and _judge_md5(client, params, tags) == tags.get("dvc.models.reward"):
        return "proxy only: the judge is the reward model that the candidate was optimised against"
    if config.judge == "function" and config.judge_target == tags.get("ppo.reward_function"):
        return "proxy only: the judge is the function that the candidate was optimised against"
    return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _run_duel(root: Path, params: Params, spec: Spec, place: Path, on_line: Callable[[str], None]) -> None:
    """In a process of its own: when it ends, so does its hold on memory and GPU."""
    file = place / "spec.json"
    spec.save(file)
    limit = params.promotion.time_limit
    done = run_command(
        [sys.executable, "-m", "rlhf_core.promotion.duel", str(file), str(place / "duel")],
        cwd=root,
        env=stage_environment(root, params),
        on_line=on_line,
        log_file=Layout(root).run_dir(RUN_NAME) / "output.log",
        time_limit=limit,
    )
    if done.timed_out:
        raise RLHFError(f"promote: the comparison was stopped after {limit} s (promotion.time_limit)")
    if done.returncode == InputError.exit_code:
        raise InputError(f"promote: {done.tail.rpartition('error: ')[2]}")
    if done.returncode != 0:
        raise RLHFError(f"promote: the comparison ended with status {done.returncode}:\n{done.tail}")


def _conclude(root: Path, promotion: Promotion, spec: Spec, results: Path, proxy: str) -> Verdict:
    """Verdict and scorecard from the stored comparisons; artifacts first, the state last."""
    rows, measurements, facts = read_duel(results)
    config = spec.params.promotion
    verdict = decide(outcomes_of(rows), measurements, config, proxy)
    card = make_card(promotion, spec.params, verdict, rows)
    report = verdict.as_dict() | facts | {"candidate": promotion.candidate, "opponent": promotion.opponent}
    report |= {"judge": card.judge, "confidence": config.confidence}
    (results / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (results / "scorecard.html").write_text(scorecard.html(card), encoding="utf-8")
    (results / "scorecard.md").write_text(scorecard.markdown(card), encoding="utf-8")
    client = open_client(root)
    client.log_artifacts(promotion.run_id, str(results), ARTIFACTS)
    metrics = [Metric(k, v, _now_ms(), 0) for k, v in verdict.metrics().items() if math.isfinite(v)]
    values = dict(flatten(config.model_dump(mode="json"), "promotion."))
    client.log_batch(
        promotion.run_id, metrics=metrics, params=[Param(k, str(v)[:500]) for k, v in values.items()]
    )
    said = {
        "gate.verdict": verdict.outcome,
        "gate.judge": card.judge,
        "gate.win_rate": f"{verdict.gate.win_rate:.4f}",
        "gate.win_rate_low": f"{verdict.gate.low:.4f}",
        "gate.opponent": promotion.opponent or SFT,
        "gate.reasons": "; ".join(verdict.reasons)[:4000],
        "gate.prompts": facts["prompts_sha256"],
        "gate.run": promotion.run_id,
        "gate.time": now(),
    }
    for key, value in said.items():
        client.set_model_version_tag(promotion.name, promotion.candidate, key, value)
    state = FAILED if verdict.outcome == "fail" else PENDING
    client.log_batch(promotion.run_id, tags=[RunTag(k, v) for k, v in (said | {STATE: state}).items()])
    client.set_terminated(promotion.run_id, "FINISHED")
    return verdict


def make_card(
    promotion: Promotion, params: Params, verdict: Verdict, rows: list[dict[str, Any]]
) -> scorecard.Card:
    config = params.promotion
    sampling = config.sampling
    target = f" {config.judge_target}" if config.judge_target else ""
    pairs = ", which sees both answers" if config.compare == "pairs" else ""
    return scorecard.Card(
        candidate=f"{promotion.name} version {promotion.candidate}",
        opponent=f"champion {promotion.opponent}" if promotion.opponent else "its SFT model",
        judge=f"{config.judge}{target}{pairs}",
        decoding=f"temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens",
        confidence=config.confidence,
        verdict=verdict,
        rows=rows,
        num_samples=config.num_samples,
    )


def read(root: Path, run_id: str) -> Promotion:
    return _promotion(open_client(root).get_run(run_id))


def _promotion(run: Any) -> Promotion:
    tags = dict(run.data.tags)
    return Promotion(run.info.run_id, tags["promotion.model"], tags)


def begun_by(root: Path, name: str, flow_run_id: str) -> Promotion | None:
    """The promotion that a flow run of Prefect began."""
    if not flow_run_id:
        return None
    client = open_client(root)
    wanted = (
        f"tags.`promotion.model` = '{name}' and tags.`prefect.flow_run` = '{flow_run_id}' "
        f"and tags.`{STATE}` != '{ROLLED_BACK}'"
    )
    found = client.search_runs([experiment_id(client, root)], wanted, max_results=1)
    return _promotion(found[0]) if found else None


def promotions(root: Path, name: str, state: str = "") -> list[Promotion]:
    """Promotions of a registered model, newest first; of one state only, if that is given."""
    client = open_client(root)
    wanted = f"tags.`promotion.model` = '{name}' and tags.`{STATE}` != '{ROLLED_BACK}'"
    if state:
        wanted += f" and tags.`{STATE}` = '{state}'"
    runs = client.search_runs(
        [experiment_id(client, root)], wanted, max_results=200, order_by=["attributes.start_time DESC"]
    )
    return [_promotion(run) for run in runs]


def find_waiting(root: Path, name: str, part: str, states: Sequence[str] = (PENDING,)) -> Promotion:
    """The promotion in one of `states` whose id begins with `part`; an empty `part` finds the only one.

    Raises InputError when there is none, or more than one.
    """
    waiting = [p for state in states for p in promotions(root, name, state)]
    found = [p for p in waiting if p.run_id.startswith(part)]
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {p.short_id}  {p.title}: {p.outcome}" for p in waiting) or "  none"
    if not found and part:
        raise InputError(f"promotion {part!r}: none that waits has this id; waiting are\n{listed}")
    if not found:
        raise InputError("no promotion waits for a decision; `rlhf promote` begins one")
    raise InputError(f"promotion {part!r}: several wait; name one by its id\n{listed}")


def scorecard_text(root: Path, run_id: str) -> str:
    """scorecard.md of a promotion."""
    with tempfile.TemporaryDirectory() as directory:
        path = open_client(root).download_artifacts(run_id, f"{ARTIFACTS}/scorecard.md", directory)
        return Path(path).read_text(encoding="utf-8")


def scorecard_place(root: Path, run_id: str) -> str:
    """Where the page lies: a path for a store on this machine, else the artifact's address."""
    uri = f"{open_client(root).get_run(run_id).info.artifact_uri}/{ARTIFACTS}/scorecard.html"
    return uri.removeprefix("file://")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
