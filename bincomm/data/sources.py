"""Where images come from: folders, lists, tar and Parquet shards, standard sets, the digits, and mixes."""

import glob
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bincomm.data.addresses import check_address, is_address
from bincomm.data.digits import digits
from bincomm.data.images import ARRAYS, EXTENSIONS, Images, SelectableImages
from bincomm.data.listing import Files, list_images
from bincomm.data.parquet import ParquetImages, open_parquet
from bincomm.data.parts import KINDS, Parts, held_out_kind, part_folders, parts_of_names, parts_of_shards
from bincomm.data.refused import ACCEPTED, describe
from bincomm.data.remote import UnreachableError, find_shards
from bincomm.data.shards import Shards, expand_braces, open_shards
from bincomm.data.standard import SETS, open_standard
from bincomm.files import expand_home
from bincomm.logs import did_you_mean, printable_name

logger = logging.getLogger(__name__)

QUERY_EVERY = 5  # without a test folder, every fifth image of a class is a query; the others are the gallery
OTHER_PICTURES = (".gif", ".avif", ".heic", ".jp2", ".ppm", ".pgm")
SHARDS = (".tar", ".parquet")  # how the names of shards end
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
    about_split: str = ""  # which parts of the data were taken for images to train on and images held out
    notes: tuple[str, ...] = ()  # what part of the data is not among the images, and why
    parts: Parts | None = None  # which part of the data each image is in, where several were taken
    held_out: "Source | None" = None  # another part of the same shards or list, for evaluation

    def announce(self) -> None:
        """Log which parts were taken, and the notes."""
        if self.about_split:
            logger.info("%s", printable_name(self.about_split))
        for note in self.notes:
            logger.info("note: %s", printable_name(note))

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


def open_source(data: str | Mapping[str, float], split: str | None = None) -> Source:
    """The images to pretrain on, or other parts of the data.

    Args:
        data: one of the following, or a mapping of several of them to their weights, the shares of an epoch's
            images that come from each.

            - a folder, nested to any depth or flat; if it holds .tar or .parquet files instead of images,
              these are shards, and if it holds .npy files, these are the images;
            - tar shards in WebDataset's layout, as a path with braces or wildcards: data-{000..127}.tar;
            - Parquet files in the layout of Hugging Face datasets, in the same way: train-*.parquet;
            - the address of such shards, or of a folder of them: s3://, gs://, https://, http:// (of shards
              alone), or a data set of Parquet files on the hub, hf://datasets/USER/NAME;
            - a .txt file with one path per line, relative to the file and below its folder, or below FOLDER
              in list.txt@FOLDER; blank lines and lines starting with # are ignored;
            - a standard set by its name (`bincomm.data.standard.SETS`), downloaded once;
            - "digits", scikit-learn's scans of handwritten digits, written into a cache once.
        split: a part of the data, "train", "val" or "test", or "all". None, the images to pretrain on, is
            "train" where there are that part and another, else "all". Parts are folders, shards, or folders
            inside shards and lists, in any usual spelling of their names (`bincomm.data.parts.SPLITS`).

    Returns:
        Files are sorted by folder and name. The label of an image is the folder that it lies in, of the first
        level on which there are at least two, if every image lies in one; in shards without folders, the
        content of its sample's .cls file; in Parquet files, the value or the class name in the column of
        labels. A mix has no labels.

    Raises:
        ValueError: the data does not exist, has no images, has no such part or two of one kind, or a listed
            file is missing or lies elsewhere; the message names it.
        ImportError: Parquet files without pyarrow.

        Images of addresses also raise `bincomm.data.remote.UnreachableError` when they are read.
    """
    if isinstance(data, str):
        return _open_one(data, split)
    if not data:
        raise ValueError("data: expected at least one source, got none")
    for name, weight in data.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"data: expected a weight > 0 for {name}, got {weight}")
    sources = [_open_one(name, split) for name in data]
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
        return _standard(data, "gallery"), _standard(data, "test"), True
    if source.labels is None:
        return None
    queries, train, held_out = source.held_out, "the part to train on", "the part held out"
    path = digits() if data == "digits" else expand_home(data)
    if queries is None and path.is_dir() and (folders := part_folders(path)):
        train, held_out = (str(path / folders[kind]) for kind in ("train", held_out_kind(folders)))
        queries = _open_folder(Path(held_out), min_classes=1)
    # A single folder of queries is a class only if the pretraining images have that class.
    if queries and (len(queries.classes) > 1 or set(queries.classes) & set(source.classes)):
        unknown = sorted(set(queries.classes) - set(source.classes))
        if unknown:
            names = ", ".join(map(printable_name, unknown[:5]))
            raise ValueError(f"data: expected only classes of {train} in {held_out}, got also {names}")
        assert queries.labels is not None
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


