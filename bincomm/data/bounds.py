"""What an image file may cost: its structure is checked before a decoder reads it, so that any file takes a
bounded time and memory, whatever it claims to be.

Readers loop over segments, chunks, blocks and tags, some of them byte by byte in Python, and a decoder runs
over all pixels for every scan. A photograph has few of these; a file with more than the limits below is left
out.
"""

import re
import struct
from typing import NamedTuple

import numpy as np

SEGMENTS = 1000  # of a JPEG; an ICC profile and a depth map take up to 255 each
HEADER = 1 << 25  # bytes before a JPEG's first scan
JUNK = 1 << 16  # bytes between a JPEG's segments that belong to none; Pillow skips them one by one
SCANS = 100  # of a JPEG; progressive ones have about ten
SCAN_PIXELS = (
    1 << 32
)  # a JPEG's scans times its pixels; for a scan of an empty image they take about 1 ns each
CHUNKS = 1 << 17  # of a PNG or WebP; libpng writes one for every 8 KiB
BLOCKS = 4096  # of a GIF before its first picture, 255 bytes each
TAGS = 4096  # of a TIFF
TAG_VALUES = 1 << 18  # in one tag of a TIFF, which become Python's integers: strips, tiles, colors
BOXES = 1000  # of a JPEG 2000, and markers in its header
TILES = 4096  # of a JPEG 2000
LAYERS = 100  # of a JPEG 2000
HEADER_BOX = 1 << 16  # bytes of a JPEG 2000's header, which has a palette of at most 4 KiB
RUNS = 1 << 23  # bytes and pixels of a BMP with run-length encoding, which Pillow decodes in Python

TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"}  # chunks of a PNG that do not change its pixels
PORTABLE = re.compile(rb"P[0-9fFy]\s")
OURS = re.compile(
    rb"P6 \d+ \d+ 255\n"
)  # what `bincomm.data.images.examine` writes; Pillow decodes others in Python
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker other than those inside a scan
STANDALONE = {0x01, *range(0xD0, 0xDA)}  # markers of JPEG without a segment
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of JPEG that hold the image's size
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
TIFF_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"II+\0": "<", b"MM\0*": ">", b"MM*\0": ">", b"MM\0+": ">"}
# Bytes of a value, by the number of its type.
TIFF_TYPES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
SAMPLES_PER_PIXEL, BITS_PER_SAMPLE, SAMPLE_FORMAT = 277, 258, 339  # tags
SIGNED, FLOATING = 2, 3  # values of the last; 1 is unsigned
TIFF_TEXTS = (2, 7)  # types whose values stay bytes
FIRST_PRIVATE_TAG = 700  # from here on bytes are data of other programs: XMP, ICC, Photoshop


def bounded(data: np.ndarray) -> np.ndarray:
    """An encoded image that takes a bounded time and memory to open and to decode to its size.

    That is the image itself, but for a PNG without its texts, which a reader would decompress, and a TIFF
    without its pages after the first, all of which Pillow would look for.

    Args:
        data: (bytes,) uint8.

    Raises:
        ValueError: it would take more; the message is the reason.
    """
    begin = data[:32].tobytes()
    view = data.data  # whose items are Python's integers, and taken faster
    try:
        if begin.startswith(b"\xff\xd8\xff"):
            _check_jpeg(view)
        elif begin.startswith(b"\x89PNG\r\n\x1a\n"):
            return _without_texts(data)
        elif begin.startswith(b"RIFF"):
            _check_webp(view)
        elif begin.startswith(b"GIF8"):
            _check_gif(view)
        elif begin.startswith(b"BM"):
            _check_bmp(view)
        elif begin[:4] in TIFF_ORDERS:
            return tiff_pages(data, 1)[0]
        elif begin.startswith(b"\xff\x4f\xff\x51") or begin[4:8] == b"jP  ":
            _check_jpeg2000(view)
        elif PORTABLE.match(begin) and not OURS.match(begin):
            raise ValueError("a file of the format PPM, which is not decoded")
    except (struct.error, IndexError):  # it ends inside its header, which its reader reports
        pass
    return data


