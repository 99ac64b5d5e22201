"""The image files below a folder, from a cache as far as its folders have not changed."""

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bincomm.data.cache import cache_folder
from bincomm.data.images import EXTENSIONS
from bincomm.engine.run import LOCK, write_text

FORMAT = f"1 {EXTENSIONS}"  # of the cache; one of another format is not looked at
RECENT = 2_000_000_000  # ns; a folder changed so lately may change again without another time stamp


def list_images(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """All image files below a folder, sorted, and how many other files there are by extension.

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
    files: list[str] = []
    others: Counter[str] = Counter()
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
                entry = [0 if recent else stamp, *_scan(parent)]
        except OSError as error:
            raise ValueError(f"data: cannot read {error.filename}: {error.strerror}") from error
        found[parent] = entry
        _, is_run, folders, images, rest = entry
        if is_run and parent != root:  # its curves are no data
            continue
        waiting += [os.path.join(parent, name) for name in folders]
        start = os.path.join(parent, "")
        files += [start + name for name in images]
        others.update(rest)
    files.sort()
    if changed or found.keys() != known.keys():
        _save(path, found)
    return files, others


def _scan(parent: str) -> tuple[bool, list[str], list[str], dict[str, int]]:
    """One folder: whether a run was made in it, its folders, its images, its other files by extension."""
    is_run, folders, images = False, [], []
    others: Counter[str] = Counter()
    with os.scandir(parent) as entries:
        for entry in entries:
            name = entry.name
            is_run = is_run or name == LOCK
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            if entry.is_dir():
                folders.append(name)
            # A link to nowhere is an image that cannot be read; reading a pipe would wait for ever.
            elif extension in EXTENSIONS and (entry.is_file() or not os.path.exists(entry.path)):
                images.append(name)
            else:
                others[extension or "no extension"] += 1
    return is_run, folders, images, dict(others)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(path.read_text())
        whole = isinstance(known, dict) and all(isinstance(e, list) and len(e) == 5 for e in known.values())
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
