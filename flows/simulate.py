"""`rlhf simulate`: collect, vote, retrain, promote, round after round, with programs in the place of people.

Each step is the command that a team would give, in a checkout of its own. Run again after it was broken off,
it goes on at the step that was not done.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from feedback.simulate import SimulatedAnnotator
from flows import own_server

if "--collect" in sys.argv:
    own_server.prepare(apart=True)

from flows.shell import told_in_the_shell
from rlhf_core.config import Params, load_params
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from tasks import retraining, simulation, simulation_report
from tasks.network import HOST, answers, free_port
from tasks.processes import end_tree
from tasks.simulation import Round, Simulation
from tasks.workspace import check_workspace, exclusive

FIRST_PORT = 8700
START_SECONDS = 60.0
GATE_FAILED = 3  # status of `rlhf promote`

Say = Callable[[str], None]


def run_rounds(found: Simulation, rounds: int, say: Say) -> None:
    """Everything up to round `rounds`, from where it was broken off."""
    params = load_params(Layout(found.checkout).params)
    first = found.round(0)
    if not first.done:
        make_first(found, first, params, say)
    for number in range(1, rounds + 1):
        this = found.round(number)
        if not this.done:
            say(f"round {number} of {rounds}")
            run_round(found, this, params, say)


def make_first(found: Simulation, this: Round, params: Params, say: Say) -> None:
    """A first version, as `rlhf run` makes it, so that there is an SFT model to collect answers of."""
    with timed(this, "train"):
        this.registered = simulation.newest_version(found.checkout)
        if not this.registered:
            updates = f"ppo.num_updates={params.simulate.first_updates}"
            simulation.run_step(found, "0-train", ["flows.run", "--isolated", "-S", updates], say)
            this.registered = simulation.newest_version(found.checkout)
    this.measured = simulation.measured_of(found.checkout, this.registered)
    found.save()


def run_round(found: Simulation, this: Round, params: Params, say: Say) -> None:
    """One round; the state is written after each step."""
    if not this.project:
        with timed(this, "collect"):
            this.project = collect(found, this, say)
        found.save()
    if not this.event:
        with timed(this, "vote"):
            this.votes, this.event = vote(found, this, params, say)
        found.save()
    if not this.registered:
        with timed(this, "retrain"):
            this.registered = retrain(found, this, say)
        found.save()
    if not this.verdict:
        with timed(this, "promote"):
            this.verdict = promote(found, this, say)
        this.champion = simulation.champion_of(found.checkout)
        simulation.check_same_sft(found.checkout, found.rounds[0].registered, this.registered)
        this.measured = simulation.measured_of(found.checkout, this.registered)
        found.save()


def collect(found: Simulation, this: Round, say: Say) -> str:
    """The id of the project that `collect_feedback` has filled."""
    told = found.directory / "collected.json"
    told.unlink(missing_ok=True)
    simulation.run_step(found, f"{this.number}-collect", ["flows.simulate", "--collect", str(told)], say)
    return str(json.loads(told.read_text(encoding="utf-8")))


def vote(found: Simulation, this: Round, params: Params, say: Say) -> tuple[int, int]:
    """Let the simulated annotators vote until nothing is left; votes in all, and the log's last event."""
    from feedback.history import last_event, votes_at
    from feedback.visiting import Visitor
    from feedback.watching import close_collection, settle

    with served(found) as url, retraining.open_votes(found.checkout) as store:
        people = [Visitor(url, name, accounts(store, name), person) for name, person in annotators(params)]
        try:
            with ThreadPoolExecutor(len(people)) as pool:
                counts = list(pool.map(lambda visitor: visitor.vote_on_all(this.project), people))
        except ValueError as error:
            raise RLHFError(f"a simulated annotator could not vote: {error}") from error
        finally:
            for visitor in people:
                visitor.close()
        if settle(store, this.project).is_open:  # something was flagged or skipped: it ends all the same
            close_collection(store, "system", this.project)
        number = last_event(store)
        total = votes_at(store, number, 0).num_votes
    say(f"{sum(counts)} votes by {len(counts)} simulated annotators, {total} in all")
    return total, number


