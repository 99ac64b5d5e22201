"""Objects annotated in COCO's format: the file, which may be someone else's, and the images it names."""

import json
import math
import os
import reprlib
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bincomm.evaluation.layouts import check_files, file_error, refusal
from bincomm.files import expand_home

# Files of annotations, and the folder of images beside each; the first that there is.
LAYOUTS = {
    "annotations/instances_val2017.json": "val2017",
    "annotations/instances_val2014.json": "val2014",
    "annotations.json": "images",
}
ACCEPTED = (
    "COCO (annotations/instances_val2017.json and val2017, or the same of 2014), or annotations.json and "
    "images; or FILE@IMAGES"
)
LARGEST_FILE = 1 << 29  # bytes; that of COCO's 118 287 training images is smaller
# Pixels of the contours of an object, and of all: pycocotools holds five points of 20 bytes each for a pixel
# of the former, and runs for the latter.
LONGEST_CONTOUR, ALL_CONTOURS = 1 << 20, 1 << 30
DIGITS = 7  # of a compressed run, five bits each


class AnnotatedObject(NamedTuple):
    """An object, and where it is."""

    box: list[float]  # left, top, width, height in pixels
    polygons: list[list[float]]  # x, y, x, y, ...; none where there are runs
    runs: list[int]  # pixels in turn outside and inside, column after column; none is 0 but the first
    crowd: bool  # a region of many objects, in which nothing counts as found wrongly


class AnnotatedImage(NamedTuple):
    """An image of a file of annotations."""

    id: int
    path: Path
    shape: tuple[int, int]  # height, width
    objects: list[AnnotatedObject]  # in the order of their numbers in the file


