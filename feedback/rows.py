"""From votes to rows of data: preferences, demonstrations, labels, critiques.

`group` is a hash of the prompt's messages, so all rows of one prompt, as the pairs of a ranking, share it,
and a split by prompt never tears a group. The same answers and votes give the same rows whatever the order
of items and votes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from feedback.collection import Collection
from feedback.consensus import Method, Shares, adjudication_queue, consensus, leading, mean, mean_strength
from feedback.records import Correction, Critique, Item, Project, Response, TaskKind
from feedback.units import Unit, parts

Row = dict[str, Any]
COMPARED = (TaskKind.PAIRWISE, TaskKind.CHAT, TaskKind.RANKING)
GRADED = (TaskKind.RATING, TaskKind.LABEL)
TIE = 0.5


class RowRules(BaseModel):
    """How votes become rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consensus: Method = "majority"
    min_votes: int = Field(default=1, ge=1)  # items with fewer give no row, unless an adjudicator decided
    ties: Literal["keep", "drop", "soften"] = "keep"
    # keep: a tie is a row of probability 0.5. drop: it is none. soften: the probability of every pair is the
    # share of the votes for the chosen answer, each tie half a vote for both.
    disputed: Literal["keep", "drop"] = "keep"  # items that wait for an adjudicator
    include_gold: bool = False  # items with a known answer: tests of annotators, shown more often
    min_margin: float = Field(default=1.0, gt=0.0)  # between ratings of two answers that make a pair
    # Of a rating's criteria; 1 where absent.
    criteria_weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    pseudonym_key: str = ""  # without one, whoever knows an id can find its pseudonym


@dataclass
class Rows:
    """Rows by kind of file, and how many items gave none, by reason."""

    preferences: list[Row] = field(default_factory=list)
    demonstrations: list[Row] = field(default_factory=list)
    labels: list[Row] = field(default_factory=list)
    critiques: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def files(self) -> dict[str, list[Row]]:
        names = ("preferences", "demonstrations", "labels", "critiques")
        return {f"{name}.jsonl": sorted(getattr(self, name), key=canonical) for name in names}


@dataclass(frozen=True)
class Verdict:
    """What the votes say of answer `first` against answer `second`."""

    shares: Shares  # of a, b, tie, bad
    counts: Counter[str]  # votes
    strength: float  # mean, positive for first
    decided: bool


