"""Where images come from: folders, lists, tar shards, standard sets, the digits, and mixes of them."""

import difflib
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bincomm.data.digits import digits
from bincomm.data.images import EXTENSIONS, Images, SelectableImages
from bincomm.data.listing import Files, list_images
from bincomm.data.shards import expand_braces, open_shards
from bincomm.data.standard import SETS, open_standard
from bincomm.files import expand_home

# Names of the parts of a data set, in lower case.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
QUERY_EVERY = 5  # without a test folder, every fifth image of a class is a query; the others are the gallery
OTHER_PICTURES = (".gif", ".avif", ".heic", ".jp2", ".ppm", ".pgm")
CHECKED_FILES = 1000  # number of files of a list whose existence is checked at the start


class Mix:
    """The images of several sources, one after another, as `Images`."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, index: int) -> str:
        """The name of an image in its source."""
        part, inside = self._find(index)
        return part.name(inside)

    def names(self) -> Iterator[str]:
        """The names of all images, in order."""
        return itertools.chain.from_iterable(part.names() for part in self.parts)

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (bytes,) uint8; OSError if it cannot be read."""
        part, inside = self._find(index)
        return part.read(inside)

    def _find(self, index: int) -> tuple[Images, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[number], int(index) - (int(self.ends[number - 1]) if number else 0)


@dataclass(frozen=True)
class Source:
    """Encoded images in a fixed order, with their labels if the data has any."""

    images: Images
    labels: np.ndarray | None = None  # (N,) int64, indices into `classes`
    classes: list[str] = field(default_factory=list)
    weights: tuple[float, ...] | None = None  # of a mix's parts; None: every image appears once per epoch
    about_split: str = ""  # which folders were taken for images to train on and images held out
    notes: tuple[str, ...] = ()  # what part of the data is not among the images, and why

    def select(self, indices: Sequence[int]) -> "Source":
        """The images with these indices, in this order, without weights and notes.

        Raises:
            TypeError: the source is a mix.
        """
        if not isinstance(self.images, SelectableImages):
            raise TypeError(
                "source: expected images of one source, got a mix, from which none can be selected"
            )
        labels = None if self.labels is None else self.labels[np.asarray(indices, np.int64)]
        return Source(self.images.select(indices), labels, self.classes)


def open_source(data: str | Mapping[str, float]) -> Source:
    """The images to pretrain on.

    Args:
        data: one of the following, or a mapping of several of them to their weights, the shares of an epoch's
            images that come from each.

            - a folder, nested to any depth or flat; if it has a subfolder `train` and also `val` or `test`,
              in any usual spelling (`SPLITS`), only `train` is taken; if it holds .tar files instead of
              images, these are shards;
            - tar shards in WebDataset's layout, as a path with braces or wildcards: data-{000..127}.tar;
            - a .txt file with one path per line, relative to the file; blank lines and lines starting with #
              are ignored;
            - a standard set by its name (`bincomm.data.standard.SETS`), downloaded once;
            - "digits", scikit-learn's scans of handwritten digits, written into a cache once.

    Returns:
        Files are sorted by folder and name. The label of an image is the first folder below `data`, if every
        image lies in one of at least two folders; in shards without folders, the content of its sample's .cls
        file. A mix has no labels.

    Raises:
        ValueError: the data does not exist or has no images, or a listed file is missing; the message names
            it.
    """
    if isinstance(data, str):
        return _open_one(data)
    if not data:
        raise ValueError("data: expected at least one source, got none")
    for name, weight in data.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"data: expected a weight > 0 for {name}, got {weight}")
    sources = [_open_one(name) for name in data]
    if len(sources) == 1:
        return sources[0]
    return Source(
        Mix([source.images for source in sources]),
        weights=tuple(map(float, data.values())),
        notes=tuple(note for source in sources for note in source.notes),
    )


def evaluation_sources(data: str | Mapping[str, float], source: Source) -> tuple[Source, Source, bool] | None:
    """Labeled images for k-NN: (gallery, queries, whether the queries were held out from pretraining).

    These are the folders `train` and `val` or `test` if `data` has both with labels, or the parts of a
    standard set; otherwise a split of `source`, the pretraining images of `data`. None without labels.

    Raises:
        ValueError: the second folder holds a class that the first lacks.
    """
    if not isinstance(data, str):
        if len(data) > 1:
            return None
        (data,) = data
    if data in SETS:
        return _standard(data, "gallery"), _standard(data, "queries"), True
    if source.labels is None:
        return None
    split = _split_folders(digits() if data == "digits" else expand_home(data))
    # A single folder of queries is a class only if the pretraining images have that class.
    queries = _open_folder(split[1], min_classes=1) if split else None
    if split and queries and (len(queries.classes) > 1 or set(queries.classes) & set(source.classes)):
        unknown = sorted(set(queries.classes) - set(source.classes))
        if unknown:
            raise ValueError(
                f"data: expected only classes of {split[0]} in {split[1]}, got also {', '.join(unknown[:5])}"
            )
        numbers = np.array([source.classes.index(name) for name in queries.classes])
        return source, replace(queries, labels=numbers[queries.labels], classes=source.classes), True
    counts: Counter[int] = Counter()
    gallery_indices: list[int] = []
    query_indices: list[int] = []
    for index, label in enumerate(source.labels.tolist()):
        counts[label] += 1
        (gallery_indices if counts[label] % QUERY_EVERY else query_indices).append(index)
    if not query_indices:
        return None
    return source.select(gallery_indices), source.select(query_indices), False