def open_objects(folder: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """The images of a file of COCO's format, by their numbers, with their objects. Of the images only names
    are read.

    Polygons, runs and compressed runs are taken; categories are not looked at.

    Args:
        folder: COCO as its archives unpack, annotations/instances_val2017.json beside val2017, or the same of
            2014; one's own, annotations.json beside images; or FILE@IMAGES, the latter relative to the
            file's folder. A file_name is relative to the folder of images and stays below it.

    Raises:
        ValueError: another layout; a file that is no JSON or is larger than 512 MiB; an entry that is
            missing, or has other values; no object that is no crowd; or images that are missing. The message
            names the file, the entry, what was expected and what there is.
    """
    path, images = _files(folder)
    content = _read(path)
    if not isinstance(content, dict):
        raise _wrong(path, "content", 'an object with "images" and "annotations"', content)
    by_id: dict[int, AnnotatedImage] = {}
    for where, record in _records(path, content, "images"):
        number = _new_id(path, where, record, by_id)
        file, shape = _image(path, where, record, images), _shape(path, where, record)
        by_id[number] = AnnotatedImage(number, file, shape, [])
    objects: dict[int, tuple[int, AnnotatedObject]] = {}
    contours = 0
    for where, record in _records(path, content, "annotations"):
        number = _new_id(path, where, record, objects)
        image = record.get("image_id")
        if type(image) is not int or image not in by_id:
            raise _wrong(path, f"{where}.image_id", "the id of an image", image)
        annotated, contour = _object(path, where, record, by_id[image].shape)
        objects[number] = image, annotated
        contours += contour
        if contours > ALL_CONTOURS:
            raise file_error(
                path, f"annotations: expected contours of at most {ALL_CONTOURS} pixels, got more"
            )
    for number in sorted(objects):
        image, annotated = objects[number]
        by_id[image].objects.append(annotated)
    if all(annotated.crowd for _, annotated in objects.values()):
        raise file_error(path, "annotations: expected an object that is no crowd, got none")
    result = [by_id[number] for number in sorted(by_id)]
    check_files("images", [image.path for image in result])
    return result


def layout_of(folder: Path) -> str | None:
    """Which file of annotations a folder has, the first of LAYOUTS; None if it has none."""
    return next((file for file in LAYOUTS if (folder / file).is_file()), None)


def decode_runs(text: str) -> list[int]:
    """The runs of COCO's compressed form: numbers in digits of 5 bits from the lowest on, as characters from
    "0" on, 32 added to all but the last, whose 16 is the sign; from the fourth on each is the difference to
    the last but one.

    Raises:
        ValueError: it holds other characters, or a number that is too large or not complete.
    """
    runs: list[int] = []
    value = digits = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or digits == DIGITS:
            raise ValueError("no compressed runs")
        value |= (digit & 31) << 5 * digits
        digits += 1
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << 5 * digits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = digits = 0
    if digits:
        raise ValueError("compressed runs that end in a number")
    return runs


def _files(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file of annotations and the folder of its images."""
    root = expand_home(folder)
    layout = layout_of(root)
    text, _, name = os.fspath(folder).rpartition("@")
    if layout is not None:
        path, images = root / layout, root / LAYOUTS[layout]
    elif text and expand_home(text).is_file():
        path = expand_home(text)
        images = path.parent / expand_home(name)
    else:
        raise refusal("objects", root, ACCEPTED, layout_of)
    if not images.is_dir():
        raise file_error(images, f"expected a folder, of the images of {path}")
    return path, images


def _read(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST_FILE:
        raise file_error(path, f"expected at most {LARGEST_FILE} bytes, got more")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise file_error(path, f"expected JSON in COCO's format, got {error}") from None


def _records(path: Path, content: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The records of a list, and what an error calls each."""
    records = content.get(key)
    if not isinstance(records, list) or not records:
        raise _wrong(path, key, "a list that is not empty", records)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise _wrong(path, f"{key}[{number}]", "an object", record)
    return [(f"{key}[{number}]", record) for number, record in enumerate(records)]


def _new_id(path: Path, where: str, record: dict[str, Any], taken: Container[int]) -> int:
    number = record.get("id")
    if type(number) is not int or number in taken:
        raise _wrong(path, f"{where}.id", "an integer that no other has", number)
    return number


def _image(path: Path, where: str, record: dict[str, Any], images: Path) -> Path:
    """The path of an image. Its name is a stranger's, and must not lead out of the folder of images."""
    name = record.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise _wrong(path, f"{where}.file_name", "the name of an image", name)
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise _wrong(path, f"{where}.file_name", f"a path below {images}", name)
    return images / relative


def _shape(path: Path, where: str, record: dict[str, Any]) -> tuple[int, int]:
    largest = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # no larger image is decoded
    sides = [record.get(key) for key in ("height", "width")]
    height, width = (side if type(side) is int else 0 for side in sides)
    if min(height, width) < 1 or height * width > largest:
        expected = f"positive integers whose product is at most {largest}"
        raise _wrong(path, f"{where}.height and width", expected, sides)
    return height, width


def _object(
    path: Path, where: str, record: dict[str, Any], shape: tuple[int, int]
) -> tuple[AnnotatedObject, int]:
    """An object, and the length of its polygons."""
    crowd = record.get("iscrowd", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        raise _wrong(path, f"{where}.iscrowd", "0 or 1", crowd)
    box = _finite(record.get("bbox"))
    if box is None or len(box) != 4 or (box[2:] < 0).any():
        expected = "left, top, width and height, finite, the last two at least 0"
        raise _wrong(path, f"{where}.bbox", expected, record.get("bbox"))
    outline, polygons, runs, contour = record.get("segmentation"), [], [], 0
    if isinstance(outline, dict):
        runs = _runs(path, f"{where}.segmentation", outline, shape)
    elif isinstance(outline, list) and outline:
        for number, polygon in enumerate(outline):
            contour += _contour(path, f"{where}.segmentation[{number}]", polygon, shape)
        polygons = outline
    else:
        expected = "polygons, or runs with size and counts"
        raise _wrong(path, f"{where}.segmentation", expected, outline)
    if contour > LONGEST_CONTOUR:
        expected = f"contours of at most {LONGEST_CONTOUR} pixels"
        raise _wrong(path, f"{where}.segmentation", expected, contour)
    return AnnotatedObject(box.tolist(), polygons, runs, bool(crowd)), contour


def _contour(path: Path, where: str, polygon: Any, shape: tuple[int, int]) -> int:
    """The length of a polygon in pixels and corners. One of two corners pycocotools would take for a box."""
    corners = _finite(polygon)
    if corners is None or len(corners) < 6 or len(corners) % 2:
        raise _wrong(path, where, "x and y of at least 3 corners, finite", polygon)
    corners = corners.reshape(-1, 2)
    size = np.array(shape[::-1])
    if (corners < -size).any() or (corners > 2 * size).any():
        raise _wrong(path, where, f"corners within a side of {_pixels(shape)}", polygon)
    return math.ceil(np.abs(np.roll(corners, -1, 0) - corners).max(1).sum()) + len(corners)


def _runs(path: Path, where: str, record: dict[str, Any], shape: tuple[int, int]) -> list[int]:
    if record.get("size") != list(shape):
        raise _wrong(path, f"{where}.size", f"{list(shape)} as of its image", record.get("size"))
    counts = record.get("counts")
    try:
        runs = decode_runs(counts) if isinstance(counts, str) else counts
    except ValueError:
        runs = None
    area = shape[0] * shape[1]
    if (
        not isinstance(runs, list)
        or not all(type(run) is int and 0 <= run <= area for run in runs)
        or sum(runs) != area
    ):
        expected = f"integers of at least 0 that are {area} together, or these compressed"
        raise _wrong(path, f"{where}.counts", expected, counts)
    # Those of no pixel are taken out: where two masks have one at the same place, pycocotools ends there.
    merged = [0]
    for number, run in enumerate(runs):
        if run and number % 2 == len(merged) % 2:
            merged.append(run)
        else:
            merged[-1] += run
    return merged


def _finite(values: Any) -> np.ndarray | None:
    """A list of finite numbers as (n,) fp64; None if it is no such list."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _pixels(shape: tuple[int, int]) -> str:
    return f"{shape[1]}×{shape[0]} pixels"


def _wrong(path: Path, where: str, expected: str, value: Any) -> ValueError:
    return file_error(path, f"{where}: expected {expected}, got {reprlib.repr(value)}")
