"""Files that would take long or much memory are left out at once; photographs as cameras and editors write
them are not."""

import contextlib
import io
import itertools
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from bincomm.data.images import UnusableImageError, examine, load
from bincomm.data.listing import Files

Y, X = np.mgrid[0:48, 0:64]
PICTURE = Image.fromarray(np.stack([4 * X, 5 * Y, 2 * (X + Y)], -1).astype(np.uint8))


def encode(kind, image=PICTURE, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(*segments, **options):
    """A JPEG with segments after its first two bytes."""
    data = encode("JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def with_scans(count):
    """A progressive JPEG whose last scan comes `count` times more."""
    data = encode("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def wide(data, width, height):
    """A JPEG that claims another size."""
    at = re.search(b"\xff[\xc0\xc2]", data).start()
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks):
    """A PNG with chunks after its header."""
    data = encode("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def tiff(*tags, image=PICTURE, pages=1):
    """An uncompressed TIFF with these tags (tag, type, count, value) besides its own, and more pages."""
    pixels = np.asarray(image)
    height, width, bands = pixels.shape
    own = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 8, 277: bands, 278: height, 279: pixels.size}
    rows = [(tag, 4, 1, value) for tag, value in own.items() if tag not in [row[0] for row in tags]]
    rows = sorted([*rows, *tags])
    at = 8 + pixels.size
    data = bytearray(b"II*\0" + struct.pack("<I", at) + pixels.tobytes())
    for page in range(1, pages + 1):
        at += 6 + 12 * len(rows)
        data += struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows)
        data += struct.pack("<I", at if page < pages else 0)
    return bytes(data)


def gif(*extensions):
    data = encode("GIF", PICTURE.convert("L"))
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"".join(extensions) + data[at:]


def bmp_of_runs(width, height):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + bytes(1024) + b"\1\0" * 100


def box(kind, content):
    return struct.pack(">I4s", len(content) + 8, kind) + content


def jpeg2000(old=b"", new=b""):
    """A JPEG 2000 in which `new` replaces `old`."""
    data = encode("JPEG2000")
    assert old in data
    return data.replace(old, new, 1)


def with_tiles(side):
    data = bytearray(encode("JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 65000, 65000)
    data[at + 16 : at + 24] = struct.pack(">II", side, side)
    return bytes(data)


def with_layers(count):
    data = bytearray(encode("JPEG2000"))
    at = data.index(b"\xff\x52")
    data[at + 6 : at + 8] = struct.pack(">H", count)
    return bytes(data)


COSTLY = {
    "scans of a JPEG": (lambda: with_scans(2000), "in more than 100 scans"),
    "scans of a large JPEG": (
        lambda: wide(with_scans(40), 13000, 13000),
        "169000000 pixels in more than 25 scans",
    ),
    "segments of a JPEG": (
        lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(60)) * 4000),
        "more than 1000 segments",
    ),
    "segments between scans": (
        lambda: with_scans(0)[:-2] + segment(0xFE, b"x") * 4000,
        "more than 1000 segments",
    ),
    "a JPEG's header": (lambda: jpeg(segment(0xE1, bytes(65000)) * 600), "bytes before its picture"),
    "junk in a JPEG": (lambda: jpeg(segment(0xE0, b"") + bytes(1 << 20)), "bytes between its segments"),
    "junk without end in a JPEG": (
        lambda: b"\xff\xd8\xff\xe0\0\2" + bytes(1 << 20),
        "bytes between its segments",
    ),
    "padding in a JPEG": (lambda: jpeg(b"\xff" * (1 << 20)), "bytes between its segments"),
    "markers of a JPEG": (lambda: jpeg(b"\xff\xd0" * 4000), "more than 1000 segments"),
    "chunks of a PNG": (lambda: png(chunk(b"prVt", b"") * (1 << 18)), "more than 131072 chunks"),
    "chunks of a WebP": (lambda: encode("WEBP") + b"JUNK\0\0\0\0" * (1 << 18), "more than 131072 chunks"),
    # A black image, losslessly.
    "pixels of a WebP": (
        lambda: bytes.fromhex("524946461a000000574542505650384c0e0000002f07e00108071011fd0f4444ff03"),
        "a WebP of more than 67108864 pixels",
    ),
    "comments of a GIF": (lambda: gif(b"!\xfe" + b"\1x" * 9999 + b"\0"), "more than 4096 blocks"),
    "extensions of a GIF": (lambda: gif(b"!\xf9\4\0\0\0\0\0" * 4000), "more than 4096 blocks"),
    "an empty extension of a GIF": (lambda: gif(b"!\xf9\0" + b"\1x" * 9999), "an empty extension"),
    "a loop of a GIF without its number": (
        lambda: gif(b"!\xff\x0bNETSCAPE2.0\0" + b"\1x" * 9999),
        "empty extension",
    ),
    "junk in a GIF": (lambda: gif(b"\1" * 9999), "more than 4096 blocks"),
    "runs of a BMP": (lambda: bmp_of_runs(10000, 10000), "run-length encoded BMP"),
    "tags of a TIFF": (lambda: tiff(*[(40000 + tag, 7, 1, 0) for tag in range(5000)]), "more than 4096 tags"),
    "a tag of a TIFF": (lambda: tiff((40000, 7, 1 << 30, 8)), "claim more bytes"),
    "tags of a TIFF that overlap": (
        lambda: tiff(*[(40000 + tag, 7, 9000, 8) for tag in range(99)]),
        "claim more",
    ),
    "strips of a TIFF": (
        lambda: tiff((273, 4, 1 << 19, 8), image=Image.new("RGB", (1024, 1024))),
        "more than 262144 strips",
    ),
    "bands of a JPEG 2000": (lambda: jpeg2000(b"\0\3\x07\1\1", b"\x40\0\x07\1\1"), "16384 bands"),
    "tiles of a JPEG 2000": (lambda: with_tiles(400), "26569 tiles"),
    "layers of a JPEG 2000": (lambda: with_layers(60000), "more than 100 layers"),
    "boxes of a JPEG 2000": (
        lambda: encode("JPEG2000")[:12] + box(b"free", b"") * 4000 + encode("JPEG2000")[12:],
        "more than 1000 boxes",
    ),
    "a header of a JPEG 2000": (
        lambda: encode("JPEG2000")[:12] + box(b"jp2h", box(b"free", b"") * 10000) + encode("JPEG2000")[12:],
        "a header of 80008 bytes",
    ),
    "markers of a JPEG 2000": (
        lambda: jpeg2000(b"\xff\x52", segment(0x64, b"") * 4000 + b"\xff\x52"),
        "more than 1000 markers",
    ),
    "a PPM as text": (lambda: b"P3 9000 9000 255\n" + b"1 " * 100, "PPM"),
    "a PPM of other values": (lambda: b"P6 9000 9000 254\n" + bytes(100), "PPM"),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_costly_image_is_left_out_before_it_is_decoded(kind):
    make, reason = COSTLY[kind]
    with pytest.raises(UnusableImageError, match=reason):
        examine(np.frombuffer(make(), np.uint8))


TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("Comment", "x" * (3 << 20), zip=True)
TEXT.add_itxt("XML:com.adobe.xmp", "y" * (3 << 20), zip=True)
EXIF = Image.Exif()
EXIF[0x010E] = "e" * 60000
ORDINARY = {
    "progressive": lambda: encode("JPEG", progressive=True),
    "progressive, in 40 scans": lambda: with_scans(30),
    "large EXIF": lambda: encode("JPEG", exif=EXIF),
    "large color profile": lambda: encode("JPEG", icc_profile=os.urandom(5 << 20)),
    "depth map in XMP": lambda: jpeg(
        segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65000)) * 300
    ),
    "Adobe": lambda: jpeg(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\2xx"), segment(0xEE, b"Adobe" + bytes(7))
    ),
    "several pictures": lambda: encode("MPO", save_all=True, append_images=[PICTURE] * 20),
    "bytes behind its end": lambda: encode("JPEG", progressive=True) + b"\xff\xda" * 5000,
    "padding before a marker": lambda: jpeg(b"\xff" * 100),
    "restart markers": lambda: encode("JPEG", progressive=True, restart_marker_blocks=1),
    "PNG with large texts": lambda: encode("PNG", pnginfo=TEXT),
    "PNG with a color profile": lambda: encode("PNG", icc_profile=bytes(3 << 20)),
    "PNG of many small chunks": lambda: png(chunk(b"prVt", b"") * 1000),
    "GIF with a comment": lambda: encode("GIF", PICTURE.convert("L"), comment=b"c" * 1000),
    "GIF that moves": lambda: encode(
        "GIF", PICTURE.convert("L"), save_all=True, loop=0, append_images=[PICTURE.convert("P")]
    ),
    "GIF with an empty comment": lambda: gif(b"!\xfe\0"),
    "TIFF of strips": lambda: encode("TIFF", compression="tiff_lzw", tiffinfo={278: 1}),
    "TIFF with data of another program": lambda: encode("TIFF", tiffinfo={37724: bytes(1 << 20)}),
    "JPEG 2000 of tiles": lambda: encode("JPEG2000", tile_size=(16, 16)),
    "JPEG 2000 of layers": lambda: encode("JPEG2000", quality_layers=[80, 40, 20]),
    "JPEG 2000 without boxes": lambda: encode("JPEG2000", no_jp2=True),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_image_is_taken(kind):
    data = np.frombuffer(ORDINARY[kind](), np.uint8)
    _, size = examine(data)
    assert size == (48, 64)


def test_pages_of_a_tiff_beyond_the_first_are_not_looked_for():
    data = np.frombuffer(tiff(pages=100_000), np.uint8)
    before = data.copy()
    given, _ = examine(data)
    assert np.array_equal(data, before)  # the caller's bytes stay as they are
    assert given[-9216:].tobytes() == np.asarray(PICTURE).tobytes()


def test_a_tiff_of_the_largest_kind():
    """Of more than 4 GiB there may be one; a small one has the same tags with eight bytes each."""
    data = np.frombuffer(encode("TIFF", big_tiff=True), np.uint8)
    assert data[2] == 43
    assert examine(data)[1] == (48, 64)


@pytest.mark.parametrize(
    ("bits", "kind", "bands", "reason"),
    [
        (16, 2, 1, "its signed 16-bit values have no known range"),
        (8, 2, 1, "its signed 8-bit values have no known range"),
        (32, 1, 1, "its 32-bit values have no known range"),
        (32, 3, 1, "its 32-bit floating-point values have no known range"),
        (64, 3, 1, "(its|a TIFF of) 64-bit floating-point values.*"),
        (32, 3, 3, "a TIFF of 3 bands of 32-bit floating-point values, which are not decoded"),
        (16, 1, 7, "a TIFF of 7 bands of 16-bit values, which are not decoded"),
        (16, 2, 2, "a TIFF of 2 bands of signed 16-bit values, which are not decoded"),
    ],
)
def test_values_of_a_tiff_that_is_left_out_are_named(bits, kind, bands, reason):
    image = Image.new("RGB", (64, 48 * 8))  # room for all
    own = [(257, 4, 1, 48), (258, 3, 1, bits), (277, 3, 1, bands), (339, 3, 1, kind)]
    sizes = [(279, 4, 1, 64 * 48 * bands * bits // 8), (278, 4, 1, 48)]
    data = tiff(*own, *sizes, (262, 3, 1, 1), image=image)
    with pytest.raises(
        UnusableImageError,
        match=f"^{reason}(; the key pixel_range gives it| without the keys channels or pixel_range)$",
    ):
        examine(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("begin", [b"", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"MZ"])
def test_a_large_file_that_is_no_image_is_not_read(tmp_path, begin):
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.write(begin)
        file.truncate(64 << 20)
    with pytest.raises(UnusableImageError, match="do not begin as an image|bytes between its segments"):
        load(Files([str(path)]), 0)


def test_damage_anywhere_in_a_header_is_an_unusable_image_or_none():
    """No check fails in a way of its own."""
    for make in itertools.chain(ORDINARY.values(), (tiff,)):
        data = np.frombuffer(make(), np.uint8)[:4000]
        for at in range(0, min(200, len(data)), 3):
            damaged = data.copy()
            damaged[at] ^= 0x80
            for changed in (damaged, data[:at]):
                with contextlib.suppress(UnusableImageError):
                    examine(changed)
