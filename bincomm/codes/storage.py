"""Codes at rest: a folder of Parquet files, `part-00000.parquet` and its successors.

A row is an image: its `path` (string), its `label` (string, null where the data has none), its `code` and
optionally the backbone's `features` (D numbers, fp32: as the network gave them, in a type all readers have).
The code of K bits is ⌈K/8⌉ bytes: bit j is bit j % 8 of byte j // 8, unused bits are 0. That is the message
of `pack_signs`, whose bit j of word w is bit 32w + j, low bytes of the words first, cut to ⌈K/8⌉ bytes.
The schema of a file has three keys, all JSON: `bincomm` describes the codes as encode.json does,
`bincomm.unusable` lists the images of the file's range that have no row, and why, and `bincomm.checksums` has
the CRC-32 of these two and the number of rows, of all codes, and of each row group's paths and labels:
Parquet's own checksums leave out how its pages are to be read. Whatever reads Parquet reads
FOLDER/part-*.parquet; in a name that is not UTF-8 the odd bytes are written as \\udcXX.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bincomm.files import write_file

# In the schema of every file; files of earlier versions have no checksums.
METADATA_KEY, UNUSABLE_KEY, CHECKSUMS_KEY = b"bincomm", b"bincomm.unusable", b"bincomm.checksums"
TEXTS = pa.schema({"path": pa.string(), "label": pa.string()})
COUNTS = ("bits", "features", "images", "rows")  # of the metadata; features: None where there are none
ROW_GROUP = 1 << 13  # rows of a Parquet row group: what is read to find one path


class Part(NamedTuple):
    """A file of codes."""

    path: Path
    rows: int
    metadata: dict[str, Any]  # what describes its codes, as in encode.json
    unusable: list[tuple[str, str]]  # images of its range without a code, and why
    checksums: dict[str, Any] | None  # of its content; None: of an earlier version


def write_part(
    path: Path,
    names: Sequence[str],
    labels: Sequence[str | None],
    codes: np.ndarray,
    metadata: dict[str, Any],
    *,
    features: np.ndarray | None = None,
    unusable: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a file of codes (n, ⌈K/8⌉) uint8, and of features (n, D) fp32, completely or not at all.

    Args:
        metadata: what describes the codes: "bits" at least.
        unusable: names of the images without a code among those of this file, and why.

    Raises:
        OSError: the file cannot be written, for want of space for example.
    """
    codes = np.ascontiguousarray(codes, np.uint8)
    width = codes.shape[1]
    columns = {
        "path": pa.array(map(_to_utf8, names), pa.string()),
        "label": pa.array([label if label is None else _to_utf8(label) for label in labels], pa.string()),
        "code": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(codes), [None, pa.py_buffer(codes)]
        ),
    }
    if features is not None:
        kind = pa.list_(pa.field("element", pa.float32(), nullable=False), features.shape[1])
        numbers = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
        columns["features"] = pa.FixedSizeListArray.from_arrays(numbers, type=kind)
    fields = [pa.field(name, column.type, nullable=name == "label") for name, column in columns.items()]
    about = {METADATA_KEY: json.dumps(metadata), UNUSABLE_KEY: json.dumps(list(unusable))}
    texts = [columns["path"], columns["label"]]
    checksums = {
        "about": _checksum_about(about.values(), len(codes)),
        "code": zlib.crc32(codes.data),
        "rows": [
            _checksum_texts([column.slice(first, ROW_GROUP) for column in texts])
            for first in range(0, len(codes), ROW_GROUP)
        ],
    }
    schema = pa.schema(fields, {**about, CHECKSUMS_KEY: json.dumps(checksums)})
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)

    def write(file: Any) -> None:
        # Codes are as good as random, so no dictionary helps; neighboring paths share their beginnings.
        pq.write_table(
            table,
            file,
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=["label"],
            column_encoding={"path": "DELTA_BYTE_ARRAY", "features.list.element": "BYTE_STREAM_SPLIT"},
            write_statistics=["path", "label"],
            write_page_checksum=True,
        )

    write_file(path, write)


