"""What a collection of feedback asks: whose answers, of which version's data, and under which id.

The id is made of what is asked: begun again after a crash, the same collection is taken up, and while one is
open, to ask the same again gives that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from feedback.errors import FeedbackError
from feedback.errors import InputError as FeedbackInputError
from feedback.records import TaskKind
from feedback.store import Store
from feedback.watching import list_collections
from rlhf_core.config import Params
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client, tracking_uri
from tasks.ledger import CANDIDATE, CHAMPION

DATABASE_VARIABLE = "RLHF_FEEDBACK_DB"
DATABASE = Path("feedback") / "feedback.db"  # below the state of the checkout, as `rlhf feedback` has it
SFT = "sft"
# Keys of section `collect` that change nothing of what is asked.
NOT_ASKED = ("watch_seconds", "time_limit", "batch_size")


@dataclass(frozen=True)
class Policy:
    """Who answers: a version of the registered policy, or (`version` empty) the SFT model with this md5."""

    label: str  # what its answers are called in the items, e.g. rlhf-policy/3
    version: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Plan:
    """What is asked, before any answer is made."""

    id: str  # of the project in the annotation service
    number: int  # collections that asked the same and ended
    first: Policy
    second: Policy
    tags: Mapping[str, str]  # of the version whose data, SFT model and reward model are used
    fingerprint: str
    params: Params
    is_open: bool = False  # its queue is filled, and it waits for votes

    @property
    def alone(self) -> bool:
        """Whether one policy gives all answers."""
        return self.first == self.second

    @property
    def kind(self) -> TaskKind:
        return TaskKind.PAIRWISE if self.params.collect.samples == 2 else TaskKind.RANKING

    @property
    def draw(self) -> str:
        """What the order of prompts hangs on."""
        return f"{self.params.run.seed}/{self.number}"

    def place(self, root: Path) -> Path:
        """Where answers are made and kept until the queue is filled."""
        return Layout(Layout(root).home).state / "collections" / self.id


def database(root: Path) -> str:
    """That of the annotation service: a URL, or a file of SQLite in the checkout."""
    return os.environ.get(DATABASE_VARIABLE) or str(Layout(Layout(root).home).state / DATABASE)


@contextlib.contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """The annotation service's store. What it refuses is raised as InputError, its trouble as RLHFError."""
    store = None
    try:
        store = Store(database(root))
        yield store
    except FeedbackInputError as error:
        raise InputError(str(error)) from None
    except FeedbackError as error:
        raise RLHFError(str(error)) from None
    finally:
        if store is not None:
            store.close()


def make_plan(root: Path, params: Params, store: Store) -> Plan:
    """Who answers, and under which id.

    Raises InputError for a version or alias that the registry does not have.
    """
    first, second, tags = policies(root, params)
    if params.collect.choose == "disagreement" and first == second:
        raise InputError(
            f"collect.choose = 'disagreement': collect.first ({params.collect.first}) and collect.second "
            f"({params.collect.second}) are both {first.label}, so nothing can differ"
        )
    fingerprint = _fingerprint(params, first, second, tags)
    same = [one for one in list_collections(store) if one.about.get("fingerprint") == fingerprint]
    ended = [one for one in same if not one.is_open]
    number = len(ended)
    digest = hashlib.sha256(f"{fingerprint} {number}".encode()).hexdigest()
    return Plan(
        f"collect-{digest[:10]}", number, first, second, tags, fingerprint, params, len(same) > number
    )


def policies(root: Path, params: Params) -> tuple[Policy, Policy, dict[str, str]]:
    """Both policies, and the tags of the version behind them: of the second, or of the first if that is SFT.

    Where there is no champion yet, the SFT model takes its place, as it does in a promotion.
    """
    client = open_client(root)
    name = params.flow.registered_model
    try:
        found = client.get_registered_model(name).aliases
    except MlflowException:
        raise InputError(
            f"{name}: no such registered model in {tracking_uri(root)}; `rlhf run` registers a candidate"
        ) from None
    aliases = {alias: str(version) for alias, version in found.items()}
    wanted = [_version(key, getattr(params.collect, key), aliases, name) for key in ("first", "second")]
    lead = wanted[1] or wanted[0] or aliases.get(CANDIDATE, "") or aliases.get(CHAMPION, "")
    if not lead:
        raise InputError(f"{name}: no version has the alias candidate or champion, so no SFT model is known")
    try:
        for version in filter(None, (*wanted, lead)):
            client.get_model_version(name, version)
        tags = dict(client.get_model_version(name, lead).tags)
    except MlflowException:
        raise InputError(f"{name}: there is no version {version} in {tracking_uri(root)}") from None
    sft = Policy(tags.get("sft_model", f"sft of {name}/{lead}"), md5=tags.get("dvc.models.sft", ""))
    first, second = (Policy(f"{name}/{version}", version) if version else sft for version in wanted)
    return first, second, tags | {"version": lead}


def _version(key: str, wanted: str, aliases: Mapping[str, str], name: str) -> str:
    """The version's number; empty for the SFT model."""
    if wanted == SFT or (wanted == CHAMPION and CHAMPION not in aliases):
        return ""
    if wanted.isdigit():
        return wanted
    if wanted not in aliases:
        raise InputError(f"collect.{key} = {wanted!r}: no version of {name} has this alias")
    return aliases[wanted]


def _fingerprint(params: Params, first: Policy, second: Policy, tags: Mapping[str, str]) -> str:
    """Equal for collections that ask the same: policies, the version behind them, and how it is asked."""
    asked = params.collect.model_dump(mode="json", exclude=set(NOT_ASKED))
    what = [first.label, second.label, tags["version"], asked, params.run.seed, params.data.eval_fraction]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
