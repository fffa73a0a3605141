"""The card of a snapshot: README.md of the data set, with the front matter that dataset hubs read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FILES = {
    "preferences.jsonl": "pairs of answers: `prompt`, `chosen`, `rejected`, `probability`, `margin`, `votes`",
    "demonstrations.jsonl": "answers that annotators wrote: `prompt`, `response`, and what it `corrects`",
    "labels.jsonl": "single answers: `prompt`, `completion`, `label`",
    "critiques.jsonl": "what annotators wrote about an answer: `prompt`, `response`, `critique`",
    "votes.jsonl": "every vote that counts, ties too",
}
TIES = {
    "keep": "kept, as rows of probability 0.5",
    "drop": "dropped",
    "soften": "softened: a pair's probability is the share of votes for the chosen answer, a tie half a vote",
}


def card(manifest: Mapping[str, Any]) -> str:
    """The card as Markdown; a function of the manifest alone."""
    project, counts, rules = manifest["project"], manifest["counts"], manifest["rules"]
    sections = [
        _front_matter(manifest),
        f"# {_line(project['name'])}",
        f"Human feedback of kind `{project['kind']}`, project `{project['id']}`, "
        f"{' to '.join(manifest['time_span'])}.",
        f"Content hash: `{manifest['content_hash']}`",
        "## Files",
        _table(
            ("file", "rows", "what"),
            ((f"`{name}`", own["rows"], FILES[name]) for name, own in manifest["files"].items()),
        ),
        "`group` is the same for all rows of one prompt: a split must not part them.",
        "## Counts",
        _table(("", "number"), ((name.replace("_", " "), number) for name, number in counts.items())),
    ]
    if manifest["left_out"]:
        sections += ["Items that gave no row:", _table(("reason", "items"), manifest["left_out"].items())]
    sections += [
        "## Agreement",
        _agreement(manifest["agreement"]),
        "## Annotators",
        "Pseudonyms; the accuracy is on items whose answer is known, with its 95 % interval.",
        _annotators(manifest["annotators"]),
        "## How rows were made",
        f"Consensus: {rules['consensus'].replace('_', '-')}. Ties: {TIES[rules['ties']]}. "
        f"Items that wait for an adjudicator: {'kept' if rules['disputed'] == 'keep' else 'left out'}. "
        f"Items with a known answer: {'rows too' if rules['include_gold'] else 'no rows'}. "
        f"Votes needed: {rules['min_votes']}. Least margin of ratings: {rules['min_margin']:g}.",
        "## Licence and consent",
        f"Licence: {_line(manifest['license'])}",
        f"Consent: {_line(manifest['consent']) or 'not stated'}",
        f"Guidelines that the annotators read: sha256 `{project['guidelines_sha256']}`",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Mapping[str, Any]) -> str:
    """YAML; its strings are JSON strings, which YAML reads alike."""
    lines = ["---", f"license: {json.dumps(manifest['license'], ensure_ascii=False)}"]
    lines += [f"pretty_name: {json.dumps(manifest['project']['name'], ensure_ascii=False)}", "configs:"]
    for name in manifest["files"]:
        lines += [f"- config_name: {name.removesuffix('.jsonl')}", f"  data_files: {name}"]
    return "\n".join([*lines, "---"])


def _agreement(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "Texts have no agreement."
    rows = (
        (
            one["criterion"],
            one["level"],
            f"{_number(one['alpha'])} ({_number(one['alpha_interval'][0])} to "
            f"{_number(one['alpha_interval'][1])})",
            one["units"],
            _number(one["mean_kappa"]),
            one["disputed_units"],
            _number(one["extra_seconds"]),
        )
        for one in found
    )
    names = (
        "criterion",
        "scale",
        "Krippendorff's alpha (95 %)",
        "units with 2 votes or more",
        "mean pairwise kappa",
        "disputed units",
        "seconds of further votes on them",
    )
    return _table(names, rows)


def _annotators(found: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            one["annotator"],
            one["votes"],
            _number(one["gold_accuracy"])
            + (f" ({' to '.join(map(_number, one['gold_interval']))})" if one["gold_interval"] else ""),
            _number(one["first_share"]),
            _number(one["first_p_value"]),
        )
        for one in found
    )
    names = ("annotator", "votes", "accuracy", "first shown preferred", "p, exact binomial")
    return _table(names, rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_line(str(cell)) for cell in row) + " |" for row in lines)


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _line(text: str) -> str:
    """Text of people in one line that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")
