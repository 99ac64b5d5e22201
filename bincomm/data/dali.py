"""Functions that all DALI graphs share: decoding, resizing, normalizing, running, and finding bad images."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.images import decoding_error

try:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.pipeline import Pipeline, do_not_convert
    from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
except ImportError as error:
    raise ImportError("the data pipeline needs NVIDIA DALI: pip install 'bincomm[train]'") from error

RGB = Crops()

# Returns the input of DALI for a batch: of each image what `bincomm.data.values.load_input` returns, and the
# numbers that its graph needs.
Feed = Callable[[], tuple[list[np.ndarray], list[np.ndarray]]]


@do_not_convert
def layouts(crops: Crops) -> list[str] | None:
    """Of an external source of images and numbers: values have one, encoded images have none."""
    return None if crops.rgb else ["HWC", ""]


@do_not_convert
def decode(images: Any, gpu: bool, crops: Crops = RGB) -> Any:
    """Encoded images as RGB, which like torchvision it does not rotate by their EXIF orientation; others are
    values already."""
    if not crops.rgb:
        return images.gpu() if gpu else images
    device = "mixed" if gpu else "cpu"
    return fn.decoders.image(images, device=device, output_type=DALIImageType.RGB, adjust_orientation=False)


@do_not_convert
def resize(images: Any, **arguments: Any) -> Any:
    """Resized as by Pillow and torchvision, bicubic and antialiased."""
    # Without antialias=True shrinking skips pixels and is off by 4 gray levels from both.
    return fn.resize(images, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True, **arguments)


@do_not_convert
def normalize(images: Any, crops: Crops, **arguments: Any) -> Any:
    """Minus the recipe's mean, over its deviation; fp32 and CHW unless the arguments say otherwise."""
    scale = 255 if crops.rgb else 1
    mean, std = ([scale * value for value in values] for values in (crops.mean, crops.std))
    defaults: dict[str, Any] = {"dtype": DALIDataType.FLOAT, "output_layout": "CHW"}
    return fn.crop_mirror_normalize(images, mean=mean, std=std, **(defaults | arguments))


def decoding_pipeline(
    feed: Callable[[], list[np.ndarray]],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    crops: Crops = RGB,
) -> Pipeline:
    """The graph from images to the shapes (n, 3) of the decoded ones; it shows if they decode."""

    @pipeline_def
    def graph() -> Any:
        images = fn.external_source(source=feed, batch=True, layout=None if crops.rgb else "HWC")
        return decode(images, device_id is not None, crops).shape()

    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)


def device_number(device: torch.device) -> int | None:
    """DALI's number of a device; None is the CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def run_pipeline(pipeline: Pipeline, device: torch.device) -> list[Tensor]:
    """DALI's next outputs as tensors, without a copy: DALI reuses their memory only after they are freed."""
    if device.type == "cuda":  # the outputs are then ordered with the work on this stream
        outputs = pipeline.run(torch.cuda.current_stream(device).cuda_stream)
    else:
        outputs = pipeline.run()
    return [torch.from_dlpack(output.as_tensor()) for output in outputs]


def find_undecodable(
    encoded: Sequence[np.ndarray], device: torch.device, readers: ThreadPoolExecutor
) -> dict[int, str]:
    """Indices of the encoded images that DALI cannot decode on a device, and why."""
    # Pillow comes first, because it is fast and its messages say what is wrong. DALI decides.
    reasons = dict(enumerate(readers.map(decoding_error, encoded)))
    suspects = [index for index, reason in reasons.items() if reason]
    refused = _refused(suspects, encoded, device) or _refused(reasons, encoded, device)
    return {index: reasons[index] or "DALI cannot decode it" for index in refused}


def _refused(indices: Iterable[int], encoded: Sequence[np.ndarray], device: torch.device) -> list[int]:
    """Indices of the images that DALI cannot decode, given one at a time."""
    batch: list[np.ndarray] = []
    refused, pipeline = [], None
    for index in indices:
        batch[:] = [encoded[index]]
        pipeline = pipeline or decoding_pipeline(
            lambda: batch, batch_size=1, threads=1, device_id=device_number(device)
        )
        try:
            pipeline.run()
        except RuntimeError:
            refused.append(index)
            pipeline = None  # DALI cannot continue after an error
    return refused
