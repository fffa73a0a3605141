import math
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.rows import read_rows, write_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.stages import preferences
from rlhf_core.stages.preferences import Pair, all_pairs, balance_length, flip_labels, human_rows, label
from rlhf_core.tracking import Tracker

WORDS = ["good", "bad", "sea", "sun", "rain", "book", "walk", "day", "love", "hate"]


def prompt_row(text, row):
    return {
        "messages": [{"role": "user", "content": text}],
        "prompt": text,
        "source": "unit.jsonl",
        "row": row,
    }


def human_pair(row, margin):
    return prompt_row(f"human prompt {row}", row) | {
        "chosen": "yes please",
        "rejected": "no",
        "probability": 1.0,
        "margin": margin,
        "chosen_score": None,
        "rejected_score": None,
    }


@pytest.fixture
def small(params):
    """Parameters for a tiny run with a labeler that splits any two random texts."""
    sampling = params.preferences.sampling.model_copy(update={"max_new_tokens": 8, "temperature": 1.5})
    changes = {
        "num_prompts": 10,
        "num_eval_prompts": 5,
        "labeler": "function",
        "labeler_target": "length_rewards:by_length",
        "max_human_pairs": 2,
        "label_noise": 0.2,
        "balance_length": False,  # this labeler likes nothing but length
        "sampling": sampling,
    }
    return params.model_copy(
        update={
            "run": params.run.model_copy(update={"device": "cpu", "precision": "float32"}),
            "preferences": params.preferences.model_copy(update=changes),
        }
    )


@pytest.fixture
def layout(tmp_path, tiny_model_dir, monkeypatch):
    layout = Layout(tmp_path)
    shutil.copytree(tiny_model_dir, layout.model("sft"))
    for split, count in (("train", 14), ("eval", 8)):
        rows = [prompt_row(f"{split} {WORDS[i % 10]} {i}", i + 1) for i in range(count)]
        write_rows(layout.prepared_file("prompts", split), rows, "prompts")
        pairs = [human_pair(1, 3.0), human_pair(2, math.nan), human_pair(3, 5.0)]
        write_rows(layout.prepared_file("preferences", split), pairs, "preferences")
    (tmp_path / "length_rewards.py").write_text(
        "def by_length(prompts, responses): return [float(len(r)) for r in responses]\n"
        "def constant(prompts, responses): return [0.0 for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    return layout


def run(params, layout):
    return preferences.run(params, layout, Tracker("preferences", layout.run_dir("preferences")))


def test_pairs_are_widest_first_and_distinct():
    answers = [("a", 0.1), ("b", 0.9), ("a", 0.1), ("", -1.0), ("c", 0.4)]
    pairs = all_pairs(answers)
    assert [(p.chosen, p.rejected) for p in pairs] == [("b", "a"), ("b", "c"), ("c", "a")]
    assert [p.gap for p in pairs] == pytest.approx([0.8, 0.5, 0.3])
    assert pairs[0] == Pair("b", "a", 0.9, 0.1)


def test_label_keeps_the_widest_and_counts_the_rest(params):
    config = params.preferences.model_copy(update={"pairs_per_prompt": 1, "min_margin": 0.35})
    prompts = [prompt_row("p", 1), prompt_row("q", 2)]
    scored = [[("a", 0.1), ("b", 0.9), ("", 0.0), ("c", 0.4)], [("x", 0.2), ("y", 0.2)]]
    rows, counts = label(prompts, scored, config, "ai:vader")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [("p", "b", "a")]
    assert rows[0]["margin"] == pytest.approx(0.8)
    assert counts == {"ties": 2, "spare": 1, "blank_answers": 1}  # c-a (0.3) and x-y tie, b-c is spare


def test_equal_scores_are_ties_even_without_a_margin(params):
    config = params.preferences.model_copy(update={"min_margin": 0.0})
    rows, counts = label([prompt_row("p", 1)], [[("a", 1.0), ("b", 1.0)]], config, "ai:vader")
    assert rows == []
    assert counts["ties"] == 1


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=40), st.integers(0, 9))
def test_balanced_pairs_tell_nothing_by_length(lengths, seed):
    rows = [
        {"chosen": "c" * a, "rejected": "r" * b, "probability": 1.0, "row": i}
        for i, (a, b) in enumerate(lengths)
    ]
    kept = balance_length(rows, random.Random(seed))
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    assert kept == [row for row in rows if row in kept]
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in kept]
    for low, high in ((1, 20), (20, 40), (40, 80), (80, 160), (160, 201)):
        inside = [gap for gap in gaps if low <= abs(gap) < high]
        assert sum(gap > 0 for gap in inside) == sum(gap < 0 for gap in inside)
        all_inside = [a - b for a, b in lengths if low <= abs(a - b) < high]
        fewer = min(sum(gap > 0 for gap in all_inside), sum(gap < 0 for gap in all_inside))
        assert len(inside) == 2 * fewer  # nothing more is dropped than has to be
    assert sum(gap == 0 for gap in gaps) == sum(a == b for a, b in lengths)


