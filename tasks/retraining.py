"""A retraining: what is new since the last one, the data set made of it, and the values that train on it.

How far votes have been used stands in the registry, as a tag of the version that was trained on them, set
when everything else of the retraining is done. A retraining that dies before has used nothing: the next one
takes the same votes, and what DVC has computed already. No vote can count twice either, since a data set is
always made of all votes up to an event, and not added to.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow.exceptions import MlflowException

from feedback.cli import DATABASE
from feedback.dataset import DEMONSTRATIONS, PREFERENCES, Blend, DataSet, make_dataset, read_manifest
from feedback.errors import FeedbackError
from feedback.history import Votes, last_event, store_id, votes_at
from feedback.rows import RowRules
from feedback.snapshot import SnapshotConfig
from feedback.store import Store
from rlhf_core.config import Params
from rlhf_core.data.formats import RowError, to_rows
from rlhf_core.data.rows import TIE
from rlhf_core.data.sources import read_source
from rlhf_core.data.split import normalise, order_key, split_of
from rlhf_core.errors import InputError
from rlhf_core.json_lines import Row, read_lines
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client, tracking_uri
from rlhf_core.stages.prepare import fault
from tasks import products, worktrees
from tasks.ledger import CHAMPION
from tasks.workspace import held

DATABASE_VARIABLE, KEY_VARIABLE = "RLHF_FEEDBACK_DB", "RLHF_PSEUDONYM_KEY"
STORE, USED_TO = "feedback.store", "feedback.used_to"  # tags of a version
FEEDBACK = Path("data") / "feedback"
CHAMPION_DIR = Path("models") / "champion"
HELD_OUT_SPARE = 4  # times sft.num_eval_rows: held-out demonstrations kept beside corrections
SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Champion:
    """The champion, and the content of its weights in DVC's cache."""

    version: str
    md5: str


def database_of(home: Path) -> str:
    """The store of votes: that of RLHF_FEEDBACK_DB, or the checkout's."""
    return os.environ.get(DATABASE_VARIABLE) or str(home / DATABASE)


@contextlib.contextmanager
def open_votes(home: Path) -> Iterator[Store]:
    """The store, as errors of this package. Raises InputError where there is none."""
    database = database_of(home)
    if "://" not in database and not Path(database).is_file():
        raise InputError(
            f"{database}: no votes have been collected here; `rlhf feedback serve` collects them"
        )
    try:
        store = Store(database)
        try:
            yield store
        finally:
            store.close()
    except FeedbackError as error:
        raise InputError(str(error)) from None


def read_votes(home: Path, params: Params) -> Votes:
    """Everything said up to now, and what of it no version has been trained on yet."""
    with open_votes(home) as store:
        number = last_event(store)
        return votes_at(store, number, used_to(home, params, store_id(store)))


def used_to(home: Path, params: Params, store: str) -> int:
    """The event up to which a finished retraining has used the votes of `store`; 0 where there was none."""
    found = [
        int(tags[USED_TO])
        for tags in version_tags(home, params.flow.registered_model)
        if tags.get(STORE) == store and tags.get(USED_TO, "").isdecimal()
    ]
    return max(found, default=0)


def version_tags(home: Path, name: str) -> Iterator[Mapping[str, str]]:
    """The tags of every version of a registered model."""
    client, token = open_client(home), None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        for version in page:
            yield dict(version.tags)
        token = page.token
        if not token:
            return


def mark_used(home: Path, params: Params, registered: str, manifest: Mapping[str, Any]) -> None:
    """Say on the version which votes it has used up. The last thing that a retraining does."""
    name, version = params.flow.registered_model, version_of(registered)
    client = open_client(home)
    client.set_model_version_tag(name, version, STORE, manifest["store"])
    client.set_model_version_tag(name, version, USED_TO, str(manifest["last_event"]))


def version_of(registered: str) -> str:
    """The number in what `register_policy` returns."""
    return registered.rpartition("(version ")[2].rstrip(")")


