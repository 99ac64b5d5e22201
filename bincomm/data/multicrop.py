"""The DALI graphs: decode once and augment every crop, for training; one centre crop, for evaluation.

One graph serves CPU and GPU. Nothing random happens inside: what a crop looks like comes in as numbers
(`draw`), so that a batch is a function of the seed and its number alone, whatever the device, the threads or
what came before.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bincomm.data.crops import Crops

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import Pipeline
except ImportError as error:
    raise ImportError("the data pipeline needs NVIDIA DALI: pip install 'bincomm[train]'") from error

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255  # ImageNet's, as every timm model expects them
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TRIES = 10  # windows drawn per crop before the fallback, as in torchvision's RandomResizedCrop

# The numbers a crop is made from, in the order `draw` writes them and `_augment` reads them.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR, SIGMA, SOLARISE = range(8)


def draw(crops: Crops, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers for n images: windows (n, V, TRIES + 1, 2) and augmentations (n, V, 8), fp32, globals
    first.

    A window's tries are (√area as a share of the image's, √aspect ratio), its last row is (y, x), the place
    from 0 to 1.
    """
    views = 2 + crops.local_crops
    low, high = np.array([crops.global_scale] * 2 + [crops.local_scale] * crops.local_crops).T[..., None]
    windows = np.empty((n, views, TRIES + 1, 2), np.float32)
    windows[:, :, :TRIES, 0] = np.sqrt(generator.uniform(low, high, (n, views, TRIES)))
    windows[:, :, :TRIES, 1] = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), (n, views, TRIES)) / 2)
    # Drawn in fp32: below 1 in fp64 may round up to 1, which is one pixel outside the image.
    windows[:, :, TRIES] = generator.random((n, views, 2), np.float32)

    def happens(probability: Any) -> np.ndarray:
        return generator.uniform(size=(n, views)) < np.asarray(probability)

    numbers = np.empty((n, views, 8), np.float32)
    numbers[..., FLIP] = happens(crops.flip)
    jitters = happens(crops.jitter_p)
    for index, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), crops.jitter, strict=False):
        factors = generator.uniform(max(0.0, 1 - strength), 1 + strength, (n, views))
        numbers[..., index] = np.where(jitters, factors, 1)
    turns = generator.uniform(-crops.jitter[3], crops.jitter[3], (n, views))
    numbers[..., HUE] = np.where(
        jitters, 360 * turns, 0
    )  # DALI turns by degrees, torchvision by shares of a circle
    numbers[..., SATURATION] *= ~happens(crops.grey)
    blur = [crops.blur[0], crops.blur[1]] + [crops.blur[2]] * crops.local_crops
    numbers[..., BLUR] = happens(blur)
    numbers[..., SIGMA] = generator.uniform(0.1, 2.0, (n, views))
    numbers[..., SOLARISE] = happens([0, crops.solarise] + [0] * crops.local_crops)
    return windows, numbers


def training_pipeline(
    crops: Crops,
    source: Callable[[], tuple[list, list, list]],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
) -> Pipeline:
    """The graph from (paths as bytes, windows, augmentations) to 2 + L outputs (n, 3, S, S), normalised."""
    gpu = device_id is not None

    @pipeline_def(enable_conditionals=True)
    def graph():
        paths, windows, numbers = fn.external_source(source=source, num_outputs=3, batch=True)
        encoded = fn.io.file.read(paths)
        starts, sizes = _windows(fn.peek_image_shape(encoded, adjust_orientation=False), windows)
        images = _decode(encoded, gpu)
        blurs = [crops.blur[0], crops.blur[1]] + [crops.blur[2]] * crops.local_crops
        views = []
        for view, blur in enumerate(blurs):
            window = fn.slice(images, starts[view], sizes[view], axes=[0, 1])
            size = crops.global_size if view < 2 else crops.local_size
            solarise = crops.solarise if view == 1 else 0.0
            views.append(_augment(_resize(window, size=(size, size)), numbers[view], crops, blur, solarise))
        return tuple(views)

    # Depth 2: while one batch is being trained on, the next is being made.
    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2)