def accounts(store, name: str) -> str:
    """A new secret for the account `name`, which is made when it is not there."""
    from feedback.accounts import add_annotator, list_annotators, new_secret

    secret = secrets.token_urlsafe(16)
    known = {person.name: person.id for person in list_annotators(store)}
    if name in known:
        return new_secret(store, known[name], secret)
    return add_annotator(store, "system", name, secret=secret)[1]


def annotators(params: Params) -> Iterator[tuple[str, SimulatedAnnotator]]:
    """Names and simulated people; what they like is the gold judge, from 0 to 1."""
    from rlhf_core.labelers import make_labeler

    config, judge = params.simulate, params.evaluate
    labeler = make_labeler(judge.gold, judge.gold_target, params.run)

    def gold(item) -> list[float]:
        texts = [response.text for response in item.responses]
        return [(score + 1.0) / 2.0 for score in labeler.score([item.prompt] * len(texts), texts)]

    for number in range(config.annotators):
        name = f"simulated-{number}"
        yield (
            name,
            SimulatedAnnotator(
                id=name,
                gold=gold,
                noise=config.noise,
                position_bias=config.position_bias,
                tie_gap=config.tie_gap,
                characters_per_second=config.characters_per_second,
                seconds=config.seconds,
                seed=config.seed,
            ),
        )


@contextmanager
def served(found: Simulation) -> Iterator[str]:
    """The annotation service for the block, on a free port of loopback; its address."""
    port = free_port(FIRST_PORT + secrets.randbelow(1000))
    process = simulation.serve(found, port)
    url = f"http://{HOST}:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RLHFError(f"the annotation service did not start: {found.directory}/logs/feedback.log")
            time.sleep(0.2)
        yield url
    finally:
        end_tree(process)


def retrain(found: Simulation, this: Round, say: Say) -> str:
    """The version that is trained on all votes up to this round's."""
    version = simulation.version_trained_to(found.checkout, this.event)
    if not version:
        words = ["flows.retrain", "-S", "retrain.min_votes=1"]
        simulation.run_step(found, f"{this.number}-retrain", words, say)
        version = simulation.version_trained_to(found.checkout, this.event)
    if not version:
        raise RLHFError(f"round {this.number}: nothing was trained on the votes up to event {this.event}")
    return version


def promote(found: Simulation, this: Round, say: Say) -> str:
    """The verdict of the gate on this round's version; where it holds, the version is the champion."""
    tags = simulation.tags_of(found.checkout, this.registered)
    if not (tags.get("gate.verdict") == "fail" or tags.get("promotion.decision")):
        words = ["flows.promote", "--version", this.registered, "--approval", "auto"]
        simulation.run_step(found, f"{this.number}-promote", words, say, ok=(0, GATE_FAILED))
        tags = simulation.tags_of(found.checkout, this.registered)
    return tags["gate.verdict"]


@contextmanager
def timed(this: Round, step: str) -> Iterator[None]:
    """Add the block's seconds to those of the step; a step that was broken off counts with its last try."""
    started = time.monotonic()
    yield
    this.seconds[step] = round(time.monotonic() - started, 1)


def collect_here(told: Path) -> None:
    """Run the flow `collect_feedback` in this directory, and write down which project it filled."""
    from flows.collect_feedback import collect_feedback
    from rlhf_core.atomic import write_text

    write_text(told, json.dumps(collect_feedback()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rlhf simulate", description="The whole loop without people.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="default")
    parser.add_argument("--profile", default="")
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    parser.add_argument("--collect", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    home = Path.cwd().resolve()
    with told_in_the_shell():
        if options.collect:
            collect_here(options.collect)
            return
        check_workspace(home)
        simulation.forget_settings()
        directory = Layout(home).state / "simulations" / options.name
        with exclusive(directory):
            found = simulation.open_simulation(home, options.name, options.profile, options.overrides)
            run_rounds(found, options.rounds, lambda line: print(line, flush=True))
        simulation_report.show(found, home, options.name)


if __name__ == "__main__":
    main()