def _check_jpeg(view: memoryview) -> None:
    at, junk, pixels, components, progressive = 2, 0, 0, 0, False
    for _ in range(SEGMENTS):
        if view[at] != 0xFF or view[at + 1] in (0, 0xFF):  # no marker
            marker = JPEG_MARKER.search(view, at, at + JUNK)
            junk += (marker.start() if marker else len(view)) - at
            if junk > JUNK:
                raise ValueError(f"a JPEG with more than {JUNK} bytes between its segments")
            if marker is None:
                return
            at = marker.start()
        if at > HEADER:
            raise ValueError(f"a JPEG with more than {HEADER} bytes before its picture")
        kind = view[at + 1]
        at += 2
        if kind in STANDALONE:
            continue
        length = view[at] << 8 | view[at + 1]
        if kind in FRAMES:
            height, width, components = struct.unpack_from(">HHB", view, at + 3)
            pixels = max(pixels, height * width)
            progressive = progressive or kind in PROGRESSIVE
        elif kind == 0xDA:
            break
        at += length
    else:
        raise ValueError(f"a JPEG of more than {SEGMENTS} segments")
    if progressive or view[at + 2] < components:  # else the decoder ends after this scan
        _check_scans(view, at + length, pixels)


def _check_scans(view: memoryview, at: int, pixels: int) -> None:
    scans, limit = 1, min(SCANS, SCAN_PIXELS // max(1, pixels))
    for _ in range(SEGMENTS):
        marker = SCAN_END.search(view, at)
        kind = 0xD9 if marker is None else view[marker.start() + 1]
        if marker is None or kind == 0xD9:
            return
        scans += kind == 0xDA
        if scans > limit:
            raise ValueError(f"a JPEG of {pixels} pixels in more than {limit} scans")
        at = marker.end()
        if kind not in STANDALONE:
            at += struct.unpack_from(">H", view, at)[0]
    raise ValueError(f"a JPEG of more than {SEGMENTS} segments")


def _without_texts(data: np.ndarray) -> np.ndarray:
    at, first, kept = 8, 0, []
    for _ in range(CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data.data, at)
        end = at + 12 + length
        if kind in TEXTS:
            kept.append(data[first:at])
            first = end
        at = end
        if kind == b"IEND":
            break
    else:
        raise ValueError(f"a PNG of more than {CHUNKS} chunks")
    return np.concatenate([*kept, data[first:]]) if kept else data


def _check_webp(view: memoryview) -> None:
    at = 12
    for _ in range(CHUNKS):
        if at + 8 > len(view):
            return
        (size,) = struct.unpack_from("<I", view, at + 4)
        at += 8 + size + size % 2
    raise ValueError(f"a WebP of more than {CHUNKS} chunks")


def _check_gif(view: memoryview) -> None:
    flags = view[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    needed = size = 0  # blocks that an extension must have, for else Pillow reads on beyond its end
    for _ in range(BLOCKS):
        if not size:
            kind = view[at]
            if kind in b",;":
                return
            at += 1
            if kind == ord("!"):
                needed = {0xFE: 0, 0xFF: 2}.get(view[at], 1)
                size, at = 1, at + 1
        else:
            size = view[at]
            if not size and needed > 0:
                raise ValueError("a GIF with an empty extension")
            at += 1 + size
            needed -= 1
    raise ValueError(f"a GIF with more than {BLOCKS} blocks before its first picture")


def _check_bmp(view: memoryview) -> None:
    header, width, height, _, _, compression = struct.unpack_from("<IiiHHI", view, 14)
    if header >= 40 and compression in (1, 2) and max(len(view), abs(width * height)) > RUNS:
        raise ValueError(f"a run-length encoded BMP of more than {RUNS} bytes or pixels")


def tiff_pages(data: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """A TIFF without its pages after the first `most`, and how many it had, `most` + 1 standing for more.

    Raises:
        ValueError: reading the tags of one of these pages would take too much time or memory.
        struct.error: it ends inside these tags.
    """
    big = 43 in data[2:4]
    order = TIFF_ORDERS[data[:4].tobytes()] + ("Q" if big else "I")
    width = link = 8 if big else 4
    for number in range(most):
        (first,) = struct.unpack_from(order, data.data, link)
        at, tags = _tiff_tags(data, first)
        sizes = np.zeros(1 << 16)
        sizes[: len(TIFF_TYPES)] = TIFF_TYPES
        kinds, counts = tags["type"], tags["count"]
        if (sizes[kinds] * counts).sum() > len(data) + tags.nbytes:
            raise ValueError("a TIFF whose tags claim more bytes than it has")
        numbers = (sizes[kinds] > 0) & ~np.isin(kinds, TIFF_TEXTS)
        numbers &= (kinds != 1) | (tags["tag"] < FIRST_PRIVATE_TAG)
        if (counts[numbers] > TAG_VALUES).any():
            raise ValueError(f"a TIFF with more than {TAG_VALUES} strips, tiles or other values of a tag")
        link = at + tags.nbytes
        if not data[link : link + width].any():
            return data, number + 1
    kept = data.copy()
    kept[link : link + width] = 0
    return kept, most + 1


def _tiff_tags(data: np.ndarray, at: int) -> tuple[int, np.ndarray]:
    """Where the tags of the page at a byte of a TIFF begin, and these."""
    order, big = TIFF_ORDERS[data[:4].tobytes()], 43 in data[2:4]
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data.data, at)
    at += 8 if big else 2
    if count > TAGS:
        raise ValueError(f"a TIFF of more than {TAGS} tags")
    number = order + ("u8" if big else "u4")
    fields = [("tag", order + "u2"), ("type", order + "u2"), ("count", number), ("value", number)]
    tag = np.dtype(fields)
    return at, np.frombuffer(data[at : at + count * tag.itemsize].tobytes(), tag)


class Samples(NamedTuple):
    """What a pixel of a TIFF consists of."""

    bands: int
    bits: int  # of a value
    kind: int  # SIGNED, FLOATING, or else unsigned

    def describe(self) -> str:
        """In words, such as "5 bands of signed 16-bit values"."""
        words = {SIGNED: "signed {}-bit", FLOATING: "{}-bit floating-point"}.get(self.kind, "{}-bit")
        bands = f"{self.bands} bands of " if self.bands > 1 else ""
        return f"{bands}{words.format(self.bits)} values"


def tiff_samples(data: np.ndarray) -> Samples | None:
    """What the pixels of a TIFF's first page consist of; None for another file, and for a damaged one."""
    order = TIFF_ORDERS.get(data[:4].tobytes())
    if order is None:
        return None
    numbers = []
    try:
        link, kind = (8, "Q") if 43 in data[2:4] else (4, "I")
        _, tags = _tiff_tags(data, struct.unpack_from(order + kind, data.data, link)[0])
        for tag in (SAMPLES_PER_PIXEL, BITS_PER_SAMPLE, SAMPLE_FORMAT):
            row = tags[tags["tag"] == tag][:1]
            size = 2 * int(row["count"][0]) if len(row) else 0
            if not size:
                numbers.append(1)  # the default of each
            elif size <= row["value"].itemsize:  # the values are here
                numbers.append(struct.unpack_from(order + "H", row["value"].tobytes())[0])
            else:
                numbers.append(struct.unpack_from(order + "H", data.data, int(row["value"][0]))[0])
    except (ValueError, struct.error, OverflowError):
        return None
    return Samples(*numbers)


def _check_jpeg2000(view: memoryview) -> None:
    at = 0
    for _ in range(BOXES):
        if view[at : at + 4].tobytes() == b"\xff\x4f\xff\x51":
            return _check_codestream(view, at)
        size, kind = struct.unpack_from(">I4s", view, at)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", view, at + 8), 16
        if kind == b"jp2h" and size > HEADER_BOX:
            raise ValueError(f"a JPEG 2000 with a header of {size} bytes, more than {HEADER_BOX}")
        at += header if kind == b"jp2c" else max(header, size or len(view))
    raise ValueError(f"a JPEG 2000 of more than {BOXES} boxes")


def _check_codestream(view: memoryview, at: int) -> None:
    at += 2
    for _ in range(BOXES):
        marker, length = struct.unpack_from(">HH", view, at)
        if marker == 0xFF51:
            x1, y1, _, _, width, height, x0, y0, components = struct.unpack_from(">8IH", view, at + 6)
            tiles = -(-(x1 - x0) // max(1, width)) * -(-(y1 - y0) // max(1, height))
            if components > 4 or tiles > TILES:
                raise ValueError(f"a JPEG 2000 of {components} bands in {tiles} tiles; at most 4 and {TILES}")
        elif marker == 0xFF52:
            (layers,) = struct.unpack_from(">H", view, at + 6)
            if layers > LAYERS:
                raise ValueError(f"a JPEG 2000 of more than {LAYERS} layers")
        elif marker == 0xFF90:
            return
        at += 2 + length
    raise ValueError(f"a JPEG 2000 with more than {BOXES} markers before its picture")
