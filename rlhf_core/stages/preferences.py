"""Stage `preferences`: the SFT model answers, a labeler scores, pairs are made and human pairs merged in."""

from __future__ import annotations

import gc
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params, PreferencesConfig
from rlhf_core.data.rows import TIE, is_tie, known, read_rows, write_rows
from rlhf_core.errors import InputError
from rlhf_core.generation import Generation, generate
from rlhf_core.labelers import make_labeler
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import load_policy
from rlhf_core.tracking import Tracker

Row = dict[str, Any]
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `chosen` is the one with the higher score."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float

    @property
    def gap(self) -> float:
        return self.chosen_score - self.rejected_score

    def probability(self, config: PreferencesConfig) -> float:
        """That the chosen answer is the better one; TIE where the gap is below `min_margin`."""
        if self.gap < config.min_margin or self.gap == 0.0:
            return TIE
        if config.label_temperature == 0.0:
            return 1.0
        return 1.0 / (1.0 + math.exp(-self.gap / config.label_temperature))


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.preferences
    prompts = {split: _choose_prompts(params, layout, split) for split in SPLITS}
    for split, context in (("train", "training"), ("eval", "evaluation")):
        tracker.dataset("prompts", layout.prepared_file("prompts", split), context)
    everything = [row for split in SPLITS for row in prompts[split]]
    # Made before the answers are: a labeler that cannot work should not cost a generation.
    labeler = make_labeler(config.labeler, config.labeler_target, params.run)
    answers = _answer(params, layout, everything, tracker)
    if not ranks.is_first():
        return {}  # one labels: a judge may cost money
    flat = [answer for group in answers for answer in group]
    asked = [row["prompt"] for row, group in zip(everything, answers, strict=True) for _ in group]
    scores = iter(labeler.score(asked, [answer.text for answer in flat]))
    scored = [[(answer.text, next(scores)) for answer in group] for group in answers]

    source = f"ai:{config.labeler}"
    metrics: dict[str, float] = {}
    outputs: dict[str, list[Row]] = {}
    cut = len(prompts["train"])
    for split, groups in (("train", scored[:cut]), ("eval", scored[cut:])):
        rows, counts = label(prompts[split], groups, config, source)
        rng = random.Random(f"{params.run.seed} {split}")
        if config.balance_length:
            counts["unbalanced"] = len(rows)
            rows = balance_length(rows, rng)
            counts["unbalanced"] -= len(rows)
        flip_labels(rows, config.label_noise, rng)
        human = read_rows(layout.prepared_file("preferences", split))
        human = human_rows(human, config.max_human_pairs, keep_ties=config.keep_ties)
        outputs[split] = rows + human
        metrics |= _split_metrics(split, len(prompts[split]), rows, human, counts)
        if not outputs[split]:
            raise InputError(
                f"preferences: no {split} pair: of {len(prompts[split])} prompts no two answers differ by "
                f"preferences.min_margin = {config.min_margin}, or preferences.balance_length dropped "
                f"{counts['unbalanced']}, and there are no human pairs"
            )
    with staged_dir(layout.preferences) as out:
        for split in SPLITS:
            write_rows(out / f"{split}.parquet", outputs[split], "preferences")
    tracker.table("preference_samples", _sample_table(outputs["train"]))
    return metrics | _answer_metrics(flat, scored)


def _choose_prompts(params: Params, layout: Layout, split: str) -> list[Row]:
    """As many prompts as asked for, or all; chosen by seed. Raises InputError when none is there."""
    path = layout.prepared_file("prompts", split)
    config = params.preferences
    wanted = config.num_prompts if split == "train" else config.num_eval_prompts
    rows = read_rows(path)
    if wanted and not rows:
        raise InputError(f"{path}: no {split} prompts; the preferences stage needs at least one")
    return choose(rows, wanted, params.run.seed)


def choose(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows, or all there are, drawn by seed."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def _answer(
    params: Params, layout: Layout, prompts: Sequence[Row], tracker: Tracker
) -> list[list[Generation]]:
    """The answers to each prompt; no model is opened for no prompts."""
    config = params.preferences
    if not prompts:
        return []
    model, tokenizer = load_policy(layout.model("sft"), params.run)
    own = generate(
        model,
        tokenizer,
        [row["messages"] for row in prompts],
        config.sampling,
        samples_per_prompt=config.responses_per_prompt,
        batch_size=config.batch_size,
        only=ranks.share(range(len(prompts))),
        on_progress=lambda done, total: tracker.progress(done, total, "prompts answered"),
    )
    del model
    gc.collect()  # a judge may need the memory
    return ranks.gather(own)


