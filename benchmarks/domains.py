"""Does a backbone from another domain help? python -m benchmarks.domains RESULTS photo=FOLDER sketch=FOLDER

The first is the source, the second the target, whose labels are for evaluation. Writes RESULTS.json and
RESULTS.md: with every seed, half of the steps on the source and the other half of adaptation to the target,
all of them of the whole network or the first epoch of the head alone, beside as many steps in all on the
target alone. What was measured is not measured again.
"""

from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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
)
from benchmarks.speed import length
from bincomm import adaptation
from bincomm.building import create_networks
from bincomm.comparison import BEFORE, PIXELS, rows_as_markdown, table_row, trained_network
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.pretraining import pretrain
from bincomm.recipes import choose_recipe

STEPS = 600
SEEDS = 3
PROTOCOLS = ("knn", "linear")
FIGURES = (("knn", "20"), ("linear", "accuracy"))


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=2)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of both runs together; default: {STEPS}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds; default: {SEEDS}")
    options = parser.parse_args()
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps: expected an even number, got {options.steps}")
    session = Session("benchmarks.domains", options, page)
    session.run(cells(pairs(options.sources), given_keys(options), options.steps, options.seeds))
    return session.end()


def cells(domains: dict[str, str], given: dict[str, Any], steps: int, seeds: int) -> list[Cell]:
    """Raw pixels, the untrained network, and the two ways, a cell for each seed."""
    (source, source_data), (target, target_data) = domains.items()
    ways = {
        BEFORE: partial(untrained, target_data),
        f"{target} alone": partial(alone, target_data, steps),
        f"{source} → {target}": partial(adapted, source_data, target_data, steps, 0),
        f"{source} → {target}, head first": partial(adapted, source_data, target_data, steps, 1),
    }

    def cell(way: str, seed: int) -> Cell:
        record = {"domains": [source, target], "way": way, "seed": seed, "steps": steps, "run": given}
        return Cell(
            f"{way}, seed {seed}", record, partial(ways[way], {**given, "seed": seed}), knn_and_linear
        )

    record = {"domains": [source, target], "way": PIXELS, "seed": None, "steps": steps, "run": given}
    pixels = Cell(PIXELS, record, partial(raw_pixels, target_data, given), knn_and_linear)
    return [pixels, *(cell(way, seed) for way in ways for seed in range(seeds))]


def raw_pixels(data: str, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = configure(**{**keys, "data": data, "output": str(folder)})
    return evaluate(Pretrained.of_pixels(config, evaluation_device(config)), config)


def untrained(data: str, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = configure(**{**keys, "data": data, "output": str(folder)})
    device = evaluation_device(config)
    return evaluate(Pretrained.of(create_networks(config, device)[1], config, device), config)


def alone(data: str, steps: int, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All steps on the target."""
    config = configure(**{**keys, "data": data, "output": str(folder), **length(steps)})
    pretrain(config)
    device = evaluation_device(config)
    return evaluate(Pretrained.of(trained_network(config, device), config, device), config)


def adapted(
    source: str, target: str, steps: int, freeze: int, keys: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Half of the steps on the source, then bincomm adapt with as many on the target, the backbone frozen in
    the first epochs."""
    first, second = folder / "source", folder / "target"
    first.mkdir(exist_ok=True)
    # The recipe that fits the target, as without the source, so that the networks are the same.
    keys = {"recipe": choose_recipe(target), **keys}
    pretrain(configure(**{**keys, "data": source, "output": str(first), **length(steps // 2)}))
    own = {key: value for key, value in keys.items() if key != "recipe"}
    own["freeze_backbone"] = freeze
    result = adaptation.adapt(
        adaptation.configure(first, **{**own, "data": target, "output": str(second), **length(steps // 2)})
    )
    assert result is not None  # there is one rank
    if result["after"] is None:
        raise ValueError("the target has no labels (folders named after classes)")
    before = {f"source_{name}": result["before"][name] for name in PROTOCOLS}
    return {**result["after"], "queries_held_out": result["queries_held_out"], **before}


def evaluate(model: Pretrained, config: PretrainConfig) -> dict[str, Any]:
    """k-NN and linear probe on the target."""
    images = evaluation_sources(config.data, open_source(config.data))
    if images is None:
        raise ValueError("the target has no labels (folders named after classes)")
    gallery, queries, held_out = images
    return {**evaluate_reproducibly(model, gallery, queries, PROTOCOLS), "queries_held_out": held_out}


def page(records: Records) -> str:
    """The Markdown page."""
    runs: dict[str, dict[int | None, dict[str, Any]]] = {}
    for record in records.values():
        if "figures" in record:
            keys = record["keys"]
            runs.setdefault(keys["way"], {})[keys["seed"]] = record["figures"]
    keys = next(iter(records.values()))["keys"]
    source, target = keys["domains"]
    lines = [f"# From {source} to {target}", "", *origin(records), ""]
    rows: list[dict[str, Any]] = []
    gains: list[str] = []
    for way, results in runs.items():
        unadapted = [
            {name: result[f"source_{name}"] for name in PROTOCOLS}
            for result in results.values()
            if "source_knn" in result
        ]
        if unadapted:
            if not any(row["name"] == f"{source} alone" for row in rows):  # it is the same for all
                rows.append(table_row(f"{source} alone", unadapted))
            gains += differences(runs.get(f"{target} alone", {}), results, way)
        rows.append(table_row(way, list(results.values())))
    some = next((result for results in runs.values() for result in results.values()), None)
    if some is not None:
        overlap = "" if some["queries_held_out"] else ", whose images, but not their labels, were trained on"
        lines += [
            *rows_as_markdown(rows, FIGURES),
            "",
            f"Mean ± standard deviation over seeds. {target}: {some['query_images']} queries{overlap}, in "
            f"{some['gallery_images']} images of {some['classes']} classes. {keys['steps']} steps in all; "
            f"`{source} alone` has half of them.",
            *gains,
        ]
    return "\n".join([*lines, *failures(records)]) + "\n"


def differences(
    alone: dict[int | None, dict[str, Any]], adapted: dict[int | None, dict[str, Any]], way: str
) -> list[str]:
    """How much better adaptation is than the target alone, seed by seed."""
    seeds = [seed for seed in adapted if seed in alone]
    if not seeds:
        return []
    texts = []
    for path, words in zip(FIGURES, ("k-NN", "linear probe"), strict=True):
        gains = [100 * (figure(adapted[seed], *path) - figure(alone[seed], *path)) for seed in seeds]
        spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
        texts.append(f"{words} {mean(gains):+.1f}{spread} points")
    return ["", f"`{way}` against the target alone, seed by seed: {', '.join(texts)}."]


if __name__ == "__main__":
    raise SystemExit(main())
