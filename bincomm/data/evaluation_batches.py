"""All usable images of a source once, in order: as center crops for evaluation, or by any other pipeline."""

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
    normalize,
    pipeline_def,
    resize,
    run_pipeline,
)
from bincomm.data.images import UnusableImageError, load
from bincomm.data.sources import Source

LONGEST = 64  # ratio of an image's sides above which the ends of the longer side are cut off


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
    """Indices of m images in the source, and their center crops (m, 3, S, S), batch by batch in order.

    S is the global crops' size, and the crops are normalized as in training. The shorter side is resized to
    S/crop_ratio (bicubic, antialiased), of which the center is taken. `report` is called with the index of
    each image that cannot be used, and the reason.
    """

    def build(feed: Feed) -> Pipeline:
        return evaluation_pipeline(
            crops,
            feed,
            resize_shorter=round(crops.global_size / crop_ratio),
            batch_size=batch_size,
            threads=threads,
            device_id=device_number(device),
        )

    for indices, (images,) in usable_batches(source, build, batch_size, device, threads, report):
        yield indices, images


def usable_batches(
    source: Source,
    build: Callable[[Feed], Pipeline],
    batch_size: int,
    device: torch.device,
    threads: int,
    report: Callable[[int, str], None],
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """All images of a source, in order, through a pipeline: the indices of a batch's images, and its outputs.

    `build` creates the pipeline from a function that returns encoded images and their `center_regions`.
    Images that cannot be used are left out, and `report` is called with the index of each and the reason.
    """
    batch: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    pipeline = None

    def load_or_reason(image: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            return load(source.images, image)
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
                encoded, sizes = zip(*loaded.values(), strict=True)
                batch[0][:], batch[1][:] = encoded, center_regions(np.array(sizes))
                pipeline = pipeline or build(lambda: batch)
                try:
                    outputs = run_pipeline(pipeline, device)
                except RuntimeError as error:
                    pipeline = None  # DALI cannot continue after an error
                    undecodable = find_undecodable(encoded, device, readers)
                    if not undecodable:
                        raise error
                    images = list(loaded)
                    for index, reason in undecodable.items():
                        report(images[index], reason)
                        del loaded[images[index]]
                else:
                    yield list(loaded), outputs
                    break


def center_regions(sizes: np.ndarray) -> np.ndarray:
    """The part of each image that can be in a center crop, (n, 4) fp32: its upper left and its lower right
    corner, (y, x) each, as shares of the sides.

    That is the complete image, unless its sides have a ratio above `LONGEST`: resized, it would not fit into
    memory.

    Args:
        sizes: (n, 2) heights and widths of the images.
    """
    sizes = sizes.astype(np.float64)
    shares = np.minimum(1, LONGEST * sizes.min(1, keepdims=True) / sizes)
    return np.concatenate([(1 - shares) / 2, (1 + shares) / 2], 1).astype(np.float32)


def evaluation_pipeline(
    crops: Crops, feed: Feed, *, resize_shorter: int, batch_size: int, threads: int, device_id: int | None
) -> Pipeline:
    """The graph from encoded images and `center_regions` to center crops (n, 3, S, S) of the global crops'
    size, once `resize_shorter` pixels are the shorter side.
    """

    @pipeline_def
    def graph() -> Any:
        encoded, region = fn.external_source(source=feed, num_outputs=2, batch=True)
        corners = {"roi_start": region[:2], "roi_end": region[2:], "roi_relative": True}
        images = resize(decode(encoded, device_id is not None), resize_shorter=resize_shorter, **corners)
        return normalize(images, crops, crop=(crops.global_size, crops.global_size))

    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
