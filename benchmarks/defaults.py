"""Measure whether the defaults learn, on several sources of images: python -m benchmarks.defaults RESULTS
digits=digits cifar10=FOLDER photo=FOLDER ...

Writes RESULTS.json and RESULTS.md: short runs by the default path, which gives the data and a time limit and
nothing else; with other numbers of bits and sizes of batches; with other backbones; with other start values
of β; and with fixed β in place of the automatic one, for as many steps. Of a source without labels there is
one run, by the default path. What was measured is not measured again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from bincomm.comparison import training_seconds
from bincomm.config import read_config
from bincomm.configuration import configure
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.engine.run import take_steps
from bincomm.evaluation.evaluate import figure
from bincomm.files import read_json_lines
from bincomm.objectives import BetaControl
from bincomm.pretraining import pretrain

MINUTES, MINUTES_OF_BACKBONES = 2.5, 5.0
SIZES: dict[str, dict[str, Any]] = {
    **{f"K {bits}": {"bits": bits} for bits in (32, 128, 512)},
    **{f"n {images}": {"batch_size": images} for images in (32, 256)},
}
CROPS: dict[str, Any] = {
    "global_size": 64,
    "local_size": 32,
}  # the least that a stride of 32 leaves anything of
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"backbone_args": {"patch_size": 8}},
    "convnext_atto": {},
}
STARTS = (1e-3, 1e-2, 1.0, 10.0)
STARTS_ON = ("digits", "cifar10")  # names of the sources that they are tried on
FIXED = (0.03, 0.1, 0.3, 1.0)
# Verdicts: bits predicted beyond the majority, in points; share of dead bits; k-NN above the untrained
# network, in standard errors.
POINTS, DEAD, ERRORS = 5, 0.1, 2

CHANNEL_HEAD = ("bits transmitted", "points", "dead bits %", "bit entropy", "β at the end")
DEFAULTS_HEAD = (
    *("data", "change", "steps", "batch", "images/s", "seconds", *CHANNEL_HEAD),
    *("k-NN %", "untrained", "pixels", "queries", "transmits", "learns"),
)
STARTS_HEAD = ("data", "start", *CHANNEL_HEAD, "k-NN %", "not collapsed")


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources="+")
    options = parser.parse_args()
    sources = pairs(options.sources)
    try:
        given = given_keys(options)
        labeled = [name for name, data in sources.items() if evaluation_sources(data, open_source(data))]
    except ValueError as error:  # a source that cannot be opened
        parser.error(str(error))
    session = Session("benchmarks.defaults", options, page)
    create = partial(create_cell, sources, given)
    defaults = {name: create(name, "defaults", "default") for name in sources}
    session.run(list(defaults.values()))
    session.run(changed_cells(labeled, create))
    for name in labeled:
        steps = (session.figures(defaults[name]) or {}).get("steps")
        if steps or options.list:
            session.run(
                [create(name, "fixed", f"beta {beta:g}", beta=beta, max_steps=steps) for beta in FIXED]
            )
        elif any(session.only.search(f"{name}: beta {beta:g}") for beta in FIXED):
            print(f"{name}: fixed β is left out, the default path has not been measured")
    return session.end()


def changed_cells(labeled: list[str], create: Callable[..., Cell]) -> list[Cell]:
    """Of sources with labels: other sizes, other backbones, other start values."""
    result = []
    for source in labeled:
        for change, keys in SIZES.items():
            result.append(create(source, "defaults", change, **keys))
        for backbone, keys in BACKBONES.items():
            keys = {"backbone": backbone, **keys, **CROPS}
            result.append(create(source, "defaults", backbone, MINUTES_OF_BACKBONES, **keys))
    for source in (name for name in STARTS_ON if name in labeled):
        result += [
            create(source, "starts", f"beta from {start:g}", beta="auto", start=start) for start in STARTS
        ]
    return result


def create_cell(
    sources: dict[str, str],
    given: dict[str, Any],
    source: str,
    group: str,
    change: str,
    minutes: float = MINUTES,
    **keys: Any,
) -> Cell:
    """A run of the default path on a source, with these keys; as long as they say, or `minutes`."""
    start = keys.pop("start", None)
    # The recipe of the digits takes half a minute, with its own backbone.
    limited = (given | keys).keys() & {"minutes", "max_steps", "epochs"} or (
        sources[source] == "digits" and "backbone" not in keys
    )
    keys = {**({} if limited else {"minutes": minutes}), **given, **keys}
    record = {"source": source, "group": group, "change": change, "start": start, "run": keys}
    take = partial(measure, sources[source], keys, start)
    return Cell(f"{source}: {change}", record, take, in_short)


def measure(data: str, keys: dict[str, Any], start: float | None, folder: Path) -> dict[str, Any]:
    """Train, and return the figures of the run."""
    config = configure(**{**keys, "data": data, "output": str(folder)})
    with beta_starts_at(start):
        result = pretrain(config)
    assert result is not None  # there is one rank
    config = take_steps(config, read_config(folder, "output"))  # and the batch that was chosen
    steps, seconds = result["last_metrics"]["step"], training_seconds(config)
    figures: dict[str, Any] = {
        "steps": steps,
        "seconds": seconds,
        "images_per_second": steps * config.batch_size / seconds,
        "bits": config.bits,
        "batch_size": config.batch_size,
        "backbone": config.backbone,
        "beta_key": config.beta,
    }
    channel = last_full_window(read_json_lines(folder / "metrics.jsonl"))
    for name in ("transmitted_bits", "dead_bits", "bit_entropy", "bit_accuracy", "bit_majority", "beta"):
        figures[name] = channel[name]
    figures["points"] = 100 * (channel["bit_accuracy"] - channel["bit_majority"])
    figures["transmits"] = figures["points"] >= POINTS and figures["dead_bits"] <= DEAD
    figures["collapsed"] = figures["dead_bits"] > DEAD
    if (evaluation := result["evaluation"]) is not None:
        for name, part in (("knn", "teacher"), ("untrained", "before_training"), ("pixels", "pixels")):
            figures[name] = figure(evaluation[part], "knn", "20")
        figures["queries"] = evaluation["teacher"]["query_images"]
        error = standard_error(figures["knn"], figures["untrained"], figures["queries"])
        figures["standard_error"] = error
        figures["learns"] = figures["knn"] - figures["untrained"] >= ERRORS * error
    return figures


@contextmanager
def beta_starts_at(beta: float | None) -> Iterator[None]:
    """Give the automatic β another start value, which is no key of a run; None: its own."""
    usual = BetaControl.START
    BetaControl.START = usual if beta is None else beta
    try:
        yield
    finally:
        BetaControl.START = usual


def last_full_window(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The last record of metrics, or the one before it where the end of the run cut the last window to less
    than half of the longest: in a few messages bits look dead that are not."""
    ends = [record["step"] for record in metrics]
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return metrics[-1] if 2 * lengths[-1] >= max(lengths) else metrics[-2]


