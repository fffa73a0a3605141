"""A program that votes: it knows how good answers are, and errs, hurries and favours a side as it is told.

It drives tests of the service and shows what reports look like. The same annotator gives the same value to
the same item shown in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from feedback.records import (
    Choice,
    Correction,
    Critique,
    Item,
    Label,
    Ranking,
    Ratings,
    TaskKind,
    Value,
)

Gold = Callable[[Item], Sequence[float]]  # how good each response is, 0 to 1
STRENGTHS = ((0.5, 3), (0.2, 2))  # the least gap of scores for much better, and for better


@dataclass(frozen=True)
class SimulatedAnnotator:
    """An annotator with known faults.

    A score is seen as gold + noise * G with standard Gumbel noise G, so of two answers the better one is
    chosen with probability sigmoid(gap / noise), as in Bradley and Terry's model, and a ranking follows
    Plackett and Luce's. For one answer, rated or labelled, the noise is normal.
    """

    id: str
    gold: Gold
    noise: float = 0.0  # on the scale of gold; 0: never errs
    position_bias: float = 0.0  # share of comparisons in which the first shown wins, whatever it says
    tie_gap: float = 0.0  # gaps of the seen scores up to this are ties
    bad_below: float = -math.inf  # two answers both seen below are bad
    characters_per_second: float = 15.0  # reading speed: 15 are some 150 words a minute
    seconds: float = 2.0  # beside reading
    criteria: tuple[str, ...] = ()  # of rating projects
    scale: int = 5
    write: Callable[[Item], str] | None = None  # critiques and corrections
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise < 0.0 or not 0.0 <= self.position_bias <= 1.0:
            raise ValueError(
                f"noise ({self.noise}) must be from 0 up, position_bias ({self.position_bias}) from 0 to 1"
            )
        if self.characters_per_second <= 0.0 or self.seconds < 0.0:
            raise ValueError(
                f"characters_per_second ({self.characters_per_second}) must be above 0, "
                f"seconds ({self.seconds}) from 0 up"
            )

    def vote(self, item: Item, sides: Sequence[int] = ()) -> Value:
        """What this annotator says of `item`; `sides[position]` is the response shown there.

        Without `sides` response 0 stands first. Raises ValueError when a text is asked for and there is no
        `write`, criteria are missing, or `gold` gives another number of scores than there are responses.
        """
        order = tuple(sides) or tuple(range(len(item.responses)))
        rng = random.Random(f"{self.seed}\0{self.id}\0{item.id}\0{order}")
        if item.kind in (TaskKind.CRITIQUE, TaskKind.CORRECTION):
            return self._text(item)
        scores = list(self.gold(item))
        if len(scores) != len(item.responses):
            raise ValueError(f"item {item.id}: {len(scores)} gold scores for {len(item.responses)} responses")
        if item.kind in (TaskKind.PAIRWISE, TaskKind.CHAT):
            return self._choice(scores, order, rng)
        if item.kind is TaskKind.RANKING:
            return self._ranking(scores, order, rng)
        if item.kind is TaskKind.LABEL:
            return Label(good=scores[0] + self.noise * rng.gauss(0.0, 1.0) >= 0.5)
        return self._ratings(item, scores[0], rng)

    def seconds_for(self, item: Item) -> float:
        """How long the vote takes: reading all answers, and the rest with a spread of a quarter."""
        rng = random.Random(f"{self.seed}\0{self.id}\0{item.id}\0seconds")
        reading = sum(len(response.text) for response in item.responses) / self.characters_per_second
        return round((reading + self.seconds) * rng.lognormvariate(0.0, 0.25), 3)

    def _seen(self, scores: Sequence[float], rng: random.Random) -> list[float]:
        """Scores with Gumbel noise; `random()` is below 1 but may be 0."""
        return [score - self.noise * math.log(-math.log(max(rng.random(), 1e-300))) for score in scores]

    def _choice(self, scores: Sequence[float], order: Sequence[int], rng: random.Random) -> Choice:
        if rng.random() < self.position_bias:
            return Choice(choice="b" if order[0] else "a", strength=1)
        first, second = self._seen(scores, rng)
        gap = first - second
        if max(first, second) < self.bad_below:
            return Choice(choice="bad")
        if abs(gap) <= self.tie_gap:
            return Choice(choice="tie")
        strength = next((strength for least, strength in STRENGTHS if abs(gap) >= least), 1)
        return Choice(choice="a" if gap > 0.0 else "b", strength=strength)

    def _ranking(self, scores: Sequence[float], order: Sequence[int], rng: random.Random) -> Ranking:
        """Answers not further apart than `tie_gap` from the next better one share its rank."""
        pulled = rng.random() < self.position_bias
        seen = self._seen(scores, rng)
        if pulled:
            seen[order[0]] = max(seen) + self.tie_gap + 1.0
        ranks, rank, last = [0] * len(seen), 0, math.inf
        for response in sorted(range(len(seen)), key=lambda i: (-seen[i], i)):
            rank += rank == 0 or last - seen[response] > self.tie_gap
            ranks[response], last = rank, seen[response]
        return Ranking(ranks=tuple(ranks))

    def _ratings(self, item: Item, score: float, rng: random.Random) -> Ratings:
        if not self.criteria:
            raise ValueError(f"item {item.id}: is to be rated, and {self.id} has no criteria")
        found = {}
        for name in self.criteria:
            seen = score + self.noise * rng.gauss(0.0, 1.0)
            found[name] = min(max(round(1 + seen * (self.scale - 1)), 1), self.scale)
        return Ratings(ratings=found)

    def _text(self, item: Item) -> Value:
        if self.write is None:
            raise ValueError(f"item {item.id}: wants a text, and {self.id} has no `write`")
        if item.kind is TaskKind.CRITIQUE:
            return Critique(text=self.write(item))
        return Correction(text=self.write(item))
