"""The graph against torchvision, operation by operation, on the 0–255 scale."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from bincomm.data import multicrop
from bincomm.data.crops import Crops
from bincomm.data.loader import Loader
from bincomm.data.order import Order
from bincomm.data.sources import Files, Source

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
    return render(path, crops, np.concatenate([window, numbers], 1)[None])[0]


def render(path, crops, numbers):
    """Crops of one picture on the 0–255 scale: a list of (S, S, 3) for each of the n rows of numbers."""
    arrays = [np.fromfile(path, np.uint8)] * len(numbers), list(numbers.astype(np.float32))
    pipeline = multicrop.training_pipeline(
        crops, lambda: arrays, batch_size=len(numbers), threads=1, device_id=None
    )
    groups = [np.array(output.as_tensor()) for output in pipeline.run()]
    return [
        [255 * (view.transpose(1, 2, 0) * crops.std + crops.mean) for group in groups for view in group[row]]
        for row in range(len(numbers))
    ]


def draw(crops, rows, **draws):
    """Numbers of these many rows, all of the same window, in which the draws named have these values."""
    uniforms = np.tile(np.random.default_rng(4).random((1, crops.views, multicrop.DRAWS)), (rows, 1, 1))
    for name, values in draws.items():
        uniforms[..., getattr(multicrop, name)] = np.asarray(values)[:, None]
    return multicrop.draw_crops(crops, np.array([[150, 200]] * rows), uniforms)


def test_colors_are_normalized_as_asked(picture):
    """Twice the deviation and another mean, of the same pixels."""
    window, values = [(0, 0, 100, 100)] * 2, numbers(SIGMA=1)
    options = {"global_size": SIZE, "local_crops": 0, **PLAIN}
    plain = run(picture, Crops(**options), window, values)
    other = run(picture, Crops(**options, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0)), window, values)
    assert np.ptp(plain) > 100
    np.testing.assert_allclose(plain, other, atol=1e-3)


def corners(y=20, x=30, h=110, w=120, flip=False):
    left, right = (x + w, x) if flip else (x, x + w)
    return [[y, left, y + h, right]] * 2


def numbers(**values):
    row = np.zeros(multicrop.NUMBERS)
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


# As they were before vertical flips, right angles, rotations, shears and posterizing came.
STORED_NUMBERS = [
    [0.061333332, 0.126, 0.9573333, 0.802, 0.6288694, 1.2572188, 0, -19.340118, 1, 0.5390026, 0],
    [0.112, 0, 0.88, 0.732, 1.0692333, 1.0683999, 0, -11.8726635, 0, 1.557297, 0],
    [0.38933334, 0.74, 0.9306667, 0.224, 0.8472683, 0.6662281, 1.0352699, -27.854126, 1, 1.3109925, 0],
]
STORED_PIXELS = [  # red of two crops and of the local one
    [[162, 142, 101, 82], [147, 129, 95, 79], [116, 104, 84, 75], [100, 92, 78, 73]],
    [[102, 26, 120, 31], [109, 45, 92, 69], [69, 84, 26, 78], [42, 127, 40, 47]],
    [[114, 67, 90], [146, 100, 89], [174, 138, 103]],
]


def test_the_crops_of_a_seed_have_stayed_the_same(picture):
    """Old runs resume: what came later takes no random number from what was there."""
    crops = Crops(global_size=24, local_crops=1, local_size=16)
    slots, sizes = np.array([0, 7, 22]), np.array([[40, 60], [375, 500], [33, 20]])
    uniforms = multicrop.by_crop(Order([23], None, 5).uniforms(2, slots, 3 * multicrop.DRAWS), 3)
    numbers = multicrop.draw_crops(crops, sizes, uniforms)
    np.testing.assert_allclose(numbers[1, :, : multicrop.SOLARIZE + 1], STORED_NUMBERS, rtol=2e-7)
    assert not numbers[..., multicrop.SOLARIZE + 1 :].any()
    tiny = Crops(global_size=4, local_crops=1, local_size=3)
    loader = Loader(
        Source(Files([str(picture)])), tiny, batch_size=1, seed=5, device=torch.device("cpu"), threads=1
    )
    globals_, locals_ = [loader.next() for _ in range(3)][-1]
    for crop, expected in zip([*globals_[0], *locals_[0]], STORED_PIXELS, strict=True):
        red = 255 * (crop[0].numpy() * tiny.std[0] + tiny.mean[0])
        np.testing.assert_array_equal(red.round(), expected)


def test_random_numbers_by_crop():
    """The first block of all crops, then the second one of all."""
    first, second = multicrop.BLOCKS
    result = multicrop.by_crop(np.arange(2 * 3 * multicrop.DRAWS).reshape(2, -1), 3)
    assert result.shape == (2, 3, multicrop.DRAWS)
    np.testing.assert_array_equal(result[0, 1, :first], first + np.arange(first))
    np.testing.assert_array_equal(result[0, 1, first:], 3 * first + second + np.arange(second))
    np.testing.assert_array_equal(result[1], result[0] + 3 * multicrop.DRAWS)


def test_flips_and_right_angles_are_exact(picture):
    options = {**PLAIN, "global_size": SIZE, "local_crops": 1, "local_size": 16}
    plain = render(picture, Crops(**options), draw(Crops(**options), 1))[0]
    quarters = np.arange(4)
    for flip, flip_vertical in np.ndindex(2, 2):
        crops = Crops(**{**options, "flip": flip, "flip_vertical": flip_vertical, "right_angles": 0.5})
        gate, angle = np.where(quarters, 0.1, 0.9), np.array([0, 0.1, 0.5, 0.9])
        rows = render(picture, crops, draw(crops, 4, TURNS_DRAW=gate, QUARTERS_DRAW=angle))
        for turns, views in enumerate(rows):
            for view, expected in zip(views, plain, strict=True):
                expected = expected[:: -1 if flip_vertical else 1, :: -1 if flip else 1]
                np.testing.assert_array_equal(view.round(), np.rot90(expected, turns).round())


@pytest.mark.parametrize(
    ("rotate", "shear"), [(30, 0), (-30, 0), (90, 0), (180, 0), (0, 20), (0, -20), (25, 15), (-70, 30)]
)
def test_rotation_and_shear_against_torchvision(picture, rotate, shear):
    """Of what is around the window, at the same scale."""
    crops = Crops(**PLAIN, global_size=SIZE, global_scale=(0.1, 0.1), local_crops=0, rotate=180, shear=45)
    # In the middle of the image, so that there is room.
    uniforms = np.full((1, 2, multicrop.DRAWS), 0.5)
    y, x, y_end, x_end = multicrop.crop_windows(Crops(**PLAIN, global_scale=(0.1, 0.1), local_crops=0),
        np.array([[150, 200]]), uniforms)[0, 0]  # fmt: skip
    uniforms[..., multicrop.ANGLE_DRAW] = 0.5 + rotate / 360
    uniforms[..., multicrop.SHEAR_DRAW] = 0.5 + shear / 90
    numbers = multicrop.draw_crops(crops, np.array([[150, 200]]), uniforms)
    ((result, _),) = render(picture, crops, numbers)
    h, w = y_end - y, x_end - x
    center_y, center_x = (numbers[0, 0, :2] + numbers[0, 0, 2:4]) / 2 * (150, 200)
    double = [[center_y - h, center_x - w, center_y + h, center_x + w]] * 2
    around = run(
        picture, Crops(**PLAIN, global_size=2 * SIZE, local_crops=0), double, [[1, 1, 1] + [0] * 14] * 2
    )
    image = torch.from_numpy(np.stack(around[:1])).permute(0, 3, 1, 2)
    bilinear = InterpolationMode.BILINEAR
    expected = tv.affine(image, -rotate, [0, 0], 1.0, [shear, 0], bilinear)  # clockwise
    expected = tv.center_crop(expected, [SIZE, SIZE])[0].permute(1, 2, 0).numpy()
    assert difference(result, expected) < 1.5
    wrong = tv.affine(image, rotate + 5, [0, 0], 1.0, [-shear, 0], bilinear)
    wrong = tv.center_crop(wrong, [SIZE, SIZE])[0].permute(1, 2, 0).numpy()
    assert difference(result, wrong) > 5


def test_rotated_crops_show_nothing_beyond_the_image():
    """Their windows are inside the image, their corners inside the windows, and touch the border of these."""
    rng = np.random.default_rng(0)
    crops = Crops(global_size=40, local_size=16, local_crops=3, rotate=180, shear=30, flip=0)
    sizes = rng.integers(1, 300, (500, 2))
    uniforms = rng.random((500, 5, multicrop.DRAWS), np.float32)
    numbers = multicrop.draw_crops(crops, sizes, uniforms).astype(np.float64)
    assert numbers[..., : multicrop.CORNERS].min() > -1e-6
    assert numbers[..., : multicrop.CORNERS].max() < 1 + 1e-6
    pixels = numbers[..., [multicrop.WIDTH, multicrop.HEIGHT]]
    matrix = numbers[..., multicrop.MATRIX :].reshape(500, 5, 2, 3)
    side = np.array([40, 40, 16, 16, 16])
    corners = np.array([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).T
    scaled = np.concatenate([matrix[..., :2] * side[:, None, None], matrix[..., 2:]], -1)
    places = scaled @ corners  # (x, y) of each corner in the resized window
    np.testing.assert_allclose(places.min(-1), 0, atol=1e-3)
    np.testing.assert_allclose(places.max(-1), pixels, atol=1e-3)
    # Shears and rotations change no area, but for the rounding of the resized window's sides.
    assert np.abs(np.linalg.det(matrix[..., :2]) - 1).max() < 2 / 16


def test_the_area_of_a_rotated_crop_is_that_drawn_where_there_is_room():
    uniforms = np.random.default_rng(0).random((2000, 2, multicrop.DRAWS), np.float32)
    sizes = np.full((2000, 2), 400)
    small, large = ({"global_scale": scale, "local_crops": 0, "flip": 0} for scale in ((0.1, 0.2), (1, 1)))
    area = lambda windows: np.prod(windows[..., 2:] - windows[..., :2], axis=-1)  # noqa: E731
    plain = area(multicrop.crop_windows(Crops(**small), sizes, uniforms))
    around = area(multicrop.crop_windows(Crops(**small, rotate=180), sizes, uniforms))
    angle = np.pi * (2 * uniforms[..., multicrop.ANGLE_DRAW] - 1)
    np.testing.assert_allclose(around / plain, 1 + np.abs(np.sin(2 * angle)), rtol=1e-4)
    whole = area(multicrop.crop_windows(Crops(**large, rotate=180), sizes, uniforms))
    assert whole.max() <= 400**2 * (1 + 1e-6)


def test_posterizing_keeps_the_highest_bits(picture):
    options = {"global_size": SIZE, "local_crops": 0, **PLAIN}
    crops = Crops(**options, posterize=0.5)
    plain = render(picture, Crops(**options), draw(crops, 1))[0][1].round().astype(int)
    gate, bits = [0.6, 0.4, 0.4, 0.4, 0.4], [0.1, 0.1, 0.3, 0.6, 0.9]
    rows = render(picture, crops, draw(crops, 5, POSTERIZE_DRAW=gate, BITS_DRAW=bits))
    for (_, result), lost in zip(rows, (0, 4, 3, 2, 1), strict=True):
        np.testing.assert_array_equal(result.round(), plain >> lost << lost)


def test_how_often_crops_are_turned_and_posterized():
    crops = Crops(flip=0, flip_vertical=0.3, right_angles=0.6, posterize=0.2, local_crops=1)
    uniforms = np.random.default_rng(0).random((4000, 3, multicrop.DRAWS), np.float32)
    numbers = multicrop.draw_crops(crops, np.full((4000, 2), 50), uniforms)
    plain = multicrop.draw_crops(
        Crops(flip=0, flip_vertical=0.3, local_crops=1), np.full((4000, 2), 50), uniforms
    )
    assert (plain[..., 0] > plain[..., 2]).mean() == pytest.approx(0.3, abs=0.02)
    transposed = numbers[..., multicrop.TRANSPOSE] == 1
    flipped, upside_down = (numbers[..., i] > numbers[..., i + 2] for i in (1, 0))
    upside_down ^= plain[..., 0] > plain[..., 2]
    for case in (transposed & flipped, transposed & upside_down, ~transposed & flipped & upside_down):
        assert case.mean() == pytest.approx(0.2, abs=0.02)
    masks, counts = np.unique(numbers[..., multicrop.POSTERIZE], return_counts=True)
    assert masks.tolist() == [0, 240, 248, 252, 254]
    assert counts / counts.sum() == pytest.approx([0.8, 0.05, 0.05, 0.05, 0.05], abs=0.02)
    last = np.full((1, 3, multicrop.DRAWS), np.nextafter(np.float32(1), np.float32(0)))
    ever = Crops(local_crops=1, right_angles=1, posterize=1)
    numbers = multicrop.draw_crops(ever, np.array([[50, 50]]), last)
    assert numbers[0, 0, multicrop.TRANSPOSE] == 1  # 270 degrees, not 360
    assert numbers[0, 0, multicrop.POSTERIZE] == 254
