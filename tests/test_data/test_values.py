"""Images of other than RGB: what becomes of their values, which are left out, what a crop keeps of them."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bincomm.data.crops import Crops, reading
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.export import verify, write_shards
from bincomm.data.images import UnusableImageError
from bincomm.data.loader import Loader
from bincomm.data.sources import open_source
from bincomm.data.statistics import measure
from bincomm.data.values import LARGEST_VALUES, decode_values

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 65536, (32, 40, 13), dtype=np.uint16)
SHARES = (BANDS / 65535).astype(np.float32)


def tiff(values, **options):
    """The file of a TIFF, as (bytes,) uint8."""
    tifffile = pytest.importorskip("tifffile", reason="TIFFs of many bands need tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return np.frombuffer(file.getvalue(), np.uint8)


def npy(values, **options):
    """The file of an array."""
    file = io.BytesIO()
    np.save(file, values, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def png(values):
    """The file of a PNG of 16 bits and 1 to 4 channels, some of which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return np.frombuffer(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), np.uint8)


def pillow(values, kind, mode=None, **options):
    """The file of an image that Pillow writes."""
    file = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


CONTIG = {"planarconfig": "contig"}
FIRST = BANDS.transpose(2, 0, 1).copy()  # bands first
EIGHT = (BANDS >> 8).astype(np.uint8)


@pytest.mark.parametrize(
    ("make", "channels", "pixel_range", "expected"),
    [
        pytest.param(lambda: tiff(BANDS, **CONTIG), 13, None, SHARES, id="pixel by pixel"),
        pytest.param(lambda: tiff(BANDS, byteorder=">", **CONTIG), 13, None, SHARES, id="big-endian"),
        pytest.param(lambda: tiff(BANDS, bigtiff=True, **CONTIG), 13, None, SHARES, id="BigTIFF"),
        pytest.param(lambda: tiff(BANDS, compression="zlib", **CONTIG), 13, None, SHARES, id="deflate"),
        pytest.param(lambda: tiff(BANDS, tile=(16, 16), **CONTIG), 13, None, SHARES, id="tiles"),
        pytest.param(lambda: tiff(FIRST, planarconfig="separate"), 13, None, SHARES, id="band by band"),
        pytest.param(lambda: tiff(FIRST), 13, None, SHARES, id="a page for each band"),
        pytest.param(lambda: tiff(EIGHT[..., :5], **CONTIG), 5, None, EIGHT[..., :5] / 255, id="8 bits"),
        pytest.param(
            lambda: tiff(4 * SHARES - 2, **CONTIG), 13, (-2, 2), SHARES, id="floating-point with a range"
        ),
        pytest.param(
            lambda: tiff(BANDS[..., 0].astype(np.int32) - 9), 1, (-9, 65526), SHARES[..., :1], id="signed"
        ),
        pytest.param(
            lambda: tiff(BANDS[..., :3], photometric="rgb"), 3, (0, 65535), SHARES[..., :3], id="RGB, 16 bits"
        ),
        pytest.param(
            lambda: pillow(BANDS[..., 0], "TIFF", compression="tiff_lzw"), 1, None, SHARES[..., :1], id="LZW"
        ),
        pytest.param(lambda: png(BANDS[..., :1]), 1, None, SHARES[..., :1], id="PNG, 16 bits"),
        pytest.param(lambda: png(BANDS[..., :3]), 3, (0, 65535), SHARES[..., :3], id="PNG, RGB in 16 bits"),
        pytest.param(lambda: npy(SHARES), 13, (0, 1), SHARES, id="array"),
        pytest.param(lambda: npy(SHARES.transpose(2, 0, 1)), 13, (0, 1), SHARES, id="array, channels first"),
        pytest.param(lambda: npy(np.asfortranarray(SHARES)), 13, (0, 1), SHARES, id="array by columns"),
        pytest.param(lambda: npy(BANDS[..., 0]), 1, None, SHARES[..., :1], id="array of 16 bits"),
        pytest.param(lambda: npy(10 * SHARES), 13, (2, 3), (10 * SHARES - 2).clip(0, 1), id="beyond"),
        # Conversions.
        pytest.param(lambda: png(BANDS[..., :4]), 3, (0, 65535), SHARES[..., :3], id="alpha dropped"),
        pytest.param(lambda: png(BANDS[..., :4]), 4, None, SHARES[..., :4], id="alpha as the fourth"),
        pytest.param(
            lambda: pillow(EIGHT[..., 0], "PNG", "LA"), 1, None, EIGHT[..., :1] / 255, id="gray and alpha"
        ),
        pytest.param(
            lambda: png(BANDS[..., :1]), 3, (0, 65535), SHARES[..., :1].repeat(3, -1), id="gray to three"
        ),
        pytest.param(
            lambda: pillow(EIGHT[..., 0], "PNG", "RGBA"), 1, None, EIGHT[..., :1] / 255, id="gray in RGBA"
        ),
    ],
)
def test_values_keep_all_their_bits(make, channels, pixel_range, expected):
    values = decode_values(make(), channels, pixel_range)
    assert values.dtype == np.float32
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, atol=1e-6)  # a step of 16 bits is 1.5e-5, of 8 bits 4e-3


