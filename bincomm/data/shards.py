"""Tar shards as WebDataset lays them out: indexed once, then any image is read by its place."""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from bincomm.data.cache import cache_folder
from bincomm.data.images import EXTENSIONS
from bincomm.engine.run import write_whole

FORMAT = f"1 {EXTENSIONS}"  # of an index; one of another format is not looked at


class Shards:
    """Images in tar files, each known by its shard and its place there, to be read as `Files` are."""

    def __init__(
        self, shards: list[str], shard: np.ndarray, offset: np.ndarray, size: np.ndarray, members: list[str]
    ):
        self.shards = shards
        self.shard, self.offset, self.size, self.members = shard, offset, size, members

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}/{self.members[index]}"

    def names(self) -> Iterator[str]:
        return (self.name(index) for index in range(len(self)))

    def read(self, index: int) -> np.ndarray:
        """The encoded image (bytes,) uint8; OSError where it cannot be read."""
        # Opened for every image: a shard taken away shows, and no limit on open files is met.
        with open(self.shards[self.shard[index]], "rb", buffering=0) as file:
            file.seek(int(self.offset[index]))
            data = np.empty(self.size[index], np.uint8)
            if file.readinto(data) < len(data):
                raise OSError(0, "the shard ends before the image does")
        return data

    def select(self, indices: Sequence[int]) -> "Shards":
        chosen = np.asarray(indices, np.int64)
        members = [self.members[index] for index in chosen]
        return Shards(self.shards, self.shard[chosen], self.offset[chosen], self.size[chosen], members)


def expand_braces(pattern: str) -> list[str]:
    """`data-{000..127}.tar` as the names it stands for, zeros at the front kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    names = [f"{pattern[: match.start()]}{number:0{width}}{pattern[match.end() :]}" for number in numbers]
    return [expanded for name in names for expanded in expand_braces(name)]


def open_shards(paths: Iterable[str]) -> tuple[Shards, list[str]]:
    """The images of tar files, in order, and for each the word in its sample's .cls file, "" without one.

    Indices are made on first use, by several processes, and kept. A shard that ends too early gives the
    images up to there.

    Raises:
        ValueError: a shard does not exist, cannot be read or is no tar file; there is no image in any.
    """
    paths = [os.path.abspath(path) for path in paths]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: there is no shard {missing[0]}{more}")
    unknown = [path for path in paths if not _index_path(path).exists()]
    if len(unknown) > 1:  # spawned, for this process may have threads
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(_index, unknown))
    rows = [_index(path) for path in paths]
    if not any(rows):
        raise ValueError(f"data: no images ({', '.join(EXTENSIONS)}) in {', '.join(paths[:3])}")
    shard = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
    offset, size = (
        np.array([int(row[column]) for found in rows for row in found], np.int64) for column in (0, 1)
    )
    classes, members = ([row[column] for found in rows for row in found] for column in (2, 3))
    return Shards(paths, shard, offset, size, members), classes


def _index_path(path: str) -> Path:
    """Where a shard's index is kept: elsewhere for another size or time of change."""
    status = os.stat(path)
    key = f"{FORMAT} {path} {status.st_size} {status.st_mtime_ns}"
    return cache_folder() / "indices" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.tsv"


def _index(path: str) -> list[list[str]]:
    """Offset, size, class and name of every image of a shard, from its index or from the shard itself."""
    index = _index_path(path)
    try:
        lines = index.read_text(errors="surrogateescape").split("\n")[:-1]
        return [line.split("\t", 3) for line in lines]
    except OSError:
        rows = _read_tar(path)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        data = "".join("\t".join(row) + "\n" for row in rows).encode(errors="surrogateescape")
        write_whole(index, lambda file: file.write(data))
    except OSError:
        pass  # made again the next time
    return rows


def _read_tar(path: str) -> list[list[str]]:
    images, classes = [], {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    sample = f"{folder}/{base.partition('.')[0]}"
                    if not member.isreg() or base.startswith(".") or "\n" in member.name:
                        continue
                    if base.endswith(".cls"):
                        word = tar.extractfile(member).read(100).decode(errors="replace")
                        classes[sample] = " ".join(word.split())
                    elif os.path.splitext(base)[1].lower() in EXTENSIONS:
                        images.append((member.offset_data, member.size, sample, member.name))
            except tarfile.ReadError:
                if not images:
                    raise
    except tarfile.ReadError as error:
        raise ValueError(f"data: {path} is no uncompressed tar file, or not a whole one: {error}") from error
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from error
    return [
        [str(offset), str(size), classes.get(sample, ""), name.removeprefix("./")]
        for offset, size, sample, name in images
    ]
