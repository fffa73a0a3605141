import errno
import os

import pytest

from rlhf_core.atomic import DiskFullError, staged_dir, write_text


def test_staged_dir_appears_whole(tmp_path):
    final = tmp_path / "models" / "sft"
    with staged_dir(final) as out:
        (out / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert [p.name for p in final.parent.iterdir()] == ["sft"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_staged_dir_leaves_what_stood_there(tmp_path, error):
    final = tmp_path / "sft"
    final.mkdir()
    (final / "old").write_text("kept")

    def fail():
        with staged_dir(final) as out:
            (out / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["sft"]
    assert (final / "old").read_text() == "kept"


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    final = tmp_path / "sft"
    (tmp_path / ".sft.partial").mkdir()
    (tmp_path / ".sft.partial" / "half").write_text("x")
    with staged_dir(final) as out:
        (out / "a").write_text("1")
    assert [p.name for p in final.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_clear_error_that_names_the_path(tmp_path, error):
    with (
        pytest.raises(DiskFullError, match=r"sft: the disk is full .* nothing was replaced"),
        staged_dir(tmp_path / "sft"),
    ):
        raise error
    assert not list(tmp_path.iterdir())


def test_write_text_replaces_in_one_step(tmp_path):
    path = tmp_path / "a" / "metrics.json"
    write_text(path, "1")
    write_text(path, "2")
    assert path.read_text() == "2"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
