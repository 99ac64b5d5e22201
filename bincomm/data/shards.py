"""Tar shards in WebDataset's layout: indexed once, then any image is read by its offset and size."""

import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from bincomm.data.cache import cache_folder, read_cached, write_cached
from bincomm.data.images import ARRAYS, EXTENSIONS, check_large, read_file
from bincomm.data.remote import RemoteFile, RemoteReader, map_files
from bincomm.logs import printable_name

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FORMAT = f"7 {EXTENSIONS}"  # of an index; one of another format is ignored
PARALLEL = 4  # number of shards without an index from which starting several processes pays off
READ_AHEAD = 1 << 23  # bytes, of a shard that is stored elsewhere; looking for its members reads most of it
MAX_PADDING = 1 << 16  # bytes that a tar file may have after its end mark; writers fill up blocks of 10 KiB
# Types of what describes the next member, or all that follow.
DESCRIPTIONS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
LARGEST_DESCRIPTION = 1 << 20  # bytes; a name takes at most 4 KiB, extended attributes 64
END = 1 << 62  # bytes; an offset beyond does not fit into an index
MAX_GLOBAL = 1000  # descriptions of all that follows, which every member gets a copy of
MAX_LINKS = 40  # length of a chain of links that is followed
# What tarfile raises for damage; it calls itself for a header that describes another.
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
Span = tuple[int, int]  # offset and size in a shard, bytes


class Shards:
    """Images in tar files as `Images`, each given by its shard, its offset and its size."""

    def __init__(
        self, shards: list[str], shard: np.ndarray, offset: np.ndarray, size: np.ndarray, members: list[str]
    ) -> None:
        self.shards = shards
        self.shard, self.offset, self.size, self.members = shard, offset, size, members

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """The path of an image's shard and its name there, with a / between."""
        return f"{self.shards[self.shard[index]]}/{self.members[index]}"

    def names(self) -> Iterator[str]:
        """The names of all images, in order."""
        return (self.name(index) for index in range(len(self)))

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (bytes,) uint8; OSError if it cannot be read."""
        path, offset, size = self.shards[self.shard[index]], int(self.offset[index]), int(self.size[index])
        if isinstance(path, RemoteFile):
            check_large(size, lambda count: path.read(offset, count).tobytes())
            data = path.read(offset, size)
        else:
            # Opened for every image: a shard that was removed is noticed, and no limit on open files is
            # reached.
            data = read_file(path, offset, size)
        if len(data) < size:
            raise OSError(0, "the shard ends before the image does")
        return data

    def select(self, indices: Sequence[int]) -> "Shards":
        """The images of these indices."""
        rows = np.asarray(indices, np.int64)
        members = [self.members[index] for index in rows]
        return Shards(self.shards, self.shard[rows], self.offset[rows], self.size[rows], members)


def expand_braces(pattern: str) -> list[str]:
    """The names that `data-{000..127}.tar` stands for, with leading zeros as there; `{train,val}` and
    `{000..099,200}` are lists."""
    match = re.search(r"\{([^{},]+(?:,[^{},]+)+|\d+\.\.\d+)\}", pattern)
    if match is None:
        return [pattern]
    words = [word for part in match[1].split(",") for word in _range(part)]
    names = [f"{pattern[: match.start()]}{word}{pattern[match.end() :]}" for word in words]
    return [expanded for name in names for expanded in expand_braces(name)]


def _range(part: str) -> list[str]:
    """The numbers of a range such as 000..127, else the part itself."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", part)
    if match is None:
        return [part]
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def open_shards(paths: Iterable[str]) -> tuple[Shards, list[str], list[str]]:
    """The images of tar files, in order; for each the word in its sample's .cls file, "" without one; and
    notes on what could not be read of damaged shards.

    Indices are built on first use, by several processes if there are many shards, and stored in the cache.

    Raises:
        ValueError: a shard does not exist, cannot be read or is no tar file; there is no image in any.
    """
    paths = existing_shards(paths)
    local = [path for path in paths if not isinstance(path, RemoteFile)]
    unknown = [path for path in local if not os.path.exists(_index_path(path))]
    if len(unknown) >= PARALLEL:
        _index_in_parallel(unknown)
    new = [path for path in paths if isinstance(path, RemoteFile) and not os.path.exists(_index_path(path))]
    if new:
        gib = sum(path.size for path in new) / 2**30
        logger.info("reading %d shards (%.3g GiB) once, for an index of their images", len(new), gib)
    indices = map_files(_index, paths)
    rows = [row for _, shard_rows in indices for row in shard_rows]
    if not rows:
        names = ", ".join(map(printable_name, paths[:3]))
        raise ValueError(f"data: no images ({', '.join(EXTENSIONS)}) in {names or 'no shards'}")
    shard = np.repeat(np.arange(len(indices)), [len(shard_rows) for _, shard_rows in indices])
    offset, size = (np.array([int(row[column]) for row in rows], np.int64) for column in (0, 1))
    classes, members = ([row[column] for row in rows] for column in (2, 3))
    notes = [f"{path} {note}" for path, (note, _) in zip(paths, indices, strict=True) if note]
    return Shards(paths, shard, offset, size, members), classes, notes


