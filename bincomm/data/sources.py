"""Where images come from: folders, lists, tar shards, standard sets, the digits, and mixes of them."""

import difflib
import glob
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bincomm.data.cache import cache_folder
from bincomm.data.images import EXTENSIONS
from bincomm.data.listing import Files, list_images
from bincomm.data.shards import Shards, expand_braces, open_shards
from bincomm.data.standard import SETS, open_standard

QUERY_EVERY = 5  # without a test folder, every fifth image of a class asks and the others answer
OTHER_PICTURES = (".gif", ".avif", ".heic", ".jp2", ".ppm", ".pgm")
LOOKED_FOR = 1000  # files of a list whose presence is tested at the start


class Mix:
    """The images of several sources, one after another, to be read as `Files` are."""

    def __init__(self, parts: "Sequence[Files | Shards]"):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, index: int) -> str:
        part, inside = self._find(index)
        return part.name(inside)

    def names(self) -> Iterator[str]:
        return itertools.chain.from_iterable(part.names() for part in self.parts)

    def read(self, index: int) -> np.ndarray:
        part, inside = self._find(index)
        return part.read(inside)

    def _find(self, index: int) -> "tuple[Files | Shards, int]":
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[number], int(index) - (int(self.ends[number - 1]) if number else 0)


@dataclass(frozen=True)
class Source:
    """Encoded images in a fixed order; labels (N,) index `classes`, and are None where the data has none.

    `weights` are those of a mix's parts, and None where every image comes once an epoch; `notes` tell what
    was not taken of the data.
    """

    images: Files | Shards | Mix
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    weights: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def select(self, indices: Sequence[int]) -> "Source":
        """Some of the images of a source that is not a mix."""
        labels = None if self.labels is None else self.labels[np.asarray(indices, np.int64)]
        return Source(self.images.select(indices), labels, self.classes)