def too_few(votes: Votes, params: Params) -> str:
    """Why nothing is trained; empty when there is enough."""
    wanted, found = params.retrain.min_votes, len(votes.new)
    if found >= wanted:
        return ""
    since = f"since event {votes.since}" if votes.since else "in all"
    return f"{found} new votes {since}, and retrain.min_votes is {wanted}: nothing to train"


def one_at_a_time(
    home: Path, *, wait: bool, say: Callable[[str], None] = print
) -> contextlib.AbstractContextManager[None]:
    """Hold the checkout's retraining. With `wait`, until who holds it is done; else raises BusyError."""
    return held(home, "retrain.lock", "a retraining is going on", say if wait else None)


def snapshot_config(params: Params) -> SnapshotConfig:
    config = params.retrain
    rules = RowRules(
        consensus=config.consensus,
        ties=config.ties,
        disputed=config.disputed,
        min_votes=config.min_votes_per_item,
        pseudonym_key=os.environ.get(KEY_VARIABLE, ""),
    )
    return SnapshotConfig(license=config.license, consent=config.consent, rules=rules)


def blend_of(params: Params) -> Blend:
    config = params.retrain
    return Blend(
        new=config.new_weight,
        old=config.old_weight,
        base=config.base_weight,
        half_life_days=config.half_life_days or None,
        num_rows=config.num_rows or None,
        seed=params.run.seed,
    )


def build(root: Path, params: Params, votes: Votes) -> DataSet:
    """The data set of `votes`. Raises InputError for votes or sources of which none can be made."""
    base = usable_rows(root, params, "preferences") if params.retrain.base_weight else []
    try:
        found = make_dataset(votes, snapshot_config(params), blend_of(params), base)
        if not found.corrections:
            return found
        filling = fill_up(usable_rows(root, params, "demonstrations"), found.corrections, params)
        return make_dataset(votes, snapshot_config(params), blend_of(params), base, filling)
    except ValueError as error:
        raise InputError(f"feedback up to event {votes.number}: {error}") from None


def usable_rows(root: Path, params: Params, kind: str) -> list[Row]:
    """The rows of the configured sources of `kind` that `prepare` would keep, in an order by content."""
    texts = {"preferences": ("chosen", "rejected"), "demonstrations": ("response",)}[kind]
    found: dict[tuple[str, ...], Row] = {}
    for source in getattr(params.data, kind):
        for raw in read_source(source, kind, root):
            try:
                rows = to_rows(raw.values, kind)
            except RowError:
                continue  # prepare puts it into the quarantine file
            for row in rows:
                if fault(row, kind, params.data) is None:
                    own = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
                    found.setdefault((normalise(row["prompt"]), *(row[name] for name in texts)), own)
    return sorted(found.values(), key=lambda row: order_key(row["prompt"], "\0".join(row[t] for t in texts)))


def fill_up(rows: Sequence[Row], corrections: Sequence[Row], params: Params) -> list[Row]:
    """So many of `rows` that SFT learns every correction: `sft.num_rows` in all, and a choice to test on.

    SFT draws its rows from all there are, and would meet few corrections among thousands of other rows.
    """
    learnt = sum(split_of(row["prompt"], params.data.eval_fraction) == "train" for row in corrections)
    room = {
        "train": max(0, params.sft.num_rows - learnt),
        "eval": HELD_OUT_SPARE * params.sft.num_eval_rows,
    }
    kept = []
    for row in rows:
        split = split_of(row["prompt"], params.data.eval_fraction)
        if room[split]:
            room[split] -= 1
            kept.append({name: row[name] for name in ("prompt", "messages", "response")})
    return kept


def write_dataset(place: worktrees.RunPlace, data: DataSet) -> None:
    """Put the data set into the run's worktree, under DVC, and commit its version on the run's branch."""
    data.write(place.root / FEEDBACK)
    track(place, FEEDBACK)
    worktrees.record(place, f"Feedback {data.version}, up to event {data.manifest['last_event']}")


def track(place: worktrees.RunPlace, path: Path) -> str:
    """`dvc add`; the md5 that DVC knows the directory by."""
    worktrees.dvc(place.root, "add", "-q", str(path))
    return md5_of(place.root, path)


