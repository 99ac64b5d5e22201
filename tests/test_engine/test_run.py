import os
import resource
import stat
import subprocess
import sys

import pytest
import torch

from bincomm.engine.run import load_checkpoint, open_run, save_checkpoint, write_text, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*/file"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_can_be_read_by_others_as_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_checkpoints(tmp_path):
    path = tmp_path / "last.ckpt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 3, "weights": {"a": torch.arange(4)}})
    state = load_checkpoint(path)
    assert state["step"] == 3
    assert torch.equal(state["weights"]["a"], torch.arange(4))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_that_does_not_fit_is_named_and_the_old_one_kept(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 3})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/last\.ckpt"):
            save_checkpoint(path, {"step": 4, "weights": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["step"] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_run_is_held_by_one_process(tmp_path):
    hold = "import sys, time; from bincomm.engine.run import open_run\n"
    hold += f"with open_run({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="output: .*in use"), open_run(str(tmp_path)):
            pass
    finally:
        holder.kill()
        holder.wait()
    with open_run(str(tmp_path)) as run:  # a killed process holds nothing
        assert run == tmp_path


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="output: cannot write in .*file"),
        open_run(str(tmp_path / "file" / "run")),
    ):
        pass
