import fcntl
import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("pyarrow", "timm", "nvidia.dali", "sklearn"):
    pytest.importorskip(package, reason="encoding needs the packages of bincomm[eval]")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

from bincomm import pack_signs  # noqa: E402
from bincomm.building import create_networks  # noqa: E402
from bincomm.codes import encode as encoding  # noqa: E402
from bincomm.codes.encode import (  # noqa: E402
    encode,
    open_parts,
    read_codes,
    read_rows,
    to_codes,
    to_messages,
    write_part,
)
from bincomm.config import PretrainConfig  # noqa: E402
from bincomm.data.export import write_shards  # noqa: E402
from bincomm.data.sources import Mix, Source, open_source  # noqa: E402
from bincomm.distributed.ranks import FirstRankError, Ranks  # noqa: E402
from bincomm.evaluation.features import extract, look  # noqa: E402
from bincomm.evaluation.identity import images_identity, weights_identity  # noqa: E402
from bincomm.evaluation.pretrained import Pretrained  # noqa: E402

CPU = torch.device("cpu")


def model_of(bits=20, **options):
    config = PretrainConfig(
        output="tiny",
        backbone="test_vit",
        backbone_args={"patch_size": 4, "depth": 1},
        global_size=16,
        local_size=12,
        bits=bits,
        hidden=32,
        head_std=0.1,
        precision="fp32",
        threads=1,
        **options,
    )
    model = Pretrained.of(create_networks(config, CPU)[1], config, CPU)
    # As it is drawn a bit is the same for nearly all images; so its mean becomes 0.
    logits = torch.cat([seen.logits for seen in look(model, some_digits())])
    model.head.layers[-1].bias -= logits.mean(0)
    return model


