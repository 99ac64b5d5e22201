"""Working on whole sources: finding the images that cannot be used, and writing tar shards."""

import itertools
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bincomm.data.images import UnusableImageError, examine, read
from bincomm.data.loader import usable_batches
from bincomm.data.multicrop import decoding_pipeline
from bincomm.data.sources import Source
from bincomm.files import write_text

BATCH = 64  # images decoded or read at once
# What an image is called in a shard; images of other kinds, which no extension would promise, become PNGs.
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def verify(source: Source, *, threads: int = 4) -> list[tuple[str, str]]:
    """Read and decode every image of a source, as training does on a CPU, under a progress bar.

    Args:
        threads: CPU threads that read and decode.

    Returns:
        Names of the images that cannot be used, in their order, and why.
    """
    unusable: list[tuple[int, str]] = []
    with tqdm(total=len(source.images), desc="verifying", unit="img", disable=None) as bar:

        def report(image: int, why: str) -> None:
            unusable.append((image, why))
            bar.update()
            bar.set_postfix_str(f"{len(unusable)} unusable")

        def build(given):
            return decoding_pipeline(lambda: given()[0], batch_size=BATCH, threads=threads, device_id=None)

        for images, _ in usable_batches(source, build, BATCH, torch.device("cpu"), threads, report):
            bar.update(len(images))
    return [(source.images.name(image), why) for image, why in sorted(unusable)]


def write_shards(
    source: Source, output: str | Path, *, shard_bytes: int = 256 << 20, threads: int = 4
) -> list[tuple[str, str]]:
    """Write the images of a source into tar shards `data-00000.tar`, ... in WebDataset's layout.

    A sample is an image as it was encoded (as a PNG if it is of an unusual kind), named by its number in a
    random order that is always the same, and the number of its class in a .cls file where there are labels;
    `classes.txt` then has a class a line. The folder appears when all is written, or not at all.

    Args:
        output: the folder; must not exist.
        shard_bytes: a shard is complete once it has so many.
        threads: CPU threads that read.

    Returns:
        Names of the images that were left out, for they cannot be read or are no whole images, and why.

    Raises:
        ValueError: the folder exists.
        OSError: it cannot be written, for want of space for example; the message names the folder.
    """
    output = Path(output).expanduser().absolute()
    if output.exists():
        raise ValueError(f"output: expected the name of a new folder, {output} is there already")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    left_out: list[tuple[str, str]] = []
    try:
        shards, tar = itertools.count(), None
        for number, (image, suffix, data) in enumerate(_usable(source, threads, left_out)):
            if tar is None or tar.offset >= shard_bytes:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(aside / f"data-{next(shards):05}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            _add(tar, f"{number:09}{suffix}", data)
            if source.labels is not None:
                _add(tar, f"{number:09}.cls", str(source.labels[image]).encode())
        if tar is None:
            raise ValueError(f"data: none of {len(source.images)} images can be used")
        tar.close()
        if source.labels is not None:
            write_text(aside / "classes.txt", "".join(f"{name}\n" for name in source.classes))
        os.chmod(aside, 0o755)  # mkdtemp lets the owner alone in
        os.rename(aside, output)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return left_out


def write_unusable(path: Path, unusable: list[tuple[str, str]]) -> None:
    """Write names and reasons whole, a line each, with a tab between."""
    lines = ("\t".join(part.replace("\t", "\\t").replace("\n", "\\n") for part in row) for row in unusable)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _usable(
    source: Source, threads: int, left_out: list[tuple[str, str]]
) -> Iterator[tuple[int, str, bytes]]:
    """Images, their kinds and bytes in the order of the shards, read a little ahead."""

    def usable(image: int) -> tuple[str, bytes] | str:
        try:
            content = read(source.images, image)
            examine(content)
            data = content.tobytes()
            with Image.open(BytesIO(data)) as opened:
                if opened.format in SUFFIXES:
                    return SUFFIXES[opened.format], data
                file = BytesIO()
                opened.convert("RGB").save(file, "PNG")
                return ".png", file.getvalue()
        except UnusableImageError as error:
            return str(error)

    order = np.random.default_rng(0).permutation(len(source.images)).tolist()
    with (
        ThreadPoolExecutor(threads) as readers,
        tqdm(total=len(order), desc="writing shards", unit="img", disable=None) as bar,
    ):
        for first in range(0, len(order), BATCH):
            images = order[first : first + BATCH]
            for image, data in zip(images, readers.map(usable, images), strict=True):
                bar.update()
                if isinstance(data, str):
                    left_out.append((source.images.name(image), data))
                else:
                    yield image, *data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))
