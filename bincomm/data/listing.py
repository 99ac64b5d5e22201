"""Lists of image files: those below a folder, from a cache for folders that have not changed."""

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bincomm.data.cache import cache_folder, leads_out, read_cached, write_cached
from bincomm.data.images import EXTENSIONS, read_file
from bincomm.files import LOCK
from bincomm.logs import printable_name

FORMAT = "2"  # of the cache; files of another format are ignored
RECENT = 2_000_000_000  # ns; a folder changed since then may change again without another time stamp


class Files:
    """Image files in a compact form: a million take about 40 MB."""

    def __init__(self, paths: Iterable[str]) -> None:
        folders: dict[str, int] = {}
        folder_indices, ends, names = array("i"), array("q", [0]), bytearray()
        for path in paths:
            start = path.rfind("/") + 1
            folder_indices.append(folders.setdefault(path[:start], len(folders)))
            names += os.fsencode(path[start:])
            ends.append(len(names))
        self._folders, self._folder_indices = list(folders), folder_indices
        self._names, self._ends = names, ends

    def __len__(self) -> int:
        return len(self._folder_indices)

    def name(self, index: int) -> str:
        """The path of an image."""
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return self._folders[self._folder_indices[index]] + os.fsdecode(bytes(name))

    def names(self) -> Iterator[str]:
        """The paths of all images, in order."""
        return map(self.name, range(len(self)))

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (bytes,) uint8; OSError if it cannot be read."""
        return read_file(self.name(index))

    def select(self, indices: Sequence[int]) -> "Files":
        """The images of these indices."""
        return Files(map(self.name, indices))


def list_images(folder: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> tuple[Files, Counter[str]]:
    """All image files below a folder, sorted by folder and name, and how many other files by extension.

    Links are followed, but not in circles; names that begin with a dot and directories of runs are left out.
    A folder's time of change shows whether its entry in the cache is still valid, so that a second listing
    reads only the folders to which something was added, or from which something was removed.

    Raises:
        ValueError: a folder cannot be read.
    """
    root = os.path.abspath(folder)
    key = hashlib.sha256(os.fsencode(f"{FORMAT} {extensions} {root}")).hexdigest()[:32]
    path = cache_folder("listings") / f"{key}.json"
    cached = _load(path)
    listing: dict[str, list[Any]] = {}
    visited = set()
    pending = [root]
    changed = False
    while pending:
        parent = pending.pop()
        real = os.path.realpath(parent)
        if real in visited:  # a link back up
            continue
        visited.add(real)
        entry = cached.get(parent)
        try:
            stamp = os.stat(parent).st_mtime_ns
            if entry is None or entry[0] != stamp:
                changed = True
                recent = time.time_ns() - stamp < RECENT
                cacheable, *content = _scan(parent, extensions)
                entry = [stamp if cacheable and not recent else 0, *content]
        except FileNotFoundError:  # vanished since its name was read, or its link leads nowhere by now
            continue
        except OSError as error:
            raise ValueError(
                f"data: cannot read {printable_name(str(error.filename))}: {error.strerror}"
            ) from error
        is_run = entry[1]
        if is_run and parent != root:  # its curves are not data
            entry = [entry[0], is_run, [], "", {}]
        listing[parent] = entry
        # In the order of their names: a folder that two links lead to is always listed under the same one.
        pending += [os.path.join(parent, name) for name in reversed(entry[2])]
    if changed or listing.keys() != cached.keys():
        _save(path, listing)
    others: Counter[str] = Counter()
    for entry in listing.values():
        others.update(entry[4])
    paths = (
        os.path.join(parent, name)
        for parent in sorted(listing)
        for name in listing[parent][3].split("/")
        if name
    )
    return Files(paths), others


def _scan(parent: str, extensions: tuple[str, ...]) -> tuple[bool, bool, list[str], str, dict[str, int]]:
    """A folder: whether its time of change shows all changes, whether it is a run's, its folders, its images
    with / between, how many other files by extension.
    """
    cacheable, is_run, folders, images = True, False, [], []
    others: Counter[str] = Counter()
    with os.scandir(parent) as entries:
        for entry in entries:
            name = entry.name
            is_run = is_run or name == LOCK
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            cacheable = cacheable and not broken  # the link may lead to a folder some day
            if not broken and entry.is_dir():
                folders.append(name)
            # A broken link is an image that cannot be read; a pipe is no image.
            elif extension in extensions and (broken or entry.is_file()):
                images.append(name)
            else:
                others[extension or "no extension"] += 1
    return cacheable, is_run, sorted(folders), "/".join(sorted(images)), dict(others)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        cached = json.loads(read_cached(path))
        types = [int, bool, list, str, dict]
        valid = isinstance(cached, dict) and all(
            isinstance(entry, list)
            and [type(part) for part in entry] == types
            and all(isinstance(name, str) and "/" not in name and not leads_out(name) for name in entry[2])
            and not leads_out(entry[3])
            for entry in cached.values()
        )
        return cached if valid else {}
    except (OSError, ValueError):
        return {}


def _save(path: Path, listing: dict[str, list[Any]]) -> None:
    """Write a listing into the cache; if that fails the next start reads all folders again."""
    with suppress(OSError):
        write_cached(path, json.dumps(listing))
