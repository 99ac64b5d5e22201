"""Parquet files with a column of images, as Hugging Face datasets has them: any image is read by its row.

Only a row group can be read, not a row of it, so those that were read last are kept. Needs pyarrow.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bincomm.data.images import LARGEST_FILE
from bincomm.data.remote import RemoteFile, RemoteReader, map_files
from bincomm.data.shards import existing_shards
from bincomm.logs import printable_name

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import FileMetaData

IMAGE_NAMES = ("image", "img")  # of the column of images, where there are several
LABEL_NAMES = ("label", "labels", "class")
KEPT = 1 << 30  # bytes of images of the row groups read last that are kept in memory
LARGEST_GROUP = 1 << 30  # bytes of images in a row group that is read
LARGE_GROUP = 1 << 26  # bytes; of larger ones only one at a time is read
SLOW_GROUP = 1 << 21  # bytes; reading one takes longer than decoding a photograph
MS_PER_MIB = 2  # of a core, to read a row group from the page cache
FEW_ROWS = 1 << 20  # that any file may claim; more need a byte of the file each
ROW_COST = 500  # bytes that a row takes in memory beside its image
NOT_OPENED = "a path in it is not opened: write such paths into a .txt file, one a line, and give that"
REWRITE = "pyarrow.parquet.write_table(pyarrow.parquet.read_table(OLD), NEW, row_group_size=100)"


class Columns(NamedTuple):
    """The columns of a file that are read."""

    image: str
    image_type: str
    label: str  # "" without
    label_type: str  # "integers" or "strings"
    classes: tuple[str, ...]  # names of the integers, where the file has them

    @property
    def encoded(self) -> str:
        """The path of the column that holds the bytes of images."""
        return f"{self.image}.bytes" if self.image_type == "struct" else self.image

    def describe(self) -> str:
        """For an error."""
        label = f"labels in {self.label} ({self.label_type})" if self.label else "no labels"
        names = f" with the names of {len(self.classes)} classes" if self.classes else ""
        return f"images in {self.image} ({self.image_type}) and {label}{names}"


class ParquetFile(NamedTuple):
    """A Parquet file that was looked at."""

    path: str
    metadata: "FileMetaData"
    columns: Columns


class ParquetImages:
    """Images in Parquet files as `Images`, each given by its row, counted over all files."""

    def __init__(self, groups: "RowGroups", rows: np.ndarray) -> None:
        self.groups, self.rows = groups, rows

    @property
    def shards(self) -> list[str]:
        """The paths of all files."""
        return [file.path for file in self.groups.files]

    @property
    def shard(self) -> np.ndarray:
        """(N,) int64, the file of each image."""
        return self.groups.file[self.group]

    @property
    def group(self) -> np.ndarray:
        """(N,) int64, the row group of each image, counted over all files."""
        return self.groups.of(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The path of an image's file and its row there, with a / between."""
        return next(self.groups.names(self.rows[[index]]))

    def names(self) -> Iterator[str]:
        """The names of all images, in order."""
        return self.groups.names(self.rows)

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (bytes,) uint8; OSError if it cannot be read."""
        return self.groups.read(int(self.rows[index]))

    def select(self, indices: Sequence[int]) -> "ParquetImages":
        """The images of these indices."""
        return ParquetImages(self.groups, self.rows[np.asarray(indices, np.int64)])

    def together(self, order: np.ndarray) -> np.ndarray:
        """An order of images, changed such that those of a row group follow each other, where its first was;
        so each row group is read once.

        Args:
            order: (n,) indices.
        """
        group = self.group[order]
        _, first, number = np.unique(group, return_index=True, return_inverse=True)
        return order[np.argsort(first[number], kind="stable")]


class RowGroups:
    """The row groups of files, of which those read last are kept."""

    def __init__(self, files: list[ParquetFile]) -> None:
        self.files = files
        counts = [file.metadata.num_row_groups for file in files]
        self.file = np.repeat(np.arange(len(files)), counts)
        self.inside = np.concatenate([np.arange(count) for count in counts])  # its number in the file
        groups = [group for file in files for group in _groups(file.metadata)]
        self.bytes = [group.total_byte_size for group in groups]  # of all columns, as the files claim
        rows = [group.num_rows for group in groups]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.file_starts = self.starts[np.concatenate([[0], np.cumsum(counts)])]
        self._kept: OrderedDict[int, list[pa.Buffer | None]] = OrderedDict()
        self._kept_bytes = 0
        self._being_read: dict[int, Future[list[pa.Buffer | None]]] = {}
        self._lock, self._one_large = threading.Lock(), threading.Lock()

    def of(self, rows: Any) -> Any:
        """The row groups of rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def names(self, rows: np.ndarray) -> Iterator[str]:
        """The names of rows, see `ParquetImages.name`."""
        file = np.searchsorted(self.file_starts, rows, side="right") - 1
        inside = (rows - self.file_starts[file]).tolist()
        return (f"{self.files[at].path}/{row}" for at, row in zip(file.tolist(), inside, strict=True))

    def read(self, row: int) -> np.ndarray:
        """See `ParquetImages.read`."""
        group = int(self.of(row))
        encoded = self._group(group)[row - int(self.starts[group])]
        if encoded is None:
            raise OSError(0, f"null: the file holds no bytes of this image; {NOT_OPENED}")
        if len(encoded) > LARGEST_FILE:
            raise OSError(0, f"{len(encoded)} bytes, more than {LARGEST_FILE}, the most that are read")
        return np.frombuffer(encoded, np.uint8).copy()  # DALI takes what can be written

    def _group(self, group: int) -> list["pa.Buffer | None"]:
        """The images of a row group; threads that want the same one wait for the first of them."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            other = self._being_read.get(group)
            future = other or self._being_read.setdefault(group, Future())
        if other:
            return other.result()
        try:
            images = self._read_group(group)
        except BaseException as error:
            with self._lock:
                del self._being_read[group]
            future.set_exception(error)
            raise
        with self._lock:
            del self._being_read[group]
            self._kept[group] = images
            self._kept_bytes += _memory(images)
            while self._kept_bytes > KEPT and self._kept:
                self._kept_bytes -= _memory(self._kept.popitem(last=False)[1])
        future.set_result(images)
        return images

    def _read_group(self, group: int) -> list["pa.Buffer | None"]:
        size, claimed = self.bytes[group], int(np.diff(self.starts)[group])
        with self._one_large if size > LARGE_GROUP else nullcontext():
            images = list(self._rows(group))
        if len(images) != claimed:
            raise OSError(0, f"its row group has {len(images)} rows, and claims {claimed}")
        return images

    def has_images(self) -> bool:
        """Whether the first row group that has rows holds an image, as far as it can be read."""
        try:
            return any(image is not None for image in self._rows(int(self.of(0))))
        except (OSError, MemoryError):  # reported when an image is read
            return True

    def _rows(self, group: int) -> Iterator["pa.Buffer | None"]:
        """The images of a row group, None for null; OSError if it cannot be read."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile as Reader

        path, metadata, columns = self.files[self.file[group]]
        read = 0
        try:
            # Opened each time: a file that was removed is noticed, and no limit on open files is reached.
            with _open(path) as file:
                # One row at a time, because all may be one large image, of which the file has one copy.
                for batch in Reader(file, metadata=metadata, pre_buffer=False).iter_batches(
                    1, row_groups=[int(self.inside[group])], columns=[columns.encoded], use_threads=False
                ):
                    values = batch.column(columns.image)
                    if columns.image_type == "struct":  # flattened, bytes are null where the struct is
                        values = values.flatten()[values.type.get_field_index("bytes")]
                    image = values[0].as_buffer()
                    read += len(image or b"")
                    if read > LARGEST_GROUP:
                        raise OSError(0, f"it is in a row group of more than {LARGEST_GROUP} bytes of images")
                    yield image
        except pa.ArrowException as error:
            raise OSError(0, f"its row group is damaged: {_first_line(error)}") from None
        except OSError as error:
            if error.errno:
                raise OSError(error.errno, os.strerror(error.errno)) from None
            raise OSError(0, error.strerror or f"its row group is damaged: {_first_line(error)}") from None