def some_digits(count=90):
    source = open_source("digits")
    return source.select(range(0, len(source.images), len(source.images) // count)[:count])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


def paths_in(folder):
    return [path for part in open_parts(folder) for path in pq.read_table(part.path)["path"].to_pylist()]


@pytest.fixture(scope="module")
def source():
    return some_digits()


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """A folder of four parts, the last with three images less."""
    folder = tmp_path_factory.mktemp("codes") / "whole"
    found = encode(model, source, folder, rows=25)
    assert (found.codes, found.bits, found.unusable, found.parts, found.made) == (90, 20, [], 4, 4)
    return folder


@pytest.mark.parametrize("bits", [20, 64])
def test_a_code_is_the_signs_of_the_logits(bits, source, tmp_path):
    model = model_of(bits)
    encode(model, source, tmp_path, rows=40, features=True)
    table = pa.concat_tables(
        pq.read_table(tmp_path / f"part-{number:05}.parquet", page_checksum_verification=True)
        for number in range(3)
    )
    assert table.column_names == ["path", "label", "code", "features"]
    assert table.schema.field("code").type == pa.binary(-(-bits // 8))
    logits = torch.cat([seen.logits for seen in look(model, source)])
    assert len((logits > 0).unique(dim=0)) > 45
    for code, row in zip(table["code"].to_pylist(), logits, strict=True):
        assert [code[j // 8] >> j % 8 & 1 for j in range(bits)] == (row > 0).int().tolist()
        assert int.from_bytes(code, "little") < 1 << bits
    assert table["path"].to_pylist() == list(source.images.names())
    assert table["label"].to_pylist() == [str(label) for label in source.labels]
    assert [path.split("/")[-2] for path in table["path"].to_pylist()] == table["label"].to_pylist()
    features = np.array(table["features"].to_pylist(), np.float32)
    assert torch.equal(torch.from_numpy(features), extract(model, source)["features"])
    codes, found = read_codes(tmp_path)
    assert found == bits
    assert torch.equal(to_messages(codes), pack_signs(logits))


def test_a_file_says_of_what_its_codes_are(whole, model, source):
    made = json.loads((whole / "encode.json").read_text())
    assert {key: made[key] for key in ("weights", "bits", "global_size", "features", "images", "rows")} == {
        "weights": "tiny",
        "bits": 20,
        "global_size": 16,
        "features": None,
        "images": 90,
        "rows": 25,
    }
    assert made["identity"] == weights_identity(model)
    assert made["images_identity"] == images_identity(source)
    for number, rows in enumerate((25, 25, 25, 15)):
        path = whole / f"part-{number:05}.parquet"
        assert json.loads(pq.read_schema(path).metadata[b"bincomm"]) == made
        assert pq.read_metadata(path).num_rows == rows
    assert (whole / "unusable.txt").read_text() == ""


def test_goes_on_with_what_is_missing(whole, model, source, tmp_path, monkeypatch):
    encode_part, made = encoding._encode_part, []

    def killed(model, images, *others):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(images.first)
        encode_part(model, images, *others)

    monkeypatch.setattr(encoding, "_encode_part", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(model, source, tmp_path, rows=25)
    (tmp_path / ".part-00002.parquet.abc.unfinished").write_bytes(b"of a process killed while it wrote")
    assert made == [0, 25]
    assert set(contents(tmp_path)) == {"part-00000.parquet", "part-00001.parquet"}
    assert len(read_codes(tmp_path)[0]) == 50  # what there is can be read
    before, made[:] = times(tmp_path), []
    encode(replace(model, name="elsewhere/tiny"), source, tmp_path, rows=25)  # the same weights
    assert made == [50, 75]
    assert not list(tmp_path.glob(".*unfinished"))
    assert contents(tmp_path) == contents(whole)
    assert before.items() <= times(tmp_path).items()
    (tmp_path / "part-00001.parquet").unlink()
    before, made[:] = times(tmp_path), []
    assert encode(model, source, tmp_path, rows=25)[3:] == (4, 1)
    assert contents(tmp_path) == contents(whole)
    assert before.items() <= times(tmp_path).items()
    assert encode(model, source, tmp_path, rows=25).made == 0


def on_two(rank, world, folder):
    ranks = Ranks(rank, world, rank, CPU)
    model, source = model_of(), some_digits()
    output = os.path.join(folder, "codes")
    assert encode(model, source, output, rows=25, ranks=ranks).made == 4
    if rank == 0:
        os.remove(os.path.join(output, "part-00003.parquet"))  # which rank 1 made; rank 0 takes it now
    torch.distributed.barrier()
    found = encode(model, source, output, rows=25, ranks=ranks)
    assert (found.codes, found.parts, found.made) == (90, 4, 1)
    with pytest.raises(FirstRankError if rank else ValueError, match="rows 25 there and 30 here"):
        encode(model, source, output, rows=30, ranks=ranks)


def test_two_ranks_write_what_one_does(whole, tmp_path):
    run_on_ranks(on_two, 2, tmp_path)
    assert contents(tmp_path / "codes") == contents(whole)


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
    found = encode(model, source, tmp_path / "codes", rows=2, features=True)
    assert (found.codes, found.parts) == (3, 3)
    assert [os.path.basename(name) for name, _ in found.unusable] == ["b.png", "e.png", "f.png"]
    listed = (tmp_path / "codes" / "unusable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [name for name, _ in found.unusable]
    assert "the file is empty" in listed[1]
    assert [os.path.basename(path) for path in paths_in(tmp_path / "codes")] == ["a.png", "c.png", "d.png"]
    assert read_rows(open_parts(tmp_path / "codes"), [2, 0]) == [
        (f"{images}/y/d.png", "y"),
        (f"{images}/x/a.png", "x"),
    ]
    assert [part.rows for part in open_parts(tmp_path / "codes")] == [1, 2, 0]
    with pytest.raises(ValueError, match="data: none of 2 images can be used"):
        encode(model, source.select([4, 5]), tmp_path / "none")


def test_images_that_could_not_be_read_are_looked_for_again(model, source, tmp_path, monkeypatch):
    images, codes = tmp_path / "images", tmp_path / "codes"
    images.mkdir()
    for number in range(20):
        data = open(source.images.name(number), "rb").read()  # noqa: SIM115
        (images / f"{number:02}.png").write_bytes(data[:40] if number == 3 else data)
    found = open_source(str(images))
    encode(model, found, tmp_path / "whole", rows=5)
    kept = [number for number in range(20) if number != 3]  # those behind it keep their own names and codes
    assert [os.path.basename(path) for path in paths_in(tmp_path / "whole")] == [f"{n:02}.png" for n in kept]
    logits = torch.cat([seen.logits for seen in look(model, source.select(kept))])
    assert torch.equal(to_messages(read_codes(tmp_path / "whole")[0]), pack_signs(logits))
    write = encoding.write_part

    def write_and_vanish(path, *rest, **named):
        write(path, *rest, **named)
        if path.name == "part-00001.parquet":
            images.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "write_part", write_and_vanish)
        lost = encode(model, found, codes, rows=5)
    assert (lost.codes, lost.parts, len(lost.unusable)) == (9, 4, 11)
    before = times(codes)
    (tmp_path / "elsewhere").rename(images)
    mended = encode(model, found, codes, rows=5)
    assert (mended.codes, mended.made) == (19, 2)  # a damaged image is no reason to make its part anew
    assert contents(codes) == contents(tmp_path / "whole")
    assert {name for name, time in times(codes).items() if before[name] == time} == {
        "part-00000.parquet",
        "part-00001.parquet",
    }
    assert encode(model, found, codes, rows=5).made == 0
    (tmp_path / "list.txt").write_text("images/01.png\nimages/04.png\n")
    listed = open_source(str(tmp_path / "list.txt"))
    (images / "04.png").unlink()  # for good: what cannot be read now either is left as it is
    assert encode(model, listed, tmp_path / "listed").unusable[0][1] == "No such file or directory"
    assert encode(model, listed, tmp_path / "listed").made == 0


def test_a_full_disk_costs_no_finished_part(model, source, small_disk):
    (small_disk / "filling").write_bytes(bytes((2 << 20) - (24 << 10)))
    with pytest.raises(OSError, match="No space left on device: .*part-0000"):
        encode(model, source, small_disk / "codes", rows=10, features=True)
    before = contents(small_disk / "codes")
    assert 0 < len(before) < 9
    (small_disk / "filling").unlink()
    assert encode(model, source, small_disk / "codes", rows=10, features=True).made == 9 - len(before)
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
    # Also of a shard inside a mix it is noticed that it changed.
    before = images_identity(mix)
    os.utime(tmp_path / "shards" / "data-00000.tar", ns=(1, 1))
    assert images_identity(mix) != before


def test_a_folder_is_of_one_kind(whole, model, source):
    before = contents(whole)
    for other, images, options, message in [
        (model_of(seed=1), source, {}, r"weights tiny \(\w+\) there and tiny \(\w+\) here"),
        (model_of(24), source, {}, "bits 20 there and 24 here"),
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
            encode(other, images, whole, **{"rows": 25, **options})
    assert contents(whole) == before


def test_what_is_wrong_is_named(whole, model, source, tmp_path):
    with pytest.raises(ValueError, match="weights: expected a head.* got tiny without"):
        encode(replace(model, head=None), source, tmp_path)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        encode(model, source, tmp_path, rows=0)
    with pytest.raises(ValueError, match="data: expected at least one image"):
        encode(model, source.select([]), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: cannot write"):
        encode(model, source, tmp_path / "file")
    broken = model_of()
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
    for name, data in contents(whole).items():
        (held / name).write_bytes(data)
    with pytest.raises(ValueError, match="output: expected a new folder, or encode.json beside"):
        encode(model, source, held)
    (held / "encode.json").write_text("[")
    with pytest.raises(ValueError, match="output: .*encode.json cannot be read"):
        encode(model, source, held)
    (held / "encode.json").write_bytes((whole / "encode.json").read_bytes())
    assert encode(model, source, held, rows=25).made == 0
    write_part(held / "part-00003.parquet", [], [], np.empty((0, 2)), {"bits": 16, "identity": "x"})
    with pytest.raises(
        ValueError, match="folder: expected files of the same codes, .*bits 20 there and 16 here"
    ):
        encode(model, source, held, rows=25)
    for path in held.glob("part-0000[012]*"):
        path.unlink()
    with pytest.raises(ValueError, match="output: the files .* are not of its encode.json: .*bits"):
        encode(model, source, held, rows=25)


def test_a_part_that_cannot_be_read_is_named(whole, tmp_path):
    with pytest.raises(ValueError, match="folder: expected one that `bincomm encode` wrote, got .*no part"):
        read_codes(tmp_path)
    data = (whole / "part-00000.parquet").read_bytes()
    path = tmp_path / "part-00000.parquet"
    column = pq.read_metadata(whole / "part-00000.parquet").row_group(0).column(2)
    assert column.path_in_schema == "code"
    damaged = bytearray(data)
    damaged[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    for wrong in (data[:-100], b"", b"no Parquet", bytes(damaged)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"folder: {path} cannot be read.*makes it again"):
            read_codes(tmp_path)
    for table in (pa.table({"code": ["a"]}), pa.table({"a": [1]}).replace_schema_metadata({"bincomm": "{}"})):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=f"folder: {path} cannot be read: no column `code`"):
            open_parts(tmp_path)


def test_rows_are_found_in_their_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "GROUP", 7)
    codes = np.arange(240, dtype=np.uint8).reshape(80, 3)
    names = [f"/images/{number}.jpg" for number in range(80)]
    labels = [None if number % 3 else f"class {number}" for number in range(80)]
    ends = (0, 10, 10, 45, 80)
    for part, (first, last) in enumerate(pairwise(ends)):
        path = tmp_path / f"part-{part:05}.parquet"
        write_part(path, names[first:last], labels[first:last], codes[first:last], {"bits": 22})
    rows = [79, 0, 9, 10, 44, 45, 6, 7, 0, 33]
    assert read_rows(open_parts(tmp_path), rows) == [(names[row], labels[row]) for row in rows]
    assert read_rows(open_parts(tmp_path), np.array([], np.int64)) == []
    assert (read_codes(tmp_path)[0] == codes).all()
    assert [len(some) for some in encoding.iterate_codes(open_parts(tmp_path))] == [10, 35, 35]
    with pytest.raises(ValueError, match="rows: expected from 0 to 79, got 3 to 80"):
        read_rows(open_parts(tmp_path), [80, 3])
    # In the order of their numbers, also where these have outgrown five figures.
    for number in (100000, 99999):
        write_part(tmp_path / f"part-{number:05}.parquet", ["x"], [None], codes[:1], {"bits": 22})
    assert [part.path.stem for part in open_parts(tmp_path)[-2:]] == ["part-99999", "part-100000"]


def test_random_codes_take_little_more_than_their_bits(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (20000, 32), dtype=np.uint8)
    names = [f"/images/n{number // 1300:08}/n{number // 1300:08}_{number}.JPEG" for number in range(20000)]
    path = tmp_path / "part-00000.parquet"
    write_part(path, names, [name.split("/")[2] for name in names], codes, {"bits": 256})
    assert path.stat().st_size < 40 * 20000
    assert (read_codes(tmp_path)[0] == codes).all()


@pytest.mark.parametrize("bits", [1, 8, 20, 32, 33, 256])
def test_codes_and_messages(bits):
    logits = torch.randn(13, bits)
    messages = pack_signs(logits)
    codes = to_codes(messages, bits)
    assert (codes == np.packbits((logits > 0).numpy(), axis=1, bitorder="little")).all()
    assert torch.equal(to_messages(codes), messages)
    codes.flags.writeable = False
    assert torch.equal(to_messages(codes), messages)
    assert torch.equal(to_messages(codes[::2]), messages[::2])
    assert (to_codes(messages.t().contiguous().t()[::3], bits) == codes[::3]).all()
    assert to_messages(codes[:0]).shape == messages[:0].shape