@pytest.mark.parametrize(
    ("make", "channels", "reason"),
    [
        (lambda: tiff(BANDS[..., :4], **CONTIG), 13, "it has 4 channels; expected 13"),
        (lambda: png(BANDS[..., :3]), 1, "it has 3 channels; expected 1"),
        (lambda: png(BANDS[..., :1]), 2, "it has 1 channel; expected 2"),
        (lambda: tiff(FIRST), 12, "it has 1 channel; expected 12"),  # of 13 pages
        (
            lambda: tiff(SHARES, **CONTIG),
            13,
            "float32 values have no known range; the key pixel_range gives it",
        ),
        (lambda: npy(BANDS.astype(np.int64)), 13, "int64 values have no known range"),
        (lambda: npy(np.full((4, 4), np.nan)), 1, "have no known range"),
        (lambda: npy(np.array([{}]), allow_pickle=True), 1, "an array of object; expected integers or"),
        (lambda: npy(np.zeros((2, 2, 2, 2))), 1, r"shape \(2, 2, 2, 2\); expected \(H, W\)"),
        (lambda: npy(BANDS)[:-1], 13, "incomplete"),
        (lambda: tiff(BANDS, **CONTIG)[:-9], 13, "failed to read"),
        (lambda: png(BANDS[..., :3])[:-9], 3, "a damaged PNG"),
        (lambda: np.frombuffer(b"no image", np.uint8), 13, "not an image"),
        (lambda: np.zeros(0, np.uint8), 13, "the file is empty"),
    ],
)
def test_what_cannot_be_read_is_an_unusable_image_with_the_reason(make, channels, reason):
    with pytest.raises(UnusableImageError, match=reason):
        decode_values(make(), channels, None)


def test_nan_is_the_low_end_unless_all_is():
    values = SHARES[..., :2].copy()
    values[0], values[1], values[2] = np.nan, np.inf, -np.inf
    decoded = decode_values(npy(values), 2, (-1, 1))
    assert (decoded[0] == 0).all()
    assert (decoded[1] == 1).all()
    assert (decoded[2] == 0).all()
    with pytest.raises(UnusableImageError, match="NaN"):
        decode_values(npy(np.full((4, 4), np.nan)), 1, (0, 1))


def test_large_images_are_reduced_by_means():
    rows = np.repeat(np.arange(3000, dtype=np.uint16)[:, None], 2900, 1)
    values = decode_values(npy(rows), 1, (0, 65535))
    assert values.size <= LARGEST_VALUES
    assert values.shape == (1500, 1450, 1)
    np.testing.assert_allclose(values[:, 7, 0] * 65535, np.arange(1500) * 2 + 0.5, atol=1e-2)


@pytest.mark.slow
def test_a_tiff_that_inflates_without_end_is_refused():
    tifffile = pytest.importorskip("tifffile")
    deflate = zlib.compressobj(9)
    strip = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(600)) + deflate.flush()
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        shape = {"shape": (32, 40, 13), "dtype": "uint16", "rowsperstrip": 32}
        writer.write(iter([strip]), photometric="minisblack", compression="zlib", **shape, **CONTIG)
    with pytest.raises(UnusableImageError, match="inflates to more than"):
        decode_values(np.frombuffer(file.getvalue(), np.uint8), 13, None)


