"""Files are written whole or not at all, on file systems that lack something, too."""

import errno
import logging
import os
import stat

import pytest
from PIL import Image

from bincomm.data.digits import digits
from bincomm.data.export import write_shards
from bincomm.data.sources import open_source
from bincomm.files import check_file, check_folder, expand_home, tell_once, write_text


def refuse_folders(monkeypatch, error):
    """Let fsync fail for folders, as file systems of networks do."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EIO"])
def test_a_folder_that_cannot_be_synchronized_is_told_once(number, tmp_path, monkeypatch, caplog):
    refuse_folders(monkeypatch, getattr(errno, number))
    tell_once.cache_clear()
    with caplog.at_level(logging.INFO, "bincomm"):
        for name in "ab":
            write_text(tmp_path / name, name)
    assert (tmp_path / "b").read_text() == "b"
    assert len(caplog.records) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_full_disk_is_still_an_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{tmp_path}/a"):
        write_text(tmp_path / "a", "after")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o007])
def test_folders_have_the_permissions_that_the_user_gives(mask, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)  # of file systems without permissions
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    before = os.umask(mask)
    try:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
        write_shards(open_source(str(tmp_path / "images")), tmp_path / "shards")
        folders = [tmp_path / "shards", digits()]
    finally:
        os.umask(before)
    # Only the user writes in the cache.
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [
        0o777 & ~mask,
        0o755 & ~mask,
    ]


# Where nothing can be written, whoever tries: below a file, a system's folder, and names that are too long.
HOPELESS = ["file/x", "/proc/none/x", "x" * 256, f"{'x' * 256}/y", "null\0", "\ud800"]


@pytest.mark.parametrize("check", [check_file, check_folder])
@pytest.mark.parametrize("place", HOPELESS)
def test_an_output_that_cannot_be_written_is_told_before_the_work(check, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^output: expected a (file in a folder|folder) that can be "):
        check("output", place)
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_that_can_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_folder("output", "~/a/b/c") == tmp_path / "a/b/c"
    assert check_file("output", "~/x") == tmp_path / "x"
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    assert check_folder("output", tmp_path / "a/b") == tmp_path / "a/b"
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    for check, path in ((check_file, "none/x"), (check_file, "a")):
        with pytest.raises(ValueError, match="output: "):
            check("output", tmp_path / path)
    assert expand_home("~nobody-of-this-name/x").parts[0] == "~nobody-of-this-name"


@pytest.mark.parametrize("name", ["n" * 255, "caf\udce9"])
def test_names_of_any_length_and_bytes_are_written(name, tmp_path):
    write_text(check_file("output", tmp_path / name), "text")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    assert os.listdir(tmp_path) != [name]
    write_shards(open_source(str(tmp_path / "images")), tmp_path / "f" / name)
    assert os.listdir(tmp_path / "f" / name) == ["data-00000.tar"]
