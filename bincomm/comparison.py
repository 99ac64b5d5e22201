"""Comparison of several methods: all trained with the same budget and seeds, and evaluated alike."""

import difflib
import logging
import math
import os
import platform
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from matplotlib.figure import Figure

from bincomm import __version__
from bincomm.building import create_networks, create_trained, trained_part
from bincomm.config import KEYS_OF_METHODS, PretrainConfig, read_config
from bincomm.data.sources import Source, evaluation_sources, open_source, why_no_evaluation
from bincomm.distributed.ranks import join_ranks
from bincomm.engine.budget import choose_steps
from bincomm.engine.checkpoints import Checkpoints
from bincomm.engine.run import has_begun, is_finished, take_steps
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.files import check_folder, read_json_lines, write_file, write_json, write_text
from bincomm.networks import Network
from bincomm.pretraining import TrainingError, pretrain

logger = logging.getLogger(__name__)

# The keys of each method, beside those of `KEYS_OF_METHODS`; all other keys are equal. The ablations are
# those of bits-fixed, as in the paper.
METHODS: dict[str, dict[str, Any]] = {
    "bits-reset": {"method": "bits", "agreement": "hard"},
    "bits-fixed": {"method": "bits", "agreement": "hard", "reset_every": 0},
    "bits-soft": {"method": "bits", "agreement": "soft", "reset_every": 0},
    "bits-cosine": {"method": "bits", "agreement": "cosine", "reset_every": 0},
    "simdino": {"method": "simdino", "expa_type": 1, "reset_every": 0},
    "simdino-expa0": {"method": "simdino", "expa_type": 0, "reset_every": 0},
    "dino": {"method": "dino", "reset_every": 0},
}
DEFAULT_METHODS = ("bits-reset", "bits-fixed", "simdino", "dino")
RESET_EVERY = 10  # reset_every of bits-reset if that of the configuration is 0
IMAGES_PER_PROTOTYPE = 20  # as in DINO, with 65 536 prototypes for ImageNet's 1.28 million images
BEFORE, PIXELS = "before training", "raw pixels"

FEATURE_PROTOCOLS = ("knn", "linear", "map", "geometry")
COMPARED_PROTOCOLS = (*FEATURE_PROTOCOLS, "map_codes", "bits")

# Path of a figure in a result of `evaluate`, as for `figure`: its heading, factor and number of decimals.
FIGURES: dict[tuple[str, ...], tuple[str, int, int]] = {
    ("knn", "20"): ("k-NN %", 100, 1),
    ("linear", "accuracy"): ("linear %", 100, 1),
    ("map",): ("mAP % features", 100, 1),
    ("map_codes",): ("mAP % codes", 100, 1),
    ("geometry", "d_eff"): ("d_eff", 1, 1),
    ("geometry", "r_eff"): ("r_eff", 1, 1),
    ("bits", "bit_entropy"): ("bit entropy", 1, 2),
    ("bits", "dead_bits"): ("dead bits %", 100, 1),
}
COLUMNS = {
    **FIGURES,
    ("transmitted_bits",): ("transmitted bits", 1, 1),
    ("training_seconds",): ("seconds", 1, 0),
}


