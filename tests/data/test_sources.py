import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.data.sources import read_file, read_source
from rlhf_core.errors import InputError

ROWS = [{"prompt": "a, b\nand c?", "response": 'say "hi"'}, {"prompt": "ünï?", "response": "ok"}]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write(tmp_path / name, ROWS)
    assert [row.values for row in read_file(tmp_path / name)] == ROWS


def test_numbers_are_lines_of_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n\n\n{"prompt": "b"}\n')
    assert [row.number for row in read_file(path)] == [1, 4]


def test_csv_from_a_spreadsheet_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt\r\nhow?\r\n")
    assert [(row.number, row.values) for row in read_file(path)] == [(2, {"prompt": "how?"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n[1]\n', "line 2: must be a JSON object, found list"),
        ("x.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', "line 2: not JSON"),
        ("x.jsonl", "\n \n", "holds no rows, only blank lines"),
        ("x.csv", "a,b\n1\n", "line 2: must have 2 cells, as line 1"),
        ("x.csv", "a,b\n1,2,3\n", "line 2: must have 2 cells"),
        ("x.csv", 'a,b\n"1,2\n', "not CSV"),
        ("x.csv", "a,b\n", "holds no rows, only a header"),
        ("x.csv", "a,b\n\n\n", "holds no rows, only a header"),
        ("x.csv", "\n\r", "holds no rows, only blank lines"),
    ],
)
def test_fault_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_file(tmp_path / name))


def test_cut_file_is_never_taken_for_a_whole_one(tmp_path):
    for name in ("x.jsonl.gz", "x.parquet"):
        write(tmp_path / name, ROWS * 50)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(InputError, match=name):
            list(read_file(tmp_path / name))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(content=st.binary(min_size=1, max_size=60), name=st.sampled_from(["x.jsonl", "x.csv", "x.jsonl.gz"]))
def test_any_bytes_are_rows_or_an_input_error(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try:
        rows = list(read_file(tmp_path / name))
    except InputError:
        return
    assert rows


def test_unknown_package_is_refused(tmp_path):
    with pytest.raises(InputError, match="the only package is package:chitchat"):
        read_source("package:other", "prompts", tmp_path)


def test_hub_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"hub:nobody/nothing.*cannot read it from the hub"):
        list(read_source("hub:nobody/nothing", "prompts", tmp_path))


def test_default_text_has_the_three_kinds(tmp_path):
    pairs = list(read_source("package:chitchat", "preferences", tmp_path))
    assert len({row.number for row in pairs}) == len(pairs)  # a chat stands in one pair only
    assert all(row.values["margin"] >= 3.0 for row in pairs)
    prompts = [row.values["prompt"] for row in read_source("package:chitchat", "prompts", tmp_path)]
    answers = [row.values for row in read_source("package:chitchat", "demonstrations", tmp_path)]
    assert [row["prompt"] for row in answers] == prompts
    assert all(prompt.endswith("?") for prompt in prompts)
    assert len(prompts) > 20_000
