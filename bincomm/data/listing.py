"""Image files: those below a folder, from a cache as far as its folders have not changed."""

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bincomm.data.cache import cache_folder
from bincomm.data.images import EXTENSIONS, read_file
from bincomm.files import LOCK, write_text

FORMAT = f"2 {EXTENSIONS}"  # of the cache; one of another format is not looked at
RECENT = 2_000_000_000  # ns; a folder changed so lately may change again without another time stamp


class Files:
    """Image files, in a compact form: a million take some 40 MB."""

    def __init__(self, paths: Iterable[str]):
        folders: dict[str, int] = {}
        places, ends, names = array("i"), array("q", [0]), bytearray()
        for path in paths:
            start = path.rfind("/") + 1
            places.append(folders.setdefault(path[:start], len(folders)))
            names += os.fsencode(path[start:])
            ends.append(len(names))
        self._folders, self._places = list(folders), places
        self._names, self._ends = names, ends

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return self._folders[self._places[index]] + os.fsdecode(bytes(name))

    def names(self) -> Iterator[str]:
        return map(self.name, range(len(self)))

    def read(self, index: int) -> np.ndarray:
        """The encoded image (bytes,) uint8; OSError where it cannot be read."""
        return read_file(self.name(index))

    def select(self, indices: Sequence[int]) -> "Files":
        return Files(map(self.name, indices))


def list_images(folder: str | Path) -> tuple[Files, Counter[str]]:
    """All image files below a folder, those of a folder together, and how many other files by extension.

    Links are followed, but not in circles; names that begin with a dot and directories of runs are left out.
    A folder's time of change tells whether its entry in the cache still holds, so that a second listing
    reads only the folders to which something was added, or from which something was taken.

    Raises:
        ValueError: a folder cannot be read.
    """
    root = os.path.abspath(folder)
    key = hashlib.sha256(os.fsencode(f"{FORMAT} {root}")).hexdigest()[:32]
    path = cache_folder() / "listings" / f"{key}.json"
    known = _load(path)
    found: dict[str, list[Any]] = {}
    visited = set()
    waiting = [root]
    changed = False
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in visited:  # a link back up
            continue
        visited.add(real)
        entry = known.get(parent)
        try:
            stamp = os.stat(parent).st_mtime_ns
            if entry is None or entry[0] != stamp:
                changed = True
                recent = time.time_ns() - stamp < RECENT
                lasting, *content = _scan(parent)
                entry = [stamp if lasting and not recent else 0, *content]
        except FileNotFoundError:  # vanished since its name was read, or its link leads nowhere by now
            continue
        except OSError as error:
            raise ValueError(f"data: cannot read {error.filename}: {error.strerror}") from error
        is_run = entry[1]
        if is_run and parent != root:  # its curves are no data
            entry = [entry[0], is_run, [], "", {}]
        found[parent] = entry
        # In the order of their names: a folder that two links lead to is always found by the same one.
        waiting += [os.path.join(parent, name) for name in reversed(entry[2])]
    if changed or found.keys() != known.keys():
        _save(path, found)
    others: Counter[str] = Counter()
    for entry in found.values():
        others.update(entry[4])
    return Files(
        os.path.join(parent, name) for parent in sorted(found) for name in found[parent][3].split("/") if name
    ), others


def _scan(parent: str) -> tuple[bool, bool, list[str], str, dict[str, int]]:
    """A folder: whether its time of change tells of all changes, whether a run was made in it, its folders,
    its images with / between, other files by kind.
    """
    lasting, is_run, folders, images = True, False, [], []
    others: Counter[str] = Counter()
    with os.scandir(parent) as entries:
        for entry in entries:
            name = entry.name
            is_run = is_run or name == LOCK
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            to_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
            lasting = lasting and not to_nowhere  # it may lead to a folder some day
            if not to_nowhere and entry.is_dir():
                folders.append(name)
            # A link to nowhere is an image that cannot be read; a pipe is none.
            elif extension in EXTENSIONS and (to_nowhere or entry.is_file()):
                images.append(name)
            else:
                others[extension or "no extension"] += 1
    return lasting, is_run, sorted(folders), "/".join(sorted(images)), dict(others)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(path.read_text())
        kinds = [int, bool, list, str, dict]
        whole = isinstance(known, dict) and all(
            isinstance(entry, list) and [type(part) for part in entry] == kinds for entry in known.values()
        )
        return known if whole else {}
    except (OSError, ValueError):
        return {}


def _save(path: Path, found: dict[str, list[Any]]) -> None:
    """Keep a listing; where that is not possible the next start lists the folder again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    except OSError:
        pass
