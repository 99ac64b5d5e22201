"""Encoded images: reading one, checking it, its size, and a form of it that DALI decodes."""

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from bincomm.data.bounds import FLOATING, SIGNED, bounded, tiff_samples

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAYS = (".npy",)  # files of arrays, which are images where there are no others
ARRAY = b"\x93NUMPY"  # how they begin
LARGEST_FILE = 1 << 29  # bytes; larger files are not read
LARGE_FILE = 1 << 25  # bytes; larger files must begin as an image to be read, and DALI does not decode them
LARGEST = 1 << 23  # pixels, 24 MiB as RGB; DALI decodes no larger images, they are reduced here,
REDUCED = 1 << 21  # to at most this many pixels
WEBP_CHUNKS = 100  # that are looked at; images have fewer than ten
HUGE = 1 << 26  # pixels; of larger images only one at a time is decoded
# Formats whose decoders hold several copies of all pixels and of the file.
COPIED = {"WEBP", "GIF", "AVIF", "JPEG2000"}
LARGEST_COPIED = 1 << 27  # bytes of a file of these formats, which have at most `HUGE` pixels

# Formats and modes that DALI decodes as Pillow does, and survives when damaged; Pillow decodes all others.
DECODED_BY_DALI = {
    "JPEG": {"L", "RGB", "CMYK"},
    "MPO": {"L", "RGB", "CMYK"},  # a JPEG followed by more pictures, as telephones write them
    "PNG": {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
# Modes whose pixels have no defined range. Pixels of 16 bits have one, and are scaled by 1/257.
WITHOUT_RANGE = {"F": "floating-point", "I": "32-bit"}

one_huge = threading.Lock()
# At import, because threads that start it at the same time would see only a part of the formats.
Image.init()
# All that are opened, whatever a file is named: those of docs/data.md. MPO is opened by JPEG's reader.
KINDS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "TIFF": "TIFF", "GIF": "GIF"}
KINDS |= {"AVIF": "AVIF", "JPEG2000": "JPEG 2000"}
# Pillow may be built without some. PPM is what `examine` makes of an image.
FORMATS = [name for name in (*KINDS, "PPM") if name in Image.OPEN]
# Large images are reduced, and transparency is ignored; neither needs a warning.
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


@runtime_checkable
class SelectableImages(Images, Protocol):
    """Images of which a part can be taken, in any order."""

    def select(self, indices: Sequence[int]) -> Images: ...


def load(images: Images, index: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image and `examine` it.

    Raises:
        UnusableImageError: it cannot be read, or cannot be used.
    """
    return examine(read(images, index))


def read(images: Images, index: int) -> np.ndarray:
    """An encoded image, (bytes,) uint8.

    Raises:
        UnusableImageError: it cannot be read.
    """
    try:
        return images.read(index)
    except OSError as error:
        raise UnusableImageError(error.strerror or str(error)) from None
    except (ValueError, MemoryError) as error:  # a name that contains a zero byte, a file larger than memory
        raise UnusableImageError(str(error) or type(error).__name__) from None


def read_file(path: str, offset: int = 0, size: int | None = None) -> np.ndarray:
    """A file, or `size` bytes of it from `offset` on: (bytes,) uint8, fewer if the file ends before.

    Raises:
        OSError: it cannot be read, is no regular file, is larger than any image, or large and none.
    """
    # Non-blocking, because opening a pipe would wait until another process writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        size = status.st_size if size is None else size
        check_large(size, lambda count: os.pread(descriptor, count, offset))
        if offset:
            file.seek(offset)
        data = np.empty(size, np.uint8)
        return data[: file.readinto(data.data)]


def check_large(size: int, begin: Callable[[int], bytes]) -> None:
    """Check the size of an encoded image before it is read, and of a large one its first bytes.

    Args:
        size: bytes.
        begin: returns as many of them as it is given.

    Raises:
        OSError: it is larger than any image, or large and none.
    """
    if size > LARGEST_FILE:
        raise OSError(0, f"{size} bytes, more than {LARGEST_FILE}, the most that are read")
    first = begin(32) if size > LARGE_FILE else ARRAY
    if not (first.startswith(ARRAY) or _accepted(first)):
        raise OSError(0, f"{size} bytes that do not begin as an image")


def open_encoded(data: np.ndarray | bytes) -> Image.Image:
    """An encoded image, opened by Pillow, in one of `FORMATS`: others may start programs, as EPS does.

    Raises:
        UnusableImageError: it is in another format, which the message names, or is none.
        ValueError: it would take too much time or memory.
        Exception: whatever Pillow's readers raise for a damaged one.
    """
    return open_bounded(bounded(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data))


def open_bounded(data: np.ndarray) -> Image.Image:
    """`open_encoded` of what `bounded` has returned."""
    try:
        image = Image.open(io.BytesIO(data.data), formats=FORMATS)
    except UnidentifiedImageError:
        begin = data[:32].tobytes()
        if begin.startswith(ARRAY):
            raise UnusableImageError("an array, which is read as an image with the key pixel_range") from None
        if name := _other_format(begin):
            kinds = ", ".join(KINDS.values())
            raise UnusableImageError(f"a file of the format {name}; those decoded are {kinds}") from None
        if samples := tiff_samples(data):
            what = f"a TIFF of {samples.describe()}, which are not decoded"
            raise UnusableImageError(f"{what} without the keys channels or pixel_range") from None
        if kind := _accepted(begin):
            raise UnusableImageError(f"a damaged {kind}, or one of an unknown kind") from None
        raise UnusableImageError("not an image, or one of an unknown format") from None
    if image.format in COPIED:
        if image.width * image.height > HUGE:
            raise UnusableImageError(f"a {KINDS[image.format]} of more than {HUGE} pixels")
        if len(data) > LARGEST_COPIED:
            raise UnusableImageError(f"a {KINDS[image.format]} of more than {LARGEST_COPIED} bytes")
    return image


def _accepted(begin: bytes) -> str:
    """The name of the format that a file may be in, of those that are opened, by its first bytes; else ""."""
    return next((kind for name, kind in KINDS.items() if _begins(name, begin)), "")


def _other_format(begin: bytes) -> str:
    """Pillow's name of the format that a file may be in, of those that are not opened; else ""."""
    return next((name for name in Image.OPEN if name not in FORMATS and _begins(name, begin)), "")


def _begins(name: str, begin: bytes) -> bool:
    # A function of the first bytes. It says no more than whether the format may be this one, or why it cannot
    # be read.
    _, accepts = Image.OPEN.get(name, (None, None))
    return accepts is not None and accepts(begin) is True


def examine(data: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The encoded image for DALI, and the (height, width) that it decodes to.

    JPEG, PNG and WebP images that look complete stay as they are, but for a PNG's texts. All others are
    decoded here and become uncompressed, and so are those above `LARGEST` pixels, reduced by an integer
    factor to at most `REDUCED`.

    Args:
        data: (bytes,) uint8.

    Raises:
        UnusableImageError: not an image, a truncated one, one whose pixels cannot be converted to RGB, or one
            that would take too much time or memory.
    """
    if not len(data):
        raise UnusableImageError("the file is empty")
    try:
        data = bounded(data)
        image = open_bounded(data)
        samples = tiff_samples(data)
        if image.mode in WITHOUT_RANGE or (samples and samples.kind in (SIGNED, FLOATING)):
            values = samples.describe() if samples else f"{WITHOUT_RANGE[image.mode]} values"
            raise UnusableImageError(f"its {values} have no known range; the key pixel_range gives it")
        pixels = image.width * image.height
        if pixels > HUGE:
            with one_huge:
                return _decoded(image)
        decodable = image.mode in DECODED_BY_DALI.get(image.format or "", ())
        small = pixels <= LARGEST and len(data) <= LARGE_FILE
        if decodable and small and looks_complete(data, image.format):
            return data, (image.height, image.width)
        return _decoded(image)
    except UnusableImageError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnusableImageError(f"more than {limit} pixels, the most that are decoded") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged image leads them to
        raise UnusableImageError(str(error) or type(error).__name__) from None


def decoding_error(data: np.ndarray) -> str:
    """The reason why Pillow cannot decode an encoded image completely; "" if it can."""
    try:
        with open_encoded(data) as image:
            image.load()
    except Exception as error:  # see `examine`
        return str(error) or type(error).__name__
    return ""


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits per pixel scaled to 8, to which Pillow would clip it; others unchanged."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image


def looks_complete(data: np.ndarray, format: str | None) -> bool:
    """Whether an image ends as a complete image of its format does, and is not animated."""
    if format == "PNG":
        # DALI trusts the lengths of chunks even if they are wrong, and crashes on some damaged animations.
        offset, name = 8, b""
        while offset + 12 <= len(data) and name not in (b"acTL", b"IEND"):
            length = int.from_bytes(data[offset : offset + 4], "big")
            name = data[offset + 4 : offset + 8].tobytes()
            offset += 12 + length
        return name == b"IEND" and offset == len(data)
    if format == "WEBP":
        end = int.from_bytes(data[4:8], "little") + 8
        offset = 12
        for _ in range(WEBP_CHUNKS):
            if offset + 8 > end:
                return end <= len(data)
            size = int.from_bytes(data[offset + 4 : offset + 8], "little")
            offset += 8 + size
            # DALI does not skip the byte that pads a chunk of odd size, and refuses what follows.
            if size % 2 and offset + 1 < end:
                return False
        return False
    return data[-2:].tobytes() == b"\xff\xd9"


def _decoded(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """An image as an uncompressed file (PPM)."""
    limit = LARGEST
    if image.width * image.height > LARGEST:
        limit = REDUCED
        factor = _factor(image)
        # A JPEG is reduced during decoding, by a power of two.
        image.draft("RGB", (image.width // factor, image.height // factor))
    pixels = eight_bits(image)
    if pixels.mode == "RGB":  # convert would copy it
        pixels.load()
    else:
        pixels = pixels.convert("RGB")
    if pixels.width * pixels.height > limit:
        pixels = pixels.reduce(_factor(pixels))
    header = b"P6 %d %d 255\n" % pixels.size
    return np.frombuffer(bytearray(header + pixels.tobytes()), np.uint8), (pixels.height, pixels.width)


def _factor(image: Image.Image) -> int:
    """The smallest integer by which to divide both sides for at most `REDUCED` pixels."""
    factor = 1
    while -(-image.width // factor) * -(-image.height // factor) > REDUCED:
        factor += 1
    return factor
