"""Standard data sets by name, fetched and unpacked through torchvision once."""

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bincomm.data.cache import (
    cache_folder,
    leads_out,
    make_folder,
    read_cached,
    unwritable,
    write_cached,
)
from bincomm.files import lock

INDEX = "index.json"
TEST_EVERY = 5  # in a set without a test split, every fifth image of the sorted files is a test image
PARTS = {
    "pretraining": ("train", "val", "unlabeled"),
    "gallery": ("train", "val"),
    "queries": ("test",),
}
# What torchvision's download, its checks and its unpacking raise.
FAILURES = (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError, zlib.error)


class Standard(NamedTuple):
    """How torchvision makes a set, and which files it makes it from."""

    dataset: str  # the class in torchvision.datasets
    splits: Mapping[str, Mapping[str, Any]]  # arguments of its constructor, by the names in `PARTS`
    archives: tuple[str, ...]
    subfolder: str = ""  # of its root, where torchvision looks for the archives
    checked: bool = True  # torchvision knows their checksums, and fetches again what does not match


# `loader=str` makes torchvision return the names of the files that it unpacked, instead of their pixels.
# Sets that take no loader are not stored as files, except the pets; see `_items`.
SETS: Mapping[str, Standard] = {
    "cifar10": Standard(
        "CIFAR10", {"train": {"train": True}, "test": {"train": False}}, ("cifar-10-python.tar.gz",)
    ),
    "cifar100": Standard(
        "CIFAR100", {"train": {"train": True}, "test": {"train": False}}, ("cifar-100-python.tar.gz",)
    ),
    "stl10": Standard(
        "STL10",
        {"train": {"split": "train"}, "unlabeled": {"split": "unlabeled"}, "test": {"split": "test"}},
        ("stl10_binary.tar.gz",),
    ),
    "svhn": Standard(
        "SVHN",
        {"train": {"split": "train"}, "test": {"split": "test"}},
        ("train_32x32.mat", "test_32x32.mat"),
    ),
    "flowers102": Standard(
        "Flowers102",
        {split: {"split": split, "loader": str} for split in ("train", "val", "test")},
        ("102flowers.tgz", "imagelabels.mat", "setid.mat"),
        subfolder="flowers-102",
    ),
    "food101": Standard(
        "Food101",
        {split: {"split": split, "loader": str} for split in ("train", "test")},
        ("food-101.tar.gz",),
    ),
    "oxford_iiit_pet": Standard(
        "OxfordIIITPet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        ("images.tar.gz", "annotations.tar.gz"),
        subfolder="oxford-iiit-pet",
    ),
    "dtd": Standard(
        "DTD",
        {split: {"split": split, "loader": str} for split in ("train", "val", "test")},
        ("dtd-r1.0.1.tar.gz",),
        subfolder="dtd",
    ),
    "fgvc_aircraft": Standard(
        "FGVCAircraft",
        {split: {"split": split, "loader": str} for split in ("train", "val", "test")},
        ("fgvc-aircraft-2013b.tar.gz",),
        checked=False,
    ),
    # The shorter sides of these are 320 pixels: enough for crops of 224, in a fifth of the download.
    "imagenette": Standard(
        "Imagenette",
        {
            "train": {"split": "train", "size": "320px", "loader": str},
            "test": {"split": "val", "size": "320px", "loader": str},
        },
        ("imagenette2-320.tgz",),
    ),
    "eurosat": Standard("EuroSAT", {"train": {"loader": str}}, ("EuroSAT.zip",), subfolder="eurosat"),
    "country211": Standard(
        "Country211",
        {split: {"split": split, "loader": str} for split in ("train", "test")},
        ("country211.tgz",),
    ),
}


def open_standard(name: str, part: str) -> tuple[list[str], np.ndarray | None, list[str]]:
    """The image files of a part of a standard set; the first call fetches the set into bincomm's cache.

    Later calls, and calls of other processes, read an index that the first one wrote. The archives of
    `SETS[name]` may be put into the set's folder below `cache_folder() / "sets"` by hand.

    Args:
        name: one of `SETS`.
        part: "pretraining", all images but those of the test split; "gallery", those of them with labels;
            "queries", the test split.

    Returns:
        (absolute paths in a fixed order, labels (N,) int64, class names). STL-10 has no labels for
        pretraining: None, and no classes.

    Raises:
        ValueError: the set is not in the cache, and cannot be fetched, unpacked or written there; or its
            index is damaged, or names files elsewhere.
    """
    files = cache_folder("sets", name, "files").absolute()
    if not (files / INDEX).exists():
        _fetch(name, files.parent)
    try:
        content = json.loads(read_cached(files / INDEX))
        splits = [content["splits"][split] for split in PARTS[part] if split in content["splits"]]
        stored = [path for split in splits for path, _ in split]
        labels = np.array([label for split in splits for _, label in split], np.int64)
        if outside := next(filter(leads_out, stored), None):
            raise ValueError(f"it names a file elsewhere, {outside}")
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"data: {files / INDEX} cannot be used: {error}; remove {files} to have {name} unpacked again"
        ) from error
    paths = [os.path.join(files, path) for path in stored]
    if (labels < 0).any():  # how torchvision marks images without one
        return paths, None, []
    return paths, labels, content["classes"]