def compare(
    config: PretrainConfig,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] | None = None,
    prototypes: int | None = None,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Train every method with every seed, each as an ordinary run in `config.output`/METHOD[-seedK], evaluate
    all, and write table.md, table.json and plot.png there.

    Interrupted runs are resumed. Finished runs are only evaluated, including those of methods that are not
    named.

    Args:
        config: the configuration that all runs share, except for the keys that `METHODS` sets: method,
            agreement, expa_type and, for all but bits-reset, reset_every; and for SimDINO and DINO except for
            those of `bincomm.config.KEYS_OF_METHODS`. Its minutes are those of the first method; the others
            have as many steps.
        methods: names in `METHODS`.
        seeds: every method has a run for each seed; None: only that of the configuration.
        prototypes: number of prototypes of DINO; None: that of the configuration, or if that is the default
            `prototypes_for` the number of images.
        given: keys, such as clip, that all methods take from `config`, in place of their own.

    Returns:
        The content of table.json: "rows", a row for raw pixels, one for the network before training and one
        for each method; "seeds", "config" (the keys that all runs share), "differences" (for each method, its
        other keys), "failed" (for each directory of a failed run, the reason), "queries_held_out", "versions"
        and "machine". A row has "name"; "runs", a result of `bincomm.evaluation.evaluate.evaluate` for each
        seed, for trained networks with their "training_seconds" and, where their objective predicts bits,
        the "transmitted_bits" of their last steps; and "mean" and "std" (None for a single run)
        of the figures of `COLUMNS`, under the same keys.

    Raises:
        ValueError: an unknown method, a key that methods set, no reset within the runs of bits-reset, images
            without labels, several ranks, or whatever `pretrain` raises it for. Nothing was trained then,
            except where the directory of a later run is in use or holds another run.
        TrainingError: a run failed; raised after the table of all others is written.
        Other errors are those of `pretrain`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("compare: expected one process; start it without torchrun")
    check_names(methods, seeds)
    for key in ("method", "agreement", "expa_type"):
        if getattr(config, key) != getattr(PretrainConfig, key):
            raise ValueError(f"{key}: compare takes it from the method's name: {', '.join(METHODS)}")
    if isinstance(config.data, str) and os.path.realpath(config.output) == os.path.realpath(config.data):
        raise ValueError(f"output: expected another folder than that of the images, got {config.output}")
    check_folder("output", config.output)
    source = open_source(config.data)
    evaluation = evaluation_sources(config.data, source)
    if evaluation is None:
        raise ValueError(
            f"data: expected images with labels (folders named after classes) to evaluate on, got none in "
            f"{config.data}: {why_no_evaluation(config.data, source)}"
        )
    if prototypes is None and config.prototypes == PretrainConfig.prototypes:
        prototypes = prototypes_for(len(source.images))
    shared = replace(config, prototypes=prototypes or config.prototypes)
    shared = settle_common_steps(shared, methods[0], source)
    shared = with_resets(shared, len(source.images))
    configs = {method: method_configs(shared, method, seeds, given) for method in METHODS}
    done = [m for m, runs in configs.items() if all(is_finished(Path(run.output)) for run in runs)]
    named = [*methods, *(method for method in done if method not in methods)]
    configs = {method: configs[method] for method in named}
    if "bits-reset" in configs:
        check_resets(configs["bits-reset"][0], len(source.images))
    failed: dict[str, str] = {}  # directory of a run: the reason
    for method, runs in configs.items():
        for run in runs:
            logger.info("%s, seed %d: %s", method, run.seed, run.output)
            try:
                pretrain(run)
            except TrainingError as error:
                logger.error("%s", error)
                failed[run.output] = str(error)

    gallery, queries, held_out = evaluation
    device = evaluation_device(config)

    def evaluate_network(network: Network) -> dict[str, Any]:
        return evaluate_reproducibly(
            Pretrained.of(network, config, device), gallery, queries, COMPARED_PROTOCOLS
        )

    pixels = Pretrained.of_pixels(config, device)
    # Before training the backbone is the same for all methods; the head here is that of the bits.
    untrained = (create_networks(run, device)[1] for run in method_configs(shared, "bits-fixed", seeds))
    rows = [
        table_row(PIXELS, [evaluate_reproducibly(pixels, gallery, queries, FEATURE_PROTOCOLS)]),
        table_row(BEFORE, [evaluate_network(network) for network in untrained]),
    ]
    for method, runs in configs.items():
        results = [
            {
                **evaluate_network(trained_network(run, device)),
                **last_transmitted_bits(run),
                "training_seconds": training_seconds(run),
            }
            for run in runs
            if run.output not in failed
        ]
        rows.append(table_row(method, results))
    table = {
        "rows": rows,
        **common_and_own(configs),
        "failed": failed,
        "queries_held_out": held_out,
        "versions": {"bincomm": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }
    output = Path(config.output)
    write_json(output / "table.json", table)
    write_text(output / "table.md", as_markdown(table))
    panels = plot(rows)
    write_file(output / "plot.png", lambda file: panels.savefig(file, format="png", dpi=110))
    if failed:
        raise TrainingError(
            f"{', '.join(failed)}: could not be trained to the end; the table in {config.output} shows the "
            "others. Remove a run's folder to train it again"
        )
    return table


def table_row(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the results of a method's runs, and the mean and standard deviation of their
    figures, under the same keys."""
    average: dict[str, Any] = {}
    deviation: dict[str, Any] = {}
    for path in COLUMNS:
        figures = [figure(result, *path) for result in results if path[0] in result]
        if figures:
            insert(average, path, mean(figures))
        if len(figures) > 1:
            insert(deviation, path, stdev(figures))
    return {"name": name, "runs": results, "mean": average, "std": deviation or None}


def insert(tree: dict[str, Any], path: tuple[str, ...], value: float) -> None:
    """Put a value into nested dicts at a path of keys."""
    *outer, last = path
    for key in outer:
        tree = tree.setdefault(key, {})
    tree[last] = value


def settle_common_steps(shared: PretrainConfig, first: str, source: Source) -> PretrainConfig:
    """The configuration with one number of steps for the minutes of all methods: that of the runs that have
    begun in its output, or else as many as the first method does in that time."""
    if not shared.steps_are_open:
        return shared
    for note in sorted(Path(shared.output).glob("*/config.yaml")):
        if has_begun(note.parent):
            shared = take_steps(shared, read_config(note.parent, "output"))
    if shared.steps_are_open:
        run = method_configs(shared, first, None)[0]
        with join_ranks(run.device) as ranks:
            chosen = choose_steps(run, source, Path(run.output), ranks)
        shared = replace(shared, **{key: getattr(chosen, key) for key in shared.open_keys})
    return shared


def epochs_of(run: PretrainConfig, images: int) -> float:
    """How many epochs a run has, which max_steps may cut short."""
    epoch_steps = images // run.batch_size
    return run.steps(epoch_steps) / epoch_steps


def with_resets(run: PretrainConfig, images: int) -> PretrainConfig:
    """A run that resets its head every tenth of its epochs where reset_every is auto: by default short ones
    do not."""
    if run.reset_every != "auto":
        return run
    return replace(run, reset_every=math.ceil(epochs_of(run, images) / 10))


def check_resets(run: PretrainConfig, images: int) -> None:
    """Raise ValueError if a run ends before the first reset of its head."""
    epochs = epochs_of(run, images)
    if run.reset_every == "auto" or run.reset_every >= epochs:
        raise ValueError(
            f"reset_every: expected fewer epochs than a run of bits-reset has, {epochs:g}, "
            f"got {run.reset_every}"
        )


def check_names(methods: Sequence[str], seeds: Sequence[int] | None) -> None:
    """Raise ValueError for unknown methods, for methods or seeds given twice, and for none."""
    for method in methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"methods: there is no method {method!r}{hint} Methods: {', '.join(METHODS)}")
    for name, given in (("methods", methods), ("seeds", [0] if seeds is None else seeds)):
        if len(given) == 0 or len(set(given)) < len(given):
            raise ValueError(
                f"{name}: expected at least one, and each only once, got {', '.join(map(str, given))}"
            )


def prototypes_for(images: int) -> int:
    """Prototypes of DINO for a number of images: the next power of two from images/20, at most 65 536."""
    return min(65536, 1 << max(0, -(-images // IMAGES_PER_PROTOTYPE) - 1).bit_length())


def method_configs(
    shared: PretrainConfig, method: str, seeds: Sequence[int] | None, given: Collection[str] = ()
) -> list[PretrainConfig]:
    """The configurations of a method's runs, one per seed."""
    name = METHODS[method]["method"]
    own = {} if name == "bits" else KEYS_OF_METHODS[name]  # the bits' are those of the recipe
    own = {key: value for key, value in own.items() if key not in given}
    keys = {"reset_every": shared.reset_every or RESET_EVERY, **own, **METHODS[method]}
    path = os.path.join(shared.output, method)
    if seeds is None:
        return [replace(shared, **keys, output=path)]
    return [replace(shared, **keys, output=f"{path}-seed{seed}", seed=seed) for seed in seeds]


def trained_network(config: PretrainConfig, device: torch.device) -> Network:
    """The network that a finished run was for, backbone and head.

    Raises:
        ValueError: its last checkpoint is missing.
    """
    run = Path(config.output)
    checkpoint = Checkpoints(run / "checkpoints", config.keep).load()
    last = read_json_lines(run / "metrics.jsonl")[-1]["step"]
    if checkpoint is None or checkpoint["step"] != last:
        raise ValueError(
            f"output: {run} holds no checkpoint of its last step, {last}; remove it to train it again"
        )
    return create_trained(config, checkpoint[trained_part(config)], device)


def last_transmitted_bits(config: PretrainConfig) -> dict[str, float]:
    """The metric of that name in a run's last record, under its name; nothing where there is none."""
    last = read_json_lines(Path(config.output) / "metrics.jsonl")[-1]
    return {key: last[key] for key in ("transmitted_bits",) if key in last}


def training_seconds(config: PretrainConfig, steps: float = math.inf) -> float:
    """Duration of a run's steps, or of the first of them, including the time they waited for data."""
    seconds, step = 0.0, 0
    for line in read_json_lines(Path(config.output) / "speed.jsonl"):
        end = min(line["step"], steps)
        seconds += (end - step) * config.batch_size / line["images_per_second"]
        step = end
    return seconds


def common_and_own(configs: dict[str, list[PretrainConfig]]) -> dict[str, Any]:
    """Keys of the configurations that are the same in all runs, and for each method those that are not."""
    each = {method: runs[0].as_dict() for method, runs in configs.items()}
    first = next(iter(each.values()))
    left_out = ("output", "seed")
    same = [key for key in first if key not in left_out and all(c[key] == first[key] for c in each.values())]
    return {
        "seeds": [run.seed for run in next(iter(configs.values()))],
        "config": {key: first[key] for key in same},
        "differences": {
            method: {key: value for key, value in c.items() if key not in (*same, *left_out)}
            for method, c in each.items()
        },
    }


def as_markdown(table: dict[str, Any]) -> str:
    """The table with aligned columns, and notes on how to read it."""
    aligned = rows_as_markdown(table["rows"])
    config, seeds, failed = table["config"], table["seeds"], table["failed"]
    (pixels,) = table["rows"][0]["runs"]
    budget = f"{config['epochs']} epochs"
    if config["max_steps"]:
        budget += f", at most {config['max_steps']} steps"
    if config["minutes"]:
        budget += f", chosen for {config['minutes']:g} minutes"
    spread = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    overlap = (
        "" if table["queries_held_out"] else ", whose images, but not their labels, were used in training"
    )
    own = "; ".join(
        f"{method} {', '.join(f'{key}={value}' for key, value in keys.items() if key != 'method')}"
        for method, keys in table["differences"].items()
        if keys
    )
    unmatched = pixels.get("unmatched_queries", 0)
    left_out = f", without {unmatched} queries whose class no image has" if unmatched else ""
    notes = (
        f"{config['data']}: {config['backbone']}, {budget}, batches of {config['batch_size']}, "
        f"{config['bits']} bits; {spread if len(seeds) > 1 else f'seed {seeds[0]}'}.",
        "Features are those of the teacher's backbone, of one center crop, of "
        f"{pixels['gallery_images']} images and {pixels['query_images']} queries{overlap}. k-NN with k = 20; "
        f"mAP@ALL by the cosine of features and the Hamming distance of codes{left_out}; "
        "d_eff, r_eff and use of bits are those of the queries. Codes are the signs of the head's K logits; "
        "of SimDINO, the signs of its outputs, and of DINO, of its head's bottleneck: neither is trained to "
        "be a code. Transmitted bits are those of a message that the student predicts, "
        "Σ max(0, entropy - cross-entropy), in the last steps of training. Seconds are those of a run's "
        "training steps.",
        "Images, network, steps, batches, learning rate and all other keys are the same for all methods, and "
        f"none was tuned for one of them. A method's own keys: {own or 'none'}.",
        *(f"{run}: {reason}" for run, reason in failed.items()),
    )
    return "\n".join([*aligned, *(f"\n{textwrap.fill(note, 110)}" for note in notes)]) + "\n"


def rows_as_markdown(
    rows: Sequence[dict[str, Any]], paths: Sequence[tuple[str, ...]] = tuple(COLUMNS)
) -> list[str]:
    """The lines of a table of rows of `table_row`, with aligned columns, those of these figures."""
    lines = [["method", *(COLUMNS[path][0] for path in paths)]]
    for row in rows:
        lines.append([row["name"], *(cell(row, path) for path in paths)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def cell(row: dict[str, Any], path: tuple[str, ...]) -> str:
    """A figure of a row as the table shows it."""
    if path[0] not in row["mean"]:
        return "-"
    _, factor, decimals = COLUMNS[path]
    spread = "" if row["std"] is None else f" ± {factor * figure(row['std'], *path):.{decimals}f}"
    return f"{factor * figure(row['mean'], *path):.{decimals}f}{spread}"


def plot(rows: list[dict[str, Any]]) -> Figure:
    """A panel per figure with a line per method: small dots for the seeds, a large one with its value for
    their mean; the dashed line is the network before training."""
    canvas = Figure(figsize=(14, 2.6 + 0.5 * len(rows)), layout="constrained")
    methods = [row for row in rows if row["runs"] and row["name"] not in (BEFORE, PIXELS)]
    (before,) = (row["mean"] for row in rows if row["name"] == BEFORE)
    panels = canvas.subplots(2, len(FIGURES) // 2, sharey=True)
    for axes, (path, (heading, factor, _)) in zip(panels.flat, FIGURES.items(), strict=True):
        axes.axvline(factor * figure(before, *path), color="gray", linestyle="--", linewidth=1)
        for line, row in enumerate(methods):
            color, center = f"C{line}", factor * figure(row["mean"], *path)
            values = [factor * figure(run, *path) for run in row["runs"]]
            axes.plot([min(values), max(values)], [line, line], color=color, alpha=0.5)
            axes.plot(values, [line] * len(values), ".", color=color, alpha=0.6)
            axes.plot(center, line, "o", color=color, markersize=8)
            axes.annotate(
                cell(row, path), (center, line), (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set(title=heading, ylim=(len(methods) - 0.4, -0.7))
        axes.set_yticks(range(len(methods)), [row["name"] for row in methods])
        axes.margins(x=0.2)
        axes.grid(axis="x", alpha=0.3)
    canvas.suptitle("dashed: before training", fontsize="small", color="gray")
    return canvas