def open_source(data: str | Mapping[str, float]) -> Source:
    """The images to pretrain on.

    Args:
        data: what to open, or a mapping of several such to their weights, the shares of an epoch's images
            that come from each.

            - a folder, nested to any depth or flat, whose subfolder `train` is taken where it has one beside
              `val` or `test`; one that holds no images but .tar files is a folder of shards;
            - tar shards in WebDataset's layout, as a path with braces or wildcards: data-{000..127}.tar;
            - a .txt file with a path a line, relative to the file, blank lines and lines starting with # left
              out;
            - a standard set by its name (`bincomm.data.standard.SETS`), fetched once;
            - "digits", scikit-learn's scans of handwritten digits, written into a cache once.

    Returns:
        Files are sorted by folder and name. The label of an image is the first folder below `data`, if every
        image lies in one of at least two; in shards, without such folders, what its sample's .cls file says.
        A mix has none.

    Raises:
        ValueError: there is nothing there, no image among it, or a listed file is missing; the message says
            which.
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

    The folders `train` and `val` or `test` where `data` has both with labels, the parts of a standard set;
    otherwise a split of `source`, the pretraining images of `data`. None where there are no labels.

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
    split = _split_folders(digits() if data == "digits" else Path(os.path.expanduser(data)))
    # A single folder among the queries is a class where it is one of those pretrained on.
    queries = _open_folder(split[1], least=1) if split else None
    if queries and (len(queries.classes) > 1 or set(queries.classes) & set(source.classes)):
        odd = sorted(set(queries.classes) - set(source.classes))
        if odd:
            raise ValueError(
                f"data: expected in {split[1]} the classes of {split[0]} or some of them, got also "
                f"{', '.join(odd[:5])}"
            )
        numbers = np.array([source.classes.index(name) for name in queries.classes])  # some may have no query
        return source, replace(queries, labels=numbers[queries.labels], classes=source.classes), True
    seen: Counter[int] = Counter()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(source.labels.tolist()):
        seen[label] += 1
        parts[seen[label] % QUERY_EVERY == 0].append(index)
    if not parts[1]:
        return None
    return source.select(parts[0]), source.select(parts[1]), False


def digits() -> Path:
    """The folder of the digits, 8×8 PNG files in train/ and test/ by class; written on first use.

    It lies in bincomm's cache, see `bincomm.data.cache.cache_folder`.
    """
    cache = cache_folder()
    folder = cache / "digits"
    if folder.is_dir():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    cache.mkdir(parents=True, exist_ok=True)
    scans, labels = load_digits(return_X_y=True)
    _, test = train_test_split(range(len(scans)), test_size=0.2, stratify=labels, random_state=0)
    test = set(test)
    # Written aside and put in place by one rename: a second process sees all of it or nothing.
    aside = Path(tempfile.mkdtemp(dir=cache, prefix=".digits."))
    try:
        for index, (scan, label) in enumerate(zip(scans, labels, strict=True)):
            path = aside / ("test" if index in test else "train") / str(label) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan.reshape(8, 8) * (255 / 16)).round().astype("uint8")).save(path)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _open_one(data: str) -> Source:
    if data == "digits":
        return _open_folder(digits() / "train")
    if data in SETS:
        return _standard(data, "pretraining")
    path = Path(os.path.expanduser(data))
    if path.is_dir() and data:
        split = _split_folders(path)
        return _open_folder(split[0] if split else path)
    if path.is_file() and path.suffix.lower() == ".txt":
        return _open_list(path)
    if data.endswith(".tar"):
        names = [str(path)] if path.exists() else expand_braces(str(path))
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
    for name in ("val", "test"):
        if (path / "train").is_dir() and (path / name).is_dir():
            return path / "train", path / name
    return None


def _open_folder(folder: Path, least: int = 2) -> Source:
    """The images below a folder, labeled where they lie in as many folders as `least` or more."""
    root = os.path.abspath(folder)
    files, others = list_images(root)
    if not len(files):
        if others[".tar"]:
            shards = sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.tar"), recursive=True))
            if shards:
                return _open_shards(shards)
        found = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        raise ValueError(
            f"data: {folder} holds no images ({', '.join(EXTENSIONS)}), but {found or 'nothing, it is empty'}"
        )
    start = len(os.path.join(root, ""))
    # Pillow reads some of them, but pictures that no extension promises may not be meant to be trained on.
    pictures = {kind: count for kind, count in others.items() if kind in OTHER_PICTURES}
    notes = tuple(f"{count} × {kind} in {folder} were not taken" for kind, count in sorted(pictures.items()))
    return Source(files, *_labels((name[start:] for name in files.names()), least), notes=notes)


def _open_shards(paths: Sequence[str]) -> Source:
    shards, words, notes = open_shards(paths)
    labels, classes = _labels(shards.members)
    if labels is None:
        labels, classes = _number(words)
    return Source(shards, labels, classes, notes=tuple(notes))


def _labels(names: Iterable[str], least: int = 2) -> tuple[np.ndarray | None, list[str]]:
    """Labels by the first folder of each name; none unless all have one and there are `least` of them."""
    # One at a time: there may be a hundred million.
    words = (first if inside else "" for first, inside, _ in (name.partition("/") for name in names))
    return _number(words, least)


def _number(words: Iterable[str], least: int = 2) -> tuple[np.ndarray | None, list[str]]:
    """Words as numbers in their sorted order; none if a word is empty, or there are fewer than `least`."""
    numbers: dict[str, int] = {}
    met = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64)
    classes = sorted(numbers)
    if len(classes) < least or "" in numbers:
        return None, []
    ranks = np.empty(len(classes), np.int64)
    ranks[[numbers[word] for word in classes]] = np.arange(len(classes))
    return ranks[met], classes


def _open_list(path: Path) -> Source:
    # A name may hold any byte but the line's end, and some editors begin a file with a mark of its encoding.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    files = [
        os.path.join(path.parent.absolute(), line) for line in lines if line and not line.startswith("#")
    ]
    if not files:
        raise ValueError(f"data: {path} lists no files")
    # All of a short list; of a long one enough to notice that it means another place. What is missing beyond
    # that is an unusable image like any other.
    looked_for = files[:: max(1, len(files) // LOOKED_FOR)]
    missing = [file for file in looked_for if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: {path} lists files that do not exist: {missing[0]}{more}")
    return Source(Files(files))
