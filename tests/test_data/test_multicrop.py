"""The graph against torchvision, operation by operation, on the 0–255 scale."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the data pipeline needs DALI")
pytest.importorskip("torchvision", reason="torchvision is what the pipeline is held against")
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from bincomm.data import multicrop
from bincomm.data.crops import Crops

SIZE = 64
PLAIN = {"flip": 0.0, "jitter_p": 0.0, "grey": 0.0, "blur": (0.0, 0.0, 0.0), "solarise": 0.0}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A smooth coloured picture with edges, as PNG (so that no decoder plays a part)."""
    y, x = np.mgrid[0:150, 0:200] / 30
    channels = [np.sin(x + 0.5 * y), np.cos(1.3 * x - y), np.sin(x * y / 3)]
    pixels = np.stack([127 + 100 * c for c in channels], -1)
    pixels[40:80, 50:90] = (230, 40, 60)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def run(path, crops, windows, numbers):
    """Crops of one picture on the 0–255 scale: list of (S, S, 3), for V windows and their numbers."""
    arrays = (
        [np.frombuffer(str(path).encode(), np.uint8)],
        [windows.astype(np.float32)],
        [numbers.astype(np.float32)],
    )
    pipeline = multicrop.training_pipeline(crops, lambda: arrays, batch_size=1, threads=1, device_id=None)
    outputs = [np.array(output.as_tensor())[0].transpose(1, 2, 0) for output in pipeline.run()]
    return [output * multicrop.STD + multicrop.MEAN for output in outputs]


def window(area=1.0, ratio=1.0, y=0.0, x=0.0):
    tries = np.tile([np.sqrt(area), np.sqrt(ratio)], (multicrop.TRIES, 1))
    return np.stack([np.concatenate([tries, [[y, x]]])] * 2)


def numbers(**values):
    row = np.zeros(8)
    row[[multicrop.BRIGHTNESS, multicrop.CONTRAST, multicrop.SATURATION]] = 1
    for name, value in values.items():
        row[getattr(multicrop, name)] = value
    return np.stack([row, row])


def both(picture, crops, **values):
    """Our global 2 with these numbers, and the plain crop that torchvision is to work on."""
    plain = Crops(global_size=SIZE, local_crops=0, **PLAIN)
    ours = run(picture, crops, window(0.5), numbers(**values))[1]
    base = run(picture, plain, window(0.5), numbers())[1]
    return ours, Image.fromarray(base.round().clip(0, 255).astype(np.uint8))


def difference(ours, theirs):
    return np.abs(ours - np.asarray(theirs, dtype=np.float64)).mean()


@pytest.mark.parametrize("area", [0.05, 0.5, 0.7])
def test_crop_and_resize(picture, area):
    plain = Crops(global_size=SIZE, local_crops=0, **PLAIN)
    ours = run(picture, plain, window(area, 1.2, 0.3, 0.6), numbers())[0]
    side = np.sqrt(150 * 200 * area)
    h, w = (int(np.floor(v + 0.5)) for v in (side / np.sqrt(1.2), side * np.sqrt(1.2)))
    y, x = int(0.3 * (150 - h + 1)), int(0.6 * (200 - w + 1))
    with Image.open(picture) as image:
        theirs = tv.resized_crop(image, y, x, h, w, [SIZE, SIZE], InterpolationMode.BICUBIC)
    assert difference(ours, theirs) < 0.5


@pytest.mark.parametrize(
    ("recipe", "values", "transform", "limit"),
    [
        ({"jitter_p": 1.0}, {"BRIGHTNESS": 1.3}, lambda im: tv.adjust_brightness(im, 1.3), 1),
        ({"jitter_p": 1.0}, {"BRIGHTNESS": 0.6}, lambda im: tv.adjust_brightness(im, 0.6), 1),
        ({"jitter_p": 1.0}, {"CONTRAST": 0.6}, lambda im: tv.adjust_contrast(im, 0.6), 1),
        ({"jitter_p": 1.0}, {"CONTRAST": 1.4}, lambda im: tv.adjust_contrast(im, 1.4), 1),
        ({"jitter_p": 1.0}, {"SATURATION": 0.8}, lambda im: tv.adjust_saturation(im, 0.8), 1),
        ({"jitter_p": 1.0}, {"SATURATION": 1.2}, lambda im: tv.adjust_saturation(im, 1.2), 1),
        ({"grey": 1.0}, {"SATURATION": 0.0}, lambda im: tv.to_grayscale(im, 3), 1),
        ({"solarise": 1.0}, {"SOLARISE": 1}, lambda im: tv.solarize(im, 128), 0.6),
        ({"flip": 1.0}, {"FLIP": 1}, tv.hflip, 0.6),
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
        # The hue turns in YIQ rather than HSV: alike for small turns of pale colours, not the same.
        ({"jitter_p": 1.0}, {"HUE": 36}, lambda im: tv.adjust_hue(im, 0.1), 25),
    ],
)
def test_against_torchvision(picture, recipe, values, transform, limit):
    ours, base = both(picture, Crops(global_size=SIZE, local_crops=0, **{**PLAIN, **recipe}), **values)
    changed = transform(base)
    assert difference(ours, changed) < limit
    assert difference(np.asarray(base, np.float64), changed) > 2 * min(
        limit, 1
    )  # the operation does something


