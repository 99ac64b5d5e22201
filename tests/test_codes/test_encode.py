import fcntl
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks
from tiny_model import create_model, logits_of, sample_digits

from bincomm import pack_signs
from bincomm.codes import encode as encode_module
from bincomm.codes.encode import encode
from bincomm.codes.storage import open_parts, read_codes, read_rows, to_messages, write_part
from bincomm.data.export import write_shards
from bincomm.data.sources import Mix, Source, open_source
from bincomm.distributed.ranks import FirstRankError, Ranks
from bincomm.evaluation.features import extract_features
from bincomm.evaluation.identity import images_identity, weights_identity


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


def paths_in(folder):
    return [path for part in open_parts(folder) for path in pq.read_table(part.path)["path"].to_pylist()]


@pytest.fixture(scope="module")
def source():
    return sample_digits()


@pytest.fixture(scope="module")
def model():
    return create_model()


@pytest.fixture(scope="module")
def complete(model, source, tmp_path_factory):
    """A folder of four parts, the last one shorter."""
    folder = tmp_path_factory.mktemp("codes") / "complete"
    result = encode(model, source, folder, rows=25)
    assert (result.codes, result.bits, result.unusable, result.parts, result.written) == (90, 20, [], 4, 4)
    return folder


@pytest.mark.parametrize("bits", [20, 64])
def test_a_code_is_the_signs_of_the_logits(bits, source, tmp_path):
    model = create_model(bits)
    encode(model, source, tmp_path, rows=40, features=True)
    table = pa.concat_tables(
        pq.read_table(tmp_path / f"part-{number:05}.parquet", page_checksum_verification=True)
        for number in range(3)
    )
    assert table.column_names == ["path", "label", "code", "features"]
    assert table.schema.field("code").type == pa.binary(-(-bits // 8))
    logits = logits_of(model, source)
    assert len((logits > 0).unique(dim=0)) > 45
    for code, row in zip(table["code"].to_pylist(), logits, strict=True):
        assert [code[j // 8] >> j % 8 & 1 for j in range(bits)] == (row > 0).int().tolist()
        assert int.from_bytes(code, "little") < 1 << bits
    assert table["path"].to_pylist() == list(source.images.names())
    assert table["label"].to_pylist() == [str(label) for label in source.labels]
    assert [path.split("/")[-2] for path in table["path"].to_pylist()] == table["label"].to_pylist()
    features = np.array(table["features"].to_pylist(), np.float32)
    assert torch.equal(torch.from_numpy(features), extract_features(model, source)["features"])
    codes, read_bits = read_codes(tmp_path)
    assert read_bits == bits
    assert torch.equal(to_messages(codes), pack_signs(logits))


def test_a_file_says_of_what_its_codes_are(complete, model, source):
    metadata = json.loads((complete / "encode.json").read_text())
    assert {
        key: metadata[key] for key in ("weights", "bits", "global_size", "features", "images", "rows")
    } == {
        "weights": "tiny",
        "bits": 20,
        "global_size": 16,
        "features": None,
        "images": 90,
        "rows": 25,
    }
    assert metadata["identity"] == weights_identity(model)
    assert metadata["images_identity"] == images_identity(source)
    for number, rows in enumerate((25, 25, 25, 15)):
        path = complete / f"part-{number:05}.parquet"
        assert json.loads(pq.read_schema(path).metadata[b"bincomm"]) == metadata
        assert pq.read_metadata(path).num_rows == rows
    assert (complete / "unusable.txt").read_text() == ""


def test_goes_on_with_what_is_missing(complete, model, source, tmp_path, monkeypatch):
    written = []

    def killed(path, *rest, **named):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_part(path, *rest, **named)

    monkeypatch.setattr(encode_module, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(model, source, tmp_path, rows=25)
    (tmp_path / ".part-00002.parquet.abc.unfinished").write_bytes(b"of a process killed while it wrote")
    assert written == ["part-00000.parquet", "part-00001.parquet"]
    assert set(contents(tmp_path)) == set(written)
    assert len(read_codes(tmp_path)[0]) == 50  # what exists can be read
    before, written[:] = times(tmp_path), []
    encode(replace(model, name="elsewhere/tiny"), source, tmp_path, rows=25)  # the same weights
    assert written == ["part-00002.parquet", "part-00003.parquet"]
    assert not list(tmp_path.glob(".*unfinished"))
    assert contents(tmp_path) == contents(complete)
    assert before.items() <= times(tmp_path).items()
    (tmp_path / "part-00001.parquet").unlink()
    before, written[:] = times(tmp_path), []
    result = encode(model, source, tmp_path, rows=25)
    assert (result.parts, result.written) == (4, 1)
    assert contents(tmp_path) == contents(complete)
    assert before.items() <= times(tmp_path).items()
    assert encode(model, source, tmp_path, rows=25).written == 0


def on_two(rank, world, folder):
    ranks = Ranks(rank, world, rank, torch.device("cpu"))
    model, source = create_model(), sample_digits()
    output = os.path.join(folder, "codes")
    assert encode(model, source, output, rows=25, ranks=ranks).written == 4
    if rank == 0:
        os.remove(os.path.join(output, "part-00003.parquet"))  # which rank 1 wrote; rank 0 writes it now
    torch.distributed.barrier()
    result = encode(model, source, output, rows=25, ranks=ranks)
    assert (result.codes, result.parts, result.written) == (90, 4, 1)
    with pytest.raises(FirstRankError if rank else ValueError, match="rows 25 there and 30 here"):
        encode(model, source, output, rows=30, ranks=ranks)


@pytest.mark.slow
def test_two_ranks_write_what_one_does(complete, tmp_path):
    run_on_ranks(on_two, 2, tmp_path)
    assert contents(tmp_path / "codes") == contents(complete)


def test_images_that_cannot_be_used_have_no_row(model, tmp_path):
    images = tmp_path / "images"
    for number, name in enumerate("abcdef"):
        path = images / ("x" if number < 3 else "y") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number, 0, 99)).save(path)
    good = (images / "x" / "a.png").read_bytes()
    (images / "x" / "b.png").write_bytes(good[: len(good) // 2])
    (images / "y" / "e.png").write_bytes(b"")
    (images / "y" / "f.png").write_text("no image")
    source = open_source(str(images))
    # All of the third part are unusable: it is a file without rows.
    result = encode(model, source, tmp_path / "codes", rows=2, features=True)
    assert (result.codes, result.parts) == (3, 3)
    assert [os.path.basename(name) for name, _ in result.unusable] == ["b.png", "e.png", "f.png"]
    listed = (tmp_path / "codes" / "unusable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [name for name, _ in result.unusable]
    assert "the file is empty" in listed[1]
    assert [os.path.basename(path) for path in paths_in(tmp_path / "codes")] == ["a.png", "c.png", "d.png"]
    assert read_rows(open_parts(tmp_path / "codes"), [2, 0]) == [
        (f"{images}/y/d.png", "y"),
        (f"{images}/x/a.png", "x"),
    ]
    assert [part.rows for part in open_parts(tmp_path / "codes")] == [1, 2, 0]
    with pytest.raises(ValueError, match="data: none of 2 images can be used"):
        encode(model, source.select([4, 5]), tmp_path / "none")


def test_parts_whose_images_could_not_be_read_are_written_again(model, source, tmp_path, monkeypatch):
    images, codes = tmp_path / "images", tmp_path / "codes"
    images.mkdir()
    for number in range(20):
        data = open(source.images.name(number), "rb").read()  # noqa: SIM115
        (images / f"{number:02}.png").write_bytes(data[:40] if number == 3 else data)
    damaged = open_source(str(images))
    encode(model, damaged, tmp_path / "complete", rows=5)
    kept = [number for number in range(20) if number != 3]  # those after it keep their own names and codes
    assert [os.path.basename(path) for path in paths_in(tmp_path / "complete")] == [
        f"{n:02}.png" for n in kept
    ]
    logits = logits_of(model, source.select(kept))
    assert torch.equal(to_messages(read_codes(tmp_path / "complete")[0]), pack_signs(logits))

    def write_and_vanish(path, *rest, **named):
        write_part(path, *rest, **named)
        if path.name == "part-00001.parquet":
            images.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "write_part", write_and_vanish)
        lost = encode(model, damaged, codes, rows=5)
    assert (lost.codes, lost.parts, len(lost.unusable)) == (9, 4, 11)
    before = times(codes)
    (tmp_path / "elsewhere").rename(images)
    mended = encode(model, damaged, codes, rows=5)
    assert (mended.codes, mended.written) == (19, 2)  # a damaged image is no reason to write its part again
    assert contents(codes) == contents(tmp_path / "complete")
    assert {name for name, time in times(codes).items() if before[name] == time} == {
        "part-00000.parquet",
        "part-00001.parquet",
    }
    assert encode(model, damaged, codes, rows=5).written == 0
    (tmp_path / "list.txt").write_text("images/01.png\nimages/04.png\n")
    listed = open_source(str(tmp_path / "list.txt"))
    (images / "04.png").unlink()  # for good: what still cannot be read stays as it is
    assert encode(model, listed, tmp_path / "listed").unusable[0][1] == "No such file or directory"
    assert encode(model, listed, tmp_path / "listed").written == 0


def test_a_full_disk_costs_no_finished_part(model, source, small_disk):
    (small_disk / "filling").write_bytes(bytes((2 << 20) - (24 << 10)))
    with pytest.raises(OSError, match="No space left on device: .*part-0000"):
        encode(model, source, small_disk / "codes", rows=10, features=True)
    before = contents(small_disk / "codes")
    assert 0 < len(before) < 9
    (small_disk / "filling").unlink()
    assert encode(model, source, small_disk / "codes", rows=10, features=True).written == 9 - len(before)
    assert before.items() <= contents(small_disk / "codes").items()


def test_shards_mixes_and_odd_names(model, source, tmp_path):
    write_shards(source.select(range(12)), tmp_path / "shards")
    shards = open_source(str(tmp_path / "shards"))
    encode(model, shards, tmp_path / "of shards", rows=5)
    assert paths_in(tmp_path / "of shards") == [
        f"{tmp_path}/shards/data-00000.tar/{number:09}.png" for number in range(12)
    ]
    labels = [label for _, label in read_rows(open_parts(tmp_path / "of shards"), range(12))]
    assert labels == [shards.classes[label] for label in shards.labels]
    odd = tmp_path / "odd"
    odd.mkdir()
    name = os.path.join(os.fsencode(odd), b"\xff.png")
    with open(source.images.name(0), "rb") as image, open(name, "wb") as copy:
        copy.write(image.read())
    mix = Source(Mix([shards.images, open_source(str(odd)).images]), weights=(1.0, 1.0))
    encode(model, mix, tmp_path / "of both", rows=5)
    assert read_rows(open_parts(tmp_path / "of both"), [12, 0]) == [
        (f"{odd}/\udcff.png", None),
        (f"{tmp_path}/shards/data-00000.tar/000000000.png", None),
    ]
    codes, together = read_codes(tmp_path / "of shards")[0], read_codes(tmp_path / "of both")[0]
    assert (together[:12] == codes).all()
    # A change of a shard inside a mix is noticed, too.
    before = images_identity(mix)
    os.utime(tmp_path / "shards" / "data-00000.tar", ns=(1, 1))
    assert images_identity(mix) != before


def test_parquet_files(model, source, tmp_path):
    images = [{"bytes": source.images.read(row).tobytes(), "path": "x"} for row in range(12)]
    images[7] = {"bytes": None, "path": source.images.name(7)}
    labels = [source.classes[label] for label in source.labels[:12]]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=5)
    files = open_source(str(path))
    result = encode(model, files, tmp_path / "codes", rows=5)
    assert [name for name, _ in result.unusable] == [f"{path}/7"]
    encode(model, source.select(range(12)), tmp_path / "of files")
    taken = [row for row in range(12) if row != 7]
    assert (read_codes(tmp_path / "codes")[0] == read_codes(tmp_path / "of files")[0][taken]).all()
    parts = open_parts(tmp_path / "codes")
    assert read_rows(parts, range(11)) == [(f"{path}/{row}", labels[row]) for row in taken]
    before = images_identity(files)
    os.utime(path, ns=(1, 1))
    assert images_identity(files) != before


def test_a_folder_is_of_one_kind(complete, model, source):
    before = contents(complete)
    for other, images, options, message in [
        (create_model(seed=1), source, {}, r"weights tiny \(\w+\) there and tiny \(\w+\) here"),
        (create_model(24), source, {}, "bits 20 there and 24 here"),
        (
            replace(model, config=replace(model.config, global_size=20)),
            source,
            {},
            "global_size 16 there and 20",
        ),
        (
            replace(model, config=replace(model.config, eval_crop=1.0)),
            source,
            {},
            "eval_crop 0.875 there and 1",
        ),
        (model, source.select(range(80)), {}, "images 90 there and 80 here"),
        (model, source.select([*range(1, 90), 0]), {}, "names, labels or files of images"),
        (model, source, {"features": True}, "features None there and 64 here"),
        (model, source, {"rows": 30}, "rows 25 there and 30 here"),
    ]:
        with pytest.raises(ValueError, match=f"output: .*{message}.*expected the same, or a new folder"):
            encode(other, images, complete, **{"rows": 25, **options})
    assert contents(complete) == before


def test_a_damaged_part_is_named_and_can_be_made_again(complete, model, source, tmp_path):
    codes = shutil.copytree(complete, tmp_path / "codes")
    part = codes / "part-00001.parquet"
    whole = part.read_bytes()
    paths = pq.read_metadata(part).row_group(0).column(0)
    middle = paths.data_page_offset + paths.total_compressed_size // 2
    part.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="part-00001.parquet cannot be read: .*makes it again"):
        encode(model, source, codes, rows=25)
    part.unlink()
    assert encode(model, source, codes, rows=25).written == 1
    assert part.read_bytes() == whole


def test_what_is_wrong_is_named(complete, model, source, tmp_path):
    with pytest.raises(ValueError, match="weights: expected a head.* got tiny without"):
        encode(replace(model, head=None), source, tmp_path)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        encode(model, source, tmp_path, rows=0)
    with pytest.raises(ValueError, match="data: expected at least one image"):
        encode(model, source.select([]), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: cannot write"):
        encode(model, source, tmp_path / "file")
    broken = create_model()
    broken.head.layers[-1].bias[3] = float("nan")
    with pytest.raises(ValueError, match=f"weights: tiny .*NaN for {source.images.name(0)}"):
        encode(broken, source, tmp_path / "nan")
    assert not contents(tmp_path / "nan")
    held = tmp_path / "held"
    held.mkdir()
    with open(held / ".bincomm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output: .*in use by another process"):
            encode(model, source, held)
    for name, data in contents(complete).items():
        (held / name).write_bytes(data)
    with pytest.raises(ValueError, match="output: expected a new folder, or encode.json beside"):
        encode(model, source, held)
    (held / "encode.json").write_text("[")
    with pytest.raises(ValueError, match="output: .*encode.json cannot be read"):
        encode(model, source, held)
    (held / "encode.json").write_bytes((complete / "encode.json").read_bytes())
    assert encode(model, source, held, rows=25).written == 0
    write_part(held / "part-00003.parquet", [], [], np.empty((0, 2)), {"bits": 16, "identity": "x"})
    with pytest.raises(
        ValueError, match="folder: expected files of the same codes, .*bits 20 there and 16 here"
    ):
        encode(model, source, held, rows=25)
    for path in held.glob("part-0000[012]*"):
        path.unlink()
    with pytest.raises(ValueError, match="output: the files .* are not of its encode.json: .*bits"):
        encode(model, source, held, rows=25)
