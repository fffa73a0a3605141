"""Two policies answer the same prompts, and the prompts that tell most are chosen.

`python -m rlhf_core.collecting.answers SPEC OUT` reads a `Spec` and fills the directory OUT, whole or not at
all: answers.jsonl (a line a prompt that is asked) and facts.json. It is a process of its own, so that waiting
for people afterwards holds no memory of a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_core.atomic import staged_dir
from rlhf_core.collecting import choosing
from rlhf_core.collecting.prompts import drawn_key
from rlhf_core.config import Params, SamplingConfig, parse_params
from rlhf_core.config.collect import SCORED
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.evaluation.results import rounded
from rlhf_core.generation import generate
from rlhf_core.json_lines import Row, lines_of, read_lines
from rlhf_core.modeling.loading import check_model_dir, load_policy

ANSWERS, FACTS = "answers.jsonl", "facts.json"


@dataclass(frozen=True)
class Spec:
    """What is answered, by whom; `second` is None where one policy gives all answers."""

    first: Path
    second: Path | None
    reward: Path | None  # only where it chooses
    prompts: Path  # JSON lines with prompt, messages, source, held_out
    labels: tuple[str, str]  # what the answers of each policy are called in the items
    seed: int
    key: str  # of the collection; the order of answers and prompts hangs on it
    params: Params

    def save(self, path: Path) -> None:
        tree = asdict(self) | {"params": self.params.model_dump(mode="json", by_alias=True)}
        tree |= {name: str(getattr(self, name) or "") for name in ("first", "second", "reward", "prompts")}
        path.write_text(json.dumps(tree), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Spec:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            first=Path(tree["first"]),
            second=Path(tree["second"]) if tree["second"] else None,
            reward=Path(tree["reward"]) if tree["reward"] else None,
            prompts=Path(tree["prompts"]),
            labels=(tree["labels"][0], tree["labels"][1]),
            seed=tree["seed"],
            key=tree["key"],
            params=parse_params(tree["params"], str(path)),
        )

    def sampling(self, side: int) -> SamplingConfig:
        """Of the first policy (0) and the second (1).

        Each draws random numbers of its own: with the same, policies that are near each other give many
        answers that are the same. Where disagreement is sought both draw the same, so that what differs is
        the policies.
        """
        config = self.params.collect
        own = 0 if config.choose == "disagreement" else side
        return config.sampling.model_copy(update={"seed": 2 * self.seed + own})

    @property
    def shares(self) -> tuple[int, int]:
        """How many answers to a prompt each policy gives: half each, an odd one more by the first."""
        samples = self.params.collect.samples
        return (samples, 0) if self.second is None else (samples - samples // 2, samples // 2)


def answer(spec: Spec, out: Path) -> None:
    """Answer all prompts of `spec`, choose among them, and fill the directory `out`.

    Raises InputError for a model that is missing, and when no prompt has two answers that differ.
    """
    for directory in filter(None, (spec.first, spec.second, spec.reward)):
        check_model_dir(directory)
    prompts = read_lines(spec.prompts)
    answers = _all_answers(spec, [row["messages"] for row in prompts])
    rows = [row | {"responses": own} for row, own in zip(prompts, answers, strict=True)]
    differing = [row for row in rows if len({response["text"] for response in row["responses"]}) > 1]
    if not differing:
        raise InputError(f"collect: all {len(rows)} prompts have answers that are the same; nothing to ask")
    picked, how = _pick(spec, differing)
    facts = {"how": how, "num_answered": len(rows), "num_same": len(rows) - len(differing)}
    picked.sort(key=lambda row: drawn_key(spec.key, row["prompt"]))
    with staged_dir(out) as directory:
        text = lines_of(_in_order(row, spec.key) for row in picked)
        (directory / ANSWERS).write_text(text, encoding="utf-8")
        (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_answers(directory: Path) -> tuple[list[Row], Row]:
    """What `answer` wrote: rows in the order in which they are asked, and facts about the choice."""
    facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return read_lines(directory / ANSWERS), facts


def _all_answers(spec: Spec, conversations: list[list[dict[str, str]]]) -> list[list[Row]]:
    """By prompt, the answers of the first policy and then those of the second."""
    found: list[list[Row]] = [[] for _ in conversations]
    for side, directory in enumerate((spec.first, spec.second)):
        if directory is None:
            continue
        label, samples, sampling = spec.labels[side], spec.shares[side], spec.sampling(side)
        print(f"{label}: {samples} answers to each of {len(conversations)} prompts", flush=True)
        model, tokenizer = load_policy(directory, spec.params.run)
        groups = generate(
            model,
            tokenizer,
            conversations,
            sampling,
            samples_per_prompt=samples,
            batch_size=spec.params.collect.batch_size,
        )
        for own, group in zip(found, groups, strict=True):
            own += [
                {"text": made.text, "policy": label, "decoding": sampling.model_dump() | {"sample": i}}
                for i, made in enumerate(group)
            ]
        del model
        gc.collect()
    return found


def _pick(spec: Spec, rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows that are asked, each with what it was chosen by, and how those were chosen that teach.

    Held-out ones are taken as they were drawn: an accuracy on prompts that were chosen by the scores of a
    reward model would not be that on prompts as they come.
    """
    held_in = [row for row in rows if not row["held_out"]]
    held_out = [row for row in rows if row["held_out"]]
    chosen = _choose(spec, held_in)
    drawn = choosing.choose_drawn(len(held_out), spec.params.collect.num_held_out)
    picked = [
        own[place] | {"chosen_by": rounded(value)}
        for own, found in ((held_in, chosen), (held_out, drawn))
        for place, value in zip(found.places, found.values, strict=True)
    ]
    return picked, chosen.how


def _choose(spec: Spec, rows: Sequence[Row]) -> choosing.Chosen:
    config = spec.params.collect
    if config.choose not in SCORED or not rows:
        return choosing.choose_drawn(len(rows), config.num_held_in)
    scores = _scores(spec, rows)
    if config.choose == "uncertain":
        return choosing.choose_uncertain(scores, config.num_held_in)
    is_first = [place < spec.shares[0] for place in range(config.samples)]
    return choosing.choose_disagreement(scores, is_first, config.num_held_in)


def _scores(spec: Spec, rows: Sequence[Row]) -> list[list[list[float]]]:
    """What each member of the reward model says of each answer: by prompt, member, answer."""
    from rlhf_core.modeling.reward import load_reward_model

    if spec.reward is None:
        raise InputError(f"collect.choose = {spec.params.collect.choose!r}: needs a reward model")
    print(f"scores of {len(rows)} prompts", flush=True)
    asked = [(row["messages"], response["text"]) for row in rows for response in row["responses"]]
    scorer = load_reward_model(spec.reward, spec.params.run)
    found = scorer.member_scores([messages for messages, _ in asked], [text for _, text in asked])
    samples = spec.params.collect.samples
    return [part.tolist() for part in found.split(samples, dim=1)]


def _in_order(row: Row, key: str) -> Row:
    """The answers in an order that says nothing of who gave them."""
    answers = list(enumerate(row["responses"]))
    answers.sort(key=lambda numbered: drawn_key(key, f"{row['prompt']} {numbered[0]}"))
    return row | {"responses": [response for _, response in answers]}


def main() -> None:
    spec, out = (Path(argument) for argument in sys.argv[1:3])
    try:
        answer(Spec.load(spec), out)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