def open_parquet(paths: Iterable[str]) -> tuple[ParquetImages, list[str], list[str]]:
    """The images of Parquet files, in order; for each the word of its class, "" without one; and notes.

    The column of images is one of structs with binary `bytes`, or a binary one: `image`, `img`, or the only
    one. The column of labels, of integers or strings, is `label`, `labels`, `class`, or the only one that
    the metadata of Hugging Face datasets calls a ClassLabel; there are the names of integers, too. Only
    metadata, labels and one row group of images are read.

    Raises:
        ValueError: a file does not exist or is no Parquet file, has no such column or several, other columns
            than the first file, a row group that is too large, or no images but paths to them.
        ImportError: without pyarrow.
    """
    paths = existing_shards(paths)
    looked_at = [_look_at(path, None) for path in paths[:1]]
    looked_at += map_files(lambda path: _look_at(path, looked_at[0][0]), paths[1:])
    files = [file for file, _ in looked_at]
    words = [word for _, labels in looked_at for word in labels]
    if not words:
        raise ValueError(f"data: no rows in {', '.join(map(printable_name, paths[:3])) or 'no shards'}")
    groups = RowGroups(files)
    images = ParquetImages(groups, np.arange(len(words)))
    if not groups.has_images():
        raise ValueError(
            f"data: {printable_name(paths[images.shard[0]])} holds no images: {files[0].columns.encoded} is "
            f"null in all rows of its first row group; {NOT_OPENED}"
        )
    return images, words, _notes(groups)


