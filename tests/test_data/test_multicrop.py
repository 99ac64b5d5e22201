"""The graph against torchvision, operation by operation, on the 0–255 scale."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from bincomm.data import multicrop
from bincomm.data.crops import Crops

SIZE = 64
PLAIN = {"flip": 0.0, "jitter_p": 0.0, "gray": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A smooth colored picture with edges, as PNG (so that no decoder plays a part)."""
    y, x = np.mgrid[0:150, 0:200] / 30
    channels = [np.sin(x + 0.5 * y), np.cos(1.3 * x - y), np.sin(x * y / 3)]
    pixels = np.stack([127 + 100 * c for c in channels], -1)
    pixels[40:80, 50:90] = (230, 40, 60)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def run(path, crops, window, numbers):
    """Crops of one picture on the 0–255 scale: list of (S, S, 3), for V windows and their numbers."""
    with Image.open(path) as image:
        window = np.array(window) / np.tile(image.size[::-1], 2)
    arrays = [np.fromfile(path, np.uint8)], [np.concatenate([window, numbers], 1, dtype=np.float32)]
    pipeline = multicrop.training_pipeline(crops, lambda: arrays, batch_size=1, threads=1, device_id=None)
    views = [view for output in pipeline.run() for view in np.array(output.as_tensor())[0]]
    return [255 * (view.transpose(1, 2, 0) * crops.std + crops.mean) for view in views]


def test_colors_are_normalized_as_asked(picture):
    """Twice the deviation and another mean, of the same pixels."""
    window, numbers = [(0, 0, 100, 100)] * 2, np.tile([1, 1, 1, 0, 0, 1, 0], (2, 1))
    options = {"global_size": SIZE, "local_crops": 0, **PLAIN}
    plain = run(picture, Crops(**options), window, numbers)
    other = run(picture, Crops(**options, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0)), window, numbers)
    assert np.ptp(plain) > 100
    np.testing.assert_allclose(plain, other, atol=1e-3)


def corners(y=20, x=30, h=110, w=120, flip=False):
    left, right = (x + w, x) if flip else (x, x + w)
    return [[y, left, y + h, right]] * 2


def numbers(**values):
    row = np.zeros(multicrop.CORNERS + 7)
    row[[multicrop.BRIGHTNESS, multicrop.CONTRAST, multicrop.SATURATION]] = 1
    for name, value in values.items():
        row[getattr(multicrop, name)] = value
    return [row[multicrop.CORNERS :]] * 2


def both(picture, crops, flip=False, **values):
    """The pipeline's global 2 with these numbers, and the plain crop that torchvision is to work on."""
    plain = Crops(global_size=SIZE, local_crops=0, **PLAIN)
    result = run(picture, crops, corners(flip=flip), numbers(**values))[1]
    base = run(picture, plain, corners(), numbers())[1]
    return result, Image.fromarray(base.round().clip(0, 255).astype(np.uint8))


def difference(result, expected):
    return np.abs(result - np.asarray(expected, dtype=np.float64)).mean()


