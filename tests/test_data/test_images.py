"""Every kind of image, through what training does with it, against Pillow."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bincomm.data import images
from bincomm.data.dali import decode, fn, pipeline_def
from bincomm.data.images import UnusableImageError, examine, load
from bincomm.data.listing import Files

Y, X = np.mgrid[0:40, 0:60]
PICTURE = Image.fromarray(np.stack([4 * X, 6 * Y, 2 * (X + Y)], -1).astype(np.uint8))
GRAY = np.asarray(PICTURE.convert("L"))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def png16(pixels):
    """A PNG of 16 bits a channel, which Pillow writes for gray images alone."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return np.frombuffer(data, np.uint8)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    return encode(PICTURE, "JPEG", exif=exif)


def moving(kind, **options):
    frames = [Image.fromarray(np.roll(np.asarray(PICTURE), 5 * shift, 1)) for shift in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def half_transparent():
    return Image.fromarray(np.dstack([np.asarray(PICTURE), 4 * X]).astype(np.uint8))


KINDS = {
    "jpeg": lambda: encode(PICTURE, "JPEG"),
    "jpeg, gray": lambda: encode(PICTURE.convert("L"), "JPEG"),
    "jpeg, CMYK": lambda: encode(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg, progressive": lambda: encode(PICTURE, "JPEG", progressive=True),
    "jpeg, turned by EXIF": turned,
    "jpeg, bytes after its end": lambda: np.concatenate([encode(PICTURE, "JPEG"), np.zeros(99, np.uint8)]),
    "png": lambda: encode(PICTURE, "PNG"),
    "png, gray": lambda: encode(PICTURE.convert("L"), "PNG"),
    "png, gray and alpha": lambda: encode(half_transparent().convert("LA"), "PNG"),
    "png, RGBA": lambda: encode(half_transparent(), "PNG"),
    "png, palette": lambda: encode(PICTURE.convert("P"), "PNG"),
    "png, palette and transparency": lambda: encode(PICTURE.convert("P"), "PNG", transparency=3),
    "png, 1 bit": lambda: encode(PICTURE.convert("1"), "PNG"),
    "png, 16 bits": lambda: png16(np.asarray(PICTURE).astype(np.uint16) * 257),
    "png, animated": lambda: moving("PNG"),
    "webp": lambda: encode(PICTURE, "WEBP", quality=90),
    "webp, lossless": lambda: encode(PICTURE, "WEBP", lossless=True),
    "webp, alpha": lambda: encode(half_transparent(), "WEBP", lossless=True),
    "webp, animated": lambda: moving("WEBP", lossless=True),
    "bmp": lambda: encode(PICTURE, "BMP"),
    "bmp, palette": lambda: encode(PICTURE.convert("P"), "BMP"),
    "bmp, 1 bit": lambda: encode(PICTURE.convert("1"), "BMP"),
    "tiff": lambda: encode(PICTURE, "TIFF"),
    "tiff, LZW": lambda: encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff, deflate": lambda: encode(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, jpeg": lambda: encode(PICTURE, "TIFF", compression="jpeg"),
    "tiff, CMYK": lambda: encode(PICTURE.convert("CMYK"), "TIFF"),
    "tiff, palette": lambda: encode(PICTURE.convert("P"), "TIFF"),
    "tiff, 1 bit": lambda: encode(PICTURE.convert("1"), "TIFF"),
    "tiff, fax": lambda: encode(PICTURE.convert("1"), "TIFF", compression="group4"),
    "tiff, LAB": lambda: encode(PICTURE.convert("LAB"), "TIFF"),
    "tiff, pages": lambda: moving("TIFF"),
    "gif": lambda: moving("GIF"),
    "jpeg 2000": lambda: encode(PICTURE, "JPEG2000"),
}


def decoded(data):
    """The pixels that DALI decodes on a CPU."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        return decode(fn.external_source(source=lambda: [data], batch=True), False)

    return np.array(graph().run()[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_come_out_as_in_pillow(kind):
    data = KINDS[kind]()
    given, size = examine(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    result = decoded(given)
    assert result.shape == (*size, 3) == expected.shape
    assert np.abs(result.astype(int) - expected).mean() < 0.5


def tiff16(pixels, order):
    """A gray TIFF of 16 bits in an order of bytes, "<" or ">"; Pillow writes that of the machine only."""
    height, width = pixels.shape
    values = {
        256: width,
        257: height,
        258: 16,
        259: 1,
        262: 1,
        273: 0,
        277: 1,
        278: height,
        279: pixels.size * 2,
    }
    values[273] = 8 + 2 + 12 * len(values) + 4  # where the pixels begin
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    begin = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    header = begin + struct.pack(f"{order}H", len(values)) + entries + bytes(4)
    return np.frombuffer(header + pixels.astype(f"{order}u2").tobytes(), np.uint8)


def test_the_order_of_bytes_does_not_matter():
    little, big = (examine(tiff16(GRAY.astype(np.uint16) * 257, order))[0] for order in "<>")
    np.testing.assert_array_equal(decoded(little), decoded(big))
    np.testing.assert_array_equal(decoded(big)[..., 0], GRAY)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_with_chunks_of_odd_size_before_others(mode):
    """They are padded by a byte, which DALI does not skip: Pillow decodes them."""
    exif = Image.Exif()
    exif[0x010F] = "camera"
    noise = np.random.default_rng(0).integers(0, 256, (48, 50, 4), np.uint8)
    for height in range(40, 48):
        image = Image.fromarray(noise[:height, :, : len(mode)])
        data = encode(image, "WEBP", lossless=True, exact=True, exif=exif)
        given, size = examine(data)
        assert size == (height, 50)
        np.testing.assert_array_equal(decoded(given), np.asarray(image)[..., :3])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind):
    given, _ = examine(encode(Image.fromarray(GRAY.astype(np.uint16) * 257), kind))
    assert np.abs(decoded(given).astype(int) - GRAY[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image, but some text", "not an image"),
        (bytes(5000), "not an image"),
        (KINDS["jpeg"]()[:-2], "truncated"),
        (KINDS["jpeg"]()[:600], "truncated|Truncated"),
        (KINDS["png"]()[:-30], "truncated|broken"),
        (KINDS["webp"]()[:-30], "decoder"),
        (KINDS["bmp"]()[:-30], "truncated"),
        (KINDS["tiff"]()[:-30], "truncated"),
        (encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_what_cannot_be_used_has_a_reason(data, reason):
    with pytest.raises(UnusableImageError, match=reason):
        examine(np.frombuffer(bytes(data), np.uint8))


def test_a_size_of_nothing_is_no_image():
    data = KINDS["png"]().copy()
    data[16:24] = 0
    with pytest.raises(UnusableImageError, match="a damaged PNG"):
        examine(data)


def test_a_turned_tiff_has_the_size_it_is_decoded_to():
    """Pillow turns it, DALI does not: windows by the size of one could lie outside the other's pixels."""
    given, size = examine(encode(PICTURE, "TIFF", tiffinfo={274: 6}))
    assert decoded(given).shape == (*size, 3) == (60, 40, 3)


def test_a_false_length_inside_a_png_never_reaches_dali():
    data = KINDS["png"]().copy()
    offset = data.tobytes().index(b"IDAT") - 4
    data[offset : offset + 4] = (0x10, 0, 0, 0)
    assert examine(data)[0] is not data  # Pillow finds all of its pixels in spite of that


def test_animations_are_decoded_by_pillow():
    """DALI's reader crashes the process on some damaged ones."""
    data = moving("PNG")
    assert examine(data)[0] is not data


def test_a_telephones_picture_is_given_as_it_is():
    data = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    given, _ = examine(data)
    assert given is data
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        assert np.abs(decoded(given).astype(int) - np.asarray(image)).mean() < 0.5


@pytest.mark.parametrize("error", [RuntimeError("x"), TypeError("x"), MemoryError(), OverflowError("x")])
def test_whatever_pillow_raises_is_a_reason(error, monkeypatch):
    def refuse(file):
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UnusableImageError, match="x|MemoryError"):
        examine(KINDS["png"]())


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10 << 40)
    images = Files([str(tmp_path / "pipe.png"), str(tmp_path / "sparse.png"), str(tmp_path), "/a\0b.png"])
    for index, reason in enumerate(
        ["not a regular file", "more than 536870912", "Is a directory", "null byte"]
    ):
        with pytest.raises(UnusableImageError, match=reason):
            load(images, index)


