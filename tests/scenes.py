"""Simple scenes with known factors: one object on a background, for tests and benchmarks alone."""

import colorsys
import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

FACTORS: Mapping[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
    "color": ("red", "yellow", "green", "cyan", "blue", "magenta"),
    "size": ("small", "medium", "large"),
    "place": (
        "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
    ),
    "texture": ("plain", "stripes", "dots"),
    "background": ("plain", "gradient", "noise", "checks"),
}  # fmt: skip

FINER = 4  # objects are drawn at so many times the size, and reduced
RADII = (6 / 64, 8 / 64, 10 / 64)  # of the sizes, as shares of the image's side
JITTER = 1 / 6 - RADII[-1]  # of the object in its cell: even a large one stays inside
PERIOD = 5 / 64  # of stripes and dots
DARK = 0.35  # brightness of stripes and dots; the object's color is 1
COLORS = np.array([colorsys.hsv_to_rgb(hue / 6, 0.8, 0.9) for hue in range(6)])
CORNERS: Mapping[str, np.ndarray] = {  # in units of the radius, y downwards
    "square": 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "star": np.array([(math.sin(turn), -math.cos(turn)) for turn in np.arange(10) * math.pi / 5])
    * np.tile([1, 0.42], 5)[:, None],
    "cross": np.array(
        [
            (-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35),
            (1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35),
        ]
    ),
}  # fmt: skip


class Scenes(NamedTuple):
    """Pictures (n, S, S, 3) uint8, and the values (n, F) int64 of their factors, which index `FACTORS`."""

    images: np.ndarray
    factors: np.ndarray


def draw_scenes(
    count: int, seed: int, size: int = 64, *, without: Sequence[Mapping[str, str]] = ()
) -> Scenes:
    """Draw scenes whose factors are independent and uniform.

    A scene has properties that are not factors, too: where in its cell the object lies, the phase of its
    texture, and the background's gray, direction and phase. Scene i depends only on the seed, i and
    `without`, so a larger set begins with the smaller one.

    Args:
        count: n.
        seed: at least 0.
        size: S, pixels a side.
        without: combinations that no scene shows: {"shape": "star"} no star, {"shape": "ring", "color":
            "red"} no red ring. The rest is uniform; the factors of a combination are then not quite
            independent.

    Raises:
        ValueError: there is no such factor or value, or nothing is left to draw.
    """
    held_out = [_as_indices(combination) for combination in without]
    _check_left(held_out)
    images = np.empty((count, size, size, 3), np.uint8)
    factors = np.empty((count, len(FACTORS)), np.int64)
    numbers = [len(values) for values in FACTORS.values()]
    for scene in range(count):
        generator = np.random.default_rng((seed, scene))
        while True:
            drawn = generator.integers(numbers)
            if not any(
                all(drawn[factor] == value for factor, value in combination.items())
                for combination in held_out
            ):
                break
        factors[scene] = drawn
        images[scene] = render(drawn, size, generator)
    return Scenes(images, factors)