def standard_error(p: float, q: float, queries: int) -> float:
    """Of the difference of two shares of the queries: √((p(1-p) + q(1-q))/N)."""
    return math.sqrt((p * (1 - p) + q * (1 - q)) / queries)


def in_short(figures: dict[str, Any]) -> str:
    """A line for the terminal."""
    knn = f", k-NN {figures['knn']:.1%} (untrained {figures['untrained']:.1%})" if "knn" in figures else ""
    return (
        f"{figures['steps']} steps, {figures['transmitted_bits']:.1f} of {figures['bits']} bits, "
        f"{figures['points']:+.1f} points, {figures['dead_bits']:.0%} dead{knn}"
    )


def page(records: Records) -> str:
    """The Markdown page."""
    measured = {name: record for name, record in records.items() if "figures" in record}

    def group(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        found = [(r["keys"], r["figures"]) for r in measured.values() if r["keys"]["group"] == name]
        return sorted(found, key=lambda each: sources.index(each[0]["source"]))

    sources = list(dict.fromkeys(record["keys"]["source"] for record in records.values()))
    defaults, starts, fixed = group("defaults"), group("starts"), group("fixed")
    by_default = {keys["source"]: f for keys, f in defaults if keys["change"] == "default"}
    judged = [figures["learns"] for _, figures in defaults if "learns" in figures]
    lines = [
        "# Do the defaults learn?",
        "",
        *origin(records),
        "",
        f"Of {len(defaults)} runs with defaults {sum(f['transmits'] for _, f in defaults)} transmit, and of "
        f"{len(judged)} with labels {sum(judged)} learn; {len(starts)} with other start values of β were "
        f"measured, {sum(not f['collapsed'] for _, f in starts)} did not collapse. One seed each.",
        "",
        f"*Transmits*: the student predicts {POINTS} points more of the bits of the other global view than "
        f"by their majority, and at most {DEAD:.0%} of the bits are dead. *Learns*: the k-NN of the teacher "
        f"is above that of the untrained network by at least {ERRORS} standard errors of the difference "
        "of two shares p and q of N queries, √((p(1-p) + q(1-q))/N); both have the same queries, so this is "
        "rather too large. Metrics of the channel are those of the last full window of steps.",
        *(["", "## Defaults", ""] if defaults else []),
        *table(
            DEFAULTS_HEAD,
            [
                [
                    keys["source"],
                    keys["change"],
                    str(f["steps"]),
                    str(f["batch_size"]),
                    f"{f['images_per_second']:.0f}",
                    f"{f['seconds']:.0f}",
                    *channel(f),
                    *shares(f, "knn", "untrained", "pixels"),
                    str(f.get("queries", "-")),
                    yes(f["transmits"]),
                    yes(f.get("learns")),
                ]
                for keys, f in defaults
            ],
        ),
        *(["", "## Start value of β", ""] if starts else []),
        *table(
            STARTS_HEAD,
            [
                [
                    keys["source"],
                    f"{keys['start']:g}",
                    *channel(f),
                    *shares(f, "knn"),
                    yes(not f["collapsed"]),
                ]
                for keys, f in starts
            ],
        ),
        *(["", "## Fixed β", "", "k-NN in percent, and bits transmitted.", ""] if fixed else []),
        *fixed_table(fixed, by_default),
        *failures(records),
    ]
    return "\n".join(lines) + "\n"


def channel(figures: dict[str, Any]) -> list[str]:
    """Five columns: bits transmitted of all, points, dead bits, entropy and β."""
    return [
        f"{figures['transmitted_bits']:.1f} of {figures['bits']}",
        f"{figures['points']:+.1f}",
        f"{100 * figures['dead_bits']:.1f}",
        f"{figures['bit_entropy']:.2f}",
        f"{figures['beta']:.2g}",
    ]


def shares(figures: dict[str, Any], *names: str) -> list[str]:
    """In percent, where there are labels."""
    return [f"{100 * figures[name]:.1f}" if name in figures else "-" for name in names]


def yes(verdict: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[verdict]


def fixed_table(
    fixed: list[tuple[dict[str, Any], dict[str, Any]]], by_default: dict[str, dict[str, Any]]
) -> list[str]:
    """A row a source: the β of the default path, and fixed ones."""
    by_source: dict[str, dict[float, dict[str, Any]]] = {}
    for keys, figures in fixed:
        by_source.setdefault(keys["source"], {})[keys["run"]["beta"]] = figures

    def text(figures: dict[str, Any] | None) -> str:
        if figures is None:
            return "-"
        return f"{shares(figures, 'knn')[0]}, {figures['transmitted_bits']:.1f}"

    def default(figures: dict[str, Any] | None) -> str:
        return text(figures) + ("" if figures is None else f" (β {figures['beta_key']})")

    return table(
        ["data", "default", *(f"{beta:g}" for beta in FIXED)],
        [
            [source, default(by_default.get(source)), *(text(figures.get(beta)) for beta in FIXED)]
            for source, figures in by_source.items()
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
