import csv
import itertools
import time

import numpy as np
import pytest
from PIL import Image
from scenes import COLORS, FACTORS, JITTER, RADII, draw_scenes, read_factors, render, write_scenes
from scipy.stats import chi2_contingency, chisquare

NAMES = list(FACTORS)
SHAPE, COLOR, SIZE, PLACE, TEXTURE, BACKGROUND = range(6)


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(3000, 7)


def colored(images):
    """(..., S, S) bool: where images are not gray, which only objects are not."""
    return np.ptp(images.astype(int), axis=-1) > 25


def picture(seed=3, **values):
    """A scene of the values named, and the first of each other factor."""
    numbers = [FACTORS[name].index(values.get(name, FACTORS[name][0])) for name in NAMES]
    return render(numbers, 64, np.random.default_rng(seed))


def test_factors_are_uniform_and_independent(scenes):
    for column, values in enumerate(FACTORS.values()):
        assert chisquare(np.bincount(scenes.factors[:, column], minlength=len(values))).pvalue > 0.01
    for one, other in itertools.combinations(range(6), 2):
        table = np.zeros((len(FACTORS[NAMES[one]]), len(FACTORS[NAMES[other]])))
        np.add.at(table, (scenes.factors[:, one], scenes.factors[:, other]), 1)
        assert chi2_contingency(table).pvalue > 0.001, (NAMES[one], NAMES[other])  # of 15 tests


def test_the_same_seed_draws_the_same(scenes):
    again = draw_scenes(20, 7)
    assert (again.images == scenes.images[:20]).all()
    assert (again.factors == scenes.factors[:20]).all()
    other = draw_scenes(20, 8)
    assert (other.factors != again.factors).any()
    assert (other.images != again.images).any((1, 2, 3)).all()
    assert draw_scenes(0, 7).images.shape == (0, 64, 64, 3)
    assert draw_scenes(2, 7, size=32).images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("name", NAMES)
def test_each_factor_alone_changes_the_picture(name):
    pictures = [picture(**{name: value}).astype(int) for value in FACTORS[name]]
    for one, other in itertools.combinations(pictures, 2):
        changed = np.abs(one - other).max(-1) > 20
        assert changed.mean() > 0.005
        if name in ("shape", "color", "size", "texture"):  # nothing but the object changes
            assert not changed[24:].any()
            assert not changed[:, 24:].any()


def test_other_properties_differ_between_scenes():
    for background in FACTORS["background"]:
        assert (picture(1, background=background) != picture(2, background=background)).any()


def test_edges_are_smooth():
    plain = picture(size="large")
    object_, ground = (COLORS[0] * 255).round(), plain[-1, -1]
    between = ~((plain == object_).all(-1) | (plain == ground).all(-1))
    assert 20 < between.sum() < 100
    assert ((plain >= np.minimum(object_, ground)) & (plain <= np.maximum(object_, ground))).all()


def test_objects_stay_in_their_cells(scenes):
    for image, factors in zip(scenes.images, scenes.factors, strict=True):
        rows, columns = colored(image).nonzero()
        row, column = divmod(factors[PLACE], 3)
        assert 64 / 3 * row - 1 <= rows.min() <= rows.max() <= 64 / 3 * (row + 1)
        assert 64 / 3 * column - 1 <= columns.min() <= columns.max() <= 64 / 3 * (column + 1)
        assert np.ptp(rows) <= 2 * RADII[factors[SIZE]] * 64 + 1
    assert 0 < JITTER < 1 / 6


