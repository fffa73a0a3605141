"""One object a line, whatever its texts hold."""

from __future__ import annotations

from rlhf_core.json_lines import lines_of, read_lines, text_lines

SEPARATORS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # all at which str.splitlines cuts


def test_a_text_may_hold_any_line_separator(tmp_path):
    rows = [{"prompt": f"a{separator}b"} for separator in SEPARATORS]
    path = tmp_path / "lines.jsonl"
    path.write_text(lines_of(rows), encoding="utf-8")
    assert read_lines(path) == rows


def test_a_line_that_is_still_written_is_the_last(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n\n{"st')
    assert text_lines(path) == ['{"step": 1}', '{"st']
