"""Compare methods on one data set, each tuned alike: python -m benchmarks.learning RESULTS cifar10=FOLDER

FOLDER has train and test, and in them a folder for each class. Writes RESULTS.json, RESULTS.md and
RESULTS.png. First every method is trained once with each of three learning rates on four fifths of the
training images and judged by k-NN on the fifth; then, with the best rate, on all of them with every seed, and
evaluated on the test images. What was measured is not measured again.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.resumable import (
    Cell,
    Records,
    Session,
    create_parser,
    failures,
    given_keys,
    knn_and_linear,
    origin,
    pairs,
    table,
)
from bincomm.building import create_networks, create_trained
from bincomm.comparison import (
    BEFORE,
    COMPARED_PROTOCOLS,
    FEATURE_PROTOCOLS,
    PIXELS,
    last_transmitted_bits,
    method_configs,
    prototypes_for,
    rows_as_markdown,
    table_row,
    trained_network,
    training_seconds,
    with_resets,
)
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.sources import QUERY_EVERY, Source, evaluation_sources, open_source
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.networks import Network
from bincomm.pretraining import pretrain

# Name of each: a method of bincomm compare, and keys.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bits, reset": ("bits-reset", {"beta": "auto"}),
    "bits, fixed head": ("bits-fixed", {"beta": "auto"}),
    "bits, fixed head, β 0.1": ("bits-fixed", {"beta": 0.1}),
    "SimDINO": ("simdino", {}),
    "DINO": ("dino", {}),
}
RATES = (0.0025, 0.008, 0.025)  # learning rates for a batch of 256
EPOCHS = 20
SEEDS = 3
POINTS = 6  # of the curve of a run, after the one before training
GALLERY, QUERIES = 5000, 1000  # images that the curve is measured on, at most


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=1)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of every run; default: {EPOCHS}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds; default: {SEEDS}")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=RATES,
        help=f"learning rates to choose from; default: {RATES}",
    )
    parser.add_argument("--methods", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args()
    ((source, data),) = pairs(options.sources).items()
    given = {"epochs": options.epochs, **given_keys(options)}
    session = Session("benchmarks.learning", options, partial(page, options.results.name), plot)

    searches = {
        method: search_cells(source, data, method, given, options.rates) for method in options.methods
    }
    session.run([cell for cells in searches.values() for cell in cells])
    session.run(reference_cells(source, data, given, options.seeds))
    for method, cells in searches.items():
        if options.list:
            rate = 0.0  # of no matter for the names
        elif all(map(session.is_stored, cells)):
            measured = [each for cell in cells if (each := session.figures(cell)) is not None]
            if not measured:
                continue  # all of them failed, which the end tells
            rate = max(measured, key=lambda each: each["knn"])["lr"]
        else:
            print(f"{method}: left out, its learning rate has not been searched for")
            continue
        session.run(final_cells(source, data, method, {**given, "lr": rate}, options.seeds))
    return session.end()


def search_cells(
    source: str, data: str, method: str, given: dict[str, Any], rates: tuple[float, ...]
) -> list[Cell]:
    """A method with each learning rate, on the training images alone."""

    def cell(rate: float) -> Cell:
        keys = {**given, "lr": rate}
        record = {"source": source, "group": "search", "method": method, "run": keys}

        def measure(folder: Path) -> dict[str, Any]:
            config = configuration(method, str(hold_out(data, folder / "images")), keys, folder)
            result = pretrain(config)
            assert result is not None  # there is one rank
            return {"lr": rate, "knn": figure(result["evaluation"]["teacher"], "knn", "20")}

        name = f"search: {method}, lr {rate:g}"
        return Cell(name, record, measure, lambda figures: f"k-NN {figures['knn']:.1%} of images held out")

    return [cell(rate) for rate in rates]


def hold_out(data: str, folder: Path) -> Path:
    """A folder whose train and test are links to the training images, every fifth of a class in test."""
    counts: dict[str, int] = {}
    for path in open_source(data).images.names():
        kind = Path(path).parent.name
        counts[kind] = counts.get(kind, 0) + 1
        link = folder / ("train" if counts[kind] % QUERY_EVERY else "test") / kind / Path(path).name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():  # an interrupted run had made it
            link.symlink_to(os.path.abspath(path))
    return folder


def reference_cells(source: str, data: str, given: dict[str, Any], seeds: int) -> list[Cell]:
    """Raw pixels, and the network before training, which is the same for all methods but for its head."""

    def cell(name: str, seed: int | None) -> Cell:
        record = {"source": source, "group": "reference", "method": name, "seed": seed, "run": given}

        def measure(folder: Path) -> dict[str, Any]:
            config = configuration("bits, fixed head", data, {**given, "seed": seed or 0}, folder)
            gallery, queries = evaluation_images(config)
            device = evaluation_device(config)
            if seed is None:
                pixels = Pretrained.of_pixels(config, device)
                return evaluate_reproducibly(pixels, gallery, queries, FEATURE_PROTOCOLS)
            untrained = Pretrained.of(create_networks(config, device)[1], config, device)
            return evaluate_reproducibly(untrained, gallery, queries, COMPARED_PROTOCOLS)

        return Cell(name if seed is None else f"{name}, seed {seed}", record, measure, knn_and_linear)

    return [cell(PIXELS, None), *(cell(BEFORE, seed) for seed in range(seeds))]


def final_cells(source: str, data: str, method: str, keys: dict[str, Any], seeds: int) -> list[Cell]:
    """A method with the learning rate that was chosen, with every seed."""

    def cell(seed: int) -> Cell:
        record = {"source": source, "group": "final", "method": method, "seed": seed, "run": keys}
        measure = partial(measure_run, method, data, {**keys, "seed": seed})
        return Cell(f"{method}, seed {seed}", record, measure, knn_and_linear)

    return [cell(seed) for seed in range(seeds)]


def measure_run(method: str, data: str, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and evaluate the end as bincomm compare does, and checkpoints on the way by k-NN."""
    config = configuration(method, data, keys, folder)
    steps = config.steps(len(open_source(data).images) // config.batch_size)
    config = replace(config, save_every=max(1, steps // POINTS), keep=2 * POINTS)
    pretrain(config)
    gallery, queries = evaluation_images(config)
    device = evaluation_device(config)
    teacher = Pretrained.of(trained_network(config, device), config, device)
    return {
        **evaluate_reproducibly(teacher, gallery, queries, COMPARED_PROTOCOLS),
        **last_transmitted_bits(config),
        "training_seconds": training_seconds(config),
        "curve": curve(config, thinned(gallery, GALLERY), thinned(queries, QUERIES), device),
    }


def configuration(method: str, data: str, keys: dict[str, Any], folder: Path) -> PretrainConfig:
    """Of one run of a method."""
    name, own = CONTENDERS[method]
    images = len(open_source(data).images)
    given = {"prototypes": prototypes_for(images), **keys, **own, "data": data, "output": str(folder)}
    (config,) = method_configs(with_resets(configure(**given), images), name, None)
    return config


def evaluation_images(config: PretrainConfig) -> tuple[Source, Source]:
    """Gallery and queries.

    Raises:
        ValueError: there are no queries that are not trained on.
    """
    images = evaluation_sources(config.data, open_source(config.data))
    if images is None or not images[2]:
        raise ValueError("expected folders train and test, and in them one for each class")
    return images[:2]


def thinned(source: Source, images: int) -> Source:
    """At most so many images, at equal distances: files are sorted by class."""
    step = -(-len(source.images) // images)
    return source.select(range(0, len(source.images), step))


def curve(
    config: PretrainConfig, gallery: Source, queries: Source, device: torch.device
) -> list[dict[str, float]]:
    """k-NN of the teacher before training and at each checkpoint, by steps and seconds of training."""
    return [
        {
            "step": step,
            "seconds": training_seconds(config, step),
            "knn": figure(
                evaluate_reproducibly(Pretrained.of(network, config, device), gallery, queries, ("knn",)),
                "knn",
                "20",
            ),
        }
        for step, network in teachers(config, device)
    ]


def teachers(config: PretrainConfig, device: torch.device) -> Iterator[tuple[int, Network]]:
    """The teacher before training and at each checkpoint, with the number of steps done."""
    yield 0, create_networks(config, device)[1]
    checkpoints = Checkpoints(Path(config.output) / "checkpoints", config.keep)
    for step in checkpoints.steps():
        weights = load_checkpoint(checkpoints.path(step))["teacher"]
        yield step, create_trained(config, weights, device)


def finals(records: Records) -> dict[str, list[dict[str, Any]]]:
    """For each method the figures of its seeds, after those of the references."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for group in ("reference", "final"):
        for record in records.values():
            if record["keys"]["group"] == group and "figures" in record:
                runs.setdefault(record["keys"]["method"], []).append(record["figures"])
    return runs


def page(name: str, records: Records) -> str:
    """The Markdown page, beside NAME.png."""
    runs = finals(records)
    rows = [table_row(name, results) for name, results in runs.items()]
    first = next(iter(records.values()))["keys"]
    counts = "; ".join(f"{name}: {len(results)}" for name, results in runs.items())
    lines = [f"# Methods compared on {first['source']}", "", *origin(records)]
    if rows:
        some = rows[0]["runs"][0]
        lines += [
            "",
            *rows_as_markdown(rows),
            "",
            f"Mean ± standard deviation over seeds (number of runs: {counts}). Features are those of the "
            f"teacher's backbone, of {some['gallery_images']} training and {some['query_images']} test "
            "images; k-NN with k = 20, mAP@ALL. Codes are the signs of the head's K logits, of DINO of its "
            "head's bottleneck; SimDINO's and DINO's are not trained to be codes.",
        ]
    if any("curve" in figures for results in runs.values() for figures in results):
        lines += [
            "",
            f"![k-NN against seconds of training]({name}.png)",
            "",
            f"k-NN of at most {QUERIES} test images in {GALLERY} training images, of the teacher before "
            "training and at a run's checkpoints: mean and range of the seeds.",
        ]
    lines += [
        "",
        "## Search",
        "",
        "Of every method the learning rate alone was chosen, by k-NN on every fifth training image, held "
        f"out. Keys of all runs: {text_of(first['run'], 'lr')}; the others are those of the recipe that "
        "fits the images; DINO's prototypes follow the number of images.",
        "",
        *search_table(records),
        *failures(records),
    ]
    return "\n".join(lines) + "\n"


def text_of(keys: dict[str, Any], without: str) -> str:
    """Keys of the runs."""
    return ", ".join(f"`{key}: {value}`" for key, value in keys.items() if key != without)


def search_table(records: Records) -> list[str]:
    """k-NN by method and learning rate, the best one in bold."""
    by_method: dict[str, dict[float, float]] = {}
    for record in records.values():
        if record["keys"]["group"] == "search" and "figures" in record:
            figures = record["figures"]
            by_method.setdefault(record["keys"]["method"], {})[figures["lr"]] = figures["knn"]
    rates = sorted({rate for accuracies in by_method.values() for rate in accuracies})
    rows, at_the_edge = [], []
    for method, accuracies in by_method.items():
        best = max(accuracies, key=lambda rate: accuracies[rate])
        texts = {rate: f"{100 * accuracy:.1f}" for rate, accuracy in accuracies.items()}
        texts[best] = f"**{texts[best]}**"
        rows.append([method, *(texts.get(rate, "-") for rate in rates)])
        if best in (rates[0], rates[-1]) and len(rates) > 1:
            at_the_edge.append(method)
    lines = table(["k-NN %", *(f"lr {rate:g}" for rate in rates)], rows)
    if at_the_edge:
        lines += ["", f"The best rate is the least or the largest one tried for: {'; '.join(at_the_edge)}."]
    return lines


def plot(records: Records) -> Figure | None:
    """k-NN against seconds: the mean of the seeds, and their range."""
    curves_of = {
        name: [figures["curve"] for figures in results if "curve" in figures]
        for name, results in finals(records).items()
    }
    if not any(curves_of.values()):
        return None
    canvas = Figure(figsize=(8, 5), layout="constrained")
    axes = canvas.subplots()
    for number, (name, curves) in enumerate(each for each in curves_of.items() if each[1]):
        points = list(zip(*curves, strict=False))  # the same checkpoints of all seeds
        seconds = [sum(p["seconds"] for p in point) / len(point) for point in points]
        accuracies = [[100 * p["knn"] for p in point] for point in points]
        means = [sum(each) / len(each) for each in accuracies]
        axes.plot(seconds, means, "o-", color=f"C{number}", label=name)
        low, high = [min(each) for each in accuracies], [max(each) for each in accuracies]
        axes.fill_between(seconds, low, high, color=f"C{number}", alpha=0.15)
    axes.set(xlabel="seconds of training", ylabel="k-NN %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return canvas


if __name__ == "__main__":
    raise SystemExit(main())
