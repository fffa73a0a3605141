"""`prepare` and `validate` on files of a user's own, and `rlhf data check` on the same files."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from rlhf_core import cli
from rlhf_core.config import change_params, load_params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import DataRejected, InputError
from rlhf_core.layout import Layout
from rlhf_core.stages.runner import run_stage
from rlhf_core.stages.validate import token_counter
from rlhf_core.validation.columns import tokens_by_file


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TEXTS = ["", "hello", " two  spaces ", "<|im_end|>", "naïve 漢字 🙂", "what is number 7?\n" * 40]


@pytest.fixture
def layout(root, tmp_path, monkeypatch, tiny_model_dir):
    """A workspace with a user's demonstrations and pairs, and a tiny model as base."""
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(tiny_model_dir)
    monkeypatch.setenv("RLHF_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    demonstrations = [{"prompt": f"what is number {i}?", "response": f"it is {i}"} for i in range(100)]
    lines(tmp_path / "mine.jsonl", demonstrations)
    lines(
        tmp_path / "pairs.jsonl", [row | {"chosen": "yes, it is", "rejected": "no"} for row in demonstrations]
    )
    layout = Layout(tmp_path)
    sources = {"demonstrations": ["mine.jsonl"], "preferences": ["pairs.jsonl"], "prompts": ["mine.jsonl"]}
    change_params(layout.params, {f"data.{kind}": files for kind, files in sources.items()})
    return layout


def stage(layout, name, **values):
    change_params(layout.params, values)
    return run_stage(name, load_params(layout.params), layout)


def test_rows_are_split_by_prompt_for_all_kinds_alike(layout):
    metrics = stage(layout, "prepare")
    sides = {}
    for kind in ("demonstrations", "preferences", "prompts"):
        for split in ("train", "eval"):
            rows = read_rows(layout.prepared_file(kind, split))
            assert len(rows) == metrics[f"prepare/{kind}_{split}"]
            for row in rows:
                assert sides.setdefault(row["prompt"], split) == split
    assert len(sides) == 100
    assert layout.quarantine.read_text() == ""


def test_every_row_is_kept_or_in_quarantine_with_its_line_and_reason(layout):
    bad = [
        ({"prompt": "hi?", "response": "ok"}, "prompt is shorter than data.min_prompt_chars"),
        ({"prompt": "what " * 80, "response": "ok"}, "prompt is longer than data.max_prompt_chars"),
        ({"prompt": "what is it then?", "response": " "}, "response is empty"),
        ({"prompt": "what is it then?", "response": "mail me@example.org"}, "personal data: e-mail address"),
        ({"prompt": "what is number 3?", "response": "it is 3"}, "duplicate"),
        ({"prompt": "what is it then?"}, "needs a column response; found prompt"),
    ]
    with (layout.root / "mine.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row, _ in bad)
    metrics = stage(layout, "prepare", **{"data.prompts": ["pairs.jsonl"]})
    put_aside = [json.loads(line) for line in layout.quarantine.read_text().splitlines()]
    assert [(row["source"], row["row"], row["reason"]) for row in put_aside] == [
        ("mine.jsonl", 101 + i, reason) for i, (_, reason) in enumerate(bad)
    ]
    assert "me@example.org" not in layout.quarantine.read_text()
    kept = metrics["prepare/demonstrations_train"] + metrics["prepare/demonstrations_eval"]
    assert kept + metrics["prepare/demonstrations_dropped"] == metrics["prepare/demonstrations_read"] == 106


def test_order_of_the_source_does_not_matter(layout):
    stage(layout, "prepare")
    before = layout.prepared_file("demonstrations", "train").read_bytes()
    rows = (layout.root / "mine.jsonl").read_text().splitlines(keepends=True)
    (layout.root / "mine.jsonl").write_text("".join(reversed(rows)))
    stage(layout, "prepare")
    again = read_rows(layout.prepared_file("demonstrations", "train"))
    (layout.root / "before.parquet").write_bytes(before)
    assert [r["prompt"] for r in again] == [r["prompt"] for r in read_rows(layout.root / "before.parquet")]


def test_cap_keeps_the_share_of_held_out_rows(layout):
    metrics = stage(layout, "prepare", **{"data.max_demonstrations": 50, "data.eval_fraction": 0.5})
    kept = metrics["prepare/demonstrations_train"], metrics["prepare/demonstrations_eval"]
    assert sum(kept) == 50
    assert min(kept) >= 15


def test_source_without_a_usable_row_is_an_error(layout):
    lines(layout.root / "mine.jsonl", [{"prompt": "hi?", "response": "x"}] * 3)
    with pytest.raises(InputError, match=r"mine\.jsonl: none of its rows can be used as demonstrations: 3 x"):
        stage(layout, "prepare")


def test_validation_passes_and_leaves_a_page(layout):
    stage(layout, "prepare")
    metrics = stage(layout, "validate", **{"validate.max_longer_chosen": 1.0})
    assert metrics["validate/critical"] == 0
    assert "fit to train on" in (layout.validation / "index.html").read_text()


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("validate.max_prompt_tokens", 2, "prompt has at most 2 tokens"),
        ("validate.min_rows", 500, "at least 500 rows"),
    ],
)
def test_critical_failure_is_told_with_its_rows_and_makes_no_output(layout, key, value, rule):
    stage(layout, "prepare")
    with pytest.raises(DataRejected, match="not fit to train on") as rejected:
        stage(layout, "validate", **{key: value})
    assert rule in str(rejected.value)
    assert not layout.validation.exists()
    assert not layout.metrics("validate").exists()
    assert "not fit to train on" in (layout.run_dir("validate") / "report" / "index.html").read_text()