def canonical(row: Any) -> str:
    """One text for one value: keys sorted, no spaces, UTF-8. Raises ValueError for NaN."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def pseudonym(annotator: str, key: str) -> str:
    """The name of an annotator in data sets: the same in each that is made with the same key."""
    digest = hmac.new(f"annotator:{key}".encode(), annotator.encode(), hashlib.sha256)
    return f"annotator-{digest.hexdigest()[:12]}"


def group_of(item: Item) -> str:
    """The same for two items exactly when their prompts are the same."""
    turns = [[message.role, message.content] for message in item.messages]
    return f"prompt-{hashlib.sha256(canonical(turns).encode()).hexdigest()[:16]}"


def make_rows(collection: Collection, rules: RowRules | None = None) -> Rows:
    """The rows that the votes which count give.

    Raises ValueError when items of one `group` have different prompts: a split by prompt would tear it.
    """
    rules = rules or RowRules()
    check_groups(collection)
    _check_weights(collection.project, rules)
    counted = collection.counted()
    disputed = {dispute.item for dispute in adjudication_queue(counted)}
    found, usable = Rows(), []
    for item in counted.items:
        reason = _not_usable(item, counted, rules, item.id in disputed)
        if reason:
            found.left_out[reason] += 1
        else:
            usable.append(item)
    kind = counted.project.kind
    if kind in COMPARED:
        _compare(usable, counted, rules, found)
    elif kind in GRADED:
        _grade(usable, counted, rules, found)
    else:
        _texts(usable, counted, rules, found)
    return found


def check_groups(collection: Collection) -> None:
    """Raises ValueError when items of one `group` have different prompts."""
    first: dict[str, Item] = {}
    for item in collection.items:
        other = first.setdefault(item.group, item) if item.group else item
        if group_of(other) != group_of(item):
            raise ValueError(
                f"item {item.id}: group {item.group!r} holds item {other.id} too, whose prompt differs; "
                "items of a group must have one prompt, or a split by prompt would tear the group"
            )


def _check_weights(project: Project, rules: RowRules) -> None:
    weights = rules.criteria_weights
    unknown = sorted(set(weights) - set(project.criteria))
    if unknown:
        raise ValueError(f"criteria_weights: {unknown} must be of the criteria {list(project.criteria)}")
    if project.criteria and not any(weights.get(name, 1.0) for name in project.criteria):
        raise ValueError(f"criteria_weights: {weights} must leave one criterion a weight above 0")


def _not_usable(item: Item, counted: Collection, rules: RowRules, disputed: bool) -> str:
    if item.gold is not None and not rules.include_gold:
        return "gold item"
    if item.id not in counted.decided:
        if len(counted.by_item.get(item.id, ())) < rules.min_votes:
            return "too few votes"
        if disputed and rules.disputed == "drop":
            return "waits for an adjudicator"
    if not item.messages or not all(response.text.strip() for response in item.responses):
        return "no text"
    return ""


def _compare(items: list[Item], counted: Collection, rules: RowRules, found: Rows) -> None:
    shares = consensus(counted, rules.consensus)
    for item in items:
        before = len(found.preferences)
        for first, second in combinations(range(len(item.responses)), 2):
            part = f"{first}:{second}" if item.kind is TaskKind.RANKING else "choice"
            verdict = _verdict(item, part, shares, counted)
            row = _preference(item, (first, second), verdict, rules)
            if row is not None:
                found.preferences.append(row | _who(item, counted, rules))
        if len(found.preferences) == before:
            found.left_out["no answer is preferred"] += 1


def _verdict(item: Item, part: str, shares: dict[Unit, Shares], counted: Collection) -> Verdict:
    votes = counted.by_item.get(item.id, ())
    counts = Counter(str(parts(vote.value)[part]) for vote in votes)
    strength = 0.0 if item.kind is TaskKind.RANKING else mean_strength(counted, item.id)
    return Verdict(shares[Unit(item.id, part)], counts, strength, item.id in counted.decided)


def _preference(item: Item, pair: tuple[int, int], verdict: Verdict, rules: RowRules) -> Row | None:
    """The row of one pair of answers; None where a tie is dropped, both answers are bad, or one text."""
    compared: Shares = {name: verdict.shares.get(name, 0.0) for name in ("a", "b", "tie")}
    total = sum(compared.values())
    same = item.responses[pair[0]].text == item.responses[pair[1]].text
    if same or leading(verdict.shares) == "bad" or total == 0.0:
        return None
    # Thirds do not add up exactly; a tie must not hang on the last bit.
    probability = round((compared["a"] + TIE * compared["tie"]) / total, 9)
    if rules.ties != "soften":
        probability = {"a": 1.0, "b": 0.0}.get(str(leading(compared)), TIE)
    if probability == TIE and rules.ties == "drop":
        return None
    swapped = probability < TIE
    chosen, rejected = pair[::-1] if swapped else pair
    row = _pair_row(item, item.responses[chosen], item.responses[rejected])
    row["probability"] = round(1.0 - probability if swapped else probability, 6)
    row["votes"] = _vote_counts(verdict.counts, swapped)
    row["adjudicated"] = verdict.decided
    if item.kind is not TaskKind.RANKING:
        # Against a majority of weak votes a few strong ones can win the mean; the margin is never negative.
        row["margin"] = round(max(0.0, -verdict.strength if swapped else verdict.strength), 6)
        if row["probability"] == TIE:
            row["margin"] = 0.0
    return row


def _vote_counts(counts: Counter[str], swapped: bool) -> dict[str, int]:
    chosen, rejected = ("b", "a") if swapped else ("a", "b")
    names = {"chosen": chosen, "rejected": rejected, "tie": "tie", "bad": "bad"}
    return {name: counts[label] for name, label in names.items()}


def _pair_row(item: Item, chosen: Response, rejected: Response) -> Row:
    return _prompt(item) | {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "policies": {"chosen": chosen.policy, "rejected": rejected.policy},
        "decoding": {"chosen": chosen.decoding, "rejected": rejected.decoding},
    }


def _prompt(item: Item) -> Row:
    return {
        "prompt": item.prompt,
        "messages": [message.model_dump() for message in item.messages],
        "group": group_of(item),
        "project": item.project,
    }


def _who(item: Item, counted: Collection, rules: RowRules) -> Row:
    """Item, annotators and time of the last vote or decision."""
    votes = counted.by_item.get(item.id, ())
    decision = counted.decided.get(item.id)
    people = {vote.annotator for vote in votes} | ({decision.annotator} if decision else set())
    times = [vote.at for vote in votes] + ([decision.at] if decision else [])
    return {
        "items": [item.id],
        "annotators": sorted(pseudonym(person, rules.pseudonym_key) for person in people),
        "at": utc(max(times)),
    }


def utc(at: datetime) -> str:
    """One text for one moment, whatever its time zone."""
    return at.astimezone(UTC).isoformat()


def _grade(items: list[Item], counted: Collection, rules: RowRules, found: Rows) -> None:
    """Ratings and labels: a row for each answer that has a label, and pairs of answers to one prompt."""
    shares: dict[str, dict[str, Shares]] = {}
    for unit, found_shares in consensus(counted, rules.consensus).items():
        shares.setdefault(unit.item, {})[unit.part] = found_shares
    by_prompt: dict[str, list[tuple[float, Item]]] = {}
    for item in items:
        score = _score(item, shares[item.id], rules)
        by_prompt.setdefault(group_of(item), []).append((score, item))
        if item.kind is TaskKind.LABEL:
            found.labels.append(_label_row(item, score, counted) | _who(item, counted, rules))
    for graded in by_prompt.values():
        paired: set[str] = set()
        for pair in _graded_pairs(graded, rules):
            found.preferences.append(_graded_row(pair, counted, rules))
            paired |= {item.id for _, item in pair}
        found.left_out["no other answer far enough in score"] += sum(
            item.id not in paired for _, item in graded
        )
    found.left_out += Counter()  # forget zeros


def _score(item: Item, shares: dict[str, Shares], rules: RowRules) -> float:
    """The weighted mean of an answer's criteria; of a label the share of "good"."""
    if item.kind is TaskKind.LABEL:
        return shares["label"].get("good", 0.0)
    weights = {name: rules.criteria_weights.get(name, 1.0) for name in shares}
    return sum(weights[name] * mean(shares[name]) for name in shares) / sum(weights.values())