def _fetch(name: str, folder: Path) -> None:
    try:
        from torchvision import datasets
    except (ImportError, OSError, RuntimeError) as error:  # the last two if it was built for another torch
        raise ValueError(
            f"data: {name} comes through torchvision, which cannot be imported ({_line(error)}); "
            "pip install torchvision"
        ) from error
    standard = SETS[name]
    try:
        make_folder(folder)
    except OSError as error:
        raise unwritable(error) from error
    try:
        with open(folder / "lock", "w") as file:
            lock(file, wait=True)  # without locks, two processes fetch it twice
            if not (folder / "files" / INDEX).exists():  # else another process was faster
                _unpack(standard, getattr(datasets, standard.dataset), folder)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data: {name} cannot be read without {error.name}; pip install {error.name}"
        ) from error
    except FAILURES as error:
        raise ValueError(
            f"data: {name} could not be fetched and unpacked ({_line(error)}); without a network, put "
            f"{' and '.join(standard.archives)}, complete and not unpacked, into {folder}"
        ) from error


def _unpack(standard: Standard, dataset_class: Any, folder: Path) -> None:
    """Have torchvision fetch and unpack a set into `unfinished`, and rename that to `files` at once.

    torchvision takes a half unpacked folder for a complete one, so it never sees one of an earlier attempt.
    """
    unfinished, fetched = folder / "unfinished", folder / "fetched"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    if not standard.checked:
        shutil.rmtree(fetched, ignore_errors=True)  # torchvision would not notice half an archive in it
    fetched.mkdir(exist_ok=True)
    make_folder(unfinished)
    root = unfinished / "set"
    links = [root / standard.subfolder / archive for archive in standard.archives]
    try:
        # torchvision reads and writes archives through these links, so that what it has fetched is still
        # there if unpacking fails.
        for link in links:
            link.parent.mkdir(parents=True, exist_ok=True)
            by_hand = folder / link.name
            link.symlink_to(by_hand if by_hand.exists() else fetched / link.name)
        splits: dict[str, list[tuple[str, int]]] = {}
        classes: list[str] = []
        for split, arguments in standard.splits.items():
            dataset = dataset_class(str(root), download=True, **arguments)
            # SVHN names no classes, they are the digits; Imagenette gives several names to each.
            names = getattr(dataset, "classes", "0123456789")
            names = [entry if isinstance(entry, str) else entry[0] for entry in names]
            if classes and names != classes:
                raise RuntimeError("its splits have different classes")
            classes = names
            splits[split] = _files(_items(dataset), unfinished, split)
            del dataset  # up to 3 GB
        if "test" not in splits:
            splits["test"] = splits["train"][TEST_EVERY - 1 :: TEST_EVERY]
            del splits["train"][TEST_EVERY - 1 :: TEST_EVERY]
        for link in links:
            link.unlink()
        if (unfinished / "train").exists():
            shutil.rmtree(root)  # its pictures were all written as files
        write_cached(unfinished / INDEX, json.dumps({"classes": classes, "splits": splits}))
        os.rename(unfinished, folder / "files")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(fetched, ignore_errors=True)  # archives put there by hand are in `folder`, and stay


def _items(dataset: Any) -> Iterable[tuple[Any, int]]:
    """(file or picture, label) of each image."""
    if hasattr(dataset, "_images"):  # the pets are files, but torchvision would open them
        return zip(dataset._images, dataset._labels, strict=True)
    return (dataset[index] for index in range(len(dataset)))


def _files(items: Iterable[tuple[Any, int]], folder: Path, split: str) -> list[tuple[str, int]]:
    """(path below `folder`, label) of each image; pictures are written as PNG files."""
    files = []
    for index, (image, label) in enumerate(items):
        if isinstance(image, str | Path):
            path = os.path.relpath(image, folder)
        else:
            path = f"{split}/{index:06}.png"
            (folder / split).mkdir(exist_ok=True)
            image.save(folder / path)
        files.append((path, int(label)))
    return files


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