def test_too_many_rows_put_aside_is_critical(layout):
    with (layout.root / "mine.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": f"{i}?", "response": "x"}) + "\n" for i in range(400))
    stage(layout, "prepare")
    with pytest.raises(DataRejected, match="rows were put aside"):
        stage(layout, "validate")


def test_tokens_are_counted_whole_where_the_file_says_to_cut(tiny_model_dir, tmp_path):
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    expected = [len(cutting.encode(text, add_special_tokens=False).ids) for text in TEXTS]
    cutting.enable_truncation(3)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert tokens_by_file(tmp_path / "tokenizer.json")(TEXTS) == expected


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab and merges"])
def test_tokens_are_counted_as_transformers_does(whole, tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if not whole:
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
        (directory / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert max(expected) > 100
    assert token_counter(directory)(TEXTS) == expected


def check(capsys, *arguments):
    before = sys.argv
    sys.argv = ["rlhf", "data", "check", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return ended.value.code, capsys.readouterr()


def test_check_passes_good_files_of_each_kind(layout, capsys):
    pairs = [
        {"prompt": f"question {i}?", "chosen": f"yes {i}" + " it is" * (i % 2), "rejected": f"no {i} at"}
        for i in range(20)
    ]
    lines(layout.root / "pairs.jsonl", pairs)
    status, said = check(capsys, "mine.jsonl", "pairs.jsonl")
    assert status == 0, said.out
    assert "mine.jsonl: 100 rows of demonstrations, 0 bad" in said.out
    assert "pairs.jsonl: 20 rows of preferences, 0 bad" in said.out


def test_check_names_file_line_and_fault_of_each_bad_row(layout, capsys):
    rows = [
        {"prompt": "a question?", "chosen": "yes", "rejected": "no"},
        {"prompt": "a question?", "chosen": "yes"},
        {"prompt": " ", "chosen": "yes", "rejected": "no"},
        {"prompt": "another?", "chosen": "same", "rejected": "Same"},
        {"prompt": "A  question?", "chosen": "yes", "rejected": "no"},
    ]
    lines(layout.root / "bad.jsonl", rows)
    status, said = check(capsys, "bad.jsonl")
    assert status == 1
    assert "bad.jsonl:2: needs a column rejected" in said.out
    assert "bad.jsonl:3: expected that prompt is not empty or blank" in said.out
    assert "bad.jsonl:4: expected that chosen and rejected differ" in said.out
    assert "bad.jsonl:5: repeats bad.jsonl:1" in said.out
    assert not said.out.startswith("bad.jsonl:1:")
    assert "\nbad.jsonl:1:" not in said.out


def test_check_of_a_file_that_is_none_says_so(layout, capsys):
    (layout.root / "cut.jsonl").write_text('{"prompt": "x"')
    status, said = check(capsys, "cut.jsonl")
    assert status == 2
    assert "cut.jsonl: line 1: not JSON" in said.err
    status, said = check(capsys, "mine.jsonl", "--kind", "stories")
    assert status == 2
    assert "--kind 'stories': must be one of demonstrations, preferences, prompts" in said.err
