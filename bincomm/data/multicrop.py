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
    do_not_convert,
    fn,
    layouts,
    normalize,
    pipeline_def,
    resize,
)

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TRIES = 10  # windows drawn per crop before the fallback, as in torchvision's RandomResizedCrop

# The numbers a crop is made from: its window's corners, then these, in the order `draw_crops` writes them.
CORNERS = 4
BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR, SIGMA, SOLARIZE = range(CORNERS, CORNERS + 7)
POSTERIZE, TRANSPOSE, HEIGHT, WIDTH, MATRIX = range(SOLARIZE + 1, SOLARIZE + 6)
NUMBERS = MATRIX + 6
# Random numbers for one crop: its window (2 TRIES + 2), its flip and its colors; then those that came later,
# which are drawn behind the first ones of all crops, so that these have stayed what they were.
BLOCKS = (2 * TRIES + 12, 7)
DRAWS = sum(BLOCKS)
FLIP_DRAW, TURNS_DRAW, QUARTERS_DRAW, ANGLE_DRAW, SHEAR_DRAW, POSTERIZE_DRAW, BITS_DRAW = range(
    BLOCKS[0], DRAWS
)


def by_crop(uniforms: np.ndarray, views: int) -> np.ndarray:
    """The random numbers of images (n, V · DRAWS), in the order in which they are drawn, by crop:
    (n, V, DRAWS)."""
    blocks = np.split(uniforms, np.cumsum(BLOCKS)[:-1] * views, axis=1)
    return np.concatenate([block.reshape(len(block), views, -1) for block in blocks], -1)


