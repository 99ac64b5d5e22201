"""The parts of a data set, one to train on and others that are held out, by the usual names of folders, of
shards, and of folders inside shards and lists."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Names of the parts of a data set, in lower case.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
KINDS = {name: kind for kind, names in SPLITS.items() for name in names}


class Parts(NamedTuple):
    """Which part each image of a data set is in."""

    names: dict[str, str]  # of the parts as they are in the data, by kind: train, val, test
    of: np.ndarray  # (N,) int8, indices into `names`; -1 for an image in none of them

    def name(self, image: int) -> str:
        """The name of the part that an image is in; "" if in none."""
        return "" if self.of[image] < 0 else list(self.names.values())[self.of[image]]

    def rows(self, kind: str) -> np.ndarray:
        """The images of a part, by its kind."""
        return np.flatnonzero(self.of == list(self.names).index(kind))


def held_out_kind(names: dict[str, str]) -> str:
    """The part for evaluation, by its kind."""
    return "val" if "val" in names else "test"


def part_folders(path: Path) -> dict[str, str]:
    """The names of the folders that are parts, by kind; none unless there is one to train on and another.

    Raises:
        ValueError: there are two of one kind.
    """
    with os.scandir(path) as entries:  # there may be millions: no path is made of the others
        named = sorted(entry.name for entry in entries if entry.name.lower() in KINDS and entry.is_dir())
    return _by_kind({name: KINDS[name.lower()] for name in named}, str(path))


def parts_of_shards(paths: Sequence[str], shard: np.ndarray) -> Parts | None:
    """Parts by a word in the names of shards, such as set-train-000.tar, or of the folders that they lie in.

    Args:
        paths: of the shards.
        shard: (N,) the shard of each image.

    Raises:
        ValueError: there are two names of one kind.
    """
    if len(paths) < 2:
        return None
    common = len(os.path.commonpath([os.path.dirname(path) for path in paths]))
    words = [
        next((word for word in re.split("[^A-Za-z]+", path[common:]) if word.lower() in KINDS), "")
        for path in paths
    ]
    names = _by_kind({word: KINDS[word.lower()] for word in words if word}, "the names of shards")
    return _parts_at(names, words, shard)


def parts_of_names(folders: Sequence[str], folder: np.ndarray, where: str) -> Parts | None:
    """Parts by the first folder of names.

    Args:
        folders: the different ones.
        folder: (N,) indices into them.
        where: what holds them, for the error.

    Raises:
        ValueError: there are two names of one kind.
    """
    names = _by_kind({name: KINDS[name.lower()] for name in folders if name.lower() in KINDS}, where)
    return _parts_at(names, folders, folder)


def _by_kind(kinds: dict[str, str], where: str) -> dict[str, str]:
    """Names by kind, from their kinds by name."""
    found = {kind: sorted(name for name in kinds if kinds[name] == kind) for kind in SPLITS}
    if not found["train"] or not (found["val"] or found["test"]):
        return {}
    for names in found.values():
        if len(names) > 1:
            raise ValueError(
                f"data: expected one of {' and '.join(names)} in {where}, which are names of the same part"
            )
    return {kind: names[0] for kind, names in found.items() if names}


def _parts_at(names: dict[str, str], words: Iterable[str], index: np.ndarray) -> Parts | None:
    """The parts of images, each of which has one of the words."""
    if not names:
        return None
    order = list(names.values())
    numbers = np.array([order.index(word) if word in order else -1 for word in words], np.int8)
    return Parts(names, numbers[index])
