"""Images to codes at rest, and back: a folder of Parquet files, which any number of ranks may go on with.

A row is an image: its `path` (string), its `label` (string, null where the data has none), its `code` and, if
asked for, the backbone's `features` (D numbers, fp32: as the network gave them, in a type all readers have).
The code of K bits is ⌈K/8⌉ bytes: bit j is bit j % 8 of byte j // 8, unused bits are 0. That is the message
of `pack_signs`, whose bit j of word w is bit 32w + j, its words' low bytes first, cut to whole bytes.
A file's schema has two keys, both JSON: `bincomm`, what the codes are of, the same as in encode.json, and
`bincomm.unusable`, the images of the file's range that have no row, and why. Whatever reads Parquet reads
FOLDER/part-*.parquet; a name that is no UTF-8 has \\udcXX for its odd bytes.
"""

import errno
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from bincomm.data.images import UnusableImageError, read
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.engine.lock import open_run
from bincomm.evaluation.identity import images_identity, weights_identity
from bincomm.files import write_file, write_json
from bincomm.ops.messages import pack_signs

if TYPE_CHECKING:  # the codes at rest are read without timm and DALI
    from bincomm.evaluation.pretrained import Pretrained

FORMAT = 1  # of the files
MADE = "encode.json"  # of what weights and images the codes are, and how the images were shown
KEY, UNUSABLE = b"bincomm", b"bincomm.unusable"  # in the schema of every file
GROUP = 1 << 13  # rows of a Parquet row group: what is read to find one path
WAIT = 0.2  # seconds between two looks for the parts of other ranks
UNREAD = set(map(os.strerror, errno.errorcode))  # reasons of images that could not be read, and may be later


class Encoded(NamedTuple):
    """What lies in a folder of codes."""

    codes: int
    bits: int
    unusable: list[tuple[str, str]]  # names of images without a code, in their order, and why
    parts: int
    made: int  # of the parts, by this call


class Part(NamedTuple):
    """A file of codes."""

    path: Path
    rows: int
    made: dict[str, Any]  # what its codes are of, as in encode.json
    unusable: list[tuple[str, str]]  # images of its range without a code, and why


