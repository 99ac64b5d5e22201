"""Do dense bits help patches, at equal time? python -m benchmarks.dense RESULTS photographs=FOLDER

FOLDER has train and test, and in them a folder for each class. Writes RESULTS.json and RESULTS.md: a ViT-Ti
is trained without dense bits and with them, with every seed, for as many steps as take the same time by
speeds that are measured by turns, and measured by k-NN of images and by segmentation of scenes from patch
features, beside raw pixels and the untrained network. The scenes are composed of FOLDER's images, those to be
segmented of its test images: parts of up to four on a ground of smooth colors, each labeled with its class.
What was measured is not measured again.
"""

from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.learning import evaluation_images, thinned
from benchmarks.resumable import (
    Cell,
    Records,
    Session,
    create_parser,
    failures,
    given_keys,
    origin,
    pairs,
    table,
)
from benchmarks.speed import SPEED, in_words, keys_in_equal_time
from bincomm.building import create_networks
from bincomm.comparison import BEFORE, PIXELS, trained_network, training_seconds
from bincomm.configuration import configure
from bincomm.data.images import open_encoded
from bincomm.data.sources import Source
from bincomm.evaluation.dense import evaluate_segmentation
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.files import read_json_lines
from bincomm.patches import stride_of
from bincomm.pretraining import pretrain

KEYS: dict[str, Any] = {  # the mild crops of photos_cpu, as a short run needs
    "recipe": "photos_cpu",
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"patch_size": 8},
    "global_size": 64,
    "local_size": 32,
    "batch_size": 32,
}
MINUTES = 10.0  # of a run
WEIGHTS = (0.0, 1.0)  # of dense bits
SEEDS = 3
GALLERY, QUERIES = 5000, 1000  # images of k-NN, at most
SCENES = 400, 200  # to learn from, to segment
TILES = 2  # a side of a scene, each as large as a global crop
FILLED = 0.7  # probability that a tile has a part of an image
FIGURES = {  # of the page: a column each, and how many times the figure is shown
    "patches, k-NN mIoU %": (("segmentation", "knn"), 100),
    "patches, linear mIoU %": (("segmentation", "linear"), 100),
    "images, k-NN %": (("knn", "20"), 100),
    "bits heard": (("transmitted_bits",), 1),
    "of patches": (("dense_transmitted_bits",), 1),
    "steps": (("steps",), 1),
    "minutes": (("minutes",), 1),
}


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=1)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds; default: {SEEDS}")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=WEIGHTS, help=f"of dense bits; default: {WEIGHTS}"
    )
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=SCENES, help=f"to learn from, to segment; default: {SCENES}"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"of each run, about; default: {MINUTES:g}"
    )
    options = parser.parse_args()
    ((source, data),) = pairs(options.sources).items()
    session = Session("benchmarks.dense", options, page)
    given = {**KEYS, **given_keys(options)}
    keys = {f"dense {weight:g}": {"dense": weight} for weight in options.weights}
    record = {"source": source, "run": given, "weights": list(options.weights)}
    ways = {way: {**given, **own, "data": data} for way, own in keys.items()}
    lengths = keys_in_equal_time(session, "", record, ways, options.minutes)
    weights = {way: {**keys[way], **length} for way, length in lengths.items()}
    session.run(cells(source, data, given, weights, options.seeds, tuple(options.scenes)))
    return session.end()


def cells(
    source: str,
    data: str,
    given: dict[str, Any],
    weights: dict[str, dict[str, Any]],
    seeds: int,
    scenes: tuple[int, int],
) -> list[Cell]:
    """Raw pixels, the untrained network, and a run with the keys of each weight; seed by seed, so that the
    first seed already compares."""

    def cell(way: str, seed: int | None, measure: Any, **keys: Any) -> Cell:
        keys = {**given, "seed": seed or 0, **keys}
        record = {"source": source, "way": way, "seed": seed, "scenes": list(scenes), "run": keys}
        name = way if seed is None else f"{way}, seed {seed}"
        return Cell(name, record, partial(measure, {**keys, "data": data}, scenes), line)

    return [
        cell(PIXELS, None, raw_pixels),
        *(
            cell(way, seed, measure, **keys)
            for seed in range(seeds)
            for way, measure, keys in [
                (BEFORE, untrained, {}),
                *((way, trained, keys) for way, keys in weights.items()),
            ]
        ),
    ]


