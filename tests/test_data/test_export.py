import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from bincomm import cli
from bincomm.data.export import verify, write_shards
from bincomm.data.sources import evaluation_sources, open_source


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in two classes; three of them cannot be used."""
    root = tmp_path / "photos"
    for number in range(12):
        path = root / ("cat" if number % 2 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(noise).save(path)
    (root / "cat" / "03.png").write_bytes(b"")
    data = (root / "cat" / "05.png").read_bytes()
    (root / "cat" / "05.png").write_bytes(data[:400] + bytes(200) + data[600:])  # looks complete
    (root / "dog" / "08.png").unlink()
    (root / "dog" / "08.png").symlink_to(tmp_path / "nowhere")
    return root


def test_verify_finds_what_cannot_be_used(photos):
    unusable = verify(open_source(str(photos)), threads=2)
    names = [os.path.relpath(name, photos) for name, _ in unusable]
    assert names == ["cat/03.png", "cat/05.png", "dog/08.png"]
    assert unusable[0][1] == "the file is empty"
    assert unusable[2][1] == "No such file or directory"


def test_verify_on_the_command_line(photos, tmp_path, capsys):
    command = ["data", "verify", "--data", str(photos), "--output", str(tmp_path / "bad.txt")]
    assert cli.main(command) == 1
    assert "12 images, 3 cannot be used" in capsys.readouterr().out
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert lines[0] == f"{photos}/cat/03.png\tthe file is empty"
    for name in ("cat/03.png", "cat/05.png", "dog/08.png"):
        (photos / name).unlink()
    assert cli.main(command) == 0
    assert (tmp_path / "bad.txt").read_text() == ""


def test_shards_hold_the_same_images(photos, tmp_path):
    source = open_source(str(photos))
    left_out = write_shards(source, tmp_path / "out" / "shards", shard_bytes=12_000, threads=2)
    assert sorted(os.path.basename(name) for name, _ in left_out) == ["03.png", "08.png"]
    names = sorted(os.listdir(tmp_path / "out" / "shards"))
    assert names == ["classes.txt", *(f"data-{number:05}.tar" for number in range(len(names) - 1))]
    assert len(names) == 4
    assert (tmp_path / "out" / "shards" / "classes.txt").read_text() == "cat\ndog\n"
    written = open_source(f"{tmp_path}/out/shards/data-*.tar")
    assert len(written.images) == 10
    usable = [i for i in range(12) if source.images.name(i) not in dict(left_out)]
    expected = {(source.images.read(i).tobytes(), source.classes[source.labels[i]]) for i in usable}
    result = {(written.images.read(i).tobytes(), source.classes[written.labels[i]]) for i in range(10)}
    assert result == expected
    # In random order: a shard holds images of both classes.
    with tarfile.open(tmp_path / "out" / "shards" / "data-00000.tar") as tar:
        assert [os.path.splitext(name)[1] for name in tar.getnames()[:4]] == [".png", ".cls"] * 2
    assert written.labels.tolist() != sorted(written.labels.tolist())


def test_shards_name_images_by_their_format(tmp_path):
    names = []
    for name, kind in (
        ("a.bin", "JPEG"),
        ("b.cls", "PNG"),
        ("c.jpg", "GIF"),
        ("d.png", "TIFF"),
        ("e", "WEBP"),
    ):
        Image.new("RGB", (8, 8), (9, 99, 9)).save(tmp_path / name, kind)
        names.append(name)
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert write_shards(open_source(str(tmp_path / "list.txt")), tmp_path / "out") == []
    source = open_source(str(tmp_path / "out"))
    suffixes = sorted(os.path.splitext(name)[1] for name in source.images.members)
    assert suffixes == [".jpg", ".png", ".png", ".tif", ".webp"]
    assert verify(source) == []


def test_shards_of_a_source_without_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    assert (
        cli.main(["data", "shard", "--data", str(tmp_path / "flat"), "--output", str(tmp_path / "out")]) == 0
    )
    assert os.listdir(tmp_path / "out") == ["data-00000.tar"]
    source = open_source(str(tmp_path / "out"))
    assert source.labels is None
    assert len(source.images) == 3


def test_shards_appear_whole_or_not_at_all(photos, tmp_path, monkeypatch, capsys):
    add_file = tarfile.TarFile.addfile

    def fail_at_the_fifth(tar, member, *content):
        if member.name.startswith("000000005"):
            raise OSError(28, "No space left on device")
        add_file(tar, member, *content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail_at_the_fifth)
    assert cli.main(["data", "shard", "--data", str(photos), "--output", str(tmp_path / "out" / "x")]) == 1
    assert f"No space left on device: '{tmp_path}/out/x'" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


def test_an_existing_folder_is_left_alone(photos, tmp_path, capsys):
    assert cli.main(["data", "shard", "--data", str(photos), "--output", str(tmp_path)]) == 2
    assert "output: expected the name of a new folder" in capsys.readouterr().err
    assert (photos / "cat" / "01.png").exists()


def test_nothing_usable_is_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(b"x")
    assert cli.main(["data", "shard", "--data", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    assert "none of 1 images can be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lok"], "did you mean look?"),
        (["verify", "--data", "/nowhere"], "data: '/nowhere' does not exist"),
        (["verify", "--data", '{"a": }'], "data: expected one source or a mapping"),
        (["look", "--data", "/nowhere"], "data: '/nowhere' does not exist"),
        (
            ["verify", "--data", "digits", "--output", "/no/folder/x.txt"],
            "output: expected a file in a folder that can be written, got /no/folder/x.txt",
        ),
        (["look", "--global_sise", "3"], "did you mean --global_size?"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(arguments, words, capsys):
    assert cli.main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bincomm: error: ")
    assert words in error


def test_bad_options_and_help(capsys):
    for arguments in (["verify"], ["verify", "--data", "x", "--threads", "0"], ["shard", "--data", "x"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["data", *arguments])
        assert ended.value.code == 2
    assert cli.main(["data"]) == 2
    assert cli.main(["data", "--help"]) == 0
    assert "draw the crops" in capsys.readouterr().out


def test_parts_of_the_data_are_parts_of_its_shards(tmp_path):
    for part in ("train", "valid"):
        for name in ("cat", "dog"):
            (tmp_path / "in" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "in" / part / name / f"{i}.png")
    write_shards(open_source(str(tmp_path / "in"), "all"), tmp_path / "out")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.tar")) == [
        "train/data-00000.tar",
        "valid/data-00000.tar",
    ]
    source = open_source(str(tmp_path / "out"))
    gallery, queries, held_out = evaluation_sources(str(tmp_path / "out"), source)
    assert (len(gallery.images), len(queries.images), held_out) == (6, 6, True)
    assert sorted(queries.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_commands_take_all_parts_or_one(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "in" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / part / "1.png")
    (tmp_path / "in" / "val" / "2.gif").write_bytes(b"GIF89a")
    data = ["--data", str(tmp_path / "in")]
    assert cli.main(["data", "shard", *data, "--output", str(tmp_path / "all")]) == 0
    written = capsys.readouterr()
    assert "2 images, 0 left out" in written.out
    assert cli.main(["data", "verify", *data, "--output", str(tmp_path / "u.txt")]) == 1
    verified = capsys.readouterr()
    assert "2 images, 0 cannot be used" in verified.out
    for shown in (written.err, verified.err):
        assert "the images are those of all parts, train and val" in shown
        assert "note: 1 × .gif in" in shown
    assert cli.main(["data", "verify", *data, "--split", "train", "--output", str(tmp_path / "u.txt")]) == 0
    assert "1 images, 0 cannot be used" in capsys.readouterr().out
