"""Damaged images, tar, Parquet and annotation files through everything that reads them, for a given time.

    python tests/fuzz_readers.py --minutes 0.5
    python tests/fuzz_readers.py --seed 123      # repeats one finding

A case is a function of its seed alone. A reader must take it, or refuse it as documented, within `SECONDS`
and `MEMORY`; it runs in a child process, so that a crash or an endless loop is a finding, too.
"""

import argparse
import copy
import io
import itertools
import json
import multiprocessing
import os
import resource
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Image.init()  # all formats, also those that are not registered by default
SECONDS = 60  # for a case; docs/data.md promises a third on a quiet machine
MEMORY = 6 << 30  # bytes of address space beyond what the libraries take, twice what docs/data.md promises
MARKS = [
    b"\xff\xda",
    b"\xff\xc2",
    b"\xff\xe1",
    b"\xff\xd8",
    b"IDAT",
    b"zTXt",
    b"acTL",
    b"VP8X",
    b"ANMF",
    b"!\xfe",
]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
VALUES = [None, True, "", "../x.jpg", "\ud800", "o" * 50, [], {}, [[]], [0] * 6, [1, 2, 3, 4, 5, 6]]
VALUES += [0, -1, 0.5, -0.0, 2**31, 2**63, 10**40, 1e308, float("inf"), float("nan")]


def images() -> dict[str, bytes]:
    """Small images of every kind that is read."""
    y, x = np.mgrid[0:40, 0:60]
    color = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    kinds: list[tuple[str, Image.Image, dict]] = [
        ("JPEG", color, {"exif": exif}),
        ("JPEG", color, {"progressive": True, "icc_profile": bytes(500)}),
        ("JPEG", color.convert("CMYK"), {}),
        ("PNG", color, {"icc_profile": bytes(500)}),
        ("PNG", color.convert("P"), {"transparency": 3}),
        ("PNG", color, {"save_all": True, "append_images": [color]}),
        ("WEBP", color, {"lossless": True, "exif": exif}),
        ("WEBP", color, {"save_all": True, "append_images": [color.transpose(Image.Transpose.ROTATE_180)]}),
        ("BMP", color, {}),
        ("BMP", color.convert("P"), {}),
        ("TIFF", color, {"compression": "tiff_lzw"}),
        ("TIFF", color, {"compression": "jpeg"}),
        ("TIFF", color.convert("L"), {"save_all": True, "append_images": [color], "big_tiff": True}),
        ("GIF", color, {"comment": b"a comment", "loop": 0, "save_all": True, "append_images": [color]}),
        ("JPEG2000", color, {"tile_size": (32, 32)}),
        ("AVIF", color, {}),
    ]
    encoded = {}
    for number, (kind, image, options) in enumerate(kinds):
        if kind in Image.SAVE:
            file = io.BytesIO()
            image.save(file, kind, **options)
            encoded[f"{kind} {number}"] = file.getvalue()
    return encoded


def tars(image: bytes) -> dict[str, bytes]:
    """Small tar files of every format, with links, classes and long names."""
    written = {}
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for number, kind in enumerate(formats):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
            long = "folder/" * (5 if kind == tarfile.USTAR_FORMAT else 30)
            for name in ("train/cat/0.jpg", "val/cat/1.jpg", f"{long}2.jpg"):
                member = tarfile.TarInfo(name)
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
            for name, type in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = type, "train/cat/0.jpg"
                tar.addfile(member)
            member = tarfile.TarInfo("a.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"7"))
        written[f"tar {number}"] = file.getvalue()
    return written


def parquets(image: bytes) -> dict[str, bytes]:
    """Small Parquet files of every encoding, with labels."""
    written = {}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": image, "path": "../x.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    table = pa.table({"image": pa.array(rows * 4, struct), "label": ["cat", "dog", None] * 4})
    words = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}'
    numbers = pa.array([0, 1, -1] * 4)
    named = table.set_column(1, "label", numbers).replace_schema_metadata({b"huggingface": words})
    plain = pa.table({"image": pa.array([image] * 12), "label": numbers})
    for number, (content, options) in enumerate(
        [
            (table, {"compression": "snappy"}),
            (named, {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"}),
            (named, {"compression": "zstd", "store_schema": False}),
            (plain, {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}),
        ]
    ):
        file = io.BytesIO()
        pq.write_table(content, file, row_group_size=5, **options)
        written[f"parquet {number}"] = file.getvalue()
    return written


def annotations() -> dict[str, Any]:
    """Objects of two images in COCO's format: polygons, runs and compressed runs."""
    box = [1, 2, 3, 4]
    objects = [
        {"image_id": 1, "bbox": box, "segmentation": [[1, 2, 20, 2, 20, 15.5, 1, 12], [0, 0, 5, 0, 5, 5]]},
        {"image_id": 1, "bbox": box, "segmentation": {"size": [20, 30], "counts": [100, 200, 300]}},
        {"image_id": 2, "bbox": box, "segmentation": {"size": [7, 9], "counts": "0o1"}},
        {"image_id": 2, "bbox": box, "segmentation": {"size": [7, 9], "counts": [0, 10, 0, 0, 20, 33, 0]}},
    ]
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": height, "width": width}
            for number, height, width in ((1, 20, 30), (2, 7, 9))
        ],
        "annotations": [
            {"id": number, "iscrowd": int(number == 2), **each} for number, each in enumerate(objects, 1)
        ],
    }