def test_flips_are_the_share_asked_for():
    rows = [
        {"chosen": f"c{i}", "rejected": f"r{i}", "chosen_score": 1.0, "rejected_score": 0.0}
        for i in range(20)
    ]
    flip_labels(rows, 0.25, random.Random(0))
    flipped = [row for row in rows if row["chosen"].startswith("r")]
    assert len(flipped) == 5
    assert all(row["chosen_score"] == 0.0 and row["rejected"].startswith("c") for row in flipped)


def test_human_pairs_come_by_margin():
    rows = human_rows(
        [human_pair(1, 3.0), human_pair(2, math.nan), human_pair(3, 5.0), human_pair(4, None)],
        3,
        keep_ties=False,
    )
    assert [row["row"] for row in rows] == [3, 1, 2]
    assert rows[0]["source"] == "human:unit.jsonl"
    assert rows[0]["chosen_score"] is None


def test_ties_of_people_are_kept_where_asked_for():
    rows = [human_pair(1, 3.0), human_pair(2, 0.0) | {"probability": 0.5}]
    assert [row["row"] for row in human_rows(rows, 9, keep_ties=False)] == [1]
    assert [row["row"] for row in human_rows(rows, 9, keep_ties=True)] == [1, 2]


def test_kept_ties_are_even_and_come_after_what_is_clear(params):
    config = params.preferences.model_copy(
        update={"keep_ties": True, "min_margin": 0.35, "pairs_per_prompt": 3}
    )
    rows, counts = label([prompt_row("p", 1)], [[("a", 0.1), ("b", 0.9), ("c", 0.4)]], config, "ai:vader")
    assert [(r["chosen"], r["rejected"], r["probability"]) for r in rows] == [
        ("b", "a", 1.0),
        ("b", "c", 1.0),
        ("c", "a", 0.5),
    ]
    assert counts["ties"] == 1


def test_soft_labels_are_the_sigmoid_of_the_gap(params):
    config = params.preferences.model_copy(update={"label_temperature": 0.4, "min_margin": 0.0})
    rows, _ = label([prompt_row("p", 1)], [[("a", 0.1), ("b", 0.9)]], config, "ai:vader")
    assert rows[0]["probability"] == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_ties_are_never_dropped_to_balance_lengths():
    rows = [{"chosen": "long answer", "rejected": "short", "probability": 0.5, "row": i} for i in range(5)]
    assert balance_length(rows, random.Random(0)) == rows


