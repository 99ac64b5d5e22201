"""The DALI graph of training: decode an image once and augment every crop.

One graph serves CPU and GPU. Nothing random happens inside: what a crop looks like comes in as numbers
(`crop_windows`, `draw_crops`), so that a batch is a function of the seed and its place in the run alone,
whatever the device, the threads or what came before.
"""

from typing import Any

import numpy as np
import torch

from bincomm.data.crops import Crops
from bincomm.data.dali import (
    DALIDataType,
    Feed,
    Pipeline,
    decode,
    fn,
    normalize,
    pipeline_def,
    resize,
)

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TRIES = 10  # windows drawn per crop before the fallback, as in torchvision's RandomResizedCrop

# The numbers a crop is made from: its window's corners, then these, in the order `draw_crops` writes them.
CORNERS = 4
BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR, SIGMA, SOLARIZE = range(CORNERS, CORNERS + 7)
DRAWS = 2 * TRIES + 12  # random numbers for one crop: its window (2 TRIES + 2), its flip, its colors


def crop_windows(crops: Crops, sizes: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Windows of the crops, by the law of torchvision's RandomResizedCrop: (n, V, 4) fp32, globals first.

    The first of TRIES draws of area and aspect ratio that fits inside the image is placed at random; when
    none does, it is the largest central window of a ratio within 3/4 and 4/3.

    Args:
        sizes: (n, 2) heights and widths of the images.
        uniforms: (n, V, DRAWS) from [0, 1).

    Returns:
        (y, x) of the corner that becomes the crop's upper left one, (y, x) of the opposite one, in pixels;
        for a crop that is flipped the first x is the larger.
    """
    u = uniforms.astype(np.float64)
    low, high = np.array([crops.global_scale] * 2 + [crops.local_scale] * crops.local_crops).T[..., None]
    height, width = (sizes[:, None, None, axis].astype(np.float64) for axis in (0, 1))
    side = np.sqrt(height * width * (low + (high - low) * u[..., :TRIES]))
    ratio = np.exp(np.log(3 / 4) / 2 + np.log(16 / 9) / 2 * u[..., TRIES : 2 * TRIES])  # √ of width / height
    heights, widths = np.floor(side / ratio + 0.5), np.floor(side * ratio + 0.5)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.argmax(-1)[..., None]
    h, w = (np.take_along_axis(values, first, -1)[..., 0] for values in (heights, widths))
    height, width = height[..., 0], width[..., 0]
    y, x = np.floor((height - h + 1) * u[..., 2 * TRIES]), np.floor((width - w + 1) * u[..., 2 * TRIES + 1])
    none = ~fits.any(-1)
    h = np.where(none, np.minimum(height, np.floor(width * 4 / 3 + 0.5)), h)
    w = np.where(none, np.minimum(width, np.floor(height * 4 / 3 + 0.5)), w)
    y, x = np.where(none, np.floor((height - h) / 2), y), np.where(none, np.floor((width - w) / 2), x)
    flipped = u[..., 2 * TRIES + 2] < crops.flip
    corners = y, np.where(flipped, x + w, x), y + h, np.where(flipped, x, x + w)
    return np.stack(corners, -1).astype(np.float32)


def draw_crops(crops: Crops, sizes: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """All numbers the crops are made from (n, V, 11) fp32: their windows, and what colors go through.

    Args:
        sizes: (n, 2) heights and widths of the images.
        uniforms: (n, V, DRAWS) random numbers from [0, 1).
    """
    u = np.moveaxis(uniforms[..., 2 * TRIES + 3 :], -1, 0)
    numbers = np.empty((*uniforms.shape[:2], CORNERS + 7), np.float32)
    # As shares of the sides: should DALI decode to another size, the window is inside all the same.
    numbers[..., :CORNERS] = crop_windows(crops, sizes, uniforms) / np.tile(sizes, 2)[:, None]
    jitters = u[0] < crops.jitter_p
    for index, strength in enumerate(crops.jitter[:3]):
        low, high = max(0.0, 1 - strength), 1 + strength
        numbers[..., BRIGHTNESS + index] = np.where(jitters, low + (high - low) * u[1 + index], 1)
    # DALI turns by degrees, torchvision by shares of a circle.
    numbers[..., HUE] = np.where(jitters, 360 * crops.jitter[3] * (2 * u[4] - 1), 0)
    numbers[..., SATURATION] *= u[5] >= crops.gray
    numbers[..., BLUR] = u[6] < _blurs(crops)
    numbers[..., SIGMA] = 0.1 + 1.9 * u[7]
    numbers[..., SOLARIZE] = u[8] < np.array([0, crops.solarize] + [0] * crops.local_crops)
    return numbers


def training_pipeline(
    crops: Crops,
    feed: Feed,
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Pipeline:
    """The graph from encoded images and the numbers of `draw_crops` to normalized globals
    (n, 2, 3, S, S) and locals (n, L, 3, s, s); with `channels_last` (n, 2, S, S, 3) and (n, L, s, s, 3).
    """

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        # Not copied: who feeds the graph keeps the images until they have been used.
        encoded, numbers = fn.external_source(source=feed, num_outputs=2, batch=True, no_copy=True)
        images = decode(encoded, device_id is not None)
        groups: tuple[list, list] = ([], [])
        for view, blur in enumerate(_blurs(crops)):
            size = crops.global_size if view < 2 else crops.local_size
            corners = {"roi_start": numbers[view, :2], "roi_end": numbers[view, 2:CORNERS]}
            crop = resize(images, size=(size, size), roi_relative=True, **corners)
            solarize = crops.solarize if view == 1 else 0.0
            groups[view >= 2].append(_augment(crop, numbers[view], crops, blur, solarize))
        layout = "FHWC" if channels_last else "FCHW"
        kind = DALIDataType.FLOAT16 if dtype == torch.float16 else DALIDataType.FLOAT
        return tuple(
            normalize(fn.stack(*group, axis_name="F"), crops, output_layout=layout, dtype=kind)
            for group in groups
            if group
        )

    # Depth 2: while one batch is being trained on, the next is being made.
    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2)


def _blurs(crops: Crops) -> list[float]:
    return [crops.blur[0], crops.blur[1]] + [crops.blur[2]] * crops.local_crops


def _augment(image: Any, numbers: Any, crops: Crops, blur: float, solarize: float) -> Any:
    """Jitter, gray, blur and solarize one crop; what the recipe never does is left out."""
    if any(crops.jitter[:2]) and crops.jitter_p:
        # Contrast is around the mean of the gray image, as in torchvision, and that is the gray of the mean
        # color.
        gray = fn.reductions.sum(fn.reductions.mean(image, axes=[0, 1]) * LUMA, axes=[0])
        image = fn.brightness_contrast(
            image, brightness=numbers[BRIGHTNESS], contrast=numbers[CONTRAST], contrast_center=_on_cpu(gray)
        )
    if (any(crops.jitter[2:]) and crops.jitter_p) or crops.gray:
        image = fn.color_twist(image, saturation=numbers[SATURATION], hue=numbers[HUE])
    if blur:  # noqa: SIM102  (this is decided when the graph is built, the next line for every image)
        if numbers[BLUR] > 0:
            image = fn.gaussian_blur(image, sigma=numbers[SIGMA])
    if solarize:  # noqa: SIM102
        if numbers[SOLARIZE] > 0:
            dark = fn.cast(image < 128, dtype=DALIDataType.UINT8)
            image = image * dark + (255 - image) * (1 - dark)
            image = fn.cast(image, dtype=DALIDataType.UINT8)
    return image


def _on_cpu(value: Any) -> Any:
    return value.cpu() if value.device == "gpu" else value