def places(value: Any) -> list[tuple[Any, Any]]:
    """All places in a value of JSON: what holds it, and its key or number there."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def mutate_json(content: dict[str, Any], rng: np.random.Generator) -> bytes:
    """The content with one to three random changes: entries left out, repeated, or with other values."""
    for _ in range(int(rng.integers(1, 4))):
        there = places(content)
        if not there:
            break
        holder, key = there[int(rng.integers(len(there)))]
        value, action = holder[key], rng.random()
        if action < 0.15:
            del holder[key]
        elif action < 0.3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[int(rng.integers(len(holder)))]))
        elif action < 0.6 and type(value) in (int, float):
            scaled = value * float(rng.uniform(-2, 3))
            holder[key] = scaled if rng.random() < 0.5 else int(rng.integers(-40, 60))
        elif action < 0.7 and isinstance(value, str):
            holder[key] = "".join(map(chr, rng.integers(40, 116, int(rng.integers(7)))))
        else:
            holder[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
    return json.dumps(content).encode()


def mutate(data: bytes, rng: np.random.Generator, checksums: bool) -> bytes:
    """The data with a few random changes; the headers of a tar get right checksums again, mostly, and the
    metadata at a Parquet file's end its right length."""
    footer = 8 + int.from_bytes(data[-8:-4], "little") if data.endswith(b"PAR1") else 0
    if footer and rng.random() < 0.7:
        end = mutate(data[-footer:-8], rng, checksums)
        return data[:-footer] + end + len(end).to_bytes(4, "little") + b"PAR1"
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        # Headers are changed most: a position near the beginning is likelier.
        at = int(len(changed) * rng.random() ** rng.integers(1, 6))
        count = int(rng.integers(1, 64))
        number = int(rng.choice(NUMBERS))
        order = "<" if rng.random() < 0.5 else ">"
        actions = [
            lambda at=at: changed.__setitem__(slice(at, at + 1), bytes([int(rng.integers(256))])),
            lambda at=at: changed.__setitem__(
                slice(at, at + 1), bytes([changed[at] ^ 1 << int(rng.integers(8))])
            ),
            lambda at=at, n=number, o=order: changed.__setitem__(slice(at, at + 4), struct.pack(o + "I", n)),
            lambda at=at, n=number, o=order: changed.__setitem__(
                slice(at, at + 2), struct.pack(o + "H", n & 0xFFFF)
            ),
            lambda at=at, c=count: changed.__delitem__(slice(at, at + c)),
            lambda at=at, c=count: changed.__setitem__(slice(at, at), rng.bytes(c)),
            lambda at=at, c=count: changed.__setitem__(
                slice(at, at), bytes(changed[at : at + c]) * int(rng.integers(1, 2000))
            ),
            lambda at=at: changed.__delitem__(slice(at, None)),
            lambda at=at: changed.__setitem__(slice(at, at), MARKS[int(rng.integers(len(MARKS)))]),
        ]
        if not changed:
            break
        actions[int(rng.integers(len(actions)))](at=min(at, len(changed) - 1))
    if checksums:
        for start in range(0, len(changed) - 511, 512):
            header = changed[start : start + 512]
            if header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                changed[start + 148 : start + 156] = b"%06o\0 " % (sum(header) & 0o777777)
    return bytes(changed)


def case(seed: int) -> tuple[str, bytes]:
    """The name and the content of a seed's file."""
    rng = np.random.default_rng(seed)
    number = rng.random()
    if number > 0.9:
        return "annotations", mutate_json(annotations(), rng)
    encoded = images()
    if number < 0.2:
        kinds = tars(next(iter(encoded.values())))
    elif number < 0.4:
        kinds = parquets(next(iter(encoded.values())))
    else:
        kinds = encoded
    name = list(kinds)[int(rng.integers(len(kinds)))]
    return name, mutate(kinds[name], rng, name.startswith("tar") and rng.random() < 0.8)