BIG = PICTURE.resize((240, 160))
BIG_GRAY = BIG.convert("L")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(BIG, "JPEG"), BIG),
        (encode(BIG, "PNG"), BIG),
        (encode(BIG.convert("CMYK"), "JPEG"), BIG),
        (encode(Image.fromarray(np.asarray(BIG_GRAY).astype(np.uint16) * 257), "PNG"), BIG_GRAY),
    ],
    ids=["jpeg", "png", "CMYK", "16 bits"],
)
def test_large_images_are_made_smaller(data, expected, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 5000)
    monkeypatch.setattr(images, "REDUCED", 2000)
    monkeypatch.setattr(images, "HUGE", 30_000)
    given, size = examine(data)
    result = decoded(given)
    assert result.shape == (*size, 3)
    assert 500 < size[0] * size[1] <= 2000
    reduced = np.asarray(expected.convert("RGB").resize(size[::-1], Image.Resampling.BOX))
    assert np.abs(result.astype(int) - reduced).mean() < 3


def test_more_pixels_than_anyone_has_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnusableImageError, match="more than 2000 pixels"):
        examine(KINDS["png"]())


def test_long_texts_are_no_reason_to_leave_a_png_out():
    texts = PngInfo()
    texts.add_text("prompt", "a" * (3 << 20), zip=True)
    texts.add_itxt("other", "b" * (3 << 20), zip=True)
    data = encode(PICTURE, "PNG", pnginfo=texts)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data.tobytes()))
    left, size = examine(data)
    assert size == (40, 60)
    assert np.array_equal(decoded(left), np.asarray(PICTURE))
    assert images.decoding_error(data) == ""