def _open_one(data: str) -> Source:
    if data == "digits":
        return _open_folder(digits() / "train")
    if data in SETS:
        return _standard(data, "pretraining")
    path = expand_home(data)
    if path.is_dir() and data:
        split = _split_folders(path)
        if split is None:
            return _open_folder(path)
        source = _open_folder(split[0])
        train, held_out = (folder.name for folder in split)
        about = f"the images are those of {train}; those of {held_out} are held out for evaluation"
        return replace(source, about_split=about)
    if path.is_file() and path.suffix.lower() == ".txt":
        return _open_list(path)
    if data.endswith(".tar"):
        if path.exists():  # whatever characters of patterns are in its name
            return _open_shards([str(path)])
        names = expand_braces(str(path))
        return _open_shards([file for name in names for file in (sorted(glob.glob(name)) or [name])])
    near = difflib.get_close_matches(data, SETS, n=1)
    raise ValueError(
        f"data: {data!r} "
        + ("is no folder, text file of paths or tar file" if path.exists() else "does not exist")
        + "; expected a folder of images, tar shards, a .txt file of paths, digits, or one of "
        + ", ".join(SETS)
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _standard(name: str, part: str) -> Source:
    paths, labels, classes = open_standard(name, part)
    return Source(Files(paths), labels, classes)


def _split_folders(path: Path) -> tuple[Path, Path] | None:
    """The folders of images to train on and of images that are held out, if there are both.

    Raises:
        ValueError: there are two of one kind.
    """
    if not path.is_dir():
        return None
    kinds = {name: kind for kind, names in SPLITS.items() for name in names}
    found: dict[str, list[Path]] = {kind: [] for kind in SPLITS}
    with os.scandir(path) as entries:  # there may be millions: no path is made of the others
        named = sorted(entry.name for entry in entries if entry.name.lower() in kinds and entry.is_dir())
    for name in named:
        found[kinds[name.lower()]].append(path / name)
    if not found["train"] or not (found["val"] or found["test"]):
        return None
    for folders in found.values():
        if len(folders) > 1:
            both = " and ".join(folder.name for folder in folders)
            raise ValueError(f"data: expected one of {both} in {path}, which are names of the same part")
    return found["train"][0], (found["val"] or found["test"])[0]


def _open_folder(folder: Path, min_classes: int = 2) -> Source:
    """The images below a folder, labeled where they lie in at least `min_classes` folders."""
    root = os.path.abspath(folder)
    files, others = list_images(root)
    if not len(files):
        if others[".tar"]:
            shards = sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.tar"), recursive=True))
            if shards:
                return _open_shards(shards)
        content = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        raise ValueError(
            f"data: {folder} holds no images ({', '.join(EXTENSIONS)}), but "
            f"{content or 'nothing, it is empty'}"
        )
    start = len(os.path.join(root, ""))
    # Pillow can read some of these, but they may not be meant for training.
    pictures = {kind: count for kind, count in others.items() if kind in OTHER_PICTURES}
    notes = tuple(f"{count} × {kind} in {folder} were skipped" for kind, count in sorted(pictures.items()))
    return Source(files, *_labels((name[start:] for name in files.names()), min_classes), notes=notes)


def _open_shards(paths: Sequence[str]) -> Source:
    shards, words, notes = open_shards(paths)
    labels, classes = _labels(shards.members)
    if labels is None:
        labels, classes = _numbered(words)
    return Source(shards, labels, classes, notes=tuple(notes))


def _labels(names: Iterable[str], min_classes: int = 2) -> tuple[np.ndarray | None, list[str]]:
    """Labels by the first folder of each name; none unless all have one and `min_classes` of them differ."""
    # An iterator, because there may be a hundred million.
    words = (first if inside else "" for first, inside, _ in (name.partition("/") for name in names))
    return _numbered(words, min_classes)


def _numbered(words: Iterable[str], min_classes: int = 2) -> tuple[np.ndarray | None, list[str]]:
    """Words as indices into the sorted different words, and these; none if one is empty or too few differ."""
    numbers: dict[str, int] = {}
    unsorted = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64)
    classes = sorted(numbers)
    if len(classes) < min_classes or "" in numbers:
        return None, []
    ranks = np.empty(len(classes), np.int64)
    ranks[[numbers[word] for word in classes]] = np.arange(len(classes))
    return ranks[unsorted], classes


def _open_list(path: Path) -> Source:
    # A name may contain any byte but a line feed, and some editors write a byte order mark.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    files = [
        os.path.join(path.parent.absolute(), line) for line in lines if line and not line.startswith("#")
    ]
    if not files:
        raise ValueError(f"data: {path} lists no files")
    # All files of a short list, and enough of a long one to notice that they are elsewhere. Any other missing
    # file is an unusable image.
    checked = files[:: max(1, len(files) // CHECKED_FILES)]
    missing = [file for file in checked if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: {path} lists files that do not exist: {missing[0]}{more}")
    return Source(Files(files))
