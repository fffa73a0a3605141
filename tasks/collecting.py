"""A collection of feedback from its plan to a filled queue.

Answers in work lie below .rlhf/collections until the queue is filled; all else is in the annotation service's
log (feedback/watching.py). However often it is broken off and begun again, no item is there twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from feedback.gathering import gather
from feedback.records import Item, Message, Project, Response, TaskKind
from feedback.store import Store
from feedback.watching import list_collections, open_collection
from rlhf_core.atomic import write_text
from rlhf_core.collecting.answers import Spec, read_answers
from rlhf_core.collecting.prompts import ASKED, askable, in_drawn_order
from rlhf_core.config import CollectConfig, Params
from rlhf_core.config.collect import SCORED
from rlhf_core.data.rows import SPLITS, read_rows
from rlhf_core.data.split import prompt_hash
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.json_lines import Row, lines_of
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import registered_model_dir
from tasks import products
from tasks.asking import SFT, Plan, Policy, make_plan, open_store
from tasks.processes import run_command
from tasks.stages import stage_environment
from tasks.workspace import held

PRODUCTION = "production"  # the project that holds what users asked, with their consent
RUN_NAME = "collect"
SPARE_FOR = 10  # asked prompts, for each of which one more is answered: not all have answers that differ
SIDES = {"train": "training prompts", "eval": "held-out prompts"}
NAMES = {TaskKind.PAIRWISE: "Which answer is better?", TaskKind.RANKING: "Order the answers"}
GUIDELINES = {
    TaskKind.PAIRWISE: "Read the message and both answers. Choose the one that you would rather get as a "
    "reply: it fits the message, is true, and is kind. Length alone is no merit. If you see no "
    "difference, say tie; if neither will do, say that both are bad.",
    TaskKind.RANKING: "Read the message and all answers. Put first the one that you would rather get as a "
    "reply: it fits the message, is true, and is kind. Length alone is no merit. Answers that are as "
    "good may share a rank.",
}


def collect(root: Path, params: Params, on_line: Callable[[str], None]) -> str:
    """Make the collection that `params` ask for, or take it up where it was broken off. Returns its id.

    Raises InputError when nothing can be asked, or a version, model or data cannot be had; RLHFError when
    answering fails.
    """
    with _alone(root, on_line), open_store(root) as store:
        plan = make_plan(root, params, store)
        if plan.is_open:
            on_line(f"{plan.id}: is open already; nothing new is asked")
        else:
            make_answers(root, plan, store, on_line)
            fill_queue(root, plan, store, on_line)
        shutil.rmtree(plan.place(root), ignore_errors=True)
    return plan.id


@contextlib.contextmanager
def _alone(root: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """One collection at a time is made in a checkout; who comes second waits."""
    home = Layout(root).home
    with held(home, "collections/lock", "another collection is being made here", on_wait):
        for left in (Layout(home).state / "collections").glob("*/models"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def make_answers(root: Path, plan: Plan, store: Store, on_line: Callable[[str], None]) -> None:
    """Let the policies answer in a process of its own; answers that are there from before are kept.

    Raises InputError when nothing can be asked, or a model or data cannot be had.
    """
    place = plan.place(root)
    if (place / "answers").is_dir():
        return
    place.mkdir(parents=True, exist_ok=True)
    models = place / "models"
    try:
        rows = _prompts(root, plan, store, models, on_line)
        write_text(place / "prompts.jsonl", lines_of(rows))
        _make_spec(root, plan, models).save(place / "spec.json")
        _run_answers(root, plan, on_line)
    finally:
        shutil.rmtree(models, ignore_errors=True)


def _prompts(root: Path, plan: Plan, store: Store, models: Path, on_line: Callable[[str], None]) -> list[Row]:
    """The prompts that are answered, in drawn order on each side of the split, with some to spare."""
    config = plan.params.collect
    from_users = config.choose == PRODUCTION
    rows = production_rows(store) if from_users else _prepared(root, plan, models)
    asked = set() if config.ask_again else asked_before(store, plan.id)
    kept, left_out = askable(rows, plan.params.data, asked, held_out=config.num_held_out > 0, raw=from_users)
    for reason, count in left_out.most_common():
        on_line(f"left out: {count} x {reason}")
    drawn = []
    for side, (wanted, answered) in sizes(config).items():
        own = in_drawn_order(kept[side], plan.draw)[:answered]
        if len(own) < wanted:
            on_line(f"{len(own)} {SIDES[side]} are there to ask, and {wanted} are wanted")
        drawn += [
            {name: row[name] for name in ("prompt", "messages", "source")} | {"held_out": side == "eval"}
            for row in own
        ]
    if not drawn:
        again = "; collect.ask_again asks them once more" if left_out[ASKED] else ""
        raise InputError(f"collect: none of {len(rows)} prompts may be asked{again}")
    return drawn


def sizes(config: CollectConfig) -> dict[str, tuple[int, int]]:
    """By side of the split, how many prompts are asked, and how many are answered for that."""
    asked = {"train": config.num_held_in, "eval": config.num_held_out}
    answered = {side: count + math.ceil(count / SPARE_FOR) for side, count in asked.items()}
    if config.choose in SCORED:
        answered["train"] = max(answered["train"], math.ceil(asked["train"] * config.oversample))
    return {side: (asked[side], answered[side]) for side in SPLITS}


def _prepared(root: Path, plan: Plan, models: Path) -> list[Row]:
    """The prompts that the version was made with, each with its `split`; the checkout's own where its tags
    name none."""
    md5 = plan.tags.get("dvc.data.prepared")
    if md5:
        what = f"data/prepared of version {plan.tags['version']}"
        data = products.fetch(Layout(root).home, md5, models / "prepared", what)
    else:
        data = Layout(root).prepared
    sides = SPLITS if plan.params.collect.num_held_out else ("train",)
    return [
        row | {"split": side} for side in sides for row in read_rows(data / "prompts" / f"{side}.parquet")
    ]


def production_rows(store: Store) -> list[Row]:
    """What users asked, with their consent. Raises InputError when there is no such project."""
    return [
        {
            "prompt": item.prompt,
            "messages": [message.model_dump() for message in item.messages],
            "source": PRODUCTION,
        }
        for item in gather(store, PRODUCTION).items
    ]


def asked_before(store: Store, besides: str = "") -> set[str]:
    """Hashes of the prompts of all collections, but for that named."""
    names = [one.id for one in list_collections(store) if one.id != besides]
    return {prompt_hash(item.prompt) for name in names for item in gather(store, name).items}


def _make_spec(root: Path, plan: Plan, models: Path) -> Spec:
    """Bring the models; those that DVC holds come by their md5."""
    home, config = Layout(root).home, plan.params.collect

    def by_md5(md5: str, what: str) -> Path:
        if not md5:
            raise InputError(
                f"{what} of version {plan.tags['version']}: the version has no tag dvc.models.{what}, so it "
                "cannot be found; register it by `rlhf run`"
            )
        return products.fetch(home, md5, models / what, f"models/{what} of version {plan.tags['version']}")

    def directory(policy: Policy) -> Path:
        if not policy.version:
            return by_md5(policy.md5, SFT)
        name = plan.params.flow.registered_model
        return registered_model_dir(f"models:/{name}/{policy.version}", root)

    reward = by_md5(plan.tags.get("dvc.models.reward", ""), "reward") if config.choose in SCORED else None
    return Spec(
        first=directory(plan.first),
        second=None if plan.alone else directory(plan.second),
        reward=reward,
        prompts=plan.place(root) / "prompts.jsonl",
        labels=(plan.first.label, plan.second.label),
        seed=config.sampling.seed + plan.number,
        key=plan.id,
        params=plan.params,
    )


def _run_answers(root: Path, plan: Plan, on_line: Callable[[str], None]) -> None:
    place, limit = plan.place(root), plan.params.collect.time_limit
    command = [sys.executable, "-m", "rlhf_core.collecting.answers"]
    done = run_command(
        [*command, str(place / "spec.json"), str(place / "answers")],
        cwd=root,
        env=stage_environment(root, plan.params),
        on_line=on_line,
        log_file=Layout(root).run_dir(RUN_NAME) / "output.log",
        time_limit=limit,
    )
    if done.timed_out:
        raise RLHFError(f"collect: answering was stopped after {limit} s (collect.time_limit)")
    if done.returncode == InputError.exit_code:
        raise InputError(done.tail.rpartition("error: ")[2])
    if done.returncode != 0:
        raise RLHFError(f"collect: answering ended with status {done.returncode}:\n{done.tail}")


def fill_queue(root: Path, plan: Plan, store: Store, on_line: Callable[[str], None]) -> int:
    """Put the answers before people and begin to wait, all or nothing. Returns how many items it has.

    Prompts that another collection has asked meanwhile are left out.
    """
    rows, facts = read_answers(plan.place(root) / "answers")
    config = plan.params.collect
    asked = set() if config.ask_again else asked_before(store, plan.id)
    kept = [row for row in rows if prompt_hash(row["prompt"]) not in asked]
    items = [make_item(plan, row) for row in kept]
    held_out = sum(row["held_out"] for row in kept)
    left = +Counter({"all answers the same": facts["num_same"], ASKED: len(rows) - len(kept)})
    project = Project(
        id=plan.id,
        name=f"{NAMES[plan.kind]} ({store.clock():%Y-%m-%d})",
        kind=plan.kind,
        guidelines=GUIDELINES[plan.kind],
        overlap_votes=config.overlap_votes,
        overlap_share=config.overlap_share,
        gold_share=config.gold_share,
        seed=plan.params.run.seed,
    )
    about = {
        "fingerprint": plan.fingerprint,
        "choose": config.choose,
        "how": facts["how"],
        "policies": [plan.first.label, plan.second.label],
        "wanted": config.num_prompts,
        "items": len(items),
        "held_out": held_out,
        "left_out": dict(left),  # of those answered, of which there are some to spare
    }
    for reason, count in left.items():
        on_line(f"left out: {count} x {reason}")
    hours, wanted = config.deadline_hours, config.votes_wanted
    open_collection(store, project, items, votes_wanted=wanted, deadline_hours=hours, about=about)
    on_line(
        f"{plan.id}: {len(items)} of {config.num_prompts} prompts are asked: "
        f"{len(items) - held_out} to learn from, {facts['how']}; {held_out} held out, drawn at random"
    )
    return len(items)


def make_item(plan: Plan, row: Row) -> Item:
    """The item's id hangs on collection and prompt alone, so nothing in it tells whose answers they are."""
    digest = hashlib.sha256(f"{plan.id} {prompt_hash(row['prompt'])}".encode()).hexdigest()
    return Item(
        id=f"{plan.id}-{digest[:16]}",
        project=plan.id,
        kind=plan.kind,
        messages=tuple(Message.model_validate(message) for message in row["messages"]),
        responses=tuple(Response.model_validate(response) for response in row["responses"]),
    )
