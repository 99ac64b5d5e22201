"""Low resolution first, against full resolution in the same time: python -m benchmarks.curriculum RESULTS
cifar10=FOLDER

FOLDER has train and test, and in them a folder for each class. Writes RESULTS.json and RESULTS.md: runs with
crops of full size throughout, and with smaller ones in the first steps, of a conv net and of a ViT, with
every seed, of as many steps as take the same time by speeds that are measured by turns; k-NN of the teacher,
of the network before training and of raw pixels. What was measured is not measured again.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

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
from bincomm.comparison import training_seconds
from bincomm.config import PretrainConfig, read_config
from bincomm.configuration import configure
from bincomm.engine.run import take_steps
from bincomm.evaluation.evaluate import figure
from bincomm.pretraining import pretrain

RECIPE = "cifar10_cpu"  # small images enlarged twofold; their own size is the low resolution
NETWORKS: dict[str, dict[str, Any]] = {
    "conv net": {},
    "ViT": {"backbone": "vit_tiny_patch16_224", "backbone_args": {"patch_size": 8}},
}
MINUTES, SEEDS = 4.0, 3
SHARES = (0.0, 0.7)  # of the steps that have low resolution
HEAD = ("network", "low resolution", "runs", "steps", "seconds", "k-NN %", "of codes", "untrained", "pixels")


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=1)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds; default: {SEEDS}")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help=f"of the steps that have low resolution; default: {SHARES}",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"of each run, about; default: {MINUTES:g}"
    )
    options = parser.parse_args()
    ((source, data),) = pairs(options.sources).items()
    given = given_keys(options)
    session = Session("benchmarks.curriculum", options, page)
    for network, own in NETWORKS.items():
        keys = {in_words_of(share): {"low_resolution": share, **given} for share in options.shares}
        record = {"source": source, "network": network, "run": given, "shares": list(options.shares)}
        ways = {way: {"recipe": RECIPE, **own, **each, "data": data} for way, each in keys.items()}
        lengths = keys_in_equal_time(session, network, record, ways, options.minutes)
        session.run(
            [
                create_cell(source, data, network, {**keys[way], "seed": seed, **length})
                for seed in range(options.seeds)
                for way, length in lengths.items()
            ]
        )
    return session.end()


def create_cell(source: str, data: str, network: str, keys: dict[str, Any]) -> Cell:
    """One run."""
    record = {"source": source, "network": network, "run": keys}
    name = f"{network}, {in_words_of(keys['low_resolution'])}, seed {keys['seed']}"
    return Cell(name, record, partial(measure, data, {**NETWORKS[network], **keys}), in_short)


def measure(data: str, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and return the figures of the run."""
    config = configure(**{"recipe": RECIPE, **keys, "data": data, "output": str(folder)})
    result = pretrain(config)
    assert result is not None  # there is one rank
    config = take_steps(config, read_config(folder, "output"))  # and the batch that was chosen
    evaluation = result["evaluation"]
    if evaluation is None:
        raise ValueError("expected folders train and test, and in them one for each class")
    return {
        "steps": result["last_metrics"]["step"],
        "seconds": training_seconds(config),
        "sizes": sizes(config),
        "knn": figure(evaluation["teacher"], "knn", "20"),
        "knn_codes": figure(evaluation["teacher"], "knn_codes", "20"),
        "untrained": figure(evaluation["before_training"], "knn", "20"),
        "pixels": figure(evaluation["pixels"], "knn", "20"),
        "queries": evaluation["teacher"]["query_images"],
    }


def sizes(config: PretrainConfig) -> list[list[int]]:
    """Sides of global and local crops, of low resolution and of full."""
    return [list(config.low_sizes), [config.global_size, config.local_size]]


def in_words_of(share: float) -> str:
    """A share of the steps that have low resolution."""
    return f"the first {share:.0%}" if share else "none"


def in_short(figures: dict[str, Any]) -> str:
    """A line for the terminal."""
    return (
        f"{figures['steps']} steps in {figures['seconds']:.0f} s, k-NN {figures['knn']:.1%} (untrained "
        f"{figures['untrained']:.1%}, pixels {figures['pixels']:.1%})"
    )


def page(records: Records) -> str:
    """The Markdown page."""
    found = [(record["keys"], record["figures"]) for record in records.values() if "figures" in record]
    measured = [(keys, figures) for keys, figures in found if keys.get("way") != SPEED]
    speeds = [(keys, figures) for keys, figures in found if keys.get("way") == SPEED]
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for keys, figures in measured:
        runs.setdefault((keys["network"], keys["run"]["low_resolution"]), []).append(figures)
    lines = ["# Low resolution first", "", *origin(records), ""]
    lines += table(HEAD, [[name, in_words_of(share), *row(each)] for (name, share), each in runs.items()])
    if measured:
        low, full = (f"{sides[0]} and {sides[1]} pixels" for sides in measured[0][1]["sizes"])
        lines += [
            "",
            f"Low resolution is crops of {low}, full {full}. k-NN with k = 20 of "
            f"{measured[0][1]['queries']} test images in the training images, at full resolution; mean ± "
            "standard deviation over seeds. Runs took these seconds beside whatever else ran.",
            "",
            *differences(runs),
            *(f"- {keys['network']}, {SPEED}, by turns: {in_words(figures)}" for keys, figures in speeds),
        ]
    return "\n".join([*lines, *failures(records)]) + "\n"


def row(found: list[dict[str, Any]]) -> list[str]:
    """Means over the seeds."""
    counts = [f"{statistics.mean(run[name] for run in found):.0f}" for name in ("steps", "seconds")]
    shares = [spread([run[name] for run in found]) for name in ("knn", "knn_codes", "untrained", "pixels")]
    return [str(len(found)), *counts, *shares]


def differences(runs: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """k-NN of low resolution first minus that of full resolution throughout, seed by seed."""
    lines = []
    for (network, share), found in runs.items():
        full = runs.get((network, 0.0), [])
        if share and len(full) == len(found):
            points = [a["knn"] - b["knn"] for a, b in zip(found, full, strict=True)]
            lines.append(
                f"- {network}, {in_words_of(share)}: k-NN {spread(points, '+')} points, seed by seed"
            )
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation in percent; the mean alone of one value."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{deviation}"


if __name__ == "__main__":
    raise SystemExit(main())