def label(
    prompts: Sequence[Row],
    scored: Sequence[Sequence[tuple[str, float]]],
    config: PreferencesConfig,
    source: str,
) -> tuple[list[Row], Counter[str]]:
    """Rows of the pairs kept, and counts of ties, blank answers and pairs to spare."""
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for prompt, answers in zip(prompts, scored, strict=True):
        counts["blank_answers"] += sum(not text for text, _ in answers)
        pairs = [(pair, pair.probability(config)) for pair in all_pairs(answers)]
        usable = [(pair, p) for pair, p in pairs if config.keep_ties or p > TIE]
        kept = usable[: config.pairs_per_prompt]
        counts["ties"] += sum(p == TIE for _, p in pairs)
        counts["spare"] += len(usable) - len(kept)
        rows += [_row(prompt, pair, p, source) for pair, p in kept]
    return rows, counts


def all_pairs(answers: Sequence[tuple[str, float]]) -> list[Pair]:
    """Every pair of distinct answers that are not blank, the widest gap first; else in the order sampled."""
    distinct: dict[str, float] = {}
    for text, score in answers:
        if text:
            distinct.setdefault(text, score)
    pairs = []
    for first, second in combinations(distinct.items(), 2):
        (chosen, high), (rejected, low) = (first, second) if first[1] >= second[1] else (second, first)
        pairs.append(Pair(chosen, rejected, high, low))
    return sorted(pairs, key=lambda pair: -pair.gap)


def _row(prompt: Row, pair: Pair, probability: float, source: str) -> Row:
    return {
        "prompt": prompt["prompt"],
        "messages": prompt["messages"],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "probability": probability,
        "margin": pair.gap,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "source": source,
        "row": prompt["row"],
    }


def balance_length(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Rows whose chosen answer is the longer one as often as the shorter one, whatever the gap in length.

    Ties are all kept: they teach that length does not matter.
    Among rows whose lengths differ by about as much (less than 20, 40, 80, ... characters) the side that is
    more frequent loses rows at random. Most labelers like length, and a reward model learns that first
    (Singhal et al. 2023, section 5.2, balance their data likewise).
    """
    bins: dict[int, tuple[list[int], list[int]]] = {}
    kept = set()
    for i, row in enumerate(rows):
        gap = len(row["chosen"]) - len(row["rejected"])
        if gap and not is_tie(row):
            bins.setdefault((abs(gap) // 20).bit_length(), ([], []))[gap > 0].append(i)
        else:
            kept.add(i)
    for shorter, longer in bins.values():
        count = min(len(shorter), len(longer))
        kept.update(rng.sample(shorter, count), rng.sample(longer, count))
    return [row for i, row in enumerate(rows) if i in kept]


def flip_labels(rows: Sequence[Row], share: float, rng: random.Random) -> None:
    """Swap the answers of `share` of the rows, as a labeler that errs would; margin stays what it claims."""
    for i in rng.sample(range(len(rows)), round(share * len(rows))):
        row = rows[i]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        row["chosen_score"], row["rejected_score"] = row["rejected_score"], row["chosen_score"]


def human_rows(rows: Sequence[Row], most: int, *, keep_ties: bool) -> list[Row]:
    """At most `most` human pairs, the highest margin first, then those without one."""
    usable = [row for row in rows if keep_ties or not is_tie(row)]
    chosen = sorted(usable, key=lambda row: -known(row["margin"], -math.inf))[:most]
    return [row | {"source": f"human:{row['source']}"} for row in chosen]


def _split_metrics(
    split: str, num_prompts: int, ai: Sequence[Row], human: Sequence[Row], counts: Counter[str]
) -> dict[str, float]:
    rows = [*ai, *human]
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    margins = [row["margin"] for row in ai]
    return {
        f"preferences/num_prompts_{split}": num_prompts,
        f"preferences/num_pairs_{split}": len(rows),
        f"preferences/num_ai_pairs_{split}": len(ai),
        f"preferences/num_human_pairs_{split}": len(human),
        f"preferences/num_flipped_{split}": sum(row["chosen_score"] < row["rejected_score"] for row in ai),
        f"preferences/num_ties_{split}": counts["ties"],
        f"preferences/num_spare_{split}": counts["spare"],
        f"preferences/num_unbalanced_{split}": counts["unbalanced"],
        f"preferences/num_blank_answers_{split}": counts["blank_answers"],
        f"preferences/margin_{split}": sum(margins) / len(margins) if margins else math.nan,
        f"preferences/longer_chosen_{split}": sum(longer) / len(longer) if longer else math.nan,
    }


def _answer_metrics(
    answers: Sequence[Generation], scored: Sequence[Sequence[tuple[str, float]]]
) -> dict[str, float]:
    if not answers:
        return {"preferences/num_answers": 0}
    scores = [score for group in scored for _, score in group]
    return {
        "preferences/num_answers": len(answers),
        "preferences/score": sum(scores) / len(scores),
        "preferences/eos_rate": sum(answer.finished for answer in answers) / len(answers),
        "preferences/response_length": sum(len(answer.token_ids) for answer in answers) / len(answers),
    }


def _sample_table(rows: Sequence[Row], most: int = 12) -> list[Row]:
    """Rows spread evenly over the file, so that human pairs are seen too."""
    step = max(1, len(rows) // most)
    names = ("prompt", "chosen", "rejected", "margin", "source")
    return [{name: row[name] for name in names} for row in rows[::step][:most]]
