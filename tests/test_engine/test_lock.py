import errno
import fcntl
import os
import stat
import subprocess
import sys

import pytest

from bincomm.distributed.ranks import ALONE
from bincomm.engine.lock import open_run
from bincomm.files import write_file, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*/file"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_can_be_read_by_others_as_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.slow
def test_a_run_is_held_by_one_process(tmp_path):
    hold = "import sys, time; from bincomm.engine.lock import open_run\n"
    hold += "from bincomm.distributed.ranks import ALONE\n"
    hold += f"with open_run({str(tmp_path)!r}, ALONE): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="output: .*in use"), open_run(str(tmp_path), ALONE):
            pass
    finally:
        holder.kill()
        holder.wait()
    (tmp_path / ".file.0123.unfinished").write_text("half")
    with open_run(str(tmp_path), ALONE) as run:  # a killed process holds nothing, and leaves nothing
        assert run == tmp_path
        assert os.listdir(tmp_path) == [".bincomm.lock"]


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EINVAL", "EBADF", "EIO", "EOPNOTSUPP"])
def test_where_nothing_can_be_locked_it_says_so(tmp_path, monkeypatch, caplog, number):
    def refuse(file, how):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_run(str(tmp_path), ALONE):
        pass
    assert "cannot be locked" in caplog.text


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="output: cannot write in .*file"),
        open_run(str(tmp_path / "file" / "run"), ALONE),
    ):
        pass


def fail_in(output, *leaves):
    """A run that leaves files and is refused then."""
    with open_run(str(output), ALONE) as run:
        for name in leaves:
            (run / name).touch()
        raise ValueError("wrong")


def test_a_run_that_cannot_begin_leaves_no_directory(tmp_path):
    for leaves in ([], ["config.yaml"], ["config.yaml", "metrics.jsonl"]):
        with pytest.raises(ValueError, match="wrong"):
            fail_in(tmp_path / "a/b", *leaves)
        assert (tmp_path / "a").exists() == (len(leaves) == 2)
    with pytest.raises(ValueError, match="wrong"):
        fail_in(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [".bincomm.lock", "b"]  # it was there before
