"""Images of other than three channels of 8 bits, as numbers: TIFF, PNG, NumPy's .npy, and all other formats.

They are decoded here and not by DALI, whose decoder knows neither bands that lie one after another nor pages,
and may not survive a damaged TIFF. tifffile is Python, and reads what Pillow cannot.
"""

import io
import logging
import threading
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from bincomm.data.bounds import FLOATING, SIGNED, TIFF_ORDERS, Samples, bounded, tiff_pages, tiff_samples
from bincomm.data.crops import Crops
from bincomm.data.images import (
    ARRAY,
    HUGE,
    Images,
    UnusableImageError,
    load,
    looks_complete,
    one_huge,
    open_bounded,
    read,
)

LARGEST_VALUES = 1 << 23  # of an image, 32 MiB; larger ones are reduced by an integer factor to at most these
MOST_BYTES = 1 << 29  # of all pixels of an image; larger ones are not decoded
FULL_SCALES = {"uint8": 255, "uint16": 65535, "bool": 1}  # of other types no full scale means anything
# Pillow's modes that are taken as they are. "1" becomes gray, and palettes, CMYK and such RGB.
EXACT = {"L", "LA", "RGB", "RGBA", "RGBX", "I;16", "I;16L", "I;16B", "I", "F"}
WITH_ALPHA = {"LA", "RGBA", "PA"}
ALPHA = {1, 2}  # values of TIFF's ExtraSamples
# Compressions of TIFF that tifffile decodes in bounded time and memory. For LZW it needs imagecodecs.
UNCOMPRESSED, LZW, DEFLATE = {1}, {5}, {8, 32946}
_png_lock = threading.Lock()
# Its remarks on unusual tags; what cannot be read it raises.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def load_input(images: Images, index: int, crops: Crops) -> tuple[np.ndarray, tuple[int, int]]:
    """What DALI is given of an image: the encoded image for RGB, else its values (H, W, N) fp32; and its
    (height, width).

    Raises:
        UnusableImageError: it cannot be read, or cannot be used.
    """
    if crops.rgb:
        return load(images, index)
    values = decode_values(read(images, index), crops.channels, crops.pixel_range)
    return values, values.shape[:2]


def decode_values(data: np.ndarray, channels: int, pixel_range: tuple[float, float] | None) -> np.ndarray:
    """The values of an encoded image, (H, W, N) fp32 from 0 to 1; of more than `LARGEST_VALUES`, reduced.

    0 and 1 are the ends of `pixel_range`, or of the type of the values, 8 or 16 bits without a sign. Values
    beyond are those of the nearer end, and NaN that of 0. Where an image has not N channels, gray becomes
    RGB, alpha is dropped, and RGB of three equal channels becomes gray.

    Args:
        data: (bytes,) uint8.
        channels: N.
        pixel_range: the values that become 0 and 1.

    Raises:
        UnusableImageError: it cannot be decoded, has another number of channels, its range is unknown, or it
            would take too much time or memory.
        ImportError: a TIFF needs tifffile, which is missing.
    """
    if not len(data):
        raise UnusableImageError("the file is empty")
    try:
        if data[: len(ARRAY)].tobytes() == ARRAY:
            values, alpha = _array(data, channels), False
        elif data[:4].tobytes() in TIFF_ORDERS:
            values, alpha = _tiff(data, channels)
        else:
            values, alpha = _picture(bounded(data))
        return _scaled(_with_channels(values, channels, alpha), pixel_range)
    except (UnusableImageError, ImportError):
        raise
    except Exception as error:  # readers raise whatever a damaged image leads them to
        raise UnusableImageError(str(error) or type(error).__name__) from None