def existing_shards(paths: Iterable[str]) -> list[str]:
    """The absolute paths of files; those of `RemoteFile` stay as they are.

    Raises:
        ValueError: there is no file at one of them.
    """
    paths = [path if isinstance(path, RemoteFile) else os.path.abspath(path) for path in paths]
    missing = [path for path in paths if not isinstance(path, RemoteFile) and not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: there is no shard {printable_name(missing[0])}{more}")
    return paths


def _index_path(path: str) -> Path:
    """The path of a shard's index, which is different for each file and for each state of it."""
    if isinstance(path, RemoteFile):
        key = f"{FORMAT} {path.key}"
    else:
        status = os.stat(path)
        key = f"{FORMAT} {path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return cache_folder("indices") / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.tsv"


def _index_in_parallel(paths: list[str]) -> None:
    """Build the indices of many shards in other processes; those that fail are built later."""
    # Not by multiprocessing, whose children begin with the caller's program or with this process's threads.
    # Isolated, because python -m and -c import from the working directory first, which may be that of a data
    # set with a tarfile.py of its own.
    workers = min(len(paths), len(os.sched_getaffinity(0)))
    package = os.path.realpath(Path(__file__).parents[2])
    imported_from = [
        folder
        for folder in map(os.path.realpath, filter(None, sys.path))
        if folder == package or folder != os.path.realpath(os.getcwd())
    ]
    code = (
        f"import sys; sys.path[:] = {imported_from!r}\nfrom {__name__} import build_indices\nbuild_indices()"
    )
    command = [sys.executable, "-I", "-c", code]
    try:
        processes = [
            subprocess.Popen([*command, *paths[first::workers]], stderr=subprocess.DEVNULL)
            for first in range(workers)
        ]
    except OSError:  # no interpreter, or too many names for one command
        return
    for process in processes:
        process.wait()


def build_indices() -> None:
    """What a process of `_index_in_parallel` does: build the indices of the shards that are its arguments."""
    for path in sys.argv[1:]:
        _index(path)


def _index(path: str) -> tuple[str, list[list[str]]]:
    """A note on a shard's damage, and offset, size, class and name of each of its images, from its index."""
    index = _index_path(path)
    try:
        first, *lines = os.fsdecode(read_cached(index)).split("\n")[:-1]
        count, note = first.split("\t")
        rows = [line.split("\t", 3) for line in lines]
        if len(rows) == int(count) and all(
            len(row) == 4 and row[0].isdigit() and row[1].isdigit() for row in rows
        ):
            return note, rows
    except (OSError, ValueError):
        pass
    note, rows = _read_tar(path)
    with suppress(OSError):  # it is built again the next time
        write_cached(index, "".join("\t".join(row) + "\n" for row in [[str(len(rows)), note], *rows]))
    return note, rows


def _read_tar(path: str) -> tuple[str, list[list[str]]]:
    """The result of `_index`, read from the shard itself."""
    contents = Contents([], [], {}, {}, {})
    note = ""
    try:
        with _open(path) as file, tarfile.open(path, "r:", fileobj=file, tarinfo=Header) as tar:
            try:
                while member := tar.next():
                    if not member.offset < tar.offset < END:
                        raise tarfile.ReadError("a member of a size below 0, or beyond any disk's")
                    if len(tar.pax_headers) > MAX_GLOBAL:
                        raise tarfile.ReadError(f"more than {MAX_GLOBAL} global headers")
                    _add(tar, member, contents)
            except DAMAGE as error:
                if not (contents.images or contents.arrays):
                    raise
                note = f"is damaged, and was not read to its end: {error}"
            end = tar.offset
        note = note or _beyond(path, end)
    except DAMAGE as error:
        raise ValueError(
            f"data: {printable_name(path)} is no uncompressed tar file, or an incomplete one: "
            + printable_name(str(error))
        ) from error
    except OSError as error:
        raise ValueError(f"data: cannot read {printable_name(path)}: {error.strerror}") from error
    for link in contents.links:
        target = contents.follow(link)
        if target in contents.classes:
            contents.classes[link] = contents.classes[target]
    if not contents.images:
        contents.images.extend(contents.arrays)
    words = contents.words()
    taken, parts = contents.without_parts(words)
    if parts:
        note += f"{'; ' if note else ''}holds {len(parts)} images that are parts of samples with another "
        note += f"image, such as {parts[0]}, which were not taken"
    rows = []
    for name, span in taken:
        # A broken link is an empty image, which will be reported as unusable.
        offset, size = span or contents.spans.get(contents.follow(name), (0, 0))
        word = words.get(os.path.splitext(name)[0], words.get(_sample(name), ""))
        rows.append([str(offset), str(size), word, name])
    return " ".join(note.split()), rows


def _beyond(path: str, end: int) -> str:
    """A note on what a tar file holds from its end mark on, which should be at this byte; "" if nothing."""
    with _open(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(end)
        mark = file.read(512)
    rest = size - end
    if len(mark) < 512 or any(mark):
        return f"is cut off or damaged at byte {end}: {max(0, rest)} bytes from there on were not read"
    if rest > MAX_PADDING:
        return f"holds {rest} bytes beyond its end, which were not read"
    return ""


def _open(path: str) -> IO[bytes]:
    """A shard, to be read from its beginning to its end."""
    if isinstance(path, RemoteFile):
        return io.BufferedReader(RemoteReader(path), READ_AHEAD)
    return open(path, "rb")


class Header(tarfile.TarInfo):
    """The header of a member, which must not claim what would take all memory, or never end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Self":
        """As of `tarfile.TarInfo`."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        # What describes the next member, such as a long name, is read at once.
        if header.type in DESCRIPTIONS and header.size > LARGEST_DESCRIPTION:
            raise tarfile.ReadError(f"a header of {header.size} bytes, more than {LARGEST_DESCRIPTION}")
        return header


class Contents(NamedTuple):
    """Members of a tar file by their names, without ./ at the front or any .. inside."""

    images: list[tuple[str, Span | None]]  # in order; None for a link
    arrays: list[tuple[str, Span | None]]  # alike, taken where there are no images
    spans: dict[str, Span]
    links: dict[str, str]
    classes: dict[str, str]

    def words(self) -> dict[str, str]:
        """The words of .cls files, by name without .cls and, where those of a sample agree, by sample."""
        words: dict[str, str] = {}
        by_sample: dict[str, set[str]] = {}
        for name, word in self.classes.items():
            if name.endswith(".cls"):
                words[name.removesuffix(".cls")] = word
                by_sample.setdefault(_sample(name), set()).add(word)
        return {sample: min(found) for sample, found in by_sample.items() if len(found) == 1} | words

    def without_parts(self, words: dict[str, str]) -> tuple[list[tuple[str, Span | None]], list[str]]:
        """The images but for those that are parts of a sample, as a.seg.png is beside a.jpg, and their names;
        one with a .cls file of its own is none."""
        own = {_sample(name) for name, _ in self.images if os.path.basename(name).count(".") == 1}
        taken, parts = [], []
        for name, span in self.images:
            stem = os.path.splitext(name)[0]
            if "." in os.path.basename(stem) and _sample(name) in own and stem not in words:
                parts.append(name)
            else:
                taken.append((name, span))
        return taken, parts

    def follow(self, name: str) -> str:
        """The name at the end of a chain of links; any name of a circle."""
        for _ in range(MAX_LINKS):
            if name not in self.links:
                break
            name = self.links[name]
        return name


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, contents: Contents) -> None:
    """Add a member to the contents: a file or a link to one, which may be an image or hold a class."""
    name = os.path.normpath(member.name)
    folder, base = os.path.split(name)
    if member.isreg():
        # A sparse member is stored in pieces, and cannot be an image.
        contents.spans[name] = (member.offset_data, 0 if member.issparse() else member.size)
        contents.links.pop(name, None)
    elif member.islnk():
        contents.links[name] = os.path.normpath(member.linkname)
    elif member.issym():
        contents.links[name] = os.path.normpath(os.path.join(folder, member.linkname))
    else:
        return
    if base.startswith(".") or "\n" in name:
        return
    extension = os.path.splitext(base)[1].lower()
    if extension in (*EXTENSIONS, *ARRAYS):
        taken = contents.images if extension in EXTENSIONS else contents.arrays
        taken.append((name, contents.spans[name] if member.isreg() else None))
    elif base.endswith(".cls") and (file := tar.extractfile(member) if member.isreg() else None):
        word = file.read(100).decode(errors="replace")
        contents.classes[name] = " ".join(word.split())


def _sample(name: str) -> str:
    """The sample that a member belongs to: its name up to the first dot behind the last slash."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"
