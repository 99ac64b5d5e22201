"""Mean, deviation and range of the values of images, channel by channel."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bincomm.data.crops import Crops
from bincomm.data.images import UnusableImageError, read
from bincomm.data.sources import Source
from bincomm.data.values import decode_values
from bincomm.logs import progress_bar

BATCH = 64  # images read at once


class Statistics(NamedTuple):
    """Of values from 0 to 1, for each of N channels; every image counts alike, as in training."""

    mean: list[float]
    std: list[float]
    smallest: list[float]
    largest: list[float]
    images: int  # that were read
    pixels: int  # of them


def measure(
    source: Source,
    crops: Crops,
    *,
    most: int | None = None,
    threads: int = 4,
    report: Callable[[str, str], None] = lambda name, reason: None,
) -> Statistics:
    """Read images one after another and measure their values, see `decode_values`, under a progress bar.

    Args:
        crops: say how images are read.
        most: of more images than this as many are read, spread evenly over the source; None: all.
        threads: CPU threads that read.
        report: called with the name of each image that cannot be used, and the reason.

    Raises:
        ValueError: none of them can be used.
    """
    total, channels = len(source.images), crops.channels
    count = total if most is None else min(most, total)
    indices = [number * total // count for number in range(count)]
    sums = np.zeros((2, channels))
    smallest, largest = np.full(channels, np.inf), np.full(channels, -np.inf)
    images = pixels = 0

    def of_image(index: int) -> tuple[int, np.ndarray] | str:
        try:
            values = decode_values(read(source.images, index), channels, crops.pixel_range)
        except UnusableImageError as error:
            return str(error)
        rows = values.reshape(-1, channels)
        mean = rows.mean(0, dtype=np.float64)
        square = np.square(rows, dtype=np.float64).mean(0)
        return len(rows), np.stack([mean, square, rows.min(0), rows.max(0)])

    with (
        ThreadPoolExecutor(threads, "bincomm-read") as readers,
        progress_bar(total=count, desc="measuring", unit="img") as bar,
    ):
        for first in range(0, count, BATCH):
            portion = indices[first : first + BATCH]
            for index, result in zip(portion, readers.map(of_image, portion), strict=True):
                bar.update()
                if isinstance(result, str):
                    report(source.images.name(index), result)
                    continue
                size, rows = result
                images, pixels = images + 1, pixels + size
                sums += rows[:2]
                smallest, largest = np.minimum(smallest, rows[2]), np.maximum(largest, rows[3])
    if not images:
        raise ValueError(f"data: none of {count} images can be used")
    mean, square = sums / images
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return Statistics(mean.tolist(), std.tolist(), smallest.tolist(), largest.tolist(), images, pixels)
