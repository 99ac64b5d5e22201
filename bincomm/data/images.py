"""One encoded image: whether it can be used, its size, and a form of it that DALI decodes."""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_FILE = 1 << 30  # bytes that are read as an image
LARGEST = 1 << 23  # pixels of an image that DALI decodes, 24 MiB as RGB; one of more is made smaller,
REDUCED = 1 << 21  # to at most this many
HUGE = 1 << 26  # pixels above which one image at a time is decoded here

# Formats and modes that DALI decodes as Pillow does, and survives when damaged; Pillow decodes all others.
DECODED_BY_DALI = {
    "JPEG": {"L", "RGB", "CMYK"},
    "MPO": {"L", "RGB", "CMYK"},  # a JPEG with more pictures behind it, as telephones take them
    "PNG": {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
# Sixteen bits a pixel are scaled by 1/257; for these there is no range to scale from.
WITHOUT_RANGE = {"F": "floating-point", "I": "32-bit", "I;16B": "big-endian 16-bit"}

_one_huge = threading.Lock()
# Now, not in the first of several threads that needs it: the others would see half of the formats.
Image.init()
# Large images are made smaller, and colors under transparent pixels are shown; neither needs a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


class UnusableImageError(Exception):
    """An image cannot be read or decoded; the message is the reason, without the image's name."""


class Images(Protocol):
    """Encoded images that can be read by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def names(self) -> Iterator[str]: ...

    def read(self, index: int) -> np.ndarray: ...


def load(images: Images, index: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image and `examine` it.

    Raises:
        UnusableImageError: it cannot be read, or cannot be used.
    """
    return examine(read(images, index))


def read(images: Images, index: int) -> np.ndarray:
    """An image as it is encoded, (bytes,) uint8.

    Raises:
        UnusableImageError: it cannot be read.
    """
    try:
        return images.read(index)
    except OSError as error:
        raise UnusableImageError(error.strerror or str(error)) from None
    except (ValueError, MemoryError) as error:  # a name with a zero byte, a file larger than memory
        raise UnusableImageError(str(error) or type(error).__name__) from None


def read_file(path: str, offset: int = 0, size: int | None = None) -> np.ndarray:
    """A file, or `size` bytes of it from `offset` on: (bytes,) uint8, fewer where it ends before.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than any image.
    """
    # Non-blocking, because opening a pipe would wait until another process writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        size = status.st_size if size is None else size
        if size > LARGEST_FILE:
            raise OSError(0, f"{size} bytes, more than {LARGEST_FILE}, the most that are read")
        if offset:
            file.seek(offset)
        data = np.empty(size, np.uint8)
        return data[: file.readinto(data.data)]


def examine(data: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """What to give to DALI for an encoded image, and the (height, width) it will decode to.

    JPEG, PNG and WebP images that look complete are given as they are. All others are decoded here and given
    as pixels, and so are those above `LARGEST` pixels, made smaller by an integer to at most `REDUCED`.

    Args:
        data: (bytes,) uint8.

    Raises:
        UnusableImageError: no image, a truncated one, or one of a kind without a meaning in RGB.
    """
    if not len(data):
        raise UnusableImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data.data))
        if image.mode in WITHOUT_RANGE:
            raise UnusableImageError(f"its {WITHOUT_RANGE[image.mode]} pixels have no known range")
        pixels = image.width * image.height
        if pixels > HUGE:
            with _one_huge:
                return _decoded(image)
        decodable = image.mode in DECODED_BY_DALI.get(image.format or "", ())
        if decodable and pixels <= LARGEST and _looks_complete(data, image.format):
            return data, (image.height, image.width)
        return _decoded(image)
    except UnusableImageError:
        raise
    except UnidentifiedImageError:
        raise UnusableImageError("not an image, or one of an unknown format") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnusableImageError(f"more than {limit} pixels, the most that are decoded") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged image leads them to
        raise UnusableImageError(str(error) or type(error).__name__) from None


def decoding_error(data: np.ndarray) -> str:
    """Why Pillow cannot decode all of an encoded image; "" where it can."""
    try:
        with Image.open(io.BytesIO(data.data)) as image:
            image.load()
    except Exception as error:  # see `examine`
        return str(error) or type(error).__name__
    return ""


def eight_bits(image: Image.Image) -> Image.Image:
    """One of 16 bits a pixel scaled to eight, to which Pillow would clip it; others as they are."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image


def _looks_complete(data: np.ndarray, format: str | None) -> bool:
    """Whether an image ends as a complete one of its format does, and is a still one."""
    if format == "PNG":
        # DALI trusts the lengths of its chunks, however wrong, and crashes on some damaged animations.
        offset, name = 8, b""
        while offset + 12 <= len(data) and name not in (b"acTL", b"IEND"):
            length = int.from_bytes(data[offset : offset + 4], "big")
            name = data[offset + 4 : offset + 8].tobytes()
            offset += 12 + length
        return name == b"IEND" and offset == len(data)
    if format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return data[-2:].tobytes() == b"\xff\xd9"


def _decoded(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """An image as an uncompressed file (PPM)."""
    limit = LARGEST
    if image.width * image.height > LARGEST:
        limit = REDUCED
        factor = _factor(image)
        # A JPEG is made smaller while it is decoded, by a power of two.
        image.draft("RGB", (image.width // factor, image.height // factor))
    pixels = eight_bits(image).convert("RGB")
    if pixels.width * pixels.height > limit:
        pixels = pixels.reduce(_factor(pixels))
    header = b"P6 %d %d 255\n" % pixels.size
    return np.frombuffer(bytearray(header + pixels.tobytes()), np.uint8), (pixels.height, pixels.width)


def _factor(image: Image.Image) -> int:
    """The smallest integer by which both sides are to be divided for `REDUCED` pixels at most."""
    factor = 1
    while -(-image.width // factor) * -(-image.height // factor) > REDUCED:
        factor += 1
    return factor