def raw_pixels(keys: dict[str, Any], scenes: tuple[int, int], folder: Path) -> dict[str, Any]:
    """The pixels of images and of patches."""
    config = configure(**keys, output=str(folder))
    device = evaluation_device(config)
    side = stride_of(create_networks(config, device)[1].backbone)
    patches = Pretrained(PIXELS, PatchPixels(side), None, config, device)
    return evaluate(Pretrained.of_pixels(config, device), patches, scenes, folder)


def untrained(keys: dict[str, Any], scenes: tuple[int, int], folder: Path) -> dict[str, Any]:
    """The network before training, which is the same whatever the weight."""
    config = configure(**keys, output=str(folder))
    device = evaluation_device(config)
    model = Pretrained.of(create_networks(config, device)[1], config, device)
    return evaluate(model, model, scenes, folder)


def trained(keys: dict[str, Any], scenes: tuple[int, int], folder: Path) -> dict[str, Any]:
    """The teacher at the end of a run."""
    config = configure(**keys, output=str(folder))
    pretrain(config)
    device = evaluation_device(config)
    model = Pretrained.of(trained_network(config, device), config, device)
    last = read_json_lines(folder / "metrics.jsonl")[-1]
    heard = {key: value for key, value in last.items() if key.endswith("transmitted_bits")}
    minutes = training_seconds(config) / 60
    return {**evaluate(model, model, scenes, folder), **heard, "steps": last["step"], "minutes": minutes}


def evaluate(
    of_images: Pretrained, of_patches: Pretrained, scenes: tuple[int, int], folder: Path
) -> dict[str, Any]:
    """k-NN of images, and segmentation of scenes by k-NN of patches and by a linear probe of them."""
    config = of_images.config
    gallery, queries = evaluation_images(config)
    knn = evaluate_reproducibly(of_images, thinned(gallery, GALLERY), thinned(queries, QUERIES), ("knn",))
    write_scenes(folder / "scenes", {"train": gallery, "val": queries}, scenes, config.global_size)
    segmentation = evaluate_segmentation(of_patches, folder / "scenes", size=TILES * config.global_size)
    return {
        "knn": knn["knn"],
        "queries": knn["query_images"],
        "gallery": knn["gallery_images"],
        "segmentation": {name: segmentation[name]["miou"] for name in ("knn", "linear")},
        "classes": segmentation["classes"],
    }


class PatchPixels(nn.Module):
    """The pixels of every patch, as a conv net's map."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.feature_info = side, ({"reduction": side},)

    def forward_features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 3·side², H/side, W/side)."""
        return F.pixel_unshuffle(images, self.side)