def evaluation_pipeline(
    source: Callable[[], list],
    *,
    size: int,
    resize: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
) -> Pipeline:
    """The graph from paths to centre crops (n, 3, size, size): shorter side to `resize`, then cropped."""

    @pipeline_def
    def graph():
        encoded = fn.io.file.read(fn.external_source(source=source, batch=True))
        images = _resize(_decode(encoded, device_id is not None), resize_shorter=resize)
        return _normalise(images, crop=(size, size))

    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)


def _decode(encoded: Any, gpu: bool) -> Any:
    # EXIF orientation is left alone, as torchvision leaves it.
    device = "mixed" if gpu else "cpu"
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False)


def _resize(images: Any, **size: Any) -> Any:
    # Without antialias=True shrinking skips pixels and is off by 4 grey levels from PIL and torchvision.
    return fn.resize(images, interp_type=types.INTERP_CUBIC, antialias=True, **size)


def _normalise(images: Any, **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(
        images, mean=MEAN.tolist(), std=STD.tolist(), dtype=types.FLOAT, output_layout="CHW", **arguments
    )


def _windows(shape: Any, windows: Any) -> tuple[Any, Any]:
    """Corners and sizes (V, 2) in pixels, (y, x), by the law of torchvision's RandomResizedCrop.

    The first try that fits inside the image is taken; when none does, the largest central window of a ratio
    within 3/4 and 4/3.
    """
    height, width = (fn.cast(shape[axis], dtype=types.FLOAT) for axis in (0, 1))
    side = math.sqrt(height * width) * windows[:, :TRIES, 0]
    ratio = windows[:, :TRIES, 1]
    heights, widths = _round(side / ratio), _round(side * ratio)
    fits = (heights <= height) * (widths <= width) * (heights > 0) * (widths > 0)
    # The first that fits has the largest score; all scores are 0 when none does.
    scores = fits * np.arange(TRIES, 0, -1, dtype=np.int32)
    best = fn.reductions.max(scores, axes=[1], keep_dims=True)
    first = (scores == best) * (best > 0)
    none = fn.cast(best[:, 0] == 0, dtype=types.FLOAT)
    h = fn.reductions.sum(heights * first, axes=[1]) + none * math.min(height, _round(width * 4 / 3))
    w = fn.reductions.sum(widths * first, axes=[1]) + none * math.min(width, _round(height * 4 / 3))
    y = math.floor((height - h + 1) * windows[:, TRIES, 0]) * (1 - none) + none * math.floor((height - h) / 2)
    x = math.floor((width - w + 1) * windows[:, TRIES, 1]) * (1 - none) + none * math.floor((width - w) / 2)
    integers = [fn.cast(value, dtype=types.INT32) for value in (y, x, h, w)]
    return fn.stack(*integers[:2], axis=1), fn.stack(*integers[2:], axis=1)


def _round(value: Any) -> Any:
    return math.floor(value + 0.5)


def _augment(image: Any, numbers: Any, crops: Crops, blur: float, solarise: float) -> Any:
    """Jitter, grey, blur, solarise, flip and normalise one crop; what the recipe never does is left out."""
    if any(crops.jitter[:2]) and crops.jitter_p:
        # Contrast is around the mean of the grey image, as in torchvision, and that is the grey of the mean
        # colour.
        grey = fn.reductions.sum(fn.reductions.mean(image, axes=[0, 1]) * LUMA, axes=[0])
        image = fn.brightness_contrast(
            image, brightness=numbers[BRIGHTNESS], contrast=numbers[CONTRAST], contrast_center=_on_cpu(grey)
        )
    if (any(crops.jitter[2:]) and crops.jitter_p) or crops.grey:
        image = fn.color_twist(image, saturation=numbers[SATURATION], hue=numbers[HUE])
    if blur:  # noqa: SIM102  (this is decided when the graph is built, the next line for every image)
        if numbers[BLUR] > 0:
            image = fn.gaussian_blur(image, sigma=numbers[SIGMA])
    if solarise:  # noqa: SIM102
        if numbers[SOLARISE] > 0:
            dark = fn.cast(image < 128, dtype=types.UINT8)
            image = image * dark + (255 - image) * (1 - dark)
            image = fn.cast(image, dtype=types.UINT8)
    return _normalise(image, mirror=fn.cast(numbers[FLIP], dtype=types.INT32))


def _on_cpu(value: Any) -> Any:
    return value.cpu() if value.device == "gpu" else value