@pytest.mark.parametrize("window", [(20, 30, 40, 50), (0, 0, 110, 120), (9, 3, 141, 197), (0, 0, 150, 200)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_resize(picture, window, flip):
    plain = Crops(global_size=SIZE, local_crops=0, **PLAIN)
    result = run(picture, plain, corners(*window, flip=flip), numbers())[0]
    with Image.open(picture) as image:
        expected = tv.resized_crop(image, *window, [SIZE, SIZE], InterpolationMode.BICUBIC)
    expected = np.asarray(tv.hflip(expected) if flip else expected)
    # Near the window's border DALI filters the pixels beyond it, where torchvision repeats those inside.
    assert difference(result, expected) < 0.7
    assert difference(result[4:-4, 4:-4], expected[4:-4, 4:-4]) < 0.5


@pytest.mark.parametrize(
    ("recipe", "values", "transform", "limit"),
    [
        ({"jitter_p": 1.0}, {"BRIGHTNESS": 1.3}, lambda im: tv.adjust_brightness(im, 1.3), 1),
        ({"jitter_p": 1.0}, {"BRIGHTNESS": 0.6}, lambda im: tv.adjust_brightness(im, 0.6), 1),
        ({"jitter_p": 1.0}, {"CONTRAST": 0.6}, lambda im: tv.adjust_contrast(im, 0.6), 1),
        ({"jitter_p": 1.0}, {"CONTRAST": 1.4}, lambda im: tv.adjust_contrast(im, 1.4), 1),
        ({"jitter_p": 1.0}, {"SATURATION": 0.8}, lambda im: tv.adjust_saturation(im, 0.8), 1),
        ({"jitter_p": 1.0}, {"SATURATION": 1.2}, lambda im: tv.adjust_saturation(im, 1.2), 1),
        ({"gray": 1.0}, {"SATURATION": 0.0}, lambda im: tv.to_grayscale(im, 3), 1),
        ({"solarize": 1.0}, {"SOLARIZE": 1}, lambda im: tv.solarize(im, 128), 0.6),
        (
            {"blur": (1, 1, 1)},
            {"BLUR": 1, "SIGMA": 1.2},
            lambda im: im.filter(ImageFilter.GaussianBlur(1.2)),
            1,
        ),
        (
            {"blur": (1, 1, 1)},
            {"BLUR": 1, "SIGMA": 1.9},
            lambda im: im.filter(ImageFilter.GaussianBlur(1.9)),
            1,
        ),
        # The hue turns in YIQ rather than HSV: alike for small turns of pale colors, not the same.
        ({"jitter_p": 1.0}, {"HUE": 36}, lambda im: tv.adjust_hue(im, 0.1), 25),
    ],
)
def test_against_torchvision(picture, recipe, values, transform, limit):
    result, base = both(picture, Crops(global_size=SIZE, local_crops=0, **{**PLAIN, **recipe}), **values)
    changed = transform(base)
    assert difference(result, changed) < limit
    assert difference(np.asarray(base, np.float64), changed) > 2 * min(
        limit, 1
    )  # the operation does something


def test_hue_turns_the_way_torchvision_does(picture):
    crops = Crops(global_size=SIZE, local_crops=0, **{**PLAIN, "jitter_p": 1.0})
    for turn in (0.1, -0.1):
        result, base = both(picture, crops, HUE=360 * turn)
        right, wrong = (difference(result, tv.adjust_hue(base, angle)) for angle in (turn, -turn))
        assert right < wrong / 2


def test_gates_that_are_shut_change_nothing(picture):
    everything = Crops(global_size=SIZE, local_crops=0)
    result, base = both(picture, everything, SIGMA=2.0)
    assert difference(result, base) < 0.6


@pytest.mark.parametrize("shape", [(90, 120), (500, 375), (40, 100), (3, 2)])
def test_window_law_is_torchvisions(shape):
    crops = Crops(global_scale=(0.3, 1.0), local_scale=(0.05, 0.3), local_crops=1, flip=0)
    uniforms = np.random.default_rng(0).random((4000, 3, multicrop.DRAWS), np.float32)
    windows = multicrop.crop_windows(crops, np.tile(shape, (4000, 1)), uniforms)
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    for view, scale in ((0, (0.3, 1.0)), (1, (0.3, 1.0)), (2, (0.05, 0.3))):
        y, x, y_end, x_end = windows[:, view].T
        assert y.min() >= 0
        assert x.min() >= 0
        assert y_end.max() <= shape[0]
        assert x_end.max() <= shape[1]
        expected = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
        for mine, other in zip((y, x, y_end - y, x_end - x), expected.T, strict=True):
            assert largest_gap(mine, other) < 1.95 * np.sqrt(2 / 4000)  # Kolmogorov–Smirnov at 0.1 %


def test_the_far_corner_is_inside():
    """The largest number that can be drawn is just below 1."""
    crops = Crops(global_scale=(0.3, 1.0))
    uniforms = np.full((1, 12, multicrop.DRAWS), np.nextafter(np.float32(1), np.float32(0)))
    for side in (1, 7, 375, 65_535):
        windows = multicrop.crop_windows(crops, np.array([[side, side]]), uniforms)
        assert windows.max() <= side


def test_numbers_hold_windows_as_shares_of_the_sides():
    uniforms = np.random.default_rng(0).random((9, 12, multicrop.DRAWS), np.float32)
    sizes = np.random.default_rng(1).integers(50, 500, (9, 2))
    pixels = multicrop.crop_windows(Crops(), sizes, uniforms)
    shares = multicrop.draw_crops(Crops(), sizes, uniforms)[..., : multicrop.CORNERS]
    np.testing.assert_allclose(shares * np.tile(sizes, 2)[:, None], pixels, atol=1e-3)


def test_flips_are_as_often_as_asked():
    uniforms = np.random.default_rng(0).random((4000, 2, multicrop.DRAWS), np.float32)
    windows = multicrop.crop_windows(Crops(flip=0.3, local_crops=0), np.full((4000, 2), 50), uniforms)
    assert (windows[..., 1] > windows[..., 3]).mean() == pytest.approx(0.3, abs=0.02)


def largest_gap(a, b):
    """Kolmogorov–Smirnov statistic of two samples of whole numbers."""
    grid = np.unique(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize("shape", [(20, 200), (200, 20)])
def test_windows_that_never_fit_fall_back_to_the_center(shape):
    uniforms = np.full((1, 2, multicrop.DRAWS), 0.5, np.float32)
    crops = Crops(local_crops=0, global_scale=(1, 1), flip=0)
    y, x, y_end, x_end = multicrop.crop_windows(crops, np.array([shape]), uniforms)[0, 0]
    expected = (0, 86, 20, 113) if shape == (20, 200) else (86, 0, 113, 20)
    assert (y, x, y_end, x_end) == expected


def test_how_often_things_happen():
    crops = Crops(flip=0.5, jitter_p=0.8, gray=0.2, blur=(1.0, 0.1, 0.5), solarize=0.2)
    drawn = multicrop.draw_crops(
        crops,
        np.full((4000, 2), 50),
        np.random.default_rng(0).random((4000, 12, multicrop.DRAWS), np.float32),
    )
    share = lambda index, view: drawn[:, view, index].mean()  # noqa: E731
    for view in (0, 1, 5):
        assert (drawn[:, view, multicrop.BRIGHTNESS] != 1).mean() == pytest.approx(0.8, abs=0.03)
        assert (drawn[:, view, multicrop.SATURATION] == 0).mean() == pytest.approx(0.2, abs=0.03)
        assert np.abs(drawn[:, view, multicrop.HUE]).max() == pytest.approx(36, abs=0.5)
        factors = drawn[:, view, multicrop.CONTRAST]
        assert (factors.min(), factors.max()) == pytest.approx((0.6, 1.4), abs=0.01)
    assert [share(multicrop.BLUR, view) for view in (0, 1, 5)] == pytest.approx([1.0, 0.1, 0.5], abs=0.03)
    assert [share(multicrop.SOLARIZE, view) for view in (0, 1, 5)] == pytest.approx([0.0, 0.2, 0.0], abs=0.03)