def write_scenes(folder: Path, sources: dict[str, Source], counts: tuple[int, int], side: int) -> None:
    """Write scenes of each source's images, and their masks, as `evaluate_segmentation` takes them; the same
    ones for the same images, numbers and size."""
    for (half, source), count in zip(sources.items(), counts, strict=True):
        for kind in ("images", "masks"):
            (folder / half / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, mask = compose(source, side, np.random.default_rng((half == "val", number)))
            picture.save(folder / half / "images" / f"{number:04}.png")
            mask.save(folder / half / "masks" / f"{number:04}.png")


def compose(source: Source, side: int, generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A scene, and its mask: 0 is the ground, c + 1 an ellipse cut out of an image of class c."""
    labels = source.labels
    assert labels is not None  # `evaluation_images` has seen to it

    def draw() -> tuple[Image.Image, int]:
        number = int(generator.integers(len(source.images)))
        return open_encoded(source.images.read(number)).convert("RGB"), int(labels[number])

    whole = TILES * side
    ground = draw()[0].resize((3, 3), Image.Resampling.BOX)  # its colors, without what it shows
    picture = ground.resize((whole, whole), Image.Resampling.BICUBIC)
    mask = Image.new("L", (whole, whole))
    for tile in range(TILES * TILES):
        if generator.random() > FILLED:
            continue
        image, label = draw()
        outline = Image.new("L", (side, side))
        radii = generator.uniform(0.3, 0.45, 2)
        center = 0.5 + generator.uniform(-1, 1, 2) * (0.48 - radii)
        ImageDraw.Draw(outline).ellipse([*(side * (center - radii)), *(side * (center + radii))], fill=255)
        corner = (tile % TILES * side, tile // TILES * side)
        picture.paste(image.resize((side, side), Image.Resampling.BICUBIC), corner, outline)
        mask.paste(label + 1, corner, outline)
    return picture, mask


def line(figures: dict[str, Any]) -> str:
    """A line for the terminal."""
    text = (
        f"patches mIoU {figures['segmentation']['knn']:.1%}, images k-NN {figure(figures, 'knn', '20'):.1%}"
    )
    return text + (f", {figures['steps']} steps" if "steps" in figures else "")


def page(records: Records) -> str:
    """The Markdown page."""
    ways: dict[str, dict[int | None, dict[str, Any]]] = {}
    speeds = [record for record in records.values() if record["keys"]["way"] == SPEED]
    measured = [record for record in records.values() if record["keys"]["way"] != SPEED]
    for record in measured:
        if "figures" in record:
            ways.setdefault(record["keys"]["way"], {})[record["keys"]["seed"]] = record["figures"]
    keys = (measured or speeds)[0]["keys"]
    rows = [
        [way, *(cell_of(results, *column) for column in FIGURES.values())] for way, results in ways.items()
    ]
    some = next((result for results in ways.values() for result in results.values()), None)
    lines = [f"# Dense bits on {keys['source']}", "", *origin(records), ""]
    if some is not None:
        counts = "; ".join(f"{way}: {len(results)}" for way, results in ways.items())
        shared = ", ".join(f"`{k}: {v}`" for k, v in keys["run"].items() if k not in ("seed", "dense"))
        lines += [
            *table(["", *FIGURES], rows),
            "",
            f"Mean ± standard deviation over seeds (number of runs: {counts}). Patches: segmentation of "
            f"{keys['scenes'][1]} scenes composed of test images, by {keys['scenes'][0]} of training images, "
            f"in {some['classes']} classes with the ground. Images: {some['queries']} test images in "
            f"{some['gallery']} training images, k = 20. Keys of all runs: {shared}.",
            *differences(ways),
            *(f"\n{SPEED}, by turns: {in_words(each['figures'])}." for each in speeds if "figures" in each),
        ]
    return "\n".join([*lines, *failures(records)]) + "\n"


def cell_of(results: dict[int | None, dict[str, Any]], path: tuple[str, ...], scale: float) -> str:
    """A figure's mean and deviation over seeds; "" where no run has it."""
    values = [scale * figure(result, *path) for result in results.values() if path[0] in result]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def differences(ways: dict[str, dict[int | None, dict[str, Any]]]) -> list[str]:
    """How much better runs with dense bits are than those without, seed by seed."""
    lines, without = [], ways.get("dense 0", {})
    for way, results in ways.items():
        seeds = [seed for seed in results if seed in without and way.startswith("dense") and way != "dense 0"]
        texts = []
        for name, (path, scale) in list(FIGURES.items())[:3] if seeds else []:
            gains = [scale * (figure(results[s], *path) - figure(without[s], *path)) for s in seeds]
            spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
            texts.append(f"{name.removesuffix(' %')} {mean(gains):+.1f}{spread} points")
        if texts:
            lines += ["", f"`{way}` against `dense 0`, seed by seed: {'; '.join(texts)}."]
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