def render(values: Iterable[int], size: int, generator: np.random.Generator) -> np.ndarray:
    """The picture (S, S, 3) uint8 of a scene with these values of the factors; its other properties come from
    the generator, and do not depend on the factors."""
    shape, color, large, place, texture, background = (int(value) for value in values)
    shift, phase = generator.uniform(-1, 1, 2), generator.uniform(0, 1, 2)
    picture = _background(FACTORS["background"][background], size, generator)[..., None].repeat(3, -1)

    radius = RADII[large] * size
    center = (np.array([place % 3, place // 3]) + 0.5) / 3 * size + shift * JITTER * size
    corner = np.floor(center - radius).astype(int)  # of the box around the object: x, y
    side = math.ceil(2 * radius) + 1
    body = _outline(FACTORS["shape"][shape], (center - corner) * FINER, radius * FINER, side * FINER)
    dark = body & _pattern(FACTORS["texture"][texture], side * FINER, PERIOD * size * FINER, phase)
    body, dark = (
        mask.reshape(side, FINER, side, FINER).mean((1, 3))[: size - corner[1], : size - corner[0], None]
        for mask in (body, dark)
    )
    box = picture[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
    box[:] = box * (1 - body) + COLORS[color] * (body - (1 - DARK) * dark)
    return (picture * 255).round().astype(np.uint8)


def write_scenes(
    folder: str | os.PathLike,
    count: int,
    seed: int,
    *,
    test_count: int | None = None,
    size: int = 64,
    without: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write scenes as PNG files train/SHAPE/NUMBER.png and test/SHAPE/NUMBER.png, and `factors.csv` with the
    path of each and the names of its values.

    Args:
        folder: made if it does not exist.
        count: training scenes.
        seed, size: see `draw_scenes`.
        test_count: test scenes, different from the training scenes; default a quarter of `count`.
        without: combinations that no training scene shows, see `draw_scenes`; test scenes show everything.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": draw_scenes(count, 2 * seed, size, without=without),
        "test": draw_scenes(count // 4 if test_count is None else test_count, 2 * seed + 1, size),
    }
    with open(folder / "factors.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *FACTORS])
        for part, scenes in parts.items():
            for number, (image, values) in enumerate(zip(*scenes, strict=True)):
                words = [names[value] for names, value in zip(FACTORS.values(), values, strict=True)]
                path = Path(part, words[0], f"{number:05}.png")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / path, compress_level=1)
                table.writerow([path, *words])


def read_factors(folder: str | os.PathLike) -> dict[str, list[int]]:
    """The values of the factors, which index `FACTORS`, of each picture that `write_scenes` wrote, by its
    path below the folder."""
    with open(Path(folder, "factors.csv"), newline="") as file:
        return {
            row["path"]: [names.index(row[factor]) for factor, names in FACTORS.items()]
            for row in csv.DictReader(file)
        }


def _as_indices(combination: Mapping[str, str]) -> dict[int, int]:
    """Indices of factors and of their values, in place of their names."""
    indices = {}
    for factor, value in combination.items():
        if factor not in FACTORS:
            raise ValueError(f"without: expected factors of {', '.join(FACTORS)}, got {factor!r}")
        if value not in FACTORS[factor]:
            raise ValueError(f"without: expected a {factor} of {', '.join(FACTORS[factor])}, got {value!r}")
        indices[list(FACTORS).index(factor)] = FACTORS[factor].index(value)
    return indices


def _check_left(held_out: Sequence[Mapping[int, int]]) -> None:
    values = np.indices([len(names) for names in FACTORS.values()]).reshape(len(FACTORS), -1)
    refused = np.zeros(values.shape[1], bool)
    for combination in held_out:
        refused |= np.all([values[factor] == value for factor, value in combination.items()], axis=0)
    if refused.all():
        raise ValueError("without: expected some scenes left to draw, got all of them held out")


def _background(kind: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """(S, S) grays from 0 to 1."""
    gray, turn, x, y = generator.uniform((0.4, 0, 0, 0), (0.6, 2 * math.pi, 1, 1))
    columns = np.arange(size) / size
    rows = columns[:, None]
    if kind == "plain":
        return np.full((size, size), gray)
    if kind == "gradient":
        return gray + 0.5 * ((columns - 0.5) * math.cos(turn) + (rows - 0.5) * math.sin(turn))
    if kind == "noise":
        return (gray + 0.12 * generator.standard_normal((size, size))).clip(0, 1)
    return gray + 0.15 * (1 - 2 * ((np.floor(8 * columns + 2 * x) + np.floor(8 * rows + 2 * y)) % 2))


def _outline(shape: str, center: np.ndarray, radius: float, side: int) -> np.ndarray:
    """(side, side) bool, true inside the shape."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse([*(center - radius), *(center + radius)], fill=1)
        if shape == "ring":
            draw.ellipse([*(center - 0.55 * radius), *(center + 0.55 * radius)], fill=0)
    else:
        draw.polygon([tuple(corner) for corner in center + radius * CORNERS[shape]], fill=1)
    return np.asarray(mask, bool)


def _pattern(texture: str, side: int, period: float, phase: np.ndarray) -> np.ndarray:
    """(side, side) bool, true where the texture is dark: nowhere, or in about half of the area."""
    columns = np.arange(side) / period
    rows = columns[:, None]
    if texture == "plain":
        return np.zeros((side, side), bool)
    if texture == "stripes":
        return (rows + columns + phase[0]) * math.sqrt(0.5) % 1 < 0.5
    x, y = (columns + phase[0]) % 1 - 0.5, (rows + phase[1]) % 1 - 0.5
    return x**2 + y**2 < 0.4**2