# Through the pipeline.


def save(folder, files):
    """Files of images in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data.tobytes())
    return str(folder)


def plain(channels, size=32, pixel_range=None, **keys):
    """Crops that show the whole image as it is."""
    none = {"jitter": (0.0, 0.0, 0.0, 0.0), "gray": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}
    numbers = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "flip": 0.0}
    whole = {"global_size": size, "global_scale": (1.0, 1.0), "local_crops": 0}
    return Crops(channels=channels, pixel_range=pixel_range, **{**none, **numbers, **whole, **keys})


def test_a_png_of_16_bits_keeps_more_than_8_in_crops(tmp_path):
    """A ramp within one step of 8 bits: quantized to 8 bits, all of it would be one value or two."""
    ramp = 20000 + np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) % 257
    data = save(tmp_path, {"ramp.png": pillow(ramp, "PNG")})
    crops = plain(1)
    ((_, images),) = eval_batches(
        open_source(data), crops, crop_ratio=1, batch_size=1, device=torch.device("cpu")
    )
    assert images.shape == (1, 1, 32, 32)
    np.testing.assert_allclose(images[0, 0].numpy() * 65535, ramp, atol=0.02)
    globals_, _ = Loader(open_source(data), crops, batch_size=1, seed=0, device=torch.device("cpu")).next()
    assert len(globals_[0, 0].unique()) > 200


def test_arrays_of_floats_come_out_in_their_range(tmp_path):
    values = RNG.normal(0, 3, (32, 32, 2)).astype(np.float32)
    data = save(tmp_path, {"a.npy": npy(values), "b.npy": npy(values.transpose(2, 0, 1))})
    crops = plain(2, pixel_range=(-10.0, 10.0), mean=(0.5, 0.5), std=(0.05, 0.05))
    ((_, images),) = eval_batches(
        open_source(data), crops, crop_ratio=1, batch_size=2, device=torch.device("cpu")
    )
    assert torch.equal(images[0], images[1])
    np.testing.assert_allclose(images[0].movedim(0, -1), values, atol=1e-4)


def test_brightness_and_contrast_are_those_of_a_channel(tmp_path):
    """All channels change by the same factors, each around its own mean; nothing else happens to them."""
    values = np.stack([SHARES[..., 0] / 4, 0.5 + SHARES[..., 1] / 4], -1)[:, :32]
    data = save(tmp_path, {f"{number}.npy": npy(values) for number in range(8)})
    crops = plain(2, pixel_range=(0, 1), jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=1.0)
    loader = Loader(open_source(data), crops, batch_size=8, seed=0, device=torch.device("cpu"))
    views = loader.next()[0].flatten(0, 1)
    original = torch.from_numpy(values).movedim(-1, 0)
    center = original.mean((1, 2), keepdim=True)
    brightness = views.mean((2, 3)) / center.flatten()
    contrast = views.std((2, 3)) / original.std((1, 2)) / brightness
    for factors in (brightness, contrast):
        torch.testing.assert_close(factors[:, 0], factors[:, 1], rtol=1e-3, atol=1e-3)
        assert factors.min() > 0.59
        assert factors.max() < 1.41
        assert factors[:, 0].std() > 0.1
    expected = (center + (original - center) * contrast[:, 0, None, None, None]) * brightness[
        :, 0, None, None, None
    ]
    torch.testing.assert_close(views, expected, rtol=1e-3, atol=1e-3)


def test_rotated_blurred_crops_of_many_channels_have_all_of_them(tmp_path):
    flat = np.broadcast_to(np.arange(13, dtype=np.uint16) * 5000, (40, 40, 13))
    data = save(tmp_path, {f"{number}.npy": npy(flat) for number in range(2)})
    keys = {"rotate": 20.0, "right_angles": 1.0, "flip_vertical": 0.5, "blur": (1.0, 1.0, 1.0)}
    crops = plain(13, 16, global_scale=(0.2, 0.6), local_crops=2, local_size=8, **keys)
    for channels_last in (False, True):
        loader = Loader(
            open_source(data),
            crops,
            batch_size=2,
            seed=0,
            device=torch.device("cpu"),
            channels_last=channels_last,
        )
        for views in loader.next():
            expected = torch.arange(13.0)[:, None, None] * 5000 / 65535
            torch.testing.assert_close(views, expected.expand_as(views), rtol=0, atol=1e-5)


def test_rgb_with_a_range_has_colors(tmp_path):
    """Gray is gray and solarize inverts what is above the half, as for 8 bits."""
    data = save(tmp_path, {"a.npy": npy(SHARES[:, :32, :3])})
    gray = plain(3, pixel_range=(0, 1), gray=1.0)
    views = Loader(open_source(data), gray, batch_size=1, seed=0, device=torch.device("cpu")).next()[0]
    assert (views.amax(2) - views.amin(2)).max() < 1e-2
    inverted = plain(3, pixel_range=(0, 1), solarize=1.0)
    views = Loader(open_source(data), inverted, batch_size=1, seed=0, device=torch.device("cpu")).next()[0]
    original = torch.from_numpy(SHARES[:, :32, :3]).movedim(-1, 0)
    torch.testing.assert_close(views[0, 0], original, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        views[0, 1], torch.where(original < 0.5, original, 1 - original), rtol=0, atol=1e-4
    )


# Around it.


def test_an_image_of_other_channels_is_named_once_and_replaced(tmp_path):
    files = {f"{number}.npy": npy(BANDS[..., :5]) for number in range(9)}
    data = save(tmp_path, {**files, "wrong.npy": npy(BANDS[..., :4])})
    source = open_source(data)
    loader = Loader(source, plain(5, 16), batch_size=5, seed=0, device=torch.device("cpu"), max_unusable=0.2)
    for _ in range(4):
        loader.next()
    ((name, reason),) = loader.unusable
    assert name.endswith("wrong.npy")
    assert reason == "it has 4 channels; expected 5, as the key channels says"
    assert verify(source, reading(5, None)) == loader.unusable


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    save(tmp_path / "only", {"a.npy": npy(BANDS[..., :1]), "b.npy": npy(BANDS[..., :1])})
    save(tmp_path / "beside", {"a.npy": npy(BANDS[..., :1]), "b.png": png(BANDS[..., :1])})
    assert len(open_source(str(tmp_path / "only")).images) == 2
    assert list(open_source(str(tmp_path / "beside")).images.names()) == [str(tmp_path / "beside/b.png")]
    ((_, reason), _) = verify(open_source(str(tmp_path / "only")))
    assert "read as an image with the key pixel_range" in reason


def test_shards_hold_images_as_they_are(tmp_path):
    data = save(tmp_path / "in/x", {"a.npy": npy(SHARES), "c.npy": npy(SHARES[::-1])})
    save(tmp_path / "in/y", {"b.npy": npy(SHARES[..., :2])})
    crops = reading(13, (0, 1))
    ((name, _),) = write_shards(open_source(str(tmp_path / "in")), tmp_path / "out", crops)
    assert name.endswith("b.npy")
    source = open_source(str(tmp_path / "out"))
    read = {source.images.read(index).tobytes() for index in range(len(source.images))}
    assert read == {path.read_bytes() for path in (tmp_path / "in/x").iterdir()}
    assert data


def test_parquet_files_hold_any_image(tmp_path):
    rows = [{"bytes": tiff(BANDS, **CONTIG).tobytes()}, {"bytes": npy(BANDS).tobytes()}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    batches = eval_batches(
        open_source(str(tmp_path / "train.parquet")),
        plain(13),
        crop_ratio=1,
        batch_size=2,
        device=torch.device("cpu"),
    )
    ((_, images),) = batches
    assert images.shape == (2, 13, 32, 32)
    assert torch.equal(images[0], images[1])


def test_statistics_are_those_of_all_values(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.random((10, 16, 16, 3)).astype(np.float32) * [1, 0.5, 0.1] + [0, 0.25, 0.5]
    data = save(tmp_path, {f"{n}.npy": npy(2 * image) for n, image in enumerate(images)})
    found = measure(open_source(data), reading(3, (0, 2)))
    np.testing.assert_allclose(found.mean, images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std, images.std((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.smallest, images.min((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.largest, images.max((0, 1, 2)), atol=1e-6)
    assert (found.images, found.pixels) == (10, 2560)
    assert measure(open_source(data), reading(3, (0, 2)), most=4).images == 4