def encode(
    model: "Pretrained",
    source: Source,
    output: str | Path,
    *,
    features: bool = False,
    ranks: Ranks = ALONE,
    rows: int | None = None,
) -> Encoded:
    """Write the codes of all images, or of those that an earlier call with the same arguments left.

    File `part-00000.parquet` and its successors are of `rows` images each, in the source's order, and appear
    when they are whole. The missing ones are shared out to the ranks, however many there are by now; on one
    kind of device and with one batch size a part is always the same, byte for byte. Images that cannot be
    used are left out and listed in `unusable.txt` once all parts are there. A later call makes a part anew
    that lacks images which could not be read, for want of their disk for example, and now can be.

    Args:
        model: with a head, as from `load_pretrained`.
        output: the folder, seen by all ranks.
        features: write the backbone's features, too.
        rows: images a part; None: a 64th of all, so that ranks share them and an interruption loses little,
            but at least 4 096, for to begin a part takes a moment, and at most 65 536.

    Raises:
        ValueError: the weights have no head, or give NaN; the folder is of other weights, images or options,
            or another process writes in it; no image can be used.
        OSError: it cannot be written, for want of space for example.
    """
    from bincomm.data.export import write_unusable

    if model.head is None:
        raise ValueError(
            f"weights: expected a head, the signs of whose logits are the code, got {model.name} without; "
            "a run's directory and a checkpoint have one"
        )
    if rows is None:
        rows = min(1 << 16, max(1 << 12, -(-len(source.images) // 64)))
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if not len(source.images):
        raise ValueError("data: expected at least one image, got none")
    starts = range(0, len(source.images), rows)
    with open_run(str(output), ranks) as folder:
        paths = [folder / f"part-{number:05}.parquet" for number in range(len(starts))]

        def begin() -> tuple[dict[str, Any], list[int]]:
            made = _begin(folder, _describe(model, source, features, rows))
            for start, path in zip(starts, paths, strict=True):
                if path.exists() and _lacks(_open_part(path), _Range(source, start, rows)):
                    path.unlink()
            return made, [number for number, path in enumerate(paths) if not path.exists()]

        made, missing = ranks.first(begin)
        own = [_Range(source, starts[number], rows) for number in missing[ranks.rank :: ranks.world]]
        with tqdm(
            total=sum(map(len, own)), desc="encoding", unit="img", disable=True if ranks.rank else None
        ) as bar:
            for images in own:
                _encode_part(model, images, made, paths[images.first // rows])
                bar.update(len(images))
        # Not in a collective operation, whose patience has a limit: a part may take another rank longer.
        while not all(paths[number].exists() for number in missing):
            time.sleep(WAIT)

        def end() -> Encoded:
            parts = open_parts(folder)
            unusable = [one for part in parts for one in part.unusable]
            write_unusable(folder / "unusable.txt", unusable)
            codes = sum(part.rows for part in parts)
            if not codes:
                raise ValueError(f"data: none of {len(source.images)} images can be used")
            return Encoded(codes, made["bits"], unusable, len(parts), len(missing))

        return ranks.first(end)


def write_part(
    path: Path,
    names: Sequence[str],
    labels: Sequence[str | None],
    codes: np.ndarray,
    made: dict[str, Any],
    *,
    features: np.ndarray | None = None,
    unusable: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a file of codes (n, ⌈K/8⌉) uint8, and of features (n, D) fp32, whole.

    Args:
        made: what the codes are of: "bits" at least.
        unusable: names of the images without a code among those of this file, and why.
    """
    codes = np.ascontiguousarray(codes, np.uint8)
    width = codes.shape[1]
    columns = {
        "path": pa.array(map(_utf8, names), pa.string()),
        "label": pa.array([label if label is None else _utf8(label) for label in labels], pa.string()),
        "code": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(codes), [None, pa.py_buffer(codes)]
        ),
    }
    if features is not None:
        kind = pa.list_(pa.field("element", pa.float32(), nullable=False), features.shape[1])
        numbers = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
        columns["features"] = pa.FixedSizeListArray.from_arrays(numbers, type=kind)
    fields = [pa.field(name, column.type, nullable=name == "label") for name, column in columns.items()]
    metadata = {KEY: json.dumps(made), UNUSABLE: json.dumps(list(unusable))}
    table = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata))

    def write(file: Any) -> None:
        # Codes are as good as random, no dictionary helps; neighboring paths share their beginnings.
        pq.write_table(
            table,
            file,
            row_group_size=GROUP,
            compression="zstd",
            use_dictionary=["label"],
            column_encoding={"path": "DELTA_BYTE_ARRAY", "features.list.element": "BYTE_STREAM_SPLIT"},
            write_statistics=["path", "label"],
            write_page_checksum=True,
        )

    write_file(path, write)


def open_parts(folder: str | Path) -> list[Part]:
    """The files of a folder of codes, in their order; of one that is not finished those that are there.

    Raises:
        ValueError: there is none, one cannot be read, or they are not of the same weights and options.
    """
    paths = sorted(Path(folder).glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise ValueError(
            f"folder: expected one that `bincomm encode` wrote, got {folder}, which holds no part-*.parquet"
        )
    parts = [_open_part(path) for path in paths]
    for part in parts:
        different = _differences(parts[0].made, part.made)
        if different:
            raise ValueError(
                f"folder: expected files of the same codes, got {different}, "
                f"there in {parts[0].path}, here in {part.path.name}"
            )
    return parts


def iterate_codes(parts: Iterable[Part]) -> Iterator[np.ndarray]:
    """The codes of files in their order, (n, ⌈K/8⌉) uint8, at most 65536 at a time."""
    for part in parts:
        yield from _codes(part)


def read_codes(folder: str | Path) -> tuple[np.ndarray, int]:
    """All codes of a folder, (N, ⌈K/8⌉) uint8 in the order of its files, and K.

    Raises:
        ValueError: as `open_parts`.
    """
    parts = open_parts(folder)
    bits = parts[0].made["bits"]
    codes = np.empty((sum(part.rows for part in parts), -(-bits // 8)), np.uint8)
    first = 0
    for some in iterate_codes(parts):
        codes[first : first + len(some)] = some
        first += len(some)
    return codes, bits


def read_rows(parts: Sequence[Part], rows: Sequence[int] | np.ndarray) -> list[tuple[str, str | None]]:
    """Path, as the system has it, and label of some rows of files, numbered through all of them as in
    `read_codes`; reads little more than these."""
    ends = np.cumsum([part.rows for part in parts])
    wanted = sorted(set(map(int, rows)))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < ends[-1]:
        raise ValueError(f"rows: expected from 0 to {ends[-1] - 1}, got {wanted[0]} to {wanted[-1]}")
    found: dict[int, tuple[str, str | None]] = {}
    for part, end in zip(parts, ends.tolist(), strict=True):
        first = end - part.rows
        inside = [row for row in wanted if first <= row < end]
        if not inside:
            continue
        with _reading(part.path) as file:
            for group in range(file.metadata.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                here = [row for row in inside if first <= row < last]
                if here:
                    table = file.read_row_group(group, ["path", "label"]).take([row - first for row in here])
                    names, labels = table.to_pydict().values()
                    found |= zip(here, zip(map(_as_named, names), labels, strict=True), strict=True)
                first = last
    return [found[int(row)] for row in rows]


def to_messages(codes: np.ndarray) -> Tensor:
    """Codes (N, ⌈K/8⌉) uint8 as messages (N, ⌈K/32⌉) int32: in the same memory, where K fills words and the
    codes may be written to."""
    if codes.shape[1] % 4:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return torch.from_numpy(np.require(codes, requirements=["C", "W"]).view("<i4"))


def to_codes(messages: Tensor, bits: int) -> np.ndarray:
    """Messages (N, ⌈K/32⌉) int32 as codes (N, ⌈K/8⌉) uint8."""
    words = messages.cpu().contiguous().numpy().astype("<i4", copy=False)
    return np.ascontiguousarray(words.view(np.uint8)[:, : -(-bits // 8)])


class _Range:
    """A contiguous range of a source's images, to be read as all of them are."""

    def __init__(self, source: Source, first: int, count: int):
        self.source, self.first = source, first
        self.count = min(count, len(source.images) - first)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.images.name(self.first + index)

    def read(self, index: int) -> np.ndarray:
        return self.source.images.read(self.first + index)

    def label(self, index: int) -> str | None:
        labels = self.source.labels
        return None if labels is None else self.source.classes[labels[self.first + index]]


@torch.no_grad()
def _describe(model: "Pretrained", source: Source, features: bool, rows: int) -> dict[str, Any]:
    """What makes codes what they are."""
    config, width = model.config, None
    if features:
        side = config.global_size
        width = model.backbone(torch.zeros(1, 3, side, side, device=model.device)).shape[-1]
    return {
        "format": FORMAT,
        "weights": model.name,
        "identity": weights_identity(model),
        "bits": config.bits,
        "features": width,
        "global_size": config.global_size,
        "eval_crop": config.eval_crop,
        "mean": list(config.mean),
        "std": list(config.std),
        "images": len(source.images),
        "images_identity": images_identity(source),
        "rows": rows,
    }


def _begin(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Note in a folder of what its codes are, or see that it is the same there; returns what is noted."""
    path = folder / MADE
    some = next(folder.glob("part-*.parquet"), None)
    if not path.exists():
        if some is not None:
            raise ValueError(f"output: expected a new folder, or {MADE} beside {some}, got none")
        write_json(path, made)
        return made
    try:
        there = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"output: {path} cannot be read: {error}; expected as it was written") from error
    different = _differences(there, made)
    if different:
        raise ValueError(
            f"output: {folder} is of other codes: {different}; expected the same, or a new folder"
        )
    if some is not None:
        different = _differences(there, open_parts(folder)[0].made)
        if different:
            raise ValueError(f"output: the files in {folder} are not of its {MADE}: {different}")
    return there


def _lacks(part: Part, images: _Range) -> bool:
    """Whether a file lacks an image that could not be read then, and now can be."""
    unread = {name for name, why in part.unusable if why in UNREAD}
    for number in range(len(images)) if unread else ():
        if images.name(number) in unread:
            try:
                read(images, number)
                return True
            except UnusableImageError:
                pass
    return False


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In what two descriptions of codes differ, in words; the weights' names make no difference."""
    found = []
    for key in there | here:
        pair = there.get(key), here.get(key)
        if key == "weights" or pair[0] == pair[1]:
            continue
        if key == "identity":
            pair = tuple(f"{made.get('weights')} ({made.get(key)})" for made in (there, here))
        name = {"identity": "weights", "images_identity": "names, labels or files of images"}.get(key, key)
        found.append(f"{name} {pair[0]} there and {pair[1]} here")
    return ", ".join(found)


def _encode_part(model: "Pretrained", images: _Range, made: dict[str, Any], path: Path) -> None:
    from bincomm.evaluation.features import look

    unusable: list[tuple[int, str]] = []
    numbers: list[int] = []
    messages, features = [torch.empty(0, -(-made["bits"] // 32), dtype=torch.int32)], []
    if made["features"] is not None:
        features.append(torch.empty(0, made["features"]))
    for seen in look(model, Source(images), lambda image, why: unusable.append((image, why))):
        wrong = seen.logits.isnan().any(-1)
        if wrong.any():
            name = images.name(seen.images[int(wrong.nonzero()[0])])
            raise ValueError(f"weights: {model.name} gives logits that are NaN for {name}; expected numbers")
        numbers += seen.images
        messages.append(pack_signs(seen.logits).cpu())
        if features:
            features.append(seen.features.float().cpu())
    write_part(
        path,
        [images.name(number) for number in numbers],
        [images.label(number) for number in numbers],
        to_codes(torch.cat(messages), made["bits"]),
        made,
        features=torch.cat(features).numpy() if features else None,
        unusable=[(images.name(number), why) for number, why in sorted(unusable)],
    )


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"folder: {path} cannot be read: {error}; expected a file of codes; once it is removed, the same "
            "`bincomm encode` makes it again"
        ) from error


def _open_part(path: Path) -> Part:
    with _reading(path) as file:
        schema = file.schema_arrow
        try:
            made = dict(json.loads(schema.metadata[KEY]))
            unusable = [(name, why) for name, why in json.loads(schema.metadata[UNUSABLE])]
            if schema.field("code").type == pa.binary(-(-made["bits"] // 8)):
                return Part(path, file.metadata.num_rows, made, unusable)
        except (KeyError, TypeError, ValueError):
            pass
        raise pa.ArrowInvalid("no column `code` and what it is of")


def _codes(part: Part) -> Iterator[np.ndarray]:
    """The codes of a file, a few groups at a time."""
    width = -(-part.made["bits"] // 8)
    with _reading(part.path) as file:
        for batch in file.iter_batches(8 * GROUP, columns=["code"]):
            column = batch.column(0)
            values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :]
            yield values[: len(column) * width].reshape(len(column), width)


def _utf8(name: str) -> str:
    """A name of any bytes as text: those that are no UTF-8 as \\udcXX."""
    return name.encode("utf-8", "backslashreplace").decode()


def _as_named(text: str) -> str:
    """The name that `_utf8` made a text of."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)
