import io
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from numbered_pictures import picture
from PIL import Image

from bincomm.data.shards import expand_braces, open_shards
from bincomm.data.sources import evaluation_sources, open_source

pytestmark = pytest.mark.usefixtures("own_cache")


def write(path, members, **options):
    """A tar file of (name, content)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_braces():
    assert expand_braces("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expand_braces("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"]
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("{a}.tar") == ["{a}.tar"]


def test_an_existing_shard_is_no_pattern(tmp_path):
    write(tmp_path / "x[1].tar", [("a.png", picture(1))])
    write(tmp_path / "x1.tar", [("b.png", picture(2))])
    assert open_source(str(tmp_path / "x[1].tar")).images.members == ["a.png"]
    assert open_source(str(tmp_path / "x?.tar")).images.members == ["b.png"]


def test_a_class_belongs_to_the_image_of_its_name_and_else_to_the_sample(tmp_path):
    words = {"a1.0": "0", "a1.1": "1", "b": "2", "c": "3"}
    images = ["a1.0.png", "a1.1.png", "a1.2.png", "b.png", "c.x.png", "d.png"]
    members = [(name, picture(1)) for name in images]
    members += [(f"{name}.cls", word.encode()) for name, word in words.items()]
    shards, classes, notes = open_shards([write(tmp_path / "x.tar", members)])
    assert dict(zip(shards.members, classes, strict=True)) == {
        "a1.0.png": "0", "a1.1.png": "1", "a1.2.png": "", "b.png": "2", "c.x.png": "3", "d.png": "",
    }  # fmt: skip
    assert notes == []


def test_a_part_of_a_sample_is_no_image_of_its_own(tmp_path):
    names = ["0.png", "0.seg.png", "1.seg.png", "1.png", "2.a.png", "2.b.png", "x.3/3.png"]
    path = write(tmp_path / "x.tar", [(name, picture(1)) for name in names])
    shards, _, notes = open_shards([path])
    assert shards.members == ["0.png", "1.png", "2.a.png", "2.b.png", "x.3/3.png"]
    assert notes == [
        f"{path} holds 2 images that are parts of samples with another image, such as 0.seg.png, which were "
        "not taken"
    ]


def test_images_are_read_from_their_offsets(tmp_path):
    contents = [picture(value) for value in range(9)]
    for number in range(3):
        members = [(f"{i}.png", contents[i]) for i in range(3 * number, 3 * number + 3)]
        write(tmp_path / f"data-{number}.tar", [*members, (f"{number}.json", b"{}")])
    for data in (f"{tmp_path}/data-{{0..2}}.tar", f"{tmp_path}/data-*.tar", str(tmp_path)):
        source = open_source(data)
        assert [source.images.read(i).tobytes() for i in range(9)] == contents
        assert source.labels is None
    assert source.images.name(4) == f"{tmp_path}/data-1.tar/4.png"
    assert list(source.images.names()) == [source.images.name(i) for i in range(9)]
    selected = source.select([7, 2]).images
    assert [selected.read(i).tobytes() for i in range(2)] == [contents[7], contents[2]]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_layouts_of_tar(tmp_path, layout):
    name = f"{'long' * 20}/{'name' * 20}.png"
    path = write(tmp_path / "x.tar", [("./first.png", picture(1)), (name, picture(2))], format=layout)
    images, _, notes = open_shards([path])
    assert notes == []
    assert images.members == ["first.png", name]
    assert [images.read(i).tobytes() for i in range(2)] == [picture(1), picture(2)]


def test_labels_of_folders_and_of_cls_files(tmp_path):
    members = [(f"{name}/{i}.png", picture(i)) for name in ("dog", "cat") for i in range(5)]
    source = open_source(write(tmp_path / "folders.tar", members))
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1] * 5 + [0] * 5

    members = [
        (f"train/{i}.{end}", c)
        for i in range(10)
        for end, c in (("png", picture(i)), ("cls", b"%d\n" % (i % 2)))
    ]
    source = open_source(write(tmp_path / "cls.tar", members))
    assert source.classes == ["0", "1"]
    assert source.labels.tolist() == [0, 1] * 5
    gallery, queries, held_out = evaluation_sources(str(tmp_path / "cls.tar"), source)
    assert not held_out
    assert (len(gallery.images), queries.labels.tolist()) == (8, [0, 1])
    assert queries.images.read(0).tobytes() == picture(8)

    members = members[:-1]  # one has none
    assert open_source(write(tmp_path / "some.tar", members)).labels is None


@pytest.fixture
def opened(monkeypatch):
    """The tar files that this process opens to make their indices."""
    paths = []
    open_tar = tarfile.open

    def recording_open(path, mode="r", **options):
        if mode == "r:":
            paths.append(path)
        return open_tar(path, mode, **options)

    monkeypatch.setattr(tarfile, "open", recording_open)
    return paths


def test_an_index_is_made_once_and_again_for_another_shard(tmp_path, opened):
    path = write(tmp_path / "x.tar", [("a.png", picture(1))])
    for _ in range(2):
        assert len(open_shards([path])[0]) == 1
    assert opened == [path]
    write(path, [("a.png", picture(1)), ("b.png", picture(2))])
    assert open_shards([path])[0].members == ["a.png", "b.png"]
    assert opened == [path, path]


@pytest.mark.slow
def test_many_shards_are_indexed_by_several_processes(tmp_path, opened):
    paths = [write(tmp_path / f"{number}.tar", [(f"{number}.png", picture(number))]) for number in range(5)]
    assert open_shards(paths)[0].members == [f"{number}.png" for number in range(5)]
    assert opened == []
    assert len(os.listdir(tmp_path / "cache" / "indices")) == 5


@pytest.mark.parametrize("cache", ["writable", "not writable"])
def test_what_other_processes_leave_undone_is_done_here(tmp_path, opened, monkeypatch, cache):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    if cache == "not writable":
        (tmp_path / "cache").write_text("a file where the folder should be")
    paths = [write(tmp_path / f"{number}.tar", [("a.png", picture(1))]) for number in range(5)]
    assert len(open_shards(paths)[0]) == 5
    assert opened == paths
    assert len(open_shards(paths)[0]) == 5
    assert opened == paths * (1 if cache == "writable" else 2)


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    paths = [write(tmp_path / f"{number}.tar", [("a.png", picture(1))]) for number in range(3)]
    assert len(open_shards(paths)[0]) == 3


def test_a_shard_that_ends_too_early_gives_what_it_has(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    path = write(tmp_path / "x.tar", [("a.png", picture(1)), ("b.png", file.getvalue())])
    os.truncate(path, 4000)
    images, _, notes = open_shards([path])
    assert images.read(0).tobytes() == picture(1)
    assert notes[0].startswith(f"{path} is damaged")
    with pytest.raises(OSError, match="the shard ends before the image does"):
        images.read(1)


@pytest.mark.parametrize(
    ("damage", "left", "words"),
    [
        (lambda data, at: data[: at(3)], 3, "is cut off or damaged at byte"),
        (lambda data, at: data[: at(2) + 600], 3, "is damaged"),
        (
            lambda data, at: data[: at(2)] + bytes([data[at(2)] ^ 1]) + data[at(2) + 1 :],
            2,
            "is cut off or damaged",
        ),
        (lambda data, at: data + bytes(20_000) + data * 40, 6, "bytes beyond its end, which were not read"),
        (lambda data, at: data + bytes(50_000), 6, ""),
    ],
    ids=["cut between", "cut inside", "header", "two files", "zeros"],
)
def test_notes_say_what_is_not_read_of_a_damaged_shard(tmp_path, damage, left, words):
    path = tmp_path / "x.tar"
    write(path, [(f"{number}.png", picture(number)) for number in range(6)])
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    path.write_bytes(damage(path.read_bytes(), lambda number: starts[number]))
    for _ in range(2):  # from the shard, and from its index
        source = open_source(str(path))
        assert len(source.images) == left
        assert [words in note for note in source.notes] == ([True] if words else [])


def split_members(part, count=2):
    return [(f"{part}{name}/{i}.png", picture(i)) for name in ("cat", "dog") for i in range(count)]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train-0.tar", "val-0.tar"),
        ("set-Training-000.tar", "set-validation-000.tar"),
        ("train/0.tar", "test/0.tar"),
        ("a/train/0.tar", "a/val/0.tar"),
    ],
)
@pytest.mark.parametrize("pattern", [False, True])
def test_parts_by_the_names_of_shards(tmp_path, train, held_out, pattern):
    for name in (train, held_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, split_members(""))
    data = str(tmp_path)
    if pattern:
        data = f"{tmp_path}/{'*/' * train.count('/')}*.tar"
    source = open_source(data)
    assert {shard.rpartition(".tar/")[0] for shard in source.images.names()} == {str(tmp_path / train)[:-4]}
    assert "are held out for evaluation" in source.about_split
    _, queries, is_held_out = evaluation_sources(data, source)
    assert is_held_out
    assert len(queries.images) == 4
    assert all(name.startswith(str(tmp_path / held_out)) for name in queries.images.names())
    assert len(open_source(data, "all").images) == 8
    kind = "test" if "test" in held_out else "val"
    assert list(open_source(data, kind).images.names()) == list(queries.images.names())


def test_parts_by_folders_inside_shards(tmp_path):
    path = write(tmp_path / "x.tar", split_members("Train/") + split_members("valid/"))
    source = open_source(path)
    assert source.classes == ["cat", "dog"]
    assert source.images.members == [name for name, _ in split_members("Train/")]
    assert source.about_split == ("the images are those of Train; those of valid are held out for evaluation")
    _, queries, held_out = evaluation_sources(path, source)
    assert held_out
    assert queries.images.members == [name for name, _ in split_members("valid/")]
    assert open_source(path, "all").labels.tolist() == [0, 0, 1, 1] * 2
    members = [member for part in ("train/", "val/", "valid/") for member in split_members(part)]
    path = write(tmp_path / "y.tar", members)
    with pytest.raises(ValueError, match="data: expected one of val and valid in .*names of the same part"):
        open_source(path)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "train-0.tar", split_members(""))
    write(tmp_path / "two" / "val-0.tar", split_members(""))
    write(tmp_path / "two" / "validation-0.tar", split_members(""))
    with pytest.raises(ValueError, match="data: expected one of val and validation in the names of shards"):
        open_source(str(tmp_path / "two"))


def test_extensions_of_shards_in_any_case(tmp_path):
    path = write(tmp_path / "X.TAR", split_members(""))
    for data in (path, str(tmp_path), f"{tmp_path}/*.TAR"):
        assert len(open_source(data).images) == 4


def test_one_shard_of_a_split_is_no_split(tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("train-0.tar", "train-1.tar"):
        write(tmp_path / "val" / name, split_members(""))
    assert len(open_source(str(tmp_path / "val")).images) == 8


def header(name, kind, size, description=b""):
    """A member that claims a size, as it is in a tar file."""
    member = tarfile.TarInfo(name)
    member.type = kind
    data = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    data[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + size.to_bytes(11, "big", signed=True)
    )
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data) + description + bytes(-len(description) % 512)


def record(keyword, value):
    """A record of a PAX header, which begins with its own length."""
    text = f" {keyword}={value}\n".encode()
    length = next(n for n in range(len(text), len(text) + 9) if n == len(text) + len(str(n)))
    return str(length).encode() + text


LARGE = 64 << 30
NEGATIVE = record("size", "-4096")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (header("a", tarfile.XHDTYPE, LARGE), f"a header of {LARGE} bytes"),
        (header("a", tarfile.XGLTYPE, LARGE), f"a header of {LARGE} bytes"),
        (header("a", tarfile.GNUTYPE_LONGNAME, LARGE), f"a header of {LARGE} bytes"),
        (header("a", tarfile.GNUTYPE_LONGLINK, LARGE), f"a header of {LARGE} bytes"),
        (header("a", tarfile.REGTYPE, -1024), "a member of -1024 bytes"),
        (
            header("a", tarfile.XHDTYPE, len(NEGATIVE), NEGATIVE) + header("b", tarfile.REGTYPE, 0),
            "a member of a size below 0",
        ),
        (header("b.png", tarfile.REGTYPE, 1 << 70), "beyond any disk"),
        (header("a", tarfile.XGLTYPE, 10, b"10 k=abcd\n") * 2000, "recursion"),
        (
            b"".join(
                header("a", tarfile.XGLTYPE, len(global_), global_) + header(f"{n}", tarfile.REGTYPE, 0)
                for n in range(1100)
                for global_ in [record(f"k{n}", "x")]
            ),
            "more than 1000 global headers",
        ),
    ],
    ids=["pax", "pax, global", "long name", "long link", "negative", "negative pax", "huge", "chain", "many"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_tar_that_would_take_all_memory_or_never_end(tmp_path, members, words, first):
    path = tmp_path / "x.tar"
    write(path, [("a.png", picture(1))])
    end = 512 + (len(picture(1)) + 511) // 512 * 512
    path.write_bytes(members if first else path.read_bytes()[:end] + members)
    with open(path, "ab") as file:
        file.truncate(100 << 30)  # of holes
    if first:
        with pytest.raises(ValueError, match=f"data: .*x.tar is no uncompressed tar file.*{words}"):
            open_shards([str(path)])
    else:
        images, _, (note,) = open_shards([str(path)])
        assert images.members == ["a.png"]
        assert words in note


def test_a_member_twice_is_two_images(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", picture(1)), ("a.png", picture(2))])
    images, _, _ = open_shards([path])
    assert [images.read(number).tobytes() for number in range(2)] == [picture(1), picture(2)]


def test_links_and_sparse_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a/1.png")
        member.size = len(picture(1))
        tar.addfile(member, io.BytesIO(picture(1)))
        for name, kind, target in (
            ("a/hard.png", tarfile.LNKTYPE, "a/1.png"),
            ("a/soft.png", tarfile.SYMTYPE, "1.png"),
            ("b/chain.png", tarfile.SYMTYPE, "../a/soft.png"),
            ("b/away.png", tarfile.SYMTYPE, "../nowhere.png"),
            ("b/circle.png", tarfile.SYMTYPE, "circle.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    images, _, _ = open_shards([str(tmp_path / "x.tar")])
    names = ["a/1", "a/hard", "a/soft", "b/chain", "b/away", "b/circle"]
    assert images.members == [f"{name}.png" for name in names]
    assert [images.read(number).tobytes() for number in range(4)] == [picture(1)] * 4
    assert len(images.read(4)) == len(images.read(5)) == 0  # images that cannot be used, and will be reported


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
def test_a_folder_packed_by_tar(tmp_path):
    """Names with ./ at the front, links of both kinds and to each other, and holes in a file."""
    folder = tmp_path / "folder" / "c"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    (folder / "a.cls").write_text("7")
    os.link(folder / "a.png", folder / "hard.png")
    for name, target in (("s1", "a"), ("s2", "../c/a"), ("s3", "hard"), ("s4", "s3")):
        (folder / f"{name}.png").symlink_to(f"{target}.png")
    (folder / "s1.cls").symlink_to("a.cls")
    with open(folder / "z.png", "wb") as file:
        file.write(picture(1))
        file.truncate(1 << 22)
    subprocess.run(["tar", "-S", "-cf", tmp_path / "x.tar", "."], cwd=tmp_path / "folder", check=True)
    images, classes, notes = open_shards([str(tmp_path / "x.tar")])
    assert notes == []
    contents = {name: images.read(number).tobytes() for number, name in enumerate(images.members)}
    assert contents.pop("c/z.png") == b""
    assert contents == dict.fromkeys(
        [f"c/{name}.png" for name in ("a", "hard", "s1", "s2", "s3", "s4")], picture(1)
    )
    assert dict(zip(images.members, classes, strict=True))["c/s1.png"] == "7"


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"2\t\n1\t2\tx\ta.png\n", b"1\t\nx\ty\tz\ta.png\n", b"\xff\n"]
)
def test_a_broken_index_is_made_anew(tmp_path, content):
    path = write(tmp_path / "x.tar", [("a\r.png", picture(1)), ("b.png", picture(2))])
    first = open_shards([path])[0].members
    assert first == ["a\r.png", "b.png"]
    (index,) = (tmp_path / "cache" / "indices").iterdir()
    for _ in range(2):
        assert open_shards([path])[0].members == first
        index.write_bytes(content)


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path / "0.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"data: no images .* in .*0\.tar"):
        open_source(str(tmp_path / "0.tar"))
    with pytest.raises(ValueError, match=r"data: there is no shard .*1\.tar and 1 more"):
        open_source(f"{tmp_path}/{{0..2}}.tar")
    (tmp_path / "3.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"data: .*3\.tar is no uncompressed tar file"):
        open_source(str(tmp_path / "3.tar"))
    write(tmp_path / "4.tar", [])
    with pytest.raises(ValueError, match="data: no images"):
        open_source(str(tmp_path / "4.tar"))
    with pytest.raises(ValueError, match="data: no images .* in no shards"):
        open_source(f"{tmp_path}/{{5..3}}.tar")


def test_a_header_of_any_length_is_not_read(tmp_path):
    """64 GB would not fit in memory, and 6 GB of zeros would take minutes."""
    write(tmp_path / "a.tar", [("a.png", picture(1))])
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 64 << 30
    content = (tmp_path / "a.tar").read_bytes()
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(content[:1024] + header.tobuf(tarfile.GNU_FORMAT) + content[:1024])
        file.truncate(7 << 30)
    shards, _, notes = open_shards([str(tmp_path / "a.tar")])
    assert shards.members == ["a.png"]
    assert notes[0].endswith(
        "is damaged, and was not read to its end: a header of 68719476736 bytes, more than 1048576"
    )
