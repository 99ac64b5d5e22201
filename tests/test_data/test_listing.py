import json
import os
import stat
from pathlib import Path

import pytest

from bincomm.data.listing import Files, list_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    """Twelve empty files with names of images in four folders, all made long ago."""
    root = tmp_path / "tree"
    for folder in ("a", "a/deep", "b", "c"):
        (root / folder).mkdir(parents=True)
        for number in range(3):
            (root / folder / f"{number}.jpg").touch()
    age(root)
    return root


def age(root, seconds=1000):
    """Give all folders the time stamp of an earlier moment."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        past = folder.stat().st_mtime - seconds
        os.utime(folder, (past, past))


@pytest.fixture
def scanned(monkeypatch):
    """The folders that are really read."""
    folders = []
    scandir = os.scandir

    def recording_scandir(path):
        folders.append(os.path.basename(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recording_scandir)
    return folders


def names(root):
    return [os.path.relpath(file, root) for file in list_images(root)[0].names()]


def test_only_changed_folders_are_read_again(tree, scanned):
    first = names(tree)
    assert len(first) == 12
    assert sorted(scanned) == ["a", "b", "c", "deep", "tree"]
    scanned.clear()
    assert names(tree) == first
    assert scanned == []

    (tree / "b" / "new.png").touch()
    (tree / "a" / "deep" / "0.jpg").unlink()
    assert sorted(set(names(tree)) ^ set(first)) == ["a/deep/0.jpg", "b/new.png"]
    assert sorted(scanned) == ["b", "deep"]

    (tree / "c" / "0.jpg").rename(tree / "c" / "9.jpg")
    (tree / "d").mkdir()
    (tree / "d" / "1.webp").touch()
    listed = names(tree)
    assert "c/9.jpg" in listed
    assert "d/1.webp" in listed
    assert "c/0.jpg" not in listed


def test_a_folder_changed_a_moment_ago_is_not_trusted(tree, scanned):
    """A file that comes within the resolution of the time stamp leaves the stamp as it is."""
    (tree / "b" / "new.png").touch()
    names(tree)
    stamp = (tree / "b").stat()
    (tree / "b" / "newer.png").touch()
    os.utime(tree / "b", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    scanned.clear()
    assert "b/newer.png" in names(tree)
    assert scanned == ["b"]


def test_a_removed_folder_is_forgotten(tree, cache):
    names(tree)
    for path in (tree / "a" / "deep").iterdir():
        path.unlink()
    (tree / "a" / "deep").rmdir()
    assert len(names(tree)) == 9
    (file,) = (cache / "listings").iterdir()
    assert not any("deep" in folder for folder in json.loads(file.read_text()))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'{"/x": 3}', b'{"/x": [1, false, [], [], {}]}']
)
def test_a_broken_cache_is_made_anew(tree, cache, content):
    first = names(tree)
    (file,) = (cache / "listings").iterdir()
    file.write_bytes(content.replace(b"/x", os.fsencode(tree)))
    assert names(tree) == first
    assert names(tree) == first


def test_a_cache_that_cannot_be_written_is_no_hindrance(tree, cache):
    cache.write_text("a file where the folder should be")
    assert len(names(tree)) == 12


def test_names_of_any_bytes_are_kept(tree, scanned):
    odd = os.fsdecode(os.fsencode(tree / "b") + b"/caf\xe9\n.png")
    Path(odd).touch()
    age(tree)
    first = list(list_images(tree)[0].names())
    assert odd in first
    scanned.clear()
    assert list(list_images(tree)[0].names()) == first
    assert scanned == []


def test_what_is_no_file_is_no_image(tree):
    (tree / "b" / "nowhere.jpg").symlink_to(tree / "gone")
    (tree / "b" / "folder.jpg").mkdir()
    (tree / "b" / "folder.jpg" / "1.jpg").touch()
    os.mkfifo(tree / "b" / "pipe.jpg")
    listed = names(tree)
    assert "b/folder.jpg/1.jpg" in listed
    assert "b/folder.jpg" not in listed
    assert "b/nowhere.jpg" in listed  # to be reported as one that cannot be read
    assert "b/pipe.jpg" not in listed  # reading it would wait for ever


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tree):
    (tree / "b").chmod(0)
    try:
        with pytest.raises(ValueError, match="data: cannot read .*/b: Permission denied"):
            list_images(tree)
    finally:
        (tree / "b").chmod(stat.S_IRWXU)


def test_broken_links_are_checked_again(tree, tmp_path):
    (tree / "later").symlink_to(tmp_path / "disk")
    (tree / "self").symlink_to(tree / "self")
    age(tree)
    assert len(names(tree)) == 12
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1.jpg").touch()
    assert "later/1.jpg" in names(tree)
    (tmp_path / "disk" / "1.jpg").unlink()
    (tmp_path / "disk").rmdir()
    assert len(names(tree)) == 12


def test_files_keep_any_paths(tmp_path):
    paths = ["a.png", "/a.png", "x/a.png", str(tmp_path / "b.png"), "x/b.png", "../c\n.png"]
    files = Files(paths)
    assert list(files.names()) == paths
    assert list(files.select([4, 0]).names()) == ["x/b.png", "a.png"]
    (tmp_path / "b.png").write_bytes(b"abc")
    assert files.read(3).tobytes() == b"abc"
    with pytest.raises(FileNotFoundError):
        files.read(2)


def test_other_files_are_counted(tree):
    (tree / "b" / "note.TXT").touch()
    (tree / "b" / "README").touch()
    for _ in range(2):
        assert list_images(tree)[1] == {".txt": 1, "no extension": 1}