def _graded_pairs(
    graded: list[tuple[float, Item]], rules: RowRules
) -> Iterator[tuple[tuple[float, Item], tuple[float, Item]]]:
    """Answers whose scores differ enough, the better one first. Of labels good against bad ones."""
    ordered = sorted(graded, key=lambda pair: (-pair[0], pair[1].id))
    for better, worse in combinations(ordered, 2):
        if better[1].kind is TaskKind.LABEL:
            far = worse[0] < TIE < better[0]
        else:
            far = better[0] - worse[0] >= rules.min_margin
        if far and better[1].responses[0].text != worse[1].responses[0].text:
            yield better, worse


def _graded_row(
    pair: tuple[tuple[float, Item], tuple[float, Item]], counted: Collection, rules: RowRules
) -> Row:
    (high, better), (low, worse) = pair
    row = _pair_row(better, better.responses[0], worse.responses[0])
    who = [_who(item, counted, rules) for item in (better, worse)]
    sides = {"chosen": better, "rejected": worse}
    return row | {
        "margin": round(high - low, 6),
        "probability": 1.0,
        "chosen_score": round(high, 6),
        "rejected_score": round(low, 6),
        "votes": {side: len(counted.by_item.get(item.id, ())) for side, item in sides.items()},
        "adjudicated": any(item.id in counted.decided for item in sides.values()),
        "items": [better.id, worse.id],
        "annotators": sorted({name for one in who for name in one["annotators"]}),
        "at": max(one["at"] for one in who),
    }


def _label_row(item: Item, score: float, counted: Collection) -> Row:
    counts = Counter("good" if vote.value.good else "bad" for vote in counted.by_item.get(item.id, ()))  # type: ignore[union-attr]
    return _prompt(item) | {
        "completion": item.responses[0].text,
        "label": score > TIE,
        "probability": round(score, 6),
        "votes": {"good": counts["good"], "bad": counts["bad"]},
        "policy": item.responses[0].policy,
        "decoding": item.responses[0].decoding,
        "adjudicated": item.id in counted.decided,
    }


def _texts(items: list[Item], counted: Collection, rules: RowRules, found: Rows) -> None:
    """Critiques and corrections: every text that people wrote, the adjudicator's alone where there is one."""
    for item in items:
        decision = counted.decided.get(item.id)
        answers: Mapping[str, Any] = {
            answer.annotator: answer
            for answer in ([decision] if decision else counted.by_item.get(item.id, ()))
        }
        for annotator, answer in answers.items():
            about = {
                "items": [item.id],
                "annotators": [pseudonym(annotator, rules.pseudonym_key)],
                "at": utc(answer.at),
                "adjudicated": decision is not None,
            }
            original = item.responses[0] if item.responses else Response()
            about |= {"policy": original.policy, "decoding": original.decoding}
            if isinstance(answer.value, Correction):
                texts = {"response": answer.value.text, "corrects": original.text}
                found.demonstrations.append(_prompt(item) | texts | about)
            elif isinstance(answer.value, Critique):
                texts = {"response": original.text, "critique": answer.value.text}
                found.critiques.append(_prompt(item) | texts | about)