def _array(data: np.ndarray, channels: int) -> np.ndarray:
    """The values of a .npy file (H, W), (H, W, C) or (C, H, W), as (H, W, C)."""
    file = io.BytesIO(data[: 1 << 16].data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UnusableImageError(f"a .npy file of version {version}; expected 1 or 2, those without names")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = reader(file)
    if dtype.kind not in "buif" or dtype.names:
        raise UnusableImageError(f"an array of {dtype}; expected integers or floating-point numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise UnusableImageError(
            f"an array of shape {shape}; expected (H, W), (H, W, {channels}) or channels first"
        )
    count = int(np.prod([int(side) for side in shape], dtype=object))
    content = data[file.tell() :]
    if count * dtype.itemsize > len(content):
        raise UnusableImageError(
            f"an array of shape {shape} in a file of {len(data)} bytes: it is incomplete"
        )
    values = np.frombuffer(content.tobytes(), dtype, count).reshape(shape, order="F" if by_columns else "C")
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, -1) if shape[-1] != channels and shape[0] == channels else values


def _picture(data: np.ndarray) -> tuple[np.ndarray, bool]:
    """The values of an image that Pillow opens, (H, W, C), and whether the last channel is alpha."""
    image = open_bounded(data)
    if image.width * image.height > HUGE:
        with one_huge:
            return _pixels(image, data)
    return _pixels(image, data)


def _pixels(image: Image.Image, data: np.ndarray) -> tuple[np.ndarray, bool]:
    alpha = image.mode in WITH_ALPHA
    if image.format == "PNG" and data[24] == 16 and image.mode in ("LA", "RGB", "RGBA"):
        return _deep_png(data), alpha  # of these Pillow keeps 8 bits
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in EXACT:
        image = image.convert("RGBA" if alpha else "RGB")
    values = np.asarray(image)
    return values if values.ndim == 3 else values[..., None], alpha


def _deep_png(data: np.ndarray) -> np.ndarray:
    """A PNG of several channels of 16 bits, decoded by DALI's own decoder."""
    import nvidia.nvimgcodec as nvimgcodec

    if not looks_complete(data, "PNG"):
        raise UnusableImageError("a damaged PNG")
    if data[25] == 4:
        raise UnusableImageError("a PNG of gray and alpha in 16 bits, which is not decoded")
    parameters = nvimgcodec.DecodeParams(allow_any_depth=True, color_spec=nvimgcodec.ColorSpec.UNCHANGED)
    with _png_lock:
        image = _png_decoder().decode(nvimgcodec.CodeStream(data.tobytes()), params=parameters)
    if image is None:
        raise UnusableImageError("a damaged PNG")
    return np.array(image)


@cache
def _png_decoder() -> Any:
    import nvidia.nvimgcodec as nvimgcodec

    on_cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    device = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
    return nvimgcodec.Decoder(device_id=device, backends=[on_cpu], max_num_cpu_threads=1)


def _tiff(data: np.ndarray, channels: int) -> tuple[np.ndarray, bool]:
    """The values of a TIFF (H, W, C), of its first page or, if it has N of one channel each, of all of them;
    and whether the last channel is alpha."""
    samples = tiff_samples(data)
    if samples is None:
        raise UnusableImageError("a damaged TIFF")
    if samples.bands == 1 < channels:
        several, pages = tiff_pages(data, channels)
        if pages == channels:
            return _by_tifffile(several, pages)
    data, _ = tiff_pages(data, 1)
    if _is_exact(samples):
        try:
            return _picture(data)  # which decodes all compressions, palettes and color spaces
        except UnusableImageError:
            pass  # as 8 bits in five bands
    return _by_tifffile(data, 1)


def _is_exact(samples: Samples) -> bool:
    """Whether Pillow keeps the values of a TIFF as they are, where it can open it."""
    if samples.kind in (SIGNED, FLOATING):
        return False
    return samples.bands <= 4 if samples.bits <= 8 else (samples.bits, samples.bands) == (16, 1)


def _by_tifffile(data: np.ndarray, pages: int) -> tuple[np.ndarray, bool]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data.data)) as file:
        # Neither its series nor metadata of programs, which may name other files.
        opened: list[Any] = [file.pages[number] for number in range(pages)]
        size = sum(page.size * page.dtype.itemsize for page in opened if page.dtype is not None)
        if size > MOST_BYTES:
            raise UnusableImageError(f"a TIFF of {size} bytes of pixels, more than {MOST_BYTES}")
        if size > HUGE:
            with one_huge:
                values = [_page_values(page, data) for page in opened]
        else:
            values = [_page_values(page, data) for page in opened]
        if len({one.shape for one in values}) > 1:
            raise UnusableImageError("a TIFF whose pages, one for a channel, differ in size")
        alpha = pages == 1 and bool(ALPHA & set(opened[0].extrasamples[-1:]))
        return np.concatenate(values, -1), alpha


