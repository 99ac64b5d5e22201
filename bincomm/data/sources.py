"""Where images come from: a folder, a text file of paths, or the digits that every run can start with."""

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bincomm.engine.run import LOCK

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
QUERY_EVERY = 5  # without a test folder, every fifth image of a class asks and the others answer


@dataclass(frozen=True)
class Source:
    """Image files in a fixed order; labels index `classes`, and are None where the data has none."""

    files: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)


def open_source(data: str) -> Source:
    """The images to pretrain on.

    Args:
        data: "digits" (scikit-learn's scans of handwritten digits, written into a cache once); a folder,
            nested to any depth or flat, whose subfolder `train` is taken where it has one beside `val` or
            `test`; or a .txt file with a path a line, relative to the file, blank lines and lines starting
            with # left out.

    Returns:
        Sorted files. The label of an image is the first folder below `data`, if every image lies in one of at
        least two.

    Raises:
        ValueError: there is nothing there, no image among it, or a listed file is missing; the message says
            which.
    """
    if data == "digits":
        return _open_folder(digits() / "train")
    path = Path(data)
    if not data or not path.exists():
        raise ValueError(
            f"data: {data!r} does not exist; expected a folder of images, a .txt file of paths, or digits"
        )
    if path.is_file():
        return _open_list(path)
    split = _split_folders(path)
    return _open_folder(split[0] if split else path)


def evaluation_sources(data: str, source: Source) -> tuple[Source, Source, bool] | None:
    """Labelled images for k-NN: (gallery, queries, whether the queries were held out from pretraining).

    The folders `train` and `val` or `test` where `data` has both with labels; otherwise a split of `source`,
    the pretraining images of `data`. None where there are no labels.

    Raises:
        ValueError: the two folders do not hold the same classes.
    """
    if source.labels is None:
        return None
    split = _split_folders(digits() if data == "digits" else Path(data))
    queries = _open_folder(split[1]) if split else None
    if queries and queries.labels is not None:
        if queries.classes != source.classes:
            odd = sorted(set(queries.classes) ^ set(source.classes))
            raise ValueError(f"data: {split[0]} and {split[1]} hold different classes: {', '.join(odd[:5])}")
        return source, queries, True
    seen: Counter[int] = Counter()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(source.labels):
        seen[label] += 1
        parts[seen[label] % QUERY_EVERY == 0].append(index)
    if not parts[1]:
        return None
    gallery, queries = (
        Source([source.files[i] for i in part], [source.labels[i] for i in part], source.classes)
        for part in parts
    )
    return gallery, queries, False


def digits() -> Path:
    """The folder of the digits, 8×8 PNG files in train/ and test/ by class; written on first use.

    It lies in $BINCOMM_CACHE, or in bincomm below $XDG_CACHE_HOME or ~/.cache.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("BINCOMM_CACHE") or Path(caches) / "bincomm")
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


def _split_folders(path: Path) -> tuple[Path, Path] | None:
    for name in ("val", "test"):
        if (path / "train").is_dir() and (path / name).is_dir():
            return path / "train", path / name
    return None


def _open_folder(folder: Path) -> Source:
    root = os.path.abspath(folder)
    files, others = [], Counter()
    visited = set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(parent)
        if real in visited:  # a link back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if LOCK in names and parent != root:  # a run's directory, whose curves are no data
            folders.clear()
            continue
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in EXTENSIONS:
                files.append(os.path.join(parent, name))
            else:
                others[extension or "no extension"] += 1
    if not files:
        found = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        raise ValueError(
            f"data: {folder} holds no images ({', '.join(EXTENSIONS)}), but {found or 'nothing, it is empty'}"
        )
    files.sort()
    first = [os.path.relpath(file, root).split(os.sep) for file in files]
    classes = sorted({parts[0] for parts in first})
    if any(len(parts) == 1 for parts in first) or len(classes) < 2:
        return Source(files)
    index = {name: number for number, name in enumerate(classes)}
    return Source(files, [index[parts[0]] for parts in first], classes)


def _open_list(path: Path) -> Source:
    if path.suffix.lower() != ".txt":
        raise ValueError(
            f"data: {path} is a file; expected a folder of images, a .txt file of paths, or digits"
        )
    # A name may hold any byte but the line's end, and some editors begin a file with a mark of its encoding.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    files = [str(path.parent.absolute() / line) for line in lines if line and not line.startswith("#")]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: {path} lists files that do not exist: {missing[0]}{more}")
    if not files:
        raise ValueError(f"data: {path} lists no files")
    return Source(files)


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data: cannot read {error.filename}: {error.strerror}") from error