def open_part(path: Path) -> Part:
    """Open one file of codes; only its metadata are read.

    Raises:
        ValueError: it cannot be read, or is not a file of codes.
    """
    with _open_parquet(path) as file:
        schema = file.schema_arrow
        try:
            about = [schema.metadata[key].decode() for key in (METADATA_KEY, UNUSABLE_KEY)]
            metadata = dict(json.loads(about[0]))
            if not all(type(n) is int and n > 0 for key in COUNTS if (n := metadata.get(key, 1)) is not None):
                raise ValueError("counts are positive integers")
            unusable = [(name, why) for name, why in json.loads(about[1])]
            fits = schema.field("code").type == pa.binary(-(-metadata["bits"] // 8))
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise pa.ArrowInvalid("no column `code` with a description of it")
        checksums = None
        if CHECKSUMS_KEY in schema.metadata:
            checksums = dict(json.loads(schema.metadata[CHECKSUMS_KEY]))
            _compare(_checksum_about(about, file.metadata.num_rows), checksums["about"])
        return Part(path, file.metadata.num_rows, metadata, unusable, checksums)


def open_parts(folder: str | Path) -> list[Part]:
    """Open the files of a folder of codes, in their order; in an unfinished folder, those that exist.

    Raises:
        ValueError: there is none, one cannot be read, or they are not of the same weights and options.
    """
    paths = sorted(Path(folder).glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise ValueError(
            f"folder: expected one that `bincomm encode` wrote, got {folder}, which holds no part-*.parquet"
        )
    parts = [open_part(path) for path in paths]
    for part in parts:
        difference = describe_difference(parts[0].metadata, part.metadata)
        if difference:
            raise ValueError(
                f"folder: expected files of the same codes, got {difference}, "
                f"there in {parts[0].path}, here in {part.path.name}"
            )
    return parts


def iterate_codes(parts: Iterable[Part]) -> Iterator[np.ndarray]:
    """The codes of files in their order, (n, ⌈K/8⌉) uint8, at most 65536 at a time.

    Raises:
        ValueError: a file cannot be read, or is damaged, which may show only at its end.
    """
    for part in parts:
        width, rows, checksum = -(-part.metadata["bits"] // 8), 0, 0
        with _open_parquet(part.path) as file:
            for batch in file.iter_batches(8 * ROW_GROUP, columns=["code"]):
                column = batch.column(0)
                values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :]
                values = values[: len(column) * width].reshape(len(column), width)
                rows, checksum = rows + len(column), zlib.crc32(values.data, checksum)
                if rows <= part.rows:  # else it is damaged; callers have room for as many as it promised
                    yield values
            if rows != part.rows:
                raise pa.ArrowInvalid(f"it has {rows} codes and says {part.rows}")
            if part.checksums is not None:
                _compare(checksum, part.checksums["code"])


def verify_part(part: Part) -> None:
    """Compare all checksums of a file.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    for _ in iterate_codes([part]):
        pass
    read_rows([part], range(0, part.rows, ROW_GROUP))


def read_codes(folder: str | Path) -> tuple[np.ndarray, int]:
    """All codes of a folder, (N, ⌈K/8⌉) uint8 in the order of its files, and K.

    Raises:
        ValueError: as `open_parts`.
    """
    parts = open_parts(folder)
    bits = parts[0].metadata["bits"]
    codes = np.empty((sum(part.rows for part in parts), -(-bits // 8)), np.uint8)
    first = 0
    for batch in iterate_codes(parts):
        codes[first : first + len(batch)] = batch
        first += len(batch)
    return codes, bits


def read_rows(parts: Sequence[Part], rows: Sequence[int] | np.ndarray) -> list[tuple[str, str | None]]:
    """Path (as the file system has it) and label of some rows, numbered through all files as in `read_codes`;
    reads little more than these.

    Raises:
        ValueError: there is no such row, or a file cannot be read.
    """
    ends = np.cumsum([part.rows for part in parts])
    wanted = sorted(set(map(int, rows)))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < ends[-1]:
        raise ValueError(f"rows: expected from 0 to {ends[-1] - 1}, got {wanted[0]} to {wanted[-1]}")
    result: dict[int, tuple[str, str | None]] = {}
    for part, end in zip(parts, ends.tolist(), strict=True):
        first = end - part.rows
        of_part = [row for row in wanted if first <= row < end]
        if not of_part:
            continue
        with _open_parquet(part.path) as file:
            for group in range(file.metadata.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                of_group = [row for row in of_part if first <= row < last]
                if of_group:
                    table = file.read_row_group(group, ["path", "label"]).cast(TEXTS)
                    if part.checksums is not None:
                        texts = [column.combine_chunks() for column in table.columns]
                        _compare(_checksum_texts(texts), part.checksums["rows"][group])
                    names, labels = table.take([row - first for row in of_group]).to_pydict().values()
                    pairs = zip(map(_from_utf8, names), labels, strict=True)
                    result |= zip(of_group, pairs, strict=True)
                first = last
    return [result[int(row)] for row in rows]


def describe_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In what the metadata of codes differ, in words; the names of the weights make no difference."""
    differences = []
    for key in there | here:
        if key == "weights" or there.get(key) == here.get(key):
            continue
        name, pair = key, [there.get(key), here.get(key)]
        if key == "identity":
            name, pair = "weights", [f"{one.get('weights')} ({one.get(key)})" for one in (there, here)]
        elif key == "images_identity":
            name = "names, labels or files of images"
        differences.append(f"{name} {pair[0]} there and {pair[1]} here")
    return ", ".join(differences)


def to_messages(codes: np.ndarray) -> Tensor:
    """Codes (N, ⌈K/8⌉) uint8 as messages (N, ⌈K/32⌉) int32; they share memory where K fills words and the
    codes are writable."""
    if codes.shape[1] % 4:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return torch.from_numpy(np.require(codes, requirements=["C", "W"]).view("<i4"))


def to_codes(messages: Tensor, bits: int) -> np.ndarray:
    """Messages (N, ⌈K/32⌉) int32 as codes (N, ⌈K/8⌉) uint8."""
    words = messages.cpu().contiguous().numpy().astype("<i4", copy=False)
    return np.ascontiguousarray(words.view(np.uint8)[:, : -(-bits // 8)])


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A file of codes to read; whatever goes wrong in it is an error that names it."""
    try:
        # Opened here, because Arrow takes only names that are UTF-8.
        with open(path, "rb") as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            yield file
    except Exception as error:  # what a damage makes of a file is of any kind
        raise ValueError(
            f"folder: {path} cannot be read: {error}; expected a file of codes; once it is removed, the same "
            "`bincomm encode` makes it again"
        ) from error


def _checksum_about(texts: Iterable[str], rows: int) -> int:
    """The CRC-32 of what describes a file, and of its number of rows."""
    return zlib.crc32(json.dumps([*texts, rows]).encode())


def _checksum_texts(columns: Iterable[pa.StringArray]) -> int:
    """The CRC-32 of columns of texts: of each one's lengths, of which are null, and of their bytes."""
    checksum = 0
    for column in columns:
        _, ends, data = column.buffers()
        ends = np.frombuffer(ends, np.int32)[column.offset :][: len(column) + 1] if len(column) else [0]
        checksum = zlib.crc32(np.diff(ends).data, checksum)
        checksum = zlib.crc32(column.is_null().to_numpy(zero_copy_only=False).data, checksum)
        checksum = zlib.crc32((data or pa.py_buffer(b""))[ends[0] : ends[-1]], checksum)
    return checksum


def _compare(checksum: int, expected: int) -> None:
    if checksum != expected:
        raise pa.ArrowInvalid("it is damaged, for a checksum is wrong")


def _to_utf8(name: str) -> str:
    """A name of any bytes as text: those that are not UTF-8 as \\udcXX."""
    return name.encode("utf-8", "backslashreplace").decode()


def _from_utf8(text: str) -> str:
    """The name that `_to_utf8` made a text of."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)
