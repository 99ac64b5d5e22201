"""One encoded image: whether it can be used, how large it is, and a form of it that DALI decodes."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LARGEST = 1 << 23  # pixels that are decoded as they are, 24 MiB as RGB; images of more are first made smaller

# What DALI decodes as Pillow does; anything else that Pillow reads is decoded by it.
DECODED_BY_DALI = {
    "JPEG": {"L", "RGB", "CMYK"},
    "PNG": {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
    "BMP": {"1", "L", "P", "RGB", "RGBA"},
    "TIFF": {"L", "I;16", "RGB", "RGBA", "CMYK"},
}
# Sixteen bits a pixel are scaled by 1/257; for these there is no range to scale from.
WITHOUT_RANGE = {"F": "floating-point", "I": "32-bit", "I;16B": "big-endian 16-bit"}


class UnusableImageError(Exception):
    """An image cannot be read or decoded; the message is the reason, without the image's name."""


def examine(data: np.ndarray, *, thorough: bool = True) -> tuple[np.ndarray, tuple[int, int]]:
    """What to give to DALI for an encoded image, and the (height, width) it will decode to.

    Most images are given as they are. Images of kinds that DALI does not decode as Pillow does are decoded
    here, and so are those above `LARGEST` pixels, which are made smaller by a whole factor.

    Args:
        data: (bytes,) uint8.
        thorough: decode an image here if its end does not tell that all of it is there.

    Raises:
        UnusableImageError: no image, a truncated one, or one of a kind without a meaning in RGB.
    """
    if not len(data):
        raise UnusableImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode in WITHOUT_RANGE:
            raise UnusableImageError(f"its {WITHOUT_RANGE[image.mode]} pixels have no known range")
        large = image.width * image.height > LARGEST
        if large or image.mode not in DECODED_BY_DALI.get(image.format, ()):
            return _decoded(image)
        if thorough and not _is_complete(data, image.format):
            image.load()
        return data, (image.height, image.width)
    except UnidentifiedImageError:
        raise UnusableImageError("not an image, or one of an unknown format") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise UnusableImageError(f"more than {limit} pixels, the most that are decoded") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnusableImageError(str(error) or type(error).__name__) from None


def why_not_whole(data: np.ndarray) -> str:
    """Why Pillow cannot decode all of an encoded image; "" where it can."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        return str(error) or type(error).__name__
    return ""


def _is_complete(data: np.ndarray, kind: str) -> bool:
    """Whether an image ends as a whole one of its kind does; False where the end does not tell."""
    end = data[-12:].tobytes()
    if kind == "JPEG":
        return end.endswith(b"\xff\xd9")
    if kind == "PNG":
        return end.endswith(b"IEND\xaeB`\x82")
    if kind == "WEBP":
        return int.from_bytes(data[4:8].tobytes(), "little") + 8 <= len(data)
    return False


def _decoded(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """An image as an uncompressed file (PPM), at most `LARGEST` pixels large."""
    factor = 1
    while (image.width // factor) * (image.height // factor) > LARGEST:
        factor += 1
    # A JPEG is made smaller while it is decoded, by a power of two.
    image.draft("RGB", (image.width // factor, image.height // factor))
    if image.mode == "I;16":  # which Pillow would clip to eight bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    pixels = image.convert("RGB")
    while factor > 1 and pixels.width * pixels.height > LARGEST:
        pixels = pixels.reduce(2)
    header = b"P6 %d %d 255\n" % pixels.size
    return np.frombuffer(bytearray(header + pixels.tobytes()), np.uint8), (pixels.height, pixels.width)
