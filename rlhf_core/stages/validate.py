"""Stage `validate`: run the suites over the prepared data; a critical failure ends the pipeline here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params
from rlhf_core.data.rows import KINDS, SPLITS, read_rows
from rlhf_core.data.split import normalise
from rlhf_core.errors import DataRejected
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import check_model_dir, load_tokenizer
from rlhf_core.tracking import Tracker
from rlhf_core.validation.columns import CountTokens, derive, tokens_by_file
from rlhf_core.validation.expectations import Outcome, check
from rlhf_core.validation.html import count_states, render, state
from rlhf_core.validation.suites import Rule, suite

SHOWN_ROWS = 5


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    count_tokens = token_counter(layout.model("base"))
    rows = {(k, s): read_rows(layout.prepared_file(k, s)) for k in KINDS for s in SPLITS}
    prompts = {s: {normalise(r["prompt"]) for k in KINDS for r in rows[k, s]} for s in SPLITS}
    results: dict[str, list[Outcome]] = {}
    total = len(rows)
    for done, ((kind, split), found) in enumerate(rows.items()):
        tracker.progress(done, total, f"{kind}/{split}")
        if not found and kind == "preferences":
            continue  # human preferences are optional
        frame = derive(found, kind, count_tokens, prompts["eval" if split == "train" else "train"])
        results[f"{kind}/{split}"] = check(frame, suite(kind, split, params.validate_), f"{kind}-{split}")
    results["sources"] = [quarantine_outcome(layout, params)]
    tracker.progress(total, total)

    facts = {f"rows of {kind} ({split})": len(found) for (kind, split), found in rows.items()}
    rejected = any(outcome.critical for outcomes in results.values() for outcome in outcomes)
    # A rejected data set makes no output, but its report stays where a person can look.
    final = layout.run_dir("validate") / "report" if rejected else layout.validation
    write_report(final, results, facts)
    tracker.artifact(final)
    if rejected:
        raise DataRejected(rejection(results, final))
    counts = count_states(results)
    return {f"validate/{name}": count for name, count in counts.items()}


def token_counter(directory: Path) -> CountTokens:
    """How many tokens of a model's tokenizer texts have, special ones not added.

    Without transformers where that can be: it would take most of the stage's time.
    """
    check_model_dir(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        slow = load_tokenizer(directory)
        return lambda texts: [len(slow.encode(text, add_special_tokens=False)) for text in texts]
    return tokens_by_file(file)


def quarantine_outcome(layout: Layout, params: Params) -> Outcome:
    """How much of the sources `prepare` had to put aside."""
    counts = json.loads(layout.metrics("prepare").read_text(encoding="utf-8"))
    dropped = sum(counts[f"prepare/{kind}_dropped"] for kind in KINDS)
    share = dropped / max(1, sum(counts[f"prepare/{kind}_read"] for kind in KINDS))
    limit = params.validate_.max_quarantined_fraction
    rule = Rule(
        "",
        {},
        "critical",
        f"at most {limit:.0%} of the rows were put aside (validate.max_quarantined_fraction)",
    )
    return Outcome(rule, share <= limit, f"{share:.1%}: {dropped} rows, listed in data/quarantine.jsonl")


def write_report(final: Path, results: Mapping[str, Sequence[Outcome]], facts: Mapping[str, object]) -> None:
    with staged_dir(final) as out:
        (out / "index.html").write_text(render(results, facts), encoding="utf-8")
        tree = {name: [_as_dict(outcome) for outcome in outcomes] for name, outcomes in results.items()}
        (out / "results.json").write_text(
            json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "state": state(outcome),
        "severity": outcome.rule.severity,
        "expectation": outcome.rule.expectation,
        "arguments": outcome.rule.arguments,
        "meaning": outcome.rule.meaning,
        "observed": outcome.observed,
        "bad_rows": outcome.bad_rows,
    }


def rejection(results: Mapping[str, Sequence[Outcome]], report: Path) -> str:
    """What failed, with the first rows of each."""
    lines = ["the data is not fit to train on"]
    for name, outcomes in results.items():
        for outcome in outcomes:
            if outcome.critical:
                lines.append(f"  {name}: expected that {outcome.rule.meaning}; found {outcome.observed}")
                lines += [f"    {r['source']}:{r['row']}: {r['text']}" for r in outcome.bad_rows[:SHOWN_ROWS]]
    return "\n".join([*lines, f"  the whole report: {report / 'index.html'}"])