def md5_of(root: Path, path: Path) -> str:
    """The content of a directory under `dvc add`; empty where it is not."""
    file = root / f"{path}.dvc"
    if not file.is_file():
        return ""
    return str(yaml.safe_load(file.read_text(encoding="utf-8"))["outs"][0]["md5"])


def dataset_in(root: Path) -> dict[str, Any] | None:
    """The manifest of the data set that a run has made already, where it is whole and under DVC."""
    return read_manifest(root / FEEDBACK) if md5_of(root, FEEDBACK) else None


def find_champion(home: Path, params: Params) -> Champion | None:
    """Raises InputError for a champion whose weights DVC does not know."""
    name = params.flow.registered_model
    client = open_client(home)
    try:
        found = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None
    md5 = found.tags.get("dvc.models.policy", "")
    if not md5:
        raise InputError(
            f"{name} version {found.version}, the champion in {tracking_uri(home)}, has no tag "
            "dvc.models.policy, so PPO cannot start from it; set retrain.start to sft"
        )
    return Champion(str(found.version), md5)


def bring_champion(place: worktrees.RunPlace, champion: Champion) -> None:
    """Its weights at models/champion, under DVC, where stage `ppo` depends on them."""
    if md5_of(place.root, CHAMPION_DIR) == champion.md5:
        return
    what = f"the champion, version {champion.version}"
    products.fetch(Layout(place.root).home, champion.md5, place.root / CHAMPION_DIR, what)
    found = track(place, CHAMPION_DIR)
    if found != champion.md5:
        raise InputError(f"{what}: its files have md5 {found}, and its version says {champion.md5}")


def values_for(
    params: Params, root: Path, manifest: Mapping[str, Any] | None, champion: Champion | None
) -> dict[str, Any]:
    """What of params.yaml a retraining sets by itself; `manifest` is that of data/feedback in `root`."""
    values: dict[str, Any] = {"ppo.start": "champion" if champion else "sft"}
    if manifest is None:  # the AI labeler alone
        return values | {"preferences.max_human_pairs": 0}
    directory = FEEDBACK / manifest["version"]
    pairs = read_lines(root / directory / PREFERENCES)
    values |= {
        "data.preferences": [str(directory / PREFERENCES)],
        "data.max_preferences": max(params.data.max_preferences, len(pairs)),
        "preferences.max_human_pairs": len(pairs),
    }
    if (root / directory / DEMONSTRATIONS).is_file():
        values["data.demonstrations"] = [str(directory / DEMONSTRATIONS)]
        count = len(read_lines(root / directory / DEMONSTRATIONS))
        values["data.max_demonstrations"] = max(params.data.max_demonstrations, count)
    if params.retrain.labels == "human":
        values["preferences.num_prompts"] = 0
        decided = [row for row in pairs if row.get("probability") != TIE]  # ties are no part of an accuracy
        held_out = sum(split_of(row["prompt"], params.data.eval_fraction) == "eval" for row in decided)
        if held_out >= max(1, params.retrain.min_held_out):
            values["preferences.num_eval_prompts"] = 0
    return values


def lineage(
    params: Params, root: Path, manifest: Mapping[str, Any] | None, champion: Champion | None
) -> dict[str, str]:
    """What the candidate's version says of its retraining, beside what every run says.

    `dvc.PATH` is the md5 of what is not an output of a stage; `rlhf gc` keeps what a version names so.
    """
    tags = {
        "retrain.labels": params.retrain.labels,
        "retrain.start": "champion" if champion else "sft",
        "retrain.champion": champion.version if champion else "",
    }
    if champion:
        tags["dvc.models.champion"] = champion.md5
    if manifest is not None:
        tags |= {
            "feedback.last_event": str(manifest["last_event"]),
            "feedback.since_event": str(manifest["since_event"]),
            "feedback.votes": str(manifest["votes"]),
            "feedback.new_votes": str(manifest["new_votes"]),
            "feedback.version": manifest["version"],
            "dvc.data.feedback": md5_of(root, FEEDBACK),
        }
    return tags