def why_no_evaluation(data: str | Mapping[str, float], source: Source) -> str:
    """Why `evaluation_sources` returns None for these images."""
    if not isinstance(data, str) and len(data) > 1:
        return "the data is a mix of sources; `bincomm evaluate` measures on one of them"
    if source.labels is None:
        return (
            "not every image lies in a folder named after a class, of at least two (or has a .cls file, or a "
            "label in a Parquet file)"
        )
    return f"no class has {QUERY_EVERY} images, of which one could be held out"


def _open_one(data: str, split: str | None) -> Source:
    if data in SETS:
        return _standard(data, split)
    if is_address(data):
        return _open_remote(data, split)
    path = digits() if data == "digits" else expand_home(data)
    if path.is_dir() and data:
        return _open_parts(path, split)
    if data.lower().endswith(SHARDS):
        if path.exists():  # whatever characters of patterns are in its name
            return _open_shards([str(path)], split)
        names = expand_braces(str(path))
        found = [file for name in names for file in (sorted(glob.glob(name)) or [name])]
        return _open_shards(found, split)
    near = did_you_mean(data, SETS)
    text, _, root = data.rpartition("@")
    if path.suffix.lower() == ".txt" and path.is_file():
        return _open_list(path, path.parent, split)
    if text.lower().endswith(".txt") and expand_home(text).is_file():
        # Relative to the list's folder. Of /, an absolute path of the data keeps nothing.
        path = expand_home(text)
        return _open_list(path, path.parent / expand_home(root or "/"), split)
    raise ValueError(f"data: {describe(data)}; {ACCEPTED}, digits, or one of {', '.join(SETS)}{near}")


def _open_remote(data: str, split: str | None) -> Source:
    """The images of shards that are stored elsewhere."""
    check_address(data)  # before it is shown
    try:
        shards, notes = find_shards(expand_braces(data), SHARDS)
        source = _open_shards(shards, split)
    except UnreachableError as error:
        raise ValueError(f"data: {error}") from None
    return replace(source, notes=(*source.notes, *notes))


def _standard(name: str, split: str | None) -> Source:
    if split == "val":
        raise ValueError(f"split: expected train or test of {name}, got val")
    names = {None: ["pretraining"], "train": ["pretraining"], "test": ["queries"], "gallery": ["gallery"]}
    opened = [open_standard(name, part) for part in names.get(split, ["pretraining", "queries"])]
    paths = [path for part, _, _ in opened for path in part]
    known = [labels for _, labels, _ in opened if labels is not None]
    labels = np.concatenate(known) if len(known) == len(opened) else None
    if split != "all":
        return Source(Files(paths), labels, opened[0][2])
    numbers = np.repeat(np.array([0, 1], np.int8), [len(part) for part, _, _ in opened])
    parts = Parts({"train": "train", "test": "test"}, numbers)
    about = _about(parts.names, split)
    return Source(Files(paths), labels, opened[0][2], about_split=about, parts=parts)


def _open_parts(path: Path, split: str | None) -> Source:
    """A folder, or one of its parts."""
    folders = part_folders(path)
    if split == "all" or not folders:
        return _open_folder(path, split=split, folders=folders)
    kind = split or "train"
    _check_split(kind, folders, str(path))
    return replace(_open_folder(path / folders[kind]), about_split=_about(folders, split))


