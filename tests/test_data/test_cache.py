"""The cache decides which files are read as images, so what others may have written there is not taken."""

import json
import os
import stat

import pytest
from PIL import Image

from bincomm.cli import main
from bincomm.data.cache import cache_folder, read_cached, who_else_writes, write_cached
from bincomm.data.digits import digits
from bincomm.data.export import write_shards
from bincomm.data.sources import open_source
from bincomm.data.standard import open_standard

OTHER = 54321  # a user, and a group


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    return str(tmp_path / "images")


def give_away(path, monkeypatch):
    """Let a file or folder be another user's."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)


@pytest.mark.parametrize("part", ["", "digits", "listings"])
@pytest.mark.parametrize("how", ["owner", "everybody", "group"])
def test_a_cache_that_others_can_write_in_is_refused_with_the_way_out(
    part, how, cache, images, monkeypatch, capsys
):
    digits()
    open_source(images)
    if how == "owner":
        give_away(cache / part, monkeypatch)
    else:
        os.chmod(cache / part, 0o777 if how == "everybody" else 0o775)
        if os.geteuid() == 0:
            os.chown(cache / part, -1, OTHER)
        elif how == "group":
            pytest.skip("only root can give a folder to another group")
    data = images if part == "listings" else "digits"
    assert main(["data", "verify", f"--data={data}", f"--output={images}/unusable.txt"]) == 2
    error = capsys.readouterr().err
    assert "cache: expected that nobody else can write in" in error
    assert f"chmod go-w {cache / part} " in error
    assert "set BINCOMM_CACHE" in error


def test_the_group_of_the_user_alone_may_write(tmp_path):
    if os.geteuid():
        pytest.skip("needs root's group, which has no other members")
    os.chmod(tmp_path, 0o775)
    assert who_else_writes(os.stat(tmp_path)) == ""
    os.chown(tmp_path, -1, OTHER)
    assert who_else_writes(os.stat(tmp_path)) == f"one that group {OTHER} can write in"


def test_whatever_the_umask_others_cannot_write_in_the_cache(cache, images, monkeypatch):
    before = os.umask(0)
    try:
        digits()
        write_shards(open_source(images), f"{images}/../shards")
        open_source(f"{images}/../shards")
    finally:
        os.umask(before)
    written = [cache, *cache.rglob("*")]
    assert {path.relative_to(cache).parts[0] for path in written[1:]} == {"digits", "indices", "listings"}
    folders_and_texts = [path for path in written if path.suffix != ".png"]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o022 == 0 for path in folders_and_texts)
    assert who_else_writes(os.stat(cache_folder("digits"))) == ""


def test_a_file_that_others_can_write_is_not_read(cache):
    write_cached(cache_folder("indices") / "x", "text")
    assert read_cached(cache / "indices/x") == b"text"
    os.chmod(cache / "indices/x", 0o646)
    with pytest.raises(PermissionError, match="can be written by others"):
        read_cached(cache / "indices/x")


@pytest.mark.parametrize("name", ["/etc", "..", "../../etc", "a/../../.."])
def test_a_listing_leads_nowhere_else(name, cache, images, tmp_path):
    (tmp_path / "etc").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "etc/secret.png")
    os.utime(images, (1e9, 1e9))
    first = list(open_source(images).images.names())
    (listing,) = (cache / "listings").iterdir()
    content = json.loads(listing.read_text())
    content[images][2] = [name, str(tmp_path / "etc")]
    content[str(tmp_path / "etc")] = [os.stat(tmp_path / "etc").st_mtime_ns, False, [], "secret.png", {}]
    listing.write_text(json.dumps(content))
    assert list(open_source(images).images.names()) == first
    content[images][2:4] = [[], "a.png/../etc/secret.png"]
    listing.write_text(json.dumps(content))
    assert list(open_source(images).images.names()) == first


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "train/..", 7])
def test_a_set_names_its_own_files(name, cache):
    files = cache_folder("sets", "cifar10", "files")
    index = {"classes": ["cat"], "splits": {"train": [["train/0.png", 0], [name, 0]], "test": []}}
    write_cached(files / "index.json", json.dumps(index))
    with pytest.raises(ValueError, match=r"data: .*index\.json cannot be used: .*remove .*cifar10/files to"):
        open_standard("cifar10", "pretraining")
    index["splits"]["train"].pop()
    write_cached(files / "index.json", json.dumps(index))
    assert open_standard("cifar10", "pretraining")[0] == [str(files / "train/0.png")]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "file/cache"))
    for data in ("digits", "cifar10"):
        assert main(["data", "verify", f"--data={data}", f"--output={tmp_path}/unusable.txt"]) == 2
        error = capsys.readouterr().err
        assert f"cache: cannot write in {tmp_path}/file/cache: " in error
        assert "; set BINCOMM_CACHE to a folder that can be written" in error