def test_stage_writes_pairs_of_both_kinds(small, layout):
    metrics = run(small, layout)
    for split in ("train", "eval"):
        rows = read_rows(layout.preferences / f"{split}.parquet")
        ai = [row for row in rows if row["source"] == "ai:function"]
        human = [row for row in rows if row["source"] == "human:unit.jsonl"]
        assert [row["row"] for row in human] == [3, 1]
        assert len(ai) == metrics[f"preferences/num_ai_pairs_{split}"] > 0
        assert len(human) == metrics[f"preferences/num_human_pairs_{split}"] == 2
        assert all(row["prompt"].startswith(split) for row in ai)  # no prompt of one split in the other
        for row in ai:
            assert (row["chosen_score"], row["rejected_score"]) == (len(row["chosen"]), len(row["rejected"]))
            assert row["margin"] == abs(row["chosen_score"] - row["rejected_score"]) > 0
        flipped = sum(row["chosen_score"] < row["rejected_score"] for row in ai)
        assert flipped == round(0.2 * len(ai)) == metrics[f"preferences/num_flipped_{split}"]
    assert metrics["preferences/num_answers"] == 15 * small.preferences.responses_per_prompt
    assert 0.0 <= metrics["preferences/eos_rate"] <= 1.0
    assert (layout.run_dir("preferences") / "preference_samples.table.json").is_file()


def test_stage_repeats_itself_and_follows_its_seeds(small, layout):
    metrics = run(small, layout)
    first = {path.name: path.read_bytes() for path in layout.preferences.iterdir()}
    assert run(small, layout) == metrics
    assert {path.name: path.read_bytes() for path in layout.preferences.iterdir()} == first
    sampling = small.preferences.sampling.model_copy(update={"seed": 9})
    other = small.model_copy(
        update={"preferences": small.preferences.model_copy(update={"sampling": sampling})}
    )
    run(other, layout)
    assert (layout.preferences / "train.parquet").read_bytes() != first["train.parquet"]


def test_stage_takes_all_prompts_when_there_are_fewer(small, layout):
    many = small.model_copy(update={"preferences": small.preferences.model_copy(update={"num_prompts": 500})})
    assert run(many, layout)["preferences/num_prompts_train"] == 14


def test_stage_says_when_nothing_can_be_paired(small, layout):
    changes = {"labeler_target": "length_rewards:constant", "max_human_pairs": 0}
    ties = small.model_copy(update={"preferences": small.preferences.model_copy(update=changes)})
    with pytest.raises(InputError, match=r"no train pair.*min_margin = 0\.1"):
        run(ties, layout)
    assert not layout.preferences.exists()


def test_balance_that_leaves_nothing_is_named(small, layout):
    balanced = small.preferences.model_copy(update={"balance_length": True, "max_human_pairs": 0})
    with pytest.raises(InputError, match=r"no train pair.*preferences\.balance_length dropped [1-9]"):
        run(small.model_copy(update={"preferences": balanced}), layout)


def test_stage_needs_prompts(small, layout):
    write_rows(layout.prepared_file("prompts", "eval"), [], "prompts")
    with pytest.raises(InputError, match="no eval prompts"):
        run(small, layout)


def test_no_prompts_give_the_pairs_of_people_alone_and_open_no_model(small, layout):
    none = small.preferences.model_copy(
        update={"num_prompts": 0, "num_eval_prompts": 0, "max_human_pairs": 9, "keep_ties": True}
    )
    shutil.rmtree(layout.model("sft"))
    metrics = run(small.model_copy(update={"preferences": none}), layout)
    for split in ("train", "eval"):
        there = read_rows(layout.prepared_file("preferences", split))
        made = read_rows(layout.preferences / f"{split}.parquet")
        assert sorted(row["row"] for row in made) == sorted(row["row"] for row in there)
        assert {row["source"] for row in made} == {"human:unit.jsonl"}
        assert metrics[f"preferences/num_ai_pairs_{split}"] == 0
    assert metrics["preferences/num_answers"] == 0


def test_a_labeler_that_cannot_work_costs_no_generation(small, layout):
    absent = small.preferences.model_copy(update={"labeler_target": "absent_module:f"})
    shutil.rmtree(layout.model("sft"))
    with pytest.raises(InputError, match="cannot import absent_module"):
        run(small.model_copy(update={"preferences": absent}), layout)