def _check_split(split: str, names: Mapping[str, str], where: str) -> None:
    if split not in names:
        there = " or ".join(names) if names else "no split, because there are no such parts,"
        raise ValueError(f"split: expected {there} in {where}, got {split}")


def _about(names: Mapping[str, str], split: str | None) -> str:
    """Which of the parts with these names were taken."""
    if split == "all":
        return f"the images are those of all parts, {' and '.join(names.values())}; --split takes one"
    if split:
        return f"the images are those of {names[split]}"
    held_out = names[held_out_kind(dict(names))]
    return f"the images are those of {names['train']}; those of {held_out} are held out for evaluation"


def _open_folder(
    folder: Path, min_classes: int = 2, split: str | None = None, folders: Mapping[str, str] | None = None
) -> Source:
    """The images below a folder, labeled where they lie in at least `min_classes` folders, which `folders`
    that are its parts are not."""
    root = os.path.abspath(folder)
    files, others = list_images(root)
    if not len(files):
        if any(others[ending] for ending in SHARDS):
            below = glob.iglob(os.path.join(glob.escape(root), "**", "*"), recursive=True)
            shards = sorted(name for name in below if name.lower().endswith(SHARDS))
            if shards:
                return _open_shards(shards, split, min_classes)
        if any(others[ending] for ending in ARRAYS):
            files, others = list_images(root, ARRAYS)
    if not len(files):
        content = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        raise ValueError(
            f"data: {folder} holds no images ({', '.join(EXTENSIONS)}), but "
            f"{content or 'nothing, it is empty'}"
        )
    # Pillow can read some of these, but they may not be meant for training.
    pictures = {kind: count for kind, count in others.items() if kind in OTHER_PICTURES}
    notes = tuple(f"{count} × {kind} in {folder} were skipped" for kind, count in sorted(pictures.items()))
    start = len(os.path.join(root, ""))
    if not folders and split not in (None, "all"):
        _check_split(split, {}, str(folder))
    names = [name[start:] for name in files.names()] if folders else []
    parts = parts_of_names(*_first_folders(names), str(folder)) if folders else None
    parts_below = set((folders or {}).values())
    labels, classes = _labels(lambda: (name[start:] for name in files.names()), min_classes, parts_below)
    about = _about(folders, "all") if folders else ""
    return Source(files, labels, classes, about_split=about, notes=notes, parts=parts)


def _open_shards(paths: Sequence[str], split: str | None, min_classes: int = 2) -> Source:
    """The images of tar or Parquet files, not of both."""
    is_parquet = [path.lower().endswith(".parquet") for path in paths]
    if len(set(is_parquet)) > 1:
        other = paths[is_parquet.index(not is_parquet[0])]
        raise ValueError(
            f"data: expected tar shards or Parquet files, got both: {printable_name(paths[0])} and "
            f"{printable_name(other)}"
        )
    images: Shards | ParquetImages
    if any(is_parquet):
        images, words, notes = open_parquet(paths)
        names = [""] * len(images)  # which have no folders
    else:
        images, words, notes = open_shards(paths)
        names = images.members
    parts = parts_of_shards(images.shards, images.shard)
    return _source_of_parts(images, names, words, parts, split, min_classes, notes)


def _source_of_parts(
    images: SelectableImages,
    names: Sequence[str],
    words: Sequence[str],
    parts: Parts | None,
    split: str | None,
    min_classes: int,
    notes: Sequence[str],
) -> Source:
    """The images of a part, or of all, labeled by the folders in their names, else by words.

    Args:
        parts: where the names do not tell.
    """
    if parts is None:
        parts = parts_of_names(*_first_folders(names), "the names of images")
    if split not in (None, "all"):
        _check_split(split, parts.names if parts else {}, "the data")

    def labeled(rows: Sequence[int], least: int) -> tuple[np.ndarray | None, list[str]]:
        below = set(parts.names.values()) if parts else set()
        labels, classes = _labels(lambda: (names[row] for row in rows), least, below)
        return (labels, classes) if labels is not None else _numbered((words[row] for row in rows), least)

    def part(kind: str, least: int) -> Source:
        assert parts is not None
        rows = parts.rows(kind).tolist()
        return Source(images.select(rows), *labeled(rows, least))

    if parts is None or split == "all":
        about = _about(parts.names, "all") if parts else ""
        return Source(
            images,
            *labeled(range(len(names)), min_classes),
            about_split=about,
            notes=tuple(notes),
            parts=parts,
        )
    source = part(split or "train", min_classes)
    held_out = None if split else part(held_out_kind(parts.names), 1)
    return replace(source, about_split=_about(parts.names, split), notes=tuple(notes), held_out=held_out)


