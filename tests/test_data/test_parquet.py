import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_pictures import picture

from bincomm.cli import main
from bincomm.data import parquet
from bincomm.data.export import verify, write_shards
from bincomm.data.images import UnusableImageError, load
from bincomm.data.parquet import open_parquet
from bincomm.data.sources import evaluation_sources, open_source, why_no_evaluation

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


pytestmark = pytest.mark.usefixtures("own_cache")


def as_images(contents):
    """A column as Hugging Face datasets writes it."""
    return pa.array([{"bytes": content, "path": f"{at}.png"} for at, content in enumerate(contents)], STRUCT)


def write(path, columns, names=None, **options):
    """A file of columns, with Hugging Face's metadata if it has `names` of a label column's classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}}
        features |= {column: {"_type": "ClassLabel", "names": words} for column, words in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return str(path)


def labeled(path, labels, names=("cat", "dog"), **options):
    """A file of one picture for each label."""
    columns = {"image": as_images(map(picture, range(len(labels)))), "label": pa.array(labels, pa.int64())}
    return write(path, columns, {"label": list(names)}, **options)


def reason(images, index):
    with pytest.raises(UnusableImageError) as error:
        load(images, index)
    return str(error.value)


def test_images_are_read_by_their_rows(tmp_path):
    contents = [picture(value) for value in range(23)]
    for number, (first, last) in enumerate([(0, 10), (10, 10), (10, 23)]):
        columns = {"image": as_images(contents[first:last]), "other": range(last - first)}
        write(tmp_path / "s" / f"data-{number}.parquet", columns, row_group_size=4)
    for data in ("s/data-{0..2}.parquet", "s/*.parquet", "s"):
        source = open_source(f"{tmp_path}/{data}")
        assert [source.images.read(at).tobytes() for at in range(23)] == contents
        assert source.labels is None
        assert source.notes == ()
    assert source.images.name(9) == f"{tmp_path}/s/data-0.parquet/9"
    assert source.images.name(22) == f"{tmp_path}/s/data-2.parquet/12"
    assert list(source.images.names()) == [source.images.name(at) for at in range(23)]
    selected = source.select([17, 2, 22]).images
    assert [selected.read(at).tobytes() for at in range(3)] == [contents[17], contents[2], contents[22]]
    assert next(iter(selected.names())) == source.images.name(17)
    assert open_source(f"{tmp_path}/s/data-0.parquet").images.read(3).flags.writeable


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_encodings(tmp_path, compression, dictionary):
    contents = [picture(value % 3) for value in range(9)]
    path = write(
        tmp_path / "x.parquet",
        {"image": as_images(contents)},
        compression=compression,
        use_dictionary=dictionary,
    )
    images, _, _ = open_parquet([path])
    assert [images.read(at).tobytes() for at in range(9)] == contents


IMAGES = as_images([picture(1)])
OTHERS = as_images([picture(2)])
BINARY = pa.array([picture(1)], pa.binary())


@pytest.mark.parametrize(
    "columns",
    [
        {"image": IMAGES, "mask": OTHERS},
        {"mask": OTHERS, "img": IMAGES},
        {"img": OTHERS, "image": IMAGES},
        {"photo": IMAGES, "x": [b"other"]},
        {"image": BINARY, "y": [b"other"]},
        {"jpg": BINARY, "key": ["a"]},
        {"jpg": BINARY.cast(pa.large_binary())},
        {"image": pa.array([{"bytes": picture(1)}], pa.struct([("bytes", pa.large_binary())]))},
        {"a.b": IMAGES},
        {"image": IMAGES, "image.bytes": OTHERS},
    ],
)
def test_the_column_of_images(tmp_path, columns):
    images, _, _ = open_parquet([write(tmp_path / "x.parquet", columns)])
    assert images.read(0).tobytes() == picture(1)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"left": IMAGES, "right": OTHERS}, "several columns of images: .*left .struct<.*, right .struct<"),
        ({"jpg": BINARY, "png": BINARY}, r"several columns of images: .*got jpg \(binary\), png \(binary\)"),
        (
            {"url": ["https://host/a.jpg"], "n": [1]},
            r"no column of images: expected image.*url \(string\), n",
        ),
        ({"image": pa.array([[1]]), "y": [1]}, r"no column of images: .*image \(list<"),
        ({"image": ["a.png"]}, r"no column of images: .*got image \(string\)"),
        ({}, "no column of images: .*got no columns"),
    ],
)
def test_no_column_of_images_or_several(tmp_path, columns, words):
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(ValueError, match=f"data: {path} has {words}"):
        open_source(path)


def test_labels(tmp_path):
    source = open_source(labeled(tmp_path / "named.parquet", [1, 0, 1, 1, 0] * 2, row_group_size=3))
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0, 1, 1, 0] * 2
    gallery, queries, held_out = evaluation_sources("x", source)
    assert (len(gallery.images), queries.labels.tolist(), held_out) == (9, [1], False)

    images = as_images([picture(1)] * 3)
    for labels in (["b", "a c", "b"], pa.array(["b", "a c", "b"]).dictionary_encode(), ["b", "a\n c", "b"]):
        source = open_source(write(tmp_path / "words.parquet", {"image": images, "label": labels}))
        assert (source.classes, source.labels.tolist()) == (["a c", "b"], [1, 0, 1])
    source = open_source(write(tmp_path / "numbers.parquet", {"image": images, "labels": [7, 3, 7]}))
    assert (source.classes, source.labels.tolist()) == (["3", "7"], [1, 0, 1])
    # A column that only the metadata calls one of labels, beside one of other numbers.
    columns = {"image": images, "width": [5, 6, 7], "breed": [1, 0, 1]}
    source = open_source(write(tmp_path / "breeds.parquet", columns, {"breed": ["pug", "boxer"]}))
    assert (source.classes, source.labels.tolist()) == (["boxer", "pug"], [0, 1, 0])
    # Two classes of one name stay two.
    source = open_source(labeled(tmp_path / "cranes.parquet", [0, 1, 2], ["crane", "dog", "crane"]))
    assert source.classes == ["crane (0)", "crane (2)", "dog"]


@pytest.mark.parametrize(
    "columns", [{}, {"label": [0, None, 1]}, {"label": [0, -1, 1]}, {"label": ["", "a", "b"]}]
)
def test_without_a_label_for_each_image_there_are_none(tmp_path, columns):
    path = write(tmp_path / "x.parquet", {"image": as_images([picture(1)] * 3), **columns})
    source = open_source(path)
    assert source.labels is None
    assert evaluation_sources(path, source) is None
    assert "a label in a Parquet file" in why_no_evaluation(path, source)


@pytest.mark.parametrize(
    "metadata", ["{", "[]", '{"info": {"features": {"label": 3, "x": {"names": 1}}}}', "[" * 9999]
)
def test_metadata_of_another_form_names_nothing(tmp_path, metadata):
    table = pa.table({"image": as_images([picture(1)] * 2), "label": [1, 2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "x.parquet")
    assert open_source(f"{tmp_path}/x.parquet").classes == ["1", "2"]


def test_a_label_without_a_name_is_an_error(tmp_path):
    path = labeled(tmp_path / "x.parquet", [0, 2, 1])
    with pytest.raises(ValueError, match=f"data: {path} holds 2 in label; expected -1 or one of 0 to 1"):
        open_source(path)


@pytest.mark.parametrize("pattern", ["", "/data/*.parquet", "/data/{train,*}-0000{0..1}-of-0000?.parquet"])
def test_parts_by_the_names_of_files(tmp_path, pattern):
    folder = tmp_path / "data"
    labeled(folder / "train-00000-of-00002.parquet", [0, 1, 1])
    labeled(folder / "train-00001-of-00002.parquet", [0, 1])
    labeled(folder / "test-00000-of-00001.parquet", [1, 0, 1])
    data = str(tmp_path) + pattern.replace("{train,*}", "t*")
    if "{" in data:
        labeled(folder / "test-00001-of-00002.parquet", [])  # for the pattern to match
    source = open_source(data)
    assert source.labels.tolist() == [0, 1, 1, 0, 1]
    assert source.about_split == "the images are those of train; those of test are held out for evaluation"
    _, queries, held_out = evaluation_sources(data, source)
    assert held_out
    assert queries.labels.tolist() == [1, 0, 1]
    assert queries.images.name(2) == f"{folder}/test-00000-of-00001.parquet/2"
    assert len(open_source(data, "all").images) == 8
    assert open_source(data, "test").images.read(1).tobytes() == picture(1)
    with pytest.raises(ValueError, match="split: expected train or test in the data, got val"):
        open_source(data, "val")


def test_parts_by_folders(tmp_path):
    labeled(tmp_path / "train" / "0000.parquet", [0, 1, 1])
    labeled(tmp_path / "validation" / "0000.parquet", [1, 1])
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [0, 1, 1]
    _, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert held_out
    assert queries.labels.tolist() == [1, 1]


def test_an_unlabeled_test_file_asks_nothing(tmp_path):
    labeled(tmp_path / "train-0.parquet", [0, 1] * 5)
    labeled(tmp_path / "test-0.parquet", [-1, -1])
    source = open_source(str(tmp_path))
    _, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert not held_out
    assert len(queries.images) == 2


def test_what_is_wrong_is_named(tmp_path):
    labeled(tmp_path / "good.parquet", [0, 1])
    content = (tmp_path / "good.parquet").read_bytes()
    for name, data in {
        "text": b"no Parquet file" * 9,
        "empty": b"",
        "cut": content[:-20],
        "magic": b"PAR1",
    }.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"data: .*{name}\.parquet is no Parquet file, or a damaged one: ."
        ):
            open_source(f"{tmp_path}/{name}.parquet")
    with pytest.raises(ValueError, match=r"data: there is no shard .*1\.parquet and 1 more"):
        open_source(f"{tmp_path}/{{1..2}}.parquet")
    with pytest.raises(ValueError, match=r"data: no rows in .*none\.parquet"):
        open_source(labeled(tmp_path / "none.parquet", []))
    with pytest.raises(ValueError, match="data: no images .* in no shards"):
        open_source(f"{tmp_path}/{{5..3}}.parquet")
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no images .* but nothing, it is empty"):
        open_source(str(folder))
    mixed = tmp_path / "mixed"
    labeled(mixed / "a.parquet", [0])
    (mixed / "b.tar").write_bytes(bytes(1024))
    with pytest.raises(
        ValueError, match=r"data: expected tar shards or Parquet files, got both: .*a\.parq.* and .*b\.tar"
    ):
        open_source(str(mixed))


@pytest.mark.parametrize(
    ("columns", "names", "words"),
    [
        (
            {"img": IMAGES, "label": [0]},
            {"label": ["cat", "dog"]},
            "images in img .struct. and labels in label",
        ),
        ({"image": BINARY, "label": [0]}, {"label": ["cat", "dog"]}, "images in image .binary. and labels"),
        ({"image": IMAGES}, None, "images in image .struct. and no labels"),
        ({"image": IMAGES, "label": ["cat"]}, None, "images in .* and labels in label .strings."),
        ({"image": IMAGES, "label": [0]}, {"label": ["cat"]}, ".* with the names of 1 classes"),
        ({"image": IMAGES, "label": [0]}, {"label": ["cat", "bird"]}, ".* with the names of 2 classes"),
    ],
)
def test_files_of_different_columns_are_refused(tmp_path, columns, names, words):
    first = labeled(tmp_path / "a.parquet", [0, 1])
    second = write(tmp_path / "b.parquet", columns, names)
    expected = "images in image .struct. and labels in label .integers. with the names of 2 classes"
    with pytest.raises(ValueError, match=f"data: {second} has {words}.*; expected {expected}, as in {first}"):
        open_source(str(tmp_path))


def test_a_null_is_an_image_that_cannot_be_used_and_its_path_is_not_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    rows = [
        {"bytes": picture(1), "path": "../secret.png"},
        {"bytes": None, "path": str(secret)},
        {"bytes": None, "path": "../secret.png"},
        None,
        {"bytes": b"", "path": "/dev/zero"},
        {"bytes": b"no image", "path": None},
    ]
    path = write(tmp_path / "d" / "x.parquet", {"image": pa.array(rows, STRUCT)})
    source = open_source(path)
    assert source.images.read(0).tobytes() == picture(1)
    for row in (1, 2, 3):
        assert reason(source.images, row).startswith("null: the file holds no bytes of this image")
    assert reason(source.images, 4) == "the file is empty"
    assert [name for name, _ in verify(source)] == [f"{path}/{row}" for row in range(1, 6)]


@pytest.mark.parametrize("rows", [[{"path": "/etc/passwd"}, {"path": "https://host/x.png"}], [None, None]])
def test_paths_alone_are_refused(tmp_path, rows):
    path = write(tmp_path / "x.parquet", {"image": pa.array(rows, STRUCT)})
    with pytest.raises(
        ValueError,
        match=rf"data: {path} holds no images: image\.bytes is null in all rows of its first.*\.txt",
    ):
        open_source(path)


def footer_with(path, old, new):
    """Write a file again with another number wherever its footer has `old`."""

    def varint(number):
        number <<= 1  # zigzag
        groups = [number >> shift & 127 for shift in range(0, max(1, number.bit_length()), 7)]
        return bytes([group | 128 for group in groups[:-1]] + groups[-1:])

    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    assert varint(old) in footer
    footer = footer.replace(varint(old), varint(new))
    path.write_bytes(data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("claimed", [1 << 20, 1 << 40, 1 << 62])
@pytest.mark.parametrize("what", ["rows", "compressed", "uncompressed"])
def test_claims_that_a_file_cannot_keep(tmp_path, what, claimed):
    path = tmp_path / "x.parquet"
    contents = [np.random.default_rng(number).bytes(50) + bytes(50) for number in range(1237)]
    columns = {"image": as_images(contents), "label": np.arange(1237)}
    write(path, columns, compression="zstd", use_dictionary=False, row_group_size=5000)
    column = pq.read_metadata(path).row_group(0).column(0)
    assert column.path_in_schema == "image.bytes"
    numbers = {
        "rows": 1237,
        "compressed": column.total_compressed_size,
        "uncompressed": pq.read_metadata(path).row_group(0).total_byte_size,
    }
    assert len(set(numbers.values())) == 3
    footer_with(path, numbers[what], claimed)
    start = time.monotonic()
    if what == "uncompressed" and claimed == 1 << 20:  # a claim that does no harm
        assert open_source(str(path)).images.read(5).tobytes() == contents[5]
    elif what == "compressed":
        assert reason(open_source(str(path)).images, 5).startswith("its row group is damaged: ")
    else:
        with pytest.raises(
            ValueError, match=rf"data: {path} (is damaged: |is no Parquet|has a row group of \d+ MiB)"
        ):
            open_source(str(path))
    assert time.monotonic() - start < 5


def test_a_large_image_in_every_row_of_a_small_file_is_not_read(tmp_path, monkeypatch):
    """The file has one copy, of which its rows are 2 GB."""
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 1 << 25)
    image = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array([bytes(1 << 20)]))
    path = write(tmp_path / "x.parquet", {"image": image}, compression="zstd", store_schema=False)
    assert os.path.getsize(path) < 1 << 20
    images, _, _ = open_parquet([path])
    assert reason(images, 1999) == "it is in a row group of more than 33554432 bytes of images"


def test_a_row_group_that_is_too_large_is_refused_with_the_way_out(tmp_path, monkeypatch):
    path = labeled(tmp_path / "x.parquet", [0, 1] * 500)
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 10_000)
    with pytest.raises(ValueError, match=f"data: {path} has a row group of .*row_group_size=100"):
        open_source(path)
    pq.write_table(pq.read_table(path), tmp_path / "y.parquet", row_group_size=100)
    assert len(open_source(f"{tmp_path}/y.parquet").images) == 1000


def test_damage_inside_makes_the_images_of_a_row_group_unusable(tmp_path):
    path = tmp_path / "x.parquet"
    contents = [os.urandom(1000) for _ in range(20)]
    write(path, {"image": as_images(contents)}, row_group_size=10, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 200] = bytes(200)
    path.write_bytes(data)
    images, _, _ = open_parquet([str(path)])
    assert images.read(9).tobytes() == contents[9]
    assert reason(images, 10).startswith("its row group is damaged: ")
    os.unlink(path)
    assert reason(images, 19) == "No such file or directory"  # so that encode tries again


def test_only_metadata_and_labels_are_listed(tmp_path):
    """A hundred thousand rows, whose column of images is overwritten."""
    path = tmp_path / "x.parquet"
    image = as_images([b"a%d" % number for number in range(100_000)])
    labels = np.arange(100_000) % 1000
    write(
        path,
        {"image": image, "label": labels},
        {"label": [f"{n:03}" for n in range(1000)]},
        row_group_size=100,
    )
    metadata = pq.read_metadata(path)
    data = bytearray(path.read_bytes())
    for number in range(metadata.num_row_groups):
        for column in (0, 1):
            chunk = metadata.row_group(number).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    start = time.monotonic()
    source = open_source(str(path))
    assert time.monotonic() - start < 10  # half a second on a quiet machine
    assert np.array_equal(source.labels, labels)
    assert reason(source.images, 0)


def test_row_groups_read_last_are_kept_within_a_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": as_images([bytes(10_000)] * 8)}, row_group_size=2)
    groups = [0, 2, 4, 6]
    for limit, kept in ((1 << 20, groups), (43_000, groups[2:]), (0, [])):
        monkeypatch.setattr(parquet, "KEPT", limit)
        images, _, _ = open_parquet([path])
        for row in (4, *groups, 4, 6):
            images.read(row)
        os.rename(path, f"{path}.away")
        for row in groups:
            if row in kept:
                assert len(images.read(row + 1)) == 10_000
            else:
                assert "No such file" in reason(images, row + 1)
        os.rename(f"{path}.away", path)


def test_threads_read_the_same_and_other_row_groups_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT", 12_000)
    contents = [b"%d" % number * 100 for number in range(200)]
    path = write(tmp_path / "x.parquet", {"image": as_images(contents)}, row_group_size=7)
    images, _, _ = open_parquet([path])
    order = np.random.default_rng(0).integers(200, size=800).tolist()
    with ThreadPoolExecutor(8) as threads:
        for row, content in zip(order, threads.map(images.read, order), strict=True):
            assert content.tobytes() == contents[row]


def test_slow_row_groups_are_told_with_the_way_out(tmp_path, monkeypatch):
    path = write(
        tmp_path / "x.parquet",
        {"image": as_images([os.urandom(2 << 20)] * 3 + [b"x"])},
        row_group_size=4,
        use_dictionary=False,
    )
    assert open_source(path).notes == ()  # all of it is kept
    monkeypatch.setattr(parquet, "KEPT", 1 << 20)
    (note,) = open_source(path).notes
    assert "row groups of 4 images and 6 MiB" in note
    assert "about 12 ms of a core; `bincomm data shard` writes tar shards" in note


def test_tar_shards_of_parquet_read_each_row_group_once(tmp_path, monkeypatch):
    for number in range(3):
        labeled(tmp_path / "in" / f"{number}.parquet", [0, 1] * 10, row_group_size=5)
    source = open_source(str(tmp_path / "in"))
    groups = source.images.group
    order = source.images.together(np.random.default_rng(0).permutation(60))
    assert sorted(order.tolist()) == list(range(60))
    assert np.count_nonzero(np.diff(groups[order])) == 11
    assert order.tolist() != sorted(order.tolist())
    assert write_shards(source, tmp_path / "out") == []
    written = open_source(str(tmp_path / "out"))
    assert len(written.images) == 60
    pairs = [(written.images.read(at).tobytes(), int(written.labels[at])) for at in range(60)]
    assert sorted(pairs) == sorted((picture(value), value % 2) for value in range(20) for _ in range(3))


def test_tar_shards_of_parts(tmp_path):
    labeled(tmp_path / "in" / "train-0.parquet", [0, 1, 1])
    labeled(tmp_path / "in" / "test-0.parquet", [0, 1])
    write_shards(open_source(str(tmp_path / "in"), "all"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["classes.txt", "test", "train"]
    assert len(open_source(str(tmp_path / "out")).images) == 3


def test_names_of_files(tmp_path):
    """Bytes that are no UTF-8, characters of patterns, and what looks like an address."""
    names = [os.fsdecode(b"caf\xe9.parquet"), "x[1].parquet", "s3:/a.parquet", "X.PARQUET"]
    written = labeled(tmp_path / "written.parquet", [0, 1])
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(written, tmp_path / name)
        source = open_source(f"{tmp_path}/{name}")
        assert source.images.read(1).tobytes() == picture(1)
        assert source.images.name(1) == f"{tmp_path}/{name}/1"


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch, capsys):
    path = labeled(tmp_path / "x.parquet", [0, 1])
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="Parquet files as data need pyarrow"):
        open_source(path)
    assert main(["data", "verify", "--data", path]) == 1
    assert "Parquet files as data need pyarrow): pip install 'bincomm[train]'" in capsys.readouterr().err
