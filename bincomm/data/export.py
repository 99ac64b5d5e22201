"""Checking all images of a source, and writing them into tar shards."""

import itertools
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from bincomm.data.bounds import TIFF_ORDERS
from bincomm.data.crops import Crops
from bincomm.data.dali import RGB, Feed, Pipeline, decoding_pipeline
from bincomm.data.evaluation_batches import usable_batches
from bincomm.data.images import ARRAY, ARRAYS, UnusableImageError, examine, open_encoded, read
from bincomm.data.parquet import ParquetImages
from bincomm.data.sources import Source
from bincomm.data.values import decode_values
from bincomm.files import check_folder, expand_home, write_text
from bincomm.logs import progress_bar

BATCH = 64  # images decoded or read at once
# Of images in a shard, by their format; images of other formats become PNGs.
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def verify(source: Source, crops: Crops = RGB, *, threads: int = 4) -> list[tuple[str, str]]:
    """Read and decode every image of a source, as training does on a CPU, under a progress bar.

    Args:
        crops: say how images are read.
        threads: CPU threads that read and decode.

    Returns:
        (name, reason) of each image that cannot be used, in their order.
    """
    unusable: list[tuple[int, str]] = []
    with progress_bar(total=len(source.images), desc="verifying", unit="img") as bar:

        def report(image: int, reason: str) -> None:
            unusable.append((image, reason))
            bar.update()
            bar.set_postfix_str(f"{len(unusable)} unusable")

        def build(feed: Feed) -> Pipeline:
            return decoding_pipeline(
                lambda: feed()[0], batch_size=BATCH, threads=threads, device_id=None, crops=crops
            )

        for images, _ in usable_batches(source, crops, build, BATCH, torch.device("cpu"), threads, report):
            bar.update(len(images))
    return [(source.images.name(image), reason) for image, reason in sorted(unusable)]


def write_shards(
    source: Source,
    output: str | Path,
    crops: Crops = RGB,
    *,
    shard_bytes: int = 256 << 20,
    threads: int = 4,
) -> list[tuple[str, str]]:
    """Write the images of a source into tar shards `data-00000.tar`, ... in WebDataset's layout, in a
    folder for each part of the data where there are several.

    A sample is an image as it was encoded (as a PNG if its format is unusual), named by its number in a
    random order that is always the same, and the number of its class in a .cls file where there are labels;
    `classes.txt` then has a class a line. In that order images of a row group of a Parquet file stay
    together. The folder appears when all is written, or not at all.

    Args:
        output: the folder; must not exist.
        crops: say how images are read; those that cannot be read so are left out.
        shard_bytes: a shard is complete once it has at least so many bytes.
        threads: CPU threads that read.

    Returns:
        (name, reason) of each image that was left out, because it cannot be read or is incomplete.

    Raises:
        ValueError: the folder exists, or cannot be made.
        OSError: it cannot be written, for example because the disk is full; the message names the folder.
    """
    output = expand_home(output).absolute()
    if os.path.lexists(output):
        raise ValueError(f"output: expected the name of a new folder, {output} exists already")
    check_folder("output", output)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{secrets.token_hex(8)}.unfinished")
    unfinished.mkdir()
    left_out: list[tuple[str, str]] = []
    try:
        writers: dict[str, ShardWriter] = {}
        for number, (image, suffix, data) in enumerate(_usable(source, crops, threads, left_out)):
            part = source.parts.name(image) if source.parts else ""
            if part not in writers:
                writers[part] = ShardWriter(unfinished / part, shard_bytes)
            label = None if source.labels is None else str(source.labels[image])
            writers[part].write(f"{number:09}", suffix, data, label)
        if not writers:
            raise ValueError(f"data: none of {len(source.images)} images can be used")
        for writer in writers.values():
            writer.close()
        if source.labels is not None:
            write_text(unfinished / "classes.txt", "".join(f"{name}\n" for name in source.classes))
        os.rename(unfinished, output)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return left_out


class ShardWriter:
    """Writes samples into tar files of a folder, one after another."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self.numbers = itertools.count()
        self.tar: tarfile.TarFile | None = None

    def write(self, name: str, suffix: str, data: bytes, label: str | None) -> None:
        """Write an image, and the number of its class."""
        if self.tar is None or self.tar.offset >= self.shard_bytes:
            self.close()
            path = self.folder / f"data-{next(self.numbers):05}.tar"
            self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed once full)
        _add(self.tar, f"{name}{suffix}", data)
        if label is not None:
            _add(self.tar, f"{name}.cls", label.encode())

    def close(self) -> None:
        """Complete the last file."""
        if self.tar is not None:
            self.tar.close()


def write_unusable(path: Path, unusable: list[tuple[str, str]]) -> None:
    """Write a file of (name, reason), a line each with a tab between: all of it or, on a failure, nothing."""
    lines = ("\t".join(part.replace("\t", "\\t").replace("\n", "\\n") for part in row) for row in unusable)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _usable(
    source: Source, crops: Crops, threads: int, left_out: list[tuple[str, str]]
) -> Iterator[tuple[int, str, bytes]]:
    """(index, suffix, bytes) of the usable images in the order of the shards, read a little ahead."""

    def read_or_reason(image: int) -> tuple[str, bytes] | str:
        try:
            content = read(source.images, image)
            if not crops.rgb:
                decode_values(content, crops.channels, crops.pixel_range)
                return _suffix(content), content.tobytes()
            examine(content)
            data = content.tobytes()
            with open_encoded(data) as opened:
                if opened.format in SUFFIXES:
                    return SUFFIXES[opened.format], data
                file = BytesIO()
                opened.convert("RGB").save(file, "PNG")
                return ".png", file.getvalue()
        except UnusableImageError as error:
            return str(error)

    order = np.random.default_rng(0).permutation(len(source.images))
    if isinstance(source.images, ParquetImages):
        order = source.images.together(order)
    with (
        ThreadPoolExecutor(threads) as readers,
        progress_bar(total=len(order), desc="writing shards", unit="img") as bar,
    ):
        for first in range(0, len(order), BATCH):
            images = order[first : first + BATCH].tolist()
            for image, result in zip(images, readers.map(read_or_reason, images), strict=True):
                bar.update()
                if isinstance(result, str):
                    left_out.append((source.images.name(image), result))
                else:
                    yield image, *result


def _suffix(content: np.ndarray) -> str:
    """How the name of an image of other than RGB ends, which is written as it is."""
    if content[: len(ARRAY)].tobytes() == ARRAY:
        return ARRAYS[0]
    if content[:4].tobytes() in TIFF_ORDERS:
        return SUFFIXES["TIFF"]
    with open_encoded(content) as opened:
        if opened.format not in SUFFIXES:
            raise UnusableImageError(
                f"its format, {opened.format}, has no name in shards; write it as a TIFF"
            )
        return SUFFIXES[opened.format]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))