def _first_folders(names: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The different first folders of names, "" for a name without, and for each name which it is."""
    numbers: dict[str, int] = {}
    first = (first if inside else "" for first, inside, _ in (name.partition("/") for name in names))
    indices = np.fromiter((numbers.setdefault(word, len(numbers)) for word in first), np.int64)
    return list(numbers), indices


def _labels(
    names: Callable[[], Iterable[str]], min_classes: int = 2, parts: Set[str] = frozenset()
) -> tuple[np.ndarray | None, list[str]]:
    """Labels by the first folder of each name that is no part; none unless all have one and `min_classes` of
    them differ.

    Args:
        names: an iterator of them, because there may be a hundred million.
        parts: names of folders. The name of a part is also one where all images lie in it.
    """
    folders, indices = _first_folders(names())
    if len(folders) == 1 and folders[0].lower() in KINDS:
        parts = set(folders)
    if parts:
        split = (name.partition("/") for name in names())
        folders, indices = _first_folders(
            rest if first in parts else f"{first}{slash}{rest}" for first, slash, rest in split
        )
    return _ranked(folders, indices, min_classes)


def _numbered(words: Iterable[str], min_classes: int = 2) -> tuple[np.ndarray | None, list[str]]:
    """Words as indices into the sorted different words, and these; none if one is empty or too few differ."""
    numbers: dict[str, int] = {}
    indices = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64)
    return _ranked(list(numbers), indices, min_classes)


def _ranked(
    words: Sequence[str], indices: np.ndarray, min_classes: int
) -> tuple[np.ndarray | None, list[str]]:
    """Indices into words as indices into the sorted words, and these."""
    classes = sorted(words)
    if len(classes) < min_classes or "" in classes:
        return None, []
    numbers = {word: number for number, word in enumerate(classes)}
    return np.array([numbers[word] for word in words], np.int64)[indices], classes


def _open_list(path: Path, root: Path, split: str | None) -> Source:
    """The files of a list, which must lie below a folder."""
    # A name may contain any byte but a line feed, and some editors write a byte order mark.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    files = [
        os.path.join(path.parent.absolute(), line) for line in lines if line and not line.startswith("#")
    ]
    if not files:
        raise ValueError(f"data: {path} lists no files")
    check_listed("data", path, files, root, path)
    first, last = min(files), max(files)
    same = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    start = first.rfind("/", 0, same) + 1 if same else first.rfind("/") + 1  # of what tells them apart
    names = [file[start:] for file in files]
    return _source_of_parts(Files(files), names, [""] * len(names), None, split, 2, ())


def check_listed(argument: str, path: Path, files: Sequence[str], root: Path, given: Path) -> None:
    """Raise ValueError, naming the argument and what was given for it, unless the absolute paths that a list
    names lie below a folder and exist."""
    below = os.path.join(os.path.abspath(root), "")
    outside = [
        file for file in files if not (os.path.normpath(file) if "/.." in file else file).startswith(below)
    ]
    if outside:
        folder = os.path.commonpath([os.path.dirname(os.path.normpath(file)) for file in files])
        first = printable_name(outside[0])
        raise ValueError(
            f"{argument}: {path} lists {len(outside)} files that do not lie in {below}, such as {first}; if "
            f"they are to be taken, name a folder that all lie in: {given}@{printable_name(folder)}"
        )
    # All files of a short list, and enough of a long one to notice that they are elsewhere. Any other missing
    # file is an unusable image.
    checked = files[:: max(1, len(files) // CHECKED_FILES)]
    missing = [file for file in checked if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{argument}: {path} lists files that do not exist: {printable_name(missing[0])}{more}"
        )