def test_hue_turns_the_way_torchvision_does(picture):
    crops = Crops(global_size=SIZE, local_crops=0, **{**PLAIN, "jitter_p": 1.0})
    for turn in (0.1, -0.1):
        ours, base = both(picture, crops, HUE=360 * turn)
        assert difference(ours, tv.adjust_hue(base, turn)) < difference(ours, tv.adjust_hue(base, -turn)) / 2


def test_gates_that_are_shut_change_nothing(picture):
    everything = Crops(global_size=SIZE, local_crops=0)
    ours, base = both(picture, everything, SIGMA=2.0)
    assert difference(ours, base) < 0.6


def test_window_law_is_torchvisions(tmp_path):
    """Sizes and places of many windows, read off a picture whose pixels tell their place."""
    height, width, count = 90, 120, 400
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width)[None]
    path = tmp_path / "place.png"
    Image.fromarray(pixels).save(path)
    crops = Crops(global_size=96, local_crops=0, global_scale=(0.3, 1.0), **PLAIN)
    windows, _ = multicrop.draw(crops, count, np.random.default_rng(0))
    arrays = (
        [np.frombuffer(str(path).encode(), np.uint8)] * count,
        list(windows),
        [numbers().astype(np.float32)] * count,
    )
    pipeline = multicrop.training_pipeline(crops, lambda: arrays, batch_size=count, threads=2, device_id=None)
    ours = []
    for output in np.array(pipeline.run()[0].as_tensor()):
        # The mean of a linear ramp is its middle, its slope over the 96 output pixels the window's size.
        crop = output.transpose(1, 2, 0) * multicrop.STD + multicrop.MEAN
        for axis, ramp in ((0, crop[..., 0].mean(1)), (1, crop[..., 1].mean(0))):
            ours.append((axis, (ramp[-10] - ramp[10]) * 96 / 76, ramp.mean()))
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    for axis in (0, 1):
        sizes = [[size for a, size, _ in ours if a == axis], [t[2 + axis] for t in theirs]]
        middles = [[m for a, _, m in ours if a == axis], [t[axis] + (t[2 + axis] - 1) / 2 for t in theirs]]
        for mine, other in (sizes, middles):
            assert largest_gap(mine, other) < 1.95 * np.sqrt(1 / len(mine) + 1 / len(other))  # KS at 0.1 %


def largest_gap(a, b):
    """Kolmogorov–Smirnov statistic; half a pixel of slack, for windows are whole pixels on one side only."""
    grid = np.sort(np.concatenate([a, b])) + 0.5
    return max(
        abs(np.searchsorted(np.sort(a), g + 1e-9) / len(a) - np.searchsorted(np.sort(b), g + 1e-9) / len(b))
        for g in grid
    )


@pytest.mark.parametrize("shape", [(20, 200), (200, 20)])
def test_windows_that_never_fit_fall_back_to_the_centre(tmp_path, shape):
    height, width = shape
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width)[None]
    path = tmp_path / "long.png"
    Image.fromarray(pixels).save(path)
    plain = Crops(global_size=32, local_crops=0, **PLAIN)
    crop = run(path, plain, window(1.0, 1.0), numbers())[0]
    short, long = (0, 1) if height < width else (1, 0)
    assert crop[..., short].mean() == pytest.approx(9.5, abs=0.6)
    assert crop[..., long].mean() == pytest.approx(99.5, abs=1)
    reach = crop[..., long].max() - crop[..., long].min()
    assert reach == pytest.approx(20 * 4 / 3, abs=2)


def test_how_often_things_happen():
    crops = Crops(flip=0.5, jitter_p=0.8, grey=0.2, blur=(1.0, 0.1, 0.5), solarise=0.2)
    _, drawn = multicrop.draw(crops, 4000, np.random.default_rng(0))
    share = lambda index, view: drawn[:, view, index].mean()  # noqa: E731
    for view in (0, 1, 5):
        assert share(multicrop.FLIP, view) == pytest.approx(0.5, abs=0.03)
        assert (drawn[:, view, multicrop.BRIGHTNESS] != 1).mean() == pytest.approx(0.8, abs=0.03)
        assert (drawn[:, view, multicrop.SATURATION] == 0).mean() == pytest.approx(0.2, abs=0.03)
        assert np.abs(drawn[:, view, multicrop.HUE]).max() == pytest.approx(36, abs=0.5)
        factors = drawn[:, view, multicrop.CONTRAST]
        assert (factors.min(), factors.max()) == pytest.approx((0.6, 1.4), abs=0.01)
    assert [share(multicrop.BLUR, view) for view in (0, 1, 5)] == pytest.approx([1.0, 0.1, 0.5], abs=0.03)
    assert [share(multicrop.SOLARISE, view) for view in (0, 1, 5)] == pytest.approx([0.0, 0.2, 0.0], abs=0.03)