def _look_at(path: str, first: ParquetFile | None) -> tuple[ParquetFile, list[str]]:
    """A file, and the words of its rows' classes."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile as Reader
    except ImportError as error:
        raise ImportError("Parquet files as data need pyarrow") from error
    try:
        with _open(path) as file:
            size = file.size()
            reader = Reader(file)
            metadata, schema = reader.metadata, reader.schema_arrow
            columns = _columns(path, schema)
            if first and columns != first.columns:
                raise ValueError(
                    f"data: {printable_name(path)} has {columns.describe()}; expected "
                    f"{first.columns.describe()}, as in {printable_name(first.path)}"
                )
            _check_sizes(path, metadata, size)
            if not columns.label:
                return ParquetFile(path, metadata, columns), [""] * metadata.num_rows
            # As a dictionary: a long word is in memory once, however many rows have it.
            reader = Reader(
                file, metadata=metadata, read_dictionary=[columns.label] * (columns.label_type == "strings")
            )
            column = reader.read([columns.label], use_threads=False).column(columns.label)
            words = _words(path, column, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(
                f"data: cannot read {printable_name(path)}: {os.strerror(error.errno)}"
            ) from error
        raise ValueError(
            f"data: {printable_name(path)} is no Parquet file, or a damaged one: {_first_line(error)}"
        ) from error
    if len(words) != metadata.num_rows:
        raise _damaged(path, f"{len(words)} rows in {columns.label}, of {metadata.num_rows}")
    return ParquetFile(path, metadata, columns), words


def _columns(path: str, schema: "pa.Schema") -> Columns:
    """The columns of images and of labels.

    Raises:
        ValueError: there is none of images, or several.
    """
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    fields = [field for field in schema if schema.names.count(field.name) == 1]
    structs = [
        field.name
        for field in fields
        if types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and is_binary(field.type.field("bytes").type)
    ]
    images = structs or [field.name for field in fields if is_binary(field.type)]
    image = _choice(images, IMAGE_NAMES)
    if not image:
        all_columns = ", ".join(f"{field.name} ({_short(field.type)})" for field in list(schema)[:20])
        raise ValueError(
            f"data: {printable_name(path)} has {'several columns' if images else 'no column'} of images: "
            "expected image or img, or just one of structs with binary bytes, or of binary values; got "
            + printable_name(all_columns or "no columns")
        )
    features = _class_labels(schema.metadata or {})
    kinds = {}
    for field in fields:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_integer(kind):
            kinds[field.name] = "integers"
        elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            kinds[field.name] = "strings"
    named = [name for name in LABEL_NAMES if name in kinds]
    label = (named or [""])[0] or _choice([name for name in features if name in kinds], LABEL_NAMES)
    kind = kinds.get(label, "")
    return Columns(
        image,
        "struct" if structs else "binary",
        label,
        kind,
        features.get(label, ()) if kind == "integers" else (),
    )


def _choice(names: Sequence[str], preferred: Sequence[str]) -> str:
    """The first preferred of some names, or the only one; "" if there is neither."""
    return next((name for name in preferred if name in names), names[0] if len(names) == 1 else "")


def _class_labels(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The columns that Hugging Face's metadata calls class labels, and the names of their classes."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: tuple(" ".join(word.split()) for word in feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):  # none, or of another form
        return {}


def _words(path: str, column: "pa.ChunkedArray", columns: Columns) -> list[str]:
    """The word of each row's class: its name, else the value itself; "" for null, and for −1, which stands
    for an unknown class."""
    import pyarrow.types as types

    if not types.is_dictionary(column.type):
        column = column.dictionary_encode()
    repeated = {name for name in columns.classes if columns.classes.count(name) > 1}

    def word(value: Any) -> str:
        if value is None or value == -1:
            return ""
        if not columns.classes:
            return " ".join(str(value).split())
        if not 0 <= value < len(columns.classes):
            raise ValueError(
                f"data: {printable_name(path)} holds {value} in {columns.label}; expected -1 or one of 0 to "
                f"{len(columns.classes) - 1}, the classes that the file names"
            )
        name = columns.classes[value]
        return f"{name} ({value})" if name in repeated or not name else name

    words: list[str] = []
    for chunk in column.chunks:
        chunk.validate(full=True)  # the indices of a damaged file lie anywhere
        known = [*map(word, chunk.dictionary.to_pylist()), ""]
        indices = chunk.indices.fill_null(len(known) - 1) if chunk.null_count else chunk.indices
        words += [known[index] for index in indices.to_pylist()]
    return words


def _check_sizes(path: str, metadata: "FileMetaData", size: int) -> None:
    """Raise ValueError for claims that a file of `size` bytes cannot keep, and for row groups too large."""
    # Not those about columns, which pyarrow checks when it reads: its function that returns them, `column`,
    # ends the process at some damage.
    groups = _groups(metadata)
    rows = [group.num_rows for group in groups]
    if sum(rows) != metadata.num_rows or min(rows, default=0) < 0 or sum(rows) > max(size, FEW_ROWS):
        raise _damaged(path, f"it claims {metadata.num_rows} rows in {size} bytes")
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > LARGEST_GROUP:
        raise ValueError(
            f"data: {printable_name(path)} has a row group of {largest >> 20} MiB; expected at most "
            f"{LARGEST_GROUP >> 20}, because to read an image is to read its row group; "
            f"`{REWRITE}` writes smaller ones"
        )


def _notes(groups: RowGroups) -> list[str]:
    """What a user should know: that row groups take long to read."""
    total = sum(groups.bytes)
    mean = total // len(groups.bytes)
    if mean <= SLOW_GROUP or total <= KEPT:
        return []
    return [
        f"the Parquet files have row groups of {groups.starts[-1] // len(groups.bytes)} images and "
        f"{mean >> 20} MiB; in random order, as in training, each image costs reading one, about "
        f"{mean / 2**20 * MS_PER_MIB:.0f} ms of a core; `bincomm data shard` writes tar shards, from which "
        "an image is read alone"
    ]


def _open(path: str) -> Any:
    """A file for pyarrow, which would take a name like s3://x for an address and fetch it."""
    import pyarrow as pa

    if isinstance(path, RemoteFile):
        return pa.PythonFile(RemoteReader(path), "r")
    return pa.OSFile(os.fsencode(path))


def _memory(images: list["pa.Buffer | None"]) -> int:
    return sum(ROW_COST + len(image or b"") for image in images)


def _groups(metadata: "FileMetaData") -> list[Any]:
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def _damaged(path: str, reason: str) -> ValueError:
    return ValueError(f"data: {printable_name(path)} is damaged: {reason}")


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) < 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    return printable_name((str(error).splitlines() or [type(error).__name__])[0])
