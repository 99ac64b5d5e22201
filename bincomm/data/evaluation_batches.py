"""All usable images of a source once, in order: as center crops for evaluation, or by any other pipeline."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.dali import (
    Feed,
    Pipeline,
    decode,
    device_number,
    find_undecodable,
    fn,
    layouts,
    normalize,
    pipeline_def,
    resize,
    run_pipeline,
)
from bincomm.data.images import UnusableImageError
from bincomm.data.sources import Source
from bincomm.data.values import load_input


def eval_batches(
    source: Source,
    crops: Crops,
    *,
    crop_ratio: float = 0.875,
    batch_size: int,
    device: torch.device,
    threads: int = 4,
    report: Callable[[int, str], None] = lambda image, reason: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices of m images in the source, and their center crops (m, C, S, S), batch by batch in order.

    S is the global crops' size, and the crops are normalized as in training. Which pixels of an image they
    show is what timm and torchvision define, see `center_windows`. `report` is called with the index of each
    image that cannot be used, and the reason.
    """
    shorter = math.floor(crops.global_size / crop_ratio)

    def build(feed: Feed) -> Pipeline:
        def with_windows() -> tuple[list[np.ndarray], list[np.ndarray]]:
            inputs, sizes = feed()
            return inputs, list(center_windows(np.array(sizes), crops.global_size, shorter))

        return evaluation_pipeline(
            crops, with_windows, batch_size=batch_size, threads=threads, device_id=device_number(device)
        )

    for indices, (images,) in usable_batches(source, crops, build, batch_size, device, threads, report):
        yield indices, images


def usable_batches(
    source: Source,
    crops: Crops,
    build: Callable[[Feed], Pipeline],
    batch_size: int,
    device: torch.device,
    threads: int,
    report: Callable[[int, str], None],
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """All images of a source, in order, through a pipeline: the indices of a batch's images, and its outputs.

    `build` creates the pipeline from a function that returns images, as `load_input` does, and their sizes,
    (height, width).
    Images that cannot be used are left out, and `report` is called with the index of each and the reason.
    """
    batch: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    pipeline = None

    def load_or_reason(image: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            return load_input(source.images, image, crops)
        except UnusableImageError as error:
            return str(error)

    with ThreadPoolExecutor(threads, "bincomm-read") as readers:
        for first in range(0, len(source.images), batch_size):
            loaded = {}
            indices = range(first, min(first + batch_size, len(source.images)))
            for image, result in zip(indices, readers.map(load_or_reason, indices), strict=True):
                if isinstance(result, str):
                    report(image, result)
                else:
                    loaded[image] = result
            while loaded:
                inputs, sizes = zip(*loaded.values(), strict=True)
                batch[0][:], batch[1][:] = inputs, np.array(sizes)
                pipeline = pipeline or build(lambda: batch)
                try:
                    outputs = run_pipeline(pipeline, device)
                except RuntimeError as error:
                    pipeline = None  # DALI cannot continue after an error
                    undecodable = find_undecodable(inputs, device, readers) if crops.rgb else {}
                    if not undecodable:
                        raise error
                    images = list(loaded)
                    for index, reason in undecodable.items():
                        report(images[index], reason)
                        del loaded[images[index]]
                else:
                    yield list(loaded), outputs
                    break


def center_windows(sizes: np.ndarray, side: int, shorter: int) -> np.ndarray:
    """The window of each image that is its center crop, (n, 4) fp32: its upper left and its lower right
    corner, (y, x) each, as shares of the sides.

    The geometry is that of torchvision's `Resize(shorter)` and `CenterCrop(side)`: the resized image's longer
    side is cut off to whole pixels, and half a pixel of the crop's place is rounded to the even one.

    Args:
        sizes: (n, 2) heights and widths of the images.
        side: S, of the crop, and shorter: of the resized image's shorter side, at least S; in pixels.
    """
    sizes = sizes.astype(np.int64)
    resized = shorter * sizes // sizes.min(1, keepdims=True)
    first = np.rint((resized - side) / 2)  # to even, as Python's round
    return (np.concatenate([first, first + side], 1) / np.tile(resized, 2)).astype(np.float32)


def evaluation_pipeline(
    crops: Crops, feed: Feed, *, batch_size: int, threads: int, device_id: int | None
) -> Pipeline:
    """The graph from images, as `load_input` returns them, and `center_windows` to center crops (n, C, S, S)
    of the global crops' size.

    Only the window is resized: a thin image would not fit into memory. On a CPU, four fifths of the values
    are Pillow's, and nearly all others a gray level off, because Pillow rounds between columns and rows. More
    (up to 9 were seen) where the kernel overshoots 0 or 255, and within two pixels of an image's edge, which
    DALI repeats and Pillow does not.
    """

    @pipeline_def
    def graph() -> Any:
        images, window = fn.external_source(source=feed, num_outputs=2, batch=True, layout=layouts(crops))
        corners = {"roi_start": window[:2], "roi_end": window[2:], "roi_relative": True}
        size = (crops.global_size, crops.global_size)
        return normalize(resize(decode(images, device_id is not None, crops), size=size, **corners), crops)

    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