def _page_values(page: Any, data: np.ndarray) -> np.ndarray:
    """The values (H, W, C) of a page of tifffile's."""
    if page.dtype is None or page.axes not in ("YX", "YXS", "SYX"):
        raise UnusableImageError(f"a TIFF with axes {page.axes} of {page.dtype or 'unknown'} values")
    if page.compression not in UNCOMPRESSED | LZW | DEFLATE:
        name = getattr(page.compression, "name", page.compression)
        raise UnusableImageError(f"a TIFF of such values compressed by {name}; expected none, deflate or LZW")
    if np.prod([int(side) for side in page.chunks], dtype=object) * page.dtype.itemsize > MOST_BYTES:
        raise UnusableImageError(f"a TIFF with a strip or tile of more than {MOST_BYTES} bytes")
    if page.compression in DEFLATE:
        _check_inflated(page, data)
    values = page.asarray(maxworkers=1)
    if page.axes == "YX":
        return values[..., None]
    return np.moveaxis(values, 0, -1) if page.axes == "SYX" else values


def _check_inflated(page: Any, data: np.ndarray) -> None:
    """Refuse a page whose strips or tiles inflate to more than any image has: zlib would fill all memory."""
    left = MOST_BYTES
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        inflater = zlib.decompressobj()
        left -= len(inflater.decompress(data[offset : offset + size].data, left + 1))
        if left < 0:
            raise UnusableImageError(f"a TIFF that inflates to more than {MOST_BYTES} bytes")


def _with_channels(values: np.ndarray, channels: int, alpha: bool) -> np.ndarray:
    """Values (H, W, C) as (H, W, N), where that is obvious."""
    count = values.shape[-1]
    if count == channels:
        return values
    kept = count - alpha
    if kept == channels:
        return values[..., :kept]
    if kept == 1 and channels == 3:
        return np.repeat(values[..., :1], 3, -1)
    if kept == 3 and channels == 1 and (values[..., :1] == values[..., 1:3]).all():
        return values[..., :1]
    with_alpha = ", one of them alpha" if alpha else ""
    noun = "channel" if count == 1 else "channels"
    raise UnusableImageError(
        f"it has {count} {noun}{with_alpha}; expected {channels}, as the key channels says"
    )


def _scaled(values: np.ndarray, pixel_range: tuple[float, float] | None) -> np.ndarray:
    """Values (H, W, N) as fp32 from 0 to 1."""
    kind = values.dtype.kind
    if pixel_range is None:
        if values.dtype.name not in FULL_SCALES:
            raise UnusableImageError(
                f"its {values.dtype.name} values have no known range; the key pixel_range gives it"
            )
        low, high = 0.0, float(FULL_SCALES[values.dtype.name])
    else:
        low, high = pixel_range
    exact = np.float64 if values.dtype.itemsize > 2 and values.dtype != np.float32 else np.float32
    factor = 1
    height, width = values.shape[:2]
    while (height // factor) * (width // factor) * values.shape[-1] > LARGEST_VALUES:
        factor += 1
    if factor > 1:
        # What is left over at the right and below is less than a pixel of the result.
        height, width = height // factor, width // factor
        if not height or not width:
            raise UnusableImageError(f"{values.shape[1]} × {values.shape[0]} pixels, too thin to be reduced")
        cut = values[: height * factor, : width * factor]
        values = cut.reshape(height, factor, width, factor, -1).mean((1, 3), dtype=exact)
    scaled = values.astype(exact)
    scaled -= low
    scaled /= high - low
    if kind == "f":
        missing = np.isnan(scaled)
        if missing.all():
            raise UnusableImageError("all of its values are NaN")
        scaled[missing] = 0
    return np.ascontiguousarray(scaled.clip(0, 1), np.float32)
