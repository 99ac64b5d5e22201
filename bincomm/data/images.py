"""Encoded images: reading one, checking it, its size, and a form of it that DALI decodes."""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_FILE = 1 << 29  # bytes; larger files are not read
LARGEST = 1 << 23  # pixels, 24 MiB as RGB; DALI decodes no larger images, they are reduced here,
REDUCED = 1 << 21  # to at most this many pixels
WEBP_CHUNKS = 100  # that are looked at; images have fewer than ten
HUGE = 1 << 26  # pixels; of larger images only one at a time is decoded, and no WebP, which needs most memory
# Limits on the time of one file. Photographs have some ten scans, some twenty segments, and a chunk for every
# eight kilobytes.
MOST_SCANS = 20  # of a progressive JPEG with
SCANNED_PIXELS = 1 << 28  # more pixels than these in all of its scans together
MOST_SEGMENTS = 512  # of a JPEG before its first scan
MOST_JUNK = 1 << 16  # bytes between two segments, which Pillow reads one by one
MOST_CHUNKS = 1 << 16  # of a PNG
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

# Formats and modes that DALI decodes as Pillow does, and survives when damaged; Pillow decodes all others.
DECODED_BY_DALI = {
    "JPEG": {"L", "RGB", "CMYK"},
    "MPO": {"L", "RGB", "CMYK"},  # a JPEG followed by more pictures, as telephones write them
    "PNG": {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
# Modes whose pixels have no defined range. Pixels of 16 bits have one, and are scaled by 1/257.
WITHOUT_RANGE = {"F": "floating-point", "I": "32-bit"}

_one_huge = threading.Lock()
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


def open_encoded(data: np.ndarray | bytes) -> Image.Image:
    """An encoded image, opened by Pillow, in one of `FORMATS`: others may start programs, as EPS does.

    Raises:
        UnusableImageError: it is in another format, which the message names, or is none.
        Exception: whatever Pillow's readers raise for a damaged one.
    """
    content = data.data if isinstance(data, np.ndarray) else data
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        begin = bytes(data[:32])
        for name, (_, accepts) in Image.OPEN.items():
            # A function of the first bytes, which says no more than whether the format may be this one.
            if name not in FORMATS and accepts is not None and accepts(begin) is True:
                kinds = ", ".join(KINDS.values())
                raise UnusableImageError(f"a file of the format {name}; those decoded are {kinds}") from None
        raise UnusableImageError("not an image, or one of an unknown format") from None


def examine(data: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The encoded image for DALI, and the (height, width) that it decodes to.

    JPEG, PNG and WebP images that look complete stay as they are. All others are decoded here and become
    uncompressed, and so are those above `LARGEST` pixels, reduced by an integer factor to at most `REDUCED`.

    Args:
        data: (bytes,) uint8.

    Raises:
        UnusableImageError: not an image, a truncated one, or one whose pixels cannot be converted to RGB.
    """
    if not len(data):
        raise UnusableImageError("the file is empty")
    try:
        data = bounded(data)
        image = open_encoded(data)
        if image.mode in WITHOUT_RANGE:
            raise UnusableImageError(f"its {WITHOUT_RANGE[image.mode]} pixels have no known range")
        check_decoding(image, data)
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
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnusableImageError(f"more than {limit} pixels, the most that are decoded") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged image leads them to
        raise UnusableImageError(str(error) or type(error).__name__) from None


def bounded(data: np.ndarray) -> np.ndarray:
    """An encoded image that Pillow opens in a bounded time: a PNG without texts, others as they are.

    Raises:
        UnusableImageError: its structure would take too long to read.
    """
    if data[:8].tobytes() == b"\x89PNG\r\n\x1a\n":
        return _without_texts(data)
    if data[:3].tobytes() == b"\xff\xd8\xff":
        _check_segments(data)
    return data


def check_decoding(image: Image.Image, data: np.ndarray) -> None:
    """Refuse an opened image, of `bounded` data, that would take too much time or memory to decode.

    Raises:
        UnusableImageError: the message is the reason.
    """
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        check_scans(data, pixels)
    if image.format == "WEBP" and pixels > HUGE:
        raise UnusableImageError(f"{pixels} pixels, more than {HUGE}, the most of a WebP")


def check_scans(data: np.ndarray, pixels: int) -> None:
    """Refuse a progressive JPEG that has many scans; each takes as long as an image."""
    # Within a scan a byte FF is followed by other bytes than DA; in a thumbnail there may be a few.
    scans = data.tobytes().count(b"\xff\xda")
    if scans > MOST_SCANS and scans * pixels > SCANNED_PIXELS:
        raise UnusableImageError(f"a progressive JPEG of {scans} scans, which take too long to decode")


def _check_segments(data: np.ndarray) -> None:
    """Refuse a JPEG with too many segments before its first scan, or too many bytes between them."""
    content, offset = data.data, 2
    for _ in range(MOST_SEGMENTS):
        start = offset
        # A marker is FF and another byte than FF, of which any number may fill up.
        while offset + 4 <= len(data) and (content[offset] != 0xFF or content[offset + 1] == 0xFF):
            offset += 1
            if offset - start > MOST_JUNK:
                raise UnusableImageError(f"more than {MOST_JUNK} bytes between two segments of a JPEG")
        if offset + 4 > len(data) or content[offset + 1] in (0xDA, 0xD9):
            return
        marker = content[offset + 1]
        alone = marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8  # markers without a length
        offset += 2 if alone else 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
    raise UnusableImageError(f"a JPEG of more than {MOST_SEGMENTS} segments")


def _without_texts(data: np.ndarray) -> np.ndarray:
    """A PNG without its texts: Pillow refuses an image for a megabyte of them."""
    kept, start, offset = [], 0, 8
    for _ in range(MOST_CHUNKS):
        if offset + 12 > len(data):
            break
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        if data[offset + 4 : offset + 8].tobytes() in PNG_TEXTS:
            kept.append(data[start:offset])
            start = end
        offset = end
    else:
        raise UnusableImageError(f"a PNG of more than {MOST_CHUNKS} chunks")
    return np.concatenate([*kept, data[start:]]) if kept else data


def decoding_error(data: np.ndarray) -> str:
    """The reason why Pillow cannot decode an encoded image completely; "" if it can."""
    try:
        with open_encoded(bounded(data)) as image:
            image.load()
    except Exception as error:  # see `examine`
        return str(error) or type(error).__name__
    return ""


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits per pixel scaled to 8, to which Pillow would clip it; others unchanged."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image


def _looks_complete(data: np.ndarray, format: str | None) -> bool:
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
    pixels = eight_bits(image).convert("RGB")
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