class Reader:
    """What a case is given to, in the child."""

    def __init__(self, folder: Path) -> None:
        from bincomm.data.dali import decoding_pipeline

        self.folder = folder
        self.batch: list[np.ndarray] = []
        self.build = lambda: decoding_pipeline(lambda: self.batch, batch_size=1, threads=1, device_id=None)
        self.pipeline = self.build()

    def __call__(self, seed: int) -> None:
        name, data = case(seed)
        if name.startswith(("tar", "parquet")):
            self.read_shard(data, f"x.{name.split()[0]}")
        elif name == "annotations":
            self.read_annotations(data)
        else:
            self.read_image(np.frombuffer(data, np.uint8))

    def read_image(self, data: np.ndarray) -> None:
        """Examine, then decode what was let through to the size that was promised."""
        from bincomm.data.images import UnusableImageError, decoding_error, examine

        try:
            given, size = examine(data)
        except UnusableImageError as error:
            reason = str(error)
            assert reason
            return
        self.batch[:] = [given]
        try:
            (shape,) = self.pipeline.run()
        except RuntimeError:
            self.pipeline = self.build()  # DALI cannot continue after an error
            decoding_error(given)
            return
        decoded = tuple(np.array(shape.as_array()[0]).tolist())
        assert decoded == (*size, 3), f"decoded to {decoded}, promised {size}"

    def read_shard(self, data: bytes, name: str) -> None:
        """Index, then read every image."""
        from bincomm.data.images import UnusableImageError, load
        from bincomm.data.sources import evaluation_sources, open_source

        path = self.folder / name
        path.write_bytes(data)
        try:
            source = open_source(str(path))
            again = open_source(str(path))  # from its index
            evaluation_sources(str(path), source)
        except ValueError as error:
            reason = str(error)
            assert reason.startswith("data: "), reason
            return
        assert list(source.images.names()) == list(again.images.names()), "its index holds something else"
        for index in range(min(20, len(source.images))):
            try:
                load(source.images, index)
            except UnusableImageError as error:
                reason = str(error)
                assert reason

    def read_annotations(self, data: bytes) -> None:
        """Read the objects, and compare two of each image with all of them."""
        from bincomm.evaluation.coco import open_objects
        from bincomm.evaluation.objects import average_precision, encode_object

        (self.folder / "images").mkdir(exist_ok=True)
        for number in (1, 2):
            (self.folder / f"images/{number}.jpg").touch()
        (self.folder / "annotations.json").write_bytes(data)
        try:
            images = open_objects(self.folder)
        except ValueError as error:
            reason = str(error)
            assert reason
            assert "\n" not in reason
            return
        found = [
            {"image_id": image.id, "category_id": 1, "score": 1.0, "bbox": one.box}
            | {"segmentation": encode_object(one, image.shape)}
            for image in images
            for one in image.objects[:2]
        ]
        figures = [figure for of in average_precision(images, found).values() for figure in of.values()]
        assert all(0 <= figure <= 1 for figure in figures), figures


def child(connection: Connection, folder: str) -> None:
    """Reads the cases whose seeds it is sent, and answers with a traceback or nothing."""
    os.environ["BINCOMM_CACHE"] = os.path.join(folder, "cache")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries write about damage
    reader = Reader(Path(folder))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    connection.send("")
    while True:
        seed = connection.recv()
        try:
            reader(seed)
            connection.send("")
        except Exception:
            connection.send(traceback.format_exc())


class Child:
    """A child process, started again where it ended."""

    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=child, args=(other, folder), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def failure(self, seed: int) -> str:
        """What is wrong with a case; "" if nothing."""
        self.connection.send(seed)
        if not self.connection.poll(SECONDS):
            return f"it takes more than {SECONDS} s"
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f"the process ended with {self.process.exitcode}"

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def main() -> int:
    """Try cases until the time is over or one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--seed", type=int, help="try this case alone")
    options = parser.parse_args()
    start = time.monotonic()
    first = int(time.time()) << 24 if options.seed is None else options.seed
    print(f"readers: seeds from {first}, for {options.minutes:g} minutes", flush=True)
    findings, tried = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        reader = Child(folder)
        for seed in itertools.count(first):
            failure = reader.failure(seed)
            tried += 1
            if failure:
                findings += 1
                print(
                    f"{case(seed)[0]}: {failure}\nagain: python tests/fuzz_readers.py --seed {seed}",
                    flush=True,
                )
                reader.end()
                reader = Child(folder)
            if options.seed is not None or time.monotonic() - start > 60 * options.minutes or findings >= 10:
                break
        reader.end()
    print(f"readers: {tried} cases, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
