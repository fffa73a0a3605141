from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.rows import read_rows, write_rows
from rlhf_core.data.split import order_key, split_of


@given(st.text(), st.floats(0.05, 0.95))
def test_prompts_that_count_as_the_same_stand_on_one_side(prompt, fraction):
    side = split_of(prompt, fraction)
    assert split_of(f" {prompt}\t", fraction) == side
    assert split_of(prompt.casefold(), fraction) == side


@given(st.text(), st.floats(0.05, 0.5), st.floats(0.0, 0.4))
def test_a_larger_share_only_adds_held_out_prompts(prompt, fraction, more):
    if split_of(prompt, fraction) == "eval":
        assert split_of(prompt, fraction + more) == "eval"


def test_share_is_the_one_asked_for_and_order_tells_nothing_of_it():
    prompts = sorted((f"prompt {i}" for i in range(4000)), key=order_key)
    held_out = [split_of(prompt, 0.2) == "eval" for prompt in prompts]
    assert abs(sum(held_out) / 4000 - 0.2) < 0.02  # 3 standard deviations
    assert abs(sum(held_out[:1000]) / 1000 - 0.2) < 0.04


def test_split_never_changes():
    """A known answer: another hash would move prompts across the split of data sets that exist."""
    sides = [split_of(f"prompt {i}", 0.5) for i in range(6)]
    assert sides == ["eval", "eval", "eval", "train", "train", "train"]


def test_same_rows_give_the_same_bytes(tmp_path):
    rows = [{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "source": "x", "row": 1}]
    write_rows(tmp_path / "1.parquet", rows, "prompts")
    write_rows(tmp_path / "2.parquet", rows, "prompts")
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert read_rows(tmp_path / "1.parquet") == rows