@pytest.mark.slow
def test_factors_can_be_measured_in_the_pixels(scenes):
    """By simple means each: the object's mean color, its middle, its extent, the grays at the border."""
    images, factors = scenes.images[:1000] / 255, scenes.factors[:1000]
    mask = colored(scenes.images[:1000])[..., None]
    mean = (images * mask).sum((1, 2)) / mask.sum((1, 2))
    hues = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    colors = COLORS / np.linalg.norm(COLORS, axis=1, keepdims=True)
    assert ((hues @ colors.T).argmax(1) == factors[:, COLOR]).mean() > 0.99

    rows, columns = (mask[..., 0].any(axis) for axis in (2, 1))
    middles = [(line.argmax(1) + 63 - line[:, ::-1].argmax(1)) / 2 for line in (rows, columns)]
    cells = [np.floor(middle / (64 / 3)).astype(int) for middle in middles]
    assert (3 * cells[0] + cells[1] == factors[:, PLACE]).mean() > 0.99

    extent = columns.sum(1)
    sizes = np.abs(extent[:, None] - 2 * 64 * np.array(RADII)).argmin(1)
    assert (sizes == factors[:, SIZE]).mean() > 0.8  # a square is narrower, stripes cut corners

    grays = images.mean(-1)[:, 1::21]  # rows between the cells; not all are free of the object
    spread = np.median(grays.std(-1), 1)
    flat = spread < 0.01
    assert (flat | (factors[:, BACKGROUND] != 0)).mean() > 0.99
    noisy = np.median(np.abs(np.diff(grays, axis=-1)), (1, 2)) > 0.05
    assert (noisy == (factors[:, BACKGROUND] == 2)).mean() > 0.99

    brightness = (images * mask).max(-1).sum((1, 2)) / mask.sum((1, 2, 3))
    assert brightness[factors[:, TEXTURE] == 0].min() > brightness[factors[:, TEXTURE] > 0].mean()


def test_shapes_differ_in_their_area():
    areas = {}
    for shape in FACTORS["shape"]:
        image = picture(shape=shape, size="large", place="center")
        areas[shape] = colored(image).sum() / (2 * RADII[-1] * 64) ** 2
    ordered = sorted(areas, key=areas.get)
    assert ordered[-1] in ("circle", "square")
    assert min(areas.values()) > 0.25


def test_values_and_combinations_held_out():
    star, red_ring = {"shape": "star"}, {"shape": "ring", "color": "red"}
    scenes = draw_scenes(1500, 0, 16, without=[star, red_ring])
    shapes, colors = scenes.factors[:, SHAPE], scenes.factors[:, COLOR]
    ring = FACTORS["shape"].index("ring")
    assert not (shapes == FACTORS["shape"].index("star")).any()
    assert not ((shapes == ring) & (colors == 0)).any()
    assert ((shapes == ring) & (colors == 1)).any()
    assert ((shapes != ring) & (colors == 0)).any()
    everything = draw_scenes(1500, 0, 16)
    allowed = (everything.factors == scenes.factors).all(1)
    assert (everything.images[allowed] == scenes.images[allowed]).all()  # the others are as they were
    assert 0.7 < allowed.mean() < 0.9


def test_folders_and_table(tmp_path):
    unseen = [{"shape": "star"}, {"shape": "ring"}]
    write_scenes(tmp_path / "scenes", 80, 5, test_count=60, without=unseen)
    train, test = (
        {folder.name for folder in (tmp_path / "scenes" / part).iterdir()} for part in ("train", "test")
    )
    assert train == set(FACTORS["shape"]) - {"star", "ring"}
    assert test == set(FACTORS["shape"])
    with open(tmp_path / "scenes" / "factors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 140
    assert list(rows[0]) == ["path", *NAMES]
    factors = read_factors(tmp_path / "scenes")
    expected = draw_scenes(60, 11)
    for number, row in enumerate(rows[80:]):
        assert row["path"] == f"test/{row['shape']}/{number:05}.png"
        assert factors[row["path"]] == expected.factors[number].tolist()
        assert (np.asarray(Image.open(tmp_path / "scenes" / row["path"])) == expected.images[number]).all()


def test_what_is_wrong_is_named():
    for without, message in (
        ({"form": "star"}, "without: expected factors of shape, color, .* got 'form'"),
        ({"shape": "heart"}, "without: expected a shape of circle, .* got 'heart'"),
        ({}, "without: expected some scenes left to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_scenes(1, 0, without=[without])
    with pytest.raises(ValueError, match="some scenes left"):
        draw_scenes(1, 0, without=[{"size": size} for size in FACTORS["size"]])


def test_drawing_is_fast():
    """Hundreds a second of the processor's time, the best of three; twice as many on an idle machine."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        draw_scenes(100, 1)
        seconds.append(time.process_time() - started)
    assert 100 / min(seconds) > 250