def crop_windows(crops: Crops, sizes: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Windows of the crops, by the law of torchvision's RandomResizedCrop: (n, V, 4) fp32, globals first.

    The first of TRIES draws of area and aspect ratio that fits inside the image is placed at random; when
    none does, it is the largest central window of a ratio within 3/4 and 4/3. Of a crop that is rotated or
    sheared it is the upright window around that, as much smaller as the image needs to hold it.

    Args:
        sizes: (n, 2) heights and widths of the images.
        uniforms: (n, V, DRAWS) from [0, 1).

    Returns:
        (y, x) of the corner that becomes the crop's upper left one, (y, x) of the opposite one, in pixels;
        for a crop that is flipped the first x is the larger, for one that is flipped vertically the first y.
        Right angles are such flips and, for 90 and 270 degrees, a transposition afterwards.
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
    if crops.warps:
        tall, wide = np.moveaxis(_extents(_to_window(crops, u)), -1, 0)
        shrink = np.minimum(1, np.minimum(height / (tall * h), width / (wide * w)))
        # The place among all that a window of its size can have stays the same.
        y = y * (height - shrink * tall * h) / np.maximum(height - h, 1)
        x = x * (width - shrink * wide * w) / np.maximum(width - w, 1)
        h, w = shrink * tall * h, shrink * wide * w
    turns = _quarter_turns(crops, u)
    flipped = (u[..., 2 * TRIES + 2] < crops.flip) ^ ((turns == 1) | (turns == 2))
    upside_down = (u[..., FLIP_DRAW] < crops.flip_vertical) ^ ((turns == 2) | (turns == 3))
    top, bottom = np.where(upside_down, y + h, y), np.where(upside_down, y, y + h)
    corners = top, np.where(flipped, x + w, x), bottom, np.where(flipped, x, x + w)
    return np.stack(corners, -1).astype(np.float32)


def draw_crops(crops: Crops, sizes: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """All numbers the crops are made from (n, V, NUMBERS) fp32: their windows, and what is done to them.

    Args:
        sizes: (n, 2) heights and widths of the images.
        uniforms: (n, V, DRAWS) random numbers from [0, 1).
    """
    u = np.moveaxis(uniforms[..., 2 * TRIES + 3 :], -1, 0)
    numbers = np.zeros((*uniforms.shape[:2], NUMBERS), np.float32)
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
    bits = 4 + np.floor(4 * uniforms[..., BITS_DRAW])
    numbers[..., POSTERIZE] = np.where(
        uniforms[..., POSTERIZE_DRAW] < crops.posterize, 256 - 2 ** (8 - bits), 0
    )
    numbers[..., TRANSPOSE] = _quarter_turns(crops, uniforms) % 2
    if crops.warps:
        numbers[..., HEIGHT:] = _warps(crops, uniforms)
    return numbers


def _quarter_turns(crops: Crops, uniforms: np.ndarray) -> np.ndarray:
    """By how many right angles, counterclockwise, the crops are rotated: (n, V)."""
    u = uniforms.astype(np.float64)  # 3 times the largest number of fp32 below 1 is rounded to 3 in fp32
    return np.where(u[..., TURNS_DRAW] < crops.right_angles, 1 + np.floor(3 * u[..., QUARTERS_DRAW]), 0)


def _to_window(crops: Crops, uniforms: np.ndarray) -> np.ndarray:
    """The matrices (n, V, 2, 2) from (x, y) in a crop to where that is in its window, both from the center
    and in shares of the sides: they undo a shear, and then a counterclockwise rotation, of the picture.
    """
    u = uniforms.astype(np.float64)
    angle = np.radians(crops.rotate) * (2 * u[..., ANGLE_DRAW] - 1)
    slant = np.tan(np.radians(crops.shear) * (2 * u[..., SHEAR_DRAW] - 1))
    cos, sin = np.cos(angle), np.sin(angle)
    # The product of (1 slant; 0 1) and (cos -sin; sin cos), which is clockwise, because y points down.
    rows = [cos + slant * sin, -sin + slant * cos], [sin, cos]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _extents(to_window: np.ndarray) -> np.ndarray:
    """(height, width) of the upright windows around the crops, in shares of the sides: (n, V, 2)."""
    return np.abs(to_window).sum(-1)[..., ::-1]


def _warps(crops: Crops, uniforms: np.ndarray) -> np.ndarray:
    """The pixels (height, width) to which windows are resized, and the matrices from (x, y) in a crop to
    (x, y) in the resized window, both in pixels from the corner: (n, V, 2 + 6).

    Resizing brings a window to the scale of the crop, antialiased as for all crops, and a warp only turns it:
    warping the image itself would skip pixels.
    """
    to_window = _to_window(crops, uniforms)
    extents = _extents(to_window)
    side = np.array([crops.global_size] * 2 + [crops.local_size] * crops.local_crops)[:, None]
    pixels = np.ceil(extents * side)
    scale = (pixels / (extents * side))[..., ::-1, None] * to_window
    center = pixels[..., ::-1] / 2
    offset = center - (scale * side[..., None] / 2).sum(-1)
    matrix = np.concatenate([scale, offset[..., None]], -1)
    return np.concatenate([pixels, matrix.reshape(*matrix.shape[:2], 6)], -1)


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
    """The graph from images, as `bincomm.data.values.load_input` has them, and the numbers of `draw_crops` to
    normalized globals (n, 2, C, S, S) and locals (n, L, C, s, s); with `channels_last` (n, 2, S, S, C) and
    (n, L, s, s, C).
    """

    # DALI rewrites the source of a graph with conditions and of what it calls, but for what is marked
    # `do_not_convert`, as all without a condition is: rewriting takes longer than building.
    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        # Not copied: who feeds the graph keeps the images until they have been used.
        images, numbers = fn.external_source(
            source=feed, num_outputs=2, batch=True, no_copy=True, layout=layouts(crops)
        )
        images = decode(images, device_id is not None, crops)
        groups: tuple[list, list] = ([], [])
        for view, blur in enumerate(_blurs(crops)):
            size = crops.global_size if view < 2 else crops.local_size
            corners = {"roi_start": numbers[view, :2], "roi_end": numbers[view, 2:CORNERS]}
            pixels = numbers[view, HEIGHT:MATRIX] if crops.warps else (size, size)
            crop = resize(images, size=pixels, roi_relative=True, **corners)
            crop = _turn(crop, numbers[view], crops, size)
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


@do_not_convert
def _blurs(crops: Crops) -> list[float]:
    return [crops.blur[0], crops.blur[1]] + [crops.blur[2]] * crops.local_crops


def _turn(image: Any, numbers: Any, crops: Crops, size: int) -> Any:
    """Rotate and shear one crop of the window around it; what the recipe never does is left out."""
    if crops.warps:
        matrix = fn.reshape(numbers[MATRIX:NUMBERS], shape=[2, 3])
        image = fn.warp_affine(image, matrix=matrix, size=(size, size))
    if crops.right_angles:  # noqa: SIM102  (this is decided when the graph is built, the next for every image)
        if numbers[TRANSPOSE] > 0:
            image = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
    return image


def _augment(image: Any, numbers: Any, crops: Crops, blur: float, solarize: float) -> Any:
    """Jitter, gray, blur, solarize and posterize one crop; what the recipe never does is left out."""
    image = _change_colors(image, numbers, crops)
    if blur:  # noqa: SIM102
        if numbers[BLUR] > 0:
            image = fn.gaussian_blur(image, sigma=numbers[SIGMA])
    if solarize:  # noqa: SIM102
        if numbers[SOLARIZE] > 0:
            image = _solarize(image, crops)
    if crops.posterize:  # noqa: SIM102
        if numbers[POSTERIZE] > 0:
            kept = fn.cast(numbers[POSTERIZE], dtype=DALIDataType.UINT8)  # the bits, as a mask
            image = image & _beside(image, kept)
    return image


@do_not_convert
def _change_colors(image: Any, numbers: Any, crops: Crops) -> Any:
    """Jitter, and gray, which is jitter without saturation."""
    if any(crops.jitter[:2]) and crops.jitter_p and crops.channels != 3:
        # Contrast is around each channel's own mean: a gray of several bands means nothing.
        center = fn.reductions.mean(image, axes=[0, 1], keep_dims=True)
        brightness, contrast = (_beside(image, numbers[index]) for index in (BRIGHTNESS, CONTRAST))
        image = (center + (image - center) * contrast) * brightness
    elif any(crops.jitter[:2]) and crops.jitter_p:
        # Contrast is around the mean of the gray image, as in torchvision, and that is the gray of the mean
        # color.
        gray = fn.reductions.sum(fn.reductions.mean(image, axes=[0, 1]) * LUMA, axes=[0])
        image = fn.brightness_contrast(
            image, brightness=numbers[BRIGHTNESS], contrast=numbers[CONTRAST], contrast_center=_on_cpu(gray)
        )
    if (any(crops.jitter[2:]) and crops.jitter_p) or crops.gray:
        image = fn.color_twist(image, saturation=numbers[SATURATION], hue=numbers[HUE])
    return image


@do_not_convert
def _solarize(image: Any, crops: Crops) -> Any:
    middle, highest = (128, 255) if crops.rgb else (0.5, 1.0)
    dark = fn.cast(image < middle, dtype=DALIDataType.UINT8)
    image = image * dark + (highest - image) * (1 - dark)
    return fn.cast(image, dtype=DALIDataType.UINT8 if crops.rgb else DALIDataType.FLOAT)


@do_not_convert
def _beside(image: Any, value: Any) -> Any:
    """A value on the image's device."""
    return value.gpu() if image.device == "gpu" else value


@do_not_convert
def _on_cpu(value: Any) -> Any:
    return value.cpu() if value.device == "gpu" else value
